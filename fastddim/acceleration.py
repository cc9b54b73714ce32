"""`accelerate`: an existing diffusers pipeline whose denoising loop is `fastddim.loop`'s, and everything else its own.

The pipeline's own code runs on a view of the pipeline, an object that shares its members, over a single timestep: the
denoiser there only notes what it is called with, and the scheduler's `step` runs the whole loop with that. So prompts,
latents, safety checks and decoding, and what a new diffusers makes of them, are never written a second time here.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import diffusers
import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from fastddim.capture_checks import owns_graphs
from fastddim.coefficients import StepTable
from fastddim.config import Limit, limit_from
from fastddim.loop import Loop, Run, graph_mode
from fastddim.model_call import Hoister, Model, prediction_of
from fastddim.sampler_options import SamplerOptions
from fastddim.samplers import METHODS, Steps
from fastddim.samplers.sampling import read_scheduler
from fastddim.schedule import Schedule
from fastddim.scheduler import DDIMScheduler, DDIMSchedulerOutput
from fastddim.scheduler_rows import FORWARD, RowCache, has_rows
from fastddim.step import Guidance

_log = logging.getLogger("fastddim")

P = TypeVar("P", bound=DiffusionPipeline)

_MISSING = object()
# Arguments that put something between the steps, or that the loop's static buffers have no place for.
_OWN_LOOP_ARGUMENTS = (
    "callback",
    "callback_on_step_end",
    "ip_adapter_image",
    "ip_adapter_image_embeds",
    "cross_attention_kwargs",
    "timesteps",
    "sigmas",
    "denoising_start",
    "denoising_end",
    "joint_attention_kwargs",
    "skip_guidance_layers",
    "true_cfg_scale",
)
# Arguments of these whose default is no None.
_NEUTRAL = {"true_cfg_scale": 1.0}


def _no_guidance(pipe: Any, arguments: Mapping[str, Any]) -> Guidance | None:
    return None


def _label_guidance(pipe: Any, arguments: Mapping[str, Any]) -> Guidance | None:
    scale = float(arguments["guidance_scale"])
    return None if scale == 1.0 else Guidance(scale)


def _prompt_guidance(pipe: Any, arguments: Mapping[str, Any]) -> Guidance | None:
    if not pipe.do_classifier_free_guidance:
        return None
    return Guidance(float(pipe.guidance_scale), max(0.0, float(getattr(pipe, "guidance_rescale", 0.0))))


def _dit_guidance(pipe: Any, arguments: Mapping[str, Any]) -> Guidance | None:
    scale = float(arguments["guidance_scale"])
    return Guidance(scale, cond_first=True) if scale > 1 else None


def _same(denoiser: Model) -> Model:
    return denoiser


def _without_variance(denoiser: Any) -> Model:
    """The prediction may be followed by channels that are no part of the step."""

    def predict(x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return prediction_of(denoiser(x, t, **kwargs))[:, : x.shape[1]]

    return predict


def _by_keyword(denoiser: Any) -> Model:
    def predict(x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> Any:
        return denoiser(hidden_states=x, timestep=t, **kwargs)

    return predict


def _by_keyword_in_thousandths(denoiser: Any) -> Model:
    def predict(x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> Any:
        return denoiser(hidden_states=x, timestep=t.to(x.dtype) / 1000, **kwargs)

    return predict


class _Kind(NamedTuple):
    """What differs between the supported pipelines.

    Attributes:
        denoiser: the component that the loop calls.
        guidance: finds a call's guidance, from the pipeline as its `__call__` has set it up and from the arguments.
        model: `model(x, t, **kwargs)` of the denoiser.
    """

    denoiser: str
    guidance: Callable[[Any, Mapping[str, Any]], Guidance | None]
    model: Callable[[Any], Model] = _same


# By name: importing them all would import transformers for everyone.
_KINDS = {
    "fastddim.DDIMPipeline": _Kind("unet", _label_guidance),
    "diffusers.DDIMPipeline": _Kind("unet", _no_guidance),
    "diffusers.StableDiffusionPipeline": _Kind("unet", _prompt_guidance),
    "diffusers.StableDiffusionImg2ImgPipeline": _Kind("unet", _prompt_guidance),
    "diffusers.StableDiffusionXLPipeline": _Kind("unet", _prompt_guidance),
    "diffusers.StableDiffusionXLImg2ImgPipeline": _Kind("unet", _prompt_guidance),
    "diffusers.DiTPipeline": _Kind("transformer", _dit_guidance, _without_variance),
    "diffusers.StableDiffusion3Pipeline": _Kind("transformer", _prompt_guidance, _by_keyword),
    "diffusers.FluxPipeline": _Kind("transformer", _no_guidance, _by_keyword_in_thousandths),
}


def _find_kind(pipeline: type) -> tuple[type, _Kind] | None:
    """The supported class that a class is or inherits from, and its kind."""
    for base in pipeline.__mro__:
        kind = _KINDS.get(f"{base.__module__.partition('.')[0]}.{base.__name__}")
        if kind is not None:
            return base, kind
    return None


class _Acceleration:
    """What an accelerated pipeline keeps between calls: its loop with the captured graphs, and what has been logged."""

    def __init__(self, options: SamplerOptions) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._logged: set[str] = set()
        self._loop: Loop | None = None
        self._denoiser: Any = None

    def loop(self, denoiser: Any, kind: _Kind) -> Loop:
        """The loop of a denoiser: a new one for another module."""
        with self._lock:
            if self._loop is None or self._denoiser is not denoiser:
                self._release()
                model, options = kind.model(denoiser), self.options
                hoister = Hoister(model, options.hoist_limit) if options.hoist else None
                self._loop = Loop(model, options.graph, options.max_graphs, denoiser, hoister)
                self._denoiser = denoiser
            return self._loop

    def release(self) -> None:
        """Free the captured graphs, after the calls under way."""
        with self._lock:
            self._release()

    def _release(self) -> None:
        if self._loop is not None:
            self._loop.graphs.clear()
            self._loop = None

    def log_once(self, name: str, reason: str) -> None:
        """Say why a call runs the pipeline's own loop, once for each reason."""
        with self._lock:
            if reason in self._logged:
                return
            self._logged.add(reason)
        _log.warning("%s runs its own denoising loop, not fastddim's: %s", name, reason)


def _parts(denoiser: Any) -> Iterator[torch.nn.Module]:
    """A denoiser's modules, without the wrapper that `torch.compile` puts around it."""
    module: torch.nn.Module = getattr(denoiser, "_orig_mod", denoiser)
    return module.modules()


def _view(original: Any, cls: type) -> Any:
    """An object of another class with the members of `original`; what is set on it stays its own."""
    view: Any = object.__new__(cls)
    vars(view).update(vars(original))
    return view


class _Progress:
    """The pipeline's progress bar, moved on by the loop's steps and not by the pipeline's one."""

    def __init__(self, bar: Any, total: int, iterable: Iterable[Any] | None) -> None:
        self._bar = bar
        self._left = total
        self._iterable = iterable

    def advance(self, steps: int = 1) -> None:
        steps = min(steps, self._left)
        if steps:
            self._bar.update(steps)
            self._left -= steps

    def fill(self) -> None:
        self.advance(self._left)

    def update(self, n: int = 1) -> None:
        """What the pipeline calls after its one step: nothing is left to show."""

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __iter__(self) -> Iterator[Any]:
        assert self._iterable is not None
        with self:
            yield from self._iterable


class _LoopScheduler:
    """Mixed into the class of the pipeline's scheduler, for a view of it whose `step` is the whole loop."""

    _call: _Call
    timesteps: torch.Tensor


@functools.cache
def _loop_scheduler_of(scheduler: Any) -> type:
    # Pipelines look into both signatures.
    @functools.wraps(scheduler.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(scheduler.set_timesteps).bind(self, *args, **kwargs)
        # On the pipeline's device they would have to be read back.
        device = given.arguments.pop("device", None)
        scheduler.set_timesteps(*given.args, **given.kwargs)
        self.timesteps = self._call.begin(self.timesteps, device, args, kwargs)

    @functools.wraps(scheduler.step)
    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(scheduler.step).bind(self, model_output, timestep, sample, *args, **kwargs)
        given.apply_defaults()
        options = {**given.arguments, **kwargs}
        final = self._call.run_loop(self, model_output, timestep, sample, options)
        return DDIMSchedulerOutput(final) if options.get("return_dict", True) else (final, final)

    return type(scheduler.__name__, (_LoopScheduler, scheduler), {"set_timesteps": set_timesteps, "step": step})


class _Recorder:
    """Mixed into the class of a denoiser's view, which notes what it is called with instead of predicting."""

    _call: _Call
    config: Any

    def __call__(self, x: torch.Tensor | None = None, timestep: Any = None, **kwargs: Any) -> Any:
        x = kwargs.pop("hidden_states") if x is None else x
        self._call.recorded = (x, kwargs)
        channels = x.shape[1] if x.ndim < 4 else getattr(self.config, "out_channels", None) or x.shape[1]
        prediction = x.new_zeros((x.shape[0], channels, *x.shape[2:]))
        return SimpleNamespace(sample=prediction) if kwargs.get("return_dict", True) else (prediction,)


@functools.cache
def _recorder_of(denoiser: Any) -> type:
    return type(denoiser.__name__, (_Recorder, denoiser), {})


class _Call:
    """One accelerated call of a pipeline.

    Args:
        pipe: the accelerated pipeline.
        pipeline: its own class.
        kind: what differs between its class and the other supported ones.
        arguments: the call's arguments by name.
    """

    def __init__(self, pipe: Any, pipeline: Any, kind: _Kind, arguments: Mapping[str, Any]) -> None:
        self.recorded: tuple[torch.Tensor, dict[str, Any]] | None = None
        self._pipe, self._pipeline, self._kind, self._arguments = pipe, pipeline, kind, arguments
        self._acceleration: _Acceleration = pipe._acceleration
        self._denoiser: Any = getattr(pipe, kind.denoiser)
        self._timesteps: list[float] = []
        # Those before them that an image-to-image pipeline leaves out.
        self._skipped: list[float] = []
        self._progress: _Progress | None = None
        self._inner = _view(pipe, pipeline)
        self._slices_timesteps = hasattr(pipeline, "get_timesteps")

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the pipeline's own `__call__`; what it sets on itself is set on the real pipeline."""
        pipe, inner = vars(self._pipe), vars(self._inner)
        before, replaced = dict(inner), self._replaced()
        inner.update(replaced)
        if "_interrupt" in pipe:
            pipe["_interrupt"] = False
        try:
            return self._pipeline.__call__(self._inner, *args, **kwargs)
        finally:
            for name, value in inner.items():
                if name not in replaced and value is not before.get(name, _MISSING):
                    pipe[name] = value
            # The view and this call hold each other, and the call's tensors should be free at its end.
            inner.clear()

    def _replaced(self) -> dict[str, Any]:
        """What the pipeline's code sees instead of the pipeline's own."""
        own: Any = type(self._denoiser)
        scheduler = _view(self._pipe.scheduler, _loop_scheduler_of(self._pipe.scheduler.__class__))
        denoiser = _view(self._denoiser, _recorder_of(own))
        for view in (scheduler, denoiser):
            vars(view)["_call"] = self
        replaced = {"scheduler": scheduler, self._kind.denoiser: denoiser, "progress_bar": self._progress_bar}
        return {**replaced, "get_timesteps": self._get_timesteps} if self._slices_timesteps else replaced

    def begin(
        self, timesteps: torch.Tensor, device: str | torch.device | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Note the run's timesteps, `[num_steps]` on the CPU: those that the pipeline should see, on `device`.

        `args` and `kwargs` are those that the pipeline has set them with.
        """
        self._timesteps = timesteps.tolist()
        # Read by users after a call.
        self._pipe.scheduler.set_timesteps(*args, **kwargs)
        timesteps = timesteps.to(device)
        # An image-to-image pipeline still has to find its start in them.
        return timesteps if self._slices_timesteps else timesteps[:1]

    def _get_timesteps(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, int]:
        timesteps, num_inference_steps = self._pipeline.get_timesteps(self._inner, *args, **kwargs)
        first = len(self._timesteps) - len(timesteps)
        self._skipped, self._timesteps = self._timesteps[:first], self._timesteps[first:]
        return timesteps[:1], num_inference_steps

    def _progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> _Progress:
        # Where a pipeline has counted the timesteps that it sees, it has one.
        total = len(self._timesteps)
        self._progress = _Progress(self._pipe.progress_bar(total=total), total, iterable)
        return self._progress

    def run_loop(
        self,
        scheduler: Any,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """The final state of all steps from `sample`, of its shape.

        Args:
            scheduler: the scheduler whose rows the steps take.
            model_output: a tensor of the shape and dtype that the pipeline hands to a step.
            timestep: the first one.
            sample: the starting state `[B, ...]`, or, as DiT has it, the same one twice.
            options: all arguments of the step by name.
        """
        assert self.recorded is not None
        if "_num_timesteps" in vars(self._inner):
            vars(self._inner)["_num_timesteps"] = len(self._timesteps)
        model_input, kwargs = self.recorded
        guidance = self._kind.guidance(self._inner, self._arguments)
        twice = guidance is not None and len(model_input) == len(sample)
        start = sample[: len(sample) // 2] if twice else sample
        table, draws = _table_of(scheduler, self._skipped, self._timesteps, options)
        # The loop's states are those that the model is called with.
        scales = getattr(scheduler, "scale_model_input", None)
        scale = 1.0 if scales is None else float(scales(torch.ones((), device="cpu"), timestep))
        if scale != 1.0:
            start = (start.to(torch.promote_types(start.dtype, torch.float32)) * scale).to(start.dtype)
        noise = None
        if any(draws):
            # In the order in which the steps would have drawn it.
            drawn = [_draw(scheduler, model_output, options.get("generator")) if draw else None for draw in draws]
            silent = torch.zeros_like(next(each for each in drawn if each is not None))
            noise = torch.stack([silent if each is None else each for each in drawn])
        run = Run(
            table=table,
            shape=tuple(start.shape),
            dtype=torch.promote_types(sample.dtype, model_output.dtype),
            model_dtype=model_input.dtype,
            device=sample.device,
            start=start,
            noise=noise,
            limit=_limit_of(scheduler),
            guidance=guidance,
            kwargs=kwargs,
            backend=self._acceleration.options.backend,
        )
        # Buffers made in inference mode could not be written to by a later call outside of it.
        with torch.inference_mode(False):
            final = self._acceleration.loop(self._denoiser, self._kind)(run, self._steps())
        if self._progress is not None and not self._interrupted:
            self._progress.fill()
        return torch.cat([final, final]) if twice else final

    @property
    def _interrupted(self) -> bool:
        """Whether another thread, or a hook, has asked the pipeline to stop."""
        return bool(vars(self._pipe).get("_interrupt", False))

    def _steps(self) -> Iterator[int]:
        for step in range(len(self._timesteps)):
            if self._interrupted:
                return
            yield step
            if self._progress is not None:
                self._progress.advance()


def _table_of(
    scheduler: Any, skipped: list[float], timesteps: list[float], options: Mapping[str, Any]
) -> tuple[StepTable, list[bool]]:
    """The table of a scheduler's steps at `timesteps`, after the `skipped` ones of its run, and at which of them it draws
    noise; `options` are a step's.
    """
    if isinstance(scheduler, diffusers.DDIMScheduler):
        eta, rederive = options.get("eta", 0.0), bool(options.get("use_clipped_model_output"))
        rows = RowCache().rows(scheduler, FORWARD)
        assert rows is not None  # `_reason_against` looked
        columns = rows.columns(np.array(timesteps), eta, rederive)
        if eta <= 0:
            columns[:, -1] = 0.0
        return StepTable.from_columns(timesteps, columns), [eta > 0] * len(timesteps)
    sampling = read_scheduler(scheduler)
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
    return table, draws


def _limit_of(scheduler: Any) -> Limit:
    ddim = isinstance(scheduler, diffusers.DDIMScheduler)
    return limit_from(scheduler.config) if ddim else read_scheduler(scheduler).limit


def _draw(scheduler: Any, model_output: torch.Tensor, generator: Any) -> torch.Tensor:
    """The noise of a step, as its scheduler draws it."""
    name = type(scheduler).__name__
    if name == "FlowMatchEulerDiscreteScheduler":
        return torch.randn_like(model_output, dtype=torch.float32)
    dtype = torch.float32 if name == "DPMSolverMultistepScheduler" else model_output.dtype
    drawn: torch.Tensor = randn_tensor(model_output.shape, generator=generator, device=model_output.device, dtype=dtype)
    return drawn


def _reason_against(pipe: Any, pipeline: type, base: type, kind: _Kind, arguments: Mapping[str, Any]) -> str | None:
    """Why a call of a `pipeline`, which is or inherits from `base`, has to run the pipeline's own loop, or None."""
    for name in ("__call__", "get_timesteps"):
        if getattr(pipeline, name, None) is not getattr(base, name, None):
            return f"{pipeline.__name__} has a {name} of its own"
    for name in _OWN_LOOP_ARGUMENTS:
        if arguments.get(name) not in (None, _NEUTRAL.get(name)):
            return f"{name} is given"
    if not isinstance(arguments.get("eta", 0.0), (int, float)):
        return "eta is no number"
    unknown = _unknown_scheduler(pipe.scheduler)
    if unknown is not None:
        return f"its scheduler is {unknown}"
    denoiser = getattr(pipe, kind.denoiser)
    if getattr(pipe, "_all_hooks", None):
        return "its models are offloaded"
    if getattr(denoiser, "_hf_peft_config_loaded", False) or hasattr(denoiser, "peft_config"):
        return f"LoRA or PEFT layers are loaded into the {kind.denoiser}; fuse and unload them"
    # diffusers' own `device` walks through all modules.
    parameter = next(denoiser.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if torch.is_autocast_enabled(device.type):
        return "torch.autocast is on"
    captures = graph_mode(pipe._acceleration.options.graph, device) != "off"
    if captures and any(map(owns_graphs, (denoiser, *_parts(denoiser)))):
        return f"the {kind.denoiser} is compiled to capture CUDA graphs of its own; pass graph='off'"
    for part in _parts(denoiser):
        members = vars(part)
        if "_hf_hook" in members or getattr(members.get("_diffusers_hook"), "hooks", None):
            return f"the {kind.denoiser} has hooks for offloading, caching or casting"
        if "forward" in members:
            return f"the {kind.denoiser} has a replaced forward"
        if captures and (part._forward_hooks or part._forward_pre_hooks):
            return f"the {kind.denoiser} has forward hooks, which a captured graph would not call; pass graph='off'"
    return None


def _unknown_scheduler(scheduler: Any) -> str | None:
    """Why the loop cannot take a scheduler's steps, after "is"; None where it can."""
    kind = type(scheduler)
    own = [name for method in METHODS.values() for name in method.schedulers if method.name not in ("ddim", "ddpm")]
    patched = [name for name in ("set_timesteps", "step") if name in vars(scheduler)]
    if patched:
        return f"a {kind.__name__} with a {patched[0]} of its own"
    if kind is DDIMScheduler or kind is diffusers.DDIMScheduler:
        known = has_rows(scheduler, FORWARD)
        return None if known else f"a {kind.__name__} with a step or values that diffusers' own step alone takes"
    if kind.__name__ not in own or getattr(diffusers, kind.__name__, None) is not kind:
        return f"a {kind.__name__}, none of {', '.join(['DDIMScheduler', *own])}"
    try:
        schedule = read_scheduler(scheduler).schedule
    except ValueError as error:
        return f"a {kind.__name__} with {error}"
    # Those that have sigmas step through these.
    own_alphas = None if hasattr(scheduler, "sigmas") else getattr(scheduler, "alphas_cumprod", None)
    if own_alphas is not None and isinstance(schedule, Schedule):
        expected = torch.from_numpy(schedule.alphas_cumprod.copy())
        if own_alphas.shape != expected.shape or not torch.allclose(own_alphas.double().cpu(), expected, 1e-3, 1e-6):
            return f"a {kind.__name__} with alphas_cumprod that its configuration does not give"
    return None


@functools.cache
def _accelerated(pipeline: Any) -> type:
    """The class of accelerated pipelines of a class, which passes for that class everywhere else."""
    found = _find_kind(pipeline)
    assert found is not None
    base, kind = found
    signature = inspect.signature(pipeline.__call__)

    @functools.wraps(pipeline.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        reason = _reason_against(self, pipeline, base, kind, arguments)
        if reason is not None:
            self._acceleration.log_once(pipeline.__name__, reason)
            return pipeline.__call__(self, *args, **kwargs)
        return _Call(self, pipeline, kind, arguments)(args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        plain = _view(self, pipeline)
        del vars(plain)["_acceleration"]
        return _attach, (plain, self._acceleration.options)

    names = {name: getattr(pipeline, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(
        pipeline.__name__,
        (pipeline,),
        {**names, "__call__": call, "__reduce_ex__": reduce, "_unaccelerated": pipeline},
    )


def _attach(pipe: P, options: SamplerOptions) -> P:
    """Accelerate a pipeline that was checked; a copied or unpickled one gets graphs of its own."""
    vars(pipe)["_acceleration"] = _Acceleration(options)
    own: Any = type(pipe)
    pipe.__class__ = _accelerated(own)
    return pipe


def accelerate(pipe: P, *, graph: str = "auto", backend: str = "auto", max_graphs: int = 8, hoist: bool = False) -> P:
    """Run a diffusers pipeline's denoising loop with fastddim: same call, same generators, same pictures to rounding.

    The pipeline is changed in place and stays of its class for `isinstance`, saving and loading. On a GPU the step is the
    fused kernel and the loop a CUDA graph, which the second call of a shape captures and later ones replay. A call that the
    loop cannot hold (callbacks, IP-Adapters, LoRA layers, `cross_attention_kwargs`, SDXL's `denoising_start` and
    `denoising_end`, offloading, `torch.autocast`, a scheduler swapped for another kind, a `__call__` of a subclass) runs
    the pipeline's own loop instead, bit for bit, and a warning of the logger `"fastddim"` names the reason, once.

    Args:
        pipe: a `DDIMPipeline` (diffusers' or fastddim's), `StableDiffusionPipeline`, `StableDiffusionImg2ImgPipeline`,
            `StableDiffusionXLPipeline`, `StableDiffusionXLImg2ImgPipeline`, `DiTPipeline`, `StableDiffusion3Pipeline` or
            `FluxPipeline`, with a `DDIMScheduler` or another scheduler of `fastddim.samplers.METHODS`, but for DDPM's and
            PNDM's. Accelerated already, it keeps its captured graphs if the options are the same.
        graph, max_graphs, hoist: as `fastddim.Sampler`'s.
        backend: implementation of the step, as `fastddim.ddim_step`'s.

    Returns:
        `pipe`.

    Raises:
        TypeError: another pipeline.
        ValueError: another scheduler, or an option that is not one of its choices.
    """
    options = SamplerOptions(graph=graph, backend=backend, max_graphs=max_graphs, hoist=hoist)
    if isinstance(pipe, type) or _find_kind(type(pipe)) is None:
        raise TypeError(f"pipe: {type(pipe).__name__}; pass one of {', '.join(_KINDS)}")
    unknown = _unknown_scheduler(pipe.scheduler)
    if unknown is not None:
        raise ValueError(
            f"pipe.scheduler: it is {unknown}; set one of these, such as"
            " pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config), first"
        )
    if _unaccelerated(pipe) is not None:
        if pipe._acceleration.options == options:
            return pipe
        unaccelerate(pipe)
    return _attach(pipe, options)


def unaccelerate(pipe: P) -> P:
    """Give a pipeline its own loop back and free its captured graphs; one that is not accelerated stays as it is.

    Returns:
        `pipe`.
    """
    pipeline = _unaccelerated(pipe)
    if pipeline is not None:
        pipe.__class__ = pipeline
        vars(pipe).pop("_acceleration").release()
    return pipe


def _unaccelerated(pipe: Any) -> type | None:
    """The own class of an accelerated pipeline."""
    return getattr(type(pipe), "_unaccelerated", None)
