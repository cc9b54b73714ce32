import functools

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastddim
from fastddim.coefficients import StepTable
from fastddim.config import BETA_SCHEDULES, PREDICTION_TYPES, TIMESTEP_SPACINGS, Clip, DDIMConfig, DynamicThreshold
from fastddim.reference import abs_quantile, combine_guidance
from fastddim.schedule import Schedule
from fastddim.step import Guidance
from oracle import ddim, guide

ddim_step = functools.partial(fastddim.ddim_step, backend="reference")
ULP = 2.0**-23
LIMITS = [None, Clip(1.0), Clip(0.4), DynamicThreshold(0.9, 3.0), DynamicThreshold(0.995, 1.0)]
SHAPES = [(3,), (2, 7), (2, 3, 5), (1, 3, 4, 4), (2, 2, 3, 2, 3)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def randn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def array(tensor):
    return tensor.detach().double().numpy()


def oracle_step(x, output, alpha_bar, alpha_bar_next, kind, limit, *, eta, noise, rederive, large):
    return ddim(
        x,
        output,
        alpha_bar,
        alpha_bar_next,
        kind,
        eta=eta,
        noise=noise,
        clip=limit.range if isinstance(limit, Clip) else None,
        threshold=(limit.ratio, limit.max_value) if isinstance(limit, DynamicThreshold) else None,
        rederive=rederive,
        large_variance=large,
    )


def scales(x, output, noise, alpha_bar, alpha_bar_next, kind, rederive):
    """The largest term that is summed for x0 and for the next state: what rounding errors are relative to."""
    signal, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    if kind == "epsilon":
        x0, eps = (x + sigma * output) / signal, output
    elif kind == "sample":
        x0, eps = output, (x + signal * output) / sigma
    else:
        x0, eps = signal * x + sigma * output, sigma * x + signal * output
    if rederive:
        eps = (x + signal * x0) / sigma
    # A tiny alpha_bar blows x0 up; a limit divides or clips it, but an error below the limit passes on in full.
    return max(x0, 1.0), max(np.sqrt(alpha_bar_next) * x0 + np.sqrt(1 - alpha_bar_next) * eps + noise, 1.0)


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(PREDICTION_TYPES))
    spacing = draw(st.sampled_from(TIMESTEP_SPACINGS))
    n = draw(st.integers(1, 1000))
    room = 999 - (n - 1) * (1000 // n) if spacing == "leading" else 999
    schedule = Schedule(
        DDIMConfig(
            prediction_type=kind,
            timestep_spacing=spacing,
            beta_schedule=draw(st.sampled_from(BETA_SCHEDULES)),
            rescale_betas_zero_snr=kind != "epsilon" and draw(st.booleans()),
            set_alpha_to_one=draw(st.booleans()),
            steps_offset=min(draw(st.sampled_from([0, 1])), room),
        )
    )
    strength = draw(st.floats(1 / n, 1.0)) if draw(st.booleans()) else 1.0
    pairs = schedule.pairs(n, strength=strength if int(n * strength) else 1.0)
    large, rederive = draw(st.booleans()), draw(st.booleans())
    eta = 1.0 if large else draw(st.sampled_from([0.0, 0.3, 1.0]))
    variance_type = "fixed_large" if large else "fixed_small"
    table = StepTable.build(schedule, pairs, eta=eta, variance_type=variance_type, use_clipped_model_output=rederive)
    return schedule, pairs, table, {"eta": eta, "rederive": rederive, "large": large}


@given(
    cases(),
    st.sampled_from(LIMITS),
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.7]),
    st.data(),
)
def test_a_step_is_the_oracles_for_any_dtype_rank_guidance_and_rows(
    case, limit, shape, dtype, guided, by_row, rescale, data
):
    schedule, pairs, table, options = case
    kind, batch = schedule.config.prediction_type, shape[0]
    row_count = batch if by_row else 1
    rows = [data.draw(st.integers(0, len(pairs) - 1)) for _ in range(row_count)]
    x, noise = randn(shape, 1, dtype), randn(shape, 2, dtype)
    stacked = randn((2 * batch if guided else batch, *shape[1:]), 3, dtype)
    kept = [tensor.clone() for tensor in (x, noise, stacked)]
    x_next, x0 = ddim_step(
        stacked,
        x,
        table,
        torch.tensor(rows) if by_row else rows[0],
        limit=limit,
        noise=noise,
        guidance=Guidance(2.5, rescale if x[0].numel() > 1 else 0.0) if guided else None,
    )
    assert x_next.dtype == x0.dtype == dtype and x_next.shape == x0.shape == x.shape
    assert all(torch.equal(a, b) for a, b in zip((x, noise, stacked), kept, strict=True))
    output = array(stacked)
    if guided:
        uncond, cond = output[:batch], output[batch:]
        # Without a rescale no standard deviation is needed, which a sample of one element does not have.
        output = (
            uncond + 2.5 * (cond - uncond) if rescale == 0 or cond[0].size < 2 else guide(uncond, cond, 2.5, rescale)
        )
    for k in range(batch):
        one = slice(k, k + 1)
        alphas = schedule.alpha_bar(pairs[rows[k % row_count]])
        expected = oracle_step(array(x[one]), output[one], *alphas, kind, limit, noise=array(noise[one]), **options)
        peaks = (np.abs(array(t)).max() for t in (x[one], stacked, noise[one]))
        x_peak, output_peak, noise_peak = peaks
        x0_scale, next_scale = scales(
            x_peak, output_peak * (4.0 if guided else 1.0), noise_peak, *alphas, kind, options["rederive"]
        )
        for result, exact, scale in ((x0, expected.x0, x0_scale), (x_next, expected.x_next, next_scale)):
            got = array(result[one])
            # A result past the largest half is infinite, on its own side.
            overflow = np.isinf(got) & (np.abs(exact) > torch.finfo(dtype).max * (1 - 4 * ULP))
            assert (np.sign(got) == np.sign(exact))[overflow].all()
            error = np.abs(np.where(overflow, 0, got) - np.where(overflow, 0, exact))
            if dtype == torch.float64:
                assert error.max() <= 1e-12 * scale
            else:
                # One half-precision spacing of the exact value, on top of the float32 arithmetic.
                rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * np.abs(exact) + 6e-8
                assert (error <= 4 * ULP * scale + rounding).all()


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("limit", [None, Clip(1.0), DynamicThreshold(0.9, 2.0)], ids=["free", "clip", "threshold"])
@pytest.mark.parametrize("rederive", [False, True])
def test_worst_error_is_not_above_diffusers_with_the_same_alphas(kind, limit, rederive):
    options = {"prediction_type": kind, "clip_sample": isinstance(limit, Clip), "timestep_spacing": "trailing"}
    if isinstance(limit, DynamicThreshold):
        options |= {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}
    schedule = Schedule(DDIMConfig(**options))
    theirs = diffusers.DDIMScheduler(**options)
    # Their own float32 product would decide the comparison; only the step's arithmetic is compared.
    theirs.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
    theirs.set_timesteps(20)
    pairs = schedule.pairs(20)
    table = StepTable.build(schedule, pairs, eta=0.5, use_clipped_model_output=rederive)
    ours_worst = theirs_worst = 0.0
    for case in range(60):
        i = case % 20
        x, output, noise = (randn((2, 3, 8, 8), 3 * case + k) for k in range(3))
        alphas = schedule.alpha_bar(pairs[i])
        arrays = (array(x), array(output), array(noise))
        expected = oracle_step(
            *arrays[:2], *alphas, kind, limit, noise=arrays[2], eta=0.5, rederive=rederive, large=False
        ).x_next
        scale = scales(*(np.abs(a).max() for a in arrays), *alphas, kind, rederive)[1]
        ours = ddim_step(output, x, table, i, limit=limit, noise=noise)[0]
        other = theirs.step(
            output, pairs[i][0], x, eta=0.5, use_clipped_model_output=rederive, variance_noise=noise
        ).prev_sample
        ours_worst = max(ours_worst, np.abs(array(ours) - expected).max() / scale)
        theirs_worst = max(theirs_worst, np.abs(array(other) - expected).max() / scale)
    # One ulp of slack: both worst cases are single elements, and the last rounding alone can move one by that much.
    assert ours_worst <= theirs_worst + ULP


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(2, 1), (2, 9), (2, 3, 7), (2, 3, 4, 5), (1, 2, 3, 4, 5)])
def test_abs_quantile_is_torch_quantile_for_every_rank_with_specials(shape, ratio):
    plain = randn(shape, 0)
    with_infinity, with_nan = plain.clone(), plain.clone()
    with_infinity.view(-1)[0] = float("-inf")
    with_nan.view(-1)[-1] = float("nan")
    for sample in (plain, plain.double() / 3, with_infinity, with_nan, torch.ones(shape), torch.zeros(shape)):
        expected = torch.quantile(sample.flatten(1).abs(), ratio, dim=1)
        torch.testing.assert_close(abs_quantile(sample, ratio), expected, rtol=0, atol=0, equal_nan=True)


def test_abs_quantile_past_sixteen_million_elements_is_numpys_partition():
    n, ratio = 17_000_000, 0.995
    rank = ratio * (n - 1)
    lower = int(rank)
    # A jump between the two ranks that the quantile lies between: a rank rounded to float32 lands on its far side.
    sample = torch.zeros(1, n)
    sample[0, : n - lower - 1] = -1.0
    part = np.partition(np.abs(sample[0].numpy()), [lower, lower + 1])
    expected = part[lower] + (rank - lower) * (float(part[lower + 1]) - part[lower])
    assert 0 < expected < 0.01
    assert abs_quantile(sample, ratio).item() == pytest.approx(float(expected), abs=1e-6)


def test_a_batch_of_mixed_rows_is_each_sample_alone_to_the_bit():
    schedule = Schedule()
    table = StepTable.build(schedule, schedule.pairs(10), eta=0.7)
    x, output, noise = (randn((4, 2, 5), k) for k in range(3))
    rows = torch.tensor([9, 0, 4, 4])
    for limit in LIMITS:
        together = ddim_step(output, x, table, rows, limit=limit, noise=noise)
        for k in range(4):
            one = slice(k, k + 1)
            alone = ddim_step(output[one], x[one], table, rows[one], limit=limit, noise=noise[one])
            assert all(torch.equal(a[one], b) for a, b in zip(together, alone, strict=True))


def test_expanded_inputs_are_read_and_left_alone():
    schedule = Schedule()
    table = StepTable.build(schedule, schedule.pairs(10), eta=1.0)
    x, output, noise = (randn((1, 3, 4), k).expand(2, 3, 4) for k in range(3))
    dense = [tensor.contiguous() for tensor in (output, x, noise)]
    results = ddim_step(output, x, table, 3, limit=Clip(1.0), noise=noise)
    expected = ddim_step(*dense[:2], table, 3, limit=Clip(1.0), noise=dense[2])
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((output, x, noise), dense, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_out_of_another_dtype_takes_the_result_rounded_to_it(dtype):
    schedule = Schedule()
    table = StepTable.build(schedule, schedule.pairs(10))
    x, output = randn((2, 6), 0), randn((2, 6), 1)
    expected, _ = ddim_step(output, x, table, 3)
    poisoned = torch.full((2, 6), float("nan"), dtype=dtype)
    result, x0 = ddim_step(output, x, table, 3, out=poisoned)
    assert result is poisoned
    assert result.dtype == x0.dtype == dtype
    assert torch.equal(result, expected.to(dtype))


def test_guidance_sends_both_halves_their_gradient():
    schedule = Schedule()
    table = StepTable.build(schedule, schedule.pairs(10))
    stacked = randn((2, 6), 0, torch.float64).requires_grad_()
    x = randn((1, 6), 1, torch.float64)
    ddim_step(stacked, x, table, 3, guidance=4.0)[0].sum().backward()
    # d guided / d uncond = 1 - s, d guided / d cond = s.
    torch.testing.assert_close(stacked.grad[0] / stacked.grad[1], torch.full((6,), -0.75, dtype=torch.float64))


def test_gradcheck_holds_away_from_the_kinks_of_a_clip():
    schedule = Schedule(DDIMConfig(prediction_type="sample"))
    table = StepTable.build(schedule, schedule.pairs(10))
    output = torch.tensor([[0.2, -0.5, 3.0, -2.0]], dtype=torch.float64, requires_grad=True)
    x = randn((1, 4), 1, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda o, s: ddim_step(o, s, table, 4, limit=Clip(1.0)), (output, x))


@pytest.mark.parametrize("step", [-1, 10])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["StepTable", "tensor"])
def test_an_integer_step_outside_the_table_is_an_index_error_that_names_it(step, as_tensor):
    schedule = Schedule()
    table = StepTable.build(schedule, schedule.pairs(10))
    with pytest.raises(IndexError) as caught:
        ddim_step(randn((2, 3), 0), randn((2, 3), 1), table.tensor() if as_tensor else table, step)
    assert "step" in str(caught.value) and str(step) in str(caught.value)


@pytest.mark.parametrize("form", ["row", "tensor row", "tensor table"])
def test_a_stochastic_row_without_noise_is_refused(form):
    schedule = Schedule()
    table = StepTable.build(schedule, schedule.pairs(10), eta=1.0)
    step = torch.tensor([1, 2]) if form == "tensor row" else 1
    with pytest.raises(ValueError, match="noise"):
        ddim_step(randn((2, 3), 0), randn((2, 3), 1), table.tensor() if form == "tensor table" else table, step)


def test_an_odd_batch_cannot_be_two_halves():
    with pytest.raises(ValueError, match="model_output"):
        combine_guidance(randn((3, 4), 0), Guidance(2.0))


@pytest.mark.parametrize("limit", LIMITS)
def test_an_empty_batch_gives_an_empty_batch(limit):
    schedule = Schedule()
    table = StepTable.build(schedule, schedule.pairs(10))
    x_next, x0 = ddim_step(torch.zeros(0, 3), torch.zeros(0, 3), table, 0, limit=limit)
    assert x_next.shape == x0.shape == (0, 3)
