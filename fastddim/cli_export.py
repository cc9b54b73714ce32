"""`fastddim export` and `fastddim run`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from fastddim.cli_options import Json, Model, Out, integer, load_model, number, parse_integers
from fastddim.config import require_choice

FORMATS = ("onnx", "aoti")

app = typer.Typer()


@app.command()
def export(
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    format: Annotated[
        str, typer.Option(help="onnx; or aoti: compiled by AOTInductor, for libtorch, on machines like this one.")
    ] = "onnx",
    device: Annotated[str, typer.Option(help="With aoti: cpu or cuda.")] = "cpu",
    cpu_isa: Annotated[
        str | None, typer.Option(metavar="NAME", help="With aoti: the CPU needs avx2 or avx512. Default: avx2.")
    ] = None,
    graph: Annotated[str, typer.Option(help="loop: all steps in one call; step: one step a call.")] = "loop",
    guidance: Annotated[bool, typer.Option(help="Classifier-free guidance, its scale an input.")] = False,
    guidance_rescale: Annotated[bool, typer.Option(help="With guidance: its rescale is an input too.")] = False,
    noise: Annotated[bool, typer.Option(help="Noise is an input, so that runs may have eta above 0.")] = False,
    bake_schedule: Annotated[
        bool, typer.Option("--bake-schedule", help="Take a number of steps instead of a table.")
    ] = False,
    steps: Annotated[int, typer.Option(parser=integer, metavar="INTEGER", help="Steps of the default table.")] = 50,
    eta: Annotated[float, typer.Option(parser=number, metavar="NUMBER", help="Of the default table.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, float16 or bfloat16.")] = "float32",
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Heights and widths may differ from call to call.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(parser=number, metavar="NUMBER", help="Largest difference from torch. Default: by dtype."),
    ] = None,
    verify: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Compare a bundle with its model instead of writing one.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Export a model and its sampler as one file, compared with torch, in a folder that describes it."""
    if (out is None) == (verify is None):
        raise ValueError("--out, --verify: pass one of the two")
    require_choice("--format", format, FORMATS)
    compiled: dict[str, Any] = {"device": device, "cpu_isa": cpu_isa}
    if format != "aoti" and compiled != {"device": "cpu", "cpu_isa": None}:
        raise ValueError(f"--device, --cpu-isa: given with format {format!r}; pass --format aoti, or leave them out")
    from fastddim.export import ExportOptions, export_aoti, export_onnx, open_bundle, verify_bundle

    start = time.perf_counter()
    if verify is not None:
        bundle = open_bundle(verify)
        pipeline = load_model(model)
        parity = verify_bundle(bundle, pipeline.unet, tolerance=tolerance)
    else:
        assert out is not None
        options = ExportOptions(
            graph=graph,
            guided=guidance,
            guidance_rescale=guidance_rescale,
            stochastic=noise,
            bake_schedule=bake_schedule,
            num_inference_steps=steps,
            eta=eta,
            dtype=dtype,
            dynamic_size=dynamic_size,
        )
        pipeline = load_model(model)
        common: dict[str, Any] = {"force": force, "tolerance": tolerance}
        if format == "aoti":
            bundle = export_aoti(pipeline.unet, pipeline.scheduler, out, options, **common, **compiled)
        else:
            bundle = export_onnx(pipeline.unet, pipeline.scheduler, out, options, **common)
        parity = bundle.manifest["parity"]
    seconds = time.perf_counter() - start
    if as_json:
        typer.echo(json.dumps({"path": str(bundle.path), "seconds": seconds, "parity": parity}))
        return
    for entry in parity:
        typer.echo(
            f"batch {entry['batch']} of {entry['size']}, {entry['steps']} steps: largest difference from torch"
            f" {entry['largest_error']:.1e} (tolerance {entry['tolerance']:.1e})"
        )
    size = sum(file["bytes"] for file in bundle.manifest["files"].values())
    typer.echo(f"{str(bundle.path)!r}: {bundle.graph}, {size / 1e6:.1f} MB, {seconds:.1f} s")


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `fastddim export` wrote.")],
    num_images: Annotated[
        int | None,
        typer.Option(parser=integer, metavar="INTEGER", help="How many. Default: one for each label, else 10."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="INTEGERS", help='Classes such as "0,1,2", repeated in turn.')
    ] = None,
    steps: Annotated[
        int | None, typer.Option(parser=integer, metavar="INTEGER", help="Model calls. Default: the bundle's.")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(parser=number, metavar="NUMBER", help="0 is DDIM, 1 is DDPM. Default: the bundle's.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(parser=number, metavar="NUMBER", help="For bundles with guidance. Default: 2.")
    ] = None,
    seed: Annotated[
        int, typer.Option(parser=integer, metavar="INTEGER", help="Of the first image; the others count up.")
    ] = 0,
    providers: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="For ONNX files: cpu, cuda, tensorrt. Default: cuda where it is there."),
    ] = None,
    check_finite: Annotated[
        bool, typer.Option("--check-finite", help="Report the step at which NaN or infinities appear.")
    ] = False,
    out: Out = Path("samples.png"),
    as_json: Json = False,
) -> None:
    """Sample from an exported bundle with what runs its file, and write a picture; an ONNX file needs no torch."""
    from fastddim.export import open_bundle, open_sampler
    from fastddim.pictures import GridLayout, check_picture, make_grid, save_picture

    classes = None if labels is None else parse_integers(labels, "--labels")
    opened = open_bundle(bundle)
    options: dict[str, Any] = {"check_finite": check_finite}
    if providers is not None:
        if opened.runtime != "onnx":
            raise ValueError(
                f"--providers: {providers!r}, but this bundle is of runtime {opened.runtime!r}; leave it out"
            )
        options["providers"] = providers.split(",")
    sampler = open_sampler(opened, **options)
    manifest = opened.manifest
    shape = manifest["sample"]["shape"]
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"bundle: its samples are {shape}, no pictures; use fastddim.export.open_sampler")
    null = manifest["sampling"]["null_values"].get("class_labels")
    conditions: dict[str, Any] = {}
    names = None
    if null is not None:
        given = classes or list(range(null))
        if max(given) > null:
            raise ValueError(f"--labels: {max(given)}; pass integers in [0, {null}] ({null} is no class)")
        num_images = len(given) if num_images is None else num_images
        names = [given[k % len(given)] for k in range(max(num_images, 0))]
        conditions["class_labels"] = np.array(names, dtype=np.int64)
    elif classes is not None:
        raise ValueError(f"--labels: {labels!r}, but this bundle has no classes; leave them out")
    num_images = 10 if num_images is None else num_images
    if num_images < 1:
        raise ValueError(f"--num-images: {num_images}; pass an integer >= 1")
    if manifest["sampling"]["guided"] and guidance_scale is None:
        guidance_scale = 2.0
    _, height, width = shape
    check_picture(out, GridLayout.plan(num_images, height, width, names).size)
    start = time.perf_counter()
    samples = sampler(
        num_images, seeds=seed, num_inference_steps=steps, eta=eta, guidance_scale=guidance_scale, **conditions
    )
    seconds = time.perf_counter() - start
    save_picture(make_grid(samples, labels=names), out)
    device = sampler.device()
    if as_json:
        typer.echo(json.dumps({"path": str(out), "num_images": num_images, "seconds": seconds, "provider": device}))
    else:
        typer.echo(f"{str(out)!r}: {num_images} images, {seconds / num_images:.3g} s per image on {device}")
