"""The DDIM step as the papers write it, in numpy float64: what candidates are judged by, sharing no code with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StepProblem:
    """One step of a run of 50 with diffusers' default schedule (linear betas, `leading` spacing).

    Attributes:
        shape: the state's shape, `[B, ...]`.
        prediction_type: `epsilon` or `v_prediction`.
        threshold: the largest divisor of dynamic thresholding at ratio 0.995; None clips x0 instead.
        clip: whether x0 is clipped to [-1, 1] where there is no threshold.
        eta: 0 is DDIM; above 0 the step takes a noise.
        guidance_scale: None, or the scale for a model output of `[2 * B, ...]`, unconditional half first.
        guidance_rescale: how much of the guided output's deviation is brought back to the conditional one's.
    """

    shape: tuple[int, ...]
    prediction_type: str = "epsilon"
    threshold: float | None = None
    clip: bool = True
    eta: float = 0.0
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0

    num_train_timesteps = 1000
    num_steps = 50
    index = 25
    ratio = 0.995

    @property
    def timestep(self) -> int:
        """The training timestep that the step starts from."""
        return (self.num_steps - 1 - self.index) * (self.num_train_timesteps // self.num_steps)

    def alpha_bars(self) -> tuple[float, float]:
        """The paper's alpha at the timestep and at the next, less noisy one."""
        alpha_bar = np.cumprod(1 - np.linspace(0.0001, 0.02, self.num_train_timesteps))
        following = self.timestep - self.num_train_timesteps // self.num_steps
        return float(alpha_bar[self.timestep]), float(alpha_bar[following])


def draw_inputs(problem: StepProblem, seed: int = 0) -> tuple[Array, Array, Array]:
    """`(model_output, sample, noise)` rounded to float32: a noisy picture and a model that is right to one part in ten.

    Some of the predicted x0 is beyond 1, and its 0.995 quantile in (1, 2), so that either limit has work to do.
    """
    rng = np.random.default_rng(seed)
    signal_squared, _ = problem.alpha_bars()
    signal, sigma = signal_squared**0.5, (1 - signal_squared) ** 0.5
    x0, eps = 0.5 * rng.standard_normal(problem.shape), rng.standard_normal(problem.shape)
    clean = signal * eps - sigma * x0 if problem.prediction_type == "v_prediction" else eps
    halves = 1 if problem.guidance_scale is None else 2
    output = np.concatenate([clean + 0.1 * rng.standard_normal(problem.shape) for _ in range(halves)])
    arrays = (output, signal * x0 + sigma * eps, rng.standard_normal(problem.shape))
    model_output, sample, noise = (array.astype(np.float32).astype(np.float64) for array in arrays)
    return model_output, sample, noise


def textbook_step(problem: StepProblem, model_output: Array, sample: Array, noise: Array) -> tuple[Array, Array]:
    """`(x_next, x0)` in float64: arXiv:2010.02502, equations 12 and 16.

    Guidance is arXiv:2207.12598, its rescale arXiv:2305.08891, section 3.4, velocity arXiv:2202.00512, thresholding
    arXiv:2205.11487, section 2.3.
    """
    if problem.guidance_scale is not None:
        uncond, cond = np.split(model_output, 2)
        model_output = uncond + problem.guidance_scale * (cond - uncond)
        if problem.guidance_rescale:
            axes = tuple(range(1, cond.ndim))
            factor = cond.std(axis=axes, keepdims=True) / model_output.std(axis=axes, keepdims=True)
            model_output = model_output * (1 + problem.guidance_rescale * (factor - 1))
    alpha_bar, alpha_bar_next = problem.alpha_bars()
    x0, eps = predict(problem.prediction_type, model_output, sample, alpha_bar)
    if problem.threshold is None and problem.clip:
        x0 = np.clip(x0, -1, 1)
    elif problem.threshold is not None:
        flat = x0.reshape(len(x0), -1)
        s = np.clip(np.quantile(np.abs(flat), problem.ratio, axis=1, keepdims=True), 1, problem.threshold)
        x0 = (np.clip(flat, -s, s) / s).reshape(x0.shape)
    std_dev = problem.eta * np.sqrt((1 - alpha_bar_next) / (1 - alpha_bar)) * np.sqrt(1 - alpha_bar / alpha_bar_next)
    direction = np.sqrt(1 - alpha_bar_next - std_dev**2) * eps
    return np.sqrt(alpha_bar_next) * x0 + direction + std_dev * noise, x0


def predict(prediction_type: str, model_output: Array, sample: Array, alpha_bar: float) -> tuple[Array, Array]:
    """`(x0, eps)`, before any limit, from what the model says of the state: `epsilon` or `v_prediction`."""
    signal, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    if prediction_type == "v_prediction":
        return signal * sample - sigma * model_output, signal * model_output + sigma * sample
    return (sample - sigma * model_output) / signal, model_output


@dataclass(frozen=True, kw_only=True)
class LoopProblem:
    """A whole run: squared cosine betas (arXiv:2102.09672, equation 17), x0 clipped to [-1, 1], eta 0.

    Attributes:
        shape: the state's shape, `[B, ...]`.
        num_train_timesteps: training timesteps of the schedule.
        num_steps: model calls; divides `num_train_timesteps`.
        prediction_type: `epsilon` or `v_prediction`.
        timestep_spacing: `leading`, whose last timestep is 0, or `trailing`, whose first is the last training timestep.
    """

    shape: tuple[int, ...]
    num_train_timesteps: int
    num_steps: int
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"

    beta_schedule = "squaredcos_cap_v2"

    @property
    def config(self) -> dict[str, Any]:
        """The run's schedule, in diffusers' names."""
        names = ("num_train_timesteps", "beta_schedule", "prediction_type", "timestep_spacing")
        return {name: getattr(self, name) for name in names}

    def timesteps(self) -> list[int]:
        """The training timesteps of the model calls, descending."""
        stride = self.num_train_timesteps // self.num_steps
        first = stride - 1 if self.timestep_spacing == "trailing" else 0
        return [first + stride * k for k in reversed(range(self.num_steps))]

    def alpha_bars(self) -> list[float]:
        """The paper's alpha at each of the timesteps, then 1 for the finished sample."""
        progress = np.linspace(0, 1, self.num_train_timesteps + 1)
        level = np.cos((progress + 0.008) / 1.008 * np.pi / 2) ** 2
        alpha_bar = np.cumprod(1 - np.minimum(1 - level[1:] / level[:-1], 0.999))
        return [*(float(alpha_bar[t]) for t in self.timesteps()), 1.0]


def textbook_loop(problem: LoopProblem, model: Callable[[Array, int], Array], start: Array) -> Array:
    """The sample in float64 that the run makes of the state `start`: arXiv:2010.02502, equation 12 at eta 0, repeated.

    `model` takes the state and the timestep.
    """
    x = start
    levels = itertools.pairwise(problem.alpha_bars())
    for t, (alpha_bar, alpha_bar_next) in zip(problem.timesteps(), levels, strict=True):
        x0, eps = predict(problem.prediction_type, model(x, t), x, alpha_bar)
        x = np.sqrt(alpha_bar_next) * np.clip(x0, -1, 1) + np.sqrt(1 - alpha_bar_next) * eps
    return x
