"""Whole runs: `Sampler` against what users would pick instead, over networks, batches and numbers of steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

from fastddim.bench import exported
from fastddim.bench.breakdown import Watch, split_captured, watching_sampler
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
from fastddim.bench.networks import (
    BATCHES,
    CIFAR10,
    DIFFUSION_POLICY,
    DIGITS,
    NETWORKS,
    POLICY,
    SD_SMALL,
    STEPS,
    Network,
)
from fastddim.bench.scheduler_loop import class_of, drawing, make_scheduler, run_scheduler
from fastddim.samplers import METHODS

# Batches and numbers of steps: what a CPU does in seconds, and what a quick run does.
_CIFAR10_ON_CPU = ((1, 1), (1, 4), (1, 10), (4, 1))
_QUICK = {POLICY: ((1, 10), (4, 10)), DIGITS: ((1, 4), (1, 20), (4, 20)), CIFAR10: ((1, 1),)}


def _sampler_work(inputs: LoopInputs, **options: Any) -> Work:
    import fastddim

    problem, start, kwargs = inputs.problem, inputs.start, inputs.kwargs
    scheduler: Any = fastddim.DDIMConfig(**problem.config)
    if inputs.method is not None:
        scheduler, options = make_scheduler(inputs.method, problem), {**options, "method": inputs.method}
    if "use_clipped_model_output" in METHODS[inputs.method or "ddim"].options:
        # diffusers' default epsilon, so that both do the same work.
        options["use_clipped_model_output"] = False
    sampler = fastddim.Sampler(
        inputs.model, scheduler, problem.num_steps, sample_shape=problem.shape[1:], dtype=start.dtype, **options
    )
    start = start * sampler.table.start_scale
    called: dict[str, Any] = {"seeds": inputs.seeds, **kwargs} if sampler.table.stochastic else kwargs
    captured = sampler.graph != "off" and start.is_cuda
    # The first call goes step by step: what is verified, and cold, is the capture of the second one too.
    uncaptured = [captured]

    def sample() -> Sequence[Any]:
        if uncaptured and uncaptured.pop():
            sampler(start, **called)
        return (sampler(start, **called),)

    def parts() -> dict[str, float]:
        if captured:
            return split_captured(sample, hoisted=sampler.hoist)
        watch = Watch(start.device.type)
        with watching_sampler(watch):
            return watch.split(sample)

    return Work(sample, parts=parts)


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

    problem, start, kwargs = inputs.problem, inputs.start, inputs.kwargs
    scheduler = diffusers.DDIMScheduler(**problem.config)
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

    def sample(model: Callable[..., Any] = model, step: Callable[..., Any] = step) -> Sequence[Any]:
        x = start
        for t, each in zip(timesteps, steps, strict=True):
            output = model(x, t.expand(len(x)), **kwargs)
            # As pipelines do: the checks of `call_model` would be on diffusers' bill.
            x = step(getattr(output, "sample", output), each, x, return_dict=False)[0]
        return (x,)

    def parts() -> dict[str, float]:
        watch = Watch(start.device.type)
        return watch.split(partial(sample, watch.around("model", model), watch.around("step", step)))

    return Work(sample, parts=parts)


def _method_work(inputs: LoopInputs) -> Work:
    """diffusers' scheduler of the method in a Python loop, as its pipelines have it, its timesteps set beforehand."""
    method, start, kwargs = inputs.method, inputs.start, inputs.kwargs
    assert method is not None
    scheduler = make_scheduler(method, inputs.problem, start.device)

    def model(x: Any, t: Any) -> Any:
        output = inputs.model(x, t.expand(len(x)), **kwargs)
        return getattr(output, "sample", output)

    # What is verified draws the noise that it is judged with; what is timed draws its own.
    unverified = [True]

    def sample() -> Sequence[Any]:
        noises = inputs.noises(start.dtype)
        with drawing(method, noises) if unverified and unverified.pop() else contextlib.nullcontext():
            return (run_scheduler(scheduler, model, start),)

    def parts() -> dict[str, float]:
        watch = Watch(start.device.type)
        kind = type(scheduler)
        with mock.patch.object(kind, "step", watch.around("step", kind.step)):
            return watch.split(partial(run_scheduler, scheduler, watch.around("model", model), start))

    return Work(sample, parts=parts)


def _captured_model(inputs: LoopInputs) -> Callable[..., Any]:
    import torch

    from fastddim.bench.gpu import capture
    from fastddim.model_call import call_model

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
COMPILED_SAMPLER = Candidate(
    "fastddim.Sampler, backend='compiled'", partial(_sampler_work, backend="compiled"), needs=a_compiler
)
HOISTED_SAMPLER = Candidate("fastddim.Sampler, hoist", partial(_sampler_work, hoist=True))
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
    # Which judges them.
    absent = None if scope.method is None else _DIFFUSERS()
    return [
        loop_case(
            network,
            *run,
            scope,
            _candidates(network, run, scope) if scope.method is None else _method_candidates(scope),
            needs=_missing(network, run, scope) or absent,
            method=scope.method,
        )
        for network in NETWORKS
        for run in _runs(network, scope)
    ]


def _method_candidates(scope: Scope) -> tuple[Candidate, ...]:
    """Ours, on a GPU as each kind of graph, and diffusers' scheduler of the method."""
    assert scope.method is not None
    whole = Candidate("fastddim.Sampler, graph='loop'", partial(_sampler_work, graph="loop"))
    theirs = Candidate(f"diffusers.{class_of(scope.method)} loop", _method_work, "diffusers", _DIFFUSERS, slack=4.0)
    return (FASTDDIM_SAMPLER, *([whole, EAGER_LOOP] if scope.on_gpu else []), theirs)


def _runs(network: Network, scope: Scope) -> list[tuple[int, int]]:
    """Batches and numbers of steps, the most usual first."""
    if network in (SD_SMALL, DIFFUSION_POLICY):
        # The larger ones of its kind are a GPU's.
        return [(1, network.usual_steps)]
    runs = [(1, network.usual_steps), *((1, steps) for steps in STEPS), *((b, network.usual_steps) for b in BATCHES)]
    if network is CIFAR10 and not scope.on_gpu:
        runs += _CIFAR10_ON_CPU
    return list(dict.fromkeys(runs))


def _missing(network: Network, run: tuple[int, int], scope: Scope) -> str | None:
    on_cpu = network in (POLICY, DIFFUSION_POLICY, DIGITS, SD_SMALL) or (network is CIFAR10 and run in _CIFAR10_ON_CPU)
    if not scope.on_gpu and not on_cpu:
        return NEEDS_GPU
    return LEFT_OUT if scope.quick and run not in _QUICK.get(network, ()) else None


def _candidates(network: Network, run: tuple[int, int], scope: Scope) -> tuple[Candidate, ...]:
    """All candidates, but those that take long to compile only for the most usual run of a network."""
    candidates, slow = [FASTDDIM_SAMPLER, HOISTED_SAMPLER, DIFFUSERS_LOOP, CAPTURED_LOOP], list(_SLOW_LOOPS)
    if scope.on_gpu:
        # On a CPU it is what ours does too.
        candidates.append(EAGER_LOOP)
    else:
        candidates[1:1] = unless_quick(scope, COMPILED_SAMPLER)
    (candidates if network in (POLICY, DIFFUSION_POLICY, DIGITS) else slow).append(exported.ORT_LOOP)
    if run == (1, network.usual_steps) or (network is CIFAR10 and not scope.on_gpu and run == (1, 4)):
        candidates += unless_quick(scope, *slow)
    return tuple(candidates)
