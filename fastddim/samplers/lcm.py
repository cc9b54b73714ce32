"""Multistep sampling of latent consistency models (arXiv:2310.04378, algorithm 3)."""

from __future__ import annotations

import numpy as np

from fastddim.coefficients import StepTable
from fastddim.levels import NoiseLevels
from fastddim.samplers.rows import x0_rows

SIGMA_DATA = 0.5


def lcm(levels: NoiseLevels, *, timestep_scaling: float = 10.0) -> StepTable:
    """`f = c_skip * x + c_out * x0`, then fresh noise at the next level; the last step is f itself.

    Args:
        levels: of the run; the timesteps are those of the distilled model's list.
        timestep_scaling: what timesteps are multiplied by in c_skip and c_out (appendix C).
    """
    scaled = np.asarray(levels.timesteps, dtype=np.float64) * timestep_scaling
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
    signal, sigma = levels.signal[1:].copy(), levels.sigma[1:].copy()
    signal[-1], sigma[-1] = 1.0, 0.0
    rows = x0_rows(levels, signal * c_skip, signal * c_out, sigma)
    return StepTable.from_columns(levels.timesteps, rows, noising=levels.noising)
