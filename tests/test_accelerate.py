import copy
import functools
import gc
import inspect
import io
import logging
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.models.attention_processor import AttnProcessor

import fastddim
from fastddim import accelerate, acceleration, unaccelerate
from fastddim.scheduler_rows import Original, StepRows
from tiny_pipelines import (
    LATENT,
    MAKERS,
    TEXT,
    WITH_ETA,
    image_unet,
    make,
    make_flux,
    make_sd,
    make_sd3,
    make_sdxl,
    randn,
    text_unet,
)

GRAPHS = ("off", "step")
# Its unconditional pipelines give arrays for "pt".
DIFFUSERS_039 = diffusers.__version__.startswith("0.39.")
ODDLY_SPACED = {"num_inference_steps": 7}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
THRESHOLD = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def denoiser(pipe):
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def run(pipe, call, seeds=0):
    """A call's pictures, and what its generators draw next."""
    generator = torch.Generator().manual_seed(seeds) if isinstance(seeds, int) else None
    generators = generator or [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipe(**call, generator=generators).images
    if DIFFUSERS_039 and call["output_type"] == "pt":
        images = torch.as_tensor(images)
    drawn = [torch.rand(1, generator=one).item() for one in ([generator] if generator else generators)]
    return images, drawn


def count_captures(pipe):
    return len(pipe._acceleration.captures.graphs)


def log_lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "fastddim"]


def check_same(pipe, call, caplog, *, seeds=0, graphs=GRAPHS, rtol=1e-9, hoist=False):
    """Equal pictures and draws in every mode, by the loop and not by falling back."""
    expected, drawn = run(pipe, call, seeds)
    caplog.clear()
    for graph in graphs:
        assert accelerate(pipe, graph=graph, hoist=hoist) is pipe
        # DiT's arrays of 0.39 are float32.
        least = max(rtol, torch.finfo(expected.dtype).eps) if DIFFUSERS_039 else rtol
        # The first call of a kind goes step by step, and that in parts follows one of the whole model.
        for _ in range(3 if hoist else 2):
            images, drawn_too = run(pipe, call, seeds)
            assert images.dtype == expected.dtype
            error = (images - expected).abs().max().item()
            assert error <= least * expected.abs().max().item(), (graph, error)
            assert drawn_too == drawn
        assert count_captures(pipe) == (graph != "off")
        assert (pipe._acceleration.hoisted_bytes > 0) == hoist
        unaccelerate(pipe)
    assert not log_lines(caplog)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_the_pictures_are_the_pipelines_own(name, steps, caplog):
    pipe, call = make(name)
    if steps == 1 and "strength" in call:
        call["strength"] = 1.0
    check_same(pipe, {**call, "num_inference_steps": steps}, caplog)


@pytest.mark.parametrize(
    "name", ["dit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ours", "sd", "sdxl_img2img"))]
)
def test_the_pictures_are_those_of_a_loop_that_computes_all_of_it(name, caplog):
    pipe, call = make(name)
    check_same(pipe, {**call, "num_inference_steps": 3}, caplog, graphs=("off", "step"), hoist=True)


@pytest.mark.parametrize("name", WITH_ETA)
@pytest.mark.parametrize("seeds", [3, (3, 4)])
def test_the_noise_of_each_step_is_the_pipelines_own(name, seeds, caplog):
    pipe, call = make(name)
    check_same(pipe, {**call, "eta": 0.8}, caplog, seeds=seeds)


def test_a_negative_eta_draws_no_noise_as_before(caplog):
    pipe, call = make("ddim")
    check_same(pipe, {**call, "eta": -0.5, "num_inference_steps": 3}, caplog)


@pytest.mark.filterwarnings("ignore:guidance_scale:UserWarning")
@pytest.mark.parametrize("name", ["ours", *TEXT, "dit"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_is_the_pipelines_own(name, scale, caplog):
    pipe, call = make(name)
    check_same(pipe, {**call, "guidance_scale": scale}, caplog, seeds=(0, 1))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sdxl_img2img"])
def test_rescaled_guidance_is_the_pipelines_own(name, caplog):
    pipe, call = make(name)
    check_same(pipe, {**call, "guidance_scale": 5.0, "guidance_rescale": 0.7}, caplog)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("options", [ZERO_SNR, THRESHOLD, {"clip_sample": True, "clip_sample_range": 0.8}])
def test_the_scheduler_is_the_pipelines_own(name, options, caplog):
    pipe, call = make(name)
    # Stable Diffusion's constructor turns a clip off.
    pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, **options})
    check_same(pipe, {**call, **ODDLY_SPACED}, caplog)


@pytest.mark.parametrize("name", ["ddim", "ours"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_epsilon_may_come_from_the_clipped_x0(name, eta, caplog):
    pipe, call = make(name)
    check_same(pipe, {**call, **ODDLY_SPACED, "eta": eta, "use_clipped_model_output": True}, caplog)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_several_images_per_prompt_from_given_latents(name, caplog):
    pipe, call = make(name)
    latents = randn((4, 4, 8, 8), 9)
    check_same(pipe, {**call, "num_images_per_prompt": 2}, caplog, seeds=range(4))
    check_same(pipe, {**call, "num_images_per_prompt": 2, "latents": latents, "eta": 0.5}, caplog)
    assert torch.equal(latents, randn((4, 4, 8, 8), 9))


@pytest.mark.parametrize("name", ["sd_img2img", "sdxl_img2img"])
@pytest.mark.parametrize(("strength", "steps"), [(1.0, 7), (0.35, 7), (0.9, 20), (0.3, 4)])
def test_an_image_may_be_changed_by_any_strength(name, strength, steps, caplog):
    pipe, call = make(name)
    check_same(pipe, {**call, "strength": strength, "num_inference_steps": steps}, caplog)
    accelerate(pipe)
    run(pipe, {**call, "strength": strength, "num_inference_steps": steps})
    assert pipe.num_timesteps == int(strength * steps)
    assert len(pipe.scheduler.timesteps) == steps


@pytest.mark.parametrize("name", ["ddim", "sd", "sdxl_img2img"])
def test_the_extra_timestep_of_trailing_spacing_is_taken_too(name, caplog):
    pipe, call = make(name, timestep_spacing="trailing")
    if "strength" in call:
        call["strength"] = 1.0
    check_same(pipe, {**call, "num_inference_steps": 61}, caplog, graphs=("off",))
    assert len(pipe.scheduler.timesteps) == 62


@pytest.mark.parametrize("name", ["ddim", "sd"])
def test_timesteps_that_are_no_integers_reach_the_denoiser_as_they_are(name, monkeypatch, caplog):
    """DDIM's own rows, at timesteps a fraction higher, as schedulers of other methods have them."""
    theirs = diffusers.DDIMScheduler
    set_timesteps, step, columns = theirs.set_timesteps, theirs.step, StepRows.columns

    def set_fractions(self, *args, **kwargs):
        set_timesteps(self, *args, **kwargs)
        self.timesteps = self.timesteps.float() + 0.6

    monkeypatch.setattr(theirs, "set_timesteps", set_fractions)

    def step_from_fractions(self, model_output, timestep, sample, **kwargs):
        return step(self, model_output, timestep.long(), sample, **kwargs)

    monkeypatch.setattr(theirs, "step", step_from_fractions)
    monkeypatch.setattr(StepRows, "columns", lambda self, t, *args: columns(self, t.astype(np.int64), *args))
    # A patched step is the scheduler's own.
    monkeypatch.setattr(Original, "runs_in", lambda self, scheduler: True)
    called = []
    pipe, call = make(name)
    handle = denoiser(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: called.append(args[1] if len(args) > 1 else kwargs["timestep"]), with_kwargs=True
    )
    expected, _ = run(pipe, call)
    accelerate(pipe, graph="off")
    images, _ = run(pipe, call)
    handle.remove()
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
    own, accelerated = called[:4], called[4:]
    assert all(t.dtype == torch.float32 and t.flatten()[0] % 1 != 0 for t in called)
    assert [t.flatten()[0] for t in accelerated] == [t.flatten()[0] for t in own] and len(accelerated) == 4
    unaccelerate(pipe)
    check_same(pipe, call, caplog)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("output_type", ["np", "pil", "pt"])
def test_outputs_are_of_every_type(name, output_type):
    pipe, call = make(name)
    call = {**call, "output_type": output_type, "num_inference_steps": 2}
    expected, _ = run(pipe, call)
    images, _ = run(accelerate(pipe), call)
    assert type(images) is type(expected)
    for one, other in zip(images, expected, strict=True):
        assert type(one) is type(other)
        difference = np.abs(np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)).max()
        assert difference <= (1 if output_type == "pil" else 1e-6)
    plain = pipe(**call, return_dict=False, generator=torch.Generator().manual_seed(0))
    assert type(plain) is tuple


@pytest.mark.parametrize("name", MAKERS)
def test_other_dtypes_stay(name, caplog):
    pipe, call = make(name)
    # numpy has no bfloat16.
    half = torch.float16 if DIFFUSERS_039 and name == "ddim" else torch.bfloat16
    for dtype, rtol in ((torch.float32, 2e-5), (half, 0.1)):
        mine = copy.deepcopy(pipe).to(dtype)
        given = {
            key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in call.items()
        }
        check_same(mine, given, caplog, graphs=("off",) if dtype == torch.float32 else ("step",), rtol=rtol)


def test_a_prediction_without_variance_is_taken_whole(caplog):
    pipe, call = make("dit", out_channels=4)
    check_same(pipe, {**call, "guidance_scale": 3.0}, caplog)


def test_a_guidance_embedding_is_passed_on(caplog):
    pipe, call = make("sd", unet=text_unet(time_cond_proj_dim=6))
    check_same(pipe, call, caplog)


@pytest.mark.parametrize("name", MAKERS)
def test_the_denoiser_is_called_once_a_step(name):
    pipe, call = make(name)
    calls = []
    handle = denoiser(pipe).register_forward_hook(lambda *given: calls.append(1))
    try:
        run(accelerate(pipe, graph="off"), {**call, "num_inference_steps": 5})
    finally:
        handle.remove()
    assert len(calls) == (3 if "strength" in call else 5)


@pytest.mark.parametrize("name", MAKERS)
def test_what_a_call_leaves_on_the_pipeline_is_the_same(name):
    left = []
    for accelerated in (False, True):
        pipe, call = make(name)
        before = dict(vars(denoiser(pipe)))
        run(accelerate(pipe) if accelerated else pipe, {**call, "num_inference_steps": 5})
        assert vars(denoiser(pipe)) == before
        left.append(pipe)
    plain, ours = left
    assert vars(ours).keys() - vars(plain).keys() == {"_acceleration"}
    for name in vars(plain):
        if name.startswith("_") and name != "_internal_dict":
            assert vars(ours)[name] == vars(plain)[name], name
    assert ours.config == plain.config
    assert torch.equal(ours.scheduler.timesteps, plain.scheduler.timesteps)
    assert vars(ours.scheduler).keys() == vars(plain.scheduler).keys()


@pytest.mark.parametrize("name", ["ddim", "sd", "sd_img2img"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_progress_bar_ends_full(name, graph):
    pipe, call = make(name)
    out = io.StringIO()
    pipe.set_progress_bar_config(file=out, disable=False, mininterval=0)
    run(accelerate(pipe, graph=graph), {**call, "num_inference_steps": 5})
    total = 3 if "strength" in call else 5
    last = out.getvalue().rstrip().rpartition("\r")[2]
    assert f"{total}/{total}" in last and "100%" in last
    assert f"{total - 1}/{total}" in out.getvalue()


@pytest.mark.parametrize("when", ["here", "before"])
def test_an_interrupted_call_stops_where_the_pipelines_own_does(when):
    pipe, call = make("sd")
    results = []
    for accelerated in (False, True):
        calls = []

        def interrupt(*given, calls=calls):
            calls.append(1)
            pipe._interrupt = len(calls) == 2

        if when == "before":
            pipe._interrupt = True  # of an earlier call
        handle = pipe.unet.register_forward_hook(interrupt if when == "here" else lambda *given: None)
        try:
            results.append(run(accelerate(pipe, graph="off") if accelerated else pipe, call)[0])
        finally:
            handle.remove()
        assert len(calls) == (2 if when == "here" else 0)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_calls_tensors_are_free_at_its_end():
    pipe, call = make("sd")
    accelerate(pipe, graph="off")
    seen = []

    def look(module, args, kwargs):
        seen.append(weakref.ref(kwargs["encoder_hidden_states"]))

    handle = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    gc.collect()
    gc.disable()
    try:
        run(pipe, call)
        assert len(seen) == 4 and all(one() is None for one in seen)
    finally:
        gc.enable()
        handle.remove()


def test_prompts_are_the_pipelines_own(caplog):
    tokens = [chr(k) + end for end in ("", "</w>") for k in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: k for k, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    pipe, _ = make("sd")
    pipe.tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
    torch.manual_seed(0)
    pipe.text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=len(vocabulary) - 2,
            eos_token_id=len(vocabulary) - 1,
        )
    ).double()
    call = {"prompt": ["a cat", "a dog"], "negative_prompt": ["fog", ""], "num_inference_steps": 3, "output_type": "pt"}
    check_same(pipe, call, caplog)
    check_same(pipe, {**call, "guidance_scale": 1.0}, caplog)


@pytest.mark.slow
def test_a_compiled_denoiser_is_called_as_it_is(caplog):
    pipe, call = make("ddim")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    check_same(pipe, call, caplog)


def own_call(pipe):
    class Derived(type(pipe)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe.__class__ = Derived


def own_timesteps(pipe):
    class Derived(type(pipe)):
        def get_timesteps(self, *args, **kwargs):
            return super().get_timesteps(*args, **kwargs)

    pipe.__class__ = Derived


def offload(pipe):
    pipe._all_hooks = [object()]
    pipe.maybe_free_model_hooks = lambda: None


def hook(pipe):
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipe.unet = add_hook_to_module(copy.deepcopy(pipe.unet), ModelHook())


def patch_forward(pipe):
    pipe.unet = copy.deepcopy(pipe.unet)
    block, forward = pipe.unet.mid_block, pipe.unet.mid_block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def watch(pipe):
    pipe.unet = copy.deepcopy(pipe.unet)
    pipe.unet.mid_block.register_forward_hook(lambda *given: None)


def nothing(pipe):
    pass


class Caller:
    """Callbacks of both kinds, counted."""

    calls = 0

    def on_step_end(self, pipe, step, timestep, tensors):
        Caller.calls += 1
        return {"latents": tensors["latents"] * 0.9}

    def callback(self, step, timestep, latents):
        Caller.calls += 1


HELD = {
    "callback_on_step_end": ("sd", nothing, {"callback_on_step_end": Caller().on_step_end}),
    "callback": ("sd", nothing, {"callback": Caller().callback, "callback_steps": 1}),
    "cross_attention_kwargs": ("sd", nothing, {"cross_attention_kwargs": {}}),
    "denoising_end": ("sdxl", nothing, {"denoising_end": 0.5}),
    "denoising_start": ("sdxl_img2img", nothing, {"denoising_start": 0.5}),
    "own __call__": ("sd", own_call, {}),
    "own get_timesteps": ("sd_img2img", own_timesteps, {}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", HELD)
def test_what_goes_on_between_the_steps_is_the_pipelines_own(case, caplog):
    name, prepare, extra = HELD[case]
    pipe, call = make(name)
    prepare(pipe)
    Caller.calls = 0
    check_same(pipe, {**call, **extra}, caplog)
    assert Caller.calls == (4 * 5 if "callback" in case else 0)


NOT_CAPTURED = {
    "it is offloaded": ("sd", offload),
    "it has hooks for offloading": ("sd", hook),
    "it has a replaced forward": ("ddim", patch_forward),
    "it has forward hooks": ("ddim", watch),
}


@pytest.mark.parametrize("reason", NOT_CAPTURED)
def test_models_that_cannot_be_captured_are_called_as_they_are(reason, caplog):
    name, prepare = NOT_CAPTURED[reason]
    pipe, call = make(name)
    prepare(pipe)
    expected, drawn = run(pipe, call)
    accelerate(pipe, graph="step")
    caplog.clear()
    for _ in range(2):
        images, drawn_too = run(pipe, call)
        torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
        assert drawn_too == drawn
    (line,) = log_lines(caplog)
    assert reason in line and count_captures(pipe) == 0
    assert caplog.records[-1].levelno == logging.WARNING


class CountingProcessor(AttnProcessor):
    """Another picture at every other call, as those that blend or record attention give."""

    calls = 0

    def __call__(self, attn, hidden_states, *args, **kwargs):
        self.calls += 1
        return super().__call__(attn, hidden_states, *args, **kwargs) * (1 + self.calls % 2)


def test_members_may_be_copied_and_set_within_a_call():
    pipe, call = make("sd")
    copies = []

    def look(pipe, step, timestep, tensors):
        copies.append((copy.deepcopy(pipe.scheduler), copy.copy(pipe.unet)))
        pipe.unet = pipe.unet
        pipe.scheduler = pipe.scheduler
        return tensors

    own = pipe.unet, pipe.scheduler
    run(accelerate(pipe, graph="step"), {**call, "callback_on_step_end": look})
    assert (pipe.unet, pipe.scheduler) == own
    for scheduler, unet in copies:
        assert type(scheduler) is diffusers.DDIMScheduler and type(unet) is diffusers.UNet2DConditionModel
        assert scheduler.config == pipe.scheduler.config


def test_a_model_that_counts_its_calls_is_told_and_not_frozen(caplog):
    pipe, call = make("sd")
    results = []
    for accelerated in (False, True):
        pipe.unet = copy.deepcopy(text_unet())
        pipe.unet.set_attn_processor(CountingProcessor())
        if accelerated:
            accelerate(pipe, graph="step")
        results.append([run(pipe, call)[0] for _ in range(2)])
    for ours, own in zip(*results, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-9, atol=1e-9)
    (line,) = log_lines(caplog)
    assert "processor.calls" in line and "whenever it is called" in line


def test_a_step_that_is_not_the_pipelines_own_is_not_taken(caplog, monkeypatch):
    pipe, call = make("sd")
    expected = run(pipe, call)[0]
    take = acceleration.take_step

    def wrong(backend, output, sample, table, step, options):
        x_next, x0 = take(backend, output, sample, table, step, options)
        # In the graph alone, where the row is a tensor.
        return (x_next.mul_(1.01) if isinstance(step, torch.Tensor) else x_next), x0

    monkeypatch.setattr(acceleration, "take_step", wrong)
    accelerate(pipe, graph="step")
    for _ in range(2):
        torch.testing.assert_close(run(pipe, call)[0], expected, rtol=1e-9, atol=1e-9)
    (line,) = log_lines(caplog)
    assert "differs from the pipeline's own" in line


@pytest.mark.parametrize("make_pipe", [make_sd, make_sdxl, make_sd3])
def test_guidance_is_a_part_of_the_fused_step(make_pipe, caplog, monkeypatch):
    pipe, call = make_pipe()
    pipe.set_progress_bar_config(disable=True)
    seen = []
    take = acceleration.take_step

    def look(backend, output, sample, table, step, options):
        if isinstance(step, torch.Tensor):
            seen.append((len(output), options.guidance and options.guidance.scale))
        return take(backend, output, sample, table, step, options)

    monkeypatch.setattr(acceleration, "take_step", look)
    check_same(
        pipe, {**call, "guidance_scale": 4.0}, caplog, graphs=("step",), rtol=1e-5 if make_pipe is make_sd3 else 1e-9
    )
    assert set(seen) == {(4, 4.0)}


class WritesBeforeItsStep(diffusers.DDIMPipeline):
    """Writes over the state between the model's call and the step."""

    @torch.no_grad()
    def __call__(self, generator, num_inference_steps, batch_size=2, output_type="pt"):
        image = torch.randn((2, 3, 8, 8), generator=generator, dtype=torch.float64)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self.unet(image, t).sample
            image[:, :, 0] = 0.5
            image = self.scheduler.step(output, t, image).prev_sample
        return diffusers.ImagePipelineOutput(images=image)


def test_what_is_written_to_before_the_step_is_not_called_again(caplog):
    pipe = WritesBeforeItsStep(image_unet(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "output_type": "pt"}
    expected, _ = run(pipe, call)
    accelerate(pipe, graph="step")
    for _ in range(2):
        torch.testing.assert_close(run(pipe, call)[0], expected, rtol=1e-9, atol=1e-9)
    assert count_captures(pipe) == 0
    assert all("written to before the step" in line for line in log_lines(caplog)) and log_lines(caplog)


@pytest.mark.parametrize("scales", [(7.5, 3.0, 3.0, 1.0, 1.0), (2.0, 3.0, 4.0, 5.0, 6.0)])
def test_guidance_may_change_at_each_step(scales, caplog):
    pipe, call = make("sd")

    def change(pipe, step, timestep, tensors):
        pipe._guidance_scale = scales[step]
        if scales[step] == 1 and len(tensors["prompt_embeds"]) == 4:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    call.update(callback_on_step_end=change, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    call["num_inference_steps"] = 5
    expected, _ = run(pipe, call)
    accelerate(pipe, graph="step")
    for _ in range(3):
        torch.testing.assert_close(run(pipe, call)[0], expected, rtol=1e-9, atol=1e-9)
    # That of the first scale, that of any other one, and the one without guidance.
    assert count_captures(pipe) == (3 if 1.0 in scales else 2)
    assert not log_lines(caplog)


def test_a_swapped_scheduler_is_followed_and_back(caplog):
    pipe, call = make("sd")
    ddim, expected = pipe.scheduler, run(pipe, call)[0]
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(ddim.config)
    other = run(pipe, call)[0]
    pipe.scheduler = ddim
    accelerate(pipe)
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(ddim.config)
    assert torch.equal(run(pipe, call)[0], other)
    (line,) = log_lines(caplog)
    assert "HeunDiscreteScheduler" in line
    pipe.scheduler = ddim
    torch.testing.assert_close(run(pipe, call)[0], expected, rtol=1e-9, atol=1e-9)
    assert len(log_lines(caplog)) == 1


def test_autocast_is_the_pipelines_own(caplog):
    pipe, call = make("ddim")
    pipe.unet = copy.deepcopy(pipe.unet).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(pipe, call)[0]
    accelerate(pipe, graph="step")
    outside = [run(pipe, call)[0] for _ in range(2)][1]
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            # diffusers' own step rounds to bfloat16.
            torch.testing.assert_close(run(pipe, call)[0], expected, rtol=0, atol=2e-2)
    assert torch.equal(run(pipe, call)[0], outside) and count_captures(pipe) == 2
    assert not log_lines(caplog)


def test_custom_timesteps_are_refused_as_before():
    pipe, call = make("sd")
    for one in (pipe, accelerate(pipe)):
        with pytest.raises(ValueError, match="custom timestep"):
            run(one, {**call, "timesteps": [900, 500]})
    with pytest.raises(ValueError, match="prompt"):
        pipe()
    with pytest.raises(TypeError, match="colour"):
        accelerate(make("ddim")[0])(colour="red")


def test_an_error_in_the_loop_leaves_the_pipeline_usable():
    pipe, call = make("sd")
    expected = run(pipe, call)[0]
    accelerate(pipe)
    with pytest.raises(RuntimeError):
        run(pipe, {**call, "prompt_embeds": randn((2, 3, 5), 0), "negative_prompt_embeds": randn((2, 3, 5), 0)})
    torch.testing.assert_close(run(pipe, call)[0], expected, rtol=1e-9, atol=1e-9)


def test_unaccelerate_gives_the_own_loop_back():
    pipe, call = make("sd")
    own, expected = type(pipe), run(pipe, call)[0]
    members = dict(vars(pipe))
    assert unaccelerate(pipe) is pipe
    accelerate(pipe)
    assert type(pipe) is not own and isinstance(pipe, own)
    assert unaccelerate(pipe) is pipe
    assert type(pipe) is own and vars(pipe) == members
    assert torch.equal(run(pipe, call)[0], expected)


def test_accelerating_again_keeps_the_captures_unless_the_options_change():
    pipe, call = make("sd")
    run(accelerate(pipe, graph="step"), call)
    assert accelerate(pipe, graph="step") is pipe
    assert count_captures(pipe) == 1
    run(pipe, {**call, "num_inference_steps": 9})
    assert count_captures(pipe) == 1
    # That of any other scale.
    for scale in (3.0, 4.0, 5.0):
        run(pipe, {**call, "guidance_scale": scale})
    assert count_captures(pipe) == 2
    run(pipe, {**call, "guidance_scale": 1.0})
    assert count_captures(pipe) == 3
    accelerate(pipe, graph="step", max_graphs=1)
    for _ in range(2):
        run(pipe, call)
        run(pipe, {**call, "guidance_scale": 1.0})
    assert count_captures(pipe) == 1
    assert type(unaccelerate(pipe)) is diffusers.StableDiffusionPipeline


def test_another_default_device_changes_nothing():
    pipe, call = make("sd")
    expected, _ = run(pipe, call)
    accelerate(pipe, graph="off")
    with torch.device("meta"):
        images = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)


def test_changed_weights_and_models_are_noticed(caplog):
    pipe, call = make("sd")
    pipe.unet = copy.deepcopy(pipe.unet)
    accelerate(pipe, graph="step")
    run(pipe, call)

    def check():
        for _ in range(2):
            images = run(pipe, call)[0]
            own = run(unaccelerate(copy.copy(pipe)), call)[0]
            torch.testing.assert_close(images, own, rtol=1e-9, atol=1e-9)
        assert count_captures(pipe) == 1

    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(3)
    check()
    pipe.unet.conv_out.weight = torch.nn.Parameter(pipe.unet.conv_out.weight * 0.5)
    check()
    pipe.unet = text_unet(1)
    check()
    pipe.unet = copy.deepcopy(pipe.unet)
    check()
    pipe.unet.set_attn_processor(AttnProcessor())
    check()
    pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    check()
    pipe.unet.disable_freeu()
    check()
    assert not log_lines(caplog)


def test_a_call_in_inference_mode_does_not_spoil_the_buffers():
    pipe, call = make("sd")
    expected = run(pipe, call)[0]
    accelerate(pipe, graph="step")
    with torch.inference_mode():
        images = [run(pipe, call)[0] for _ in range(2)]
    images += [run(pipe, call)[0]]
    for one in images:
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("graph", ["off", "step"])
def test_threads_may_share_a_pipeline(graph):
    pipe, call = make("sd")
    calls = [{**call, "num_inference_steps": 2 + k % 3, "guidance_scale": 1.0 + k % 2 * 3.0} for k in range(8)]
    expected = [run(pipe, one, seed)[0] for seed, one in enumerate(calls)]
    accelerate(pipe, graph=graph)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda seed: run(pipe, calls[seed], seed)[0], range(8)))
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-9)


def test_it_passes_for_the_pipelines_own_class():
    pipe, _ = make("sd")
    own = type(pipe)
    accelerate(pipe)
    assert isinstance(pipe, own)
    assert repr(type(pipe)) == repr(own) and type(pipe).__doc__ == own.__doc__
    assert inspect.signature(pipe.__call__) == inspect.signature(own.__call__.__get__(pipe))
    assert type(accelerate(make("sd")[0])) is type(pipe)
    assert set(pipe.components) == set(unaccelerate(pipe).components)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["ddim", "sdxl", "dit"])
def test_it_is_saved_and_loaded_as_before(name, tmp_path):
    pipe, call = make(name)
    own, expected = type(pipe), run(pipe, call)[0]
    run(accelerate(pipe), call)
    pipe.save_pretrained(tmp_path)
    assert "fastddim" not in (tmp_path / "model_index.json").read_text()
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert type(loaded) is own
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded, call)[0], expected)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_is_accelerated_with_captures_of_its_own(duplicate):
    pipe, call = make("sd")
    accelerate(pipe, graph="step")
    expected = [run(pipe, call)[0] for _ in range(2)][1]
    other = duplicate(pipe)
    assert type(other) is type(pipe) and other._acceleration is not pipe._acceleration
    assert other._acceleration.options == pipe._acceleration.options
    assert torch.equal([run(other, call)[0] for _ in range(2)][1], expected)
    unaccelerate(other)
    assert torch.equal(run(pipe, call)[0], expected)


def test_another_pipeline_from_its_parts_is_not_accelerated():
    pipe, _ = make("sd")
    other = diffusers.StableDiffusionImg2ImgPipeline(**accelerate(pipe).components, requires_safety_checker=False)
    assert type(other) is diffusers.StableDiffusionImg2ImgPipeline
    assert diffusers.AutoPipelineForImage2Image.from_pipe(pipe).unet is pipe.unet


@pytest.mark.parametrize("pipe", [object(), diffusers.DDIMPipeline, "stable-diffusion"])
def test_what_is_no_pipeline_is_refused(pipe):
    with pytest.raises(TypeError, match=r"pipe: .*pass a diffusers pipeline with a scheduler and a model"):
        accelerate(pipe)
    assert unaccelerate(pipe) is pipe


def test_bad_options_are_refused():
    pipe, _ = make("sd")
    for graph in ("steps", None, "loop"):
        with pytest.raises(ValueError, match=r"graph: .*'(auto|step)'"):
            accelerate(pipe, graph=graph)
    with pytest.raises(ValueError, match="backend: 'cuda'"):
        accelerate(pipe, backend="cuda")
    with pytest.raises(ValueError, match="max_graphs: 0"):
        accelerate(pipe, max_graphs=0)
    assert type(pipe) is diffusers.StableDiffusionPipeline


OTHERS = {
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler, karras": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True, "timestep_spacing": "leading"}),
    "euler, v": (diffusers.EulerDiscreteScheduler, {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmsolver++, heun": (diffusers.DPMSolverMultistepScheduler, {"solver_type": "heun", "use_karras_sigmas": True}),
    "dpmsolver++ 1": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 1, "final_sigmas_type": "sigma_min"}),
    "sde-dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "lcm": (diffusers.LCMScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "ddpm, large": (diffusers.DDPMScheduler, {"variance_type": "fixed_large", "steps_offset": 0}),
    "tcd": (diffusers.TCDScheduler, {}),
}


def exact(scheduler):
    """diffusers' scheduler with the alphas of float64, as its own of float32 are no part of the loop."""
    config = fastddim.DDIMConfig.from_dict(scheduler.config, ignore_unknown=True)
    scheduler.alphas_cumprod = torch.from_numpy(fastddim.Schedule(config).alphas_cumprod.copy())
    return scheduler


# Every scheduler with each number of steps and on each pipeline, and every pipeline with each number of steps.
OTHER_RUNS = [
    (other, ("sd", "sd_img2img", "sdxl")[(k + j) % 3], steps)
    for k, other in enumerate(OTHERS)
    for j, steps in enumerate((1, 6, 20))
]


@pytest.mark.parametrize(("other", "name", "steps"), OTHER_RUNS)
def test_other_schedulers_are_sampled_as_themselves(other, name, steps, caplog):
    pipe, call = make(name)
    kind, options = OTHERS[other]
    pipe.scheduler = exact(kind.from_config({**LATENT, **options}))
    if steps == 1 and "strength" in call:
        call["strength"] = 1.0
    # diffusers' float32 sigmas and states.
    check_same(pipe, {**call, "num_inference_steps": steps}, caplog, rtol=3e-5, seeds=(0, 1))


@pytest.mark.parametrize(
    "options", [{}, {"solver_type": "heun"}, {"lower_order_final": False}, {"euler_at_final": True}]
)
def test_the_last_step_of_a_changed_image_is_of_the_schedulers_order(options, caplog):
    """Which it counts the whole run for, not the part of it that the strength leaves."""
    pipe, call = make("sd_img2img")
    options = {**LATENT, **options, "final_sigmas_type": "sigma_min"}
    pipe.scheduler = exact(diffusers.DPMSolverMultistepScheduler.from_config(options))
    check_same(pipe, {**call, "num_inference_steps": 20, "strength": 0.5}, caplog, graphs=("off",), rtol=3e-6)


def make_with(name, other):
    """A pipeline with one of `OTHERS`; what of it `from_pretrained` asks for is in its components that are None."""
    if name in ("sd3", "flux"):
        pipe, call = {"sd3": make_sd3, "flux": make_flux}[name]()
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **other)
        pipe.set_progress_bar_config(disable=True)
    else:
        pipe, call = make(name)
        kind, options = OTHERS[other]
        pipe.scheduler = kind.from_config({**LATENT, **options})
    return pipe, {**call, "num_inference_steps": 4}


LIVES = [
    *(("sd" if k % 2 else "sdxl", other) for k, other in enumerate(OTHERS)),
    *((name, {option: True}) for name in ("sd3", "flux") for option in ("stochastic_sampling", "use_karras_sigmas")),
]


@pytest.mark.parametrize(("name", "other"), LIVES)
def test_a_pipeline_with_another_scheduler_lives_as_its_own(name, other, tmp_path, caplog):
    """Copied, given another scheduler and back, its configuration changed, saved and loaded: each time as diffusers has it."""

    def check(pipe):
        results = []
        for one in (unaccelerate(copy.copy(pipe)), pipe, pipe):
            # Of `stochastic_sampling`, which takes no generator.
            torch.manual_seed(0)
            results.append(run(one, call)[0])
        for result in results[1:]:
            assert (result - results[0]).abs().max() <= 3e-5 * results[0].abs().max()
        return results[0]

    pipe, call = make_with(name, other)
    first = check(accelerate(pipe, graph="step"))
    assert torch.equal(check(copy.deepcopy(pipe)), first)
    scheduler = pipe.scheduler
    if isinstance(other, str):
        kind = diffusers.EulerAncestralDiscreteScheduler
        changes = {"prediction_type": "epsilon" if "v" in other.split() else "v_prediction"}
    else:
        kind, changes = type(scheduler), {**dict.fromkeys(other, False), "use_exponential_sigmas": True}
    pipe.scheduler = kind.from_config(scheduler.config, **changes)
    assert not torch.equal(check(pipe), first)
    pipe.scheduler = scheduler
    assert torch.equal(check(pipe), first)
    pipe.save_pretrained(tmp_path)
    nothing = {key: value for key, value in pipe.components.items() if value is None}
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float64, **nothing)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(check(accelerate(loaded, graph="step")), first)
    scheduler.register_to_config(**changes)
    assert not torch.equal(check(pipe), first)
    assert not log_lines(caplog)


def test_alphas_that_no_configuration_gives_keep_the_pipelines_loop(caplog):
    pipe, call = make("sd")
    pipe.scheduler = diffusers.LCMScheduler.from_config(LATENT)
    accelerate(pipe)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod**1.1
    assert torch.equal(run(pipe, call)[0], run(unaccelerate(copy.copy(pipe)), call)[0])
    assert "alphas_cumprod: other numbers than the scheduler's configuration gives" in log_lines(caplog)[0]


def test_assigned_attributes_of_a_configuration_are_heeded(caplog):
    pipe, call = make("sd")
    first, _ = run(pipe, call)
    pipe.scheduler.config.prediction_type = "v_prediction"
    pipe.scheduler.alphas_cumprod.mul_(0.98)
    pipe.scheduler.num_inference_steps = 3
    check_same(pipe, call, caplog)
    assert not torch.allclose(run(pipe, call)[0], first, rtol=1e-3)


def small_variance(timestep, prev_timestep):
    return torch.tensor(1e-6 if prev_timestep >= 0 else 0.0)


@pytest.mark.parametrize("change", ["variance", "step", "eta", "alphas"])
def test_a_changed_scheduler_keeps_its_own_steps(change, caplog):
    pipe, call = make("sd")
    accelerate(pipe)
    scheduler = pipe.scheduler
    call["eta"] = torch.tensor(0.5) if change == "eta" else 0.5
    if change == "variance":
        scheduler._get_variance = small_variance
    elif change == "step":
        own = scheduler.step
        scheduler.step = lambda *args, **kwargs: own(*args, **{**kwargs, "eta": 0.0})
    elif change == "alphas":
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.numpy()
    expected, drawn = run(unaccelerate(copy.copy(pipe)), call)
    assert run(pipe, call) == (pytest.approx(expected, abs=0), drawn)
    said = {"step": "whose step was replaced", "variance": "whose _get_variance was replaced",
            "alphas": "that diffusers' own step alone takes"}  # fmt: skip
    assert [line for line in log_lines(caplog) if said.get(change, "") not in line] == []
    assert len(log_lines(caplog)) == (change != "eta")


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_gamma_is_what_the_pipeline_calls_eta(gamma, caplog):
    pipe, call = make("sd")
    pipe.scheduler = exact(diffusers.TCDScheduler.from_config(LATENT))
    check_same(pipe, {**call, "eta": gamma}, caplog, rtol=1e-5)


@pytest.mark.parametrize("make_pipe", [make_sd3, make_flux])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 5])
def test_transformers_of_flow_matching_are_the_pipelines_own(make_pipe, scale, steps, caplog):
    pipe, call = make_pipe()
    pipe.set_progress_bar_config(disable=True)
    check_same(pipe, {**call, "guidance_scale": scale, "num_inference_steps": steps}, caplog, rtol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [(diffusers.UniPCMultistepScheduler(), "a UniPCMultistepScheduler"), (diffusers.PNDMScheduler(), "a PNDMScheduler"),
     (diffusers.DDPMScheduler(variance_type="fixed_small_log"), "a DDPMScheduler with variance_type 'fixed_small_log'"),
     (diffusers.HeunDiscreteScheduler(), "a HeunDiscreteScheduler"),
     (diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True), "a DPMSolverMultistepScheduler with use_lu_lambdas: True"),
     (type("Own", (diffusers.EulerDiscreteScheduler,), {})(), "a Own")],
)  # fmt: skip
def test_other_schedulers_take_their_own_steps_over_captured_calls(scheduler, said, caplog):
    pipe, call = make("sd")
    pipe.scheduler = scheduler
    expected, _ = run(pipe, call)
    accelerate(pipe, graph="step")
    caplog.clear()
    for _ in range(2):
        assert torch.equal(run(pipe, call)[0], expected)
    (line,) = log_lines(caplog)
    assert f"the steps are its scheduler's own, as it is {said}" in line and count_captures(pipe) == 1


@pytest.mark.parametrize("as_output", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_a_step_returns_what_the_schedulers_own_does(other, as_output, monkeypatch):
    pipe, call = make("sd")
    kind, options = OTHERS[other]
    pipe.scheduler = exact(kind.from_config({**LATENT, **options}))
    ours, steps = acceleration._Call.step, []

    def step(self, view, own, args, kwargs):
        kwargs = {**kwargs, "return_dict": as_output}
        twin = copy.deepcopy(pipe.scheduler)
        # The one whose previous outputs the accelerated one does not keep.
        steps.append(len(steps) == 0 or kind is not diffusers.DPMSolverMultistepScheduler)
        generator = kwargs.get("generator")
        again = {"generator": generator.clone_state()} if generator is not None else {}
        expected = twin.step(*args, **{**kwargs, **again})
        result = ours(self, view, own, args, kwargs)
        assert type(result) is type(expected) and len(result) == len(expected)
        for name in expected if as_output else range(len(expected)):
            if steps[-1]:
                assert (result[name] - expected[name]).abs().max() <= 3e-5 * expected[name].abs().max()
        return (result.prev_sample,) if as_output else result

    monkeypatch.setattr(acceleration._Call, "step", step)
    run(accelerate(pipe, graph="off"), call)
    assert len(steps) == 4


@pytest.mark.parametrize("member", ["step", "set_timesteps", "scale_model_input", "_get_variance"])
def test_a_patched_scheduler_keeps_what_was_patched(member, caplog):
    pipe, call = make("sd")
    call["eta"] = 0.5
    own, calls = getattr(pipe.scheduler, member), []
    setattr(pipe.scheduler, member, lambda *args, **kwargs: calls.append(member) or own(*args, **kwargs))
    if member == "step":
        pipe.scheduler.step = functools.wraps(own)(pipe.scheduler.step)
    expected, _ = run(pipe, call)
    accelerate(pipe, graph="step")
    seen = len(calls)
    for _ in range(2):
        assert torch.equal(run(pipe, call)[0], expected)
    assert len(calls) == 3 * seen
    assert f"whose {member} was replaced" in log_lines(caplog)[0]
