"""A whole diffusers pipeline as one bundle: text encoders, sampler and VAE decoder, each a graph; token ids to pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from fastddim.export.bundle import Bundle, check_destination, write_bundle
from fastddim.export.denoisers import DTYPES, TOKENS, prepared
from fastddim.export.manifest import NOTE_FILE, note
from fastddim.export.models import TEXT_TO_IMAGE, denoiser_of, is_text_to_image
from fastddim.export.onnx.exporter import describe_values, export_onnx, save, to_graph, write_sampler
from fastddim.export.onnx.graph import name_dims, symbolic_dims
from fastddim.export.onnx.parity import runnable
from fastddim.export.onnx.sampler import yielding_options
from fastddim.export.sampler_plan import ExportOptions, plan_sampler
from fastddim.export.validate import (
    LARGEST_BATCH,
    PARITY_STEPS,
    TOLERANCES,
    fit_parity_steps,
    parity_entry,
    verify_bundle,
)
from fastddim.noise import STREAM_INITIAL, normal

_MEANINGS = {
    "input_ids": f"the tokenizer's ids, padded to {TOKENS}",
    "encoder_hidden_states": "the states that condition the sampler",
    "text_embeds": "the pooled text embedding",
    "latents": "the sampler's finished samples",
    "images": "pictures in [-1, 1], RGB",
}
# What `OrtPipeline` makes of texts and sizes for the sampler.
_OF_TEXTS = ("encoder_hidden_states", "text_embeds", "time_ids")


@dataclass(frozen=True)
class _Component:
    """A graph beside the sampler's.

    Attributes:
        model: the module whose weights it has.
        module: what is exported; it takes a dictionary of inputs and returns a tuple.
        outputs: names of what it returns.
        batches: inputs `[B, ...]` to trace and to compare with.
        dtype: the dtype of the weights.
        meaning: what the manifest says of it.
        resized: inputs of any height and width.
        facts: more fields of the manifest's entry.
    """

    model: torch.nn.Module
    module: torch.nn.Module
    outputs: tuple[str, ...]
    batches: Sequence[dict[str, torch.Tensor]]
    dtype: torch.dtype
    meaning: str
    resized: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def export_pipeline(
    pipe: Any,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    force: bool = False,
    parity_steps: Sequence[int] = PARITY_STEPS,
    tolerance: float | None = None,
) -> Bundle:
    """Export a diffusers text-to-image pipeline, which then samples with DDIM, as one ONNX bundle.

    `model.onnx` is the sampler, always guided; `text_encoder.onnx` (and for SDXL `text_encoder_2.onnx`) takes `input_ids`
    `[B, 77]` int64; `vae_decoder.onnx` takes `latents` and gives `images` `[B, 3, H, W]` in [-1, 1]. All floating-point
    inputs and outputs are float32. The tokenizers' files are in the bundle too. `OrtPipeline` runs it.

    Args:
        pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`, on the CPU; it is not changed.
        out: the folder to write.
        options: what is fixed in the files. A decoder that overflows in float16 (`force_upcast`) stays float32.
        force: replace a bundle that is there.
        parity_steps: numbers of steps after which the sampler is compared with torch.
        tolerance: the largest difference from torch, of the sampler and each component; by default what rounding explains.

    Returns:
        The bundle, opened; its manifest has `components`.

    Raises:
        TypeError: another pipeline; ValueError: parts, options or configurations that cannot be exported.
        ExportError: code that cannot be exported; ParityError: a file whose results differ from torch's.
        FileExistsError, NotADirectoryError, PermissionError: `out`, before any work.
    """
    target = check_destination(out, force)
    _check_pipeline(pipe)
    options = replace(options or ExportOptions(), guided=True)
    plan = plan_sampler(pipe.unet, pipe.scheduler, options)
    fit_parity_steps(parity_steps, plan.sampling)
    beside = [name for name in plan.denoiser.conditions if name not in _OF_TEXTS]
    if beside:
        raise ValueError(
            f"pipe: its unet takes {', '.join(beside)} beside texts, which no text gives; pass export_onnx(pipe.unet,"
            " pipe.scheduler, out), which makes them inputs"
        )
    components = {name: make(pipe, name, options, plan.denoiser.sample_shape) for name, make in _components(pipe)}

    def fill(folder: Path) -> dict[str, Any]:
        manifest = write_sampler(folder, plan, parity_steps, tolerance)
        manifest["zeros_for_empty_prompt"] = bool(pipe.config.get("force_zeros_for_empty_prompt", False))
        manifest["components"] = {}
        for name, component in components.items():
            entry, parity = _write_component(folder, name, component, tolerance)
            manifest["components"][name] = entry
            manifest["parity"] += parity
        for name in ("tokenizer", "tokenizer_2"):
            tokenizer = getattr(pipe, name, None)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder / name))
        (folder / NOTE_FILE).write_text(note(manifest), "utf-8")
        return manifest

    return write_bundle(target, force, fill)


def export_loaded(
    pipe: Any, out: str | Path, options: ExportOptions | None = None, sampler_only: bool = False, **arguments: Any
) -> Bundle:
    """Export a pipeline of `load_exportable`: whole if `export_pipeline` takes it, else its network and schedule.

    Args:
        pipe: the pipeline.
        out, options: as `export_pipeline`'s.
        sampler_only: the network and schedule of a pipeline with an autoencoder too.
        **arguments: `force`, `parity_steps` and `tolerance`, as `export_pipeline`'s.
    """
    if is_text_to_image(pipe) and not sampler_only:
        return export_pipeline(pipe, out, options, **arguments)
    if not sampler_only and (hasattr(pipe, "vqvae") or hasattr(pipe, "text_encoder")):
        raise ValueError(
            f"model: {type(pipe).__name__} has encoders or a decoder that are not exported; pass sampler_only=True for"
            " its network and schedule, whose samples are latents"
        )
    return export_onnx(denoiser_of(pipe), pipe.scheduler, out, options, **arguments)


def _check_pipeline(pipe: Any) -> None:
    kind = type(pipe).__name__
    if kind not in TEXT_TO_IMAGE:
        raise TypeError(f"pipe: {kind} cannot be exported; pass one of {', '.join(TEXT_TO_IMAGE)}")
    for name, classes in TEXT_TO_IMAGE[kind].items():
        found = type(getattr(pipe, name)).__name__
        if found not in classes:
            raise ValueError(f"pipe: its {name} is {found}; only {' or '.join(classes)} can be exported")
        config = getattr(pipe, name).config
        if name.startswith("text_encoder"):
            if config.max_position_embeddings != TOKENS:
                raise ValueError(
                    f"pipe: its {name} takes {config.max_position_embeddings} tokens; only {TOKENS} can be exported"
                )
            if getattr(config, "use_attention_mask", False):
                raise ValueError(f"pipe: its {name} has use_attention_mask, which cannot be exported; turn it off")
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise ValueError(
            "pipe: its unet has the guidance scale embedded (time_cond_proj_dim), which cannot be exported"
        )


def verify_pipeline(
    bundle: Bundle, pipe: Any, *, steps: Sequence[int] = PARITY_STEPS, tolerance: float | None = None
) -> list[dict[str, Any]]:
    """Compare an opened bundle with the pipeline it was exported from, as `export_pipeline` does.

    Args:
        bundle: from `open_bundle`.
        pipe: in torch, on the CPU; it is not changed.
        steps, tolerance: as `export_pipeline`'s.

    Returns:
        The measured entries.

    Raises:
        TypeError, ValueError: another pipeline than the bundle's; ParityError: a file whose results differ from torch's.
    """
    _check_pipeline(pipe)
    manifest = bundle.manifest
    options = ExportOptions(dtype=manifest["sampling"]["dtype"], dynamic_size=bundle.any_size)
    components = {
        name: make(pipe, name, options, tuple(manifest["sample"]["shape"])) for name, make in _components(pipe)
    }
    if set(components) != set(bundle.components):
        raise ValueError(f"pipe: has {', '.join(components)}, the bundle {', '.join(bundle.components)}; pass its own")
    parity = verify_bundle(bundle, pipe.unet, steps=steps, tolerance=tolerance)
    for name, component in components.items():
        with prepared(component.model, component.dtype):
            parity += _measure(bundle.component_path(name), name, component, tolerance)
    return parity


def _measure(path: Path, name: str, component: _Component, tolerance: float | None) -> list[dict[str, Any]]:
    """Largest differences between a component's file and its module, for the manifest.

    The default tolerance is what the dtype explains, relative to the largest value where that is above 1.
    """
    with runnable(path, component.module, component.dtype) as (file, dtype), torch.no_grad():
        session = onnxruntime.InferenceSession(str(file), yielding_options(), providers=["CPUExecutionProvider"])
        pairs = [
            (component.module(inputs), session.run(None, {key: value.numpy() for key, value in inputs.items()}))
            for inputs in component.batches
        ]
    results = []
    for inputs, (expected, actual) in zip(component.batches, pairs, strict=True):
        batch, *size = next(iter(inputs.values())).shape
        largest = max(float(value.abs().max()) for value in expected)
        # numpy's maximum keeps a NaN, Python's need not.
        error = float(np.max([np.abs(have - want.numpy()).max() for have, want in zip(actual, expected, strict=True)]))
        allowed = TOLERANCES[dtype] * max(1.0, largest) if tolerance is None else tolerance
        where = f"in {name}, a batch of {batch} of {tuple(size)}"
        results.append(parity_entry(error, allowed, where, component=name, batch=batch, size=size))
    return results


_Maker = Callable[[Any, str, ExportOptions, tuple[int, ...]], _Component]


def _components(pipe: Any) -> list[tuple[str, _Maker]]:
    encoders = [name for name in TEXT_TO_IMAGE[type(pipe).__name__] if name.startswith("text_encoder")]
    return [*((name, _text_encoder) for name in encoders), ("vae_decoder", _vae_decoder)]


class _TextEncoder(torch.nn.Module):
    """The states that a pipeline takes from an encoder: the last, or for SDXL those before the last layer; the pooled."""

    def __init__(self, model: torch.nn.Module, before_last: bool, pooled: bool) -> None:
        super().__init__()
        self.model = model
        self._before_last, self._pooled = before_last, pooled

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        output = self.model(inputs["input_ids"], output_hidden_states=self._before_last)
        states = output.hidden_states[-2] if self._before_last else output.last_hidden_state
        return (states.float(), output.text_embeds.float()) if self._pooled else (states.float(),)


def _text_encoder(pipe: Any, name: str, options: ExportOptions, sample_shape: tuple[int, ...]) -> _Component:
    model = getattr(pipe, name)
    is_xl, pooled = "text_encoder_2" in TEXT_TO_IMAGE[type(pipe).__name__], name == "text_encoder_2"
    meaning = "token ids to what conditions the sampler"
    if is_xl:
        meaning += "; both encoders' encoder_hidden_states, joined along the last dimension, are the sampler's"
    return _Component(
        model,
        _TextEncoder(model, before_last=is_xl, pooled=pooled),
        ("encoder_hidden_states", "text_embeds") if pooled else ("encoder_hidden_states",),
        [{"input_ids": _draw_ids(model.config, batch)} for batch in (1, LARGEST_BATCH)],
        DTYPES[options.dtype],
        meaning,
    )


def _draw_ids(config: Any, batch: int) -> torch.Tensor:
    """Random ids `[B, 77]`, from the second sample on with an end and padding."""
    ids = torch.randint(0, config.vocab_size, (batch, TOKENS), generator=torch.Generator().manual_seed(1))
    for k in range(batch):
        # The padding token of some configurations is none, or beyond a small vocabulary.
        end, pad = (min(i or 0, config.vocab_size - 1) for i in (config.eos_token_id, config.pad_token_id))
        length = TOKENS // (k + 1) - 1
        ids[k, length] = end
        ids[k, length + 1 :] = pad
    return ids


class _VaeDecoder(torch.nn.Module):
    """Latents to pictures, without the slices and tiles of `vae.decode`, which depend on sizes."""

    def __init__(self, vae: Any, by_channel: bool) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        # As the pipelines do: SDXL's alone knows these two.
        if not by_channel or mean is None or std is None:
            mean, std = [0.0], [1.0]
        self._shift = torch.tensor(mean).reshape(1, -1, 1, 1)
        self._scale = torch.tensor(std).reshape(1, -1, 1, 1) / vae.config.scaling_factor

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        latents = inputs["latents"] * self._scale + self._shift
        latents = latents.to(self.decoder.conv_in.weight.dtype)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return (self.decoder(latents).float().clamp(-1, 1),)


def _vae_decoder(pipe: Any, name: str, options: ExportOptions, sample_shape: tuple[int, ...]) -> _Component:
    vae = pipe.vae
    channels, height, width = sample_shape
    larger = (channels, 2 * height if options.dynamic_size else height, width)
    overflows = options.dtype == "float16" and vae.config.force_upcast
    return _Component(
        vae,
        _VaeDecoder(vae, by_channel=type(pipe).__name__ == "StableDiffusionXLPipeline"),
        ("images",),
        [
            {"latents": normal(range(batch), 0, shape, STREAM_INITIAL)}
            for batch, shape in ((1, sample_shape), (LARGEST_BATCH, larger))
        ],
        torch.float32 if overflows else DTYPES[options.dtype],
        "finished latents to pictures, the scaling factor inside",
        ("latents",) if options.dynamic_size else (),
        {"upscale": 2 ** (len(vae.config.block_out_channels) - 1)},
    )


def _write_component(
    folder: Path, name: str, component: _Component, tolerance: float | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Its file; the manifest's entry for it and those of its parity."""
    path = folder / f"{name}.onnx"
    with prepared(component.model, component.dtype):
        examples = {key: value[:2] for key, value in component.batches[-1].items()}
        kind = type(component.model).__name__
        dynamic = dict.fromkeys(component.resized, (0, 2, 3))
        graph = to_graph(component.module, examples, component.outputs, kind, path, dynamic=dynamic)
        name_dims(graph.graph, _named_dims(symbolic_dims(graph.graph)))
        save(graph, path)
        parity = _measure(path, name, component, tolerance)
    entry = {
        "model": path.name,
        "inputs": describe_values(graph.graph.input, _MEANINGS),
        "outputs": describe_values(graph.graph.output, _MEANINGS),
        "meaning": component.meaning,
        **component.facts,
    }
    return entry, parity


def _named_dims(dims: Mapping[str, Sequence[str | int]]) -> dict[str, list[str | int]]:
    """Readable names for dimensions that differ from call to call."""
    sides = {"latents": ("height", "width"), "images": ("image_height", "image_width")}
    named = {}
    for value, shape in dims.items():
        names = ("batch", "", *sides.get(value, ()))
        named[value] = [names[k] if isinstance(dim, str) else dim for k, dim in enumerate(shape)]
    return named
