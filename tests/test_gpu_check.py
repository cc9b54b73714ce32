"""`scripts/gpu_check.sh`: dry where there is no GPU; its parts, limits and files over stand-ins for the GPU's tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastddim
from fastddim.bench import report

ROOT = Path(fastddim.__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
from gpu_check import CUT, FAILED, PASSED, SKIPPED, Task  # noqa: E402

NCU = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","ddim_step_kernel","dram__bytes.sum.per_second","Tbyte/second","3.10"
"1","ddim_step_kernel","dram__bytes.sum.per_second","Tbyte/second","4.25"
"1","ddim_step_kernel","gpu__time_duration.sum","usecond","1,234.5"
"""


def run_script(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(ROOT / "scripts" / "gpu_check.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(out)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_gpu_every_part_is_skipped_for_lack_of_one(tmp_path: Path) -> None:
    if report.environment()["gpu"] is not None:
        pytest.skip("this machine has a GPU: the dry mode is for those without")
    done = run_script(tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "gpu-check.json").read_text())
    names = [task.name for task in gpu_check.make_tasks(tmp_path)]
    assert [part["name"] for part in summary["parts"]] == names
    assert {(part["status"], part["summary"]) for part in summary["parts"]} == {(SKIPPED, gpu_check.NO_DEVICE)}
    assert done.stdout.count(gpu_check.NO_DEVICE) == len(names)
    assert all(f"| {name} | skipped |" in (tmp_path / "gpu-check.md").read_text() for name in names)
    assert len(os.listdir(tmp_path)) == 2
    # With what the parts that have one write, no more than may come back.
    assert 2 + sum(task.file is not None for task in gpu_check.make_tasks(tmp_path)) <= 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "0"], "--minutes: 0.0; pass a number above 0"),
        (["--minutes", "nine"], "--minutes"),
        (["--wheels", "nowhere"], "--wheels: 'nowhere' has no wheels"),
        (["--out", "/nowhere/at/all"], "--out: '/nowhere/at/all/gpu-check.json'"),
    ],
)
def test_bad_arguments_come_before_any_part(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu_check, "_check", lambda *_: pytest.fail("it started"))
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {**report.environment(), "gpu": {"name": "stand-in"}}
    monkeypatch.setattr(gpu_check, "_describe_machine", lambda _: machine)
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0.5)


@pytest.mark.usefixtures("on_a_gpu")
def test_each_part_is_written_as_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = tmp_path / "gpu-check.json"
    look = f"import json; print([part['status'] for part in json.load(open({str(summary)!r}))['parts']])"
    # Its child would outlive it, and hold the pipe.
    hang = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    hang += "print('so far', flush=True); time.sleep(60)"
    tasks = [
        Task("good", 30, lambda _: python("print('3 passed')")),
        Task("bad", 30, lambda _: python("print('x' * 9000); raise SystemExit('1 failed')")),
        Task("missing", 30, lambda _: pytest.fail("it ran"), lambda: "ncu is not installed"),
        Task("hanging", 3, lambda _: python(hang)),
        Task("forbidden", 30, lambda _: python("raise SystemExit('==ERROR== ERR_NVGPUCTRPERM')")),
        Task("looking", 30, lambda _: python(look)),
    ]
    monkeypatch.setattr(gpu_check, "make_tasks", lambda out: tasks)
    assert gpu_check.main(["--out", str(tmp_path), "--minutes", "1"]) == 1
    parts = {part["name"]: part for part in json.loads(summary.read_text())["parts"]}
    statuses = [part["status"] for part in parts.values()]
    assert statuses == [PASSED, FAILED, SKIPPED, CUT, SKIPPED, PASSED]
    assert parts["good"]["summary"] == "3 passed"
    assert parts["bad"]["summary"] == "1 failed"
    assert 100 < len(parts["bad"]["tail"]) <= gpu_check.TAIL_CHARACTERS
    assert parts["missing"]["summary"] == "ncu is not installed"
    assert parts["hanging"]["summary"] == "so far"
    assert 3 <= parts["hanging"]["seconds"] < 20
    assert "administrators" in parts["forbidden"]["summary"]
    assert parts["looking"]["summary"] == str(statuses[:5])


@pytest.mark.usefixtures("on_a_gpu")
def test_time_runs_out_for_what_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Task("first", 60, lambda _: python("import time; time.sleep(60)")), Task("last", 60, lambda _: python(""))]
    monkeypatch.setattr(gpu_check, "make_tasks", lambda out: tasks)
    assert gpu_check.main(["--out", str(tmp_path), "--minutes", "0.05"]) == 0
    first, last = json.loads((tmp_path / "gpu-check.json").read_text())["parts"]
    assert (first["status"], last["status"]) == (CUT, SKIPPED)
    assert "out of time" in last["summary"]


@pytest.mark.usefixtures("on_a_gpu")
def test_a_suite_without_typer_rich_and_diffusers_is_summarised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "rival-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("typer.py", "raise ImportError('typer')")
        wheel.writestr("rich.py", "raise ImportError('rich')")
    path = tmp_path / "gpu-step.json"
    path.write_text("an earlier check's")
    options = {
        "suite": "step",
        "quick": True,
        "patterns": ["size [1,4,32,32]"],
        "budget_s": 0.1,
        "json_file": str(path),
    }
    task = Task(
        "steps",
        60,
        lambda seconds: gpu_check._suite_command(options, seconds),
        read=lambda output, status: gpu_check._read_suite(path, output),
        file=path,
    )
    monkeypatch.setattr(gpu_check, "make_tasks", lambda out: [task])
    # The wheels go before what is installed.
    assert gpu_check.main(["--out", str(tmp_path), "--wheels", str(wheels)]) == 0
    (part,) = json.loads((tmp_path / "gpu-check.json").read_text())["parts"]
    assert part["status"] == PASSED, part["tail"]
    assert part["summary"] == "2 ok, 0 wrong, 0 raised, 0 out of time; gpu-step.json"
    assert {row["case"] for row in part["numbers"]["rows"]} == {"size [1,4,32,32]"}
    assert "| step: size [1,4,32,32] | fastddim.ddim_step |" in (tmp_path / "gpu-check.md").read_text()


def test_a_profile_gives_the_last_launch() -> None:
    said, numbers = gpu_check._read_ncu(NCU, 0)
    assert numbers == {
        "bytes_per_second": {"value": 4.25, "unit": "Tbyte/second"},
        "duration": {"value": 1234.5, "unit": "usecond"},
    }
    assert "4.25 Tbyte/second" in said
    assert gpu_check._read_ncu("nothing\n", 1) == ("nothing", {})


def test_every_kernel_that_the_checkers_see_runs_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "benchmarks/launch_kernels.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "launched 24 kinds of step"
