"""Exported files: their size, how long they take to build and load, and their runs against diffusers' loop."""

from __future__ import annotations

from dataclasses import replace

from fastddim.bench.cases import LEFT_OUT, NEEDS_GPU, Case, Scope, unless_quick
from fastddim.bench.exported import AOTI_LOOP, ORT_LOOP, TENSORRT_LOOP, UNHOISTED_ORT_LOOP
from fastddim.bench.loop_case import loop_case
from fastddim.bench.loop_suite import DIFFUSERS_LOOP
from fastddim.bench.networks import CIFAR10, DIGITS, LSUN256, POLICY, SD15, SD_SMALL, Network

_STEPS = 20
# What a CPU does in seconds.
_STEPS_ON_CPU = {CIFAR10: 4}
# The bar of what leaves the loop, of a text model on a CPU.
_HOISTING_TARGET = 1.05
# In this suite ONNX Runtime is ours, not a baseline.
_ORT = replace(ORT_LOOP, baseline=None)
# Batches, and the bar of diffusers' loop on a CPU.
_BATCHES: tuple[tuple[Network, int, float | None], ...] = (
    (DIGITS, 1, 2.0),
    (DIGITS, 2, 1.4),
    (DIGITS, 8, 1.0),
    (POLICY, 1, None),
    (CIFAR10, 1, None),
    (SD_SMALL, 1, None),
    (LSUN256, 1, None),
    (SD15, 1, None),
)


def export_suite(scope: Scope) -> list[Case]:
    """Whole runs from one exported file, against diffusers' loop."""
    cases = []
    for network, batch, target in _BATCHES:
        needs = None
        if not scope.on_gpu and network in (LSUN256, SD15):
            needs = NEEDS_GPU
        elif scope.quick and (network, batch) != (DIGITS, 1):
            needs = LEFT_OUT
        steps = _STEPS if scope.on_gpu else _STEPS_ON_CPU.get(network, _STEPS)
        unhoisted = UNHOISTED_ORT_LOOP
        if network is SD_SMALL and not scope.on_gpu:
            unhoisted = replace(unhoisted, target=_HOISTING_TARGET)
        candidates = (_ORT, unhoisted, *unless_quick(scope, AOTI_LOOP, TENSORRT_LOOP), DIFFUSERS_LOOP)
        target = None if scope.on_gpu else target
        case = loop_case(network, batch, steps, scope, candidates, suite="export", target=target, needs=needs)
        cases.append(case)
    return cases
