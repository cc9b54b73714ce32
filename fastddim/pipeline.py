"""`DDIMPipeline`: diffusers' signature with our scheduler, class labels and guidance; and the loading of model folders."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import LDMPipeline, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from fastddim.config import require_number
from fastddim.model_call import mean_of, null_class
from fastddim.reference import combine_guidance
from fastddim.samplers.sampling import read_scheduler
from fastddim.schedule import Schedule
from fastddim.scheduler import DDIMScheduler
from fastddim.step import Guidance

EMBEDDED_MODEL = Path(__file__).parent / "models" / "digits"
# A folder with a network and a scheduler at its root.
_ROOT = "UNet2DModel"
# The networks of each pipeline that is loaded.
_PARTS: dict[str, tuple[str, ...]] = {
    "DDIMPipeline": ("unet",),
    "DDPMPipeline": ("unet",),
    "PNDMPipeline": ("unet",),
    "LDMPipeline": ("unet", "vqvae"),
    _ROOT: ("unet",),
}
PIPELINES = tuple(name for name in _PARTS if name != _ROOT)


class DDIMPipeline(diffusers.DDIMPipeline):  # type: ignore[misc]
    """diffusers' `DDIMPipeline` with `fastddim.DDIMScheduler`, and class labels with guidance where the UNet takes them.

    What it saves is a plain diffusers folder, which loads without fastddim.

    Args:
        unet: a `UNet2DModel` or anything with its call and configuration.
        scheduler: any scheduler whose configuration DDIM can take; it is converted.

    Raises:
        ValueError: a scheduler whose noise levels are no `DDIMScheduler`'s.
    """

    def __init__(self, unet: torch.nn.Module, scheduler: SchedulerMixin) -> None:
        DiffusionPipeline.__init__(self)
        levels = read_scheduler(scheduler, "ddim").schedule
        if not isinstance(levels, Schedule) or "snr_shift_scale" in scheduler.config:
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} has other noise levels than a DDIMScheduler can; pass"
                " fastddim.Sampler(unet, scheduler) instead"
            )
        self.register_modules(unet=unet, scheduler=DDIMScheduler.from_config(scheduler.config))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        class_labels: Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            batch_size: number of images.
            generator: draws the starting state and, with `eta > 0`, the steps' noise; a list has one for each image.
            eta: 0 is DDIM, 1 is DDPM.
            num_inference_steps: number of model calls.
            use_clipped_model_output: derive epsilon from the clipped x0; None is diffusers' default, False.
            output_type: `"pil"`, `"np"` (`[B, H, W, C]` in [0, 1]) or `"pt"` (`[B, C, H, W]` in [0, 1]).
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            class_labels: one label per image, for class-conditional UNets; None samples the "no class" label.
            guidance_scale: classifier-free guidance against the "no class" label; 1 is off.

        Raises:
            ValueError: generators or labels of another number than images, labels for a UNet without classes, out of range
                or no integers, guidance without labels or of no finite scale, an unknown output type.
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator: a list of {len(generator)} for batch_size {batch_size}; pass one per image")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type: {output_type!r}; pass 'pil', 'np' or 'pt'")
        require_number("guidance_scale", guidance_scale, -1e4, 1e4)
        guided = guidance_scale != 1.0
        labels = self._labels(class_labels, batch_size, guided)
        if not 0.0 <= eta <= 1.0:
            warnings.warn(f"eta: {eta!r} is outside [0, 1]; 0 is DDIM, 1 is DDPM", stacklevel=2)
        config = self.scheduler.config
        if guided and not use_clipped_model_output and (config.clip_sample or config.thresholding):
            warnings.warn(
                f"guidance_scale {guidance_scale:g} with a limited x0 and the raw epsilon drifts away from any picture;"
                " pass use_clipped_model_output=True",
                stacklevel=2,
            )

        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        image = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        label_kwargs = {} if labels is None else {"class_labels": labels}
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = torch.cat([image, image]) if guided else image
            output = mean_of(self.unet(model_input, t, **label_kwargs).sample, model_input)
            if guided:
                output = combine_guidance(output, Guidance(guidance_scale))
            image = self.scheduler.step(
                output, t, image, eta=eta, use_clipped_model_output=use_clipped_model_output, generator=generator
            ).prev_sample

        image = (image / 2 + 0.5).clamp(0, 1)
        images: Any = image
        if output_type != "pt":
            images = image.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(
        self, labels: Sequence[int] | torch.Tensor | None, batch_size: int, guided: bool
    ) -> torch.Tensor | None:
        """Labels `[B]`, or `[2 * B]` with the "no class" half first when guided; None for a UNet without classes."""
        null = null_class(self.unet)
        if labels is None:
            if guided:
                raise ValueError("guidance_scale: guidance needs class_labels; pass them, or guidance_scale=1.0")
            return None if null is None else torch.full((batch_size,), null, device=self._execution_device)
        if null is None:
            raise ValueError("class_labels: this UNet has no classes; leave them out")
        given = torch.as_tensor(labels)
        if given.is_floating_point():
            raise ValueError(f"class_labels: {given.tolist()}; pass integers in [0, {null}] ({null} is no class)")
        tensor = given.to(self._execution_device, torch.int64)
        if tensor.shape != (batch_size,):
            raise ValueError(
                f"class_labels: shape {tuple(tensor.shape)}; pass one label for each of {batch_size} images"
            )
        if not bool(((tensor >= 0) & (tensor <= null)).all()):
            raise ValueError(f"class_labels: {tensor.tolist()}; pass integers in [0, {null}] ({null} is no class)")
        return torch.cat([torch.full_like(tensor, null), tensor]) if guided else tensor


def load_pipeline(model: str | Path | None = None, variant: str | None = None) -> DDIMPipeline | LDMPipeline:
    """Load a model folder as a `DDIMPipeline`, one of an `LDMPipeline` as diffusers' own.

    Args:
        model: a diffusers pipeline folder (`model_index.json`; `unet/` and `scheduler/`, or their files beside it), one of a
            `UNet2DModel` and a scheduler without an index, a hub id such as `google/ddpm-cifar10-32` (downloaded by
            diffusers), or None for the embedded handwritten-digits model.
        variant: the weights to take, such as `"fp16"` for `diffusion_pytorch_model.fp16.safetensors`.

    Raises:
        FileNotFoundError: no such folder, or a file that it must have is missing.
        ValueError: another kind of pipeline, a single file, another variant than the folder has, a weight file that is
            truncated or does not fit the configuration, or a hub id that cannot be fetched.
    """
    folder = EMBEDDED_MODEL if model is None else Path(model)
    if not folder.exists() and _is_hub_id(str(model)):
        with _explaining(str(model), "is no folder here, and as a hub id it cannot be loaded"):
            kind = DiffusionPipeline.load_config(str(model))["_class_name"]
        _require_kind(model, kind)
        return _from_diffusers(str(model), kind, variant, "is no folder here, and as a hub id it cannot be loaded")
    if folder.is_file():
        raise ValueError(
            f"model: {str(folder)!r} is a single file; diffusers' from_single_file reads it, with a configuration that is not"
            " in it: save what that gives by save_pretrained, and pass the folder"
        )
    if not folder.is_dir():
        raise FileNotFoundError(
            f"model: {str(folder)!r} is no folder; pass a diffusers folder or a hub id 'owner/name'"
        )
    kind = _read_kind(folder)
    _require_kind(folder, kind)
    parts = [folder / name if (folder / name).is_dir() else folder for name in _PARTS[kind]]
    schedulers = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    for path in (*(part / "config.json" for part in parts), schedulers / "scheduler_config.json"):
        if not path.is_file():
            raise FileNotFoundError(f"model: {str(path)!r} is missing; pass a diffusers pipeline folder")
    check_variant(parts, variant)
    return _from_diffusers(str(folder), kind, variant, "cannot be loaded")


def _is_hub_id(name: str) -> bool:
    owner, slash, repository = name.partition("/")
    return bool(slash and owner and repository) and "/" not in repository and not name.startswith((".", "~"))


def decode_latents(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """What a pipeline of `load_pipeline` makes of finished samples: pictures `[B, C, H, W]`, of latents by its decoder."""
    vqvae = getattr(pipe, "vqvae", None)
    if vqvae is None:
        return latents
    with torch.no_grad():
        decoded: torch.Tensor = (
            vqvae.to(latents.device).decode((latents / vqvae.config.scaling_factor).to(vqvae.dtype)).sample
        )
    return decoded


def picture_shape(pipe: Any, sample_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one picture of `decode_latents`."""
    config = getattr(getattr(pipe, "vqvae", None), "config", None)
    if config is None:
        return tuple(sample_shape)
    upscale = 2 ** (len(config.block_out_channels) - 1)
    return (config.out_channels, *(side * upscale for side in sample_shape[1:]))


def _read_kind(folder: Path) -> str:
    """The class in a folder's index; without one, that of the network at its root."""
    path = index = folder / "model_index.json"
    if not index.is_file() and (folder / "scheduler_config.json").is_file():
        path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model: {str(index)!r} is missing; pass a diffusers pipeline folder")
    try:
        return str(json.loads(path.read_text("utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model: {str(path)!r} names no class: {error}; save it by save_pretrained") from error


def _require_kind(model: str | Path | None, kind: str) -> None:
    if kind not in _PARTS:
        raise ValueError(
            f"model: {str(model)!r} is a {kind}; pass one of {', '.join(PIPELINES)}, or load it by diffusers, for"
            " fastddim.Sampler(pipe.unet, pipe.scheduler) or fastddim.accelerate(pipe)"
        )


def check_variant(parts: Sequence[Path], variant: str | None) -> None:
    """Refuse a variant that no part has, and a part without weights of it or of none.

    Args:
        parts: the folders of a pipeline's networks.
        variant: as `load_pipeline`'s.

    Raises:
        FileNotFoundError: a folder without weights; ValueError: with weights of other variants alone.
    """
    found = []
    for part in parts:
        files = [*part.glob("*.safetensors"), *part.glob("*.bin")]
        if not files:
            raise FileNotFoundError(
                f"model: {str(part)!r} has no weight file; it should hold diffusion_pytorch_model.safetensors"
            )
        # Shards of a variant are name.fp16-00001-of-00002.safetensors.
        found.append({([*re.sub(r"-\d+-of-\d+$", "", file.stem).split("."), None])[1] for file in files})
    for part, variants in zip(parts, found, strict=True):
        if not {variant, None} & variants or all(variant not in each for each in found):
            there = ", ".join(sorted(repr(each) for each in variants if each))
            fix = f"the weights of variant {there}; pass that" if there else "weights of no variant; leave it out"
            raise ValueError(f"variant: {variant!r}, but {str(part)!r} has {fix}")


@contextlib.contextmanager
def _explaining(name: str, problem: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # diffusers, safetensors, torch and the hub's client each raise their own types
        raise ValueError(f"model: {name!r} {problem}: {error}") from error


def _from_diffusers(name: str, kind: str, variant: str | None, problem: str) -> DDIMPipeline | LDMPipeline:
    with _explaining(name, problem):
        if kind == _ROOT:
            unet = UNet2DModel.from_pretrained(name, variant=variant)
            config = DDIMScheduler.load_config(name)
            made = getattr(diffusers, config.get("_class_name", "DDIMScheduler"))
            return DDIMPipeline(unet, made.from_config(config))
        loader = LDMPipeline if kind == "LDMPipeline" else DDIMPipeline
        library, _ = DiffusionPipeline.load_config(name).get("scheduler", ("", ""))
        if library == "fastddim.scheduler" and loader is DDIMPipeline:
            # Saved before ours was written as diffusers', which loads nothing from our module.
            unet = UNet2DModel.from_pretrained(name, subfolder="unet", variant=variant)
            return DDIMPipeline(unet, DDIMScheduler.from_pretrained(name, subfolder="scheduler"))
        pipeline: DDIMPipeline | LDMPipeline = loader.from_pretrained(name, variant=variant)
    return pipeline
