"""`python -m fastddim.bench` is `fastddim bench`."""

import sys

from fastddim.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
