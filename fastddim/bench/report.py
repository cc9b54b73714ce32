"""What results say: a report as JSON and as Markdown, in files that are written whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastddim.bench.breakdown import PARTS
from fastddim.bench.timing import ABSENT, OK, Row
from fastddim.files import write_whole

FORMAT = 2

_PACKAGES = ("torch", "diffusers", "triton", "numpy", "onnxruntime", "tensorrt", "torch-tensorrt")
TEXT_COLUMNS = ("case", "candidate")
_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def environment() -> dict[str, Any]:
    """All that the numbers depend on: devices, clocks, versions, threads, load, and the commit in a git checkout."""
    import torch

    import fastddim
    from fastddim.bench import gpu

    versions: dict[str, str | None] = {"python": platform.python_version(), "fastddim": fastddim.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    # Names its build too, as in 2.11.0+cu130.
    versions["torch"] = torch.__version__
    cpu = _cpu_fields("model name") or [platform.processor() or platform.machine()]
    clocks = _cpu_fields("cpu MHz")
    return {
        "device": cpu[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock_mhz": max(map(float, clocks), default=None),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": gpu.describe(),
        "platform": platform.platform(),
        "versions": versions,
        "commit": _commit(),
    }


def _cpu_fields(field: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(field)]


def _commit() -> str | None:
    """The commit, with `-dirty` after it where the checkout differs from it; outside of one $FASTDDIM_COMMIT, or None."""
    folder = Path(__file__).resolve().parent
    # An installed package may lie inside some other project's checkout.
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return os.environ.get("FASTDDIM_COMMIT")
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def make_report(rows: Sequence[Row], suite: str, quick: bool, allocator: str) -> dict[str, Any]:
    """A report, as the JSON file holds it: the environment and a row for each candidate."""
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "suite": suite,
        "quick": quick,
        "allocator": allocator,
        "complete": True,
        "copy_gb_per_s": None,
        "environment": environment(),
        "rows": as_dicts(rows),
    }


def as_dicts(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows as JSON has them."""
    return [asdict(row) for row in rows]


def read_report(path: Path, argument: str) -> dict[str, Any]:
    """A report that `--json` wrote, its rows as `Row`s.

    Raises:
        ValueError: no such file, or another kind of one; the message names `argument`.
    """
    named = f"{argument}: {str(path)!r}"
    try:
        report = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{named} cannot be read ({error.strerror}); pass a file that --json wrote") from error
    except ValueError as error:
        raise ValueError(f"{named} is no JSON ({error}); pass a file that --json wrote") from error
    try:
        if is_report(report):
            return {**report, "rows": rows_of(report)}
    except TypeError:
        # Rows with other fields.
        pass
    raise ValueError(f"{named} holds no results of this bench; pass a file that this version's --json wrote")


def is_report(value: Any) -> bool:
    """Whether a JSON file's content is a report that can be read."""
    return isinstance(value, dict) and value.get("format") == FORMAT and isinstance(value.get("rows"), list)


def rows_of(report: dict[str, Any]) -> list[Row]:
    """A report's rows as `Row`s."""
    return [Row(**row) for row in report["rows"]]


def make_json(report: dict[str, Any]) -> str:
    """The report as strict JSON: no NaN, no infinity."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def write_text(option: str, path: Path, text: str) -> None:
    """Write a file whole or not at all; messages call it by its command-line option."""
    write_whole(path, lambda file: file.write(text.encode()), option)


def describe_environment(report: dict[str, Any]) -> list[str]:
    """Where a report was measured, in lines."""
    known = report["environment"]
    gpu = known.get("gpu")
    on_gpu = any(row.get("device") == "cuda" for row in report["rows"])
    where = "A CPU run: nothing here was measured on a GPU, and launches, waits and peak memory are a GPU's."
    if gpu and on_gpu:
        clocks = ", ".join(
            f"{name} {gpu[name]}" for name in ("driver_version", "clocks.sm", "clocks.mem") if name in gpu
        )
        where = f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, CUDA {gpu['cuda']}, {clocks}"
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items() if version)
    clock = f" at {known['clock_mhz']:.0f} MHz" if known.get("clock_mhz") else ""
    load = f", load {known['load']:.1f} at the start" if known.get("load") is not None else ""
    lines = [
        where,
        f"{known['device']}{clock}, {known['threads']} of {known['cores']} threads{load}, {known['platform']}",
        versions,
        f"commit {known['commit'] or 'unknown'}",
    ]
    if report.get("copy_gb_per_s"):
        lines.append(f"a copy of a large tensor: {report['copy_gb_per_s']:.3g} GB/s, read and written")
    return lines


def make_markdown(report: dict[str, Any], title: str = "# fastddim benchmarks") -> str:
    """The report as a Markdown table with its environment."""
    quick = " (quick)" if report["quick"] else ""
    rows = rows_of(report)
    lines = [
        title,
        "",
        f"{report['created']}, suite {report['suite']}{quick}, allocator {report['allocator']}",
        "",
        *(f"- {line}" for line in describe_environment(report)),
        "",
        *markdown_table(rows),
        "",
        *(f"Not run: {line}.\n" for line in describe_absent(rows)),
        "Times are per call: cold the first, then the median, 20% and 80% of the warm rounds. ratio is the median quotient"
        " of a candidate's time and ours in the same round: above 1 it takes longer than ours.",
        "",
    ]
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table."""
    columns = columns_of(rows)
    lines = [
        f"| {' | '.join(columns)} |",
        "|" + "".join("---|" if heading in TEXT_COLUMNS else "---:|" for heading in columns),
    ]
    for row in attempted(rows):
        cells = cells_of(row)
        lines.append(f"| {' | '.join(cells[heading].replace('|', chr(92) + '|') for heading in columns)} |")
    return lines


def attempted(rows: Sequence[Row]) -> list[Row]:
    """The rows of the cases in which some candidate could run."""
    return [row for group in groups_of(rows) if not _is_absent(group) for row in group]


def describe_absent(rows: Sequence[Row]) -> list[str]:
    """A line for each reason why whole cases did not run, with their names."""
    cases: dict[str, list[str]] = {}
    for group in filter(_is_absent, groups_of(rows)):
        cases.setdefault(group[0].message or "", []).append(f"{group[0].suite}: {group[0].case}")
    return [f"{reason}, {len(names)} cases: {', '.join(names)}" for reason, names in cases.items()]


def _is_absent(group: Sequence[Row]) -> bool:
    return {(row.status, row.message) for row in group} == {(ABSENT, group[0].message)}


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The headings under which some row has a cell, in their order."""
    cells = [cells_of(row) for row in rows]
    return [heading for heading in (cells[0] if cells else TEXT_COLUMNS) if any(each[heading] for each in cells)]


def cells_of(row: Row) -> dict[str, str]:
    """A row's cells by heading."""
    name = row.candidate
    if row.status != OK:
        name += f": {row.message or ''}" if row.status == ABSENT else f": {row.status.upper()}, {row.message}"
    requests = row.about.get("requests")
    verdict = "" if row.target_met is None else (" met" if row.target_met else " missed")
    return {
        "case": f"{row.suite}: {row.case}",
        "candidate": name,
        "cold": format_seconds(row.cold_s),
        "median": format_seconds(row.median_s),
        "p20": format_seconds(row.p20_s),
        "p80": format_seconds(row.p80_s),
        "p99": format_seconds(row.p99_s) if row.num_steps > 1 else "",
        "ratio": "" if row.ratio is None else f"{row.ratio:.2f}x",
        "target": "" if row.target is None else f">= {row.target:.3g}x{verdict}",
        "GB/s": "" if row.gb_per_s is None else f"{row.gb_per_s:.3g}",
        "of copy": "" if row.of_copy is None else f"{row.of_copy:.0%}",
        **{part: format_seconds(row.parts.get(part)) for part in PARTS[:-1]},
        "launches/step": "" if row.launches is None else f"{row.launches:.3g}",
        "syncs/step": "" if row.synchronizations is None else f"{row.synchronizations:.3g}",
        "peak MiB": "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.3g}",
        "size MB": f"{row.facts['size_bytes'] / 1e6:.3g}" if "size_bytes" in row.facts else "",
        "build": format_seconds(row.facts.get("build_s")),
        "load": format_seconds(row.facts.get("load_s")),
        "latency p50": format_seconds(row.facts.get("latency_p50_s")),
        "latency p99": format_seconds(row.facts.get("latency_p99_s")),
        "requests/s": "" if requests is None or row.median_s is None else f"{requests / row.median_s:.3g}",
    }


def format_seconds(value: float | None) -> str:
    """Three digits and a unit; nothing for None."""
    if value is None:
        return ""
    unit, scale = next((each for each in _UNITS if value >= each[1]), _UNITS[-1])
    return f"{value / scale:.3g} {unit}"


def groups_of(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each case."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.suite, row.case), []).append(row)
    return list(groups.values())
