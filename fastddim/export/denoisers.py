"""The step as a plain torch module that `torch.export` takes, around any of the supported denoisers.

Everything that a request may change is an input; what is fixed at export is an `ExportOptions`. The arithmetic is that of
`fastddim.reference.ddim_step` in float32, written in operations that ONNX Runtime and TensorRT both have.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastddim.coefficients import NUM_COLUMNS
from fastddim.config import Clip, DynamicThreshold, Limit
from fastddim.step import Guidance, StepOptions

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What CLIP's text encoders take.
TOKENS = 77
# TensorRT's limit for TopK.
LARGEST_TOPK = 3840
_BISECTIONS_TO_ONE_ULP = 24


@dataclass(frozen=True)
class Condition:
    """An input that conditions the model.

    Attributes:
        example: `[B, ...]`, what the export traces with.
        null: the value of the unconditional half, where the model has one (a label for "no class").
        meaning: its description in the manifest.
    """

    example: torch.Tensor
    null: int | None = None
    meaning: str = ""


@dataclass(frozen=True)
class Denoiser:
    """A model as the exporters see it.

    Attributes:
        model: the module whose weights are exported.
        call: `call(x, t, conditions)` with x `[B, ...]`, t `[B]` int64 or float32, conditions by name; it returns the
            prediction `[B, ...]`.
        sample_shape: the shape of one sample.
        conditions: its other inputs by name, in order.
        resizable: whether it takes other heights and widths.
    """

    model: torch.nn.Module
    call: Callable[[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
    sample_shape: tuple[int, ...]
    conditions: dict[str, Condition] = field(default_factory=dict)
    resizable: bool = False


def describe(
    model: torch.nn.Module,
    sample_shape: tuple[int, ...] | None = None,
    example_kwargs: Mapping[str, torch.Tensor] | None = None,
) -> Denoiser:
    """How to call a model: diffusers' UNets and DiT by their configurations, any other from its examples.

    Args:
        model: `UNet2DModel`, `UNet2DConditionModel`, `DiTTransformer2DModel`, or any module called as
            `model(x, t, **kwargs)` that returns the prediction, a tuple that starts with it, or `.sample`.
        sample_shape: the shape of one sample, where the configuration does not say.
        example_kwargs: the keyword tensors `[B, ...]` that any other module takes, B equal for all.

    Raises:
        ValueError: a configuration that cannot be exported, or a module without a sample shape; the message names it.
    """
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if kind in _DESCRIBED and config is not None:
        if example_kwargs:
            raise ValueError(f"example_kwargs: given for a {kind}, whose inputs are known; leave them out")
        return _DESCRIBED[kind](model, config, sample_shape)
    if sample_shape is None:
        raise ValueError(f"sample_shape: not known for a {kind}; pass the shape of one sample, without the batch")
    conditions = {name: Condition(value) for name, value in (example_kwargs or {}).items()}
    return Denoiser(model, _Call(model), tuple(sample_shape), conditions)


class _Call:
    """`model(x, t, **conditions)`, whatever it returns."""

    def __init__(self, model: torch.nn.Module, **fixed: Any) -> None:
        self._model, self._fixed = model, fixed

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        output = self._model(x, t, **self._arguments(conditions), **self._fixed)
        output = getattr(output, "sample", output)
        first: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return first

    def _arguments(self, conditions: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return dict(conditions)


class _TextCall(_Call):
    """A UNet whose conditions are float32, whatever its dtype."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        # The embeddings of SDXL's other two are float32 until the UNet itself casts them.
        states = conditions["encoder_hidden_states"].to(x.dtype)
        return super().__call__(x, t, {**conditions, "encoder_hidden_states": states})


class _XLCall(_TextCall):
    """SDXL's UNet, whose pooled text and sizes come in a dictionary."""

    def _arguments(self, conditions: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        added = {name: conditions[name] for name in ("text_embeds", "time_ids")}
        return {"encoder_hidden_states": conditions["encoder_hidden_states"], "added_cond_kwargs": added}


class _MeanOnly(_Call):
    """A model that predicts a variance too, in its second half of channels."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return super().__call__(x, t, conditions)[:, : x.shape[1]]


def _square(config: Any, sample_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    if sample_shape is not None:
        return tuple(sample_shape)
    size = config.sample_size
    if size is None:
        raise ValueError("sample_shape: the model's configuration has no sample_size; pass (channels, height, width)")
    return (config.in_channels, *((size, size) if isinstance(size, int) else size))


def _describe_unet(model: torch.nn.Module, config: Any, sample_shape: tuple[int, ...] | None) -> Denoiser:
    conditions = {}
    if config.class_embed_type is not None:
        raise ValueError(
            f"model: class_embed_type {config.class_embed_type!r} cannot be exported; only class labels can"
        )
    if config.num_class_embeds is not None:
        null = config.num_class_embeds - 1
        labels = torch.zeros(2, dtype=torch.int64)
        conditions["class_labels"] = Condition(labels, null, f"class of each sample; {null} is no class")
    return Denoiser(model, _Call(model, return_dict=False), _square(config, sample_shape), conditions, resizable=True)


def _describe_condition_unet(model: torch.nn.Module, config: Any, sample_shape: tuple[int, ...] | None) -> Denoiser:
    kind = config.addition_embed_type
    if kind not in (None, "text_time"):
        raise ValueError(f"model: addition_embed_type {kind!r} cannot be exported; None and 'text_time' (SDXL) can")
    if config.encoder_hid_dim_type is not None or config.class_embed_type is not None:
        raise ValueError("model: encoder_hid_dim_type and class_embed_type have to be None to be exported")
    width = config.cross_attention_dim
    width = width[0] if isinstance(width, (tuple, list)) else width
    conditions = {
        "encoder_hidden_states": Condition(torch.zeros(2, TOKENS, width), meaning="the text encoder's states")
    }
    if kind is None:
        return Denoiser(model, _TextCall(model, return_dict=False), _square(config, sample_shape), conditions, True)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    conditions["text_embeds"] = Condition(torch.zeros(2, pooled), meaning="the pooled text embedding")
    conditions["time_ids"] = Condition(torch.zeros(2, 6), meaning="original size, crop corner, target size: h, w each")
    return Denoiser(model, _XLCall(model, return_dict=False), _square(config, sample_shape), conditions, True)


def _describe_dit(model: torch.nn.Module, config: Any, sample_shape: tuple[int, ...] | None) -> Denoiser:
    null = config.num_embeds_ada_norm
    labels = Condition(torch.zeros(2, dtype=torch.int64), null, f"class of each sample; {null} is no class")
    return Denoiser(model, _MeanOnly(model, return_dict=False), _square(config, sample_shape), {"class_labels": labels})


_DESCRIBED: dict[str, Callable[[torch.nn.Module, Any, tuple[int, ...] | None], Denoiser]] = {
    "UNet2DModel": _describe_unet,
    "UNet2DConditionModel": _describe_condition_unet,
    "DiTTransformer2DModel": _describe_dit,
}


@contextlib.contextmanager
def prepared(model: torch.nn.Module, dtype: torch.dtype, device: str = "cpu") -> Iterator[None]:
    """The model in evaluation mode, of a dtype and on a device, and as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    kept = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in grads:
            parameter.requires_grad_(False)
        for tensor, data in kept:
            tensor.data = data.to(device, dtype if data.is_floating_point() else data.dtype)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
        for parameter, wanted in grads:
            parameter.requires_grad_(wanted)
        for module, mode in training.items():
            module.training = mode


class StepModule(torch.nn.Module):
    """One DDIM step with its model call.

    Args:
        denoiser: what is called.
        limit: of x0.
        guided: the model is called with both halves of each condition.
        rescale: `guidance_rescale` is an input.
        stochastic: `noise` is an input.
        dynamic_size: heights and widths are not those of the denoiser's `sample_shape` alone.
        timestep_dtype: the dtype of the timesteps that the model is called with, int64 or float32.

    The inputs of `forward`, in order, those in brackets where the options ask for them:
        sample: `[B, ...]` float32, the state.
        timestep: `[B]` int64 or float32.
        coefficients: `[B, 6]` float32, a row of a `StepTable` for each sample.
        [noise]: `[B, ...]` float32.
        [guidance_scale], [guidance_rescale]: `[B]` float32.
        conditions: by name, `[B, ...]`; with guidance also `uncond_<name>`.
    Returns `(next_sample, pred_original_sample)`, `[B, ...]` float32.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        limit: Limit,
        guided: bool,
        rescale: bool,
        stochastic: bool,
        dynamic_size: bool = False,
        timestep_dtype: torch.dtype = torch.int64,
    ) -> None:
        super().__init__()
        self._timestep_dtype = timestep_dtype
        self.model = denoiser.model
        self._denoiser = denoiser
        self.limit = limit
        self._rank = None if dynamic_size else find_rank(limit, math.prod(denoiser.sample_shape))
        self.guided, self.rescale, self.stochastic = guided, rescale, stochastic
        self._model_dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def input_names(self) -> list[str]:
        """In the order in which `forward` takes them."""
        names = ["sample", "timestep", "coefficients"]
        names += ["noise"] if self.stochastic else []
        names += ["guidance_scale"] if self.guided else []
        names += ["guidance_rescale"] if self.rescale else []
        for name in self._denoiser.conditions:
            names += [name, f"uncond_{name}"] if self.guided else [name]
        return names

    def example_inputs(self) -> dict[str, torch.Tensor]:
        """Tensors of two samples to trace with."""
        generator = torch.Generator().manual_seed(0)
        state = (2, *self._denoiser.sample_shape)
        values = {
            "sample": torch.randn(state, generator=generator),
            "timestep": torch.tensor([3, 1], dtype=self._timestep_dtype),
            "coefficients": torch.full((2, NUM_COLUMNS), 0.5),
            "noise": torch.randn(state, generator=generator),
            "guidance_scale": torch.full((2,), 2.0),
            "guidance_rescale": torch.full((2,), 0.5),
        }
        for name, condition in self._denoiser.conditions.items():
            values[name] = condition.example[:2]
            null = condition.example[:2].clone()
            values[f"uncond_{name}"] = null if condition.null is None else null.fill_(condition.null)
        return {name: values[name] for name in self.input_names()}

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.update(self._predict(inputs["sample"], inputs), inputs)

    def options(self, inputs: Mapping[str, torch.Tensor]) -> StepOptions:
        """What `forward`'s inputs ask of the step."""
        guidance = None
        if self.guided:
            guidance = Guidance(inputs["guidance_scale"], inputs["guidance_rescale"] if self.rescale else 0.0)
        return StepOptions(guidance=guidance, limit=self.limit, noise=inputs.get("noise"))

    def update(self, output: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The step from the model's output `[B, ...]`, or `[2B, ...]` with guidance; results as `forward`'s."""
        x = inputs["sample"]
        per_sample = (-1, *[1] * (x.ndim - 1))
        output = output.float()
        if self.guided:
            batch = x.shape[0]
            uncond, cond = output[:batch], output[batch:]
            output = uncond + inputs["guidance_scale"].reshape(per_sample) * (cond - uncond)
            if self.rescale:
                ratio = (cond.flatten(1).std(1) / output.flatten(1).std(1)).reshape(per_sample)
                phi = inputs["guidance_rescale"].reshape(per_sample)
                output = output * (phi * ratio + (1 - phi))
        columns = [column.reshape(per_sample) for column in inputs["coefficients"].unbind(1)]
        x0 = limit_x0(columns[0] * x + columns[1] * output, self.limit, self._rank)
        x_next = columns[2] * x + columns[3] * output + columns[4] * x0
        if self.stochastic:
            x_next = x_next + columns[5] * inputs["noise"]
        return x_next, x0

    def _predict(self, x: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        t = inputs["timestep"]
        conditions = {name: inputs[name] for name in self._denoiser.conditions}
        if self.guided:
            x, t = torch.cat([x, x]), torch.cat([t, t])
            conditions = {name: torch.cat([inputs[f"uncond_{name}"], value]) for name, value in conditions.items()}
        return self._denoiser.call(x.to(self._model_dtype), t, conditions)


def find_rank(limit: Limit, elements: int) -> float | None:
    """The rank of a threshold among a sample's elements, in float32 as `torch.quantile` has it; None where `TopK` is too short.

    Before a graph is traced: in a loop's body neither numpy's numbers nor new tensors of constants are traced well.
    """
    if not isinstance(limit, DynamicThreshold):
        return None
    rank = float(np.float32(limit.ratio) * np.float32(elements - 1))
    return rank if elements - int(rank) <= LARGEST_TOPK else None


def limit_x0(x0: torch.Tensor, limit: Limit, rank: float | None) -> torch.Tensor:
    """`fastddim.reference.apply_limit` in operations that export: the same value, to the rounding of the quotient.

    Args:
        x0: `[B, ...]`.
        limit: of it.
        rank: of `find_rank`, where the size is known when the graph is made.
    """
    if limit is None:
        return x0
    if isinstance(limit, Clip):
        return x0.clamp(-limit.range, limit.range)
    if limit.max_value <= 1:
        return x0.clamp(-limit.max_value, limit.max_value) / limit.max_value
    scale = _quantile(x0.abs().flatten(1), limit, rank).clamp(1.0, limit.max_value)
    scale = scale.reshape(-1, *[1] * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -scale), scale) / scale


def _quantile(magnitudes: torch.Tensor, limit: DynamicThreshold, rank: float | None) -> torch.Tensor:
    """`torch.quantile(magnitudes, ratio, dim=1)` where it is in `[1, max_value]`, else something on the same side of it."""
    if rank is not None:
        lower = int(rank)
        weight = rank - lower
        largest = magnitudes.topk(magnitudes.shape[1] - lower, dim=1).values
        below, above = largest[:, -1], largest[:, -2 if weight else -1]
        gap = above - below
        return below + weight * gap if weight < 0.5 else above - (1 - weight) * gap
    # In float32 too, of a size that may only be known later.
    count = torch.ones_like(magnitudes[:1, :]).sum()
    exact = limit.ratio * (count - 1)
    lower_rank = exact.floor()
    weight_tensor = exact - lower_rank
    # Bisection between 1 and max_value ends at two neighbouring numbers, the upper of which is the order statistic.
    low = torch.ones_like(magnitudes[:, :1])
    high = low * limit.max_value
    doublings = max(1, int(limit.max_value).bit_length())
    for _ in range(_BISECTIONS_TO_ONE_ULP + doublings):
        middle = low + (high - low) * 0.5
        passes = (magnitudes <= middle).float().sum(1, keepdim=True) > lower_rank
        low, high = torch.where(passes, low, middle), torch.where(passes, middle, high)
    below = torch.where(magnitudes <= high, magnitudes, low * 0.0).amax(1)
    # Up to 1 the clamp decides, but for a rank whose neighbour is above 1.
    at_most_one = torch.where(magnitudes <= 1.0, magnitudes, low * 0.0).amax(1)
    below = torch.where((magnitudes <= 1.0).float().sum(1) > lower_rank, at_most_one, below)
    above = torch.where(magnitudes > below[:, None], magnitudes, low * 0.0 + torch.finfo(torch.float32).max).amin(1)
    above = torch.where((magnitudes <= below[:, None]).float().sum(1) > lower_rank + 1, below, above)
    gap = above - below
    # torch.lerp's own two formulas, by the nearer end.
    quantile = torch.where(weight_tensor < 0.5, below + weight_tensor * gap, above - (1 - weight_tensor) * gap)
    over = (magnitudes <= limit.max_value).float().sum(1) <= lower_rank
    return torch.where(over, low[:, 0] * 0.0 + limit.max_value, quantile)
