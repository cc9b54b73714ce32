"""What is measured on the device itself: the bandwidth of a copy, launches, waits, memory, captured calls."""

from __future__ import annotations

import re
import subprocess
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from fastddim.bench.profiles import Operation, in_order

# A copy of this many bytes is far beyond any cache.
_COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
# Long enough for fifteen copies or more.
_COPYING_S = 0.5

# The runtime's and the driver's calls that put work on a device, whatever their version and variant.
_LAUNCH = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")
_QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.limit"


def synchronize(device: str) -> None:
    """Wait for what is under way on a GPU."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of torch's copy of a large tensor."""
    import torch
    from torch.utils.benchmark import Timer

    source = torch.ones(_COPY_BYTES[device] // 4, device=device)
    tensors = {"source": source, "target": torch.empty_like(source)}
    timer = Timer("target.copy_(source)", globals=tensors, num_threads=torch.get_num_threads())
    return float(2 * source.nbytes / timer.blocked_autorange(min_run_time=_COPYING_S).median)


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call over fixed tensors as a CUDA graph that someone captured by hand; returns the replay, which gives its result."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    return partial(_replay, graph, result, call)


def _replay(graph: Any, result: Any, call: Callable[[], Any]) -> Any:
    """What the graph reads and writes is in memory that `call` holds."""
    graph.replay()
    return result


def count_launches(call: Callable[[], Any]) -> int | None:
    """How often a warm call puts work on the device: kernels, graphs, copies; None where the profiler sees nothing."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if _LAUNCH.match(event.key)) or None


def device_operations(call: Callable[[], Any], ranges: str | None = None) -> list[Operation]:
    """The kernels of a warm call with their seconds, the costliest first; none where the profiler sees nothing.

    Args:
        ranges: the start of names of `record_function` to sum the kernels up by, instead of by their own names.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if ranges is None or event.key.startswith(ranges)]
    if ranges is None:
        kernels = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
        return in_order(Operation(each.key, each.count, 1e-6 * each.self_device_time_total) for each in kernels)
    # A range is there on the device too, from its first kernel to its last one.
    on_host = [event for event in events if event.device_type.name == "CPU"]
    made = in_order(Operation(each.key, each.count, 1e-6 * each.device_time_total) for each in on_host)
    return [each for each in made if each.self_s]


def count_synchronizations(call: Callable[[], Any]) -> int:
    """How often a warm call waits for the device, as far as torch knows."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


class PeakMemory:
    """Device memory that the code in its `with` block had beyond what was there before: `nbytes`, None on a CPU."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self.nbytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            import torch

            self.nbytes = torch.cuda.max_memory_allocated() - self._before


def release(device: str) -> None:
    """Give back what a case's compiled code and tensors held."""
    import gc
    import sys

    if "torch._dynamo" in sys.modules:
        import torch

        torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def describe() -> dict[str, Any] | None:
    """The GPU's name, memory, driver and clocks; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    known: dict[str, Any] = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or torch.version.hip,
    }
    command = ["nvidia-smi", "--id=0", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return known
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode == 0 and len(values) == len(_QUERY.split(",")):
        known |= dict(zip(_QUERY.split(","), values, strict=True))
    return known
