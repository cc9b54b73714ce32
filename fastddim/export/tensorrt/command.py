"""`fastddim export tensorrt`."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from fastddim.cli_options import choice, integer, naming_options, with_options
from fastddim.export.command_options import ComparisonFlags, Destination, SamplerFlags, SamplerOnly, load_model, report

if TYPE_CHECKING:
    from fastddim.export import Bundle


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """How an engine is built: fields of `TensorRTOptions`."""

    flavour: Annotated[str, choice(help="standard, rtx or auto.")] = "auto"
    profiles: Annotated[
        list[str] | None,
        typer.Option("--profile", metavar="SIZES", help="Such as batch=1:4:8,steps=1:50:100; repeats."),
    ] = None
    compute_capabilities: Annotated[
        list[str] | None,
        typer.Option("--compute-capability", metavar="NUMBER", help="rtx: a GPU to build for; repeats."),
    ] = None
    workspace: Annotated[int | None, integer(metavar="BYTES", help="A layer's largest scratch memory.")] = None
    builder_optimization_level: Annotated[
        int | None, integer("--optimization-level", help="0 to 5; higher builds longer.")
    ] = None
    tf32: Annotated[bool, typer.Option("--tf32", help="Let float32 products round to TF32.")] = False
    version_compatible: Annotated[bool, typer.Option("--version-compatible", help="Later TensorRT loads it too.")] = (
        False
    )
    hardware_compatibility: Annotated[str | None, choice(help="ampere_plus or same_compute_capability.")] = None
    refit: Annotated[bool, typer.Option("--refit", help="Weights may be replaced later.")] = False
    strip_plan: Annotated[bool, typer.Option("--strip-plan", help="Leave the weights in the ONNX bundle.")] = False
    weight_streaming: Annotated[bool, typer.Option("--weight-streaming", help="Weights may stay on the host.")] = False
    timing_cache: Annotated[Path | None, typer.Option(metavar="FILE", help="standard: measured kernels, kept.")] = None
    fused_step: Annotated[bool, typer.Option("--fused-step", help="standard, kind step: the step is our kernel.")] = (
        False
    )


@with_options
def export_command(
    *,
    source: Annotated[
        str | None,
        typer.Argument(metavar="MODEL_OR_BUNDLE", help="As `export onnx`, or an ONNX bundle."),
    ] = None,
    destination: Destination,
    engine: EngineFlags,
    reuse: Annotated[bool, typer.Option("--reuse", help="Keep an engine that would come out the same.")] = False,
    sampler: SamplerFlags,
    sampler_only: SamplerOnly = False,
    comparison: ComparisonFlags,
) -> None:
    """Build TensorRT engines from a model or an ONNX bundle."""
    from fastddim.export.bundle import FORMAT, check_destination, open_bundle
    from fastddim.export.onnx.pipeline_exporter import export_loaded
    from fastddim.export.tensorrt.exporter import export_tensorrt
    from fastddim.export.tensorrt.options import Profile, TensorRTOptions

    parsed = {
        "profiles": tuple(map(Profile.parse, engine.profiles)) if engine.profiles else (Profile(),),
        "compute_capabilities": tuple(engine.compute_capabilities or ()),
    }
    options = TensorRTOptions(**dataclasses.asdict(engine) | parsed)
    start = time.perf_counter()
    graphs: Bundle | Callable[[Path], Bundle]
    if source is not None and (Path(source) / FORMAT.file).is_file():
        _require_defaults(sampler, comparison, sampler_only)
        graphs = open_bundle(source)
    else:
        if engine.fused_step and sampler.kind != "step":
            raise ValueError(f"--fused-step: given with --kind {sampler.kind}; pass --kind step, or leave it out")
        exported = sampler.options()
        compared = comparison.arguments()
        # Before a model is fetched and read.
        check_destination(destination.out, destination.force or reuse)

        def graphs(folder: Path) -> Bundle:
            # It takes the bundle then.
            with naming_options({"--variant": "export onnx --variant"}):
                pipeline = load_model(source)
            return export_loaded(pipeline, folder, exported, sampler_only, **compared)

    with _build_progress(destination.as_json) as progress:
        bundle = export_tensorrt(
            graphs, destination.out, options, force=destination.force, reuse=reuse, progress=progress
        )
    report(bundle, start, bundle.kind, destination.as_json, parity=bundle.manifest["parity"])


def _require_defaults(sampler: SamplerFlags, comparison: ComparisonFlags, sampler_only: bool) -> None:
    """Refuse what was typed about a graph that is there already."""
    given = [
        field.name
        for flags in (sampler, comparison)
        for field in dataclasses.fields(flags)
        if getattr(flags, field.name) != field.default
    ]
    given += ["sampler_only"] * sampler_only
    if given:
        raise ValueError(f"{given[0]}: is decided in the ONNX bundle; leave it out")


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
