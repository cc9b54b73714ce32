"""The ONNX exporter: a model and its sampling loop, or one step of it, in one graph."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch.export import Dim

import fastddim
from fastddim.coefficients import StepTable
from fastddim.config import Clip, DDIMConfig, DynamicThreshold, Limit, require_choice, require_int
from fastddim.export.bundle import FORMAT, FORMAT_VERSION, Bundle, check_destination, write_bundle
from fastddim.export.graph import as_loop, name_dims, strip, symbolic_dims, with_schedule
from fastddim.export.modules import DTYPES, Denoiser, StepModule, describe, prepared
from fastddim.export.schedule_module import ScheduleModule
from fastddim.export.validate import PARITY_STEPS, measure_parity
from fastddim.noise import STREAM_INITIAL, STREAM_STEP
from fastddim.sampler import to_schedule
from fastddim.schedule import Schedule

GRAPHS = ("loop", "step")
MODEL_FILE = "model.onnx"
NOTE_FILE = "README.md"
# 21 and later have slower or refused operators in today's runtimes; 20 has all that the models need.
_OPSET = 20
# protobuf holds no more.
_LARGEST_FILE = 2_000_000_000

_MEANINGS = {
    "sample": "the starting state; standard normal for a whole run",
    "timestep": "the training timestep of each sample's step",
    "timesteps": "the training timestep of each step, the noisiest first",
    "num_inference_steps": "how many steps to take",
    "noise": "standard normal, fresh for each step",
    "guidance_scale": "classifier-free guidance: uncond + guidance_scale * (cond - uncond)",
    "guidance_rescale": "in [0, 1]: how far to pull the guided output's deviation back to the conditional one's",
    "samples": "the finished samples",
    "next_sample": "the state after the step",
    "pred_original_sample": "the limited prediction of x0",
}
_COLUMNS = "x0 = limit(c0 * sample + c1 * output); next_sample = c2 * sample + c3 * output + c4 * x0 + c5 * noise"


class ExportError(ValueError):
    """A model that cannot be exported; the message names the module or operator."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is fixed in an exported file.

    Attributes:
        graph: `"loop"`, all steps in one call; `"step"`, one step, with rows of the table for each sample.
        guided: classifier-free guidance, its scale an input `[B]`.
        guidance_rescale: `guidance_rescale` is an input `[B]` too.
        stochastic: noise is an input, so that rows may add it.
        bake_schedule: the loop takes `num_inference_steps` and derives the table itself.
        num_inference_steps, eta: of the default table; a baked schedule keeps eta.
        use_clipped_model_output: derive epsilon from the limited x0; where x0 is limited by default.
        dtype: of the weights, `"float32"`, `"float16"` or `"bfloat16"`; the state is float32.
        dynamic_size: heights and widths may differ from call to call, for models that take them.

    Raises:
        ValueError: options that exclude each other.
    """

    graph: str = "loop"
    guided: bool = False
    guidance_rescale: bool = False
    stochastic: bool = False
    bake_schedule: bool = False
    num_inference_steps: int = 50
    eta: float = 0.0
    use_clipped_model_output: bool | None = None
    dtype: str = "float32"
    dynamic_size: bool = False

    def __post_init__(self) -> None:
        require_choice("graph", self.graph, GRAPHS)
        require_choice("dtype", self.dtype, DTYPES)
        require_int("num_inference_steps", self.num_inference_steps, 1)
        if self.guidance_rescale and not self.guided:
            raise ValueError("guidance_rescale: True without guided; pass both")
        if self.bake_schedule and self.graph == "step":
            raise ValueError("bake_schedule: True with graph 'step', which takes rows of a table; pass graph='loop'")
        if self.eta and not self.stochastic:
            raise ValueError(f"eta: {self.eta!r} adds noise; pass stochastic=True, which makes noise an input")


def export_onnx(
    model: Any,
    scheduler: Schedule | DDIMConfig | Any,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    sample_shape: Sequence[int] | None = None,
    example_kwargs: Mapping[str, torch.Tensor] | None = None,
    force: bool = False,
    parity_steps: Sequence[int] = PARITY_STEPS,
    tolerance: float | None = None,
) -> Bundle:
    """Export a model with its sampling loop as an ONNX bundle.

    Args:
        model: a diffusers UNet or DiT, or any module with `sample_shape` (and `example_kwargs`); it is not changed.
        scheduler: as `Sampler`'s.
        out: the folder to write.
        options: what is fixed in the file.
        sample_shape: of one sample; a diffusers model's own by default.
        example_kwargs: keyword tensors `[B, ...]`, B >= 2, that any other module takes.
        force: replace a bundle that is there.
        parity_steps: numbers of steps after which the file is compared with torch.
        tolerance: the largest difference from the torch reference; by default what float32 rounding explains.

    Returns:
        The bundle, opened.

    Raises:
        ValueError: options or configurations that cannot be exported; ExportError: the model cannot.
        FileExistsError, NotADirectoryError, PermissionError: `out`, before any work.
        ParityError: the file's results differ from the torch reference's.
    """
    target = check_destination(out, force)
    plan = plan_sampler(model, scheduler, options, sample_shape, example_kwargs)

    def fill(folder: Path) -> dict[str, Any]:
        manifest = write_sampler(folder, plan, parity_steps, tolerance)
        (folder / NOTE_FILE).write_text(note(manifest), "utf-8")
        return manifest

    return write_bundle(target, force, fill)


@dataclass(frozen=True)
class SamplerPlan:
    """What `write_sampler` exports, all of it checked.

    Attributes:
        denoiser: the model.
        schedule, table: of the default run.
        options: with every default decided.
    """

    denoiser: Denoiser
    schedule: Schedule
    table: StepTable
    options: ExportOptions


def plan_sampler(
    model: Any,
    scheduler: Schedule | DDIMConfig | Any,
    options: ExportOptions | None,
    sample_shape: Sequence[int] | None = None,
    example_kwargs: Mapping[str, torch.Tensor] | None = None,
) -> SamplerPlan:
    """Check what is to be exported, before any work.

    Args:
        model, scheduler, options, sample_shape, example_kwargs: as `export_onnx`'s.

    Raises:
        TypeError: no module; ValueError: options or configurations that cannot be exported.
    """
    options = ExportOptions() if options is None else options
    schedule = to_schedule(scheduler)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: {type(model).__name__}; pass a torch module")
    rederive = options.use_clipped_model_output
    rederive = schedule.config.limit is not None if rederive is None else rederive
    options = replace(options, use_clipped_model_output=rederive)
    pairs = schedule.pairs(options.num_inference_steps)
    table = StepTable.build(schedule, pairs, eta=options.eta, use_clipped_model_output=rederive)
    denoiser = describe(model, None if sample_shape is None else tuple(sample_shape), example_kwargs)
    if options.dynamic_size and not denoiser.resizable:
        raise ValueError(f"dynamic_size: True for a {type(model).__name__}, whose size is fixed; leave it out")
    return SamplerPlan(denoiser, schedule, table, options)


def write_sampler(
    folder: Path, plan: SamplerPlan, parity_steps: Sequence[int], tolerance: float | None
) -> dict[str, Any]:
    """Write the sampler's graph to a folder and compare it with torch.

    Args:
        folder: of the bundle that is being written.
        plan: from `plan_sampler`.
        parity_steps, tolerance: as `export_onnx`'s.

    Returns:
        The manifest, without `files`.

    Raises:
        ExportError, ParityError: as `export_onnx`.
    """
    denoiser, schedule, options = plan.denoiser, plan.schedule, plan.options
    with prepared(denoiser.model, DTYPES[options.dtype]):
        module = StepModule(
            denoiser, schedule.config.limit, options.guided, options.guidance_rescale, options.stochastic
        )
        graph = _step_graph(module, denoiser, options)
        if options.graph == "loop":
            graph = as_loop(graph)
        if options.bake_schedule:
            graph = with_schedule(graph, strip(_schedule_graph(schedule, options)))
        save(graph, folder / MODEL_FILE)
        manifest = _manifest(graph, denoiser, schedule, plan.table, options)
        manifest["parity"] = measure_parity(
            Bundle(folder, manifest), denoiser, schedule, steps=parity_steps, tolerance=tolerance
        )
    return manifest


def _step_graph(module: StepModule, denoiser: Denoiser, options: ExportOptions) -> onnx.ModelProto:
    examples = module.example_inputs()
    resized = ("sample", "noise") if options.dynamic_size else ()
    graph = to_graph(
        module, examples, ["next_sample", "pred_original_sample"], type(denoiser.model).__name__, resized=resized
    )
    name_dims(graph.graph, _named_dims(graph.graph, denoiser, options))
    return graph


def to_graph(
    module: torch.nn.Module,
    examples: dict[str, torch.Tensor],
    outputs: Sequence[str],
    kind: str,
    *,
    resized: Sequence[str] = (),
) -> onnx.ModelProto:
    """Trace a module whose `forward` takes a dictionary of tensors.

    Args:
        module: in evaluation mode; it returns a tuple.
        examples: `[2, ...]` for each input; the batch is dynamic.
        outputs: names of what it returns.
        kind: the model's name for errors.
        resized: inputs whose last two of four dimensions are dynamic too.

    Raises:
        ExportError: code that cannot be exported, or that fixes a dynamic dimension.
    """
    names = list(examples)
    spatial = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    shapes = {name: {0: Dim.DYNAMIC, **(spatial if name in resized else {})} for name in names}
    with _quiet():
        try:
            program = torch.export.export(module, (examples,), dynamic_shapes=({**shapes},), strict=False)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=_OPSET,
                input_names=names,
                output_names=list(outputs),
                verbose=False,
            )
        except Exception as error:
            raise ExportError(f"model: {kind} cannot be exported: {_told(error)}") from error
    assert exported is not None
    graph: onnx.ModelProto = exported.model_proto
    _require_symbolic(graph.graph, shapes)
    return strip(graph)


def _schedule_graph(schedule: Schedule, options: ExportOptions) -> onnx.ModelProto:
    module = ScheduleModule(schedule, options.eta, bool(options.use_clipped_model_output))
    with _quiet():
        program = torch.export.export(module, (torch.tensor(5),))
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_OPSET,
            input_names=["num_inference_steps"],
            output_names=["timesteps", "coefficients"],
            verbose=False,
        )
    assert exported is not None
    graph: onnx.ModelProto = exported.model_proto
    name_dims(graph.graph, {"num_inference_steps": [], "timesteps": ["steps"], "coefficients": ["steps", 6]})
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own notes on what it exports."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _told(error: BaseException) -> str:
    """The innermost reason of an exporter's error, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _require_symbolic(graph: onnx.GraphProto, shapes: Mapping[str, Mapping[int, Any]]) -> None:
    """torch fixes a size that it cannot prove to be free, without an error."""
    dims = symbolic_dims(graph)
    for name, dynamic in shapes.items():
        for index in dynamic:
            if isinstance(dims[name][index], int):
                raise ExportError(
                    f"model: its code fixes dimension {index} of {name!r} to {dims[name][index]}, so the file would take"
                    " no other; leave out dynamic_size, or change the model"
                )


def _named_dims(graph: onnx.GraphProto, denoiser: Denoiser, options: ExportOptions) -> dict[str, list[str | int]]:
    state: list[str | int] = ["batch", *denoiser.sample_shape]
    if options.dynamic_size:
        state[2:] = ["height", "width"]
    named = {}
    for name, dims in symbolic_dims(graph).items():
        is_state = name in ("sample", "noise", "next_sample", "pred_original_sample")
        named[name] = state if is_state else ["batch", *dims[1:]]
    return named


def save(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph, with its weights beside it where one file cannot hold them, and check it.

    Raises:
        ExportError: a graph that is not valid.
    """
    graph.producer_name, graph.producer_version = "fastddim", fastddim.__version__
    if graph.ByteSize() < _LARGEST_FILE:
        path.write_bytes(graph.SerializeToString(deterministic=True))
    else:
        onnx.save_model(
            graph, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}.data"
        )
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"model: the exported graph is not valid: {_told(error)}") from error


def describe_values(values: Iterable[onnx.ValueInfoProto], meanings: Mapping[str, str]) -> list[dict[str, Any]]:
    """A graph's inputs or outputs for the manifest."""
    return [
        {
            "name": value.name,
            "dtype": str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
            "shape": [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
            "meaning": meanings[value.name],
        }
        for value in values
    ]


def _limit_text(limit: Limit) -> str:
    if isinstance(limit, Clip):
        return f"clip to [-{limit.range:g}, {limit.range:g}]"
    if isinstance(limit, DynamicThreshold):
        return f"dynamic threshold, quantile {limit.ratio:g}, at most {limit.max_value:g}"
    return "none"


def _manifest(
    graph: onnx.ModelProto, denoiser: Denoiser, schedule: Schedule, table: StepTable, options: ExportOptions
) -> dict[str, Any]:
    row_of = "step" if options.graph == "loop" else "sample"
    meanings = {**_MEANINGS, "coefficients": f"c0 to c5 of each {row_of}: {_COLUMNS}"}
    for name, condition in denoiser.conditions.items():
        meanings[name] = condition.meaning or "conditions the model"
        meanings[f"uncond_{name}"] = f"{name} of the unconditional half"

    limit = schedule.config.limit
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "graph": options.graph,
        "model": MODEL_FILE,
        "inputs": describe_values(graph.graph.input, meanings),
        "outputs": describe_values(graph.graph.output, meanings),
        "schedule": asdict(schedule.config),
        "sampling": {
            "guided": options.guided,
            "guidance_rescale": options.guidance_rescale,
            "stochastic": options.stochastic,
            "baked_schedule": options.bake_schedule,
            "eta": float(options.eta),
            "use_clipped_model_output": bool(options.use_clipped_model_output),
            "dtype": options.dtype,
            "limit": _limit_text(limit),
            "null_values": {
                name: condition.null for name, condition in denoiser.conditions.items() if condition.null is not None
            },
        },
        "table": {
            "timesteps": list(table.timesteps),
            "coefficients": np.asarray(table.columns).tolist(),
        },
        "sample": {
            "shape": list(denoiser.sample_shape),
            "layout": "NCHW" if len(denoiser.sample_shape) == 3 else "N...",
            "range": [-limit.range, limit.range] if isinstance(limit, Clip) else None,
        },
        "noise": {
            "generator": "Philox4x32-10, then Box-Muller; see fastddim/noise.py",
            "key": "the 64 bits of the sample's seed",
            "counter": "(element // 4, 0, step, stream)",
            "stream_initial": STREAM_INITIAL,
            "stream_step": STREAM_STEP,
        },
        "versions": {"fastddim": fastddim.__version__, "opset": str(_OPSET), **_versions()},
    }


def _versions() -> dict[str, str]:
    versions = {"onnxruntime": onnxruntime.__version__}
    for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def note(manifest: Mapping[str, Any]) -> str:
    """What an integrator reads first."""
    kind = "all steps of a run in one call" if manifest["graph"] == "loop" else "one step of a run in each call"
    largest = max((entry["largest_error"] for entry in manifest["parity"]), default=math.nan)
    components = "".join(
        f"\n## {name}\n\n`{component['model']}`: {component['meaning']}.\n\n{_tables(component)}\n"
        for name, component in manifest.get("components", {}).items()
    )
    runner = "OrtPipeline" if components else "OrtSampler"
    command = "" if components else "`fastddim run FOLDER --seed 0 --out samples.png`, or "
    return f"""# An exported DDIM sampler

`{manifest["model"]}` holds the model and its sampler: {kind}. Any ONNX runtime loads it. `manifest.json` says the same as
this page for programs, with a default table of timesteps and coefficients; its schema is in fastddim.

{_tables(manifest)}

Limit of x0: {manifest["sampling"]["limit"]}. Largest difference from the torch reference at export: {largest:.1e}.

With Python: {command}`fastddim.export.{runner}(FOLDER)`, which needs no torch.
{components}"""


def _tables(described: Mapping[str, Any]) -> str:
    """The inputs and outputs of the sampler or of a component."""
    tables = []
    for group in ("inputs", "outputs"):
        rows = [
            f"| `{item['name']}` | {item['dtype']} | {item['shape']} | {item['meaning']} |" for item in described[group]
        ]
        tables.append("\n".join([f"| {group.removesuffix('s')} | dtype | shape | |", "|---|---|---|---|", *rows]))
    return "\n\n".join(tables)
