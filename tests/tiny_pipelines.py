"""Pipelines of diffusers of the smallest networks, with random weights, and calls for them."""

import copy
import functools
import inspect

import diffusers
import torch
import transformers

import fastddim
from unets import small_unet


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tamed(model, last):
    """Random weights whose loop is no chaos, in float64: what is compared is the loop, not how rounding grows."""
    with torch.no_grad():
        last(model).weight.mul_(0.1)
    return model.double().eval()


@functools.cache
def image_unet(num_class_embeds=None):
    torch.manual_seed(0)
    unet = small_unet(True, in_channels=3, out_channels=3, attention_head_dim=8, num_class_embeds=num_class_embeds)
    return tamed(unet, lambda model: model.conv_out)


@functools.cache
def text_unet(seed=0, **options):
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        **options,
    )
    return tamed(unet, lambda model: model.conv_out)


@functools.cache
def transformer(out_channels):
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=out_channels,
        num_layers=1,
        sample_size=8,
    )
    return tamed(model, lambda model: model.proj_out_2)


@functools.cache
def vae():
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8).double().eval()


def scheduler(defaults, options):
    return diffusers.DDIMScheduler(**{**defaults, **options})


LATENT = {"clip_sample": False, "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1}
PROMPT = {"prompt_embeds": randn((2, 3, 8), 0), "negative_prompt_embeds": randn((2, 3, 8), 1)}
POOLED = {"pooled_prompt_embeds": randn((2, 8), 2), "negative_pooled_prompt_embeds": randn((2, 8), 3)}
PICTURES = {"image": randn((2, 3, 8, 8), 4).sigmoid(), "strength": 0.6}


def make_ddim(**options):
    return diffusers.DDIMPipeline(image_unet(), scheduler({}, options)), {"batch_size": 2, "output_type": "pt"}


def make_ours(**options):
    pipe = fastddim.DDIMPipeline(image_unet(5), scheduler({}, options))
    return pipe, {"batch_size": 2, "output_type": "pt", "class_labels": [0, 3]}


def make_dit(out_channels=8, **options):
    pipe = diffusers.DiTPipeline(transformer(out_channels), vae(), scheduler({"clip_sample": False}, options))
    return pipe, {"class_labels": [1, 7], "output_type": "pt"}


def make_sd(pipeline=diffusers.StableDiffusionPipeline, extra=(), unet=None, **options):
    parts = (vae(), None, None, unet or text_unet(), scheduler(LATENT, options), None, None)
    pipe = pipeline(*parts, requires_safety_checker=False)
    return pipe, {**PROMPT, "output_type": "latent", **dict(extra)}


def make_sd_img2img(**options):
    return make_sd(diffusers.StableDiffusionImg2ImgPipeline, PICTURES, **options)


def make_sdxl(pipeline=diffusers.StableDiffusionXLPipeline, extra=(), **options):
    unet = text_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=4 * 6 + 8
    )
    parts = (vae(), None, None, None, None, unet, scheduler(LATENT, options))
    return pipeline(*parts, add_watermarker=False), {**PROMPT, **POOLED, "output_type": "latent", **dict(extra)}


def make_sdxl_img2img(**options):
    # One time id fewer than a refiner's.
    pipe, call = make_sdxl(diffusers.StableDiffusionXLImg2ImgPipeline, PICTURES, **options)
    pipe.register_to_config(requires_aesthetics_score=False)
    return pipe, call


@functools.cache
def sd3_transformer(channels=4):
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=channels, out_channels=channels, num_layers=1, attention_head_dim=4,
        num_attention_heads=2, caption_projection_dim=8, joint_attention_dim=8, pooled_projection_dim=8,
        pos_embed_max_size=8,
    )  # fmt: skip
    return tamed(model, lambda model: model.proj_out)


@functools.cache
def flux_transformer(**options):
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        **{"in_channels": 16, **options}, patch_size=1, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    return tamed(model, lambda model: model.proj_out)


def make_sd3():
    pipe = diffusers.StableDiffusion3Pipeline(
        sd3_transformer(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae(), *[None] * 6
    )
    return pipe, {**PROMPT, **POOLED, "height": 8, "width": 8, "output_type": "latent"}


def make_flux():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(scheduler, vae(), None, None, None, None, flux_transformer())
    embeds = {
        name: PROMPT[name] if name in PROMPT else POOLED[name] for name in ("prompt_embeds", "pooled_prompt_embeds")
    }
    return pipe, {**embeds, "height": 16, "width": 16, "output_type": "latent"}


MAKERS = {
    "ddim": make_ddim,
    "ours": make_ours,
    "sd": make_sd,
    "sd_img2img": make_sd_img2img,
    "sdxl": make_sdxl,
    "sdxl_img2img": make_sdxl_img2img,
    "dit": make_dit,
}
TEXT = ("sd", "sd_img2img", "sdxl", "sdxl_img2img")
WITH_ETA = ("ddim", "ours", *TEXT)


def make(name, **options):
    pipe, call = MAKERS[name](**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"num_inference_steps": 4, **call}


# Pipelines by the parts that they are made of.


@functools.cache
def network(kind, last=None, dtype=torch.float64, **options):
    """A model: zeros that training would start from are random, and what its `last` layer gives is small."""
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**options).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, 0.1)
        if last is not None:
            model.get_submodule(last).weight.mul_(0.1)
    return model


def assemble(pipeline, **parts):
    """A pipeline, whose other parts are None."""
    kind = getattr(diffusers, pipeline)
    needed = [
        name
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if parameter.default is parameter.empty and name != "self"
    ]
    options = {"requires_safety_checker": False, "add_watermarker": False}
    options = {name: value for name, value in options.items() if name in inspect.signature(kind.__init__).parameters}
    return kind(**{**dict.fromkeys(needed), **options, **parts})


MASK = (randn((2, 1, 8, 8), 6) > 0).double()
IMAGE = randn((2, 3, 8, 8), 4).sigmoid()
CONTROL = randn((2, 3, 8, 8), 7).sigmoid()
LEVELS = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8,
}  # fmt: skip
TIME_IDS = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 4 * 6 + 8,
}  # fmt: skip


def controlnet(**options):
    return network(
        "ControlNetModel", down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        conditioning_embedding_out_channels=(4,), **LEVELS, **options,
    )  # fmt: skip


def text_pipeline(pipeline, unet=None, parts=(), **call):
    """One of Stable Diffusion's kind, which is given its prompts' embeddings."""
    own = {"vae": vae(), "unet": unet or text_unet(), "scheduler": scheduler(LATENT, {})}
    pipe = assemble(pipeline, **{**own, **dict(parts)})
    return pipe, {**PROMPT, "output_type": "latent", **call}


def sdxl_pipeline(pipeline, unet=None, parts=(), refiner=False, **call):
    # A refiner has one time id fewer.
    unet = unet or text_unet(**{**TIME_IDS, "projection_class_embeddings_input_dim": 4 * (5 if refiner else 6) + 8})
    pipe, call = text_pipeline(pipeline, unet, parts, **POOLED, **call)
    if "requires_aesthetics_score" in pipe.config:
        pipe.register_to_config(requires_aesthetics_score=refiner)
    return pipe, call


def unclip_unet():
    return text_unet(class_embed_type="projection", projection_class_embeddings_input_dim=16)


def unclip_parts():
    module = diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer
    torch.manual_seed(0)
    return {
        "image_normalizer": module.StableUnCLIPImageNormalizer(embedding_dim=8).double(),
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }


@functools.cache
def tokenizer():
    tokens = [chr(k) + end for end in ("", "</w>") for k in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: k for k, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)


@functools.cache
def text_encoder(projection=False):
    torch.manual_seed(0)
    size = len(tokenizer())
    config = transformers.CLIPTextConfig(
        vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=8, bos_token_id=size - 2, eos_token_id=size - 1,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).double().eval()


def make_unclip():
    prior = network(
        "PriorTransformer", num_attention_heads=2, attention_head_dim=4, embedding_dim=8, num_layers=1, num_embeddings=8,
        additional_embeddings=4,
    )  # fmt: skip
    prior_scheduler = diffusers.DDPMScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0,
        beta_schedule="squaredcos_cap_v2",
    )  # fmt: skip
    parts = {
        "prior": prior, "prior_scheduler": prior_scheduler, "prior_tokenizer": tokenizer(),
        "prior_text_encoder": text_encoder(projection=True), "tokenizer": tokenizer(), "text_encoder": text_encoder(),
        **unclip_parts(),
    }  # fmt: skip
    pipe, _ = text_pipeline("StableUnCLIPPipeline", unclip_unet(), parts)
    return pipe, {"prompt": ["a cat", "a dog"], "prior_num_inference_steps": 3, "output_type": "latent"}


def make_unclip_img2img():
    call = {"image_embeds": randn((2, 8), 8), "noise_level": 10}
    # Its embeddings are of the picture that is varied.
    parts = {**unclip_parts(), "image_encoder": text_encoder(), "feature_extractor": None}
    return text_pipeline("StableUnCLIPImg2ImgPipeline", unclip_unet(), parts, **call)


def make_marigold():
    parts = {"vae": vae(), "unet": text_unet(in_channels=8), "text_encoder": text_encoder(), "tokenizer": tokenizer()}
    options = {"prediction_type": "depth", "scale_invariant": True, "shift_invariant": True}
    pipe = assemble(
        "MarigoldDepthPipeline", scheduler=scheduler(LATENT, {"prediction_type": "v_prediction"}), **parts, **options
    )
    return pipe, {"image": IMAGE, "processing_resolution": 0, "output_type": "pt"}


def motion_unet():
    adapter = network(
        "MotionAdapter", block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4,
        motion_num_attention_heads=2, motion_max_seq_length=4,
    )  # fmt: skip
    return adapter


def make_animatediff(pipeline="AnimateDiffPipeline", **call):
    embeds = {name: value[:1] for name, value in PROMPT.items()}
    pipe, call = text_pipeline(pipeline, parts={"motion_adapter": motion_unet()}, **call)
    with torch.no_grad():
        # Its last layers start from zeros.
        for parameter in pipe.unet.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    pipe.unet.double().eval()
    return pipe, {**call, **embeds}


def make_ldm():
    # It draws its latents in float32.
    vqvae = network(
        "VQModel",
        dtype=torch.float32,
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=2,
    )
    unet = copy.deepcopy(image_unet()).float()
    pipe = assemble("LDMPipeline", vqvae=vqvae, unet=unet, scheduler=scheduler({"clip_sample": False}, {}))
    return pipe, {"batch_size": 2, "output_type": "np"}


def make_ldm_super_resolution():
    vqvae = network("VQModel", block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    torch.manual_seed(0)
    unet = tamed(small_unet(True, in_channels=6, out_channels=3, attention_head_dim=8), lambda model: model.conv_out)
    pipe = assemble("LDMSuperResolutionPipeline", vqvae=vqvae, unet=unet, scheduler=scheduler(LATENT, {}))
    return pipe, {"image": IMAGE.clone(), "output_type": "np"}


def make_audioldm2():
    unet = network(
        "AudioLDM2UNet2DConditionModel", "conv_out", sample_size=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        **{**LEVELS, "cross_attention_dim": (8, 8)},
    )  # fmt: skip
    torch.manual_seed(0)
    vocoder = transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8, upsample_initial_channel=8, upsample_rates=[2], upsample_kernel_sizes=[4],
            resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]], normalize_before=False,
        )
    )  # fmt: skip
    audio_vae = network("AutoencoderKL", in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    pipe = assemble(
        "AudioLDM2Pipeline", vae=audio_vae, unet=unet, scheduler=scheduler(LATENT, {}), vocoder=vocoder.double(),
        text_encoder=text_encoder(), text_encoder_2=text_encoder(), language_model=text_encoder(),
        projection_model=network("AudioLDM2ProjectionModel", text_encoder_dim=8, text_encoder_1_dim=8, langauge_model_dim=8),
    )  # fmt: skip
    mask = {"attention_mask": torch.ones(2, 3), "negative_attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    generated = {
        "generated_prompt_embeds": randn((2, 4, 8), 2),
        "negative_generated_prompt_embeds": randn((2, 4, 8), 3),
    }
    return pipe, {**PROMPT, **mask, **generated, "audio_length_in_s": 0.002, "output_type": "latent"}


def pixart_transformer(kind="PixArtTransformer2DModel", **options):
    return network(
        kind, "proj_out", sample_size=8, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=2,
        caption_channels=8, in_channels=4, cross_attention_dim=8, out_channels=8, attention_bias=True,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, **options,
    )  # fmt: skip


MASKS = {
    "prompt_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "negative_prompt_attention_mask": torch.tensor([[1, 0, 0], [1, 0, 0]]),
}


def make_pixart(pipeline="PixArtSigmaPipeline"):
    transformer = pixart_transformer()
    pipe = assemble(pipeline, vae=vae(), transformer=transformer, scheduler=scheduler({"clip_sample": False}, {}))
    size = {"height": 8, "width": 8, "use_resolution_binning": False}
    return pipe, {**PROMPT, **MASKS, **size, "negative_prompt": None, "output_type": "latent"}


def make_latte():
    transformer = pixart_transformer("LatteTransformer3DModel", video_length=2)
    pipe = assemble(
        "LattePipeline", vae=vae(), transformer=transformer, scheduler=scheduler({"clip_sample": False}, {})
    )
    embeds = {name: value[:1] for name, value in PROMPT.items()}
    size = {"height": 8, "width": 8, "video_length": 2}
    return pipe, {**embeds, **size, "negative_prompt": None, "mask_feature": False, "output_type": "latent"}


def make_hunyuan():
    transformer = network(
        "HunyuanDiT2DModel", "proj_out", sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=8, hidden_size=16,
        activation_fn="gelu-approximate", text_len=3, text_len_t5=3,
    )  # fmt: skip
    pipe = assemble("HunyuanDiTPipeline", vae=vae(), transformer=transformer, scheduler=scheduler(LATENT, {}))
    second = {f"{name}_2": randn((2, 3, 8), 5) for name in PROMPT}
    masks = {**MASKS, **{f"{name}_2": value for name, value in MASKS.items()}}
    size = {"height": 16, "width": 16, "use_resolution_binning": False}
    return pipe, {**PROMPT, **second, **masks, **size, "output_type": "latent"}


def make_svd():
    unet = network(
        "UNetSpatioTemporalConditionModel", "conv_out", torch.float32, sample_size=8, in_channels=8, out_channels=4,
        block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=8,
        num_attention_heads=2, projection_class_embeddings_input_dim=12, addition_time_embed_dim=4,
)  # fmt: skip
    video_vae = network(
        "AutoencoderKLTemporalDecoder",
        dtype=torch.float32,
        block_out_channels=(32,),
        down_block_types=("DownEncoderBlock2D",),
    )
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=8, projection_dim=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, intermediate_size=8,
        patch_size=8,
    )  # fmt: skip
    euler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0, steps_offset=1,
        timestep_spacing="leading", timestep_type="continuous",
    )  # fmt: skip
    pipe = assemble(
        "StableVideoDiffusionPipeline", unet=unet, vae=video_vae, scheduler=euler,
        image_encoder=transformers.CLIPVisionModelWithProjection(config).eval(),
        feature_extractor=transformers.CLIPImageProcessor(crop_size=8, size=8),
    )  # fmt: skip
    picture = {"image": IMAGE[:1].float(), "height": 8, "width": 8, "num_frames": 2}
    return pipe, {**picture, "output_type": "latent", "max_guidance_scale": 2.5}


def make_upscale():
    unet = text_unet(in_channels=7, num_class_embeds=400)
    parts = {"low_res_scheduler": diffusers.DDPMScheduler()}
    return text_pipeline("StableDiffusionUpscalePipeline", unet, parts, image=IMAGE)


def make_cycle():
    parts = {"tokenizer": tokenizer(), "text_encoder": text_encoder()}
    pipe, _ = text_pipeline("CycleDiffusionPipeline", parts=parts)
    return pipe, {
        "prompt": "a cat",
        "source_prompt": "fog",
        "image": IMAGE[:1],
        "strength": 0.7,
        "eta": 0.1,
        "output_type": "latent",
    }


def make_ldm3d():
    picture_and_depth = network(
        "AutoencoderKL", in_channels=6, out_channels=6, block_out_channels=(8,), norm_num_groups=4, sample_size=8
    )
    return text_pipeline("StableDiffusionLDM3DPipeline", parts={"vae": picture_and_depth}, output_type="np")


def flow_pipeline(pipeline, **call):
    """Stable Diffusion 3 or FLUX, with what its pipeline asks for beside prompts."""
    is_flux = pipeline.startswith("Flux")
    pipe, own = make_flux() if is_flux else make_sd3()
    # Stable Diffusion 3's pipeline for inpainting has 16 channels.
    channels = 16 if pipeline == "StableDiffusion3InpaintPipeline" else 4
    parts = {
        "transformer": pipe.transformer if channels == 4 else sd3_transformer(channels),
        "vae": network(
            "AutoencoderKL", block_out_channels=(8,), norm_num_groups=4, sample_size=8, shift_factor=0.1,
            latent_channels=channels,
        ),
        "scheduler": pipe.scheduler,
    }  # fmt: skip
    if "Fill" in pipeline or "ControlPipeline" in pipeline:
        channels = {"FluxFillPipeline": 16 + 16 + 4, "FluxControlPipeline": 32}[pipeline]
        parts["transformer"] = flux_transformer(in_channels=channels, out_channels=16)
    if "ControlNet" in pipeline:
        parts["controlnet"] = flux_controlnet() if is_flux else sd3_controlnet()
    return assemble(pipeline, **parts), {**own, **call}


def sd3_controlnet():
    return network(
        "SD3ControlNetModel", sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4,
        num_attention_heads=2, caption_projection_dim=8, joint_attention_dim=8, pooled_projection_dim=8,
        pos_embed_max_size=8, out_channels=4,
    )  # fmt: skip


def flux_controlnet():
    return network(
        "FluxControlNetModel", patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )  # fmt: skip


def adapter_parts(several=False):
    kind = {"in_channels": 3, "channels": (8, 16), "num_res_blocks": 1, "downscale_factor": 1}
    adapter = network("T2IAdapter", **kind)
    return {"adapter": diffusers.MultiAdapter([adapter, copy.deepcopy(adapter)]) if several else adapter}


def adapted_unet(**options):
    """With the block that does not sample down as the last, as adapters have it."""
    return network(
        "UNet2DConditionModel", "conv_out", sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4, **LEVELS, **options,
    )  # fmt: skip


def make_depth2img():
    return text_pipeline(
        "StableDiffusionDepth2ImgPipeline",
        text_unet(in_channels=5),
        image=IMAGE,
        depth_map=randn((2, 8, 8), 5),
        strength=0.8,
    )


def flow_scheduler():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def make_cogvideox():
    transformer = network(
        "CogVideoXTransformer3DModel", "proj_out", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=2, text_embed_dim=8, num_layers=1, sample_width=4, sample_height=4, sample_frames=5,
        max_text_seq_length=3,
    )  # fmt: skip
    video_vae = network(
        "AutoencoderKLCogVideoX", down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(2, 2, 2, 2), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    pipe = assemble("CogVideoXPipeline", transformer=transformer, vae=video_vae, scheduler=scheduler(LATENT, {}))
    return pipe, {**PROMPT, "height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}


def make_wan(dtype=torch.float64):
    transformer = network(
        "WanTransformer3DModel", "proj_out", dtype, patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=12,
        in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=8, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    video_vae = diffusers.AutoencoderKLWan(base_dim=2, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).double()
    pipe = assemble("WanPipeline", transformer=transformer, vae=video_vae, scheduler=flow_scheduler())
    return pipe, {**PROMPT, "height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}


def make_ltx():
    transformer = network(
        "LTXVideoTransformer3DModel", "proj_out", in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=4,
        cross_attention_dim=8, num_layers=1, caption_channels=8,
    )  # fmt: skip
    blocks = {f"{name}block_out_channels": (2, 2, 2, 2) for name in ("", "decoder_")}
    layers = {f"{name}layers_per_block": (1,) * 5 for name in ("", "decoder_")}
    video_vae = network("AutoencoderKLLTXVideo", latent_channels=8, **blocks, **layers)
    pipe = assemble("LTXPipeline", transformer=transformer, vae=video_vae, scheduler=flow_scheduler())
    return pipe, {**PROMPT, **MASKS, "height": 32, "width": 32, "num_frames": 9, "output_type": "latent"}


def make_sana():
    transformer = network(
        "SanaTransformer2DModel", "proj_out", patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=8, sample_size=32,
    )  # fmt: skip
    blocks = {f"{name}_block_types": ("ResBlock", "ResBlock") for name in ("encoder", "decoder")}
    channels = {f"{name}_block_out_channels": (8, 8) for name in ("encoder", "decoder")}
    layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    scales = {f"{name}_qkv_multiscales": ((), ()) for name in ("encoder", "decoder")}
    deep_vae = network("AutoencoderDC", latent_channels=4, **blocks, **channels, **layers, **scales)
    pipe = assemble("SanaPipeline", transformer=transformer, vae=deep_vae, scheduler=flow_scheduler())
    size = {"height": 32, "width": 32, "use_resolution_binning": False}
    return pipe, {**PROMPT, **MASKS, **size, "negative_prompt": None, "output_type": "latent"}


def make_auraflow():
    transformer = network(
        "AuraFlowTransformer2DModel", "proj_out", sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=4, num_attention_heads=2, caption_projection_dim=8,
        joint_attention_dim=8, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    pipe = assemble("AuraFlowPipeline", transformer=transformer, vae=vae(), scheduler=flow_scheduler())
    return pipe, {**PROMPT, **MASKS, "height": 8, "width": 8, "output_type": "latent"}


def make_lcm():
    lcm = diffusers.LCMScheduler.from_config(LATENT)
    pipe, call = text_pipeline(
        "LatentConsistencyModelPipeline", text_unet(time_cond_proj_dim=6), {"scheduler": lcm}, guidance_scale=4.0
    )
    return pipe, {name: value for name, value in call.items() if name != "negative_prompt_embeds"}
