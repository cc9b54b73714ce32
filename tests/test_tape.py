"""Captured runs on an emulated device: every option against the eager loop, and what a capture must not do."""

import gc
import warnings
import weakref

import pytest
import torch
from torch.utils import _pytree as pytree

import test_accelerate as pipelines
from fastddim import Clip, DDIMConfig, DynamicThreshold, Sampler, accelerate, loop, unaccelerate
from fastddim.bench import gpu as bench_gpu
from fastddim.cuda_graph import CaptureError, Graph
from pairwise import pairwise
from tape import REFUSED, Tape, TapedMachine
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


RUNS = pairwise(MODES, GUIDANCE, (0.0, 1.0), LIMITS, REST)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_a_captured_run_is_the_eager_one(tape, model, mode, guidance):
    for *_, eta, limit, rest in (run for run in RUNS if run[:2] == (mode, guidance)):
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


@pytest.mark.parametrize("name", pipelines.MAKERS)
def test_each_accelerated_pipeline_is_captured(tape, name, caplog):
    for options in ({}, {"eta": 0.7}, {"guidance_scale": 1.0}):
        pipe, call = pipelines.make(name)
        if name == "ddim" and "guidance_scale" in options:
            continue
        if name == "dit" and "eta" in options:
            continue
        call = {**call, **options}
        expected, _ = pipelines.run(pipe, call)
        accelerate(pipe, graph="step")
        tape.graphs.clear()
        for _ in range(3):
            images, _ = pipelines.run(pipe, call)
        torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
        (static,) = pipe._acceleration.captures.graphs._entries.values()
        tape.check_reads(static, pipelines.denoiser(pipe))
        unaccelerate(pipe)
    assert not pipelines.log_lines(caplog)


# What a capture must not do.


@pytest.fixture
def without_collector():
    gc.disable()
    yield
    gc.enable()


def runs(sampler, count=1, batch=2, **call):
    """Results of equal runs."""
    return [sampler(batch, seeds=0, **call) for _ in range(count)]


def test_what_is_dropped_is_free_at_once(tape, model, without_collector):
    sampler = make(model, graph="step", max_graphs=1)
    sampler.warmup(1)
    refs = [weakref.ref(static) for static in sampler.graphs._entries.values()]
    refs += [weakref.ref(graph) for graph in tape.graphs]
    tape.graphs.clear()
    sampler.warmup(2)
    assert [ref() for ref in refs] == [None] * 3
    refs = [weakref.ref(static) for static in sampler.graphs._entries.values()]
    sampler.graphs.clear()
    assert refs[0]() is None


def test_an_unaccelerated_pipeline_holds_no_captures(tape, without_collector):
    pipe, call = pipelines.make("ours")
    accelerate(pipe, graph="step")
    for _ in range(2):
        pipelines.run(pipe, call)
    static = weakref.ref(next(iter(pipe._acceleration.captures.graphs._entries.values())))
    unaccelerate(pipe)
    assert static() is None


class Failing(Denoiser):
    """Fails in captures alone, as other threads' doings make it; `failures` of them."""

    def __init__(self, tape, failures, error=lambda: RuntimeError("another thread has synchronized")):
        super().__init__()
        self.tape, self.failures, self.error = tape, failures, error

    def forward(self, x, t, **kwargs):
        if self.tape.recording and self.failures:
            self.failures.pop()
            raise self.error()
        return super().forward(x, t, **kwargs)


@pytest.fixture
def torch_2_13(monkeypatch):
    """Its failed captures need no other capture behind them, which would be counted."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0"))


@pytest.mark.usefixtures("torch_2_13")
def test_a_capture_that_failed_is_tried_again_in_another_pool(tape):
    sampler = make(Failing(tape, [1, 2]), graph="loop")
    expected = make(Denoiser(), graph="off")(2, seeds=0)
    default = tape.current_stream()
    with pytest.warns(RuntimeWarning, match=r"another thread has synchronized.*\(to be tried again\)") as caught:
        results = runs(sampler, 5)
    assert len(caught) == 1
    for result in results:
        close(result, expected)
    assert len(tape.captures) == 3 == len({pool for pool, _ in tape.captures}) == len({id(s) for _, s in tape.captures})
    # torch leaves the stream of a failed capture current, and its pool in use.
    assert tape.current_stream() is default and not tape.recording
    assert tape.log.count("release pool") == 2 and len(sampler.graphs) == 1


@pytest.mark.usefixtures("torch_2_13")
def test_three_failures_are_the_last(tape):
    sampler = make(Failing(tape, [1] * 10), graph="loop")
    with pytest.warns(RuntimeWarning) as caught:
        runs(sampler, 7)
    assert len(tape.captures) == 3
    assert ["tried again" in str(each.message) for each in caught] == [True, False]


@pytest.mark.parametrize(("version", "captures"), [("2.11.0+cu130", 3), ("2.12.1", 3), ("2.13.0", 2)])
def test_before_torch_2_13_a_failed_capture_is_followed_by_one_that_ends_it(tape, monkeypatch, version, captures):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    sampler = make(Failing(tape, [1]), graph="loop")
    with pytest.warns(RuntimeWarning, match="another thread"):
        runs(sampler, 2)
    assert not tape.generator_captures
    runs(sampler)
    assert len(tape.captures) == captures and len(sampler.graphs) == 1


def test_without_memory_the_half_built_capture_is_free_before_the_run_goes_on(tape, monkeypatch, without_collector):
    model = Failing(tape, [], lambda: torch.cuda.OutOfMemoryError("2 GiB"))
    sampler = make(model, graph="step")
    sampler.warmup(1)
    runs(sampler)
    model.failures = [1]
    built, alive = [], []
    own_load = loop.StaticLoop.load

    def load(self, run):
        built.append(weakref.ref(self))
        own_load(self, run)

    monkeypatch.setattr(loop.StaticLoop, "load", load)
    monkeypatch.setattr(loop.EagerLoop, "__init__", lambda *args: alive.extend(ref() for ref in built))
    monkeypatch.setattr(loop.EagerLoop, "__call__", lambda *args: torch.zeros(2, *SHAPE))
    with pytest.warns(RuntimeWarning, match="2 GiB"):
        runs(sampler)
    assert built and alive == [None] * len(built) and len(sampler.graphs) == 0


class Reading(Denoiser):
    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x, t, **kwargs):
        return super().forward(x, t, **kwargs) + self.read(x)


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda x: 0 * x.sum().item(), "waits for the device"),
        (lambda x: 0 * len(x[x > 0]), "waits for the device"),
        (lambda x: 0 * x.clone().index_put_((x == x,), torch.ones(x.numel())), "waits for the device"),
        (lambda x: 0 * len(torch.unique(x)), "waits for the device"),
        (lambda x: 0 * torch.equal(x, x), "waits for the device"),
    ],
)
def test_a_model_that_reads_on_the_host_never_reaches_a_capture(tape, read, reason):
    sampler = make(Reading(read), graph="step")
    line = read.__code__.co_firstlineno
    with pytest.warns(RuntimeWarning, match=rf"test_tape\.py:{line} {reason}") as caught:
        results = runs(sampler, 4)
    # One capture, that of the start.
    assert len(caught) == 1 and len(tape.captures) == 1 and not tape.generator_captures
    close(results[-1], make(Denoiser(), graph="off")(2, seeds=0))


def test_one_value_at_a_mask_and_numbers_from_the_host_are_no_reads(tape):
    def masked(x):
        kept = x.clone()
        kept[kept > 0] = 0.5
        return torch.tensor(0.25) * kept * int(torch.tensor(1.0))

    sampler, eager = (make(Reading(masked), graph=graph) for graph in ("step", "off"))
    close(runs(sampler, 3)[2], runs(eager)[0])
    assert len(sampler.graphs) == 1


def test_the_captures_of_a_cache_share_a_stream_and_a_pool_until_it_is_cleared(tape, model):
    sampler = make(model, graph="step", guidance_scale=2.0, guidance_interval=(0.3, 0.7))
    for batch in (1, 2, 3):
        sampler.warmup(batch, **labels(batch))
    assert len(tape.captures) == 9 and len(set(tape.captures)) == 1
    sampler.graphs.clear()
    sampler.warmup(1, **labels(1))
    (pool, stream), (other_pool, other_stream) = tape.captures[0], tape.captures[-1]
    assert pool != other_pool and stream is not other_stream
    other = make(model, graph="step")
    other.warmup(1)
    assert tape.captures[-1][0] != other_pool and tape.captures[-1][1] is not other_stream


def test_workspaces_are_cleared_around_every_capture(tape, model):
    make(model, graph="step").warmup(2)
    assert tape.log == ["clear workspaces", "capture", "clear workspaces"] * 2


@pytest.mark.usefixtures("torch_2_13")
def test_a_failed_capture_leaves_no_workspace_in_its_pool(tape):
    with pytest.warns(RuntimeWarning):
        make(Failing(tape, [1]), graph="loop").warmup(2)
    assert tape.log[:2] == ["clear workspaces", "capture"] and "clear workspaces" in tape.log[2:4]


def test_the_reason_is_the_models_own_error_and_not_what_was_handled_before(tape):
    def body():
        if tape.recording:
            try:
                raise torch.cuda.OutOfMemoryError("no 2 GiB left\nand more lines")
            except torch.cuda.OutOfMemoryError as error:
                raise ValueError("the model's own") from error

    try:
        raise LookupError("handled by the caller")
    except LookupError:
        with pytest.raises(CaptureError) as raised:
            Graph(body, CPU)
    assert str(raised.value) == (
        "OutOfMemoryError: no 2 GiB left; then ValueError: the model's own; then RuntimeError: operation failed due to a"
        " previous error during capture"
    )
    assert isinstance(raised.value.__cause__, torch.cuda.OutOfMemoryError) and not raised.value.permanent


def test_the_bytes_of_a_capture_are_not_those_that_its_start_releases(tape):
    def body():
        if not tape.recording:
            tape.cached += 1 << 20

    assert Graph(body, CPU).nbytes == 64


def test_the_first_run_of_a_kind_is_not_captured(tape, model):
    sampler = make(model, graph="step", guidance_scale=2.0)
    for batch in (1, 2, 3):
        sampler(batch, seeds=0, **labels(batch))
    assert not tape.captures and len(sampler.graphs) == 0
    sampler(2, seeds=0, **labels(2))
    assert len(sampler.graphs) == 1
    captures = len(tape.captures)
    sampler.replace(num_inference_steps=9, eta=1.0)(2, seeds=4, **labels(2))
    assert len(tape.captures) == captures


@pytest.mark.parametrize("start", [2, torch.zeros(2, *SHAPE)], ids=["drawn", "given"])
def test_a_warm_up_captures_at_once_what_calls_need(tape, model, start, monkeypatch):
    monkeypatch.delattr(loop.EagerLoop, "__call__")
    sampler = make(model, graph="step")
    warmup = sampler.warmup(start)
    captures = len(tape.captures)
    assert len(sampler.graphs) == 1 and warmup.graph_bytes == sampler.graphs.nbytes > 64
    sampler(start, **({"seeds": 3} if isinstance(start, int) else {}))
    assert len(tape.captures) == captures


# Python, which a replay does not run.


class Counting(Denoiser):
    """Counts its calls in one way or another, and its output depends on the number."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.count = 0
        self.processor = Processor()
        self.register_buffer("calls_so_far", torch.zeros(()))
        self.last = torch.zeros(())

    def forward(self, x, t, **kwargs):
        return super().forward(x, t, **kwargs) + 0.1 * self.how(self)


class Processor:
    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return self.count


def by_attribute(model):
    model.count += 1
    return model.count


def by_processor(model):
    return model.processor()


def by_rebound_buffer(model):
    model.calls_so_far = model.calls_so_far + 1
    return model.calls_so_far


def by_tensor_attribute(model):
    model.last = model.last + 1
    return model.last


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (by_attribute, "the model changes its 'count' whenever it is called"),
        (by_processor, "the model changes its 'processor.count' whenever it is called"),
        (by_rebound_buffer, "memory that is freed after the call"),
        (by_tensor_attribute, "memory that is freed after the call"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_keeps_count_runs_step_by_step_as_the_eager_loop_does(tape, mode, how, reason):
    captured, eager = Counting(how), Counting(how)
    sampler, reference = make(captured, graph=mode), make(eager, graph="off")
    runs(sampler), runs(reference)
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        runs(sampler)
    assert len(caught) == 1
    with torch.no_grad():
        for count in (captured, eager):
            count.count = count.processor.count = 0
            count.calls_so_far, count.last = torch.zeros(()), torch.zeros(())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(runs(sampler, 3)[2], runs(reference, 3)[2])
    assert len(sampler.graphs) == 0


class Noting(Denoiser):
    """Leaves things on itself that it does not read again, or makes them once."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.scale = torch.ones(())
        self.table = None

    def forward(self, x, t, **kwargs):
        if self.table is None:
            self.table = torch.linspace(0, 1, 8)
        self.scale = self.conv.weight.mean()
        self.seen = x.mean()[None]
        self.rate = 0.25
        return super().forward(x, t, **kwargs) * self.scale + self.table * self.rate


@pytest.mark.parametrize("mode", MODES)
def test_what_a_model_only_leaves_behind_is_captured_once(tape, mode):
    noting = Noting()
    sampler = make(noting, graph=mode)
    got = runs(sampler, 4)[3]
    captures = len(tape.captures)
    close(got, make(noting, graph="off")(2, seeds=0))
    runs(sampler, 2)
    assert len(sampler.graphs) == 1 and len(tape.captures) == captures
    with torch.no_grad():
        noting.conv.weight.mul_(2)
    close(runs(sampler)[0], make(noting, graph="off")(2, seeds=0))
    assert len(tape.captures) == captures


def test_what_a_model_makes_in_its_first_call_is_no_change_in_each(tape):
    sampler = make(Noting(), graph="step")
    sampler.warmup(2)
    assert len(sampler.graphs) == 1


def changes_of(model, change):
    """A run after each change, against the eager loop."""
    sampler, eager = (Sampler(model, DDIMConfig(), 3, sample_shape=SHAPE, graph=graph) for graph in ("step", "off"))
    runs(sampler, 2)
    for k in range(3):
        change(k)
        close(runs(sampler)[0], runs(eager)[0])


def test_what_a_function_closes_over_is_noticed(tape):
    network, condition, scale = Denoiser(), torch.ones(2, *SHAPE), 0.5

    def model(x, t):
        return network(x, t) * scale + condition

    def change(k):
        nonlocal condition, scale
        if k == 0:
            condition = torch.full((2, *SHAPE), 0.3)
        elif k == 1:
            scale = 0.7
        else:
            network.conv.weight = torch.nn.Parameter(network.conv.weight * 0.5)

    changes_of(model, change)


def test_attributes_hooks_and_processors_are_noticed(tape):
    model = Counting(lambda model: model.count + model.processor.count)

    def change(k):
        if k == 0:
            model.count = 3
        elif k == 1:
            model.processor.count = 2
        else:
            model.conv.register_forward_hook(lambda module, given, output: output * 0.5)

    changes_of(model, change)


def test_a_model_that_changes_between_all_runs_is_named_once(tape, caplog):
    model = Counting(lambda model: model.count)
    sampler = make(model, graph="step")
    for k in range(9):
        model.count = k
        runs(sampler)
    lines = [record.getMessage() for record in caplog.records if record.name == "fastddim"]
    assert lines == ["the model is captured again and again, as its 'count' changes between runs"]


# Models compiled to capture CUDA graphs of their own.


def reduce_overhead(model):
    return torch.compile(model, mode="reduce-overhead")


def compiled_in_part(model):
    model.conv.compile(mode="reduce-overhead")
    return model


def within_a_function(model):
    compiled = reduce_overhead(model)
    return lambda x, t: compiled(x, t)


@pytest.mark.parametrize("how", [reduce_overhead, compiled_in_part, within_a_function])
def test_a_model_with_graphs_of_its_own_is_refused_in_a_graph(tape, how):
    model = how(Denoiser())
    with pytest.raises(ValueError, match=r"model: compiled to capture CUDA graphs of its own.*graph='off'"):
        Sampler(model, DDIMConfig(), 3, sample_shape=SHAPE, graph="step")
    Sampler(model, DDIMConfig(), 3, sample_shape=SHAPE, graph="off")
    Sampler(torch.compile(Denoiser()), DDIMConfig(), 3, sample_shape=SHAPE, graph="step")


def test_one_that_is_compiled_so_later_is_called_step_by_step(tape, monkeypatch):
    model = Denoiser()
    sampler = make(model, graph="step")
    runs(sampler)
    # What is compiled needs no compiler to be called here.
    model.compile(mode="reduce-overhead")
    monkeypatch.setattr(torch.nn.Module, "__call__", torch.nn.Module._call_impl)
    with pytest.warns(RuntimeWarning, match="the model is compiled to capture CUDA graphs of its own"):
        close(runs(sampler)[0], make(Denoiser(), graph="off")(2, seeds=0))
    assert not tape.captures


def test_an_accelerated_pipeline_with_such_a_denoiser_captures_nothing(caplog):
    pipe, call = pipelines.make("ddim")
    expected, _ = pipelines.run(pipe, call)
    mid_block = pipe.unet.mid_block
    pipe.unet.mid_block.compile(mode="reduce-overhead")
    compiled, mid_block._compiled_call_impl = mid_block._compiled_call_impl, None
    mid_block._compiled_call_impl = Disguise(mid_block._call_impl, compiled.get_compiler_config)
    try:
        accelerate(pipe, graph="step")
        images, _ = pipelines.run(pipe, call)
    finally:
        mid_block._compiled_call_impl = None
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
    assert any(
        "compiled to capture CUDA graphs of its own; pass graph='off'" in line for line in pipelines.log_lines(caplog)
    )


class Disguise:
    """What torch has compiled, without the compiler's work."""

    def __init__(self, call, get_compiler_config):
        self.call, self.get_compiler_config = call, get_compiler_config

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


class OneOutput(Denoiser):
    """Writes each output over the last one, as a model with CUDA graphs of its own does."""

    def forward(self, x, t, **kwargs):
        output = super().forward(x, t, **kwargs)
        if not hasattr(self, "output"):
            self.output = torch.empty_like(output)
        return self.output.copy_(output)


@pytest.mark.parametrize("channels_last", [False, True])
def test_two_calls_do_not_need_an_output_each(channels_last):
    options = {"guidance_scale": 3.0, "channels_last": channels_last, "graph": "off"}
    expected = make(Denoiser(), **options)(2, seeds=0, **labels(2))
    close(make(OneOutput(), batched_guidance=False, **options)(2, seeds=0, **labels(2)), expected)


def test_a_benchs_capture_holds_what_it_reads(tape):
    def make():
        x = torch.ones(3)
        return bench_gpu.capture(lambda: x * 2)

    assert make()().tolist() == [2, 2, 2]


# The fused step, on the machine in tests/ptx.


@pytest.fixture
def taped_machine(tape):
    device = TapedMachine(tape, 90, seed=0)
    with device.installed():
        yield device


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guidance", ["none", "interval"])
def test_a_captured_fused_step_is_the_eager_loops(tape, taped_machine, model, mode, guidance):
    options = {"steps": 4, "eta": 1.0, "limit": Clip(0.8), "backend": "triton", **GUIDANCE[guidance]}
    sampler, eager = make(model, graph=mode, **options), make(model, graph="off", **options)
    call = conditioned(options, 2)
    sampler(2, seeds=0, **call)
    for seed in (3, 9):
        launches = taped_machine.launches
        got = sampler(2, seeds=seed, **call)
        # A replay launches the start's kernel and one for each step.
        if seed == 9:
            assert taped_machine.launches - launches == 5
        assert torch.equal(got, eager(2, seeds=seed, **call))
    assert len(sampler.graphs) == 1
    reference = make(model, graph="off", **{**options, "backend": "reference"})
    close(got, reference(2, seeds=9, **call))
