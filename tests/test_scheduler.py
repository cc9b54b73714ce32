import copy
import inspect
import itertools
import pickle
import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastddim import DDIMInverseScheduler, DDIMScheduler, DDIMSchedulerOutput
from fastddim.scheduler import _row_at

TRAINED_BETAS = np.linspace(0.0005, 0.02, 1000).tolist()
AXES = {
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "betas": [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": TRAINED_BETAS},
    ],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "limit": [
        {"clip_sample": False},
        {"clip_sample": True, "clip_sample_range": 0.8},
        {"thresholding": True},
        {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
    ],
    "rescale_betas_zero_snr": [False, True],
    "set_alpha_to_one": [True, False],
    "steps_offset": [0, 1],
    "eta": [0.0, 0.3, 1.0],
    "use_clipped_model_output": [False, True],
    "num_inference_steps": [1, 7, 10, 30, 50, 61, 999],
}
EVERY_CASE = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
SAMPLED_CASES = random.Random(0).sample(EVERY_CASE, 250)
WAYS = ("eta", "use_clipped_model_output")


def randn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(options, ours=DDIMScheduler, theirs=diffusers.DDIMScheduler):
    """Our scheduler and diffusers' of one configuration, with timesteps set."""
    config = {
        key: value for key, value in options.items() if key not in (*WAYS, "betas", "limit", "num_inference_steps")
    }
    config |= options.get("betas", {}) | options.get("limit", {})
    schedulers = ours(**config), theirs(**config)
    for scheduler in schedulers:
        scheduler.set_timesteps(options.get("num_inference_steps", 10))
    return schedulers


def scale_before_limit(scheduler, timestep, sample):
    """x0 divides by sqrt(alpha_bar) where epsilon is predicted, and so does its rounding error, before the limit."""
    return max(1.0, sample.abs().max().item() / max(scheduler.alphas_cumprod[timestep].item(), 2.0**-24) ** 0.5)


def check_same(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours, theirs = pair(case)
    way = {key: case[key] for key in WAYS}
    assert torch.equal(ours.timesteps, theirs.timesteps)
    timesteps = theirs.timesteps[theirs.timesteps < 1000]
    for k in sorted({0, len(timesteps) // 2, len(timesteps) - 1}):
        t = timesteps[k]
        if theirs.alphas_cumprod[t] < 1e-6 and case["prediction_type"] == "epsilon":
            continue  # divided by this little signal, rounding is all that is left of x0
        x, output, noise = (randn((2, 3, 4, 4), 3 * k + i) for i in range(3))
        way["variance_noise"] = noise if way["eta"] > 0 else None
        expected, result = theirs.step(output, t, x, **way), ours.step(output, t, x, **way)
        x0_scale = scale_before_limit(theirs, t, x) if case["prediction_type"] == "epsilon" else 4.0
        # float32 rounding makes the direction's square negative for some steps of eta 1, where diffusers gives NaN.
        assert torch.equal(result.prev_sample.isnan(), expected.prev_sample.isnan()), case
        if expected.prev_sample.isnan().any():
            continue
        x0_error = (result.pred_original_sample - expected.pred_original_sample).abs().max().item()
        assert x0_error <= 1e-6 * x0_scale, case
        error = (result.prev_sample - expected.prev_sample).abs().max().item()
        carried = x0_error * (1 + x.abs().max().item())
        assert error <= 1e-6 * expected.prev_sample.abs().max().item() + carried, case


@pytest.mark.parametrize("chunk", range(10))
def test_a_step_is_diffusers(chunk):
    for case in SAMPLED_CASES[chunk::10]:
        check_same(case)


@pytest.mark.slow
def test_a_step_is_diffusers_over_the_whole_configuration_space():
    for case in EVERY_CASE:
        check_same(case)


def smooth_model(x, t):
    """A stand-in with a model's scale that keeps rounding errors small along a loop."""
    return 0.6 * torch.tanh(x) + 0.1 * torch.sin(x.roll(1, -1) + int(t) / 300)


@pytest.mark.parametrize("num_inference_steps", [10, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_whole_loop_is_diffusers(num_inference_steps, prediction_type, eta, spacing):
    options = {"prediction_type": prediction_type, "timestep_spacing": spacing}
    results = []
    for scheduler in pair(options | {"num_inference_steps": num_inference_steps}):
        generator = torch.Generator().manual_seed(1)
        x = randn((2, 3, 8, 8), 0)
        for t in scheduler.timesteps:
            x = scheduler.step(smooth_model(x, t), t, x, eta=eta, generator=generator).prev_sample
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-6 * results[1].abs().max().item())


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_the_inverse_step_is_diffusers(prediction_type, spacing, set_alpha_to_one):
    options = {"prediction_type": prediction_type, "timestep_spacing": spacing, "set_alpha_to_one": set_alpha_to_one}
    for n in (7, 50):
        ours, theirs = pair(options | {"num_inference_steps": n}, DDIMInverseScheduler, diffusers.DDIMInverseScheduler)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        for t in theirs.timesteps:
            if prediction_type == "sample" and set_alpha_to_one and t - 1000 // n < 0:
                continue  # 0 / 0: a clean state has no epsilon
            x, output = randn((2, 3, 4), int(t)), randn((2, 3, 4), int(t) + 1)
            expected, result = theirs.step(output, t, x), ours.step(output, t, x)
            torch.testing.assert_close(result.prev_sample, expected.prev_sample, rtol=2e-6, atol=2e-6)
            atol = 1e-6 * scale_before_limit(theirs, t, x)
            torch.testing.assert_close(result.pred_original_sample, expected.pred_original_sample, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_at_least_as_exact_as_diffusers(dtype):
    ours, theirs = pair({"num_inference_steps": 10})
    for t in theirs.timesteps:
        x, output = randn((2, 3, 8, 8), int(t), dtype), randn((2, 3, 8, 8), int(t) + 1, dtype)
        exact = theirs.step(output.double(), t, x.double()).prev_sample
        errors = [(s.step(output, t, x).prev_sample.double() - exact).abs().max().item() for s in (ours, theirs)]
        assert ours.step(output, t, x).prev_sample.dtype == dtype
        assert errors[0] <= errors[1] + 1e-12


@pytest.mark.parametrize("dtypes", list(itertools.product([torch.float16, torch.float32, torch.float64], repeat=2)))
def test_mixed_dtypes_promote_as_in_diffusers(dtypes):
    ours, theirs = pair({})
    x, output = randn((2, 3), 0, dtypes[0]), randn((2, 3), 1, dtypes[1])
    assert ours.step(output, 500, x).prev_sample.dtype == theirs.step(output, 500, x).prev_sample.dtype


@pytest.mark.parametrize("timestep", [500, np.int64(500), torch.tensor(500), torch.tensor([500]), -3, torch.tensor(-3)])
def test_any_timestep_diffusers_takes(timestep):
    ours, theirs = pair({})
    x, output = randn((2, 3), 0), randn((2, 3), 1)
    expected = theirs.step(output, timestep, x)
    torch.testing.assert_close(ours.step(output, timestep, x).prev_sample, expected.prev_sample, rtol=1e-6, atol=1e-6)


def test_a_timestep_outside_training_is_an_index_error_as_in_diffusers():
    for scheduler in pair({}):
        with pytest.raises(IndexError):
            scheduler.step(randn((2, 3), 0), 1000, randn((2, 3), 1))


class NoHostRead(TorchDispatchMode):
    """Fails on whatever reads a tensor's value on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_device_timestep_is_never_read_on_the_host(eta, monkeypatch):
    ours, theirs = pair({})
    x, output, noise = randn((2, 3), 0), randn((2, 3), 1), randn((2, 3), 2)
    table = ours._rows(output, 500, x).table(eta, False)
    with NoHostRead():
        past_the_end = _row_at(table.on(x.device)[0], table.index(torch.tensor(1000), x.device))
    assert all(value.isnan() for value in past_the_end[:6])
    for t in (999, 500, -2, 1):
        expected = theirs.step(output, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        with NoHostRead():
            row = _row_at(table.on(x.device)[0], table.index(torch.tensor(t), x.device))
        monkeypatch.setattr(type(table), "row", lambda self, timestep, row=row: row)
        result = ours.step(output, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        torch.testing.assert_close(result, expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("limit", AXES["limit"])
@pytest.mark.parametrize("prediction_type", AXES["prediction_type"])
def test_gradients_are_diffusers(limit, prediction_type):
    gradients = []
    for scheduler in pair({"limit": limit, "prediction_type": prediction_type}):
        x, output = randn((2, 3, 4), 0).requires_grad_(), randn((2, 3, 4), 1).requires_grad_()
        result = scheduler.step(output, 500, x, use_clipped_model_output=True)
        weights = randn((2, 3, 4), 2)
        ((result.prev_sample + result.pred_original_sample) * weights).sum().backward()
        gradients.append((x.grad, output.grad))
    zeros = torch.zeros(2, 3, 4)
    for ours, theirs in zip(*gradients, strict=True):
        # "sample" leaves x out of x0, for diffusers too.
        torch.testing.assert_close(
            zeros if ours is None else ours, zeros if theirs is None else theirs, rtol=1e-5, atol=1e-5
        )


def test_a_step_leaves_its_inputs_alone():
    ours, _ = pair({})
    x, output, noise = (randn((2, 3), k) for k in range(3))
    kept = [tensor.clone() for tensor in (x, output, noise)]
    ours.step(output, 500, x, eta=1.0, variance_noise=noise)
    assert all(torch.equal(a, b) for a, b in zip((x, output, noise), kept, strict=True))


def test_shapes_broadcast_as_in_diffusers():
    ours, theirs = pair({})
    x, output = randn((1, 3, 4), 0), randn((5, 3, 4), 1)
    torch.testing.assert_close(ours.step(output, 500, x).prev_sample, theirs.step(output, 500, x).prev_sample)


def test_the_constructor_takes_every_argument_of_diffusers():
    for ours, theirs in (
        (DDIMScheduler, diffusers.DDIMScheduler),
        (DDIMInverseScheduler, diffusers.DDIMInverseScheduler),
    ):
        assert inspect.signature(ours.__init__) == inspect.signature(theirs.__init__)
        assert issubclass(ours, (diffusers.SchedulerMixin, diffusers.ConfigMixin))
        assert dict(ours().config).keys() == dict(theirs().config).keys()


def test_configurations_move_between_the_libraries(tmp_path):
    ours = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", trained_betas=[0.1, 0.2])
    ours.save_pretrained(tmp_path)
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path)
    assert theirs.config["prediction_type"] == "v_prediction"
    again = DDIMScheduler.from_pretrained(tmp_path)
    assert type(again) is DDIMScheduler
    assert torch.equal(again.alphas_cumprod, theirs.alphas_cumprod)
    for other in (diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.DDPMScheduler):
        config = other(beta_schedule="scaled_linear", beta_end=0.012).config
        assert DDIMScheduler.from_config(config).config.beta_end == 0.012
        assert other.from_config(ours.config).config.prediction_type == "v_prediction"
    assert [c.__name__ for c in ours.compatibles] == [c.__name__ for c in diffusers.DDIMScheduler().compatibles]


def test_the_rest_of_the_interface_is_diffusers():
    ours, theirs = pair({})
    x, noise, t = randn((2, 3, 4), 0), randn((2, 3, 4), 1), torch.tensor([10, 700])
    assert torch.equal(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t))
    assert torch.equal(ours.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t))
    assert ours.scale_model_input(x, 10) is x
    assert (ours.init_noise_sigma, ours.order, len(ours)) == (1.0, 1, 1000)
    for t_cur, t_next in ((0, 0), (420, 400), (980, 960), (487, 486), (999, 998), (5, -15)):
        assert torch.equal(ours._get_variance(t_cur, t_next), theirs._get_variance(t_cur, t_next))


def test_outputs_behave_like_diffusers():
    ours, theirs = pair({})
    x, output = randn((2, 3), 0), randn((2, 3), 1)
    result, expected = ours.step(output, 500, x), theirs.step(output, 500, x)
    assert isinstance(result, DDIMSchedulerOutput)
    assert isinstance(result, type(expected))
    assert list(result.keys()) == list(expected.keys()) == ["prev_sample", "pred_original_sample"]
    for one in (result, copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert torch.equal(one[0], result.prev_sample)
        assert torch.equal(one["pred_original_sample"], result.pred_original_sample)
        assert len(one.to_tuple()) == 2
    plain = ours.step(output, 500, x, return_dict=False)
    assert type(plain) is tuple
    assert torch.equal(plain[0], result.prev_sample)
    assert DDIMSchedulerOutput(x).to_tuple() == (x,)


def test_step_before_set_timesteps_says_what_to_call():
    for scheduler in (DDIMScheduler(), DDIMInverseScheduler()):
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step(torch.zeros(1, 2), 5, torch.zeros(1, 2))


def test_two_sources_of_noise_and_unknown_predictions_are_refused():
    ours, _ = pair({})
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="generator, variance_noise"):
        ours.step(x, 5, x, eta=1.0, generator=torch.Generator(), variance_noise=x)
    unknown = DDIMScheduler(prediction_type="noise")
    unknown.set_timesteps(10)
    with pytest.raises(ValueError, match=r"prediction_type: 'noise'.*'epsilon'"):
        unknown.step(x, 5, x)


def test_likely_mistakes_are_warned_of_and_work_as_in_diffusers():
    with pytest.warns(UserWarning, match="zero_snr"):
        ours, theirs = pair({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    x, output, noise = randn((2, 3), 0), randn((2, 3), 1), randn((2, 3), 2)
    with pytest.warns(UserWarning, match=r"eta: 1.2 is outside \[0, 1\]"):
        result = ours.step(output, 500, x, eta=1.2, variance_noise=noise)
    expected = theirs.step(output, 500, x, eta=1.2, variance_noise=noise)
    torch.testing.assert_close(result.prev_sample, expected.prev_sample, rtol=1e-6, atol=1e-6)


def test_epsilon_without_signal_is_clipped_as_in_diffusers():
    ours, theirs = pair({"betas": {"trained_betas": TRAINED_BETAS}, "rescale_betas_zero_snr": True})
    assert theirs.alphas_cumprod[-1] == 0
    x, output = randn((2, 3), 0), randn((2, 3), 1)
    expected, result = theirs.step(output, 999, x), ours.step(output, 999, x)
    assert expected.pred_original_sample.abs().eq(1).all()
    assert torch.equal(result.pred_original_sample, expected.pred_original_sample)
    torch.testing.assert_close(result.prev_sample, expected.prev_sample)


def test_changed_settings_are_seen():
    x, output = randn((2, 3), 0), randn((2, 3), 1)
    ours, theirs = pair({"num_inference_steps": 10})
    ours.step(output, 500, x)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
    torch.testing.assert_close(ours.step(output, 500, x).prev_sample, theirs.step(output, 500, x).prev_sample)
    for scheduler in (ours, theirs):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.3
    torch.testing.assert_close(ours.step(output, 500, x).prev_sample, theirs.step(output, 500, x).prev_sample)
    for scheduler in (ours, theirs):
        scheduler.register_to_config(clip_sample_range=0.1)
    torch.testing.assert_close(ours.step(output, 500, x).prev_sample, theirs.step(output, 500, x).prev_sample)


def test_threads_may_share_a_scheduler():
    ours, theirs = pair({})
    x, output, noise = randn((2, 3), 0), randn((2, 3), 1), randn((2, 3), 2)
    ways = [(t, eta) for t in range(0, 1000, 37) for eta in (0.0, 0.2, 0.9)]

    def run(way):
        return ours.step(output, way[0], x, eta=way[1], variance_noise=noise if way[1] else None).prev_sample

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, ways * 4))
    for (t, eta), result in zip(ways * 4, results, strict=True):
        expected = theirs.step(output, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("image_to_image", [False, True])
def test_it_serves_stable_diffusion_pipelines(image_to_image):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    call = {"num_inference_steps": 7, "eta": 0.5, "output_type": "np"}
    call |= {"prompt_embeds": randn((1, 4, 8), 0), "negative_prompt_embeds": randn((1, 4, 8), 1)}
    if image_to_image:
        pipeline = diffusers.StableDiffusionImg2ImgPipeline
        call |= {"image": randn((1, 3, 8, 8), 2).clamp(-1, 1), "strength": 0.6}
    else:
        pipeline = diffusers.StableDiffusionPipeline
        call |= {"height": 8, "width": 8}
    pictures = []
    for scheduler in pair({"limit": {"clip_sample": False}, "steps_offset": 1}):
        pipe = pipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        pictures.append(pipe(**call, generator=torch.Generator().manual_seed(3)).images)
    np.testing.assert_allclose(*pictures, atol=1e-4)
    assert pictures[0].std() > 0


@pytest.mark.parametrize(("ours", "options"), [(DDIMScheduler, {"eta": 0.5}), (DDIMInverseScheduler, {})])
def test_another_default_device_changes_nothing(ours, options):
    output, sample, noise = (randn((2, 3, 8, 8), seed) for seed in range(3))
    if options:
        options = {**options, "variance_noise": noise}
    config = {} if ours is DDIMInverseScheduler else {"thresholding": True}

    # Each with a cache of its own; what diffusers makes of the betas is on the default device of that time.
    schedulers = [pair({"limit": config}, ours)[0] for _ in range(2)]

    def results(scheduler):
        timesteps = scheduler.timesteps[3], int(scheduler.timesteps[4])
        return [scheduler.step(output, t, sample, return_dict=False, **options) for t in timesteps]

    expected = results(schedulers[0])
    with torch.device("meta"):
        got = results(schedulers[1])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
