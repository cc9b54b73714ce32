"""The diffusers pipelines that can be exported: which kinds there are, and how one is loaded."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import diffusers
import torch

from fastddim.pipeline import PIPELINES, check_variant, load_pipeline
from fastddim.policies.lerobot import is_lerobot_folder, load_policy

_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
# The classes that the parts of each text-to-image pipeline may have.
TEXT_TO_IMAGE: dict[str, dict[str, tuple[str, ...]]] = {
    "StableDiffusionPipeline": {
        "text_encoder": _ENCODERS,
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
    },
    "StableDiffusionXLPipeline": {
        "text_encoder": _ENCODERS,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
    },
}
# Of these the network and schedule alone.
SAMPLERS_ALONE = (
    "DiTPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusionXLImg2ImgPipeline",
)  # fmt: skip


def load_exportable(model: str | Path | None, variant: str | None = None) -> Any:
    """Load a diffusers pipeline of a kind that can be exported.

    Args:
        model: as `load_pipeline`'s; also the folder or hub id of a text-to-image pipeline or of one of `SAMPLERS_ALONE`, and
            the folder of a robot policy.
        variant: as `load_pipeline`'s.

    Returns:
        The diffusers pipeline; a `DDIMPipeline` for those of a `UNet2DModel` alone; a `Policy`.

    Raises:
        FileNotFoundError, ValueError: as `load_pipeline`.
    """
    if model is not None and is_lerobot_folder(model):
        return load_policy(model)
    kind = ""
    if model is not None:
        # What is wrong with it, load_pipeline says.
        with contextlib.suppress(Exception):
            kind = diffusers.DiffusionPipeline.load_config(str(model))["_class_name"]
    beside = (*TEXT_TO_IMAGE, *SAMPLERS_ALONE)
    if kind and kind not in (*PIPELINES, *beside):
        raise ValueError(
            f"model: {str(model)!r} is a {kind}; pass one of {', '.join((*PIPELINES, *beside))}, or load it by diffusers, for"
            " fastddim.export.export_onnx(pipe.unet, pipe.scheduler, out)"
        )
    if kind not in beside:
        return load_pipeline(model, variant)
    # Only pipelines of Stable Diffusion before XL have one.
    checked = kind in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
    unchecked = {"safety_checker": None, "requires_safety_checker": False} if checked else {}
    networks = [path.parent for path in Path(str(model)).glob("*/config.json")]
    check_variant([folder for folder in networks if folder.name not in unchecked], variant)
    try:
        return diffusers.DiffusionPipeline.from_pretrained(str(model), variant=variant, **unchecked)
    except Exception as error:  # diffusers, safetensors, torch and the hub's client each raise their own types
        raise ValueError(f"model: {str(model)!r} cannot be loaded as a {kind}: {error}") from error


def denoiser_of(pipe: Any) -> torch.nn.Module:
    """The network of a pipeline from `load_exportable`."""
    model: torch.nn.Module = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    return model


def is_text_to_image(pipe: Any) -> bool:
    """Whether `export_pipeline` takes this kind of pipeline."""
    return type(pipe).__name__ in TEXT_TO_IMAGE
