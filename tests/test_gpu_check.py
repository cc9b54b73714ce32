"""`scripts/gpu_check.sh`: dry where there is no GPU; its parts, limits and files over stand-ins for the GPU's tasks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import gpu_check
import pytest
from gpu_check import CUT, FAILED, PASSED, SKIPPED, Part

import fastddim
from fastddim.bench import report
from fastddim.bench.cases import BASELINES, Scope
from fastddim.bench.suites import select_cases

ROOT = Path(fastddim.__file__).parents[1]

NCU = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","ddim_step_kernel","dram__bytes.sum.per_second","Tbyte/second","3.10"
"1","ddim_step_kernel","dram__bytes.sum.per_second","Tbyte/second","4.25"
"1","ddim_step_kernel","gpu__time_duration.sum","usecond","1,234.5"
"""


WITHOUT_A_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


def summary(out: Path) -> dict[str, tuple[str, str]]:
    """Status and line of each part, as the summary has them."""
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| +(\d+) \| ([^|]*) \|$", (out / gpu_check.SUMMARY).read_text(), re.MULTILINE
    )
    return {name: (status, said) for name, status, _, said in rows}


def test_without_a_gpu_every_part_is_skipped_for_lack_of_one(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", str(ROOT / "scripts" / "gpu_check.sh")],
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), **WITHOUT_A_GPU},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    names = [part.name for part in gpu_check.make_parts(tmp_path)]
    assert summary(tmp_path) == dict.fromkeys(names, (SKIPPED, gpu_check.NO_DEVICE))
    assert done.stdout.count(gpu_check.NO_DEVICE) == len(names)
    assert os.listdir(tmp_path) == [gpu_check.SUMMARY]


@pytest.mark.slow
def test_a_rehearsal_runs_parts_and_names_what_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {part.name: part for part in gpu_check.make_parts(tmp_path)}
    tests = parts["gpu-marked tests"]
    files = [f"tests/test_{name}.py" for name in ("cuda_graph", "export_aoti")]
    tests.command = [*(each for each in tests.command if not each.endswith(".py")), *files]
    options = {"suite": "step", "baselines": gpu_check.FEW}
    profile, checker = parts["ncu on the step kernel"], parts["compute-sanitizer memcheck"]
    # Not every kind.
    checker.command = [*checker.command, "--elements", str(1 << 14)]
    chosen = [
        tests,
        checker,
        profile,
        gpu_check.suite("steps", 60, tmp_path / "steps.json", patterns=["in place", "size [4,*"], **options),
        gpu_check.suite("lost", 60, tmp_path / "lost.json", patterns=["in place", "sizes [*"], **options),
        Part("mistyped", 60, [each.replace("--metrics", "--metric") for each in profile.command], "ncu"),
        Part("misplaced", 60, [each.replace("launch_", "") for each in profile.command], "ncu"),
    ]
    monkeypatch.setattr(gpu_check, "make_parts", lambda out: chosen)
    assert gpu_check.main(["--rehearse", "--out", str(tmp_path)]) == 1
    found = summary(tmp_path)
    failed = {name for name, (status, _) in found.items() if status == FAILED}
    assert failed == {"lost", "mistyped", "misplaced"} and {status for status, _ in found.values()} == {PASSED, FAILED}
    assert "2 passed, 2 skipped" in found["gpu-marked tests"][1] and found["steps"][1].startswith("6 ok, 15 absent")
    said = capsys.readouterr().out
    assert "AOTInductor's code for a GPU" in said
    assert "not rehearsed: step, fastddim.ddim_step, left out by --quick: size [4,4,128,128], size" in said


@pytest.mark.slow
def test_the_whole_check_is_rehearsed(tmp_path: Path) -> None:
    assert gpu_check.main(["--rehearse", "--out", str(tmp_path)]) == 0
    assert {status for status, _ in summary(tmp_path).values()} == {PASSED}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "0"], "--minutes: 0.0; pass a number above 0"),
        (["--minutes", "nine"], "--minutes"),
        (["--wheels", "nowhere"], "--wheels: 'nowhere' has no wheels"),
        (["--wheels", "broken"], "broken/a.whl' cannot be unpacked (File is not a zip file)"),
        (["--out", "/nowhere/at/all"], "--out: '/nowhere/at/all/gpu-check.md'"),
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
    monkeypatch.setattr(gpu_check, "check", lambda *_: pytest.fail("it started"))
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
    monkeypatch.setattr(gpu_check, "describe_machine", lambda _: machine)
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0.5)


@pytest.fixture
def check(tmp_path: Path, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the given parts."""

    def run(*parts: Part, arguments: Sequence[str] = ()) -> int:
        monkeypatch.setattr(gpu_check, "make_parts", lambda out: list(parts))
        return gpu_check.main(["--out", str(tmp_path), *arguments])

    return run


HANG = "import time; time.sleep(600)"


@pytest.fixture
def hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The end of a part's code: its limit is over when it comes here, on a clock that else stands still."""
    here = tmp_path / "hangs"
    clock = SimpleNamespace(now=0.0)

    class Process(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if str(here) not in str(self.args[-1]) or here.exists():
                return super().wait(timeout)
            while not here.exists():
                assert self.poll() is None
                time.sleep(0.02)
            clock.now += timeout
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(subprocess, "Popen", Process)
    return f"open({str(here)!r}, 'w').close(); {HANG}"


def test_each_part_is_written_as_it_ends(tmp_path: Path, check: Callable[..., int], hang: str) -> None:
    # Its child would outlive it, and hold the pipe.
    hang = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {HANG!r}]); print('so far', flush=True); {hang}"
    forbidden = python("print('==ERROR== ERR_NVGPUCTRPERM')")
    status = check(
        Part("good", 300, python("print('3 passed')")),
        Part("bad", 300, python("print('x' * 9000); raise SystemExit('1 failed')")),
        Part("missing", 300, python("raise SystemExit('it ran')"), tool="no-such-tool"),
        Part("hanging", 6, python(hang)),
        # Any program that is there stands for the tool.
        Part("forbidden", 300, forbidden, tool="sh", read=gpu_check.read_metrics),
        Part("no program", 300, [str(tmp_path)]),
        Part("odd", 300, python("print('pass')"), read=lambda output: {}["pass"]),
        Part("looking", 300, python(f"print(open({str(tmp_path / gpu_check.SUMMARY)!r}).read().count('| passed |'))")),
    )
    assert status == 1
    assert summary(tmp_path) == {
        "good": (PASSED, "3 passed"),
        "bad": (FAILED, "1 failed"),
        "missing": (SKIPPED, "no-such-tool is not installed"),
        "hanging": (CUT, "so far"),
        "forbidden": (SKIPPED, "the driver gives performance counters to administrators only"),
        "no program": (FAILED, f"it could not be started: [Errno 13] Permission denied: '{tmp_path}'"),
        "odd": (FAILED, "its results cannot be read: KeyError: 'pass'"),
        "looking": (PASSED, "1"),
    }
    # The end of what a part printed that did not pass.
    (tail,) = re.findall(r"^x+$", (tmp_path / gpu_check.SUMMARY).read_text(), re.MULTILINE)
    assert 100 < len(tail) <= gpu_check.TAIL_CHARACTERS


def test_what_a_part_leaves_behind_cannot_hold_up_the_check(
    tmp_path: Path, check: Callable[..., int], hang: str
) -> None:
    # In a session of its own a process outlives the group, with the output still open.
    daemon = (
        f"import subprocess, sys; left = subprocess.Popen([sys.executable, '-c', {HANG!r}], start_new_session=True);"
    )
    daemon += f"print(left.pid, flush=True); {hang}"
    assert check(Part("daemon", 6, python(daemon)), Part("last", 300, python("print('done')"))) == 0
    found = summary(tmp_path)
    assert found["daemon"][0] == CUT and found["last"] == (PASSED, "done")
    # It still runs: nobody waited for it.
    os.kill(int(found["daemon"][1]), signal.SIGKILL)


STOPPED = """
import sys
import gpu_check
from gpu_check import Part
from fastddim.bench import report
gpu_check.describe_machine = lambda _: {**report.environment(), "gpu": {"name": "stand-in"}}
hang = "import os, sys, time; print(os.getpid(), flush=True); open(sys.argv[1], 'w').close(); time.sleep(600)"
gpu_check.make_parts = lambda out: [
    Part("first", 300, [sys.executable, "-c", "print('1 passed')"]),
    Part("second", 300, [sys.executable, "-c", hang, str(out / "started")]),
    Part("third", 300, [sys.executable, "-c", ""]),
]
gpu_check.stop_when_told()
gpu_check.main(["--out", sys.argv[1]])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_check_that_is_stopped_keeps_the_part_under_way_and_ends_it(tmp_path: Path, number: int) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    check = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)], env=environment, stdout=subprocess.DEVNULL)
    while not (tmp_path / "started").exists():
        assert check.poll() is None
        time.sleep(0.05)
    check.send_signal(number)
    assert check.wait() == 128 + number
    found = summary(tmp_path)
    assert {name: status for name, (status, _) in found.items()} == {"first": PASSED, "second": CUT}
    with pytest.raises(ProcessLookupError):
        os.kill(int(found["second"][1]), 0)


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
        part = Part("tests", 300, [])
        gpu_check.judge(part, done.stdout, done.returncode)
        assert said in part.summary
        if skips == "1":
            (line,) = part.details
            assert "test_lacking.py" in line and "no_such_package is not installed" in line


def test_files_of_which_none_can_be_imported_have_not_passed() -> None:
    part = Part("tests", 300, [])
    gpu_check.judge(
        part, "SKIPPED [1] tests/test_kernels.py:0: hypothesis is not installed\n= 1 skipped in 0.1s =\n", 5
    )
    assert (part.status, part.summary) == (SKIPPED, "1 skipped in 0.1s")


def test_time_runs_out_for_what_comes_last(tmp_path: Path, check: Callable[..., int], hang: str) -> None:
    parts = Part("first", 60, python(hang)), Part("last", 60, python(""))
    assert check(*parts, arguments=["--minutes", "0.05"]) == 0
    assert summary(tmp_path) == {"first": (CUT, "no output"), "last": (SKIPPED, "out of time: 0.05 minutes")}


@pytest.mark.slow
def test_a_suite_without_typer_rich_and_diffusers_is_summarised(tmp_path: Path, check: Callable[..., int]) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "rival-1-py3-none-any.whl", "w") as wheel:
        for name in ("typer", "rich", "diffusers"):
            wheel.writestr(f"{name}.py", f"raise ImportError({name!r})")
    path = tmp_path / "gpu-step.json"
    path.write_text("an earlier check's")
    options = {"quick": True, "patterns": ["in place [1,4,16,16]"], "budget_s": 0.1, "baselines": ["eager"]}
    part = gpu_check.suite("steps", 300, path, "cpu", suite="step", **options)
    # The wheels go before what is installed.
    assert check(part, arguments=["--wheels", str(wheels)]) == 0
    assert summary(tmp_path) == {"steps": (PASSED, "1 ok, 1 absent; gpu-step.json")}
    assert (
        "| step: in place [1,4,16,16] | fastddim.ddim_step(out=sample) |" in (tmp_path / gpu_check.SUMMARY).read_text()
    )


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
    said = gpu_check.read_metrics(NCU)
    assert said == "dram__bytes.sum.per_second 4.25 Tbyte/second, gpu__time_duration.sum 1,234.5 usecond"
    with pytest.raises(ValueError, match=r"no metrics of a step: .*No kernels were"):
        gpu_check.read_metrics("==WARNING== No kernels were profiled.\n")


def test_the_profiler_finds_the_kernel_and_leaves_the_clocks_alone(tmp_path: Path) -> None:
    (command,) = (part.command for part in gpu_check.make_parts(tmp_path) if part.tool == "ncu")
    assert command[command.index("--clock-control") + 1] == "none"
    source = (ROOT / "fastddim" / "kernels" / "step.py").read_text()
    pattern = command[command.index("--kernel-name") + 1].removeprefix("regex:")
    assert [name for name in re.findall(r"^def (\w+)\(", source, re.MULTILINE) if re.search(pattern, name)] == [
        "ddim_step_kernel"
    ]


@pytest.mark.parametrize("sign", gpu_check.REFUSALS)
def test_a_tool_that_may_not_work_here_is_skipped(sign: str) -> None:
    part = Part("checker", 300, [], tool="compute-sanitizer")
    gpu_check.judge(part, f"========= Error: {sign}\n", 1)
    assert (part.status, part.summary) == (SKIPPED, gpu_check.REFUSALS[sign])
    part = Part("checker", 300, [], tool="compute-sanitizer")
    gpu_check.judge(part, "launched\n========= ERROR SUMMARY: 0 errors\n", 0)
    assert (part.status, part.summary) == (PASSED, "ERROR SUMMARY: 0 errors")


@pytest.mark.slow
def test_every_kernel_that_the_checkers_see_runs_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "benchmarks/launch_kernels.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "launched 36 kinds of step"
