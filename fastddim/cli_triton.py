"""The options of `fastddim export --triton-repository`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastddim.cli_options import integer, naming, parse_integers

if TYPE_CHECKING:
    from fastddim.export import ExportOptions, TritonOptions

_OPTIONS = {
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
_PANEL = "NVIDIA Triton Inference Server"

Repository = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Add the bundle to this model repository too.", rich_help_panel=_PANEL),
]
Name = Annotated[str | None, typer.Option(help="Of the model. Default: the bundle's folder.", rich_help_panel=_PANEL)]
MaxBatchSize = Annotated[
    int,
    typer.Option(
        parser=integer, metavar="INTEGER", help="Samples that the server joins; 0: no batching.", rich_help_panel=_PANEL
    ),
]
PreferredBatchSizes = Annotated[
    str | None,
    typer.Option(metavar="INTEGERS", help="Batches that wait for no other request.", rich_help_panel=_PANEL),
]
QueueDelay = Annotated[
    int,
    typer.Option(
        parser=integer, metavar="MICROSECONDS", help="How long to wait for others to join.", rich_help_panel=_PANEL
    ),
]
QueueTimeout = Annotated[
    int,
    typer.Option(
        parser=integer, metavar="MICROSECONDS", help="How long a request may wait; 0: any.", rich_help_panel=_PANEL
    ),
]
TimeoutAction = Annotated[
    str, typer.Option(help="Of requests that waited longer: reject or delay.", rich_help_panel=_PANEL)
]
QueueSize = Annotated[
    int,
    typer.Option(
        parser=integer, metavar="INTEGER", help="Reject requests beyond so many; 0: none.", rich_help_panel=_PANEL
    ),
]
Instances = Annotated[
    int,
    typer.Option(
        parser=integer, metavar="INTEGER", help="Of the model, on each GPU or the CPU.", rich_help_panel=_PANEL
    ),
]
Kind = Annotated[str, typer.Option(help="Where instances run: auto, cpu or gpu.", rich_help_panel=_PANEL)]
Gpus = Annotated[str | None, typer.Option(metavar="INTEGERS", help="Default: all.", rich_help_panel=_PANEL)]
Warmup = Annotated[
    str | None, typer.Option(metavar="INTEGERS", help="Batch sizes to run before it is ready.", rich_help_panel=_PANEL)
]
Parameter = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Such as intra_op_thread_count=4; may repeat.", rich_help_panel=_PANEL),
]
Accelerator = Annotated[
    str | None, typer.Option(help="Of ONNX Runtime: tensorrt, cuda or openvino.", rich_help_panel=_PANEL)
]
AcceleratorParameter = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Such as precision_mode=FP16; may repeat.", rich_help_panel=_PANEL),
]
Versions = Annotated[
    str, typer.Option(help='To load: how many of the latest, "all", or a list such as "1,3,".', rich_help_panel=_PANEL)
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

    with _naming_options():
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
    options: ExportOptions, runtime: str, bundle_name: str, repository: Path | None, served: TritonOptions, force: bool
) -> None:
    """Whether the server will take what is to be exported, before the work.

    Raises:
        ValueError: a file that it cannot run or batch; OSError: a repository that cannot be written to.
    """
    from fastddim.export.triton_repository import BACKENDS, check_model_name, check_repository

    if runtime not in BACKENDS:
        raise ValueError(f"--format: {runtime!r}, which the server has no backend for; pass {' or '.join(BACKENDS)}")
    if served.max_batch_size and options.graph == "loop" and not options.per_sample_steps:
        raise ValueError(
            f"--max-batch-size: {served.max_batch_size}, but the requests of a batch may differ in their steps; pass"
            " --bake-schedule --per-sample-steps, and --seeded with --noise; or --max-batch-size 0"
        )
    assert repository is not None
    with _naming_options():
        name = check_model_name(bundle_name if served.name is None else served.name)
    with naming("out", "--triton-repository"):
        check_repository(repository, name, force)


def server_line(repository: Path) -> str:
    """The shell's line that serves a repository."""
    return (
        f"docker run --rm -p8000:8000 -p8001:8001 -p8002:8002 -v {repository}:/models {_IMAGE}"
        " tritonserver --model-repository=/models --disable-auto-complete-config"
    )


@contextlib.contextmanager
def _naming_options() -> Iterator[None]:
    """Let an error of `TritonOptions` name the option that the user typed."""
    try:
        yield
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        raise ValueError(f"{_OPTIONS.get(name, name)}{colon}{rest}") from error


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
