"""A run of the registry, without the terminal: what the command line and `scripts/gpu_check.sh` share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastddim.bench import report
from fastddim.bench.cases import Case, Scope
from fastddim.bench.gpu import copy_bandwidth, release
from fastddim.bench.suites import select_cases
from fastddim.bench.timing import FAILURES, QUICK, Row, Settings, absent_rows, run_case, set_allocator

OUT_OF_TIME = "not run: out of time"
# Of runs with a budget of their own.
_LEAST_ROUNDS = 3


def run_suite(
    suite: str,
    device: str = "cpu",
    quick: bool = False,
    patterns: Sequence[str] = (),
    baselines: Sequence[str] = (),
    allocator: str = "keep",
    minutes: float | None = None,
    budget_s: float | None = None,
    json_file: str | Path | None = None,
    on_case: Callable[[Case], None] = lambda case: None,
) -> dict[str, Any]:
    """Run cases and return the report.

    Args:
        suite, patterns, baselines: as `select_cases`'.
        device, quick: of the scope.
        allocator: one of `timing.ALLOCATORS`.
        minutes: after which no further case is started; those left get rows that say so.
        budget_s: how long to measure a case, but for three rounds at least.
        json_file: rewritten after every case, so that a run that is cut off loses one.
        on_case: called before each case.
    """
    cases = select_cases(suite, Scope(quick, device), patterns, baselines)
    settings = QUICK if quick else Settings()
    if budget_s is not None:
        settings = Settings(_LEAST_ROUNDS, settings.max_rounds, budget_s)
    in_force = set_allocator(allocator)
    copy = cache(lambda: copy_bandwidth(device))
    end = None if minutes is None else time.monotonic() + 60 * minutes
    rows: list[Row] = []
    made = report.make_report(rows, suite, quick, in_force)
    for case in cases:
        on_case(case)
        if end is not None and time.monotonic() > end and case.needs is None:
            rows += absent_rows(case, OUT_OF_TIME)
            continue
        rows += run_case(case, settings, copy)
        if case.needs is None:
            release(device)
            if copy.cache_info().currsize:
                made["copy_gb_per_s"] = copy() / 1e9
            _update(made, rows, json_file)
    _update(made, rows, json_file, complete=True)
    return made


def has_failed(made: dict[str, Any]) -> bool:
    """Whether a candidate was wrong or raised."""
    return any(row["status"] in FAILURES for row in made["rows"])


def _update(made: dict[str, Any], rows: list[Row], json_file: str | Path | None, complete: bool = False) -> None:
    made["rows"] = report.as_dicts(rows)
    made["complete"] = complete
    if json_file is not None:
        report.write_text("--json", Path(json_file), report.make_json(made))
