"""Files of one step whose second graph computes, once for a run, what no step changes: against files of whole steps."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch

from damage import put
from fastddim import DDIMConfig
from fastddim.export import (
    BundleError,
    ExportOptions,
    InferenceServerOptions,
    OrtSampler,
    ParityError,
    TensorRTOptions,
    export_aoti,
    export_onnx,
    export_tensorrt,
    open_bundle,
    verify_bundle,
    write_repository,
)
from fastddim.export.run_values import RunValues

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SHAPE, TOKENS, WIDTH = (6, 4), 5, 8


class Conditioned(torch.nn.Module):
    """Attention to a text, scaled by a label and the timestep: values of steps, of both, and kept ones."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.time, self.label = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Embedding(4, WIDTH)
        self.scale = torch.nn.Linear(WIDTH, 4)
        self.keys, self.values = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
        self.out = torch.nn.Linear(4, 4)

    def forward(self, x, t, label, text):
        dtype = self.out.weight.dtype
        angles = t.float()[:, None] * torch.exp(-torch.arange(WIDTH // 2))
        time = torch.nn.functional.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1).to(dtype)))
        scale = self.scale(time + self.label(label))
        keys, values = self.keys(text.to(dtype)), self.values(text.to(dtype))
        x = x + time[:, None, :4]
        return torch.tanh(self.out((x @ keys.mT).softmax(-1) @ values + x * scale[:, None]))


def conditions(batch, seed=0):
    draw = np.random.default_rng(seed)
    text = draw.standard_normal((batch, TOKENS, 3)).astype(np.float32)
    return {"label": draw.integers(0, 4, batch), "text": text}


def export(folder, model=None, config=None, **options):
    config = config or DDIMConfig(clip_sample=False)
    examples = {name: torch.from_numpy(value) for name, value in conditions(2).items()}
    chosen = ExportOptions(**{"kind": "step", "num_inference_steps": 6, **options})
    return export_onnx(
        model or Conditioned(), config, folder, chosen, sample_shape=SHAPE, example_kwargs=examples, parity_steps=(3,)
    )


KINDS = {
    "plain": {},
    "guided": {"guided": True, "guidance_rescale": True, "stochastic": True, "eta": 0.6},
    "second order": {"method": "dpmsolver++", "guided": True},
    "half": {"dtype": "float16"},
}
# Each is exported twice, which takes long.
SAMPLED = [kind if kind == "plain" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The sampler of a whole step and of one in two graphs, by the name of the options."""
    made = {}

    def load(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("files")
            bundles = [export(folder / f"{hoist}", hoist=hoist, **KINDS[kind]) for hoist in (None, True)]
            made[kind] = [OrtSampler(bundle, providers="cpu") for bundle in bundles]
        return made[kind]

    return load


def arguments(sampler, batch, seed=0):
    given = conditions(batch, seed)
    if sampler.bundle.manifest["sampling"]["guided"]:
        given |= {"guidance_scale": np.linspace(1, 3, batch), "uncond_kwargs": conditions(batch, seed + 100)}
    if sampler.bundle.manifest["sampling"]["guidance_rescale"]:
        given["guidance_rescale"] = 0.4
    return given


def assert_close(actual, expected, ulps=2.0):
    """Equal to two last places of the largest value: a product of many rows may sum in another order than one of few."""
    assert actual.shape == expected.shape and np.isfinite(expected).all()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ulps * np.spacing(np.abs(expected).max()))


@pytest.mark.parametrize("kind", SAMPLED)
def test_a_step_in_two_graphs_is_the_whole_step(exported, kind):
    whole, parted = exported(kind)
    assert whole.bundle.before is None and parted.bundle.before is not None
    bundle = parted.bundle
    operators = {node.op_type for node in onnx.load(bundle.model_path).graph.node}
    assert "Sin" not in operators and "Sin" in {node.op_type for node in onnx.load(bundle.before_path).graph.node}
    copies, names = (2, ["uncond_label", "uncond_text"]) if "guided" in KINDS[kind] else (1, [])
    assert {item["name"] for item in bundle.before["inputs"]} == {"timesteps", "label", "text", *names}
    shapes = {item["name"]: item["shape"] for item in bundle.before["outputs"]}
    assert shapes["step_values"][:1] == ["steps"] and shapes["both_values"][:3] == ["steps", copies, "batch"]
    assert shapes["kept_0"][:2] == [copies, "batch"]
    assert set(shapes) <= set(bundle.names("inputs")) and "text" not in bundle.names("inputs")
    half = bundle.manifest["sampling"]["dtype"] == "float16"
    for batch, steps in ((1, 1), (3, 5), (5, 20)):
        runs = [s(batch, seeds=7, num_inference_steps=steps, **arguments(s, batch)) for s in (whole, parted)]
        # A run hands a last place on from step to step; a half rounds to 2 ** 13 times as much.
        assert_close(runs[1], runs[0], ulps=2.0 * steps * (2**13 if half else 1))


def inputs_of(sampler, batch, steps, seed):
    """A run of a batch, and the inputs of its step k for some samples, as a list of dictionaries."""
    call = sampler.prepare(batch, seeds=seed, num_inference_steps=steps, **arguments(sampler, batch, seed))
    table = call.table
    values = RunValues({}, ()) if sampler.bundle.before is None else sampler.compute_values(table, call.feeds)

    def take(step, sample):
        given = {
            "sample": call.sample[[sample]],
            "timestep": np.array([table.timesteps[step]]),
            "coefficients": table.columns[[step]].astype(np.float32),
            "previous_x0": call.sample[[sample]] / 2,
            "noise": call.sample[[sample]][:, ::-1],
            **{name: value[[sample]] for name, value in call.feeds.items()},
            **values.of_samples([sample]),
            **values.of_steps([step], [sample]),
        }
        return {name: given[name] for name in sampler.bundle.names("inputs")}

    return take


def joined(sampler, parts):
    """One batch of several samples' inputs."""
    axes = {item["name"]: item["shape"].index("batch") for item in sampler.bundle.manifest["inputs"]}
    return {name: np.concatenate([part[name] for part in parts], axis) for name, axis in axes.items()}


@pytest.mark.parametrize("kind", SAMPLED)
def test_a_step_takes_samples_of_several_runs_each_at_a_step_of_its_own(exported, kind):
    results = []
    for sampler in exported(kind):
        first, second = inputs_of(sampler, 3, 6, seed=1), inputs_of(sampler, 2, 17, seed=2)
        parts = [first(5, 0), second(0, 1), first(1, 2), second(16, 1)]
        results.append(sampler.step(joined(sampler, parts)))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, 2**14 if kind == "half" else 2.0)


def test_rows_are_those_of_each_sample_and_step():
    draw = np.random.default_rng(0)
    shapes = {"a": ["steps", 3], "b": ["steps", 2, "batch", 4], "c": [2, "batch", 5], "d": [7]}
    described = [{"name": name, "shape": shape} for name, shape in shapes.items()]
    sizes = {"steps": 6, "batch": 4}
    values = {name: draw.random([sizes.get(dim, dim) for dim in shape]) for name, shape in shapes.items()}
    run = RunValues(values, described)
    assert run.nbytes == sum(value.nbytes for value in values.values())
    steps, samples = [5, 0, 5], [3, 1, 0]
    rows, kept = run.of_steps(steps, samples), run.of_samples(samples)
    assert rows["a"].shape == (3, 3) and rows["b"].shape == (2, 3, 4) and kept["c"].shape == (2, 3, 5)
    for k, (step, sample) in enumerate(zip(steps, samples, strict=True)):
        np.testing.assert_array_equal(rows["a"][k], values["a"][step])
        np.testing.assert_array_equal(rows["b"][:, k], values["b"][step, :, sample])
        np.testing.assert_array_equal(kept["c"][:, k], values["c"][:, sample])
    np.testing.assert_array_equal(run.of_steps([2] * 4)["b"], values["b"][2])
    assert run.of_samples()["c"] is values["c"] and kept["d"] is values["d"]
    for bad in (lambda: run.of_steps([6]), lambda: run.of_steps([0], [4]), lambda: run.of_samples([4])):
        with pytest.raises(IndexError):
            bad()


def test_steps_are_whole_unless_asked():
    assert not ExportOptions(kind="step").hoisted and ExportOptions(kind="step", hoist=True).hoisted


def test_a_model_of_which_nothing_can_leave_has_one_graph(tmp_path):
    class Plain(torch.nn.Module):
        def forward(self, x, t):
            return torch.tanh(x * t[:, None, None] / 1000)

    options = ExportOptions(kind="step", hoist=True)
    bundle = export_onnx(Plain(), DDIMConfig(), tmp_path / "one", options, sample_shape=SHAPE, parity_steps=(2,))
    assert bundle.before is None and not (bundle.path / "before.onnx").exists()


def test_parity_sees_another_models_values(exported, tmp_path):
    _, parted = exported("plain")
    examples = {name: torch.from_numpy(value) for name, value in conditions(2).items()}
    assert verify_bundle(parted.bundle, Conditioned(), example_kwargs=examples, steps=(2,))
    other = export(tmp_path / "other", Conditioned(seed=1), hoist=True)
    shutil.copytree(parted.bundle.path, tmp_path / "mixed")
    shutil.copyfile(other.before_path, tmp_path / "mixed" / "before.onnx")
    with pytest.raises(BundleError, match=r"before.onnx' is not the file that was exported|before.onnx' has"):
        open_bundle(tmp_path / "mixed")
    mixed = open_bundle(tmp_path / "mixed", check_hashes=False)
    with pytest.raises(ParityError, match="differs from torch"):
        verify_bundle(mixed, Conditioned(), example_kwargs=examples, steps=(2,))


@pytest.mark.parametrize("method", ["of_steps", "of_samples"])
def test_parity_sees_rows_that_are_another_samples(exported, monkeypatch, method):
    """Rows that are right as long as all samples are at the same step."""
    _, parted = exported("plain")
    real = getattr(RunValues, method)

    def wrong(self, *given):
        if method == "of_samples":
            return real(self, *(sorted(samples, reverse=True) for samples in given))
        steps, *samples = given
        return real(self, [steps[0]] * len(steps), *samples)

    monkeypatch.setattr(RunValues, method, wrong)
    examples = {name: torch.from_numpy(value) for name, value in conditions(2).items()}
    with pytest.raises(ParityError, match="after 4 steps of a batch of 3"):
        verify_bundle(parted.bundle, Conditioned(), example_kwargs=examples, steps=(4,))


def test_bad_calls_are_named(exported):
    whole, parted = exported("plain")
    for message, changed in {
        r"text: missing; pass an array \['batch', 5, 3\]": {"text": None},
        r"text: float32 of shape \(2, 5, 2\); pass float32 of shape \(2, 5, 3\)": {"text": np.zeros((2, 5, 2), "f")},
        "step_values: this bundle takes label, text": {"step_values": np.zeros((2, 8), "f")},
        "kept_0: this bundle takes label, text": {"kept_0": np.zeros((1, 2, 5, 4), "f")},
    }.items():
        given = {name: value for name, value in {**conditions(2), **changed}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            parted(2, seeds=0, **given)
    call = whole.prepare(2, seeds=0, **conditions(2))
    with pytest.raises(ValueError, match="compute_values: this bundle has no graph before its steps; export it with"):
        whole.compute_values(call.table, call.feeds)


def test_what_cannot_run_two_graphs_refuses_them_by_name(exported, tmp_path):
    with pytest.raises(ValueError, match=r"hoist: True with kind 'step' and dtype 'bfloat16', .*pass dtype='float16'"):
        ExportOptions(kind="step", hoist=True, dtype="bfloat16")
    options = ExportOptions(kind="step", hoist=True)
    with pytest.raises(ValueError, match="hoist: True with kind 'step', whose second graph is for ONNX files"):
        export_aoti(Conditioned(), DDIMConfig(), tmp_path / "aoti", options, sample_shape=SHAPE)
    folder = exported("plain")[1].bundle.path
    second = "has a second graph, 'before.onnx', .*; export it without hoist=True, or with kind='loop'"
    with pytest.raises(ValueError, match=f"bundle: '{folder}' {second}"):
        write_repository(folder, tmp_path / "models", InferenceServerOptions(max_batch_size=0))
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"source: '{folder}' {second}"):
        export_tensorrt(folder, tmp_path / "engine", TensorRTOptions(flavour="rtx"))


DAMAGE = {
    r"\$.before: 'outputs' is a required property": put(None, "before", "outputs"),
    r"\$.kind: 'step' was expected": put("loop", "kind"),
    "has no 'other.onnx'": put("other.onnx", "before", "model"),
    "has no 'more'": put("more", "before", "outputs", 0, "name"),
    "before.onnx' is missing": lambda folder: (folder / "before.onnx").unlink(),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_second_graph_is_named(exported, tmp_path, message):
    folder = shutil.copytree(exported("plain")[1].bundle.path, tmp_path / "damaged")
    DAMAGE[message](folder)
    with pytest.raises(BundleError, match=message):
        open_bundle(folder)


def test_the_note_tells_of_both_graphs(exported):
    folder = exported("plain")[1].bundle.path
    text = (folder / "README.md").read_text()
    assert "## Before the steps" in text and "`before.onnx`" in text and "`text`" in text
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {"model.onnx", "before.onnx"} <= set(files)
