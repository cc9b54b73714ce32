"""Running the bundle of a whole pipeline with ONNX Runtime: token ids to pictures. numpy in, numpy out; no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from fastddim.export.bundle import Bundle, BundleError, open_bundle
from fastddim.export.bundle_sampler import Array, fit_array
from fastddim.export.onnx.sampler import OrtSampler, choose_providers

DECODER = "vae_decoder"
Ids = Array | Sequence[Array]


class OrtPipeline:
    """Pictures from the bundle of a diffusers pipeline, equal to that pipeline's own with DDIM, to float rounding.

    Args:
        bundle: a folder that `export_pipeline` wrote, or an opened bundle.
        providers: as `choose_providers`'.
        session_options: `onnxruntime.SessionOptions`, e.g. for threads.
        check_finite: as `OrtSampler`'s.

    Attributes:
        bundle: the opened bundle.
        sampler: the `OrtSampler` between the text encoders and the decoder.
        zeros_for_empty_prompt: without a negative prompt the unconditional embeddings are zeros, as the pipeline's
            configuration has it (`force_zeros_for_empty_prompt`, SDXL).

    Raises:
        BundleError: a bundle that is damaged, or that is a sampler alone; ValueError: a provider that is not there.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        providers: str | Sequence[str] | None = None,
        *,
        session_options: onnxruntime.SessionOptions | None = None,
        check_finite: bool = False,
    ) -> None:
        chosen = choose_providers(providers)
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        components = self.bundle.components
        if DECODER not in components or "text_encoder" not in components:
            raise BundleError(
                f"bundle: {str(self.bundle.path)!r} is a sampler alone; pass one of export_pipeline, or use OrtSampler"
            )
        self.sampler = OrtSampler(
            self.bundle, providers=chosen, session_options=session_options, check_finite=check_finite
        )
        self._sessions = {
            name: onnxruntime.InferenceSession(
                str(self.bundle.component_path(name)), sess_options=session_options, providers=chosen
            )
            for name in components
        }
        self._encoders = [name for name in components if name != DECODER]
        self.zeros_for_empty_prompt: bool = self.bundle.manifest.get("zeros_for_empty_prompt", False)
        self._takes_sizes = "time_ids" in self.bundle.taken

    def __call__(
        self,
        input_ids: Ids,
        negative_input_ids: Ids | None,
        *,
        seeds: int | Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | Array = 7.5,
        guidance_rescale: float | Array = 0.0,
        eta: float | None = None,
        size: tuple[int, int] | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
    ) -> Array:
        """Pictures of prompts.

        Args:
            input_ids: `[B, 77]` integers, padded as the tokenizer does; for a bundle with two encoders (SDXL) a pair, as
                its tokenizers pad differently.
            negative_input_ids: the same of the negative prompts; None for none, with `zeros_for_empty_prompt` or without
                guidance.
            seeds: one per picture, or an integer s for s, s + 1, ...
            num_inference_steps, eta: the steps and the noise of this run; the bundle's own by default.
            guidance_scale, guidance_rescale: numbers or `[B]`; as in the pipelines there is no guidance at scales up to 1,
                but with CFG++.
            size: `(height, width)` in pixels, for bundles of any size; the model's own by default.
            original_size, crops_coords_top_left, target_size: SDXL's `(height, width)`, `(top, left)` and
                `(height, width)`; the sizes are the pictures' own by default.

        Returns:
            float32 `[B, 3, H, W]` in [-1, 1].

        Raises:
            ValueError: arguments that the bundle does not take, or of the wrong shape or dtype.
            NotFiniteError: with `check_finite`.
        """
        conditions = self._encode("input_ids", input_ids)
        scales = np.asarray(guidance_scale, dtype=np.float32)
        if self.bundle.manifest["sampling"].get("guidance_method", "cfg") == "cfg":
            # As in the pipelines, where no guidance is what any scale up to 1 means.
            scales = np.maximum(scales, 1)
        batch = len(conditions["encoder_hidden_states"])
        latent_size, pixels = self._sizes(size)
        uncond = dict(conditions) if (scales <= 1).all() else self._uncond(negative_input_ids, conditions)
        if self._takes_sizes:
            sizes = (*(original_size or pixels), *crops_coords_top_left, *(target_size or pixels))
            time_ids = np.repeat(np.array([sizes], dtype=np.float32), batch, axis=0)
            conditions["time_ids"] = uncond["time_ids"] = time_ids
        elif original_size is not None or target_size is not None or tuple(crops_coords_top_left) != (0, 0):
            raise ValueError(
                "original_size, crops_coords_top_left, target_size: this bundle takes none; leave them out"
            )
        latents = self.sampler(
            batch,
            seeds=seeds,
            num_inference_steps=num_inference_steps,
            eta=eta,
            guidance_scale=scales,
            guidance_rescale=guidance_rescale,
            size=latent_size,
            uncond_kwargs=uncond,
            **conditions,
        )
        images: Array = self._sessions[DECODER].run(["images"], {"latents": latents})[0]
        return images

    def tokenize(self, prompts: Sequence[str]) -> Ids:
        """`input_ids` of texts, with the bundle's tokenizers: an array, or for SDXL a pair. Needs transformers, no torch.

        Raises:
            ImportError: transformers is not installed.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError("transformers is missing; pip install transformers, or pass input_ids") from error
        ids = []
        for encoder in self._encoders:
            tokenizer = AutoTokenizer.from_pretrained(self.bundle.path / encoder.replace("text_encoder", "tokenizer"))
            (item,) = self.bundle.components[encoder]["inputs"]
            given = tokenizer(
                [_expanded(text, tokenizer) for text in prompts],
                padding="max_length",
                max_length=item["shape"][1],
                truncation=True,
            )
            ids.append(np.array(given.input_ids, dtype=np.int64))
        return ids[0] if len(ids) == 1 else ids

    def _encode(self, argument: str, ids: Ids, batch: int | None = None) -> dict[str, Any]:
        count = len(self._encoders)
        given = [ids] if isinstance(ids, np.ndarray) else list(ids)
        if len(given) != count:
            raise ValueError(
                f"{argument}: {len(given)} arrays; pass {'one' if count == 1 else 'a pair'}, of {', '.join(self._encoders)}"
            )
        states = []
        encoded: dict[str, Any] = {}
        for name, array in zip(self._encoders, given, strict=True):
            (item,) = self.bundle.components[name]["inputs"]
            fitted = fit_array(argument, array, item, batch)
            batch = len(fitted)
            names = [output["name"] for output in self.bundle.components[name]["outputs"]]
            encoded |= dict(zip(names, self._sessions[name].run(names, {item["name"]: fitted}), strict=True))
            states.append(encoded["encoder_hidden_states"])
        encoded["encoder_hidden_states"] = np.concatenate(states, axis=-1)
        return encoded

    def _uncond(self, ids: Ids | None, conditions: dict[str, Any]) -> dict[str, Any]:
        if ids is not None:
            return self._encode("negative_input_ids", ids, len(conditions["encoder_hidden_states"]))
        if not self.zeros_for_empty_prompt:
            raise ValueError("negative_input_ids: None; pass the ids of the negative prompts, which may be empty")
        return {name: np.zeros_like(value) for name, value in conditions.items()}

    def _sizes(self, size: tuple[int, int] | None) -> tuple[tuple[int, int] | None, tuple[int, int]]:
        """The latents' size, and the pictures'."""
        upscale = self.bundle.components[DECODER]["upscale"]
        own = tuple(side * upscale for side in self.bundle.manifest["sample"]["shape"][-2:])
        if size is None or tuple(size) == own:
            return None, own
        if not self.bundle.any_size:
            raise ValueError(f"size: {tuple(size)}; this bundle makes pictures of {own} alone")
        height, width = size
        if height < 1 or width < 1 or height % upscale or width % upscale:
            raise ValueError(f"size: {tuple(size)}; pass a height and width that are multiples of {upscale}")
        return (height // upscale, width // upscale), (height, width)


def _expanded(prompt: str, tokenizer: Any) -> str:
    """A prompt with all tokens of each textual inversion of several vectors: `<a>`, then `<a>_1`, `<a>_2`, ..."""
    added = tokenizer.added_tokens_encoder
    for token in {*tokenizer.tokenize(prompt)} & {*added}:
        following = itertools.takewhile(added.__contains__, (f"{token}_{k}" for k in itertools.count(1)))
        prompt = prompt.replace(token, " ".join([token, *following]))
    return prompt
