"""How numbers of observations and actions are brought to a network's range, and back: LeRobot's modes and affine maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

# For each mode the statistics that it takes.
STATISTICS: dict[str, tuple[str, ...]] = {
    "identity": (),
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "quantiles": ("q01", "q99"),
    "quantile10": ("q10", "q90"),
    "affine": ("scale", "offset"),
}


@dataclass(frozen=True)
class Normalisation:
    """A map of each number on its own, and its inverse, in float32.

    Attributes:
        mode: a name in `STATISTICS`. `min_max` and the quantiles bring their two statistics to -1 and 1, `mean_std` to mean
            0 and deviation 1, `affine` is `scale * x + offset` (Diffusion Policy's), `identity` leaves all as it is.
        statistics: for each of the mode's names numbers that broadcast with a value `[..., *shape]`.
        eps: in place of a range of 0, and beside a deviation.

    Raises:
        ValueError: an unknown mode, or statistics that are missing or not finite; the message names them.
    """

    mode: str = "identity"
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.mode not in STATISTICS:
            raise ValueError(f"mode: {self.mode!r}; pass one of {', '.join(STATISTICS)}")
        for name in STATISTICS[self.mode]:
            if name not in self.statistics:
                raise ValueError(f"{name}: missing, which mode {self.mode!r} takes; pass it among the statistics")
            if not torch.isfinite(self.statistics[name]).all():
                raise ValueError(f"{name}: has NaN or infinite values; pass the statistics of a dataset")

    def normalise(self, value: torch.Tensor) -> torch.Tensor:
        """From units to the network's range; float32 of the value's shape."""
        first, second = self._pair(value)
        if self.mode == "mean_std":
            return (value - first) / (second + self.eps)
        if self.mode == "affine":
            return value * first + second
        return value if self.mode == "identity" else 2 * (value - first) / self._width(first, second) - 1

    def denormalise(self, value: torch.Tensor) -> torch.Tensor:
        """Back to units; float32 of the value's shape."""
        first, second = self._pair(value)
        if self.mode == "mean_std":
            return value * second + first
        if self.mode == "affine":
            return (value - second) / first
        return value if self.mode == "identity" else (value + 1) / 2 * self._width(first, second) + first

    def record(self) -> dict[str, object]:
        """For a manifest: `mode`, and each statistic as nested lists."""
        return {"mode": self.mode, **{name: self.statistics[name].tolist() for name in STATISTICS[self.mode]}}

    def _pair(self, value: torch.Tensor) -> Sequence[torch.Tensor]:
        statistics = [self.statistics[name].to(value.device, torch.float32) for name in STATISTICS[self.mode]]
        return statistics or (value, value)

    def _width(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        width = high - low
        return torch.where(width == 0, torch.full_like(width, self.eps), width)
