import contextlib
import dataclasses
import doctest
import functools
import logging
import os
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch

import fastddim
from fastddim import Clip, DDIMConfig, DDIMScheduler, DynamicThreshold, Guidance, Sampler, Schedule, StepTable, backends
from fastddim.config import limit_name
from fastddim.kernels import KernelUnavailableError, PreparedStep, launch
from fastddim.noise import seed_tensor
from fastddim.step import StepOptions
from oracle import ddim

reference_step = functools.partial(fastddim.ddim_step, backend="reference")
SCHEDULE = Schedule(DDIMConfig())
TABLE = StepTable.build(SCHEDULE, SCHEDULE.pairs(10))

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def on_gpu(monkeypatch, machine):
    """CPU tensors pass for a GPU's, and nothing of the module's state outlives the test."""
    monkeypatch.setattr(backends, "_is_on_gpu", lambda sample: isinstance(sample, torch.Tensor))
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.setattr(backends, "_unavailable", {})
    launch._ENTRIES.clear()


def kernel_ran():
    return bool(launch._ENTRIES)


def test_a_cpu_takes_the_reference_and_says_nothing(caplog):
    launch._ENTRIES.clear()
    with caplog.at_level(logging.DEBUG, "fastddim"):
        fastddim.ddim_step(draw(2, 3), draw(2, 3), TABLE, 1)
    assert not kernel_ran() and not caplog.records


def test_a_gpu_takes_the_kernel(on_gpu):
    expected = reference_step(draw(2, 3), draw(2, 3, seed=1), TABLE, 1, limit=Clip())
    actual = fastddim.ddim_step(draw(2, 3), draw(2, 3, seed=1), TABLE, 1, limit=Clip())
    assert kernel_ran()
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_gpu")
def test_the_reference_by_argument_or_by_environment(monkeypatch):
    fastddim.ddim_step(draw(2, 3), draw(2, 3), TABLE, 1, backend="reference")
    assert not kernel_ran()
    monkeypatch.setenv("FASTDDIM_BACKEND", "reference")
    fastddim.ddim_step(draw(2, 3), draw(2, 3), TABLE, 1)
    assert not kernel_ran()
    fastddim.ddim_step(draw(2, 3), draw(2, 3), TABLE, 1, backend="triton")
    assert kernel_ran()


def test_the_documented_example_runs():
    assert doctest.testmod(backends) == (0, 6)


def test_unknown_backends_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"^backend: 'tritn' is not one of .* Did you mean 'triton'\?"):
        fastddim.ddim_step(draw(2, 3), draw(2, 3), TABLE, 1, backend="tritn")
    with pytest.raises(ValueError, match=r"^backend: 'cuda'"):
        Sampler(lambda x, t: x, DDIMConfig(), 2, backend="cuda")
    monkeypatch.setenv("FASTDDIM_BACKEND", "off")
    with pytest.raises(ValueError, match=r"^FASTDDIM_BACKEND: 'off' is not one of 'auto', 'reference'"):
        fastddim.ddim_step(draw(2, 3), draw(2, 3), TABLE, 1)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("sample", "why"),
    [(draw(2, 3).double(), "not torch.float64"), (draw(2, 3).requires_grad_(), "no gradients")],
)
def test_what_the_kernel_cannot_do_the_reference_does_and_it_is_logged_once(sample, why, caplog):
    for _ in range(3):
        x_next, _ = fastddim.ddim_step(draw(2, 3), sample, TABLE, 1)
    assert not kernel_ran()
    assert x_next.requires_grad == sample.requires_grad
    (record,) = caplog.records
    assert "the fused DDIM kernel is not used" in record.getMessage() and why in record.getMessage()


@pytest.mark.usefixtures("on_gpu")
def test_without_triton_the_reference_steps_in(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fastddim.kernels.launch", None)
    fastddim.ddim_step(draw(2, 3), draw(2, 3), TABLE, 1)
    assert "triton cannot be imported" in caplog.text


@pytest.mark.usefixtures("on_gpu")
def test_where_it_does_not_compile_the_reference_steps_in(monkeypatch, caplog):
    def fail(*_):
        raise KernelUnavailableError("the fused step does not compile here: ptxas: no")

    monkeypatch.setattr(launch._Launcher, "__call__", fail)
    model = lambda x, t: x * 0.5  # noqa: E731
    expected = Sampler(model, DDIMConfig(), 3, sample_shape=(4,), backend="reference")(2, seeds=0)
    fastddim.ddim_step(draw(2, 3), draw(2, 3), TABLE, 1)
    fastddim.ddim_step(draw(2, 3), draw(2, 3), TABLE, 1)
    assert torch.equal(Sampler(model, DDIMConfig(), 3, sample_shape=(4,))(2, seeds=0), expected)
    assert caplog.text.count("ptxas: no") == 1
    with pytest.raises(KernelUnavailableError):
        fastddim.ddim_step(draw(2, 3), draw(2, 3), TABLE, 1, backend="triton")


class Halved(torch.nn.Linear):
    """Half of its input, in the dtype of its weights."""

    def __init__(self):
        super().__init__(6, 6, bias=False)
        torch.nn.init.eye_(self.weight).mul_(0.5)

    def forward(self, x, t):
        return super().forward(x)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("guidance_scale", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_the_sampler_gives_the_same_samples_with_the_kernel(guidance_scale, dtype, eta):
    def sample(backend):
        sampler = Sampler(
            Halved().to(dtype), DDIMConfig(thresholding=True, sample_max_value=2.0), 4, eta=eta,
            guidance_scale=guidance_scale, sample_shape=(6,), backend=backend,
        )  # fmt: skip
        return sampler(3, seeds=5, return_trajectory=True, uncond_kwargs={})[1]

    launch._ENTRIES.clear()
    with torch.no_grad():
        actual, expected = sample("triton"), sample("reference")
    assert kernel_ran()
    torch.testing.assert_close(actual, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=2e-2)


@pytest.mark.usefixtures("machine")
def test_a_model_that_returns_its_input_is_not_written_over():
    for guidance_scale in (None, 2.0):
        results = [
            Sampler(lambda x, t: x, DDIMConfig(), 4, guidance_scale=guidance_scale, sample_shape=(6,), backend=backend)(
                3, seeds=5, uncond_kwargs={}
            )
            for backend in ("triton", "reference")
        ]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("state", [torch.float32, torch.float16])
def test_the_drop_in_scheduler_gives_diffusers_numbers_with_the_kernel(prediction_type, eta, state):
    config = {"prediction_type": prediction_type, "thresholding": True, "sample_max_value": 1.5}
    ours, theirs = DDIMScheduler(**config), diffusers.DDIMScheduler(**config)
    ours.backend = "triton"
    x, output, noise = (draw(2, 3, 8, 8, seed=k).to(state) for k in range(3))
    launch._ENTRIES.clear()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
    for timestep in (*ours.timesteps[:3], int(ours.timesteps[4]), -1):
        kwargs = {"eta": eta, "variance_noise": noise if eta else None, "return_dict": False}
        actual = ours.step(output, timestep, x, **kwargs)
        expected = theirs.step(output.float(), timestep, x.float(), **{**kwargs, "variance_noise": noise.float()})
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == state
            torch.testing.assert_close(a, b.to(state), rtol=2e-5 if state == torch.float32 else 2e-3, atol=2e-5)
    assert kernel_ran()


@pytest.mark.usefixtures("machine")
def test_the_drop_in_promotes_and_broadcasts_as_before():
    scheduler = DDIMScheduler()
    scheduler.backend = "triton"
    scheduler.set_timesteps(5)
    x, output = draw(2, 3, 4, 4).half(), draw(2, 3, 4, 4, seed=1)
    prev_sample, x0 = scheduler.step(output, 400, x, return_dict=False)
    assert prev_sample.dtype == x0.dtype == torch.float32
    prev_sample, _ = scheduler.step(output[:1], 400, x, return_dict=False)
    assert prev_sample.shape == x.shape


@pytest.mark.usefixtures("machine")
class TestPreparedStep:
    def make(self):
        self.x, self.output = draw(2, 6), draw(4, 6, seed=1)
        self.model_input = torch.empty(4, 6)
        options = StepOptions(guidance=Guidance(2.0), limit=Clip(), out=self.x, model_input=self.model_input)
        return PreparedStep(self.output, self.x, TABLE, options)

    def test_it_steps_as_ddim_step_does(self):
        prepared = self.make()
        expected = self.x.clone()
        for step in range(10):
            output = draw(4, 6, seed=step)
            x_next, x0 = prepared(output, step)
            expected, expected_x0 = reference_step(output, expected, TABLE, step, limit=Clip(), guidance=2.0)
            assert x_next is self.x and x0 is prepared.x0
            torch.testing.assert_close(x_next, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(x0, expected_x0, rtol=1e-4, atol=1e-4)
            assert torch.equal(self.model_input, torch.cat([x_next, x_next]))

    def test_it_refuses_what_it_was_not_prepared_for(self):
        prepared = self.make()
        for output in (draw(4, 5), draw(4, 6).half(), draw(6, 4).T):
            assert not prepared.fits(output)
            with pytest.raises(ValueError, match=r"^model_output: .*; this step was prepared for"):
                prepared(output, 0)
        for step in (-1, 10):
            with pytest.raises(IndexError):
                prepared(self.output, step)
        with pytest.raises(ValueError, match=r"^model_output: shares memory with model_input"):
            prepared(self.model_input, 0)
        with pytest.raises(TypeError, match=r"^table: Tensor; pass a StepTable"):
            PreparedStep(self.output, self.x, TABLE.tensor(), StepOptions(guidance=Guidance(2.0)))
        stochastic = StepTable.build(SCHEDULE, SCHEDULE.pairs(10), eta=1.0)
        with pytest.raises(ValueError, match=r"^noise: None, but the table adds noise"):
            PreparedStep(self.output, self.x, stochastic, StepOptions(guidance=Guidance(2.0)))
        with pytest.raises(ValueError, match=r"^advance: True, but step is the number"):
            PreparedStep(self.output, self.x, TABLE, StepOptions(guidance=Guidance(2.0), advance=True))


def traced(function, *inputs):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    # The graph is whole; without a GPU it cannot run.
    with contextlib.suppress(RuntimeError):
        torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    return [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("index", [torch.tensor(501), 501])
def test_the_drop_ins_step_compiles_without_a_break_on_a_cpu(index):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    x, output = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    step = torch.compile(lambda o, t, x: scheduler.step(o, t, x, return_dict=False), backend="eager", fullgraph=True)
    torch._dynamo.reset()
    for n in (10, 20):
        scheduler.set_timesteps(n)
        expected = scheduler.step(output, index, x, return_dict=False)
        torch.testing.assert_close(step(output, index, x)[0], expected[0], rtol=1e-5, atol=1e-5)


def test_a_compiled_step_tells_schedulers_apart():
    schedulers = [DDIMScheduler(beta_end=beta_end) for beta_end in (0.02, 0.01)]
    x, output = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    torch._dynamo.reset()
    step = torch.compile(lambda s, o, x: s.step(o, 501, x, return_dict=False), backend="eager", fullgraph=True)
    for scheduler in schedulers:
        scheduler.set_timesteps(10)
        expected = diffusers.DDIMScheduler.from_config(scheduler.config)
        expected.set_timesteps(10)
        wanted = expected.step(output, 501, x).prev_sample
        # A step before, so that both have the same attributes.
        for own in (scheduler.step(output, 501, x, return_dict=False), step(scheduler, output, x)):
            torch.testing.assert_close(own[0], wanted, rtol=1e-5, atol=1e-5)


# Triton's kernels cannot be traced where its interpreter has replaced them.
TRACE = """
import torch, fastddim
from fastddim import Clip, DynamicThreshold, Guidance
from fastddim.kernels import launch
from test_backends import TABLE, SCHEDULE, traced
from torch._subclasses.fake_tensor import FakeTensorMode
torch.set_grad_enabled(False)
launch._DEVICE_TYPES = ("cuda", "cpu")
scheduler = fastddim.DDIMScheduler(); scheduler.set_timesteps(10); scheduler.backend = "triton"
x = torch.randn(2, 3, 8, 8)
targets = traced(lambda o, t, x: scheduler.step(o, t, x, return_dict=False), x, torch.tensor(501), x.clone())
assert torch.ops.fastddim.ddim_step in [getattr(t, "overloadpacket", t) for t in targets], targets

class Step(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options
    def forward(self, output, x, seeds, step):
        return fastddim.ddim_step(output, x, TABLE, step, seeds=seeds, **self.options)

for options, size in (
    (dict(limit=Clip(), guidance=3.0), 8),
    (dict(limit=DynamicThreshold(0.9, 2.0), guidance=Guidance(3.0, 0.5)), 8),
    (dict(limit=DynamicThreshold(0.9, 2.0), guidance=Guidance(3.0, 0.5)), 128),
    (dict(guidance=Guidance(0.6, method="cfg++")), 8),
    (dict(limit=Clip(), guidance=Guidance(3.0, 0.5, method="apg", apg_norm_threshold=5.0)), 128),
):
    for dynamic in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True):
            output, x = torch.empty(6, 3, size, size, device="cuda"), torch.empty(3, 3, size, size, device="cuda")
            seeds = torch.empty(3, dtype=torch.int64, device="cuda")
            batch = torch.export.Dim("batch", min=2, max=1000)
            shapes = ({0: 2 * batch}, {0: batch}, {0: batch}, {0: batch}) if dynamic else None
            program = torch.export.export(Step(**options), (output, x, seeds, seeds.clone()), dynamic_shapes=shapes)
            nodes = [node for node in program.graph.nodes if node.target == torch.ops.fastddim.ddim_step.default]
            assert len(nodes) == 1
            if dynamic:
                assert isinstance(nodes[0].args[1].meta["val"].shape[0], torch.SymInt)
            assert "auto_functionalized" not in str(program.run_decompositions().graph)
print("traced")
"""


def test_it_is_one_operator_under_compile_and_export():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    tests = os.path.dirname(__file__)
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(tests), tests])
    done = subprocess.run([sys.executable, "-c", TRACE], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.strip().endswith("traced"), done.stderr[-3000:]


def test_the_operator_refuses_what_a_graph_has_no_place_for():
    from fastddim.kernels.operator import ddim_step

    with pytest.raises(ValueError, match=r"^advance: True under torch.compile"):
        ddim_step(draw(2, 3), draw(2, 3), TABLE, torch.tensor(0), StepOptions(advance=True))


@pytest.mark.usefixtures("machine")
def test_the_operator_takes_seeds_and_first_rows_of_any_strides():
    from fastddim.kernels.operator import ddim_step

    table = StepTable.build(SCHEDULE, SCHEDULE.pairs(10), eta=1.0)
    x, output, steps = draw(2, 50), draw(2, 50, seed=1), torch.tensor([6, 4])
    seeds, first = torch.tensor([[1, 8], [2, 9]]), torch.tensor([[1, 8], [3, 9]])
    strided = StepOptions(seeds=seeds[:, 0], first_row=first[:, 0])
    whole = StepOptions(seeds=seeds[:, 0].clone(), first_row=first[:, 0].clone())
    assert torch.equal(ddim_step(output, x, table, steps, strided)[0], ddim_step(output, x, table, steps, whole)[0])


@pytest.mark.usefixtures("machine")
def test_the_operator_runs_eagerly_too():
    """Through the oracle, as an exported program would call it."""
    from fastddim.kernels.operator import ddim_step

    x, output = draw(2, 50), draw(4, 50, seed=1)
    seeds = seed_tensor([1, 2])
    for limit in (None, Clip(1.0), DynamicThreshold(0.9, 1.5)):
        table = StepTable.build(SCHEDULE, SCHEDULE.pairs(10), use_clipped_model_output=limit is not None)
        x_next, _ = ddim_step(output, x, table, 6, StepOptions(limit=limit, seeds=seeds, guidance=Guidance(2.5)))
        t, t_next = SCHEDULE.pairs(10)[6]
        bars = SCHEDULE.alpha_bar([t, t_next])
        uncond, cond = output.double().numpy().reshape(2, 2, 50)
        expected = ddim(
            x.double().numpy(), uncond + 2.5 * (cond - uncond), *bars, rederive=limit is not None,
            clip=1.0 if isinstance(limit, Clip) else None,
            threshold=(0.9, 1.5) if isinstance(limit, DynamicThreshold) else None,
        )  # fmt: skip
        np.testing.assert_allclose(x_next.numpy(), expected.x_next, atol=1e-5)


def test_each_option_of_a_step_has_a_plan_of_its_own():
    """A field that a plan is not looked up by would get whatever plan is kept for the other value."""
    x, output, half = draw(2, 3), draw(4, 3), torch.ones(2)
    guidance = {
        "scale": half, "rescale": 0.5, "cond_first": True, "method": "apg", "apg_eta": 0.5, "apg_norm_threshold": 2.0,
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(Guidance)} == set(guidance)
    options = {
        "guidance": None, "limit": Clip(0.5), "limit_values": half.double(), "noise": x, "seeds": seed_tensor([1, 2], "cpu"),
        "first_row": half.long(), "out": x, "model_input": output, "advance": True, "timesteps": half, "next_timestep": half,
        "previous_x0": x, "ratios": half,
    }  # fmt: skip
    # The workspace and whether x0 is wanted change no plan.
    assert {field.name for field in dataclasses.fields(StepOptions)} == {*options, "return_x0", "workspace"}
    plain = StepOptions(guidance=Guidance(2.0))
    variants = [dataclasses.replace(plain, **{name: value}) for name, value in options.items()]
    variants += [StepOptions(guidance=Guidance(**{"scale": 2.0, name: value})) for name, value in guidance.items()]
    keys = [launch._key(output, x, TABLE, 1, each) for each in (plain, *variants)]
    assert len(set(keys)) == len(keys)
    # What captures are looked up by, whose numbers change.
    fixed = {name: value for name, value in guidance.items() if name not in ("scale", "rescale")}
    assert Guidance(3.0, 0.5).fixed == Guidance(2.0).fixed
    assert all(Guidance(2.0, **{name: value}).fixed != Guidance(2.0).fixed for name, value in fixed.items())


def test_a_limit_that_has_no_name_is_refused_and_not_left_out():
    class Soft:
        range = 1.0

    with pytest.raises(TypeError, match="limit: Soft; pass a Clip, a DynamicThreshold or None"):
        limit_name(Soft())
    assert [limit_name(limit) for limit in (None, Clip(), DynamicThreshold())] == ["none", "clip", "threshold"]
