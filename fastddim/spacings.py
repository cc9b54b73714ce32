"""Noise levels to step through: descending lists of `sigma`, the noise's scale beside an x0 of scale 1, float64."""

from __future__ import annotations

import numpy as np

from fastddim.schedule import FloatArray

# NVIDIA's lists for 10 steps (arXiv:2404.14507, table of section "Practitioner's guide"); `resample` gives other numbers.
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


def beta(n: int, lowest: float, highest: float, a: float = 0.6, b: float = 0.6) -> FloatArray:
    """`[n]`, at the quantiles of a beta distribution (arXiv:2407.12173).

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.stats import beta as distribution
    except ImportError as error:
        raise ImportError("spacing 'beta' needs scipy: pip install scipy") from error
    sigmas: FloatArray = lowest + distribution.ppf(1 - np.linspace(0, 1, n), a, b) * (highest - lowest)
    return sigmas


def resample(sigmas: tuple[float, ...], n: int) -> FloatArray:
    """`[n]` levels of a published list, log-linear between its own (arXiv:2404.14507)."""
    given = np.log(np.asarray(sigmas, dtype=np.float64))
    levels: FloatArray = np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(given)), given))
    return levels
