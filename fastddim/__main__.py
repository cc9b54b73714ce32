"""`python -m fastddim` is the command line."""

import sys

from fastddim.cli import main

if __name__ == "__main__":
    sys.exit(main())
