"""Captured runs on an emulated device: every option against the eager loop, and what a capture must not do."""

import itertools

import pytest
import torch
from torch.utils import _pytree as pytree

import test_accelerate as pipelines
from fastddim import Clip, DDIMConfig, DynamicThreshold, accelerate, unaccelerate
from tape import REFUSED, Tape
from test_loop import MODES, SHAPE, Denoiser, labels, make

CPU = torch.device("cpu")


@pytest.fixture
def tape(monkeypatch):
    return Tape().install(monkeypatch)


@pytest.fixture(scope="module")
def model():
    return Denoiser()


def close(got, expected, dtype=torch.float32):
    tolerance = {torch.bfloat16: 0.03, torch.float16: 4e-3, torch.float32: 4e-6, torch.float64: 1e-11}[dtype]
    scale = max(1.0, *(float(value.abs().max()) for value in pytree.tree_leaves(expected)))
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


# The tape itself.


def capture(tape, body):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


def test_a_replay_computes_over_what_is_there_by_then(tape):
    x, y = torch.ones(3), torch.zeros(3)
    graph = capture(tape, lambda: y.copy_((x * 2).cumsum(0)[:3]))
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), torch.ones(2)),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: torch.unique(x),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_the_tape_refuses_what_waits_for_a_device(tape, body):
    x = torch.tensor([1.0, -1.0, 2.0])
    with pytest.raises(RuntimeError) as raised:
        capture(tape, lambda: body(x))
    assert REFUSED in str(raised.value.__context__)


def test_the_tape_notices_freed_memory_and_leftovers(tape):
    held = [torch.ones(3)]
    y = torch.zeros(3)
    graph = capture(tape, lambda: y.copy_(held[0]))
    graph.replay()
    with pytest.raises(AssertionError, match="nobody may hold"):
        tape.check_reads(y)
    held.clear()
    with pytest.raises(RuntimeError, match=r"memory that was freed.*test_tape"):
        graph.replay()
    leftovers = capture(tape, lambda: y.copy_(torch.empty(3)))
    leftovers.replay()
    assert y.isnan().all()


# Every option.

GUIDANCE = {
    "none": {},
    "batched": {"guidance_scale": 3.0},
    "two calls": {"guidance_scale": 3.0, "batched_guidance": False},
    "rescaled": {"guidance_scale": 3.0, "guidance_rescale": 0.7},
    "interval": {"guidance_scale": 3.0, "guidance_interval": (0.3, 0.7)},
    "interval, two calls": {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.5), "batched_guidance": False},
}
LIMITS = (None, Clip(0.8), DynamicThreshold(ratio=0.9, max_value=1.5))
REST = (
    {},
    {"dtype": torch.bfloat16},
    {"eta": (0.0, 0.3, 0.9, 0.0)},
    {"dtype": torch.float64},
    {"channels_last": True},
    {"batch_buckets": (2, 5)},
    {"strength": 0.5},
    {"use_clipped_model_output": False, "config": DDIMConfig(prediction_type="sample")},
    {"config": DDIMConfig(prediction_type="v_prediction", timestep_spacing="trailing")},
    {"timesteps": (900, 500, 20), "steps": None},
)


def conditioned(options, batch=3):
    """No conditioning, or a class, with its null under guidance, and nested embeddings that are the same for both halves."""
    if "guidance_scale" not in options:
        return {}
    embeds = torch.randn(batch, 5, generator=torch.Generator().manual_seed(1))
    return {**labels(batch), "added": {"text": {"embeds": embeds}}}


def sample_twice(model, mode, options, tape=None, **call):
    """The first run, step by step, and two replays with other conditioning in between."""
    sampler = make(model, graph=mode, **options)
    results = [sampler(**call) for _ in range(2)]
    if mode != "off":
        assert len(sampler.graphs) == 1
        (static,) = sampler.graphs._entries.values()
        assert all(graph._replay.__func__.__name__ == "replay" for graph in static._graphs.values())
        tape.check_reads(static, model)
    return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_a_captured_run_is_the_eager_one(tape, model, mode, guidance):
    limits = itertools.cycle(LIMITS)
    for eta, rest in itertools.product((0.0, 1.0), REST):
        limit = next(limits)
        options = {"steps": 4, "limit": limit, "eta": eta, **GUIDANCE[guidance], **rest}
        call = {"start": 3, "seeds": 5, **conditioned(options)}
        own = Denoiser() if "channels_last" in rest else model
        tape.graphs.clear()
        (_, got), (expected, _) = (
            sample_twice(own, mode, options, tape, **call),
            sample_twice(own, "off", options, **call),
        )
        dtype = torch.float32 if options.get("dtype") == torch.float64 else options.get("dtype", torch.float32)
        close(got, expected.to(got.dtype), dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype(tape, mode, dtype):
    model = Denoiser().to(dtype)
    options = {"dtype": dtype, "guidance_scale": 2.0, "eta": 0.5}
    call = {"start": 2, "seeds": 5, **conditioned(options, 2)}
    (_, got), (expected, _) = (
        sample_twice(model, mode, options, tape, **call),
        sample_twice(model, "off", options, **call),
    )
    close(got, expected, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_starts_seeds_and_conditioning_change_between_replays(tape, model, mode):
    sampler, eager = (make(model, graph=graph, guidance_scale=2.0, eta=1.0) for graph in (mode, "off"))
    for seed in range(4):
        start = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed))
        call = {**labels(2), "class_labels": torch.tensor([seed, 9 - seed])}
        close(sampler(start, seeds=seed, **call), eager(start, seeds=seed, **call))
    assert len(sampler.graphs) == 1


def test_steps_eta_scale_and_limits_change_between_replays(tape, model):
    sampler = make(model, limit=Clip(1.0), graph="step", guidance_scale=2.0)
    sampler.warmup(2, **labels(2))
    for change in (
        {"num_inference_steps": 17}, {"eta": 1.0}, {"guidance_scale": 5.5}, {"limit": Clip(0.4)},
        {"timesteps": [900, 400, 30]}, {"scheduler": DDIMConfig(timestep_spacing="trailing")},
    ):  # fmt: skip
        changed = sampler.replace(**change)
        close(changed(2, seeds=3, **labels(2)), changed.replace(graph="off")(2, seeds=3, **labels(2)))
    assert len(tape.graphs) == 2


def test_what_observers_see_is_what_the_eager_loop_shows(tape, model):
    seen = {}
    for graph in ("step", "off"):
        sampler = make(model, graph=graph, guidance_scale=2.0, guidance_interval=(0.2, 0.6), eta=0.5)
        for _ in range(2):
            into = seen[graph] = []
            final, states = sampler(
                2, seeds=1, return_trajectory=True, **labels(2),
                callback=lambda k, t, x, x0, into=into: into.append((torch.tensor([k, t]), x.clone(), x0.clone())),
            )  # fmt: skip
        into.append((final, states))
    for got, expected in zip(seen["step"], seen["off"], strict=True):
        close(got, expected)


def test_inversion_and_interpolation_are_captured_too(tape, model):
    captured, eager = (make(model, graph=graph, limit=None) for graph in ("step", "off"))
    x0 = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    for _ in range(2):
        close(captured.invert(x0), eager.invert(x0))
        close(captured.interpolate(1, 2, 3), eager.interpolate(1, 2, 3))
    assert len(captured.graphs) == 2


@pytest.mark.parametrize("graph", ["step", "loop"])
@pytest.mark.parametrize("name", pipelines.MAKERS)
def test_each_accelerated_pipeline_is_captured(tape, name, graph, caplog):
    for options in ({}, {"eta": 0.7}, {"guidance_scale": 1.0}):
        pipe, call = pipelines.make(name)
        if name == "ddim" and "guidance_scale" in options:
            continue
        if name == "dit" and "eta" in options:
            continue
        call = {**call, **options}
        expected, _ = pipelines.run(pipe, call)
        accelerate(pipe, graph=graph)
        tape.graphs.clear()
        for _ in range(3):
            images, _ = pipelines.run(pipe, call)
        torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
        (static,) = pipe._acceleration._loop.graphs._entries.values()
        tape.check_reads(static, pipelines.denoiser(pipe))
        unaccelerate(pipe)
    assert not pipelines.log_lines(caplog)
