"""The kernels compiled for real, in processes without Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def check_budget(folder, *options):
    file = folder / "figures.json"
    done = run("kernel_budget.py", "--json", file, *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads(file.read_text())["figures"]
    assert {figure["target"] for figure in figures} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert not any(figure["spills"] for figure in figures)
    return figures


def test_the_kernels_keep_their_budget_on_every_target(tmp_path):
    figures = check_budget(tmp_path, "--quick")
    instructions = {figure["case"]: figure["instructions"] for figure in figures if figure["target"] == "sm_90"}
    assert instructions["guidance + clip"] <= 12
    assert instructions["guidance + clip + drawn noise, fp32"] <= 70


@pytest.mark.slow
def test_every_variant_keeps_its_budget(tmp_path):
    assert len(check_budget(tmp_path)) >= 200


def test_a_variant_over_budget_is_an_error(tmp_path):
    """The check can fail."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import kernel_budget as k;"
        "f = k.Figure('guidance + clip', 'ddim_step_kernel', 'sm_90', 2048, 2, 12.5, 99, 8, 31, 32);"
        "kept = {'guidance + clip: ddim_step_kernel: sm_90': {'instructions': 12.0, 'registers': 80}};"
        "print(*k.check([f], kept), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT / "benchmarks")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    for line, end in zip(
        lines,
        (
            "8 bytes spilled; 0 asked",
            "31 accesses of full width; 32 asked",
            "12.5 instructions an element; at most 12 asked",
            "12.5 instructions, 12.0 before; mend it, or run with --update and say why",
            "99 registers, 80 before; mend it, or run with --update and say why",
        ),
        strict=True,
    ):
        assert line == f"guidance + clip: ddim_step_kernel: sm_90: {end}"


def test_a_prepared_step_costs_little_more_than_the_drivers_own_launch(tmp_path):
    """Triton's own launcher over a stub of the CUDA driver. The bar is 2 us; noisy machines get room, and the ratio."""
    file = tmp_path / "launch.json"
    done = run("launch_cost.py", "--rounds", 7, "--json", file)
    assert done.returncode == 0, done.stderr[-3000:]
    medians = {name: figure["median_us"] for name, figure in json.loads(file.read_text())["figures"].items()}
    driver = next(median for name, median in medians.items() if name.startswith("driver"))
    prepared = next(median for name, median in medians.items() if name.startswith("PreparedStep"))
    assert prepared - driver < 4
    assert prepared < medians["plain Triton launch"] / 3
