"""The registry: which cases a suite has, and each case's candidates, reference and bar. torch loads when a case runs."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastddim.bench.textbook import LoopProblem, StepProblem, draw_inputs, textbook_loop, textbook_step

Call = Callable[[], Sequence[Any]]

# Of the result's largest magnitude. float32, and diffusers' float32 alphas_cumprod, cost a tenth of it.
TOLERANCE = 2e-5

_POLICY_OBS_DIM = 20

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


@dataclass(frozen=True)
class LoopInputs:
    """A run with its float32 model, starting state and the model's keyword arguments."""

    problem: LoopProblem
    model: Any
    start: Any
    kwargs: dict[str, Any]


def loop_case(name: str, problem: LoopProblem, make_model: Callable[[], tuple[Any, dict[str, Any]]]) -> Case:
    """A case of the loop suite: `Sampler` against diffusers' scheduler in a Python loop, from the same start.

    Args:
        name: of the model.
        problem: the run.
        make_model: makes the model, in float32, and its keyword arguments.
    """
    return Case(
        suite="loop",
        name=f"{name} [{','.join(map(str, problem.shape))}]",
        candidates=(FASTDDIM_SAMPLER, DIFFUSERS_LOOP),
        inputs=partial(_loop_inputs, problem, make_model),
        reference=_loop_reference,
    )


def _loop_inputs(problem: LoopProblem, make_model: Callable[[], tuple[Any, dict[str, Any]]]) -> LoopInputs:
    import torch

    start = np.random.default_rng(0).standard_normal(problem.shape).astype(np.float32)
    model, kwargs = make_model()
    return LoopInputs(problem, model, torch.from_numpy(start), kwargs)


def _loop_reference(inputs: LoopInputs) -> Sequence[Any]:
    """The textbook's loop around a float64 copy of the model."""
    import torch

    model = copy.deepcopy(inputs.model).double()
    kwargs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.kwargs.items()}

    def call(x: Any, t: int) -> Any:
        timesteps = torch.full((len(x),), t)
        return _tensor(model(torch.from_numpy(x), timesteps, **kwargs)).numpy()

    return (textbook_loop(inputs.problem, call, inputs.start.double().numpy()),)


def _sampler_call(inputs: LoopInputs) -> Call:
    import fastddim

    problem = inputs.problem
    # diffusers' default epsilon, so that both do the same work.
    sampler = fastddim.Sampler(
        inputs.model,
        fastddim.DDIMConfig(**_loop_config(problem)),
        problem.num_steps,
        use_clipped_model_output=False,
        sample_shape=problem.shape[1:],
    )
    return lambda: (sampler(inputs.start, **inputs.kwargs),)


def _diffusers_loop_call(inputs: LoopInputs) -> Call:
    import diffusers

    problem, model, kwargs = inputs.problem, inputs.model, inputs.kwargs
    scheduler = diffusers.DDIMScheduler(**_loop_config(problem))
    scheduler.set_timesteps(problem.num_steps)

    def sample() -> Sequence[Any]:
        x = inputs.start
        for t in scheduler.timesteps:
            output = _tensor(model(x, t.expand(len(x)), **kwargs))
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return (x,)

    return sample


def _loop_config(problem: LoopProblem) -> dict[str, Any]:
    return {
        "num_train_timesteps": problem.num_train_timesteps,
        "beta_schedule": problem.beta_schedule,
        "prediction_type": problem.prediction_type,
        "timestep_spacing": problem.timestep_spacing,
    }


def _tensor(output: Any) -> Any:
    """A model's prediction, which diffusers' models wrap."""
    return getattr(output, "sample", output)


FASTDDIM_SAMPLER = Candidate("fastddim.Sampler", _sampler_call)
DIFFUSERS_LOOP = Candidate("diffusers.DDIMScheduler loop", _diffusers_loop_call)


def _policy_model(problem: LoopProblem) -> tuple[Any, dict[str, Any]]:
    """A policy with random weights, the same in each run, and an observation."""
    import torch

    from fastddim.models.policy import ActionUNet1d

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batch_size, horizon, action_dim = problem.shape
        model = ActionUNet1d(action_dim, _POLICY_OBS_DIM, horizon=horizon).eval().requires_grad_(False)
        observation = torch.randn(batch_size, _POLICY_OBS_DIM)
        # A random model's error grows from step to step; with less of it, float32 stays close to float64.
        model.conv_out.weight.mul_(0.5)
    return model, {"observation": observation}


def _digits_model(problem: LoopProblem) -> tuple[Any, dict[str, Any]]:
    """The embedded model, and the label 3."""
    import torch
    from diffusers import UNet2DModel

    from fastddim.pipeline import EMBEDDED_MODEL

    return UNet2DModel.from_pretrained(EMBEDDED_MODEL / "unet"), {"class_labels": torch.full(problem.shape[:1], 3)}


_DIGITS = LoopProblem(
    shape=(1, 1, 16, 16),
    num_train_timesteps=1000,
    num_steps=20,
    prediction_type="v_prediction",
    timestep_spacing="trailing",
)


def loop_suite(quick: bool = False) -> list[Case]:
    """Whole runs of small models at batch 1, where what the loop costs beside the model counts; `quick` is the same."""
    policy = LoopProblem(shape=(1, 16, 7), num_train_timesteps=100, num_steps=10)
    return [
        loop_case("policy", policy, partial(_policy_model, policy)),
        loop_case("digits", _DIGITS, partial(_digits_model, _DIGITS)),
    ]


def _ort_call(inputs: LoopInputs) -> Call:
    """The run as one exported file, on as many threads as torch has."""
    import tempfile

    import onnxruntime
    import torch

    import fastddim
    from fastddim.export import ExportOptions, OrtSampler, export_onnx

    problem = inputs.problem
    options = ExportOptions(num_inference_steps=problem.num_steps, use_clipped_model_output=False)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin after a call would slow the candidate that follows.
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        config = fastddim.DDIMConfig(**_loop_config(problem))
        bundle = export_onnx(inputs.model, config, f"{folder}/bundle", options, parity_steps=())
        sampler = OrtSampler(bundle, providers="cpu", session_options=session_options)
    start = inputs.start.numpy()
    kwargs: dict[str, Any] = {name: value.numpy() for name, value in inputs.kwargs.items()}
    return lambda: (sampler(start, **kwargs),)


def _aoti_call(inputs: LoopInputs) -> Call:
    """The run as one compiled package."""
    import tempfile

    import fastddim
    from fastddim.export import AotiSampler, ExportOptions, export_aoti

    problem = inputs.problem
    options = ExportOptions(num_inference_steps=problem.num_steps, use_clipped_model_output=False)
    with tempfile.TemporaryDirectory() as folder:
        config = fastddim.DDIMConfig(**_loop_config(problem))
        sampler = AotiSampler(export_aoti(inputs.model, config, f"{folder}/bundle", options, parity_steps=()))
    return lambda: (sampler(inputs.start, **inputs.kwargs),)


ORT_SAMPLER = Candidate("fastddim.export.OrtSampler", _ort_call)
AOTI_SAMPLER = Candidate("fastddim.export.AotiSampler", _aoti_call)


def export_suite(quick: bool = False) -> list[Case]:
    """Whole runs of the embedded model from one exported file, against diffusers' loop; `quick` is an ONNX one at batch 1."""
    cases = []
    for batch, target in ((1, 2.0), (2, 1.4), (8, 1.0))[: 1 if quick else None]:
        problem = replace(_DIGITS, shape=(batch, *_DIGITS.shape[1:]))
        case = loop_case("digits", problem, partial(_digits_model, problem))
        cases.append(replace(case, suite="export", candidates=(ORT_SAMPLER, DIFFUSERS_LOOP), target=target))
    # Compiling takes half a minute, and a compiler.
    if not quick and shutil.which(os.environ.get("CXX", "g++")):
        case = replace(
            cases[0], name=f"compiled {cases[0].name}", candidates=(AOTI_SAMPLER, ORT_SAMPLER, DIFFUSERS_LOOP)
        )
        cases.append(replace(case, target=None))
    return cases


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


SUITES: dict[str, Callable[[bool], list[Case]]] = {
    "step": step_suite,
    "loop": loop_suite,
    "export": export_suite,
    "import": import_suite,
}
