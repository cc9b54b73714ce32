"""The options of `fastddim export --triton-repository`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastddim.cli_options import integer, naming, naming_options, parse_integers

if TYPE_CHECKING:
    from fastddim.export import Bundle, ExportOptions, TensorRTOptions, TritonOptions

OPTIONS = {
    "name": "--triton-name",
    "max_batch_size": "--max-batch-size",
    "preferred_batch_sizes": "--preferred-batch-sizes",
    "max_queue_delay_microseconds": "--queue-delay",
    "queue_timeout_microseconds": "--queue-timeout",
    "timeout_action": "--timeout-action",
    "max_queue_size": "--queue-size",
    "instances": "--instances",
    "kind": "--instance-kind",
    "gpus": "--gpus",
    "warmup_batch_sizes": "--warmup",
    "parameters": "--backend-parameter",
    "accelerator": "--accelerator",
    "accelerator_parameters": "--accelerator-parameter",
    "versions": "--model-versions",
}
_IMAGE = "nvcr.io/nvidia/tritonserver:25.06-py3"
PANEL = "NVIDIA Triton Inference Server"

Repository = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Add the bundle to this model repository too.", rich_help_panel=PANEL),
]
Name = Annotated[str | None, typer.Option(help="Of the model. Default: the bundle's folder.", rich_help_panel=PANEL)]
MaxBatchSize = Annotated[
    int,
    typer.Option(
        parser=integer, metavar="INTEGER", help="Samples that the server joins; 0: no batching.", rich_help_panel=PANEL
    ),
]
PreferredBatchSizes = Annotated[
    str | None,
    typer.Option(metavar="INTEGERS", help="Batches that wait for no other request.", rich_help_panel=PANEL),
]
QueueDelay = Annotated[
    int,
    typer.Option(
        parser=integer, metavar="MICROSECONDS", help="How long to wait for others to join.", rich_help_panel=PANEL
    ),
]
QueueTimeout = Annotated[
    int,
    typer.Option(
        parser=integer, metavar="MICROSECONDS", help="How long a request may wait; 0: any.", rich_help_panel=PANEL
    ),
]
TimeoutAction = Annotated[
    str, typer.Option(help="Of requests that waited longer: reject or delay.", rich_help_panel=PANEL)
]
QueueSize = Annotated[
    int,
    typer.Option(
        parser=integer, metavar="INTEGER", help="Reject requests beyond so many; 0: none.", rich_help_panel=PANEL
    ),
]
Instances = Annotated[
    int,
    typer.Option(
        parser=integer, metavar="INTEGER", help="Of the model, on each GPU or the CPU.", rich_help_panel=PANEL
    ),
]
Kind = Annotated[str, typer.Option(help="Where instances run: auto, cpu or gpu.", rich_help_panel=PANEL)]
Gpus = Annotated[str | None, typer.Option(metavar="INTEGERS", help="Default: all.", rich_help_panel=PANEL)]
Warmup = Annotated[
    str | None, typer.Option(metavar="INTEGERS", help="Batch sizes to run before it is ready.", rich_help_panel=PANEL)
]
Parameter = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Such as intra_op_thread_count=4; may repeat.", rich_help_panel=PANEL),
]
Accelerator = Annotated[
    str | None, typer.Option(help="Of ONNX Runtime: tensorrt, cuda or openvino.", rich_help_panel=PANEL)
]
AcceleratorParameter = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Such as precision_mode=FP16; may repeat.", rich_help_panel=PANEL),
]
Versions = Annotated[
    str, typer.Option(help='To load: how many of the latest, "all", or a list such as "1,3,".', rich_help_panel=PANEL)
]


def triton_options(
    *,
    name: str | None,
    max_batch_size: int,
    preferred_batch_sizes: str | None,
    queue_delay: int,
    queue_timeout: int,
    timeout_action: str,
    queue_size: int,
    instances: int,
    kind: str,
    gpus: str | None,
    warmup: str | None,
    parameter: Sequence[str] | None,
    accelerator: str | None,
    accelerator_parameter: Sequence[str] | None,
    versions: str,
) -> TritonOptions:
    """From the options' texts.

    Raises:
        ValueError: texts that are none of theirs, or options that exclude each other.
    """
    from fastddim.export import TritonOptions

    with naming_options(OPTIONS):
        return TritonOptions(
            name=name,
            max_batch_size=max_batch_size,
            preferred_batch_sizes=_integers(preferred_batch_sizes, "--preferred-batch-sizes"),
            max_queue_delay_microseconds=queue_delay,
            queue_timeout_microseconds=queue_timeout,
            timeout_action=timeout_action,
            max_queue_size=queue_size,
            instances=instances,
            kind=kind,
            gpus=_integers(gpus, "--gpus"),
            warmup_batch_sizes=_integers(warmup, "--warmup"),
            parameters=_pairs(parameter, "--backend-parameter"),
            accelerator=accelerator,
            accelerator_parameters=_pairs(accelerator_parameter, "--accelerator-parameter"),
            versions=_versions(versions),
        )


def check_export(
    options: ExportOptions,
    runtime: str,
    engine: TensorRTOptions,
    bundle_name: str,
    repository: Path,
    served: TritonOptions,
    force: bool,
) -> None:
    """Whether the server will take what is to be exported, before the work.

    Raises:
        ValueError: a file that it cannot run or batch; ImportError: no TensorRT; OSError: a repository that cannot be
            written to.
    """
    from fastddim.export.inference_server.repository import BACKENDS, require_servable

    if runtime not in BACKENDS:
        raise ValueError(f"--format: {runtime!r}, which the server has no backend for; pass {' or '.join(BACKENDS)}")
    if runtime == "tensorrt":
        if options.bake_schedule:
            raise ValueError(
                "--bake-schedule: with --format tensorrt, whose number of steps the server cannot pass; leave it out,"
                " with --graph step or --max-batch-size 0"
            )
        with naming_options(OPTIONS):
            require_servable(_engine(engine, [{"batch": profile.batch} for profile in engine.profiles]), served)
    if served.max_batch_size and options.graph == "loop" and not options.per_sample_steps:
        batching = (
            "--graph step" if runtime == "tensorrt" else "--bake-schedule --per-sample-steps, and --seeded with --noise"
        )
        raise ValueError(
            f"--max-batch-size: {served.max_batch_size}, but the requests of a batch may differ in their steps; pass"
            f" {batching}; or --max-batch-size 0"
        )
    _check_place(bundle_name, repository, served, force)


def check_engine(
    graphs: Bundle, engine: TensorRTOptions, bundle_name: str, repository: Path, served: TritonOptions, force: bool
) -> None:
    """Whether the server will take the engine of an ONNX bundle, before it is built. Raises as `check_export` does."""
    from fastddim.export import Bundle
    from fastddim.export.bundle import require_runtime
    from fastddim.export.inference_server.repository import model_config

    require_runtime(graphs, "onnx")
    profiles = [profile.ranges(graphs.manifest) for profile in engine.profiles]
    built = Bundle(graphs.path, {**graphs.manifest, "runtime": "tensorrt", "engine": _engine(engine, profiles)})
    with naming_options(OPTIONS):
        model_config(built, bundle_name, served)
    _check_place(bundle_name, repository, served, force)


def _engine(options: TensorRTOptions, profiles: Sequence[Any]) -> dict[str, Any]:
    """What a manifest will say of an engine, as far as the server asks."""
    from fastddim.export.tensorrt.library import load_library

    flavour = load_library(options.flavour).flavour
    return {"flavour": flavour, "options": options.identity(), "profiles": profiles}


def _check_place(bundle_name: str, repository: Path, served: TritonOptions, force: bool) -> None:
    from fastddim.export.inference_server.repository import check_model_name, check_repository

    with naming_options(OPTIONS):
        name = check_model_name(bundle_name if served.name is None else served.name)
    with naming("out", "--triton-repository"):
        check_repository(repository, name, force)


def server_line(repository: Path) -> str:
    """The shell's line that serves a repository."""
    return (
        f"docker run --rm -p8000:8000 -p8001:8001 -p8002:8002 -v {repository}:/models {_IMAGE}"
        " tritonserver --model-repository=/models --disable-auto-complete-config"
    )


def _integers(text: str | None, option: str) -> tuple[int, ...]:
    return () if text is None else tuple(parse_integers(text, option))


def _pairs(texts: Sequence[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        key, separator, value = text.partition("=")
        if not (key and separator):
            raise ValueError(f"{option}: {text!r}; pass KEY=VALUE")
        pairs[key] = value
    return pairs


def _versions(text: str) -> int | str | tuple[int, ...]:
    if text == "all":
        return text
    listed = parse_integers(text.removesuffix(","), "--model-versions")
    return tuple(listed) if "," in text else listed[0]
