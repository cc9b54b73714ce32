"""Everything that needs a GPU, in order of importance and within a time: tests, checkers, a profile, step and loop suites.

    sh scripts/gpu_check.sh [--minutes 9] [--wheels DIR] [--out DIR]
    sh scripts/gpu_check.sh --rehearse

The second runs the same parts on a machine without a GPU, on what tests/rehearsal.py emulates, at small sizes, and names
what was not run.

Writes gpu-check.md, rewritten as each part ends, and the suites' own gpu-*.json, rewritten after every case. The status is 1
if a part failed. Needs torch, triton, numpy and pytest; diffusers, of which most baselines are, comes from a folder of
wheels. Test files that import something else which is missing are named and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from fastddim.bench import report
from fastddim.files import check_writable

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUMMARY = "gpu-check.md"
NO_DEVICE = "no GPU on this machine"
SUMMARY_CHARACTERS, TAIL_CHARACTERS = 300, 4000
# A part is not started with less.
LEAST_SECONDS = 15
# For what a killed part leaves behind to end.
GRACE_SECONDS = 10
MACHINE_SECONDS = 120

MINUTES, REHEARSAL_MINUTES = 9.0, 60.0
REHEARSAL = "no GPU: a rehearsal"
NOT_REHEARSED = (
    "the assembler's code, the driver, and how long anything takes",
    "synchronisation, races and memory errors, which the tools would find",
    "measurements of memory",
)

PASSED, FAILED, SKIPPED, CUT = "passed", "failed", "skipped", "cut off"

KERNELS = "benchmarks/launch_kernels.py"
NCU_METRICS = (
    "dram__bytes.sum.per_second",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__time_duration.sum",
)
# The usual run of each network.
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


def last_line(output: str) -> str:
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    return lines[-1] if lines else "no output"


@dataclass
class Part:
    """One part of the check: a command, and what became of it.

    Attributes:
        name: its name in the table.
        limit_s: seconds that it may take at most.
        command: the command line.
        tool: a program that the machine may lack or refuse.
        read: from the output to a line; raises ValueError where the output is not as it must be.
        file: where a suite writes its results.
        variables: its own variables of the environment.
        status: `passed`, `failed`, `skipped`, or `cut off` at its limit.
        summary: its result in a line.
        seconds: seconds that it took.
        details: lines below the table: tests skipped for a reason, and the end of the output of a part that did not pass.
    """

    name: str
    limit_s: float
    command: Sequence[str]
    tool: str | None = None
    read: Callable[[str], str] = last_line
    file: Path | None = None
    variables: dict[str, str] = field(default_factory=dict)
    status: str = SKIPPED
    summary: str = ""
    seconds: float = 0.0
    details: list[str] = field(default_factory=list)


def make_parts(out: Path) -> list[Part]:
    """The parts, the most important first."""
    python = sys.executable

    def tests(name: str, limit_s: float, *arguments: str) -> Part:
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *arguments]
        return Part(name, limit_s, command, variables={"FASTDDIM_SKIP_MISSING": "1"})

    def sanitizer(tool: str, *arguments: str) -> Part:
        return Part(
            f"compute-sanitizer {tool}",
            60,
            ["compute-sanitizer", "--tool", tool, *arguments, "--error-exitcode", "1", python, KERNELS],
            "compute-sanitizer",
            # Out of one tensor's bounds is out of an allocation's.
            variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )

    # The kernels' tests are compilation for the most part.
    several = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    # The clocks are the machine owner's, and what users run at.
    profiler = ["--clock-control", "none", "--kernel-name", "regex:ddim_step", "--metrics", ",".join(NCU_METRICS)]
    first = "test_gpu_graphs.py"
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: (path.name != first, path.name))
    gpu_tests = [str(path) for path in files if "mark.gpu" in path.read_text()]
    return [
        tests("gpu-marked tests", 120, "-vv", "-m", "gpu", *gpu_tests),
        tests("kernel tests", 90, *several, "tests/test_kernels.py"),
        # Compiled here, the kernels are in Triton's cache for what follows.
        Part("kernels launched", 60, [python, KERNELS]),
        # torch and Triton ask the driver for functions that it may not have, which is no error of theirs.
        sanitizer("memcheck", "--report-api-errors", "no"),
        sanitizer("racecheck"),
        Part("ncu on the step kernel", 45, ["ncu", "--csv", *profiler, python, KERNELS, "--elements", str(1 << 26)],
             "ncu", read_metrics),
        suite("step suite, sizes", 75, out / "gpu-step.json", suite="step", patterns=["size*"], baselines=FEW,
              budget_s=0.5),
        suite("step suite, options", 45, out / "gpu-step-options.json", suite="step", patterns=OPTIONS, baselines=FEW,
              budget_s=0.5),
        suite("loop suite, usual runs", 120, out / "gpu-loop.json", suite="loop", patterns=USUAL, baselines=FEW,
              budget_s=1.0),
        # All suites: the compiled step too, and the exported files.
        suite("compiled and exported", 240, out / "gpu-compiled.json", suite="all", patterns=(*USUAL, *COMPILED_STEPS),
              baselines=COMPILED, budget_s=1.0),
        tests("loop and graph tests", 90, "tests/test_cuda_graph.py", "tests/test_loop.py"),
    ]  # fmt: skip


def suite(name: str, limit_s: float, file: Path, device: str = "cuda", **options: Any) -> Part:
    """A run of the bench, without its command line, whose packages the machine may lack."""
    code = (
        "import json, sys; from fastddim.bench.run import has_failed, run_suite;"
        "sys.exit(has_failed(run_suite(**json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, json.dumps({**options, "device": device, "json_file": str(file)})]
    return Part(name, limit_s, command, read=lambda output: read_suite(file, output), file=file)


def read_suite(file: Path, output: str) -> str:
    if not file.exists():
        return last_line(output)
    counts = Counter(row["status"] for row in json.loads(file.read_text())["rows"])
    return ", ".join(f"{count} {status}" for status, count in counts.items()) + f"; {file.name}"


def read_metrics(output: str) -> str:
    """The metrics of the last launch: the first ones also fill caches."""
    found = re.findall(r'"(dram__\S+?|gpu__\S+?)","(\S+?)","([\d.,]+)"', output)
    if not found:
        raise ValueError(f"no metrics of a step: {last_line(output)}")
    return ", ".join(
        f"{name} {said}" for name, said in {name: f"{value} {unit}" for name, unit, value in found}.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="run all parts without a GPU, emulated, at small sizes")
    parser.add_argument("--minutes", type=float, help="for all parts together; 9 by default, 60 with --rehearse")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels to use, such as diffusers'")
    parser.add_argument("--out", type=Path, metavar="DIR", help="$OUT or benchmarks/results by default")
    options = parser.parse_args(arguments)
    if options.minutes is None:
        options.minutes = REHEARSAL_MINUTES if options.rehearse else MINUTES
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes: {options.minutes}; pass a number above 0")
    wheels = [] if options.wheels is None else sorted(options.wheels.glob("*.whl"))
    if options.wheels is not None and not wheels:
        parser.error(f"--wheels: {str(options.wheels)!r} has no wheels; pass a folder of .whl files")
    with tempfile.TemporaryDirectory() as folder:
        site, rehearsed = Path(folder, "site"), Path(folder, "out")
        rehearsed.mkdir()
        # What a rehearsal writes are no results.
        out = options.out or Path(os.environ.get("OUT") or (rehearsed if options.rehearse else RESULTS))
        try:
            check_writable(out / SUMMARY, "--out")
        except (OSError, ValueError) as error:
            parser.error(str(error))
        for wheel in wheels:
            try:
                zipfile.ZipFile(wheel).extractall(site)
            except (OSError, zipfile.BadZipFile) as error:
                parser.error(f"--wheels: {str(wheel)!r} cannot be unpacked ({error}); fetch it again")
        return check(out, options.minutes, site, Path(folder, "tools") if options.rehearse else None)


def check(out: Path, minutes: float, site: Path, tools: Path | None = None) -> int:
    """Run the parts; 1 if one failed. Packages in the folder `site` go before those that are installed.

    Args:
        tools: a folder for a rehearsal's stand-ins; None for the real thing.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), str(site), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment.pop("OMP_NUM_THREADS", None)
    end = time.monotonic() + 60 * minutes
    parts = make_parts(out)
    if tools is not None:
        make_tools(tools, {part.tool for part in parts if part.tool})
        environment["PATH"] = os.pathsep.join((str(tools), environment["PATH"]))
        environment["PYTHONPATH"] += "".join(os.pathsep + str(ROOT / name) for name in ("tests", "benchmarks"))
        environment["CUDA_VISIBLE_DEVICES"] = ""
        for part in parts:
            part.command, part.limit_s = rehearse(part), 60 * minutes
    machine = describe_machine(environment)
    if tools is not None:
        machine["gpu"] = {"name": REHEARSAL}
    for number, part in enumerate(parts, 1):
        part.limit_s = min(part.limit_s, end - time.monotonic())
        try:
            if machine["gpu"] is None:
                part.summary = NO_DEVICE
            elif part.tool and not shutil.which(part.tool, path=environment.get("PATH")):
                part.summary = f"{part.tool} is not installed"
            elif part.limit_s < LEAST_SECONDS:
                part.summary = f"out of time: {minutes:g} minutes"
            else:
                run(part, environment)
        finally:
            # Whatever ends this process, what the part has so far is kept.
            report.write_text("--out", out / SUMMARY, make_markdown(machine, parts[:number]))
            print(f"{part.status:<8} {part.name}: {part.summary} ({part.seconds:.0f} s)", flush=True)
    if tools is not None:
        for line in [*NOT_REHEARSED, *dict.fromkeys(line for part in parts for line in find_absent(part))]:
            print(f"not rehearsed: {line}")
    return int(any(part.status == FAILED for part in parts))


def make_tools(folder: Path, names: set[str]) -> None:
    """Stand-ins that check how they are called, and run what they are called with."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m rehearsal {name} "$@"\n')
        (folder / name).chmod(0o755)


def rehearse(part: Part) -> list[str]:
    """A part's command with tests/rehearsal.py in it."""
    first, *rest = part.command
    if part.tool:
        return [first, *rest]
    if rest[:2] == ["-m", "pytest"]:
        # `make test` runs all of the kernels' tests.
        few = (
            ["-m", "sampled and not slow", *(["-n", "2"] if "-n" in rest else [])]
            if "tests/test_kernels.py" in rest
            else []
        )
        return [first, *rest[:2], "-p", "rehearsal", *rest[2:], *few]
    return [first, "-m", "rehearsal", *rest]


def find_absent(part: Part) -> list[str]:
    """What a rehearsed part has not run: its tests and tools that were skipped, its candidates that cannot run here."""
    found = [line for line in part.details if line.startswith("SKIPPED")]
    if part.status == SKIPPED:
        found.append(f"{part.name}: {part.summary}")
    if part.file is not None and part.file.exists():
        cases: dict[str, list[str]] = {}
        for row in json.loads(part.file.read_text())["rows"]:
            if row["status"] == "absent":
                cases.setdefault(f"{row['suite']}, {row['candidate']}, {row['message']}", []).append(row["case"])
        found += [f"{what}: {', '.join(names)}" for what, names in cases.items()]
    return found


def describe_machine(environment: dict[str, str]) -> dict[str, Any]:
    """`report.environment()` of another process: in this one it would leave a context on the GPU."""
    code = "import json; from fastddim.bench.report import environment; print(json.dumps(environment()))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=MACHINE_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"error: torch did not find out about the GPU in {MACHINE_SECONDS} seconds") from error
    if done.returncode:
        raise SystemExit(f"error: torch or fastddim cannot be imported: {last_line(done.stderr)}")
    known: dict[str, Any] = json.loads(last_line(done.stdout))
    return known


def run(part: Part, environment: dict[str, str]) -> None:
    """Run a part in a process of its own and note what became of it, also where an exception ends this one."""
    if part.file is not None:
        # What an earlier check left is not this one's.
        part.file.unlink(missing_ok=True)
    start = time.monotonic()
    status = None
    # No pipe, which what a killed part leaves behind would hold open.
    with tempfile.TemporaryFile() as log:
        try:
            status = call(part, {**environment, **part.variables}, log)
        except OSError as error:
            log.write(f"it could not be started: {error}".encode())
            status = 127
        finally:
            part.seconds = time.monotonic() - start
            log.seek(0)
            judge(part, log.read().decode(errors="replace"), status)


def call(part: Part, environment: dict[str, str], log: IO[bytes]) -> int | None:
    """The exit status of a part's command; None if it had to be killed at its limit, or because this process ends."""
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(part.limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # The checkers have children of their own, and one that waits for a lost device does not end.
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(GRACE_SECONDS)


def judge(part: Part, output: str, status: int | None) -> None:
    # pytest's 5: no test was chosen, as the files import what is missing.
    part.status = CUT if status is None else {0: PASSED, 5: SKIPPED}.get(status, FAILED)
    part.details = [line for line in output.splitlines() if line.startswith("SKIPPED")]
    try:
        part.summary = part.read(output)
    except Exception as error:
        # One part's odd output must not cost the others.
        part.status = CUT if status is None else FAILED
        part.summary = f"its results cannot be read: {type(error).__name__}: {error}"
    refusals = [reason for sign, reason in REFUSALS.items() if part.tool and sign in output]
    if refusals:
        part.status, part.summary = SKIPPED, refusals[0]
    part.summary = part.summary[:SUMMARY_CHARACTERS]
    if part.status != PASSED:
        part.details += ["```", output[-TAIL_CHARACTERS:], "```"]


def make_markdown(machine: dict[str, Any], parts: Sequence[Part]) -> str:
    """The parts so far as a table, then each one's details and results."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    lines = [
        "# GPU check",
        "",
        f"{now}, {machine['gpu']['name'] if machine['gpu'] else NO_DEVICE}, commit {machine['commit'] or 'unknown'}",
        "",
        "| part | result | seconds | |",
        "|---|---|---:|---|",
    ]
    for part in parts:
        said = part.summary.replace("|", "\\|")
        lines.append(f"| {part.name} | {part.status} | {part.seconds:.0f} | {said} |")
    for part in parts:
        if part.details:
            lines += ["", f"## {part.name}", "", *part.details]
        if part.status != SKIPPED and part.file is not None and part.file.exists():
            lines += ["", report.make_markdown(json.loads(part.file.read_text()), f"## {part.name}").rstrip()]
    return "\n".join([*lines, ""])


def stop_when_told() -> None:
    """Make exceptions of signals, so that the part under way is ended and what it has is kept."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


if __name__ == "__main__":
    stop_when_told()
    sys.exit(main())
