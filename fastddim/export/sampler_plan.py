"""What is to be exported, checked before any work: the options, the model, the schedule and its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastddim.coefficients import StepCoefficients, StepTable
from fastddim.config import DDIMConfig, Limit, require_choice, require_guidance_method, require_int
from fastddim.export.denoisers import DTYPES, Denoiser, describe
from fastddim.export.schedule_module import ScheduleModule, TablesModule, bake
from fastddim.hoisting import DEFAULT_HOIST_LIMIT
from fastddim.samplers import Steps
from fastddim.samplers.sampling import Sampling, read_scheduler
from fastddim.schedule import Schedule
from fastddim.step import require_epsilon_term

KINDS = ("loop", "step")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is fixed in an exported file.

    Attributes:
        kind: `"loop"`, all steps in one call; `"step"`, one step, with rows of the table for each sample.
        guided: classifier-free guidance, its scale an input `[B]`.
        guidance_rescale: `guidance_rescale` is an input `[B]` too.
        guidance_method, apg_eta, apg_norm_threshold: as those of `SamplerOptions`.
        stochastic: noise is an input, so that rows may add it.
        bake_schedule: the loop takes `num_inference_steps` and derives the table itself.
        per_sample_steps: each sample has its own `num_inference_steps` `[B]`; it stays as it is once it is finished.
        seeded: the loop takes a `seed` for each sample and draws its starting state and noise itself. The scale of the
            start is fixed in the file, as the limit is: with a seed, a client has nothing else to know of the method.
        num_inference_steps: the default table's number of steps (50, or as many as the schedule has).
        method, method_options, spacing, eta, use_clipped_model_output: as those of `SamplerOptions`; a baked schedule keeps
            them.
        dtype: the weights' dtype, `"float32"`, `"float16"` or `"bfloat16"`; the state is float32.
        dynamic_size: heights and widths may differ from call to call, for models that take them.
        hoist: compute what depends on timesteps and conditions alone once for a run, before its steps. By default where the
            file has the loop. With kind `"step"`, for ONNX alone, a second graph computes it, and each step takes its rows.
        hoist_limit: bytes that this may take in a run of one sample; what would take more is computed in each step.

    Raises:
        ValueError: options that exclude each other.
    """

    kind: str = "loop"
    guided: bool = False
    guidance_rescale: bool = False
    guidance_method: str = "cfg"
    apg_eta: float = 0.0
    apg_norm_threshold: float = 0.0
    stochastic: bool = False
    bake_schedule: bool = False
    per_sample_steps: bool = False
    seeded: bool = False
    num_inference_steps: int | None = None
    method: str = "auto"
    method_options: Mapping[str, Any] | None = None
    spacing: str | None = None
    eta: float | None = None
    use_clipped_model_output: bool | None = None
    dtype: str = "float32"
    dynamic_size: bool = False
    hoist: bool | None = None
    hoist_limit: int = DEFAULT_HOIST_LIMIT

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, KINDS)
        require_choice("dtype", self.dtype, DTYPES)
        if self.num_inference_steps is not None:
            require_int("num_inference_steps", self.num_inference_steps, 1)
        if self.guidance_rescale and not self.guided:
            raise ValueError("guidance_rescale: True without guided; pass both")
        require_guidance_method(
            "guidance_method", self.guidance_method, self.apg_eta, self.apg_norm_threshold, self.guided, "guided"
        )
        if self.bake_schedule and self.kind == "step":
            raise ValueError("bake_schedule: True with kind 'step', which takes rows of a table; pass kind='loop'")
        if self.per_sample_steps and not self.bake_schedule:
            raise ValueError("per_sample_steps: True without bake_schedule, which makes the tables; pass both")
        if self.per_sample_steps and self.stochastic and not self.seeded:
            raise ValueError(
                "per_sample_steps: True with stochastic, where the noise would have as many steps as the longest run; pass"
                " seeded=True too"
            )
        if self.seeded and self.kind == "step":
            raise ValueError("seeded: True with kind 'step', which starts from any state; pass kind='loop'")
        if self.seeded and self.dynamic_size:
            raise ValueError(
                "seeded: True with dynamic_size, but the size of what is drawn is fixed; pass one of the two"
            )
        require_int("hoist_limit", self.hoist_limit, 0)
        if self.hoist and self.kind == "step" and self.dtype == "bfloat16":
            raise ValueError(
                "hoist: True with kind 'step' and dtype 'bfloat16', but numpy has no such values to hand to a step; pass"
                " dtype='float16' or 'float32', or leave hoist out"
            )
        if self.eta and not self.stochastic:
            raise ValueError(f"eta: {self.eta!r} adds noise; pass stochastic=True, which makes noise an input")

    @property
    def hoisted(self) -> bool:
        """Whether what every step would compute again is computed before the first."""
        return self.kind == "loop" if self.hoist is None else self.hoist

    def of_the_method(self) -> dict[str, Any]:
        """The method's options by name."""
        given = {name: getattr(self, name) for name in ("eta", "use_clipped_model_output")}
        return {**{name: value for name, value in given.items() if value is not None}, **(self.method_options or {})}


@dataclass(frozen=True)
class SamplerPlan:
    """What `write_sampler` exports, all of it checked.

    Attributes:
        denoiser: the model.
        sampling: the schedule and method that the table comes from; None where a table was given.
        table: the steps of the default run.
        limit: the limit applied to x0.
        options: with every default decided.
    """

    denoiser: Denoiser
    sampling: Sampling | None
    table: StepTable
    limit: Limit
    options: ExportOptions

    @property
    def timestep_dtype(self) -> torch.dtype:
        """What the graph takes timesteps as."""
        dtype: torch.dtype = getattr(torch, self.table.timestep_dtype)
        return dtype

    @property
    def num_columns(self) -> int:
        """Columns of the table: 6, or 7 where it looks back."""
        return int(self.table.columns.shape[1])

    @property
    def state_dims(self) -> list[str | int]:
        """The dimensions of a batch of states, a name for each that differs from call to call."""
        dims: list[str | int] = ["batch", *self.denoiser.sample_shape]
        if self.options.dynamic_size:
            dims[2:] = ["height", "width"]
        return dims

    def baked_schedule(self) -> ScheduleModule | TablesModule:
        """What makes the tables in a file with a baked schedule."""
        assert self.sampling is not None
        baked = bake(self.sampling, self.options.per_sample_steps)
        if self.options.seeded and isinstance(baked, TablesModule) and len(baked.start_scales) > 1:
            raise ValueError(
                f"seeded: True with bake_schedule and method {self.sampling.method!r}, whose start is scaled by the number of"
                " steps here; leave seeded out, or pass a scheduler with timestep_spacing 'leading' or 'trailing'"
            )
        return baked


def plan_sampler(
    model: Any,
    scheduler_or_table: Schedule | DDIMConfig | StepTable | Any,
    options: ExportOptions | None,
    sample_shape: Sequence[int] | None = None,
    example_kwargs: Mapping[str, torch.Tensor] | None = None,
    limit: Limit = None,
) -> SamplerPlan:
    """Check what is to be exported, before any work; arguments and errors as `export_onnx`'s."""
    options = ExportOptions() if options is None else options
    sampling = None
    if isinstance(scheduler_or_table, StepTable):
        table = scheduler_or_table
        _require_for_table(table, options)
    else:
        if limit is not None:
            raise ValueError(f"limit: {limit!r}, but a scheduler's configuration has its own; leave it out")
        sampling = read_scheduler(scheduler_or_table, options.method, "scheduler_or_table")
        limit = sampling.limit
        rederive = options.guidance_method != "cfg++"
        sampling = sampling.with_options(options.of_the_method(), limit, options.spacing, rederive=rederive)
        table = sampling.build(Steps(options.num_inference_steps or sampling.default_steps))
        if table.stochastic and not options.stochastic:
            raise ValueError(
                f"stochastic: False, but method {sampling.method!r} adds noise; pass stochastic=True, which makes noise an"
                " input"
            )
    if options.guidance_method == "cfg++":
        require_epsilon_term(table, "guidance_method", None if sampling is None else sampling.method)
    bad = np.argwhere(~np.isfinite(table.columns))
    if len(bad):
        row, column = bad[0]
        name = StepCoefficients._fields[column]
        raise ValueError(
            f"scheduler_or_table: row {row} has {name} {table.columns[row, column]}, which a manifest cannot hold; leave out"
            f" timestep {table.timesteps[row]}"
        )
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: {type(model).__name__}; pass a torch module")
    denoiser = describe(model, None if sample_shape is None else tuple(sample_shape), example_kwargs)
    if options.dynamic_size and not denoiser.resizable:
        raise ValueError(f"dynamic_size: True for a {type(model).__name__}, whose size is fixed; leave it out")
    return SamplerPlan(denoiser, sampling, table, limit, options)


def _require_for_table(table: StepTable, options: ExportOptions) -> None:
    """Refuse the options that only a schedule has a use for, and a table that the file could not run."""
    default = ExportOptions()
    names = ("num_inference_steps", "method", "method_options", "spacing", "eta", "use_clipped_model_output")
    for name in ("bake_schedule", "per_sample_steps", *names):
        value = getattr(options, name)
        if value != getattr(default, name):
            raise ValueError(f"{name}: {value!r} with a StepTable, which has its steps already; leave it out")
    if table.stochastic and not options.stochastic:
        raise ValueError(
            "stochastic: False, but the table adds noise; pass stochastic=True, which makes noise an input"
        )
