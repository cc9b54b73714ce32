"""Model repositories for NVIDIA's inference server (Triton Inference Server, not the language Triton) from bundles.

No torch here, as in `bundle.py`. The fields are those of the server's `model_config.proto`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastddim.export.bundle import FORMAT, Bundle, open_bundle, write_folder
from fastddim.export.inference_server.options import ACCELERATORS, VERSION, InferenceServerOptions, check_model_name
from fastddim.export.runtime import get_runtime, runtimes

CONFIG_FILE = "config.pbtxt"
NOTE_FILE = "README.md"

_DATA_TYPES = {
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign}int{bits}".upper() for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
}
# More than a shell's line should hold.
_LONGEST_EXAMPLE = 16


def write_repository(
    bundle: str | Path | Bundle, out: str | Path, options: InferenceServerOptions | None = None, *, force: bool = False
) -> Path:
    """Add a bundle's model to a model repository, which is created where there is none.

    Args:
        bundle: a folder that `fastddim export` wrote, or an opened bundle.
        out: the repository; its other models are left as they are.
        options: how the server runs the model.
        force: replace a model of the same name.

    Returns:
        The model's folder: `config.pbtxt`, `1/` with the model, and a note with its inputs.

    Raises:
        BundleError: a damaged bundle; ValueError: one that the server cannot run in this way.
        FileExistsError, NotADirectoryError, PermissionError: `out`.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, check_hashes=False)
    options = InferenceServerOptions() if options is None else options
    name = check_model_name(opened.path.resolve().name) if options.name is None else options.name
    repository = check_repository(out, name, force)
    config = model_config(opened, name, options)
    if opened is not bundle:
        # Reading all of the files comes after all other checks.
        open_bundle(opened.path)
    _, file = _backend(opened)
    model = str(opened.manifest["model"])

    def fill(folder: Path) -> None:
        version = folder / str(VERSION)
        version.mkdir()
        shutil.copyfile(opened.model_path, version / file)
        for beside in opened.manifest["files"]:
            # Weights that the graph names, so that they keep their name.
            if beside.startswith(f"{model}."):
                shutil.copyfile(opened.path / beside, version / Path(beside).name)
        (folder / CONFIG_FILE).write_text(to_pbtxt(config), "utf-8")
        (folder / NOTE_FILE).write_text(_note(opened, config), "utf-8")

    created = not repository.exists()
    if created:
        repository.mkdir()
    try:
        # Outside of the repository, which a server may be polling, unless it is a file system of its own.
        outside = os.stat(repository.parent).st_dev == os.stat(repository).st_dev
        outside = outside and os.access(repository.parent, os.W_OK)
        write_folder(repository / name, force, fill, repository.parent if outside else repository)
    except BaseException:
        if created:
            with contextlib.suppress(OSError):
                repository.rmdir()
        raise
    return repository / name


def check_repository(out: str | Path, name: str, force: bool) -> Path:
    """The absolute path of a repository to add a model to, before the work.

    Raises:
        FileExistsError: there is such a model, and `force` is off or it is none; NotADirectoryError, PermissionError.
    """
    repository = Path(out).expanduser().absolute()
    there = repository if repository.exists() else repository.parent
    if not there.is_dir():
        raise NotADirectoryError(f"out: {str(there)!r} is no folder; pass another, or create it first")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"out: {str(there)!r} cannot be written to; pass another folder")
    if (repository / FORMAT.file).exists():
        raise FileExistsError(f"out: {str(repository)!r} is a bundle; pass another folder for the repository")
    model = repository / name
    if model.exists() or model.is_symlink():
        if not force:
            raise FileExistsError(f"out: {str(model)!r} exists; pass another name, or --force to replace it")
        if model.is_symlink() or not (model / CONFIG_FILE).is_file():
            raise FileExistsError(
                f"out: {str(model)!r} is no model, so --force does not replace it; remove it yourself"
            )
    return repository


def model_config(bundle: Bundle, name: str, options: InferenceServerOptions) -> dict[str, Any]:
    """A model's configuration, as `to_pbtxt` takes it; ValueError for a bundle that the server cannot run or batch."""
    runtime, manifest = bundle.runtime, bundle.manifest
    backend, _ = _backend(bundle)
    if bundle.components:
        raise ValueError(
            f"bundle: {str(bundle.path)!r} is a whole pipeline, which is several models; export its sampler alone"
            " (--sampler-only)"
        )
    if bundle.before is not None:
        raise ValueError(
            f"bundle: {str(bundle.path)!r} has a second graph, {bundle.before['model']!r}, and the server runs one file a"
            " model; export it without hoist=True, or with kind='loop'"
        )
    if runtime != "onnx" and (options.parameters or options.accelerator):
        raise ValueError(f"parameters, accelerator: are the ONNX Runtime backend's, and this bundle is {runtime}")
    if runtime == "tensorrt":
        scalars = [item["name"] for item in manifest["inputs"] if not item["shape"]]
        if scalars:
            raise ValueError(
                f"bundle: {scalars[0]!r} shapes an engine's loop, which the server cannot pass; export a table"
            )
        require_servable(manifest["engine"], options)
    batched = options.max_batch_size > 0
    if batched:
        _require_batched(manifest, options.max_batch_size)
    config: dict[str, Any] = {
        "name": name,
        "backend": backend,
        "max_batch_size": options.max_batch_size,
        "input": [_tensor(item, batched) for item in manifest["inputs"]],
        "output": [_tensor(item, batched) for item in manifest["outputs"]],
        "version_policy": _version_policy(options.versions),
        "instance_group": [{"count": options.instances, "kind": _Word(f"KIND_{options.kind.upper()}")}],
    }
    if options.gpus:
        config["instance_group"][0]["gpus"] = list(options.gpus)
    if runtime == "tensorrt":
        # The server takes the first one alone where none is named.
        config["instance_group"][0]["profile"] = [str(index) for index in range(len(manifest["engine"]["profiles"]))]
    if batched:
        config["dynamic_batching"] = {
            "preferred_batch_size": list(options.preferred_batch_sizes),
            "max_queue_delay_microseconds": options.max_queue_delay_microseconds,
            "default_queue_policy": {
                "timeout_action": _Word(options.timeout_action.upper()),
                "default_timeout_microseconds": options.queue_timeout_microseconds,
                "max_queue_size": options.max_queue_size,
            },
        }
    if options.accelerator is not None:
        accelerator = {"name": options.accelerator, "parameters": _entries(options.accelerator_parameters)}
        which = f"{ACCELERATORS[options.accelerator]}_execution_accelerator"
        config["optimization"] = {"execution_accelerators": {which: [accelerator]}}
    config["parameters"] = _entries({key: {"string_value": value} for key, value in options.parameters.items()})
    config["model_warmup"] = [_warmup(manifest, size, batched) for size in options.warmup_batch_sizes]
    return config


def require_servable(engine: Mapping[str, Any], options: InferenceServerOptions) -> None:
    """Check that the server's TensorRT backend loads an engine, described as in a manifest, with these options."""
    if engine["flavour"] != "standard":
        raise ValueError(
            f"flavour: {engine['flavour']!r}, but the server's backend loads the standard TensorRT's engines; build one"
            " with flavour='standard' (--flavour standard)"
        )
    if engine["options"]["strip_plan"]:
        raise ValueError("strip_plan: True, but the server has no weights for such an engine; build one with them")
    if options.kind == "cpu":
        raise ValueError("kind: 'cpu', but engines run on GPUs alone; pass 'gpu' or 'auto'")
    if not options.max_batch_size:
        return
    least = min(profile["batch"][0] for profile in engine["profiles"])
    most = max(profile["batch"][2] for profile in engine["profiles"])
    if least > 1 or most < options.max_batch_size:
        raise ValueError(
            f"max_batch_size: {options.max_batch_size}, but the engine takes batches of {least} to {most}; pass at most"
            f" that, or build one whose profiles take 1 to {options.max_batch_size}"
        )


def to_pbtxt(fields: Mapping[str, Any], indent: str = "") -> str:
    """Protobuf's text format of nested mappings, lists, strings, integers and booleans."""
    lines = []
    for key, value in fields.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key} {{\n{to_pbtxt(value, indent + '  ')}{indent}}}\n")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [to_pbtxt({key: item}, indent) for item in value]
        elif isinstance(value, list):
            # An empty list of anything but numbers is an absent field.
            if value or key in ("dims", "shape"):
                lines.append(f"{indent}{key}: [{', '.join(map(_literal, value))}]\n")
        else:
            lines.append(f"{indent}{key}: {_literal(value)}\n")
    return "".join(lines)


class _Word(str):
    """A name of an enumeration, which has no quotes."""


def _literal(value: Any) -> str:
    return str(value) if isinstance(value, _Word) else json.dumps(value, ensure_ascii=False)


def _entries(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A protobuf map."""
    return [{"key": key, "value": value} for key, value in values.items()]


def _backend(bundle: Bundle) -> tuple[str, str]:
    """The server's backend for a bundle's runtime, and the file name that it looks for."""
    server = get_runtime(bundle.runtime).server
    if server is None:
        served = [name for name, runtime in runtimes().items() if runtime.server is not None]
        raise ValueError(
            f"bundle: {str(bundle.path)!r} is for {bundle.runtime!r}, which the server has no backend for; export it for"
            f" {' or '.join(served)}"
        )
    return server


def _require_batched(manifest: Mapping[str, Any], max_batch_size: int) -> None:
    values = (*manifest["inputs"], *manifest["outputs"])
    others = [item["name"] for item in values if item["shape"][:1] != ["batch"]]
    if others:
        raise ValueError(
            f"max_batch_size: {max_batch_size}, but the server joins requests along the first dimension, which of"
            f" {', '.join(others)} is no batch; export with bake_schedule and per_sample_steps, and with noise seeded"
            " (--bake-schedule --per-sample-steps --seeded), or pass 0"
        )


def _tensor(item: Mapping[str, Any], batched: bool) -> dict[str, Any]:
    # Without the batch; -1 where it may differ.
    dims = [dim if isinstance(dim, int) else -1 for dim in item["shape"][batched:]]
    tensor = {"name": item["name"], "data_type": _Word(f"TYPE_{_data_type(item)}"), "dims": dims or [1]}
    # Requests have no empty shapes: [B, 1] comes in for a model's [B].
    return tensor if dims else {**tensor, "reshape": {"shape": []}}


def _data_type(item: Mapping[str, Any]) -> str:
    if item["dtype"] not in _DATA_TYPES:
        raise ValueError(f"bundle: {item['name']!r} is {item['dtype']}, which the server does not have")
    return _DATA_TYPES[item["dtype"]]


def _version_policy(versions: int | str | Sequence[int]) -> dict[str, Any]:
    if isinstance(versions, int):
        return {"latest": {"num_versions": versions}}
    return {"all": {}} if isinstance(versions, str) else {"specific": {"versions": list(versions)}}


def _warmup(manifest: Mapping[str, Any], size: int, batched: bool) -> dict[str, Any]:
    """A request of zeros, which a baked schedule takes for one step; random bytes could be NaN, or no class."""
    own = manifest["sample"]["shape"]
    known = {"batch": size, "steps": 1, **dict(zip(("width", "height"), reversed(own), strict=False))}
    if "engine" in manifest:
        for name, (least, _, most) in manifest["engine"]["profiles"][0].items():
            known[name] = min(max(known[name], least), most)
    inputs = {}
    for item in manifest["inputs"]:
        dims = [known[dim] if isinstance(dim, str) else dim for dim in item["shape"][batched:]] or [1]
        inputs[item["name"]] = {"data_type": _Word(f"TYPE_{_data_type(item)}"), "dims": dims, "zero_data": True}
    return {"name": f"batch of {size}", "batch_size": size if batched else 1, "inputs": _entries(inputs)}


def _note(bundle: Bundle, config: Mapping[str, Any]) -> str:
    """What a client's author reads first."""
    batched = config["max_batch_size"] > 0
    rows = []
    for group in ("input", "output"):
        described = bundle.manifest[f"{group}s"]
        for item, tensor in zip(described, config[group], strict=True):
            shape = [*(["batch"] if batched else []), *tensor["dims"]]
            rows.append(f"| {group} | `{item['name']}` | {_data_type(item)} | {shape} | {item['meaning']} |")
    table = "\n".join(["| | name | datatype | shape | |", "|---|---|---|---|---|", *rows])
    example = _curl(bundle, config) if batched else ""
    return f"""# {config["name"]}

A DDIM sampler with the {config["backend"]} backend. Start the server with `--disable-auto-complete-config`: `{CONFIG_FILE}`
is complete. How: docs/serving.md of fastddim.

{table}
{example}"""


def _curl(bundle: Bundle, config: Mapping[str, Any]) -> str:
    """A request from the shell, where its values fit there."""
    nulls = {f"uncond_{name}": value for name, value in bundle.manifest["sampling"]["null_values"].items()}
    values = {"num_inference_steps": 20, "guidance_scale": 2.0, **nulls}
    inputs = []
    for item, tensor in zip(bundle.manifest["inputs"], config["input"], strict=True):
        count = math.prod(tensor["dims"])
        if not 0 < count <= _LONGEST_EXAMPLE:
            return ""
        data = [values.get(item["name"], 0)] * count
        inputs.append({"name": item["name"], "shape": [1, *tensor["dims"]], "datatype": _data_type(item), "data": data})
    body = json.dumps({"inputs": inputs})
    return f"""
```sh
curl localhost:8000/v2/models/{config["name"]}/infer -d '{body}'
```
"""
