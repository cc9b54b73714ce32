"""Verify, then time: a candidate that is wrong or raises gets a row that says so, and the others go on."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastddim.bench.cases import Candidate, Case, Work
from fastddim.bench.gpu import PeakMemory, count_launches, count_synchronizations, synchronize

if TYPE_CHECKING:
    from fastddim.bench.explain import Explanation

OK, WRONG, RAISED, ABSENT = "ok", "wrong", "raised", "absent"
FAILURES = (WRONG, RAISED)

ALLOCATORS = ("keep", "fresh", "system")

# Long enough for the clock's own cost and resolution to vanish.
_SAMPLE_S = 2e-3
# The share of the slowest candidate's call that a sample lasts: a quotient is no steadier than its shorter time.
_SAMPLE_SHARE = 0.05
# A case's bar is that of what users have now.
_WITH_A_BAR = ("diffusers", "import")
# Shorter calls depend on what the candidate before them left in the caches: one that is not timed comes first.
_BRIEF_S = 0.05
_WARM_UP_CALLS = 3
_WARM_UP_S = 0.02


@dataclass(frozen=True)
class Settings:
    """How long to measure a case: in each of so many passes rounds until `budget_s` is spent, within the two bounds."""

    min_rounds: int = 5
    max_rounds: int = 200
    budget_s: float = 4.0
    passes: int = 1


# Passes over all cases: a shared machine is slow for some seconds at a time, and no case's rounds should all be there.
QUICK = Settings(min_rounds=1, max_rounds=60, budget_s=0.8, passes=5)


@dataclass
class Row:
    """The result of one candidate in one case. Times are seconds per call, None where the candidate was not timed.

    Attributes:
        ours: whether it is the case's first candidate.
        status: `ok`, `wrong` (never timed), `raised`, or `absent` for what cannot run here.
        message: the error, or the thing that is missing.
        error: the largest relative error, None unless it is a finite number.
        cold_s: the time of the first call.
        median_s, p20_s, p80_s, p99_s: median and quantiles over the warm rounds.
        calls: how many calls each round makes.
        ratio, ratio_p20, ratio_p80: median and quantiles of its time over ours in the same round; None for ours.
        target: the least ratio that meets the case's bar.
        gb_per_s, of_copy: the bytes that a call has to read and write at least, a second, and their share of what a copy of a
            large tensor moves in that time.
        launches, synchronizations: calls of the device's driver per sampling step, on a GPU.
        peak_bytes: device memory that the preparation and the first call take.
        parts: what the median goes to, seconds by `breakdown.PARTS`, by the shares in a run apart from the timed ones.
        facts: other numbers that the candidate reports.
        num_steps, device, about: the case's fields of these names.
        baseline: which baseline it is; None for ours.
    """

    suite: str
    case: str
    candidate: str
    ours: bool
    status: str
    tolerance: float | None
    message: str | None = None
    error: float | None = None
    cold_s: float | None = None
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    p99_s: float | None = None
    rounds: int = 0
    calls: int = 0
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    target: float | None = None
    target_met: bool | None = None
    gb_per_s: float | None = None
    of_copy: float | None = None
    launches: float | None = None
    synchronizations: float | None = None
    peak_bytes: int | None = None
    parts: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    num_steps: int = 1
    device: str = "cpu"
    about: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None


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


def relative_error(results: Sequence[Any], expected: Sequence[Any], blocks: int = 1) -> float:
    """The largest error of any result, relative to the largest magnitude of what is expected of it.

    Args:
        results: tensors or arrays, on any device.
        expected: float64 arrays.
        blocks: how often the rows of what is expected are to be there.

    Raises:
        ValueError: another number of results, or another shape.
    """
    import torch

    got = [tuple(result.shape) for result in results]
    wanted = [(blocks * len(array), *np.shape(array)[1:]) for array in expected]
    if got != wanted:
        raise ValueError(f"results of shapes {got}, expected {wanted}")
    errors = []
    for result, array in zip(map(torch.as_tensor, results), expected, strict=True):
        want = torch.as_tensor(array, dtype=torch.float64, device=result.device)
        largest = [(block.double() - want).abs().max() for block in result.chunk(blocks)]
        # torch's maximum keeps a NaN, Python's need not.
        errors.append((torch.stack(largest).max() / want.abs().max()).cpu())
    return float(torch.stack(errors).max())


def verify(case: Case, candidate: Candidate, inputs: Any, expected: Sequence[Any]) -> tuple[Row, Work | None]:
    """A candidate's row and, if its first result is right, the work to time."""
    tolerance = case.tolerance(inputs, expected) if callable(case.tolerance) else case.tolerance
    row = _row(case, candidate)
    row.tolerance = tolerance * (1 if row.about.get("dtype", "float32") == "float32" else candidate.slack)
    missing = candidate.needs()
    if missing is not None:
        row.status, row.message = ABSENT, missing
        return row, None
    with noting(row):
        with PeakMemory(case.device) as memory:
            made = candidate.make(inputs)
            work = made if isinstance(made, Work) else Work(made)
            start = time.perf_counter()
            results = work.call()
            synchronize(case.device)
            cold_s = time.perf_counter() - start
        error = relative_error(results, expected, case.blocks)
        if error <= row.tolerance:
            row.error, row.cold_s, row.peak_bytes = error, cold_s, memory.nbytes
            return row, work
        row.error = error if math.isfinite(error) else None
        row.status, row.message = WRONG, f"relative error {error:.1e} exceeds {row.tolerance:.0e}"
    return row, None


@contextlib.contextmanager
def noting(row: Row | Explanation) -> Iterator[None]:
    """An exception in the block ends it and is the row's."""
    try:
        yield
    except Exception as error:
        row.status, row.message = RAISED, _describe(error)


def run_case(case: Case, settings: Settings, copy_bandwidth: Callable[[], float] | None = None) -> list[Row]:
    """Verify all candidates of a case, then time the right ones in turn: A B A B, without autograd.

    Args:
        case: the case to run.
        settings: how long to time it.
        copy_bandwidth: gives the bytes a second of a copy on the device; asked for by cases that move memory alone.
    """
    run = CaseRun(case)
    for _ in range(settings.passes):
        run.measure(settings)
    return run.finish(copy_bandwidth)


class CaseRun:
    """A case whose candidates are verified and warm; measured in one pass or several, then finished, once."""

    def __init__(self, case: Case) -> None:
        import torch

        self.case = case
        self._rows = [_row(case, candidate) for candidate in case.candidates]
        self._runners: list[_Runner] = []
        if case.needs is not None:
            self._refuse(ABSENT, case.needs)
            return
        # Where nothing can run, no inputs are needed.
        missing = [candidate.needs() for candidate in case.candidates]
        if all(missing):
            self._refuse(ABSENT, *missing)
            return
        with torch.no_grad():
            try:
                inputs = case.inputs()
                expected = case.reference(inputs)
                tolerance = case.tolerance(inputs, expected) if callable(case.tolerance) else case.tolerance
            except Exception as error:
                self._refuse(RAISED, f"the case could not be set up: {_describe(error)}")
                return
            # A loop's tolerance takes a whole run to find.
            case = replace(case, tolerance=tolerance)
            # The thread pool starts here, not in the first candidate's cold run.
            torch.ones(1 << 20).add_(1)
            verified = [verify(case, candidate, inputs, expected) for candidate in case.candidates]
            self._rows = [row for row, _ in verified]
            self._runners = [_Runner(row, work) for row, work in verified if work is not None]
            warm = [(runner, _warm_up(runner, case.device)) for runner in self._runners]
            sample_s = max([_SAMPLE_S, *(_SAMPLE_SHARE * seconds for _, seconds in warm)])
            for runner, seconds in warm:
                runner.brief = seconds < _BRIEF_S
                runner.row.calls = max(1, math.ceil(sample_s / seconds)) if seconds else 1

    def _refuse(self, status: str, *messages: str | None) -> None:
        for row, message in zip(self._rows, itertools.cycle(messages), strict=False):
            row.status, row.message = status, message

    def measure(self, settings: Settings) -> None:
        """Time the candidates for a pass."""
        import torch

        with torch.no_grad():
            _time([runner for runner in self._runners if runner.row.status == OK], settings, self.case.device)

    def finish(self, copy_bandwidth: Callable[[], float] | None = None) -> list[Row]:
        """The rows, with times, ratios and all else that is known."""
        import torch

        for runner in self._runners:
            if runner.row.status == OK:
                runner.summarise()
        for runner in self._runners:
            row = runner.row
            with torch.no_grad(), noting(row):
                if row.status == OK and self.case.device == "cuda":
                    launches = count_launches(runner.work.call)
                    row.launches = None if launches is None else launches / row.num_steps
                    row.synchronizations = count_synchronizations(runner.work.call) / row.num_steps
                if row.status == OK:
                    row.facts, parts = runner.work.facts(), runner.work.parts()
                    # Of another run, whose shares are as good.
                    row.parts = {name: (row.median_s or 0) * each / sum(parts.values()) for name, each in parts.items()}
        _compare(self._rows, self._runners, self.case)
        for row in self._rows:
            if self.case.nbytes is not None and row.median_s is not None:
                bytes_per_s = self.case.nbytes / row.median_s
                row.gb_per_s = bytes_per_s / 1e9
                row.of_copy = None if copy_bandwidth is None else bytes_per_s / copy_bandwidth()
        # What they hold of a device's memory is the next case's.
        self._runners = []
        return self._rows


def _row(case: Case, candidate: Candidate) -> Row:
    return Row(
        suite=case.suite,
        case=case.name,
        candidate=candidate.name,
        ours=candidate is case.candidates[0],
        status=OK,
        tolerance=None,
        num_steps=case.num_steps,
        device=case.device,
        about=case.about,
        baseline=candidate.baseline,
    )


@dataclass
class _Runner:
    """A right candidate in the rotation, and the seconds per call of its rounds."""

    row: Row
    work: Work
    brief: bool = False
    samples: list[float] = field(default_factory=list)

    def summarise(self) -> None:
        """Fill in the row's times."""
        row, times = self.row, self.samples
        row.p20_s, row.median_s, row.p80_s, row.p99_s = (float(each) for each in np.percentile(times, (20, 50, 80, 99)))
        row.rounds = len(times)


def _time(runners: list[_Runner], settings: Settings, device: str) -> None:
    """A pass; a call that raises leaves the rotation."""
    active = list(runners)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(settings.max_rounds):
            if done >= settings.min_rounds and time.perf_counter() - start > settings.budget_s:
                break
            for runner in active:
                with noting(runner.row):
                    if runner.brief:
                        runner.work.call()
                    runner.samples.append(_time_calls(runner.work.call, runner.row.calls, device))
            active = [runner for runner in active if runner.row.status == OK]
    finally:
        if collecting:
            gc.enable()


def _warm_up(runner: _Runner, device: str) -> float:
    """Call a few times; the seconds of the last call, 0 if it raises."""
    start = time.perf_counter()
    with noting(runner.row):
        for _ in range(_WARM_UP_CALLS):
            seconds = _time_calls(runner.work.call, 1, device)
            if time.perf_counter() - start > _WARM_UP_S:
                break
        return seconds
    return 0.0


def _time_calls(call: Callable[[], Any], count: int, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / count


def _compare(rows: list[Row], runners: list[_Runner], case: Case) -> None:
    samples = {id(runner.row): runner.samples for runner in runners if runner.row.status == OK}
    ours = samples.get(id(rows[0]))
    for row, candidate in zip(rows[1:], case.candidates[1:], strict=True):
        row.target = candidate.target
        if row.target is None and row.baseline in _WITH_A_BAR:
            row.target = case.target
        times = samples.get(id(row))
        if ours is None or times is None:
            continue
        # Rounds are paired: what slows the machine down for a while slows both.
        quotients = [theirs / own for theirs, own in zip(times, ours, strict=True)]
        row.ratio_p20, row.ratio, row.ratio_p80 = (float(each) for each in np.percentile(quotients, (20, 50, 80)))
        row.target_met = None if row.target is None else row.ratio >= row.target


def _describe(error: Exception) -> str:
    # A compiler's error is pages long.
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]
