"""What launching the fused step costs the host, no GPU needed: Triton's own launcher over a CUDA driver that does nothing.

    python benchmarks/launch_cost.py [--rounds N] [--json FILE]

Tensors are on the CPU, so torch's own share is its CPU allocator's, and asking CUDA for the device and the stream is free.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stub_cuda
import torch
import triton

import fastddim
from fastddim.bench.timing import set_allocator
from fastddim.config import Clip
from fastddim.kernels import PreparedStep, launch
from fastddim.kernels.plan import StepShape, make_plan
from fastddim.kernels.step import ddim_step_kernel
from fastddim.step import Guidance, StepOptions

CALLS = 2000
BATCH, CHANNELS, SIZE = 2, 4, 64
STEP = 10
DRIVER = "driver: the compiled kernel's own launch"


def make_candidates() -> tuple[tuple[int, int], dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """The grid that every step has; the candidates that launch it once a call; and others, for scale."""
    sample = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    x0 = torch.empty_like(sample)
    output, model_input = (torch.randn(2 * BATCH, CHANNELS, SIZE, SIZE) for _ in range(2))
    schedule = fastddim.Schedule(fastddim.DDIMConfig())
    table = fastddim.StepTable.build(schedule, schedule.pairs(50))
    options: dict[str, Any] = {"guidance": Guidance(7.5), "limit": Clip(), "out": sample}
    step = functools.partial(fastddim.ddim_step, output, sample, table, STEP, backend="triton", **options)

    shape = StepShape(BATCH, CHANNELS * SIZE * SIZE, len(table), CHANNELS, guided=True, limit=Clip())
    (call,) = make_plan(shape).calls
    columns, index, _ = table.on(sample.device)
    given = {
        "output": output, "sample": sample, "table": columns, "step": index[STEP], "guidance": torch.tensor([7.5]),
        "next": sample, "x0": x0,
    }  # fmt: skip
    tensors = [given.get(name) for name in call.pointers]

    def plain() -> Any:
        return ddim_step_kernel[call.grid](
            *tensors, *call.numbers, **call.constants, num_warps=call.num_warps, enable_fp_fusion=False
        )

    compiled = plain()
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    arguments = (
        *call.grid, 1, 0, compiled.function, compiled.packed_metadata, None, None, None,
        *addresses, *call.numbers, *call.constants.values(),
    )  # fmt: skip
    run = compiled.run
    prepared = PreparedStep(output, sample, table, StepOptions(**options, model_input=model_input))
    steps = {
        DRIVER: lambda: run(*arguments),
        "plain Triton launch": plain,
        "ddim_step, in place": step,
        "ddim_step, in place, no x0": functools.partial(step, return_x0=False),
        "ddim_step, in place, model_input": functools.partial(step, model_input=model_input),
    }
    steps["PreparedStep, in place, model_input"] = lambda: prepared(output, STEP)
    others = {"torch.empty_like, twice": lambda: (torch.empty_like(sample), torch.empty_like(sample))}
    return call.grid, steps, others


def verify(stub: stub_cuda.Stub, grid: tuple[int, int], steps: dict[str, Callable[[], Any]]) -> None:
    """Every candidate launches the step, once a call.

    Raises:
        RuntimeError: one does not.
    """
    for name, step in steps.items():
        # The first call compiles.
        step()
        before = stub.launches
        step()
        if stub.launches != before + 1 or stub.grid != (*grid, 1):
            raise RuntimeError(
                f"{name}: {stub.launches - before} launches of {stub.grid} programs; expected 1 of {grid}"
            )


def measure(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds a call, over rounds that take the candidates in turn."""
    # timeit turns the garbage collector off.
    timers = {name: timeit.Timer(candidate) for name, candidate in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(CALLS) / CALLS * 1e6)
    figures = {}
    for name, values in times.items():
        quantiles = statistics.quantiles(values, n=5)
        figures[name] = {"median_us": statistics.median(values), "p20_us": quantiles[0], "p80_us": quantiles[-1]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25, help=f"of {CALLS} calls of each candidate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds: {arguments.rounds}; pass at least 2, as quantiles need them")
    stub = stub_cuda.install()
    set_allocator("keep")
    launch._DEVICE_TYPES = ("cuda", "cpu")
    torch.set_grad_enabled(False)
    grid, steps, others = make_candidates()
    verify(stub, grid, steps)
    figures = measure({**steps, **others}, arguments.rounds)

    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"float32 [{BATCH}, {CHANNELS}, {SIZE}, {SIZE}], guidance, clip: median of {arguments.rounds} rounds")
    print(f"{'microseconds a call':42} {'median':>7} {'p20':>7} {'p80':>7}  over the driver's own launch")
    for name, figure in figures.items():
        over = figure["median_us"] - figures[DRIVER]["median_us"]
        cell = f"{over:+10.2f}" if name in steps and name != DRIVER else ""
        print(f"{name:42} {figure['median_us']:7.2f} {figure['p20_us']:7.2f} {figure['p80_us']:7.2f}  {cell}".rstrip())
    if arguments.json:
        report = {"versions": versions, "grid": grid, "rounds": arguments.rounds, "calls": CALLS, "figures": figures}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
