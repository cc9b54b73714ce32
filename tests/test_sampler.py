import copy
import dataclasses
import inspect
import pickle
import types
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastddim import DDIMConfig, DDIMScheduler, DynamicThreshold, Sampler, SamplerOptions, Schedule, load_pipeline
from fastddim.interpolation import slerp
from fastddim.noise import STREAM_INITIAL, normal_numpy
from oracle import ddim, guide
from unets import small_unet

SHAPE = (3, 4, 4)


def numpy_model(x, t, shift=0.0):
    return 0.5 * np.tanh(x) + 0.05 * np.cos(t / 200) + shift


def torch_model(x, t, shift=None):
    t = t.view(-1, *[1] * (x.ndim - 1))
    shift = 0.0 if shift is None else shift.view(-1, *[1] * (x.ndim - 1))
    return 0.5 * torch.tanh(x) + (0.05 * torch.cos(t / 200) + shift).to(x.dtype)


def oracle_loop(config, pairs, seeds, shape, eta=0.0, guidance=None, rederive=True, start=None, large_variance=False):
    """The loop in float64: the papers' step, noise by the seeds."""
    schedule = Schedule(config)
    x = normal_numpy(seeds, 0, shape, STREAM_INITIAL).astype(np.float64) if start is None else start
    etas = np.broadcast_to(eta, len(pairs))
    for step, (t, t_next) in enumerate(pairs):
        output = numpy_model(x, t)
        if guidance is not None:
            scale, rescale, shift = guidance
            output = guide(numpy_model(x, t), numpy_model(x, t, shift), scale, rescale)
        x = ddim(
            x,
            output,
            *schedule.alpha_bar((t, t_next)),
            config.prediction_type,
            eta=etas[step],
            noise=normal_numpy(seeds, step, shape),
            clip=config.clip_sample_range if config.clip_sample else None,
            rederive=rederive,
            large_variance=large_variance,
        ).x_next
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(5,), (7, 2), (3, 4, 4), (2, 3, 4, 4)])
def test_the_loop_is_the_oracles(prediction_type, eta, shape):
    config = DDIMConfig(prediction_type=prediction_type, timestep_spacing="trailing")
    sampler = Sampler(torch_model, config, 30, eta=eta, sample_shape=shape)
    expected = oracle_loop(config, Schedule(config).pairs(30), [4, 9], shape, eta)
    np.testing.assert_allclose(sampler(2, seeds=[4, 9]), expected, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"eta": list(np.linspace(0, 1, 12))},
        {"eta": 1.0, "variance_type": "fixed_large"},
        {"use_clipped_model_output": False},
        {"transitions": "diffusers"},
        {"timesteps": [990, 700, 333, 20]},
        {"strength": 0.5},
    ],
)
def test_each_option_is_the_oracles(options):
    config = DDIMConfig(beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_spacing="linspace")
    steps = None if "timesteps" in options else 12
    chosen = {key: options[key] for key in ("timesteps", "strength", "transitions") if key in options}
    pairs = Schedule(config).pairs(steps, **chosen)
    sampler = Sampler(torch_model, config, steps, sample_shape=SHAPE, **options)
    expected = oracle_loop(
        config,
        pairs,
        [1, 2],
        SHAPE,
        options.get("eta", 0.0),
        rederive=options.get("use_clipped_model_output", True),
        large_variance="variance_type" in options,
    )
    np.testing.assert_allclose(sampler(2, seeds=[1, 2]), expected, atol=2e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_stacks_the_unconditional_half_first(rescale):
    config = DDIMConfig(prediction_type="v_prediction")
    sampler = Sampler(torch_model, config, 8, guidance_scale=3.0, guidance_rescale=rescale, sample_shape=SHAPE)
    result = sampler(2, seeds=0, shift=torch.full((2,), 0.3), uncond_kwargs={"shift": torch.zeros(2)})
    expected = oracle_loop(config, Schedule(config).pairs(8), [0, 1], SHAPE, guidance=(3.0, rescale, 0.3))
    np.testing.assert_allclose(result, expected, atol=2e-5)


@pytest.mark.parametrize("guidance_scale", [None, 2.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_seed_gives_the_same_picture_alone_in_a_batch_and_elsewhere(guidance_scale, eta):
    pipe = load_pipeline()
    sampler = Sampler(pipe.unet, pipe.scheduler, 10, eta=eta, guidance_scale=guidance_scale)

    def draw(seeds, labels):
        kwargs = {"class_labels": torch.tensor(labels)}
        uncond = None if guidance_scale is None else {"class_labels": torch.full((len(labels),), 10)}
        return sampler(len(seeds), seeds=seeds, uncond_kwargs=uncond, **kwargs)

    alone = draw([42], [7])
    first = draw([42, 1, 2, 3, 4, 5, 6], [7, 0, 1, 2, 3, 4, 5])
    fifth = draw([1, 2, 3, 4, 42, 5, 6], [0, 1, 2, 3, 7, 4, 5])
    torch.testing.assert_close(first[:1], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(fifth[4:5], alone, rtol=0, atol=1e-5)
    assert (first[1] - alone[0]).abs().max() > 0.1


def test_the_embedded_model_draws_the_digits_asked_for():
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    digits = load_digits()
    classifier = SVC(gamma="scale", C=10).fit(digits.images.reshape(-1, 64) / 8 - 1, digits.target)
    pipe = load_pipeline()
    sampler = Sampler(pipe.unet, pipe.scheduler, 20, guidance_scale=2.0)
    labels = torch.arange(50) % 10
    images = sampler(50, seeds=1000, class_labels=labels, uncond_kwargs={"class_labels": torch.full_like(labels, 10)})
    small = torch.nn.functional.avg_pool2d(images, 2).flatten(1)
    assert (classifier.predict(small.numpy()) == labels.numpy()).mean() >= 0.97


def test_a_diffusers_scheduler_gives_its_configuration_and_its_transitions():
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    theirs.set_timesteps(30)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(torch_model, theirs, 30, transitions="diffusers", sample_shape=SHAPE)
    expected = x
    for t in theirs.timesteps:
        expected = theirs.step(torch_model(expected, t.reshape(1)), t, expected).prev_sample
    torch.testing.assert_close(sampler(x), expected, rtol=1e-4, atol=1e-4)
    euler = Sampler(torch_model, diffusers.EulerDiscreteScheduler(beta_end=0.012), 10, sample_shape=SHAPE)
    assert euler.schedule.config.beta_end == 0.012
    assert DDIMScheduler.from_config(theirs.config).config.timestep_spacing == "trailing"


def test_callbacks_and_trajectory_show_every_state():
    sampler = Sampler(torch_model, DDIMConfig(), 6, sample_shape=SHAPE)
    seen = []
    result, trajectory = sampler(
        2,
        seeds=0,
        return_trajectory=True,
        progress=True,
        callback=lambda *step: seen.append((*step[:2], step[2].clone())),
    )
    assert trajectory.shape == (7, 2, *SHAPE)
    assert torch.equal(trajectory[-1], result)
    assert [step[:2] for step in seen] == list(enumerate(sampler.table.timesteps))
    assert all(torch.equal(state, trajectory[k + 1]) for k, (_, _, state) in enumerate(seen))
    np.testing.assert_array_equal(trajectory[0], normal_numpy([0, 1], 0, SHAPE, STREAM_INITIAL))


def test_a_callback_may_stop_the_run():
    calls = []

    def stop(step, t, x, x0):
        calls.append(step)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sampler(torch_model, DDIMConfig(), 6, sample_shape=SHAPE)(1, seeds=0, callback=stop)
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("graph", ["off", "step"])
@pytest.mark.parametrize(
    ("dtype", "model_dtype", "atol"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.bfloat16, 0.02),
        (torch.bfloat16, torch.bfloat16, 0.1),
    ],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_interval": (0.25, 0.75)}, {"batch_buckets": (4,)}],
)
def test_what_a_callback_sets_holds(options, dtype, model_dtype, atol, graph):
    """Planning by inpainting as Diffuser does it (arXiv:2205.09991): the first entries of a plan are given."""
    given = torch.tensor([[0.5, -1.0], [0.25, 2.0]])
    seen = []

    class Planner(torch.nn.Linear):
        def forward(self, x, t, shift):
            seen.append(x.float().clone())
            return torch_model(x, t, shift)

    def condition(step, t, x, x0):
        x[:, 0] = given

    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample")
    options = {"dtype": dtype, "graph": graph, "sample_shape": (6, 2), **options}
    sampler = Sampler(Planner(1, 1).to(model_dtype), scheduler, 8, **options)
    x = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    x[:, 0] = given
    uncond = {"uncond_kwargs": {"shift": torch.zeros(2)}} if "guidance_scale" in options else {}
    call = {"shift": torch.full((2,), 0.3), **uncond}
    sampler.warmup(x, **call)
    seen.clear()
    result, trajectory = sampler(x, callback=condition, return_trajectory=True, **call)
    assert torch.equal(result[:, 0].float(), given) and torch.equal(trajectory[-1], result)
    # Rows behind these fill a bucket.
    firsts = (0, 2) if uncond else (0,)
    assert all(torch.equal(rows[k : k + 2, 0], given) for rows in seen for k in firsts if k < len(rows))
    scheduler.set_timesteps(8)
    expected, guided = x, sampler._guided_steps
    for step, t in enumerate(scheduler.timesteps):
        output = torch_model(expected, t.reshape(1), call["shift"])
        if uncond and step in guided:
            plain = torch_model(expected, t.reshape(1), torch.zeros(2))
            output = plain + 2.0 * (output - plain)
        expected = scheduler.step(output, t, expected).prev_sample
        expected[:, 0] = given
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=atol)


def test_a_models_answer_may_be_a_tensor_a_tuple_or_an_output():
    class Output:
        def __init__(self, sample):
            self.sample = sample

    results = [
        Sampler(lambda x, t, wrap=wrap: wrap(torch_model(x, t)), DDIMConfig(), 3, sample_shape=SHAPE)(1, seeds=0)
        for wrap in (lambda y: y, lambda y: (y, None), Output)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    with pytest.raises(TypeError, match="model: returned NoneType"):
        Sampler(lambda x, t: None, DDIMConfig(), 3, sample_shape=SHAPE)(1, seeds=0)


def test_a_half_precision_model_keeps_a_float32_state():
    seen = set()

    class Half(torch.nn.Linear):
        def forward(self, x, t, condition):
            seen.update({x.dtype, condition.dtype})
            return super().forward(x)

    model = Half(4, 4).to(torch.bfloat16)
    result = Sampler(model, DDIMConfig(), 3, sample_shape=(4,))(2, seeds=0, condition=torch.ones(2, 4))
    assert result.dtype == torch.float32
    assert seen == {torch.bfloat16}


def test_the_callers_state_is_left_alone():
    x = torch.randn(2, *SHAPE)
    kept = x.clone()
    Sampler(torch_model, DDIMConfig(), 3)(x)
    assert torch.equal(x, kept)


def test_add_noise_is_the_forward_process_at_the_first_timestep():
    sampler = Sampler(torch_model, DDIMConfig(), 10, strength=0.4, sample_shape=SHAPE)
    x0 = torch.randn(2, *SHAPE)
    noise = torch.tensor(normal_numpy([5, 6], 0, SHAPE, STREAM_INITIAL))
    t = torch.tensor([sampler.table.timesteps[0]] * 2)
    assert t[0] == 300
    torch.testing.assert_close(sampler.add_noise(x0, 5), diffusers.DDIMScheduler().add_noise(x0, noise, t))


def test_the_options_are_one_frozen_record_that_the_signature_shows():
    sampler = Sampler(torch_model, DDIMConfig(), 4, timesteps=None, eta=np.array([0, 0.5, 1, 0]), batch_buckets=[8, 2])
    options = sampler.options
    assert options == SamplerOptions(num_inference_steps=4, eta=(0.0, 0.5, 1.0, 0.0), batch_buckets=(2, 8))
    assert hash(options) == hash(dataclasses.replace(options))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.eta = 1.0
    shown = inspect.signature(Sampler).parameters
    fields = {field.name: field for field in dataclasses.fields(SamplerOptions)}
    assert list(shown) == ["model", "scheduler", *fields]
    for name, field in fields.items():
        assert shown[name].default == field.default and (name == "num_inference_steps" or shown[name].kind.value == 3)
        assert getattr(sampler, name) == getattr(options, name) or name in ("sample_shape", "device", "limit", "method")
    assert "seeds" in inspect.signature(sampler).parameters
    assert sampler.replace(eta=0.0).options == dataclasses.replace(options, eta=0.0)
    # An iterator would be empty the second time.
    by_iterator = Sampler(torch_model, DDIMConfig(), timesteps=iter([900, 5]), sample_shape=iter(SHAPE))
    assert by_iterator.replace(eta=1.0).table.timesteps == (900, 5) and by_iterator.sample_shape == SHAPE


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("guidance_scale", r"use sampler\.replace\(guidance_scale=3\)"),
        ("device", r"use sampler\.replace\(device=3\)"),
        ("table", r"use sampler\.replace\(scheduler=\.\.\.\)"),
        ("schedule", r"use sampler\.replace\(scheduler=\.\.\.\)"),
        ("model", "make another Sampler"),
        ("guidence", "make another Sampler"),
    ],
)
def test_nothing_that_is_assigned_is_ignored(name, fix):
    sampler = Sampler(torch_model, DDIMConfig(), 4, sample_shape=SHAPE)
    with pytest.raises(AttributeError, match=f"{name}: a Sampler does not change; {fix}"):
        setattr(sampler, name, 3)
    with pytest.raises(AttributeError, match=f"{name}: a Sampler does not change; make another Sampler"):
        delattr(sampler, name)
    assert not hasattr(sampler, "guidence") and sampler.guidance_scale is None


def test_an_unknown_option_is_named_with_the_nearest_one():
    with pytest.raises(TypeError, match=r"guidence_scale: no option of Sampler; did you mean 'guidance_scale'\?"):
        Sampler(torch_model, DDIMConfig(), 4, guidence_scale=2.0)
    with pytest.raises(TypeError, match="zzz: no option of Sampler; pass any of num_inference_steps, "):
        Sampler(torch_model, DDIMConfig(), 4).replace(zzz=2.0)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_a_copy_samples_the_same(again):
    pipe = load_pipeline()
    sampler = Sampler(pipe.unet, pipe.scheduler, 2, graph="step", eta=0.5)
    label = {"class_labels": torch.tensor([3])}
    sampler.warmup(1, **label)
    expected = sampler(1, seeds=0, **label)
    copied = again(sampler)
    copied.warmup(1, **label)
    assert torch.equal(copied(1, seeds=0, **label), expected) and copied.options == sampler.options
    assert (copied.model is sampler.model) == (copied.graphs is sampler.graphs) == (again is copy.copy)
    assert len(copied.graphs) == len(sampler.graphs) == 1
    with pytest.raises(AttributeError, match="does not change"):
        copied.eta = 0.0


def test_threads_may_share_a_sampler():
    sampler = Sampler(torch_model, DDIMConfig(), 10, eta=1.0, sample_shape=SHAPE)
    expected = [sampler(2, seeds=10 * k) for k in range(6)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda k: sampler(2, seeds=10 * k), range(6)))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_numbers_may_be_numpys_and_tensors():
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(5)
    expected = Sampler(torch_model, DDIMConfig(), 5, sample_shape=SHAPE)(2, seeds=3)
    for steps in ({"timesteps": scheduler.timesteps}, {"timesteps": scheduler.timesteps.numpy()}):
        for shape in (torch.tensor(SHAPE), np.array(SHAPE)):
            sampler = Sampler(torch_model, scheduler, sample_shape=shape, **steps)
            for start, seeds in ((np.int64(2), np.int64(3)), (torch.tensor(2), [np.uint8(3), torch.tensor(4)])):
                assert torch.equal(sampler(start, seeds=seeds), expected)
    for number in (np.int32(5), torch.tensor(5)):
        assert torch.equal(Sampler(torch_model, DDIMConfig(), number, sample_shape=SHAPE)(2, seeds=3), expected)
    for start in (np.float32(2), torch.tensor(2.0), torch.tensor(True), np.int64(0)):
        with pytest.raises(ValueError, match="start: "):
            sampler(start, seeds=0)


class Mps(TorchFunctionMode):
    """Torch as with a device that has no float64: tensors on it are on the CPU, and say that they are not."""

    def __init__(self):
        super().__init__()
        # Kept, so that no other tensor takes their place.
        self.on_cpu = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        leaves = pytree.tree_leaves((args, kwargs))
        on_cpu = all(id(leaf) in self.on_cpu for leaf in leaves if isinstance(leaf, torch.Tensor))
        if name == "__get__" and getattr(function, "__self__", None) is torch.Tensor.device:
            return torch.device("cpu" if on_cpu else "mps")
        places = []
        if name != "device":
            places = [torch.device(leaf).type for leaf in leaves if isinstance(leaf, torch.device) or leaf == "mps"]
            on_cpu = places == ["cpu"] if places else on_cpu
            args, kwargs = pytree.tree_map(
                lambda leaf: torch.device("cpu") if isinstance(leaf, torch.device) or leaf == "mps" else leaf,
                (args, dict(kwargs)),
            )
        result = function(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            if places and result is args[0]:
                result = result.view_as(result)
            if on_cpu:
                self.on_cpu[id(result)] = result
            elif result.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            else:
                self.on_cpu.pop(id(result), None)
        return result


@pytest.mark.parametrize("options", [{}, {"limit": DynamicThreshold(0.9, 2.0)}, {"guidance_scale": 2.0}])
def test_seeds_need_no_float64_on_the_device(options):
    call = {"shift": torch.full((2,), 0.3)}
    if options.get("guidance_scale"):
        call["uncond_kwargs"] = {"shift": torch.zeros(2)}
    arguments = {"num_inference_steps": 4, "eta": 1.0, "sample_shape": SHAPE, "backend": "reference", **options}
    expected = Sampler(torch_model, DDIMConfig(), **arguments)(2, seeds=3, **call)
    with Mps():
        sampler = Sampler(torch_model, DDIMConfig(), device="mps", **arguments)
        assert sampler.device.type == "mps"
        result = sampler(2, seeds=3, **call)
        ends = [torch.ones(3).to("mps"), torch.arange(3.0).to("mps")]
        between = slerp(*ends, 4)
        assert between.device.type == "mps"
    assert torch.equal(result, expected)
    assert torch.equal(between, slerp(torch.ones(3), torch.arange(3.0), 4))


@pytest.mark.parametrize(
    ("make", "options", "shape"),
    [
        (diffusers.UNet1DModel, {"sample_size": 64, "in_channels": 2}, (2, 64)),
        (diffusers.UNet2DModel, {"sample_size": 8, "out_channels": 6}, (3, 8, 8)),
        (diffusers.UNet2DModel, {"sample_size": (8, 16)}, (3, 8, 16)),
        (diffusers.UNet2DConditionModel, {"sample_size": 8, "in_channels": 9}, (4, 8, 8)),
        (diffusers.UNet3DConditionModel, {"sample_size": 8}, None),
        (diffusers.UNetMotionModel, {"sample_size": 8}, None),
        (diffusers.UNetSpatioTemporalConditionModel, {"sample_size": 8}, None),
    ],
)
def test_the_shape_is_that_of_the_models_class(make, options, shape):
    # The configuration is all that is read, and most of these are large.
    model = torch.nn.Module()
    model.__class__ = type(make.__name__, (torch.nn.Module,), {"forward": fail})
    with torch.device("meta"):
        model.config = make(**options).config
    assert Sampler(model, DDIMConfig(), 2).sample_shape == shape


def test_a_one_dimensional_model_is_sampled_as_diffusers_samples_it():
    torch.manual_seed(0)
    unet = diffusers.UNet1DModel(
        sample_size=64, in_channels=2, out_channels=2, block_out_channels=(32, 32), norm_num_groups=4,
        down_block_types=("DownBlock1D", "DownBlock1D"), up_block_types=("UpBlock1D", "UpBlock1D"),
        use_timestep_embedding=True, time_embedding_type="positional", act_fn="silu", extra_in_channels=0,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(3)
    result = Sampler(unet, scheduler, use_clipped_model_output=False, timesteps=scheduler.timesteps)(2, seeds=[4, 9])
    expected = torch.from_numpy(normal_numpy([4, 9], 0, (2, 64), STREAM_INITIAL))
    with torch.no_grad():
        for t in scheduler.timesteps:
            expected = scheduler.step(unet(expected, t).sample, t, expected).prev_sample
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"hoist": True}, {"graph": "step"}])
def test_of_a_learned_variance_the_mean_is_taken(options):
    torch.manual_seed(0)
    unet = small_unet(in_channels=3, out_channels=6, num_class_embeds=3).eval()
    theirs = diffusers.DDPMScheduler(clip_sample=False)
    mean = lambda x, t, class_labels: unet(x, t, class_labels).sample[:, :3]  # noqa: E731
    kwargs = {"class_labels": torch.tensor([0, 1])}
    for guidance in ({}, {"guidance_scale": 3.0}):
        call = {**kwargs, "uncond_kwargs": {"class_labels": torch.tensor([2, 2])}} if guidance else kwargs
        expected = Sampler(mean, theirs, 3, sample_shape=(3, 8, 8), **guidance)(2, seeds=0, **call)
        result = Sampler(unet, theirs, 3, **options, **guidance)(2, seeds=0, **call)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", ["unet", "dit"])
def test_guidance_without_an_unconditional_half_takes_no_class(make):
    torch.manual_seed(0)
    if make == "unet":
        model, null = small_unet(num_class_embeds=5).eval(), 4
    else:
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=1, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
            num_embeds_ada_norm=5,
        ).eval()  # fmt: skip
        null = 5
    sampler = Sampler(model, DDIMConfig(), 2, guidance_scale=7.5)
    labels = torch.tensor([0, 3])
    given = sampler(2, seeds=0, class_labels=labels, uncond_kwargs={"class_labels": torch.full((2,), null)})
    assert torch.equal(sampler(2, seeds=0, class_labels=labels), given)
    equal_halves = sampler(2, seeds=0, class_labels=labels, uncond_kwargs={})
    assert (equal_halves - given).abs().max() > 1e-3


def test_guidance_that_would_guide_nowhere_is_refused():
    sampler = Sampler(torch_model, DDIMConfig(), 2, guidance_scale=7.5, sample_shape=SHAPE)
    said = r"uncond_kwargs: None with guidance_scale 7\.5, but the model is called with "
    for kwargs, names in (({}, "no keyword argument"), ({"shift": torch.ones(2)}, "shift")):
        with pytest.raises(ValueError, match=f"{said}{names}"):
            sampler(2, seeds=0, **kwargs)
        with pytest.raises(ValueError, match=said):
            sampler.warmup(2, **kwargs)
    # Both halves are in what is given, or in the model.
    stacked = sampler(2, seeds=0, shift=torch.tensor([0.0, 0.0, 1.0, 1.0]))
    halves = sampler(2, seeds=0, shift=torch.ones(2), uncond_kwargs={"shift": torch.zeros(2)})
    own = Sampler(
        lambda x, t: torch_model(x, t, torch.tensor([0.0, 0.0, 1.0, 1.0])), DDIMConfig(), 2, guidance_scale=7.5
    )
    assert torch.equal(stacked, halves)
    start = torch.from_numpy(normal_numpy([0, 1], 0, SHAPE, STREAM_INITIAL))
    assert torch.equal(own(start, uncond_kwargs={}), halves)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("rescale", [False, True])
def test_cogvideox_levels_are_shifted(prediction_type, rescale):
    options = {"prediction_type": prediction_type, "rescale_betas_zero_snr": rescale and prediction_type != "epsilon"}
    theirs = diffusers.CogVideoXDDIMScheduler(**options, timestep_spacing="trailing", snr_shift_scale=2.0)
    theirs.set_timesteps(10)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = Sampler(torch_model, theirs, 10, sample_shape=SHAPE, dtype=torch.float64)
    expected = x
    for t in theirs.timesteps:
        expected = theirs.step(torch_model(expected, t.reshape(1)), t, expected, return_dict=False)[0]
    assert sampler.method == "ddim" and sampler.limit is None
    torch.testing.assert_close(sampler(x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ValueError, match="scheduler: FlowMatchHeunDiscreteScheduler is the class of no sampling method here"
    ):
        Sampler(torch_model, diffusers.FlowMatchHeunDiscreteScheduler(), 10)


@pytest.mark.parametrize("change", ["alphas_cumprod", "beta_start"])
def test_levels_that_a_configuration_does_not_give_are_refused(change):
    scheduler = diffusers.DDIMScheduler()
    if change == "alphas_cumprod":
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    else:
        # diffusers reads it no more.
        scheduler.config.beta_start = 0.001
    with pytest.raises(ValueError, match=r"alphas_cumprod: other numbers than .*; pass one made with trained_betas="):
        Sampler(torch_model, scheduler, 10)


def test_tensors_are_taken_as_numbers():
    given = {"num_inference_steps": 4, "guidance_scale": 2.0, "guidance_rescale": 0.5, "strength": 0.75}
    for convert in (torch.tensor, np.array):
        sampler = Sampler(torch_model, DDIMConfig(), **{name: convert(value) for name, value in given.items()})
        assert {name: getattr(sampler, name) for name in given} == given


@pytest.mark.parametrize("labels", [[1, 2], torch.tensor([1, 2, 3]), torch.tensor(1)])
def test_labels_without_a_row_for_each_sample_are_named(labels):
    model = small_unet(num_class_embeds=4)
    with pytest.raises(ValueError, match=r"class_labels: .*; pass a tensor of 2 labels"):
        Sampler(model, DDIMConfig(), 2, guidance_scale=2.0)(2, seeds=0, class_labels=labels)


def fail(*args, **kwargs):
    raise AssertionError("the model was called before the arguments were checked")


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"scheduler": 5}, TypeError, ["scheduler", "int", "Schedule", "StepTable"]),
        ({"model": 5}, TypeError, ["model", "int"]),
        ({"num_inference_steps": 1001}, ValueError, ["num_inference_steps", "1001", "[1, 1000]"]),
        ({"num_inference_steps": None}, ValueError, ["num_inference_steps", "timesteps"]),
        ({"eta": 1.1}, ValueError, ["eta", "1.1", "[0, 1]"]),
        ({"guidance_scale": float("nan")}, ValueError, ["guidance_scale", "nan"]),
        ({"guidance_rescale": 0.5}, ValueError, ["guidance_rescale", "0.5", "guidance_scale"]),
        ({"guidance_scale": 2.0, "guidance_rescale": 1.5}, ValueError, ["guidance_rescale", "1.5", "[0, 1]"]),
        ({"dtype": torch.int64}, ValueError, ["dtype", "int64"]),
        ({"dtype": "float32"}, ValueError, ["dtype: 'float32'", "torch.dtype"]),
        ({"device": "gpu"}, ValueError, ["device: 'gpu'", "'cuda:0'"]),
        ({"device": 0.5}, ValueError, ["device: 0.5", "'cuda:0'"]),
        ({"eta": "most"}, ValueError, ["eta: 'most'", "[0, 1]"]),
        ({"guidance_interval": 0.5}, ValueError, ["guidance_interval: 0.5", "two fractions"]),
        ({"guidance_interval": (0, 0.5, 1)}, ValueError, ["guidance_interval: (0, 0.5, 1)", "two fractions"]),
        ({"batch_buckets": 4}, ValueError, ["batch_buckets: 4", "list of integers"]),
        ({"num_inference_steps": None, "timesteps": 4}, ValueError, ["timesteps: 4", "list of numbers"]),
        ({"sample_shape": 8}, ValueError, ["sample_shape: 8", "list of integers"]),
        ({"sample_shape": (3, 4.5)}, ValueError, ["sample_shape: 4.5", "integer"]),
        ({"strength": 0}, ValueError, ["strength", "0"]),
        (
            {"scheduler": DDIMConfig(rescale_betas_zero_snr=True, timestep_spacing="trailing")},
            ValueError,
            ["'epsilon'", "999", "v_prediction"],
        ),
    ],
)
def test_bad_options_are_refused(options, error, parts):
    arguments = {"model": fail, "scheduler": DDIMConfig(), "num_inference_steps": 5, "sample_shape": SHAPE, **options}
    with pytest.raises(error) as caught:
        Sampler(**arguments)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"start": np.zeros((2, *SHAPE))}, r"start: ndarray; pass a tensor \[B, 3, 4, 4\]"),
        ({"start": 2, "callback": 3}, "callback: 3; pass a function of"),
    ],
)
def test_calls_of_other_types_are_refused_before_the_model_runs(call, message):
    sampler = Sampler(fail, DDIMConfig(), 5, sample_shape=SHAPE)
    with pytest.raises(TypeError, match=message):
        sampler(seeds=1, **call)


@pytest.mark.parametrize(
    ("options", "call", "parts"),
    [
        ({}, {"start": 2}, ["seeds", "None"]),
        ({}, {"start": 2, "seeds": [1]}, ["seeds", "1", "batch of 2"]),
        ({}, {"start": 2, "seeds": 1.5}, ["seeds: 1.5", "integer"]),
        ({}, {"start": 2, "seeds": torch.Generator()}, ["seeds: <torch", "integer"]),
        ({}, {"start": 0, "seeds": 1}, ["start", "0", ">= 1"]),
        ({}, {"start": torch.zeros(2, 5)}, ["start", "(2, 5)", "[B, 3, 4, 4]"]),
        ({}, {"start": torch.zeros(2, *SHAPE, dtype=torch.int64)}, ["start", "int64"]),
        ({"eta": 1.0}, {"start": torch.zeros(2, *SHAPE)}, ["seeds", "None"]),
        ({"sample_shape": None}, {"start": 2, "seeds": 1}, ["sample_shape"]),
        ({}, {"start": 1, "seeds": 1, "uncond_kwargs": {"a": 1}}, ["uncond_kwargs", "guidance_scale"]),
        ({"guidance_scale": 2.0}, {"start": 1, "seeds": 1, "uncond_kwargs": {"a": 1}}, ["uncond_kwargs", "['a']"]),
        (
            {"guidance_scale": 2.0},
            {"start": 2, "seeds": 1, "a": torch.zeros(2), "uncond_kwargs": {"a": torch.zeros(3)}},
            ["uncond_kwargs", "'a'", "(2,)"],
        ),
        (
            {"guidance_scale": 2.0},
            {"start": 2, "seeds": 1, "a": 1.0, "uncond_kwargs": {"a": 0.0}},
            ["uncond_kwargs", "'a'", "2 rows"],
        ),
    ],
)
def test_bad_calls_are_refused_before_the_model_runs(options, call, parts):
    sampler = Sampler(
        **{"model": fail, "scheduler": DDIMConfig(), "num_inference_steps": 5, "sample_shape": SHAPE, **options}
    )
    with pytest.raises(ValueError) as caught:
        sampler(**call)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_the_arguments_of_any_bound_callable_are_checked():
    class Model:
        # No weak reference to it can be made.
        __slots__ = ()

        def __call__(self, owner, x, t, scale):
            return scale * x

    module = torch.nn.Linear(1, 1)
    sampler = Sampler(module, DDIMConfig(), 2, sample_shape=(3,))
    module.forward = types.MethodType(Model(), module)
    assert sampler(1, seeds=0, scale=0.5).shape == (1, 3)
    with pytest.raises(ValueError, match="model_kwargs"):
        sampler(1, seeds=0)
    # Another one in its place is another signature.
    module.forward = lambda x, t: 0.5 * x
    assert sampler(1, seeds=0).shape == (1, 3)
    with pytest.raises(ValueError, match="model_kwargs"):
        sampler(1, seeds=0, scale=0.5)


def test_a_subclass_keeps_attributes_of_its_own_and_its_class():
    class Named(Sampler):
        def __init__(self, *args, name, **options):
            super().__init__(*args, **options)
            self.name = name

    sampler = Named(torch_model, DDIMConfig(), 4, name="eight", sample_shape=SHAPE)
    assert sampler.name == "eight" and type(sampler.replace(num_inference_steps=8)) is Named
    assert sampler.replace(num_inference_steps=8).replace(eta=0.5).name == "eight"
    with pytest.raises(AttributeError, match="eta: a Sampler does not change"):
        sampler.eta = 1.0
    with pytest.raises(AttributeError, match="eta: a Sampler does not change"):
        del sampler.eta
    del sampler.name
    assert not hasattr(sampler, "name")


def test_a_schedulers_assigned_attributes_are_heeded():
    scheduler = diffusers.DDIMScheduler()
    scheduler.config.prediction_type = "v_prediction"
    scheduler.config.clip_sample_range = 0.3
    samplers = [Sampler(lambda x, t: 0.5 * x, each, 4, sample_shape=(3,)) for each in (
        scheduler, diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample_range=0.3))]  # fmt: skip
    assert torch.equal(*(sampler(2, seeds=0) for sampler in samplers))


@pytest.mark.parametrize("graph", ["off", "step"])
@pytest.mark.parametrize("options", [{"eta": 0.5}, {"limit": DynamicThreshold(0.9, 2.0)}, {"method": "dpmsolver++"}])
def test_another_default_device_changes_nothing(graph, options):
    def sample():
        sampler = Sampler(lambda x, t: 0.5 * x, DDIMConfig(), 4, sample_shape=(3, 5), graph=graph, **options)
        # The second run is captured.
        return [sampler(2, seeds=7) for _ in range(2)]

    expected = sample()
    with torch.device("meta"):
        assert all(map(torch.equal, sample(), expected))
