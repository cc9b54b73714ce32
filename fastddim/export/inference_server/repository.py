"""Model repositories for NVIDIA Triton Inference Server (the server, not the language) from exported bundles.

No torch here, as in `bundle.py`. The fields are those of the server's `model_config.proto`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastddim.config import require_choice, require_int
from fastddim.export.bundle import FORMAT, Bundle, open_bundle, write_folder

CONFIG_FILE = "config.pbtxt"
NOTE_FILE = "README.md"
VERSION = 1

# By the manifest's runtime: the backend, and the file that it looks for.
BACKENDS = {"onnx": ("onnxruntime", "model.onnx"), "tensorrt": ("tensorrt", "model.plan")}
_DATA_TYPES = {
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign}int{bits}".upper() for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
}
_PARAMETERS = (
    "intra_op_thread_count",
    "inter_op_thread_count",
    "execution_mode",
    "enable_mem_arena",
    "enable_mem_pattern",
    "memory.enable_memory_arena_shrinkage",
    "session.use_device_allocator_for_initializers",
)
# Which instances each of ONNX Runtime's accelerators serves.
_ACCELERATORS = {"tensorrt": "gpu", "cuda": "gpu", "openvino": "cpu"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# More than a shell's line should hold.
_LONGEST_EXAMPLE = 16


@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """How the server runs a model.

    Attributes:
        name: of the model; the bundle's folder's by default.
        max_batch_size: samples in a batch; the server joins requests up to it. 0: requests run one by one, as they are.
        preferred_batch_sizes: batches that run without waiting for more requests.
        max_queue_delay_microseconds: how long a request waits for others to join it.
        queue_timeout_microseconds: how long a request may wait in all; 0 is without end.
        timeout_action: `"reject"` such a request, or `"delay"` it behind the others.
        max_queue_size: requests beyond it are rejected; 0 is any number.
        instances: of the model, for each GPU or on the CPU.
        kind: `"cpu"`, `"gpu"`, or `"auto"` for GPUs where there are any.
        gpus: the devices to use; all by default.
        warmup_batch_sizes: run once each before the model counts as ready.
        parameters: of the ONNX Runtime backend, such as `{"intra_op_thread_count": "4"}`.
        accelerator: of the ONNX Runtime backend: `"tensorrt"`, `"cuda"` or `"openvino"`.
        accelerator_parameters: such as `{"precision_mode": "FP16"}`.
        versions: the server loads the latest `n`, `"all"`, or those of a tuple. Version 1 is what is written.

    Raises:
        ValueError: values that the server does not take, or that exclude each other.
    """

    name: str | None = None
    max_batch_size: int = 8
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_microseconds: int = 0
    queue_timeout_microseconds: int = 0
    timeout_action: str = "reject"
    max_queue_size: int = 0
    instances: int = 1
    kind: str = "auto"
    gpus: tuple[int, ...] = ()
    warmup_batch_sizes: tuple[int, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    accelerator: str | None = None
    accelerator_parameters: Mapping[str, str] = field(default_factory=dict)
    versions: int | str | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        if self.name is not None:
            check_model_name(self.name)
        for name in (
            "max_batch_size", "max_queue_delay_microseconds", "queue_timeout_microseconds", "max_queue_size",
        ):  # fmt: skip
            require_int(name, getattr(self, name), 0)
        require_int("instances", self.instances, 1)
        require_choice("timeout_action", self.timeout_action, ("reject", "delay"))
        require_choice("kind", self.kind, ("auto", "cpu", "gpu"))
        for name, most in (("preferred_batch_sizes", self.max_batch_size), ("warmup_batch_sizes", self._most)):
            for size in getattr(self, name):
                require_int(name, size, 1, most)
        for name in ("max_queue_delay_microseconds", "queue_timeout_microseconds", "max_queue_size"):
            if getattr(self, name) and not self.max_batch_size:
                raise ValueError(f"{name}: {getattr(self, name)} with max_batch_size 0, where there is no such queue")
        for gpu in self.gpus:
            require_int("gpus", gpu, 0)
        if self.gpus and self.kind != "gpu":
            raise ValueError(f"gpus: {self.gpus} with kind {self.kind!r}; pass kind='gpu'")
        for key in self.parameters:
            require_choice("parameters", key, _PARAMETERS)
        self._check_accelerator()
        if isinstance(self.versions, tuple):
            if VERSION not in self.versions:
                raise ValueError(f"versions: {self.versions} without {VERSION}, which is written; add it")
            for version in self.versions:
                require_int("versions", version, 1)
        elif self.versions != "all":
            if isinstance(self.versions, str):
                raise ValueError(f"versions: {self.versions!r}; pass an integer, 'all', or a tuple of integers")
            require_int("versions", self.versions, 1)

    def _check_accelerator(self) -> None:
        if self.accelerator is None:
            if self.accelerator_parameters:
                raise ValueError("accelerator_parameters: without an accelerator; pass accelerator='tensorrt'")
            return
        require_choice("accelerator", self.accelerator, tuple(_ACCELERATORS))
        needed = _ACCELERATORS[self.accelerator]
        if self.kind not in ("auto", needed):
            raise ValueError(f"accelerator: {self.accelerator!r} with kind {self.kind!r}; pass kind={needed!r}")

    @property
    def _most(self) -> int:
        return max(1, self.max_batch_size)


def write_triton_repository(
    bundle: str | Path | Bundle, out: str | Path, options: TritonOptions | None = None, *, force: bool = False
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
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    options = TritonOptions() if options is None else options
    name = check_model_name(opened.path.resolve().name) if options.name is None else options.name
    repository = check_repository(out, name, force)
    config = model_config(opened, name, options)
    file = BACKENDS[_runtime(opened)][1]
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


def check_model_name(name: str) -> str:
    """The name, if the server takes it for a model and a folder.

    Raises:
        ValueError: another one.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name: {name!r}; pass letters, digits, '_', '-' and '.', the first no '-' or '.'")
    return name


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


def model_config(bundle: Bundle, name: str, options: TritonOptions) -> dict[str, Any]:
    """A model's configuration, as `to_pbtxt` takes it.

    Args:
        bundle: opened.
        name: of the model.
        options: how the server runs it.

    Raises:
        ValueError: a bundle that the server cannot run, or cannot batch.
    """
    runtime = _runtime(bundle)
    manifest = bundle.manifest
    if bundle.components:
        raise ValueError(
            f"bundle: {str(bundle.path)!r} is a whole pipeline, which is several models; export its sampler alone"
            " (--sampler-only)"
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
        "backend": BACKENDS[runtime][0],
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
        config["dynamic_batching"] = _dynamic_batching(options)
    if options.accelerator is not None:
        accelerator = {"name": options.accelerator, "parameters": _entries(options.accelerator_parameters)}
        which = f"{_ACCELERATORS[options.accelerator]}_execution_accelerator"
        config["optimization"] = {"execution_accelerators": {which: [accelerator]}}
    config["parameters"] = _entries({key: {"string_value": value} for key, value in options.parameters.items()})
    config["model_warmup"] = [_warmup(manifest, size, batched) for size in options.warmup_batch_sizes]
    return config


def require_servable(engine: Mapping[str, Any], options: TritonOptions) -> None:
    """Check that the server's TensorRT backend takes an engine.

    Args:
        engine: `flavour`, `options` and `profiles` as a manifest's `engine` has them.
        options: how the server runs it.

    Raises:
        ValueError: an engine that it does not load, or not with these options.
    """
    if engine["flavour"] != "standard":
        raise ValueError(
            f"flavour: {engine['flavour']!r}, but the server's backend loads the standard TensorRT's engines; build one"
            " with flavour='standard' (--trt standard)"
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


def _runtime(bundle: Bundle) -> str:
    if bundle.runtime not in BACKENDS:
        raise ValueError(
            f"bundle: {str(bundle.path)!r} is for {bundle.runtime!r}, which the server has no backend for; export it for"
            f" {' or '.join(BACKENDS)}"
        )
    return bundle.runtime


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
    dims = _dims(item, batched)
    tensor = {"name": item["name"], "data_type": _Word(f"TYPE_{_data_type(item)}"), "dims": dims or [1]}
    # Requests have no empty shapes: [B, 1] comes in for a model's [B].
    return tensor if dims else {**tensor, "reshape": {"shape": []}}


def _dims(item: Mapping[str, Any], batched: bool) -> list[int]:
    """What a request's tensor has, without the batch; -1 where it may differ."""
    return [dim if isinstance(dim, int) else -1 for dim in item["shape"][batched:]]


def _data_type(item: Mapping[str, Any]) -> str:
    if item["dtype"] not in _DATA_TYPES:
        raise ValueError(f"bundle: {item['name']!r} is {item['dtype']}, which the server does not have")
    return _DATA_TYPES[item["dtype"]]


def _version_policy(versions: int | str | Sequence[int]) -> dict[str, Any]:
    if isinstance(versions, int):
        return {"latest": {"num_versions": versions}}
    return {"all": {}} if isinstance(versions, str) else {"specific": {"versions": list(versions)}}


def _dynamic_batching(options: TritonOptions) -> dict[str, Any]:
    return {
        "preferred_batch_size": list(options.preferred_batch_sizes),
        "max_queue_delay_microseconds": options.max_queue_delay_microseconds,
        "default_queue_policy": {
            "timeout_action": _Word(options.timeout_action.upper()),
            "default_timeout_microseconds": options.queue_timeout_microseconds,
            "max_queue_size": options.max_queue_size,
        },
    }


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
