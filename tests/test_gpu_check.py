"""`scripts/gpu_check.sh`: dry where there is no GPU; its parts, limits and files over stand-ins for the GPU's tasks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import fastddim
from fastddim.bench import report
from fastddim.bench.cases import BASELINES, Scope
from fastddim.bench.suites import select_cases

ROOT = Path(fastddim.__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
from gpu_check import CUT, FAILED, PASSED, SKIPPED, RefusedError, Task  # noqa: E402

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
        (["--wheels", "broken"], "broken/a.whl' cannot be unpacked (File is not a zip file)"),
        (["--out", "/nowhere/at/all"], "--out: '/nowhere/at/all/gpu-check.json'"),
    ],
)
def test_bad_arguments_come_before_any_part(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.whl").write_text("no zip")
    out.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(gpu_check, "_check", lambda *_: pytest.fail("it started"))
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert os.listdir(out) == []


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
        Task("forbidden", 30, lambda _: python("print('==ERROR== ERR_NVGPUCTRPERM')"), read=gpu_check._read_ncu),
        Task("no program", 30, lambda _: [str(tmp_path)]),
        Task("odd", 30, lambda _: python("print('pass')"), read=lambda output, status: {}["pass"]),
        Task("looking", 30, lambda _: python(look)),
    ]
    monkeypatch.setattr(gpu_check, "make_tasks", lambda out: tasks)
    assert gpu_check.main(["--out", str(tmp_path), "--minutes", "1"]) == 1
    parts = {part["name"]: part for part in json.loads(summary.read_text())["parts"]}
    statuses = [part["status"] for part in parts.values()]
    assert statuses == [PASSED, FAILED, SKIPPED, CUT, SKIPPED, FAILED, FAILED, PASSED]
    assert parts["good"]["summary"] == "3 passed"
    assert parts["bad"]["summary"] == "1 failed"
    assert 100 < len(parts["bad"]["tail"]) <= gpu_check.TAIL_CHARACTERS
    assert parts["missing"]["summary"] == "ncu is not installed"
    assert parts["hanging"]["summary"] == "so far"
    assert 3 <= parts["hanging"]["seconds"] < 20
    assert "administrators" in parts["forbidden"]["summary"]
    assert "could not be started: [Errno 13] Permission denied" in parts["no program"]["summary"]
    assert parts["odd"]["summary"] == "its results cannot be read: KeyError: 'pass'"
    assert parts["looking"]["summary"] == str(statuses[:-1])


@pytest.mark.usefixtures("on_a_gpu")
def test_what_a_part_leaves_behind_cannot_hold_up_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a session of its own a process outlives the group, with the output still open.
    daemon = "import os, subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', 'import time;"
    daemon += "time.sleep(60)'], start_new_session=True).pid, flush=True); time.sleep(60)"
    tasks = [Task("daemon", 2, lambda _: python(daemon)), Task("last", 30, lambda _: python("print('done')"))]
    monkeypatch.setattr(gpu_check, "make_tasks", lambda out: tasks)
    start = time.monotonic()
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    assert time.monotonic() - start < 20
    first, last = json.loads((tmp_path / "gpu-check.json").read_text())["parts"]
    assert (first["status"], last["status"], last["summary"]) == (CUT, PASSED, "done")
    os.kill(int(first["summary"]), signal.SIGKILL)


STOPPED = """
import signal, sys
import gpu_check
from gpu_check import Task
from fastddim.bench import report
gpu_check._describe_machine = lambda _: {**report.environment(), "gpu": {"name": "stand-in"}}
hang = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
gpu_check.make_tasks = lambda out: [
    Task("first", 30, lambda _: [sys.executable, "-c", "print('1 passed')"]),
    Task("second", 30, lambda _: [sys.executable, "-c", hang]),
    Task("third", 30, lambda _: [sys.executable, "-c", ""]),
]
gpu_check.stop_when_told()
gpu_check.main(["--out", sys.argv[1]])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_check_that_is_stopped_keeps_the_part_under_way_and_ends_it(tmp_path: Path, number: int) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    check = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert check.stdout is not None
    assert "1 passed" in check.stdout.readline()
    time.sleep(2)
    check.send_signal(number)
    assert check.wait(30) == 128 + number
    parts = json.loads((tmp_path / "gpu-check.json").read_text())["parts"]
    assert [(part["name"], part["status"]) for part in parts] == [("first", PASSED), ("second", CUT)]
    with pytest.raises(ProcessLookupError):
        os.kill(int(parts[1]["summary"]), 0)


def test_results_outside_of_a_checkout_have_the_commit_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDIM_COMMIT", "0123abc")
    assert report.environment()["commit"] != "0123abc"
    monkeypatch.setattr(report, "_git", lambda *_: None)
    assert report.environment()["commit"] == "0123abc"


def test_a_file_that_imports_what_is_missing_is_named_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_lacking.py").write_text("import no_such_package\n\ndef test_it(): pass\n")
    (tmp_path / "test_whole.py").write_text("def test_it(): pass\n")
    for skips, status, said in (("1", 0, "1 passed, 1 skipped"), ("0", 2, "1 error")):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-ra",
                "-q",
                "-p",
                "no:cacheprovider",
                "--rootdir",
                str(tmp_path),
                str(tmp_path),
            ],
            env={**os.environ, "FASTDDIM_SKIP_MISSING": skips},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert (done.returncode, said in done.stdout) == (status, True), done.stdout
        summary, numbers = gpu_check._read_tests(done.stdout, done.returncode)
        assert said in summary
        if skips == "1":
            (line,) = numbers["skipped"]
            assert "test_lacking.py" in line and "no_such_package is not installed" in line


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


def test_parts_choose_the_cases_that_they_mean() -> None:
    scope = Scope(device="cuda")
    usual = [case.name for case in select_cases("loop", scope, gpu_check.USUAL)]
    assert usual == [
        "policy [1,16,7] x10", "digits [1,1,16,16] x20", "cifar10 [1,3,32,32] x20", "lsun256 [1,3,256,256] x20",
        "sd15 [1,4,64,64] x20", "sdxl [1,4,128,128] x20",
    ]  # fmt: skip
    sizes, options = (
        {case.name for case in select_cases("step", scope, patterns)} for patterns in (["size*"], gpu_check.OPTIONS)
    )
    assert sizes | options == {case.name for case in select_cases("step", scope)} and not sizes & options
    chosen = select_cases("all", scope, (*gpu_check.USUAL, *gpu_check.COMPILED_STEPS), gpu_check.COMPILED)
    names = [case.name for case in chosen if case.suite == "loop"]
    assert names == usual
    assert [case.name for case in chosen if case.suite == "step"] == [
        "default [1,4,64,64]", "default [8,3,256,256]", "threshold [8,3,256,256]", "threshold [16,3,64,64]",
    ]  # fmt: skip
    assert "digits [1,1,16,16] x20" in [case.name for case in chosen if case.suite == "export"]
    baselines = {each.baseline for case in chosen for each in case.candidates}
    assert baselines == {None, *gpu_check.COMPILED}
    assert {*gpu_check.FEW, *gpu_check.COMPILED} == {*BASELINES} - {"onnxruntime", "import"}


def test_a_profile_gives_the_last_launch() -> None:
    said, numbers = gpu_check._read_ncu(NCU, 0)
    assert numbers == {
        "bytes_per_second": {"value": 4.25, "unit": "Tbyte/second"},
        "duration": {"value": 1234.5, "unit": "usecond"},
    }
    assert "4.25 Tbyte/second" in said
    assert gpu_check._read_ncu("nothing\n", 1) == ("nothing", {})
    with pytest.raises(ValueError, match=r"no metrics of a step in .*No kernels were"):
        gpu_check._read_ncu("==WARNING== No kernels were profiled.\n", 0)


def test_the_profiler_finds_the_kernel_and_leaves_the_clocks_alone() -> None:
    command = gpu_check._ncu_command(30)
    assert command[command.index("--clock-control") + 1] == "none"
    source = (ROOT / "fastddim" / "kernels" / "step.py").read_text()
    pattern = command[command.index("--kernel-name") + 1].removeprefix("regex:")
    assert [name for name in re.findall(r"^def (\w+)\(", source, re.MULTILINE) if re.search(pattern, name)] == [
        "ddim_step_kernel"
    ]


@pytest.mark.parametrize("sign", gpu_check.REFUSALS)
def test_a_tool_that_may_not_work_here_is_skipped(sign: str) -> None:
    for read in (gpu_check._read_ncu, gpu_check._read_checker):
        with pytest.raises(RefusedError, match=gpu_check.REFUSALS[sign]):
            read(f"========= Error: {sign}\n", 1)
    summary = "========= ERROR SUMMARY: 0 errors"
    assert gpu_check._read_checker(f"launched\n{summary}\n", 0) == (summary, {})


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
    assert done.stdout.strip() == "launched 36 kinds of step"
