"""The step as a plain torch module that `torch.export` takes, around any of the supported denoisers.

Everything that a request may change is an input; what is fixed at export is an `ExportOptions`. The arithmetic is the
reference's own, in float32, but for the quantile of a dynamic threshold: `quantile_in_graph`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import numpy as np
import torch

from fastddim.config import DynamicThreshold, Limit
from fastddim.export.sampler_plan import SamplerPlan
from fastddim.reference import combine_guidance, find_direction, spread_columns, step_with_row
from fastddim.step import Guidance, StepOptions

# The names of what `StepModule` returns.
STEP_OUTPUTS = ("next_sample", "pred_original_sample")
# TensorRT's limit for TopK.
LARGEST_TOPK = 3840
_BISECTIONS_TO_ONE_ULP = 24


class StepModule(torch.nn.Module):
    """One DDIM step with its model call.

    The inputs of `forward`, in order, those in brackets where the plan's options ask for them:
        sample: `[B, ...]` float32, the state.
        timestep: `[B]` int64 or float32.
        coefficients: `[B, 6]` float32, a row of a `StepTable` for each sample; `[B, 7]` where the table looks back.
        [previous_x0]: `[B, ...]` float32, the `pred_original_sample` of the step before, where the table looks back.
        [noise]: `[B, ...]` float32.
        [guidance_scale], [guidance_rescale]: `[B]` float32.
        conditions: by name, `[B, ...]`; with guidance also `uncond_<name>`.
    Returns `(next_sample, pred_original_sample)`, `[B, ...]` float32.
    """

    def __init__(self, plan: SamplerPlan) -> None:
        super().__init__()
        self._plan = plan
        self.model = plan.denoiser.model
        size = None if plan.options.dynamic_size else math.prod(plan.denoiser.sample_shape)
        self._quantile = functools.partial(quantile_in_graph, rank=find_rank(plan.limit, size))
        self._model_dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def example_inputs(self) -> dict[str, torch.Tensor]:
        """Tensors of two samples to trace with, in the order of the inputs."""
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
            if options.guided:
                null = condition.example[:2].clone()
                values[f"uncond_{name}"] = null if condition.null is None else null.fill_(condition.null)
        return values

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.update(self._predict(inputs["sample"], inputs), inputs)

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
        t = inputs["timestep"]
        conditions = {name: inputs[name] for name in self._plan.denoiser.conditions}
        if self._plan.options.guided:
            x, t = torch.cat([x, x]), torch.cat([t, t])
            conditions = {name: torch.cat([inputs[f"uncond_{name}"], value]) for name, value in conditions.items()}
        return self._plan.denoiser.call(x.to(self._model_dtype), t, conditions)


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
