"""One step: ours against diffusers' scheduler, its compiled one and plain torch, over sizes, dtypes and options."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastddim.bench.cases import (
    LEFT_OUT,
    NEEDS_GPU,
    TOLERANCE,
    Call,
    Candidate,
    Case,
    Scope,
    a_compiler,
    a_gpu,
    all_of,
    installed,
    unless_quick,
)
from fastddim.bench.textbook import StepProblem, draw_inputs, textbook_step

# Rounding the result to half precision costs up to 2**-11 and 2**-8 of it.
DTYPES = {"float32": TOLERANCE, "float16": 6e-4, "bfloat16": 4.4e-3}
# Larger states repeat a block of this many elements: drawing and judging them takes longer than the steps.
_BLOCK = 1 << 20
_LATENT, _PIXELS = (1, 4, 64, 64), (8, 3, 256, 256)
_SMALL_SIDE = 16
_SWEEP = range(12, 29, 2)
_LARGEST_ON_CPU = 1 << 24
_LARGEST_QUICK = 1 << 16


@dataclass(frozen=True)
class StepInputs:
    """A problem with its tensors; `noise` is None for a deterministic step.

    Attributes:
        block: the step of the first samples, which the others repeat.
        drawn: the block's arrays in float64: model output, sample, noise.
    """

    problem: StepProblem
    model_output: Any
    sample: Any
    noise: Any
    block: StepProblem
    drawn: tuple[Any, Any, Any]


def step_case(
    name: str,
    problem: StepProblem,
    scope: Scope,
    candidates: Sequence[Candidate],
    *,
    target: float | None = None,
    dtype: str = "float32",
    needs: str | None = None,
) -> Case:
    """A case of the step suite.

    Args:
        name: the case's name without the shape, which is added.
        problem: the step to take.
        scope: where the case runs.
        candidates: ways to take the step, ours first.
        target: the bar of diffusers' ratio.
        dtype: the dtype of all tensors, one of `DTYPES`.
        needs: what keeps the case from running here.
    """
    elements = math.prod(problem.shape)
    reads = 1 + (1 if problem.guidance_scale is None else 2) + bool(problem.eta)
    itemsize = 4 if dtype == "float32" else 2
    return Case(
        suite="step",
        name=f"{name} [{','.join(map(str, problem.shape))}]" + ("" if dtype == "float32" else f" {dtype}"),
        candidates=tuple(candidates),
        inputs=partial(_step_inputs, problem, dtype, scope.device),
        reference=lambda inputs: textbook_step(inputs.block, *inputs.drawn),
        target=target,
        tolerance=DTYPES[dtype],
        blocks=_copies(problem),
        device=scope.device,
        needs=needs,
        nbytes=(reads + 2) * elements * itemsize,
        about={"elements": elements, "dtype": dtype, "option": name},
    )


def _step_inputs(problem: StepProblem, dtype: str, device: str) -> StepInputs:
    import torch

    copies = _copies(problem)
    block = replace(problem, shape=(problem.shape[0] // copies, *problem.shape[1:]))
    tensors = [torch.from_numpy(array).to(getattr(torch, dtype)) for array in draw_inputs(block)]
    drawn = tuple(tensor.double().numpy() for tensor in tensors)
    output, sample, noise = (tensor.to(device) for tensor in tensors)
    if copies > 1:
        # Both halves of a guided output, each repeated.
        halves = output.reshape(-1, 1, *block.shape).expand(-1, copies, *block.shape)
        output = halves.reshape(-1, *block.shape[1:])
        sample, noise = (each.repeat(copies, *[1] * (each.ndim - 1)) for each in (sample, noise))
    return StepInputs(problem, output, sample, noise if problem.eta else None, block, drawn)  # type: ignore[arg-type]


def _copies(problem: StepProblem) -> int:
    """How often the drawn block is there."""
    batch, sample_size = problem.shape[0], math.prod(problem.shape[1:])
    return batch // max(k for k in range(1, batch + 1) if batch % k == 0 and (k == 1 or k * sample_size <= _BLOCK))


def _scheduler_call(module: str, inputs: StepInputs, compiled: bool = False, backend: str | None = None) -> Call:
    """A scheduler's `step` as diffusers' pipelines call it, after eager guidance where the problem has it.

    backend: what our scheduler's step is taken by.
    """
    import torch

    problem, model_output, sample = inputs.problem, inputs.model_output, inputs.sample
    scheduler = importlib.import_module(module).DDIMScheduler(
        prediction_type=problem.prediction_type,
        clip_sample=problem.clip,
        thresholding=problem.threshold is not None,
        sample_max_value=problem.threshold or 1.0,
    )
    if backend is not None:
        scheduler.backend = backend
    scheduler.set_timesteps(problem.num_steps)
    timestep = scheduler.timesteps[problem.index]
    kwargs: dict[str, Any] = {"return_dict": False}
    if problem.eta:
        kwargs |= {"eta": problem.eta, "variance_noise": inputs.noise}
    if compiled:
        # A tensor would break the graph at `prev_timestep >= 0`.
        timestep = int(timestep)

    def step() -> Sequence[Any]:
        output = model_output
        if problem.guidance_scale is not None:
            uncond, cond = model_output.chunk(2)
            output = uncond + problem.guidance_scale * (cond - uncond)
            if problem.guidance_rescale:
                output = _rescale(output, cond, problem.guidance_rescale)
        results: Sequence[Any] = scheduler.step(output, timestep, sample, **kwargs)
        return results

    return torch.compile(step, dynamic=False) if compiled else step


def _rescale(guided: Any, cond: Any, amount: float) -> Any:
    """As diffusers' `rescale_noise_cfg`, which would import all of its pipelines."""
    axes = list(range(1, cond.ndim))
    rescaled = guided * (cond.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return amount * rescaled + (1 - amount) * guided


def _ddim_step_call(inputs: StepInputs, in_place: bool = False, backend: str = "auto") -> Call:
    import fastddim

    problem, model_output = inputs.problem, inputs.model_output
    table = _table(problem)
    # In place each call steps from the last one's result: bounded, as x0 is limited, and as much work.
    sample = inputs.sample.clone() if in_place else inputs.sample

    def step() -> Sequence[Any]:
        return fastddim.ddim_step(
            model_output,
            sample,
            table,
            problem.index,
            limit=_limit(problem),
            noise=inputs.noise,
            guidance=_guidance(problem),
            out=sample if in_place else None,
            backend=backend,
        )

    return step


def _prepared_call(inputs: StepInputs) -> Call:
    """The step as `Sampler`'s loop takes it: bound to its buffers."""
    from fastddim.kernels import PreparedStep
    from fastddim.step import StepOptions

    problem = inputs.problem
    options = StepOptions(guidance=_guidance(problem), limit=_limit(problem), noise=inputs.noise)
    step = PreparedStep(inputs.model_output, inputs.sample, _table(problem), options)
    return lambda: step(inputs.model_output, problem.index)


def _table(problem: StepProblem) -> Any:
    import fastddim

    schedule = fastddim.Schedule(fastddim.DDIMConfig(prediction_type=problem.prediction_type))
    return fastddim.StepTable.build(schedule, schedule.pairs(problem.num_steps), eta=problem.eta)


def _guidance(problem: StepProblem) -> Any:
    import fastddim

    scale = problem.guidance_scale
    return None if scale is None else fastddim.Guidance(scale, problem.guidance_rescale)


def _limit(problem: StepProblem) -> Any:
    import fastddim

    if problem.threshold is not None:
        return fastddim.DynamicThreshold(problem.ratio, problem.threshold)
    return fastddim.Clip() if problem.clip else None


_DIFFUSERS = installed("diffusers")
# In half precision diffusers rounds after each of its operations, and guidance multiplies what that leaves.
_HALF_SLACK = 32.0

FASTDDIM_SCHEDULER = Candidate(
    "fastddim.DDIMScheduler", partial(_scheduler_call, "fastddim"), needs=_DIFFUSERS, slack=_HALF_SLACK
)
DIFFUSERS_SCHEDULER = Candidate(
    "diffusers.DDIMScheduler", partial(_scheduler_call, "diffusers"), "diffusers", _DIFFUSERS, _HALF_SLACK
)
COMPILED_STEP = Candidate(
    "diffusers.DDIMScheduler, compiled",
    partial(_scheduler_call, "diffusers", compiled=True),
    "compile-step",
    all_of(_DIFFUSERS, a_compiler),
    _HALF_SLACK,
)
EAGER_STEP = Candidate(
    "torch, eager (backend='reference')", partial(_ddim_step_call, backend="reference"), "eager", a_gpu
)
DDIM_STEP = Candidate("fastddim.ddim_step", _ddim_step_call)
DDIM_STEP_IN_PLACE = Candidate("fastddim.ddim_step(out=sample)", partial(_ddim_step_call, in_place=True))
# Compiled once for all sizes of a kind.
_COMPILED = {
    FASTDDIM_SCHEDULER: Candidate(
        "fastddim.DDIMScheduler, backend='compiled'",
        partial(_scheduler_call, "fastddim", backend="compiled"),
        needs=all_of(_DIFFUSERS, a_compiler),
        slack=_HALF_SLACK,
    ),
    DDIM_STEP: Candidate(
        "fastddim.ddim_step(backend='compiled')", partial(_ddim_step_call, backend="compiled"), needs=a_compiler
    ),
    DDIM_STEP_IN_PLACE: Candidate(
        "fastddim.ddim_step(out=sample, backend='compiled')",
        partial(_ddim_step_call, in_place=True, backend="compiled"),
        needs=a_compiler,
    ),
}
PREPARED_STEP = Candidate("fastddim.kernels.PreparedStep", _prepared_call, needs=a_gpu)


def step_suite(scope: Scope) -> list[Case]:
    """One step: options at a latent and a pixel size, then sizes of 2**12 to 2**28 elements, then half precision."""
    guided = {"guidance_scale": 7.5}
    rows: list[tuple[str, dict[str, Any], tuple[int, ...], float | None, Candidate]] = [
        ("default", {}, _LATENT, 4.0, FASTDDIM_SCHEDULER),
        ("default", {}, _PIXELS, 5.0, FASTDDIM_SCHEDULER),
        ("threshold", {"threshold": 2.0}, _PIXELS, 5.0, FASTDDIM_SCHEDULER),
        ("threshold", {"threshold": 2.0}, (16, 3, 64, 64), None, FASTDDIM_SCHEDULER),
        ("v_prediction", {"prediction_type": "v_prediction"}, _PIXELS, None, FASTDDIM_SCHEDULER),
        ("eta 1", {"eta": 1.0}, _PIXELS, None, FASTDDIM_SCHEDULER),
        ("no limit", {"clip": False}, _PIXELS, None, FASTDDIM_SCHEDULER),
        ("guidance", guided, _LATENT, None, DDIM_STEP),
        ("guidance", guided, _PIXELS, None, DDIM_STEP),
        ("rescale", {**guided, "guidance_rescale": 0.7}, _LATENT, None, DDIM_STEP),
        ("rescale", {**guided, "guidance_rescale": 0.7}, _PIXELS, None, DDIM_STEP),
        ("all", {**guided, "guidance_rescale": 0.7, "threshold": 2.0, "eta": 1.0}, _PIXELS, None, DDIM_STEP),
        ("in place", {}, _LATENT, None, DDIM_STEP_IN_PLACE),
        ("in place", {}, _PIXELS, None, DDIM_STEP_IN_PLACE),
    ]
    cases = []
    for name, options, shape, target, ours in rows:
        if scope.quick:
            shape, target = (min(shape[0], 2), shape[1], _SMALL_SIDE, _SMALL_SIDE), None
        problem = StepProblem(shape=shape, **options)
        target = None if scope.on_gpu else target
        cases.append(step_case(name, problem, scope, _candidates(problem, ours, scope), target=target))
    for exponent in _SWEEP:
        # Latents of 4 channels: larger pictures, then more of them, but never a sample above 2**20 elements.
        side = {12: 32, 14: 64}.get(exponent, 128)
        problem = StepProblem(shape=((1 << exponent) // (4 * side * side), 4, side, side))
        needs = None
        if not scope.on_gpu and 1 << exponent > _LARGEST_ON_CPU:
            needs = NEEDS_GPU
        elif scope.quick and 1 << exponent > _LARGEST_QUICK:
            needs = LEFT_OUT
        # On a CPU two sizes show what half precision costs.
        for dtype in DTYPES if scope.on_gpu or exponent in (14, 20) else ("float32",):
            candidates = _candidates(problem, DDIM_STEP, scope)
            cases.append(step_case("size", problem, scope, candidates, dtype=dtype, needs=needs))
    # A quick run's smaller shapes may coincide.
    return list({case.name: case for case in cases}.values())


def _candidates(problem: StepProblem, ours: Candidate, scope: Scope) -> list[Candidate]:
    # A compilation for each case takes seconds.
    baselines = [DIFFUSERS_SCHEDULER, *unless_quick(scope, COMPILED_STEP)]
    if not scope.on_gpu:
        return [ours, *unless_quick(scope, _COMPILED[ours]), *baselines]
    # On a CPU eager torch is what ours does too.
    baselines.append(EAGER_STEP)
    if ours is DDIM_STEP_IN_PLACE:
        return [ours, *baselines]
    scheduler = [FASTDDIM_SCHEDULER] if problem.guidance_scale is None else []
    return [DDIM_STEP, PREPARED_STEP, *scheduler, *baselines]
