"""`backend="compiled"`, over a few kinds of step, each of which takes seconds to compile once for all tests of this file."""

import logging
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import fastddim
from fastddim import Clip, DDIMConfig, DDIMScheduler, DynamicThreshold, Guidance, Sampler, Schedule, StepTable, backends
from fastddim.compiled import CompilerMissingError, code, step
from fastddim.noise import normal_for, seed_tensor
from oracle import ddim, guide, project

SCHEDULES = {kind: Schedule(DDIMConfig(prediction_type=kind)) for kind in ("epsilon", "v_prediction")}
TABLES = {kind: StepTable.build(each, each.pairs(10)) for kind, each in SCHEDULES.items()}
NOISY = StepTable.build(SCHEDULES["epsilon"], SCHEDULES["epsilon"].pairs(10), eta=1.0)
SHAPES = [(1,), (3, 1), (1, 16, 7), (2, 3, 5), (2, 4, 8, 8), (1, 2, 3, 4, 5)]
FLOAT32_ULP = 2.0**-23
SECOND_ORDER = StepTable.from_columns(
    [3, 2, 1], [[1.2, -0.7, 0.8, 0.0, 0.3, 0.0, 0.0], [1.1, -0.4, 0.7, 0.0, 0.5, 0.0, -0.2], [1, -0.2, 0, 0, 1, 0, 0]]
)


@pytest.fixture(scope="module", autouse=True)
def kept_code(tmp_path_factory):
    """A folder of this file's own, and the names of what is compiled into it."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(code.FOLDER_VARIABLE, str(folder))
        patch.setattr(code, "_loaded", {})
        patch.setattr(step, "_codes", {})
        patch.setattr(step, "_plans", {})
        caches = (code._folder, code._has_compiler, code.require_compiler)
        for cache in caches:
            cache.cache_clear()
        yield folder
        for cache in caches:
            cache.cache_clear()


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(output, x, table, row, **options):
    """The results by the reference and by compiled code, on tensors of their own."""
    results = []
    for backend in ("reference", "compiled"):
        own = {name: each.clone() if isinstance(each, torch.Tensor) else each for name, each in options.items()}
        results.append(fastddim.ddim_step(output.clone(), x.clone(), table, row, backend=backend, **own))
    return results


def assert_same_bits(results):
    for theirs, ours in zip(*results, strict=True):
        assert (theirs.dtype, theirs.shape, theirs.stride()) == (ours.dtype, ours.shape, ours.stride())
        assert torch.equal(theirs, ours)


def has_fused_products():
    """Whether torch's own kernels fuse a product and a sum here, as compiled code does."""
    return "AVX" in torch.backends.cpu.get_cpu_capability()


needs_fused = pytest.mark.skipif(not has_fused_products(), reason="needs a processor with AVX2")


@needs_fused
@pytest.mark.parametrize("kind", TABLES)
def test_all_rows_and_shapes_of_one_kind_are_the_references_bits_and_one_piece_of_code(kind, kept_code):
    before = set(kept_code.glob("*.so"))
    for number, shape in enumerate(SHAPES):
        for row in range(10):
            output, x = draw(*shape, seed=number), draw(*shape, seed=row + 100)
            assert_same_bits(both(output, x, TABLES[kind], row, limit=Clip(0.5 + number)))
    assert len(set(kept_code.glob("*.so")) - before) == (1 if kind == "epsilon" else 0)


@needs_fused
def test_guidance_of_any_scale_in_half_precision():
    output, x = draw(4, 3, 5, dtype=torch.float16), draw(2, 3, 5, seed=1, dtype=torch.float16)
    for scale in (-1.0, 0.3, 1.0, 7.5):
        for row in (0, 4, 9):
            assert_same_bits(both(output, x, TABLES["epsilon"], row, limit=Clip(), guidance=scale))


@needs_fused
def test_rows_of_a_tensor_are_the_rows_alone():
    output, x, rows = draw(3, 3, 5), draw(3, 3, 5, seed=1), torch.tensor([8, 0, -7])
    for table in (TABLES["v_prediction"], TABLES["v_prediction"].tensor()):
        together = fastddim.ddim_step(output, x, table, rows, limit=Clip(), backend="compiled")
        for k, row in enumerate((8, 0, 3)):
            one = slice(k, k + 1)
            alone = fastddim.ddim_step(
                output[one], x[one], TABLES["v_prediction"], row, limit=Clip(), backend="reference"
            )
            assert all(torch.equal(a[one], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.slow
@needs_fused
def test_in_place_with_a_model_input_and_noise_of_seeds():
    x, output, seeds = draw(2, 3, 5), draw(2, 3, 5, seed=1), seed_tensor([3, 2**63])
    options = {"limit": Clip(), "seeds": seeds, "first_row": torch.tensor([0, 2])}
    expected = fastddim.ddim_step(output, x, NOISY, 3, backend="reference", **options)
    model_input, state = torch.full((2, 3, 5), float("nan"), dtype=torch.bfloat16), x.clone()
    x_next, x0 = fastddim.ddim_step(
        output, state, NOISY, 3, backend="compiled", out=state, model_input=model_input, **options
    )
    assert x_next is state
    assert torch.equal(x_next, expected[0]) and torch.equal(x0, expected[1])
    assert torch.equal(model_input, expected[0].bfloat16())


@pytest.mark.slow
@needs_fused
def test_a_threshold_noise_that_is_given_and_float64():
    x, output, noise = (draw(2, 3, 5, seed=k, dtype=torch.float64) * 3 for k in range(3))
    assert_same_bits(both(output, x, NOISY, 2, limit=DynamicThreshold(0.9, 2.0), noise=noise))


@pytest.mark.slow
@needs_fused
def test_a_table_that_looks_back_writes_over_the_x0_of_the_step_before():
    output, previous = draw(2, 5, seed=1), [draw(2, 5, seed=2) for _ in range(2)]
    states = [draw(2, 5), draw(2, 5)]
    for row in range(3):
        for k, backend in enumerate(("reference", "compiled")):
            _, x0 = fastddim.ddim_step(
                output, states[k], SECOND_ORDER, row, out=states[k], previous_x0=previous[k], backend=backend
            )
            assert x0 is previous[k]
        assert torch.equal(*states) and torch.equal(*previous)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cfg", "apg"])
def test_guidance_with_sums_is_as_near_to_the_oracle_as_the_reference(method):
    x, output = draw(3, 4, 8, 8), draw(6, 4, 8, 8, seed=1)
    rescale = 0.7 if method == "cfg" else 0.0
    guidance = Guidance(7.5, rescale, method=method, apg_norm_threshold=5.0 if method == "apg" else 0.0)
    uncond, cond = output.double().numpy().reshape(2, 3, 4, 8, 8)
    guided = guide(uncond, cond, 7.5, rescale) if method == "cfg" else project(uncond, cond, 7.5, 0.0, 5.0)
    pairs, schedule = SCHEDULES["v_prediction"].pairs(10), SCHEDULES["v_prediction"]
    for row in (0, 6):
        expected = ddim(x.double().numpy(), guided, *schedule.alpha_bar(pairs[row]), "v_prediction", clip=3.0)
        results = both(output, x, TABLES["v_prediction"], row, limit=Clip(3.0), guidance=guidance)
        reference, ours = (np.abs(result[0].double().numpy() - expected.x_next).max() for result in results)
        assert ours <= reference + 2 * FLOAT32_ULP * np.abs(guided).max()


def test_a_step_is_the_oracles():
    schedule, shape = SCHEDULES["v_prediction"], (2, 4, 8, 8)
    for row, pair in enumerate(schedule.pairs(10)):
        x, output = draw(*shape, seed=row), draw(*shape, seed=row + 20)
        expected = ddim(
            x.double().numpy(), output.double().numpy(), *schedule.alpha_bar(pair), "v_prediction", clip=1.0
        )
        got = fastddim.ddim_step(output, x, TABLES["v_prediction"], row, limit=Clip(), backend="compiled")
        for ours, exact in zip(got, (expected.x_next, expected.x0), strict=True):
            assert np.abs(ours.numpy() - exact).max() <= 4 * FLOAT32_ULP * np.abs(x.numpy()).max()


def test_a_nan_and_an_infinity_end_as_in_the_reference():
    x, output = draw(2, 16), draw(2, 16, seed=1)
    output[0, 3], output[1, 2], x[1, 5] = float("nan"), float("inf"), -float("inf")
    for theirs, ours in zip(*both(output, x, TABLES["epsilon"], 2, limit=Clip()), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_drawn_noise_is_the_references_bits():
    seeds, steps = seed_tensor([0, 1, 2**64 - 1]), torch.tensor([0, 7, 2**33])
    for shape in ((1,), (7,), (3, 5, 4)):
        for counted in (5, steps):
            assert torch.equal(step.draw_normal(seeds, counted, shape, 1), normal_for(seeds, counted, shape, 1))


@needs_fused
def test_views_and_shared_memory_are_as_in_the_reference():
    x, output = draw(2, 4, 6), draw(2, 4, 6, seed=1)
    expected, expected_x0 = fastddim.ddim_step(output, x, TABLES["epsilon"], 4, limit=Clip(), backend="reference")
    last = x.transpose(1, 2).contiguous().transpose(1, 2)
    over = torch.cat([torch.zeros(1), x.reshape(-1), torch.zeros(9)])
    cases = {
        "strided state": (output, last, None),
        "strided result": (output, x, torch.empty(2, 6, 4).transpose(1, 2)),
        "over the output": (shared := output.clone(), x, shared),
        "beside the state": (output, over[1:49].view(2, 4, 6), over[2:50].view(2, 4, 6)),
        "expanded output": (output, x, None),
    }
    for name, (given, state, out) in cases.items():
        x_next, x0 = fastddim.ddim_step(given, state, TABLES["epsilon"], 4, limit=Clip(), out=out, backend="compiled")
        assert torch.equal(x_next, expected) and torch.equal(x0, expected_x0), name
        assert out is None or x_next is out
    empty = fastddim.ddim_step(draw(0, 3), draw(0, 3), TABLES["epsilon"], 4, backend="compiled")
    assert [tuple(each.shape) for each in empty] == [(0, 3), (0, 3)]


@needs_fused
@pytest.mark.parametrize("graph", ["off", "step"])
def test_the_sampler_and_the_drop_in_give_the_references_samples(graph):
    def sample(backend, graph):
        sampler = Sampler(lambda x, t: 0.5 * x, DDIMConfig(), 4, sample_shape=(3, 5), backend=backend, graph=graph)
        # The second run is captured.
        return [sampler(2, seeds=7, return_trajectory=True)[1] for _ in range(2)]

    for ours, expected in zip(sample("compiled", graph), sample("reference", "off"), strict=True):
        assert torch.equal(ours, expected)
    schedulers = [DDIMScheduler(), DDIMScheduler()]
    schedulers[1].backend = "compiled"
    for scheduler in schedulers:
        scheduler.set_timesteps(10)
    x, output = draw(2, 3, 5), draw(2, 3, 5, seed=1)
    assert_same_bits([each.step(output, 501, x, return_dict=False) for each in schedulers])


def test_threads_share_the_code():
    x, output, failures = draw(2, 4, 64, 64), draw(2, 4, 64, 64, seed=1), []
    expected = [
        fastddim.ddim_step(output, x, TABLES["epsilon"], k, limit=Clip(), backend="compiled")[0] for k in range(10)
    ]

    def run(offset):
        for k in range(200):
            row = (k + offset) % 10
            got = fastddim.ddim_step(output, x, TABLES["epsilon"], row, limit=Clip(), backend="compiled")[0]
            if not torch.equal(got, expected[row]):
                failures.append(row)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_inference_mode_and_gradients():
    x, output = draw(2, 5), draw(2, 5, seed=1)
    with torch.inference_mode():
        inside = fastddim.ddim_step(output, x, TABLES["epsilon"], 1, limit=Clip(), backend="compiled")
    outside = fastddim.ddim_step(output, x, TABLES["epsilon"], 1, limit=Clip(), backend="compiled")
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    with pytest.raises(
        ValueError, match=r"^backend: 'compiled' has no gradients, and a tensor requires them; pass 'ref"
    ):
        fastddim.ddim_step(output, x.requires_grad_(), TABLES["epsilon"], 1, backend="compiled")
    with torch.no_grad():
        again = fastddim.ddim_step(output, x, TABLES["epsilon"], 1, limit=Clip(), backend="compiled")
    assert torch.equal(again[0], outside[0])


def test_under_compile_export_and_transforms_it_is_the_reference():
    class Step(torch.nn.Module):
        def forward(self, output, x):
            return fastddim.ddim_step(output, x, TABLES["epsilon"], 3, limit=Clip(), backend="compiled")[0]

    x, output = draw(2, 5), draw(2, 5, seed=1)
    expected = fastddim.ddim_step(output, x, TABLES["epsilon"], 3, limit=Clip(), backend="reference")[0]
    torch._dynamo.reset()
    compiled = torch.compile(Step(), backend="eager", fullgraph=True)(output, x)
    exported = torch.export.export(Step(), (output, x)).module()(output, x)
    mapped = torch.func.vmap(Step())(output[:, None], x[:, None])[:, 0]
    for result in (compiled, exported, mapped):
        torch.testing.assert_close(result, expected)


def test_auto_takes_no_compiled_code(monkeypatch):
    monkeypatch.setattr(backends.compiled, "ddim_step", None)
    fastddim.ddim_step(draw(2, 3), draw(2, 3), TABLES["epsilon"], 1, limit=Clip())


def test_another_process_loads_what_is_kept_without_inductor(kept_code):
    fastddim.ddim_step(draw(2, 5), draw(2, 5), TABLES["epsilon"], 1, limit=Clip(), backend="compiled")
    kept = {path: path.stat().st_mtime_ns for path in kept_code.glob("*.so")}
    script = (
        "import sys, torch, fastddim\n"
        "schedule = fastddim.Schedule()\n"
        "table = fastddim.StepTable.build(schedule, schedule.pairs(10))\n"
        "x = torch.ones(2, 5)\n"
        "fastddim.ddim_step(x, x, table, 1, limit=fastddim.Clip(), backend='compiled')\n"
        "print('torch._inductor' in sys.modules)\n"
    )
    # And without a compiler.
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__)), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["False"], done.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in kept_code.glob("*.so")} == kept


# A folder of its own has nothing compiled yet.
@pytest.mark.slow
def test_a_broken_file_is_compiled_again(monkeypatch, caplog, tmp_path):
    seeds = seed_tensor([1])
    expected, whole = step.draw_normal(seeds, 0, (5,), 0), code._path(code.DRAW).read_bytes()
    monkeypatch.setattr(code, "_folder", lambda: tmp_path)
    monkeypatch.setattr(code, "_loaded", {})
    # The compiler's own work is tested above.
    monkeypatch.setattr(code, "_compile", lambda kind, made: made.write_bytes(whole))
    code._path(code.DRAW).write_bytes(b"not a library")
    with caplog.at_level(logging.WARNING, "fastddim"):
        assert torch.equal(step.draw_normal(seeds, 0, (5,), 0), expected)
    assert "cannot be loaded and is compiled again" in caplog.text
    assert code._path(code.DRAW).read_bytes() == whole


def test_a_folder_that_cannot_be_made_is_one_of_this_process(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(code.FOLDER_VARIABLE, str(tmp_path / "file" / "below"))
    code._folder.cache_clear()
    try:
        folder = code._folder()
        assert folder.is_dir() and tmp_path not in folder.parents
    finally:
        code._folder.cache_clear()


def test_without_a_compiler_it_is_refused_before_any_work_and_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv(code.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(code, "_loaded", {})
    monkeypatch.setattr(step, "_codes", {})
    monkeypatch.setattr(step, "_plans", {})
    caches = (code._folder, code._has_compiler, code.require_compiler)
    for cache in caches:
        cache.cache_clear()
    message = r"^backend: 'compiled' needs a C\+\+ compiler, and 'no-such-compiler' is not there; apt-get install g\+\+"
    try:
        with pytest.raises(CompilerMissingError, match=message):
            Sampler(lambda x, t: x, DDIMConfig(), 2, backend="compiled")
        with pytest.raises(CompilerMissingError, match=message):
            fastddim.ddim_step(draw(2, 3), draw(2, 3), TABLES["epsilon"], 1, backend="compiled")
        scheduler = DDIMScheduler()
        scheduler.backend = "compiled"
        scheduler.set_timesteps(10)
        with pytest.raises(CompilerMissingError, match=message):
            scheduler.step(draw(2, 3), 501, draw(2, 3))
    finally:
        for cache in caches:
            cache.cache_clear()


def test_what_it_cannot_take_is_named():
    absent = torch.empty(2, 3, device="meta")
    with pytest.raises(ValueError, match=r"^backend: 'compiled' with a state on meta; it is for CPUs, pass 'auto'"):
        fastddim.ddim_step(absent, absent, TABLES["epsilon"], 1, backend="compiled")
    with pytest.raises(ValueError, match=r"^noise: None, but step 1 adds noise"):
        fastddim.ddim_step(draw(2, 3), draw(2, 3), NOISY, 1, backend="compiled")
    with pytest.raises(IndexError, match=r"^step: 10 is outside the table"):
        fastddim.ddim_step(draw(2, 3), draw(2, 3), NOISY, 10, backend="compiled")


@pytest.mark.slow
def test_what_was_checked_once_is_refused_where_it_differs():
    table, x, output = TABLES["epsilon"], draw(2, 3, 5), draw(4, 3, 5, seed=1)
    given = {"guidance": Guidance(2.0), "limit": Clip(), "backend": "compiled"}
    bad = [
        (TypeError, "^model_output: ", (None, x, table, 1), {}),
        (ValueError, "^model_output: ", (output[:3], x, table, 1), {}),
        (ValueError, "^model_output: ", (output.long(), x, table, 1), {}),
        (ValueError, "^model_output: on meta", (output.to("meta"), x, table, 1), {}),
        (ValueError, "^sample: ", (output, x.int(), table, 1), {}),
        (TypeError, "^table: ", (output, x, None, 1), {}),
        (ValueError, "^previous_x0: ", (output, x, SECOND_ORDER, 1), {}),
        (ValueError, "^noise: None", (output, x, NOISY, 1), {}),
        (IndexError, "^step: -1 ", (output, x, table, -1), {}),
        (IndexError, "^step: 10 ", (output, x, table, 10), {}),
        (TypeError, "^step: bool", (output, x, table, True), {}),
        (TypeError, "^guidance.scale: ", (output, x, table, 1), {"guidance": Guidance(True)}),
        (ValueError, "^guidance.method: ", (output, x, table, 1), {"guidance": Guidance(2.0, method=["cfg"])}),
        (ValueError, "^apg_eta: ", (output, x, table, 1), {"guidance": Guidance(2.0, apg_eta=False)}),
        (TypeError, "^limit: ", (output, x, table, 1), {"limit": 1.0}),
        (ValueError, "^noise: ", (output, x, NOISY, 1), {"noise": x[:1]}),
        (TypeError, "^noise: ", (output, x, NOISY, 1), {"noise": x.numpy()}),
        (ValueError, "^noise: on meta", (output, x, NOISY, 1), {"noise": x.to("meta")}),
        (ValueError, "^noise, seeds: ", (output, x, NOISY, 1), {"noise": x, "seeds": seed_tensor([1, 2])}),
        (ValueError, "^first_row: ", (output, x, table, 1), {"first_row": torch.tensor([0, 0])}),
        (ValueError, "^advance: ", (output, x, table, 1), {"advance": True}),
        (ValueError, "^backend: .* has no gradients", (output, x.clone().requires_grad_(), table, 1), {}),
        (ValueError, "^backend: .* has no gradients", (output.clone().requires_grad_(), x, table, 1), {}),
        (ValueError, "^backend: .* has no gradients", (output, x, NOISY, 1), {"noise": x.clone().requires_grad_()}),
    ]
    for _ in range(2):
        fastddim.ddim_step(output, x, table, 1, **given)
        fastddim.ddim_step(output, x, NOISY, 1, noise=x, **given)
        for error, message, arguments, options in bad:
            with pytest.raises(error, match=message):
                fastddim.ddim_step(*arguments, **{**given, **options})


@needs_fused
def test_a_step_like_one_before_reads_the_layout_and_memory_of_its_own_tensors():
    output, x = draw(2, 4, 6), draw(2, 4, 6, seed=1)
    options = {"limit": Clip(), "backend": "compiled"}
    for row in (4, 5):
        expected = fastddim.ddim_step(output, x, TABLES["epsilon"], row, limit=Clip(), backend="reference")
        strided = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in (output, x)]
        negated = [torch._neg_view(-each) for each in (output, x)]
        for given in ((output, x), strided, negated, (output, strided[1]), (negated[0], x)):
            results = fastddim.ddim_step(*given, TABLES["epsilon"], row, **options)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        state = x.clone()
        assert torch.equal(
            fastddim.ddim_step(output, state, TABLES["epsilon"], row, out=state, **options)[0], expected[0]
        )
        # The output is the state's own memory.
        shared = fastddim.ddim_step(x, x, TABLES["epsilon"], row, limit=Clip(), backend="reference")[0]
        assert torch.equal(
            fastddim.ddim_step(state := x.clone(), state, TABLES["epsilon"], row, out=state, **options)[0], shared
        )
