"""Noise schedules and timestep spacings: a configuration becomes `alphas_cumprod` and explicit `(t, t_next)` pairs.

`FlowSchedule` and `EDMSchedule` are those of models that know no betas, with the names of diffusers' configurations.
All maths is float64 on the CPU. `t_next` is None where a transition leads to the clean end of the chain, behind timestep 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastddim.config import (
    TRANSITIONS,
    DDIMConfig,
    require_choice,
    require_int,
    require_number,
)

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


def shift_snr(config: DDIMConfig, scale: float) -> DDIMConfig:
    """The configuration with all signal-to-noise ratios divided by a number > 0 (CogVideoX's `snr_shift_scale`).

    Its `trained_betas` say so, before any zero-SNR rescaling (arXiv:2403.03206, equation 23, has the same shift).
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"snr_shift_scale: {scale!r}; pass a finite number > 0")
    bars = make_alphas_cumprod(replace(config, rescale_betas_zero_snr=False))
    bars = bars / (scale + (1 - scale) * bars)
    betas = 1 - bars / np.concatenate([[1.0], bars[:-1]])
    return replace(config, trained_betas=tuple(betas.tolist()))


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


def check_timesteps(timesteps: Iterable[float], num_train_timesteps: int) -> list[int]:
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
        timesteps: Iterable[float] | None = None,
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


TIME_SHIFTS = ("exponential", "linear")


@dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """The noise levels of flow matching (SD 3, Flux), as diffusers' `FlowMatchEulerDiscreteScheduler` has them.

    Attributes:
        num_train_timesteps: the model is called with `sigma * num_train_timesteps`.
        shift: static shift towards noise, arXiv:2403.03206, equation 23.
        use_dynamic_shifting: shift by a `mu` of the image's size instead.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: the line that gives `mu`.
        shift_terminal: stretch the levels so that the last one is this number.
        time_shift_type: what `mu` is: `"exponential"`, the logarithm of the shift; `"linear"`, the shift.

    Raises:
        ValueError: a value out of range.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    time_shift_type: str = "exponential"

    def __post_init__(self) -> None:
        require_int("num_train_timesteps", self.num_train_timesteps, 1)
        require_choice("time_shift_type", self.time_shift_type, TIME_SHIFTS)
        if not 0 < self.shift < float("inf"):
            raise ValueError(f"shift: {self.shift!r}; pass a finite number > 0")
        if self.shift_terminal:
            require_number("shift_terminal", self.shift_terminal, 0.0, 1.0)

    def mu(self, image_seq_len: int) -> float:
        """The shift of an image of so many tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + (image_seq_len - self.base_image_seq_len) * slope

    def sigmas(
        self,
        num_inference_steps: int | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> FloatArray:
        """`[n]` float64 levels in (0, 1], descending, shifted, without the clean end.

        Args:
            num_inference_steps: evenly spaced before the shift, from the first to the last of training.
            sigmas: an explicit list to shift instead.
            mu: needed with `use_dynamic_shifting`.

        Raises:
            ValueError: a `mu` that is missing or has no use.
        """
        if self.use_dynamic_shifting != (mu is not None):
            fix = "pass one, such as schedule.mu(image_seq_len)" if mu is None else "leave it out, or pass shift"
            raise ValueError(f"mu: {mu!r} with use_dynamic_shifting {self.use_dynamic_shifting}; {fix}")
        if mu is not None:
            # exp(mu) is finite, and a shift above 0.
            require_number("mu", mu, *((-700.0, 700.0) if self.time_shift_type == "exponential" else (1e-300, 1e300)))
        if sigmas is not None:
            levels = np.asarray(sigmas, dtype=np.float64)
        else:
            require_int("num_inference_steps", num_inference_steps, 1)
            assert num_inference_steps is not None
            lowest = 1 / self.num_train_timesteps
            if mu is None:
                lowest = float(self._shifted(np.float64(lowest), self.shift))
            levels = np.linspace(1.0, lowest, num_inference_steps)
        if mu is not None and self.time_shift_type == "exponential":
            mu = math.exp(mu)
        levels = self._shifted(levels, self.shift if mu is None else mu)
        if self.shift_terminal:
            if levels[-1] == 1:
                raise ValueError(
                    f"shift_terminal: {self.shift_terminal!r} with a last level of 1; pass more steps, or leave it out"
                )
            levels = 1 - (1 - levels) * ((1 - self.shift_terminal) / (1 - levels[-1]))
        shifted: FloatArray = levels
        return shifted

    @staticmethod
    def _shifted(levels: Any, shift: float) -> Any:
        return shift * levels / (1 + (shift - 1) * levels)


@dataclass(frozen=True, kw_only=True)
class EDMSchedule:
    """The noise levels of models with EDM's preconditioning (arXiv:2206.00364), as diffusers' EDM schedulers have them.

    Attributes:
        sigma_min, sigma_max: scales of the noise.
        sigma_data: deviation of the data, by which the preconditioning scales.
        sigma_schedule: how a run spaces them, `"karras"` or `"exponential"`.
        prediction_type: `"epsilon"` or `"v_prediction"`, the sign of the model's output.

    Raises:
        ValueError: a value out of range.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_schedule: str = "karras"
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        require_choice("sigma_schedule", self.sigma_schedule, ("karras", "exponential"))
        require_choice("prediction_type", self.prediction_type, ("epsilon", "v_prediction"))
        if not (0 < self.sigma_min < self.sigma_max < float("inf") and 0 < self.sigma_data < float("inf")):
            raise ValueError(
                f"sigma_min, sigma_max, sigma_data: {self.sigma_min!r}, {self.sigma_max!r}, {self.sigma_data!r}; pass"
                " finite numbers, 0 < sigma_min < sigma_max and 0 < sigma_data"
            )
