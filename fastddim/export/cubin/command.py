"""`fastddim export cubin`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from fastddim.cli_options import naming_options, parse_integers, with_options
from fastddim.config import Clip, DynamicThreshold, Limit
from fastddim.export.command_options import Destination, report


@with_options
def export_command(
    *,
    destination: Destination,
    shape: Annotated[str, typer.Option(metavar="SIZES", help="One sample's sizes, such as 4x64x64.")],
    batch: Annotated[str, typer.Option(metavar="INTEGERS", help="Batch sizes.")] = "1",
    state_dtype: Annotated[
        str, typer.Option(metavar="NAME", help="The state: float32, float16 or bfloat16.")
    ] = "float32",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="The model's output, as --state-dtype.")] = "float32",
    guidance: Annotated[bool, typer.Option("--guidance", help="Guidance of stacked outputs.")] = False,
    guidance_rescale: Annotated[
        bool, typer.Option("--guidance-rescale", help="The guidance's rescale is an argument.")
    ] = False,
    limit: Annotated[
        str, typer.Option(metavar="LIMIT", help="Applied to x0: none, clip=RANGE or threshold=RATIO:MAX.")
    ] = "none",
    noise: Annotated[str, typer.Option(metavar="NAME", help="none, given or drawn (from seeds).")] = "none",
    per_sample: Annotated[bool, typer.Option("--per-sample", help="A row and scale for each sample.")] = False,
    x0: Annotated[bool, typer.Option("--x0", help="Write the prediction of x0 too.")] = False,
    model_input: Annotated[bool, typer.Option("--model-input", help="Write the next model input too.")] = False,
    advance: Annotated[bool, typer.Option("--advance", help="Move the row on, for captured launches.")] = False,
) -> None:
    """Compile the fused step alone for NVIDIA GPUs.

    It writes cubins and PTX, and takes no model.
    """
    from fastddim.export.cubin.exporter import export_cubin
    from fastddim.export.cubin.options import KernelOptions

    with naming_options(KernelOptions, batches="--batch", model_dtype="--dtype", guided="--guidance"):
        options = KernelOptions(
            shape=tuple(parse_integers(shape.replace("x", ","), "--shape")),
            batches=tuple(parse_integers(batch, "--batch")),
            state_dtype=state_dtype,
            model_dtype=dtype,
            guided=guidance,
            guidance_rescale=guidance_rescale,
            per_sample=per_sample,
            limit=_parse_limit(limit),
            noise=noise,
            x0=x0,
            model_input=model_input,
            advance=advance,
        )
    start = time.perf_counter()
    bundle = export_cubin(destination.out, options, force=destination.force)
    count = len(bundle.manifest["kernels"])
    report(bundle, start, f"{count} kernels", destination.as_json, kernels=count)


def _parse_limit(text: str) -> Limit:
    kind, _, numbers = text.partition("=")
    try:
        if text == "none":
            return None
        if kind == "clip":
            return Clip(float(numbers))
        if kind == "threshold":
            ratio, _, max_value = numbers.partition(":")
            return DynamicThreshold(float(ratio), float(max_value))
        raise ValueError("no such limit")
    except ValueError as error:
        raise ValueError(f"--limit: {text!r} ({error}); pass none, clip=1 or such as threshold=0.995:1.5") from error
