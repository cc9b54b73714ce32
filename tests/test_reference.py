import functools

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastddim
from fastddim import reference
from fastddim.coefficients import StepTable
from fastddim.config import Clip, DDIMConfig, DynamicThreshold
from fastddim.reference import abs_quantile, combine_guidance, step_by_blocks
from fastddim.schedule import Schedule
from fastddim.step import Guidance
from oracle import ddim, guide
from test_coefficients import pairs_of, runs, table_of

ddim_step = functools.partial(fastddim.ddim_step, backend="reference")
FLOAT32_ULP = 2.0**-23
LIMITS = [None, Clip(1.0), Clip(0.4), DynamicThreshold(0.9, 3.0), DynamicThreshold(0.995, 1.0)]
SHARED = torch.zeros(2, 3, 4, 4)
SHAPES = [(1,), (3, 1), (2, 7), (2, 16, 7), (1, 3, 5, 4), (2, 4, 8, 8), (1, 2, 3, 4, 5)]


def randn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def oracle_of(schedule, pair, options, limit, x, output, noise):
    clip = limit.range if isinstance(limit, Clip) else None
    threshold = (limit.ratio, limit.max_value) if isinstance(limit, DynamicThreshold) else None
    return ddim(
        x.double().numpy(),
        output.double().numpy(),
        *schedule.alpha_bar(pair),
        schedule.config.prediction_type,
        eta=options["eta"],
        noise=noise.double().numpy(),
        clip=clip,
        threshold=threshold,
        rederive=options["use_clipped_model_output"],
        large_variance=options["variance_type"] == "fixed_large",
    )


@given(
    runs(), st.sampled_from(LIMITS), st.sampled_from(SHAPES), st.sampled_from([torch.float32, torch.float64]), st.data()
)
def test_a_step_is_the_oracles_to_four_ulp_of_its_scale(run, limit, shape, dtype, data):
    schedule, options = run
    pairs = pairs_of(schedule, options)
    table = table_of(schedule, pairs, options)
    i = data.draw(st.integers(0, len(pairs) - 1))
    x, output, noise = (randn(shape, 3 * i + k, dtype) for k in range(3))
    expected = oracle_of(schedule, pairs[i], options, limit, x, output, noise)
    x_next, x0 = ddim_step(output, x, table, i, limit=limit, noise=noise)
    # The scale of a result is that of the largest term that was summed for it.
    x0_terms = max(np.abs(expected.x0_unlimited).max(), abs(table.columns[i, 0]) * x.abs().max().item(), 1)
    next_terms = max(np.abs(expected.x_next).max(), abs(table.columns[i, 4]) * min(x0_terms, 1e30), 1)
    if limit is not None:
        next_terms = max(next_terms, abs(table.columns[i, 4]) * x0_terms)
    ulp = FLOAT32_ULP if dtype == torch.float32 else 1e-3 * FLOAT32_ULP
    assert x_next.dtype == x0.dtype == dtype
    assert np.abs(x0.double().numpy() - expected.x0).max() <= 4 * ulp * x0_terms
    assert np.abs(x_next.double().numpy() - expected.x_next).max() <= 4 * ulp * next_terms


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [False, True])
def test_float32_error_is_not_above_diffusers(prediction_type, clip):
    theirs = diffusers.DDIMScheduler(prediction_type=prediction_type, clip_sample=clip)
    theirs.set_timesteps(50)
    schedule = Schedule(DDIMConfig(prediction_type=prediction_type, clip_sample=clip))
    table = StepTable.build(schedule, schedule.pairs(50), eta=0.5)
    errors = {"ours": [], "diffusers": []}
    for i, t in enumerate(table.timesteps):
        x, output, noise = (randn((2, 3, 16, 16), 3 * i + k) for k in range(3))
        options = {"eta": 0.5, "use_clipped_model_output": False, "variance_type": "fixed_small"}
        expected = oracle_of(schedule, schedule.pairs(50)[i], options, schedule.config.limit, x, output, noise)
        ours, _ = ddim_step(output, x, table, i, limit=schedule.config.limit, noise=noise)
        other = theirs.step(output, t, x, eta=0.5, variance_noise=noise).prev_sample
        for name, result in (("ours", ours), ("diffusers", other)):
            errors[name].append(np.abs(result.double().numpy() - expected.x_next).max())
    assert max(errors["ours"]) <= max(errors["diffusers"])
    assert np.mean(errors["ours"]) <= np.mean(errors["diffusers"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("limit", LIMITS)
def test_half_precision_is_rounded_once(dtype, limit):
    schedule = Schedule(DDIMConfig(prediction_type="v_prediction"))
    table = StepTable.build(schedule, schedule.pairs(10), eta=1.0)
    x, output, noise = (randn((4, 3, 32, 32), k, dtype) for k in range(3))
    options = {"eta": 1.0, "use_clipped_model_output": False, "variance_type": "fixed_small"}
    expected = oracle_of(schedule, schedule.pairs(10)[3], options, limit, x, output, noise)
    for result, exact in zip(
        ddim_step(output, x, table, 3, limit=limit, noise=noise), (expected.x_next, expected.x0), strict=True
    ):
        rounded = torch.tensor(exact).to(dtype)
        assert result.dtype == dtype
        assert (result == rounded).float().mean() >= 0.999
        gap = (result.double() - rounded.double()).abs()
        spacing = torch.finfo(dtype).eps * rounded.double().abs().clamp_min(torch.finfo(dtype).tiny)
        assert (gap <= spacing).all()


@given(st.integers(1, 40), st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.995, 1.0]), st.booleans(), st.integers(0, 10))
def test_abs_quantile_is_torch_quantile_to_the_bit(n, ratio, ties, seed):
    for dtype in (torch.float32, torch.float64):
        sample = randn((3, n), seed, dtype)
        if ties:
            sample = (sample * 2).round() / 2
        assert torch.equal(abs_quantile(sample, ratio), torch.quantile(sample.abs(), ratio, dim=1))


def test_abs_quantile_takes_any_rank_infinities_and_shows_nan():
    sample = randn((2, 3, 5, 7), 0)
    sample[0, 1, 2, 3] = float("nan")
    sample[1, 0, 0, 0] = float("-inf")
    for ratio in (0.0, 0.3, 0.99, 1.0):
        ours, theirs = abs_quantile(sample, ratio), torch.quantile(sample.flatten(1).abs(), ratio, dim=1)
        assert ours[0].isnan()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_abs_quantile_has_no_size_limit():
    n = 17_000_000
    sample = torch.arange(n, dtype=torch.float32).flip(0)[None]
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(sample, 0.995)
    rank = float(np.float64(0.995) * (n - 1))
    assert abs_quantile(sample, 0.995).item() == pytest.approx(rank, abs=2)


@pytest.mark.parametrize("cond_first", [False, True])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_is_the_textbook_combination(cond_first, rescale):
    uncond, cond = randn((3, 4, 6, 6), 0, torch.float64), randn((3, 4, 6, 6), 1, torch.float64)
    stacked = torch.cat([cond, uncond] if cond_first else [uncond, cond])
    expected = guide(uncond.numpy(), cond.numpy(), 3.5, rescale)
    np.testing.assert_allclose(combine_guidance(stacked, Guidance(3.5, rescale, cond_first)), expected, atol=1e-12)
    scales = torch.tensor([1.0, 3.5, 7.5])
    combined = combine_guidance(stacked, Guidance(scales, rescale, cond_first))
    for k, scale in enumerate(scales.tolist()):
        one = guide(uncond.numpy()[k : k + 1], cond.numpy()[k : k + 1], scale, rescale)
        np.testing.assert_allclose(combined[k : k + 1], one, atol=1e-12)


def run_step(**changes):
    schedule = Schedule()
    table = StepTable.build(schedule, schedule.pairs(10), eta=changes.pop("eta", 0.0))
    arguments = {
        "model_output": randn((2, 3, 4, 4), 0),
        "sample": randn((2, 3, 4, 4), 1),
        "table": table,
        "step": 2,
        "limit": Clip(1.0),
        **changes,
    }
    return ddim_step(**arguments)


def test_guidance_in_the_step_is_guidance_before_it():
    stacked = randn((4, 3, 4, 4), 5)
    guidance = Guidance(3.0, 0.5)
    together = run_step(model_output=stacked, guidance=guidance)
    apart = run_step(model_output=combine_guidance(stacked, guidance))
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_mixed_rows_are_each_samples_own_step():
    schedule = Schedule()
    table = StepTable.build(schedule, schedule.pairs(10), eta=0.7)
    x, output, noise = (randn((3, 2, 5), k) for k in range(3))
    limit = DynamicThreshold(0.9, 2.0)
    for rows_table in (table, table.tensor()):
        x_next, x0 = ddim_step(output, x, rows_table, torch.tensor([9, 0, 4]), limit=limit, noise=noise)
        for k, row in enumerate([9, 0, 4]):
            one_next, one_x0 = ddim_step(
                output[k : k + 1], x[k : k + 1], table, row, limit=limit, noise=noise[k : k + 1]
            )
            torch.testing.assert_close(x_next[k : k + 1], one_next, rtol=1e-6, atol=2e-5)
            torch.testing.assert_close(x0[k : k + 1], one_x0, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("rederive", [False, True])
def test_out_may_be_the_state_or_poisoned_memory(prediction_type, rederive):
    schedule = Schedule(DDIMConfig(prediction_type=prediction_type))
    table = StepTable.build(schedule, schedule.pairs(10), eta=1.0, use_clipped_model_output=rederive)
    x, output, noise = (randn((2, 3, 4), k) for k in range(3))
    kept = [tensor.clone() for tensor in (x, output, noise)]
    for step in (0, 4, 9):
        expected, x0 = ddim_step(output, x, table, step, limit=Clip(1.0), noise=noise)
        assert all(torch.equal(a, b) for a, b in zip((x, output, noise), kept, strict=True))
        poisoned = torch.full_like(x, float("nan"))
        result, again = ddim_step(output, x, table, step, limit=Clip(1.0), noise=noise, out=poisoned)
        assert result is poisoned
        assert torch.equal(result, expected)
        assert torch.equal(again, x0)
        state = x.clone()
        assert ddim_step(output, state, table, step, limit=Clip(1.0), noise=noise, out=state)[0] is state
        assert torch.equal(state, expected)
        half = torch.full_like(x, float("nan"), dtype=torch.bfloat16)
        ddim_step(output, x, table, step, limit=Clip(1.0), noise=noise, out=half)
        assert torch.equal(half, expected.bfloat16())


def test_strides_do_not_matter():
    x, output = randn((2, 3, 4, 6), 0), randn((2, 3, 4, 6), 1)
    expected = run_step(sample=x, model_output=output)
    wide = torch.zeros(2, 3, 4, 12)
    wide[..., ::2] = x
    for state in (
        x.to(memory_format=torch.channels_last),
        wide[..., ::2],
        x.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        result = run_step(sample=state, model_output=output)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_nan_is_never_hidden():
    output = randn((2, 3, 4, 4), 0)
    output[1, 2, 3, 3] = float("nan")
    for limit in (None, Clip(1.0), DynamicThreshold(0.9, 1.0)):
        x_next, x0 = run_step(model_output=output, limit=limit)
        for result in (x_next, x0):
            assert result.isnan().nonzero().tolist() == [[1, 2, 3, 3]]
    x_next, x0 = run_step(model_output=output, limit=DynamicThreshold(0.9, 2.0))
    # torch.quantile of a sample with a NaN is NaN, so all of that sample is; the other is untouched.
    assert x_next[1].isnan().all()
    assert not x_next[0].isnan().any()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_step_is_differentiable(prediction_type):
    schedule = Schedule(DDIMConfig(prediction_type=prediction_type))
    table = StepTable.build(schedule, schedule.pairs(10), eta=0.5, use_clipped_model_output=True)
    x, output, noise = (randn((2, 6), k, torch.float64) for k in range(3))
    stacked = torch.cat([output, output * 1.3])
    x.requires_grad_()
    stacked.requires_grad_()
    for limit in (None, DynamicThreshold(0.9, 3.0)):

        def step(x, stacked, limit=limit):
            return ddim_step(stacked, x, table, 5, limit=limit, noise=noise, guidance=Guidance(2.0, 0.3))

        assert torch.autograd.gradcheck(step, (x, stacked))


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"model_output": torch.zeros(2, 3, 4)}, ValueError, ["model_output", "(2, 3, 4)", "(2, 3, 4, 4)"]),
        ({"guidance": 2.0}, ValueError, ["model_output", "(2, 3, 4, 4)", "[4, 3, 4, 4]", "stacked"]),
        ({"noise": torch.zeros(1, 3, 4, 4)}, ValueError, ["noise", "(1, 3, 4, 4)"]),
        ({"out": torch.zeros(2)}, ValueError, ["out", "(2,)"]),
        ({"sample": torch.zeros(())}, ValueError, ["sample", "[B, ...]"]),
        ({"sample": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, ValueError, ["sample", "int64"]),
        ({"model_output": torch.zeros(2, 3, 4, 4, dtype=torch.bool)}, ValueError, ["model_output", "bool"]),
        ({"model_output": torch.zeros(2, 3, 4, 4, device="meta")}, ValueError, ["model_output", "meta", "cpu"]),
        ({"eta": 1.0}, ValueError, ["noise", "None", "step 2"]),
        ({"eta": 1.0, "noise": SHARED, "out": SHARED}, ValueError, ["out", "noise"]),
        ({"step": 10}, IndexError, ["step", "10"]),
        ({"step": -1}, IndexError, ["step", "-1"]),
        ({"step": torch.zeros(3, dtype=torch.int64)}, ValueError, ["step", "(3,)", "[2]"]),
        (
            {"sample": torch.zeros(2, 3, 4, 4, requires_grad=True), "out": torch.zeros(2, 3, 4, 4)},
            ValueError,
            ["out", "no_grad"],
        ),
    ],
)
def test_bad_input_is_refused_by_name(changes, error, parts):
    with pytest.raises(error) as caught:
        run_step(**dict(changes))
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("guidance", [None, 2.0, Guidance(0.6, method="cfg++")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_steps_in_half_precision_go_by_blocks_to_the_same_bits(monkeypatch, dtype, guidance):
    """Each block of a ragged size, beside the same step of samples that are too small for blocks."""
    schedule = Schedule(DDIMConfig())
    table = StepTable.build(schedule, schedule.pairs(10), eta=0.5)
    copies = 1 if guidance is None else 2
    x, noise, output = randn((3, 5, 7), 1, dtype), randn((3, 5, 7), 2), randn((3 * copies, 5, 7), 3, dtype)
    options = {"limit": Clip(), "guidance": guidance, "noise": noise}
    whole = ddim_step(output, x, table, 4, **options)
    monkeypatch.setattr(reference, "_BLOCK", 16)
    model_input = torch.full((3 * copies, 5, 7), float("nan"))
    state = x.clone()
    calls = []
    monkeypatch.setattr(reference, "step_by_blocks", lambda *a: (calls.append(1), step_by_blocks(*a))[1])
    for out in (None, state):
        blocks = ddim_step(output, x if out is None else state, table, 4, **options, out=out)
        assert all(torch.equal(a, b) for a, b in zip(blocks, whole, strict=True))
    ddim_step(output, x, table, 4, **options, model_input=model_input)
    assert len(calls) == 3
    assert torch.equal(model_input.to(dtype), torch.cat([whole[0]] * copies))
    # What a block would write over before it is read, or tells of other elements, or needs a gradient.
    for changed in ({"out": output[:3]}, {"limit": DynamicThreshold(0.9, 2.0)}, {"guidance": Guidance(2.0, 0.5)}):
        if "guidance" not in changed or copies == 2:
            ddim_step(output.clone() if "out" not in changed else output, x, table, 4, **{**options, **changed})
    ddim_step(output, x.clone().requires_grad_(), table, 4, **options)[0].sum().backward()
    assert len(calls) == 3


def test_a_rescale_of_long_samples_is_the_oracles():
    output = randn((4, 3, 64, 64), 0)
    uncond, cond = output.double().numpy().reshape(2, 2, 3, 64, 64)
    got = combine_guidance(output, Guidance(7.5, 0.7))
    exact = guide(uncond, cond, 7.5, 0.7)
    assert np.abs(got.double().numpy() - exact).max() <= 4 * FLOAT32_ULP * np.abs(exact).max()
