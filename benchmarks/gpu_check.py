"""Everything that needs a GPU, in order of importance and within a time: tests, checkers, a profile, step and loop suites.

    sh scripts/gpu_check.sh [--minutes 9] [--wheels DIR] [--out DIR]

Writes gpu-check.json and gpu-check.md, rewritten as each part ends, and the suites' own gpu-*.json. The status is 1 if a
part failed. Needs torch, triton, numpy and pytest; diffusers, of which most baselines are, comes from a folder of wheels.
"""

from __future__ import annotations

import argparse
import csv
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
from typing import Any

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
COMPILED = (
    "compile-reduce-overhead",
    "compile-step",
    "compile-max-autotune",
    "torch-tensorrt",
    "tensorrt",
    "aotinductor",
)


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
        read: from output and exit status to a summary and numbers.
        file: a suite's results.
    """

    name: str
    limit_s: float
    command: Callable[[float], list[str]]
    needs: Callable[[], str | None] = lambda: None
    read: Callable[[str, int], tuple[str, dict[str, Any]]] = lambda output, status: (_last_line(output), {})
    file: Path | None = None


def make_tasks(out: Path) -> list[Task]:
    """The parts, the most important first."""
    python = sys.executable

    def pytest(*arguments: str) -> Callable[[float], list[str]]:
        return lambda _: [python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *arguments]

    def sanitizer(tool: str) -> Task:
        return Task(
            f"compute-sanitizer {tool}",
            60,
            lambda _: ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", python, KERNELS],
            lambda: _program("compute-sanitizer"),
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

    return [
        Task("gpu-marked tests", 120, pytest("-m", "gpu", *_files_with_gpu_marks())),
        # Compiled here, the kernels are in Triton's cache for what follows.
        Task("kernels launched", 60, lambda _: [python, KERNELS]),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Task("ncu on the step kernel", 45, _ncu_command, lambda: _program("ncu"), _read_ncu),
        suite("step suite, sizes", "gpu-step.json", 75, suite="step", patterns=["size*"], baselines=FEW, budget_s=0.5),
        suite("loop suite, usual runs", "gpu-loop.json", 120, suite="loop", patterns=USUAL, baselines=FEW, budget_s=1.0),
        suite("loop suite, compiled", "gpu-loop-compiled.json", 240, suite="loop", patterns=USUAL, baselines=COMPILED,
              budget_s=1.0),
        suite("step suite, options", "gpu-step-options.json", 60, suite="step", patterns=OPTIONS, budget_s=0.5),
        Task("kernel, loop and graph tests", 150, pytest("tests/test_cuda_graph.py", "tests/test_loop.py",
             "tests/test_kernels.py")),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together; 9 by default")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="pure Python wheels to use, such as diffusers'")
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
                zipfile.ZipFile(wheel).extractall(site)
        return _check(options.out, options.minutes, site if options.wheels else None)


def _check(out: Path, minutes: float, site: str | None) -> int:
    path = os.pathsep.join(filter(None, (str(ROOT), site, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
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
        if missing is not None:
            part.summary = missing
        else:
            _run(task, part, environment)
        parts.append(part)
        print(f"{part.status:<8} {part.name}: {part.summary} ({part.seconds:.0f} s)", flush=True)
        _write(out, {**summary, "parts": [asdict(each) for each in parts]}, parts)
    return int(any(part.status == FAILED for part in parts))


def _describe_machine(environment: dict[str, str]) -> dict[str, Any]:
    """`report.environment()` of another process: in this one it would leave a context on the GPU."""
    code = "import json; from fastddim.bench.report import environment; print(json.dumps(environment()))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: torch or fastddim cannot be imported: {_last_line(done.stderr)}")
    known: dict[str, Any] = json.loads(_last_line(done.stdout))
    return known


def _run(task: Task, part: Part, environment: dict[str, str]) -> None:
    if task.file is not None:
        # What an earlier check left is not this one's.
        task.file.unlink(missing_ok=True)
    start = time.monotonic()
    process = subprocess.Popen(
        task.command(part.limit_s), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=part.limit_s)
    except subprocess.TimeoutExpired:
        # The checkers have children of their own.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        part.status = CUT
    part.seconds = time.monotonic() - start
    said, part.numbers = task.read(output, process.returncode)
    part.summary = said[:SUMMARY_CHARACTERS]
    if part.status != CUT:
        # pytest's 5: no test was chosen.
        part.status = PASSED if process.returncode in (0, 5) else FAILED
    if "ERR_NVGPUCTRPERM" in output:
        part.status, part.summary = SKIPPED, "the driver gives performance counters to administrators only"
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


def _ncu_command(_: float) -> list[str]:
    metrics = ",".join(NCU_METRICS)
    profiled = [sys.executable, KERNELS, "--elements", str(1 << 26)]
    return ["ncu", "--csv", "--kernel-name", "regex:ddim_step", "--metrics", metrics, *profiled]


def _read_ncu(output: str, status: int) -> tuple[str, dict[str, Any]]:
    """The last launch's metrics: the first ones also fill caches."""
    table = [line for line in output.splitlines() if line.startswith('"')]
    numbers: dict[str, Any] = {}
    for row in csv.DictReader(table):
        name = NCU_METRICS.get(row.get("Metric Name", ""))
        if name:
            numbers[name] = {"value": float(row["Metric Value"].replace(",", "")), "unit": row["Metric Unit"]}
    said = ", ".join(f"{name} {each['value']:.4g} {each['unit']}" for name, each in numbers.items())
    return said or _last_line(output), numbers


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


if __name__ == "__main__":
    sys.exit(main())
