"""The ONNX exporter: a model and its sampling loop, or one step of it, in one graph."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
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
    options = ExportOptions() if options is None else options
    target = check_destination(out, force)
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
    with prepared(denoiser.model, DTYPES[options.dtype]):
        module = StepModule(
            denoiser, schedule.config.limit, options.guided, options.guidance_rescale, options.stochastic
        )

        def fill(folder: Path) -> dict[str, Any]:
            graph = strip(_to_graph(module, denoiser, options, folder / MODEL_FILE))
            if options.graph == "loop":
                graph = as_loop(graph)
            if options.bake_schedule:
                graph = with_schedule(graph, strip(_schedule_graph(schedule, options)))
            graph.producer_name, graph.producer_version = "fastddim", fastddim.__version__
            (folder / MODEL_FILE).write_bytes(graph.SerializeToString(deterministic=True))
            _check(folder / MODEL_FILE)
            manifest = _manifest(graph, denoiser, schedule, table, options)
            manifest["parity"] = measure_parity(
                Bundle(folder, manifest), denoiser, schedule, steps=parity_steps, tolerance=tolerance
            )
            (folder / "README.md").write_text(_note(manifest), "utf-8")
            return manifest

        return write_bundle(target, force, fill)


def _to_graph(module: StepModule, denoiser: Denoiser, options: ExportOptions, path: Path) -> onnx.ModelProto:
    """The step's graph; its weights are in it, or beside `path` where one file cannot hold them."""
    examples = module.example_inputs()
    names = list(examples)
    spatial = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if options.dynamic_size else {}
    shapes = {name: {0: Dim.DYNAMIC, **(spatial if name in ("sample", "noise") else {})} for name in names}
    with _quiet():
        try:
            program = torch.export.export(module, (examples,), dynamic_shapes=({**shapes},), strict=False)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=_OPSET,
                input_names=names,
                output_names=["next_sample", "pred_original_sample"],
                verbose=False,
            )
        except Exception as error:
            raise ExportError(f"model: {type(denoiser.model).__name__} cannot be exported: {_told(error)}") from error
    assert exported is not None
    graph = _to_proto(exported.model, path)
    _require_symbolic(graph.graph, shapes)
    dims = _named_dims(graph.graph, denoiser, options)
    name_dims(graph.graph, dims)
    return graph


def _to_proto(model: onnx_ir.Model, path: Path) -> onnx.ModelProto:
    weights = [value.const_value for value in model.graph.initializers.values()]
    if sum(weight.nbytes for weight in weights if weight is not None) < _LARGEST_FILE:
        return onnx_ir.to_proto(model)
    onnx_ir.save(model, path, external_data=f"{path.name}.data")
    # What follows moves nodes; the weights stay where they are.
    return onnx.load(path, load_external_data=False)


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


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"model: the exported graph is not valid: {_told(error)}") from error


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

    def describe_values(values: Any) -> list[dict[str, Any]]:
        dims = symbolic_dims(graph.graph)
        return [
            {
                "name": value.name,
                "dtype": str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
                "shape": dims[value.name],
                "meaning": meanings[value.name],
            }
            for value in values
        ]

    limit = schedule.config.limit
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "graph": options.graph,
        "model": MODEL_FILE,
        "inputs": describe_values(graph.graph.input),
        "outputs": describe_values(graph.graph.output),
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
    for name in ("torch", "diffusers", "onnx", "onnxscript"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _note(manifest: Mapping[str, Any]) -> str:
    """What an integrator reads first."""

    def rows(group: str) -> str:
        return "\n".join(
            f"| `{item['name']}` | {item['dtype']} | {item['shape']} | {item['meaning']} |" for item in manifest[group]
        )

    kind = "all steps of a run in one call" if manifest["graph"] == "loop" else "one step of a run in each call"
    largest = max((entry["largest_error"] for entry in manifest["parity"]), default=math.nan)
    return f"""# An exported DDIM sampler

`{manifest["model"]}` holds the model and its sampler: {kind}. Any ONNX runtime loads it. `manifest.json` says the same as
this page for programs, with a default table of timesteps and coefficients; its schema is in fastddim.

| input | dtype | shape | |
|---|---|---|---|
{rows("inputs")}

| output | dtype | shape | |
|---|---|---|---|
{rows("outputs")}

Limit of x0: {manifest["sampling"]["limit"]}. Largest difference from the torch reference at export: {largest:.1e}.

With Python: `fastddim run FOLDER --seed 0 --out samples.png`, or `fastddim.export.OrtSampler(FOLDER)`, which needs no torch.
"""
