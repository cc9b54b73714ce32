"""What a sampler does with arrays, in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastddim.export.bundle_sampler import NumpyArrays
from fastddim.noise import STREAM_STEP, normal


def as_tensor(value: Any) -> torch.Tensor:
    """A tensor as it is; numpy's arrays and numbers on the host, whatever torch's default device."""
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value))


class TorchArrays(NumpyArrays):
    """Tensors on a device; numpy's arrays are taken too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (torch.Tensor, np.ndarray))

    def place(self, value: Any) -> Any:
        return as_tensor(np.array(value) if isinstance(value, np.ndarray) else value).to(self._device)

    def casts(self, array: Any, dtype: str) -> bool:
        return torch.can_cast(array.dtype, getattr(torch, dtype))

    def is_floating(self, array: Any) -> bool:
        return bool(array.is_floating_point()) if isinstance(array, torch.Tensor) else super().is_floating(array)

    def cast(self, array: Any, dtype: str) -> Any:
        return array.to(getattr(torch, dtype)).contiguous()

    def full(self, shape: Sequence[int], value: float, dtype: str) -> Any:
        return torch.full(tuple(shape), value, dtype=getattr(torch, dtype), device=self._device)

    def normal(self, seeds: Sequence[int], step: int, shape: Sequence[int], stream: int = STREAM_STEP) -> Any:
        return normal(seeds, step, shape, stream, device=self._device)

    def is_finite(self, array: Any) -> bool:
        return bool(torch.isfinite(array).all())
