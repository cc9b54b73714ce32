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
    table = ours._row_cache.rows(ours, ours._kind).table(eta, False)
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


def assign(name, value):
    return lambda scheduler: setattr(scheduler, name, value)


def assign_config(**values):
    def change(scheduler):
        for name, value in values.items():
            setattr(scheduler.config, name, value)

    return change


def register(**values):
    return lambda scheduler: scheduler.register_to_config(**values)


def write(values):
    """Into the memory of alphas_cumprod, which no version counts."""

    def change(scheduler):
        scheduler.alphas_cumprod.numpy()[:] = values(scheduler.alphas_cumprod.numpy())

    return change


def convert(function):
    return lambda scheduler: setattr(scheduler, "alphas_cumprod", function(scheduler.alphas_cumprod))


CHANGES = {
    "set_timesteps": lambda scheduler: scheduler.set_timesteps(20),
    "num_inference_steps": assign("num_inference_steps", 7),
    "a numpy integer": assign("num_inference_steps", np.int64(7)),
    "prediction_type": assign_config(prediction_type="v_prediction"),
    "clip_sample": assign_config(clip_sample=False),
    "clip_sample_range": assign_config(clip_sample_range=0.3),
    "a range that is a tensor": assign_config(clip_sample_range=torch.tensor(0.3)),
    "a range of nothing": assign_config(clip_sample_range=0),
    "thresholding": assign_config(thresholding=True, sample_max_value=1.5),
    "a dictionary's item": lambda scheduler: scheduler.config.__setitem__("prediction_type", "v_prediction"),
    "register_to_config": register(clip_sample_range=0.1),
    "num_train_timesteps": register(num_train_timesteps=500),
    "alphas": convert(lambda alphas: alphas**1.3),
    "alphas in place": lambda scheduler: scheduler.alphas_cumprod.mul_(0.9),
    "alphas' memory": write(lambda alphas: 0.9 * alphas),
    "alphas' data": lambda scheduler: setattr(scheduler.alphas_cumprod, "data", 0.8 * scheduler.alphas_cumprod),
    "fewer alphas": convert(lambda alphas: alphas[:600]),
    "alphas in float64": convert(torch.Tensor.double),
    "alphas in float16": convert(torch.Tensor.half),
    "an array of alphas": convert(torch.Tensor.numpy),
    "a parameter": convert(torch.nn.Parameter),
    "final_alpha_cumprod": assign("final_alpha_cumprod", torch.tensor(0.9995)),
    "final_alpha_cumprod in place": lambda scheduler: scheduler.final_alpha_cumprod.mul_(0.9995),
    "a float": assign("final_alpha_cumprod", 0.9995),
    "a patched variance": assign("_get_variance", lambda t, t_next: torch.tensor(0.01 if t_next >= 0 else 0.0)),
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_a_step_is_seen(change, prediction_type):
    x, output, noise = (randn((2, 3, 4), k) for k in range(3))
    # The last step too, which ends beyond the training timesteps.
    steps = [(t, {"eta": eta, "variance_noise": noise if eta else None}) for t in (500, 9) for eta in (0.0, 0.5)]
    ours, theirs = pair({"prediction_type": prediction_type})
    for t, way in steps:
        ours.step(output, t, x, **way)
    for scheduler in (ours, theirs):
        CHANGES[change](scheduler)
    for t, way in steps:
        result, expected = ours.step(output, t, x, **way), theirs.step(output, t, x, **way)
        for name in ("prev_sample", "pred_original_sample"):
            torch.testing.assert_close(result[name], expected[name], rtol=2e-6, atol=2e-6, check_dtype=True)


@pytest.mark.parametrize(
    "change", ["num_inference_steps", "prediction_type", "clip_sample_range", "num_train_timesteps", "alphas' memory"]
)
def test_a_change_is_seen_by_the_inverse_step(change):
    x, output = randn((2, 3, 4), 0), randn((2, 3, 4), 1)
    ours, theirs = pair({}, DDIMInverseScheduler, diffusers.DDIMInverseScheduler)
    ours.step(output, 500, x)
    for scheduler in (ours, theirs):
        CHANGES[change](scheduler)
        scheduler.initial_alpha_cumprod = torch.tensor(0.99)
    for t in (500, 3):
        torch.testing.assert_close(
            ours.step(output, t, x).prev_sample, theirs.step(output, t, x).prev_sample, rtol=2e-6, atol=2e-6
        )


def test_an_inverse_made_of_a_thresholding_scheduler_does_not_threshold():
    config = diffusers.DDIMScheduler(thresholding=True, sample_max_value=3.0).config
    x, output = 3 * randn((2, 3, 4), 0), randn((2, 3, 4), 1)
    results = []
    for made in (DDIMInverseScheduler, diffusers.DDIMInverseScheduler):
        scheduler = made.from_config(config)
        scheduler.set_timesteps(10)
        results.append(scheduler.step(output, 500, x).prev_sample)
    torch.testing.assert_close(*results, rtol=2e-6, atol=2e-6)


def test_fewer_trained_betas_than_training_timesteps_have_diffusers_neighbours():
    ours, theirs = pair({"betas": {"trained_betas": TRAINED_BETAS[:800]}})
    x, output = randn((2, 3), 0), randn((2, 3), 1)
    torch.testing.assert_close(ours.step(output, 500, x).prev_sample, theirs.step(output, 500, x).prev_sample)


def halve(self, *args):
    return 0.5 * args[-1] if isinstance(args[-1], torch.Tensor) else torch.tensor(0.01)


@pytest.mark.parametrize("part", ["_get_variance", "_threshold_sample"])
@pytest.mark.parametrize("where", ["subclass", "own class", "diffusers' class", "object"])
def test_an_overridden_part_of_a_step_is_heeded(part, where, monkeypatch):
    x, output, noise = (randn((2, 3, 4), k) for k in range(3))
    config = {"thresholding": True, "sample_max_value": 1.5}
    classes = DDIMScheduler, diffusers.DDIMScheduler
    if where == "subclass":
        classes = [type("Own", (base,), {part: halve}) for base in classes]
    schedulers = ours, theirs = pair({"limit": config}, *classes)
    unpatched = ours.step(output, 500, x, eta=0.5, variance_noise=noise).prev_sample
    if where == "object":
        for scheduler in schedulers:
            setattr(scheduler, part, lambda *args: halve(None, *args))
    elif where != "subclass":
        for base in classes[1:] if where == "diffusers' class" else classes:
            monkeypatch.setattr(base, part, halve)
    expected = theirs.step(output, 500, x, eta=0.5, variance_noise=noise).prev_sample
    result = ours.step(output, 500, x, eta=0.5, variance_noise=noise).prev_sample
    assert torch.equal(result, expected)
    assert where == "subclass" or not torch.allclose(result, unpatched, rtol=1e-3)


def test_what_diffusers_step_takes_from_its_module_may_be_patched(monkeypatch):
    ours, _ = pair({})
    x, noise = randn((2, 3), 0), randn((2, 3), 1)
    expected = ours.step(x, 500, x, eta=1.0, variance_noise=noise).prev_sample
    module = diffusers.schedulers.scheduling_ddim
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **kwargs: noise)
    torch.testing.assert_close(ours.step(x, 500, x, eta=1.0).prev_sample, expected, rtol=2e-6, atol=2e-6)
    monkeypatch.setattr(diffusers.DDIMScheduler, "step", lambda self, *args, **kwargs: "patched")
    assert ours.step(x, 500, x) == "patched"


NOISE = randn((2, 3, 4), 2)
CALLS = {
    "timestep np.array([500])": {"timestep": np.array([500])},
    "timestep [1]": {"timestep": torch.tensor([500])},
    "timestep [1] in half precision": {"timestep": torch.tensor([500]), "dtype": torch.float16},
    "timestep [1, 1]": {"timestep": torch.tensor([[500]])},
    "an int16 timestep": {"timestep": torch.tensor(500, dtype=torch.int16)},
    "broadcast noise": {"eta": 0.5, "variance_noise": NOISE[:1]},
    "a float for noise": {"eta": 0.5, "variance_noise": 0.3},
    "noise in float64": {"eta": 0.5, "variance_noise": NOISE.double()},
    "eta as a tensor": {"eta": torch.tensor(0.3), "variance_noise": NOISE},
    "eta as a numpy number": {"eta": np.float32(0.3), "variance_noise": NOISE},
    "a float for the state": {"sample": 0.5},
    "an integer state": {"sample": torch.arange(24).reshape(2, 3, 4)},
    "an output of one number": {"model_output": torch.tensor(0.3, dtype=torch.float64)},
    "a state and an output of one number": {"model_output": torch.tensor(0.3), "sample": torch.tensor(0.2)},
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
@pytest.mark.parametrize("call", CALLS)
def test_any_call_that_diffusers_takes(call, prediction_type):
    given = {"model_output": randn((2, 3, 4), 0), "sample": randn((2, 3, 4), 1), "timestep": 500, **CALLS[call]}
    dtype = given.pop("dtype", torch.float32)
    if dtype is torch.float16:
        given |= {name: given[name].to(dtype) for name in ("model_output", "sample")}
    ours, theirs = pair({"prediction_type": prediction_type})
    torch.testing.assert_close(
        ours.step(**given, return_dict=False), theirs.step(**given, return_dict=False), rtol=2e-6, atol=2e-6
    )


def test_an_eta_tensor_that_changes_in_place_or_needs_a_gradient():
    ours, theirs = pair({})
    x, output = randn((2, 3, 4), 0), randn((2, 3, 4), 1)
    eta = torch.tensor(0.3, requires_grad=True)
    for value in (0.3, 0.8):
        with torch.no_grad():
            eta.fill_(value)
        results = [s.step(output, 500, x, eta=eta, variance_noise=NOISE).prev_sample for s in (ours, theirs)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(result.sum(), eta) for result in results))


def test_learned_alphas_get_their_gradient():
    x, output = randn((2, 3, 4), 0), randn((2, 3, 4), 1)
    gradients = []
    for scheduler in pair({"limit": {"clip_sample": False}}):
        scheduler.step(output, 500, x)
        alphas = scheduler.alphas_cumprod.requires_grad_()
        (gradient,) = torch.autograd.grad(scheduler.step(output, 500, x).prev_sample.sum(), alphas)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)
    assert gradients[0][500] != 0


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum()),
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).square().sum()),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "vmap": torch.vmap,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_functions_are_diffusers(transform):
    x = randn((2, 3, 2), 0)
    results = [TRANSFORMS[transform](lambda x, s=s: s.step(x.sin(), 500, x, return_dict=False)[0])(x) for s in pair({})]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    # And what it has kept is good for a plain step.
    ours, theirs = pair({})
    torch.testing.assert_close(ours.step(x, 500, x).prev_sample, theirs.step(x, 500, x).prev_sample)


def test_a_trace_by_torch_jit_is_diffusers():
    output, x = randn((2, 3, 2), 0), randn((2, 3, 2), 1)
    traced = [torch.jit.trace(lambda o, x, s=s: s.step(o, 500, x, return_dict=False)[0], (output, x)) for s in pair({})]
    other = randn((2, 3, 2), 2)
    torch.testing.assert_close(traced[0](output, other), traced[1](output, other))


COMPILED = ["set_timesteps", "num_inference_steps", "prediction_type", "register_to_config", "alphas", "alphas' memory",
            "final_alpha_cumprod", "num_train_timesteps", "thresholding"]  # fmt: skip


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("change", COMPILED)
def test_a_compiled_step_sees_a_change(change, as_tensor):
    ours, theirs = pair({})
    x, output = randn((2, 3, 4), 0), randn((2, 3, 4), 1)
    torch._dynamo.reset()
    step = torch.compile(lambda o, t, x: ours.step(o, t, x, return_dict=False), backend="eager", fullgraph=True)
    for _ in range(2):
        for t in (500, 9):
            timestep = torch.tensor(t) if as_tensor else t
            expected = theirs.step(output, t, x, return_dict=False)
            torch.testing.assert_close(step(output, timestep, x), expected, rtol=2e-6, atol=2e-6)
        for scheduler in (ours, theirs):
            CHANGES[change](scheduler)


def test_a_compiled_step_sees_a_patch():
    ours, theirs = pair({})
    x, output = randn((2, 3, 4), 0), randn((2, 3, 4), 1)
    torch._dynamo.reset()
    step = torch.compile(lambda o, x: ours.step(o, 500, x, 0.5, variance_noise=NOISE)[0], backend="eager")
    for _ in range(2):
        expected = theirs.step(output, 500, x, 0.5, variance_noise=NOISE)[0]
        torch.testing.assert_close(step(output, x), expected, rtol=2e-6, atol=2e-6)
        for scheduler in (ours, theirs):
            CHANGES["a patched variance"](scheduler)


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
