"""Runs by diffusers' scheduler of a sampling method: in float64 the judge of the method's candidates, and a baseline."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

from fastddim.bench.textbook import LoopProblem
from fastddim.config import require_choice
from fastddim.samplers import METHODS
from fastddim.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor


def class_of(method: str) -> str:
    """The name of the diffusers class that samples by a method.

    Raises:
        ValueError: an unknown method, or one without such a class for schedules of betas.
    """
    comparable = [name for name, each in METHODS.items() if each.schedulers and Schedule in each.schedules]
    require_choice("--method", method, METHODS)
    if method not in comparable:
        raise ValueError(
            f"--method: {method!r} has no diffusers scheduler of betas to be compared with; pass one of"
            f" {', '.join(map(repr, comparable))}"
        )
    return METHODS[method].schedulers[0]


def make_scheduler(method: str, problem: LoopProblem, device: Any = None) -> Any:
    """The diffusers scheduler of a method with the problem's schedule, and its timesteps set."""
    import diffusers

    scheduler = getattr(diffusers, class_of(method))(**problem.config)
    scheduler.set_timesteps(problem.num_steps, device=device)
    return scheduler


def run_scheduler(scheduler: Any, model: Callable[[Tensor, Tensor], Tensor], noise: Tensor) -> Tensor:
    """The loop as diffusers' pipelines have it, from standard normal noise `[B, ...]`; `model` takes state and timestep."""
    # A run moves its scheduler on.
    scheduler = copy.copy(scheduler)
    x: Tensor = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return x


@contextlib.contextmanager
def drawing(method: str, noises: Iterable[Tensor]) -> Iterator[None]:
    """The scheduler's steps draw these, in turn."""
    drawn = iter(noises)

    def draw(*args: Any, **kwargs: Any) -> Tensor:
        return next(drawn)

    with mock.patch.object(_module_of(method), "randn_tensor", draw):
        yield


@contextlib.contextmanager
def in_float64(method: str) -> Iterator[None]:
    """Schedulers made and run here compute in float64, for which their module's name is float32 otherwise."""
    import numpy as np
    import torch

    module = _module_of(method)
    double_torch = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    double_np = SimpleNamespace(**{**vars(np), "float32": np.float64})
    with mock.patch.object(module, "torch", double_torch), mock.patch.object(module, "np", double_np):
        yield


def _module_of(method: str) -> Any:
    import diffusers

    return sys.modules[getattr(diffusers, class_of(method)).__module__]
