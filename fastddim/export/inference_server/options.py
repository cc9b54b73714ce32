"""How NVIDIA's inference server runs a model, checked before any work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastddim.config import require_choice, require_int

# The version of a model that is written.
VERSION = 1
# Which instances each of ONNX Runtime's accelerators serves.
ACCELERATORS = {"tensorrt": "gpu", "cuda": "gpu", "openvino": "cpu"}
_PARAMETERS = (
    "intra_op_thread_count",
    "inter_op_thread_count",
    "execution_mode",
    "enable_mem_arena",
    "enable_mem_pattern",
    "memory.enable_memory_arena_shrinkage",
    "session.use_device_allocator_for_initializers",
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class InferenceServerOptions:
    """How the server runs a model.

    Attributes:
        name: the model's name; that of the bundle's folder by default.
        max_batch_size: samples in a batch; the server joins requests up to it. 0: requests run one by one, as they are.
        preferred_batch_sizes: batches that run without waiting for more requests.
        max_queue_delay_microseconds: how long a request waits for others to join it.
        queue_timeout_microseconds: how long a request may wait in all; 0 is without end.
        timeout_action: `"reject"` such a request, or `"delay"` it behind the others.
        max_queue_size: requests beyond it are rejected; 0 is any number.
        instances: how many of the model run, on each GPU or on the CPU.
        kind: `"cpu"`, `"gpu"`, or `"auto"` for GPUs where there are any.
        gpus: the devices to use; all by default.
        warmup_batch_sizes: run once each before the model counts as ready.
        parameters: settings of the ONNX Runtime backend, such as `{"intra_op_thread_count": "4"}`.
        accelerator: the ONNX Runtime backend's execution provider, `"tensorrt"`, `"cuda"` or `"openvino"`.
        accelerator_parameters: its settings, such as `{"precision_mode": "FP16"}`.
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
        for name, most in (
            ("preferred_batch_sizes", self.max_batch_size),
            ("warmup_batch_sizes", max(1, self.max_batch_size)),
        ):
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
        require_choice("accelerator", self.accelerator, tuple(ACCELERATORS))
        needed = ACCELERATORS[self.accelerator]
        if self.kind not in ("auto", needed):
            raise ValueError(f"accelerator: {self.accelerator!r} with kind {self.kind!r}; pass kind={needed!r}")


def check_model_name(name: str) -> str:
    """The name, if the server takes it for a model and a folder.

    Raises:
        ValueError: another one.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name: {name!r}; pass letters, digits, '_', '-' and '.', the first no '-' or '.'")
    return name
