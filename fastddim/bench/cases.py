"""The registry: which cases a suite has, and each case's candidates, reference and bar. torch loads when a case runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastddim.bench.textbook import StepProblem, draw_inputs, textbook_step

Call = Callable[[], Sequence[Any]]

# Of the result's largest magnitude. float32, and diffusers' float32 alphas_cumprod, cost a tenth of it.
TOLERANCE = 2e-5

_IMPORT_TIMEOUT_S = 600


@dataclass(frozen=True)
class Candidate:
    """One way to do a case's work.

    Attributes:
        name: as reports show it.
        make: from the case's inputs, which it must not modify, to the call that is verified and timed; the call
            returns the case's results as tensors or arrays.
    """

    name: str
    make: Callable[[Any], Call]


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        suite: the suite it belongs to.
        name: unique in the suite.
        candidates: ours first, then the baselines.
        inputs: makes what the candidates share.
        reference: from the inputs to the expected results, float64 arrays.
        target: the least time of each baseline over ours that meets the bar; None without one.
        tolerance: the largest error, relative to the largest magnitude of each expected result.
    """

    suite: str
    name: str
    candidates: tuple[Candidate, ...]
    inputs: Callable[[], Any]
    reference: Callable[[Any], Sequence[Any]]
    target: float | None = None
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class StepInputs:
    """A problem with its float32 tensors; `noise` is None for a deterministic step."""

    problem: StepProblem
    model_output: Any
    sample: Any
    noise: Any


def step_case(
    name: str, problem: StepProblem, target: float | None = None, ours: tuple[Candidate, ...] | None = None
) -> Case:
    """A case of the step suite: our candidates, by default the drop-in scheduler, against diffusers' step."""
    return Case(
        suite="step",
        name=f"{name} [{','.join(map(str, problem.shape))}]",
        candidates=(*(ours or (FASTDDIM_SCHEDULER,)), DIFFUSERS_SCHEDULER),
        inputs=partial(_step_inputs, problem),
        reference=lambda _: textbook_step(problem, *draw_inputs(problem)),
        target=target,
    )


def _step_inputs(problem: StepProblem) -> StepInputs:
    import torch

    output, sample, noise = (torch.from_numpy(array.astype(np.float32)) for array in draw_inputs(problem))
    return StepInputs(problem, output, sample, noise if problem.eta else None)


def _scheduler_call(module: str, inputs: StepInputs) -> Call:
    """A scheduler's `step` as diffusers' pipelines call it, after eager guidance where the problem has it."""
    import importlib

    problem, model_output, sample = inputs.problem, inputs.model_output, inputs.sample
    scheduler = importlib.import_module(module).DDIMScheduler(
        prediction_type=problem.prediction_type,
        thresholding=problem.threshold is not None,
        sample_max_value=problem.threshold or 1.0,
    )
    scheduler.set_timesteps(problem.num_steps)
    timestep = scheduler.timesteps[problem.index]
    kwargs: dict[str, Any] = {"return_dict": False}
    if problem.eta:
        kwargs |= {"eta": problem.eta, "variance_noise": inputs.noise}

    def step() -> Sequence[Any]:
        results: Sequence[Any] = scheduler.step(model_output, timestep, sample, **kwargs)
        return results

    def guided_step() -> Sequence[Any]:
        uncond, cond = model_output.chunk(2)
        guided = uncond + problem.guidance_scale * (cond - uncond)
        results: Sequence[Any] = scheduler.step(guided, timestep, sample, **kwargs)
        return results

    return step if problem.guidance_scale is None else guided_step


def _ddim_step_call(inputs: StepInputs, in_place: bool = False) -> Call:
    import fastddim

    problem, model_output = inputs.problem, inputs.model_output
    config = fastddim.DDIMConfig(prediction_type=problem.prediction_type)
    schedule = fastddim.Schedule(config)
    table = fastddim.StepTable.build(schedule, schedule.pairs(problem.num_steps), eta=problem.eta)
    threshold = problem.threshold
    limit = fastddim.Clip() if threshold is None else fastddim.DynamicThreshold(problem.ratio, threshold)
    # In place each call steps from the last one's result: bounded, as x0 is limited, and as much work.
    sample = inputs.sample.clone() if in_place else inputs.sample

    def step() -> Sequence[Any]:
        return fastddim.ddim_step(
            model_output,
            sample,
            table,
            problem.index,
            limit=limit,
            noise=inputs.noise,
            guidance_scale=problem.guidance_scale,
            out=sample if in_place else None,
        )

    return step


FASTDDIM_SCHEDULER = Candidate("fastddim.DDIMScheduler", partial(_scheduler_call, "fastddim"))
DIFFUSERS_SCHEDULER = Candidate("diffusers.DDIMScheduler", partial(_scheduler_call, "diffusers"))
DDIM_STEP = Candidate("fastddim.ddim_step", _ddim_step_call)
DDIM_STEP_IN_PLACE = Candidate("fastddim.ddim_step(out=sample)", partial(_ddim_step_call, in_place=True))


def step_suite(quick: bool = False) -> list[Case]:
    """One step on the CPU, the drop-in scheduler or `ddim_step` against diffusers' scheduler.

    Args:
        quick: shapes of at most `[2, C, 16, 16]`, to which no bar applies.
    """
    latent, pixels = (1, 4, 64, 64), (8, 3, 256, 256)
    rows: list[tuple[str, StepProblem, float | None, tuple[Candidate, ...] | None]] = [
        ("default", StepProblem(shape=latent), 4.0, None),
        ("default", StepProblem(shape=pixels), 5.0, None),
        ("threshold", StepProblem(shape=pixels, threshold=2.0), 5.0, None),
        ("threshold", StepProblem(shape=(16, 3, 64, 64), threshold=2.0), None, None),
        ("v_prediction", StepProblem(shape=pixels, prediction_type="v_prediction"), None, None),
        ("eta 1", StepProblem(shape=pixels, eta=1.0), None, None),
        ("guidance", StepProblem(shape=latent, guidance_scale=7.5), None, (DDIM_STEP,)),
        ("guidance", StepProblem(shape=pixels, guidance_scale=7.5), None, (DDIM_STEP,)),
        ("in place", StepProblem(shape=latent), None, (DDIM_STEP_IN_PLACE,)),
        ("in place", StepProblem(shape=pixels), None, (DDIM_STEP_IN_PLACE,)),
    ]
    if not quick:
        return [step_case(*row) for row in rows]
    shrunk = {}
    for name, problem, _, ours in rows:
        shape = (min(problem.shape[0], 2), problem.shape[1], 16, 16)
        case = step_case(name, replace(problem, shape=shape), None, ours)
        shrunk[case.name] = case
    return list(shrunk.values())


def _import_call(code: str, modules: Sequence[str], _: Any) -> Call:
    program = f"{code}\nimport sys\nprint(all(name in sys.modules for name in {list(modules)!r}))"
    # The children import the fastddim that this process runs, installed or not.
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))

    def run() -> Sequence[Any]:
        child = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT_S,
        )
        if child.returncode:
            raise RuntimeError(f"{code!r} failed: {(child.stderr.strip().splitlines() or ['no message'])[-1]}")
        return (np.array([float(child.stdout.strip() == "True")]),)

    return run


def import_suite(quick: bool = False) -> list[Case]:
    """Whole interpreter runs that import fastddim, or torch and diffusers; `quick` leaves out the first use."""
    ours, baseline = "import fastddim", "import torch, diffusers"
    used_ours = "import fastddim; fastddim.DDIMScheduler"
    used_baseline = "import torch, diffusers; diffusers.DDIMScheduler"
    rows = [
        ("import", ours, ("fastddim",), baseline, ("torch", "diffusers")),
        ("first use", used_ours, ("fastddim.scheduler",), used_baseline, ("diffusers.schedulers.scheduling_ddim",)),
    ]
    return [
        Case(
            suite="import",
            name=name,
            candidates=(
                Candidate(our_code, partial(_import_call, our_code, our_modules)),
                Candidate(code, partial(_import_call, code, modules)),
            ),
            inputs=lambda: None,
            reference=lambda _: (np.ones(1),),
            target=1 / 1.5,
        )
        for name, our_code, our_modules, code, modules in rows[: 1 if quick else None]
    ]


SUITES: dict[str, Callable[[bool], list[Case]]] = {"step": step_suite, "import": import_suite}
