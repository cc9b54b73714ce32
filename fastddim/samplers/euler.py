"""Euler's method, plain and ancestral (arXiv:2206.00364, algorithm 1 without churn; k-diffusion's `sample_euler`)."""

from __future__ import annotations

import numpy as np

from fastddim.coefficients import StepTable
from fastddim.levels import NoiseLevels
from fastddim.samplers.rows import ancestral, linear_rows


def euler(levels: NoiseLevels, *, use_clipped_model_output: bool = False) -> StepTable:
    """`x_next = x0 + sigma_next * eps` in units of the signal: along the line from x to x0.

    For flow matching this is `x + (sigma_next - sigma) * v`.
    """
    rows = linear_rows(levels, levels.sigma[1:], np.zeros(len(levels)), use_clipped_model_output)
    return StepTable.from_columns(levels.timesteps, rows, start_scale=levels.start_scale, noising=levels.noising)


def euler_ancestral(levels: NoiseLevels, *, eta: float = 1.0, use_clipped_model_output: bool = False) -> StepTable:
    """Euler's step down to sigma_down, then noise of scale sigma_up (k-diffusion's `sample_euler_ancestral`).

    Args:
        levels: of the run.
        eta: a number in [0, 1], how much of the posterior's noise is drawn.
        use_clipped_model_output: derive eps from the limited x0.
    """
    direction, noise_scale = ancestral(levels, np.full(len(levels), eta))
    rows = linear_rows(levels, direction, noise_scale, use_clipped_model_output)
    return StepTable.from_columns(levels.timesteps, rows, start_scale=levels.start_scale, noising=levels.noising)
