"""`Sampler`: the sampling loop as an object. It owns the table, the noise and guidance; the model is any callable."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fastddim.backends import draw_start
from fastddim.capture_checks import captures_itself, is_compiled
from fastddim.coefficients import StepTable
from fastddim.config import DDIMConfig, Limit
from fastddim.cuda_graph import GraphCache
from fastddim.interpolation import slerp
from fastddim.loop import Loop, Run, graph_mode, pad, upload_new
from fastddim.model_call import Hoister, Model, has_rows, null_class, sample_shape_of
from fastddim.noise import STREAM_INITIAL, check_seeds, normal, seed_bits
from fastddim.sampler_options import FIXED_BY_A_TABLE, OF_A_METHOD, SamplerOptions, to_python
from fastddim.samplers import Steps
from fastddim.samplers.sampling import Sampling, read_scheduler
from fastddim.schedule import Pair, Schedule
from fastddim.step import Guidance, require_epsilon_term

# Names of keyword arguments that models' methods take.
_TAKEN: WeakKeyDictionary[Any, set[tuple[str, ...]]] = WeakKeyDictionary()

_OPTIONS = {field.name: field for field in dataclasses.fields(SamplerOptions)}
# A subclass may keep what it likes beside these.
_FIXED = {*_OPTIONS, "options", "table", "schedule", "pairs", "model", "model_dtype"}
# Of which a call has one.
_STEPS = {"num_inference_steps", "timesteps", "sigmas"}

Callback = Callable[[int, float, torch.Tensor, torch.Tensor], None]


class Warmup(NamedTuple):
    """What `Sampler.warmup` measured.

    Attributes:
        cold_seconds: time of the first run, with compilation, capture and the first allocations.
        warm_seconds: time of a run after it, until the result is there.
        graph_bytes: device memory that the sampler's captured graphs hold.
        hoisted_bytes: memory of what such a run computes before its steps (`SamplerOptions.hoist`).
    """

    cold_seconds: float
    warm_seconds: float
    graph_bytes: int
    hoisted_bytes: int = 0


F = TypeVar("F", bound=Callable[..., Any])


def _naming_options(init: F) -> F:
    """Have `help` and `inspect.signature` show the fields of `SamplerOptions` in place of `**options`."""
    own = list(inspect.signature(init).parameters.values())[:-1]
    names = [parameter.name for parameter in own]
    options = inspect.signature(SamplerOptions).parameters.values()
    named: Any = init
    named.__signature__ = inspect.Signature([*own, *(option for option in options if option.name not in names)])
    return init


def _without_gradients(method: F) -> F:
    """`torch.no_grad()`, which takes as long as several operations, where gradients are on alone."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        with torch.no_grad():
            return method(*args, **kwargs)

    return cast("F", call)


class Sampler:
    """Samples a model with DDIM, on the exact `(t, t_next)` pairs of its timestep list, with another method, or by any table.

    A sampler does not change: `replace` makes another one that shares its captured graphs.

    Args:
        model: `model(x, t, **kwargs)` with x `[B, ...]` and t `[B]`, int64 or, where the table's timesteps are
            floating-point numbers, float32; returns the prediction `[B, ...]`, a tuple that starts with it, or an object
            with `.sample` (diffusers models). Called with `[2 * B, ...]` when guided.
        scheduler: a `Schedule`, a `DDIMConfig`, a `FlowSchedule`, an `EDMSchedule`, or a diffusers scheduler, of which the
            configuration and the method are taken; or a `StepTable`, which is used as it is and fixes method, steps, eta
            and strength.
        num_inference_steps, options: fields of `SamplerOptions`, which says what they are.

    Attributes:
        options: the `SamplerOptions`; each can be read as an attribute of the sampler too.
        table: the `StepTable` of a run.
        schedule, method: where the table comes from, and the name of the method; None for a given table.
        pairs: DDIM's `(t, t_next)` pairs; None with another method.
        limit: the limit applied to x0.
        sample_shape: shape of one sample, None where it is not known.
        model_dtype, device: dtype of the model's input, and where it is called.
        graphs: the captured graphs, a `cuda_graph.GraphCache`: `len`, `nbytes`, `keys()`, `clear()`.

    Raises:
        TypeError: a model that cannot be called, something that is no scheduler, or an unknown option.
        ValueError: any value out of range, or an option that the table fixes, before any work; the message names it and
            what is valid.
    """

    @_naming_options
    def __init__(
        self,
        model: Model,
        scheduler: Schedule | DDIMConfig | StepTable | Any,
        num_inference_steps: int | None = None,
        **options: Any,
    ) -> None:
        if num_inference_steps is not None:
            options["num_inference_steps"] = num_inference_steps
        _check_names(options, scheduler)
        self._set_up(model, scheduler, SamplerOptions(**options), None)

    def _set_up(self, model: Model, scheduler: Any, options: SamplerOptions, loop: Loop | None) -> None:
        if not callable(model):
            raise TypeError(f"model: {type(model).__name__} is not callable; pass model(x, t, **kwargs)")
        self.model, self.options = model, options
        for name in _OPTIONS:
            setattr(self, name, getattr(options, name))
        sampling = None if isinstance(scheduler, StepTable) else read_scheduler(scheduler, options.method)
        self._sampling, self.schedule = sampling, None if sampling is None else sampling.schedule
        self.method = None if sampling is None else sampling.method
        configured = None if sampling is None else sampling.limit
        self.limit: Limit = configured if isinstance(options.limit, str) else options.limit
        self.table: StepTable = scheduler if sampling is None else _build_table(sampling, options, self.limit)
        scale = options.guidance_scale
        self._guidance = None
        if scale is not None:
            self._guidance = Guidance(
                float(scale), options.guidance_rescale, method=options.guidance_method, apg_eta=options.apg_eta,
                apg_norm_threshold=options.apg_norm_threshold,
            )  # fmt: skip
        if options.guidance_method == "cfg++":
            require_epsilon_term(self.table, "guidance_method", self.method)
        self._guided_steps = range(*(int(fraction * len(self.table)) for fraction in options.guidance_interval))
        self.sample_shape = sample_shape_of(model) if options.sample_shape is None else options.sample_shape
        module = model if isinstance(model, torch.nn.Module) else None
        parameter = None if module is None else next(iter(module.parameters()), None)
        self.model_dtype = parameter.dtype if parameter is not None and parameter.is_floating_point() else options.dtype
        self.device = torch.device(options.device or ("cpu" if parameter is None else parameter.device))
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if loop is None:
            if options.channels_last and module is not None:
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            mode = "default" if options.compile is True else options.compile or None
            hoister = None
            if options.hoist:
                if is_compiled(model):
                    raise ValueError(
                        "hoist: True for a model that is compiled already; pass compile=True to Sampler instead"
                    )
                hoister = Hoister(model, options.hoist_limit, mode)
            if mode is not None:
                model = torch.compile(model, mode=mode)
            loop = Loop(model, options.graph, options.max_graphs, module, hoister)
            if graph_mode(options.graph, self.device) != "off" and captures_itself(model):
                raise ValueError(
                    "model: compiled to capture CUDA graphs of its own; compile it with mode='default' or"
                    " 'max-autotune-no-cudagraphs', or pass graph='off'"
                )
        self._loop = loop

    if TYPE_CHECKING:
        # Options are attributes. At run time this method would slow down every access to one.
        def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: Any) -> None:
        own = name not in _FIXED and type(self) is not Sampler
        if own or not hasattr(self, "_loop"):
            object.__setattr__(self, name, value)
            return
        change = f"{name}={value!r}" if name in _OPTIONS else "scheduler=..."
        replaceable = name in _OPTIONS or name in ("table", "schedule")
        fix = f"use sampler.replace({change})" if replaceable else "make another Sampler"
        raise AttributeError(f"{name}: a Sampler does not change; {fix}")

    def __delattr__(self, name: str) -> None:
        if name in _FIXED or type(self) is Sampler:
            raise AttributeError(f"{name}: a Sampler does not change; make another Sampler")
        object.__delattr__(self, name)

    @property
    def pairs(self) -> tuple[Pair, ...] | None:
        if self.method != "ddim":
            return None
        assert isinstance(self.schedule, Schedule)
        options = self.options
        return self.schedule.pairs(
            options.num_inference_steps,
            timesteps=options.timesteps,
            strength=options.strength,
            transitions=options.transitions,
        )

    @property
    def graphs(self) -> GraphCache[Any]:
        return self._loop.graphs

    def replace(self, *, scheduler: Any = None, **changes: Any) -> Sampler:
        """This sampler with another scheduler or table, or other options, on the same captured graphs.

        A table is built anew, which is cheap; nothing is captured again as long as only the number of steps (up to the
        next power of two from 64), timesteps, eta, guidance scale or the limit's numbers differ. Other values of `graph`,
        `compile`, `hoist`, `hoist_limit`, `channels_last` or `max_graphs` are captured apart. A table in place of a
        scheduler takes none of the options that it fixes. What a subclass keeps on the sampler is on the new one too.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        if scheduler is None:
            scheduler = self.table if self._sampling is None else self._sampling
        _check_names(changes, scheduler)
        kept = {name: _OPTIONS[name].default for name in FIXED_BY_A_TABLE if isinstance(scheduler, StepTable)}
        for given in _STEPS & changes.keys():
            kept |= dict.fromkeys(_STEPS - {given})
        options = dataclasses.replace(self.options, **{**kept, **changes})
        apart = {"graph", "compile", "channels_last", "max_graphs", "hoist", "hoist_limit"} & changes.keys()
        changed = object.__new__(type(self))
        changed._set_up(self.model, scheduler, options, None if apart else self._loop)
        for name in vars(self).keys() - vars(changed).keys():
            setattr(changed, name, getattr(self, name))
        return changed

    @_without_gradients
    def __call__(
        self,
        start: int | torch.Tensor,
        *,
        seeds: int | Sequence[int] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
        callback: Callback | None = None,
        return_trajectory: bool = False,
        **model_kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Run the loop.

        Args:
            start: how many samples to draw from `seeds` (standard normal noise times `table.start_scale`), or the starting
                state `[B, ...]` itself, which is taken as it is.
            seeds: one per sample, or an integer s for s, s + 1, ...; sample k depends on its own seed alone, whatever
                the batch. Needed unless a state is given and no step adds noise.
            uncond_kwargs: the unconditional half's model keyword arguments with guidance, for those that differ
                (e.g. `{"class_labels": null_labels}`). None takes the "no class" label of a diffusers model that is
                conditioned by class labels alone; `{}` says that the model tells the halves apart by itself.
            progress: show a progress bar.
            callback: called after each step as `callback(step, t, x, x0)`; the next step writes over both, so clone what
                you keep. What it writes to x in place holds: the next model call, the trajectory and the result have it. It
                may raise to stop the run.
            return_trajectory: also return all states.
            **model_kwargs: passed on to the model, floating-point tensors in its dtype; tensors of B rows are stacked
                for guidance.

        Returns:
            `[B, ...]` samples, or `(samples, trajectory)` with trajectory `[num_steps + 1, B, ...]`, the starting
            state first.

        Raises:
            ValueError: seeds that are missing or of the wrong number, an unknown sample shape, a state of the wrong
                shape, `uncond_kwargs` without guidance, or guidance without what its unconditional half is.
        """
        self._check_observers(callback, progress, return_trajectory)
        run = self._run(start, seeds, model_kwargs, uncond_kwargs)
        batch, run = run.shape[0], self._pad(run)
        trajectory: list[torch.Tensor] = []

        def observe(step: int, x: torch.Tensor, x0: torch.Tensor) -> None:
            if callback is not None:
                callback(step, self.table.timesteps[step], x[:batch], x0[:batch])
            if return_trajectory:
                trajectory.append(x[:batch].clone())

        if return_trajectory:
            first = self._first_state(run.start, run.shape, run.seeds)
            run = dataclasses.replace(run, start=first)
            trajectory.append(first[:batch].clone())
        on_step = observe if return_trajectory or callback is not None else None
        x = self._loop(run, _steps(run, progress), on_step)
        x = x if len(x) == batch else x[:batch]
        return (x, torch.stack(trajectory)) if return_trajectory else x

    @_without_gradients
    def warmup(
        self, start: int | torch.Tensor, *, uncond_kwargs: Mapping[str, Any] | None = None, **model_kwargs: Any
    ) -> Warmup:
        """Compile, capture and allocate for calls like this one, so that a server's first requests do not: without it the
        first call of a shape goes step by step, and the second one is captured.

        Args:
            start, uncond_kwargs, model_kwargs: as in a call; seeds are not needed.
        """
        # Without seeds where a call needs none, as such calls are captured apart.
        seeds = 0 if isinstance(start, int) or self.table.stochastic else None
        run = self._pad(self._run(start, seeds, model_kwargs, uncond_kwargs))
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            self._loop(run, at_once=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - begin)
        cold, warm = times
        return Warmup(cold, warm, self.graphs.nbytes, self._loop.hoisted_bytes)

    @_without_gradients
    def invert(
        self,
        x0: torch.Tensor,
        *,
        uncond_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Encode clean samples: the starting states from which this sampler, with the same arguments, gives them back.

        The table's `inverse`, without a limit; a schedule's is the ODE of arXiv:2010.02502, section 4.3, backwards in the
        sampler's own steps (`StepTable.build_inverse`). More steps bring the reconstruction closer. Guidance is undone
        too, but less exactly; with CFG++ by `StepTable.swap_outputs`.

        Args:
            x0: clean samples `[B, ...]`, floating-point.
            uncond_kwargs, progress, **model_kwargs: as for sampling.

        Returns:
            `[B, ...]` states in the sampler's dtype, at its first timestep: x_T for a whole run, the noised state there
            with `strength < 1`.

        Raises:
            TypeError: no tensor.
            ValueError: a sampler that adds noise (eta > 0), a table without an inverse, another shape or dtype,
                `uncond_kwargs` without guidance.
        """
        self._require_deterministic("inversion")
        inverse = self.table.inverse
        if inverse is None and self.method not in (None, "ddim"):
            raise ValueError(f"method: {self.method!r} has no inverse; pass method='ddim' or 'euler'")
        if inverse is None:
            raise ValueError(
                "table: it has no inverse; pass inverse= to StepTable.from_columns, or, with a schedule, leave out the"
                " timesteps without signal"
            )
        self._check_observers(None, progress, False)
        self._check_state("x0", x0, "B")
        run = self._run(x0, None, model_kwargs, uncond_kwargs)
        guided_steps = _backwards(run.guided_steps, self.table, inverse)
        if self.options.guidance_method == "cfg++":
            inverse = inverse.swap_outputs()
        run = self._pad(dataclasses.replace(run, table=inverse, limit=None, guided_steps=guided_steps))
        return self._loop(run, _steps(run, progress), None)[: x0.shape[0]]

    def interpolate(
        self,
        a: int | torch.Tensor,
        b: int | torch.Tensor,
        n: int,
        *,
        uncond_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Samples between two, from starting states on the great circle (arXiv:2010.02502, section 5.3; `slerp`).

        Args:
            a, b: the ends: a seed, or a starting state `[...]` of one sample, such as `invert` gives.
            n: how many samples, at least 2: the first is that of `a`, the last that of `b`.
            uncond_kwargs, progress, **model_kwargs: as for sampling a batch of n.

        Returns:
            `[n, ...]` samples.

        Raises:
            ValueError: a sampler that adds noise (eta > 0), which would hide what lies between, n below 2, or a state of
                another shape or dtype.
        """
        self._require_deterministic("interpolation")
        first, last = (self._state_of(name, end) for name, end in (("a", a), ("b", b)))
        samples = self(slerp(first, last, n), uncond_kwargs=uncond_kwargs, progress=progress, **model_kwargs)
        assert isinstance(samples, torch.Tensor)
        return samples

    def add_noise(self, x0: torch.Tensor, seeds: int | Sequence[int]) -> torch.Tensor:
        """A clean `x0` `[B, ...]` noised to where this run starts: the state to call a sampler of `strength < 1` with.

        The noise is the standard normal noise from which the same seeds draw a start. Returns `[B, ...]` in the sampler's
        dtype.

        Raises:
            ValueError: a table without a noising rule.
        """
        if self.table.noising is None:
            raise ValueError(
                "table: it has no noising rule; pass noising=(from_x0, from_noise) to StepTable.from_columns"
            )
        from_x0, from_noise = self.table.noising
        noise = normal(check_seeds(seeds, x0.shape[0]), 0, x0.shape[1:], STREAM_INITIAL, device=self.device)
        noised = x0.to(self.device, noise.dtype) * from_x0 + noise * from_noise
        return noised.to(self.options.dtype)

    def _require_deterministic(self, what: str) -> None:
        if self.table.stochastic:
            raise ValueError(
                f"eta: this sampler adds noise, and {what} needs eta 0; pass eta=0.0 to Sampler, or a table without noise"
            )

    def _state_of(self, name: str, end: int | torch.Tensor) -> torch.Tensor:
        """One starting state `[...]`: a given one, checked, or a seed's."""
        if not isinstance(end, torch.Tensor):
            return self._first_state(*self._start(1, [end]))[0]
        self._check_state(name, end)
        return end.to(self.device, self.options.dtype)

    def _first_state(self, start: torch.Tensor | None, shape: tuple[int, ...], seeds: list[int] | None) -> torch.Tensor:
        """A given start, or what the seeds draw."""
        if start is not None:
            return start
        words = upload_new(seed_bits(seeds or ()), self.device)
        drawn = torch.empty(shape, dtype=self.options.dtype, device=self.device)
        return draw_start(self.options.backend, words, drawn, self.table.start_scale)

    def _check_observers(self, callback: Callback | None, progress: bool, return_trajectory: bool) -> None:
        if callback is not None and not callable(callback):
            raise TypeError(f"callback: {callback!r}; pass a function of (step, t, x, x0)")
        if self.options.graph != "loop":
            return
        for name, given in (("callback", callback), ("progress", progress), ("return_trajectory", return_trajectory)):
            if given:
                raise ValueError(
                    f"{name}: given with graph='loop', which has no place between the steps; use graph='step' or 'off'"
                )

    def _run(
        self,
        start: int | torch.Tensor,
        seeds: int | Sequence[int] | None,
        model_kwargs: Mapping[str, Any],
        uncond_kwargs: Mapping[str, Any] | None,
    ) -> Run:
        """The checked run of a call."""
        options = self.options
        state, shape, seed_list = self._start(start, seeds)
        if options.channels_last and len(shape) != 4:
            raise ValueError(
                f"channels_last: True for a state of shape {shape}; pass states [B, C, H, W], or leave it out"
            )
        return Run(
            table=self.table,
            shape=shape,
            dtype=options.dtype,
            model_dtype=self.model_dtype,
            device=self.device,
            start=state,
            seeds=seed_list,
            limit=self.limit,
            guidance=self._guidance,
            guided_steps=self._guided_steps,
            batched=options.batched_guidance,
            kwargs=self._model_kwargs(shape[0], model_kwargs, uncond_kwargs),
            channels_last=options.channels_last,
            backend=options.backend,
        )

    def _pad(self, run: Run) -> Run:
        """The run with its batch padded to a bucket, where samples are captured."""
        buckets = self.options.batch_buckets
        if not buckets or graph_mode(self.options.graph, self.device) == "off":
            return run
        batch = next((bucket for bucket in buckets if bucket >= run.shape[0]), None)
        if batch is None:
            raise ValueError(f"start: a batch of {run.shape[0]}; the largest of batch_buckets is {buckets[-1]}")
        return pad(run, batch)

    def _start(
        self, start: int | torch.Tensor, seeds: int | Sequence[int] | None
    ) -> tuple[torch.Tensor | None, tuple[int, ...], list[int] | None]:
        """The given state, or None to draw one; its shape; the seeds."""
        state: torch.Tensor | None = None
        if isinstance(start, np.generic) or (isinstance(start, torch.Tensor) and start.ndim == 0):
            start = to_python(start)
        if isinstance(start, (torch.Tensor, np.ndarray)):
            self._check_state("start", start, "B")
            state, shape = start, tuple(start.shape)
        elif isinstance(start, bool) or not isinstance(start, int) or start < 1:
            raise ValueError(f"start: {start!r}; pass a batch size >= 1, or a state [B, ...]")
        elif self.sample_shape is None:
            raise ValueError("sample_shape: the model's configuration has none; pass sample_shape= to Sampler")
        else:
            shape = (start, *self.sample_shape)
        if seeds is None and (state is None or self.table.stochastic):
            raise ValueError("seeds: None; pass one integer per sample, or one integer s for s, s + 1, ...")
        return state, shape, None if seeds is None else check_seeds(seeds, shape[0])

    def _check_state(self, name: str, state: Any, *batch: str) -> None:
        """Refuse what is no state of the sampler's; `batch` names the dimensions before a sample's own."""
        shape = ("...",) if self.sample_shape is None else self.sample_shape
        # Written out for a message alone.
        wanted = (*batch, *shape)
        if not isinstance(state, torch.Tensor):
            raise TypeError(f"{name}: {type(state).__name__}; pass a tensor {_listed(wanted)}")
        if not state.is_floating_point() or state.ndim < len(batch):
            raise ValueError(
                f"{name}: {state.dtype} of shape {tuple(state.shape)}; pass a floating-point state {_listed(wanted)}"
            )
        if self.sample_shape is not None and state.shape[len(batch) :] != self.sample_shape:
            raise ValueError(f"{name}: shape {tuple(state.shape)}; pass {_listed(wanted)}")
        self._check_device(name, state)

    def _model_kwargs(
        self, batch_size: int, kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The model's keyword arguments on the device; with guidance, unconditional and conditional rows stacked."""
        _check_signature(self.model, kwargs)
        if self._guidance is None:
            if uncond_kwargs:
                raise ValueError("uncond_kwargs: given without guidance; pass guidance_scale= to Sampler")
            return {
                name: self._place(name, value)
                if isinstance(value, torch.Tensor)
                else pytree.tree_map(partial(self._place, name), value)
                for name, value in kwargs.items()
            }
        uncond = self._null_kwargs(kwargs, batch_size) if uncond_kwargs is None else dict(uncond_kwargs)
        extra = sorted(set(uncond) - set(kwargs))
        if extra:
            raise ValueError(f"uncond_kwargs: {extra} have no conditional counterpart; pass them as keywords too")
        stacked = {}
        for name, value in kwargs.items():
            leaves, structure = pytree.tree_flatten(value)
            others, other_structure = pytree.tree_flatten(uncond.get(name, value))
            if structure != other_structure:
                raise ValueError(f"uncond_kwargs: {name!r} is not built like its conditional counterpart")
            stacked[name] = pytree.tree_unflatten(
                [self._stack(name, name in uncond, batch_size, *pair) for pair in zip(leaves, others, strict=True)],
                structure,
            )
        return stacked

    def _null_kwargs(self, kwargs: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
        """The unconditional half where none is given: of a model with classes alone its label for no class."""
        if any(has_rows(leaf, 2 * batch_size) for leaf in pytree.tree_leaves(dict(kwargs))):
            # Both halves are in it.
            return {}
        labels, null = kwargs.get("class_labels"), null_class(self.model)
        if labels is not None and null is not None and "encoder_hidden_states" not in kwargs:
            if not has_rows(labels, batch_size):
                given = f"shape {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else type(labels).__name__
                raise ValueError(f"class_labels: {given}; pass a tensor of {batch_size} labels")
            return {"class_labels": torch.full_like(labels, null)}
        names = ", ".join(kwargs) or "no keyword argument"
        raise ValueError(
            f"uncond_kwargs: None with guidance_scale {self.options.guidance_scale:g}, but the model is called with {names},"
            " and equal halves guide nowhere; pass what differs in the unconditional half, such as"
            " uncond_kwargs={'class_labels': null_labels}, or {} for a model that tells the halves apart by itself"
        )

    def _stack(self, name: str, differs: bool, batch_size: int, cond: Any, uncond: Any) -> Any:
        """One leaf of a keyword argument for both halves."""
        cond, uncond = self._place(name, cond), self._place(name, uncond)
        if isinstance(cond, torch.Tensor) and cond.ndim and cond.shape[0] == batch_size:
            if not isinstance(uncond, torch.Tensor) or uncond.shape != cond.shape:
                raise ValueError(f"uncond_kwargs: {name!r} must be a tensor of shape {tuple(cond.shape)}")
            return torch.cat([uncond, cond])
        if differs and cond is not uncond:
            raise ValueError(f"uncond_kwargs: {name!r} is no tensor of {batch_size} rows; leave it out, or stack it")
        return cond

    def _place(self, name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        dtype = self.model_dtype if value.is_floating_point() else value.dtype
        if value.device == self.device and value.dtype is dtype:
            return value
        self._check_device(name, value)
        return value.to(self.device, dtype, non_blocking=True)

    def _check_device(self, name: str, tensor: torch.Tensor) -> None:
        """Only what is on the CPU moves by itself: from another device it would wait there for what is under way."""
        if tensor.device != self.device and tensor.device.type != "cpu":
            raise ValueError(f"{name}: on {tensor.device}, but the sampler is on {self.device}; move it there")


def _listed(names: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, names))}]"


def _build_table(sampling: Sampling, options: SamplerOptions, limit: Limit) -> StepTable:
    """The table of a sampler's options."""
    steps = Steps(options.num_inference_steps, options.timesteps, options.sigmas, options.spacing, options.strength)
    given = {name: getattr(options, name) for name in OF_A_METHOD if getattr(options, name) != _OPTIONS[name].default}
    rederive = options.guidance_method != "cfg++"
    return sampling.with_options({**given, **(options.method_options or {})}, limit, rederive=rederive).build(steps)


def _steps(run: Run, progress: bool) -> Iterable[int]:
    steps = range(len(run.table))
    if not progress:
        return steps
    from rich.console import Console
    from rich.progress import track

    return track(steps, description="sampling", console=Console(stderr=True))


def _backwards(guided_steps: range, table: StepTable, inverse: StepTable) -> range:
    """The guided steps of an inverse: those whose timesteps lie between the ones at which sampling is guided."""
    on = sorted(table.timesteps[guided_steps.start : guided_steps.stop])
    rows = [k for k, t in enumerate(inverse.timesteps) if on and on[0] <= t <= on[-1]]
    return range(min(rows, default=0), max(rows, default=-1) + 1)


def _check_names(options: Mapping[str, Any], scheduler: Any) -> None:
    """Refuse what is no option, and what is none with a table."""
    for name, value in options.items():
        if name not in _OPTIONS:
            close = difflib.get_close_matches(name, _OPTIONS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"pass any of {', '.join(_OPTIONS)}"
            raise TypeError(f"{name}: no option of Sampler; {hint}")
        if name in FIXED_BY_A_TABLE and isinstance(scheduler, StepTable):
            raise ValueError(f"{name}: {value!r} with a StepTable, which fixes it; leave it out, or pass a scheduler")


def _check_signature(model: Model, kwargs: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that the model does not take, and missing ones that it needs."""
    forward = model.forward if isinstance(model, torch.nn.Module) else model
    # Reading a signature takes longer than a short run's other work on the host.
    method, names = getattr(forward, "__func__", None), tuple(kwargs)
    # Any callable can be bound, but not all can be kept.
    kept = isinstance(method, FunctionType)
    if kept and names in _TAKEN.get(method, ()):
        return
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None, **kwargs)
    except TypeError as error:
        valid = [name for name in list(signature.parameters)[2:] if name != "return_dict"]
        raise ValueError(
            f"model_kwargs: {sorted(kwargs)} do not fit the model: {error}; it takes {', '.join(valid) or 'none'}"
        ) from None
    if kept:
        _TAKEN.setdefault(method, set()).add(names)
