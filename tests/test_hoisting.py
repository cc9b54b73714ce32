"""What is constant over the steps leaves the loop: the parts of a model against the whole of it."""

import pickle
import warnings

import diffusers
import onnx
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fastddim import DDIMConfig, Sampler
from fastddim.export import ExportOptions, export_onnx
from fastddim.hoisting import split_model
from fastddim.model_call import Hoister
from fastddim.models.policy import ActionUNet1d
from fastddim.tracing import ExportError
from test_loop import SHAPE, Denoiser, labels, make
from unets import small_unet

ROWS = 3


def split(call, modules, conditions=(), shape=SHAPE, dtype=torch.float32, **options):
    """The parts of `call(x, t, *conditions)`."""
    x = torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return split_model(
        lambda x, t, conditions: call(x, t, *conditions), modules, x, torch.tensor([7, 3, 900]), list(conditions),
        batched=[True] * len(conditions), kind="Model", **options,
    )  # fmt: skip


def predict(parts, x, timesteps, step, conditions=()):
    values = parts.rows_of(parts.prepare(timesteps, conditions), step, x.shape[0])
    return parts.predict(x, timesteps[step].expand(x.shape[0]), conditions, values)


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# Networks that people use.


def text_unet(**options):
    width = {"cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"sample_size": 4, "block_out_channels": (8,)}
    return diffusers.UNet2DConditionModel(**(width | blocks | sizes | options))


def text():
    model = text_unet()
    return model, (4, 4, 4), [draw(ROWS, 5, 16)], lambda x, t, states: model(x, t, states).sample


def sdxl():
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    model = text_unet(**added, projection_class_embeddings_input_dim=6 * 4 + 8, use_linear_projection=True)

    def call(x, t, states, pooled, sizes):
        return model(x, t, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample

    return model, (4, 4, 4), [draw(ROWS, 5, 16), draw(ROWS, 8), draw(ROWS, 6)], call


def labelled():
    model = small_unet(num_class_embeds=5, attention=True)
    return model, (1, 8, 8), [torch.tensor([0, 1, 4])], lambda x, t, label: model(x, t, label).sample


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=2, num_layers=2, sample_size=4,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model, (2, 4, 4), [torch.tensor([0, 1, 4])], lambda x, t, label: model(x, t, label).sample


def policy():
    model = ActionUNet1d(3, 5, horizon=8)
    return model, (8, 3), [draw(ROWS, 5)], lambda x, t, observed: model(x, t, observation=observed)


# What each network is expected to have computed before its loop: values of steps, values of both, number of kept ones.
NETWORKS = {"text": (text, (True, False, 8)), "sdxl": (sdxl, (False, True, 8)), "labelled": (labelled, (False, True, 0)),
            "dit": (dit, (False, True, 0)), "policy": (policy, (False, True, 0))}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_in_parts_is_the_model(name):
    torch.manual_seed(0)
    build, expected = NETWORKS[name]
    model, shape, conditions, call = build()
    model.eval().requires_grad_(False)
    parts = split(call, [model], conditions, shape)
    assert (parts.steps_width > 0, parts.both_width > 0, len(parts.by_rows)) == expected
    # No timestep and no condition is read in the loop, and no weight is read in both parts.
    assert not parts.reads_timestep and not any(parts.reads_conditions)
    before, rest = ({id(weight) for weight in part.parameters()} for part in (parts.before, parts.rest))
    assert before and rest and not before & rest
    x, timesteps = draw(ROWS, *shape), torch.tensor([900, 500, 30, 2])
    whole = [call(x, t.expand(ROWS), *conditions) for t in timesteps]
    for step, expected_output in enumerate(whole):
        torch.testing.assert_close(predict(parts, x, timesteps, step, conditions), expected_output, rtol=0, atol=2e-6)
    if not parts.both_width:
        # As many rows as in the model's own products, so that their sums are taken in the same order.
        assert torch.equal(predict(parts, x, timesteps[:1].expand(ROWS), 0, conditions), whole[0])
    # Weights are the model's own, so what a batch of other rows rounds is all that differs.
    model.double()
    double = [value.double() if value.is_floating_point() else value for value in conditions]
    parts = split(call, [model], double, shape, torch.float64)
    got = predict(parts, x.double(), timesteps, 1, double)
    torch.testing.assert_close(got, call(x.double(), timesteps[1].expand(ROWS), *double), rtol=0, atol=1e-13)


# Without shrinking, as each example takes seconds.
@settings(max_examples=3, deadline=None, phases=[Phase.generate])
@given(
    data=st.fixed_dictionaries(
        {
            "time_embedding_type": st.sampled_from(["positional", "fourier"]),
            "resnet_time_scale_shift": st.sampled_from(["default", "scale_shift"]),
            "num_class_embeds": st.sampled_from([None, 5]),
            "layers_per_block": st.integers(1, 2),
            "attention": st.booleans(),
            "add_attention": st.booleans(),
            "downsample_type": st.sampled_from(["conv", "resnet"]),
        }
    )
)
def test_random_networks_in_parts_are_the_networks(data):
    torch.manual_seed(0)
    model = small_unet(**data).eval().requires_grad_(False)
    conditions = [] if data["num_class_embeds"] is None else [torch.tensor([0, 1, 4])]

    def call(x, t, *label):
        return model(x, t, *label).sample

    parts = split(call, [model], conditions, (1, 8, 8))
    x, timesteps = draw(2, 1, 8, 8), torch.tensor([900, 3])
    labels = [value[:2] for value in conditions]
    expected = call(x, timesteps[1].expand(2), *labels)
    torch.testing.assert_close(predict(parts, x, timesteps, 1, labels), expected, rtol=0, atol=3e-6)


# What must not leave the loop.


class Timed(torch.nn.Module):
    """A time embedding through a layer, then something done to it, then another layer."""

    def __init__(self, middle, zero=False):
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)
        self.norm = torch.nn.BatchNorm1d(6)
        if zero:
            torch.nn.init.zeros_(self.last.weight)
        self.middle = middle

    def forward(self, x, t):
        frequencies = t[:, None].to(x.dtype) / torch.tensor([10.0, 30.0, 100.0, 300.0])
        return x + self.last(self.middle(self, self.first(frequencies.sin()), x))[:, :, None, None]


PLANTED = {
    "reads the state": lambda model, h, x: h + x.mean(),
    "reads a size of the state": lambda model, h, x: h * x.shape[2],
    "of the row before": lambda model, h, x: h.roll(1, 0),
    "of all rows": lambda model, h, x: h.softmax(0),
    "of the first row": lambda model, h, x: h + h[:1],
    "rows in other order": lambda model, h, x: h.flip(0),
    "of the rows before": lambda model, h, x: h.cumsum(0),
    "by a row's number": lambda model, h, x: h * torch.arange(h.shape[0], device=h.device)[:, None],
    "random": lambda model, h, x: torch.nn.functional.dropout(h, 0.5, training=True),
}


@pytest.mark.parametrize("zero", [False, True], ids=["", "before zeros"])
@pytest.mark.parametrize("name", PLANTED)
def test_what_is_not_a_steps_alone_stays_in_the_loop(name, zero):
    model = Timed(PLANTED[name], zero).eval().requires_grad_(False)
    parts = split(model, [model], shape=(3, 8, 8), resized=name == "reads a size of the state")
    # All that is before it may leave.
    assert parts is None or parts.steps_width == 6
    if parts is not None and name != "random":
        x, timesteps = draw(ROWS, 3, 8, 8), torch.tensor([900, 3])
        got = predict(parts, x, timesteps, 1)
        torch.testing.assert_close(got, model(x, timesteps[1].expand(ROWS)), rtol=0, atol=1e-6)


def test_a_model_that_changes_its_buffers_is_refused():
    model = Timed(lambda model, h, x: model.norm(h)).train().requires_grad_(False)
    with pytest.raises(ExportError, match=r"Model changes '.*running_mean' in each call"):
        split(model, [model])


def test_in_place_operations_of_a_model_are_no_obstacle():
    model = Timed(lambda model, h, x: h.clone().mul_(2).add_(1)).eval().requires_grad_(False)
    parts, x = split(model, [model]), draw(ROWS, *SHAPE)
    assert parts.steps_width == 3
    expected = model(x, torch.tensor([3]).expand(ROWS))
    torch.testing.assert_close(predict(parts, x, torch.tensor([900, 3]), 1), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_past_a_limit_values_stay_in_the_loop():
    torch.manual_seed(0)
    model, shape, conditions, call = text()
    model.eval().requires_grad_(False)
    sizes, last = [], 1 << 20
    while last:
        parts = split(call, [model], conditions, shape, limit=last, steps=4)
        if parts is None:
            break
        before = parts.prepare(torch.arange(4), conditions)
        assert before.nbytes <= last
        sizes.append(before.nbytes)
        x = draw(ROWS, *shape)
        expected = call(x, torch.tensor([2]).expand(ROWS), *conditions)
        torch.testing.assert_close(predict(parts, x, torch.arange(4), 2, conditions), expected, rtol=0, atol=2e-6)
        last = before.nbytes // 3
    assert len(sizes) > 1 and sizes == sorted(sizes, reverse=True)


# In `Sampler`.


@pytest.fixture
def traces(monkeypatch):
    """Each trace's arguments."""
    from fastddim import model_call

    seen = []

    def counting(*args, **kwargs):
        seen.append(kwargs)
        return split_model(*args, **kwargs)

    monkeypatch.setattr(model_call, "split_model", counting)
    return seen


def added(batch):
    return {"added": {"text": {"embeds": draw(batch, 4)}}}


def test_one_trace_serves_every_batch_and_run(traces):
    model = Denoiser()
    hoisted, plain = (make(model, hoist=on, guidance_scale=3.0, graph="step") for on in (True, False))
    for batch, steps in ((3, 6), (1, 6), (4, 9)):
        got, expected = (
            sampler.replace(num_inference_steps=steps)(batch, seeds=5, **labels(batch), **added(batch))
            for sampler in (hoisted, plain)
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert len(traces) == 1 and traces[0]["kind"] == "Denoiser"
    # Another kind of call is another trace.
    hoisted(2, seeds=0, **labels(2))
    assert len(traces) == 2


@pytest.mark.parametrize("graph", ["off", "step"])
def test_weights_that_change_are_seen(traces, graph):
    model = Denoiser()
    hoisted, plain = (make(model, hoist=on, graph=graph) for on in (True, False))

    def check(count):
        for _ in range(3):
            got, expected = (sampler(2, seeds=1, class_labels=torch.tensor([1, 2])) for sampler in (hoisted, plain))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert len(traces) == count

    check(1)
    with torch.no_grad():
        model.embedding.weight.mul_(-1)
    check(1)
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
    check(1)
    model.embedding = torch.nn.Embedding(5, 3)
    check(2)
    model.embedding.weight = torch.nn.Parameter(torch.ones(5, 3))
    check(3)


def test_hooks_and_a_patched_forward_are_seen(traces):
    model = Denoiser()
    hoisted, plain = (make(model, hoist=on) for on in (True, False))
    own = model.forward

    def same():
        torch.testing.assert_close(hoisted(2, seeds=0), plain(2, seeds=0), rtol=0, atol=1e-5)
        return plain(2, seeds=0)

    before = same()
    hook = model.register_forward_hook(lambda module, inputs, output: output * 0.5)
    hooked = same()
    hook.remove()
    model.forward = lambda *args, **kwargs: own(*args, **kwargs) + 0.1
    patched = same()
    del model.forward
    assert torch.equal(same(), before)
    assert not torch.equal(hooked, before) and not torch.equal(patched, before) and len(traces) == 4


def test_an_interrupted_run_leaves_the_next_one_right():
    hoisted, plain = (make(Denoiser(), hoist=on) for on in (True, False))

    def stop(step, t, x, x0):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hoisted(2, seeds=0, callback=stop)
    torch.testing.assert_close(hoisted(2, seeds=1), plain(2, seeds=1), rtol=0, atol=1e-5)


def test_the_memory_is_told_and_copies_hoist_too(traces):
    sampler = make(Denoiser(), hoist=True)
    # One float32 cosine for each of six steps.
    assert sampler.warmup(2).hoisted_bytes == 24
    assert make(Denoiser()).warmup(2).hoisted_bytes == 0
    again = pickle.loads(pickle.dumps(sampler))
    torch.testing.assert_close(again(2, seeds=0), sampler(2, seeds=0))
    assert again.hoist and again.warmup(2).hoisted_bytes == 24 and len(traces) == 2


def test_the_first_call_may_be_in_inference_mode(traces):
    hoisted, plain = (make(Denoiser(), hoist=on, guidance_scale=2.0) for on in (True, False))
    with torch.inference_mode():
        first = hoisted(2, seeds=0, **labels(2), **added(2))
    got, expected = (sampler(2, seeds=0, **labels(2), **added(2)) for sampler in (hoisted, plain))
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert len(traces) == 1


def test_the_part_in_the_loop_may_be_compiled():
    hoisted, plain = (make(Denoiser(), hoist=on, compile=on) for on in (True, False))
    got, expected = (sampler(2, seeds=0, class_labels=torch.tensor([1, 2])) for sampler in (hoisted, plain))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert hoisted.warmup(2, class_labels=torch.tensor([1, 2])).hoisted_bytes > 0


def test_a_function_of_several_modules():
    first, second = Denoiser(), Denoiser()

    def both(x, t, class_labels):
        return first(x, t, class_labels) - 0.5 * second(x, t)

    got, expected = (
        Sampler(both, DDIMConfig(), 4, sample_shape=SHAPE, hoist=on)(2, seeds=0, class_labels=torch.tensor([1, 2]))
        for on in (True, False)
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


class Untraceable(Denoiser):
    def forward(self, x, t, **kwargs):
        if float(x.mean()) > 1e9:
            x = -x
        return super().forward(x, t, **kwargs)


def test_a_model_that_cannot_be_traced_runs_whole_with_one_warning():
    sampler = make(Untraceable(), hoist=True)
    with pytest.warns(RuntimeWarning, match="hoist: model: Untraceable cannot be exported") as caught:
        got = sampler(2, seeds=0)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(3, seeds=0, class_labels=torch.tensor([1, 2, 3]))
    assert torch.equal(got, make(Denoiser())(2, seeds=0))


def test_bad_options():
    with pytest.raises(ValueError, match="hoist_limit: -1"):
        make(Denoiser(), hoist_limit=-1)
    with pytest.raises(ValueError, match="hoist: True for a model that is compiled already; pass compile=True"):
        make(torch.compile(Denoiser()), hoist=True)


def test_arguments_that_cannot_be_told_from_others_are_not_hoisted():
    hoister = Hoister(Denoiser())
    with pytest.warns(RuntimeWarning, match="hoist: .*unhashable"):
        assert hoister.find(draw(2, *SHAPE), torch.zeros(2), {"added": object.__new__(Unhashable)}, steps=2) is None


class Unhashable:
    __hash__ = None


# In files.


def graph_of(folder):
    """Operators outside the loop, and in it."""
    graph = onnx.load(folder / "model.onnx").graph
    (loop,) = [node for node in graph.node if node.op_type == "Loop"]
    (body,) = [attribute.g for attribute in loop.attribute if attribute.name == "body"]
    return [node.op_type for node in graph.node], [node.op_type for node in body.node]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"guided": True}, marks=pytest.mark.slow),
        pytest.param({"bake_schedule": True, "per_sample_steps": True, "guided": True}, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_an_onnx_loop_computes_its_embeddings_before_the_steps(tmp_path, options):
    torch.manual_seed(0)
    model = text_unet().eval()
    model.conv_out.weight.data.mul_(0.1)
    bundle = export_onnx(model, DDIMConfig(), tmp_path / "hoisted", ExportOptions(**options), parity_steps=(4,))
    outside, inside = graph_of(bundle.path)
    assert "Sin" in outside and "Sin" not in inside


def test_a_file_may_compute_all_of_it_in_each_step(tmp_path):
    model = small_unet(num_class_embeds=5).eval()
    options = ExportOptions(hoist=False)
    bundle = export_onnx(model, DDIMConfig(), tmp_path / "whole", options, parity_steps=(2,))
    outside, inside = graph_of(bundle.path)
    assert "Sin" not in outside and "Sin" in inside
