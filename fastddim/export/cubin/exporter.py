"""The fused step as cubins and PTX for servers without Python: no GPU and no model needed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastddim
from fastddim.coefficients import NUM_COLUMNS
from fastddim.export.bundle import check_destination, write_bundle
from fastddim.export.cubin.bundle import FORMAT, KernelBundle
from fastddim.export.cubin.options import TRITON_DTYPES, KernelOptions
from fastddim.export.manifest import limit_text
from fastddim.kernels.aot import ALIGNMENT, compile_call, make_source
from fastddim.kernels.plan import ARGUMENT_OF, KernelCall, make_plan
from fastddim.tracing import ExportError

# Compute capabilities, times ten, of the cubins.
TARGETS = (80, 90, 100, 120)
# Its PTX goes along, which the driver of any newer GPU compiles: from 90 on Triton's code is for one capability alone.
# The version is CUDA 12.0's, so that no driver is too old for it.
PTX_TARGET = 80
PTX_VERSION = 80
_DTYPES = {short: long for long, short in TRITON_DTYPES.items()} | {"fp64": "float64", "i64": "int64", "i32": "int32"}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "int64": 8, "int32": 4}
# What Triton adds to a kernel's parameters: null pointers, as these kernels need neither.
_HIDDEN = ("global_scratch", "profile_scratch")
_MEANINGS = {
    "model_output": "the model's output; with guidance both halves, the unconditional one first",
    "sample": "the state",
    "table": "a row of coefficients for each step: x0_from_x, x0_from_output, next_from_x, next_from_output,"
    " next_from_x0, noise_scale",
    "step": "the index of the row",
    "guidance_scale": "uncond + guidance_scale * (cond - uncond); with guidance_method 'apg' counted from cond, as"
    " fastddim.Guidance has it",
    "guidance_rescale": "in [0, 1]: how far to pull the guided output's deviation back to the conditional one's",
    "noise": "standard normal",
    "seeds": "what each sample's noise is drawn from",
    "first_row": "the row with which each sample's run begins, so that its noise does not depend on where that is",
    "out": "the next state; may be the memory of sample, or of an unguided model_output",
    "x0": "the limited prediction of x0",
    "model_input": "the next state as the model takes it; with guidance twice",
    "timesteps": "the training timestep of each row",
    "next_timestep": "the timestep of the next model call, for each of its inputs",
}


def export_cubin(out: str | Path, options: KernelOptions, *, force: bool = False) -> KernelBundle:
    """Compile the fused step for NVIDIA GPUs of compute capability 8.x, 9.0, 10.0 and 12.0, with PTX for newer ones.

    A kernel takes a few seconds the first time. `fastddim/step_kernel.hpp` launches what is written.

    Args:
        out: the folder to write, whole or not at all.
        options: what is fixed in the kernels.
        force: replace a kernel bundle that is there.

    Raises:
        ExportError: kernels that Triton does not compile, or would interpret.
        OSError: a folder that cannot be written, as `check_destination` says.
    """
    target = check_destination(out, force, FORMAT)
    if triton.knobs.runtime.interpret:
        raise ExportError("TRITON_INTERPRET: set, so that Triton compiles nothing; unset it")
    return write_bundle(target, force, lambda folder: _fill(folder, options), KernelBundle)


def _fill(folder: Path, options: KernelOptions) -> dict[str, Any]:
    kernels: dict[tuple[str, int], dict[str, Any]] = {}
    plans = []
    for batch in options.batches:
        types = options.pointer_types(batch)
        plan = make_plan(options.step_shape(batch))
        launches = []
        for call in plan.calls:
            source = make_source(call, types)
            key = source.hash(), call.num_warps
            if key not in kernels:
                kernels[key] = _write_kernel(folder, len(kernels), call, source, types)
            names = call.kernel.arg_names[len(call.pointers) :]
            numbers = {
                name: number
                for name, number in zip(names, call.numbers, strict=False)
                if source.signature[name] != "constexpr" and name != "num_steps"
            }
            launches.append({"kernel": kernels[key]["name"], "grid": [*call.grid, 1], "numbers": numbers})
        scratch = {"tickets": plan.tickets, "counters": plan.counters, "statistics": plan.statistics}
        plans.append(
            {
                "batch": batch,
                "tier": plan.tier,
                "shapes": _shapes(options, batch, types),
                "scratch": {name: 4 * size for name, size in scratch.items() if size},
                "launches": launches,
            }
        )
    return {
        "format": FORMAT.name,
        "format_version": FORMAT.version,
        "options": {**asdict(options), "limit": limit_text(options.limit)},
        "arguments": _arguments(options),
        "kernels": list(kernels.values()),
        "plans": plans,
        "versions": {"fastddim": fastddim.__version__, "triton": triton.__version__},
    }


def _write_kernel(
    folder: Path, index: int, call: KernelCall, source: ASTSource, types: Mapping[str, str]
) -> dict[str, Any]:
    """Compile a kernel for every target; what `kernel.json` says of it."""
    name = f"{call.kernel.__name__}_{index}"
    parameters = _parameters(call, source)
    images = []
    for arch in TARGETS:
        options = {"ptx_version": PTX_VERSION} if arch == PTX_TARGET else {}
        compiled = _compile(call, types, arch, options)
        _check_parameters(compiled, parameters)
        (target,) = re.findall(r"^\.target (\w+)$", compiled.asm["ptx"], re.MULTILINE)
        contents = {"cubin": compiled.asm["cubin"]}
        if arch == PTX_TARGET:
            contents["ptx"] = compiled.asm["ptx"].encode()
        for kind, content in contents.items():
            file = f"{name}.{target}.{kind}"
            (folder / file).write_bytes(content)
            images.append(
                {
                    "kind": kind,
                    "target": target,
                    "compute_capability": list(divmod(arch, 10)),
                    "file": file,
                    "shared_bytes": compiled.metadata.shared,
                }
            )
    return {
        "name": name,
        "entry": compiled.metadata.name,
        "source_sha256": call.kernel.cache_key,
        "parameters": parameters,
        "constants": call.constants,
        "num_warps": call.num_warps,
        "images": images,
    }


def _compile(call: KernelCall, types: Mapping[str, str], arch: int, options: Mapping[str, Any]) -> Any:
    try:
        return compile_call(call, dict(types), GPUTarget("cuda", arch, 32), **options)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[-1]
        raise ExportError(
            f"{call.kernel.__name__}: does not compile for sm_{arch}: {type(error).__name__}: {reason}"
        ) from error


def _parameters(call: KernelCall, source: ASTSource) -> list[dict[str, Any]]:
    """What a launch of a kernel passes, in order."""
    parameters = []
    for i, name in enumerate(call.kernel.arg_names):
        declared = source.signature[name]
        if declared == "constexpr":
            continue
        aligned = (i,) in source.attrs
        if i < len(call.pointers):
            dtype = _DTYPES[declared.removeprefix("*")]
            pointer = call.pointers[i]
            named, type_, divisor = ARGUMENT_OF.get(pointer, pointer), f"{dtype}*", _BYTES[dtype]
        else:
            named, type_, divisor = name, _DTYPES[declared], 1
        parameters.append({"name": named, "type": type_, "divisible_by": ALIGNMENT if aligned else divisor})
    return parameters + [{"name": name, "type": "uint8*", "divisible_by": 1} for name in _HIDDEN]


def _check_parameters(compiled: Any, parameters: list[dict[str, Any]]) -> None:
    """Check that the compiler made of a kernel what `parameters` and a plain launch say."""
    metadata = compiled.metadata
    declared = re.findall(r"\.param \.([us]\d+)", compiled.asm["ptx"].partition(")")[0])
    expected = [f"u{64 if parameter['type'] != 'int32' else 32}" for parameter in parameters]
    plain = not metadata.global_scratch_size and not metadata.profile_scratch_size and metadata.num_ctas == 1
    if declared != expected or not plain:
        raise ExportError(
            f"{metadata.name}: Triton {triton.__version__} gives it parameters {declared}, not {expected}, or asks for more"
            " than a plain launch; install a version that fastddim supports"
        )


def _shapes(options: KernelOptions, batch: int, types: Mapping[str, str]) -> dict[str, Sequence[int | str]]:
    state = [batch, *options.shape]
    stacked = [2 * batch if options.guided else batch, *options.shape]
    each = [batch if options.per_sample else 1]
    shapes: dict[str, Sequence[int | str]] = {
        "model_output": stacked,
        "sample": state,
        "table": ["num_steps", NUM_COLUMNS],
        "step": each,
        "guidance_scale": each,
        "guidance_rescale": each,
        "noise": state,
        "seeds": [batch],
        "first_row": [batch],
        "out": state,
        "x0": state,
        "model_input": stacked,
        "timesteps": ["num_steps"],
        "next_timestep": stacked[:1],
    }
    passed = {ARGUMENT_OF.get(name, name) for name in types}
    return {name: shape for name, shape in shapes.items() if name in passed}


def _arguments(options: KernelOptions) -> dict[str, Any]:
    types = options.pointer_types(options.batches[0])
    dtypes = {ARGUMENT_OF.get(name, name): _DTYPES[short] for name, short in types.items()}
    written = {"out", "x0", "model_input", "next_timestep"} | ({"step"} if options.advance else set())
    return {
        name: {"dtype": dtypes[name], "written": name in written, "meaning": meaning}
        for name, meaning in _MEANINGS.items()
        if name in dtypes
    }
