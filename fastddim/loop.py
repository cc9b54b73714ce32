"""The sampling loop: eager, or over static buffers so that a step or the whole of it is one CUDA graph.

A captured run reads everything that may change from one run to the next from the device: table, timesteps, seeds, scales,
the limit's numbers, the model's keyword arguments. They go there in one transfer, and nothing comes back.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fastddim.backends import draw_start, prepare_step, take_step, takes_kernel
from fastddim.captures import Captures
from fastddim.coefficients import StepTable
from fastddim.compiled import is_traced
from fastddim.config import Limit, limit_kind, limit_numbers
from fastddim.cuda_graph import Graph, GraphCache, MemoryPool, is_captured
from fastddim.hoisting import Hoisted, HoistedModel
from fastddim.model_call import Hoister, Model, call_model, has_rows
from fastddim.noise import seed_bits
from fastddim.step import Guidance, StepOptions

# Called after each step with its number, the state and x0.
OnStep = Callable[[int, torch.Tensor, torch.Tensor], None]

GRAPH_MODES = ("auto", "loop", "step", "off")
# The least number of rows that a captured step can take; runs of more steps get the next power of two.
_LEAST_CAPACITY = 64
# Up to so many elements a state's loop step by step is kept for the next run of its kind, and so many kinds of them.
_SMALL = 1 << 15
_MAX_EAGER = 8


# Cached, as reading a device's type costs a run as much as an operation.
@functools.cache
def graph_mode(graph: str, device: torch.device) -> str:
    """What one of `GRAPH_MODES` comes to on a device: `"auto"` is `"step"` on a GPU and `"off"` elsewhere."""
    if graph != "auto":
        return graph
    return "step" if device.type == "cuda" else "off"


# Not frozen, which would cost a run more than all of its checks.
@dataclass(slots=True)
class Run:
    """One run, checked; it does not change.

    Attributes:
        table: the steps, and the scale of a drawn start.
        shape: shape of the state, `[B, ...]`.
        dtype, model_dtype, device: dtype of the state, dtype of the model's input, and where both are.
        start: the state to start from, on any device; None draws it from the seeds.
        seeds: one per sample, or None.
        noise: `[num_steps, B, ...]` to add instead of what the seeds give.
        limit: the limit applied to x0.
        guidance: its values are numbers; None for a run without guidance.
        guided_steps: the steps with guidance; at the others the model is called with the conditional half alone.
        batched: one model call for both halves, or one for each.
        kwargs: the model's keyword arguments, nested as it takes them, on the device; with guidance its halves stacked.
        channels_last: whether the model's input is in channels-last memory format.
        backend: implementation of the step, as in `fastddim.ddim_step`.
    """

    table: StepTable
    shape: tuple[int, ...]
    dtype: torch.dtype
    model_dtype: torch.dtype
    device: torch.device
    start: torch.Tensor | None = None
    seeds: list[int] | None = None
    noise: torch.Tensor | None = None
    limit: Limit = None
    guidance: Guidance | None = None
    guided_steps: range = range(1 << 30)
    batched: bool = True
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    channels_last: bool = False
    backend: str = "auto"

    @property
    def copies(self) -> int:
        """Rows of the model's input for each sample."""
        return 1 if self.guidance is None else 2

    def guided(self, step: int) -> bool:
        """Whether a step's model call has both halves."""
        return self.guidance is not None and step in self.guided_steps

    def walk(self, steps: Iterable[int]) -> Iterator[tuple[int, bool, bool]]:
        """Each step, whether it is guided, and whether guidance resumes at it."""
        before = True
        for step in steps:
            guided = self.guided(step)
            yield step, guided, guided and not before
            before = guided


def upload(values: np.ndarray[Any, Any], out: torch.Tensor) -> torch.Tensor:
    """Copy an array to a tensor of its size and dtype, without waiting for the device."""
    source: torch.Tensor = torch.from_numpy(values)
    if out.is_cuda:
        # Pinned memory is not reused before the copy is done.
        source = source.pin_memory()
    return out.copy_(source.view(out.shape), non_blocking=True)


def upload_new(values: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """An array, which nothing else writes to, as a tensor on a device, without waiting for it."""
    if device.type == "cpu":
        return torch.from_numpy(values)
    return upload(values, torch.empty(values.shape, dtype=torch.from_numpy(values).dtype, device=device))


# All of a run but its table, shape and what differs from run to run.
_OF_A_KIND = attrgetter(
    "dtype", "model_dtype", "device", "limit", "guidance", "guided_steps", "batched", "channels_last", "backend"
)


class _Buffers:
    """A run's state and the model's arguments, which every step overwrites.

    Args:
        hoisted: the model in two parts, of which `prepare` calls the first one, `predict` the second.
    """

    def __init__(self, model: Model, run: Run, hoisted: HoistedModel | None = None) -> None:
        self.model, self._hoisted = model, hoisted
        self.values: Hoisted | None = None
        self.batch = run.shape[0]
        self.x = torch.empty(run.shape, dtype=run.dtype, device=run.device)
        # Unguided, of the same dtype and layout, the state itself is what the model takes.
        self.model_input: torch.Tensor | None = None
        if run.copies == 2 or run.model_dtype != run.dtype or run.channels_last:
            self.model_input = torch.empty(
                (run.copies * self.batch, *run.shape[1:]),
                dtype=run.model_dtype,
                device=run.device,
                memory_format=torch.channels_last if run.channels_last else torch.contiguous_format,
            )
        self.previous_x0 = torch.empty_like(self.x) if run.table.looks_back else None
        self.guidance, self.batched = run.guidance, run.batched
        # The half of the model's input that is left where a guided run has no guidance.
        cond_first = run.guidance is not None and run.guidance.cond_first
        self._cond, self._uncond = self._halves()[:: 1 if cond_first else -1]
        self.load(run.kwargs)

    def load(self, kwargs: Mapping[str, Any]) -> None:
        """Take another run's keyword arguments."""
        self.kwargs = kwargs
        self._half_kwargs: dict[int, Mapping[str, Any]] = {}
        self._half_tensors: dict[int | None, list[torch.Tensor]] = {}

    def _halves(self) -> tuple[slice, slice]:
        return slice(0, self.batch), slice(self.batch, 2 * self.batch)

    def fill_input(self) -> None:
        """The model's input from the state."""
        if self.model_input is not None:
            self.model_input.unflatten(0, (-1, self.batch)).copy_(self.x)  # type: ignore[no-untyped-call]

    def input_of(self, guided: bool) -> torch.Tensor | None:
        """What the step writes besides the state: the rows of the model's input that its next call takes."""
        if self.model_input is None or guided or self.guidance is None:
            return self.model_input
        return self.model_input[self._cond]

    def rows_of(self, guided: bool, rows: torch.Tensor) -> torch.Tensor:
        """The entries of `rows` `[copies * B]` for the model's input."""
        return rows if guided or self.guidance is None else rows[self._cond]

    def rejoin(self, t: torch.Tensor | None = None) -> None:
        """After steps without guidance: the conditional half, and its timesteps, for both again."""
        assert self.model_input is not None
        self.model_input[self._uncond].copy_(self.model_input[self._cond])
        if t is not None:
            t[self._uncond].copy_(t[self._cond])

    def prepare(self, timesteps: torch.Tensor) -> None:
        """Compute what is hoisted, for the timesteps of all steps `[N]` or `[N, rows]`, in the memory of the call before if
        there was one.
        """
        if self._hoisted is None:
            return
        timesteps = timesteps[:, 0] if timesteps.ndim == 2 else timesteps
        before = self._hoisted.prepare(timesteps, _tensors(self.kwargs))
        if self.values is None:
            self.values = before
            return
        for mine, new in zip(self.values.tensors, before.tensors, strict=True):
            mine.copy_(new)

    @property
    def hoisted_bytes(self) -> int:
        """Memory of what is computed before the steps."""
        return 0 if self.values is None else self.values.nbytes

    def predict(self, guided: bool, t: torch.Tensor, step: int | torch.Tensor) -> torch.Tensor:
        """The model's output for the current input: `[2 * B, ...]` if guided, else `[B, ...]`.

        Args:
            guided: whether with both halves.
            t: the timestep of each row.
            step: the step's number, where it is known on the host, or `[]` on the device.
        """
        given = self.input_of(guided)
        given = self.x if given is None else given
        if self.guidance is None:
            return self._call(given, t, step, None)
        if not guided:
            return self._call(given, t, step, self._cond)
        if self.batched:
            return self._call(given, t, step, None)
        both: torch.Tensor | None = None
        for half in self._halves():
            output = self._call(given[half], t[half], step, half)
            if both is None:
                last = not output.is_contiguous() and output.is_contiguous(memory_format=torch.channels_last)
                both = torch.empty(
                    (2 * self.batch, *output.shape[1:]),
                    dtype=output.dtype,
                    device=output.device,
                    memory_format=torch.channels_last if last else torch.contiguous_format,
                )
            # At once, as a model with CUDA graphs of its own writes its next output over this one.
            both[half] = output
        assert both is not None
        return both

    def _call(self, x: torch.Tensor, t: torch.Tensor, step: int | torch.Tensor, half: slice | None) -> torch.Tensor:
        """The model's output for some rows of its input: all, or a half."""
        kwargs = self.kwargs if half is None else self._half_of(half)
        if self._hoisted is None:
            return call_model(self.model, x, t, kwargs)
        assert self.values is not None
        start = None if half is None else half.start
        conditions = self._half_tensors.get(start)
        if conditions is None:
            conditions = self._half_tensors[start] = _tensors(kwargs)
        rows = self._hoisted.rows_of(self.values, step, x.shape[0], half)
        return call_model(self._hoisted.predict, x, t, {"conditions": conditions, "values": rows})

    def _half_of(self, half: slice) -> Mapping[str, Any]:
        """The keyword arguments of one half, views of the stacked ones."""
        taken = self._half_kwargs.get(half.start)
        if taken is None:

            def take(value: Any) -> Any:
                return value[half] if has_rows(value, 2 * self.batch) else value

            taken = self._half_kwargs[half.start] = pytree.tree_map(take, dict(self.kwargs))
        return taken


def _tensors(kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(dict(kwargs)) if isinstance(leaf, torch.Tensor)]


class EagerLoop:
    """The loop step by step, on any device, with any model.

    Args:
        model: what the steps call.
        run: gives shapes, dtypes and structure.
        hoisted: the model in two parts.
    """

    def __init__(self, model: Model, run: Run, hoisted: HoistedModel | None = None) -> None:
        self.buffers = _Buffers(model, run, hoisted)
        self.x = self.buffers.x
        self._table, self._kind = run.table, _OF_A_KIND(run)
        self._seeds: torch.Tensor | None = None
        called = np.array(run.table.timesteps, dtype=run.table.timestep_dtype)
        self._timesteps = upload_new(np.repeat(called[:, None], run.copies * run.shape[0], 1), run.device)
        # The guided step and the other one.
        self._prepared: dict[bool, Any] = {}

    def fits(self, run: Run) -> bool:
        """Whether the loop takes a run: of its shape, without given noise, and like the one that it was made for."""
        return (
            run.table is self._table
            and _OF_A_KIND(run) == self._kind
            and self.x.is_inference() == torch.is_inference_mode_enabled()
        )

    def __call__(self, run: Run, steps: Iterable[int], on_step: OnStep | None) -> torch.Tensor:
        """The final state `[B, ...]`, over which the next run writes."""
        buffers = self.buffers
        buffers.load(run.kwargs)
        seeds = None if run.seeds is None else upload_new(seed_bits(run.seeds), run.device)
        if seeds is not None:
            # What is prepared has this tensor.
            self._seeds = seeds if self._seeds is None else self._seeds.copy_(seeds)
        if run.start is not None:
            self.x.copy_(run.start)
        else:
            assert seeds is not None
            draw_start(run.backend, seeds, self.x, run.table.start_scale)
        buffers.fill_input()
        # A copy, as a model may write to its timesteps.
        called = self._timesteps.clone()
        buffers.prepare(called)
        timesteps = called.unbind()
        for step, guided, again in run.walk(steps):
            if again:
                buffers.rejoin()
            output = buffers.predict(guided, buffers.rows_of(guided, timesteps[step]), step)
            x0 = self._step(run, step, guided, output)
            if on_step is not None:
                assert x0 is not None
                on_step(step, self.x, x0)
                # What was called may have set entries of the state.
                buffers.fill_input()
        # The caller's tensors are not kept.
        buffers.load({})
        return self.x

    def _step(self, run: Run, step: int, guided: bool, output: torch.Tensor) -> torch.Tensor | None:
        """Take a step: x0."""
        prepared = self._prepared.get(guided)
        if prepared is not None and prepared.fits(output):
            x0: torch.Tensor | None = prepared(output, step)[1]
            return x0
        options = StepOptions(
            guidance=run.guidance if guided else None,
            limit=run.limit,
            noise=None if run.noise is None else run.noise[step],
            seeds=self._seeds if run.noise is None and run.table.stochastic else None,
            out=self.x,
            model_input=self.buffers.input_of(guided),
            previous_x0=self.buffers.previous_x0,
        )
        # Given noise is another tensor each time.
        prepared = None if run.noise is not None else prepare_step(run.backend, output, self.x, run.table, options)
        if prepared is None:
            return take_step(run.backend, output, self.x, run.table, step, options)[1]
        self._prepared[guided] = prepared
        return self._step(run, step, guided, output)


class StaticLoop:
    """The loop over buffers that stay where they are, as graphs: `begin` and a step, or all of them in one.

    Args:
        model: what the steps call.
        run: gives shapes, dtypes and structure; its numbers are `load`ed for each run.
        whole: one graph of all steps, for runs of that many.
        pool: the graphs' memory.
        probe: as for `Graph`.
        hoisted: the model in two parts, the first of which is a part of `begin`.

    Raises:
        CaptureError: the model cannot be captured.
    """

    def __init__(
        self,
        model: Model,
        run: Run,
        whole: bool,
        pool: MemoryPool | None,
        probe: bool = True,
        hoisted: HoistedModel | None = None,
    ) -> None:
        self._run = run
        leaves, self._structure = pytree.tree_flatten(dict(run.kwargs))
        self._leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        kwargs = pytree.tree_unflatten(self._leaves, self._structure)
        self.buffers = _Buffers(model, replace(run, kwargs=kwargs), hoisted)
        self.x = self.buffers.x
        # x0 of the guided step and of the other one, in the graphs' own memory.
        self._x0: dict[bool, torch.Tensor] = {}
        at = self._at = _layout(run)
        words = self._words = torch.zeros(at["ratios"].stop, dtype=torch.int64, device=run.device)
        numbers = words.view(torch.float64)
        self._seeds, self._index = words[at["seeds"]], words[at["index"]][0]
        self._scales, self._limit_values = numbers[at["guidance"]], numbers[at["limit"]]
        self._start_scale, self._table = (
            numbers[at["start_scale"]][0],
            numbers[at["table"]].view(_capacity(run.table), -1),
        )
        self._ratios = words[at["ratios"]].view(torch.float32).view(-1, 2)
        t_dtype = getattr(torch, run.table.timestep_dtype)
        self._t = torch.zeros(run.copies * run.shape[0], dtype=t_dtype, device=run.device)
        self._timesteps = (numbers if t_dtype.is_floating_point else words)[at["timesteps"]]
        noise_steps = () if run.noise is None else ((len(run.table),) if whole else ())
        self._noise = None if run.noise is None else self.x.new_zeros((*noise_steps, *run.shape))
        self._workspace = None
        if takes_kernel(run.backend, (self.x,)):
            from fastddim.kernels import Workspace

            self._workspace = Workspace()
        self._loads_limit = _loads_limit(run)
        self.load(run)
        # Outside of the graphs, which write their values over these.
        self._prepare()
        self.nbytes = 0
        self._graphs: dict[str, Graph] = {}
        bodies: dict[str, Callable[[], None]] = {}
        if whole:
            bodies["loop"] = self._loop
        else:
            bodies["begin"] = self._begin
            for guided in {run.guided(step) for step in range(len(run.table))}:
                bodies["guided" if guided else "step"] = partial(self._step, guided)
        for name, body in bodies.items():
            graph = self._graphs[name] = Graph(body, run.device, pool, probe)
            self.nbytes += graph.nbytes
        self.nbytes += self.buffers.hoisted_bytes
        self.nbytes += sum(
            tensor.nbytes
            for tensor in (
                self.x,
                self.buffers.model_input,
                self.buffers.previous_x0,
                self._words,
                self._t,
                self._noise,
                *self._leaves,
            )
            if isinstance(tensor, torch.Tensor)
        )

    def load(self, run: Run) -> None:
        """Put a run's numbers, start and keyword arguments where the graphs read them."""
        at, steps = self._at, len(run.table)
        words = np.zeros(len(self._words), dtype=np.int64)
        numbers = words.view(np.float64)
        if run.seeds is not None:
            words[at["seeds"]] = seed_bits(run.seeds)
        if run.guidance is not None:
            numbers[at["guidance"]] = run.guidance.scale, run.guidance.rescale
        numbers[at["limit"]] = limit_numbers(run.limit)
        numbers[at["start_scale"]] = run.table.start_scale
        (numbers if self._t.is_floating_point() else words)[at["timesteps"]][:steps] = run.table.timesteps
        numbers[at["table"]][: run.table.columns.size] = run.table.columns.reshape(-1)
        words[at["ratios"]][:steps] = run.table.ratios.view(np.int64).reshape(-1)
        upload(words, self._words)
        for mine, given in zip(self._leaves, pytree.tree_leaves(dict(run.kwargs)), strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(given, non_blocking=True)
        if run.start is not None:
            self.x.copy_(run.start, non_blocking=True)
        if self._noise is not None and self._noise.ndim > len(self._run.shape):
            assert run.noise is not None
            self._noise.copy_(run.noise, non_blocking=True)

    def __call__(self, run: Run, steps: Iterable[int], on_step: OnStep | None) -> torch.Tensor:
        """Run what was loaded: the final state, which the next run overwrites."""
        if "loop" in self._graphs:
            self._graphs["loop"].replay()
            return self.x
        self._graphs["begin"].replay()
        for step, guided, again in run.walk(steps):
            if again:
                self.buffers.rejoin(self._t)
            if self._noise is not None:
                assert run.noise is not None
                self._noise.copy_(run.noise[step])
            self._graphs["guided" if guided else "step"].replay()
            if on_step is not None:
                on_step(step, self.x, self._x0[guided])
                self.buffers.fill_input()
        return self.x

    def _begin(self) -> None:
        run = self._run
        if run.start is None:
            draw_start(run.backend, self._seeds, self.x, 1.0 if run.table.start_scale == 1 else self._start_scale)
        self.buffers.fill_input()
        self._t.copy_(self._timesteps[0])
        self._prepare()

    def _prepare(self) -> None:
        self.buffers.prepare(self._timesteps.to(self._t.dtype))

    def _loop(self) -> None:
        run = self._run
        self._begin()
        self._index.zero_()
        for step, guided, again in run.walk(range(len(run.table))):
            if again:
                self.buffers.rejoin(self._t)
            self._step(guided, None if self._noise is None else self._noise[step])

    def _step(self, guided: bool, noise: torch.Tensor | None = None) -> None:
        run, buffers = self._run, self.buffers
        t = buffers.rows_of(guided, self._t)
        output = buffers.predict(guided, t, self._index)
        guidance = run.guidance if guided else None
        if guidance is not None:
            rescale = self._scales[1] if guidance.rescaled else 0.0
            guidance = replace(guidance, scale=self._scales[0], rescale=rescale)
        noise = self._noise if noise is None else noise
        options = StepOptions(
            guidance=guidance,
            limit=run.limit,
            limit_values=self._limit_values if self._loads_limit else None,
            noise=noise,
            seeds=self._seeds if noise is None and run.seeds is not None else None,
            out=self.x,
            model_input=buffers.input_of(guided),
            advance=True,
            timesteps=self._timesteps,
            next_timestep=t,
            previous_x0=buffers.previous_x0,
            ratios=self._ratios,
            workspace=self._workspace,
        )
        _, x0 = take_step(run.backend, output, self.x, self._table, self._index, options)
        assert x0 is not None
        self._x0[guided] = x0


def _loads_limit(run: Run) -> bool:
    """Whether captured steps read their limit's numbers from the device: the reference would read them on the host."""
    if run.limit is None:
        return False
    return not is_captured(run.device) or takes_kernel(
        run.backend, (torch.empty(0, dtype=run.dtype, device=run.device),)
    )


def _capacity(table: StepTable) -> int:
    return max(_LEAST_CAPACITY, 1 << (len(table) - 1).bit_length())


def _layout(run: Run) -> dict[str, slice]:
    """Where a captured run's numbers lie among its 64-bit words on the device."""
    capacity = _capacity(run.table)
    sizes = {
        "seeds": run.shape[0],
        "guidance": 2,
        "limit": 2,
        "start_scale": 1,
        "index": 1,
        "timesteps": capacity,
        "table": capacity * run.table.columns.shape[1],
        "ratios": capacity,
    }
    ends = accumulate(sizes.values())
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def _capture_key(run: Run, mode: str) -> Hashable:
    """What a capture is of: all that `StaticLoop.load` cannot change."""
    leaves, structure = pytree.tree_flatten(dict(run.kwargs))
    described = tuple(
        (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf) for leaf in leaves
    )
    guidance = run.guidance
    guided = () if guidance is None else tuple(map(run.guided, range(len(run.table))))
    key = (
        mode,
        (len(run.table), guided) if mode == "loop" else frozenset(guided),
        _capacity(run.table),
        run.table.looks_back,
        run.table.timestep_dtype,
        run.shape,
        run.dtype,
        run.model_dtype,
        run.device,
        run.start is None,
        run.start is None and run.table.start_scale != 1,
        run.seeds is None,
        run.noise is None,
        limit_kind(run.limit, numbers_change=True) if _loads_limit(run) else run.limit,
        guidance and (guidance.rescaled, guidance.fixed, run.batched),
        described,
        structure,
        run.channels_last,
        run.backend,
        torch.is_autocast_enabled(run.device.type) and torch.get_autocast_dtype(run.device.type),
    )
    hash(key)
    return key


def pad(run: Run, batch: int) -> Run:
    """A run of more samples, the last one repeated; each depends on its own row alone."""
    missing = batch - run.shape[0]
    if not missing:
        return run

    def fill(value: Any, dim: int = 0) -> Any:
        rows = run.shape[0]
        if (
            not isinstance(value, torch.Tensor)
            or value.ndim <= dim
            or value.shape[dim] not in (rows, run.copies * rows)
        ):
            return value
        halves = torch.split(value, rows, dim)
        return torch.cat([part for half in halves for part in (half, *[half.narrow(dim, rows - 1, 1)] * missing)], dim)

    return replace(
        run,
        shape=(batch, *run.shape[1:]),
        start=fill(run.start),
        seeds=None if run.seeds is None else run.seeds + [run.seeds[-1]] * missing,
        noise=fill(run.noise, 1),
        kwargs=pytree.tree_map(fill, dict(run.kwargs)),
    )


class Loop:
    """A model's sampling loop: as a CUDA graph where that is asked for and possible, else step by step. Thread-safe.

    Args:
        model: `model(x, t, **kwargs)`.
        graph: one of `GRAPH_MODES`; see `SamplerOptions`.
        max_graphs: how many captures are kept, at least 1.
        module: what makes the captures stale when it changes (`ModelState`); the model itself by default.
        hoister: finds the two parts of the model where what is constant over the steps is to leave the loop.

    Attributes:
        captures: the graphs, of `StaticLoop`s.
        hoisted_bytes: memory of what left the loop, in the last run.
    """

    def __init__(
        self,
        model: Model,
        graph: str = "auto",
        max_graphs: int = 8,
        module: Model | None = None,
        hoister: Hoister | None = None,
    ) -> None:
        self.model = model
        self._module = model if module is None else module
        self._hoister = hoister
        self.hoisted_bytes = 0
        self.graph = graph
        self.captures: Captures[StaticLoop] = Captures(self._module, max_graphs, model)
        # For small runs on a CPU, which the host's work would slow, by their shapes.
        self._eager: dict[tuple[int, ...], EagerLoop] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or unpickled loop captures anew.
        return Loop, (self.model, self.graph, self.graphs.max_entries, self._module, self._hoister)

    @property
    def graphs(self) -> GraphCache[StaticLoop]:
        """The captures that are kept."""
        return self.captures.graphs

    def __call__(
        self, run: Run, steps: Iterable[int] | None = None, on_step: OnStep | None = None, *, at_once: bool = False
    ) -> torch.Tensor:
        """The final state `[B, ...]`, in memory of its own. To be called where torch records no gradients.

        Args:
            run: what to run.
            steps: `range(len(run.table))`, or an iterator over it that reports progress.
            on_step: called after each step; not with `"loop"`. The next step writes over what it gets.
            at_once: capture the first run of its kind too.
        """
        steps = range(len(run.table)) if steps is None else steps
        mode = graph_mode(self.graph, run.device)
        if mode != "off" and not self.captures.in_use:
            final = self._try_replay(run, mode, steps, on_step, at_once)
            if final is not None:
                return final
        parts = self._find_parts(run)
        usual = mode == "off" and parts is None and run.noise is None and not is_traced()
        # Out of the way of other threads, and of a run within a callback.
        loop = self._eager.pop(run.shape, None) if usual else None
        if loop is None or not loop.fits(run):
            loop = EagerLoop(self.model, run, parts)
        final = loop(run, steps, on_step)
        self.hoisted_bytes = 0 if parts is None else loop.buffers.hoisted_bytes
        if usual and loop.x.is_cpu and loop.x.numel() <= _SMALL:
            final = final.clone()
            if len(self._eager) >= _MAX_EAGER:
                self._eager.clear()
            self._eager[run.shape] = loop
        return final

    def _find_parts(self, run: Run) -> HoistedModel | None:
        """The model's two parts for a run, None where it stays whole."""
        if self._hoister is None:
            return None
        rows = run.copies * run.shape[0]
        x = torch.zeros((rows, *run.shape[1:]), dtype=run.model_dtype, device=run.device)
        if run.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        t = torch.zeros(rows, dtype=getattr(torch, run.table.timestep_dtype), device=run.device)
        return self._hoister.find(x, t, run.kwargs, steps=len(run.table))

    def _try_replay(
        self, run: Run, mode: str, steps: Iterable[int], on_step: OnStep | None, at_once: bool
    ) -> torch.Tensor | None:
        """The final state, None where the run has to go step by step."""

        def build(probe: bool) -> StaticLoop:
            pool = self.graphs.pool(run.device)
            return StaticLoop(self.model, run, mode == "loop", pool, probe, self._find_parts(run))

        def use(static: StaticLoop) -> torch.Tensor:
            static.load(run)
            self.hoisted_bytes = static.buffers.hoisted_bytes
            return static(run, steps, on_step).clone()

        warn = partial(self._warn, run, mode)
        try:
            key = _capture_key(run, mode)
        except TypeError as error:
            if self.captures.see(None):
                warn(f"a keyword argument that cannot be told from others ({error})")
            return None
        return self.captures.use(key, run.device, build, use, warn, at_once=at_once)

    def _warn(self, run: Run, mode: str, reason: str) -> None:
        warnings.warn(
            f"graph: {mode!r} is not used for a state {tuple(run.shape)} of {run.dtype} on {run.device}, the steps are"
            f" launched one by one instead: {reason}",
            RuntimeWarning,
            stacklevel=7,
        )
