"""The fused step, as PTX on a machine in tests/ptx (on the GPU where there is one), against the oracle and the reference."""

import dataclasses
import functools
import inspect
import itertools
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.jit import JITFunction

import fastddim
from fastddim import Clip, DDIMConfig, DynamicThreshold, Guidance, Schedule, StepTable
from fastddim.config import limit_kind
from fastddim.kernels import KernelUnavailableError, PreparedStep, Workspace, draw_normal, launch, plan
from fastddim.noise import STREAM_INITIAL, normal, normal_numpy, seed_tensor
from fastddim.reference import abs_quantile
from fastddim.step import StepOptions
from oracle import ddim, guide
from pairwise import pairwise

ddim_step, reference_step = (functools.partial(fastddim.ddim_step, backend=name) for name in ("triton", "reference"))
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCHEDULE = Schedule(DDIMConfig())
PAIRS = SCHEDULE.pairs(10)
# x0 is the model output and x_next is x0: what a limit does, and nothing else.
IDENTITY = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0, 0.0]], device=DEVICE)

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning"),
    pytest.mark.usefixtures("machine"),
]


def table(eta=0.0, rederive=False, prediction_type="epsilon"):
    return StepTable.build(SCHEDULE, PAIRS, eta=eta, use_clipped_model_output=rederive, prediction_type=prediction_type)


def draw(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def poisoned(shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def last_plan():
    """The plan of the newest entry: which variant ran."""
    return next(reversed(launch._ENTRIES.values())).plan


@pytest.fixture(autouse=True)
def _fresh_plans():
    launch._ENTRIES.clear()


@pytest.fixture
def _small_statistics(monkeypatch):
    """The tier of large samples, at sizes that the interpreter can take."""
    monkeypatch.setattr(plan, "WHOLE_SAMPLE", 0)
    monkeypatch.setattr(plan, "STATISTICS_BLOCK", 64)


def float64_step(output, x, row, *, limit=None, noise=None, scale=None, phi=0.0):
    """The oracle on the transition of `row`, float64 in numpy."""
    t, t_next = PAIRS[row]
    alpha_bar, alpha_bar_next = SCHEDULE.alpha_bar([t, t_next])
    output = output.double().cpu().numpy()
    if scale is not None:
        uncond, cond = np.split(output, 2)
        output = guide(uncond, cond, scale, phi) if phi else uncond + scale * (cond - uncond)
    clip = limit.range if isinstance(limit, Clip) else None
    threshold = (limit.ratio, limit.max_value) if isinstance(limit, DynamicThreshold) else None
    return ddim(
        x.double().cpu().numpy(),
        output,
        alpha_bar,
        alpha_bar_next,
        eta=0.0 if noise is None else 1.0,
        noise=None if noise is None else noise.double().cpu().numpy(),
        clip=clip,
        threshold=threshold,
        rederive=limit is not None,
    )


def ulps(actual, expected, scale=None):
    """Largest distance in float32 ulps of the expected result's scale."""
    scale = np.abs(expected).max() if scale is None else scale
    return np.abs(actual.double().cpu().numpy() - expected).max() / np.spacing(np.float32(scale))


LIMITS = {"none": None, "clip": Clip(1.0), "fixed": DynamicThreshold(0.9, 0.5), "threshold": DynamicThreshold(0.9, 1.5)}


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 5, 7), (1, 4, 16, 16), (2, 1000)])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("noise", ["none", "given", "drawn"])
def test_float32_is_within_2_ulp_of_the_oracle(shape, limit, guided, noise):
    batch, row = shape[0], 6
    x, output = draw(shape), draw((batch * (1 + guided), *shape[1:]), seed=1)
    kwargs = {"limit": LIMITS[limit], "guidance": 2.5 if guided else None}
    z = None
    if noise == "given":
        kwargs["noise"] = z = draw(shape, seed=2)
    elif noise == "drawn":
        kwargs["seeds"] = seed_tensor(range(5, 5 + batch), DEVICE)
        z = torch.from_numpy(normal_numpy(range(5, 5 + batch), row, shape[1:]))
    steps = table(0.0 if noise == "none" else 1.0, rederive=LIMITS[limit] is not None)
    x_next, x0 = ddim_step(output, x, steps, row, out=poisoned(shape), **kwargs)
    expected = float64_step(output, x, row, limit=LIMITS[limit], noise=z, scale=kwargs["guidance"])
    # x0 is a difference of what it is made of, and its error theirs.
    t = PAIRS[row][0]
    terms = np.abs(output.double().cpu().numpy()).max() * (4 if guided else 1) / np.sqrt(SCHEDULE.alpha_bar([t])[0])
    assert ulps(x0, expected.x0, max(terms, np.abs(expected.x0).max())) <= 2
    # A threshold below 1 divides by it, errors included.
    grown = LIMITS["fixed"].max_value if limit == "fixed" else 1
    assert (
        ulps(x_next, expected.x_next, max(np.abs(expected.x_next).max(), terms if limit == "none" else 0)) <= 2 / grown
    )
    assert last_plan().tier == ("whole" if limit == "threshold" else "elements")


@pytest.mark.parametrize("state", DTYPES)
@pytest.mark.parametrize("model", DTYPES)
@pytest.mark.parametrize("limit", ["clip", "threshold"])
def test_every_pair_of_dtypes_rounds_the_oracle_once(state, model, limit):
    shape, row = (2, 3, 32, 32), 5
    x, output = draw(shape, state), draw((4, *shape[1:]), model, seed=1)
    out, model_input = poisoned(shape, state), poisoned((4, *shape[1:]), model)
    x_next, x0 = ddim_step(
        output, x, table(rederive=True), row, limit=LIMITS[limit], guidance=2.5, out=out, model_input=model_input
    )
    assert x_next is out
    assert x0.dtype == state
    expected = float64_step(output, x, row, limit=LIMITS[limit], scale=2.5)
    for actual, exact in ((x_next, expected.x_next), (x0, expected.x0), (model_input[:2], expected.x_next)):
        if actual.dtype == torch.float32:
            # Of the terms whose difference x0 is.
            terms = 4 * float(output.abs().max()) / np.sqrt(SCHEDULE.alpha_bar([PAIRS[row][0]])[0])
            assert ulps(actual, exact, terms) <= 2
            continue
        rounded = torch.from_numpy(exact).to(actual.dtype)
        steps = _ordered(actual.cpu()) - _ordered(rounded)
        assert (steps == 0).float().mean() >= 0.999
        assert steps.abs().max() <= 1
    assert torch.equal(model_input[:2], model_input[2:])
    assert torch.equal(model_input[:2].float().to(state), x_next) or model != torch.float32


@pytest.mark.parametrize("tier", ["whole", "statistics"])
@pytest.mark.parametrize("limit", ["clip", "fixed", "threshold"])
def test_a_limit_on_the_device_is_the_limit_in_the_code(tier, limit, monkeypatch):
    if tier == "statistics":
        monkeypatch.setattr(plan, "WHOLE_SAMPLE", 0)
        monkeypatch.setattr(plan, "STATISTICS_BLOCK", 64)
    kinds = {
        "clip": (Clip(0.3), Clip(2.0)),
        "fixed": (DynamicThreshold(0.1, 0.9), DynamicThreshold(0.9, 0.25)),
        "threshold": (DynamicThreshold(0.5, 1.9), DynamicThreshold(0.97, 250.0)),
    }
    planned, wanted = kinds[limit]
    assert limit_kind(planned, numbers_change=True) == limit_kind(wanted, numbers_change=True)
    x, output = draw((3, 333)), draw((3, 333), seed=1)
    numbers = (wanted.range, 1.0) if limit == "clip" else (wanted.max_value, wanted.ratio)
    values = torch.tensor(numbers, dtype=torch.float64, device=DEVICE)
    ours = ddim_step(output, x, table(), 4, limit=planned, limit_values=values)
    assert last_plan().tier == (tier if limit == "threshold" else "elements")
    constants = ddim_step(output, x, table(), 4, limit=wanted)
    theirs = reference_step(output, x, table(), 4, limit=planned, limit_values=values)
    for actual, exact, expected in zip(ours, constants, theirs, strict=True):
        assert torch.equal(actual, exact)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("state", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("row", [0, 4, 9])
@pytest.mark.parametrize("limit", ["none", "clip", "threshold"])
def test_half_precision_x0_is_rounded_once_where_its_terms_cancel(state, row, limit):
    """Model outputs that all but cancel the state, as a good model's do."""
    shape = (2, 3, 64, 64)
    x = draw(shape, state)
    alpha_bar = SCHEDULE.alpha_bar([PAIRS[row][0]])[0]
    output = ((x.float() - 1e-3 * draw(shape, seed=1)) / (1 - alpha_bar) ** 0.5).to(state)
    _, x0 = ddim_step(output, x, table(rederive=True), row, limit=LIMITS[limit])
    exact = torch.from_numpy(float64_step(output, x, row, limit=LIMITS[limit]).x0)
    # Where all of it cancels, the oracle's own float64 rounding is what is left.
    told = exact.abs() > 1e-12
    steps = (_ordered(x0.cpu()) - _ordered(exact.to(state)))[told]
    assert (steps == 0).float().mean() >= 0.999
    assert steps.abs().max() <= 1
    # A float32 table is taken too, and is less exact.
    in_float32 = table(rederive=True).tensor(DEVICE, torch.float32)
    _, coarse = ddim_step(output, x, in_float32, row, limit=LIMITS[limit])
    torch.testing.assert_close(coarse.float(), x0.float(), rtol=2**-7, atol=1e-3)


def _ordered(half):
    """Bit patterns of a half-precision tensor as integers in the order of its values."""
    bits = half.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@given(data=st.data())
def test_any_shape_and_option_is_the_references(data):
    rank = data.draw(st.integers(1, 4))
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank)))
    batch, guided = shape[0], data.draw(st.booleans())
    state, model = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    limit = data.draw(st.sampled_from(list(LIMITS.values())))
    noise = data.draw(st.sampled_from(["none", "given", "drawn"]))
    elements = int(np.prod(shape[1:]))
    kwargs = {"limit": limit}
    if guided:
        scale = data.draw(st.sampled_from([0.0, 0.4, 1.0, 7.5, "tensor"]))
        scale = draw((batch,), seed=3).abs() if scale == "tensor" else scale
        rescale = data.draw(st.sampled_from([0.0, 0.7])) if elements > 1 else 0.0
        kwargs["guidance"] = Guidance(scale, rescale, data.draw(st.booleans()))
    if noise == "given":
        kwargs["noise"] = draw(shape, data.draw(st.sampled_from(DTYPES)), seed=2)
    elif noise == "drawn":
        kwargs["seeds"] = seed_tensor([2**63 + k for k in range(batch)], DEVICE)
        if data.draw(st.booleans()):
            kwargs["first_row"] = torch.arange(batch, device=DEVICE) % 3
    x, output = draw(shape, state), draw((batch * (1 + guided), *shape[1:]), model, seed=1)
    step = data.draw(st.sampled_from(["int", "shared", "rows"]))
    rows = {
        "int": 4,
        "shared": torch.tensor(4, device=DEVICE),
        "rows": torch.arange(batch, device=DEVICE, dtype=torch.int32) % 7 + 3,
    }[step]
    if isinstance(rows, int):
        kwargs.pop("first_row", None)
    steps = table(0.0 if noise == "none" else 1.0, rederive=limit is not None, prediction_type="v_prediction")
    ours, theirs = poisoned(shape, state), poisoned(shape, state)
    inputs = [poisoned(tuple(output.shape), model) for _ in range(2)]
    _, x0 = ddim_step(output, x, steps, rows, out=ours, model_input=inputs[0], **kwargs)
    _, expected_x0 = reference_step(output, x, steps, rows, out=theirs, model_input=inputs[1], **kwargs)
    for actual, expected in ((ours, theirs), (x0, expected_x0), tuple(inputs)):
        tolerance = 3e-5 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps * 2
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def magnitudes(kind, batch, n):
    x = draw((batch, n), seed=n) * 3
    if kind == "ties":
        x = x.round()
    elif kind == "within one":
        x = x * 0.1
    elif kind == "around one":
        x = torch.where(draw((batch, n), seed=9) < 0.5, x * 0.01, x)
    elif kind == "all equal":
        x = torch.full((batch, n), 1.5, device=DEVICE)
    elif kind == "denormal":
        x = x * 1e-40
    elif kind == "huge":
        x = x * 1e20
    elif kind == "infinite":
        x[0, : max(1, n // 3)] = float("inf")
        x[-1, 0] = float("-inf")
    elif kind == "nan":
        x[0, n // 2] = float("nan")
    return x


MAGNITUDES = ("normal", "ties", "within one", "around one", "all equal", "denormal", "huge", "infinite", "nan")


def on_device(ratio, maximum):
    """A threshold whose numbers are in memory, so that one kernel serves all of a kind."""
    kinds = (DynamicThreshold(0.5, 1.5), DynamicThreshold(0.5, 300.0), DynamicThreshold(0.5, 1e6))
    wanted = limit_kind(DynamicThreshold(ratio, maximum), numbers_change=True)
    (planned,) = [kind for kind in kinds if limit_kind(kind, numbers_change=True) == wanted]
    return planned, torch.tensor([maximum, ratio], dtype=torch.float64, device=DEVICE)


def check_threshold(kind, n, limit, tier, workspace=None, limit_values=None):
    output = magnitudes(kind, 2, n)
    state = torch.zeros_like(output)
    out = poisoned((2, n))
    _, x0 = ddim_step(output, state, IDENTITY, 0, limit=limit, limit_values=limit_values, out=out, workspace=workspace)
    assert last_plan().tier == tier
    maximum, ratio = (limit.max_value, limit.ratio) if limit_values is None else limit_values.tolist()
    quantile = torch.quantile(output.abs(), ratio, dim=1)
    scale = quantile.clamp(1, maximum)[:, None]
    expected = output.clamp(-scale, scale) / scale
    torch.testing.assert_close(x0, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", MAGNITUDES)
@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_the_threshold_is_torch_quantiles(kind, n):
    for ratio, maximum in itertools.product((0.0, 0.3, 0.5, 0.69, 0.71, 0.995, 1.0), (1.5, 1e3)):
        limit, values = on_device(ratio, maximum)
        check_threshold(kind, n, limit, "whole", limit_values=values)


@pytest.mark.usefixtures("_small_statistics")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ("normal", "ties") else pytest.mark.slow) for kind in MAGNITUDES]
)
@pytest.mark.parametrize("choose", [pairwise, pytest.param(itertools.product, marks=pytest.mark.slow)])
def test_the_threshold_of_large_samples_is_torch_quantiles(kind, choose):
    workspace, sizes = Workspace(), (1, 7, 150)
    # Whether a rank lies between two infinities takes a kind, a size and a ratio.
    cases = itertools.product(MAGNITUDES, sizes)
    for (chosen, n), ratio, maximum in choose(cases, (0.0, 0.5, 0.69, 0.71, 0.9, 1.0), (1.5, 300.0)):
        if chosen == kind:
            limit, values = on_device(ratio, maximum)
            check_threshold(kind, n, limit, "statistics", workspace, values)
    compiled_in = (DynamicThreshold(*numbers) for numbers in ((0.0, 1.5), (0.69, 300.0), (0.71, 1.5), (1.0, 300.0)))
    for chosen, n, limit in choose(MAGNITUDES, sizes, compiled_in):
        if chosen == kind:
            check_threshold(kind, n, limit, "statistics", workspace)
    assert not workspace._kept["counters"].any()


@given(
    values=st.lists(st.floats(0, 4, width=32), min_size=1, max_size=60),
    ratio=st.floats(0, 1),
    maximum=st.sampled_from([1.25, 2.0, 1e6]),
    large=st.booleans(),
)
def test_any_threshold_is_exact(values, ratio, maximum, large):
    output = torch.tensor([values], device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        launch._ENTRIES.clear()
        if large:
            patch.setattr(plan, "WHOLE_SAMPLE", 0)
            patch.setattr(plan, "STATISTICS_BLOCK", 16)
        limit, values = on_device(ratio, maximum)
        _, x0 = ddim_step(output, torch.zeros_like(output), IDENTITY, 0, limit=limit, limit_values=values)
        assert last_plan().tier == ("statistics" if large else "whole")
    launch._ENTRIES.clear()
    scale = float(torch.quantile(output.abs().flatten(), ratio).clamp(1, maximum))
    torch.testing.assert_close(x0, output.clamp(-scale, scale) / scale, rtol=0, atol=0)


@pytest.mark.sampled
def test_a_sample_of_16384_takes_one_program_and_one_more_element_three_launches():
    limit = DynamicThreshold(0.995, 2.0)
    for n, tier, launches in ((16384, "whole", 1), (16385, "statistics", 3)):
        output = draw((1, n)) * 2
        _, x0 = ddim_step(output, torch.zeros_like(output), IDENTITY, 0, limit=limit)
        assert last_plan().tier == tier
        assert len(last_plan().calls) == launches
        scale = abs_quantile(output, 0.995).clamp(1, 2)
        torch.testing.assert_close(x0, output.clamp(-scale, scale) / scale, rtol=0, atol=0)


def take_captured(batch, dtype, rescale):
    """A step as a graph has it, of the first `batch` of 17 samples."""
    steps, n = table(1.0, rederive=True), 16384
    x, output = draw((17, n), dtype), draw((2, 17, n), dtype, seed=1)
    halves = output[:, :batch].flatten(0, 1).contiguous()
    step, workspace = torch.tensor(5, device=DEVICE), Workspace()
    results = ddim_step(
        halves, x[:batch].contiguous(), steps, step, limit=DynamicThreshold(0.995, 30.0), guidance=Guidance(3.0, rescale),
        seeds=seed_tensor(range(batch), DEVICE), advance=True, workspace=workspace,
    )  # fmt: skip
    assert int(step) == 6 and not any(each.any() for name, each in workspace._kept.items() if name != "statistics")
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thresholds_tier_follows_the_batch_and_no_bit_does(dtype):
    few = take_captured(1, dtype, 0.0)
    assert last_plan().tier == "statistics"
    many = take_captured(17, dtype, 0.0)
    assert last_plan().tier == "whole"
    assert all(torch.equal(one[0], other[0]) for one, other in zip(few, many, strict=True))


def test_the_tier_of_what_is_rounded_follows_the_samples_size_alone():
    few, tier = take_captured(1, torch.float32, 0.7), last_plan().tier
    many = take_captured(17, torch.float32, 0.7)
    assert last_plan().tier == tier == "whole"
    assert all(torch.equal(one[0], other[0]) for one, other in zip(few, many, strict=True))
    limits = (None, Clip(), DynamicThreshold(0.9, 2.0))
    for limit, n, advance, drawn in itertools.product(
        limits, (9, 8192, 8193, 16384, 16385), (False, True), (False, True)
    ):
        shape = plan.StepShape(1, n, guided=True, rescale=True, limit=limit, advance=advance, drawn=drawn)
        blocks = {
            tuple((call.kernel, call.constants["BLOCK"]) for call in plan.make_plan(planned).calls[:-1])
            or plan.make_plan(planned).calls[-1].constants["BLOCK"]
            for planned in (dataclasses.replace(shape, batch=batch) for batch in (1, 16, 17, 200, 70000))
        }
        assert len(blocks) == 1


@pytest.mark.slow
def test_a_megapixel_sample_is_exact():
    output = draw((1, 3, 1024, 1024)) * 1.5
    _, x0 = ddim_step(output, torch.zeros_like(output), IDENTITY, 0, limit=DynamicThreshold(0.995, 10.0))
    scale = abs_quantile(output, 0.995).clamp(1, 10)
    assert last_plan().tier == "statistics"
    torch.testing.assert_close(x0, output.clamp(-scale, scale) / scale, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "limit", "rescale"), [((16, 4, 64, 64), "clip", 0.0), ((2, 3, 200, 201), "threshold", 0.6)]
)
def test_pictures_and_latents_are_the_references(shape, limit, rescale, dtype):
    batch, steps = shape[0], table(1.0, rederive=True)
    x, output = draw(shape, dtype), draw((2 * batch, *shape[1:]), dtype, seed=1)
    index, next_timestep = torch.arange(batch, device=DEVICE) % 9, torch.zeros(2 * batch, device=DEVICE)
    kwargs = {
        "limit": LIMITS[limit], "guidance": Guidance(2.5, rescale), "seeds": seed_tensor(range(batch), DEVICE), "advance": True,
        "timesteps": torch.tensor(steps.timesteps, device=DEVICE), "next_timestep": next_timestep,
    }  # fmt: skip
    expected = reference_step(output, x, steps, index.clone(), **kwargs)
    timesteps = next_timestep.clone()
    before = index.clone()
    actual = ddim_step(output, x, steps, index, out=poisoned(shape, dtype), **kwargs)
    tolerance = 3e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * 2
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert torch.equal(index, before + 1) and torch.equal(next_timestep, timesteps)


def test_a_threshold_of_at_most_one_is_dispatched_as_a_clip():
    output = draw((2, 20000)) * 2
    _, x0 = ddim_step(output, torch.zeros_like(output), IDENTITY, 0, limit=DynamicThreshold(0.9, 1.0))
    (call,) = last_plan().calls
    assert (last_plan().tier, call.constants["LIMIT"], call.constants["RANGE"]) == ("elements", "clip", 1.0)
    assert torch.equal(x0, output.clamp(-1, 1))


@pytest.mark.usefixtures("_small_statistics")
@pytest.mark.parametrize("cond_first", [False, True])
@pytest.mark.parametrize("limit", ["none", "clip", "threshold"])
def test_large_samples_rescale_as_the_oracle(cond_first, limit):
    shape, row = (3, 2, 11, 13), 6
    halves = draw((2, *shape), seed=1)
    x, uncond, cond = draw(shape), halves[0], halves[1] * 1.7 + 0.3
    stacked = torch.cat([cond, uncond] if cond_first else [uncond, cond])
    scales = torch.tensor([0.3, 1.5, 6.0], device=DEVICE)
    workspace = Workspace()
    for _ in range(2):
        x_next, _ = ddim_step(
            stacked, x, table(rederive=LIMITS[limit] is not None), row, limit=LIMITS[limit],
            guidance=Guidance(scales, 0.6, cond_first), workspace=workspace,
        )  # fmt: skip
        assert (last_plan().tier, len(last_plan().calls)) == ("statistics", 4 if limit == "threshold" else 2)
        for k, scale in enumerate(scales.tolist()):
            pair = torch.stack([uncond[k], cond[k]])
            expected = float64_step(pair, x[k : k + 1], row, limit=LIMITS[limit], scale=scale, phi=0.6)
            np.testing.assert_allclose(x_next[k : k + 1].cpu(), expected.x_next, rtol=0, atol=2e-5)
    assert not workspace._kept["counters"].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("rederive", [False, True])
def test_nan_and_infinity_in_the_model_output_end_as_in_the_reference(value, guided, limit, rederive):
    shape = (2, 3, 5)
    x, output = draw(shape), draw((2 * (1 + guided), *shape[1:]), seed=1)
    output[0, 1, 2] = output[-1, 0, 0] = value
    for scale in (0.3, 1.0, 7.5) if guided else (None,):
        kwargs = {"limit": LIMITS[limit], "guidance": scale}
        ours = ddim_step(output, x, table(rederive=rederive), 4, **kwargs)
        theirs = reference_step(output, x, table(rederive=rederive), 4, **kwargs)
        rows = torch.full((2,), 4, device=DEVICE)
        by_row = reference_step(output, x, table(rederive=rederive), rows, **kwargs)
        for actual, expected, again in zip(ours, theirs, by_row, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
            torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        if np.isnan(value):
            assert ours[0][-1].isnan().any() and ours[1][-1].isnan().any()


@pytest.mark.sampled
def test_drawn_noise_is_noise_pys_for_any_batch_block_and_position(monkeypatch):
    """The bits of the noise itself: nothing else in the row."""
    only_noise = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]] * 8, device=DEVICE)
    seeds, n = [0, 7, 2**32 + 5, 2**64 - 1], 1237
    for block, order in ((256, [0, 1, 2, 3]), (2048, [3, 1]), (512, [2])):
        monkeypatch.setattr(plan, "_element_block", lambda batch, n, block=block: block)
        launch._ENTRIES.clear()
        chosen = [seeds[k] for k in order]
        zeros = torch.zeros(len(chosen), n, device=DEVICE)
        rows = torch.tensor([3 + k for k in order], device=DEVICE)
        x_next, _ = ddim_step(zeros, zeros, only_noise, rows, seeds=seed_tensor(chosen, DEVICE))
        assert last_plan().calls[-1].constants["BLOCK"] == block
        for k, seed, drawn in zip(order, chosen, x_next.cpu(), strict=True):
            expected = normal_numpy([seed], 3 + k, (n,))[0]
            assert np.array_equal(drawn.numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1025), (4,), (0, 3)])
def test_drawn_starts_are_noise_pys(shape, dtype):
    seeds = [9, 2**40, 2**64 - 1, 0][: shape[0]]
    out = draw_normal(seed_tensor(seeds, DEVICE), poisoned(shape, dtype), STREAM_INITIAL)
    expected = normal(seeds, 0, shape[1:], STREAM_INITIAL, dtype=dtype)
    assert torch.equal(out.cpu(), expected)


def test_noise_for_other_shapes_than_the_seeds_is_refused():
    for out in (torch.zeros(3, 4), torch.zeros(4, 2).t()):
        with pytest.raises(ValueError, match="out: "):
            draw_normal(seed_tensor([1, 2], DEVICE), out.to(DEVICE), STREAM_INITIAL)


def test_first_row_counts_the_steps_of_the_noise_from_each_samples_own_start():
    only_noise = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]] * 8, device=DEVICE)
    zeros = torch.zeros(2, 50, device=DEVICE)
    rows, first = torch.tensor([2, 7], device=DEVICE), torch.tensor([0, 5], device=DEVICE)
    x_next, _ = ddim_step(zeros, zeros, only_noise, rows, seeds=seed_tensor([4, 4], DEVICE), first_row=first)
    assert torch.equal(x_next[0], x_next[1])
    assert np.array_equal(x_next[0].cpu(), normal_numpy([4], 2, (50,))[0])


@pytest.mark.sampled
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("elements", [40, 700])
@pytest.mark.parametrize("guided", [True, False])
def test_the_index_advances_on_the_device(shared, elements, guided):
    batch, copies = 3, 2 if guided else 1
    steps = table(1.0)
    timesteps = torch.tensor(steps.timesteps, device=DEVICE)
    step = torch.tensor(7, device=DEVICE) if shared else torch.tensor([6, 7, 8], device=DEVICE)
    seeds, workspace = seed_tensor(range(batch), DEVICE), Workspace()
    x = y = draw((batch, elements))
    next_timestep = torch.full((batch * copies,), -5.0, device=DEVICE)
    for k in range(2):
        output = draw((batch * copies, elements), seed=k)
        before = step.clone()
        x, _ = ddim_step(
            output, x, steps, step, seeds=seeds, guidance=2.0 if guided else None, advance=True,
            timesteps=timesteps, next_timestep=next_timestep, workspace=workspace,
        )  # fmt: skip
        reference_index, reference_timestep = before.clone(), torch.full_like(next_timestep, -5.0)
        y, _ = reference_step(
            output, y, steps, reference_index, seeds=seeds, guidance=2.0 if guided else None, advance=True,
            timesteps=timesteps, next_timestep=reference_timestep,
        )  # fmt: skip
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        assert torch.equal(step, before + 1)
        assert torch.equal(step, reference_index)
        kept = (before + 1 >= len(steps)).expand(batch).repeat(copies)
        expected = timesteps[(before + 1).clamp(max=len(steps) - 1)].expand(batch).repeat(copies).float()
        assert torch.equal(next_timestep[~kept], expected[~kept])
        assert torch.equal(reference_timestep[~kept], expected[~kept])
    assert all(not kept.any() for kept in workspace._kept.values())


def test_the_last_program_of_a_grid_moves_the_index_on_whatever_the_size():
    """Close to 2**31 elements, the sum that rounds a quotient up overflows: the programs of the grid are what counts."""
    step, tickets = torch.tensor(3, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    timesteps, next_timestep = torch.arange(10, device=DEVICE), torch.zeros(1, device=DEVICE)
    call = plan.make_plan(plan.StepShape(1, 512, num_steps=10, advance=True)).calls[-1]
    call = dataclasses.replace(call, numbers=(2**31 - 1, *call.numbers[1:]))
    given = {
        "output": draw((512,)), "sample": draw((512,)), "table": table().tensor(DEVICE), "step": step, "tickets": tickets,
        "next": poisoned((512,)), "timesteps": timesteps, "next_timestep": next_timestep,
    }  # fmt: skip
    assert math.prod(call.grid) == 2
    launch._Launcher(call)([given.get(name) for name in call.pointers], step.device)
    assert (int(step), float(next_timestep), int(tickets)) == (4, 4.0, 0)


@pytest.mark.parametrize("limit", [Clip(), DynamicThreshold(0.9, 1.5)])
@pytest.mark.parametrize("small", [False, True])
def test_an_index_outside_the_table_gives_nan_instead_of_someone_elses_memory(monkeypatch, limit, small):
    if small:
        monkeypatch.setattr(plan, "WHOLE_SAMPLE", 0)
    rows = torch.tensor([9, -10, -1, 10, -11, 2**40, -(2**40), 2**63 - 1, -(2**63)], device=DEVICE)
    x, output = draw((len(rows), 9)), draw((len(rows), 9), seed=1)
    x_next, x0 = ddim_step(output, x, table(), rows, limit=limit)
    assert x_next[3:].isnan().all() and x0[3:].isnan().all()
    for k, row in enumerate((9, 0, 9)):
        expected, _ = reference_step(output[k : k + 1], x[k : k + 1], table(), row, limit=limit)
        torch.testing.assert_close(x_next[k : k + 1], expected)


@pytest.mark.sampled
def test_a_channels_last_model_beside_a_contiguous_state():
    shape = (2, 3, 6, 10)
    x, output = draw(shape), draw((4, *shape[1:]), torch.bfloat16, seed=1)
    model_input = poisoned((4, *shape[1:]), torch.bfloat16).contiguous(memory_format=torch.channels_last)
    steps, seeds = table(1.0), seed_tensor([1, 2], DEVICE)
    for limit in (Clip(), DynamicThreshold(0.8, 2.0)):
        kwargs = {"limit": limit, "guidance": 3.0, "seeds": seeds}
        expected = ddim_step(output, x, steps, 3, **kwargs)
        strided = output.contiguous(memory_format=torch.channels_last)
        actual = ddim_step(strided, x, steps, 3, model_input=model_input, **kwargs)
        constants = last_plan().calls[-1].constants
        assert constants["OUTPUT_CHANNELS_LAST"] and constants["INPUT_CHANNELS_LAST"]
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        assert torch.equal(model_input, torch.cat([expected[0]] * 2).bfloat16())
        assert model_input.is_contiguous(memory_format=torch.channels_last)


def test_where_everything_is_channels_last_so_are_the_results():
    shape = (2, 3, 6, 10)
    x, output = (t.contiguous(memory_format=torch.channels_last) for t in (draw(shape), draw(shape, seed=1)))
    expected = reference_step(output, x, table(), 3, limit=Clip())
    actual = ddim_step(output, x, table(), 3, limit=Clip())
    assert not last_plan().calls[-1].constants["OUTPUT_CHANNELS_LAST"]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.stride() == x.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sample", "model_output", "noise"])
def test_other_strides_are_taken(name):
    tensors = {"sample": draw((3, 8, 6)), "model_output": draw((3, 8, 6), seed=1), "noise": draw((3, 8, 6), seed=2)}
    expected = reference_step(**tensors, table=table(1.0), step=2)
    tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert not tensors[name].is_contiguous()
    actual = ddim_step(**tensors, table=table(1.0), step=2)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)


def test_in_place_and_unaligned():
    storage = draw((1 + 3 * 33,))
    x = storage[1:].view(3, 33)
    expected, _ = reference_step(draw((3, 33), seed=1), x, table(), 3, limit=Clip())
    x_next, x0 = ddim_step(draw((3, 33), seed=1), x, table(), 3, limit=Clip(), out=x, return_x0=False)
    assert x_next is x and x0 is None
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_samples_that_do_not_differ_are_one_flat_sample():
    x, output = draw((16, 7)), draw((16, 7), seed=1)
    ddim_step(output, x, table(), 3)
    assert last_plan().flat
    ddim_step(output, x, table(), torch.arange(16, device=DEVICE) % 4)
    assert not last_plan().flat


@pytest.mark.parametrize(
    ("limit", "small", "channels_last", "dtype"),
    pairwise((Clip(), DynamicThreshold(0.9, 1.5)), (False, True), (False, True), (torch.float32, torch.bfloat16)),
)
def test_a_batch_of_one_is_known_to_the_compiler_and_changes_no_bit(monkeypatch, limit, small, channels_last, dtype):
    """Nor the order in which the sums of a rescale are taken."""
    if small:
        monkeypatch.setattr(plan, "WHOLE_SAMPLE", 0)
    shape = (3, 16, 65)
    x, output = draw((2, *shape), dtype), draw((4, *shape), dtype, seed=1)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    rows, seeds = torch.tensor([3, 3], device=DEVICE), seed_tensor([5, 6], DEVICE)
    results = {}
    for batch, axis in ((1, -1), (2, 1)):
        halves = output[:: 2 // batch].contiguous(memory_format=memory_format)
        results[batch] = ddim_step(
            halves, x[:batch], table(1.0), rows[:batch], limit=limit, guidance=Guidance(3.0, 0.7), seeds=seeds[:batch]
        )
        assert all(call.constants["SAMPLE_AXIS"] == axis for call in last_plan().calls)
    one, both = results[1], results[2]
    assert all(torch.equal(alone[0], among[0]) for alone, among in zip(one, both, strict=True))


def test_more_samples_than_a_grids_second_axis_takes(monkeypatch):
    monkeypatch.setattr(plan, "_MAX_GRID_Y", 3)
    x, output, rows = draw((5, 70)), draw((5, 70), seed=1), torch.arange(5, device=DEVICE)
    for limit in (Clip(), DynamicThreshold(0.9, 2.0)):
        x_next, _ = ddim_step(output, x, table(), rows, limit=limit)
        assert last_plan().calls[-1].constants["SAMPLE_AXIS"] == 0
        expected, _ = reference_step(output, x, table(), rows, limit=limit)
        torch.testing.assert_close(x_next, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0)])
def test_nothing_to_do_is_done(shape):
    x_next, x0 = ddim_step(torch.zeros(shape, device=DEVICE), torch.zeros(shape, device=DEVICE), table(), 0)
    assert x_next.shape == x0.shape == torch.Size(shape)


def test_past_2_to_the_31_elements_the_offsets_are_64_bit():
    """Grid and numbers of the plan, as the memory for it is not here."""
    call = plan.make_plan(plan.StepShape(3, 1 << 31, row_per_sample=True)).calls[-1]
    assert call.grid == (1 << 20, 3) and call.numbers[0] == 1 << 31
    flat = plan.make_plan(plan.StepShape(1 << 20, 1 << 14)).calls[-1]
    assert flat.numbers[0] == 1 << 34 and flat.grid == (1 << 23, 1)
    huge = torch.zeros(1, device=DEVICE).expand(1, 1 << 32)
    with pytest.raises(ValueError, match=r"^sample: 4294967296 elements each; .* pass fewer than 2\*\*31$"):
        ddim_step(huge, huge, table(), 0, limit=DynamicThreshold(0.9, 2.0))


def good():
    return {"model_output": draw((2, 5), seed=1), "sample": draw((2, 5)), "table": table(), "step": 3}


BAD = {
    "sample: list; pass a tensor": {"sample": [1.0]},
    "model_output: NoneType; for a state of (2, 5) pass a floating-point tensor [2, 5]": {"model_output": None},
    "model_output: shape (2, 4); for a state of (2, 5) pass a floating-point tensor": {
        "model_output": torch.zeros(2, 4)
    },
    "model_output: shape (2, 5); for a state of (2, 5) pass a floating-point tensor [4, 5] (uncond": {"guidance": 2.0},
    "noise: shape (5,)": {"noise": torch.zeros(5)},
    "noise, seeds: both given": {"noise": torch.zeros(2, 5), "seeds": torch.zeros(2, dtype=torch.int64)},
    "out: dtype torch.int64": {"out": torch.zeros(2, 5, dtype=torch.int64)},
    "sample: dtype torch.float64; the fused step takes float32": {"sample": torch.zeros(2, 5, dtype=torch.float64)},
    "noise: dtype torch.float64; the fused step takes float32": {"noise": torch.zeros(2, 5, dtype=torch.float64)},
    "limit_values: given without a limit": {"limit_values": torch.ones(2, dtype=torch.float64)},
    "limit_values: dtype torch.float32": {"limit": Clip(), "limit_values": torch.ones(2)},
    "limit_values: list": {"limit": Clip(), "limit_values": [1.0, 1.0]},
    "table: torch.float16": {"table": torch.zeros(4, 6, dtype=torch.float16)},
    "table: torch.float32 of shape (6,)": {"table": torch.zeros(6)},
    "step: 10 is outside the table of 10 steps": {"step": 10},
    "step: -1 is outside": {"step": -1},
    "step: str; pass an integer": {"step": "3"},
    "step: shape (3,); for a state of (2, 5) pass an int64 or int32 tensor [] or": {
        "step": torch.zeros(3, dtype=torch.int64)
    },
    "step: dtype torch.float32": {"step": torch.zeros(2)},
    "seeds: dtype torch.int32": {"seeds": torch.zeros(2, dtype=torch.int32)},
    "seeds: shape (1,)": {"seeds": torch.zeros(1, dtype=torch.int64)},
    "seeds: list": {"seeds": [1, 2]},
    "first_row: given without seeds": {"first_row": torch.zeros(2, dtype=torch.int64)},
    "limit: float; pass a Clip, a DynamicThreshold or None": {"limit": 1.0},
    "guidance.scale: str; for a state of (2, 5) pass a number or a floating-point tensor [] or [2]": {
        "guidance": "2",
        "model_output": torch.zeros(4, 5),
    },
    "guidance.scale: shape (3,)": {"guidance": torch.ones(3), "model_output": torch.zeros(4, 5)},
    "guidance.rescale: bool": {"guidance": Guidance(2.0, True), "model_output": torch.zeros(4, 5)},
    "guidance.rescale: dtype torch.int64": {
        "guidance": Guidance(2.0, torch.ones(2, dtype=torch.int64)),
        "model_output": torch.zeros(4, 5),
    },
    "model_input: shape (4, 5); for a state of (2, 5) pass a floating-point tensor [2, 5]": {
        "model_input": torch.zeros(4, 5)
    },
    "out: strides (1, 2); pass a contiguous tensor": {"out": torch.zeros(5, 2).T},
    "model_input: strides (1, 2)": {"model_input": torch.zeros(5, 2).T},
    "advance: True, but step is the number 3": {"advance": True},
    "timesteps, next_timestep: one without the other": {"timesteps": torch.zeros(10)},
    "noise: None, but step 3 adds noise": {"table": table(1.0)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named_before_any_launch(message, monkeypatch):
    bad = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in BAD[message].items()}
    launches = []
    monkeypatch.setattr(launch._Launcher, "__call__", lambda *args: launches.append(args))
    # Also once a good call's entry is kept.
    ddim_step(**good())
    launches.clear()
    with pytest.raises((TypeError, ValueError, IndexError)) as raised:
        ddim_step(**{**good(), **bad})
    assert str(raised.value).startswith(message)
    assert not launches


def test_memory_that_is_shared_is_refused():
    x, output = draw((2, 8)), draw((2, 8), seed=1)
    storage = draw((20,))
    cases = [
        ("out: shares memory with sample", {"sample": storage[:16].view(2, 8), "out": storage[4:].view(2, 8)}),
        ("out: shares memory with noise", {"noise": storage[:16].view(2, 8), "out": storage[:16].view(2, 8)}),
        # Both halves of a guided output in half the precision have the span of the state.
        (
            "out: shares memory with model_output",
            {
                "model_output": storage[:16].view(torch.float16).view(4, 8),
                "guidance": 2.0,
                "out": storage[:16].view(2, 8),
            },
        ),
        ("model_input: shares memory with model_output", {"model_input": output}),
        ("model_input: shares memory with sample", {"model_input": x}),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            ddim_step(**{"model_output": output, "sample": x, "table": table(), "step": 1, **arguments})
    expected, _ = ddim_step(output, x, table(), 1)
    x_next, _ = ddim_step(output, x, table(), 1, out=output)
    assert torch.equal(x_next, expected)


def test_the_memory_of_a_model_output_in_another_order_is_refused():
    storage, shape = draw((2 * 3 * 32 * 32,)), (2, 3, 32, 32)
    out = storage.view(shape)
    output = storage.view(2, 32, 32, 3).permute(0, 3, 1, 2)
    x = draw(shape)
    with pytest.raises(ValueError, match=r"^out: shares memory with model_output"):
        ddim_step(output, x, table(), 1, out=out)
    prepared = PreparedStep(output.clone(), x, table(), StepOptions(out=out))
    with pytest.raises(ValueError, match=r"^model_output: shares memory with out"):
        prepared(output, 1)
    # All of them channels-last is one order.
    everything = x.contiguous(memory_format=torch.channels_last)
    expected, _ = reference_step(output.clone(), x, table(), 1)
    for step in (functools.partial(ddim_step, table=table(), out=output), _prepared_in_place):
        storage_before = storage.clone()
        x_next, _ = step(model_output=output, sample=everything, step=1)
        torch.testing.assert_close(x_next, expected, rtol=1e-5, atol=1e-5)
        storage.copy_(storage_before)


def _prepared_in_place(model_output, sample, step):
    return PreparedStep(model_output, sample, table(), StepOptions(out=model_output))(model_output, step)


@pytest.mark.sampled
@pytest.mark.parametrize("limit", [Clip(), DynamicThreshold(0.9, 1.5)])
@pytest.mark.parametrize("small", [False, True])
def test_a_dependent_launch_waits_before_it_touches_memory_and_changes_no_bit(machine, monkeypatch, limit, small):
    if small:
        monkeypatch.setattr(plan, "WHOLE_SAMPLE", 0)
    x, outputs = draw((2, 700)), [draw((4, 700), seed=seed) for seed in (1, 2)]
    options = StepOptions(limit=limit, guidance=Guidance(3.0), seeds=seed_tensor([5, 6], DEVICE))
    plain, dependent = (
        PreparedStep(outputs[0], x, table(1.0), options, dependent_launch=asked) for asked in (False, True)
    )
    if machine is None:
        asked = DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    else:
        seen, asked = [], machine.capability >= 90
        monkeypatch.setattr(machine, "edit", lambda text: seen.append(text) or text)
    for output, step in zip(outputs, (3, 4), strict=True):
        expected = [each.clone() for each in plain(output, step)]
        assert all(torch.equal(*pair) for pair in zip(dependent(output, step), expected, strict=True))
    launchers = [each._request.entry.launchers for each in (plain, dependent)]
    assert [each[-1].call.constants["DEPENDENT"] for each in launchers] == [False, asked]
    assert not any(each.call.constants.get("DEPENDENT") for each in launchers[1][:-1])
    if machine is not None:
        waiting = {text for text in seen if "griddepcontrol" in text}
        assert len(waiting) == asked
        assert all(text.index("griddepcontrol.wait") < text.index(".global.", text.index("{")) for text in waiting)
        kernels = [next(iter(each[-1]._compiled.values()))[3] for each in launchers]
        assert [kernel.metadata.launch_pdl for kernel in kernels] == [False, asked]


@pytest.mark.usefixtures("_small_statistics")
@pytest.mark.parametrize("error", [KeyboardInterrupt, KernelUnavailableError])
def test_a_step_interrupted_between_its_launches_leaves_its_workspace_clear(error, monkeypatch):
    """The next sample's threshold is 1, which the first launch knows: nothing would clear what was counted before."""
    limit, workspace, launches = DynamicThreshold(0.9, 3.0), Workspace(), []
    x, large, small = torch.zeros(1, 333, device=DEVICE), draw((1, 333)), draw((1, 333)) * 0.1
    call = launch._Launcher.__call__

    def interrupted(*arguments):
        if launches:
            raise error
        launches.append(call(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(launch._Launcher, "__call__", interrupted)
        with pytest.raises(error):
            ddim_step(large, x, IDENTITY, 0, limit=limit, workspace=workspace)
    assert launches and not workspace._kept["counters"].any()
    _, x0 = ddim_step(small, x, IDENTITY, 0, limit=limit, workspace=workspace)
    assert torch.equal(x0, small)


def test_gradients_are_refused():
    x = draw((2, 5)).requires_grad_()
    with pytest.raises(ValueError, match="the fused step has no gradients"):
        ddim_step(draw((2, 5)), x, table(), 3)
    with torch.no_grad():
        ddim_step(draw((2, 5)), x, table(), 3)


def test_the_public_keywords_are_the_options_of_a_step():
    public = inspect.signature(fastddim.ddim_step).parameters.values()
    keywords = {each.name: each.default for each in public if each.kind == inspect.Parameter.KEYWORD_ONLY}
    assert keywords.pop("backend") == "auto"
    assert keywords == {field.name: field.default for field in dataclasses.fields(StepOptions)}


def test_threads_compile_one_at_a_time(monkeypatch):
    """CPython 3.11 fails to parse in two threads at once, and a kernel that fails to compile is given up for good."""
    warmup, inside, most = JITFunction.warmup, [], []

    def watched(*args, **kwargs):
        inside.append(1)
        time.sleep(0.01)
        most.append(len(inside))
        try:
            return warmup(*args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(JITFunction, "warmup", watched)
    inputs = [(draw((2, 50), seed=k), draw((2, 50), seed=k + 100), Clip() if k % 2 else None) for k in range(4)]
    launch._ENTRIES.clear()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda given: ddim_step(*given[:2], table(), 4, limit=given[2]), inputs))
    assert max(most) == 1


def test_threads_share_the_plans():
    inputs = [(draw((2, 50 + k % 3), seed=k), draw((2, 50 + k % 3), seed=k + 100)) for k in range(12)]
    expected = [reference_step(output, x, table(), 4, limit=Clip())[0] for output, x in inputs]
    # The interpreter patches triton.language while a kernel runs, so it takes one thread at a time.
    with ThreadPoolExecutor(1 if triton.knobs.runtime.interpret else 4) as pool:
        results = list(pool.map(lambda pair: ddim_step(*pair, table(), 4, limit=Clip())[0], inputs))
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
