"""What a capture cannot hold, found before one is tried, and what makes one stale.

A CUDA graph replays kernels over fixed addresses: host code does not run again, and memory that was freed since is read all the
same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import chain
from operator import is_, itemgetter
from pathlib import Path
from types import CellType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_NOT_THE_MODEL: tuple[str, ...] = (str(Path(torch.__file__).parent) + os.sep, __file__)
_aten = torch.ops.aten
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
_MASKED = (_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)


class Probe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first thing that an ordinary call does and a capture on a device refuses, or a replay would do wrong.

    It sees torch's operations as they run eagerly, so it says nothing of compiled code.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device.type
        self._refusal: str | None = None
        self._made: set[StorageWeakRef] = set()
        self._read: dict[StorageWeakRef, str] = {}

    def refusal(self) -> str | None:
        """What was found, with the line of the model; to be asked for when nothing of the call is left but its results."""
        if self._refusal is not None:
            return self._refusal
        freed = (line for ref, line in self._read.items() if ref.expired())  # type: ignore[no-untyped-call]
        return next((f"{line} reads memory that is freed after the call" for line in freed), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(value, torch.Tensor)]
        here = list(filter(self._is_on_device, given))
        for ref in map(_storage, here):
            if ref not in self._made and ref not in self._read:
                self._read[ref] = _caller(sys._getframe())
        out = func(*args, **kwargs)
        made = [value for value in pytree.tree_leaves(out) if isinstance(value, torch.Tensor)]
        self._made.update(ref for ref in map(_storage, made) if ref not in self._read)
        if self._refusal is None:
            what = self._refused(func, args, given, made)
            if what is not None:
                self._refusal = f"{_caller(sys._getframe())} {what} ({func})"
        return out

    def _is_on_device(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._device_type

    def _refused(self, func: Any, args: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> str | None:
        here = any(map(self._is_on_device, given))
        if here and reads_on_host(func, args):
            return "waits for the device to read a value on the host"
        if func is _aten._pin_memory.default:
            return "allocates pinned memory"
        # torch makes a literal on the host; an operation takes a number from there without waiting.
        places = {self._is_on_device(value) for value in (*given, *made) if value.ndim or func in _COPIES}
        if len(places) == 2 or (here and func is _aten.lift_fresh.default):
            return "copies between the host and the device"
        return None


def reads_on_host(func: Any, args: Any) -> bool:
    """Whether an operation of torch over device memory decides something on the host: a value, or the size of its output."""
    if func in _MASKED:
        # One value for a mask is filled in without counting.
        return args[2].numel() != 1 and _has_mask(args[1])
    if func is _aten.index.Tensor:
        return _has_mask(args[1])
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return func is _aten.equal.default or any(tag in func.tags for tag in tags)


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _storage(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _caller(frame: FrameType | None) -> str:
    """The innermost line outside of torch: the model's."""
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_MODEL):
        frame = frame.f_back
    return "the model" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


# What torch itself keeps on a module: its members, which are watched one by one, and hooks.
_OWN = frozenset(vars(torch.nn.Module())) - {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_MISSING = object()


class _Members(NamedTuple):
    """A dictionary of a model's, its size, and those of its values that matter."""

    now: dict[Any, Any]
    path: str
    size: int
    values: dict[str, Any]


class ModelState:
    """What a capture of a model is of beside its inputs, to tell whether it still is: parameters, buffers, submodules and the
    number of hooks; attributes of its modules, and of objects to call that these hold, such as attention processors; what
    functions close over.

    Weights that change in place need no new capture: it reads the same memory. Dictionaries of numbers, names and the like are
    compared by what they have, lists by the names and numbers that they had. Globals are not noticed, nor what changes within
    others, or within an object that a function closes over.

    Args:
        model: a module, or a function, a method, a `functools.partial` or an object that calls some; or a tuple of such.
        ignored: names of what may change, as `differences` gives them.
    """

    def __init__(self, model: Any, ignored: Collection[str] = ()) -> None:
        self._ignored = ignored
        self._members: list[_Members] = []
        self._cells: list[tuple[CellType, str, Any]] = []
        # Dictionaries of plain values and lists among attributes, as adapters keep scales and names, and what they had.
        self._containers: list[tuple[str, Any, Any]] = []
        for holder, path in _holders(model):
            if not isinstance(holder, FunctionType):
                self._watch(holder, path)
            elif not hasattr(holder, "_torchdynamo_orig_callable"):
                cells = zip(holder.__closure__ or (), holder.__code__.co_freevars, strict=True)
                self._cells += [(cell, name, _contents(cell)) for cell, name in cells if name not in ignored]
        self._compare_in_few_passes()

    def _watch(self, holder: Any, path: str) -> None:
        attributes = vars(holder)
        self._note(attributes, path)
        for name, value in attributes.items():
            if name not in _OWN and callable(value) and _is_plain_object(value):
                self._note(vars(value), f"{path}{name}.")
        if isinstance(holder, torch.nn.Module):
            members: dict[str, Any]
            for members in (holder._modules, holder._parameters, holder._buffers):
                if members:
                    self._note(members, path)
            for hooks in (holder._forward_hooks, holder._forward_pre_hooks):
                self._members.append(_Members(hooks, f"{path}hooks", len(hooks), {}))

    def _note(self, members: dict[str, Any], path: str) -> None:
        skipped = {name for name in members if name in _OWN or path + name in self._ignored}
        values = {name: value for name, value in members.items() if name not in skipped}
        self._members.append(_Members(members, path, len(members), values))
        self._containers += [
            (path + name, value, _contained(value))
            for name, value in values.items()
            if type(value) is list or (type(value) is dict and all(map(_is_plain, value.values())))
        ]

    def _compare_in_few_passes(self) -> None:
        """Lay out what `_looks_the_same` compares: a large network has tens of thousands of values, and every run looks."""
        self._sized = [members.now for members in self._members]
        self._sizes = [members.size for members in self._members]
        whole = [members for members in self._members if len(members.values) == members.size]
        self._whole = [members.now for members in whole]
        self._whole_values = [value for members in whole for value in members.values.values()]
        self._parts: list[tuple[Callable[[Any], Any], dict[Any, Any]]] = []
        self._tensors: dict[str, torch.Tensor] = {}
        # Tensors among other values, where `==` would compare their elements.
        self._apart: list[tuple[dict[Any, Any], str, torch.Tensor]] = []
        for members in self._members:
            tensors = {name: value for name, value in members.values.items() if isinstance(value, torch.Tensor)}
            self._tensors |= {members.path + name: value for name, value in tensors.items()}
            if len(members.values) < members.size:
                self._apart += [(members.now, name, value) for name, value in tensors.items()]
                names = [name for name in members.values if name not in tensors]
                if names:
                    self._parts.append((itemgetter(*names), members.now))
        self._part_values = [pick(members) for pick, members in self._parts]
        self._tensors |= {name: value for _, name, value in self._cells if isinstance(value, torch.Tensor)}
        self._addresses = list(map(torch.Tensor.data_ptr, self._tensors.values()))

    def _looks_the_same(self) -> bool:
        try:
            return (
                list(map(len, self._sized)) == self._sizes
                and all(map(is_, chain.from_iterable(map(dict.values, self._whole)), self._whole_values))
                and [pick(members) for pick, members in self._parts] == self._part_values
                and list(map(torch.Tensor.data_ptr, self._tensors.values())) == self._addresses
                and all(members[name] is value for members, name, value in self._apart)
                and all(_is_same(_contents(cell), value) for cell, _, value in self._cells)
                and all(_still_has(now, before) for _, now, before in self._containers)
            )
        except (KeyError, RuntimeError, TypeError, ValueError):
            # A name is gone, or something that has come in place of a number compares its elements.
            return False

    def difference(self) -> str | None:
        """The name of one of `differences`."""
        return None if self._looks_the_same() else next((name for name, _ in self.differences()), None)

    def differences(self) -> Iterator[tuple[str, bool]]:
        """What was replaced, added or removed, moved in memory, set up otherwise, or left eval for train: its name, and whether
        it was a tensor and is another one."""
        for members in self._members:
            if len(members.now) != members.size:
                added = (name for name in members.now if name not in members.values and name not in _OWN)
                yield f"{members.path}{next(added, '')}", False
            for name, old in members.values.items():
                yield from _compare(members.path + name, old, members.now.get(name, _MISSING))
        for cell, name, old in self._cells:
            yield from _compare(name, old, _contents(cell))
        for name, container, before in self._containers:
            if not _still_has(container, before):
                yield name, False
        for (name, tensor), address in zip(self._tensors.items(), self._addresses, strict=True):
            if tensor.data_ptr() != address:
                yield name, False

    def restore(self) -> None:
        """Set attributes back to what they were, but for what functions close over."""
        if self._looks_the_same():
            return
        for members in self._members:
            for name, old in members.values.items():
                if not _is_same(old, members.now.get(name, _MISSING)):
                    members.now[name] = old
        for _, container, before in self._containers:
            if isinstance(container, dict):
                container.clear()
                container.update(before)


def _compare(name: str, old: Any, new: Any) -> Iterator[tuple[str, bool]]:
    if not _is_same(old, new):
        yield name, isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)


def _is_same(old: Any, new: Any) -> bool:
    return old is new or (isinstance(old, _PLAIN) and type(old) is type(new) and bool(old == new))


def _contained(container: Any) -> Any:
    """What matters of a dictionary or a list."""
    return dict(container) if isinstance(container, dict) else list(filter(_is_plain, container))


def _still_has(container: Any, before: Any) -> bool:
    """Whether a dictionary or a list has what it had; a list may have got more numbers, as it may be a log of calls."""
    now = _contained(container)
    if isinstance(container, dict):
        return bool(now == before)
    return bool(now[: len(before)] == before) and not any(isinstance(value, str) for value in now[len(before) :])


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, _PLAIN)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an object of someone's own class, whose attributes may be a part of the model."""
    opaque = (torch.nn.Module, torch.Tensor, type, ModuleType, FunctionType, MethodType, partial)
    ours = not isinstance(value, opaque) and not type(value).__module__.startswith(("torch.", "builtins"))
    return ours and hasattr(value, "__dict__")


def _holders(model: Any) -> Iterator[tuple[Any, str]]:
    """The modules and functions that a model is made of, and the object that it is, each with what precedes its names."""
    seen: set[int] = set()
    left = [model]
    while left:
        holder = left.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, tuple):
            left += holder
        elif isinstance(holder, torch.nn.Module):
            for name, part in holder.named_modules():
                seen.add(id(part))
                yield part, f"{name}." if name else ""
        elif isinstance(holder, partial):
            left += [holder.func, *holder.args, *holder.keywords.values()]
        elif isinstance(holder, MethodType):
            left += [holder.__func__, holder.__self__]
        elif isinstance(holder, FunctionType):
            yield holder, ""
            original = vars(holder).get("_torchdynamo_orig_callable")
            left += [_contents(cell) for cell in holder.__closure__ or ()] if original is None else [original]
        elif _is_plain_object(holder):
            if holder is model:
                yield holder, ""
            left += [value for value in vars(holder).values() if isinstance(value, torch.nn.Module)]


def find_modules(model: Any) -> list[torch.nn.Module]:
    """The modules that a model is or calls, without the parts of others."""
    return [holder for holder, path in _holders(model) if isinstance(holder, torch.nn.Module) and not path]


def is_compiled(model: Any) -> bool:
    """Whether `torch.compile` has made any part of a model."""
    return any(_configs(holder) for holder, _ in _holders(model))


def captures_itself(model: Any) -> bool:
    """Whether any part of a model is compiled so that it captures CUDA graphs of its own."""
    return any(owns_graphs(holder) for holder, _ in _holders(model))


def owns_graphs(part: Any) -> bool:
    """Whether a module or a function is compiled so that it captures CUDA graphs of its own (`mode="reduce-overhead"`)."""
    return any(config.get("triton.cudagraphs") for config in _configs(part))


def _configs(part: Any) -> list[Mapping[str, Any]]:
    """Configurations with which `torch.compile` has wrapped a part, and with which `Module.compile` has compiled it."""
    members = vars(part)
    compiled = (members, vars(members.get("_compiled_call_impl") or _configs))
    return [each["get_compiler_config"]() or {} for each in compiled if "get_compiler_config" in each]
