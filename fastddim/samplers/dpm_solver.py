"""DPM-Solver++ (arXiv:2211.01095): exponential integrators of the ODE and the SDE in terms of x0."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastddim.coefficients import StepTable
from fastddim.config import require_choice, require_int, require_number
from fastddim.samplers.levels import (
    AnySchedule,
    NoiseLevels,
    TrainingSigmas,
    find_levels,
    scaled_levels,
)
from fastddim.samplers.method import method
from fastddim.samplers.rows import make_table, noise_ratio, x0_rows
from fastddim.samplers.spacings import SPACINGS
from fastddim.samplers.steps import Steps, to_steps
from fastddim.schedule import EDMSchedule, FloatArray, FlowSchedule, Schedule

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++")
SOLVER_TYPES = ("midpoint", "heun")


@method(
    "dpmsolver++",
    Schedule,
    FlowSchedule,
    EDMSchedule,
    schedulers=("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"),
)
def dpm_solver(
    schedule: AnySchedule,
    steps: Steps | int,
    *,
    solver_order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    final_sigmas_type: str = "zero",
    lambda_min_clipped: float = -np.inf,
    mu: float | None = None,
) -> StepTable:
    """The multistep solver: `x_next = from_x * x + from_d * D`, D extrapolated from this x0 and the previous one.

    Args:
        schedule: the model's.
        steps: the run's.
        solver_order: 1, which is DDIM in the deterministic case, or 2: 2M, algorithm 2.
        algorithm_type: `"dpmsolver++"`, or `"sde-dpmsolver++"`, which draws noise at each step (appendix D).
        solver_type: how the second order integrates, `"midpoint"` or `"heun"`.
        lower_order_final: take the last step at first order where there are fewer than 15, with those that a strength
            leaves out, as the end is where a second order extrapolates most. A step to a clean end is of first order always.
        euler_at_final: take the last step at first order in any case.
        final_sigmas_type: `"zero"`, or `"sigma_min"` to stop at the least level of training.
        lambda_min_clipped: the least log(signal / sigma) that a number of steps starts from, for betas.
        mu: shift of a `FlowSchedule` that has `use_dynamic_shifting`.

    Raises:
        ValueError: a value out of range.
    """
    require_choice("algorithm_type", algorithm_type, ALGORITHMS)
    require_choice("solver_type", solver_type, SOLVER_TYPES)
    if solver_order not in (1, 2):
        raise ValueError(f"solver_order: {solver_order!r}; pass 1 or 2, as a step has room for one previous x0")
    require_number("lambda_min_clipped", lambda_min_clipped, -np.inf, np.inf)
    levels = find_levels(
        schedule, to_steps(steps), _beta_levels, final_sigmas_type=final_sigmas_type, mu=mu,
        lambda_min_clipped=lambda_min_clipped,
    )  # fmt: skip
    ratio = noise_ratio(levels)
    signal_next, sigma, sigma_next = levels.signal[1:], levels.sigma[:-1], levels.sigma[1:]
    # Of `exp(-h)`, h the step in lambda = log(signal / sigma): the SDE takes twice the step, and adds the noise of it.
    stochastic = algorithm_type == "sde-dpmsolver++"
    power = 2 if stochastic else 1
    from_x = sigma_next / sigma * (ratio if stochastic else 1)
    from_d = signal_next * ((1 - ratio) * (1 + ratio) if stochastic else 1 - ratio)
    noise_scale = sigma_next * np.sqrt((1 - ratio) * (1 + ratio)) if stochastic else np.zeros(len(levels))
    with np.errstate(divide="ignore"):
        h = -np.log(ratio)
    ahead = _extrapolation(h, power, solver_type)
    if solver_order == 1:
        ahead[:] = 0
    if sigma_next[-1] == 0 or euler_at_final or (lower_order_final and levels.skipped + len(levels) < 15):
        ahead[-1] = 0
    rows = x0_rows(levels, from_x, from_d * (1 + ahead), noise_scale)
    # Also where no step of a short run looks back, so that runs of all lengths are of one kind.
    return make_table(levels, np.column_stack([rows, -from_d * ahead]) if solver_order == 2 else rows)


def _extrapolation(h: FloatArray, power: int, solver_type: str) -> FloatArray:
    """`[n]`: D = x0 + extrapolation * (x0 - previous x0), of steps h in lambda; 0 where one of the two is 0 or infinite."""
    before = np.append(np.inf, h[:-1])
    usable = np.isfinite(h) & np.isfinite(before) & (h > 0) & (before > 0)
    own, before = np.where(usable, h, 1.0), np.where(usable, before, 1.0)
    factor: npt.ArrayLike = 0.5
    if solver_type == "heun":
        factor = 1 / -np.expm1(-power * own) - 1 / (power * own)
    found: FloatArray = np.where(usable, factor * own / before, 0.0)
    return found


def _beta_levels(
    schedule: Schedule, steps: Steps, final_sigmas_type: str, lambda_min_clipped: float = -np.inf
) -> NoiseLevels:
    """The levels of diffusers' `DPMSolverMultistepScheduler`."""
    config, training = schedule.config, TrainingSigmas.of(schedule)
    if steps.sigmas is not None:
        sigmas = np.asarray(steps.sigmas, dtype=np.float64)
        timesteps = training.timesteps_of(sigmas[:-1]) if steps.timesteps is None else np.asarray(steps.timesteps)
    elif steps.spacing is not None:
        sigmas = SPACINGS[steps.spacing](steps.count, training.values[0], training.values[-1])
        timesteps = training.timesteps_of(sigmas)
        # diffusers calls the model with whole numbers here.
        rounded = steps.spacing == "karras" and config.beta_schedule != "squaredcos_cap_v2"
        timesteps = (timesteps.round() if rounded else np.trunc(timesteps)).astype(np.int64)
        sigmas = np.append(sigmas, training.last(final_sigmas_type))
    else:
        if steps.timesteps is not None:
            timesteps = np.array(steps.timesteps)
        else:
            end = int((-np.log(training.values) >= lambda_min_clipped).sum())
            if end == 0:
                raise ValueError(
                    f"lambda_min_clipped: {lambda_min_clipped!r} leaves no timestep of training; pass a smaller number"
                )
            timesteps = _timesteps(config.timestep_spacing, config.steps_offset, len(training.values), end, steps)
        sigmas = np.append(training.at(timesteps), training.last(final_sigmas_type))
    first = steps.first_of(len(timesteps))
    return scaled_levels(
        timesteps[first:], sigmas[first:], config.prediction_type, start_scale=1.0, scale_end=True, skipped=first
    )


def _timesteps(spacing: str, offset: int, n_train: int, end: int, steps: Steps) -> npt.NDArray[np.int64]:
    """`[n]` descending, below `end`."""
    n = steps.count
    # Of more steps some would be repeated.
    most = {"leading": max(1, end - 1), "linspace": end}.get(spacing, n_train)
    require_int("num_inference_steps", n, 1, most)
    timesteps: npt.NDArray[Any]
    if spacing == "linspace":
        timesteps = np.linspace(0, end - 1, n + 1).round()[:0:-1]
    elif spacing == "leading":
        timesteps = np.arange(n, 0, -1) * (end // (n + 1)) + offset
    elif spacing == "trailing":
        timesteps = np.arange(end, 0, -n_train / n).round() - 1
        # diffusers' list has one more, -1, for some numbers of steps.
        timesteps = timesteps[timesteps >= 0]
    else:
        raise ValueError(f"timestep_spacing: {spacing!r} for method 'dpmsolver++'; pass leading, trailing or linspace")
    return timesteps.astype(np.int64)
