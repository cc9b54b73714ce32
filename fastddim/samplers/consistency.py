"""Multistep sampling of consistency models (arXiv:2303.01469, algorithm 1)."""

from __future__ import annotations

import numpy as np

from fastddim.coefficients import StepTable
from fastddim.samplers.levels import edm_levels
from fastddim.samplers.method import method
from fastddim.samplers.steps import Steps, to_steps
from fastddim.schedule import EDMSchedule


@method("consistency", EDMSchedule)
def consistency(schedule: EDMSchedule, steps: Steps | int) -> StepTable:
    """`f = c_skip * x + c_out * out` is x0; then fresh noise of the next level; the last step is f itself.

    Args:
        schedule: the model's; the model is called with `250 * log(sigma)`; its sigma_min is the paper's epsilon.
        steps: the run's.

    Raises:
        ValueError: a value out of range.
    """
    levels = edm_levels(schedule, to_steps(steps), "zero")
    if levels.sigma[-1] > schedule.sigma_min:
        raise ValueError(f"sigmas: {levels.sigma[-1]:g} at the end, where this method has no noise left; pass 0")
    c_in, data = levels.signal[:-1], schedule.sigma_data
    sigma = levels.sigma[:-1] / c_in
    # Appendix C, for the state divided as the model takes it.
    c_skip = data**2 / ((sigma - schedule.sigma_min) ** 2 + data**2) / c_in
    c_out = (sigma - schedule.sigma_min) * data * c_in
    following, scale = np.append(sigma[1:], schedule.sigma_min), np.append(c_in[1:], 1.0)
    noise_scale = scale * np.sqrt(np.maximum(following**2 - schedule.sigma_min**2, 0))
    zero = np.zeros_like(sigma)
    return StepTable.from_columns(
        1000 * np.array(levels.timesteps),
        np.stack([c_skip, c_out, zero, zero, scale, noise_scale], axis=1),
        start_scale=levels.start_scale,
        noising=levels.noising,
    )
