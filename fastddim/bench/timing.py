"""Verify, then time: a candidate that is wrong or raises gets a row that says so, and the others go on."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastddim.bench.cases import Call, Candidate, Case

OK, WRONG, RAISED = "ok", "wrong", "raised"

ALLOCATORS = ("keep", "fresh", "system")

# Long enough for the clock's own cost and resolution to vanish.
_SAMPLE_S = 2e-3
_WARM_UP_CALLS = 3
_WARM_UP_S = 0.02


@dataclass(frozen=True)
class Settings:
    """How long to measure a case: rounds until `budget_s` is spent, within the two bounds."""

    min_rounds: int = 5
    max_rounds: int = 200
    budget_s: float = 4.0


QUICK = Settings(min_rounds=1, max_rounds=10, budget_s=0.1)


@dataclass
class Row:
    """What one candidate did in one case. Times are seconds per call, None where the candidate was not timed.

    Attributes:
        ours: whether it is the case's first candidate.
        status: `ok`, `wrong` (never timed) or `raised`.
        message: what was wrong.
        error: the largest relative error, None unless it is a finite number.
        cold_s: the first call.
        median_s, p20_s, p80_s: of the warm rounds.
        calls: how many calls each round makes.
        ratio: the median over ours, for baselines.
        target: the least ratio that meets the case's bar.
    """

    suite: str
    case: str
    candidate: str
    ours: bool
    status: str
    tolerance: float
    message: str | None = None
    error: float | None = None
    cold_s: float | None = None
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    rounds: int = 0
    calls: int = 0
    ratio: float | None = None
    target: float | None = None
    target_met: bool | None = None


def set_allocator(mode: str) -> str:
    """Fix how glibc serves large tensors on the CPU for the rest of this process; returns the mode that now holds.

    Left alone, glibc changes its mind as a process runs, one candidate's tensors decide what another's cost, and the
    ratio of the same two candidates on 6 MB states wanders between 2 and 8.

    Args:
        mode: `keep` reuses memory, as after long running; `fresh` takes every large tensor's pages anew from the
            kernel; `system` changes nothing. Other C libraries only have `system`.
    """
    # M_MMAP_THRESHOLD at its largest or smallest sensible value, M_TRIM_THRESHOLD, M_TOP_PAD (glibc's malloc.h).
    options = {"keep": ((-3, 1 << 25), (-1, (1 << 31) - 1), (-2, 1 << 28)), "fresh": ((-3, 1 << 17),), "system": ()}[
        mode
    ]
    if not options:
        return mode
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return "system"
    return mode if all(mallopt(option, value) for option, value in options) else "system"


def relative_error(results: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest error of any result, relative to the largest magnitude of what is expected of it.

    Raises:
        ValueError: another number of results, or another shape.
    """
    got = [np.asarray(result, dtype=np.float64) for result in results]
    want = [np.asarray(array, dtype=np.float64) for array in expected]
    if [array.shape for array in got] != [array.shape for array in want]:
        raise ValueError(
            f"results of shapes {[array.shape for array in got]}, expected {[array.shape for array in want]}"
        )
    errors = [float(np.max(np.abs(g - w)) / np.max(np.abs(w))) for g, w in zip(got, want, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def verify(case: Case, candidate: Candidate, inputs: Any, expected: Sequence[Any]) -> tuple[Row, Call | None]:
    """A candidate's row and, if its first result is right, a fresh call to time."""
    ours = candidate is case.candidates[0]
    row = Row(case.suite, case.name, candidate.name, ours, OK, case.tolerance)
    try:
        call = candidate.make(inputs)
        start = time.perf_counter()
        results = call()
        cold_s = time.perf_counter() - start
        error = relative_error(results, expected)
        if error <= case.tolerance:
            row.error, row.cold_s = error, cold_s
            return row, candidate.make(inputs)
        row.error = error if math.isfinite(error) else None
        row.status, row.message = WRONG, f"relative error {error:.1e} exceeds {case.tolerance:.0e}"
    except Exception as error:
        row.status, row.message = RAISED, _describe(error)
    return row, None


def run_case(case: Case, settings: Settings) -> list[Row]:
    """Verify all candidates of a case, then time the right ones in turn: A B A B, without autograd."""
    import torch

    with torch.no_grad():
        try:
            inputs = case.inputs()
            expected = case.reference(inputs)
        except Exception as error:
            message = f"the case could not be set up: {_describe(error)}"
            return [
                Row(case.suite, case.name, each.name, index == 0, RAISED, case.tolerance, message)
                for index, each in enumerate(case.candidates)
            ]
        # The thread pool starts here, not in the first candidate's cold run.
        torch.ones(1 << 20).add_(1)
        verified = [verify(case, candidate, inputs, expected) for candidate in case.candidates]
        _time([(row, call) for row, call in verified if call is not None], settings)
    rows = [row for row, _ in verified]
    _compare(rows, case.target)
    return rows


def _time(runners: list[tuple[Row, Call]], settings: Settings) -> None:
    """Fill in the rows' times; a call that raises leaves the rotation."""
    samples: dict[int, list[float]] = {id(row): [] for row, _ in runners}
    active = [runner for runner in runners if _warm_up(*runner)]
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(settings.max_rounds):
            if done >= settings.min_rounds and time.perf_counter() - start > settings.budget_s:
                break
            for runner in tuple(active):
                row, call = runner
                try:
                    samples[id(row)].append(_time_calls(call, row.calls))
                except Exception as error:
                    row.status, row.message = RAISED, _describe(error)
                    active.remove(runner)
    finally:
        if collecting:
            gc.enable()
    for row, _ in active:
        times = samples[id(row)]
        row.p20_s, row.median_s, row.p80_s = (float(value) for value in np.percentile(times, (20, 50, 80)))
        row.rounds = len(times)


def _warm_up(row: Row, call: Call) -> bool:
    """Call a few times and choose how many calls make a sample."""
    start = time.perf_counter()
    try:
        for _ in range(_WARM_UP_CALLS):
            seconds = _time_calls(call, 1)
            if time.perf_counter() - start > _WARM_UP_S:
                break
    except Exception as error:
        row.status, row.message = RAISED, _describe(error)
        return False
    row.calls = max(1, math.ceil(_SAMPLE_S / seconds))
    return True


def _time_calls(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def _compare(rows: list[Row], target: float | None) -> None:
    ours = rows[0].median_s
    for row in rows[1:]:
        row.target = target
        if ours is not None and row.median_s is not None:
            row.ratio = row.median_s / ours
            row.target_met = None if target is None else row.ratio >= target


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
