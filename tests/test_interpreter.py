"""What the kernels have for Triton's interpreter alone: products and sums rounded once, conversions to bfloat16, no waiting."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHOSEN = "every_pair_of_dtypes and clip and state2 and model2 or drawn_noise_is or dependent_launch"


def test_the_interpreter_gives_the_oracles_results_too():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_kernels.py", "-k", CHOSEN]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
