"""What a model computes of its timesteps and conditions alone, once for a run instead of once for a step.

A model's graph is split in two. One part reads no state: the embedding of the timestep and its projections, keys and values of
the text, class embeddings, the scales and shifts that both give together. It runs before the loop, for all timesteps in one
batch. The other part takes the results as inputs, a row of them for each step.
"""

from __future__ import annotations

import enum
import math
import operator
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fastddim.tracing import ExportError, quiet, told, trace

# Values beyond it stay in the loop: bytes for one run.
DEFAULT_HOIST_LIMIT = 1 << 28
# Steps that the bytes are counted for where a run's number is not known.
TYPICAL_STEPS = 50

# Rows that are computed together, and alone, to see that none has a part in another.
_ROWS_TOGETHER = 3

_aten = torch.ops.aten
# They cost nothing, and hide that two values are one.
_VIEWS = (
    _aten.view.default, _aten.reshape.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.expand.default,
    _aten.transpose.int, _aten.permute.default, _aten.slice.Tensor, _aten.select.int, _aten.split.Tensor,
    _aten.split_with_sizes.default, _aten.chunk.default, _aten.alias.default, _aten.flatten.using_ints,
    _aten.unflatten.int, operator.getitem,
)  # fmt: skip


class _Reads(enum.Flag):
    """What a value depends on."""

    NOTHING = 0
    STEP = 1
    CONDITIONS = 2
    BOTH = 3
    STATE = 4


_BEFORE = (_Reads.STEP, _Reads.CONDITIONS, _Reads.BOTH)


class Hoisted(NamedTuple):
    """What was computed before a loop of N steps over R rows of the model's input.

    Attributes:
        steps: `[N, T]`, a row for each step; None where nothing depends on the step alone.
        both: `[N, R, F]`, what depends on step and conditions; None where nothing does.
        kept: what depends on the conditions alone, `[R, ...]`, or of another shape where no row of the input has a part in it.
    """

    steps: torch.Tensor | None
    both: torch.Tensor | None
    kept: tuple[torch.Tensor, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [tensor for tensor in (self.steps, self.both, *self.kept) if tensor is not None]

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return sum(tensor.nbytes for tensor in self.tensors)


class HoistedModel:
    """A model in two parts, over the same parameters: `prepare` before a loop, `predict` in it.

    Attributes:
        steps_width: T, numbers for each step; 0 for none.
        both_width: F, numbers for each step and row; 0 for none.
        by_rows: for each of `Hoisted.kept`, whether it has a row for each row of the model's input.
        before, rest: the two graphs.
        reads_timestep, reads_conditions: whether `predict` reads the timestep, and each of the conditions.
        operations: how many operations of the model's graph left the loop.
        per_step, per_row, per_pair: bytes for each step, each row of the conditions, and each pair of the two.
    """

    def __init__(self, before: GraphModule, rest: GraphModule, layout: _Layout) -> None:
        self.before = before
        self.rest = rest
        self.steps_width, self.both_width = layout.steps.width, layout.both.width
        self.by_rows = layout.by_rows
        _, t, *conditions = (node for node in rest.graph.nodes if node.op == "placeholder")
        self.reads_timestep = bool(t.users)
        self.reads_conditions = tuple(bool(node.users) for node in conditions[: layout.conditions])
        self.operations = layout.operations
        self.per_step, self.per_pair = layout.steps.nbytes, layout.both.nbytes
        self.per_row = layout.kept_bytes

    def compile(self, mode: str) -> None:
        """Compile the part in the loop, in a mode of `torch.compile`."""
        self.rest.compile(mode=mode)

    def prepare(self, t: torch.Tensor, conditions: Sequence[torch.Tensor]) -> Hoisted:
        """The values for timesteps `[N]` and the model's other tensors, in the order of the call that was traced."""
        values = list(self.before(t, *conditions))
        steps = values.pop(0) if self.steps_width else None
        both = values.pop(0) if self.both_width else None
        return Hoisted(steps, both, tuple(values))

    def rows_of(
        self, values: Hoisted, step: int | torch.Tensor, rows: int, half: slice | None = None
    ) -> list[torch.Tensor]:
        """The values of one step for `predict`.

        Args:
            values: what `prepare` has computed.
            step: the step's number, or a tensor `[]` that has it.
            rows: how many rows the model's input has.
            half: the rows of the conditions that are meant; None for all.
        """

        def pick(of_steps: torch.Tensor) -> torch.Tensor:
            return of_steps.index_select(0, step.view(1))[0] if isinstance(step, torch.Tensor) else of_steps[step]

        taken = [] if values.steps is None else [pick(values.steps).expand(rows, -1)]
        if values.both is not None:
            both = pick(values.both)
            taken.append((both if half is None else both[half]).expand(rows, -1))
        for value, by_rows in zip(values.kept, self.by_rows, strict=True):
            taken.append(value[half] if by_rows and half is not None else value)
        return taken

    def predict(
        self,
        x: torch.Tensor,
        t: torch.Tensor | None,
        conditions: Sequence[torch.Tensor | None],
        values: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The prediction `[R, ...]` with a step's values: `[R, T]` of the step, `[R, F]` of both, then what is kept.

        The timestep and the conditions that it does not read may be None.
        """
        output: torch.Tensor = self.rest(x, t, *conditions, *values)
        return output


def split_model(
    call: Callable[[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]], torch.Tensor],
    modules: Iterable[torch.nn.Module],
    x: torch.Tensor,
    t: torch.Tensor,
    conditions: Sequence[torch.Tensor],
    *,
    batched: Sequence[bool],
    kind: str,
    resized: bool = False,
    pairs: bool = True,
    steps: int = TYPICAL_STEPS,
    limit: int = DEFAULT_HOIST_LIMIT,
) -> HoistedModel | None:
    """A model in two parts.

    Args:
        call: `call(x, t, conditions)`, the model's prediction.
        modules: the modules whose parameters it reads.
        x, t, conditions: examples: x `[R, ...]`, t `[R]`, R >= 2.
        batched: for each condition whether it is `[R, ...]`.
        kind: the model's name for errors.
        resized: x's last two of four dimensions may differ from call to call.
        pairs: whether what depends on both a step and the conditions is wanted, for each pair of the two.
        steps: the number of steps that the memory is counted for, together with R.
        limit: bytes that the values of a run may take. Of larger ones the operation stays in the loop.

    Returns:
        None where nothing can leave the loop.

    Raises:
        ExportError: a model that `torch.export` cannot trace, or that changes its own buffers.
    """
    wrapped = _Call(call, modules)
    dims: dict[str, Sequence[int]] = {"x": (0, 2, 3) if resized else (0,), "t": (0,)}
    examples = {"x": x, "t": t}
    for index, (condition, in_batch) in enumerate(zip(conditions, batched, strict=True)):
        examples[f"condition_{index}"] = condition
        dims[f"condition_{index}"] = (0,) if in_batch else ()
    program = trace(wrapped, examples, dims, kind)
    if any(_changes_memory(node) for node in program.graph.nodes):
        try:
            with quiet():
                program = program.run_decompositions({})
        except Exception as error:
            raise ExportError(f"model: {kind} changes its values in place: {told(error)}") from error
    if program.graph_signature.buffers_to_mutate or program.graph_signature.user_inputs_to_mutate:
        changed = [
            *program.graph_signature.buffers_to_mutate.values(),
            *program.graph_signature.user_inputs_to_mutate.values(),
        ]
        raise ExportError(f"model: {kind} changes {changed[0]!r} in each call")
    with quiet():
        traced = program.module(check_guards=False)
    splitter = _Splitter(traced, rows=x.shape[0], steps=steps)
    if not pairs:
        splitter.leave_pairs()
    while (built := splitter.build(limit)) is not None:
        before, rest, layout = built
        model = HoistedModel(before, rest, layout)
        mixed = _find_mixed(model, layout, t, conditions, batched)
        if not mixed:
            return model
        for index in mixed:
            splitter.leave(index)
    return None


class _Call(torch.nn.Module):
    """A call as a module whose `forward` takes a dictionary."""

    def __init__(self, call: Callable[..., torch.Tensor], modules: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self._call = call
        self._modules_of_the_call = torch.nn.ModuleList(modules)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        given = dict(inputs)
        return self._call(given.pop("x"), given.pop("t"), list(given.values()))


def _changes_memory(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


class _Packed(NamedTuple):
    """Values of one dtype side by side: their nodes, and the shape of each without its row's dimension."""

    nodes: list[Node]
    shapes: list[tuple[int, ...]]

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def width(self) -> int:
        return sum(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.nodes[0].meta["val"].dtype.itemsize if self.nodes else 0


@dataclass(frozen=True)
class _Layout:
    steps: _Packed
    both: _Packed
    by_rows: tuple[bool, ...]
    kept_bytes: int
    conditions: int
    operations: int


class _Splitter:
    """A traced graph, and which of its nodes leave the loop."""

    def __init__(self, traced: GraphModule, rows: int, steps: int) -> None:
        self._traced = traced
        nodes = list(traced.graph.nodes)
        self._inputs = [node for node in nodes if node.op == "placeholder"]
        self._rows, self._steps = rows, steps
        # Of the batch's size there may be a symbol for each input.
        sizes = [node.meta["val"].shape[:1] for node in self._inputs]
        self._batch = {size[0].node.expr for size in sizes if size and isinstance(size[0], torch.SymInt)}
        self._reads: dict[Node, _Reads] = {}
        for node in nodes:
            self._reads[node] = self._find_reads(node)
        # Values that the loop computes itself, whatever else is computed of them before it.
        self._own: set[Node] = set()
        self._handed_on: list[Node] = []

    def _find_reads(self, node: Node) -> _Reads:
        if node.op == "placeholder":
            index = self._inputs.index(node)
            return (_Reads.STATE, _Reads.STEP)[index] if index < 2 else _Reads.CONDITIONS
        if node.op == "get_attr":
            return _Reads.NOTHING
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            # Of the batch's size alone: known wherever there is a batch.
            return _Reads.NOTHING if self._is_of_batch(value) else _Reads.STATE
        reads = _Reads.NOTHING
        for source in node.all_input_nodes:
            reads |= self._reads[source]
        tags = getattr(node.target, "tags", ())
        if node.op != "call_function" or _changes_memory(node) or torch.Tag.nondeterministic_seeded in tags:
            return _Reads.STATE
        # What a step alone decides has to stay a row for each step.
        if _Reads.STEP in reads and not all(map(self._has_rows, _tensors(value))):
            return _Reads.STATE
        return _Reads.STATE if _Reads.STATE in reads else reads

    def _is_of_batch(self, size: Any) -> bool:
        return not isinstance(size, torch.SymInt) or size.node.expr.free_symbols <= self._batch

    def _has_rows(self, value: torch.Tensor) -> bool:
        """Whether a tensor has one row for each of the batch, and no other size that may change."""
        first = value.shape[:1]
        in_batch = bool(first) and isinstance(first[0], torch.SymInt) and first[0].node.expr in self._batch
        return in_batch and all(isinstance(size, int) for size in value.shape[1:])

    def _find_parts(self) -> tuple[list[Node], set[Node]]:
        """The values that the loop is handed, and the nodes that it computes."""
        values, inside = [], set()
        needed = set()
        for node in reversed(self._traced.graph.nodes):
            if node.op == "output" or node in needed:
                if node.op == "call_function" and self._reads[node] in _BEFORE and node not in self._own:
                    values.append(node)
                else:
                    inside.add(node)
                    needed.update(node.all_input_nodes)
        return values[::-1], inside

    def leave_pairs(self) -> None:
        """Leave what depends on both step and conditions in the loop."""
        for node, reads in self._reads.items():
            if reads is _Reads.BOTH:
                self._reads[node] = _Reads.STATE

    def leave(self, index: int) -> None:
        """Have the loop compute a value itself; its number is that in the order of the results."""
        self._own.add(self._handed_on[index])

    def _bytes(self, node: Node) -> int:
        value, reads = node.meta["val"], self._reads[node]
        size: int = math.prod(size for size in value.shape if isinstance(size, int)) * value.dtype.itemsize
        size *= self._steps if _Reads.STEP in reads else 1
        return size * (self._rows if self._has_rows(value) and _Reads.CONDITIONS in reads else 1)

    def _keep_within(self, limit: int) -> list[Node]:
        """The values of no more bytes than a limit, without the largest ones: the loop computes these itself."""
        while sum(map(self._bytes, values := self._settle())) > limit:
            self._own.add(max(values, key=self._bytes))
        return values

    def _settle(self) -> list[Node]:
        """The values that the loop is handed: none that is only another view, and those of a step of one dtype."""
        while True:
            values, _ = self._find_parts()
            own = {node for node in values if not self._can_be_handed_on(node)}
            for reads in () if own else (_Reads.STEP, _Reads.BOTH):
                nodes = [node for node in values if self._reads[node] is reads]
                dtypes: Counter[torch.dtype] = Counter()
                for node in nodes:
                    dtypes[node.meta["val"].dtype] += self._bytes(node)
                own |= {node for node in nodes if node.meta["val"].dtype != dtypes.most_common(1)[0][0]}
            if not own:
                return values
            self._own |= own

    def _can_be_handed_on(self, node: Node) -> bool:
        value = node.meta.get("val")
        if node.target in _VIEWS or not isinstance(value, torch.Tensor):
            return False
        whole = all(isinstance(size, int) for size in value.shape)
        return self._has_rows(value) or (whole and self._reads[node] is _Reads.CONDITIONS)

    def build(self, limit: int) -> tuple[GraphModule, GraphModule, _Layout] | None:
        """The graphs before and in the loop, and how the values within a limit are laid out; None where there are none."""
        values = self._keep_within(limit)
        if not values:
            return None
        steps, both = (
            _Packed(nodes, [tuple(node.meta["val"].shape[1:]) for node in nodes])
            for nodes in (
                [node for node in values if self._reads[node] is reads] for reads in (_Reads.STEP, _Reads.BOTH)
            )
        )
        kept = [node for node in values if self._reads[node] is _Reads.CONDITIONS]
        self._handed_on = [*steps.nodes, *both.nodes, *kept]
        _, inside = self._find_parts()
        layout = _Layout(
            steps,
            both,
            tuple(self._has_rows(node.meta["val"]) for node in kept),
            sum(map(self._bytes, kept)) // self._rows,
            len(self._inputs) - 2,
            sum(node.op == "call_function" and node not in inside for node in self._traced.graph.nodes),
        )
        before = _Before(self._inputs, self._reads, self._batch).build(self._traced, steps, both, kept)
        return before, self._build_rest(steps, both, kept, inside), layout

    def _build_rest(self, steps: _Packed, both: _Packed, kept: Sequence[Node], inside: Container[Node]) -> GraphModule:
        graph = Graph()
        copies: dict[Node, Node] = {}
        for node in self._inputs:
            copies[node] = graph.node_copy(node)
        rows = [(name, packed) for name, packed in (("steps", steps), ("both", both)) if packed.nodes]
        packs = [graph.placeholder(f"{name}_row") for name, _ in rows]
        for index, node in enumerate(kept):
            copies[node] = graph.placeholder(f"kept_{index}")
        for pack, (_, packed) in zip(packs, rows, strict=True):
            parts = graph.call_function(_aten.split_with_sizes.default, (pack, packed.sizes, 1))
            for index, (node, shape) in enumerate(zip(packed.nodes, packed.shapes, strict=True)):
                part = graph.call_function(operator.getitem, (parts, index))
                flat = len(shape) == 1
                copies[node] = part if flat else graph.call_function(_aten.reshape.default, (part, [-1, *shape]))
        for node in self._traced.graph.nodes:
            if node in copies or node not in inside:
                continue
            if node.op == "output":
                graph.output(_map_output(node, copies))
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.eliminate_dead_code()
        return GraphModule(self._traced, graph)


def _map_output(node: Node, copies: Mapping[Node, Node]) -> Node:
    (result,) = pytree.tree_leaves(node.args)
    return copies[result]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class _Before:
    """The graph before the loop: for N steps over R rows of conditions."""

    def __init__(self, inputs: Sequence[Node], reads: Mapping[Node, _Reads], batch: set[Any]) -> None:
        self._reads, self._symbols = reads, batch
        self._graph = Graph()
        # A node's values over the rows of a level: the steps, the rows of the conditions, or each step's rows of them.
        self._copies: dict[tuple[Node, _Reads], Node] = {}
        _, t, *conditions = inputs
        for node in (t, *conditions):
            self._copies[node, reads[node]] = self._graph.node_copy(node)
        steps = self._graph.call_function(_aten.sym_size.int, (self._copies[t, _Reads.STEP], 0))
        rows: Any = 1
        batched = (node for node in conditions if isinstance(next(iter(node.meta["val"].shape), 0), torch.SymInt))
        for node in batched:
            rows = self._graph.call_function(_aten.sym_size.int, (self._copies[node, _Reads.CONDITIONS], 0))
            break
        both = self._graph.call_function(operator.mul, (steps, rows))
        self._sizes = {_Reads.STEP: steps, _Reads.CONDITIONS: rows, _Reads.BOTH: both}

    def build(self, traced: GraphModule, steps: _Packed, both: _Packed, kept: Sequence[Node]) -> GraphModule:
        wanted = [
            *((node, _Reads.STEP) for node in steps.nodes),
            *((node, _Reads.BOTH) for node in both.nodes),
            *((node, _Reads.CONDITIONS) for node in kept),
        ]
        needed = self._find_needed(wanted)
        for node in traced.graph.nodes:
            for level in (_Reads.STEP, _Reads.CONDITIONS, _Reads.BOTH):
                if (node, level) in needed and (node, level) not in self._copies:
                    self._copies[node, level] = self._copy(node, level)
        results = []
        if steps.nodes:
            results.append(self._pack(steps, _Reads.STEP))
        if both.nodes:
            shape = [self._sizes[_Reads.STEP], self._sizes[_Reads.CONDITIONS], both.width]
            results.append(self._reshape(self._pack(both, _Reads.BOTH), shape))
        results += [self._copies[node, _Reads.CONDITIONS] for node in kept]
        self._graph.output(tuple(results))
        self._graph.eliminate_dead_code()
        return GraphModule(traced, self._graph)

    def _sources(self, node: Node, level: _Reads) -> list[tuple[Node, _Reads]]:
        """What a node's value over a level is made of."""
        if self._is_size(node):
            return []
        own = self._reads[node]
        if own not in (_Reads.NOTHING, level):
            return [(node, own)]
        return [(source, level) for source in node.all_input_nodes]

    def _is_size(self, node: Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.SymInt) and value.node.expr in self._symbols

    def _find_needed(self, wanted: Sequence[tuple[Node, _Reads]]) -> set[tuple[Node, _Reads]]:
        needed = set(wanted)
        left = list(wanted)
        while left:
            for source in self._sources(*left.pop()):
                if source not in needed:
                    needed.add(source)
                    left.append(source)
        return needed

    def _copy(self, node: Node, level: _Reads) -> Node:
        if self._is_size(node):
            size: Node = self._sizes[level]
            return size
        own = self._reads[node]
        if own in (_Reads.NOTHING, level):
            return self._graph.node_copy(node, lambda source: self._copies[source, level])
        return self._spread(node, own)

    def _spread(self, node: Node, own: _Reads) -> Node:
        """What depends on steps or on conditions, `[N, ...]` or `[R, ...]`, as `[N * R, ...]`."""
        source, shape = self._copies[node, own], node.meta["val"].shape
        if not any(isinstance(size, torch.SymInt) for size in shape):
            return source
        wide = self._graph.call_function(_aten.unsqueeze.default, (source, 1 if own is _Reads.STEP else 0))
        sizes = [self._sizes[_Reads.STEP], self._sizes[_Reads.CONDITIONS], *shape[1:]]
        wide = self._graph.call_function(_aten.expand.default, (wide, sizes))
        return self._reshape(wide, [self._sizes[_Reads.BOTH], *shape[1:]])

    def _pack(self, packed: _Packed, level: _Reads) -> Node:
        parts = [
            self._copies[node, level]
            if len(shape) == 1
            else self._reshape(self._copies[node, level], [self._sizes[level], math.prod(shape)])
            for node, shape in zip(packed.nodes, packed.shapes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else self._graph.call_function(_aten.cat.default, (parts, 1))

    def _reshape(self, source: Node, shape: list[Any]) -> Node:
        return self._graph.call_function(_aten.reshape.default, (source, shape))


def _find_mixed(
    model: HoistedModel, layout: _Layout, t: torch.Tensor, conditions: Sequence[torch.Tensor], batched: Sequence[bool]
) -> list[int]:
    """Numbers of the values in which one row has a part in another's, found by computing rows together and alone.

    With random weights, since a product with zeros, as many layers begin, hides what it is a product of.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(tensor.shape, generator=generator) * scale
        return drawn.to(tensor.device, tensor.dtype)

    weights = {
        name: draw(weight, max(1, weight[0].numel() if weight.ndim else 1) ** -0.5)
        for name, weight in model.before.named_parameters()
        if weight.is_floating_point()
    }
    given = [draw(condition) if condition.is_floating_point() else condition for condition in conditions]

    def prepare(t: torch.Tensor, conditions: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
        """Each value, and which of its dimensions has the rows of the conditions; -1 for none."""
        results: tuple[torch.Tensor, ...] = torch.func.functional_call(model.before, weights, (t, *conditions))
        values, left = [], list(results)
        for packed, dim in ((layout.steps, -1), (layout.both, 1)):
            if packed.nodes:
                values += [(part, dim) for part in torch.split(left.pop(0), packed.sizes, -1)]
        return values + [(value, 0 if rows else -1) for value, rows in zip(left, layout.by_rows, strict=True)]

    times = torch.arange(1, 2 * _ROWS_TOGETHER, 2, device=t.device).to(t.dtype)
    together = prepare(times, given)
    mixed = set()
    per_step = len(layout.steps.nodes) + len(layout.both.nodes)
    for row in range(_ROWS_TOGETHER):
        alone = prepare(times[row : row + 1], given)
        for index in range(per_step):
            if not _is_close(together[index][0][row : row + 1], alone[index][0]):
                mixed.add(index)
    for row in range(next((c.shape[0] for c, rows in zip(given, batched, strict=True) if rows), 0)):
        alone = prepare(times, [c[row : row + 1] if rows else c for c, rows in zip(given, batched, strict=True)])
        for index, (value, dim) in enumerate(together):
            if dim >= 0 and not _is_close(value.narrow(dim, row, 1), alone[index][0]):
                mixed.add(index)
    return sorted(mixed)


def _is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = float(one.abs().amax()) if one.numel() else 0.0
    # A sum may be taken in another order; another row's part would be of the value's own size.
    tolerance = 1e3 * torch.finfo(one.dtype).eps
    return torch.allclose(one, other, rtol=0.0, atol=min(tolerance, 0.1) * scale, equal_nan=True)
