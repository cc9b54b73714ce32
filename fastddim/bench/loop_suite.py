"""Whole runs: `Sampler` against what users would pick instead, over networks, batches and numbers of steps."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fastddim.bench import exported
from fastddim.bench.cases import (
    LEFT_OUT,
    NEEDS_GPU,
    TOLERANCE,
    Candidate,
    Case,
    Scope,
    Work,
    a_compiler,
    a_gpu,
    all_of,
    installed,
    left_out,
)
from fastddim.bench.networks import BATCHES, CIFAR10, DIGITS, NETWORKS, POLICY, STEPS, Network
from fastddim.bench.textbook import LoopProblem, textbook_loop

# What rounding after each step does to the result of a run, times this, is not an error; up to a limit.
_TOLERATED_SPREAD = 4.0
_LARGEST_TOLERANCE = 0.1

# Batches and numbers of steps of the networks that a CPU runs, beyond what it can do in seconds.
_CIFAR10_ON_CPU = ((1, 1), (1, 4), (1, 10), (4, 1))
_QUICK = {POLICY: ((1, 10), (4, 10)), DIGITS: ((1, 4), (1, 20), (4, 20)), CIFAR10: ((1, 1),)}


@dataclass(frozen=True)
class LoopInputs:
    """A run with its model, starting state and the model's keyword arguments, on the device.

    Attributes:
        key: of the model, for what is exported once.
        block: the run of the rows that the batch repeats, if it does.
    """

    problem: LoopProblem
    model: Any
    start: Any
    kwargs: dict[str, Any]
    key: str = ""
    block: LoopInputs | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Of the run's schedule, as diffusers names it."""
        return {
            "num_train_timesteps": self.problem.num_train_timesteps,
            "beta_schedule": self.problem.beta_schedule,
            "prediction_type": self.problem.prediction_type,
            "timestep_spacing": self.problem.timestep_spacing,
        }


def loop_case(
    network: Network,
    batch: int,
    num_steps: int,
    scope: Scope | None = None,
    *,
    suite: str = "loop",
    candidates: tuple[Candidate, ...] | None = None,
    target: float | None = None,
    needs: str | None = None,
) -> Case:
    """A case of whole runs from one starting state.

    Args:
        network: what is sampled from.
        batch, num_steps: the run's.
        scope: where it runs; the CPU by default.
        suite: it belongs to.
        candidates: ours first; by default those of the loop suite.
        target: the bar of diffusers' ratio.
        needs: what keeps it from running here, besides what the network needs.
    """
    scope = scope or Scope()
    dtype = network.dtype if scope.on_gpu else "float32"
    problem = LoopProblem(shape=(batch, *network.sample_shape), num_steps=num_steps, **dict(network.schedule))
    return Case(
        suite=suite,
        name=f"{network.name} [{','.join(map(str, problem.shape))}] x{num_steps}",
        candidates=candidates or (FASTDDIM_SAMPLER, DIFFUSERS_LOOP),
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

    copies = problem.shape[0] if network.repeats else 1
    rows = problem.shape[0] // copies
    drawn = np.random.default_rng(0).standard_normal((rows, *problem.shape[1:])).astype(np.float32)
    start = torch.from_numpy(drawn).to(device, getattr(torch, dtype))
    kwargs = network.make_kwargs(rows, device)
    model = network.build(device)
    block = LoopInputs(replace(problem, shape=tuple(start.shape)), model, start, kwargs, f"{network.name} {device}")
    if copies == 1:
        return block

    def repeated(tensor: Any) -> Any:
        return tensor.repeat(copies, *[1] * (tensor.ndim - 1))

    return LoopInputs(problem, model, repeated(start), _map_tensors(repeated, kwargs), block.key, block)


def _reference(inputs: LoopInputs) -> Sequence[Any]:
    """The textbook's loop around a float64 copy of the model."""
    inputs = inputs.block or inputs
    model = copy.deepcopy(inputs.model).double()
    kwargs = _map_tensors(lambda each: each.double() if each.is_floating_point() else each, inputs.kwargs)
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

    (result,) = (textbook_loop(inputs.problem, rounding, inputs.start.double().cpu().numpy()),)
    spread = float(np.abs(result - expected[0]).max() / np.abs(expected[0]).max())
    return min(max(TOLERANCE, _TOLERATED_SPREAD * spread), _LARGEST_TOLERANCE)


def _numpy_model(model: Any, kwargs: dict[str, Any], device: Any, dtype: Any = None) -> Callable[[Any, int], Any]:
    import torch

    def call(x: Any, t: int) -> Any:
        state = torch.from_numpy(x).to(device, dtype)
        timesteps = torch.full((len(x),), t, device=device)
        return prediction(model(state, timesteps, **kwargs)).double().cpu().numpy()

    return call


def _map_tensors(change: Callable[[Any], Any], value: Any) -> Any:
    import torch

    if isinstance(value, dict):
        return {name: _map_tensors(change, each) for name, each in value.items()}
    return change(value) if isinstance(value, torch.Tensor) else value


def prediction(output: Any) -> Any:
    """A model's prediction, which diffusers' models wrap."""
    return getattr(output, "sample", output)


def _sampler_work(inputs: LoopInputs, **options: Any) -> Work:
    import torch

    import fastddim

    problem, start, kwargs = inputs.problem, inputs.start, inputs.kwargs
    # diffusers' default epsilon, so that both do the same work.
    sampler = fastddim.Sampler(
        inputs.model,
        fastddim.DDIMConfig(**inputs.config),
        problem.num_steps,
        use_clipped_model_output=False,
        sample_shape=problem.shape[1:],
        dtype=start.dtype,
        **options,
    )
    state = start.clone()
    t = torch.full((len(start),), problem.timesteps()[0], device=start.device)
    output = prediction(inputs.model(state, t, **kwargs)).clone()

    def model() -> Any:
        return inputs.model(state, t, **kwargs)

    def step() -> Any:
        return fastddim.ddim_step(output, state, sampler.table, 0, limit=sampler.limit, out=state)

    parts = {"model": model, "step": step}
    if sampler.graph != "off" and start.is_cuda:
        from fastddim.bench.gpu import capture

        parts = {name: capture(part) for name, part in parts.items()}
    return Work(
        lambda: (sampler(start, **kwargs),),
        parts={name: partial(repeat, problem.num_steps, part) for name, part in parts.items()},
    )


def repeat(count: int, call: Callable[[], Any]) -> None:
    """Call so many times."""
    for _ in range(count):
        call()


def _diffusers_work(
    inputs: LoopInputs, mode: str | None = None, compiled_step: bool = False, captured: bool = False
) -> Work:
    """diffusers' scheduler in a Python loop, as its pipelines have it.

    Args:
        mode: of `torch.compile` for the model.
        compiled_step: compile the scheduler's step.
        captured: call the model as a CUDA graph.
    """
    import diffusers
    import torch

    problem, start, kwargs = inputs.problem, inputs.start, inputs.kwargs
    scheduler = diffusers.DDIMScheduler(**inputs.config)
    scheduler.set_timesteps(problem.num_steps, device=start.device)
    model, step = inputs.model, scheduler.step
    timesteps = scheduler.timesteps
    # A tensor would break the compiled step's graph at `prev_timestep >= 0`.
    steps = timesteps.tolist() if compiled_step else timesteps
    if mode is not None:
        model = torch.compile(inputs.model, mode=mode)
    if compiled_step:
        step = torch.compile(scheduler.step)
    if captured:
        model = _captured_model(inputs)

    def sample() -> Sequence[Any]:
        x = start
        for t, each in zip(timesteps, steps, strict=True):
            output = prediction(model(x, t.expand(len(x)), **kwargs))
            x = step(output, each, x, return_dict=False)[0]
        return (x,)

    t = timesteps[0]
    rows = t.expand(len(start))
    output = prediction(inputs.model(start, rows, **kwargs)).clone()
    parts = {}
    if not compiled_step:
        parts = {
            "model": partial(repeat, problem.num_steps, lambda: model(start, rows, **kwargs)),
            "step": partial(repeat, problem.num_steps, lambda: step(output, t, start, return_dict=False)),
        }
    return Work(sample, parts=parts)


def _captured_model(inputs: LoopInputs) -> Callable[..., Any]:
    import torch

    from fastddim.bench.gpu import capture

    x = inputs.start.clone()
    t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    replay = capture(lambda: prediction(inputs.model(x, t, **inputs.kwargs)))

    def call(state: Any, timesteps: Any, **kwargs: Any) -> Any:
        x.copy_(state)
        t.copy_(timesteps)
        return replay()

    return call


def _torch_tensorrt_work(inputs: LoopInputs) -> Work:
    import torch
    import torch_tensorrt  # noqa: F401

    compiled = torch.compile(inputs.model, backend="tensorrt")
    return _diffusers_work(LoopInputs(inputs.problem, compiled, inputs.start, inputs.kwargs, inputs.key))


def _tensorrt_missing() -> str | None:
    for package in ("tensorrt", "tensorrt_rtx"):
        if importlib.util.find_spec(package):
            return exported.missing("TensorRTSampler") or a_gpu()
    return "not installed: tensorrt (pip install 'fastddim[tensorrt]')"


_DIFFUSERS = installed("diffusers", "pip install diffusers")

# In half precision diffusers rounds after each of a step's operations.
_HALF_SLACK = 4.0

FASTDDIM_SAMPLER = Candidate("fastddim.Sampler", _sampler_work)
DIFFUSERS_LOOP = Candidate("diffusers.DDIMScheduler loop", _diffusers_work, "diffusers", _DIFFUSERS, _HALF_SLACK)
COMPILED_LOOPS = (
    Candidate(
        "diffusers, compiled UNet (reduce-overhead)",
        partial(_diffusers_work, mode="reduce-overhead"),
        "compile-reduce-overhead",
        all_of(_DIFFUSERS, a_compiler),
        _HALF_SLACK,
    ),
    Candidate(
        "diffusers, compiled UNet (max-autotune)",
        partial(_diffusers_work, mode="max-autotune"),
        "compile-max-autotune",
        all_of(_DIFFUSERS, a_gpu, a_compiler),
        _HALF_SLACK,
    ),
    Candidate(
        "diffusers, compiled step",
        partial(_diffusers_work, compiled_step=True),
        "compile-step",
        all_of(_DIFFUSERS, a_compiler),
        _HALF_SLACK,
    ),
)
CAPTURED_LOOP = Candidate(
    "diffusers, UNet as a CUDA graph",
    partial(_diffusers_work, captured=True),
    "cuda-graph",
    all_of(_DIFFUSERS, a_gpu),
    _HALF_SLACK,
)
EAGER_LOOP = Candidate(
    "torch, eager (graph='off', backend='reference')",
    partial(_sampler_work, graph="off", backend="reference"),
    "eager",
    a_gpu,
)
ORT_LOOP = Candidate("fastddim.export.OrtSampler", exported.ort_work, "onnxruntime", exported.ort_missing)
AOTI_LOOP = Candidate("fastddim.export.AotiSampler", exported.aoti_work, "aotinductor", exported.aoti_missing)
TENSORRT_LOOP = Candidate("fastddim.export.TensorRTSampler", exported.tensorrt_work, "tensorrt", _tensorrt_missing)
TORCH_TENSORRT_LOOP = Candidate(
    "diffusers, torch-tensorrt UNet",
    _torch_tensorrt_work,
    "torch-tensorrt",
    all_of(installed("torch_tensorrt", "pip install torch-tensorrt"), _DIFFUSERS, a_gpu),
    _HALF_SLACK,
)


def loop_suite(scope: Scope | None = None) -> list[Case]:
    """Whole runs of each network: numbers of steps at batch 1, and batches at the usual number of steps."""
    scope = scope or Scope()
    cases = []
    for network in NETWORKS:
        for run in _runs(network, scope):
            candidates = _candidates(network, run, scope)
            cases.append(loop_case(network, *run, scope, candidates=candidates, needs=_missing(network, run, scope)))
    return cases


def _runs(network: Network, scope: Scope) -> list[tuple[int, int]]:
    """Batches and numbers of steps, the most usual first."""
    runs = [(1, network.usual_steps), *((1, steps) for steps in STEPS), *((b, network.usual_steps) for b in BATCHES)]
    if network is CIFAR10 and not scope.on_gpu:
        runs += _CIFAR10_ON_CPU
    return list(dict.fromkeys(runs))


def _missing(network: Network, run: tuple[int, int], scope: Scope) -> str | None:
    on_cpu = network in (POLICY, DIGITS) or (network is CIFAR10 and run in _CIFAR10_ON_CPU)
    if not scope.on_gpu and not on_cpu:
        return NEEDS_GPU
    return LEFT_OUT if scope.quick and run not in _QUICK.get(network, ()) else None


def _candidates(network: Network, run: tuple[int, int], scope: Scope) -> tuple[Candidate, ...]:
    """All, but what takes long to compile only where a network's runs are the most usual."""
    candidates = [FASTDDIM_SAMPLER, DIFFUSERS_LOOP, CAPTURED_LOOP]
    if scope.on_gpu:
        # On a CPU it is what ours does too.
        candidates.append(EAGER_LOOP)
    slow = [*COMPILED_LOOPS, AOTI_LOOP, TENSORRT_LOOP, TORCH_TENSORRT_LOOP]
    if network in (POLICY, DIGITS):
        candidates.append(ORT_LOOP)
    else:
        slow.append(ORT_LOOP)
    if run == (1, network.usual_steps) or (network is CIFAR10 and not scope.on_gpu and run == (1, 4)):
        candidates += [left_out(each) if scope.quick and each.needs() is None else each for each in slow]
    return tuple(candidates)
