"""`SamplerOptions`: what a `Sampler` can be told beside its model and its schedule or table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastddim.backends import check_backend
from fastddim.config import (
    LIMIT_CLASSES,
    Limit,
    require_choice,
    require_guidance_method,
    require_int,
    require_number,
)
from fastddim.hoisting import DEFAULT_HOIST_LIMIT
from fastddim.loop import GRAPH_MODES

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# What a StepTable fixes, so that nothing of it can be asked for beside one.
FIXED_BY_A_TABLE = (
    "num_inference_steps", "timesteps", "sigmas", "spacing", "method", "method_options", "eta", "variance_type",
    "use_clipped_model_output", "strength", "transitions",
)  # fmt: skip
# Options that may be tensors or numpy's numbers.
_NUMBERS = (
    "num_inference_steps", "guidance_scale", "guidance_rescale", "apg_eta", "apg_norm_threshold", "strength",
)  # fmt: skip
# Options that a method has or has not, handed on where they differ from their defaults.
OF_A_METHOD = ("eta", "variance_type", "use_clipped_model_output", "transitions")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerOptions:
    """Options of a `Sampler`, checked, with sequences as tuples.

    Attributes:
        num_inference_steps: number of model calls; timesteps spaced by the configuration's `timestep_spacing`.
        timesteps: an explicit descending list of training timesteps instead of `num_inference_steps`.
        sigmas: an explicit descending list of noise levels instead, for methods that take one (`samplers.Steps`).
        spacing: how a number of steps is spaced, a name in `samplers.SPACINGS`; the schedule's own by default.
        method: the sampling method, a name in `samplers.METHODS`; `"auto"` is that of a diffusers class, Euler's method for
            a `FlowSchedule` or an `EDMSchedule`, and otherwise DDIM, also for DDPM's and PNDM's classes.
        method_options: options of the method by name, such as `{"gamma": 0.2}` for `"tcd"`.
        eta: a number in [0, 1] for all steps, or one per step; 0 is DDIM, 1 is DDPM. By default what the method has.
        variance_type: `"fixed_large"` with eta 1, or with method `"ddpm"`, is DDPM with the paper's larger variance.
        guidance_scale: classifier-free guidance; None calls the model without it, once per step on `[B, ...]`.
        guidance_rescale: a number in [0, 1]; arXiv:2305.08891, section 3.4.
        guidance_method: `"cfg"`; `"cfg++"`, whose `guidance_scale` is the paper's lambda in [0, 1]; or `"apg"`, adaptive
            projected guidance. See `fastddim.Guidance`. CFG++ is for methods with an epsilon term: DDIM, Euler's and TCD.
        apg_eta, apg_norm_threshold: numbers of `"apg"`, as for `fastddim.Guidance`.
        limit: the limit applied to x0, a `Clip`, a `DynamicThreshold` or None; by default (`"auto"`) the configuration's, and
            none where a table is given.
        use_clipped_model_output: derive epsilon from the limited x0. True by default where x0 is limited: with the raw
            epsilon, guidance and a limit drift the state away from any picture. Not with
            CFG++, whose epsilon is another output's.
        strength: a number in (0, 1]; below 1 the run starts that far into the chain, from a noised state (image-to-image).
        transitions: `"exact"`, or `"diffusers"` to reproduce its recomputed neighbours (see `Schedule.pairs`).
        sample_shape: shape of one sample, without the batch; read from a diffusers model's configuration by default.
        dtype: floating-point dtype of the state; the model is called in its own parameters' dtype.
        device: where to sample; the model's own by default.
        backend: implementation of the step, `"auto"`, `"triton"`, `"reference"` or, on a CPU, `"compiled"`; see
            `fastddim.ddim_step`.
        graph: `"loop"`, one CUDA graph of all steps; `"step"`, one of a step, which runs of any number of steps, eta,
            spacing, guidance scale, threshold and seeds replay (`replace`); `"off"`; `"auto"`, `"step"` on a GPU. On a CPU
            the same code runs without a capture. The first call of a shape goes step by step, the second is captured
            (`Sampler.warmup` captures at once). Where a model cannot be captured, it is called step by step, with a warning
            that says why; what is not noticed of a model that changes is in `capture_checks.ModelState`.
        compile: a mode of `torch.compile` for the model, True for its default.
        hoist: compute what the model makes of timesteps and conditions alone once for a run, before its steps: embeddings of
            the timestep, keys and values of a text. The model is traced by `torch.export` at the first call of its kind,
            which takes seconds; one that cannot be traced is called as it is, with a warning. What comes of sums over more
            rows than in a step differs in the last bits.
        hoist_limit: bytes that this may take in a run; what would take more stays in the steps.
        channels_last: hand the model channels-last inputs; its weights are converted in place.
        guidance_interval: fractions of the steps from and to which guidance is on (arXiv:2404.07724); at the others the
            model is called with the conditional half alone.
        batched_guidance: one model call for both halves, or, with less memory, one for each.
        batch_buckets: batch sizes to pad to, so that a few captures serve all of them.
        max_graphs: how many captured graphs are kept, the most recently used.

    Raises:
        ValueError: a value out of range; the message names it and what is valid.
    """

    num_inference_steps: int | None = None
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None
    spacing: str | None = None
    method: str = "auto"
    method_options: Mapping[str, Any] | None = None
    eta: float | Sequence[float] | None = None
    variance_type: str = "fixed_small"
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_method: str = "cfg"
    apg_eta: float = 0.0
    apg_norm_threshold: float = 0.0
    limit: Limit | str = "auto"
    use_clipped_model_output: bool | None = None
    strength: float = 1.0
    transitions: str = "exact"
    sample_shape: Sequence[int] | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None
    backend: str = "auto"
    graph: str = "auto"
    compile: bool | str = False
    hoist: bool = False
    hoist_limit: int = DEFAULT_HOIST_LIMIT
    channels_last: bool = False
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    batched_guidance: bool = True
    batch_buckets: Sequence[int] = ()
    max_graphs: int = 8

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            object.__setattr__(self, name, to_python(getattr(self, name)))
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"dtype: {self.dtype!r}; pass a floating-point torch.dtype")
        if self.device is not None:
            _convert("device", torch.device, self.device, "such as 'cpu' or 'cuda:0'")
        require_number("guidance_rescale", self.guidance_rescale, 0.0, 1.0)
        if self.guidance_scale is not None:
            require_number("guidance_scale", self.guidance_scale, -1e4, 1e4)
        elif self.guidance_rescale:
            raise ValueError(f"guidance_rescale: {self.guidance_rescale!r} without guidance_scale; pass both")
        guided = self.guidance_scale is not None
        require_guidance_method("guidance_method", self.guidance_method, self.apg_eta, self.apg_norm_threshold, guided)
        if self.limit != "auto" and not isinstance(self.limit, Limit):
            raise ValueError(f"limit: {self.limit!r}; pass {LIMIT_CLASSES}, None, or 'auto'")
        check_backend(self.backend)
        require_choice("graph", self.graph, GRAPH_MODES)
        self._check_compile()
        require_int("hoist_limit", self.hoist_limit, 0)
        interval = _convert("guidance_interval", tuple, self.guidance_interval, "two fractions of the steps")
        if len(interval) != 2:
            raise ValueError(f"guidance_interval: {interval!r}; pass two fractions of the steps")
        require_number("guidance_interval", interval[0], 0.0, 1.0)
        require_number("guidance_interval", interval[1], interval[0], 1.0)
        buckets = _convert("batch_buckets", tuple, self.batch_buckets or (), "a list of integers")
        for bucket in buckets:
            require_int("batch_buckets", bucket, 1)
        require_int("max_graphs", self.max_graphs, 1)
        etas = (
            None if self.eta is None else _convert("eta", _floats, self.eta, "numbers in [0, 1] (0 is DDIM, 1 is DDPM)")
        )
        options = _convert("method_options", dict, self.method_options or {}, "a mapping of names to values")
        for name, value in (
            ("guidance_interval", interval),
            ("batch_buckets", tuple(sorted(buckets))),
            ("eta", tuple(etas) if isinstance(etas, list) else etas),
            ("method_options", options or None),
        ):
            object.__setattr__(self, name, value)
        for name, noun in (("timesteps", "numbers"), ("sigmas", "numbers"), ("sample_shape", "integers")):
            given = to_python(getattr(self, name))
            if given is not None:
                object.__setattr__(self, name, _convert(name, tuple, given, f"a list of {noun}"))
        for size in self.sample_shape or ():
            require_int("sample_shape", size, 0)

    def _check_compile(self) -> None:
        if isinstance(self.compile, bool):
            return
        require_choice("compile", self.compile, COMPILE_MODES)
        if self.graph != "off" and self.compile in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"compile: {self.compile!r} captures CUDA graphs of its own; pass 'default' or"
                " 'max-autotune-no-cudagraphs', or graph='off'"
            )


def to_python(value: Any) -> Any:
    """A tensor, an array or a number of numpy as Python's lists and numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _floats(values: Any) -> Any:
    return np.asarray(values, dtype=np.float64).tolist()


def _convert(name: str, kind: Callable[[Any], Any], value: Any, noun: str) -> Any:
    """A value as another type, or a `ValueError` that names the option."""
    try:
        return kind(value)
    # torch.device raises a RuntimeError.
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: {value!r}; pass {noun}") from None
