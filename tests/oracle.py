"""The textbook DDIM step in float64 numpy, written from the papers; it shares no code with the step table."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, localcontext

import numpy as np


@dataclass
class OracleStep:
    x_next: np.ndarray
    x0: np.ndarray
    x0_unlimited: np.ndarray


def predict_x0_and_eps(x, output, alpha_bar, prediction_type):
    """arXiv:2010.02502, equation 12's "predicted x0"; v from arXiv:2202.00512, appendix D."""
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha, output
    if prediction_type == "sample":
        return output, (x - alpha * output) / sigma
    if prediction_type == "v_prediction":
        return alpha * x - sigma * output, alpha * output + sigma * x
    raise ValueError(f"prediction_type: {prediction_type!r} has no oracle yet")


def dynamic_threshold(x0, ratio, max_value):
    """Imagen, arXiv:2205.11487, section 2.3, with the quantile's scale kept in [1, max_value]."""
    flat = np.abs(x0.reshape(len(x0), -1))
    s = np.clip(np.quantile(flat, ratio, axis=1), 1, max_value).reshape(-1, *[1] * (x0.ndim - 1))
    return np.clip(x0, -s, s) / s


def ddim(
    x,
    output,
    alpha_bar,
    alpha_bar_next,
    prediction_type="epsilon",
    *,
    eta=0.0,
    noise=None,
    clip=None,
    threshold=None,
    rederive=False,
    large_variance=False,
    direction_output=None,
) -> OracleStep:
    """One step from alpha_bar to alpha_bar_next; `clip` a range, `threshold` a (ratio, max_value).

    direction_output: what epsilon is told from instead, the unconditional output of arXiv:2406.08070, algorithm 2.
    """
    x, output = np.asarray(x, np.float64), np.asarray(output, np.float64)
    x0_unlimited, eps = predict_x0_and_eps(x, output, alpha_bar, prediction_type)
    x0 = x0_unlimited
    if threshold is not None:
        x0 = dynamic_threshold(x0, *threshold)
    elif clip is not None:
        x0 = np.clip(x0, -clip, clip)
    if direction_output is not None:
        eps = predict_x0_and_eps(x, np.asarray(direction_output, np.float64), alpha_bar, prediction_type)[1]
    if rederive:
        eps = (x - np.sqrt(alpha_bar) * x0) / np.sqrt(1 - alpha_bar)
    # Equation 16, in 50 digits: at eta 1 the direction is a difference that cancels.
    with localcontext() as context:
        context.prec = 50
        a, a_next = Decimal(float(alpha_bar)), Decimal(float(alpha_bar_next))
        std_dev = Decimal(eta) * ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).sqrt()
        direction = float(max(1 - a_next - std_dev**2, Decimal(0)).sqrt())
    std_dev = float(std_dev)
    x_next = np.sqrt(alpha_bar_next) * x0 + direction * eps
    if noise is not None:
        # Appendix D.3: sigma-hat changes the noise alone.
        scale = np.sqrt(1 - alpha_bar / alpha_bar_next) if large_variance else std_dev
        x_next = x_next + scale * np.asarray(noise, np.float64)
    return OracleStep(x_next, x0, x0_unlimited)


def guide(uncond, cond, scale, rescale=0.0):
    """arXiv:2207.12598 with the rescale of arXiv:2305.08891, section 3.4 (torch's unbiased standard deviation)."""
    guided = uncond + scale * (cond - uncond)
    axes = tuple(range(1, cond.ndim))
    ratio = cond.std(axes, ddof=1, keepdims=True) / guided.std(axes, ddof=1, keepdims=True)
    return rescale * guided * ratio + (1 - rescale) * guided


def project(uncond, cond, scale, eta, norm_threshold):
    """arXiv:2410.02416, algorithm 1 without momentum, sample by sample; a threshold of 0 is none."""
    guided = []
    for one_uncond, one_cond in zip(uncond, cond, strict=True):
        diff = one_cond - one_uncond
        if norm_threshold > 0:
            diff = diff * min(1.0, norm_threshold / np.linalg.norm(diff))
        unit = one_cond / np.linalg.norm(one_cond)
        parallel = (diff * unit).sum() * unit
        guided.append(one_cond + (scale - 1) * ((diff - parallel) + eta * parallel))
    return np.stack(guided)
