"""`fastddim export` and `fastddim run`."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from fastddim import cli_triton
from fastddim.cli_options import (
    Json,
    Model,
    Out,
    integer,
    naming,
    naming_options,
    number,
    parse_integers,
    quiet_diffusers,
)
from fastddim.config import Clip, DynamicThreshold, Limit, require_choice

if TYPE_CHECKING:
    from fastddim.export import Bundle, ExportOptions
    from fastddim.export.bundle_sampler import BundleSampler

FORMATS = ("onnx", "aoti", "tensorrt", "cubin")
# Of class labels; a text-to-image pipeline has its own default.
_GUIDANCE = 2.0

app = typer.Typer()
_TENSORRT, _KERNELS = "TensorRT", "Kernels"
_tensorrt = functools.partial(typer.Option, rich_help_panel=_TENSORRT)
_cubin = functools.partial(typer.Option, rich_help_panel=_KERNELS)
# What each panel's options need.
_NEEDED = {
    _TENSORRT: "--format tensorrt",
    _KERNELS: "--format cubin",
    cli_triton.PANEL: "--triton-repository",
}
# The other options that are used: for kernels, for comparing a bundle, for one that is there, and beside its model.
_OF_KERNELS = ("out", "format", "guidance", "guidance_rescale", "noise", "dtype", "force", "as_json")
_OF_VERIFY = ("verify", "model", "parity_steps", "tolerance", "as_json")
_OF_SOURCE = ("source", "force", "as_json")
_OF_AOTI = ("device", "cpu_isa")
# For `TensorRTOptions`' names.
_ENGINE_OPTIONS = {
    "flavour": "--trt",
    "profiles": "--profile",
    "compute_capabilities": "--compute-capability",
    "workspace": "--workspace",
    "builder_optimization_level": "--optimization-level",
    "tf32": "--tf32",
    "version_compatible": "--version-compatible",
    "hardware_compatibility": "--hardware-compatibility",
    "refit": "--refit",
    "strip_plan": "--strip-plan",
    "weight_streaming": "--weight-streaming",
    "timing_cache": "--timing-cache",
    "fused_step": "--fused-step",
}


@app.command()
def export(
    context: typer.Context,
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    format: Annotated[
        str,
        typer.Option(
            help="onnx; aoti: compiled by AOTInductor, for libtorch, on machines like this one; tensorrt: an engine;"
            " cubin: the fused step alone, without a model."
        ),
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
    per_sample_steps: Annotated[
        bool, typer.Option("--per-sample-steps", help="With --bake-schedule: a number of steps for each sample.")
    ] = False,
    seeded: Annotated[
        bool, typer.Option("--seeded", help="Take seeds instead of states and noise; the file draws them.")
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
    parity_steps: Annotated[
        str, typer.Option(metavar="INTEGERS", help="Numbers of steps after which to compare with torch.")
    ] = "1,10,50",
    sampler_only: Annotated[
        bool, typer.Option("--sampler-only", help="Of a text-to-image pipeline: without text encoders and decoder.")
    ] = False,
    verify: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Compare a bundle with its model instead of writing one.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="BUNDLE",
            help="Take this bundle instead of a model: its ONNX graphs for an engine, or as it is for a server.",
        ),
    ] = None,
    trt: Annotated[
        str, _tensorrt(help="standard; rtx: TensorRT for RTX, builds without a GPU; auto: what is installed.")
    ] = "auto",
    profile: Annotated[
        list[str] | None,
        _tensorrt(
            metavar="SIZES", help="MIN:OPT:MAX such as batch=1:4:8,steps=1:50:100, also height, width; again for more."
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None, _tensorrt(metavar="NUMBER", help="rtx: a GPU to build for, such as 8.9; again for more.")
    ] = None,
    workspace: Annotated[
        int | None, _tensorrt(parser=integer, metavar="BYTES", help="Largest scratch memory of a layer.")
    ] = None,
    optimization_level: Annotated[
        int | None, _tensorrt(parser=integer, metavar="INTEGER", help="0 to 5; higher builds longer.")
    ] = None,
    tf32: Annotated[bool, _tensorrt("--tf32", help="Let float32 products round to TF32.")] = False,
    version_compatible: Annotated[
        bool, _tensorrt("--version-compatible", help="Later versions of TensorRT load it too.")
    ] = False,
    hardware_compatibility: Annotated[
        str | None, _tensorrt(metavar="NAME", help="standard: ampere_plus or same_compute_capability.")
    ] = None,
    refit: Annotated[bool, _tensorrt("--refit", help="Weights may be replaced later.")] = False,
    strip_plan: Annotated[
        bool, _tensorrt("--strip-plan", help="Leave the weights out; they come from the ONNX bundle.")
    ] = False,
    weight_streaming: Annotated[
        bool, _tensorrt("--weight-streaming", help="Weights may stay on the host in part.")
    ] = False,
    timing_cache: Annotated[
        Path | None, _tensorrt(metavar="FILE", help="standard: measured kernels, read where it is and written.")
    ] = None,
    fused_step: Annotated[
        bool,
        _tensorrt("--fused-step", help="standard, with graph step: the step is our kernel, compiled into the engine."),
    ] = False,
    reuse: Annotated[
        bool, _tensorrt("--reuse", help="Keep an engine that is there if nothing it depends on has changed.")
    ] = False,
    triton_repository: cli_triton.Repository = None,
    triton_name: cli_triton.Name = None,
    max_batch_size: cli_triton.MaxBatchSize = 8,
    preferred_batch_sizes: cli_triton.PreferredBatchSizes = None,
    queue_delay: cli_triton.QueueDelay = 0,
    queue_timeout: cli_triton.QueueTimeout = 0,
    timeout_action: cli_triton.TimeoutAction = "reject",
    queue_size: cli_triton.QueueSize = 0,
    instances: cli_triton.Instances = 1,
    instance_kind: cli_triton.Kind = "auto",
    gpus: cli_triton.Gpus = None,
    warmup: cli_triton.Warmup = None,
    backend_parameter: cli_triton.Parameter = None,
    accelerator: cli_triton.Accelerator = None,
    accelerator_parameter: cli_triton.AcceleratorParameter = None,
    model_versions: cli_triton.Versions = "1",
    shape: Annotated[str | None, _cubin(metavar="SIZES", help="Of one sample, such as 4x64x64.")] = None,
    batch: Annotated[str | None, _cubin(metavar="INTEGERS", help="Sizes of a batch. Default: 1.")] = None,
    state_dtype: Annotated[
        str, _cubin(help="float32, float16 or bfloat16; --dtype is of the model's output.")
    ] = "float32",
    limit: Annotated[str, _cubin(help="Of x0: none, clip=RANGE or threshold=RATIO:MAX_VALUE.")] = "none",
    per_sample: Annotated[bool, _cubin("--per-sample", help="Each sample has its own row and guidance.")] = False,
    draw_noise: Annotated[bool, _cubin("--draw-noise", help="Draw the noise from seeds; --noise takes it.")] = False,
    x0: Annotated[bool, _cubin("--x0", help="Write the prediction of x0 too.")] = False,
    model_input: Annotated[bool, _cubin("--model-input", help="Write the next model input too.")] = False,
    advance: Annotated[bool, _cubin("--advance", help="Move the index of the row on, for captured launches.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle or model that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Export a model and its sampler as one file, compared with torch, in a folder that describes it."""
    require_choice("--format", format, FORMATS)
    _check_options(context, format, verify, source, out, triton_repository)
    if format == "cubin":
        if out is None:
            raise ValueError("--out: missing; pass a folder to write")
        drawn = "drawn" if draw_noise else "none"
        if noise and draw_noise:
            raise ValueError("--noise, --draw-noise: both given; pass one of the two")
        asked: dict[str, Any] = {
            "state_dtype": state_dtype, "model_dtype": dtype, "guided": guidance, "guidance_rescale": guidance_rescale,
            "per_sample": per_sample, "noise": "given" if noise else drawn, "x0": x0, "model_input": model_input,
            "advance": advance,
        }  # fmt: skip
        _export_kernels(out, force, as_json, shape, batch, limit, asked)
        return
    if verify is None and out is None and None in (source, triton_repository):
        raise ValueError("--out: missing; pass a folder to write, or --verify, or --from with --triton-repository")
    if None not in (out, source) and format != "tensorrt":
        raise ValueError(f"--from: with --out it builds an engine, format is {format!r}; pass --format tensorrt")
    from fastddim.export import (
        ExportOptions,
        Profile,
        TensorRTOptions,
        export_aoti,
        export_tensorrt,
        open_bundle,
        write_triton_repository,
    )
    from fastddim.export.bundle import check_destination
    from fastddim.export.pipelines import denoiser_of

    compared = parse_integers(parity_steps, "--parity-steps")
    with naming_options(_ENGINE_OPTIONS):
        engine = TensorRTOptions(
            flavour=trt,
            profiles=tuple(map(Profile.parse, profile)) if profile else (Profile(),),
            compute_capabilities=tuple(compute_capability or ()),
            workspace=workspace,
            builder_optimization_level=optimization_level,
            tf32=tf32,
            version_compatible=version_compatible,
            hardware_compatibility=hardware_compatibility,
            refit=refit,
            strip_plan=strip_plan,
            weight_streaming=weight_streaming,
            timing_cache=timing_cache,
            fused_step=fused_step,
        )
    served = None
    if triton_repository is not None:
        served = cli_triton.triton_options(
            name=triton_name,
            max_batch_size=max_batch_size,
            preferred_batch_sizes=preferred_batch_sizes,
            queue_delay=queue_delay,
            queue_timeout=queue_timeout,
            timeout_action=timeout_action,
            queue_size=queue_size,
            instances=instances,
            kind=instance_kind,
            gpus=gpus,
            warmup=warmup,
            parameter=backend_parameter,
            accelerator=accelerator,
            accelerator_parameter=accelerator_parameter,
            versions=model_versions,
        )
    start = time.perf_counter()
    if verify is not None:
        bundle = open_bundle(verify)
        parity = _verify(bundle, model, compared, tolerance)
    elif out is None:
        assert source is not None
        bundle, parity = open_bundle(source), []
    else:
        options = ExportOptions(
            graph=graph,
            guided=guidance,
            guidance_rescale=guidance_rescale,
            stochastic=noise,
            bake_schedule=bake_schedule,
            per_sample_steps=per_sample_steps,
            seeded=seeded,
            num_inference_steps=steps,
            eta=eta,
            dtype=dtype,
            dynamic_size=dynamic_size,
        )
        if fused_step and source is None and graph != "step":
            raise ValueError(f"--fused-step: given with --graph {graph}; pass --graph step, or leave it out")
        if format == "tensorrt" and (per_sample_steps or seeded):
            raise ValueError("--per-sample-steps, --seeded: TensorRT takes no such graph; leave them out")
        # Before a model is fetched and read.
        target = check_destination(out, force or reuse)
        load = functools.partial(_load_exported, model, sampler_only, format, served is not None)
        common: dict[str, Any] = {"parity_steps": compared, "tolerance": tolerance}
        write = functools.partial(_export_onnx, load, options, common)
        graphs = None if source is None else open_bundle(source)
        if triton_repository is not None and served is not None:
            with naming_options(_ENGINE_OPTIONS):
                place = (engine, target.name, triton_repository, served, force)
                if graphs is None:
                    cli_triton.check_export(options, format, *place)
                else:
                    cli_triton.check_engine(graphs, *place)
        if format == "tensorrt":
            with _build_progress(as_json) as progress, naming_options(_ENGINE_OPTIONS):
                bundle = export_tensorrt(graphs or write, out, engine, force=force, reuse=reuse, progress=progress)
        elif format == "aoti":
            pipeline, _ = load()
            compiled: dict[str, Any] = {"device": device, "cpu_isa": cpu_isa}
            bundle = export_aoti(
                denoiser_of(pipeline), pipeline.scheduler, out, options, force=force, **common, **compiled
            )
        else:
            bundle = write(out, force=force)
        parity = bundle.manifest["parity"]
    placed = None
    if triton_repository is not None:
        placed = write_triton_repository(bundle, triton_repository, served, force=force)
    seconds = time.perf_counter() - start
    if as_json:
        told = {"path": str(bundle.path), "seconds": seconds, "parity": parity}
        typer.echo(json.dumps(told if placed is None else {**told, "triton_model": str(placed)}))
        return
    for entry in parity:
        compared_after = f"{entry['steps']} steps" if "steps" in entry else entry["component"]
        typer.echo(
            f"batch {entry['batch']} of {entry['size']}, {compared_after}: largest difference from torch"
            f" {entry['largest_error']:.1e} (tolerance {entry['tolerance']:.1e})"
        )
    size = sum(file["bytes"] for file in bundle.manifest["files"].values())
    typer.echo(f"{str(bundle.path)!r}: {bundle.kind}, {size / 1e6:.1f} MB, {seconds:.1f} s")
    if placed is not None:
        typer.echo(f"{str(placed)!r}: start the server with {cli_triton.server_line(placed.parent)}")


def _verify(bundle: Bundle, model: str | None, steps: Sequence[int], tolerance: float | None) -> list[dict[str, Any]]:
    from fastddim.export import verify_bundle, verify_pipeline
    from fastddim.export.pipelines import denoiser_of

    pipeline = _load(model)
    parity: list[dict[str, Any]]
    if bundle.components:
        parity = verify_pipeline(bundle, pipeline, steps=steps, tolerance=tolerance)
    else:
        parity = verify_bundle(bundle, denoiser_of(pipeline), steps=steps, tolerance=tolerance)
    return parity


def _load_exported(model: str | None, sampler_only: bool, format: str, served: bool) -> tuple[Any, bool]:
    """A pipeline, and whether all of it is exported; one of texts that only ONNX and TensorRT hold whole is refused."""
    from fastddim.export.pipelines import is_text_to_image

    pipeline = _load(model)
    whole = is_text_to_image(pipeline) and not sampler_only
    if whole and (format == "aoti" or served):
        name = "--triton-repository" if served else "--format: 'aoti'"
        raise ValueError(f"{name} takes the sampler of a text-to-image pipeline, not the whole; pass --sampler-only")
    return pipeline, whole


def _check_options(
    context: typer.Context,
    format: str,
    verify: Path | None,
    source: Path | None,
    out: Path | None,
    repository: Path | None,
) -> None:
    """Refuse options that were typed and would not be used."""
    used: tuple[str, ...] | None = None
    panels: set[str] = set()
    given_with = f"--format {format}"
    if format == "cubin":
        used, panels = _OF_KERNELS, {_KERNELS}
    elif verify is not None:
        used, given_with = _OF_VERIFY, "--verify"
    else:
        panels |= {_TENSORRT} if format == "tensorrt" and out is not None else set()
        panels |= {cli_triton.PANEL} if repository is not None else set()
        if source is not None:
            used, given_with = (*_OF_SOURCE, *(("out", "format") if out is not None else ())), "--from"
    for option in context.command.params:
        # By its name: some releases of typer have a click of their own.
        typed = context.get_parameter_source(option.name or "")
        if typed is None or typed.name != "COMMANDLINE":
            continue
        panel = getattr(option, "rich_help_panel", None)
        if panel is not None:
            fits, needed = panel in panels, _NEEDED[panel]
        elif option.name in _OF_AOTI:
            fits, needed = format == "aoti" and used is None, "--format aoti"
        else:
            fits, needed = used is None or option.name in used, None
        if not fits:
            fix = f"pass {needed}, or leave it out" if needed is not None and used is None else "leave it out"
            raise ValueError(f"{option.opts[0]}: given with {given_with}, which does not use it; {fix}")


def _export_kernels(
    out: Path, force: bool, as_json: bool, shape: str | None, batch: str | None, limit: str, asked: Mapping[str, Any]
) -> None:
    if shape is None:
        raise ValueError("--shape: not given; pass the sizes of one sample, such as 4x64x64")
    from fastddim.export import KernelOptions, export_cubin

    options = KernelOptions(
        shape=tuple(parse_integers(shape.replace("x", ","), "--shape")),
        batches=tuple(parse_integers(batch or "1", "--batch")),
        limit=_parse_limit(limit),
        **asked,
    )
    start = time.perf_counter()
    bundle = export_cubin(out, options, force=force)
    seconds = time.perf_counter() - start
    count = len(bundle.manifest["kernels"])
    if as_json:
        typer.echo(json.dumps({"path": str(bundle.path), "seconds": seconds, "kernels": count}))
        return
    size = sum(file["bytes"] for file in bundle.manifest["files"].values())
    typer.echo(f"{str(bundle.path)!r}: {count} kernels, {size / 1e6:.1f} MB, {seconds:.1f} s")


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


def _export_onnx(
    load: Callable[[], tuple[Any, bool]],
    options: ExportOptions,
    common: Mapping[str, Any],
    out: Path,
    *,
    force: bool = False,
) -> Bundle:
    """Load a model and write its ONNX bundle: of the sampler, or of a whole text-to-image pipeline."""
    from fastddim.export import export_onnx, export_pipeline
    from fastddim.export.pipelines import denoiser_of

    pipeline, whole = load()
    if whole:
        return export_pipeline(pipeline, out, options, force=force, **common)
    return export_onnx(denoiser_of(pipeline), pipeline.scheduler, out, options, force=force, **common)


@contextlib.contextmanager
def _build_progress(as_json: bool) -> Iterator[Callable[[str, str | None, int, int], None] | None]:
    """A bar for each phase of an engine's build, where someone may be looking."""
    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield None
        return
    tasks: dict[str, TaskID] = {}
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console) as bars:

        def show(phase: str, parent: str | None, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase if parent is None else f"  {phase}", total=total)
            bars.update(tasks[phase], completed=done, total=total, visible=parent is None or done < total)

        yield show


def _load(model: str | None) -> Any:
    from fastddim.export import load_exportable

    quiet_diffusers()
    with naming("model", "--model"):
        return load_exportable(model)


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `fastddim export` wrote.")],
    num_images: Annotated[
        int | None,
        typer.Option(
            parser=integer, metavar="INTEGER", help="How many. Default: one for each label or prompt, else 10."
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="INTEGERS", help='Classes such as "0,1,2", repeated in turn.')
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Of a text-to-image bundle; give it again for another.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the pictures should not show. Default: empty.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(parser=integer, metavar="INTEGER", help="Model calls. Default: the bundle's.")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(parser=number, metavar="NUMBER", help="0 is DDIM, 1 is DDPM. Default: the bundle's.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(parser=number, metavar="NUMBER", help="For bundles with guidance. Default: 2; with prompts 7.5."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HEIGHTxWIDTH", help="In pixels, for bundles of any size.")
    ] = None,
    seed: Annotated[
        int, typer.Option(parser=integer, metavar="INTEGER", help="Of the first image; the others count up.")
    ] = 0,
    providers: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Of ONNX bundles: cpu, cuda, tensorrt. Default: cuda where it is there."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE", help="The ONNX bundle of an engine with --strip-plan, or with others for --refit."
        ),
    ] = None,
    check_finite: Annotated[
        bool, typer.Option("--check-finite", help="Report the step at which NaN or infinities appear.")
    ] = False,
    out: Out = Path("samples.png"),
    as_json: Json = False,
) -> None:
    """Sample from an exported bundle with what runs its file, and write a picture; an ONNX bundle needs no torch."""
    from fastddim.export import open_bundle
    from fastddim.pictures import GridLayout, check_picture, make_grid, save_picture

    opened = open_bundle(bundle)
    cycle: Sequence[int] | Sequence[str] | None
    if opened.components:
        if opened.runtime != "onnx":
            raise ValueError(
                f"bundle: {str(bundle)!r} is a whole pipeline for {opened.runtime!r}, which this command does not run; pass"
                " the ONNX bundle that it was built from"
            )
        if labels is not None or not prompt:
            raise ValueError("--prompt: this bundle makes pictures of texts; pass one or more, and no --labels")
        cycle, upscale = prompt, opened.components["vae_decoder"]["upscale"]
    else:
        if prompt or negative_prompt is not None:
            raise ValueError("--prompt, --negative-prompt: this bundle has no text encoder; leave them out")
        cycle, upscale = _pick_labels(labels, opened.manifest), 1
    num_images = (len(cycle) if cycle else 10) if num_images is None else num_images
    if num_images < 1:
        raise ValueError(f"--num-images: {num_images}; pass an integer >= 1")
    names = None if cycle is None else [cycle[k % len(cycle)] for k in range(num_images)]
    pixels = None if size is None else _parse_size(size)
    height, width = pixels or [side * upscale for side in opened.manifest["sample"]["shape"][-2:]]
    # Texts are too long for a picture's margin.
    shown = None if opened.components else names
    check_picture(out, GridLayout.plan(num_images, height, width, shown).size)
    options: dict[str, Any] = {"seeds": seed, "num_inference_steps": steps, "eta": eta, "size": pixels}
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    settings: dict[str, Any] = {"check_finite": check_finite}
    for name, runtime, given in (("providers", "onnx", providers), ("weights", "tensorrt", weights)):
        if given is None:
            continue
        if opened.runtime != runtime:
            raise ValueError(f"--{name}: '{given}', but this bundle is of runtime {opened.runtime!r}; leave it out")
        settings[name] = given.split(",") if isinstance(given, str) else given
    if opened.components:
        draw, sampler = _load_pipeline(opened, settings, names, negative_prompt)
    else:
        draw, sampler = _load_sampler(opened, settings, names, num_images)
    start = time.perf_counter()
    samples = draw(**options)
    seconds = time.perf_counter() - start
    save_picture(make_grid(samples, labels=shown), out)
    device = sampler.device()
    if as_json:
        typer.echo(json.dumps({"path": str(out), "num_images": num_images, "seconds": seconds, "provider": device}))
    else:
        typer.echo(f"{str(out)!r}: {num_images} images, {seconds / num_images:.3g} s per image on {device}")


def _pick_labels(labels: str | None, manifest: Mapping[str, Any]) -> list[int] | None:
    """The classes to repeat in turn; None for a model without."""
    shape = manifest["sample"]["shape"]
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"bundle: its samples are {shape}, no pictures; use fastddim.export.open_sampler")
    null = manifest["sampling"]["null_values"].get("class_labels")
    if null is None:
        if labels is not None:
            raise ValueError(f"--labels: {labels!r}, but this bundle has no classes; leave them out")
        return None
    given = list(range(null)) if labels is None else parse_integers(labels, "--labels")
    if max(given) > null:
        raise ValueError(f"--labels: {max(given)}; pass integers in [0, {null}] ({null} is no class)")
    return given


def _parse_size(text: str) -> tuple[int, int]:
    height, by, width = text.partition("x")
    if not (by and height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--size: {text!r}; pass height and width in pixels, such as 512x768")
    return int(height), int(width)


def _load_sampler(
    bundle: Bundle, settings: Mapping[str, Any], labels: Sequence[Any] | None, num_images: int
) -> tuple[Callable[..., Any], BundleSampler]:
    """What draws the samples, and the sampler."""
    from fastddim.export import open_sampler

    sampler = open_sampler(bundle, **settings)
    fixed: dict[str, Any] = {} if labels is None else {"class_labels": np.array(labels, dtype=np.int64)}
    if bundle.manifest["sampling"]["guided"]:
        fixed["guidance_scale"] = _GUIDANCE
    return functools.partial(sampler, num_images, **fixed), sampler


def _load_pipeline(
    bundle: Bundle, settings: Mapping[str, Any], prompts: Sequence[Any] | None, negative_prompt: str | None
) -> tuple[Callable[..., Any], BundleSampler]:
    """What draws the pictures, and their sampler."""
    from fastddim.export import OrtPipeline

    assert prompts is not None
    pipeline = OrtPipeline(bundle, **settings)
    ids = pipeline.tokenize(prompts)
    if negative_prompt is None and pipeline.zeros_for_empty_prompt:
        return functools.partial(pipeline, ids, None), pipeline.sampler
    negative = pipeline.tokenize([negative_prompt or ""] * len(prompts))
    return functools.partial(pipeline, ids, negative), pipeline.sampler
