"""What is to be exported, checked before any work: the options, the model, the schedule and its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastddim.coefficients import StepCoefficients, StepTable
from fastddim.config import DDIMConfig, Limit, require_choice, require_int
from fastddim.export.denoisers import DTYPES, Denoiser, describe
from fastddim.export.schedule_module import ScheduleModule
from fastddim.sampler import to_schedule
from fastddim.schedule import Schedule

KINDS = ("loop", "step")
DEFAULT_STEPS = 50


class ExportError(ValueError):
    """A model that cannot be exported; the message names the module or operator."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is fixed in an exported file.

    Attributes:
        kind: `"loop"`, all steps in one call; `"step"`, one step, with rows of the table for each sample.
        guided: classifier-free guidance, its scale an input `[B]`.
        guidance_rescale: `guidance_rescale` is an input `[B]` too.
        stochastic: noise is an input, so that rows may add it.
        bake_schedule: the loop takes `num_inference_steps` and derives the table itself.
        per_sample_steps: each sample has its own `num_inference_steps` `[B]`; it stays as it is once it is finished.
        seeded: the loop takes a `seed` for each sample and draws its starting state and noise itself. The scale of the
            start is fixed in the file, as the limit is: with a seed, a client has nothing else to know of the method.
        num_inference_steps, eta: the default table's number of steps (50) and its noise; a baked schedule keeps eta.
        use_clipped_model_output: derive epsilon from the limited x0; where x0 is limited by default.
        dtype: the weights' dtype, `"float32"`, `"float16"` or `"bfloat16"`; the state is float32.
        dynamic_size: heights and widths may differ from call to call, for models that take them.

    Raises:
        ValueError: options that exclude each other.
    """

    kind: str = "loop"
    guided: bool = False
    guidance_rescale: bool = False
    stochastic: bool = False
    bake_schedule: bool = False
    per_sample_steps: bool = False
    seeded: bool = False
    num_inference_steps: int | None = None
    eta: float = 0.0
    use_clipped_model_output: bool | None = None
    dtype: str = "float32"
    dynamic_size: bool = False

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, KINDS)
        require_choice("dtype", self.dtype, DTYPES)
        if self.num_inference_steps is not None:
            require_int("num_inference_steps", self.num_inference_steps, 1)
        if self.guidance_rescale and not self.guided:
            raise ValueError("guidance_rescale: True without guided; pass both")
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
        if self.eta and not self.stochastic:
            raise ValueError(f"eta: {self.eta!r} adds noise; pass stochastic=True, which makes noise an input")


@dataclass(frozen=True)
class SamplerPlan:
    """What `write_sampler` exports, all of it checked.

    Attributes:
        denoiser: the model.
        schedule: the schedule that the table comes from; None where a table was given.
        table: the steps of the default run.
        limit: the limit applied to x0.
        options: with every default decided.
    """

    denoiser: Denoiser
    schedule: Schedule | None
    table: StepTable
    limit: Limit
    options: ExportOptions

    @property
    def timestep_dtype(self) -> torch.dtype:
        """What the graph takes timesteps as."""
        dtype: torch.dtype = getattr(torch, self.table.timestep_dtype)
        return dtype

    @property
    def state_dims(self) -> list[str | int]:
        """The dimensions of a batch of states, a name for each that differs from call to call."""
        dims: list[str | int] = ["batch", *self.denoiser.sample_shape]
        if self.options.dynamic_size:
            dims[2:] = ["height", "width"]
        return dims

    def baked_schedule(self) -> ScheduleModule:
        """What makes the tables in a file with a baked schedule."""
        assert self.schedule is not None
        options = self.options
        return ScheduleModule(
            self.schedule, options.eta, bool(options.use_clipped_model_output), options.per_sample_steps
        )


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
    schedule = None
    if isinstance(scheduler_or_table, StepTable):
        table = scheduler_or_table
        _require_for_table(table, options)
    else:
        if limit is not None:
            raise ValueError(f"limit: {limit!r}, but a scheduler's configuration has its own; leave it out")
        schedule = to_schedule(scheduler_or_table, "scheduler_or_table")
        limit = schedule.config.limit
        rederive = options.use_clipped_model_output
        options = replace(
            options,
            use_clipped_model_output=limit is not None if rederive is None else rederive,
            num_inference_steps=options.num_inference_steps or DEFAULT_STEPS,
        )
        table = StepTable.build(
            schedule,
            schedule.pairs(options.num_inference_steps),
            eta=options.eta,
            use_clipped_model_output=bool(options.use_clipped_model_output),
        )
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
    return SamplerPlan(denoiser, schedule, table, limit, options)


def _require_for_table(table: StepTable, options: ExportOptions) -> None:
    """Refuse the options that only a schedule has a use for, and a table that the file could not run."""
    default = ExportOptions()
    for name in ("num_inference_steps", "eta", "bake_schedule", "per_sample_steps", "use_clipped_model_output"):
        value = getattr(options, name)
        if value != getattr(default, name):
            raise ValueError(f"{name}: {value!r} with a StepTable, which has its steps already; leave it out")
    if table.stochastic and not options.stochastic:
        raise ValueError(
            "stochastic: False, but the table adds noise; pass stochastic=True, which makes noise an input"
        )
