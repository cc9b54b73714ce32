import json
import socket
import warnings
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.latent_diffusion_uncond import pipeline_latent_diffusion_uncond as ldm

from fastddim import DDIMPipeline, DDIMScheduler, Sampler, load_pipeline
from fastddim.noise import STREAM_INITIAL, normal_numpy
from fastddim.pipeline import decode_latents, picture_shape
from unets import small_unet


def image_unet(**options):
    torch.manual_seed(0)
    return small_unet(True, in_channels=3, out_channels=3, attention_head_dim=8, **options).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_pt(images):
    """diffusers' own pipeline gives `[B, H, W, C]` arrays for "pt" in 0.39."""
    return torch.from_numpy(images).permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else images


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"num_inference_steps": 7, "use_clipped_model_output": True}])
@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_the_pictures_are_diffusers(options, output_type):
    unet, scheduler = image_unet(), diffusers.DDIMScheduler(beta_schedule="scaled_linear")
    images = []
    for pipeline in (DDIMPipeline, diffusers.DDIMPipeline):
        generators = [torch.Generator().manual_seed(k) for k in range(2)]
        call = {
            "num_inference_steps": 10,
            "batch_size": 2,
            "generator": generators,
            "output_type": output_type,
            **options,
        }
        images.append(quiet(pipeline(unet, scheduler))(**call).images)
    if output_type == "pt":
        images[1] = as_pt(images[1])
    ours, theirs = (np.stack([np.asarray(image) for image in batch]).astype(np.float64) for batch in images)
    assert type(images[0]) is type(images[1])
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1 if output_type == "pil" else 1e-5)


def test_a_tuple_is_returned_on_request_and_any_ddim_configuration_is_taken():
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    pipe = quiet(DDIMPipeline(image_unet(), scheduler))
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    result = pipe(num_inference_steps=2, output_type="pt", return_dict=False, generator=torch.Generator())
    assert type(result) is tuple
    assert result[0].shape == (1, 3, 8, 8)


def test_class_labels_with_guidance_are_the_written_out_loop():
    unet = image_unet(num_class_embeds=5)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = quiet(DDIMPipeline(unet, scheduler))
    call = {"num_inference_steps": 5, "batch_size": 2, "output_type": "pt"}
    result = pipe(**call, generator=torch.Generator().manual_seed(1), class_labels=[0, 3], guidance_scale=2.5).images
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond = unet(x, t, class_labels=torch.tensor([0, 3])).sample
            uncond = unet(x, t, class_labels=torch.tensor([4, 4])).sample
            x = scheduler.step(uncond + 2.5 * (cond - uncond), t, x).prev_sample
    torch.testing.assert_close(result, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_without_labels_a_class_conditional_model_samples_no_class():
    pipe = quiet(DDIMPipeline(image_unet(num_class_embeds=5), diffusers.DDIMScheduler()))
    call = {"num_inference_steps": 2, "output_type": "pt"}
    unlabelled = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    labelled = pipe(**call, generator=torch.Generator().manual_seed(0), class_labels=[4]).images
    assert torch.equal(unlabelled, labelled)


def test_guidance_with_a_clip_and_raw_epsilon_is_warned_of_once():
    pipe = quiet(DDIMPipeline(image_unet(num_class_embeds=5), diffusers.DDIMScheduler()))
    call = {"num_inference_steps": 1, "output_type": "pt", "class_labels": [1], "guidance_scale": 2.0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        pipe(**call, use_clipped_model_output=True)
        assert not caught
        for _ in range(2):
            pipe(**call)
    assert ["use_clipped_model_output=True" in str(warning.message) for warning in caught] == [True]


def test_a_saved_pipeline_is_a_plain_diffusers_folder(tmp_path):
    pipe = quiet(DDIMPipeline(image_unet(), diffusers.DDIMScheduler()))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert "fastddim" not in json.dumps(index)
    call = {"num_inference_steps": 3, "output_type": "pt"}
    expected = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    stock = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(stock) is diffusers.DDIMPipeline
    assert type(stock.scheduler) is diffusers.DDIMScheduler
    for loaded in (stock, quiet(load_pipeline(tmp_path))):
        images = as_pt(loaded(**call, generator=torch.Generator().manual_seed(0)).images)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_the_embedded_model_is_a_diffusers_folder_too():
    from fastddim.pipeline import EMBEDDED_MODEL

    stock = diffusers.DiffusionPipeline.from_pretrained(EMBEDDED_MODEL)
    assert stock.unet.config.num_class_embeds == 11
    assert stock.unet.dtype == torch.float32
    assert load_pipeline().scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        ({"generator": [torch.Generator()], "batch_size": 2}, ["generator", "1", "2"]),
        ({"output_type": "jpg"}, ["output_type", "'jpg'", "'pil'"]),
        ({"class_labels": [0]}, ["class_labels", "no classes"]),
        ({"guidance_scale": 2.0}, ["guidance_scale", "class_labels"]),
        ({"guidance_scale": None}, ["guidance_scale: None", "number"]),
    ],
)
def test_bad_calls_are_refused(call, parts):
    pipe = quiet(DDIMPipeline(image_unet(), diffusers.DDIMScheduler()))
    with pytest.raises(ValueError) as caught:
        pipe(**call)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("labels", "parts"),
    [([0], ["(1,)", "2"]), ([0, 5], ["[0, 5]", "[0, 4]"]), ([-1, 0], ["-1"]), ([1.7, 0.0], ["1.7", "integers"])],
)
def test_bad_labels_are_refused(labels, parts):
    pipe = quiet(DDIMPipeline(image_unet(num_class_embeds=5), diffusers.DDIMScheduler()))
    with pytest.raises(ValueError, match="class_labels") as caught:
        pipe(batch_size=2, class_labels=labels)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.fixture
def folder(tmp_path):
    DDIMPipeline(image_unet(), diffusers.DDIMScheduler()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_missing_folder_or_file_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.*hub id"):
        load_pipeline(tmp_path / "absent")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"unet.*no weight file"):
        load_pipeline(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        load_pipeline(folder)


def at_the_root(folder):
    """The folder with its files beside the index, as the first ones on the hub are."""
    for part in ("unet", "scheduler"):
        for path in (folder / part).iterdir():
            path.rename(folder / path.name)
        (folder / part).rmdir()


@pytest.mark.parametrize("with_index", [True, False])
def test_files_may_lie_at_the_root(folder, with_index):
    call = {"num_inference_steps": 3, "output_type": "np"}
    expected = quiet(diffusers.DDIMPipeline.from_pretrained(folder))(**call, generator=torch.Generator().manual_seed(0))
    at_the_root(folder)
    if not with_index:
        (folder / "model_index.json").unlink()
    images = quiet(load_pipeline(folder))(**call, generator=torch.Generator().manual_seed(0)).images
    np.testing.assert_allclose(images, expected.images, atol=1e-5)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weight file"):
        load_pipeline(folder)
    (folder / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json|model_index\.json"):
        load_pipeline(folder)


@pytest.mark.parametrize("shard", [None, "30KB"])
def test_the_weights_of_a_variant_are_loaded_by_name(folder, shard):
    unet = load_pipeline(folder).unet
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    unet.half().save_pretrained(folder / "unet", variant="fp16", **({"max_shard_size": shard} if shard else {}))
    assert len(list((folder / "unet").glob("*.safetensors"))) == (1 if shard is None else 4)
    loaded = load_pipeline(folder, variant="fp16").unet.state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in unet.state_dict().items())
    for variant in (None, "ema"):
        with pytest.raises(
            ValueError, match=f"variant: {variant!r}, but .*unet.* has the weights of variant 'fp16'; pass"
        ):
            load_pipeline(folder, variant)
    unet.save_pretrained(folder / "unet")
    for path in (folder / "unet").glob("*.fp16*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"variant: 'fp16', but .*unet' has weights of no variant; leave it out"):
        load_pipeline(folder, "fp16")


def latent_pipeline(**options):
    torch.manual_seed(0)
    vqvae = diffusers.VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=16, latent_channels=3,
    ).eval()  # fmt: skip
    return quiet(diffusers.LDMPipeline(vqvae, image_unet(), diffusers.DDIMScheduler(clip_sample=False, **options)))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_latents_are_decoded_as_diffusers_decodes_them(tmp_path, variant):
    pipe = latent_pipeline()
    pipe.save_pretrained(tmp_path, variant=variant)
    # A part may have no weights of the variant.
    if variant:
        for path in (tmp_path / "vqvae").glob("*.safetensors"):
            path.rename(path.with_name("diffusion_pytorch_model.safetensors"))
    loaded = load_pipeline(tmp_path, variant)
    assert type(loaded) is diffusers.LDMPipeline
    sampler = Sampler(loaded.unet, loaded.scheduler, 3)
    pictures = decode_latents(loaded, sampler(2, seeds=0))
    assert pictures.shape == (2, *picture_shape(loaded, sampler.sample_shape)) == (2, 3, 16, 16)
    start = torch.from_numpy(normal_numpy([0, 1], 0, (3, 8, 8), STREAM_INITIAL))
    with mock.patch.object(ldm, "randn_tensor", return_value=start):
        expected = pipe(batch_size=2, num_inference_steps=3, output_type="np").images
    np.testing.assert_allclose((pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), expected, atol=1e-4)


def test_another_kind_of_pipeline_is_refused_by_name(folder, tmp_path):
    index = folder / "model_index.json"
    values = json.loads(index.read_text())
    for kind in ("StableDiffusionPipeline", "ConsistencyModelPipeline", "ScoreSdeVePipeline", "MyPipeline"):
        index.write_text(json.dumps({**values, "_class_name": kind}))
        with pytest.raises(ValueError, match=f"model: .* is a {kind}; pass one of DDIMPipeline, DDPMPipeline"):
            load_pipeline(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"model: .*model_index\.json' names no class"):
        load_pipeline(folder)
    single = tmp_path / "sd.safetensors"
    single.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"model: .*sd\.safetensors' is a single file; .*from_single_file.*save_pretrained"
    ):
        load_pipeline(single)


@pytest.mark.parametrize("scheduler", [diffusers.FlowMatchEulerDiscreteScheduler, diffusers.CogVideoXDDIMScheduler])
def test_a_scheduler_of_other_levels_is_not_converted(scheduler):
    with pytest.raises(ValueError, match=f"scheduler: {scheduler.__name__} has other noise levels"):
        DDIMPipeline(image_unet(), scheduler())


def test_the_folder_of_such_a_scheduler_is_refused_for_that_reason(folder):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = type(scheduler).__name__
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="cannot be loaded: scheduler: FlowMatchEulerDiscreteScheduler has other noise"
    ):
        load_pipeline(folder)


def test_a_learned_variance_is_left_out():
    unet = image_unet()
    torch.manual_seed(0)
    wide = small_unet(True, in_channels=3, out_channels=6, attention_head_dim=8).eval()
    state = {name: value for name, value in wide.state_dict().items() if not name.startswith("conv_out")}
    unet.load_state_dict(state, strict=False)
    with torch.no_grad():
        unet.conv_out.weight.copy_(wide.conv_out.weight[:3])
        unet.conv_out.bias.copy_(wide.conv_out.bias[:3])
    call = {"num_inference_steps": 3, "output_type": "np"}
    images = quiet(DDIMPipeline(wide, diffusers.DDIMScheduler()))(**call, generator=torch.Generator().manual_seed(0))
    theirs = quiet(diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()))
    expected = theirs(**call, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(images.images, expected.images, atol=1e-4)


def test_damaged_weights_are_refused(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not safetensors at all"):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="model"):
            load_pipeline(folder)


def test_weights_of_another_configuration_are_refused(folder):
    config = folder / "unet" / "config.json"
    values = json.loads(config.read_text())
    values["block_out_channels"] = [16, 32]
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="model"):
        load_pipeline(folder)


def test_a_folder_that_names_our_module_for_its_scheduler_loads(tmp_path):
    load_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    index["scheduler"] = ["fastddim.scheduler", "DDIMScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded, plain = load_pipeline(tmp_path), load_pipeline()
    assert type(loaded) is type(plain) and loaded.scheduler.config.beta_schedule == plain.scheduler.config.beta_schedule
    for name, weight in plain.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], weight)
