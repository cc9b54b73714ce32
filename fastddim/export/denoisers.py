"""How the exporters call each kind of model that they take."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastddim.model_call import Model, mean_of, prediction_of, sample_shape_of
from fastddim.policies.chunk import KNOWN
from fastddim.policies.policy import Policy

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What an inpainting UNet takes beside the state, in this order.
INPAINTING = ("mask", "masked_image_latents")
# What CLIP's text encoders take.
TOKENS = 77


@dataclass(frozen=True)
class Condition:
    """An input that conditions the model.

    Attributes:
        example: `[B, ...]`, what the export traces with.
        null: the value of the unconditional half, where the model has one (a label for "no class").
        meaning: its description in the manifest.
        shared: whether the unconditional half has the same, and so no input of its own.
    """

    example: torch.Tensor
    null: int | None = None
    meaning: str = ""
    shared: bool = False


@dataclass(frozen=True)
class Finish:
    """What becomes of finished samples in the file.

    Attributes:
        module: `module(samples, inputs)`, with samples `[B, ...]` float32 and the model's conditions by name; it returns the
            samples again and the other outputs, `[B, ...]` each.
        outputs: the names of the others, and what they are.
        reads: the conditions that it takes.
    """

    module: torch.nn.Module
    outputs: Mapping[str, str]
    reads: tuple[str, ...] = ()


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
        finish: what becomes of its samples.
        facts: what a manifest says of it beside its inputs.
        repeated: the call for many steps of one run, where what the conditions alone make is computed once for it.
    """

    model: torch.nn.Module
    call: Callable[[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
    sample_shape: tuple[int, ...]
    conditions: dict[str, Condition] = field(default_factory=dict)
    resizable: bool = False
    finish: Finish | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    repeated: Callable[[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor] | None = None


def describe(
    model: torch.nn.Module,
    sample_shape: tuple[int, ...] | None = None,
    example_kwargs: Mapping[str, torch.Tensor] | None = None,
) -> Denoiser:
    """How to call a model: diffusers' UNets and DiT by their configurations, any other from its examples.

    Args:
        model: `UNet2DModel`, `UNet2DConditionModel`, `DiTTransformer2DModel`, a `fastddim.policies.Policy`, or any module
            called as `model(x, t, **kwargs)` that returns the prediction, a tuple that starts with it, or `.sample`.
        sample_shape: the shape of one sample, where the configuration does not say.
        example_kwargs: the keyword tensors `[B, ...]` that any other module takes, B equal for all.

    Raises:
        ValueError: a configuration that cannot be exported, or a module without a sample shape; the message names it.
    """
    if isinstance(model, Policy):
        return _describe_policy(model, example_kwargs)
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if kind in _DESCRIBED and config is not None:
        if example_kwargs:
            raise ValueError(f"example_kwargs: given for a {kind}, whose inputs are known; leave them out")
        return _DESCRIBED[kind](model, config, sample_shape)
    if sample_shape is None:
        raise ValueError(f"sample_shape: not known for a {kind}; pass the shape of one sample, without the batch")
    conditions = {name: Condition(value) for name, value in (example_kwargs or {}).items()}
    return Denoiser(model, functools.partial(_call, model), tuple(sample_shape), conditions)


def _call(model: Model, x: torch.Tensor, t: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`model(x, t, **conditions)`, whatever it returns, without a learned variance."""
    return mean_of(prediction_of(model(x, t, **conditions)), x)


def _call_condition_unet(
    model: Model, x: torch.Tensor, t: torch.Tensor, conditions: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """A UNet whose text states are float32, whatever its dtype, and SDXL's pooled text and sizes in a dictionary.

    An inpainting one takes what is beside the state as more channels.
    """
    # The embeddings of the added two are float32 until the UNet itself casts them.
    added = {name: conditions[name] for name in ("text_embeds", "time_ids") if name in conditions}
    states = conditions["encoder_hidden_states"].to(x.dtype)
    beside = [conditions[name].to(x.dtype) for name in INPAINTING if name in conditions]
    output = model(
        torch.cat([x, *beside], 1) if beside else x,
        t,
        states,
        class_labels=conditions.get("class_labels"),
        added_cond_kwargs=added or None,
    )
    return mean_of(prediction_of(output), x)


def _shape_of(model: torch.nn.Module, sample_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    shape = sample_shape_of(model) if sample_shape is None else tuple(sample_shape)
    if shape is None:
        raise ValueError("sample_shape: the model's configuration has no sample_size; pass (channels, height, width)")
    return shape


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
    shape = _shape_of(model, sample_shape)
    if config.in_channels != shape[0]:
        raise ValueError(
            f"model: {config.in_channels} channels, {shape[0]} of them the sample's, cannot be exported; wrap it in a module"
            " that has the others, and pass sample_shape"
        )
    return Denoiser(model, functools.partial(_call, model), shape, conditions, resizable=True)


def _describe_condition_unet(model: torch.nn.Module, config: Any, sample_shape: tuple[int, ...] | None) -> Denoiser:
    kind = config.addition_embed_type
    if kind not in (None, "text_time"):
        raise ValueError(f"model: addition_embed_type {kind!r} cannot be exported; None and 'text_time' (SDXL) can")
    if config.encoder_hid_dim_type is not None or config.class_embed_type not in (None, "timestep"):
        raise ValueError(
            f"model: encoder_hid_dim_type {config.encoder_hid_dim_type!r} and class_embed_type {config.class_embed_type!r}"
            " cannot be exported; None and None or 'timestep' can"
        )
    shape = _shape_of(model, sample_shape)
    beside = config.in_channels - shape[0]
    if beside not in (0, 1 + shape[0]):
        raise ValueError(
            f"model: {config.in_channels} channels, {shape[0]} of them the sample's, cannot be exported; of those beside it"
            " a mask and the masked image's latents can, as inpainting has them"
        )
    width = config.cross_attention_dim
    width = width[0] if isinstance(width, (tuple, list)) else width
    conditions = {
        "encoder_hidden_states": Condition(torch.zeros(2, TOKENS, width), meaning="the text encoder's states")
    }
    if kind is not None:
        ids, sizes = 6, "original size, crop corner, target size: h, w each"
        total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
        if total - 5 * each == width:
            # SDXL's refiner: one encoder, whose pooled text is as wide as its states.
            ids, sizes = 5, "original size, crop corner: h, w each; aesthetic score"
        conditions["text_embeds"] = Condition(torch.zeros(2, total - ids * each), meaning="the pooled text embedding")
        conditions["time_ids"] = Condition(torch.zeros(2, ids), meaning=sizes)
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        # An upscaler's are levels of noise: a text, not they, makes the unconditional half.
        labels = torch.full((2,), (config.num_class_embeds or 1000) - 1)
        conditions["class_labels"] = Condition(labels, meaning="class of each sample", shared=True)
    if beside:
        for name, channels, meaning in (
            (INPAINTING[0], 1, "1 where the picture is to be made, 0 where it is given, at the latents' size"),
            (INPAINTING[1], shape[0], "latents of the picture without what is to be made"),
        ):
            conditions[name] = Condition(torch.zeros(2, channels, *shape[1:]), meaning=meaning, shared=True)
    call = functools.partial(_call_condition_unet, model)
    return Denoiser(model, call, shape, conditions, resizable=not beside)


def _describe_dit(model: torch.nn.Module, config: Any, sample_shape: tuple[int, ...] | None) -> Denoiser:
    null = config.num_embeds_ada_norm
    labels = Condition(torch.zeros(2, dtype=torch.int64), null, f"class of each sample; {null} is no class")
    call = functools.partial(_call, model)
    return Denoiser(model, call, _shape_of(model, sample_shape), {"class_labels": labels})


class _Decode(torch.nn.Module):
    """A policy's samples as a chunk of actions."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._decode = policy.decode

    def forward(self, samples: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        chunk = self._decode(samples, inputs.get("known"), inputs.get("mask"))
        return chunk.samples, chunk.actions, chunk.normalised


def _describe_policy(policy: Policy, example_kwargs: Mapping[str, torch.Tensor] | None) -> Denoiser:
    examples = policy.example_inputs() if example_kwargs is None else example_kwargs
    conditions = {name: Condition(value, meaning=policy.meaning(name)) for name, value in examples.items()}
    outputs = {
        "actions": f"the {policy.n_action_steps} actions to execute, in the robot's units",
        "normalised": "the same actions as the network has them",
    }
    finish = Finish(_Decode(policy), outputs, tuple(name for name in KNOWN[:2] if name in conditions))
    call = functools.partial(_call, policy)
    kept: dict[str, Any] = {}

    def repeated(x: torch.Tensor, t: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if kept.get("inputs") is None or any(kept["inputs"][name] is not value for name, value in given.items()):
            kept.update(inputs=dict(given), made=policy.condition(given))
        prediction: torch.Tensor = policy.denoiser(x, t, **kept["made"])
        return prediction

    return Denoiser(
        policy,
        call,
        policy.sample_shape,
        conditions,
        finish=finish,
        facts={"policy": policy.record(conditions)},
        repeated=repeated,
    )


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
