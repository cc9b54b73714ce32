"""Trajectory consistency distillation (arXiv:2402.19159, algorithm 2: strategic stochastic sampling)."""

from __future__ import annotations

import dataclasses

import numpy as np

from fastddim.coefficients import StepTable
from fastddim.config import require_number
from fastddim.samplers.lcm import distilled_levels
from fastddim.samplers.method import method
from fastddim.samplers.rows import linear_rows, make_table
from fastddim.samplers.steps import Steps, to_steps
from fastddim.schedule import Schedule


@method("tcd", Schedule, schedulers=("TCDScheduler",))
def tcd(
    schedule: Schedule,
    steps: Steps | int,
    *,
    gamma: float = 0.3,
    original_inference_steps: int = 50,
) -> StepTable:
    """Down to `s = floor((1 - gamma) * t_next)` on the trajectory, then back up to t_next with noise; the last step stays.

    Args:
        schedule: the model's. The run ends at timestep 0, as these models are trained.
        steps: the run's; a number of steps takes some of those that the model is distilled for.
        gamma: a number in [0, 1], what diffusers calls eta; 0 adds no noise, 1 is a consistency model's sampling.
        original_inference_steps: how many steps the model is distilled for.

    Raises:
        ValueError: a value out of range.
    """
    require_number("gamma", gamma, 0.0, 1.0)
    levels = distilled_levels(schedule, to_steps(steps).without_sigmas("tcd"), original_inference_steps)
    following = np.array([*levels.timesteps[1:], 0], dtype=np.float64)
    alpha_bar_next = schedule.alpha_bar(following.astype(int).tolist())
    alpha_bar_s = schedule.alpha_bar(np.floor((1 - gamma) * following).astype(int).tolist())
    # The noise lies between s and t_next, which the last step does not go back to.
    back = alpha_bar_next / alpha_bar_s
    ends = dataclasses.replace(
        levels,
        signal=np.append(levels.signal[0], np.sqrt(alpha_bar_next)),
        sigma=np.append(levels.sigma[0], np.sqrt(1 - alpha_bar_next)),
    )
    direction, noise_scale = np.sqrt(back * (1 - alpha_bar_s)), np.sqrt(1 - back)
    return make_table(ends, linear_rows(ends, direction, noise_scale, use_clipped_model_output=False))
