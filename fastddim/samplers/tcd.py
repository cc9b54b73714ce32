"""Trajectory consistency distillation (arXiv:2402.19159, algorithm 2: strategic stochastic sampling)."""

from __future__ import annotations

import dataclasses

import numpy as np

from fastddim.coefficients import StepTable
from fastddim.levels import NoiseLevels
from fastddim.samplers.rows import linear_rows
from fastddim.schedule import Schedule


def tcd(schedule: Schedule, levels: NoiseLevels, *, gamma: float = 0.3) -> StepTable:
    """Down to `s = floor((1 - gamma) * t_next)` on the trajectory, then back up to t_next with noise; the last step stays.

    Args:
        schedule: where alpha_bar at s comes from.
        levels: of the run. Whatever its end is, the run ends at timestep 0, as these models are trained.
        gamma: a number in [0, 1]; 0 adds no noise, 1 is multistep sampling of a consistency model.
    """
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
    rows = linear_rows(ends, direction, noise_scale, use_clipped_model_output=False)
    return StepTable.from_columns(levels.timesteps, rows, noising=levels.noising)
