"""A run of the registry, without the terminal: what the command line and `scripts/gpu_check.sh` share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from fastddim.bench import report
from fastddim.bench.cases import Case, Scope
from fastddim.bench.gpu import copy_bandwidth, release
from fastddim.bench.suites import select_cases
from fastddim.bench.timing import FAILURES, QUICK, CaseRun, Row, Settings, set_allocator

OUT_OF_TIME = "out of time"
# Rounds of a run with a budget of its own.
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
    threads: int | None = None,
    method: str | None = None,
    json_file: str | Path | None = None,
    on_visit: Callable[[Case, int], None] = lambda case, total: None,
) -> dict[str, Any]:
    """Run cases and return the report.

    Args:
        suite, patterns, baselines: the arguments of `select_cases`.
        device, quick, method: the fields of the `Scope`.
        allocator: one of `timing.ALLOCATORS`.
        minutes: the time after which no further case is started; cases that are left get rows that say so.
        budget_s: how long to measure a case, but for three rounds at least.
        threads: torch's threads from here on; by default its own choice, but one for a quick run on a CPU.
        json_file: rewritten after every case that is done, so that a run that is cut off loses one. Those of a quick
            run are done in its last pass.
        on_visit: called before a case is prepared and before each of its passes, with the number of all such calls.
    """
    cases = select_cases(suite, Scope(quick, device, method), patterns, baselines)
    settings = QUICK if quick else Settings()
    if budget_s is not None:
        settings = Settings(_LEAST_ROUNDS, settings.max_rounds, budget_s)
    pick_threads(threads, quick, device)
    in_force = set_allocator(allocator)
    copy = cache(lambda: copy_bandwidth(device))
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    visits = len(cases) * (1 + settings.passes)
    rows: list[Row] = []
    made = report.make_report(rows, suite, quick, in_force)
    for group in [cases] if settings.passes > 1 else [[case] for case in cases]:
        runs = []
        for case in group:
            on_visit(case, visits)
            late = case.needs is None and time.monotonic() > end
            runs.append(CaseRun(replace(case, needs=OUT_OF_TIME) if late else case))
        for done in range(1, settings.passes + 1):
            for run in runs:
                on_visit(run.case, visits)
                if done == 1 or time.monotonic() <= end:
                    run.measure(settings)
                if done < settings.passes:
                    continue
                rows += run.finish(copy)
                if run.case.needs is None:
                    release(device)
                    if copy.cache_info().currsize:
                        made["copy_gb_per_s"] = copy() / 1e9
                    _update(made, rows, json_file)
    _update(made, rows, json_file, complete=True)
    return made


def pick_threads(threads: int | None, quick: bool, device: str) -> None:
    """Set torch's threads; by default its own choice, but one for a quick run on a CPU."""
    if threads is None and quick and device == "cpu":
        # Threads wait for each other, and so for whatever else the machine does.
        threads = 1
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def has_failed(made: dict[str, Any]) -> bool:
    """Whether a candidate was wrong or raised."""
    return any(row["status"] in FAILURES for row in made["rows"])


def _update(made: dict[str, Any], rows: list[Row], json_file: str | Path | None, complete: bool = False) -> None:
    made["rows"] = report.as_dicts(rows)
    made["complete"] = complete
    if json_file is not None:
        report.write_text("--json", Path(json_file), report.make_json(made))
