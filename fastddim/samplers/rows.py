"""What methods share: x0 and epsilon in terms of the state and the model's output."""

from __future__ import annotations

import numpy as np

from fastddim.coefficients import columns
from fastddim.levels import NoiseLevels
from fastddim.schedule import FloatArray


def linear_rows(
    levels: NoiseLevels, direction: FloatArray, noise_scale: FloatArray, use_clipped_model_output: bool
) -> FloatArray:
    """`[n, 6]`: `x_next = signal_next * x0 + direction * eps + noise_scale * noise`.

    Args:
        levels: of the run.
        direction, noise_scale: `[n]`.
        use_clipped_model_output: derive eps from the limited x0 instead of the raw model output.
    """
    return columns(
        levels.signal[:-1], levels.sigma[:-1], levels.signal[1:], direction, noise_scale, levels.prediction_type,
        use_clipped_model_output, data_scale=levels.data_scale,
    )  # fmt: skip


def x0_rows(levels: NoiseLevels, from_x: FloatArray, from_x0: FloatArray, noise_scale: FloatArray) -> FloatArray:
    """`[n, 6]`: `x_next = from_x * x + from_x0 * x0 + noise_scale * noise`, `[n]` each, with nothing of the raw output."""
    zero = np.zeros_like(from_x)
    rows = linear_rows(levels, zero, zero, use_clipped_model_output=False)
    return np.column_stack([rows[:, :2], from_x, zero, from_x0, noise_scale])


def ancestral(levels: NoiseLevels, eta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """`(direction, noise_scale)`, `[n]`: the split of the next level's sigma in what is kept and what is drawn anew.

    With s = sigma / signal, the drawn part is `eta * s_next * sqrt(1 - s_next**2 / s**2)`: sigma_up of k-diffusion, and
    equation 16 of arXiv:2010.02502, as both are the posterior's deviation.
    """
    signal, sigma, signal_next, sigma_next = levels.signal[:-1], levels.sigma[:-1], levels.signal[1:], levels.sigma[1:]
    # s_next / s, also where the first state has no signal.
    ratio = sigma_next * signal / (sigma * signal_next)
    drawn = eta * np.sqrt((1 - ratio) * (1 + ratio))
    return sigma_next * np.sqrt((1 - drawn) * (1 + drawn)), sigma_next * drawn
