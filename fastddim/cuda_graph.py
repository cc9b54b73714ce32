"""CUDA graphs: a callable over fixed memory, captured once and replayed, and a cache of such captures.

Where there is no CUDA device a `Graph` calls what it would have captured, so that everything around the capture is the
same code.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from fastddim.capture_checks import Probe

# A capture fails if another thread allocates device memory, or captures, at the same time.
_CAPTURING = threading.RLock()


class CaptureError(RuntimeError):
    """A callable cannot be captured; the message says why, `__cause__` is the error itself.

    Attributes:
        permanent: it would fail again, as the reason lies in the callable.
    """

    def __init__(self, reason: str, permanent: bool = False) -> None:
        super().__init__(reason)
        self.permanent = permanent


@dataclass(frozen=True, slots=True)
class MemoryPool:
    """Memory for captures, and the stream that all of them are made on: torch reuses memory within one stream alone."""

    handle: Any
    stream: torch.cuda.Stream

    @classmethod
    def on(cls, device: torch.device) -> MemoryPool:
        """A new one on a CUDA device."""
        return cls(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


class Graph:
    """`body` captured over the tensors it reads and writes, which must keep their places in memory.

    Args:
        body: called without arguments, twice before the capture; what it does is only kept if it is work on the device's
            current stream. It is let go after the capture.
        device: where the work runs.
        pool: memory for what `body` allocates, a new one by default; graphs that share one must not run at the same time,
            and after a capture that failed it is of no use.
        probe: look for what cannot be captured before the capture; compiled code cannot be looked into.

    Attributes:
        nbytes: device memory that the capture has added to the pool.

    Raises:
        CaptureError: the work cannot be captured, or there is not enough memory for it.
    """

    def __init__(
        self, body: Callable[[], None], device: torch.device, pool: MemoryPool | None = None, probe: bool = True
    ) -> None:
        self._replay = body
        self.nbytes = 0
        if not is_captured(device):
            body()
            return
        with _CAPTURING, torch.cuda.device(device):
            self._capture(body, device, MemoryPool.on(device) if pool is None else pool, probe)

    def _capture(self, body: Callable[[], None], device: torch.device, pool: MemoryPool, probe: bool) -> None:
        handled = sys.exc_info()[1]
        caller = torch.cuda.current_stream(device)
        pool.stream.wait_stream(caller)
        caching = torch.is_autocast_cache_enabled()
        # Autocast frees its copies of the weights when it ends, and replays would go on reading them.
        torch.set_autocast_cache_enabled(False)
        try:
            # The caller's stream is current again even after a failed capture, which torch leaves current.
            with torch.cuda.stream(pool.stream):
                # Lazily initialised libraries and autotuners have to have run before a capture.
                body()
                if probe:
                    _probe(body, device)
                else:
                    body()
                graph = self._record(body, device, pool, handled)
        except torch.cuda.OutOfMemoryError as error:
            raise _to_capture_error(error, handled)  # noqa: B904
        finally:
            torch.set_autocast_cache_enabled(caching)
            caller.wait_stream(pool.stream)
        self._replay = graph.replay

    def _record(
        self, body: Callable[[], None], device: torch.device, pool: MemoryPool, handled: BaseException | None
    ) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # One that was allocated outside of the capture would be freed with another graph of the stream.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Other threads' unrelated work must not break this capture.
            with torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local"):
                # What was cached is released at the start of the capture.
                before = torch.cuda.memory_reserved(device)
                body()
            self.nbytes = max(0, torch.cuda.memory_reserved(device) - before)
        except Exception as error:
            _end_failed_capture(device, pool)
            raise _to_capture_error(error, handled)  # noqa: B904
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        return graph

    def replay(self) -> None:
        """Do the captured work again, on the current stream, without waiting for it."""
        self._replay()


def is_captured(device: torch.device) -> bool:
    """Whether work on a device is captured, not called."""
    return device.type == "cuda"


def _probe(body: Callable[[], None], device: torch.device) -> None:
    """Call `body`, and refuse what no capture can hold before one is begun: torch recovers badly from one that fails."""
    probe = Probe(device)
    with probe:
        body()
    refusal = probe.refusal()
    if refusal is not None:
        raise CaptureError(refusal, permanent=True)


def _end_failed_capture(device: torch.device, pool: MemoryPool) -> None:
    """What torch leaves undone: memory is still handed out from the pool, and before 2.13 the random generator captures."""
    with contextlib.suppress(RuntimeError):
        # It raises where torch has done it.
        torch._C._cuda_endAllocateToPool(device.index, pool.handle)
        torch._C._cuda_releasePool(device.index, pool.handle)
    if torch.__version__ < (2, 13):  # type: ignore[operator]
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            torch.zeros(1, device=device)


def _to_capture_error(error: BaseException, handled: BaseException | None) -> CaptureError:
    """The error of a capture with all that led to it, the first cause first: torch's own hides the model's.

    Args:
        error: what was raised.
        handled: what was being handled before the capture, which has nothing to do with it.
    """
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at is not handled:
        chain.insert(0, at)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    made = CaptureError("; then ".join(map(_describe, chain)))
    made.__cause__ = next((each for each in chain if isinstance(each, torch.cuda.OutOfMemoryError)), chain[0])
    return made


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


class Sized(Protocol):
    """What says how much device memory it holds."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class GraphCache(Generic[T]):
    """Captures by key: the least recently used is dropped beyond a limit, and one runs at a time.

    Args:
        max_entries: how many are kept.
    """

    def __init__(self, max_entries: int = 8) -> None:
        self.max_entries = max_entries
        self._entries: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.RLock()
        self._done: torch.cuda.Event | None = None
        self._pools: dict[torch.device, MemoryPool] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def pool(self, device: torch.device) -> MemoryPool | None:
        """The memory that the captures on a device share, None where nothing is captured."""
        if not is_captured(device):
            return None
        with self._lock:
            if device not in self._pools:
                self._pools[device] = MemoryPool.on(device)
            return self._pools[device]

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
            if not is_captured(device):
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
                try:
                    entry = self._entries[key] = build()
                except CaptureError:
                    # torch may still be allocating from a pool whose capture failed.
                    self._pools.clear()
                    raise
            self._entries.move_to_end(key)
            return entry

    def clear(self) -> None:
        """Drop all captures, their memory and its stream."""
        with self._lock:
            for key in list(self._entries):
                self._drop(key)
            self._pools.clear()

    def _drop(self, key: Hashable) -> None:
        if self._done is not None:
            # Its memory may still be in use, by another stream than the one that would get it next.
            self._done.synchronize()
        del self._entries[key]
