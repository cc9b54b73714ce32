"""The ONNX exporter: a model and its sampling loop, or one step of it, in one graph."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch.export import ExportedProgram

import fastddim
from fastddim.coefficients import StepTable
from fastddim.config import DDIMConfig, Limit
from fastddim.export.bundle import Bundle, check_destination, write_bundle
from fastddim.export.denoisers import DTYPES, prepared
from fastddim.export.manifest import NOTE_FILE, build_manifest, name_meanings, note
from fastddim.export.onnx.graph import (
    LOOP_ROWS,
    as_loop,
    fed_by,
    followed_by,
    name_dims,
    sized_noise,
    strip,
    symbolic_dims,
)
from fastddim.export.onnx.noise_module import NoiseModule
from fastddim.export.sampler_plan import ExportOptions, SamplerPlan, plan_sampler
from fastddim.export.step_module import SAMPLED, STEP_OUTPUTS, BeforeLoop, FinishModule, StepModule, hoist
from fastddim.export.validate import PARITY_STEPS, fit_parity_steps, measure_parity
from fastddim.hoisting import HoistedModel
from fastddim.noise import STREAM_INITIAL, STREAM_STEP
from fastddim.schedule import Schedule
from fastddim.tracing import ExportError, quiet, told, trace

MODEL_FILE = "model.onnx"
BEFORE_FILE = "before.onnx"
# 21 and later have slower or refused operators in today's runtimes; 20 has all that the models need, but no bfloat16
# convolutions.
_OPSET = 20
_BFLOAT16_OPSET = 22
# protobuf holds no more.
_LARGEST_FILE = 2_000_000_000
_ALIGNMENT = 1 << 16


def export_onnx(
    model: Any,
    scheduler_or_table: Schedule | DDIMConfig | StepTable | Any,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    limit: Limit = None,
    sample_shape: Sequence[int] | None = None,
    example_kwargs: Mapping[str, torch.Tensor] | None = None,
    force: bool = False,
    parity_steps: Sequence[int] = PARITY_STEPS,
    tolerance: float | None = None,
) -> Bundle:
    """Export a model with its sampling loop as an ONNX bundle.

    Args:
        model: a diffusers UNet or DiT, or any module with `sample_shape` (and `example_kwargs`); it is not changed.
        scheduler_or_table: a `Schedule`, a `DDIMConfig` or a diffusers scheduler; or a `StepTable`, whose steps the file
            then takes. Timesteps that are floating-point numbers call the model with float32, integers with int64.
        out: the folder to write.
        options: what is fixed in the file.
        limit: with a table, what keeps the predicted x0 in range, `Clip`, `DynamicThreshold` or None; a scheduler's
            configuration has its own.
        sample_shape: the shape of one sample; a diffusers model's own by default.
        example_kwargs: keyword tensors `[B, ...]`, B >= 2, that any other module takes.
        force: replace a bundle that is there.
        parity_steps: numbers of steps after which the file is compared with torch.
        tolerance: the largest difference from the torch reference; by default what float32 rounding explains.

    Returns:
        The bundle, opened.

    Raises:
        ValueError: options, configurations or tables that cannot be exported; ExportError: the model cannot.
        FileExistsError, NotADirectoryError, PermissionError: `out`, before any work.
        ParityError: the file's results differ from the torch reference's.
    """
    target = check_destination(out, force)
    plan = plan_sampler(model, scheduler_or_table, options, sample_shape, example_kwargs, limit)
    fit_parity_steps(parity_steps, plan.sampling)

    def fill(folder: Path) -> dict[str, Any]:
        manifest = write_sampler(folder, plan, parity_steps, tolerance)
        (folder / NOTE_FILE).write_text(note(manifest), "utf-8")
        return manifest

    return write_bundle(target, force, fill)


def write_sampler(
    folder: Path, plan: SamplerPlan, parity_steps: Sequence[int], tolerance: float | None
) -> dict[str, Any]:
    """Write the sampler's graph to a bundle's folder and compare it with torch; returns the manifest, without `files`."""
    denoiser, options = plan.denoiser, plan.options
    with prepared(denoiser.model, DTYPES[options.dtype]):
        hoisted = hoist(plan)
        graph = _step_graph(plan, hoisted, folder / MODEL_FILE)
        opset = graph.opset_import[0].version
        if options.seeded and options.stochastic:
            graph = fed_by(graph, _noise_graph(denoiser.sample_shape, "noise", opset), "noise_")
        if options.kind == "loop":
            graph = as_loop(graph, options.per_sample_steps)
        before = None
        if hoisted is not None:
            before = _before_graph(graph, plan, hoisted, folder)
            if options.kind == "loop":
                graph, before = _with_values(graph, before, plan), None
        if options.bake_schedule:
            graph = fed_by(graph, _schedule_graph(plan, opset), "schedule_")
        if denoiser.finish is not None and options.kind == "loop":
            graph = followed_by(graph, _finish_graph(plan, folder / MODEL_FILE), {"samples": SAMPLED}, "finish_")
        if options.seeded:
            start = _noise_graph(denoiser.sample_shape, "sample", opset, plan.table.start_scale)
            graph = fed_by(graph, start, "start_")
        save(graph, folder / MODEL_FILE)
        meanings = name_meanings(plan, hoisted)
        inputs, outputs = _describe(graph, meanings).values()
        manifest = build_manifest(plan, MODEL_FILE, inputs, outputs, hoisted=hoisted)
        if before is not None:
            save(before, folder / BEFORE_FILE)
            meaning = "what no step changes, computed once for all steps of a run; each step takes its rows"
            manifest["before"] = {"model": BEFORE_FILE, **_describe(before, meanings), "meaning": meaning}
        manifest["versions"]["opset"] = str(graph.opset_import[0].version)
        manifest["parity"] = measure_parity(Bundle(folder, manifest), denoiser, steps=parity_steps, tolerance=tolerance)
    return manifest


def _step_graph(plan: SamplerPlan, hoisted: HoistedModel | None, path: Path) -> onnx.ModelProto:
    module = StepModule(plan, hoisted)
    kind = type(plan.denoiser.model).__name__
    states = ("sample", "noise", "previous_x0", *STEP_OUTPUTS)
    dynamic: dict[str, Sequence[int]] = dict.fromkeys(states[:3], (0, 2, 3)) if plan.options.dynamic_size else {}
    dynamic |= dict.fromkeys(module.second, (1,)) | dict.fromkeys(module.whole, ())
    # A loop's file has both parts.
    other_bytes = 0 if hoisted is None or plan.options.kind == "step" else _weight_bytes(hoisted.before)
    graph = to_graph(
        module, module.example_inputs(), module.outputs, kind, path, dynamic=dynamic, other_bytes=other_bytes
    )
    dims = {}
    for name, own in symbolic_dims(graph.graph).items():
        dims[name] = plan.state_dims if name in states else ["batch" if isinstance(dim, str) else dim for dim in own]
    name_dims(graph.graph, dims)
    return graph


def _before_graph(graph: onnx.ModelProto, plan: SamplerPlan, hoisted: HoistedModel, folder: Path) -> onnx.ModelProto:
    """What gives a loop, or a step for all of its calls, the hoisted values from `timesteps` and the conditions."""
    module = BeforeLoop(plan, hoisted)
    looped = plan.options.kind == "loop"
    examples = module.example_inputs()
    own_steps = plan.options.per_sample_steps
    kind = type(plan.denoiser.model).__name__
    before = to_graph(
        module,
        examples,
        module.outputs,
        kind,
        folder / (MODEL_FILE if looped else BEFORE_FILE),
        dynamic={"timesteps": (0, 1)[: 1 + own_steps]},
        other_bytes=_weight_bytes(hoisted.rest) if looped else 0,
    )
    taken = symbolic_dims(graph.graph)
    if not looped:
        # Of a step's rows, which are one for each sample, all that there are.
        rows = {name: taken[name][name == "step_values" :] for name in module.outputs if name in LOOP_ROWS}
        taken |= {name: ["steps", *dims] for name, dims in rows.items()}
    dims: dict[str, Sequence[str | int]] = {name: ["batch", *value.shape[1:]] for name, value in examples.items()}
    dims["timesteps"] = ["steps", *(["batch"] if own_steps else [])]
    name_dims(before.graph, dims | {name: taken[name] for name in module.outputs})
    return before


def _with_values(graph: onnx.ModelProto, before: onnx.ModelProto, plan: SamplerPlan) -> onnx.ModelProto:
    """A loop whose hoisted values are computed before it."""
    fed = fed_by(graph, before, "before_")
    # As those of a loop that computes all of it: what feeds the noise, the step's, then the rows.
    order = [name for name in StepModule(plan).example_inputs() if name not in LOOP_ROWS]
    order += [*LOOP_ROWS.values(), "going"]
    inputs = sorted(fed.graph.input, key=lambda value: order.index(value.name) if value.name in order else -1)
    del fed.graph.input[:]
    fed.graph.input.extend(inputs)
    return fed


def _finish_graph(plan: SamplerPlan, path: Path) -> onnx.ModelProto:
    module = FinishModule(plan)
    examples = module.example_inputs()
    graph = to_graph(module, examples, module.outputs, type(plan.denoiser.model).__name__, path)
    dims = {name: ["batch", *own[1:]] for name, own in symbolic_dims(graph.graph).items()}
    name_dims(graph.graph, dims)
    return graph


def _weight_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def to_graph(
    module: torch.nn.Module,
    examples: dict[str, torch.Tensor],
    outputs: Sequence[str],
    kind: str,
    path: Path,
    *,
    dynamic: Mapping[str, Sequence[int]] | None = None,
    other_bytes: int = 0,
) -> onnx.ModelProto:
    """Trace a module whose `forward` takes a dictionary of tensors.

    Args:
        module: in evaluation mode; it returns a tuple.
        examples: `[2, ...]` for each input.
        outputs: names of what it returns.
        kind: the model's name for errors.
        path: the file to be; weights that it cannot hold are written beside it now.
        dynamic: the dimensions that may differ, of inputs where it is not the first alone.
        other_bytes: weights that the file will have beside the module's own.

    Raises:
        ExportError: code that cannot be exported, or that fixes a dynamic dimension.
    """
    names = list(examples)
    dynamic = {name: (dynamic or {}).get(name, (0,)) for name in names}
    program = trace(module, examples, dynamic, kind)
    half = any(parameter.dtype == torch.bfloat16 for parameter in module.parameters())
    try:
        exported = _to_onnx(program, names, outputs, _BFLOAT16_OPSET if half else _OPSET)
    except Exception as error:
        raise ExportError(f"model: {kind} cannot be exported: {told(error)}") from error
    graph = _to_proto(exported, path, other_bytes)
    _require_symbolic(graph.graph, dynamic)
    return strip(graph)


def _to_proto(model: onnx_ir.Model, path: Path, other_bytes: int) -> onnx.ModelProto:
    weights = [value.const_value for value in model.graph.initializers.values()]
    if other_bytes + sum(weight.nbytes for weight in weights if weight is not None) < _LARGEST_FILE:
        return onnx_ir.to_proto(model)
    data = path.with_name(f"{path.name}.data")
    # A graph that becomes a part of the file may have written its weights already: these come after them.
    mine = data.with_name(f"{data.name}.new") if data.exists() else data
    onnx_ir.save(model, path, external_data=mine.name)
    # What follows moves nodes; the weights stay where they are.
    graph = onnx.load(path, load_external_data=False)
    path.unlink()
    if mine != data:
        _append(mine, data, graph.graph)
    return graph


def _append(mine: Path, data: Path, graph: onnx.GraphProto) -> None:
    """Move a graph's weights to the end of another file."""
    with data.open("ab") as file:
        # Where memory can be mapped from.
        start = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
        file.write(bytes(start - file.tell()))
        with mine.open("rb") as source:
            shutil.copyfileobj(source, file)
    mine.unlink()
    for weight in graph.initializer:
        entries = {entry.key: entry for entry in weight.external_data}
        if entries:
            entries["location"].value = data.name
            entries["offset"].value = str(start + int(entries["offset"].value))


def _to_onnx(program: ExportedProgram, inputs: Iterable[str], outputs: Iterable[str], opset: int) -> onnx_ir.Model:
    with quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    assert exported is not None
    return exported.model


def _schedule_graph(plan: SamplerPlan, opset: int) -> onnx.ModelProto:
    per_sample = plan.options.per_sample_steps
    batch = ["batch"] if per_sample else []
    outputs: dict[str, list[str | int]] = {
        "timesteps": ["steps", *batch],
        "coefficients": ["steps", *batch, plan.num_columns],
    }
    if per_sample:
        outputs["going"] = ["steps", *batch]
    counts = torch.tensor([5, 3] if per_sample else 5)
    return _plain_graph(plan.baked_schedule(), {"num_inference_steps": (counts, batch)}, outputs, opset)


def _noise_graph(shape: Sequence[int], name: str, opset: int, scale: float = 1.0) -> onnx.ModelProto:
    """From seeds to the starting state `sample`, or to the `noise` of a step."""
    fixed = {"stream": STREAM_STEP} if name == "noise" else {"stream": STREAM_INITIAL, "step_index": 0}
    return sized_noise(_noise_groups(opset), shape, name, fixed, scale)


# Whatever the model: traced once.
@functools.cache
def _noise_groups(opset: int) -> onnx.ModelProto:
    scalar: list[str] = []
    inputs = {
        "seed": (torch.tensor([5, 3]), ["batch"]),
        "group": (torch.arange(3), ["groups"]),
        "step_index": (torch.tensor(1), scalar),
        "stream": (torch.tensor(1), scalar),
    }
    return _plain_graph(NoiseModule(), inputs, {"values": ["batch", "elements"]}, opset)


def _plain_graph(
    module: torch.nn.Module,
    inputs: Mapping[str, tuple[torch.Tensor, list[str]]],
    outputs: Mapping[str, Sequence[str | int]],
    opset: int,
) -> onnx.ModelProto:
    """Trace a module without weights of a model: inputs' examples and dimensions, outputs' dimensions."""
    examples = tuple(example for example, _ in inputs.values())
    shapes = tuple(dict.fromkeys(range(example.ndim), torch.export.Dim.DYNAMIC) for example in examples)
    with quiet():
        program = torch.export.export(module, examples, dynamic_shapes=shapes)
    graph = onnx_ir.to_proto(_to_onnx(program, inputs, outputs, opset))
    _require_symbolic(graph.graph, {name: range(len(dims)) for name, (_, dims) in inputs.items()})
    name_dims(graph.graph, {**{name: dims for name, (_, dims) in inputs.items()}, **outputs})
    return strip(graph)


def _require_symbolic(graph: onnx.GraphProto, dynamic: Mapping[str, Sequence[int]]) -> None:
    """torch fixes a size that it cannot prove to be free, without an error."""
    dims = symbolic_dims(graph)
    for name, indices in dynamic.items():
        for index in indices:
            if isinstance(dims[name][index], int):
                raise ExportError(
                    f"model: its code fixes dimension {index} of {name!r} to {dims[name][index]}, so the file would take"
                    " no other; leave out dynamic_size, or change the model"
                )


def save(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph and check it.

    Raises:
        ExportError: a graph that is not valid.
    """
    graph.producer_name, graph.producer_version = "fastddim", fastddim.__version__
    path.write_bytes(graph.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"model: the exported graph is not valid: {told(error)}") from error


def _describe(graph: onnx.ModelProto, meanings: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """A graph's inputs and outputs for the manifest."""
    values = {"inputs": graph.graph.input, "outputs": graph.graph.output}
    return {group: describe_values(described, meanings) for group, described in values.items()}


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
