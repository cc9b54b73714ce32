"""`fastddim run` and `fastddim verify`: what is done with a bundle."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from fastddim.cli_options import (
    DEFAULT_GUIDANCE,
    Json,
    Variant,
    check_classes,
    choice,
    integer,
    integers,
    naming,
    number,
    parse_integers,
    with_options,
)
from fastddim.config import require_int
from fastddim.export.command_options import ComparisonFlags, Model, load_model, report

if TYPE_CHECKING:
    from fastddim.export.bundle import Bundle
    from fastddim.export.runtime import Runtime

app = typer.Typer()


@app.command()
@with_options
def run(
    *,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `fastddim export` wrote.")],
    num_images: Annotated[int | None, integer(help="How many. Default: one for each label or prompt, else 10.")] = None,
    labels: Annotated[str | None, integers(help='Classes such as "0,1,2", repeated in turn.')] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What to show, for text-to-image bundles; may repeat.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the pictures should not show. Default: empty.")
    ] = None,
    num_inference_steps: Annotated[int | None, integer("--steps", help="Model calls. Default: the bundle's.")] = None,
    eta: Annotated[float | None, number(help="0 is DDIM, 1 is DDPM. Default: the bundle's.")] = None,
    guidance_scale: Annotated[
        float | None, number(help="For bundles with guidance. Default: 2, of cfg++ 0.6; with prompts 7.5.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HEIGHTxWIDTH", help="In pixels, for bundles of any size.")
    ] = None,
    seeds: Annotated[int, integer("--seed", help="The first image's seed; the others count up.")] = 0,
    providers: Annotated[
        str | None, typer.Option(metavar="NAMES", help="ONNX: cpu, cuda, tensorrt. Default: cuda where it is there.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="TensorRT: the ONNX bundle to take an engine's weights from.")
    ] = None,
    check_finite: Annotated[
        bool, typer.Option("--check-finite", help="Report the step at which NaN or infinities appear.")
    ] = False,
    observations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Robot policies: arrays by name, .npz; with noise or --seed.")
    ] = None,
    method: Annotated[str | None, choice(help="Robot policies: such as ddim. Default: the bundle's.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: samples.png, of a robot policy actions.npz.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Sample from a bundle with what runs it.

    It writes one picture, or a robot's actions. An ONNX bundle needs no torch.
    """
    from fastddim.export import get_runtime, open_bundle
    from fastddim.pictures import GridLayout, check_picture, make_grid, save_picture

    opened = open_bundle(bundle)
    runtime = get_runtime(opened.runtime)
    if "policy" in opened.manifest:
        pictures: dict[str, Any] = {"--num-images": num_images, "--labels": labels, "--prompt": prompt, "--size": size,
                    "--negative-prompt": negative_prompt, "--guidance-scale": guidance_scale}  # fmt: skip
        for name, value in pictures.items():
            if value:
                raise ValueError(f"{name}: {value!r}, but this bundle is a robot policy's; leave it out")
        settings = _settings(runtime.load(runtime.sampler or ""), opened.runtime, check_finite, providers, weights)
        steps = {"num_inference_steps": num_inference_steps, "eta": eta, "method": method}
        _run_policy(opened, observations, out or Path("actions.npz"), seeds, steps, settings, as_json)
        return
    for name, given in (("--observations", observations), ("--method", method)):
        if given is not None:
            raise ValueError(f"{name}: '{given}', but this bundle is no robot policy's; leave it out")
    out = Path("samples.png") if out is None else out
    cycle: Sequence[int] | Sequence[str] | None
    if opened.components:
        _require_pipeline(opened, runtime)
        if labels is not None or not prompt:
            raise ValueError("--prompt: this bundle makes pictures of texts; pass one or more, and no --labels")
        cycle, upscale = prompt, opened.components["vae_decoder"]["upscale"]
    else:
        if prompt or negative_prompt is not None:
            raise ValueError("--prompt, --negative-prompt: this bundle has no text encoder; leave them out")
        cycle, upscale = _pick_labels(labels, opened.manifest), 1
    num_images = (len(cycle) if cycle else 10) if num_images is None else num_images
    require_int("--num-images", num_images, 1)
    names = None if cycle is None else [cycle[k % len(cycle)] for k in range(num_images)]
    pixels = None if size is None else _parse_size(size)
    height, width = pixels or [side * upscale for side in opened.manifest["sample"]["shape"][-2:]]
    # Texts are too long for a picture's margin.
    shown = None if opened.components else names
    with naming("path", "--out"):
        check_picture(out, GridLayout.plan(num_images, height, width, shown).size)
    path = runtime.pipeline if opened.components else runtime.sampler
    if path is None:
        raise ValueError(f"bundle: runtime {opened.runtime!r} has no sampler in Python")
    loaded = runtime.load(path)
    draw = loaded(opened, **_settings(loaded, opened.runtime, check_finite, providers, weights))
    options: dict[str, Any] = {"seeds": seeds, "num_inference_steps": num_inference_steps, "eta": eta, "size": pixels}
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    inputs: list[Any]
    if opened.components:
        sampler, inputs = draw.sampler, [draw.tokenize(names), None]
        if negative_prompt is not None or not draw.zeros_for_empty_prompt:
            inputs[1] = draw.tokenize([negative_prompt or ""] * num_images)
    else:
        sampler, inputs = draw, [num_images]
        if names is not None:
            options["class_labels"] = np.array(names, dtype=np.int64)
        if opened.manifest["sampling"]["guided"]:
            method = opened.manifest["sampling"].get("guidance_method", "cfg")
            options.setdefault("guidance_scale", DEFAULT_GUIDANCE[method])
    start = time.perf_counter()
    samples = draw(*inputs, **options)
    seconds = time.perf_counter() - start
    picture = make_grid(samples, labels=shown)
    with naming("path", "--out"):
        save_picture(picture, out)
    device = sampler.device()
    if as_json:
        typer.echo(json.dumps({"path": str(out), "num_images": num_images, "seconds": seconds, "provider": device}))
    else:
        typer.echo(f"{str(out)!r}: {num_images} images, {seconds / num_images:.3g} s per image on {device}")


def _settings(
    loaded: Any, runtime: str, check_finite: bool, providers: str | None, weights: Path | None
) -> dict[str, Any]:
    """The options of a runtime's sampler."""
    settings: dict[str, Any] = {"check_finite": check_finite}
    for name, given in (("providers", providers), ("weights", weights)):
        if given is None:
            continue
        if name not in inspect.signature(loaded).parameters:
            raise ValueError(f"--{name}: '{given}', but this bundle is of runtime {runtime!r}; leave it out")
        settings[name] = given.split(",") if isinstance(given, str) else given
    return settings


def _run_policy(
    bundle: Bundle,
    observations: Path | None,
    out: Path,
    seeds: int,
    steps: Mapping[str, Any],
    settings: Mapping[str, Any],
    as_json: bool,
) -> None:
    """The actions for observations in a file."""
    from fastddim.export import PolicySampler
    from fastddim.files import check_writable, write_whole

    names = ", ".join(bundle.manifest["policy"]["observations"])
    if observations is None:
        raise ValueError(f"--observations: missing; pass a .npz file with {names}")
    if out.suffix != ".npz":
        raise ValueError(f"--out: {str(out)!r}; pass a name that ends in .npz")
    check_writable(out, "--out")
    try:
        with np.load(observations, allow_pickle=False) as file:
            arrays = dict(file.items())
    except FileNotFoundError:
        raise ValueError(f"--observations: {str(observations)!r} is not there; pass a .npz file with {names}") from None
    except Exception as error:  # numpy and zipfile each raise their own types
        raise ValueError(f"--observations: {str(observations)!r} is no .npz file of arrays: {error}") from None
    given = {name: arrays.pop(name) for name in ("noise", "known", "mask") if name in arrays}
    draw = PolicySampler(bundle, **settings)
    start = time.perf_counter()
    chunk = draw(arrays, seeds=seeds, **given, **steps)
    seconds = time.perf_counter() - start
    results: dict[str, Any] = {name: np.asarray(value) for name, value in chunk._asdict().items()}
    write_whole(out, lambda file: np.savez(file, **results), "--out")
    shape = list(results["actions"].shape)
    if as_json:
        device = draw.sampler.device()
        typer.echo(json.dumps({"path": str(out), "actions": shape, "seconds": seconds, "provider": device}))
    else:
        typer.echo(f"{str(out)!r}: actions {shape}, {1e3 * seconds:.3g} ms on {draw.sampler.device()}")


def _pick_labels(labels: str | None, manifest: Mapping[str, Any]) -> list[int] | None:
    """The classes to repeat in turn; None for a model without."""
    shape = manifest["sample"]["shape"]
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"bundle: its samples are {shape}, no pictures; use fastddim.export.open_sampler")
    null = manifest["sampling"]["null_values"].get("class_labels")
    classes = None if labels is None else parse_integers(labels, "--labels")
    check_classes(classes, null, "bundle")
    return list(range(max(null, 1))) if classes is None and null is not None else classes


def _parse_size(text: str) -> tuple[int, int]:
    height, by, width = text.partition("x")
    if not (by and height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--size: {text!r}; pass height and width in pixels, such as 512x768")
    return int(height), int(width)


@app.command()
@with_options
def verify(
    *,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `fastddim export` wrote.")],
    model: Model = None,
    variant: Variant = None,
    comparison: ComparisonFlags,
    as_json: Json = False,
) -> None:
    """Compare a bundle with the model that it was exported from."""
    from fastddim.export import get_runtime, open_bundle, verify_bundle, verify_pipeline
    from fastddim.export.models import denoiser_of
    from fastddim.policies import Policy

    compared: dict[str, Any] = {"steps": comparison.steps(), "tolerance": comparison.tolerance}
    opened = open_bundle(bundle)
    if opened.components:
        _require_pipeline(opened, get_runtime(opened.runtime))
    start = time.perf_counter()
    pipeline = load_model(model, variant)
    if opened.components:
        parity = verify_pipeline(opened, pipeline, **compared)
    else:
        parity = verify_bundle(opened, pipeline if isinstance(pipeline, Policy) else denoiser_of(pipeline), **compared)
    report(opened, start, opened.kind, as_json, parity=parity)


def _require_pipeline(bundle: Bundle, runtime: Runtime) -> None:
    if runtime.pipeline is None:
        raise ValueError(
            f"bundle: {str(bundle.path)!r} is a whole pipeline for {runtime.name!r}, which has nothing to run it here; pass"
            " the ONNX bundle that it was built from"
        )
