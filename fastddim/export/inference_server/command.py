"""`fastddim export repository`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fastddim.cli_options import Json, choice, integer, integers, parse_integers, with_options

_IMAGE = "nvcr.io/nvidia/tritonserver:25.06-py3"


@dataclass(frozen=True, slots=True)
class ServerFlags:
    """How the server runs the model: fields of `InferenceServerOptions`."""

    name: Annotated[str | None, choice(help="The model's. Default: the bundle's folder.")] = None
    max_batch_size: Annotated[int, integer(help="Samples that the server joins; 0: none.")] = 8
    preferred_batch_sizes: Annotated[str | None, integers(help="Batches that wait for no more.")] = None
    max_queue_delay_microseconds: Annotated[
        int, integer("--queue-delay", metavar="MICROSECONDS", help="How long to wait for others.")
    ] = 0
    queue_timeout_microseconds: Annotated[
        int, integer("--queue-timeout", metavar="MICROSECONDS", help="The longest wait; 0: any.")
    ] = 0
    timeout_action: Annotated[str, choice(help="After that: reject or delay.")] = "reject"
    max_queue_size: Annotated[int, integer("--queue-size", help="Reject requests beyond it; 0: none.")] = 0
    instances: Annotated[int, integer(help="On each GPU, or on the CPU.")] = 1
    kind: Annotated[str, choice("--instance-kind", help="Where they run: auto, cpu or gpu.")] = "auto"
    gpus: Annotated[str | None, integers(help="GPUs to use. Default: all.")] = None
    warmup_batch_sizes: Annotated[str | None, integers("--warmup", help="Batch sizes to run before it is ready.")] = (
        None
    )
    parameters: Annotated[
        list[str] | None,
        typer.Option("--backend-parameter", metavar="KEY=VALUE", help="Such as intra_op_thread_count=4; may repeat."),
    ] = None
    accelerator: Annotated[str | None, choice(help="ONNX Runtime's: tensorrt, cuda or openvino.")] = None
    accelerator_parameters: Annotated[
        list[str] | None,
        typer.Option("--accelerator-parameter", metavar="KEY=VALUE", help="Such as precision_mode=FP16; may repeat."),
    ] = None
    versions: Annotated[
        str,
        typer.Option(
            "--model-versions", metavar="VERSIONS", help='To load: the latest so many, "all", or such as "1,3,".'
        ),
    ] = "1"


@with_options
def repository_command(
    *,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder with an ONNX graph or an engine.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The repository; its other models stay.")],
    server: ServerFlags,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Add a bundle to a model repository.

    The repository is that of NVIDIA's inference server, docs/serving.md.
    """
    from fastddim.export.inference_server.options import InferenceServerOptions
    from fastddim.export.inference_server.repository import write_repository

    start = time.perf_counter()
    parsed = {
        "preferred_batch_sizes": _integers(server.preferred_batch_sizes, "--preferred-batch-sizes"),
        "gpus": _integers(server.gpus, "--gpus"),
        "warmup_batch_sizes": _integers(server.warmup_batch_sizes, "--warmup"),
        "parameters": _pairs(server.parameters, "--backend-parameter"),
        "accelerator_parameters": _pairs(server.accelerator_parameters, "--accelerator-parameter"),
        "versions": _versions(server.versions),
    }
    options = InferenceServerOptions(**dataclasses.asdict(server) | parsed)
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
