"""Where results go: a table for the terminal, Markdown and JSON files that are written whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fastddim.bench.timing import OK, Row
from fastddim.files import write_whole

_HEADINGS = ("case", "candidate", "cold", "median", "p20", "p80", "ratio", "target")
_PACKAGES = ("torch", "diffusers", "triton", "numpy")


def environment() -> dict[str, Any]:
    """What the numbers depend on: device, versions, threads, and the commit where the package is in a git checkout."""
    import torch

    import fastddim

    versions: dict[str, str | None] = {"python": platform.python_version(), "fastddim": fastddim.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": versions,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit, with `-dirty` after it where the checkout differs from it; None outside of one."""
    folder = Path(__file__).resolve().parent
    # An installed package may lie inside some other project's checkout.
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def make_table(rows: Sequence[Row]) -> Table:
    """The rows as a rich table, failures in red in the place of times."""
    table = Table(box=box.SIMPLE_HEAD)
    for index, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="left" if index < 2 else "right", no_wrap=index != 1)
    for row in rows:
        # Text, as names hold brackets that rich would read as markup.
        cells = [Text(cell) for cell in _cells(row)]
        if row.target_met is not None:
            cells[-1].stylize("green" if row.target_met else "yellow")
        table.add_row(*cells, style="red" if row.status != OK else None, end_section=_ends_case(rows, row))
    return table


def make_markdown(report: dict[str, Any], rows: Sequence[Row]) -> str:
    """The report as a Markdown table with its environment."""
    known = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items() if version)
    lines = [
        "# fastddim benchmarks",
        "",
        f"{report['created']}, suite {report['suite']}{' (quick)' if report['quick'] else ''}, allocator {report['allocator']}",
        "",
        f"- {known['device']}, {known['threads']} of {known['cores']} threads, {known['platform']}",
        f"- {versions}",
        f"- commit {known['commit'] or 'unknown'}",
        "",
        f"| {' | '.join(_HEADINGS)} |",
        "|---|---|" + "---:|" * (len(_HEADINGS) - 2),
    ]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in _cells(row))} |" for row in rows]
    return "\n".join([*lines, "", "Seconds per call; ratio is the candidate's median over ours, in the same run.", ""])


def make_report(rows: Sequence[Row], suite: str, quick: bool, allocator: str) -> dict[str, Any]:
    """What the JSON file holds: the environment and a row for each candidate."""
    return {
        "format": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "suite": suite,
        "quick": quick,
        "allocator": allocator,
        "environment": environment(),
        "rows": [asdict(row) for row in rows],
    }


def make_json(report: dict[str, Any]) -> str:
    """The report as strict JSON: no NaN, no infinity."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def write_text(option: str, path: Path, text: str) -> None:
    """Write a file whole or not at all; messages call it by its command-line option."""
    write_whole(path, lambda file: file.write(text.encode()), option)


def _cells(row: Row) -> list[str]:
    name = f"{row.candidate}: {row.status.upper()}, {row.message}" if row.status != OK else row.candidate
    times = [_format_seconds(value) for value in (row.cold_s, row.median_s, row.p20_s, row.p80_s)]
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    verdict = "" if row.target_met is None else (" met" if row.target_met else " missed")
    target = "" if row.target is None else f">= {row.target:.3g}x{verdict}"
    return [f"{row.suite}: {row.case}", name, *times, ratio, target]


def _format_seconds(value: float | None) -> str:
    if value is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def _ends_case(rows: Sequence[Row], row: Row) -> bool:
    following = [each for each in rows if (each.suite, each.case) == (row.suite, row.case)]
    return following[-1] is row
