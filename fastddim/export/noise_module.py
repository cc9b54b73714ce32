"""The noise of seeds as a torch module, so that an exported file draws it itself: the bits of `fastddim.noise`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch

from fastddim.noise import normal_groups

_MASK = 0xFFFFFFFF
_SQRT_HALF = math.sqrt(0.5)


class NoiseModule(torch.nn.Module):
    """`fastddim.noise.normal_for` in operations that ONNX has.

    Args:
        shape: of one sample.
        stream: `STREAM_INITIAL` or `STREAM_STEP`.
    """

    def __init__(self, shape: Sequence[int], stream: int) -> None:
        super().__init__()
        self._shape, self._stream = tuple(shape), stream

    def forward(self, seed: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, *shape]` float32 of int64 seeds `[B]` as `seed_tensor` has them, for a step int64 `[]`, 0 by default."""
        n = math.prod(self._shape)
        words = [(seed[:, None] >> shift) & _MASK for shift in (0, 32)]
        group = torch.arange((n + 3) // 4)[None]
        values: torch.Tensor = normal_groups(torch, words, group, 0 if step is None else step, self._stream, _split)
        return values[:, :n].reshape(-1, *self._shape)


def _split(xp: ModuleType, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`fastddim.noise.split_bits` of `u` in `[2**-33, 1]` without looking at bits, which ONNX cannot."""
    exponent, mantissa = torch.zeros_like(u), u
    for power in (32, 16, 8, 4, 2, 1):
        small = mantissa < _SQRT_HALF * 2.0 ** (1 - power)
        # Products with powers of two are exact.
        mantissa = torch.where(small, mantissa * 2.0**power, mantissa)
        exponent = torch.where(small, exponent - power, exponent)
    return exponent, mantissa
