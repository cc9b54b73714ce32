"""A case of the suites that sample whole runs: its inputs, and the textbook's result to judge candidates by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fastddim.bench.cases import TOLERANCE, Candidate, Case, Scope
from fastddim.bench.networks import Network
from fastddim.bench.scheduler_loop import drawing, in_float64, make_scheduler, run_scheduler
from fastddim.bench.textbook import LoopProblem, textbook_loop
from fastddim.noise import normal_numpy

# What rounding after each step does to the result of a run, times this, is not an error; up to a limit.
_TOLERATED_SPREAD = 4.0
_LARGEST_TOLERANCE = 0.1


@dataclass(frozen=True)
class LoopInputs:
    """A run with its model, starting state and the model's keyword arguments, on the device.

    Attributes:
        key: the model's name and device, by which it is exported once.
        block: the run of the rows that the batch repeats; None where the batch repeats none.
        method: the sampling method; None is DDIM, by the textbook.
    """

    problem: LoopProblem
    model: Any
    start: Any
    kwargs: dict[str, Any]
    key: str = ""
    block: LoopInputs | None = None
    method: str | None = None

    @property
    def seeds(self) -> list[int]:
        """A seed for each sample; those that repeat a block repeat its seeds."""
        rows = len((self.block or self).start)
        return [row % rows for row in range(len(self.start))]

    def noises(self, dtype: Any) -> Iterator[Any]:
        """What each step of a method that adds noise draws: `Sampler`'s noise of the seeds."""
        import torch

        for step in range(self.problem.num_steps):
            drawn = normal_numpy(self.seeds, step, self.problem.shape[1:])
            yield torch.from_numpy(drawn).to(self.start.device, dtype)


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
    method: str | None = None,
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
        method: the sampling method; None is DDIM, judged by the textbook instead of by diffusers.
    """
    dtype = network.dtype if scope.on_gpu else "float32"
    problem = LoopProblem(shape=(batch, *network.sample_shape), num_steps=num_steps, **dict(network.schedule))
    return Case(
        suite=suite,
        name=f"{network.name} [{','.join(map(str, problem.shape))}] x{num_steps}" + (f" {method}" if method else ""),
        candidates=candidates,
        inputs=partial(_inputs, network, problem, dtype, scope.device, method),
        reference=_reference if method is None else _method_reference,
        target=target,
        tolerance=_tolerance if method is None else _method_tolerance,
        blocks=batch if network.repeats else 1,
        device=scope.device,
        needs=needs or network.needs(),
        num_steps=num_steps,
        about={"model": network.name, "batch": batch, "steps": num_steps, "dtype": dtype}
        | ({"method": method} if method else {}),
    )


def _inputs(network: Network, problem: LoopProblem, dtype: str, device: str, method: str | None) -> LoopInputs:
    import torch
    from torch.utils._pytree import tree_map_only

    copies = problem.shape[0] if network.repeats else 1
    rows = problem.shape[0] // copies
    drawn = np.random.default_rng(0).standard_normal((rows, *problem.shape[1:])).astype(np.float32)
    start = torch.from_numpy(drawn).to(device, getattr(torch, dtype))
    kwargs = network.make_kwargs(rows, device)
    model = network.build(device).to(start.dtype)
    block = LoopInputs(
        replace(problem, shape=tuple(start.shape)), model, start, kwargs, f"{network.name} {device}", method=method
    )
    if copies == 1:
        return block

    def repeated(tensor: Any) -> Any:
        return tensor.repeat(copies, *[1] * (tensor.ndim - 1))

    return LoopInputs(
        problem, model, repeated(start), tree_map_only(torch.Tensor, repeated, kwargs), block.key, block, method
    )


def _reference(inputs: LoopInputs) -> Sequence[Any]:
    """The textbook's loop around a float64 copy of the model."""
    inputs = _in_float64(inputs.block or inputs)
    start = inputs.start.cpu().numpy()
    return (textbook_loop(inputs.problem, _numpy_model(inputs.model, inputs.kwargs, inputs.start.device), start),)


def _in_float64(inputs: LoopInputs) -> LoopInputs:
    """The run with a copy of the model in float64."""
    import torch
    from torch.utils._pytree import tree_map_only

    kwargs = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs.kwargs)
    model = copy.deepcopy(inputs.model).double()
    return replace(inputs, model=model, start=inputs.start.double(), kwargs=kwargs)


def _tolerance(inputs: LoopInputs, expected: Sequence[Any]) -> float:
    """More than float32's usual error where the same loop, in the model's dtype, is off by more."""
    import torch

    inputs = inputs.block or inputs
    model = _numpy_model(inputs.model, inputs.kwargs, inputs.start.device, inputs.start.dtype)

    def rounding(x: Any, t: int) -> Any:
        rounded = torch.from_numpy(x).to(inputs.start.dtype).double().numpy()
        return model(rounded, t)

    return _tolerated(textbook_loop(inputs.problem, rounding, inputs.start.double().cpu().numpy()), expected)


def _tolerated(result: Any, expected: Sequence[Any]) -> float:
    spread = float(np.abs(result - expected[0]).max() / np.abs(expected[0]).max())
    return min(max(TOLERANCE, _TOLERATED_SPREAD * spread), _LARGEST_TOLERANCE)


def _method_reference(inputs: LoopInputs) -> Sequence[Any]:
    """diffusers' loop in float64 around a float64 copy of the model, with `Sampler`'s noise."""
    inputs = _in_float64(inputs.block or inputs)
    assert inputs.method is not None
    with in_float64(inputs.method):
        return (_method_loop(inputs),)


def _method_tolerance(inputs: LoopInputs, expected: Sequence[Any]) -> float:
    """More than float32's usual error where diffusers' own loop, in the model's dtype, is off by more.

    Its state is the noise's at a scale of thousands, where a schedule ends there.
    """
    return _tolerated(_method_loop(inputs.block or inputs), expected)


def _method_loop(inputs: LoopInputs) -> Any:
    from fastddim.model_call import call_model

    assert inputs.method is not None
    start = inputs.start

    def model(x: Any, t: Any) -> Any:
        return call_model(inputs.model, x.to(start.dtype), t.expand(len(x)), inputs.kwargs)

    scheduler = make_scheduler(inputs.method, inputs.problem, start.device)
    with drawing(inputs.method, inputs.noises(start.dtype)):
        return run_scheduler(scheduler, model, start).double().cpu().numpy()


def _numpy_model(model: Any, kwargs: dict[str, Any], device: Any, dtype: Any = None) -> Callable[[Any, int], Any]:
    import torch

    from fastddim.model_call import call_model

    def call(x: Any, t: int) -> Any:
        state = torch.from_numpy(x).to(device, dtype)
        timesteps = torch.full((len(x),), t, device=device)
        return call_model(model, state, timesteps, kwargs).double().cpu().numpy()

    return call
