"""The noise levels of a run: how much signal and how much noise each of its states has.

A state is `x = signal * x0 + sigma * noise`. Three families of models differ in these two numbers alone:

- betas (DDPM, Stable Diffusion): `signal = sqrt(alpha_bar)`, `sigma = sqrt(1 - alpha_bar)`;
- flow matching (SD 3, Flux): `signal = 1 - s`, `sigma = s`;
- a noise of scale s added to x0 (EDM, k-diffusion): the state divided by what their `scale_model_input` divides it by,
  so that the model is called with the state itself.

All maths is float64 on the CPU.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastddim.coefficients import require_signal
from fastddim.config import require_choice
from fastddim.samplers.spacings import SPACINGS
from fastddim.samplers.steps import Steps
from fastddim.schedule import EDMSchedule, FloatArray, FlowSchedule, Pair, Schedule

AnySchedule: TypeAlias = "Schedule | FlowSchedule | EDMSchedule"

FINAL_SIGMAS = ("zero", "sigma_min")
# diffusers' alpha_bar at the end of training where zero terminal SNR would make it 0, so that sigma is finite.
_LEAST_ALPHA_BAR = 2.0**-24


@dataclass(frozen=True)
class NoiseLevels:
    """The states of a run of `n` steps, the noisiest first.

    Attributes:
        timesteps: `[n]` numbers, what the model is called with at each state but the last.
        signal, sigma: `[n + 1]` float64.
        prediction_type: what the model predicts: one of `PREDICTION_TYPES`, `flow`, or `edm`.
        start_scale: a run starts from standard normal noise times this number.
        data_scale: the factor of `edm`, as for `coefficients.columns`.
        skipped: how many steps before these a `strength` has left out.

    Raises:
        ValueError: shapes that do not fit, or levels whose noise rises.
    """

    timesteps: tuple[int, ...] | tuple[float, ...]
    signal: FloatArray = field(repr=False)
    sigma: FloatArray = field(repr=False)
    prediction_type: str = "epsilon"
    start_scale: float = 1.0
    data_scale: float = 1.0
    skipped: int = 0

    def __post_init__(self) -> None:
        shape = (len(self.timesteps) + 1,)
        if self.signal.shape != shape or self.sigma.shape != shape or shape == (1,):
            raise ValueError(
                f"sigmas: {len(self.sigma)} for {len(self.timesteps)} timesteps; pass one more than timesteps, and at"
                " least one timestep"
            )
        # sigma / signal, as a comparison that signal 0 does not upset, nor a rounding where a level is repeated.
        most = self.sigma[:-1] * self.signal[1:] * (1 + 1e-12)
        rises = np.flatnonzero(~(self.sigma[1:] * self.signal[:-1] <= most))
        if len(rises):
            k = int(rises[0])
            raise ValueError(
                f"sigmas, timesteps: the noise rises at step {k} (timestep {self.timesteps[k]:g}); pass them descending"
            )

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def noising(self) -> tuple[float, float]:
        """`(from_x0, from_noise)`, which bring a clean state to the first level."""
        return float(self.signal[0]), float(self.sigma[0])

    def starting_at(self, first: int) -> NoiseLevels:
        """The run from one of its steps on."""
        return dataclasses.replace(
            self, timesteps=self.timesteps[first:], signal=self.signal[first:], sigma=self.sigma[first:], skipped=first
        )


def find_levels(
    schedule: AnySchedule,
    steps: Steps,
    of_betas: Callable[..., NoiseLevels],
    *,
    final_sigmas_type: str,
    mu: float | None = None,
    **options: Any,
) -> NoiseLevels:
    """The levels of a run, for a method that takes more kinds of schedule than one.

    Args:
        schedule: the model's.
        steps: the run's.
        of_betas: `(schedule, steps, final_sigmas_type, **options) -> NoiseLevels`, the method's own for a `Schedule`.
        final_sigmas_type, mu: the method's, which some kinds of schedule take.
        options: the method's for a `Schedule` alone.

    Raises:
        ValueError: a value out of range, or an option that is for another kind of schedule.
    """
    require_choice("final_sigmas_type", final_sigmas_type, FINAL_SIGMAS)
    defaults = {name: inspect.signature(of_betas).parameters[name].default for name in options}
    unused = {name: (value, defaults[name]) for name, value in options.items()}
    if isinstance(schedule, FlowSchedule):
        unused["final_sigmas_type"] = final_sigmas_type, "zero"
    else:
        unused = {"mu": (mu, None), **({} if isinstance(schedule, Schedule) else unused)}
    for name, (value, default) in unused.items():
        # The configuration of an EDM scheduler has its own range under the names of a spacing's.
        if value not in (default, getattr(schedule, name, default)):
            raise ValueError(f"{name}: {value!r} with a {type(schedule).__name__}, which has none; leave it out")
    if isinstance(schedule, FlowSchedule):
        return flow_levels(schedule, steps, mu)
    if isinstance(schedule, EDMSchedule):
        return edm_levels(schedule, steps, final_sigmas_type)
    return of_betas(schedule, steps, final_sigmas_type, **options)


def beta_levels(schedule: Schedule, pairs: Sequence[Pair], *, clean_end: bool = False) -> NoiseLevels:
    """The levels of a schedule at `pairs`, which must follow each other: `schedule.pairs(n)`.

    `clean_end`: whether the last one is 1 instead of the schedule's.
    """
    timesteps = tuple(t for t, _ in pairs)
    alpha_bar = schedule.alpha_bar([*timesteps, pairs[-1][1]])
    if clean_end:
        alpha_bar[-1] = 1.0
    kind = schedule.config.prediction_type
    require_signal(kind, timesteps, alpha_bar[:-1])
    return NoiseLevels(timesteps, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), kind)


def scaled_levels(
    timesteps: npt.ArrayLike,
    sigmas: npt.ArrayLike,
    prediction_type: str,
    *,
    data_scale: float = 1.0,
    start_scale: float | None = None,
    scale_end: bool = False,
    skipped: int = 0,
) -> NoiseLevels:
    """The levels of states `x0 + sigma * noise`, divided by `sqrt(sigma**2 + data_scale**2)` but for the last.

    Args:
        timesteps: `[n]`.
        sigmas: `[n + 1]`, descending.
        prediction_type, data_scale, skipped: as the attributes of `NoiseLevels`.
        start_scale: as the attribute; by default that of a state which starts as noise of the first sigma.
        scale_end: divide the last state too.
    """
    noise = np.asarray(sigmas, dtype=np.float64)
    norm = np.hypot(noise, data_scale)
    if not scale_end or noise[-1] == 0:
        norm[-1:] = 1.0
    return NoiseLevels(
        tuple(np.asarray(timesteps).tolist()),
        1 / norm,
        noise / norm,
        prediction_type,
        start_scale=float(noise[0] / norm[0]) if start_scale is None else start_scale,
        data_scale=data_scale,
        skipped=skipped,
    )


def flow_levels(schedule: FlowSchedule, steps: Steps, mu: float | None) -> NoiseLevels:
    """The levels of flow matching (arXiv:2403.03206, section 2): `x = (1 - sigma) * x0 + sigma * noise`."""
    if steps.timesteps is not None and steps.sigmas is not None:
        sigmas = np.asarray(steps.sigmas, dtype=np.float64)
        timesteps: Any = steps.timesteps
    else:
        given = None if steps.sigmas is None else list(steps.sigmas)
        if steps.timesteps is not None:
            given = [t / schedule.num_train_timesteps for t in steps.timesteps]
        out = [level for level in given or () if not 0 < level <= 1]
        if out:
            name, most = ("sigmas", 1) if steps.timesteps is None else ("timesteps", schedule.num_train_timesteps)
            raise ValueError(f"{name}: {out[0] * most:g} with a FlowSchedule; pass numbers above 0 and up to {most}")
        shifted = schedule.sigmas(steps.num_inference_steps, sigmas=given, mu=mu)
        if steps.spacing is not None:
            shifted = SPACINGS[steps.spacing](len(shifted), shifted[-1], shifted[0])
            if shifted[0] > 1:
                raise ValueError(
                    f"spacing: {steps.spacing!r} has levels above 1, which flow matching has not; pass 'karras',"
                    " 'exponential', 'beta' or 'uniform'"
                )
        sigmas = np.append(shifted, 0.0)
        timesteps = shifted * schedule.num_train_timesteps if steps.timesteps is None else steps.timesteps
    return NoiseLevels(tuple(map(float, timesteps)), 1 - sigmas, sigmas, "flow").starting_at(
        steps.first_of(len(sigmas) - 1)
    )


def edm_levels(schedule: EDMSchedule, steps: Steps, final_sigmas_type: str) -> NoiseLevels:
    """The levels of EDM's models (arXiv:2206.00364), which are called with `log(sigma) / 4`."""
    if steps.sigmas is not None:
        sigmas = np.asarray(steps.sigmas, dtype=np.float64)
    elif steps.timesteps is not None:
        raise ValueError("timesteps: given to an EDMSchedule, whose models are called with log(sigma) / 4; pass sigmas")
    else:
        spacing = schedule.sigma_schedule if steps.spacing is None else steps.spacing
        spaced = SPACINGS[spacing](steps.count, schedule.sigma_min, schedule.sigma_max)
        sigmas = np.append(spaced, 0.0 if final_sigmas_type == "zero" else schedule.sigma_min)
    data_scale = schedule.sigma_data if schedule.prediction_type == "epsilon" else -schedule.sigma_data
    first = steps.first_of(len(sigmas) - 1)
    sigmas = sigmas[first:]
    timesteps = np.log(sigmas[:-1]) / 4
    # diffusers' `init_noise_sigma`.
    start = np.hypot(schedule.sigma_max, 1.0) / np.hypot(sigmas[0], data_scale) if first == 0 else 1.0
    return scaled_levels(timesteps, sigmas, "edm", data_scale=data_scale, start_scale=float(start), skipped=first)


@dataclass(frozen=True)
class TrainingSigmas:
    """The sigmas of a beta schedule's timesteps, `[num_train_timesteps]` ascending, and what lies between them."""

    values: FloatArray

    @classmethod
    def of(cls, schedule: Schedule) -> TrainingSigmas:
        # A cosine schedule ends lower than that without being 0.
        alpha_bar = np.where(schedule.alphas_cumprod == 0, _LEAST_ALPHA_BAR, schedule.alphas_cumprod)
        return cls(np.sqrt((1 - alpha_bar) / alpha_bar))

    def at(self, timesteps: npt.NDArray[Any]) -> FloatArray:
        """The sigmas of timesteps, linear between whole ones.

        Raises:
            ValueError: a timestep that is not between those of training.
        """
        out = timesteps[(timesteps < 0) | (timesteps > len(self.values) - 1)]
        if len(out):
            raise ValueError(f"timesteps: {out[0]:g}; pass numbers in [0, {len(self.values) - 1}]")
        found: FloatArray = np.interp(timesteps, np.arange(len(self.values)), self.values)
        return found

    def timesteps_of(self, sigmas: npt.ArrayLike) -> FloatArray:
        """The timesteps of sigmas, linear in the logarithm between whole ones."""
        logs = np.log(np.maximum(sigmas, 1e-10))
        found: FloatArray = np.interp(logs, np.log(self.values), np.arange(len(self.values)))
        return found

    def last(self, final_sigmas_type: str) -> float:
        """The sigma behind the last step: 0, or the least of training."""
        require_choice("final_sigmas_type", final_sigmas_type, FINAL_SIGMAS)
        return 0.0 if final_sigmas_type == "zero" else float(self.values[0])
