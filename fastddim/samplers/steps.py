"""`Steps`: which steps a run takes, before any method has turned them into noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastddim.config import require_choice, require_int, require_number
from fastddim.samplers.spacings import SPACINGS


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a run: a number of them, or a list.

    Attributes:
        num_inference_steps: how many steps; the method and the schedule space them.
        timesteps: what the model is called with at each step, descending, instead.
        sigmas: the noise's scale beside an x0 of scale 1 at each step, and behind the last one, descending, instead; as
            diffusers takes them, those of flow matching end before the last 0 and are shifted. With timesteps, the two
            are the run's levels as they are.
        spacing: one of `SPACINGS`, for a number of steps; by default the schedule's own.
        strength: a number in (0, 1]; below 1 only the last part of the steps is taken.

    Raises:
        ValueError: a value out of range, or a list and a number.
    """

    num_inference_steps: int | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    spacing: str | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        if (self.num_inference_steps is None) == (self.timesteps is None and self.sigmas is None):
            raise ValueError("num_inference_steps, timesteps, sigmas: pass a number of steps, or a list")
        for name in ("timesteps", "sigmas"):
            given = getattr(self, name)
            if given is not None:
                _check_numbers(name, given)
        require_number("strength", self.strength, 0.0, 1.0)
        if self.spacing is not None:
            require_choice("spacing", self.spacing, SPACINGS)
            if self.num_inference_steps is None:
                raise ValueError(f"spacing: {self.spacing!r} with a list of steps; pass num_inference_steps instead")

    @property
    def count(self) -> int:
        """The number of steps, where a method has no bound of its own for it."""
        require_int("num_inference_steps", self.num_inference_steps, 1)
        assert self.num_inference_steps is not None
        return self.num_inference_steps

    def without_sigmas(self, method: str) -> Steps:
        """These steps, for a method that is only defined at training timesteps."""
        for name in ("sigmas", "spacing"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} for method {method!r}, which steps through training timesteps; pass"
                    " timesteps, or another method such as 'euler' or 'dpmsolver++'"
                )
        return self

    def first_of(self, n: int) -> int:
        """The first of n steps that `strength` leaves (diffusers' `get_timesteps`)."""
        first = n - int(n * self.strength)
        if first == n and n:
            raise ValueError(f"strength: {self.strength!r} of {n} steps leaves none; pass at least {1 / n:.4g}")
        return first


def _check_numbers(name: str, given: Sequence[Any]) -> None:
    """Refuse a list of something else than numbers, or of sigmas that no state has."""
    if not len(given):
        raise ValueError(f"{name}: empty; pass at least one")
    for k, value in enumerate(given):
        number = np.asarray(value)
        if number.ndim or number.dtype.kind not in "iuf" or not np.isfinite(number):
            raise ValueError(f"{name}: entry {k} is {value!r}; pass finite numbers")
        if name == "sigmas" and (number < 0 or (number == 0 and k + 1 < len(given))):
            raise ValueError(f"sigmas: entry {k} is {value!r}; pass numbers above 0, and 0 at the end alone")


def to_steps(steps: Steps | int) -> Steps:
    """`Steps` from a number of them."""
    return steps if isinstance(steps, Steps) else Steps(steps)
