"""Noise schedules and timestep spacings: a configuration becomes `alphas_cumprod` and explicit `(t, t_next)` pairs.

All maths is float64 on the CPU. `t_next` is None where a transition leads to the clean end of the chain, behind timestep 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastddim.config import TRANSITIONS, DDIMConfig, require_choice, require_int

FloatArray = npt.NDArray[np.float64]
Pair: TypeAlias = "tuple[int, int | None]"


def make_betas(config: DDIMConfig) -> FloatArray:
    """`[num_train_timesteps]` float64 betas of a configuration, before any zero-SNR rescaling."""
    n = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.asarray(config.trained_betas, dtype=np.float64)
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, n)
    if config.beta_schedule == "scaled_linear":
        roots: FloatArray = np.linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), n)
        return roots**2
    # Nichol and Dhariwal, arXiv:2102.09672, equation 17, with their cap of 0.999.
    edges: FloatArray = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
    betas: FloatArray = np.minimum(1.0 - edges[1:] / edges[:-1], 0.999)
    return betas


def make_alphas_cumprod(config: DDIMConfig) -> FloatArray:
    """`[num_train_timesteps]` float64 `alphas_cumprod` (the paper's alpha_t), read-only.

    With `rescale_betas_zero_snr` the last one is exactly 0 (arXiv:2305.08891, algorithm 1).
    """
    alphas_cumprod: npt.NDArray[Any] = np.cumprod(1.0 - make_betas(config))
    if config.rescale_betas_zero_snr:
        root = np.sqrt(alphas_cumprod)
        alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    alphas_cumprod.setflags(write=False)
    return alphas_cumprod


def make_timesteps(config: DDIMConfig, num_inference_steps: int) -> list[int]:
    """Descending training timesteps at which the model is called, by `config.timestep_spacing`.

    `leading`, `trailing` and `linspace` are table 2 of arXiv:2305.08891, rounded as diffusers rounds; `quadratic` is
    `floor(c * i**2)` (arXiv:2010.02502, appendix D.2) with the last one at the end of training, and repeated
    timesteps, which it has near 0, moved up to the next free one.

    Raises:
        ValueError: more steps than training timesteps, or a spacing and offset that leave their range.
    """
    n_train, n, spacing = config.num_train_timesteps, num_inference_steps, config.timestep_spacing
    require_int("num_inference_steps", n, 1, n_train)
    ascending: npt.NDArray[Any]
    if spacing == "leading":
        ascending = np.arange(n) * (n_train // n) + config.steps_offset
    elif spacing == "trailing":
        ascending = np.round(np.arange(n_train, 0, -n_train / n))[:n][::-1] - 1
    elif spacing == "linspace":
        ascending = np.linspace(0, n_train - 1, n).round()
    else:
        ascending = (
            np.floor(np.linspace(0, math.sqrt(n_train - 1), n) ** 2 + 1e-9) if n > 1 else np.array([n_train - 1])
        )
        ascending = np.maximum.accumulate(ascending - np.arange(n)) + np.arange(n)
    timesteps = [int(t) for t in ascending[::-1]]
    if timesteps[0] >= n_train:
        raise ValueError(
            f"steps_offset: {config.steps_offset} with {n} leading steps puts the first timestep at {timesteps[0]},"
            f" past the last training timestep {n_train - 1}; pass steps_offset <= {n_train - 1 - (n - 1) * (n_train // n)}"
        )
    return timesteps


def check_timesteps(timesteps: Iterable[int], num_train_timesteps: int) -> list[int]:
    """Validate an explicit list: strictly descending integers in `[0, num_train_timesteps)`, at least one."""
    checked: list[int] = []
    for i, t in enumerate(timesteps):
        require_int("timesteps", t, 0, num_train_timesteps - 1)
        if checked and t >= checked[-1]:
            raise ValueError(
                f"timesteps: entry {i} ({t}) is not below entry {i - 1} ({checked[-1]}); pass them descending"
            )
        checked.append(int(t))
    if not checked:
        raise ValueError("timesteps: empty; pass at least one")
    return checked


@dataclass(frozen=True)
class Schedule:
    """A noise schedule: what training fixed, and nothing of how it is sampled.

    Attributes:
        config: the configuration it was built from.
        alphas_cumprod: `[num_train_timesteps]` float64, read-only.
    """

    config: DDIMConfig = field(default_factory=DDIMConfig)
    alphas_cumprod: FloatArray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas_cumprod", make_alphas_cumprod(self.config))

    @property
    def final_alpha_cumprod(self) -> float:
        """The alpha_bar behind timestep 0: 1 with `set_alpha_to_one`, else timestep 0's own."""
        return 1.0 if self.config.set_alpha_to_one else float(self.alphas_cumprod[0])

    def alpha_bar(self, timesteps: Sequence[int | None]) -> FloatArray:
        """The alpha_bar at each training timestep, float64; None stands for the clean end behind timestep 0.

        Raises:
            ValueError: a negative timestep, which would count from the end.
            IndexError: a timestep past the end of training.
        """
        lowest = min((t for t in timesteps if t is not None), default=0)
        if lowest < 0:
            raise ValueError(f"timesteps: {lowest}; pass training timesteps >= 0, or None for the clean end")
        bars = [self.final_alpha_cumprod if t is None else self.alphas_cumprod[t] for t in timesteps]
        return np.array(bars, dtype=np.float64)

    def pairs(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Iterable[int] | None = None,
        strength: float = 1.0,
        transitions: str = "exact",
    ) -> tuple[Pair, ...]:
        """The `(t, t_next)` transitions of a run, in sampling order; `t_next` is None where one leads to the clean end.

        Args:
            num_inference_steps: how many steps, spaced by `config.timestep_spacing`.
            timesteps: an explicit descending list instead.
            strength: a number in (0, 1]; below 1 only the last `int(num_inference_steps * strength)` steps run, for
                image-to-image (diffusers' `get_timesteps`). The starting state then belongs at the first pair's `t`.
            transitions: `"exact"`: `t_next` is the list's own next timestep. `"diffusers"`: it is
                `t - num_train_timesteps // num_inference_steps`, as diffusers' `DDIMScheduler.step` recomputes it;
                the two differ with `trailing` or `linspace` spacing when the step count does not divide the training
                timesteps, and with a `steps_offset`.

        Raises:
            ValueError: neither or both of `num_inference_steps` and `timesteps`, or a value out of range.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("num_inference_steps, timesteps: pass exactly one of the two")
        require_choice("transitions", transitions, TRANSITIONS)
        if not 0 < strength <= 1:
            raise ValueError(f"strength: {strength!r}; pass a number in (0, 1]")
        n_train = self.config.num_train_timesteps
        if timesteps is None:
            assert num_inference_steps is not None
            current = make_timesteps(self.config, num_inference_steps)
        else:
            current = check_timesteps(timesteps, n_train)
        n = len(current)
        first = n - int(n * strength)
        if first == n:
            raise ValueError(f"strength: {strength!r} of {n} steps leaves none; pass at least {1 / n:.4g}")
        following: list[int | None] = [*current[1:], None]
        if transitions == "diffusers":
            stride = n_train // n
            following = [t - stride if t >= stride else None for t in current]
        return tuple(zip(current, following, strict=True))[first:]
