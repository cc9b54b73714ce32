"""Whole runs: `Sampler` against what users would pick instead, over networks, batches and numbers of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastddim.bench import exported
from fastddim.bench.cases import (
    LEFT_OUT,
    NEEDS_GPU,
    Candidate,
    Case,
    Needs,
    Scope,
    Work,
    a_compiler,
    a_gpu,
    all_of,
    installed,
    unless_quick,
)
from fastddim.bench.loop_case import LoopInputs, loop_case
from fastddim.bench.networks import BATCHES, CIFAR10, DIGITS, NETWORKS, POLICY, STEPS, Network

# Batches and numbers of steps: what a CPU does in seconds, and what a quick run does.
_CIFAR10_ON_CPU = ((1, 1), (1, 4), (1, 10), (4, 1))
_QUICK = {POLICY: ((1, 10), (4, 10)), DIGITS: ((1, 4), (1, 20), (4, 20)), CIFAR10: ((1, 1),)}


def _sampler_work(inputs: LoopInputs, **options: Any) -> Work:
    import torch

    import fastddim
    from fastddim.loop import call_model

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
    output = call_model(inputs.model, state, t, kwargs).clone()
    parts: dict[str, Callable[[], Any]] = {
        "model": lambda: inputs.model(state, t, **kwargs),
        "step": lambda: fastddim.ddim_step(output, state, sampler.table, 0, limit=sampler.limit, out=state),
    }
    captured = sampler.graph != "off" and start.is_cuda
    if captured:
        from fastddim.bench.gpu import capture

        parts = {name: capture(part) for name, part in parts.items()}
    # The first call goes step by step: what is verified, and cold, is the capture of the second one too.
    uncaptured = [captured]

    def sample() -> Sequence[Any]:
        if uncaptured and uncaptured.pop():
            sampler(start, **kwargs)
        return (sampler(start, **kwargs),)

    return Work(sample, parts=_repeated(problem.num_steps, parts))


def _repeated(count: int, parts: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], None]]:
    """Parts of a step, as often as a run has steps."""

    def repeat(call: Callable[[], Any]) -> None:
        for _ in range(count):
            call()

    return {name: partial(repeat, part) for name, part in parts.items()}


def _diffusers_work(
    inputs: LoopInputs, mode: str | None = None, compiled_step: bool = False, captured: bool = False
) -> Work:
    """diffusers' scheduler in a Python loop, as its pipelines have it.

    Args:
        mode: the mode in which `torch.compile` compiles the model; None leaves it as it is.
        compiled_step: compile the scheduler's step.
        captured: call the model as a CUDA graph.
    """
    import diffusers
    import torch

    from fastddim.loop import call_model

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
            output = model(x, t.expand(len(x)), **kwargs)
            # As pipelines do: the checks of `call_model` would be on diffusers' bill.
            x = step(getattr(output, "sample", output), each, x, return_dict=False)[0]
        return (x,)

    t = timesteps[0]
    rows = t.expand(len(start))
    if compiled_step:
        return Work(sample)
    output = call_model(inputs.model, start, rows, kwargs).clone()
    parts = {
        "model": lambda: model(start, rows, **kwargs),
        "step": lambda: step(output, t, start, return_dict=False),
    }
    return Work(sample, parts=_repeated(problem.num_steps, parts))


def _captured_model(inputs: LoopInputs) -> Callable[..., Any]:
    import torch

    from fastddim.bench.gpu import capture
    from fastddim.loop import call_model

    x = inputs.start.clone()
    t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    replay = capture(lambda: call_model(inputs.model, x, t, inputs.kwargs))

    def call(state: Any, timesteps: Any, **kwargs: Any) -> Any:
        x.copy_(state)
        t.copy_(timesteps)
        return replay()

    return call


def _torch_tensorrt_work(inputs: LoopInputs) -> Work:
    import torch
    import torch_tensorrt  # noqa: F401

    return _diffusers_work(replace(inputs, model=torch.compile(inputs.model, backend="tensorrt")))


_DIFFUSERS = installed("diffusers", "pip install diffusers")


def _diffusers_loop(name: str, baseline: str, *needs: Needs, **options: Any) -> Candidate:
    # In half precision diffusers rounds after each of a step's operations.
    return Candidate(name, partial(_diffusers_work, **options), baseline, all_of(_DIFFUSERS, *needs), slack=4.0)


FASTDDIM_SAMPLER = Candidate("fastddim.Sampler", _sampler_work)
DIFFUSERS_LOOP = _diffusers_loop("diffusers.DDIMScheduler loop", "diffusers")
CAPTURED_LOOP = _diffusers_loop("diffusers, UNet as a CUDA graph", "cuda-graph", a_gpu, captured=True)
EAGER_LOOP = Candidate(
    "torch, eager (graph='off', backend='reference')",
    partial(_sampler_work, graph="off", backend="reference"),
    "eager",
    a_gpu,
)
# These compile for long.
_SLOW_LOOPS = (
    _diffusers_loop(
        "diffusers, compiled UNet (reduce-overhead)", "compile-reduce-overhead", a_compiler, mode="reduce-overhead"
    ),
    _diffusers_loop(
        "diffusers, compiled UNet (max-autotune)", "compile-max-autotune", a_gpu, a_compiler, mode="max-autotune"
    ),
    _diffusers_loop("diffusers, compiled step", "compile-step", a_compiler, compiled_step=True),
    exported.AOTI_LOOP,
    exported.TENSORRT_LOOP,
    Candidate(
        "diffusers, torch-tensorrt UNet",
        _torch_tensorrt_work,
        "torch-tensorrt",
        all_of(installed("torch_tensorrt", "pip install torch-tensorrt"), _DIFFUSERS, a_gpu),
        DIFFUSERS_LOOP.slack,
    ),
)


def loop_suite(scope: Scope) -> list[Case]:
    """Whole runs of each network: numbers of steps at batch 1, and batches at the usual number of steps."""
    return [
        loop_case(network, *run, scope, _candidates(network, run, scope), needs=_missing(network, run, scope))
        for network in NETWORKS
        for run in _runs(network, scope)
    ]


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
    """All candidates, but those that take long to compile only for the most usual run of a network."""
    candidates, slow = [FASTDDIM_SAMPLER, DIFFUSERS_LOOP, CAPTURED_LOOP], list(_SLOW_LOOPS)
    if scope.on_gpu:
        # On a CPU it is what ours does too.
        candidates.append(EAGER_LOOP)
    (candidates if network in (POLICY, DIGITS) else slow).append(exported.ORT_LOOP)
    if run == (1, network.usual_steps) or (network is CIFAR10 and not scope.on_gpu and run == (1, 4)):
        candidates += unless_quick(scope, *slow)
    return tuple(candidates)
