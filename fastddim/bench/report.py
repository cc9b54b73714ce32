"""Where results go: a table for the terminal, Markdown and JSON files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
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


def check_writable(option: str, path: Path) -> None:
    """Raise now what `write_text` would raise after the run.

    Raises:
        ValueError: a path that is a device or a pipe.
        OSError: no such folder, a path that is a folder, or a file or folder that cannot be written.
    """
    target = Path(os.path.realpath(path))
    # os.path says no to a name that is too long, where pathlib raises.
    if os.path.isdir(target):
        raise IsADirectoryError(f"{option}: {str(path)!r} is a folder; pass a file in it")
    if not os.path.isdir(target.parent):
        raise FileNotFoundError(f"{option}: {str(path)!r} is in a folder that does not exist; create it first")
    if os.path.exists(target) and not os.path.isfile(target):
        raise ValueError(f"{option}: {str(path)!r} is a device or a pipe; pass a regular file")
    if os.path.exists(target) and not os.access(target, os.W_OK):
        raise PermissionError(f"{option}: {str(path)!r} is write-protected; pass another file")
    # A probe, as permission bits say nothing of read-only mounts; the lookup finds names that are too long.
    probe = _beside(target)
    try:
        with contextlib.suppress(FileNotFoundError):
            target.lstat()
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise type(error)(f"{option}: {str(path)!r} cannot be written ({error.strerror}); pass another path") from error


def write_text(option: str, path: Path, text: str) -> None:
    """Write a file whole or not at all; an earlier one stays until the new one is on disk.

    Raises:
        OSError: the file could not be written; no part of it is left.
    """
    target = Path(os.path.realpath(path))
    temporary = _beside(target)
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"{option}: {str(path)!r} was not written ({error.strerror or error})") from error
    finally:
        # After a successful replace there is nothing left to remove.
        temporary.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    return target.parent / f".fastddim-{secrets.token_hex(8)}.tmp"


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
