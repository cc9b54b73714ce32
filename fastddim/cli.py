"""The command line: `fastddim sample`, `invert`, `interpolate`, `info`, and those of `cli_run`, `export` and `bench`.

torch and diffusers load inside the commands.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import fastddim
from fastddim import cli_run
from fastddim.bench import command as cli_bench
from fastddim.cli_options import (
    CommandGroup,
    Device,
    Json,
    Model,
    Out,
    Steps,
    integer,
    load_model,
    naming,
    number,
    parse_integers,
)
from fastddim.config import require_int, require_number
from fastddim.export import command as cli_export

if TYPE_CHECKING:
    import torch

    from fastddim.pipeline import DDIMPipeline
    from fastddim.sampler import Sampler

USER_ERROR = 2
INTERRUPTED = 130

_DEFAULT_GUIDANCE = 2.0
# What a strip shows of x_T: three standard deviations from black to grey, and three to white.
_SHOWN_DEVIATIONS = 3
# One picture holds them all.
_MOST_IMAGES = 100_000
# typer may bring its own copy of click, and exports of it only this subclass of the usage error.
_UsageError: Any = typer.BadParameter.__base__

# Each package under the names of its builds.
_PACKAGES = {
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"),
    "diffusers": ("diffusers",),
    "numpy": ("numpy",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "tensorrt_rtx": ("tensorrt-rtx",),
}

# Plain help: typer's tables cut names and waste half of a screen.
app = typer.Typer(
    name="fastddim", cls=CommandGroup, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.add_typer(cli_run.app)
app.add_typer(cli_export.app)
app.add_typer(cli_bench.app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for an error of the user's, 130 when interrupted.

    `bench` has 1 as well, for a candidate that failed or a ratio that got worse.

    Args:
        arguments: without the program's name; `sys.argv` by default.
    """
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="fastddim", standalone_mode=False)
    except _UsageError as error:
        return _fail(_explain(error))
    except (ValueError, OSError, ImportError) as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return status if isinstance(status, int) else 0


def _explain(error: Any) -> str:
    """A usage error's message, with the options that there are where none is near, and where to read on."""
    message = error.format_message()
    if getattr(error, "possibilities", None) == []:
        options = [name for option in error.ctx.command.params for name in option.opts if name.startswith("-")]
        message += f" (Possible options: {', '.join(options)})"
    # An option without its value, or a flag with one, comes without a context.
    read_on = "" if error.ctx is None else f" See {error.ctx.command_path} --help."
    return f"{message.rstrip('.')}.{read_on}"


def _fail(message: str) -> int:
    line = Text(f"error: {' '.join(message.split())}", style="red")
    Console(stderr=True).print(line, soft_wrap=True)
    return USER_ERROR


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastddim {fastddim.__version__}")
        raise typer.Exit()


_StripGuidance = Annotated[
    float | None,
    typer.Option(parser=number, metavar="NUMBER", help="Classifier-free guidance towards the labels; 1 is off."),
]
_StripLabels = Annotated[
    str | None,
    typer.Option(metavar="INTEGERS", help='A class for each row such as "0,1,2", repeated in turn. Default: no class.'),
]
_BatchSize = Annotated[
    int | None,
    typer.Option(parser=integer, metavar="INTEGER", help="Images at a time. Default: by size, at most 100."),
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """DDIM sampling at the speed of the hardware."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@dataclass(frozen=True)
class _Run:
    """A validated `sample` command: everything but the work."""

    sampler: Sampler
    null: int | None
    labels: list[int] | None
    num_images: int
    batch_size: int
    seed: int


@app.command()
def sample(
    model: Model = None,
    num_images: Annotated[int, typer.Option(parser=integer, metavar="INTEGER", help="How many images.")] = 100,
    steps: Steps = 50,
    eta: Annotated[
        float, typer.Option(parser=number, metavar="NUMBER", help="Noise in [0, 1]: 0 is DDIM, 1 is DDPM.")
    ] = 0.0,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            parser=number,
            metavar="NUMBER",
            help=f"Classifier-free guidance; 1 is off. Default: {_DEFAULT_GUIDANCE:g} with classes, else off.",
        ),
    ] = None,
    guidance_rescale: Annotated[
        float, typer.Option(parser=number, metavar="NUMBER", help="Guidance rescale in [0, 1].")
    ] = 0.0,
    labels: Annotated[
        str | None, typer.Option(metavar="INTEGERS", help='Classes such as "0,1,2", repeated in turn. Default: all.')
    ] = None,
    seed: Annotated[int, typer.Option(parser=integer, metavar="INTEGER", help="Image k is drawn from seed + k.")] = 0,
    batch_size: _BatchSize = None,
    out: Out = Path("grid.png"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Sample images into one picture, a row for each class."""
    from fastddim.pictures import check_picture

    # What is cheap to check comes before the seconds that loading torch and the model takes.
    require_int("--num-images", num_images, 1, _MOST_IMAGES)
    require_int("--steps", steps, 1)
    require_number("--eta", eta, 0.0, 1.0)
    require_number("--guidance-rescale", guidance_rescale, 0.0, 1.0)
    if guidance_scale is not None:
        require_number("--guidance-scale", guidance_scale, -1e4, 1e4)
    require_int("--seed", seed, 0, 2**64 - num_images)
    if batch_size is not None:
        require_int("--batch-size", batch_size, 1)
    classes = None if labels is None else parse_integers(labels, "--labels")
    with naming("path", "--out"):
        check_picture(out)
    target = _pick_device(device)

    pipeline = load_model(model)
    null = _null_class(pipeline)
    if guidance_scale is None and null is not None:
        guidance_scale = _DEFAULT_GUIDANCE
    scale = _pick_guidance(guidance_scale, guidance_rescale, null)
    cycle = _pick_labels(classes, null)
    sampler = _make_sampler(pipeline, steps, target, eta=eta, guidance_scale=scale, guidance_rescale=guidance_rescale)
    run = _Run(
        sampler=sampler,
        null=null,
        labels=None if cycle is None else [cycle[k % len(cycle)] for k in range(num_images)],
        num_images=num_images,
        batch_size=batch_size or _default_batch_size(sampler),
        seed=seed,
    )
    seconds = _sample_to(run, out, progress=not as_json)
    summary = {
        "path": str(out),
        "num_images": num_images,
        "steps": steps,
        "eta": eta,
        "guidance_scale": scale,
        "guidance_rescale": guidance_rescale,
        "seed": seed,
        "seconds": seconds,
        "seconds_per_image": seconds / num_images,
        "device": str(sampler.device),
        "labels": run.labels,
    }
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        typer.echo(f"{str(out)!r}: {num_images} images, {seconds / num_images:.3g} s per image on {sampler.device}")


def _pick_device(name: str | None) -> torch.device:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    valid = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name not in valid:
        raise ValueError(f"--device: {name!r} is not on this machine; pass one of {', '.join(valid)}")
    return torch.device(name)


def _null_class(pipeline: DDIMPipeline) -> int | None:
    from fastddim.pipeline import null_class

    return null_class(pipeline.unet)


def _pick_guidance(scale: float | None, rescale: float, null: int | None) -> float | None:
    """The guidance scale; None, which halves the work, where guidance would change nothing."""
    if scale == 1.0:
        scale = None
    if scale is not None and null is None:
        raise ValueError(f"--guidance-scale: {scale!r}, but this model has no classes; leave it out")
    if scale is None and rescale:
        raise ValueError(
            f"--guidance-rescale: {rescale!r} without guidance; leave it out, or pass a --guidance-scale above 1"
        )
    return scale


def _pick_labels(classes: list[int] | None, null: int | None) -> list[int] | None:
    """The classes to repeat; None for a model without classes."""
    if null is None:
        if classes is not None:
            raise ValueError(f"--labels: {','.join(map(str, classes))}, but this model has no classes; leave them out")
        return None
    for label in classes or ():
        if label > null:
            raise ValueError(f"--labels: {label}; pass integers in [0, {null}] ({null} is no class)")
    return classes or list(range(max(null, 1)))


def _make_sampler(pipeline: DDIMPipeline, steps: int, target: torch.device, **options: Any) -> Sampler:
    require_int("--steps", steps, 1, int(pipeline.scheduler.config.num_train_timesteps))
    sampler = fastddim.Sampler(pipeline.unet.to(target), pipeline.scheduler, steps, **options)
    _picture_shape(sampler)
    return sampler


def _default_batch_size(sampler: Sampler) -> int:
    """At most as many pixels at a time as 128 images of 32x32, which a small machine's memory holds."""
    _, height, width = _picture_shape(sampler)
    return max(1, min(100, 128 * 32 * 32 // (height * width)))


def _class_kwargs(sampler: Sampler, labels: list[int] | None, null: int | None) -> dict[str, Any]:
    """The model's keyword arguments for one batch of labels."""
    import torch

    kwargs: dict[str, Any] = {}
    if labels is not None:
        kwargs["class_labels"] = torch.tensor(labels)
    if sampler.guidance_scale is not None and null is not None and labels is not None:
        kwargs["uncond_kwargs"] = {"class_labels": torch.full((len(labels),), null)}
    return kwargs


@contextlib.contextmanager
def _naming_memory(option: str, value: int, device: torch.device) -> Iterator[None]:
    """Turn the exhaustion of the device's memory into an error of the option that asked for it."""
    import torch

    try:
        yield
    except RuntimeError as error:
        # torch has a type for a GPU's memory only.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(f"{option}: {value} exceeds the memory of {device}; pass a smaller one") from error


def _picture_shape(sampler: Sampler) -> tuple[int, int, int]:
    shape = sampler.sample_shape
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"--model: it makes samples of shape {shape}; pass one that makes pictures of 1 or 3 channels")
    return shape[0], shape[1], shape[2]


def _sample_to(run: _Run, out: Path, progress: bool) -> float:
    """Sample and write the picture; returns the seconds that sampling took."""
    _check_grid(out, run.sampler, run.num_images, labels=run.labels)
    start = time.perf_counter()
    images = _sample_batches(run, progress)
    seconds = time.perf_counter() - start
    _save_grid(out, images, labels=run.labels)
    return seconds


def _check_grid(out: Path, sampler: Sampler, count: int, **layout: Any) -> None:
    """Refuse before the work a grid that its file's format could not hold."""
    from fastddim.pictures import GridLayout, check_picture

    with naming("path", "--out"):
        check_picture(out, GridLayout.plan(count, *_picture_shape(sampler)[1:], **layout).size)


def _save_grid(out: Path, images: torch.Tensor, **layout: Any) -> None:
    from fastddim.pictures import make_grid, save_picture

    picture = make_grid(images, **layout)
    with naming("path", "--out"):
        save_picture(picture, out)


def _sample_batches(run: _Run, progress: bool) -> torch.Tensor:
    """`[num_images, C, H, W]` float32 on the CPU, a batch at a time."""
    import torch

    console = Console(stderr=True)
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    firsts = range(0, run.num_images, run.batch_size)
    batches = []
    with Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("sampling", total=len(firsts) * len(run.sampler.table))
        for first in firsts:
            count = min(run.batch_size, run.num_images - first)
            labels = None if run.labels is None else run.labels[first : first + count]
            kwargs = _class_kwargs(run.sampler, labels, run.null)
            with _naming_memory("--batch-size", run.batch_size, run.sampler.device):
                images = run.sampler(count, seeds=run.seed + first, callback=lambda *_: bar.advance(task), **kwargs)
            assert isinstance(images, torch.Tensor)
            batches.append(images.float().cpu())
    return torch.cat(batches)


@app.command()
def invert(
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="Anything that Pillow opens.")],
    model: Model = None,
    steps: Steps = 50,
    guidance_scale: _StripGuidance = None,
    labels: _StripLabels = None,
    batch_size: _BatchSize = None,
    out: Out = Path("strip.png"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Encode pictures to x_T, and decode them again.

    A row shows the original, x_T and the reconstruction of each. The error is the mean squared one per dimension, of
    pictures scaled to [0, 1].
    """
    from fastddim.pictures import open_picture, picture_tensor

    if batch_size is not None:
        require_int("--batch-size", batch_size, 1)
    classes = _check_strip(len(pictures), steps, guidance_scale, labels, out)
    with naming("path", "PICTURE"):
        opened = [open_picture(path) for path in pictures]
    if out.exists() and any(os.path.samefile(out, path) for path in pictures):
        raise ValueError(f"--out: {str(out)!r} is one of the pictures; pass another path")
    strip = _load_strip(model, len(pictures), steps, guidance_scale, classes, _pick_device(device))
    sampler, count = strip.sampler, batch_size or _default_batch_size(strip.sampler)
    headings = ("original", "x_T", "reconstruction")
    layout = {"labels": [k + 1 for k in range(len(pictures)) for _ in headings], "columns": 3, "headings": headings}
    _check_grid(out, sampler, 3 * len(pictures), **layout)

    import torch

    start = time.perf_counter()
    progress = not as_json and Console(stderr=True).is_terminal
    originals = torch.stack([picture_tensor(image, _picture_shape(sampler)) for image in opened])
    tiles = []
    for first in range(0, len(originals), count):
        x0 = originals[first : first + count]
        batch_labels = None if strip.labels is None else strip.labels[first : first + count]
        kwargs = _class_kwargs(sampler, batch_labels, strip.null)
        with _naming_memory("--batch-size", count, sampler.device):
            x = sampler.invert(x0, progress=progress, **kwargs)
            reconstruction = sampler(x, progress=progress, **kwargs)
        assert isinstance(reconstruction, torch.Tensor)
        tiles.append(torch.stack([x0, x.cpu() / _SHOWN_DEVIATIONS, reconstruction.cpu()], dim=1))
    rows = torch.cat(tiles)
    errors = ((rows[:, 2] - rows[:, 0]) / 2).square().flatten(1).mean(1).tolist()
    _save_grid(out, rows.flatten(0, 1), **layout)
    summary = {
        "path": str(out),
        "pictures": [str(path) for path in pictures],
        "errors": errors,
        "steps": steps,
        "guidance_scale": sampler.guidance_scale,
        "seconds": time.perf_counter() - start,
        "device": str(sampler.device),
        "labels": strip.labels,
    }
    if as_json:
        typer.echo(json.dumps(summary))
        return
    for k, (path, error) in enumerate(zip(pictures, errors, strict=True), start=1):
        typer.echo(f"{k}: {str(path)!r}: reconstruction error {error:.2g}")
    typer.echo(f"{str(out)!r}: {len(pictures)} pictures, {steps} steps each way on {sampler.device}")


@app.command()
def interpolate(
    model: Model = None,
    seeds: Annotated[
        str, typer.Option(metavar="INTEGERS", help='Pairs such as "1,2,3,4": a row from 1 to 2, ...')
    ] = "0,1",
    num: Annotated[
        int, typer.Option(parser=integer, metavar="INTEGER", help="Images in a row, both ends included.")
    ] = 10,
    steps: Steps = 50,
    guidance_scale: _StripGuidance = None,
    labels: _StripLabels = None,
    out: Out = Path("strip.png"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write what lies between the images of two seeds.

    There is a row for each pair.
    """
    ends = parse_integers(seeds, "--seeds")
    for seed in ends:
        require_int("--seeds", seed, 0, 2**64 - 1)
    if len(ends) % 2:
        raise ValueError(f"--seeds: {len(ends)} in {seeds!r}; pass two for each row")
    pairs = list(zip(ends[::2], ends[1::2], strict=True))
    require_int("--num", num, 2, _MOST_IMAGES // len(pairs))
    classes = _check_strip(len(pairs), steps, guidance_scale, labels, out)
    strip = _load_strip(model, len(pairs), steps, guidance_scale, classes, _pick_device(device))
    sampler = strip.sampler
    names = [f"{a}, {b}" for a, b in pairs]
    if classes is not None:
        names = [f"{name}: {label}" for name, label in zip(names, strip.labels or (), strict=True)]
    layout = {
        "labels": [name for name in names for _ in range(num)],
        "columns": num,
        "headings": [f"{k / (num - 1):.2g}" for k in range(num)],
    }
    _check_grid(out, sampler, num * len(pairs), **layout)

    import torch

    start = time.perf_counter()
    progress = not as_json and Console(stderr=True).is_terminal
    rows = []
    for row, (a, b) in enumerate(pairs):
        kwargs = _class_kwargs(sampler, None if strip.labels is None else [strip.labels[row]] * num, strip.null)
        with _naming_memory("--num", num, sampler.device):
            rows.append(sampler.interpolate(a, b, num, progress=progress, **kwargs).cpu())
    _save_grid(out, torch.cat(rows), **layout)
    summary = {
        "path": str(out),
        "seeds": pairs,
        "num": num,
        "steps": steps,
        "guidance_scale": sampler.guidance_scale,
        "seconds": time.perf_counter() - start,
        "device": str(sampler.device),
        "labels": strip.labels,
    }
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        typer.echo(f"{str(out)!r}: {len(pairs)} rows of {num} images, {steps} steps on {sampler.device}")


@dataclass(frozen=True)
class _Strip:
    """What a validated `invert` or `interpolate` command samples with; a label for each row."""

    sampler: Sampler
    null: int | None
    labels: list[int] | None


def _check_strip(
    rows: int, steps: int, guidance_scale: float | None, labels: str | None, out: Path
) -> list[int] | None:
    """The checks that need no model; returns the classes."""
    from fastddim.pictures import check_picture

    require_int("--steps", steps, 1)
    classes = None if labels is None else parse_integers(labels, "--labels")
    if classes is not None and len(classes) > rows:
        raise ValueError(f"--labels: {len(classes)} for {rows} rows; pass at most one for each")
    if guidance_scale is not None:
        require_number("--guidance-scale", guidance_scale, -1e4, 1e4)
        if classes is None and guidance_scale != 1:
            raise ValueError(f"--guidance-scale: {guidance_scale!r} without --labels to guide towards; pass both")
    with naming("path", "--out"):
        check_picture(out)
    return classes


def _load_strip(
    model: str | None,
    rows: int,
    steps: int,
    guidance_scale: float | None,
    classes: list[int] | None,
    target: torch.device,
) -> _Strip:
    pipeline = load_model(model)
    null = _null_class(pipeline)
    scale = _pick_guidance(guidance_scale, 0.0, null)
    cycle = _pick_labels(classes or (None if null is None else [null]), null)
    labels = None if cycle is None else [cycle[k % len(cycle)] for k in range(rows)]
    return _Strip(_make_sampler(pipeline, steps, target, guidance_scale=scale), null, labels)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, devices, and which backends can run here."""
    devices = _devices()
    versions, backends = _versions(), _backends(len(devices) > 1)
    if as_json:
        typer.echo(json.dumps({"versions": versions, "devices": devices, "backends": backends}))
        return
    for name, version in versions.items():
        typer.echo(f"{name:<12} {version or 'not installed'}")
    typer.echo("\ndevices")
    for device in devices:
        typer.echo(f"  {device['device']:<10} {device['name']}")
    typer.echo("\nbackends")
    for name, backend in backends.items():
        typer.echo(f"  {name:<12} {'yes' if backend['usable'] else 'no: ' + backend['reason']}")


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"fastddim": fastddim.__version__, "python": platform.python_version()}
    for package, distributions in _PACKAGES.items():
        versions[package] = None
        for distribution in distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = versions[package] or importlib.metadata.version(distribution)
    return versions


def _devices() -> list[dict[str, str]]:
    """The CPU, then the CUDA or HIP devices."""
    import torch

    devices = [{"device": "cpu", "name": f"{platform.machine()}, {torch.get_num_threads()} threads"}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        devices.append({"device": f"cuda:{index}", "name": torch.cuda.get_device_name(index)})
    return devices


def _backends(has_gpu: bool) -> dict[str, dict[str, Any]]:
    """What can run the step here, and all that keeps the others from it."""
    needs = {
        "reference": [],
        "triton": [_missing("triton", "pip install triton"), "" if has_gpu else "needs a CUDA or HIP device"],
        "onnxruntime": [_missing("onnxruntime", "pip install fastddim[onnx]")],
        "tensorrt": [
            _missing("tensorrt", "pip install fastddim[tensorrt]"),
            "" if has_gpu else "needs a CUDA device",
        ],
        "tensorrt_rtx": [
            _missing("tensorrt_rtx", "pip install fastddim[rtx]"),
            "" if has_gpu else "needs a CUDA device; builds engines without",
        ],
    }
    report: dict[str, dict[str, Any]] = {}
    for name, reasons in needs.items():
        found = [*filter(None, reasons)]
        report[name] = {"usable": not found, "reason": "; ".join(found) or None}
    return report


def _missing(package: str, remedy: str) -> str:
    return "" if importlib.util.find_spec(package) else f"{package} is not installed ({remedy})"
