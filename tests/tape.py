"""CUDA graphs on a CPU: torch.cuda's names for captures over a tape, which a replay runs again: aten operations, and launches
of kernels on the machine in tests/ptx.

It is stricter than a device. An operation that a capture refuses raises; a replay that reads memory which was freed since
raises too; and what a body leaves in memory that nobody holds is NaN before the next replay.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastddim import backends, capture_checks, cuda_graph, loop, noise, reference
from fastddim.capture_checks import Probe
from ptx.launcher import Machine, span

aten = torch.ops.aten
# Operations whose result, or its size, the host has to read.
HOST_READS = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.bincount.default, aten.repeat_interleave.Tensor, aten._pin_memory.default,
}  # fmt: skip
HOST_COPIES = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.pin_memory}
# No lines of a model's.
OWN_FILES = {__file__}
_randn = torch.randn
REFUSED = "operation not permitted when stream is capturing"


class Ref(NamedTuple):
    """A tensor on the tape: a view of the memory in a slot."""

    slot: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def of(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=self.dtype, device="cpu").set_(storage, self.offset, self.size, self.stride)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class HostTensors:
    """Literals, and what is computed of them alone: on a device they would be on the host."""

    def __init__(self) -> None:
        self.known: set[StorageWeakRef] = set()

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and StorageWeakRef(value.untyped_storage()) in self.known

    def run(self, func, args, kwargs, call):
        """What `call` gives for an operation, with what it makes of literals alone."""
        given = {StorageWeakRef(leaf.untyped_storage()) for leaf in tensors_in((args, kwargs))}
        if func is aten.lift_fresh.default:
            self.known |= given
        out = call()
        if given and given <= self.known:
            self.known.update(StorageWeakRef(leaf.untyped_storage()) for leaf in tensors_in(out))
        return out


class TapedProbe(Probe):
    """The probe on a device where all but literals is."""

    def __init__(self, device):
        super().__init__(device)
        self.host = HostTensors()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        look = super().__torch_dispatch__
        return self.host.run(func, args, kwargs, lambda: look(func, types, args, kwargs))

    def _is_on_device(self, tensor):
        return tensor not in self.host


class Recorder(TorchDispatchMode):
    """Writes operations down without keeping what they read or make alive."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, list[Any], Any, list[Ref]]] = []
        self.refs: list[StorageWeakRef] = []
        self.slots: dict[StorageWeakRef, int] = {}
        # Slots that the body did not make, with the line that first used them.
        self.read: dict[int, str] = {}
        self.kept: dict[int, torch.UntypedStorage] = {}
        self.host = HostTensors()
        self.failed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.failed or (refuses(func, args) and args[0] not in self.host):
            self.failed = True
            raise RuntimeError(f"{REFUSED}: {func}")
        return self.host.run(func, args, kwargs, lambda: self.record(func, args, kwargs or {}))

    def record(self, func, args, kwargs):
        leaves, structure = pytree.tree_flatten((args, kwargs))
        given = [self.ref(leaf, func) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        out = func(*args, **kwargs)
        self.ops.append((func, given, structure, [self.ref(leaf, None) for leaf in tensors_in(out)]))
        return out

    def ref(self, tensor: torch.Tensor, reader: Any) -> Ref:
        storage = tensor.untyped_storage()
        weak = StorageWeakRef(storage)
        slot = self.slots.setdefault(weak, len(self.refs))
        if slot == len(self.refs):
            self.refs.append(weak)
            if tensor in self.host:
                self.kept[slot] = storage
            elif reader is not None:
                self.read[slot] = f"{line_outside_torch()} {reader}"
        return Ref(slot, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype)

    def finish(self) -> None:
        """What the body made and left in someone's hands has a place from now on; the rest is free again."""
        for slot, weak in enumerate(self.refs):
            if slot not in self.read and slot not in self.kept and not weak.expired():
                self.kept[slot] = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)


def refuses(func: Any, args: Any) -> bool:
    masked = func in (aten.index.Tensor, aten.index_put_.default) and any(
        index is not None and index.dtype == torch.bool for index in args[1]
    )
    # One value at a mask is a `masked_fill`.
    return func in HOST_READS or (masked and (func is aten.index.Tensor or args[2].numel() > 1))


class HostCopies(TorchFunctionMode):
    """Refuses what reads a tensor on the host without an operation."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in HOST_COPIES:
            self.recorder.failed = True
            raise RuntimeError(f"{REFUSED}: {func.__name__}")
        return func(*args, **(kwargs or {}))


class TapedGraph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def replay(self) -> None:
        recorder = self.recorder
        storages = dict(recorder.kept)
        for slot, line in recorder.read.items():
            storages[slot] = torch.UntypedStorage._new_with_weak_ptr(recorder.refs[slot].cdata)
            if storages[slot] is None:
                raise RuntimeError(f"a replay reads memory that was freed: {line}")
        with torch.no_grad():
            for func, given, structure, made in recorder.ops:
                leaves = [leaf.of(storages[leaf.slot]) if isinstance(leaf, Ref) else leaf for leaf in given]
                args, kwargs = pytree.tree_unflatten(leaves, structure)
                for ref, tensor in zip(made, tensors_in(func(*args, **kwargs)), strict=True):
                    if func.overloadpacket in (aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided):
                        tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
                    if ref.slot not in storages:
                        storages[ref.slot] = tensor.untyped_storage()
                    elif storages[ref.slot].data_ptr() != tensor.untyped_storage().data_ptr():
                        ref.of(storages[ref.slot]).copy_(tensor)


class TapedMachine(Machine):
    """The machine whose launches within a capture are on the tape too."""

    def __init__(self, tape: Tape, capability: int, seed: int | None = None) -> None:
        super().__init__(capability, seed)
        self.tape = tape
        # By their addresses: the memory of the tensors that were taken, the byte in it, and the number of bytes.
        self.taken: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def take(self, tensor: torch.Tensor) -> int:
        address = super().take(tensor)
        if tensor.numel():
            offset = tensor.storage_offset() * tensor.element_size()
            self.taken[address] = StorageWeakRef(tensor.untyped_storage()), offset, span(tensor)
        return address

    def launch(self, program: Any, grid: Any, arguments: Any, shared: int) -> None:
        recorder = self.tape.recorder()
        if recorder is None:
            super().launch(program, grid, arguments, shared)
            return
        with _disable_current_modes():
            given = [self._bytes_at(each) if each in self.taken else each for each in map(self._address, arguments)]
            recorder.record(super().launch, (program, grid, given, shared), {})

    def _address(self, value: Any) -> int:
        return self.take(value) if isinstance(value, torch.Tensor) else int(value)

    def _bytes_at(self, address: int) -> torch.Tensor:
        weak, offset, size = self.taken[address]
        storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
        assert storage is not None, "a launch is given memory that was freed"
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, offset, (size,))


class Stream:
    """In place of `torch.cuda.Stream`, and of its events: everything has happened already."""

    def __init__(self, device: Any = None) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Stream) -> None: ...

    def record_event(self) -> Stream:
        return self

    def synchronize(self) -> None: ...


def normal_as_on_a_device(*args: Any) -> torch.Tensor:
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        return noise.normal_for(*args)


def line_outside_torch() -> str:
    frame = sys._getframe(1)
    while "torch" in frame.f_code.co_filename or frame.f_code.co_filename in OWN_FILES:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class StreamContext:
    def __init__(self, tape: Tape, stream: Stream) -> None:
        self.tape, self.stream = tape, stream

    def __enter__(self) -> None:
        self.before, self.tape.current.stream = self.tape.current_stream(), self.stream

    def __exit__(self, *error: Any) -> None:
        self.tape.current.stream = self.before


class Tape:
    """The emulated device.

    Attributes:
        log: what happened, in words.
        captures: pool and stream of each capture that was begun.
        cached: bytes that the allocator holds for later, until a capture begins.
        generator_captures: whether a failed capture has left torch's random generator in its state.
        on_capture: called when a capture begins.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.captures: list[tuple[Any, Stream]] = []
        # Those that somebody holds.
        self.graphs: weakref.WeakSet[TapedGraph] = weakref.WeakSet()
        self.capturing: TapedGraph | None = None
        self.cached = 0
        self.generator_captures = False
        self.on_capture = lambda: None
        self.recording: set[Any] = set()
        self.current = threading.local()
        self.default = Stream()

    def install(self, monkeypatch) -> Tape:
        handles = iter(range(1, 1 << 20))
        tape = self

        class Capture:
            """In place of `torch.cuda.graph`, with what it does before, after, and not at all after a failure."""

            def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global"):
                self.graph, self.pool = cuda_graph, (0, next(handles)) if pool is None else pool
                self.stream = Stream() if stream is None else stream
                assert capture_error_mode in ("global", "thread_local")

            def __enter__(self):
                tape.cached = 0
                self.current = tape.stream(self.stream)
                self.current.__enter__()
                if self.pool in tape.recording:
                    raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
                tape.recording.add(self.pool)
                tape.capturing = self.graph
                tape.captures.append((self.pool, self.stream))
                tape.log.append("capture")
                self.modes = contextlib.ExitStack()
                self.modes.enter_context(self.graph.recorder)
                self.modes.enter_context(HostCopies(self.graph.recorder))
                tape.on_capture()

            def __exit__(self, *error):
                self.modes.close()
                tape.capturing = None
                if error[0] is not None or self.graph.recorder.failed:
                    tape.generator_captures = torch.__version__ < (2, 13)
                    # The rest of torch's epilogue is not reached.
                    raise RuntimeError("operation failed due to a previous error during capture")
                tape.recording.discard(self.pool)
                tape.generator_captures = False
                self.graph.recorder.finish()
                tape.graphs.add(self.graph)
                self.current.__exit__(*error)

        def end_allocate(device, handle):
            if handle not in self.recording:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            self.recording.discard(handle)

        for module in (cuda_graph, loop):
            monkeypatch.setattr(module, "is_captured", lambda device: True)
        monkeypatch.setattr(cuda_graph, "Probe", TapedProbe)
        monkeypatch.setattr(capture_checks, "_NOT_THE_MODEL", (*capture_checks._NOT_THE_MODEL, *OWN_FILES))
        # What the reference takes a shorter way for where tensors are on the host.
        for module in (backends, reference):
            monkeypatch.setattr(module, "normal_for", normal_as_on_a_device)
        monkeypatch.setattr(
            reference, "_is_stochastic", lambda row: row.noise_scale.__class__ is float and row.noise_scale != 0
        )
        for name, value in {
            "graph": Capture, "CUDAGraph": TapedGraph, "Stream": Stream, "stream": self.stream,
            "device": lambda device: contextlib.nullcontext(), "current_stream": lambda device=None: self.current_stream(),
            "memory_reserved": lambda device=None: self.cached + self.allocated(), "synchronize": self.synchronize,
            "memory_allocated": lambda device=None: self.allocated(), "graph_pool_handle": lambda: (0, next(handles)),
            "is_current_stream_capturing": lambda: self.capturing is not None and self.current_stream() is not self.default,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "randn", self.randn)
        for name, value in {
            "_cuda_clearCublasWorkspaces": lambda: self.log.append("clear workspaces"),
            "_cuda_endAllocateToPool": end_allocate,
            "_cuda_releasePool": lambda device, handle: self.log.append("release pool"),
        }.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)
        return self

    def current_stream(self) -> Stream:
        return getattr(self.current, "stream", self.default)

    def stream(self, stream: Stream) -> StreamContext:
        return StreamContext(self, stream)

    def allocated(self) -> int:
        return 64 * len(self.graphs)

    def randn(self, *size: Any, **options: Any) -> torch.Tensor:
        if self.generator_captures and options.get("generator") is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        return _randn(*size, **options)

    def synchronize(self, device: Any = None) -> None:
        if self.capturing is not None:
            # Whichever thread it is.
            self.capturing.recorder.failed = True
            raise RuntimeError(REFUSED)

    def recorder(self) -> Recorder | None:
        """Where this thread's work is written down, None where it is done."""
        return self.capturing.recorder if torch.cuda.is_current_stream_capturing() else None

    def check_reads(self, *owners: Any) -> None:
        """Every capture reads what it made and what one of the owners holds: a module, a tensor, a capture."""
        held = {StorageWeakRef(tensor.untyped_storage()) for owner in owners for tensor in tensors_of(owner)}
        for graph in self.graphs:
            for slot, line in graph.recorder.read.items():
                assert graph.recorder.refs[slot] in held, f"a capture reads what nobody may hold: {line}"


def tensors_of(owner: Any) -> list[torch.Tensor]:
    if isinstance(owner, torch.Tensor):
        return [owner]
    if isinstance(owner, torch.nn.Module):
        return [*owner.parameters(), *owner.buffers()]
    return tensors_in([vars(owner), vars(owner.buffers) if hasattr(owner, "buffers") else ()])
