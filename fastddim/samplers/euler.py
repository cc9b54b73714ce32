"""Euler's method, plain and ancestral (arXiv:2206.00364, algorithm 1 without churn; k-diffusion's `sample_euler`)."""

from __future__ import annotations

import numpy as np

from fastddim.coefficients import StepTable
from fastddim.config import require_choice, require_number
from fastddim.samplers.levels import (
    AnySchedule,
    NoiseLevels,
    TrainingSigmas,
    find_levels,
    scaled_levels,
)
from fastddim.samplers.method import method
from fastddim.samplers.rows import inverse_of, linear_rows, make_table, noise_ratio, x0_rows
from fastddim.samplers.spacings import SPACINGS
from fastddim.samplers.steps import Steps, to_steps
from fastddim.schedule import EDMSchedule, FlowSchedule, Schedule, make_timesteps

TIMESTEP_TYPES = ("discrete", "continuous")


@method(
    "euler",
    Schedule,
    FlowSchedule,
    EDMSchedule,
    schedulers=("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"),
)
def euler(
    schedule: AnySchedule,
    steps: Steps | int,
    *,
    final_sigmas_type: str = "zero",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    timestep_type: str = "discrete",
    mu: float | None = None,
    stochastic_sampling: bool = False,
    use_clipped_model_output: bool = False,
) -> StepTable:
    """`x_next = x0 + sigma_next * eps` in units of the signal, along the line from x to x0.

    For flow matching this is `x + (sigma_next - sigma) * v`.

    Args:
        schedule: the model's. With betas the state is divided by `sqrt(sigma**2 + 1)`, as the model is called with it.
        steps: the run's.
        final_sigmas_type: `"zero"`, or `"sigma_min"` to stop at the least level of training.
        sigma_min, sigma_max: the range of a spacing, for betas; by default the run's own.
        timestep_type: `"continuous"`: a model with betas is called with `log(sigma) / 4`.
        mu: shift of a `FlowSchedule` that has `use_dynamic_shifting`.
        stochastic_sampling: draw the noise of the next level anew.
        use_clipped_model_output: derive eps from the limited x0.

    Raises:
        ValueError: a value out of range, or one that the schedule does not take.
    """
    levels = find_levels(
        schedule, to_steps(steps), discrete_levels, final_sigmas_type=final_sigmas_type, mu=mu, sigma_min=sigma_min,
        sigma_max=sigma_max, timestep_type=timestep_type,
    )  # fmt: skip
    zero = np.zeros(len(levels))
    if stochastic_sampling:
        return make_table(levels, x0_rows(levels, zero, levels.signal[1:], levels.sigma[1:]))
    rows = linear_rows(levels, levels.sigma[1:], zero, use_clipped_model_output)
    return make_table(levels, rows, inverse_of(levels))


@method("euler_ancestral", Schedule, EDMSchedule, schedulers=("EulerAncestralDiscreteScheduler",))
def euler_ancestral(
    schedule: Schedule | EDMSchedule,
    steps: Steps | int,
    *,
    eta: float = 1.0,
    final_sigmas_type: str = "zero",
    use_clipped_model_output: bool = False,
) -> StepTable:
    """Euler's step down to sigma_down, then noise of scale sigma_up (k-diffusion's `sample_euler_ancestral`).

    With s = sigma / signal, the drawn part is `eta * s_next * sqrt(1 - s_next**2 / s**2)`, which is equation 16 of
    arXiv:2010.02502, as both are the posterior's deviation.

    Args:
        schedule: the model's.
        steps: the run's.
        eta: a number in [0, 1], how much of the posterior's noise is drawn.
        final_sigmas_type, use_clipped_model_output: as for `euler`.

    Raises:
        ValueError: a value out of range.
    """
    require_number("eta", eta, 0.0, 1.0)
    levels = find_levels(schedule, to_steps(steps), discrete_levels, final_sigmas_type=final_sigmas_type)
    ratio = noise_ratio(levels)
    drawn = eta * np.sqrt((1 - ratio) * (1 + ratio))
    kept = np.sqrt((1 - drawn) * (1 + drawn))
    sigma_next = levels.sigma[1:]
    return make_table(levels, linear_rows(levels, sigma_next * kept, sigma_next * drawn, use_clipped_model_output))


def discrete_levels(
    schedule: Schedule,
    steps: Steps,
    final_sigmas_type: str,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    timestep_type: str = "discrete",
) -> NoiseLevels:
    """The levels of diffusers' `EulerDiscreteScheduler`: timesteps may lie between those of training."""
    require_choice("timestep_type", timestep_type, TIMESTEP_TYPES)
    config, training = schedule.config, TrainingSigmas.of(schedule)
    if steps.sigmas is not None:
        sigmas = np.asarray(steps.sigmas, dtype=np.float64)
        timesteps = training.timesteps_of(sigmas[:-1]) if steps.timesteps is None else np.asarray(steps.timesteps)
    else:
        if steps.timesteps is not None:
            timesteps = np.asarray(steps.timesteps, dtype=np.float64)
        elif config.timestep_spacing == "linspace":
            timesteps = np.linspace(0, config.num_train_timesteps - 1, steps.count)[::-1]
        else:
            timesteps = np.array(make_timesteps(config, steps.count), dtype=np.float64)
        sigmas = training.at(timesteps)
        if steps.spacing is not None:
            lowest = float(sigmas[-1]) if sigma_min is None else sigma_min
            highest = float(sigmas[0]) if sigma_max is None else sigma_max
            require_number("sigma_min", lowest, 1e-10, 1e10)
            require_number("sigma_max", highest, 1e-10, 1e10)
            if lowest > highest:
                raise ValueError(f"sigma_min, sigma_max: {lowest:g}, {highest:g}; pass sigma_min <= sigma_max")
            sigmas = SPACINGS[steps.spacing](len(sigmas), lowest, highest)
            timesteps = training.timesteps_of(sigmas)
        sigmas = np.append(sigmas, training.last(final_sigmas_type))
    if timestep_type == "continuous":
        timesteps = np.log(sigmas[:-1]) / 4
    first = steps.first_of(len(timesteps))
    # diffusers' `init_noise_sigma`.
    start = None if first == 0 and config.timestep_spacing in ("linspace", "trailing") else 1.0
    return scaled_levels(
        timesteps[first:].astype(np.float64), sigmas[first:], config.prediction_type, start_scale=start, skipped=first
    )
