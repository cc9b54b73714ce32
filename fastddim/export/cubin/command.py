"""`fastddim export cubin`."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Annotated

import typer

from fastddim.cli_options import (
    GuidanceMethod,
    choice,
    integers,
    parse_guidance_method,
    parse_integers,
    with_options,
)
from fastddim.config import LIMITS, Limit, require_choice
from fastddim.export.command_options import Destination, report


@dataclass(frozen=True, slots=True)
class KernelFlags:
    """What is fixed in the kernels: fields of `KernelOptions`."""

    shape: Annotated[str, typer.Option(metavar="SIZES", help="One sample's sizes, such as 4x64x64.")]
    batches: Annotated[str, integers("--batch", help="Batch sizes.")] = "1"
    state_dtype: Annotated[str, choice(help="The state: float32, float16 or bfloat16.")] = "float32"
    model_dtype: Annotated[str, choice("--dtype", help="The model's output, as --state-dtype.")] = "float32"
    guided: Annotated[bool, typer.Option("--guidance", help="Guidance of stacked outputs.")] = False
    guidance_rescale: Annotated[
        bool, typer.Option("--guidance-rescale", help="The guidance's rescale is an argument.")
    ] = False
    guidance_method: GuidanceMethod = "cfg"
    limit: Annotated[
        str, typer.Option(metavar="LIMIT", help="Applied to x0: none, clip=RANGE or threshold=RATIO:MAX.")
    ] = "none"
    noise: Annotated[str, choice(help="none, given or drawn (from seeds).")] = "none"
    per_sample: Annotated[bool, typer.Option("--per-sample", help="A row and scale for each sample.")] = False
    x0: Annotated[bool, typer.Option("--x0", help="Write the prediction of x0 too.")] = False
    model_input: Annotated[bool, typer.Option("--model-input", help="Write the next model input too.")] = False
    advance: Annotated[bool, typer.Option("--advance", help="Move the row on, for captured launches.")] = False
    timestep_dtype: Annotated[str, choice(help="With --advance: int64 or float32.")] = "int64"


@with_options
def export_command(*, destination: Destination, kernel: KernelFlags) -> None:
    """Compile the fused step alone for NVIDIA GPUs.

    It writes cubins and PTX, and takes no model.
    """
    from fastddim.export.cubin.exporter import export_cubin
    from fastddim.export.cubin.options import KernelOptions

    parsed = {
        "shape": tuple(parse_integers(kernel.shape.replace("x", ","), "--shape")),
        "batches": tuple(parse_integers(kernel.batches, "--batch")),
        "limit": _parse_limit(kernel.limit),
        **parse_guidance_method(kernel.guidance_method),
    }
    options = KernelOptions(**dataclasses.asdict(kernel) | parsed)
    start = time.perf_counter()
    bundle = export_cubin(destination.out, options, force=destination.force)
    count = len(bundle.manifest["kernels"])
    report(bundle, start, f"{count} kernels", destination.as_json, kernels=count)


def _parse_limit(text: str) -> Limit:
    kind, _, given = text.partition("=")
    try:
        if text == "none":
            return None
        require_choice("limit", kind, LIMITS)
        names = [field.name for field in dataclasses.fields(LIMITS[kind])]
        numbers = [float(number) for number in given.split(":") if number]
        if len(numbers) != len(names):
            raise ValueError(f"{kind} takes {' and '.join(names)}")
        return LIMITS[kind](**dict(zip(names, numbers, strict=True)))
    except ValueError as error:
        raise ValueError(f"--limit: {text!r} ({error}); pass none, clip=1 or such as threshold=0.995:1.5") from error
