"""Lists of noise levels to step through: descending `sigma`, the noise's scale beside an x0 of scale 1, float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fastddim.schedule import FloatArray

# Published for 10 steps (arXiv:2404.14507), with the level behind the last one.
ALIGN_YOUR_STEPS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def karras(n: int, lowest: float, highest: float, rho: float = 7.0) -> FloatArray:
    """`[n]`: arXiv:2206.00364, equation 5."""
    ramp = np.linspace(0, 1, n)
    sigmas: FloatArray = (highest ** (1 / rho) + ramp * (lowest ** (1 / rho) - highest ** (1 / rho))) ** rho
    return sigmas


def exponential(n: int, lowest: float, highest: float) -> FloatArray:
    """`[n]`, evenly spaced in the logarithm."""
    sigmas: FloatArray = np.exp(np.linspace(np.log(highest), np.log(lowest), n))
    return sigmas


def beta(n: int, lowest: float, highest: float) -> FloatArray:
    """`[n]`, at quantiles of the beta distribution of 0.6 and 0.6 (arXiv:2407.12173).

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.stats import beta as distribution  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("spacing: 'beta' needs scipy; pip install scipy") from error
    sigmas: FloatArray = lowest + distribution.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6) * (highest - lowest)
    return sigmas


def uniform(n: int, lowest: float, highest: float) -> FloatArray:
    """`[n]`, as far from each other as the last one from the clean end, whatever the lowest: as pi0's and SmolVLA's."""
    sigmas: FloatArray = highest * (np.arange(n, 0, -1) / n)
    return sigmas


def align_your_steps(model: str, n: int, lowest: float, highest: float) -> FloatArray:
    """`[n]` levels of the list published for a model, log-linear between its own for another number than 10 steps."""
    given = np.log(ALIGN_YOUR_STEPS[model])
    # The run's last step leads to the clean end instead of the list's last level.
    levels: FloatArray = np.exp(np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(given)), given))
    return levels[:-1]


# `(n, lowest, highest) -> [n]` by name.
SPACINGS: dict[str, Callable[[int, float, float], FloatArray]] = {
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    "uniform": uniform,
    **{f"align_your_steps_{model}": partial(align_your_steps, model) for model in ALIGN_YOUR_STEPS},
}
