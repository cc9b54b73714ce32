"""CUDA graphs: a callable over fixed memory, captured once and replayed, and a cache of such captures.

Where there is no CUDA device a `Graph` calls what it would have captured, so that everything around the capture is the
same code.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch

# Lazily initialised libraries and autotuners have to have run before a capture.
_WARMUP_CALLS = 2
# A capture fails if another thread allocates device memory, or captures, at the same time.
_CAPTURING = threading.RLock()


class CaptureError(RuntimeError):
    """A callable cannot be captured; the message says why, `__cause__` is the error itself."""


class Graph:
    """`body` captured over the tensors it reads and writes, which must keep their places in memory.

    Args:
        body: called without arguments, a few times before the capture; what it does is only kept if it is work on the
            device's current stream.
        device: where the work runs.
        pool: memory for what `body` allocates, from `torch.cuda.graph_pool_handle()`; graphs that share one must not run
            at the same time.

    Attributes:
        nbytes: device memory that the capture has added to the pool.

    Raises:
        CaptureError: the work cannot be captured, or there is not enough memory for it.
    """

    def __init__(self, body: Callable[[], None], device: torch.device, pool: Any = None) -> None:
        self._body = body
        self._graph: torch.cuda.CUDAGraph | None = None
        self.nbytes = 0
        if device.type != "cuda":
            body()
            return
        with _CAPTURING, torch.cuda.device(device):
            self._capture(device, pool)

    def _capture(self, device: torch.device, pool: Any) -> None:
        caller, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP_CALLS):
                    self._body()
            before = torch.cuda.memory_reserved(device)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads' unrelated work must not break this capture.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    self._body()
            except Exception as error:
                raise CaptureError(_reason(error)) from error
        except torch.cuda.OutOfMemoryError as error:
            raise CaptureError(_reason(error)) from error
        finally:
            caller.wait_stream(stream)
        self.nbytes = max(0, torch.cuda.memory_reserved(device) - before)
        self._graph = graph

    def replay(self) -> None:
        """Do the captured work again, on the current stream, without waiting for it."""
        if self._graph is None:
            self._body()
        else:
            self._graph.replay()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)


class GraphCache(Generic[T]):
    """Captures by key: the least recently used is dropped beyond a limit, and one runs at a time.

    Args:
        max_entries: how many are kept.

    Attributes:
        pool: the memory they share, None without CUDA.
    """

    def __init__(self, max_entries: int = 8) -> None:
        self.max_entries = max_entries
        self._entries: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.RLock()
        self._done: torch.cuda.Event | None = None
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def pool(self) -> Any:
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    @property
    def nbytes(self) -> int:
        """Device memory that the kept captures hold."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def keys(self) -> list[Hashable]:
        """The kept captures' keys, the least recently used first."""
        with self._lock:
            return list(self._entries)

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """Hold the cache while work on its captures is put on the current stream, after the work of the last turn."""
        with self._lock:
            if device.type != "cuda":
                yield
                return
            stream = torch.cuda.current_stream(device)
            if self._done is not None:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done = stream.record_event()

    def get(self, key: Hashable, build: Callable[[], T]) -> T:
        """The capture of a key, built and kept if there is none; to be called in a `turn`."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                while len(self._entries) >= self.max_entries:
                    self._drop(next(iter(self._entries)))
                entry = self._entries[key] = build()
            self._entries.move_to_end(key)
            return entry

    def clear(self) -> None:
        """Drop all captures and their memory."""
        with self._lock:
            for key in list(self._entries):
                self._drop(key)
            self._pool = None

    def _drop(self, key: Hashable) -> None:
        if self._done is not None:
            # Its memory may still be in use, by another stream than the one that would get it next.
            self._done.synchronize()
        del self._entries[key]


# What diffusers sets on a model's parts besides parameters and submodules: attention processors and FreeU's factors.
_SETTINGS = ("training", "processor", "b1", "b2", "s1", "s2")


class ModuleState:
    """Which parameters, buffers, submodules and settings a module has, to tell whether a capture of it still is of it.

    Weights that change in place need no new capture: it reads the same memory.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._members: list[tuple[dict[str, Any], int]] = []
        self._values: list[tuple[dict[str, Any], str, Any, int]] = []
        for part in module.modules():
            attributes = vars(part)
            self._members.append((attributes, len(attributes)))
            self._values += [(attributes, name, attributes[name], 0) for name in _SETTINGS if name in attributes]
            for members in (part._modules, part._parameters, part._buffers):
                if members:
                    self._members.append((members, len(members)))
                    self._values += [(members, name, value, _address(value)) for name, value in members.items()]

    def changed(self) -> bool:
        """Whether something was replaced, added or removed, moved in memory, set up otherwise, or left eval for train."""
        return any(len(members) != size for members, size in self._members) or any(
            members.get(name) is not value or (address and _address(value) != address)
            for members, name, value, address in self._values
        )


def _address(value: Any) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else 0
