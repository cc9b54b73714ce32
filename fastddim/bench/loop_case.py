"""A case of the suites that sample whole runs: its inputs, and the textbook's result to judge candidates by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fastddim.bench.cases import TOLERANCE, Candidate, Case, Scope
from fastddim.bench.networks import Network
from fastddim.bench.textbook import LoopProblem, textbook_loop

# What rounding after each step does to the result of a run, times this, is not an error; up to a limit.
_TOLERATED_SPREAD = 4.0
_LARGEST_TOLERANCE = 0.1


@dataclass(frozen=True)
class LoopInputs:
    """A run with its model, starting state and the model's keyword arguments, on the device.

    Attributes:
        key: the model's name and device, by which it is exported once.
        block: the run of the rows that the batch repeats; None where the batch repeats none.
    """

    problem: LoopProblem
    model: Any
    start: Any
    kwargs: dict[str, Any]
    key: str = ""
    block: LoopInputs | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The run's schedule, in diffusers' names."""
        names = ("num_train_timesteps", "beta_schedule", "prediction_type", "timestep_spacing")
        return {name: getattr(self.problem, name) for name in names}


def loop_case(
    network: Network,
    batch: int,
    num_steps: int,
    scope: Scope,
    candidates: tuple[Candidate, ...],
    *,
    suite: str = "loop",
    target: float | None = None,
    needs: str | None = None,
) -> Case:
    """A case of whole runs from one starting state.

    Args:
        network: the network to sample from.
        batch, num_steps: samples in a batch, and model calls for each.
        scope: where the case runs.
        candidates: ways to do the run, ours first.
        suite: the suite that the case belongs to.
        target: the bar of diffusers' ratio.
        needs: what keeps the case from running here, besides what the network needs.
    """
    dtype = network.dtype if scope.on_gpu else "float32"
    problem = LoopProblem(shape=(batch, *network.sample_shape), num_steps=num_steps, **dict(network.schedule))
    return Case(
        suite=suite,
        name=f"{network.name} [{','.join(map(str, problem.shape))}] x{num_steps}",
        candidates=candidates,
        inputs=partial(_inputs, network, problem, dtype, scope.device),
        reference=_reference,
        target=target,
        tolerance=_tolerance,
        blocks=batch if network.repeats else 1,
        device=scope.device,
        needs=needs or network.needs(),
        num_steps=num_steps,
        about={"model": network.name, "batch": batch, "steps": num_steps, "dtype": dtype},
    )


def _inputs(network: Network, problem: LoopProblem, dtype: str, device: str) -> LoopInputs:
    import torch
    from torch.utils._pytree import tree_map_only

    copies = problem.shape[0] if network.repeats else 1
    rows = problem.shape[0] // copies
    drawn = np.random.default_rng(0).standard_normal((rows, *problem.shape[1:])).astype(np.float32)
    start = torch.from_numpy(drawn).to(device, getattr(torch, dtype))
    kwargs = network.make_kwargs(rows, device)
    model = network.build(device).to(start.dtype)
    block = LoopInputs(replace(problem, shape=tuple(start.shape)), model, start, kwargs, f"{network.name} {device}")
    if copies == 1:
        return block

    def repeated(tensor: Any) -> Any:
        return tensor.repeat(copies, *[1] * (tensor.ndim - 1))

    return LoopInputs(problem, model, repeated(start), tree_map_only(torch.Tensor, repeated, kwargs), block.key, block)


def _reference(inputs: LoopInputs) -> Sequence[Any]:
    """The textbook's loop around a float64 copy of the model."""
    import torch
    from torch.utils._pytree import tree_map_only

    inputs = inputs.block or inputs
    model = copy.deepcopy(inputs.model).double()
    kwargs = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs.kwargs)
    start = inputs.start.double().cpu().numpy()
    return (textbook_loop(inputs.problem, _numpy_model(model, kwargs, inputs.start.device), start),)


def _tolerance(inputs: LoopInputs, expected: Sequence[Any]) -> float:
    """More than float32's usual error where the same loop, in the model's dtype, is off by more."""
    import torch

    inputs = inputs.block or inputs
    model = _numpy_model(inputs.model, inputs.kwargs, inputs.start.device, inputs.start.dtype)

    def rounding(x: Any, t: int) -> Any:
        rounded = torch.from_numpy(x).to(inputs.start.dtype).double().numpy()
        return model(rounded, t)

    result = textbook_loop(inputs.problem, rounding, inputs.start.double().cpu().numpy())
    spread = float(np.abs(result - expected[0]).max() / np.abs(expected[0]).max())
    return min(max(TOLERANCE, _TOLERATED_SPREAD * spread), _LARGEST_TOLERANCE)


def _numpy_model(model: Any, kwargs: dict[str, Any], device: Any, dtype: Any = None) -> Callable[[Any, int], Any]:
    import torch

    from fastddim.loop import call_model

    def call(x: Any, t: int) -> Any:
        state = torch.from_numpy(x).to(device, dtype)
        timesteps = torch.full((len(x),), t, device=device)
        return call_model(model, state, timesteps, kwargs).double().cpu().numpy()

    return call
