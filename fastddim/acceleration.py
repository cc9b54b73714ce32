"""`accelerate`: a diffusers pipeline whose own code runs, over captured model calls and fused steps.

A pipeline's `__call__` runs as it is written. Its models and its scheduler are seen by it through views: between a step's
first model call and the scheduler's `step`, a `Segment` follows what the pipeline computes, guidance among it. What is known
from the step before becomes one CUDA graph, with the step itself as its last operation; what is not, runs as it is written.
So no pipeline is known by name, and prompts, latents, callbacks, masks and decoding are never written a second time here.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import diffusers
import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch.utils import _pytree as pytree

from fastddim.backends import take_step
from fastddim.capture_checks import ModelState, owns_graphs
from fastddim.captures import Captures, changes_itself
from fastddim.coefficients import StepCoefficients, StepTable
from fastddim.config import VARIANCE_TYPES, Limit, limit_from
from fastddim.cuda_graph import CaptureError, Graph, MemoryPool
from fastddim.deferral import Deferred, Place, Ref, Segment, find_guidance, real
from fastddim.hoisted_calls import HoistedCalls
from fastddim.loop import graph_mode
from fastddim.sampler_options import SamplerOptions
from fastddim.samplers import METHODS, Steps
from fastddim.samplers.sampling import read_scheduler
from fastddim.scheduler import DDIMScheduler
from fastddim.scheduler_rows import FORWARD, RowCache, has_rows
from fastddim.step import Guidance, StepOptions

_log = logging.getLogger("fastddim")

P = TypeVar("P")
# The method of LeRobot's and Diffusion Policy's diffusion policies that has their loop.
_POLICY_LOOP = "conditional_sample"

# Columns of a table, by what they multiply or give.
_OF_STATE = [StepCoefficients._fields.index(name) for name in ("x0_from_x", "next_from_x")]
_OF_NEXT = [index for index, name in enumerate(StepCoefficients._fields) if name.startswith(("next_", "noise_"))]

# Arguments of a step that a table's rows heed.
_KNOWN = frozenset(
    {
        "model_output",
        "timestep",
        "sample",
        "eta",
        "use_clipped_model_output",
        "generator",
        "variance_noise",
        "return_dict",
    }
)
# Schedulers whose step returns the next state alone, and those that return what they have noised.
_WITHOUT_X0 = (diffusers.DPMSolverMultistepScheduler, diffusers.FlowMatchEulerDiscreteScheduler)
_RENOISING = (diffusers.LCMScheduler, diffusers.TCDScheduler)


class _Acceleration:
    """What an accelerated pipeline keeps between calls: its captured graphs, and what has been logged.

    Attributes:
        turn: held by the call under way.
    """

    def __init__(self, options: SamplerOptions) -> None:
        self.options = options
        self.turn = threading.RLock()
        self._logged: set[str] = set()
        self.captures: Captures[_StaticStep] = Captures((), options.max_graphs)
        self._roots: dict[Hashable, Place] = {}
        self._models: dict[str, Any] = {}
        self._calls: dict[int, HoistedCalls] = {}

    def follow(self, models: Mapping[str, Any]) -> None:
        """Forget what was captured of other models than these."""
        if self._models.keys() != models.keys() or any(self._models[name] is not models[name] for name in models):
            self._roots.clear()
            self.captures.graphs.clear()
            self.captures = Captures((), self.options.max_graphs)
            self._calls.clear()
            self._models = dict(models)

    def root(self, device: torch.device) -> Place:
        """Where the segments of a kind of call begin."""
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        return self._roots.setdefault((device, autocast), Place())

    def calls_of(self, model: Any) -> HoistedCalls:
        """A model's calls in two parts."""
        if id(model) not in self._calls:
            self._calls[id(model)] = HoistedCalls(model, self.options.hoist_limit)
        return self._calls[id(model)]

    def begin(self, timesteps: list[float]) -> None:
        """A run over a scheduler's `timesteps` begins."""
        for calls in self._calls.values():
            calls.begin(timesteps)

    @property
    def hoisted_bytes(self) -> int:
        """Memory of what left the steps of the last run."""
        return sum(calls.nbytes for calls in self._calls.values())

    def release(self) -> None:
        """Free the captured graphs, after the call under way."""
        with self.turn:
            self.captures.graphs.clear()
            self._roots.clear()
            self._calls.clear()

    def log_once(self, name: str, reason: str) -> None:
        """Say why something of a call runs as it is written, once for each reason."""
        if reason not in self._logged:
            self._logged.add(reason)
            _log.warning("%s: %s", name, reason)


def _view(original: Any, cls: type) -> Any:
    """An object of another class with the very members of `original`."""
    view: Any = object.__new__(cls)
    object.__setattr__(view, "__dict__", vars(original))
    return view


class _View:
    """Mixed into the class of a member of the pipeline: with its very members, within a call of the pipeline."""

    __slots__ = ("_call", "_original")
    _call: _Call
    _original: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy is one of the member itself.
        return self._original.__reduce_ex__(protocol)


class _CalledModel(_View):
    """A model whose calls the pipeline's call gets."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call.call_model(self._original, args, kwargs)


class _SteppedScheduler(_View):
    """A scheduler whose steps the pipeline's call takes."""

    __slots__ = ()


@functools.cache
def _called_model_of(model: Any) -> type:
    return type(model.__name__, (_CalledModel, model), {"__module__": model.__module__})


@functools.cache
def _stepped_scheduler_of(scheduler: Any) -> type:
    def method(name: str) -> property:
        # Those of an instance that a user has replaced come before its class's.
        def get(self: Any) -> Any:
            own = vars(self).get(name) or getattr(super(view, self), name)
            call = getattr(self._call, name)
            # Pipelines look into the signatures.
            return functools.wraps(own)(lambda *args, **kwargs: call(self, own, args, kwargs))

        return property(get)

    members = {name: method(name) for name in ("step", "set_timesteps")}
    view = type(scheduler.__name__, (_SteppedScheduler, scheduler), {**members, "__module__": scheduler.__module__})
    return view


_calls = threading.local()


def _component(name: str) -> property:
    """A member of an accelerated pipeline: within a call of it what the call makes of it."""

    def get(self: Any) -> Any:
        members = _members(self)
        if name not in members:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = members[name]
        running = getattr(_calls, "running", ())
        return running[-1].see(value) if running and running[-1].pipe is self else value

    def put(self: Any, value: Any) -> None:
        running = getattr(_calls, "running", ())
        vars(self)[name] = running[-1].unsee(value) if running and running[-1].pipe is self else value

    def remove(self: Any) -> None:
        del vars(self)[name]

    return property(get, put, remove)


def _members(pipe: Any) -> dict[str, Any]:
    """What a pipeline, or a policy, which is a module, consists of."""
    return {**vars(pipe), **vars(pipe).get("_modules", {})}


class _Method(NamedTuple):
    """How the steps of a scheduler are taken from a table.

    Attributes:
        table: its rows, from the run's first step on.
        draws: the steps that draw noise.
        first: the number of the run's first step among the scheduler's timesteps.
        limit: the limit applied to x0.
        options: the step's options that the table is of.
    """

    table: StepTable
    draws: list[bool]
    first: int
    limit: Limit
    options: tuple[Any, ...]


class _Stepper:
    """The steps of one scheduler in one call of a pipeline.

    Args:
        view: what the pipeline sees of it.
        unknown: why no table has its steps, after "is", so that its own `step` takes them; None where one has.
    """

    def __init__(self, view: Any, unknown: str | None) -> None:
        self.view, self.unknown = view, unknown
        self.timesteps: list[float] = []
        self._method: _Method | None = None
        self._next = -1
        self.previous_x0: torch.Tensor | None = None

    def begin(self, timesteps: torch.Tensor) -> None:
        """A run's timesteps `[num_steps]`, on the CPU."""
        self.timesteps, self._method, self._next = timesteps.tolist(), None, -1

    def find(self, timestep: Any, options: Mapping[str, Any]) -> tuple[_Method, int] | None:
        """The table that has the step from `timestep`, and its row; None where the scheduler's own step takes it."""
        step = self._number_of(timestep)
        if step is None:
            return None
        chosen = tuple(options.get(name) for name in ("eta", "use_clipped_model_output"))
        method = self._method
        if method is None or step != self._next or method.options != chosen:
            found = _table_of(self.view, self.timesteps[:step], self.timesteps[step:], options)
            if found is None:
                return None
            table, draws = found
            method = self._method = _Method(
                _unscaled(table, self.view, timestep, step), draws, step, _limit_of(self.view), chosen
            )
            self.previous_x0 = None
        self._next = step + 1
        return method, step - method.first

    def _number_of(self, timestep: Any) -> int | None:
        own = self.view.timesteps
        # A view of the scheduler's own, whose number a device is not asked for.
        if isinstance(timestep, torch.Tensor) and _is_entry_of(timestep, own):
            return int(timestep.storage_offset() - own.storage_offset())
        number = float(timestep)
        following = 0 <= self._next < len(self.timesteps) and self.timesteps[self._next] == number
        if following:
            return self._next
        return self.timesteps.index(number) if number in self.timesteps else None


def _is_entry_of(number: torch.Tensor, numbers: torch.Tensor) -> bool:
    """Whether a tensor of one number is a view of one of `numbers`."""
    same = number.numel() == 1 and number.device == numbers.device and number.dtype == numbers.dtype
    return same and number.untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr()


class _Work(NamedTuple):
    """A step of a table, as one capture is of it."""

    sample: torch.Tensor
    table: StepTable
    row: int
    noise: torch.Tensor | None
    limit: Limit
    previous_x0: torch.Tensor | None
    dtype: torch.dtype

    @property
    def kind(self) -> Hashable:
        """What captures of two steps would differ in."""
        sample = self.sample
        return (
            sample.shape,
            sample.stride(),
            sample.dtype,
            self.noise is None,
            self.limit,
            self.previous_x0 is None,
            self.dtype,
        )

    def take(self, backend: str, model_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next state and x0."""
        previous = None if self.previous_x0 is None else self.previous_x0.clone()
        options = StepOptions(limit=self.limit, noise=self.noise, out=self.empty(), previous_x0=previous)
        x_next, x0 = take_step(backend, model_output, self.sample, self.table, self.row, options)
        assert x0 is not None
        return x_next, x0

    def empty(self) -> torch.Tensor:
        """Where the next state goes."""
        return torch.empty_like(self.sample, dtype=self.dtype)


class _StaticStep:
    """A segment over buffers that stay where they are, and the step that ends it, as one graph.

    Args:
        segment: has the operations, and inputs like those that will come.
        ref: the model's output among its tensors.
        work: the step; None where the scheduler takes it itself.
        backend: implementation of the step.
        device: where the work runs.
        pool, probe: as for `Graph`.

    Attributes:
        nbytes: device memory of the capture and its buffers.
    """

    def __init__(
        self, segment: Segment, ref: Ref, work: _Work | None, backend: str, device: torch.device,
        pool: MemoryPool | None, probe: bool,
    ) -> None:  # fmt: skip
        guided = None if work is None else find_guidance(segment, ref)
        # The fused step guides too, where each half is of the state.
        self._guided = guided if guided is not None and work is not None and guided.rows == len(work.sample) else None
        if self._guided is not None:
            ref = self._guided.both
        self._nodes = [(index, segment.nodes[index]) for index in segment.needed(ref)]
        leaves = [leaf for _, node in self._nodes for leaf in node.leaves]
        if self._guided is not None:
            leaves.append(self._guided.scale)
        wanted = {leaf.output for leaf in leaves if isinstance(leaf, Ref) and leaf.node is None}
        given = {index: segment.inputs[index] for index in wanted}
        self._inputs = {
            index: value if isinstance(value, torch.nn.Parameter) else torch.empty_like(value, device=device)
            for index, value in given.items()
        }
        self._ref, self._backend, self._steps = ref, backend, work is not None
        if work is not None:
            self._rows = torch.empty(1, work.table.columns.shape[1], dtype=torch.float64, device=device)
            self._row = torch.zeros((), dtype=torch.int64, device=device)
            self._sample, self._limit = torch.empty_like(work.sample), work.limit
            self._noise = None if work.noise is None else torch.empty_like(work.noise)
            self._previous_x0 = None if work.previous_x0 is None else torch.empty_like(work.previous_x0)
            self._next = work.empty()
        self._results: tuple[torch.Tensor, ...] = ()
        self.load(segment, work)
        graph = self._graph = Graph(self._do, device, pool, probe)
        buffers = [*self._inputs.values()]
        self.nbytes = graph.nbytes + sum(buffer.nbytes for buffer in buffers)

    def load(self, segment: Segment, work: _Work | None) -> None:
        """Put the numbers of a step where the graph reads them."""
        for index, buffer in self._inputs.items():
            if not isinstance(buffer, torch.nn.Parameter):
                buffer.copy_(segment.inputs[index], non_blocking=True)
        if work is None:
            return
        self._sample.copy_(work.sample)
        self._rows.copy_(work.table.on(self._rows.device)[0][work.row : work.row + 1])
        for to, value in ((self._noise, work.noise), (self._previous_x0, work.previous_x0)):
            if to is not None:
                assert value is not None
                to.copy_(value)

    def _do(self) -> None:
        values: dict[int, list[Any]] = {}

        def value_of(ref: Ref) -> torch.Tensor:
            found: torch.Tensor = self._inputs[ref.output] if ref.node is None else values[ref.node][ref.output]
            return found

        for index, node in self._nodes:
            values[index] = node(value_of)
        output = value_of(self._ref)
        if not self._steps:
            self._results = (output,)
            return
        guidance = None
        if self._guided is not None:
            scale = self._guided.scale
            guidance = Guidance(
                value_of(scale) if isinstance(scale, Ref) else scale, cond_first=self._guided.cond_first
            )
        options = StepOptions(
            guidance=guidance, limit=self._limit, noise=self._noise, out=self._next, previous_x0=self._previous_x0
        )
        x_next, x0 = take_step(self._backend, output, self._sample, self._rows, self._row, options)
        assert x0 is not None
        self._results = x_next, x0

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """Do what was loaded: the next state and x0, or the model's output, in memory of their own."""
        self._graph.replay()
        return tuple(result.clone() for result in self._results)


class _Call:
    """One call of an accelerated pipeline.

    Args:
        pipe: the pipeline.
        name: its class's, for what is logged.
    """

    def __init__(self, pipe: Any, name: str) -> None:
        self.pipe, self._name = pipe, name
        self._acceleration: _Acceleration = pipe._acceleration
        # By identity: what the pipeline sees of a member, and the member.
        self._views: dict[int, tuple[Any, Any]] = {}
        self._steppers: dict[int, _Stepper] = {}
        self._whole: dict[int, bool] = {}
        self._segment: Segment | None = None
        # The step of the run that comes next, if it is not the first one.
        self._number: int | None = None
        # Models called before a run's timesteps are known, as text encoders, are no part of a step.
        self._in_run = False
        models = {key: value for key, value in _members(pipe).items() if isinstance(value, torch.nn.Module)}
        self._acceleration.follow(models)

    def __enter__(self) -> None:
        _calls.running = [*getattr(_calls, "running", ()), self]

    def __exit__(self, *error: object) -> None:
        _calls.running = _calls.running[:-1]
        # The call's tensors should be free at its end.
        self._views.clear()
        self._steppers.clear()
        self._segment = None

    def see(self, value: Any) -> Any:
        """What the pipeline's code sees of a member."""
        if id(value) in self._views:
            return self._views[id(value)][0]
        if isinstance(value, SchedulerMixin):
            view = self._view_scheduler(value)
        elif isinstance(value, torch.nn.Module):
            kind: Any = type(value)
            view = _view(value, _called_model_of(kind))
        else:
            return value
        object.__setattr__(view, "_call", self)
        object.__setattr__(view, "_original", value)
        self._views[id(value)] = view, value
        return view

    def unsee(self, value: Any) -> Any:
        """The member that the pipeline's code sees as `value`."""
        return value._original if isinstance(value, _View) else value

    def _view_scheduler(self, scheduler: Any) -> Any:
        kind: Any = type(scheduler)
        view = _view(scheduler, _stepped_scheduler_of(kind))
        self._steppers[id(view)] = _Stepper(view, _unknown_scheduler(scheduler))
        return view

    def set_timesteps(self, view: Any, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The scheduler's own, which begins a run."""
        self._in_run, self._segment = True, None
        stepper = self._steppers[id(view)]
        if stepper.unknown is not None:
            return own(*args, **kwargs)
        given = inspect.signature(own).bind(*args, **kwargs)
        # On the pipeline's device they would have to be read back.
        device = given.arguments.pop("device", None)
        result = own(*given.args, **given.kwargs)
        stepper.begin(view.timesteps)
        self._number = None
        self._acceleration.begin(stepper.timesteps)
        view.timesteps = view.timesteps.to(device)
        return result

    def call_model(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a model's call, put off where it is a part of a step that may be captured."""
        if not self._in_run:
            return model(*args, **kwargs)
        calls = self._acceleration.calls_of(model) if self._acceleration.options.hoist else None
        apart = None if calls is None else calls.take_apart(args, kwargs, self._number)
        function, given, named = (model, args, kwargs) if apart is None else (*apart, {})
        root = self._acceleration.root(_device_of(model)) if self._is_captured(model) else None
        if root is None:
            result = function(*given, **named)
        elif function in root.refused:
            self._acceleration.log_once(
                self._name, f"its {type(model).__name__} is not captured: {root.refused[function]}"
            )
            result = function(*given, **named)
        else:
            if self._segment is None:
                self._segment = Segment(root)
            result = self._segment.call(function, given, named)
        if calls is None:
            return result
        if apart is not None:
            return calls.wrap(result, args, kwargs)
        calls.note(result)
        return result

    def _is_captured(self, model: Any) -> bool:
        if id(model) not in self._whole:
            captured = graph_mode(self._acceleration.options.graph, _device_of(model)) != "off"
            reason = _reason_against(self.pipe, model) if captured else None
            if reason is not None:
                self._acceleration.log_once(self._name, f"its {type(model).__name__} is not captured: {reason}")
            self._whole[id(model)] = captured and reason is None
        return self._whole[id(model)]

    def step(self, view: Any, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step of the run: in the graph of its model's calls where that is captured."""
        segment, self._segment = self._segment, None
        given = inspect.signature(own).bind(*args, **kwargs)
        given.apply_defaults()
        options = {**given.arguments, **given.arguments.get("kwargs", {})}
        output: Any = options.get("model_output")
        sample: Any = options.get("sample")
        stepper = self._steppers[id(view)]
        found = None
        if stepper.unknown is not None:
            self._acceleration.log_once(self._name, f"the steps are its scheduler's own, as it is {stepper.unknown}")
        elif _is_usual(output, sample, given, own):
            found = stepper.find(options["timestep"], options)
        if found is None:
            args, kwargs = pytree.tree_map(lambda value: self._resolve(segment, value), (args, kwargs))
            return own(*args, **kwargs)
        method, row = found
        sample = real(sample)
        self._number = method.first + row + 1
        self._in_run = self._number < len(stepper.timesteps)
        noise = options.get("variance_noise") if method.draws[row] else None
        noise = None if noise is None else real(noise)
        if noise is None and any(method.draws):
            # A step without takes none, but is one of the same kind.
            drawn = method.draws[row]
            noise = (
                _draw(view, output, options.get("generator")) if drawn else torch.zeros_like(sample, dtype=output.dtype)
            )
        table = method.table
        previous = None
        if table.looks_back:
            previous = sample.new_zeros(sample.shape) if stepper.previous_x0 is None else stepper.previous_x0
        # Schedulers that step through sigmas give the output's dtype.
        dtype = output.dtype if hasattr(view, "sigmas") else torch.promote_types(sample.dtype, output.dtype)
        work = _Work(sample, table, row, noise, method.limit, previous, dtype)
        x_next, x0 = self._finish(segment, output, work)
        if table.looks_back:
            stepper.previous_x0 = x0
        _advance(view, options["timestep"])
        if isinstance(view, _RENOISING):
            # What was noised to the next state, which comes back without a limit's or a boundary's help.
            scale = table.rows[row].noise_scale
            x0 = x_next if noise is None or not scale else (x_next - scale * noise) / (1 - scale**2) ** 0.5
        return _output_of(view, x_next, x0, options.get("return_dict", True))

    def _resolve(self, segment: Segment | None, value: Any) -> Any:
        return self._finish(segment, value, None)[0] if isinstance(value, Deferred) else value

    def _finish(self, segment: Segment | None, output: torch.Tensor, work: _Work | None) -> tuple[torch.Tensor, ...]:
        """The step's next state and x0, or without `work` the model's output."""
        backend = self._acceleration.options.backend
        results = None
        if isinstance(output, Deferred) and output.segment is segment:
            if segment.end():
                results = self._try_replay(segment, output.ref, work, backend)
            else:
                self._acceleration.log_once(self._name, f"its steps are launched one by one: {segment.reason}")
            if results is not None:
                return results
            output = segment.value(output.ref)
        output = real(output)
        return (output,) if work is None else work.take(backend, output)

    def _try_replay(
        self, segment: Segment, ref: Ref, work: _Work | None, backend: str
    ) -> tuple[torch.Tensor, ...] | None:
        captures = self._acceleration.captures
        key = (segment.place, ref, work and work.kind)
        if captures.in_use or segment.is_done:
            captures.see(key)
            return None
        called = [getattr(node.function, "model", node.function) for node in segment.nodes]
        models = [each for each in called if isinstance(each, torch.nn.Module)]
        device = _device_of(models[0]) if work is None else work.sample.device
        captures.watch(models)

        def build(probe: bool) -> _StaticStep:
            output = segment.value(ref)
            own = (output,) if work is None else work.take(backend, output)
            before, changed = ModelState(tuple(models)), None
            try:
                # The pipeline's own step is the one that counts.
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    static = _StaticStep(segment, ref, work, backend, device, captures.graphs.pool(device), probe)
                    # The calls before the capture have written over the previous x0.
                    static.load(segment, work)
                    ours = static()
                changed = next((name for name, is_tensor in before.differences() if not is_tensor), None)
            finally:
                before.restore()
            if changed is not None:
                raise changes_itself(changed)
            error = _difference(ours[0], own[0])
            if error is not None:
                raise CaptureError(f"its step differs from the pipeline's own by {error}", permanent=True)
            return static

        def use(static: _StaticStep) -> tuple[torch.Tensor, ...]:
            static.load(segment, work)
            return static()

        def warn(reason: str) -> None:
            self._acceleration.log_once(self._name, f"its steps are launched one by one: {reason}")

        return captures.use(key, device, build, use, warn)


def _is_usual(output: Any, sample: Any, given: inspect.BoundArguments, own: Callable[..., Any]) -> bool:
    """Whether a step is one of the arguments that tables know, of tensors without gradients."""
    if not all(isinstance(each, torch.Tensor) and each.is_floating_point() for each in (output, sample)):
        return False
    if output.shape != sample.shape or output.device != sample.device or not sample.ndim:
        return False
    if torch.is_grad_enabled() and (output.requires_grad or sample.requires_grad):
        return False
    timestep = given.arguments.get("timestep")
    if not (timestep.numel() == 1 if isinstance(timestep, torch.Tensor) else isinstance(timestep, (int, float))):
        return False
    parameters = inspect.signature(own).parameters
    unusual = (
        name for name, value in given.arguments.items() if name not in _KNOWN and value is not parameters[name].default
    )
    both = given.arguments.get("generator") is not None and given.arguments.get("variance_noise") is not None
    return not both and not any(name != "kwargs" for name in unusual)


def _output_of(scheduler: Any, x_next: torch.Tensor, second: torch.Tensor, as_output: bool) -> Any:
    """What the scheduler's own `step` would return."""
    results = (x_next,) if isinstance(scheduler, _WITHOUT_X0) else (x_next, second)
    if not as_output:
        return results
    kind = type(scheduler)
    output = getattr(sys.modules[kind.__module__], f"{kind.__name__}Output", SchedulerOutput)
    return output(*results)


def _difference(ours: torch.Tensor, own: torch.Tensor) -> str | None:
    """The largest difference of two tensors, in words, None where it is rounding: half of the digits agree."""
    if ours.shape != own.shape or ours.dtype != own.dtype:
        return f"{ours.dtype} of shape {tuple(ours.shape)} instead of {own.dtype} of {tuple(own.shape)}"
    largest = float(own.abs().nan_to_num(0, 0, 0).max()) if own.numel() else 0.0
    limit = torch.finfo(own.dtype).eps ** 0.5 * largest
    if torch.allclose(ours, own, rtol=0.0, atol=limit, equal_nan=True):
        return None
    return f"{float((ours - own).abs().max()):.2g}, where its largest value is {largest:.2g}"


def _device_of(model: Any) -> torch.device:
    # diffusers' own `device` walks through all modules.
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _table_of(
    scheduler: Any, skipped: list[float], timesteps: list[float], options: Mapping[str, Any]
) -> tuple[StepTable, list[bool]] | None:
    """The table of a scheduler's steps at `timesteps`, after the `skipped` ones of its run, and at which of them it draws
    noise; None where its own step alone takes them. `options` are a step's.
    """
    if isinstance(scheduler, diffusers.DDIMScheduler):
        eta, rederive = options.get("eta", 0.0), bool(options.get("use_clipped_model_output"))
        rows = RowCache().rows(scheduler, FORWARD)
        if rows is None or not isinstance(eta, (int, float)):
            return None
        columns = rows.columns(np.array(timesteps), eta, rederive)
        if eta <= 0:
            columns[:, -1] = 0.0
        return StepTable.from_columns(timesteps, columns), [eta > 0] * len(timesteps)
    sampling = read_scheduler(scheduler, _method_of(scheduler))
    if sampling.method == "ddpm" and not _has_neighbours(scheduler, timesteps):
        return None
    # The numbers that the scheduler steps through, whatever rule or list they are of.
    sigmas = getattr(scheduler, "sigmas", None)
    n = len(skipped) + len(timesteps)
    steps = Steps(
        timesteps=[*skipped, *timesteps],
        sigmas=None if sigmas is None else sigmas[-n - 1 :].tolist(),
        # Half a step more, so that rounding takes none away.
        strength=min(1.0, (len(timesteps) + 0.5) / n),
    )
    table = sampling.build(steps, **({"gamma": options["eta"]} if sampling.method == "tcd" else {}))
    draws = (table.columns[:, 5] != 0).tolist()
    if sampling.method == "euler_ancestral" or sampling.options.get("algorithm_type") == "sde-dpmsolver++":
        # They draw at the last step too, where it is not used.
        draws[-1] = True
    if sampling.method == "ddpm":
        draws = [t > 0 for t in timesteps]
    return table, draws


def _unscaled(table: StepTable, scheduler: Any, timestep: Any, first: int) -> StepTable:
    """The table over a pipeline's states: a table's own are those that the model is called with, scaled by the scheduler."""
    scale = getattr(scheduler, "scale_model_input", None)
    if scale is None or float(scale(torch.ones((), device="cpu"), timestep)) == 1.0:
        return table
    sigmas = scheduler.sigmas[first : first + len(table) + 1].double().cpu().numpy()
    scales = (sigmas**2 + 1) ** -0.5
    columns = table.columns.copy()
    # In the order of `StepCoefficients`: what is of the state, then what gives the next one.
    columns[:, _OF_STATE] *= scales[:-1, None]
    columns[:, [index for index in _OF_NEXT if index < columns.shape[1]]] /= scales[1:, None]
    return StepTable.from_columns(table.timesteps, columns)


def _has_neighbours(scheduler: Any, timesteps: list[float]) -> bool:
    """Whether a DDPM scheduler's steps lead from each timestep of its list to the next, which it computes by itself."""
    if scheduler.config.variance_type == "fixed_large" and timesteps[-1] > 0:
        # Its last step adds noise then.
        return False
    if scheduler.custom_timesteps:
        return True
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return all(t - stride == after for t, after in itertools.pairwise(timesteps)) and timesteps[-1] < stride


def _method_of(scheduler: Any) -> str:
    # A DDPM scheduler's model is sampled by DDIM elsewhere.
    return "ddpm" if type(scheduler).__name__ == "DDPMScheduler" else "auto"


def _limit_of(scheduler: Any) -> Limit:
    ddim = isinstance(scheduler, diffusers.DDIMScheduler)
    return limit_from(scheduler.config) if ddim else read_scheduler(scheduler).limit


def _draw(scheduler: Any, model_output: torch.Tensor, generator: Any) -> torch.Tensor:
    """The noise of a step, as its scheduler draws it."""
    shape, device, dtype = model_output.shape, model_output.device, model_output.dtype
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return torch.randn(shape, device=device, dtype=torch.float32)
    if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
        dtype = torch.float32
    drawn: torch.Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    return drawn


def _advance(scheduler: Any, timestep: Any) -> None:
    """Count a step where the scheduler itself counts."""
    if hasattr(scheduler, "_step_index"):
        if scheduler._step_index is None:
            scheduler._init_step_index(timestep)
        scheduler._step_index += 1


def _reason_against(pipe: Any, model: Any) -> str | None:
    """Why a model's calls cannot be captured, None where they can be as far as is known."""
    if getattr(pipe, "_all_hooks", None):
        return "it is offloaded"
    parts = list(_parts(model))
    if any(map(owns_graphs, (model, *parts))):
        return "it is compiled to capture CUDA graphs of its own; pass graph='off'"
    for part in parts:
        members = vars(part)
        if "_hf_hook" in members or getattr(members.get("_diffusers_hook"), "hooks", None):
            return "it has hooks for offloading, caching or casting"
        if "forward" in members:
            return "it has a replaced forward"
        if part._forward_hooks or part._forward_pre_hooks:
            return "it has forward hooks, which a captured graph would not call"
    return None


def _parts(model: Any) -> Iterator[torch.nn.Module]:
    """A model's modules, without the wrapper that `torch.compile` puts around it."""
    module: torch.nn.Module = getattr(model, "_orig_mod", model)
    return module.modules()


def _unknown_scheduler(scheduler: Any) -> str | None:
    """Why no table has a scheduler's steps, after "is"; None where one has."""
    kind = type(scheduler)
    replaced = [name for name, value in vars(scheduler).items() if callable(value) and hasattr(kind, name)]
    if replaced:
        return f"a {kind.__name__} whose {replaced[0]} was replaced"
    if kind is DDIMScheduler or kind is diffusers.DDIMScheduler:
        known = has_rows(scheduler, FORWARD)
        return None if known else f"a {kind.__name__} with a step or values that diffusers' own step alone takes"
    own = [name for method in METHODS.values() for name in method.schedulers if method.name != "ddim"]
    if kind.__name__ not in own or getattr(diffusers, kind.__name__, None) is not kind:
        return f"a {kind.__name__}"
    try:
        read_scheduler(scheduler, _method_of(scheduler))
    except ValueError as error:
        return f"a {kind.__name__} with {error}"
    variance = getattr(scheduler.config, "variance_type", "fixed_small")
    if kind is diffusers.DDPMScheduler and variance not in VARIANCE_TYPES:
        return f"a {kind.__name__} with variance_type {variance!r}"
    return None


@functools.cache
def _accelerated(pipeline: Any, entry: str, components: tuple[str, ...]) -> type:
    """The class of accelerated pipelines of a class, which passes for that class everywhere else.

    Args:
        pipeline: the class.
        entry: the method that has the loop.
        components: names of its models and scheduler.
    """
    loop = getattr(pipeline, entry)

    @functools.wraps(loop)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # One at a time: a pipeline keeps a call's guidance, and its scheduler a run's timesteps, on itself.
        with self._acceleration.turn, _Call(self, pipeline.__name__):
            return loop(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        plain = object.__new__(pipeline)
        vars(plain).update({name: value for name, value in vars(self).items() if name != "_acceleration"})
        return _attach, (plain, self._acceleration.options)

    names = {name: getattr(pipeline, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = {name: _component(name) for name in components}
    return type(
        pipeline.__name__,
        (pipeline,),
        {**members, **names, entry: call, "__reduce_ex__": reduce, "_unaccelerated": pipeline},
    )


def _attach(pipe: P, options: SamplerOptions) -> P:
    """Accelerate a pipeline that was checked; a copied or unpickled one gets graphs of its own."""
    own: Any = type(pipe)
    if isinstance(pipe, DiffusionPipeline):
        entry = "__call__"
        names = [name for name in inspect.signature(own.__init__).parameters if not hasattr(own, name)]
    else:
        entry = _POLICY_LOOP
        names = [name for name, value in _members(pipe).items() if isinstance(value, (SchedulerMixin, torch.nn.Module))]
    vars(pipe)["_acceleration"] = _Acceleration(options)
    pipe.__class__ = _accelerated(own, entry, tuple(names))
    return pipe


def _holder_of(pipe: Any) -> Any:
    """What has the loop, with models and a scheduler: the pipeline itself, a policy, or a policy's `diffusion`; or None."""
    for holder in (pipe, getattr(pipe, "diffusion", None)):
        if isinstance(holder, type) or not (isinstance(holder, DiffusionPipeline) or hasattr(holder, _POLICY_LOOP)):
            continue
        members = list(_members(holder).values())
        if all(any(isinstance(value, kind) for value in members) for kind in (SchedulerMixin, torch.nn.Module)):
            return holder
    return None


def accelerate(pipe: P, *, graph: str = "auto", backend: str = "auto", max_graphs: int = 8, hoist: bool = False) -> P:
    """Run a diffusers pipeline's denoising steps with fastddim: same call, same generators, same pictures to rounding.

    The pipeline is changed in place and stays of its class for `isinstance`, saving and loading. Its own code runs, whatever
    it is: guidance, masks, ControlNets, adapters and callbacks are as it has them. On a GPU each step, from the first model
    call to the scheduler's, becomes a CUDA graph when it comes the second time, and the step itself the fused kernel. The
    first replay is compared with the pipeline's own step; where they differ by more than rounding, or a step cannot be
    captured (offloaded models, hooks, models that count their calls), it goes on being launched as it is written. The
    scheduler's own `step` runs where it is no `DDIMScheduler` nor another scheduler of `fastddim.samplers.METHODS`, is a
    subclass, or was patched. Each such reason is a warning of the logger `"fastddim"`, once.

    Args:
        pipe: a pipeline of diffusers, or a subclass of one, or a diffusion policy of LeRobot or of Diffusion Policy, whose
            queues, normalisers and encoders stay as they are. Accelerated already, it keeps its captured graphs if the
            options are the same.
        graph: `"auto"`, `"step"` or `"off"`, as `fastddim.Sampler`'s; the pipeline's own code runs between the steps, so that
            there is no `"loop"`.
        max_graphs: as `fastddim.Sampler`'s.
        hoist: as `fastddim.Sampler`'s, for the schedulers whose steps the fused kernel takes.
        backend: implementation of the step, as `fastddim.ddim_step`'s.

    Returns:
        `pipe`.

    Raises:
        TypeError: something else than a pipeline or a policy with a scheduler and a model.
        ValueError: an option that is not one of its choices.

    Example:
        >>> import fastddim
        >>> pipe = fastddim.accelerate(fastddim.load_pipeline())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(class_labels=[3], num_inference_steps=4, output_type="np").images.shape
        (1, 16, 16, 1)
    """
    options = SamplerOptions(graph=graph, backend=backend, max_graphs=max_graphs, hoist=hoist)
    if options.graph == "loop":
        raise ValueError("graph: 'loop'; a pipeline's own code runs between the steps, so pass 'auto', 'step' or 'off'")
    holder = _holder_of(pipe)
    if holder is None:
        raise TypeError(
            f"pipe: {type(pipe).__name__}; pass a diffusers pipeline with a scheduler and a model, or a policy of LeRobot or"
            " Diffusion Policy"
        )
    if _unaccelerated(holder) is not None:
        if holder._acceleration.options == options:
            return pipe
        unaccelerate(holder)
    _attach(holder, options)
    return pipe


def unaccelerate(pipe: P) -> P:
    """Give a pipeline its own loop back and free its captured graphs; one that is not accelerated stays as it is.

    Returns:
        `pipe`.
    """
    holder: Any = _holder_of(pipe)
    pipeline = _unaccelerated(holder)
    if pipeline is not None:
        holder.__class__ = pipeline
        vars(holder).pop("_acceleration").release()
    return pipe


def _unaccelerated(pipe: Any) -> type | None:
    """The own class of an accelerated pipeline."""
    return getattr(type(pipe), "_unaccelerated", None)
