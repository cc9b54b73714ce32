"""`Sampler`: the DDIM loop as an object. It owns the transitions, the noise and guidance; the model is any callable."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.utils import _pytree as pytree

from fastddim.backends import check_backend
from fastddim.coefficients import StepTable
from fastddim.config import DDIMConfig, Limit, require_choice, require_int, require_number
from fastddim.cuda_graph import GraphCache
from fastddim.interpolation import slerp
from fastddim.loop import Loop, Model, Run, pad
from fastddim.noise import STREAM_INITIAL, check_seeds, normal
from fastddim.schedule import Schedule
from fastddim.step import Guidance

# Of models' methods, without `self`.
_SIGNATURES: WeakKeyDictionary[Any, inspect.Signature] = WeakKeyDictionary()

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

Callback = Callable[[int, float, torch.Tensor, torch.Tensor], None]


def to_schedule(scheduler: Schedule | DDIMConfig | Any) -> Schedule:
    """A `Schedule` from one, from a `DDIMConfig`, or from any diffusers scheduler whose configuration DDIM can take.

    Raises:
        TypeError: something else.
        ValueError: a configuration that DDIM cannot sample from; the message names the field.
    """
    if isinstance(scheduler, Schedule):
        return scheduler
    if isinstance(scheduler, DDIMConfig):
        return Schedule(scheduler)
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"scheduler: {type(scheduler).__name__}; pass a fastddim Schedule, a DDIMConfig or a diffusers scheduler"
        )
    return Schedule(DDIMConfig.from_dict(config, ignore_unknown=True))


class Warmup(NamedTuple):
    """What `Sampler.warmup` measured.

    Attributes:
        cold_seconds: of the first run: compilation, capture, the first allocations.
        warm_seconds: of one after it, until the result is there.
        graph_bytes: device memory that the sampler's captured graphs hold.
    """

    cold_seconds: float
    warm_seconds: float
    graph_bytes: int


class Sampler:
    """Samples a model with DDIM, on the exact `(t, t_next)` pairs of its timestep list.

    Args:
        model: `model(x, t, **kwargs)` with x `[B, ...]` and t `[B]` int64; returns the prediction `[B, ...]`, a tuple
            that starts with it, or an object with `.sample` (diffusers models). Called with `[2 * B, ...]` when guided.
        scheduler: a `Schedule`, a `DDIMConfig`, or a diffusers scheduler, of which the configuration is taken.
        num_inference_steps: number of model calls; timesteps spaced by the configuration's `timestep_spacing`.
        timesteps: an explicit descending list of training timesteps instead of `num_inference_steps`.
        eta: in [0, 1], one number or one per step; 0 is DDIM, 1 is DDPM.
        variance_type: `"fixed_large"` with eta 1 is DDPM with the paper's sigma-hat.
        guidance_scale: classifier-free guidance; None calls the model without it, once per step on `[B, ...]`.
        guidance_rescale: in [0, 1]; arXiv:2305.08891, section 3.4.
        use_clipped_model_output: derive epsilon from the limited x0. True by default where x0 is limited: with the raw
            epsilon, guidance and a limit drift the state away from any picture.
        strength: in (0, 1]; below 1 the run starts that far into the chain, from a noised state (image-to-image).
        transitions: `"exact"`, or `"diffusers"` to reproduce its recomputed neighbours (see `Schedule.pairs`).
        sample_shape: of one sample, without the batch; read from a diffusers model's configuration by default.
        dtype: of the state; the model is called in its own parameters' dtype.
        device: where to sample; the model's own by default.
        backend: of the step, `"auto"`, `"triton"` or `"reference"`; see `fastddim.ddim_step`.
        graph: `"loop"`, one CUDA graph of all steps; `"step"`, one of a step, which runs of any number of steps, eta,
            spacing, guidance scale, threshold and seeds replay (`replace`); `"off"`; `"auto"`, `"step"` on a GPU. On a CPU
            the same code runs without a capture. Where a model cannot be captured, it is called step by step, with one
            warning that says why.
        compile: a mode of `torch.compile` for the model, True for its default.
        channels_last: hand the model channels-last inputs; its weights are converted in place.
        guidance_interval: from and to which fraction of the steps guidance is on (arXiv:2404.07724); at the others the
            model is called with the conditional half alone.
        batched_guidance: one model call for both halves, or, with less memory, one for each.
        batch_buckets: batch sizes to pad to, so that a few captures serve all of them.
        max_graphs: captured graphs that are kept, the most recently used.

    Attributes:
        graphs: the captured graphs, a `cuda_graph.GraphCache`: `len`, `nbytes`, `keys()`, `clear()`.

    Raises:
        ValueError: any value out of range, before any work; the message names it and what is valid.
    """

    def __init__(
        self,
        model: Model,
        scheduler: Schedule | DDIMConfig | Any,
        num_inference_steps: int | None = None,
        *,
        timesteps: Iterable[int] | None = None,
        eta: float | Sequence[float] = 0.0,
        variance_type: str = "fixed_small",
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        use_clipped_model_output: bool | None = None,
        strength: float = 1.0,
        transitions: str = "exact",
        sample_shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        backend: str = "auto",
        graph: str = "auto",
        compile: bool | str = False,
        channels_last: bool = False,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        batched_guidance: bool = True,
        batch_buckets: Sequence[int] | None = None,
        max_graphs: int = 8,
    ) -> None:
        self._options = {name: value for name, value in locals().items() if name not in ("self", "model")}
        if not callable(model):
            raise TypeError(f"model: {type(model).__name__} is not callable; pass model(x, t, **kwargs)")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: {dtype}; pass a floating-point dtype")
        require_number("guidance_rescale", guidance_rescale, 0.0, 1.0)
        if guidance_scale is not None:
            require_number("guidance_scale", guidance_scale, -1e4, 1e4)
        elif guidance_rescale:
            raise ValueError(f"guidance_rescale: {guidance_rescale!r} without guidance_scale; pass both")
        check_backend(backend)
        _check_compile(compile, graph)
        first, stop = guidance_interval
        require_number("guidance_interval", first, 0.0, 1.0)
        require_number("guidance_interval", stop, first, 1.0)
        for bucket in batch_buckets or ():
            require_int("batch_buckets", bucket, 1)
        self.backend = backend
        self.model = model
        self.schedule = to_schedule(scheduler)
        self.limit: Limit = self.schedule.config.limit
        if use_clipped_model_output is None:
            use_clipped_model_output = self.limit is not None
        self.pairs = self.schedule.pairs(
            num_inference_steps, timesteps=timesteps, strength=strength, transitions=transitions
        )
        self.table = StepTable.build(
            self.schedule,
            self.pairs,
            eta=eta,
            variance_type=variance_type,
            use_clipped_model_output=use_clipped_model_output,
        )
        self.guidance_scale = guidance_scale
        self.guidance_rescale = guidance_rescale
        self.guidance_interval = (first, stop)
        self.batched_guidance = batched_guidance
        self.batch_buckets = tuple(sorted(batch_buckets or ()))
        self.channels_last = channels_last
        self.sample_shape = _model_sample_shape(model) if sample_shape is None else tuple(sample_shape)
        module = model if isinstance(model, torch.nn.Module) else None
        parameter = None if module is None else next(iter(module.parameters()), None)
        self.dtype = dtype
        self.model_dtype = dtype if parameter is None or not parameter.is_floating_point() else parameter.dtype
        self.device = torch.device(device or ("cpu" if parameter is None else parameter.device))
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if channels_last and module is not None:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile:
            model = torch.compile(model, mode=None if compile is True else compile)
        self._loop = Loop(model, graph, max_graphs, module)

    @property
    def graph(self) -> str:
        return self._loop.graph

    @property
    def graphs(self) -> GraphCache[Any]:
        return self._loop.graphs

    def replace(self, **changes: Any) -> Sampler:
        """This sampler with other options (`scheduler` or any keyword of the constructor), on the same captured graphs.

        The table is built anew, which is cheap; nothing is captured again as long as only the number of steps (up to the
        next power of two from 64), timesteps, eta, guidance scale or the limit's numbers differ.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        options = {**self._options, **changes}
        for given, other in (("num_inference_steps", "timesteps"), ("timesteps", "num_inference_steps")):
            if given in changes and other not in changes:
                options[other] = None
        fresh = {"graph", "compile", "channels_last", "max_graphs"} & changes.keys()
        changed = Sampler(self.model, **(options if fresh else {**options, "compile": False, "channels_last": False}))
        if not fresh:
            changed._options = options
            changed.channels_last = self.channels_last
            changed._loop = self._loop
        return changed

    @torch.no_grad()
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
            start: how many samples to draw from `seeds`, or the starting state `[B, ...]` itself.
            seeds: one per sample, or an integer s for s, s + 1, ...; sample k depends on its own seed alone, whatever
                the batch. Needed unless a state is given and no step adds noise.
            uncond_kwargs: with guidance, the model keyword arguments of the unconditional half, for those that differ
                (e.g. `{"class_labels": null_labels}`).
            progress: show a progress bar.
            callback: called after each step as `callback(step, t, x, x0)`; the next step writes over both, so clone what
                you keep; it may raise to stop the run.
            return_trajectory: also return all states.
            **model_kwargs: passed on to the model, floating-point tensors in its dtype; tensors of B rows are stacked
                for guidance.

        Returns:
            `[B, ...]` samples, or `(samples, trajectory)` with trajectory `[num_steps + 1, B, ...]`, the starting
            state first.

        Raises:
            ValueError: seeds that are missing or of the wrong number, an unknown sample shape, a state of the wrong
                shape, `uncond_kwargs` without guidance.
        """
        self._check_observers(callback, progress, return_trajectory)
        run = self._run(start, seeds, model_kwargs, uncond_kwargs)
        batch, run = run.shape[0], self._pad(run)
        trajectory: list[torch.Tensor] = []

        def observe(step: int, x: torch.Tensor, x0: torch.Tensor) -> None:
            if return_trajectory:
                trajectory.append(x[:batch].clone())
            if callback is not None:
                callback(step, self.table.timesteps[step], x[:batch], x0[:batch])

        if return_trajectory:
            run = replace(run, start=self._first_state(run))
            assert run.start is not None
            trajectory.append(run.start[:batch].clone())
        on_step = observe if return_trajectory or callback is not None else None
        x = self._loop(run, _steps(run, progress), on_step)[:batch]
        return (x, torch.stack(trajectory)) if return_trajectory else x

    def warmup(
        self, start: int | torch.Tensor, *, uncond_kwargs: Mapping[str, Any] | None = None, **model_kwargs: Any
    ) -> Warmup:
        """Compile, capture and allocate for calls like this one, so that a server's first request does not.

        Args:
            start, uncond_kwargs, model_kwargs: as in a call; seeds are not needed.
        """
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            self(start, seeds=0, uncond_kwargs=uncond_kwargs, **model_kwargs)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - begin)
        cold, warm = times
        return Warmup(cold, warm, self.graphs.nbytes)

    @torch.no_grad()
    def invert(
        self,
        x0: torch.Tensor,
        *,
        uncond_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Encode clean samples: the starting states from which this sampler, with the same arguments, gives them back.

        The ODE of arXiv:2010.02502, section 4.3, backwards in the sampler's own steps (`StepTable.build_inverse`) and
        without a limit; more steps bring the reconstruction closer. Guidance is undone too, but less exactly.

        Args:
            x0: clean samples `[B, ...]`, floating-point.
            uncond_kwargs, progress, **model_kwargs: as for sampling.

        Returns:
            `[B, ...]` states in the sampler's dtype, at its first timestep: of a whole run x_T, with `strength < 1` the
            noised state there.

        Raises:
            TypeError: no tensor.
            ValueError: a sampler that adds noise (eta > 0), another shape or dtype, `uncond_kwargs` without guidance.
        """
        self._require_deterministic("inversion")
        self._check_observers(None, progress, False)
        self._check_state("x0", x0, "B")
        run = self._run(x0, None, model_kwargs, uncond_kwargs)
        guided_steps = _backwards(run.guided_steps, len(self.table))
        assert self.table.inverse is not None
        run = self._pad(replace(run, table=self.table.inverse, limit=None, guided_steps=guided_steps))
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

        The noise is the starting state that the same seeds draw. Returns `[B, ...]` in the sampler's dtype.
        """
        assert self.table.noising is not None
        from_x0, from_noise = self.table.noising
        noise = normal(check_seeds(seeds, x0.shape[0]), 0, x0.shape[1:], STREAM_INITIAL, device=self.device)
        noised = x0.to(self.device, noise.dtype) * from_x0 + noise * from_noise
        return noised.to(self.dtype)

    def _require_deterministic(self, what: str) -> None:
        if self.table.stochastic:
            raise ValueError(f"eta: this sampler adds noise, and {what} needs eta 0; pass eta=0.0 to Sampler")

    def _state_of(self, name: str, end: int | torch.Tensor) -> torch.Tensor:
        """One starting state `[...]`: a given one, checked, or a seed's."""
        if isinstance(end, torch.Tensor):
            self._check_state(name, end)
            return end.to(self.device, self.dtype)
        _, shape, seeds = self._start(1, [end])
        assert seeds is not None
        return normal(seeds, 0, shape[1:], STREAM_INITIAL, device=self.device, dtype=self.dtype)[0]

    def _check_observers(self, callback: Callback | None, progress: bool, return_trajectory: bool) -> None:
        if self._loop.mode_on(self.device) != "loop":
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
        state, shape, seed_list = self._start(start, seeds)
        if self.channels_last and len(shape) != 4:
            raise ValueError(
                f"channels_last: True for a state of shape {shape}; pass states [B, C, H, W], or leave it out"
            )
        guidance = None
        if self.guidance_scale is not None:
            guidance = Guidance(float(self.guidance_scale), self.guidance_rescale)
        return Run(
            table=self.table,
            shape=shape,
            dtype=self.dtype,
            model_dtype=self.model_dtype,
            device=self.device,
            start=state,
            seeds=seed_list,
            limit=self.limit,
            guidance=guidance,
            guided_steps=range(*(int(fraction * len(self.table)) for fraction in self.guidance_interval)),
            batched=self.batched_guidance,
            kwargs=self._model_kwargs(shape[0], model_kwargs, uncond_kwargs),
            channels_last=self.channels_last,
            backend=self.backend,
        )

    def _pad(self, run: Run) -> Run:
        """The run with its batch padded to a bucket, where samples are captured."""
        if not self.batch_buckets or self._loop.mode_on(self.device) == "off":
            return run
        batch = next((bucket for bucket in self.batch_buckets if bucket >= run.shape[0]), None)
        if batch is None:
            raise ValueError(
                f"start: a batch of {run.shape[0]}; the largest of batch_buckets is {self.batch_buckets[-1]}"
            )
        return pad(run, batch)

    def _first_state(self, run: Run) -> torch.Tensor:
        if run.start is not None:
            return run.start
        assert run.seeds is not None
        return normal(run.seeds, 0, run.shape[1:], STREAM_INITIAL, device=run.device, dtype=run.dtype)

    def _start(
        self, start: int | torch.Tensor, seeds: int | Sequence[int] | None
    ) -> tuple[torch.Tensor | None, tuple[int, ...], list[int] | None]:
        """The given state, or None to draw one; its shape; the seeds."""
        if not isinstance(start, torch.Tensor):
            if isinstance(start, bool) or not isinstance(start, int) or start < 1:
                raise ValueError(f"start: {start!r}; pass a batch size >= 1, or a state [B, ...]")
            if self.sample_shape is None:
                raise ValueError("sample_shape: the model's configuration has none; pass sample_shape= to Sampler")
        else:
            self._check_state("start", start, "B")
        if seeds is None and (not isinstance(start, torch.Tensor) or self.table.stochastic):
            raise ValueError("seeds: None; pass one integer per sample, or one integer s for s, s + 1, ...")
        batch_size = start.shape[0] if isinstance(start, torch.Tensor) else start
        seed_list = None if seeds is None else check_seeds(seeds, batch_size)
        if isinstance(start, torch.Tensor):
            return start, tuple(start.shape), seed_list
        assert self.sample_shape is not None
        return None, (start, *self.sample_shape), seed_list

    def _check_state(self, name: str, state: Any, *batch: str) -> None:
        """Refuse what is no state of the sampler's; `batch` names the dimensions before a sample's own."""
        shape = ("...",) if self.sample_shape is None else self.sample_shape
        wanted = f"[{', '.join(map(str, (*batch, *shape)))}]"
        if not isinstance(state, torch.Tensor):
            raise TypeError(f"{name}: {type(state).__name__}; pass a tensor {wanted}")
        if not state.is_floating_point() or state.ndim < len(batch):
            raise ValueError(
                f"{name}: {state.dtype} of shape {tuple(state.shape)}; pass a floating-point state {wanted}"
            )
        if self.sample_shape is not None and tuple(state.shape[len(batch) :]) != self.sample_shape:
            raise ValueError(f"{name}: shape {tuple(state.shape)}; pass {wanted}")
        self._check_device(name, state)

    def _model_kwargs(
        self, batch_size: int, kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The model's keyword arguments on the device; with guidance, unconditional and conditional rows stacked."""
        _check_signature(self.model, kwargs)
        if self.guidance_scale is None:
            if uncond_kwargs:
                raise ValueError("uncond_kwargs: given without guidance; pass guidance_scale= to Sampler")
            return {name: pytree.tree_map(partial(self._place, name), value) for name, value in kwargs.items()}
        uncond = dict(uncond_kwargs or {})
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
        self._check_device(name, value)
        dtype = self.model_dtype if value.is_floating_point() else value.dtype
        return value.to(self.device, dtype, non_blocking=True)

    def _check_device(self, name: str, tensor: torch.Tensor) -> None:
        """Only what is on the CPU moves by itself: from another device it would wait there for what is under way."""
        if tensor.device != self.device and tensor.device.type != "cpu":
            raise ValueError(f"{name}: on {tensor.device}, but the sampler is on {self.device}; move it there")


def _steps(run: Run, progress: bool) -> Iterable[int]:
    steps = range(len(run.table))
    if not progress:
        return steps
    from rich.console import Console
    from rich.progress import track

    return track(steps, description="sampling", console=Console(stderr=True))


def _backwards(guided_steps: range, num_steps: int) -> range:
    """The guided steps of an inverse: those that call the model with a timestep at which sampling is guided."""
    # Row k has the timestep of sampling's step num_steps - k, but the first has the last step's, as the second.
    first, stop = num_steps - guided_steps.stop + 1, num_steps - guided_steps.start + 1
    return range(0 if first == 1 < stop else first, stop)


def _check_compile(compile: bool | str, graph: str) -> None:
    if isinstance(compile, bool):
        return
    require_choice("compile", compile, COMPILE_MODES)
    if graph != "off" and compile in ("reduce-overhead", "max-autotune"):
        raise ValueError(
            f"compile: {compile!r} captures CUDA graphs of its own; pass 'default' or 'max-autotune-no-cudagraphs', or"
            " graph='off'"
        )


def _check_signature(model: Model, kwargs: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that the model does not take, and missing ones that it needs."""
    forward = model.forward if isinstance(model, torch.nn.Module) else model
    # Reading one takes longer than a short captured run's other work on the host.
    method = getattr(forward, "__func__", None)
    # Any callable can be bound, but not all can be kept.
    kept = inspect.isfunction(method)
    signature = _SIGNATURES.get(method) if kept else None
    if signature is None:
        try:
            signature = inspect.signature(forward)
        except (TypeError, ValueError):
            return
        if kept:
            _SIGNATURES[method] = signature
    try:
        signature.bind(None, None, **kwargs)
    except TypeError as error:
        names = [name for name in list(signature.parameters)[2:] if name != "return_dict"]
        raise ValueError(
            f"model_kwargs: {sorted(kwargs)} do not fit the model: {error}; it takes {', '.join(names) or 'none'}"
        ) from None


def _model_sample_shape(model: Model) -> tuple[int, ...] | None:
    config = getattr(model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        return None
    return (channels, size, size) if isinstance(size, int) else (channels, *size)
