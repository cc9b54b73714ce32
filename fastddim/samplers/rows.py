"""What methods share: x0 and epsilon in terms of the state and the model's output, and tables of them."""

from __future__ import annotations

import numpy as np

from fastddim.coefficients import StepTable, columns, epsilon_factors
from fastddim.samplers.levels import NoiseLevels
from fastddim.schedule import FloatArray


def linear_rows(
    levels: NoiseLevels, direction: FloatArray, noise_scale: FloatArray, use_clipped_model_output: bool
) -> FloatArray:
    """`[n, 6]`: `x_next = signal_next * x0 + direction * eps + noise_scale * noise`.

    Args:
        levels: the run's.
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


def noise_ratio(levels: NoiseLevels) -> FloatArray:
    """`[n]`: what a step leaves of sigma / signal."""
    left, before = levels.sigma[1:] * levels.signal[:-1], levels.sigma[:-1] * levels.signal[1:]
    # All of it between two states without signal.
    ratio: FloatArray = np.divide(left, before, out=np.ones_like(left), where=before != 0)
    return np.minimum(ratio, 1.0)


def make_table(levels: NoiseLevels, rows: FloatArray, inverse: StepTable | None = None) -> StepTable:
    """The table of a run's rows `[n, 6]` or `[n, 7]`."""
    return StepTable.from_columns(
        levels.timesteps, rows, start_scale=levels.start_scale, noising=levels.noising, inverse=inverse
    )


def inverse_of(levels: NoiseLevels) -> StepTable | None:
    """The table that encodes a clean state by the ODE backwards, or None where the run does not end without noise.

    Each row inverts one step, with epsilon predicted at the step's end, where sampling calls the model next. The clean
    state has no timestep of its own, so there the model is called with the last one of sampling.
    """
    if levels.sigma[-1] != 0:
        return None
    called = [*range(1, len(levels)), len(levels) - 1]
    eps_x, eps_output = epsilon_factors(
        levels.signal[called], levels.sigma[called], levels.prediction_type, levels.data_scale
    )
    signal, sigma = levels.signal[1:], levels.sigma[1:]
    noisier, direction = levels.signal[:-1], levels.sigma[:-1]
    x0 = ((1 - sigma * eps_x) / signal, -sigma * eps_output / signal)
    rows = np.stack([*x0, direction * eps_x, direction * eps_output, noisier, np.zeros_like(signal)], axis=1)
    return StepTable.from_columns([levels.timesteps[k] for k in reversed(called)], rows[::-1])
