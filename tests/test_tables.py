"""Sampling methods from outside the package: a `StepTable` is all that `Sampler` needs of them."""

import math

import diffusers
import numpy as np
import pytest
import torch

from fastddim import Clip, DDIMConfig, DynamicThreshold, Sampler, Schedule, StepTable
from fastddim.noise import STREAM_INITIAL, normal_numpy

SHAPE = (3, 4)
MODES = ("off", "step", "loop")
BACKENDS = ("reference", "triton")
EULER_SCALE = 157.4073


def flow_euler(sigmas, **options):
    """Flow matching: the model predicts the velocity v, so x0 = x - sigma v and x_next = x + (sigma_next - sigma) v."""
    sigma, sigma_next = np.asarray(sigmas[:-1]), np.asarray(sigmas[1:])
    zero, one = np.zeros_like(sigma), np.ones_like(sigma)
    # Backwards, the velocity is taken at the end of the step.
    back = np.stack([one, -sigma_next, one, sigma - sigma_next, zero, zero], 1)[::-1]
    return StepTable.from_columns(
        1000 * sigma,
        np.stack([one, -sigma, one, sigma_next - sigma, zero, zero], 1),
        noising=(1 - sigma[0], sigma[0]),
        inverse=StepTable.from_columns(1000 * sigma_next[::-1], back),
        **options,
    )


def euler(sigmas, timesteps, start_scale):
    """Euler's method on dx = eps dsigma, without scaling the model's input."""
    sigma, sigma_next = np.asarray(sigmas[:-1]), np.asarray(sigmas[1:])
    zero, one = np.zeros_like(sigma), np.ones_like(sigma)
    columns = np.stack([one, -sigma, one, sigma_next - sigma, zero, zero], 1)
    return StepTable.from_columns(timesteps, columns, start_scale=start_scale, noising=(1.0, sigma[0]))


def numpy_model(x, t, shift=0.0):
    return 0.5 * np.tanh(x) + 0.3 * np.cos(t / 200) + shift


class Watched(torch.nn.Module):
    """`numpy_model` in torch, which keeps what it is called with."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros((), dtype=dtype), requires_grad=False)
        self.calls = []

    def forward(self, x, t, shift=None):
        self.calls.append((len(x), t.dtype, t.tolist()))
        rows = t.view(-1, *[1] * (x.ndim - 1))
        moved = self.shift if shift is None else shift.view(rows.shape)
        return (0.5 * torch.tanh(x) + 0.3 * torch.cos(rows.double() / 200) + moved).to(x.dtype)


def plain_loop(sigmas, timesteps, x, model=numpy_model):
    """Euler's method in float64; the model is called with integers, or with the nearest float32 numbers."""
    for t, sigma, sigma_next in zip(timesteps, sigmas[:-1], sigmas[1:], strict=True):
        x = x + (sigma_next - sigma) * model(x, t if isinstance(t, int) else float(np.float32(t)))
    return x


def start_of(seeds, scale=1.0):
    return scale * normal_numpy(seeds, 0, SHAPE, STREAM_INITIAL).astype(np.float64)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_flow_matching_from_outside_is_a_plain_loop_and_diffusers(mode, backend):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(7)
    sigmas = theirs.sigmas.double().tolist()
    sampler = Sampler(Watched(), flow_euler(sigmas), sample_shape=SHAPE, graph=mode, backend=backend)
    result = sampler(2, seeds=[4, 9])
    x = torch.tensor(start_of([4, 9]), dtype=torch.float32)
    np.testing.assert_allclose(result, plain_loop(sigmas, 1000 * np.array(sigmas[:-1]), start_of([4, 9])), atol=1e-6)
    expected = x
    for t in theirs.timesteps:
        expected = theirs.step(Watched()(expected, t.expand(2)), t, expected).prev_sample
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sampler(x), result, rtol=1e-6, atol=1e-6)


TIMESTEPS = {
    "fractions": [987.6, 500.25, 1 / 3, 0.0],
    "negative": [-0.5, -1.0, -2.75, -3.0],
    "negative integers": [3, -1, -2, -700],
    "repeated": [500, 500, 20, 20],
    "repeated fractions": [80.5, 80.5, 80.5, 3.25],
    "ascending": [0, 1, 700, 999],
    "beyond float32": [2**31 + 1, 2**24 + 1, 5, -(2**40)],
}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TIMESTEPS)
def test_the_model_is_called_with_the_tables_timesteps(mode, name, backend):
    timesteps, sigmas = TIMESTEPS[name], [1.0, 0.8, 0.5, 0.2, 0.0]
    table = euler(sigmas, timesteps, 1.0)
    model = Watched()
    sampler = Sampler(model, table, sample_shape=SHAPE, graph=mode, backend=backend, batch_buckets=(4,))
    sampler.warmup(3)
    model.calls.clear()
    result = sampler(3, seeds=0)
    floats = any(isinstance(t, float) for t in timesteps)
    dtype, rows = (torch.float32, np.float32(timesteps).tolist()) if floats else (torch.int64, timesteps)
    batch = 3 if mode == "off" else 4
    assert model.calls == [(batch, dtype, [t] * batch) for t in rows]
    np.testing.assert_allclose(result, plain_loop(sigmas, timesteps, start_of(range(3))), atol=1e-6)
    if mode != "loop":
        seen = []
        _, trajectory = sampler(
            3, seeds=0, return_trajectory=True, callback=lambda step, t, x, x0: seen.append((step, t))
        )
        assert seen == list(enumerate(timesteps)) and len(trajectory) == 5


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batched", [True, False])
def test_half_precision_and_guidance_leave_timesteps_float32(mode, batched, backend):
    model = Watched(torch.bfloat16)
    timesteps = [987.6, -2.3, -2.3, 1 / 3]
    sampler = Sampler(
        model, euler([1.0, 0.8, 0.5, 0.2, 0.0], timesteps, 1.0), sample_shape=SHAPE, graph=mode, backend=backend,
        guidance_scale=2.0, guidance_interval=(0.25, 0.75), batched_guidance=batched,
    )  # fmt: skip
    shifts = {"shift": torch.full((2,), 0.3), "uncond_kwargs": {"shift": torch.zeros(2)}}
    sampler.warmup(2, **shifts)
    model.calls.clear()
    sampler(2, seeds=0, **shifts)
    called = np.float32(timesteps).tolist()
    guided = [(4, 1)] if batched else [(2, 2)]
    sizes = [(2, 1), *guided, *guided, (2, 1)]
    expected = [(rows, torch.float32, [t] * rows) for t, (rows, n) in zip(called, sizes, strict=True) for _ in range(n)]
    assert model.calls == expected


def test_the_timesteps_dtype_is_another_capture_and_other_tables_are_not():
    sigmas = [1.0, 0.8, 0.5, 0.2, 0.0]
    sampler = Sampler(Watched(), euler(sigmas, [4, 3, 2, 1], 1.0), sample_shape=SHAPE, graph="step")
    for timesteps, scale, captures in (
        ([4, 3, 2, 1], 1.0, 1),
        ([7, 7, -7, 7], 1.0, 1),
        ([4.5, 3.0, 2.0, 1.0], 1.0, 2),
        ([987.6, -3.0, 2.0, 1.0], 1.0, 2),
        ([987.6, -3.0, 2.0, 1.0], EULER_SCALE, 3),
        ([1.5, 0.0, 2.0, 1.0], 14.6, 3),
    ):
        other = sampler.replace(scheduler=euler(sigmas, timesteps, scale))
        other.warmup(2)
        result = other(2, seeds=1)
        expected = plain_loop(sigmas, timesteps, start_of([1, 2], scale))
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
        assert len(sampler.graphs) == captures


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_drawn_start_has_the_tables_scale_and_a_given_one_its_own(mode, backend):
    theirs = diffusers.EulerDiscreteScheduler(timestep_spacing="linspace")
    theirs.set_timesteps(6)
    sigmas, timesteps, scale = (
        theirs.sigmas.double().tolist(),
        theirs.timesteps.tolist(),
        float(theirs.init_noise_sigma),
    )
    assert scale == pytest.approx(EULER_SCALE, rel=1e-6)
    table = euler(sigmas, timesteps, scale)
    sampler = Sampler(Watched(), table, sample_shape=SHAPE, graph=mode, backend=backend)
    expected = plain_loop(sigmas, timesteps, start_of([5, 6], scale))
    np.testing.assert_allclose(sampler(2, seeds=5), expected, rtol=1e-6, atol=1e-4)
    given = start_of([5, 6])
    expected = plain_loop(sigmas, timesteps, given)
    np.testing.assert_allclose(sampler(torch.tensor(given)), expected, rtol=1e-6, atol=1e-4)
    if mode != "loop":
        sampler.warmup(2)
        for _ in range(2):
            final, trajectory = sampler(2, seeds=5, return_trajectory=True)
        np.testing.assert_allclose(trajectory[0], start_of([5, 6], scale), rtol=1e-6)
        assert torch.equal(final, sampler(2, seeds=5))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scaled_start_is_rounded_once(mode, dtype, backend):
    # A step that leaves the state as it is.
    table = StepTable.from_columns([1.5], [[1, 0, 1, 0, 0, 0]], start_scale=EULER_SCALE)
    sampler = Sampler(Watched(dtype), table, sample_shape=SHAPE, graph=mode, backend=backend, dtype=dtype)
    expected = torch.tensor(np.float32(EULER_SCALE) * normal_numpy([3, 4], 0, SHAPE, STREAM_INITIAL)).to(dtype)
    assert torch.equal(sampler(2, seeds=3), expected)


def test_interpolation_goes_between_scaled_starts():
    sigmas = [EULER_SCALE, 3.0, 0.5, 0.0]
    sampler = Sampler(Watched(), euler(sigmas, [999.0, 321.7, 5.2], EULER_SCALE), sample_shape=SHAPE)
    samples = sampler.interpolate(4, 9, 5)
    torch.testing.assert_close(samples[[0, -1]], sampler(2, seeds=[4, 9]), rtol=1e-6, atol=1e-5)
    a, b = (torch.tensor(start_of([seed], EULER_SCALE)[0]) for seed in (4, 9))
    torch.testing.assert_close(samples, sampler.interpolate(a, b, 5), rtol=1e-6, atol=1e-5)


def test_noise_is_added_by_the_tables_rule():
    x0 = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    noise = torch.tensor(normal_numpy([5, 6], 0, SHAPE, STREAM_INITIAL))
    theirs = diffusers.EulerDiscreteScheduler()
    theirs.set_timesteps(6)
    table = euler(theirs.sigmas.tolist()[2:], theirs.timesteps.tolist()[2:], 1.0)
    expected = theirs.add_noise(x0, noise, theirs.timesteps[2:3].expand(2))
    torch.testing.assert_close(Sampler(Watched(), table).add_noise(x0, 5), expected)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(6)
    table = flow_euler(flow.sigmas.tolist()[2:])
    expected = flow.scale_noise(x0, flow.timesteps[2:3].expand(2), noise)
    torch.testing.assert_close(Sampler(Watched(), table).add_noise(x0, 5), expected)
    without = StepTable.from_columns(table.timesteps, table.columns)
    with pytest.raises(ValueError, match="table: it has no noising rule; pass noising="):
        Sampler(Watched(), without).add_noise(x0, 5)


@pytest.mark.parametrize("mode", MODES)
def test_an_inverse_that_ascends_leads_back(mode):
    x0 = torch.tensor(start_of(range(3)))
    errors = []
    for steps in (20, 200):
        sampler = Sampler(
            Watched(torch.float64), flow_euler(np.linspace(1, 0, steps + 1)), graph=mode, dtype=torch.float64
        )
        errors.append(float((sampler(sampler.invert(x0)) - x0).abs().max()))
    assert errors[1] < errors[0] / 8 and errors[1] < 0.01
    without = StepTable.from_columns(sampler.table.timesteps, sampler.table.columns)
    with pytest.raises(ValueError, match="table: it has no inverse; pass inverse="):
        sampler.replace(scheduler=without).invert(x0)
    noisy = StepTable.from_columns([1], [[1, 0, 0, 0, 1, 0.5]])
    with pytest.raises(ValueError, match=r"eta: this sampler adds noise, and inversion .* a table without noise"):
        sampler.replace(scheduler=noisy).invert(x0)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.25, 0.75), (0.0, 0.0), (1.0, 1.0)])
def test_guidance_of_an_inverse_is_on_at_the_same_timesteps(interval):
    model = Watched()
    sampler = Sampler(model, flow_euler(np.linspace(1, 0, 9)), guidance_scale=2.0, guidance_interval=interval)
    shifts = {"shift": torch.full((2,), 0.3), "uncond_kwargs": {"shift": torch.zeros(2)}}
    seen = []
    x = torch.zeros(2, *SHAPE)
    for work in (sampler.__call__, sampler.invert):
        model.calls.clear()
        x = work(x, **shifts)
        seen.append({rows: {t[0] for n, _, t in model.calls if n == rows} for rows in (2, 4)})
    forwards, backwards = seen
    # Sampling alone starts at 1000, and only its inverse is called with the clean end's 0.
    assert {t for t in backwards[4] if t > 0} == {t for t in forwards[4] if t < 1000}
    assert {t for t in backwards[2] if t > 0} == {t for t in forwards[2] if t < 1000}


STEPS = {"num_inference_steps": 5, "timesteps": [5, 1], "eta": 0.0, "strength": 0.5, "transitions": "exact",
         "variance_type": "fixed_small", "use_clipped_model_output": False}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_what_a_table_fixes_is_refused_by_name(name):
    table = flow_euler([1.0, 0.5, 0.0])
    message = f"{name}: .* with a StepTable, which fixes it; leave it out"
    with pytest.raises(ValueError, match=message):
        Sampler(Watched(), table, **{name: STEPS[name]})
    with pytest.raises(ValueError, match=message):
        Sampler(Watched(), table).replace(**{name: STEPS[name]})


def test_a_table_and_a_scheduler_replace_each_other():
    table = flow_euler([1.0, 0.5, 0.0])
    by_steps = Sampler(Watched(), DDIMConfig(), 5, eta=0.5, strength=0.8, sample_shape=SHAPE)
    by_table = by_steps.replace(scheduler=table)
    assert by_table.table is table and by_table.schedule is None and by_table.pairs is None
    assert by_table.limit is None and by_table.options.num_inference_steps is None and by_table.eta is None
    again = by_table.replace(scheduler=DDIMConfig(), num_inference_steps=5, eta=0.5, strength=0.8)
    assert again.table.timesteps == by_steps.table.timesteps and again.limit == Clip()
    assert torch.equal(again(2, seeds=0), by_steps(2, seeds=0))
    with pytest.raises(ValueError, match="num_inference_steps, timesteps, sigmas: pass"):
        by_table.replace(scheduler=DDIMConfig())
    assert by_table.replace(guidance_scale=2.0).table is table


@pytest.mark.parametrize("mode", MODES)
def test_a_limit_is_an_argument(mode):
    schedule = Schedule(DDIMConfig(clip_sample_range=0.7))
    table = StepTable.build(schedule, schedule.pairs(6), use_clipped_model_output=True)
    options = {"sample_shape": SHAPE, "graph": mode}
    clipped = Sampler(Watched(), schedule, 6, **options)
    assert clipped.limit == Clip(0.7) and Sampler(Watched(), table, **options).limit is None
    by_table = Sampler(Watched(), table, limit=Clip(0.7), **options)
    assert torch.equal(by_table(2, seeds=0), clipped(2, seeds=0))
    for limit in (Clip(0.2), DynamicThreshold(0.9, 1.5), None):
        other = clipped.replace(limit=limit)
        configured = DDIMConfig(
            clip_sample=isinstance(limit, Clip),
            clip_sample_range=getattr(limit, "range", 1.0),
            thresholding=isinstance(limit, DynamicThreshold),
            dynamic_thresholding_ratio=getattr(limit, "ratio", 0.5),
            sample_max_value=getattr(limit, "max_value", 1.0),
        )
        expected = Sampler(Watched(), configured, 6, **options)
        assert other.limit == expected.limit == limit
        for each in (other, expected):
            each.warmup(2)
        assert torch.equal(other(2, seeds=0), expected(2, seeds=0))
    with pytest.raises(ValueError, match="limit: 'clip'; pass a Clip, a DynamicThreshold, None, or 'auto'"):
        Sampler(Watched(), table, limit="clip")


@pytest.mark.parametrize("mode", MODES)
def test_a_table_that_adds_noise_needs_seeds_and_takes_theirs(mode):
    # x_next = x / 2 + noise / 4 at timesteps that are no numbers of steps.
    table = StepTable.from_columns([0.25, -7.5, -7.5], [[1, 0, 0.5, 0, 0, 0.25]] * 3, start_scale=2.0)
    sampler = Sampler(Watched(), table, sample_shape=SHAPE, graph=mode)
    with pytest.raises(ValueError, match="seeds: None"):
        sampler(torch.zeros(2, *SHAPE))
    expected = start_of([7, 8], 2.0)
    for step in range(3):
        expected = expected / 2 + normal_numpy([7, 8], step, SHAPE) / 4
    np.testing.assert_allclose(sampler(2, seeds=7), expected, atol=1e-6)
    assert math.isfinite(float(sampler(2, seeds=0).sum()))
