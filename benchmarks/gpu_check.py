"""Everything that needs a GPU, in order of importance and within a time: tests, checkers, a profile, step and loop suites.

    sh scripts/gpu_check.sh [--minutes 9] [--wheels DIR] [--out DIR]

Writes gpu-check.json and gpu-check.md, rewritten as each part ends, and the suites' own gpu-*.json. The status is 1 if a
part failed. Needs torch, triton, numpy and pytest; diffusers, of which most baselines are, comes from a folder of wheels.
Test files that import something else which is missing are named and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from fastddim.bench import report
from fastddim.bench.run import OUT_OF_TIME
from fastddim.bench.timing import FAILURES, OK, Row
from fastddim.files import check_writable, write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUMMARY, TABLE = "gpu-check.json", "gpu-check.md"
NO_DEVICE = "no GPU on this machine"
SUMMARY_CHARACTERS, TAIL_CHARACTERS = 300, 4000
# A part is not started with less.
LEAST_SECONDS = 15
# For what a killed part leaves behind to end.
GRACE_SECONDS = 10
MACHINE_SECONDS = 120

PASSED, FAILED, SKIPPED, CUT = "passed", "failed", "skipped", "cut off"

KERNELS = "benchmarks/launch_kernels.py"
NCU_METRICS = {
    "dram__bytes.sum.per_second": "bytes_per_second",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "percent_of_peak",
    "gpu__time_duration.sum": "duration",
}
# Of each network the usual run.
USUAL = ("policy [1,*x10", "[1,1,16,16] x20", "cifar10 [1,*x20", "sd15 [1,*x20", "sdxl [1,*x20", "lsun256 [1,*x20")
OPTIONS = ("default", "threshold", "v_prediction", "eta 1", "no limit", "guidance", "rescale", "all", "in place")
FEW = ("diffusers", "cuda-graph", "eager")
# What tools say where the machine does not let them work.
REFUSALS = {
    "ERR_NVGPUCTRPERM": "the driver gives performance counters to administrators only",
    "LibraryNotLoaded": "the profiler cannot reach the driver's counters",
    "Device not supported": "the checker does not support this machine's device",
}
COMPILED_STEPS = ("default [*", "threshold [*")
COMPILED = (
    "compile-reduce-overhead",
    "compile-step",
    "compile-max-autotune",
    "torch-tensorrt",
    "tensorrt",
    "aotinductor",
)


class RefusedError(Exception):
    """A tool says that this machine does not let it work."""


@dataclass
class Part:
    """One part of the check.

    Attributes:
        name: as the table has it.
        seconds: it may take at most, and did take.
        status: `passed`, `failed`, `skipped`, or `cut off` at its limit, with what it had by then.
        summary: in a line.
        tail: the end of its output, of one that failed.
        numbers: what it measured.
    """

    name: str
    limit_s: float
    status: str = SKIPPED
    summary: str = ""
    seconds: float = 0.0
    tail: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """How a part is run: a command, what it needs besides a GPU, and what its output says.

    Attributes:
        needs: says what is missing; None if nothing.
        read: from output and exit status, None if cut off, to a summary and numbers; or raises `RefusedError`.
        file: a suite's results.
        variables: of the environment, besides the others.
    """

    name: str
    limit_s: float
    command: Callable[[float], list[str]]
    needs: Callable[[], str | None] = lambda: None
    read: Callable[[str, int | None], tuple[str, dict[str, Any]]] = lambda output, status: (_last_line(output), {})
    file: Path | None = None
    variables: dict[str, str] = field(default_factory=dict)


def make_tasks(out: Path) -> list[Task]:
    """The parts, the most important first."""
    python = sys.executable

    def tests(name: str, limit_s: float, *arguments: str) -> Task:
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *arguments]
        return Task(name, limit_s, lambda _: command, read=_read_tests, variables={"FASTDDIM_SKIP_MISSING": "1"})

    def sanitizer(tool: str, *arguments: str) -> Task:
        return Task(
            f"compute-sanitizer {tool}",
            60,
            lambda _: ["compute-sanitizer", "--tool", tool, *arguments, "--error-exitcode", "1", python, KERNELS],
            lambda: _program("compute-sanitizer"),
            _read_checker,
            # Out of one tensor's bounds is out of an allocation's.
            variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )

    def suite(name: str, file: str, limit_s: float, **options: Any) -> Task:
        path = out / file
        return Task(
            name,
            limit_s,
            lambda seconds: _suite_command({**options, "device": "cuda", "json_file": str(path)}, seconds),
            read=lambda output, status: _read_suite(path, output),
            file=path,
        )

    # The kernels' tests are compilation for the most part.
    several = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    return [
        tests("gpu-marked tests", 120, "-vv", "-m", "gpu", *_files_with_gpu_marks()),
        tests("kernel tests", 90, *several, "tests/test_kernels.py"),
        # Compiled here, the kernels are in Triton's cache for what follows.
        Task("kernels launched", 60, lambda _: [python, KERNELS]),
        # torch and Triton ask the driver for functions that it may not have, which is no error of theirs.
        sanitizer("memcheck", "--report-api-errors", "no"),
        sanitizer("racecheck"),
        Task("ncu on the step kernel", 45, _ncu_command, lambda: _program("ncu"), _read_ncu),
        suite("step suite, sizes", "gpu-step.json", 75, suite="step", patterns=["size*"], baselines=FEW, budget_s=0.5),
        suite("step suite, options", "gpu-step-options.json", 45, suite="step", patterns=OPTIONS, baselines=FEW,
              budget_s=0.5),
        suite("loop suite, usual runs", "gpu-loop.json", 120, suite="loop", patterns=USUAL, baselines=FEW, budget_s=1.0),
        # Of all suites: the compiled step too, and the exported files.
        suite("compiled and exported", "gpu-compiled.json", 240, suite="all", patterns=(*USUAL, *COMPILED_STEPS),
              baselines=COMPILED, budget_s=1.0),
        tests("loop and graph tests", 90, "tests/test_cuda_graph.py", "tests/test_loop.py"),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together; 9 by default")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels to use, such as diffusers'")
    default = Path(os.environ.get("OUT") or RESULTS)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=default, help="$OUT or benchmarks/results by default"
    )
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes: {options.minutes}; pass a number above 0")
    if options.wheels is not None and not any(options.wheels.glob("*.whl")):
        parser.error(f"--wheels: {str(options.wheels)!r} has no wheels; pass a folder of .whl files")
    try:
        for name in (SUMMARY, TABLE):
            check_writable(options.out / name, "--out")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as site:
        if options.wheels is not None:
            for wheel in sorted(options.wheels.glob("*.whl")):
                try:
                    zipfile.ZipFile(wheel).extractall(site)
                except (OSError, zipfile.BadZipFile) as error:
                    parser.error(f"--wheels: {str(wheel)!r} cannot be unpacked ({error}); fetch it again")
        return _check(options.out, options.minutes, site if options.wheels else None)


def _check(out: Path, minutes: float, site: str | None) -> int:
    path = os.pathsep.join(filter(None, (str(ROOT), site, os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment.pop("OMP_NUM_THREADS", None)
    end = time.monotonic() + 60 * minutes
    machine = _describe_machine(environment)
    summary = {
        "format": "gpu-check 1",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "minutes": minutes,
        "environment": machine,
        "parts": [],
    }
    parts: list[Part] = []
    for task in make_tasks(out):
        part = Part(task.name, min(task.limit_s, end - time.monotonic()))
        missing = NO_DEVICE if machine["gpu"] is None else task.needs()
        if missing is None and part.limit_s < LEAST_SECONDS:
            missing = f"out of time: {minutes:g} minutes"
        parts.append(part)
        try:
            if missing is not None:
                part.summary = missing
            else:
                _run(task, part, environment)
        finally:
            # Whatever ends this process, what the part has so far is kept.
            _write(out, {**summary, "parts": [asdict(each) for each in parts]}, parts)
            print(f"{part.status:<8} {part.name}: {part.summary} ({part.seconds:.0f} s)", flush=True)
    return int(any(part.status == FAILED for part in parts))


def _describe_machine(environment: dict[str, str]) -> dict[str, Any]:
    """`report.environment()` of another process: in this one it would leave a context on the GPU."""
    code = "import json; from fastddim.bench.report import environment; print(json.dumps(environment()))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=MACHINE_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"error: torch did not find out about the GPU in {MACHINE_SECONDS} seconds") from error
    if done.returncode:
        raise SystemExit(f"error: torch or fastddim cannot be imported: {_last_line(done.stderr)}")
    known: dict[str, Any] = json.loads(_last_line(done.stdout))
    return known


def _run(task: Task, part: Part, environment: dict[str, str]) -> None:
    if task.file is not None:
        # What an earlier check left is not this one's.
        task.file.unlink(missing_ok=True)
    start = time.monotonic()
    status = None
    # No pipe, which what a killed part leaves behind would hold open.
    with tempfile.TemporaryFile() as log:
        try:
            status = _call(task.command(part.limit_s), {**environment, **task.variables}, log, part.limit_s)
        except OSError as error:
            log.write(f"it could not be started: {error}".encode())
            status = 127
        finally:
            part.seconds = time.monotonic() - start
            log.seek(0)
            _judge(task, part, log.read().decode(errors="replace"), status)


def _call(command: list[str], environment: dict[str, str], log: IO[bytes], limit_s: float) -> int | None:
    """The exit status of a command; None if it had to be killed at its limit, or because this process ends."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # The checkers have children of their own, and one that waits for a lost device does not end.
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(GRACE_SECONDS)


def _judge(task: Task, part: Part, output: str, status: int | None) -> None:
    # pytest's 5: no test was chosen.
    part.status = CUT if status is None else PASSED if status in (0, 5) else FAILED
    try:
        part.summary, part.numbers = task.read(output, status)
    except RefusedError as error:
        part.status, part.summary = SKIPPED, str(error)
    except Exception as error:
        # One part's odd output must not cost the others.
        part.status = CUT if status is None else FAILED
        part.summary = f"its results cannot be read: {type(error).__name__}: {error}"
    part.summary = part.summary[:SUMMARY_CHARACTERS]
    if part.status != PASSED:
        part.tail = output[-TAIL_CHARACTERS:]


def _suite_command(options: dict[str, Any], seconds: float) -> list[str]:
    """Run a suite, which stops by itself a little before it would be cut off."""
    code = (
        "import json, sys; from fastddim.bench.run import has_failed, run_suite;"
        "sys.exit(has_failed(run_suite(**json.loads(sys.argv[1]))))"
    )
    return [sys.executable, "-c", code, json.dumps({**options, "minutes": 0.75 * seconds / 60})]


def _read_suite(path: Path, output: str) -> tuple[str, dict[str, Any]]:
    if not path.exists():
        return _last_line(output), {}
    rows = report.rows_of(json.loads(path.read_text()))
    counts = {status: sum(row.status == status for row in rows) for status in (OK, *FAILURES)}
    counts["out of time"] = sum(row.message == OUT_OF_TIME for row in rows)
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{said}; {path.name}", {"rows": [_brief(row) for row in rows if row.status == OK]}


def _brief(row: Row) -> dict[str, Any]:
    return {
        "case": row.case, "candidate": row.candidate, "median_s": row.median_s, "ratio": row.ratio, "of_copy": row.of_copy,
    }  # fmt: skip


def _read_tests(output: str, status: int | None) -> tuple[str, dict[str, Any]]:
    """The counts, and which tests and files were skipped for what reason."""
    skipped = [line for line in output.splitlines() if line.startswith("SKIPPED")]
    return _last_line(output).strip("= "), {"skipped": skipped} if skipped else {}


def _read_checker(output: str, status: int | None) -> tuple[str, dict[str, Any]]:
    _check_refusal(output)
    return _last_line(output), {}


def _ncu_command(_: float) -> list[str]:
    metrics = ",".join(NCU_METRICS)
    profiled = [sys.executable, KERNELS, "--elements", str(1 << 26)]
    # The clocks are the machine owner's, and what users run at.
    options = ["--clock-control", "none", "--kernel-name", "regex:ddim_step", "--metrics", metrics]
    return ["ncu", "--csv", *options, *profiled]


def _read_ncu(output: str, status: int | None) -> tuple[str, dict[str, Any]]:
    """The last launch's metrics: the first ones also fill caches."""
    _check_refusal(output)
    table = [line for line in output.splitlines() if line.startswith('"')]
    numbers: dict[str, Any] = {}
    for row in csv.DictReader(table):
        name = NCU_METRICS.get(row.get("Metric Name", ""))
        if name:
            numbers[name] = {"value": float(row["Metric Value"].replace(",", "")), "unit": row["Metric Unit"]}
    if not numbers and status == 0:
        raise ValueError(f"no metrics of a step in {_last_line(output)!r}")
    said = ", ".join(f"{name} {each['value']:.4g} {each['unit']}" for name, each in numbers.items())
    return said or _last_line(output), numbers


def _check_refusal(output: str) -> None:
    for sign, reason in REFUSALS.items():
        if sign in output:
            raise RefusedError(reason)


def _program(name: str) -> str | None:
    return None if shutil.which(name) else f"{name} is not installed"


def _files_with_gpu_marks() -> list[str]:
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "@pytest.mark.gpu" in file.read_text()]


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _write(out: Path, summary: dict[str, Any], parts: Sequence[Part]) -> None:
    text = json.dumps(summary, indent=1) + "\n"
    write_whole(out / SUMMARY, lambda file: file.write(text.encode()), "--out")
    write_whole(out / TABLE, lambda file: file.write(_markdown(out, summary, parts).encode()), "--out")


def _markdown(out: Path, summary: dict[str, Any], parts: Sequence[Part]) -> str:
    gpu = summary["environment"]["gpu"]
    lines = [
        "# GPU check",
        "",
        f"{summary['created']}, {gpu['name'] if gpu else NO_DEVICE}, commit {summary['environment']['commit'] or 'unknown'}",
        "",
        "| part | result | seconds | |",
        "|---|---|---:|---|",
    ]
    for part in parts:
        said = part.summary.replace("|", "\\|")
        lines.append(f"| {part.name} | {part.status} | {part.seconds:.0f} | {said} |")
    for task in make_tasks(out):
        done = any(part.name == task.name and part.status != SKIPPED for part in parts)
        if done and task.file is not None and task.file.exists():
            made = json.loads(task.file.read_text())
            lines += ["", report.make_markdown(made, f"## {task.name}").rstrip()]
    return "\n".join([*lines, ""])


def stop_when_told() -> None:
    """Make exceptions of signals, so that the part under way is ended and what it has is kept."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


if __name__ == "__main__":
    stop_when_told()
    sys.exit(main())
