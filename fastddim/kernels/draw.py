"""Standard normal noise from seeds in one launch: `fastddim.noise.normal` on the device, bit for bit."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastddim.kernels.launch import COMPILING
from fastddim.kernels.philox import normal_block
from fastddim.kernels.plan import make_grid
from fastddim.kernels.step import program_place, store

_BLOCK = 1024


@triton.jit
def normal_kernel(out_ptr, seeds_ptr, n, step, STREAM: tl.constexpr, SAMPLE_AXIS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of one sample's noise."""
    b, block, _ = program_place(SAMPLE_AXIS)
    start = block.to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    live = lanes < tl.minimum(n - start, BLOCK).to(tl.int32)
    noise = normal_block(tl.load(seeds_ptr + b), tl.cast(step, tl.int64), start, BLOCK, STREAM)
    store(out_ptr, b * n, (b, 1, start, lanes, n, 1), live, noise, False)


def draw_normal(seeds: torch.Tensor, out: torch.Tensor, stream: int, step: int = 0) -> torch.Tensor:
    """Fill `out` with `fastddim.noise.normal_for(seeds, step, out.shape[1:], stream)`, rounded to its dtype.

    Args:
        seeds: `[B]` int64, of `noise.seed_tensor`.
        out: contiguous `[B, ...]`, float32, float16 or bfloat16, on the device of the seeds.
        stream: `noise.STREAM_INITIAL` or `noise.STREAM_STEP`.
        step: the index of the step in its run.

    Returns:
        `out`.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
    """
    if not out.is_contiguous() or seeds.shape != out.shape[:1] or seeds.device != out.device:
        raise ValueError(
            f"out: {tuple(out.shape)} with strides {out.stride()} on {out.device}, seeds: {tuple(seeds.shape)} on"
            f" {seeds.device}; pass a contiguous out [B, ...] and seeds [B] on one device"
        )
    n = math.prod(out.shape[1:])
    if out.numel():
        sample_axis, grid = make_grid(out.shape[0], triton.cdiv(n, _BLOCK), n)
        # Its first launch compiles.
        with COMPILING, torch.cuda.device_of(out):
            normal_kernel[grid](
                out, seeds, n, step, STREAM=stream, SAMPLE_AXIS=sample_axis, BLOCK=_BLOCK, enable_fp_fusion=False
            )
    return out
