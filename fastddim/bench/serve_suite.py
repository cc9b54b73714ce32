"""Requests from concurrent callers: latency and throughput of the exported file and of diffusers' loop in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fastddim.bench.cases import Candidate, Case, Scope, Work
from fastddim.bench.exported import ORT_LOOP
from fastddim.bench.loop_case import LoopInputs, loop_case
from fastddim.bench.loop_suite import DIFFUSERS_LOOP
from fastddim.bench.networks import DIGITS

_STEPS = 10
_CALLERS = (1, 4)
_REQUESTS = 8


def serve_suite(scope: Scope) -> list[Case]:
    """Digits, one sample a request, from 1 and from 4 callers at a time."""
    cases = []
    for callers in _CALLERS:
        candidates = tuple(
            replace(each, make=partial(_serve, each, callers))
            for each in (replace(ORT_LOOP, baseline=None), DIFFUSERS_LOOP)
        )
        case = loop_case(DIGITS, 1, _STEPS, scope, candidates, suite="serve")
        cases.append(
            replace(
                case,
                name=f"{case.name}, {callers} callers",
                reference=partial(_all_requests, case.reference),
                num_steps=_STEPS * _REQUESTS,
                about={**case.about, "callers": callers, "requests": _REQUESTS},
            )
        )
    return cases


def _all_requests(reference: Callable[[Any], Sequence[Any]], inputs: LoopInputs) -> Sequence[Any]:
    (one,) = reference(inputs)
    return (np.repeat(one, _REQUESTS, axis=0),)


def _serve(candidate: Candidate, callers: int, inputs: LoopInputs) -> Work:
    """All requests, taken in turn by as many threads as there are callers; each notes how long it waited."""
    import torch

    made = candidate.make(inputs)
    call = made.call if isinstance(made, Work) else made
    pool = ThreadPoolExecutor(callers)
    latencies: list[float] = []

    def request(_: int) -> Any:
        # Autograd is switched off for each thread by itself.
        with torch.no_grad():
            start = time.perf_counter()
            (sample,) = call()
            sample = torch.as_tensor(sample).cpu()
            latencies.append(time.perf_counter() - start)
        return sample

    def all_requests() -> Sequence[Any]:
        return (torch.cat(list(pool.map(request, range(_REQUESTS)))),)

    def facts() -> dict[str, float]:
        pool.shutdown()
        # Without the first call's requests.
        warm = latencies[_REQUESTS:]
        p50, p99 = np.percentile(warm, (50, 99))
        return {"latency_p50_s": float(p50), "latency_p99_s": float(p99), "requests": float(len(warm))}

    return Work(all_requests, facts=facts)
