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
import re
import time
from collections.abc import Iterator, Mapping, Sequence
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
    DEFAULT_GUIDANCE,
    CommandGroup,
    Device,
    Eta,
    GuidanceMethod,
    Json,
    Method,
    Model,
    Out,
    Steps,
    Variant,
    check_classes,
    integer,
    integers,
    load_model,
    naming,
    naming_options,
    number,
    parse_guidance_method,
    parse_integers,
    parse_method,
    pick_device,
)
from fastddim.config import require_guidance_method, require_int, require_number
from fastddim.export import command as cli_export

if TYPE_CHECKING:
    import torch

    from fastddim.sampler import Sampler

USER_ERROR = 2
INTERRUPTED = 130

# What a strip shows of x_T: three standard deviations from black to grey, and three to white.
_SHOWN_DEVIATIONS = 3
# One picture holds them all.
_MOST_IMAGES = 100_000
# typer may bring its own copy of click, and exports of it only this subclass of the usage error.
_UsageError: Any = typer.BadParameter.__base__

_PACKAGES = ("torch", "triton", "diffusers", "numpy", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx")

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
    message = re.sub("^Invalid value for '(.+?)': ", r"\1: ", error.format_message())
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


_StripGuidance = Annotated[float | None, number(help="Classifier-free guidance towards the labels; 1 is off.")]
_StripLabels = Annotated[
    str | None, integers(help='A class for each row such as "0,1,2", repeated in turn. Default: no class.')
]
_BatchSize = Annotated[int | None, integer(help="Images at a time. Default: by size, at most 100.")]


@app.command()
def sample(
    model: Model = None,
    variant: Variant = None,
    num_images: Annotated[int, integer(help="How many images.")] = 100,
    steps: Steps = None,
    method: Method = "auto",
    eta: Eta = None,
    guidance_scale: Annotated[
        float | None,
        number(
            help="Classifier-free guidance; 1 is off, but with cfg++. Default: 2, of cfg++ 0.6; off without classes."
        ),
    ] = None,
    guidance_rescale: Annotated[float, number(help="Guidance rescale in [0, 1].")] = 0.0,
    guidance_method: GuidanceMethod = "cfg",
    labels: Annotated[str | None, integers(help='Classes such as "0,1,2", repeated in turn. Default: all.')] = None,
    seed: Annotated[int, integer(help="Image k is drawn from seed + k.")] = 0,
    batch_size: _BatchSize = None,
    out: Out = Path("grid.png"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Sample images into one picture, a row for each class."""
    # What is cheap to check comes before the seconds that loading torch and the model takes.
    require_int("--num-images", num_images, 1, _MOST_IMAGES)
    options = parse_method(method)
    if eta is not None:
        require_number("--eta", eta, 0.0, 1.0)
        options["eta"] = eta
    require_number("--guidance-rescale", guidance_rescale, 0.0, 1.0)
    guided_by = parse_guidance_method(guidance_method)
    guidance_method = guided_by["guidance_method"]
    with naming_options({"guidance_method": "--guidance-method"}):
        require_guidance_method("guidance_method", *guided_by.values())
    require_int("--seed", seed, 0, 2**64 - num_images)
    classes = _check(steps, guidance_scale, labels, batch_size, out)
    target = pick_device(device)

    from fastddim.model_call import null_class

    pipeline = load_model(model, variant)
    null = null_class(pipeline.unet)
    if null is not None:
        classes = classes or list(range(max(null, 1)))
        guidance_scale = DEFAULT_GUIDANCE[guidance_method] if guidance_scale is None else guidance_scale
    options |= guided_by
    job = _Job.plan(
        pipeline, target, out, as_json, num_images, classes, steps, guidance_scale, guidance_rescale, **options
    )
    layout = {"labels": job.labels}
    job.check_grid(num_images, layout)
    start = time.perf_counter()
    images = _sample_batches(job, num_images, batch_size or job.default_batch_size(), seed)
    seconds = time.perf_counter() - start
    job.save(images, layout)
    from fastddim.samplers.method import get_method

    job.tell(
        [f"{str(out)!r}: {num_images} images, {seconds / num_images:.3g} s per image on {job.sampler.device}"],
        seconds,
        num_images=num_images,
        steps=job.sampler.num_inference_steps,
        method=job.sampler.method,
        eta=get_method(str(job.sampler.method)).options.get("eta") if eta is None else eta,
        guidance_rescale=guidance_rescale,
        guidance_method=guidance_method,
        seed=seed,
        seconds_per_image=seconds / num_images,
    )


def _check(
    steps: int | None, guidance_scale: float | None, labels: str | None, batch_size: int | None, out: Path
) -> list[int] | None:
    """The checks that need no model; returns the classes."""
    from fastddim.pictures import check_picture

    if steps is not None:
        require_int("--steps", steps, 1)
    if guidance_scale is not None:
        require_number("--guidance-scale", guidance_scale, -1e4, 1e4)
    if batch_size is not None:
        require_int("--batch-size", batch_size, 1)
    classes = None if labels is None else parse_integers(labels, "--labels")
    with naming("path", "--out"):
        check_picture(out)
    return classes


@dataclass(frozen=True)
class _Job:
    """A validated command: what it samples with, a class for each image or row, and where the picture goes."""

    sampler: Sampler
    shape: tuple[int, int, int]
    null: int | None
    labels: list[int] | None
    out: Path
    as_json: bool
    pipeline: Any

    @classmethod
    def plan(
        cls,
        pipeline: Any,
        target: torch.device,
        out: Path,
        as_json: bool,
        count: int,
        classes: list[int] | None,
        steps: int | None,
        guidance_scale: float | None,
        guidance_rescale: float = 0.0,
        **options: Any,
    ) -> _Job:
        """Refuse what the model cannot do; `count` images or rows show the classes in turn, or no class."""
        from fastddim.model_call import null_class
        from fastddim.pipeline import picture_shape
        from fastddim.samplers.sampling import read_scheduler

        null = null_class(pipeline.unet)
        # None halves the work, where guidance would change nothing.
        unchanged = guidance_scale == 1.0 and options.get("guidance_method", "cfg") == "cfg"
        scale = None if unchanged else guidance_scale
        if scale is not None and null is None:
            raise ValueError(f"--guidance-scale: {scale!r}, but this model has no classes; leave it out")
        if scale is None and guidance_rescale:
            raise ValueError(
                f"--guidance-rescale: {guidance_rescale!r} without guidance; leave it out, or pass a --guidance-scale"
                " above 1"
            )
        check_classes(classes, null, "model")
        cycle = classes or (None if null is None else [null])
        if steps is not None:
            require_int("--steps", steps, 1, int(pipeline.scheduler.config.num_train_timesteps))
        options |= {"guidance_scale": scale, "guidance_rescale": guidance_rescale}
        options_named = ("method", "spacing", "eta", "guidance_method", "guidance_scale")
        named = {name: f"--{name.replace('_', '-')}" for name in options_named} | {"num_inference_steps": "--steps"}
        with naming_options(named):
            if steps is None:
                sampling = read_scheduler(pipeline.scheduler, options.get("method", "auto"))
                steps = sampling.with_options(options.get("method_options") or {}, None).default_steps
            sampler = fastddim.Sampler(pipeline.unet.to(target), pipeline.scheduler, steps, **options)
        shape = None if sampler.sample_shape is None else picture_shape(pipeline, sampler.sample_shape)
        if shape is None or len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(
                f"--model: it makes samples of shape {shape}; pass one that makes pictures of 1 or 3 channels"
            )
        labels = None if cycle is None else [cycle[k % len(cycle)] for k in range(count)]
        return cls(sampler, (shape[0], shape[1], shape[2]), null, labels, out, as_json, pipeline)

    def default_batch_size(self) -> int:
        """At most as many pixels at a time as 128 images of 32x32, which a small machine's memory holds."""
        _, height, width = self.shape
        return max(1, min(100, 128 * 32 * 32 // (height * width)))

    def class_kwargs(self, labels: list[int] | None) -> dict[str, Any]:
        """The model's keyword arguments for one batch."""
        import torch

        if labels is None:
            return {}
        kwargs: dict[str, Any] = {"class_labels": torch.tensor(labels)}
        if self.sampler.guidance_scale is not None:
            assert self.null is not None
            kwargs["uncond_kwargs"] = {"class_labels": torch.full((len(labels),), self.null)}
        return kwargs

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Pictures `[B, C, H, W]` of finished samples, float32 on the CPU."""
        from fastddim.pipeline import decode_latents

        return decode_latents(self.pipeline, samples).float().cpu()

    def check_grid(self, count: int, layout: Mapping[str, Any]) -> None:
        """Refuse before the work a grid that its file's format could not hold."""
        from fastddim.pictures import GridLayout, check_picture

        with naming("path", "--out"):
            check_picture(self.out, GridLayout.plan(count, *self.shape[1:], **layout).size)

    def shows_progress(self) -> bool:
        return not self.as_json and Console(stderr=True).is_terminal

    @contextlib.contextmanager
    def naming_memory(self, option: str, value: int) -> Iterator[None]:
        """Turn the exhaustion of the device's memory into an error of the option that asked for it."""
        import torch

        try:
            yield
        except RuntimeError as error:
            # torch has a type for a GPU's memory only.
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            device = self.sampler.device
            raise ValueError(f"{option}: {value} exceeds the memory of {device}; pass a smaller one") from error

    def save(self, images: torch.Tensor, layout: Mapping[str, Any]) -> None:
        from fastddim.pictures import make_grid, save_picture

        picture = make_grid(images, **layout)
        with naming("path", "--out"):
            save_picture(picture, self.out)

    def tell(self, lines: Sequence[str], seconds: float, **facts: Any) -> None:
        """Print what was done: the lines, or the facts as JSON."""
        common = {
            "path": str(self.out),
            "guidance_scale": self.sampler.guidance_scale,
            "seconds": seconds,
            "device": str(self.sampler.device),
            "labels": self.labels,
        }
        typer.echo(json.dumps(common | facts) if self.as_json else "\n".join(lines))


def _sample_batches(job: _Job, num_images: int, batch_size: int, seed: int) -> torch.Tensor:
    """`[num_images, C, H, W]` float32 on the CPU, a batch at a time."""
    import torch

    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    firsts = range(0, num_images, batch_size)
    batches = []
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not job.shows_progress()) as bar:
        task = bar.add_task("sampling", total=len(firsts) * len(job.sampler.table))
        for first in firsts:
            count = min(batch_size, num_images - first)
            kwargs = job.class_kwargs(job.labels and job.labels[first : first + count])
            with job.naming_memory("--batch-size", batch_size):
                images = job.sampler(count, seeds=seed + first, callback=lambda *_: bar.advance(task), **kwargs)
                assert isinstance(images, torch.Tensor)
                batches.append(job.decode(images))
    return torch.cat(batches)


def _check_strip(
    rows: int, steps: int | None, guidance_scale: float | None, labels: str | None, batch_size: int | None, out: Path
) -> list[int] | None:
    """`_check`, and what a row for each label asks for."""
    classes = _check(steps, guidance_scale, labels, batch_size, out)
    if classes is not None and len(classes) > rows:
        raise ValueError(f"--labels: {len(classes)} for {rows} rows; pass at most one for each")
    if classes is None and guidance_scale not in (None, 1):
        raise ValueError(f"--guidance-scale: {guidance_scale!r} without --labels to guide towards; pass both")
    return classes


@app.command()
def invert(
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE", help="Anything that Pillow opens.")],
    model: Model = None,
    variant: Variant = None,
    steps: Steps = None,
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

    classes = _check_strip(len(pictures), steps, guidance_scale, labels, batch_size, out)
    with naming("path", "PICTURE"):
        opened = [open_picture(path) for path in pictures]
    if out.exists() and any(os.path.samefile(out, path) for path in pictures):
        raise ValueError(f"--out: {str(out)!r} is one of the pictures; pass another path")
    target = pick_device(device)
    job = _Job.plan(load_model(model, variant), target, out, as_json, len(pictures), classes, steps, guidance_scale)
    if hasattr(job.pipeline, "vqvae"):
        raise ValueError(
            f"--model: {type(job.pipeline).__name__} samples latents, which pictures are not; pass a model of pixels"
        )
    headings = ("original", "x_T", "reconstruction")
    layout = {"labels": [k + 1 for k in range(len(pictures)) for _ in headings], "columns": 3, "headings": headings}
    job.check_grid(3 * len(pictures), layout)

    import torch

    start = time.perf_counter()
    count, progress = batch_size or job.default_batch_size(), job.shows_progress()
    originals = torch.stack([picture_tensor(image, job.shape) for image in opened])
    tiles = []
    for first in range(0, len(originals), count):
        x0 = originals[first : first + count]
        kwargs = job.class_kwargs(job.labels and job.labels[first : first + count])
        with job.naming_memory("--batch-size", count):
            x = job.sampler.invert(x0, progress=progress, **kwargs)
            reconstruction = job.sampler(x, progress=progress, **kwargs)
        assert isinstance(reconstruction, torch.Tensor)
        tiles.append(torch.stack([x0, x.cpu() / _SHOWN_DEVIATIONS, reconstruction.cpu()], dim=1))
    rows = torch.cat(tiles)
    errors = ((rows[:, 2] - rows[:, 0]) / 2).square().flatten(1).mean(1).tolist()
    seconds = time.perf_counter() - start
    job.save(rows.flatten(0, 1), layout)
    paths = [str(path) for path in pictures]
    lines = [f"{k}: {path!r}: reconstruction error {errors[k - 1]:.2g}" for k, path in enumerate(paths, start=1)]
    steps = job.sampler.num_inference_steps
    lines.append(f"{str(out)!r}: {len(paths)} pictures, {steps} steps each way on {job.sampler.device}")
    job.tell(lines, seconds, pictures=paths, errors=errors, steps=steps)


@app.command()
def interpolate(
    model: Model = None,
    variant: Variant = None,
    seeds: Annotated[str, integers(help='Pairs such as "1,2,3,4": a row from 1 to 2, ...')] = "0,1",
    num: Annotated[int, integer(help="Images in a row, both ends included.")] = 10,
    steps: Steps = None,
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
        raise ValueError(f"--seeds: {seeds!r} has {len(ends)}; pass two for each row")
    pairs = list(zip(ends[::2], ends[1::2], strict=True))
    require_int("--num", num, 2, _MOST_IMAGES // len(pairs))
    classes = _check_strip(len(pairs), steps, guidance_scale, labels, None, out)
    target = pick_device(device)
    job = _Job.plan(load_model(model, variant), target, out, as_json, len(pairs), classes, steps, guidance_scale)
    names = [f"{a}, {b}" for a, b in pairs]
    if classes is not None:
        names = [f"{name}: {label}" for name, label in zip(names, job.labels or (), strict=True)]
    layout = {
        "labels": [name for name in names for _ in range(num)],
        "columns": num,
        "headings": [f"{k / (num - 1):.2g}" for k in range(num)],
    }
    job.check_grid(num * len(pairs), layout)

    import torch

    start = time.perf_counter()
    rows = []
    for row, (a, b) in enumerate(pairs):
        kwargs = job.class_kwargs(job.labels and [job.labels[row]] * num)
        with job.naming_memory("--num", num):
            rows.append(job.decode(job.sampler.interpolate(a, b, num, progress=job.shows_progress(), **kwargs)))
    seconds = time.perf_counter() - start
    job.save(torch.cat(rows), layout)
    steps = job.sampler.num_inference_steps
    line = f"{str(out)!r}: {len(pairs)} rows of {num} images, {steps} steps on {job.sampler.device}"
    job.tell([line], seconds, seeds=pairs, num=num, steps=steps)


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
    import torch

    versions: dict[str, str | None] = {"fastddim": fastddim.__version__, "python": platform.python_version()}
    # A package's builds have names of their own, such as onnxruntime-gpu.
    builds = importlib.metadata.packages_distributions()
    for package in _PACKAGES:
        versions[package] = importlib.metadata.version(builds[package][0]) if package in builds else None
    # Names its build too, as in 2.11.0+cu130.
    versions["torch"] = torch.__version__
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
    gpu = "" if has_gpu else "needs a CUDA device"
    needs = {
        "reference": [],
        "compiled": [_missing_compiler()],
        "triton": [_missing("triton", "pip install triton"), "" if has_gpu else "needs a CUDA or HIP device"],
        "onnxruntime": [_missing("onnxruntime", "pip install fastddim[onnx]")],
        "tensorrt": [_missing("tensorrt", "pip install fastddim[tensorrt]"), gpu],
        "tensorrt_rtx": [
            _missing("tensorrt_rtx", "pip install fastddim[rtx]"),
            gpu and f"{gpu}; builds engines without",
        ],
    }
    return {
        name: {"usable": not any(reasons), "reason": "; ".join(filter(None, reasons)) or None}
        for name, reasons in needs.items()
    }


def _missing_compiler() -> str:
    from fastddim.compiled import CompilerMissingError
    from fastddim.compiled.code import require_compiler

    try:
        require_compiler()
    except CompilerMissingError:
        return "a C++ compiler is not installed (apt-get install g++)"
    return ""


def _missing(package: str, remedy: str) -> str:
    return "" if importlib.util.find_spec(package) else f"{package} is not installed ({remedy})"
