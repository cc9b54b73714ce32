"""What a pipeline computes between its first model call of a step and the scheduler's step, put off until it is known whether
a capture does all of it.

A `Segment` goes through these operations with the pipeline's own code. What it has seen before in this order, it does not
do, but answers with `Deferred` tensors, of the shapes that came last time; what it has not, it does and remembers. Whoever
reads the data of a deferred tensor makes the segment do all that was put off. So the pipeline's code is never second-guessed:
what is captured is what it did, and what it did not do before runs as it is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

# Beyond so many continuations a segment is not one that repeats.
_MOST_CHILDREN = 16
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_ON_HOST = {
    torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.__array__,
    torch.Tensor.__reduce_ex__, torch.Tensor.__repr__, torch.Tensor.__deepcopy__, torch.Tensor.__dlpack__,
    torch.Tensor.__dlpack_device__,
}  # fmt: skip


class _Kind(NamedTuple):
    """What a deferred tensor says of itself."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Kind:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class Ref(NamedTuple):
    """A tensor of a segment: output `output` of operation `node`, or its input `output` where `node` is None."""

    node: int | None
    output: int


class Node(NamedTuple):
    """One operation: `function(*args, **kwargs)`, whose tensors are `Ref`s among the leaves."""

    function: Callable[..., Any]
    leaves: list[Any]
    structure: pytree.TreeSpec

    def result(self, value_of: Callable[[Ref], torch.Tensor]) -> Any:
        """What it returns, given the data of its tensors."""
        leaves = [value_of(leaf) if isinstance(leaf, Ref) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return self.function(*args, **kwargs)

    def __call__(self, value_of: Callable[[Ref], torch.Tensor]) -> list[Any]:
        """The leaves of its result."""
        return pytree.tree_leaves(self.result(value_of))


class Place:
    """How far a segment has come, by what led there; and how it may go on.

    Attributes:
        outputs: what the last operation gave: kinds of tensors, or None.
        children: operations that came next, and where they lead.
        scalings: products with a number of which there was another one: kinds of such operations.
        refused: where segments begin, the functions that cannot be put off, and why.
    """

    def __init__(self, outputs: Sequence[Any] = (), structure: Any = None) -> None:
        self.outputs, self._structure = outputs, structure
        self.children: dict[Hashable, Place] = {}
        self.scalings: set[Hashable] = set()
        self.refused: dict[Any, str] = {}

    @classmethod
    def after(cls, result: Any) -> Place | None:
        """Where an operation with a result leads; None where the result has something that cannot be known beforehand."""
        leaves, structure = pytree.tree_flatten(result)
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            return None
        if not all(leaf is None or isinstance(leaf, torch.Tensor) for leaf in leaves):
            return None
        return cls([None if leaf is None else _Kind.of(leaf) for leaf in leaves], structure)

    def defer(self, segment: Segment, node: int) -> Any:
        """The result of the operation that leads here, with deferred tensors."""
        return pytree.tree_unflatten(
            [kind and Deferred(kind, segment, Ref(node, index)) for index, kind in enumerate(self.outputs)],
            self._structure,
        )


class Segment:
    """The operations from a step's first model call on.

    Args:
        root: where it begins: what it knows.

    Attributes:
        reason: why what came later was not put off; None while it is.
    """

    def __init__(self, root: Place) -> None:
        self._root = self.place = root
        self.nodes: list[Node] = []
        self.inputs: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._places: dict[int, int] = {}
        self._outputs: list[Sequence[Any]] = []
        self._values: dict[int, list[Any]] = {}
        self._open = True
        self.reason: str | None = None

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of `function(*args, **kwargs)`, with deferred tensors where it is one of a segment that goes on."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        if not self._open or torch.is_grad_enabled():
            return self._call_now(function, leaves, structure)
        try:
            refs, described = zip(*map(self._describe, leaves), strict=True) if leaves else ((), ())
            key = (function, structure, described)
            child = self.place.children.get(key)
        except TypeError:
            # An argument that cannot be told from others.
            return self._call_now(function, leaves, structure)
        node = Node(function, list(refs), structure)
        if child is None and function is _mul and isinstance(leaves[1], float):
            # The scale of a guidance that changes from step to step would be another operation each time.
            kind = (structure, described[0])
            if kind in self.place.scalings:
                number = torch.tensor(leaves[1], dtype=torch.float64, device="cpu")
                return self.call(_scale, (leaves[0], number), {})
            self.place.scalings.add(kind)
        if child is None:
            if len(self.place.children) >= _MOST_CHILDREN:
                return self._call_now(function, leaves, structure)
            self._catch_up()
            result = node.result(self.value)
            child = Place.after(result)
            if child is None:
                self.close(f"{_name_of(function)} returns something else than tensors")
                return result
            child = self.place.children.setdefault(key, child)
            self._values[len(self.nodes)] = pytree.tree_leaves(result)
        self.nodes.append(node)
        self._outputs.append(child.outputs)
        self.place = child
        return child.defer(self, len(self.nodes) - 1)

    def _call_now(self, function: Callable[..., Any], leaves: list[Any], structure: Any) -> Any:
        self.close(f"its own code calls {_name_of(function)} before the scheduler's step")
        args, kwargs = pytree.tree_unflatten(list(map(_value, leaves)), structure)
        return function(*args, **kwargs)

    def _describe(self, leaf: Any) -> tuple[Any, Hashable]:
        """A leaf as a node has it, and what it has to be equal in to be the same operation."""
        if isinstance(leaf, Deferred):
            if leaf.segment is self:
                return leaf.ref, leaf.ref
            leaf = leaf.value()
        if isinstance(leaf, torch.Tensor):
            index = self._places.setdefault(id(leaf), len(self.inputs))
            if index == len(self.inputs):
                self.inputs.append(leaf)
                self._versions.append(version(leaf))
            return Ref(None, index), (index, *_Kind.of(leaf), isinstance(leaf, torch.nn.Parameter))
        if not isinstance(leaf, _PLAIN):
            raise TypeError(f"{type(leaf).__name__}")
        # 1, 1.0 and True are equal.
        return leaf, (type(leaf), repr(leaf) if isinstance(leaf, float) else leaf)

    def value(self, ref: Ref) -> torch.Tensor:
        """A tensor's data: what was put off of it is done."""
        if ref.node is None:
            return self.inputs[ref.output]
        for index in [] if ref.node in self._values else self.needed(ref):
            self._do(index)
        value: torch.Tensor = self._values[ref.node][ref.output]
        return value

    def shape_of(self, ref: Ref) -> torch.Size:
        """A tensor's shape."""
        shape: torch.Size = (self.inputs if ref.node is None else self._outputs[ref.node])[ref.output].shape
        return shape

    def read(self, ref: Ref) -> torch.Tensor:
        """A tensor's data, for the pipeline's own code."""
        if self.reason is None and not self._open:
            self._refuse(self.needed(ref), "what it gives is used after the step")
        self.close("its own code reads what a model gives before the scheduler's step")
        return self.value(ref)

    def _do(self, index: int) -> None:
        if index not in self._values:
            self._values[index] = self.nodes[index](self.value)

    def _catch_up(self) -> None:
        for index in range(len(self.nodes)):
            self._do(index)

    @property
    def is_done(self) -> bool:
        """Whether everything was done."""
        return len(self._values) == len(self.nodes)

    def close(self, reason: str) -> None:
        """Do what was put off; nothing is from now on."""
        if self._open:
            self._catch_up()
            self._open, self.reason = False, reason

    def end(self) -> bool:
        """Let it go without doing what was put off; whether it was still going on.

        What was written to since it was given has to be seen while everything is done at once, as it is the first time.
        """
        was_open, self._open = self._open, False
        if list(map(version, self.inputs)) != self._versions:
            self.reason = "what a model is called with is written to before the step"
            self._refuse(range(len(self.nodes)), self.reason)
            return False
        return was_open

    def _refuse(self, nodes: Iterable[int], reason: str) -> None:
        self._root.refused.update((self.nodes[index].function, reason) for index in nodes)

    def needed(self, ref: Ref) -> list[int]:
        """The operations that a tensor needs, in order."""
        wanted = {ref.node}
        for index in range(len(self.nodes) - 1, -1, -1):
            if index in wanted:
                wanted |= {leaf.node for leaf in self.nodes[index].leaves if isinstance(leaf, Ref)}
        return sorted(index for index in wanted if index is not None)


class Guided(NamedTuple):
    """Two halves of a tensor, guided: `uncond + scale * (cond - uncond)`.

    Attributes:
        both: the halves, stacked.
        rows: how many a half has.
        scale: a number, or where it is.
        cond_first: whether the conditional half is the first one.
    """

    both: Ref
    rows: int
    scale: float | Ref
    cond_first: bool


def find_guidance(segment: Segment, ref: Ref) -> Guided | None:
    """What a tensor of a segment is the guidance of, None where it is something else."""
    nodes = segment.nodes

    def leaves_of(at: Any, *functions: Any) -> list[Any]:
        node = nodes[at.node] if isinstance(at, Ref) and at.node is not None else None
        return node.leaves if node is not None and node.function in functions else []

    match leaves_of(ref, _aten.add.Tensor):
        case [Ref() as uncond, scaled]:
            match leaves_of(scaled, _mul, _scale):
                case [change, (float() | Ref()) as scale] if leaves_of(change, _aten.sub.Tensor)[1:] == [uncond]:
                    cond = leaves_of(change, _aten.sub.Tensor)[0]
                    split = leaves_of(uncond, _aten.split.Tensor)
                    halves = {cond, uncond} == {Ref(uncond.node, 0), Ref(uncond.node, 1)}
                    if halves and len(split) == 2 and segment.shape_of(split[0])[0] == 2 * split[1]:
                        return Guided(split[0], split[1], scale, cond.output == 0)
    return None


_aten = torch.ops.aten
_mul = _aten.mul.Tensor


def _scale(x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """`x` times a number `[]`, rounded as a product with a Python number is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * number.to(wide)).to(x.dtype)


class Deferred(torch.Tensor):
    """A tensor of a `Segment`, whose data is computed when they are needed."""

    segment: Segment
    ref: Ref

    @staticmethod
    def __new__(cls, kind: _Kind, segment: Segment, ref: Ref) -> Deferred:
        made: Deferred = torch.Tensor._make_wrapper_subclass(
            cls, kind.shape, strides=kind.stride, dtype=kind.dtype, device=kind.device
        )
        made.segment, made.ref = segment, ref
        return made

    def value(self) -> torch.Tensor:
        """The tensor itself."""
        return self.segment.read(self.ref)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ON_HOST:
                args, kwargs = _real(args), _real(kwargs or {})
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        segments = [leaf.segment for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, Deferred)]
        segment = next((each for each in segments if each._open), segments[0])
        if not _repeats(func):
            segment.close(f"its own code calls {func} before the scheduler's step")
        return segment.call(func, args, kwargs)


@functools.cache
def _repeats(func: Any) -> bool:
    """Whether an operation of torch does the same to the same tensors, changes none of them, and asks nothing of their data."""
    tags = (torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return not func._schema.is_mutable and not any(tag in func.tags for tag in tags)


def _name_of(function: Any) -> str:
    return type(function).__name__ if isinstance(function, torch.nn.Module) else str(function)


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; one of inference mode does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _value(leaf: Any) -> Any:
    return leaf.value() if isinstance(leaf, Deferred) else leaf


def _real(tree: Any) -> Any:
    return pytree.tree_map(_value, tree)


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with its data, whether it was deferred or not."""
    return tensor.value() if isinstance(tensor, Deferred) else tensor
