"""Multistep sampling of latent consistency models (arXiv:2310.04378, algorithm 3)."""

from __future__ import annotations

import numpy as np

from fastddim.coefficients import StepTable
from fastddim.config import require_int, require_number
from fastddim.samplers.levels import NoiseLevels, beta_levels
from fastddim.samplers.method import method
from fastddim.samplers.rows import make_table, x0_rows
from fastddim.samplers.steps import Steps, to_steps
from fastddim.schedule import Schedule, check_timesteps

# The deviation of the data, as these models are distilled.
SIGMA_DATA = 0.5


@method("lcm", Schedule, schedulers=("LCMScheduler",))
def lcm(
    schedule: Schedule,
    steps: Steps | int,
    *,
    original_inference_steps: int = 50,
    timestep_scaling: float = 10.0,
) -> StepTable:
    """`f = c_skip * x + c_out * x0`, then fresh noise at the next level; the last step is f itself.

    Args:
        schedule: the model's.
        steps: the run's; a number of steps takes some of those that the model is distilled for.
        original_inference_steps: how many those are.
        timestep_scaling: what timesteps are multiplied by in c_skip and c_out (appendix C).

    Raises:
        ValueError: more steps than those of the distillation, or another value out of range.
    """
    require_number("timestep_scaling", timestep_scaling, 1e-6, 1e6)
    levels = distilled_levels(schedule, to_steps(steps).without_sigmas("lcm"), original_inference_steps)
    scaled = np.asarray(levels.timesteps, dtype=np.float64) * timestep_scaling
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
    signal, sigma = levels.signal[1:].copy(), levels.sigma[1:].copy()
    signal[-1], sigma[-1] = 1.0, 0.0
    return make_table(levels, x0_rows(levels, signal * c_skip, signal * c_out, sigma))


def distilled_levels(schedule: Schedule, steps: Steps, original_inference_steps: int) -> NoiseLevels:
    """The levels of some of the steps of a distillation, those at its end with a `strength` below 1."""
    n_train = schedule.config.num_train_timesteps
    require_int("original_inference_steps", original_inference_steps, 1, n_train)
    if steps.timesteps is not None:
        timesteps = check_timesteps(steps.timesteps, n_train)
        timesteps = timesteps[steps.first_of(len(timesteps)) :]
    else:
        n = steps.count
        left = int(original_inference_steps * steps.strength)
        if n > left:
            raise ValueError(
                f"num_inference_steps: {n}, but the model is distilled for {original_inference_steps} steps, of which a"
                f" strength of {steps.strength:g} leaves {left}; pass at most {left}, or original_inference_steps"
            )
        distilled = np.arange(left, 0, -1) * (n_train // original_inference_steps) - 1
        timesteps = distilled[np.floor(np.linspace(0, left, n, endpoint=False)).astype(int)].tolist()
    return beta_levels(schedule, list(zip(timesteps, [*timesteps[1:], None], strict=True)))
