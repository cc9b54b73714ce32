"""Exported files: their size, how long they take to build and load, and their runs against diffusers' loop."""

from __future__ import annotations

from dataclasses import replace

from fastddim.bench.cases import LEFT_OUT, NEEDS_GPU, Case, Scope, unless_quick
from fastddim.bench.exported import AOTI_LOOP, ORT_LOOP, TENSORRT_LOOP
from fastddim.bench.loop_case import loop_case
from fastddim.bench.loop_suite import DIFFUSERS_LOOP
from fastddim.bench.networks import CIFAR10, DIGITS, LSUN256, SD15, Network

_STEPS = 20
# In this suite ONNX Runtime is ours, not a baseline.
_ORT = replace(ORT_LOOP, baseline=None)
# Batches, and the bar of diffusers' loop on a CPU.
_BATCHES: tuple[tuple[Network, int, float | None], ...] = (
    (DIGITS, 1, 2.0),
    (DIGITS, 2, 1.4),
    (DIGITS, 8, 1.0),
    (CIFAR10, 1, None),
    (LSUN256, 1, None),
    (SD15, 1, None),
)


def export_suite(scope: Scope) -> list[Case]:
    """Whole runs from one exported file, against diffusers' loop."""
    cases = []
    for network, batch, target in _BATCHES:
        needs = None
        if not scope.on_gpu and network not in (DIGITS, CIFAR10):
            needs = NEEDS_GPU
        elif scope.quick and (network, batch) != (DIGITS, 1):
            needs = LEFT_OUT
        steps = _STEPS if network is not CIFAR10 or scope.on_gpu else 4
        candidates = (_ORT, *unless_quick(scope, AOTI_LOOP, TENSORRT_LOOP), DIFFUSERS_LOOP)
        target = None if scope.on_gpu else target
        case = loop_case(network, batch, steps, scope, candidates, suite="export", target=target, needs=needs)
        cases.append(case)
    return cases
