"""The step suite of `python -m fastddim.bench` under pytest-benchmark: each candidate is verified, then timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastddim.bench.cases import Candidate, Case
from fastddim.bench.step_suite import step_suite
from fastddim.bench.timing import set_allocator, verify

PAIRS = [(case, candidate) for case in step_suite() for candidate in case.candidates]


@pytest.mark.parametrize(
    ("case", "candidate"), PAIRS, ids=[f"{case.name}-{candidate.name}" for case, candidate in PAIRS]
)
def test_step(benchmark: Any, case: Case, candidate: Candidate) -> None:
    set_allocator("keep")
    benchmark.group = case.name
    inputs = case.inputs()
    with torch.no_grad():
        row, call = verify(case, candidate, inputs, case.reference(inputs))
        assert call is not None, row.message
        benchmark(call)
