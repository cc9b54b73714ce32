"""`Sampler.invert` and `Sampler.interpolate`, on data whose ODE is solved: x ~ N(mean, deviation^2)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastddim import DDIMConfig, Sampler, Schedule, load_pipeline, slerp
from fastddim.noise import STREAM_INITIAL, normal_numpy

SHAPE = (3, 4)
MEAN, DEVIATION = 0.3, 0.4
KINDS = ["epsilon", "sample", "v_prediction"]


def gaussian_model(config):
    """What a perfect model predicts for that data, in float64."""
    alphas_cumprod = torch.tensor(Schedule(config).alphas_cumprod)

    def model(x, t, shift=None):
        alpha_bar = alphas_cumprod[t].view(-1, *[1] * (x.ndim - 1))
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        mean = MEAN if shift is None else MEAN + shift.view(-1, *[1] * (x.ndim - 1))
        x0 = mean + signal * DEVIATION**2 * (x - signal * mean) / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)
        eps = (x - signal * x0) / sigma
        return {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - sigma * x0}[config.prediction_type]

    return model


def gaussian_sampler(steps, kind="epsilon", **options):
    fields = {"clip_sample": False, "timestep_spacing": "trailing"}
    config = DDIMConfig(prediction_type=kind, **{key: options.pop(key, value) for key, value in fields.items()})
    return Sampler(gaussian_model(config), config, steps, sample_shape=SHAPE, dtype=torch.float64, **options)


def clean(count=5):
    noise = normal_numpy(range(count), 0, SHAPE, STREAM_INITIAL).astype(np.float64)
    return torch.tensor(MEAN + DEVIATION * noise)


def exact_state(x0, alpha_bar):
    """The ODE keeps each point's distance from the mean, in standard deviations."""
    deviation = np.sqrt(alpha_bar * DEVIATION**2 + 1 - alpha_bar)
    return np.sqrt(alpha_bar) * MEAN + deviation * (x0 - MEAN) / DEVIATION


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "quadratic"])
def test_encoding_and_round_trip_come_closer_with_more_steps(kind, spacing):
    x0 = clean()
    encoding, reconstruction = [], []
    for steps in (10, 20, 50, 100, 250):
        sampler = gaussian_sampler(steps, kind, timestep_spacing=spacing)
        x = sampler.invert(x0)
        exact = exact_state(x0, sampler.schedule.alpha_bar(sampler.table.timesteps[:1])[0])
        encoding.append(float((x - exact).square().mean()))
        reconstruction.append(float((sampler(x) - x0).square().mean()))
    # With few trailing steps two errors cancel on the way to x_T.
    assert np.all(np.diff(encoding[2:]) < 0) and encoding[-1] < 2e-4
    assert np.all(np.diff(reconstruction) < 0) and reconstruction[-1] < 2e-4
    # Euler's method is of first order, so its squared error falls with the square of the step.
    assert reconstruction[2] / reconstruction[4] > 10


@pytest.mark.parametrize("options", [{}, {"strength": 0.5}, {"transitions": "diffusers"}])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_what_the_model_predicts_makes_no_difference(steps, options):
    x0 = clean()
    options = {} if steps == 1 else options
    states = [gaussian_sampler(steps, kind, **options).invert(x0) for kind in KINDS]
    torch.testing.assert_close(states[0], states[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(states[0], states[2], rtol=1e-9, atol=1e-9)


def test_a_strength_encodes_to_its_first_timestep():
    sampler = gaussian_sampler(200, strength=0.5)
    t = sampler.table.timesteps[0]
    assert t == 499
    x = sampler.invert(clean())
    np.testing.assert_allclose(x, exact_state(clean(), sampler.schedule.alpha_bar([t])[0]), atol=0.04)
    np.testing.assert_allclose(sampler(x), clean(), atol=0.04)


def test_guidance_is_undone():
    shifts = {"shift": torch.full((5,), 0.2), "uncond_kwargs": {"shift": torch.zeros(5)}}
    errors = []
    for steps in (20, 100):
        sampler = gaussian_sampler(steps, guidance_scale=2.0)
        errors.append(float((sampler(sampler.invert(clean(), **shifts), **shifts) - clean()).square().mean()))
    assert errors[1] < errors[0] / 5 and errors[1] < 2e-3


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.25, 0.75), (0.0, 0.0), (1.0, 1.0)])
def test_guidance_is_on_at_the_same_timesteps_both_ways(interval):
    sampler = gaussian_sampler(8, guidance_scale=2.0, guidance_interval=interval)
    shifts = {"shift": torch.full((5,), 0.2), "uncond_kwargs": {"shift": torch.zeros(5)}}
    seen = {}
    model = sampler.model

    def watch(x, t, shift):
        seen.setdefault(len(x) > 5, set()).add(int(t[0]))
        return model(x, t, shift)

    watched = Sampler(
        watch,
        sampler.schedule,
        8,
        guidance_scale=2.0,
        guidance_interval=interval,
        sample_shape=SHAPE,
        dtype=torch.float64,
    )
    x = watched.invert(clean(), **shifts)
    inverted, seen = seen, {}
    watched(x, **shifts)
    # Nothing is encoded from the noisiest timestep.
    sampled = {guided: ts - {sampler.table.timesteps[0]} for guided, ts in seen.items()}
    assert {k: v for k, v in inverted.items() if v} == {k: v for k, v in sampled.items() if v}


@pytest.mark.parametrize("guidance_scale", [None, 2.0])
@pytest.mark.parametrize("graph", ["loop", "step"])
def test_graphs_and_padded_batches_encode_the_same(graph, guidance_scale):
    shifts = {"shift": torch.full((5,), 0.2)}
    if guidance_scale is not None:
        shifts["uncond_kwargs"] = {"shift": torch.zeros(5)}
    expected = gaussian_sampler(10, guidance_scale=guidance_scale).invert(clean(), **shifts)
    sampler = gaussian_sampler(10, guidance_scale=guidance_scale, graph=graph, batch_buckets=(8,))
    torch.testing.assert_close(sampler.invert(clean(), **shifts), expected)
    first = sampler(expected, **shifts)
    sampler.invert(2 * clean(), **shifts)
    assert torch.equal(sampler(expected, **shifts), first)


def test_encoding_has_no_limit():
    x0 = 3 * clean()
    limited, free = gaussian_sampler(10, clip_sample=True), gaussian_sampler(10)
    assert torch.equal(limited.invert(x0), free.invert(x0))
    assert not torch.allclose(limited(free.invert(x0)), free(free.invert(x0)))


def test_the_callers_tensor_is_left_alone_and_the_samplers_dtype_returned():
    x0 = clean().float()
    kept = x0.clone()
    assert gaussian_sampler(3).invert(x0, progress=True).dtype == torch.float64
    assert torch.equal(x0, kept)


def test_real_digits_come_back_from_the_embedded_model(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    from digits_data import load_split

    pipe = load_pipeline()
    x0 = load_split("held_out")[0][:4]
    no_class = {"class_labels": torch.full((4,), 10)}
    errors = []
    for steps in (5, 20):
        sampler = Sampler(pipe.unet, pipe.scheduler, steps)
        x = sampler.invert(x0, **no_class)
        errors.append(float(((sampler(x, **no_class) - x0) / 2).square().mean()))
    assert errors[1] < 3e-3 and errors[1] < errors[0] / 3


@pytest.mark.parametrize("as_state", [(), ("a",), ("a", "b")])
def test_interpolation_decodes_the_great_circle(as_state):
    sampler = gaussian_sampler(10)
    starts = {"a": 4, "b": 9}
    states = {name: torch.tensor(normal_numpy([seed], 0, SHAPE, STREAM_INITIAL)[0]) for name, seed in starts.items()}
    ends = {name: states[name] if name in as_state else seed for name, seed in starts.items()}
    samples = sampler.interpolate(**ends, n=6)
    assert samples.shape == (6, *SHAPE)
    torch.testing.assert_close(samples, sampler(slerp(states["a"].double(), states["b"].double(), 6)))
    torch.testing.assert_close(samples[:1], sampler(1, seeds=4))
    torch.testing.assert_close(samples[-1:], sampler(1, seeds=9))


def test_interpolation_passes_the_models_arguments_on():
    sampler = gaussian_sampler(10, guidance_scale=2.0)
    shifts = {"shift": torch.linspace(0, 1, 4), "uncond_kwargs": {"shift": torch.zeros(4)}}
    samples = sampler.interpolate(1, 1, 4, **shifts)
    torch.testing.assert_close(samples, sampler(4, seeds=[1] * 4, **shifts))
    assert (samples.flatten(1).mean(1).diff() > 0.1).all()


def fail(*args, **kwargs):
    raise AssertionError("the model was called before the arguments were checked")


@pytest.mark.parametrize(
    ("options", "method", "arguments", "error", "parts"),
    [
        ({"eta": 0.5}, "invert", [torch.zeros(2, *SHAPE)], ValueError, ["eta", "inversion needs eta 0"]),
        ({"eta": 0.5}, "interpolate", [1, 2, 3], ValueError, ["eta", "interpolation needs eta 0"]),
        ({}, "invert", [torch.zeros(2, 5)], ValueError, ["x0: shape (2, 5)", "[B, 3, 4]"]),
        ({}, "invert", [torch.zeros(*SHAPE)], ValueError, ["x0: shape (3, 4)", "[B, 3, 4]"]),
        ({}, "invert", [torch.zeros(2, *SHAPE, dtype=torch.uint8)], ValueError, ["x0: torch.uint8", "floating-point"]),
        ({}, "invert", [3], TypeError, ["x0: int", "[B, 3, 4]"]),
        ({"sample_shape": None}, "invert", [torch.tensor(1.0)], ValueError, ["x0", "[B, ...]"]),
        ({}, "interpolate", [1, 2, 1], ValueError, ["n: 1", ">= 2"]),
        ({}, "interpolate", [1, torch.zeros(2, *SHAPE), 3], ValueError, ["b: shape (2, 3, 4)", "pass [3, 4]"]),
        ({}, "interpolate", [torch.zeros(SHAPE, dtype=torch.int64), 2, 3], ValueError, ["a: torch.int64", "[3, 4]"]),
        ({}, "interpolate", [-1, 2, 3], ValueError, ["seeds: -1"]),
        ({"sample_shape": None}, "interpolate", [1, 2, 3], ValueError, ["sample_shape"]),
    ],
)
def test_bad_calls_are_refused_before_the_model_runs(options, method, arguments, error, parts):
    sampler = Sampler(
        **{"model": fail, "scheduler": DDIMConfig(), "num_inference_steps": 5, "sample_shape": SHAPE, **options}
    )
    with pytest.raises(error) as caught:
        getattr(sampler, method)(*arguments)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_one_graph_of_all_steps_has_no_place_for_a_progress_bar():
    with pytest.raises(ValueError, match="progress: given with graph='loop'"):
        gaussian_sampler(5, graph="loop").invert(clean(), progress=True)
