"""diffusers' own tests of its DDIM schedulers, with ours in their place.

    python scripts/diffusers_tests.py CHECKOUT [pytest arguments]

CHECKOUT is a folder with diffusers' `tests/`, best of the version that is installed (`git clone --branch v0.42.1 ...`); nothing
of it is changed or copied. The file is the plugin of that pytest too, which replaces the classes before a test imports them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

SCHEDULER_TESTS = ("schedulers/test_scheduler_ddim.py", "schedulers/test_scheduler_ddim_inverse.py")


def replace_schedulers() -> None:
    """Make `diffusers.DDIMScheduler` and `diffusers.DDIMInverseScheduler` fastddim's."""
    import diffusers.schedulers

    import fastddim

    for name in ("DDIMScheduler", "DDIMInverseScheduler"):
        for module in (diffusers, diffusers.schedulers):
            setattr(module, name, getattr(fastddim, name))


def pytest_report_header() -> str:
    """What pytest says first: whose classes the tests are of."""
    import diffusers

    return f"diffusers.DDIMScheduler: {diffusers.DDIMScheduler.__module__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a folder with diffusers' tests/")
    options, rest = parser.parse_known_args()
    tests = options.checkout.resolve() / "tests"
    missing = [name for name in SCHEDULER_TESTS if not (tests / name).is_file()]
    if missing:
        parser.error(f"checkout: {tests / missing[0]} is missing; pass the root of a checkout of diffusers")
    here = Path(__file__).resolve()
    paths = [str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "pytest", "-p", here.stem, "--rootdir", str(tests.parent), "-c", os.devnull]
    return subprocess.run(
        [*command, *(str(tests / name) for name in SCHEDULER_TESTS), *rest], env=environment
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
else:
    replace_schedulers()
