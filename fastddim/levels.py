"""The noise levels of a run: how much signal and how much noise each of its states has.

A state is `x = signal * x0 + sigma * noise`. Three families of models differ in these two numbers alone:

- betas (DDPM, Stable Diffusion): `signal = sqrt(alpha_bar)`, `sigma = sqrt(1 - alpha_bar)`;
- flow matching (SD 3, Flux): `signal = 1 - s`, `sigma = s`;
- a noise of scale s added to x0 (EDM, k-diffusion): the state divided by what their `scale_model_input` divides it by,
  so that the model is called with the state itself.

All maths is float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fastddim.schedule import FloatArray, Pair, Schedule


@dataclass(frozen=True)
class NoiseLevels:
    """The states of a run of `n` steps, the noisiest first.

    Attributes:
        timesteps: `[n]` numbers, what the model is called with at each state but the last.
        signal, sigma: `[n + 1]` float64.
        prediction_type: what the model predicts.
        start_scale: a run starts from standard normal noise times this number.
        data_scale: what data is divided by where `signal**2 + sigma**2 = 1` is to hold (EDM's sigma_data).

    Raises:
        ValueError: shapes that do not fit, or levels whose noise does not fall.
    """

    timesteps: tuple[int, ...] | tuple[float, ...]
    signal: FloatArray = field(repr=False)
    sigma: FloatArray = field(repr=False)
    prediction_type: str = "epsilon"
    start_scale: float = 1.0
    data_scale: float = 1.0

    def __post_init__(self) -> None:
        shape = (len(self.timesteps) + 1,)
        if self.signal.shape != shape or self.sigma.shape != shape or shape == (1,):
            raise ValueError(
                f"levels: {len(self.timesteps)} timesteps, signal {self.signal.shape} and sigma {self.sigma.shape};"
                " pass one level more than timesteps, and at least one timestep"
            )
        # sigma / signal, as a comparison that signal 0 does not upset.
        rises = np.flatnonzero(self.sigma[1:] * self.signal[:-1] >= self.sigma[:-1] * self.signal[1:])
        if len(rises):
            k = int(rises[0])
            raise ValueError(
                f"levels: the noise does not fall at step {k} (timestep {self.timesteps[k]}); pass them descending"
            )

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def noising(self) -> tuple[float, float]:
        """`(from_x0, from_noise)`, which bring a clean state to the first level."""
        return float(self.signal[0]), float(self.sigma[0])


def beta_levels(schedule: Schedule, pairs: Sequence[Pair], prediction_type: str | None = None) -> NoiseLevels:
    """The levels of a schedule at `pairs`, which must follow each other: `schedule.pairs(n)`."""
    timesteps = tuple(t for t, _ in pairs)
    alpha_bar = schedule.alpha_bar([*timesteps, pairs[-1][1]])
    kind = schedule.config.prediction_type if prediction_type is None else prediction_type
    return NoiseLevels(timesteps, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), kind)


def scaled_levels(
    timesteps: Sequence[float], sigmas: npt.ArrayLike, prediction_type: str, data_scale: float = 1.0
) -> NoiseLevels:
    """The levels of states `x0 + sigma * noise`, divided by `sqrt(sigma**2 + data_scale**2)` but for a clean end.

    Args:
        timesteps: `[n]`.
        sigmas: `[n + 1]`, descending; a last one of 0 is the clean end.
        prediction_type, data_scale: as the attributes of `NoiseLevels`.
    """
    noise = np.asarray(sigmas, dtype=np.float64)
    norm = np.hypot(noise, data_scale)
    norm[-1] = norm[-1] if noise[-1] else 1.0
    called = np.asarray(timesteps).tolist()
    return NoiseLevels(
        tuple(called),
        1 / norm,
        noise / norm,
        prediction_type,
        start_scale=float(noise[0] / norm[0]),
        data_scale=data_scale,
    )


def flow_levels(timesteps: Sequence[float], sigmas: npt.ArrayLike) -> NoiseLevels:
    """The levels of flow matching (arXiv:2403.03206, section 2): `x = (1 - sigma) * x0 + sigma * noise`.

    Args:
        timesteps: `[n]`.
        sigmas: `[n + 1]` numbers in [0, 1], descending.
    """
    noise = np.asarray(sigmas, dtype=np.float64)
    return NoiseLevels(tuple(np.asarray(timesteps).tolist()), 1 - noise, noise, "flow")
