"""Launch every kind of the fused kernels, for checkers and profilers: a memory error or a race stops or marks the run.

    compute-sanitizer --tool memcheck python benchmarks/launch_kernels.py
    ncu ... python benchmarks/launch_kernels.py --elements 16777216

Without a GPU it needs TRITON_INTERPRET=1. Ragged sizes by default; with `--elements` the plain step alone, over latents.
"""

from __future__ import annotations

import argparse
import itertools
import os

import torch

from fastddim import Clip, DDIMConfig, DynamicThreshold, Guidance, Schedule, StepTable, ddim_step
from fastddim.kernels import draw_normal, plan
from fastddim.noise import STREAM_INITIAL, seed_tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The last one is above what one program holds, where it is not interpreted.
SHAPES = ((2, 3, 7), (3, 4, 16, 16), (2, 3, 96, 80))
LIMITS = (None, Clip(), DynamicThreshold(0.995, 2.0))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def launch(
    shape: tuple[int, ...], limit: object, guided: bool, noisy: bool, dtype: torch.dtype, index: str = "number"
) -> None:
    """One step, with noise from seeds, guidance and its rescale where asked for.

    Args:
        index: `number`; or as captured loops have it, in place, with the next model input, and an index on the device
            that moves on: `shared`, or one for each sample, `own`.
    """
    schedule = Schedule(DDIMConfig())
    table = StepTable.build(schedule, schedule.pairs(10), eta=float(noisy))
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(((1 + guided) * shape[0], *shape[1:]), generator=generator).to(DEVICE, dtype)
    sample = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    options = {"guidance": Guidance(3.0, 0.7)} if guided else {}
    seeds = seed_tensor(range(shape[0]), DEVICE) if noisy else None
    step: int | torch.Tensor = 5
    if index != "number":
        step = torch.full(shape[:1] if index == "own" else (), 5, device=DEVICE)
        options |= {
            "out": sample,
            "model_input": torch.empty_like(output),
            "advance": True,
            "timesteps": torch.tensor(table.timesteps, device=DEVICE),
            "next_timestep": torch.zeros(len(output), dtype=torch.int64, device=DEVICE),
        }
    x_next, _ = ddim_step(output, sample, table, step, limit=limit, seeds=seeds, backend="triton", **options)
    if not bool(torch.isfinite(x_next).all()):
        raise SystemExit(f"not finite: {shape}, {limit}, guided {guided}, noisy {noisy}, {dtype}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--elements", type=int, help="elements of the plain step's state, a multiple of 16,384")
    arguments = parser.parse_args()
    if arguments.elements is not None:
        if arguments.elements < 1 or arguments.elements % (1 << 14):
            parser.error(f"--elements: {arguments.elements}; pass a multiple of {1 << 14}")
        for _ in range(3):
            launch((arguments.elements >> 14, 4, 64, 64), Clip(), False, False, torch.float32)
        return
    if INTERPRETED:
        # The tier of large samples, at sizes that the interpreter can take.
        plan.WHOLE_SAMPLE, plan.STATISTICS_BLOCK = 512, 64
    shapes = SHAPES[:2] if INTERPRETED else SHAPES
    kinds = list(itertools.product(shapes, LIMITS, (False, True), (False, True)))
    for kind, dtype in zip(kinds, itertools.cycle(DTYPES)):
        launch(*kind, dtype)
    loops = list(itertools.product(shapes, LIMITS, (True,), (True,), (torch.float32,), ("shared", "own")))
    for kind in loops:
        launch(*kind)
    draw_normal(seed_tensor(range(3), DEVICE), torch.empty(3, 5, 7, device=DEVICE), STREAM_INITIAL)
    print(f"launched {len(kinds) + len(loops)} kinds of step")


if __name__ == "__main__":
    main()
