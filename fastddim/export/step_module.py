"""The step as a plain torch module that `torch.export` takes, around any of the supported denoisers.

Everything that a request may change is an input; what is fixed at export is an `ExportOptions`. The arithmetic is the
reference's own, in float32, but for the quantile of a dynamic threshold: `quantile_in_graph`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch

from fastddim.config import DynamicThreshold, Limit
from fastddim.export.sampler_plan import SamplerPlan
from fastddim.hoisting import HoistedModel, split_model
from fastddim.reference import combine_guidance, find_direction, spread_columns, step_with_row
from fastddim.step import Guidance, StepOptions
from fastddim.tracing import ExportError

# The names of what `StepModule` returns.
STEP_OUTPUTS = ("next_sample", "pred_original_sample")
# What `FinishModule` takes: not the name of what it gives.
SAMPLED = "sampled"
# TensorRT's limit for TopK.
LARGEST_TOPK = 3840
_BISECTIONS_TO_ONE_ULP = 24


class StepModule(torch.nn.Module):
    """One step with its model call.

    Args:
        plan: what is exported.
        hoisted: the model in two parts, of which the step has the second one.

    The inputs of `forward`, in order, those in brackets where the plan's options ask for them:
        sample: `[B, ...]` float32, the state.
        timestep: `[B]` int64 or float32.
        coefficients: `[B, 6]` float32, a row of a `StepTable` for each sample; `[B, 7]` where the table looks back.
        [previous_x0]: `[B, ...]` float32, the `pred_original_sample` of the step before, where the table looks back.
        [noise]: `[B, ...]` float32.
        [guidance_scale], [guidance_rescale]: `[B]` float32.
        conditions: by name, `[B, ...]`; with guidance also `uncond_<name>`.
    With a hoisted model, timestep and conditions are there where its second part reads them, and in addition, of
    `BeforeLoop`'s results those that are: step_values `[B, T]`, both_values `[copies, B, F]`, kept_0, kept_1, ...
    Returns `outputs`: `(next_sample, pred_original_sample)`, `[B, ...]` float32, and in a file of one step what becomes of the
    latter, where the model says so.
    """

    def __init__(self, plan: SamplerPlan, hoisted: HoistedModel | None = None) -> None:
        super().__init__()
        self._plan = plan
        # What has the weights that the step reads.
        self.model = plan.denoiser.model if hoisted is None else hoisted.rest
        self._hoisted = hoisted
        size = None if plan.options.dynamic_size else math.prod(plan.denoiser.sample_shape)
        self._quantile = functools.partial(quantile_in_graph, rank=find_rank(plan.limit, size))
        self._model_dtype = model_dtype(plan.denoiser.model)
        self._finish = plan.denoiser.finish if plan.options.kind == "step" else None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what `forward` returns."""
        return (*STEP_OUTPUTS, *(() if self._finish is None else self._finish.outputs))

    def example_inputs(self) -> dict[str, torch.Tensor]:
        """Tensors of two samples to trace with, in the order of the inputs."""
        values = self.whole_example_inputs()
        return values if self._hoisted is None else self._replace_hoisted(self._hoisted, values)

    def whole_example_inputs(self) -> dict[str, torch.Tensor]:
        """Those of a model that is not hoisted."""
        generator = torch.Generator().manual_seed(0)
        state = (2, *self._plan.denoiser.sample_shape)
        options = self._plan.options
        values = {
            "sample": torch.randn(state, generator=generator),
            "timestep": torch.tensor([3, 1], dtype=self._plan.timestep_dtype),
            "coefficients": torch.full((2, self._plan.num_columns), 0.5),
        }
        if self._plan.table.looks_back:
            values["previous_x0"] = torch.randn(state, generator=generator)
        if options.stochastic:
            values["noise"] = torch.randn(state, generator=generator)
        if options.guided:
            values["guidance_scale"] = torch.full((2,), 2.0)
        if options.guidance_rescale:
            values["guidance_rescale"] = torch.full((2,), 0.5)
        for name, condition in self._plan.denoiser.conditions.items():
            values[name] = condition.example[:2]
            if options.guided and not condition.shared:
                null = condition.example[:2].clone()
                values[f"uncond_{name}"] = null if condition.null is None else null.fill_(condition.null)
        return values

    def _replace_hoisted(self, hoisted: HoistedModel, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The examples with what is hoisted in place of what only that reads."""
        before = BeforeLoop(self._plan, hoisted)
        made = dict(zip(before.outputs, before({**values, "timesteps": values["timestep"]}), strict=True))
        reads = dict(zip(self._plan.denoiser.conditions, hoisted.reads_conditions, strict=True))
        unread = {name for name, is_read in reads.items() if not is_read}
        unread -= set(() if self._finish is None else self._finish.reads)
        unread |= {f"uncond_{name}" for name in unread}
        if not hoisted.reads_timestep:
            unread.add("timestep")
        kept = {name: value for name, value in values.items() if name not in unread}
        return {**kept, **{name: value[0] if name == "both_values" else value for name, value in made.items()}}

    @property
    def second(self) -> tuple[str, ...]:
        """The inputs whose second dimension is the batch, `[copies, B, ...]`."""
        if self._hoisted is None:
            return ()
        both = ("both_values",) if self._hoisted.both_width else ()
        return (*both, *(name for name, by_rows in kept_names(self._hoisted).items() if by_rows))

    @property
    def whole(self) -> tuple[str, ...]:
        """The inputs that have no batch."""
        return (
            () if self._hoisted is None else tuple(n for n, by_rows in kept_names(self._hoisted).items() if not by_rows)
        )

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        x_next, x0 = self.update(self._predict(inputs["sample"], inputs), inputs)
        return (x_next, x0) if self._finish is None else (x_next, *self._finish.module(x0, inputs))

    def options(self, inputs: Mapping[str, torch.Tensor]) -> StepOptions:
        """What `forward`'s inputs ask of the step."""
        guidance = None
        if self._plan.options.guided:
            fixed = self._plan.options
            guidance = Guidance(
                inputs["guidance_scale"], inputs.get("guidance_rescale", 0.0), method=fixed.guidance_method,
                apg_eta=fixed.apg_eta, apg_norm_threshold=fixed.apg_norm_threshold,
            )  # fmt: skip
        return StepOptions(
            guidance=guidance, limit=self._plan.limit, noise=inputs.get("noise"), previous_x0=inputs.get("previous_x0")
        )

    def update(self, output: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The step from the model's output `[B, ...]`, or `[2B, ...]` with guidance; results as `forward`'s."""
        options, x, output = self.options(inputs), inputs["sample"], output.float()
        direction = None
        if options.guidance is not None:
            direction = find_direction(output, options.guidance)
            output = combine_guidance(output, options.guidance)
        row = spread_columns(inputs["coefficients"], x)
        return step_with_row(
            output, x, row, options.limit, options.noise, quantile=self._quantile, previous_x0=options.previous_x0,
            direction=direction,
        )  # fmt: skip

    def _predict(self, x: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        double = self._plan.options.guided

        def rows(value: torch.Tensor) -> torch.Tensor:
            return torch.cat([value, value]) if double else value

        model_input = rows(x).to(self._model_dtype)
        conditions = model_conditions(self._plan, inputs)
        if self._hoisted is None:
            return self._plan.denoiser.call(model_input, rows(inputs["timestep"]), conditions)
        t = rows(inputs["timestep"]) if "timestep" in inputs else None
        values = [rows(inputs["step_values"])] if "step_values" in inputs else []
        # Of both halves already.
        values += [inputs[name].flatten(0, 1) for name in self.second]
        values += [inputs[name] for name in self.whole]
        output: torch.Tensor = self._hoisted.predict(
            model_input, t, [conditions.get(name) for name in self._plan.denoiser.conditions], values
        )
        return output


class BeforeLoop(torch.nn.Module):
    """What a hoisted model computes before a loop.

    The inputs of `forward`: timesteps `[N]`, or `[N, B]` with steps of each sample's own, and `StepModule`'s conditions.
    Returns, of these what there is (`outputs`): step_values `[N, T]` or `[N, B, T]`, both_values `[N, copies, B, F]`, kept_0,
    kept_1, ... `[copies, B, ...]`, with two copies, the unconditional one first, where there is guidance.
    """

    def __init__(self, plan: SamplerPlan, hoisted: HoistedModel) -> None:
        super().__init__()
        self._plan = plan
        self.model = hoisted.before
        self._hoisted = hoisted
        rows = (("step_values", hoisted.steps_width), ("both_values", hoisted.both_width))
        self.outputs = (*(name for name, width in rows if width), *kept_names(hoisted))

    def example_inputs(self) -> dict[str, torch.Tensor]:
        """Tensors of two samples and three steps to trace with."""
        values = StepModule(self._plan).example_inputs()
        t = values["timestep"][:1].repeat(3)
        names = [name for name in values if name.removeprefix("uncond_") in self._plan.denoiser.conditions]
        timesteps = t[:, None].repeat(1, 2) if self._plan.options.per_sample_steps else t
        return {"timesteps": timesteps, **{name: values[name] for name in names}}

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        copies = 2 if self._plan.options.guided else 1
        t = inputs["timesteps"]
        conditions = model_conditions(self._plan, inputs)
        before = self._hoisted.prepare(t.flatten(), list(conditions.values()))
        values = []
        if before.steps is not None:
            values.append(before.steps.view(*t.shape, -1))
        # A size that is not said would be another unknown where the number of steps is one.
        batch = (copies, next((value.shape[0] // copies for value in conditions.values()), 1))
        if before.both is not None:
            values.append(before.both.view(before.both.shape[0], *batch, before.both.shape[2]))
        for by_rows, value in zip(self._hoisted.by_rows, before.kept, strict=True):
            values.append(value.view(*batch, *value.shape[1:]) if by_rows else value)
        return tuple(values)


class FinishModule(torch.nn.Module):
    """What becomes of a run's samples: of a dictionary with `sampled` `[B, ...]` float32 and the conditions that it reads."""

    def __init__(self, plan: SamplerPlan) -> None:
        super().__init__()
        assert plan.denoiser.finish is not None
        self._finish, self._plan = plan.denoiser.finish, plan
        self.outputs = ("samples", *self._finish.outputs)

    def example_inputs(self) -> dict[str, torch.Tensor]:
        """Tensors of two samples to trace with."""
        denoiser = self._plan.denoiser
        reads = {name: denoiser.conditions[name].example[:2] for name in self._finish.reads}
        return {SAMPLED: torch.zeros(2, *denoiser.sample_shape), **reads}

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        outputs: tuple[torch.Tensor, ...] = self._finish.module(inputs[SAMPLED], inputs)
        return outputs


def hoist(plan: SamplerPlan, device: str = "cpu") -> HoistedModel | None:
    """The plan's model in two parts; None where it is not asked for, or nothing can leave the loop.

    A model that cannot be traced alone stays whole, with a warning. To be called while the model is `prepared`.
    """
    denoiser, options = plan.denoiser, plan.options
    if not options.hoisted:
        return None
    names = list(denoiser.conditions)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, *denoiser.sample_shape), generator=generator).to(device, model_dtype(denoiser.model))
    try:
        return split_model(
            lambda x, t, conditions: denoiser.call(x, t, dict(zip(names, conditions, strict=True))),
            [denoiser.model],
            x,
            torch.tensor([3, 1], dtype=plan.timestep_dtype, device=device),
            [condition.example[:2].to(device) for condition in denoiser.conditions.values()],
            batched=[True] * len(names),
            kind=type(denoiser.model).__name__,
            resized=options.dynamic_size,
            pairs=not options.per_sample_steps,
            steps=len(plan.table),
            limit=options.hoist_limit,
        )
    except ExportError as error:
        warnings.warn(f"hoist: {error}; every step computes all of it", RuntimeWarning, stacklevel=4)
        return None


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype of a model's input: that of its weights."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def model_conditions(plan: SamplerPlan, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's conditions among a step's inputs, with guidance the unconditional rows first."""
    names = [name for name in plan.denoiser.conditions if name in inputs]
    if not plan.options.guided:
        return {name: inputs[name] for name in names}
    # Stacked, so that the two halves are seen to have as many rows.
    return {
        name: torch.stack([inputs.get(f"uncond_{name}", inputs[name]), inputs[name]]).flatten(0, 1) for name in names
    }


def kept_names(hoisted: HoistedModel) -> dict[str, bool]:
    """The names of a hoisted model's kept values, and whether each has a row for each of the model's input."""
    return {f"kept_{index}": by_rows for index, by_rows in enumerate(hoisted.by_rows)}


def find_rank(limit: Limit, elements: int | None) -> float | None:
    """The rank of a threshold among a sample's elements, in float32 as `torch.quantile` has it.

    None where `TopK` is too short, or the number of elements is not known.

    Before a graph is traced: in a loop's body neither numpy's numbers nor new tensors of constants are traced well.
    """
    if not isinstance(limit, DynamicThreshold) or elements is None:
        return None
    rank = float(np.float32(limit.ratio) * np.float32(elements - 1))
    return rank if elements - int(rank) <= LARGEST_TOPK else None


def quantile_in_graph(x0: torch.Tensor, limit: DynamicThreshold, rank: float | None) -> torch.Tensor:
    """`fastddim.reference.abs_quantile` in operations that ONNX Runtime and TensorRT both have.

    Args:
        x0: `[B, ...]` float32.
        limit: its ratio is the quantile's, and its `max_value` bounds what matters.
        rank: what `find_rank` gives, where the size is known when the graph is made.

    Returns:
        `[B]`: the same number where it is in `[1, max_value]`, else something on the same side of it.
    """
    magnitudes = x0.abs().flatten(1)
    quantile = _bisect(magnitudes, limit) if rank is None else _take_top(magnitudes, rank)
    # A NaN makes its sample's quantile NaN, whatever order a runtime gives it.
    total = magnitudes.sum(1)
    return torch.where(total.isnan(), total, quantile)


def _take_top(magnitudes: torch.Tensor, rank: float) -> torch.Tensor:
    lower = int(rank)
    weight = rank - lower
    largest = magnitudes.topk(magnitudes.shape[1] - lower, dim=1).values
    return torch.lerp(largest[:, -1], largest[:, -2 if weight else -1], weight)


def _bisect(magnitudes: torch.Tensor, limit: DynamicThreshold) -> torch.Tensor:
    # In float32 too, of a size that may only be known later.
    count = torch.ones_like(magnitudes[:1, :]).sum()
    exact = limit.ratio * (count - 1)
    rank = exact.floor()
    weight = exact - rank
    # Bisection between 1 and max_value ends at two neighbouring numbers, the upper of which is the order statistic.
    low = torch.ones_like(magnitudes[:, :1])
    high = low * limit.max_value
    doublings = max(1, int(limit.max_value).bit_length())
    for _ in range(_BISECTIONS_TO_ONE_ULP + doublings):
        middle = low + (high - low) * 0.5
        passes = (magnitudes <= middle).float().sum(1, keepdim=True) > rank
        low, high = torch.where(passes, low, middle), torch.where(passes, middle, high)
    below = torch.where(magnitudes <= high, magnitudes, 0.0).amax(1)
    # Up to 1 the clamp decides, but for a rank whose neighbour is above 1.
    at_most_one = torch.where(magnitudes <= 1.0, magnitudes, 0.0).amax(1)
    below = torch.where((magnitudes <= 1.0).float().sum(1) > rank, at_most_one, below)
    above = torch.where(magnitudes > below[:, None], magnitudes, torch.finfo(torch.float32).max).amin(1)
    above = torch.where((magnitudes <= below[:, None]).float().sum(1) > rank + 1, below, above)
    over = (magnitudes <= limit.max_value).float().sum(1) <= rank
    quantile = torch.where(over, limit.max_value, torch.lerp(below, above, weight))
    # torch.lerp starts from the nearer end, and from an infinite one infinities cancel.
    finite = (magnitudes < torch.inf).float().sum(1) > rank + (weight >= 0.5).float()
    return torch.where(finite, quantile, torch.nan)
