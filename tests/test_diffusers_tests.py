"""`scripts/diffusers_tests.py`, on a stand-in for a checkout of diffusers."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "diffusers_tests.py"
TEST = """
import diffusers
from diffusers.schedulers import {name} as again

def test_it_is_ours():
    assert diffusers.{name}.__module__ == again.__module__ == "fastddim.scheduler"

def test_it_fails():
    assert False
"""


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_tests_see_our_classes_and_their_failures_are_passed_on(tmp_path):
    folder = tmp_path / "tests" / "schedulers"
    folder.mkdir(parents=True)
    for name, kind in (("ddim", "DDIMScheduler"), ("ddim_inverse", "DDIMInverseScheduler")):
        (folder / f"test_scheduler_{name}.py").write_text(TEST.format(name=kind))
    done = run(tmp_path, "-k", "ours")
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
    assert "diffusers.DDIMScheduler: fastddim.scheduler" in done.stdout
    assert run(tmp_path).returncode == 1


def test_another_folder_is_refused(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2 and "checkout: " in done.stderr and "pass the root of a checkout" in done.stderr
