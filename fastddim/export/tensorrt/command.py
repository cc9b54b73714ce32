"""`fastddim export tensorrt`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from fastddim.cli_options import integer, naming_options, option_of, with_options
from fastddim.export.command_options import ComparisonFlags, Destination, SamplerFlags, SamplerOnly, load_model, report

if TYPE_CHECKING:
    from fastddim.export import Bundle, ExportOptions

_RENAMED = {
    "profiles": "--profile",
    "compute_capabilities": "--compute-capability",
    "builder_optimization_level": "--optimization-level",
}


@with_options
def export_command(
    *,
    source: Annotated[
        str | None,
        typer.Argument(metavar="MODEL_OR_BUNDLE", help="As `export onnx`, or an ONNX bundle."),
    ] = None,
    destination: Destination,
    flavour: Annotated[str, typer.Option(metavar="NAME", help="standard, rtx or auto.")] = "auto",
    profile: Annotated[
        list[str] | None, typer.Option(metavar="SIZES", help="Such as batch=1:4:8,steps=1:50:100; repeats.")
    ] = None,
    compute_capability: Annotated[
        list[str] | None, typer.Option(metavar="NUMBER", help="rtx: a GPU to build for; repeats.")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(parser=integer, metavar="BYTES", help="A layer's largest scratch memory.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(parser=integer, metavar="INTEGER", help="0 to 5; higher builds longer.")
    ] = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let float32 products round to TF32.")] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Later TensorRT loads it too.")
    ] = False,
    hardware_compatibility: Annotated[
        str | None, typer.Option(metavar="NAME", help="ampere_plus or same_compute_capability.")
    ] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Weights may be replaced later.")] = False,
    strip_plan: Annotated[bool, typer.Option("--strip-plan", help="Leave the weights in the ONNX bundle.")] = False,
    weight_streaming: Annotated[bool, typer.Option("--weight-streaming", help="Weights may stay on the host.")] = False,
    timing_cache: Annotated[Path | None, typer.Option(metavar="FILE", help="standard: measured kernels, kept.")] = None,
    fused_step: Annotated[
        bool, typer.Option("--fused-step", help="standard, kind step: the step is our kernel.")
    ] = False,
    reuse: Annotated[bool, typer.Option("--reuse", help="Keep an engine that would come out the same.")] = False,
    sampler: SamplerFlags,
    sampler_only: SamplerOnly = False,
    comparison: ComparisonFlags,
) -> None:
    """Build TensorRT engines from a model or an ONNX bundle."""
    from fastddim.export.bundle import FORMAT, check_destination, open_bundle
    from fastddim.export.tensorrt.exporter import export_tensorrt
    from fastddim.export.tensorrt.options import Profile, TensorRTOptions

    naming_engine = functools.partial(naming_options, TensorRTOptions, **_RENAMED)
    with naming_engine():
        engine = TensorRTOptions(
            flavour=flavour,
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
    start = time.perf_counter()
    graphs: Bundle | Callable[[Path], Bundle]
    if source is not None and (Path(source) / FORMAT.file).is_file():
        _require_defaults(sampler, comparison, sampler_only)
        graphs = open_bundle(source)
    else:
        if fused_step and sampler.kind != "step":
            raise ValueError(f"--fused-step: given with --kind {sampler.kind}; pass --kind step, or leave it out")
        options = sampler.options()
        compared = comparison.arguments()
        # Before a model is fetched and read.
        check_destination(destination.out, destination.force or reuse)
        graphs = functools.partial(_export_graphs, source, options, sampler_only, compared)
    with _build_progress(destination.as_json) as progress, naming_engine():
        bundle = export_tensorrt(
            graphs, destination.out, engine, force=destination.force, reuse=reuse, progress=progress
        )
    report(bundle, start, bundle.kind, destination.as_json, parity=bundle.manifest["parity"])


def _export_graphs(
    model: str | None, options: ExportOptions, sampler_only: bool, compared: Mapping[str, Any], folder: Path
) -> Bundle:
    from fastddim.export.onnx.pipeline_exporter import export_loaded

    return export_loaded(load_model(model), folder, options, sampler_only, **compared)


def _require_defaults(sampler: SamplerFlags, comparison: ComparisonFlags, sampler_only: bool) -> None:
    """Refuse what was typed about a graph that is there already."""
    given = [
        field.name
        for flags in (sampler, comparison)
        for field in dataclasses.fields(flags)
        if getattr(flags, field.name) != field.default
    ]
    for name in given or (["sampler_only"] if sampler_only else []):
        raise ValueError(f"{option_of(name)}: is decided in the ONNX bundle; leave it out")


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
