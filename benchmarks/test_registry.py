"""The quick step and loop suites of `python -m fastddim.bench` under pytest-benchmark: verified, then timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastddim.bench.cases import Candidate, Case, Scope
from fastddim.bench.loop_suite import loop_suite
from fastddim.bench.step_suite import step_suite
from fastddim.bench.timing import set_allocator, verify

SCOPE = Scope(quick=True, device="cuda" if torch.cuda.is_available() else "cpu")
PAIRS = [
    (case, candidate)
    for case in (*step_suite(SCOPE), *loop_suite(SCOPE))
    for candidate in case.candidates
    if case.needs is None and candidate.needs() is None
]


@pytest.mark.parametrize(
    ("case", "candidate"), PAIRS, ids=[f"{case.name}-{candidate.name}" for case, candidate in PAIRS]
)
def test_registry(benchmark: Any, case: Case, candidate: Candidate) -> None:
    set_allocator("keep")
    benchmark.group = f"{case.suite}: {case.name}"
    with torch.no_grad():
        inputs = case.inputs()
        row, work = verify(case, candidate, inputs, case.reference(inputs))
        assert work is not None, row.message
        benchmark(work.call)
        if case.device == "cuda":
            torch.cuda.synchronize()
