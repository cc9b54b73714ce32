"""The noise of seeds as a torch module, so that an exported file draws it itself: the bits of `fastddim.noise`."""

from __future__ import annotations

import math
from types import ModuleType

import torch

from fastddim.noise import normal_groups

_MASK = 0xFFFFFFFF
_SQRT_HALF = math.sqrt(0.5)


class NoiseModule(torch.nn.Module):
    """`fastddim.noise.normal_groups` in operations that ONNX has."""

    def forward(
        self, seed: torch.Tensor, group: torch.Tensor, step: torch.Tensor, stream: torch.Tensor
    ) -> torch.Tensor:
        """`[B, 4 * groups]` float32 from int64: seeds `[B]` of `seed_tensor`, element // 4 `[groups]`, step and stream `[]`."""
        words = [(seed[:, None] >> shift) & _MASK for shift in (0, 32)]
        values: torch.Tensor = normal_groups(torch, words, group[None], step, stream, _split)
        return values


def _split(xp: ModuleType, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`fastddim.noise.split_bits` of `u` in `[2**-33, 1]` without looking at bits, which ONNX cannot."""
    exponent, mantissa = torch.zeros_like(u), u
    for power in (32, 16, 8, 4, 2, 1):
        small = mantissa < _SQRT_HALF * 2.0 ** (1 - power)
        # Products with powers of two are exact.
        mantissa = torch.where(small, mantissa * 2.0**power, mantissa)
        exponent = torch.where(small, exponent - power, exponent)
    return exponent, mantissa
