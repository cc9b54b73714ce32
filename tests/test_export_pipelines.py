"""Bundles of whole pipelines, from token ids to pictures, against the diffusers pipelines' own calls."""

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys

import diffusers
import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from PIL import Image

from damage import edit
from fastddim.cli import main
from fastddim.export import (
    BundleError,
    ExportOptions,
    OrtPipeline,
    OrtSampler,
    ParityError,
    export_pipeline,
    load_exportable,
    open_bundle,
)
from fastddim.export.bundle import FORMAT
from fastddim.export.onnx import pipeline_exporter
from fastddim.export.sampler_plan import plan_sampler
from fastddim.noise import STREAM_INITIAL, normal
from fastddim.pictures import make_grid

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

VOCABULARY = 60
END = VOCABULARY - 1
KINDS = ("sd", "sdxl")
SCHEDULER = {"clip_sample": False, "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1}


def text_encoder(kind, width):
    torch.manual_seed(width)
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=10, bos_token_id=END - 1, eos_token_id=END, pad_token_id=1,
    )  # fmt: skip
    return kind(config).eval()


def unet(width, levels=2, **options):
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16)[:levels], layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")[:levels], cross_attention_dim=width,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")[-levels:], attention_head_dim=4, **options,
    )  # fmt: skip
    with torch.no_grad():
        model.conv_out.weight.mul_(0.1)
    return model.eval()


def vae(**options):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, **options,
    ).eval()  # fmt: skip


def tokenizer(pad):
    letters = {character: k for k, character in enumerate("!abcdefgh")}
    vocabulary = {**letters, "a</w>": 9, "<|startoftext|>": END - 1, "<|endoftext|>": END}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=77)


@functools.cache
def make(kind):
    if kind == "sd":
        parts = (
            vae(), text_encoder(transformers.CLIPTextModel, 12), tokenizer("<|endoftext|>"), unet(12),
            diffusers.DDIMScheduler(**SCHEDULER), None, None,
        )  # fmt: skip
        pipe = diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)
    else:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 10,
        }
        pipe = diffusers.StableDiffusionXLPipeline(
            # A shift, which SDXL's pipeline knows.
            vae(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.9, 1.0, 1.1, 1.2]),
            text_encoder(transformers.CLIPTextModel, 12),
            text_encoder(transformers.CLIPTextModelWithProjection, 8),
            tokenizer("<|endoftext|>"), tokenizer("!"), unet(20, levels=1, **added), diffusers.DDIMScheduler(**SCHEDULER),
            add_watermarker=False,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder as a user's: a pipeline of any size, what was typed to export it, and what that said."""
    folder = tmp_path_factory.mktemp("shop")
    make("sd").save_pretrained(folder / "pipeline")
    line = [str(folder / "pipeline"), "--parity-steps", "1,4"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["export", "onnx", *line, "--dynamic-size", "--out", str(folder / "bundle")]) == 0
    return folder, line, printed.getvalue()


@pytest.fixture(scope="module")
def exported(shop, tmp_path_factory):
    """The bundle of each kind, written once; that of "sd" has any size."""

    @functools.cache
    def export(kind):
        if kind == "sd":
            return shop[0] / "bundle"
        return export_pipeline(make(kind), tmp_path_factory.mktemp(kind) / "bundle", parity_steps=(1, 4)).path

    return export


PROMPTS = ["ab ca", "fgh"]
NEGATIVE = ["h", ""]


def encode(kind, prompts):
    pipe = make(kind)
    tokenizers = [pipe.tokenizer, pipe.tokenizer_2] if kind == "sdxl" else [pipe.tokenizer]
    ids = [np.array(one(prompts, padding="max_length", max_length=77).input_ids) for one in tokenizers]
    return ids if kind == "sdxl" else ids[0]


def sample_with_diffusers(kind, prompts, negative, seeds, size=(16, 16), scale=5.0, **options):
    latents = normal(seeds, 0, (4, size[0] // 2, size[1] // 2), STREAM_INITIAL)
    images = make(kind)(
        prompts, negative_prompt=negative, latents=latents, height=size[0], width=size[1], num_inference_steps=5,
        guidance_scale=scale, output_type="pt", **options,
    ).images  # fmt: skip
    return (images * 2 - 1).numpy()


@pytest.mark.parametrize("kind", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_pictures_are_the_pipelines_own(exported, kind, batch):
    prompts, negative = PROMPTS[:batch], NEGATIVE[:batch]
    seeds = [7, 2**40][:batch]
    actual = OrtPipeline(exported(kind), "cpu")(
        encode(kind, prompts), encode(kind, negative), seeds=seeds, num_inference_steps=5, guidance_scale=5.0
    )
    expected = sample_with_diffusers(kind, prompts, negative, seeds)
    assert actual.dtype == np.float32 and actual.shape == (batch, 3, 16, 16)
    assert np.abs(expected).max() <= 1 and expected.std() > 0.05
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    # The prompt matters by more than the tolerance.
    other = sample_with_diffusers(kind, negative, prompts, seeds)
    assert np.abs(other - expected).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0])
def test_scales_up_to_one_are_no_guidance_as_in_the_pipeline(exported, kind, scale):
    for negative in (encode(kind, NEGATIVE), None):
        actual = OrtPipeline(exported(kind), "cpu")(
            encode(kind, PROMPTS), negative, seeds=3, num_inference_steps=5, guidance_scale=scale
        )
        expected = sample_with_diffusers(kind, PROMPTS, NEGATIVE, [3, 4], scale=scale)
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.slow
def test_a_textual_inversion_of_several_vectors_has_all_its_tokens(tmp_path):
    make("sd").save_pretrained(tmp_path / "pipeline")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    # The names that diffusers' loader gives to the vectors of two inversions.
    pipe.tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
    pipe.text_encoder.resize_token_embeddings(VOCABULARY + 4)
    bundle = export_pipeline(pipe, tmp_path / "bundle", parity_steps=(1,))
    prompts = ["a <cat> b <dog>", "ab"]
    ids = OrtPipeline(bundle).tokenize(prompts)
    # Ids that a vocabulary with gaps gives are other ones once it is saved.
    saved = transformers.CLIPTokenizer.from_pretrained(bundle.path / "tokenizer")
    converted = pipe.maybe_convert_prompt(prompts, saved)
    assert converted[0] == "a <cat> <cat>_1 <cat>_2 b <dog>"
    expected = saved(converted, padding="max_length", max_length=77).input_ids
    assert ids.tolist() == expected


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(),
        diffusers.PNDMScheduler(skip_prk_steps=True),
        diffusers.DDIMScheduler(clip_sample=True),
    ],
)
def test_old_configurations_are_those_that_diffusers_makes_of_them(tmp_path, scheduler):
    folder = tmp_path / "pipeline"
    make("sd").save_pretrained(folder)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    pipe = load_exportable(folder)
    plan = plan_sampler(pipe.unet, pipe.scheduler, ExportOptions(num_inference_steps=10))
    assert plan.limit is None
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.scheduler.set_timesteps(10)
    assert list(plan.table.timesteps) == theirs.scheduler.timesteps.tolist() and plan.table.timesteps[-1] == 1


def test_sizes_are_free_where_asked_for(exported):
    actual = OrtPipeline(exported("sd"))(
        encode("sd", PROMPTS), encode("sd", NEGATIVE), seeds=3, num_inference_steps=5, guidance_scale=5.0, size=(24, 32)
    )
    expected = sample_with_diffusers("sd", PROMPTS, NEGATIVE, [3, 4], (24, 32))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.slow
def test_a_size_that_a_bundle_does_not_make_is_refused(exported, tmp_path, capsys):
    line = ["run", str(exported("sdxl")), "--prompt", "a", "--size", "24x24", "--out", str(tmp_path / "picture.png")]
    assert main(line) == 2
    assert "size: (24, 24); this bundle makes pictures of (16, 16)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_sdxls_sizes_and_missing_negative_prompts_are_the_pipelines_own(exported):
    sizes = {"original_size": (40, 30), "crops_coords_top_left": (2, 3), "target_size": (20, 10)}
    actual = OrtPipeline(exported("sdxl"))(
        encode("sdxl", PROMPTS), None, seeds=3, num_inference_steps=5, guidance_scale=5.0, **sizes
    )
    expected = sample_with_diffusers("sdxl", PROMPTS, None, [3, 4], **sizes)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.slow
def test_a_pipelines_steps_may_be_in_two_graphs(tmp_path):
    """Of which the first one alone takes texts and sizes."""
    options = ExportOptions(kind="step", hoist=True)
    bundle = export_pipeline(make("sdxl"), tmp_path / "bundle", options, parity_steps=(2,))
    assert bundle.before is not None and "time_ids" not in bundle.names("inputs")
    sizes = {"original_size": (40, 30), "crops_coords_top_left": (2, 3), "target_size": (20, 10)}
    given = {"seeds": 3, "num_inference_steps": 5, "guidance_scale": 5.0, **sizes}
    actual = OrtPipeline(bundle)(encode("sdxl", PROMPTS), None, **given)
    np.testing.assert_allclose(actual, sample_with_diffusers("sdxl", PROMPTS, None, [3, 4], **sizes), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_describes_each_component(exported, kind):
    bundle = open_bundle(exported(kind))
    jsonschema.validate(json.loads((bundle.path / "manifest.json").read_text()), FORMAT.schema())
    encoders = ["text_encoder", "text_encoder_2"][: 1 + (kind == "sdxl")]
    assert list(bundle.components) == [*encoders, "vae_decoder"]
    for name, component in bundle.components.items():
        graph = onnx.load(bundle.component_path(name)).graph
        session = onnxruntime.InferenceSession(bundle.component_path(name))
        for group, values, found in (
            ("inputs", graph.input, session.get_inputs()),
            ("outputs", graph.output, session.get_outputs()),
        ):
            described = component[group]
            assert [item["name"] for item in described] == [value.name for value in values]
            assert [item["shape"] for item in described] == [value.shape for value in found]
            assert all(item["shape"][0] == "batch" and item["meaning"] for item in described)
        measured = [entry for entry in bundle.manifest["parity"] if entry.get("component") == name]
        assert [entry["batch"] for entry in measured] == [1, 3]
        assert f"## {name}" in (bundle.path / "README.md").read_text()
    # The file of names is the library's own to choose; it is loaded, not listed.
    again = transformers.CLIPTokenizer.from_pretrained(bundle.path / "tokenizer")
    assert again(PROMPTS).input_ids == make(kind).tokenizer(PROMPTS).input_ids
    assert "tokenizer/tokenizer_config.json" in bundle.manifest["files"]
    assert bundle.manifest["sampling"]["guided"]


@pytest.mark.slow
def test_a_step_of_half_precision_weights_is_a_pipeline_too(tmp_path):
    bundle = export_pipeline(
        make("sdxl"), tmp_path / "bundle", ExportOptions(kind="step", dtype="float16"), parity_steps=(2,)
    )
    assert next(make("sdxl").unet.parameters()).dtype == torch.float32
    kinds = {
        name: {tensor.data_type for tensor in onnx.load(bundle.component_path(name)).graph.initializer}
        for name in bundle.components
    }
    half = onnx.TensorProto.FLOAT16
    # The decoder's configuration says that float16 overflows there.
    assert half in kinds["text_encoder"] and half not in kinds["vae_decoder"]
    actual = OrtPipeline(bundle)(
        encode("sdxl", PROMPTS), encode("sdxl", NEGATIVE), seeds=[1, 2], num_inference_steps=5, guidance_scale=2.0
    )
    expected = sample_with_diffusers("sdxl", PROMPTS, NEGATIVE, [1, 2], scale=2.0)
    np.testing.assert_allclose(actual, expected, atol=2e-2 * np.ptp(expected))


def test_running_needs_no_torch(exported):
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'diffusers', 'transformers', 'triton', 'onnx'):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np
from fastddim.export import OrtPipeline
ids, negative = np.array({encode("sd", PROMPTS).tolist()}), np.array({encode("sd", NEGATIVE).tolist()})
images = OrtPipeline({str(exported("sd"))!r})(ids, negative, seeds=3, num_inference_steps=5, guidance_scale=5.0)
print(images.astype(np.float64).sum())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = sample_with_diffusers("sd", PROMPTS, NEGATIVE, [3, 4])
    assert float(done.stdout) == pytest.approx(float(expected.astype(np.float64).sum()), abs=expected.size * 1e-5)


DAMAGE = {
    "vae_decoder.onnx' is missing": lambda folder: (folder / "vae_decoder.onnx").unlink(),
    "text_encoder.onnx' has 1 bytes": lambda folder: (folder / "text_encoder.onnx").write_bytes(b"x"),
    "tokenizer_config.json' has 2 bytes": lambda folder: (folder / "tokenizer/tokenizer_config.json").write_text("{}"),
    "has no 'other.onnx'": lambda folder: edit(
        folder, lambda manifest: manifest["components"]["vae_decoder"].update(model="other.onnx")
    ),
    r"\$.components.vae_decoder: 'inputs' is a required": lambda folder: edit(
        folder, lambda manifest: manifest["components"]["vae_decoder"].pop("inputs")
    ),
    "is a sampler alone": lambda folder: edit(folder, lambda manifest: manifest.pop("components")),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_component_is_refused(exported, tmp_path, message):
    folder = shutil.copytree(exported("sd"), tmp_path / "bundle")
    DAMAGE[message](folder)
    with pytest.raises(BundleError, match=message):
        OrtPipeline(folder)


def test_a_flipped_byte_of_a_component_is_refused(exported, tmp_path):
    folder = shutil.copytree(exported("sd"), tmp_path / "bundle")
    content = bytearray((folder / "text_encoder.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "text_encoder.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"text_encoder.onnx' is not the file that was exported"):
        OrtSampler(folder)


BAD_CALLS = {
    "input_ids: 2 arrays; pass one, of text_encoder": {"input_ids": [np.zeros((2, 77), int)] * 2},
    r"input_ids: int64 of shape \(2, 76\); pass int64 of shape": {"input_ids": np.zeros((2, 76), int)},
    "input_ids: float64": {"input_ids": np.zeros((2, 77))},
    r"negative_input_ids: int64 of shape \(1, 77\)": {"negative_input_ids": np.zeros((1, 77), int)},
    "negative_input_ids: None; pass the ids": {"negative_input_ids": None},
    r"size: \(15, 16\); pass a height and width that are multiples of 2": {"size": (15, 16)},
    "target_size: this bundle takes none": {"target_size": (16, 16)},
    "seeds: ": {"seeds": [1, 2, 3]},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_are_named(exported, message):
    arguments = {"input_ids": encode("sd", PROMPTS), "negative_input_ids": encode("sd", NEGATIVE), "seeds": 0}
    with pytest.raises(ValueError, match=message):
        OrtPipeline(exported("sd"))(**{**arguments, **BAD_CALLS[message]})


def with_parts(pipeline=None, **parts):
    pipe = make("sd")
    return (pipeline or type(pipe))(**{**pipe.components, **parts}, requires_safety_checker=False)


def test_pipelines_that_cannot_be_exported_are_named(tmp_path):
    out = tmp_path / "bundle"
    other = with_parts(diffusers.StableDiffusionImg2ImgPipeline)
    with pytest.raises(
        TypeError, match=r"StableDiffusionImg2ImgPipeline .*one of StableDiffusionPipeline, StableDiffusionXLPipeline"
    ):
        export_pipeline(other, out)
    with pytest.raises(ValueError, match=r"its text_encoder is NoneType; only CLIPTextModel or"):
        export_pipeline(with_parts(text_encoder=None), out)
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        export_pipeline(with_parts(unet=unet(12, time_cond_proj_dim=8)), out)
    with pytest.raises(ValueError, match=r"its unet takes mask, masked_image_latents beside texts.*export_onnx"):
        export_pipeline(with_parts(unet=unet(12, in_channels=9)), out)
    with pytest.raises(ValueError, match=r"its unet takes class_labels beside texts.*export_onnx"):
        export_pipeline(with_parts(unet=unet(12, num_class_embeds=5)), out)
    with pytest.raises(FileExistsError, match="--force"):
        export_pipeline(make("sd"), tmp_path)
    assert os.listdir(tmp_path) == []


def test_folders_that_cannot_be_exported_are_named(tmp_path):
    make("sd").save_pretrained(tmp_path, variant="fp16")
    for variant in (None, "ema"):
        with pytest.raises(
            ValueError, match=rf"variant: {variant!r}, but .* has the weights of variant 'fp16'; pass that"
        ):
            load_exportable(tmp_path, variant)
    edit(tmp_path, lambda index: index.update(_class_name="StableDiffusionImg2ImgPipeline"), "model_index.json")
    named = r"is a StableDiffusionImg2ImgPipeline; pass one of DDIMPipeline, .*StableDiffusionPipeline, .*export_onnx\("
    with pytest.raises(ValueError, match=named):
        load_exportable(tmp_path)


@pytest.mark.slow
def test_a_component_that_differs_from_torch_is_not_written(tmp_path, monkeypatch):
    real = pipeline_exporter.to_graph

    def shifted(*arguments, **options):
        graph = real(*arguments, **options)
        # Twice the encoder's states.
        node = next(node for node in graph.graph.node if "encoder_hidden_states" in node.output)
        node.output[:] = ["half" if name == "encoder_hidden_states" else name for name in node.output]
        graph.graph.node.append(onnx.helper.make_node("Add", ["half", "half"], ["encoder_hidden_states"]))
        return graph

    monkeypatch.setattr(pipeline_exporter, "to_graph", shifted)
    with pytest.raises(ParityError, match=r"differs from torch by .* in text_encoder, a batch of 1 of \(77,\)"):
        export_pipeline(make("sd"), tmp_path / "bundle", parity_steps=())
    assert os.listdir(tmp_path) == []


def test_texts_to_pictures_from_the_shell(shop, tmp_path, capsys):
    """The commands as a user types them, from a diffusers folder to a picture."""
    folder, line, told = shop
    bundle, picture = folder / "bundle", tmp_path / "pictures.png"
    assert "text_encoder: largest difference from torch" in told and "vae_decoder: largest" in told
    assert main(["verify", str(bundle), *line]) == 0
    assert capsys.readouterr().out.count("largest difference from torch") == told.count("largest difference")
    run = ["run", str(bundle), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--steps", "5", "--seed", "3"]
    assert main([*run, "--guidance-scale", "5", "--out", str(picture)]) == 0
    expected = make_grid(sample_with_diffusers("sd", PROMPTS, ["", ""], [3, 4]))
    drawn = Image.open(picture)
    assert drawn.size == expected.size
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    bad = {
        "--prompt: this bundle makes pictures of texts": ["run", str(bundle)],
        "no --labels": [*run, "--labels", "1"],
        "size: 15x; pass height and width": [*run, "--size", "15x"],
        "--parity-steps: 'two'": ["export", "onnx", *line[:-1], "two", "--out", str(tmp_path / "other")],
    }
    for message, arguments in bad.items():
        capsys.readouterr()
        assert main(arguments) == 2, message
        assert message in " ".join(capsys.readouterr().err.replace("'15x'", "15x").split())
    assert sorted(os.listdir(tmp_path)) == ["pictures.png"]


@pytest.mark.slow
def test_the_sampler_alone_of_a_pipelines_folder(tmp_path, capsys):
    make("sdxl").save_pretrained(tmp_path / "pipeline")
    arguments = ["export", "onnx", str(tmp_path / "pipeline"), "--sampler-only", "--parity-steps", "1"]
    assert main([*arguments, "--out", str(tmp_path / "bundle")]) == 0
    bundle = open_bundle(tmp_path / "bundle")
    assert not bundle.components and "time_ids" in bundle.names("inputs")
    assert main(["run", str(tmp_path / "bundle"), "--prompt", "a"]) == 2
    assert "has no text encoder; leave them out" in capsys.readouterr().err
    with pytest.raises(BundleError, match="is a sampler alone; pass one of export_pipeline"):
        OrtPipeline(bundle)
