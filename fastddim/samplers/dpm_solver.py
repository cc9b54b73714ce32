"""DPM-Solver++ (arXiv:2211.01095): exponential integrators of the ODE and the SDE in terms of x0."""

from __future__ import annotations

import numpy as np

from fastddim.coefficients import StepTable
from fastddim.config import require_choice
from fastddim.levels import NoiseLevels
from fastddim.samplers.rows import x0_rows
from fastddim.schedule import FloatArray

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++")


def dpm_solver(
    levels: NoiseLevels, *, order: int = 2, algorithm: str = "dpmsolver++", lower_order_final: bool = True
) -> StepTable:
    """The multistep solver: `x_next = from_x * x + from_D * D`, D extrapolated from this x0 and the previous one.

    Args:
        levels: of the run.
        order: 1, which is DDIM in the deterministic case, or 2: 2M, algorithm 2, with the midpoint rule.
        algorithm: `"dpmsolver++"`, or `"sde-dpmsolver++"`, which draws noise at each step (appendix D).
        lower_order_final: take the last step at first order where there are fewer than 15, as the end is where a second
            order extrapolates most. A step to the clean end is of first order always.

    Raises:
        ValueError: an order or algorithm that is none of these.
    """
    require_choice("algorithm", algorithm, ALGORITHMS)
    if order not in (1, 2):
        raise ValueError(f"order: {order!r}; pass 1 or 2")
    ratio, extrapolation = _step_sizes(levels)
    signal_next, sigma, sigma_next = levels.signal[1:], levels.sigma[:-1], levels.sigma[1:]
    if algorithm == "dpmsolver++":
        from_x, from_d, noise_scale = sigma_next / sigma, signal_next * (1 - ratio), np.zeros(len(levels))
    else:
        from_x, from_d = sigma_next / sigma * ratio, signal_next * (1 - ratio) * (1 + ratio)
        noise_scale = sigma_next * np.sqrt((1 - ratio) * (1 + ratio))
    second = np.arange(len(levels)) > 0 if order == 2 else np.zeros(len(levels), bool)
    if sigma_next[-1] == 0 or (lower_order_final and len(levels) < 15):
        second[-1] = False
    ahead = np.where(second, extrapolation, 0.0)
    rows = x0_rows(levels, from_x, from_d * (1 + ahead), noise_scale)
    if second.any():
        rows = np.column_stack([rows, -from_d * ahead])
    return StepTable.from_columns(levels.timesteps, rows, start_scale=levels.start_scale, noising=levels.noising)


def _step_sizes(levels: NoiseLevels) -> tuple[FloatArray, FloatArray]:
    """`[n]` each: `exp(-h)`, h the step in lambda = log(signal / sigma); and `1 / (2 r)`, r the step before over h."""
    ratio = levels.signal[:-1] * levels.sigma[1:] / (levels.sigma[:-1] * levels.signal[1:])
    with np.errstate(divide="ignore"):
        h = -np.log(ratio)
    before = np.append(np.inf, h[:-1])
    return ratio, np.divide(h, 2 * before, out=np.zeros_like(h), where=np.isfinite(before) & np.isfinite(h))
