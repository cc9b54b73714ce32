"""Sampling methods in float64 as their papers and k-diffusion have them, in their own variables; no code is `fastddim`'s.

Each takes a state, what the model is called with and by, and standard normal noise `[n, ...]`, and returns the final state.
"""

from itertools import pairwise

import numpy as np


def flow_euler(x, sigmas, model):
    """dx = v dsigma (arXiv:2403.03206); the model is called with `1000 * sigma`."""
    for sigma, sigma_next in pairwise(sigmas):
        x = x + (sigma_next - sigma) * model(x, 1000 * sigma)
    return x


def denoise(x, sigma, t, model):
    """D(x; sigma) of a model that predicts epsilon (arXiv:2206.00364, table 1, the column of VP)."""
    return x - sigma * model(x / np.sqrt(sigma**2 + 1), t)


def edm_denoise(x, sigma, model, sigma_data=0.5):
    """D(x; sigma) of arXiv:2206.00364, equation 7."""
    total = sigma**2 + sigma_data**2
    out = model(x / np.sqrt(total), np.log(sigma) / 4)
    return sigma_data**2 / total * x + sigma * sigma_data / np.sqrt(total) * out


def euler(x, sigmas, denoiser):
    """arXiv:2206.00364, algorithm 1, lines 4 and 5."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        d = (x - denoiser(x, sigma, i)) / sigma
        x = x + (sigma_next - sigma) * d
    return x


def euler_ancestral(x, sigmas, denoiser, noise, eta=1.0):
    """k-diffusion's `sample_euler_ancestral`."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        up = min(sigma_next, eta * np.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
        down = np.sqrt(sigma_next**2 - up**2)
        d = (x - denoiser(x, sigma, i)) / sigma
        x = x + (down - sigma) * d + up * noise[i]
    return x


def ddpm(x, alpha_bars, timesteps, model, noise, large):
    """arXiv:2006.11239, equation 7, between the timesteps of a list; the last step adds no noise."""
    for i, t in enumerate(timesteps):
        bar = alpha_bars[t]
        last = i + 1 == len(timesteps)
        bar_next = 1.0 if last else alpha_bars[timesteps[i + 1]]
        alpha = bar / bar_next
        beta = 1 - alpha
        x0 = (x - np.sqrt(1 - bar) * model(x, t)) / np.sqrt(bar)
        mean = np.sqrt(bar_next) * beta / (1 - bar) * x0 + np.sqrt(alpha) * (1 - bar_next) / (1 - bar) * x
        variance = beta if large else (1 - bar_next) / (1 - bar) * beta
        x = mean + (0 if last else np.sqrt(variance)) * noise[i]
    return x


def lcm(x, alpha_bars, timesteps, model, noise):
    """arXiv:2310.04378, algorithm 3, with the boundary condition of appendix C at ten times the timestep."""
    for i, t in enumerate(timesteps):
        bar, scaled = alpha_bars[t], 10 * t
        x0 = (x - np.sqrt(1 - bar) * model(x, t)) / np.sqrt(bar)
        f = 0.25 / (scaled**2 + 0.25) * x + scaled / np.sqrt(scaled**2 + 0.25) * x0
        if i + 1 == len(timesteps):
            return f
        bar_next = alpha_bars[timesteps[i + 1]]
        x = np.sqrt(bar_next) * f + np.sqrt(1 - bar_next) * noise[i]


def tcd(x, alpha_bars, timesteps, model, noise, gamma):
    """arXiv:2402.19159, algorithm 2."""
    for i, t in enumerate(timesteps):
        last = i + 1 == len(timesteps)
        t_next = 0 if last else timesteps[i + 1]
        s = int(np.floor((1 - gamma) * t_next))
        eps = model(x, t)
        x0 = (x - np.sqrt(1 - alpha_bars[t]) * eps) / np.sqrt(alpha_bars[t])
        at_s = np.sqrt(alpha_bars[s]) * x0 + np.sqrt(1 - alpha_bars[s]) * eps
        back = alpha_bars[t_next] / alpha_bars[s]
        x = at_s if last or gamma == 0 else np.sqrt(back) * at_s + np.sqrt(1 - back) * noise[i]
    return x


def dpm_solver_2m(x, alphas, sigmas, denoised, noise=None, heun=False):
    """arXiv:2211.01095: algorithm 2 from `alphas[0], sigmas[0]` on; with noise, SDE-DPM-Solver++(2M) of appendix D.

    The first and the last step are of first order.
    """
    lambdas = np.log(alphas) - np.log(np.maximum(sigmas, 1e-300))
    before = None
    for i in range(len(alphas) - 1):
        h = lambdas[i + 1] - lambdas[i]
        x0 = denoised(x, i)
        power = 1 if noise is None else 2
        weight = -alphas[i + 1] * np.expm1(-power * h)
        x = sigmas[i + 1] / sigmas[i] * (1 if noise is None else np.exp(-h)) * x + weight * x0
        if before is not None and i + 2 < len(alphas):
            d1 = (x0 - before) / ((lambdas[i] - lambdas[i - 1]) / h)
            x = x + (alphas[i + 1] * (np.expm1(-power * h) / (power * h) + 1) if heun else 0.5 * weight) * d1
        if noise is not None:
            x = x + sigmas[i + 1] * np.sqrt(-np.expm1(-2 * h)) * noise[i]
        before = x0
    return x
