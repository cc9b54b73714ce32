"""The loop over static buffers against the eager one; without a GPU it is the same code but for the capture."""

import gc
import math
import os
import random
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastddim import Clip, DDIMConfig, Sampler, loop
from fastddim.cuda_graph import CaptureError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (3, 8, 8)
MODES = ("step", "loop")


class Denoiser(torch.nn.Module):
    """Small, class-conditional, with nested conditioning as SDXL's."""

    def __init__(self, channels=3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.embedding = torch.nn.Embedding(11, channels)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        self.calls = []

    def forward(self, x, t, class_labels=None, added=None):
        self.calls.append(x.shape[0])
        shift = torch.cos(t.to(x.dtype) / 200)[:, None]
        if class_labels is not None:
            shift = shift + self.embedding(class_labels)
        if added is not None:
            shift = shift + added["text"]["embeds"].mean(1, keepdim=True)
        return torch.tanh(self.conv(x)) + shift[:, :, None, None]


@pytest.fixture
def model():
    return Denoiser().to(DEVICE)


def make(model, steps=6, config=None, **options):
    return Sampler(model, config or DDIMConfig(), steps, **{"sample_shape": SHAPE, **options})


def labels(batch):
    label = torch.arange(batch, device=DEVICE)
    return {"class_labels": label, "uncond_kwargs": {"class_labels": torch.full_like(label, 10)}}


OPTIONS = {
    "plain": {},
    "eta": {"eta": 1.0},
    "guided": {"guidance_scale": 3.0},
    "rescaled": {"guidance_scale": 3.0, "guidance_rescale": 0.7},
    "two calls": {"guidance_scale": 3.0, "batched_guidance": False},
    "interval": {"guidance_scale": 3.0, "guidance_interval": (0.3, 0.7)},
    "half state": {"guidance_scale": 2.0, "dtype": torch.bfloat16},
    "channels last": {"channels_last": True, "guidance_scale": 2.0},
    "threshold": {"config": DDIMConfig(thresholding=True, sample_max_value=1.5)},
    "strength": {"strength": 0.5, "eta": 0.5},
    "one step": {"steps": 1},
    "no limit": {"config": DDIMConfig(clip_sample=False, prediction_type="v_prediction")},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_graph_gives_what_the_eager_loop_gives(model, mode, name):
    options = OPTIONS[name]
    kwargs = labels(3) if "guidance_scale" in options else {}
    eager = make(model, graph="off", **options)(3, seeds=5, **kwargs)
    sampler = make(model, graph=mode, **options)
    for _ in range(2):
        again = sampler(3, seeds=5, **kwargs)
        if DEVICE == "cuda":
            assert torch.equal(again, eager)
        else:
            tolerance = 0.02 if options.get("dtype") == torch.bfloat16 else 2e-6
            torch.testing.assert_close(again, eager, rtol=tolerance, atol=tolerance)
    assert len(sampler.graphs) == 1 and sampler.graphs.nbytes > 0
    assert torch.equal(sampler(3, seeds=5, **kwargs), again)
    assert not torch.equal(sampler(3, seeds=50, **kwargs), again)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["eta", "interval", "rescaled", "threshold", "half state"])
def test_with_the_fused_step_a_graph_gives_the_eager_loops_bits(model, mode, name):
    options = {**OPTIONS[name], "backend": "triton"}
    kwargs = labels(2) if "guidance_scale" in options else {}
    eager = make(model, 4, graph="off", **options)(2, seeds=5, **kwargs)
    assert torch.equal(make(model, 4, graph=mode, **options)(2, seeds=5, **kwargs), eager)


def test_the_model_is_called_with_the_conditional_half_alone_outside_the_interval(model):
    sampler = make(model, 10, graph="off", guidance_scale=2.0, guidance_interval=(0.2, 0.6))
    result = sampler(2, seeds=0, **labels(2))
    assert model.calls == [2, 2, 4, 4, 4, 4, 2, 2, 2, 2]
    # A scale of 1 is the conditional half, at twice the work.
    always = make(model, 10, graph="off", guidance_scale=1.0, guidance_interval=(0.2, 0.6))
    plain = make(model, 10, graph="off")
    torch.testing.assert_close(
        always(2, seeds=0, **labels(2)), plain(2, seeds=0, class_labels=labels(2)["class_labels"])
    )
    assert not torch.equal(result, plain(2, seeds=0, class_labels=labels(2)["class_labels"]))


def test_steps_eta_spacing_scale_thresholds_and_seeds_change_without_another_capture(model):
    config = DDIMConfig(thresholding=True, sample_max_value=1.5)
    first = make(model, 6, config, graph="step", guidance_scale=2.0)
    first(2, seeds=0, **labels(2))
    changes = [
        {"num_inference_steps": 17},
        {"eta": 1.0},
        {"eta": [0.5] * 6},
        {"guidance_scale": 5.5},
        {"timesteps": [900, 400, 30]},
        {"scheduler": DDIMConfig(thresholding=True, sample_max_value=3.7, dynamic_thresholding_ratio=0.8)},
        {"scheduler": DDIMConfig(thresholding=True, sample_max_value=1.5, timestep_spacing="trailing")},
        {"strength": 0.5},
    ]
    for change in changes:
        changed = first.replace(**change)
        expected = changed.replace(graph="off")(2, seeds=3, **labels(2))
        torch.testing.assert_close(changed(2, seeds=3, **labels(2)), expected, rtol=2e-6, atol=2e-6)
    assert len(first.graphs) == 1
    # More rows than the captured table has room for are another capture.
    many = first.replace(num_inference_steps=100)
    expected = many.replace(graph="off")(2, seeds=3, **labels(2))
    for _ in range(2):
        torch.testing.assert_close(many(2, seeds=3, **labels(2)), expected, rtol=2e-6, atol=2e-6)
    assert len(first.graphs) == 2


def test_a_replaced_sampler_is_the_one_built_anew(model):
    first = make(model, 6, graph="step", channels_last=True)
    changed = first.replace(timesteps=[800, 300])
    assert changed.table.timesteps == (800, 300) and changed.channels_last
    assert changed.replace(num_inference_steps=4).table.timesteps == make(model, 4).table.timesteps
    assert changed.graphs is first.graphs
    assert first.replace(graph="loop").graphs is not first.graphs
    with pytest.raises(TypeError, match="stepps"):
        first.replace(stepps=3)
    with pytest.raises(ValueError, match="eta"):
        first.replace(eta=2.0)


@pytest.mark.parametrize("mode", MODES)
def test_a_capture_made_in_inference_mode_serves_runs_outside_it(model, mode):
    sampler = make(model, graph=mode, guidance_scale=2.0)
    with torch.inference_mode():
        sampler(torch.ones(2, *SHAPE), **labels(2))
        first = sampler(torch.ones(2, *SHAPE), **labels(2))
    assert torch.equal(sampler(torch.ones(2, *SHAPE), **labels(2)), first)
    assert not first.requires_grad and len(sampler.graphs) == 1


@pytest.mark.parametrize("mode", MODES)
def test_results_are_the_callers_own(model, mode):
    sampler = make(model, graph=mode)
    first = sampler(2, seeds=0)
    kept = first.clone()
    sampler(2, seeds=9)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("mode", MODES)
def test_new_conditioning_and_starts_reach_the_captured_run(model, mode):
    sampler, eager = make(model, graph=mode), make(model, graph="off")
    for seed in range(3):
        embeds = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        added = {"text": {"embeds": embeds}}
        start = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(7 + seed))
        torch.testing.assert_close(sampler(start, added=added), eager(start, added=added), rtol=2e-6, atol=2e-6)
    assert len(sampler.graphs) == 1


def test_nested_conditioning_is_stacked_for_guidance(model):
    cond, null = torch.ones(2, 5, device=DEVICE), torch.zeros(2, 5, device=DEVICE)
    sampler = make(model, guidance_scale=3.0)
    guided = sampler(2, seeds=0, added={"text": {"embeds": cond}}, uncond_kwargs={"added": {"text": {"embeds": null}}})
    unguided = make(model)(2, seeds=0, added={"text": {"embeds": cond}})
    assert not torch.allclose(guided, unguided)
    with pytest.raises(ValueError, match="uncond_kwargs: 'added' is not built like"):
        sampler(2, seeds=0, added={"text": {"embeds": cond}}, uncond_kwargs={"added": {"embeds": null}})


class _Syncs(TorchDispatchMode):
    """Counts reads of a device value on the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_nothing_is_read_on_the_host_between_start_and_result(model, mode, eta):
    sampler = make(model, graph=mode, eta=eta, guidance_scale=2.0, config=DDIMConfig(clip_sample=False))
    arguments = labels(2)
    sampler.warmup(2, **arguments)
    with _Syncs() as syncs:
        sampler(2, seeds=1, **arguments)
    assert syncs.count == 0
    with _Syncs() as syncs:
        torch.ones(1, device=DEVICE).item()
    assert syncs.count == 1


def test_every_step_is_one_model_call(model):
    sampler = make(model, 9, graph="step")
    sampler.warmup(2)
    model.calls.clear()
    if DEVICE == "cpu":
        sampler(2, seeds=0)
        assert model.calls == [2] * 9


def test_observers_see_every_step_and_can_stop_the_run(model):
    sampler, eager = make(model, graph="step"), make(model, graph="off")
    seen = {}
    for name, which in (("step", sampler), ("off", eager)):
        seen[name] = []
        which(
            2,
            seeds=0,
            callback=lambda k, t, x, x0, into=seen[name]: into.append((k, t, x.clone(), x0.clone())),
        )
    for mine, theirs in zip(seen["step"], seen["off"], strict=True):
        assert mine[:2] == theirs[:2]
        torch.testing.assert_close(mine[2:], theirs[2:], rtol=2e-5, atol=2e-5)
    final, trajectory = sampler(2, seeds=0, return_trajectory=True)
    expected_final, expected = eager(2, seeds=0, return_trajectory=True)
    torch.testing.assert_close((final, trajectory), (expected_final, expected), rtol=2e-6, atol=2e-6)

    def stop(k, t, x, x0):
        if k == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler(2, seeds=0, callback=stop)
    torch.testing.assert_close(sampler(2, seeds=0), final)


def test_a_run_within_a_callback_does_not_touch_the_outer_one(model):
    sampler = make(model, graph="step")
    sampler.warmup(2)
    expected, inner_expected = sampler(2, seeds=0), sampler(2, seeds=1)
    inner = []
    outer = sampler(2, seeds=0, callback=lambda *_: inner.append(sampler(2, seeds=1)))
    assert torch.equal(outer, expected)
    for result in inner:
        torch.testing.assert_close(result, inner_expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "observer",
    [{"callback": lambda *_: None}, {"progress": True}, {"return_trajectory": True}],
    ids=lambda observer: next(iter(observer)),
)
def test_one_graph_has_no_place_between_its_steps(model, observer):
    (name,) = observer
    with pytest.raises(ValueError, match=f"{name}: given with graph='loop'"):
        make(model, graph="loop")(2, seeds=0, **observer)


@pytest.mark.parametrize("mode", MODES)
def test_batches_are_padded_to_buckets(model, mode):
    sampler = make(model, graph=mode, eta=0.5, guidance_scale=2.0, batch_buckets=(8, 3))
    eager = make(model, graph="off", eta=0.5, guidance_scale=2.0)
    for batch in (1, 2, 3, 5, 8):
        result = sampler(batch, seeds=4, **labels(batch))
        assert result.shape[0] == batch
        torch.testing.assert_close(result, eager(batch, seeds=4, **labels(batch)), rtol=2e-6, atol=2e-6)
    assert len(sampler.graphs) == 2
    with pytest.raises(ValueError, match="start: a batch of 9; the largest of batch_buckets is 8"):
        sampler(9, seeds=0, **labels(9))


def test_a_model_that_cannot_be_captured_is_called_step_by_step_with_one_warning(model, monkeypatch):
    def fail(*args):
        raise CaptureError("RuntimeError: operation not permitted when stream is capturing", permanent=True)

    monkeypatch.setattr(loop, "Graph", fail)
    sampler = make(model, graph="loop")
    expected = make(model, graph="off")(2, seeds=0)
    sampler(2, seeds=0)
    with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing") as caught:
        first = sampler(2, seeds=0)
    assert len(caught) == 1 and "(2, 3, 8, 8)" in str(caught[0].message) and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = sampler(2, seeds=0)
    assert torch.equal(first, expected) and torch.equal(second, expected)
    assert len(sampler.graphs) == 0


def test_without_memory_for_a_capture_the_others_are_dropped_and_the_run_is_eager(model, monkeypatch):
    sampler = make(model, graph="step")
    sampler.warmup(1)
    assert len(sampler.graphs) == 1
    sampler(2, seeds=0)

    def fail(*args):
        raise CaptureError("OutOfMemoryError: tried to allocate 2 GiB") from torch.cuda.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(loop, "Graph", fail)
    with pytest.warns(RuntimeWarning, match="2 GiB"):
        result = sampler(2, seeds=0)
    torch.testing.assert_close(result, make(model, graph="off")(2, seeds=0))
    assert len(sampler.graphs) == 0


def test_an_argument_without_a_hash_is_named_and_the_run_is_eager():
    def with_set(x, t, options=None):
        return x * 0.1

    with pytest.warns(RuntimeWarning, match="cannot be told from others"):
        Sampler(with_set, DDIMConfig(), 3, sample_shape=SHAPE, graph="step")(1, seeds=0, options={1, 2})


def test_replaced_weights_are_captured_again_and_weights_changed_in_place_are_not(model):
    sampler = make(model, graph="step")
    sampler.warmup(2)
    before = sampler(2, seeds=0)
    key = sampler.graphs.keys()[0]
    static = sampler.graphs._entries[key]
    with torch.no_grad():
        model.conv.weight.mul_(0.5)
    in_place = sampler(2, seeds=0)
    assert sampler.graphs._entries[key] is static
    assert not torch.equal(in_place, before)
    model.conv.weight = torch.nn.Parameter(2 * model.conv.weight.detach())
    torch.testing.assert_close(sampler(2, seeds=0), before)
    assert sampler.graphs._entries[key] is not static


def test_threads_get_their_own_results(model):
    sampler = make(model, graph="step", eta=1.0, guidance_scale=2.0)
    batches = [1, 2, 3]
    for batch in batches:
        sampler.warmup(batch, **labels(batch))
    expected = {(batch, seed): sampler(batch, seeds=seed, **labels(batch)) for batch in batches for seed in range(4)}
    jobs = list(expected) * 3
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda job: sampler(job[0], seeds=job[1], **labels(job[0])), jobs))
    for job, result in zip(jobs, results, strict=True):
        assert torch.equal(result, expected[job])


def random_runs(model, count, seed=0):
    """Runs of random shapes and options through one small cache: results right, cache within its limit."""
    chooser = random.Random(seed)
    for mode in MODES:
        samplers = {
            size: Sampler(model, DDIMConfig(), 3, sample_shape=(3, size, size), graph=mode, max_graphs=3)
            for size in (4, 6)
        }
        eager = {size: sampler.replace(graph="off") for size, sampler in samplers.items()}
        for _ in range(count):
            size, batch, seed = chooser.choice((4, 6)), chooser.randint(1, 5), chooser.randint(0, 99)
            changes = {"num_inference_steps": chooser.randint(1, 5), "eta": chooser.choice((0.0, 1.0))}
            result = samplers[size].replace(**changes)(batch, seeds=seed)
            expected = eager[size].replace(**changes)(batch, seeds=seed)
            torch.testing.assert_close(result, expected, rtol=2e-6, atol=2e-6)
            assert len(samplers[size].graphs) <= 3


def test_random_shapes_keep_the_cache_within_its_limit(model):
    random_runs(model, 40)


@pytest.mark.slow
def test_500_random_shapes_keep_the_cache_within_its_limit(model):
    random_runs(model, 500)


def grown_bytes(sampler, runs):
    """Growth of host and device memory over `runs` runs, after as many to settle."""

    def measure():
        gc.collect()
        with open("/proc/self/statm") as statm:
            host = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return host, torch.cuda.memory_allocated() if DEVICE == "cuda" else 0

    for seed in range(runs):
        sampler(1, seeds=seed)
    before = measure()
    for seed in range(runs):
        sampler(1, seeds=seed)
    after = measure()
    return [late - early for early, late in zip(before, after, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_10000_runs_hold_no_more_memory_than_the_first_ones(model, mode):
    host, device = grown_bytes(make(model, 2, graph=mode, eta=1.0), 10_000)
    assert host < 8 << 20
    assert device == 0


def test_300_runs_hold_no_more_memory_than_the_first_ones(model):
    host, device = grown_bytes(make(model, 2, graph="step", eta=1.0), 300)
    assert host < 8 << 20
    assert device == 0


def test_a_warm_up_captures_what_a_call_needs(model):
    sampler = make(model, graph="step", guidance_scale=2.0)
    warmup = sampler.warmup(2, **labels(2))
    assert warmup.cold_seconds > 0 and warmup.warm_seconds > 0
    assert warmup.graph_bytes == sampler.graphs.nbytes > 0
    sampler(2, seeds=3, **labels(2))
    assert len(sampler.graphs) == 1


def test_auto_is_a_graph_of_a_step_on_a_gpu_and_none_on_a_cpu(model):
    sampler = make(model)
    for _ in range(2):
        sampler(1, seeds=0)
    assert len(sampler.graphs) == (DEVICE == "cuda")
    assert loop.graph_mode("auto", torch.device("cuda", 0)) == "step"
    assert loop.graph_mode("auto", torch.device("cpu")) == "off"


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_samples(model):
    compiled = make(model, graph="step", compile="default", guidance_scale=2.0)
    expected = make(model, graph="off", guidance_scale=2.0)(2, seeds=0, **labels(2))
    torch.testing.assert_close(compiled(2, seeds=0, **labels(2)), expected, rtol=1e-4, atol=1e-4)


BAD = {
    "graph: 'always' is not one of": {"graph": "always"},
    "max_graphs: 0": {"max_graphs": 0},
    "compile: 'fast' is not one of": {"compile": "fast"},
    "compile: 'reduce-overhead' captures CUDA graphs of its own": {"compile": "reduce-overhead"},
    "guidance_interval: 1.5": {"guidance_interval": (0.0, 1.5)},
    "guidance_interval: 0.2; pass a number in \\[0.6, 1\\]": {"guidance_interval": (0.6, 0.2)},
    "batch_buckets: 0": {"batch_buckets": (0, 4)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_named(model, message):
    with pytest.raises(ValueError, match=message):
        make(model, **BAD[message])


def test_bad_calls_are_named(model):
    sampler = make(model, graph="step")
    with pytest.raises(ValueError, match=r"model_kwargs: \['labels'\] do not fit the model.*class_labels, added"):
        sampler(2, seeds=0, labels=torch.zeros(2))
    with pytest.raises(ValueError, match=r"start: shape \(2, 3, 4, 4\); pass \[B, 3, 8, 8\]"):
        sampler(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="seeds: 3 for a batch of 2"):
        sampler(2, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="channels_last: True for a state of shape"):
        Sampler(lambda x, t: x, DDIMConfig(), 3, sample_shape=(4,), channels_last=True)(2, seeds=0)
    with pytest.raises(ValueError, match="start: on meta, but the sampler is on"):
        sampler(torch.zeros(2, *SHAPE, device="meta"))
    with pytest.raises(ValueError, match="added: on meta"):
        sampler(2, seeds=0, added={"text": {"embeds": torch.zeros(2, 5, device="meta")}})

    def needs(x, t, observation):
        return x

    with pytest.raises(ValueError, match="missing a required argument: 'observation'"):
        Sampler(needs, DDIMConfig(), 3, sample_shape=SHAPE)(2, seeds=0)


def test_a_clip_of_another_range_is_the_same_capture(model):
    sampler = make(model, graph="step", config=DDIMConfig(clip_sample_range=1.0))
    sampler(2, seeds=0)
    tighter = sampler.replace(scheduler=DDIMConfig(clip_sample_range=0.5))
    assert tighter.limit == Clip(0.5)
    assert float(tighter(2, seeds=0).abs().max()) <= 0.5
    assert len(sampler.graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [*MODES, "off"])
def test_no_synchronisation_on_a_gpu(model, mode):
    sampler = make(model, graph=mode, eta=1.0, guidance_scale=2.0)
    arguments = labels(2)
    sampler.warmup(2, **arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = sampler(2, seeds=1, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(float(result.sum()))


class _Recording(torch.nn.Module):
    """A model that writes to its timesteps, and notes what it was called with."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.full((1,), 0.5)), []

    def forward(self, x, t, shift=None):
        self.seen.append((x, t.clone()))
        t.zero_()
        return self.weight * x + (0 if shift is None else shift)


def test_a_loop_that_is_kept_serves_every_run_of_its_kind_as_a_new_one_would():
    model, shift = _Recording(), torch.full((2, 3), 0.25)
    options = {"sample_shape": (3,), "guidance_scale": 2.0, "eta": 1.0, "guidance_interval": (0.0, 0.5)}
    sampler = Sampler(model, DDIMConfig(), 4, **options)
    calls = [
        (2, {"seeds": [5, 6], "shift": shift, "uncond_kwargs": {}}),
        (torch.ones(2, 3), {"seeds": 1, "shift": -shift, "uncond_kwargs": {}}),
        (torch.ones(2, 3), {"seeds": 2, "shift": -shift, "uncond_kwargs": {"shift": shift}}),
        (2, {"seeds": [7, 6], "uncond_kwargs": {}}),
        (1, {"seeds": 3, "uncond_kwargs": {}}),
    ]
    kept = [sampler(start, **given) for start, given in calls]
    copies = [each.clone() for each in kept]
    with torch.inference_mode():
        inside = [sampler(start, **given) for start, given in calls]
    again = [sampler(start, **given) for start, given in calls]
    fresh = [Sampler(model, DDIMConfig(), 4, **options)(start, **given) for start, given in calls]
    for results in (kept, copies, inside, again):
        assert all(torch.equal(a, b) for a, b in zip(results, fresh, strict=True))
    runs = [model.seen[k : k + 4] for k in range(0, len(model.seen), 4)]
    # Of the state's memory, or a step's own: the loop is the same one.
    assert runs[0][0][0].data_ptr() == runs[3][0][0].data_ptr()
    assert all([t[0].item() for _, t in run] == list(sampler.table.timesteps) for run in runs)


def test_a_kept_loop_takes_the_table_limit_and_noise_of_each_run():
    model, x = _Recording(), torch.ones(2, 3)
    sampler = Sampler(model, DDIMConfig(), 4, sample_shape=(3,))
    for changes in ({"num_inference_steps": 6}, {"eta": 0.5}, {"limit": Clip(0.1)}, {"guidance_scale": 3.0}, {}):
        # A table that is dropped may leave its place in memory to the next one.
        for steps in (3, 5, 3):
            ours = sampler.replace(**{"num_inference_steps": steps, **changes})
            fresh = Sampler(model, DDIMConfig(), **{"num_inference_steps": steps, **changes}, sample_shape=(3,))
            assert torch.equal(ours(x, seeds=1, uncond_kwargs={}), fresh(x, seeds=1, uncond_kwargs={}))
            del ours
        gc.collect()


def test_a_kept_loop_holds_nothing_of_the_caller():
    model = _Recording()
    sampler, start, shift = Sampler(model, DDIMConfig(), 2, sample_shape=(3,)), torch.ones(2, 3), torch.ones(2, 3)
    sampler(start, shift=shift)
    held = [weakref.ref(start), weakref.ref(shift)]
    model.seen.clear()
    del start, shift
    gc.collect()
    assert [each() for each in held] == [None, None]
