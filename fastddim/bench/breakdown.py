"""What a run's time goes to, measured apart from the runs that are timed, which it would slow."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from fastddim.bench.gpu import device_operations, synchronize

# What a run's time goes to: the model's calls, what is computed before the loop, the scheduler's or the kernel's own part, and
# the rest. `run` is what cannot be told apart.
PARTS = ("model", "hoisted", "step", "host", "run")

_RUNS = 5
# Longer runs are steady enough to make fewer.
_LONG_S = 1.0
_STEP_KERNELS = ("ddim_step_kernel", "projection_kernel", "rescale_kernel", "histogram_kernel")
_RANGE = "fastddim.bench: "


class Watch:
    """Callables that note whose part of a run their time is.

    Args:
        device: `cpu` or `cuda`. On a GPU a part's time is that of its kernels.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, whose time is this part's; one that is watched must not call another."""

        @functools.wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._device == "cuda":
                from torch.profiler import record_function

                with record_function(_RANGE + part):
                    return call(*args, **kwargs)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self._seconds[part] += time.perf_counter() - start
            return result

        return watched

    def split(self, run: Callable[[], Any]) -> dict[str, float]:
        """Seconds of each part of the run of median length, the host's what is left; their sum is the run's."""
        if self._device == "cuda":
            ranges = {op.name.removeprefix(_RANGE): op.self_s for op in device_operations(run, ranges=_RANGE)}
            return with_host(ranges, seconds_of(run, self._device))
        made: list[tuple[float, dict[str, float]]] = []

        def noted() -> None:
            self._seconds.clear()
            start = time.perf_counter()
            run()
            total = time.perf_counter() - start
            made.append((total, with_host(self._seconds, total)))

        seconds_of(noted, self._device)
        return sorted(made, key=lambda each: each[0])[len(made) // 2][1]


@contextlib.contextmanager
def watching_sampler(watch: Watch) -> Iterator[None]:
    """Have a watch see the parts of `Sampler`'s loops that go step by step."""
    from fastddim import loop
    from fastddim.hoisting import HoistedModel
    from fastddim.model_call import call_model

    with (
        mock.patch.object(loop, "call_model", watch.around("model", call_model)),
        mock.patch.object(HoistedModel, "prepare", watch.around("hoisted", HoistedModel.prepare)),
        mock.patch.object(loop.EagerLoop, "_step", watch.around("step", loop.EagerLoop._step)),
    ):
        yield


def with_host(parts: dict[str, float], total: float) -> dict[str, float]:
    """The parts and what the host has of a run that took `total` seconds.

    Where a profiler has stretched the parts beyond that, they shrink to it.
    """
    busy = sum(parts.values())
    if not busy:
        return {"run": total}
    scale = min(1.0, total / busy)
    return {**{name: scale * seconds for name, seconds in parts.items()}, "host": max(0.0, total - busy)}


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """How long a run takes: the median of a few, or the first of long ones."""
    times: list[float] = []
    while len(times) < _RUNS and (not times or times[0] < _LONG_S):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def split_captured(run: Callable[[], Any], hoisted: bool) -> dict[str, float]:
    """Parts of a run that is CUDA graphs, by its kernels' names, as no Python code runs between them.

    Args:
        hoisted: whether something is computed before the loop, which is not told from the model's calls.
    """
    parts: defaultdict[str, float] = defaultdict(float)
    for kernel in device_operations(run):
        parts["step" if kernel.name in _STEP_KERNELS else "run" if hoisted else "model"] += kernel.self_s
    return with_host(dict(parts), seconds_of(run, "cuda"))
