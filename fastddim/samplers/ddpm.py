"""DDPM (arXiv:2006.11239): ancestral sampling with the posterior's mean."""

from __future__ import annotations

import numpy as np

from fastddim.coefficients import StepTable
from fastddim.config import VARIANCE_TYPES, require_choice
from fastddim.samplers.levels import beta_levels
from fastddim.samplers.method import method
from fastddim.samplers.rows import make_table, noise_ratio, x0_rows
from fastddim.samplers.steps import Steps, to_steps
from fastddim.schedule import Schedule


@method("ddpm", Schedule, schedulers=("DDPMScheduler", "DDPMParallelScheduler"))
def ddpm(schedule: Schedule, steps: Steps | int, *, variance_type: str = "fixed_small") -> StepTable:
    """Equation 7's mean of x and x0, with one of section 3.2's variances.

    Args:
        schedule: the model's. Its last step leads to the clean end, whatever `set_alpha_to_one` says, without noise.
        steps: the run's; a number, or a list of training timesteps.
        variance_type: `"fixed_small"`, the posterior's own, or `"fixed_large"`, beta.

    Raises:
        ValueError: a value out of range.
    """
    require_choice("variance_type", variance_type, VARIANCE_TYPES)
    steps = to_steps(steps).without_sigmas("ddpm")
    pairs = schedule.pairs(steps.num_inference_steps, timesteps=steps.timesteps, strength=steps.strength)
    levels = beta_levels(schedule, pairs, clean_end=True)
    ratio, fading = noise_ratio(levels), levels.signal[:-1] / levels.signal[1:]
    sigma, sigma_next = levels.sigma[:-1], levels.sigma[1:]
    if variance_type == "fixed_small":
        noise_scale = sigma_next * np.sqrt((1 - ratio) * (1 + ratio))
    else:
        noise_scale = np.sqrt((1 - fading) * (1 + fading))
        noise_scale[-1] = 0
    from_x0 = levels.signal[1:] * (1 - ratio) * (1 + ratio)
    return make_table(levels, x0_rows(levels, fading * (sigma_next / sigma) ** 2, from_x0, noise_scale))
