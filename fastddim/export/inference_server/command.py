"""`fastddim export repository`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fastddim.cli_options import Json, integer, naming_options, parse_integers

_IMAGE = "nvcr.io/nvidia/tritonserver:25.06-py3"
_RENAMED = {
    "out": "--out",
    "max_queue_delay_microseconds": "--queue-delay",
    "queue_timeout_microseconds": "--queue-timeout",
    "max_queue_size": "--queue-size",
    "kind": "--instance-kind",
    "warmup_batch_sizes": "--warmup",
    "parameters": "--backend-parameter",
    "accelerator_parameters": "--accelerator-parameter",
    "versions": "--model-versions",
}


def repository_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder with an ONNX graph or an engine.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The repository; its other models stay.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The model's. Default: the bundle's folder.")] = None,
    max_batch_size: Annotated[
        int, typer.Option(parser=integer, metavar="INTEGER", help="Samples that the server joins; 0: none.")
    ] = 8,
    preferred_batch_sizes: Annotated[
        str | None, typer.Option(metavar="INTEGERS", help="Batches that wait for no more.")
    ] = None,
    queue_delay: Annotated[
        int, typer.Option(parser=integer, metavar="MICROSECONDS", help="How long to wait for others.")
    ] = 0,
    queue_timeout: Annotated[
        int, typer.Option(parser=integer, metavar="MICROSECONDS", help="The longest wait; 0: any.")
    ] = 0,
    timeout_action: Annotated[str, typer.Option(metavar="NAME", help="After that: reject or delay.")] = "reject",
    queue_size: Annotated[
        int, typer.Option(parser=integer, metavar="INTEGER", help="Reject requests beyond it; 0: none.")
    ] = 0,
    instances: Annotated[int, typer.Option(parser=integer, metavar="INTEGER", help="On each GPU, or on the CPU.")] = 1,
    instance_kind: Annotated[str, typer.Option(metavar="NAME", help="Where they run: auto, cpu or gpu.")] = "auto",
    gpus: Annotated[str | None, typer.Option(metavar="INTEGERS", help="GPUs to use. Default: all.")] = None,
    warmup: Annotated[
        str | None, typer.Option(metavar="INTEGERS", help="Batch sizes to run before it is ready.")
    ] = None,
    backend_parameter: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Such as intra_op_thread_count=4; may repeat."),
    ] = None,
    accelerator: Annotated[
        str | None, typer.Option(metavar="NAME", help="ONNX Runtime's: tensorrt, cuda or openvino.")
    ] = None,
    accelerator_parameter: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Such as precision_mode=FP16; may repeat."),
    ] = None,
    model_versions: Annotated[
        str, typer.Option(metavar="VERSIONS", help='To load: the latest so many, "all", or such as "1,3,".')
    ] = "1",
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Add a bundle to a model repository.

    The repository is that of NVIDIA's inference server, docs/serving.md.
    """
    from fastddim.export.inference_server.options import InferenceServerOptions
    from fastddim.export.inference_server.repository import write_repository

    start = time.perf_counter()
    with naming_options(InferenceServerOptions, **_RENAMED):
        options = InferenceServerOptions(
            name=name,
            max_batch_size=max_batch_size,
            preferred_batch_sizes=_integers(preferred_batch_sizes, "--preferred-batch-sizes"),
            max_queue_delay_microseconds=queue_delay,
            queue_timeout_microseconds=queue_timeout,
            timeout_action=timeout_action,
            max_queue_size=queue_size,
            instances=instances,
            kind=instance_kind,
            gpus=_integers(gpus, "--gpus"),
            warmup_batch_sizes=_integers(warmup, "--warmup"),
            parameters=_pairs(backend_parameter, "--backend-parameter"),
            accelerator=accelerator,
            accelerator_parameters=_pairs(accelerator_parameter, "--accelerator-parameter"),
            versions=_versions(model_versions),
        )
        model = write_repository(bundle, out, options, force=force)
    if as_json:
        typer.echo(json.dumps({"path": str(model), "bundle": str(bundle), "seconds": time.perf_counter() - start}))
        return
    typer.echo(
        f"{str(model)!r}: start the server with docker run --rm -p8000:8000 -p8001:8001 -p8002:8002"
        f" -v {model.parent}:/models {_IMAGE} tritonserver --model-repository=/models --disable-auto-complete-config"
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
