"""`Sampler`: the DDIM loop as an object. It owns the transitions, the noise and guidance; the model is any callable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from fastddim.backends import check_backend, prepare_step
from fastddim.coefficients import StepTable
from fastddim.config import DDIMConfig, Limit, require_number
from fastddim.interpolation import slerp
from fastddim.noise import STREAM_INITIAL, check_seeds, normal, seed_tensor
from fastddim.reference import ddim_step as reference_step
from fastddim.schedule import Schedule

Model = Callable[..., Any]
Callback = Callable[[int, int, torch.Tensor, torch.Tensor], None]


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
    ) -> None:
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
        self.sample_shape = _model_sample_shape(model) if sample_shape is None else tuple(sample_shape)
        parameter = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
        self.dtype = dtype
        self.model_dtype = dtype if parameter is None or not parameter.is_floating_point() else parameter.dtype
        self.device = torch.device(device or ("cpu" if parameter is None else parameter.device))

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
        x, seed_list = self._start(start, seeds)
        kwargs = self._model_kwargs(x.shape[0], model_kwargs, uncond_kwargs)
        trajectory = [x.clone()] if return_trajectory else None
        # Each step writes the next state over x.
        for step, t, x0 in self._steps(x, seed_list, kwargs, progress, self.table, self.limit):
            if trajectory is not None:
                trajectory.append(x.clone())
            if callback is not None:
                callback(step, t, x, x0)
        return x if trajectory is None else (x, torch.stack(trajectory))

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
        x = self._own_state("x0", x0, "B")
        kwargs = self._model_kwargs(x.shape[0], model_kwargs, uncond_kwargs)
        for _ in self._steps(x, None, kwargs, progress, StepTable.build_inverse(self.schedule, self.pairs), None):
            pass
        return x

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
        first, last = (
            self._own_state(name, end) if isinstance(end, torch.Tensor) else self._start(1, [end])[0][0]
            for name, end in (("a", a), ("b", b))
        )
        samples = self(slerp(first, last, n), uncond_kwargs=uncond_kwargs, progress=progress, **model_kwargs)
        assert isinstance(samples, torch.Tensor)
        return samples

    def add_noise(self, x0: torch.Tensor, seeds: int | Sequence[int]) -> torch.Tensor:
        """A clean `x0` `[B, ...]` noised to where this run starts: the state to call a sampler of `strength < 1` with.

        The noise is the starting state that the same seeds draw. Returns `[B, ...]` in the sampler's dtype.
        """
        alpha_bar = float(self.schedule.alpha_bar(self.table.timesteps[:1])[0])
        noise = normal(check_seeds(seeds, x0.shape[0]), 0, x0.shape[1:], STREAM_INITIAL, device=self.device)
        noised = x0.to(self.device, noise.dtype) * math.sqrt(alpha_bar) + noise * math.sqrt(1 - alpha_bar)
        return noised.to(self.dtype)

    def _require_deterministic(self, what: str) -> None:
        if self.table.stochastic:
            raise ValueError(f"eta: this sampler adds noise, and {what} needs eta 0; pass eta=0.0 to Sampler")

    def _steps(
        self,
        x: torch.Tensor,
        seeds: list[int] | None,
        kwargs: Mapping[str, Any],
        progress: bool,
        table: StepTable,
        limit: Limit,
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        guided = self.guidance_scale is not None
        copies = 2 if guided else 1
        device_seeds = None if seeds is None else seed_tensor(seeds, x.device)
        timesteps = torch.tensor(table.timesteps, device=x.device)[:, None].repeat(1, copies * x.shape[0])
        # Unguided and of the same dtype, the state itself is what the model takes.
        model_input = None
        if guided or self.model_dtype != x.dtype:
            model_input = torch.cat([x] * copies).to(self.model_dtype)
        options: dict[str, Any] = {
            "limit": limit,
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "out": x,
            "model_input": model_input,
        }
        prepared = None
        steps: Iterable[int] = range(len(table))
        if progress:
            steps = track(steps, description="sampling", console=Console(stderr=True))
        for step in steps:
            given = x if model_input is None else model_input
            output = self._call_model(given, timesteps[step], kwargs)
            if output.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
                # A view of its input, over which the step writes while it reads the output.
                output = output.clone()
            if prepared is None or not prepared.fits(output):
                seeds_or_none = device_seeds if table.stochastic else None
                prepared = prepare_step(self.backend, output, x, table, seeds=seeds_or_none, **options)
            if prepared is not None:
                _, x0 = prepared(output, step)
            else:
                drawn = device_seeds if table.rows[step].noise_scale != 0 else None
                _, x0 = reference_step(output, x, table, step, seeds=drawn, **options)
            assert x0 is not None
            yield step, table.timesteps[step], x0

    def _call_model(self, x: torch.Tensor, t: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        output = self.model(x, t, **kwargs)
        output = getattr(output, "sample", output)
        tensor: Any = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"model: returned {type(tensor).__name__}; it must return a tensor, a tuple, or `.sample`")
        return tensor

    def _start(
        self, start: int | torch.Tensor, seeds: int | Sequence[int] | None
    ) -> tuple[torch.Tensor, list[int] | None]:
        """A state of our own to work on in place, and the seeds."""
        if not isinstance(start, torch.Tensor):
            if isinstance(start, bool) or not isinstance(start, int) or start < 1:
                raise ValueError(f"start: {start!r}; pass a batch size >= 1, or a state [B, ...]")
            if self.sample_shape is None:
                raise ValueError("sample_shape: the model's configuration has none; pass sample_shape= to Sampler")
        else:
            start = self._own_state("start", start, "B")
        if seeds is None and (not isinstance(start, torch.Tensor) or self.table.stochastic):
            raise ValueError("seeds: None; pass one integer per sample, or one integer s for s, s + 1, ...")
        batch_size = start.shape[0] if isinstance(start, torch.Tensor) else start
        seed_list = None if seeds is None else check_seeds(seeds, batch_size)
        if isinstance(start, torch.Tensor):
            return start, seed_list
        assert seed_list is not None
        assert self.sample_shape is not None
        return normal(seed_list, 0, self.sample_shape, STREAM_INITIAL, device=self.device, dtype=self.dtype), seed_list

    def _own_state(self, name: str, state: Any, *batch: str) -> torch.Tensor:
        """A copy of the caller's state where the sampler runs; `batch` names the dimensions before a sample's own."""
        shape = ("...",) if self.sample_shape is None else self.sample_shape
        wanted = f"[{', '.join(map(str, (*batch, *shape)))}]"
        if not isinstance(state, torch.Tensor):
            raise TypeError(f"{name}: {type(state).__name__}; pass a tensor {wanted}")
        if self.sample_shape is not None and tuple(state.shape[len(batch) :]) != self.sample_shape:
            raise ValueError(f"{name}: shape {tuple(state.shape)}; pass {wanted}")
        if not state.is_floating_point() or state.ndim < len(batch):
            raise ValueError(
                f"{name}: {state.dtype} of shape {tuple(state.shape)}; pass a floating-point state {wanted}"
            )
        return state.to(self.device, self.dtype, copy=True, memory_format=torch.contiguous_format)

    def _model_kwargs(
        self, batch_size: int, kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The model's keyword arguments on the device; with guidance, unconditional and conditional rows stacked."""
        if self.guidance_scale is None:
            if uncond_kwargs:
                raise ValueError("uncond_kwargs: given without guidance; pass guidance_scale= to Sampler")
            return {name: self._place(value) for name, value in kwargs.items()}
        uncond = dict(uncond_kwargs or {})
        extra = sorted(set(uncond) - set(kwargs))
        if extra:
            raise ValueError(f"uncond_kwargs: {extra} have no conditional counterpart; pass them as keywords too")
        stacked = {}
        for name, value in kwargs.items():
            cond, other = self._place(value), self._place(uncond.get(name, value))
            if isinstance(cond, torch.Tensor) and cond.ndim and cond.shape[0] == batch_size:
                if not isinstance(other, torch.Tensor) or other.shape != cond.shape:
                    raise ValueError(f"uncond_kwargs: {name!r} must be a tensor of shape {tuple(cond.shape)}")
                cond = torch.cat([other, cond])
            elif name in uncond:
                raise ValueError(
                    f"uncond_kwargs: {name!r} is no tensor of {batch_size} rows; leave it out, or stack it"
                )
            stacked[name] = cond
        return stacked

    def _place(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.device, self.model_dtype if value.is_floating_point() else None)


def _model_sample_shape(model: Model) -> tuple[int, ...] | None:
    config = getattr(model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        return None
    return (channels, size, size) if isinstance(size, int) else (channels, *size)
