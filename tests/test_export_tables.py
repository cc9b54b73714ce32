"""Bundles made from a `StepTable`, against a plain float64 loop; and the formats that today's readers take."""

import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from damage import edit, put
from fastddim import Clip, DDIMConfig, DynamicThreshold, StepTable
from fastddim.export import BundleError, ExportOptions, OrtSampler, ParityError, export_onnx, open_bundle, verify_bundle
from fastddim.noise import STREAM_INITIAL, normal_numpy
from flow import SHAPE, START_SCALE, TIMESTEPS, Wave, flow_table, plain_loop

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

BUNDLES = Path(__file__).parent / "bundles"
SEEDS = [5, 2**63, 7]
START = START_SCALE * normal_numpy(SEEDS, 0, SHAPE, STREAM_INITIAL)


def export_flow(folder, table=None, limit=None, **options):
    table = flow_table() if table is None else table
    return export_onnx(Wave(), table, folder, ExportOptions(**options), limit=limit, sample_shape=SHAPE)


def input_dtypes(bundle):
    return {item["name"]: item["dtype"] for item in bundle.manifest["inputs"]}


@pytest.fixture(scope="module", params=["loop", "step"])
def flow(request, tmp_path_factory):
    return export_flow(tmp_path_factory.mktemp("flow") / "bundle", kind=request.param)


def test_the_model_is_called_with_the_tables_own_numbers(flow):
    expected = plain_loop(Wave(), START)
    np.testing.assert_allclose(OrtSampler(flow)(3, seeds=SEEDS), expected, atol=1e-5)
    np.testing.assert_allclose(OrtSampler(flow)(START.astype(np.float32)), expected, atol=1e-5)
    # What integers would make of it.
    cut = plain_loop(Wave(), START, [int(t) for t in TIMESTEPS])
    assert np.abs(cut - expected).max() > 0.03
    name = "timesteps" if flow.kind == "loop" else "timestep"
    assert input_dtypes(flow)[name] == "float32"


def test_a_bundle_says_which_table_it_was_made_from(flow):
    assert flow.manifest["schedule"] is None and flow.scheduling is None and flow.limit is None
    assert flow.manifest["runtime"] == "onnx"
    table = flow.table
    assert table == flow_table() and np.array_equal(table.columns, flow_table().columns)
    assert table.timesteps == TIMESTEPS and table.noising == flow_table().noising
    # As many steps as the table has, where more are asked for.
    assert [entry["steps"] for entry in flow.manifest["parity"]] == [1, 3, 1, 3]
    assert "standard normal noise times 1.7" in (flow.path / "README.md").read_text()


def test_a_bundle_of_a_table_is_compared_again(flow):
    assert [entry["steps"] for entry in verify_bundle(flow, Wave(), steps=(2,))] == [2, 2]
    model = Wave()
    with torch.no_grad():
        model.conv.weight.mul_(1.01)
    with pytest.raises(ParityError):
        verify_bundle(flow, model, steps=(2,))


def threshold(x0):
    """Imagen's dynamic thresholding (arXiv:2205.11487, section 2.3): the 0.9 quantile, at most 1.5."""
    bound = torch.quantile(x0.abs().flatten(1), 0.9, dim=1).clamp(1, 1.5)[:, None, None, None]
    return x0.clamp(-bound, bound) / bound


@pytest.mark.parametrize("graph", ["loop", "step"])
@pytest.mark.parametrize(
    ("limit", "expected"),
    [(Clip(0.8), lambda x0: x0.clamp(-0.8, 0.8)), (DynamicThreshold(0.9, 1.5), threshold)],
    ids=["clip", "threshold"],
)
def test_the_limit_comes_with_the_table(tmp_path, graph, limit, expected):
    bundle = export_flow(tmp_path / "bundle", limit=limit, kind=graph)
    assert bundle.limit == limit
    np.testing.assert_allclose(OrtSampler(bundle)(3, seeds=SEEDS), plain_loop(Wave(), START, limit=expected), atol=1e-5)


@pytest.mark.parametrize("graph", ["loop", "step"])
@pytest.mark.parametrize("timesteps", [(-3, 5, 5), (1, 40, 900), (-0.25, -0.25, 1.5)], ids=str)
def test_timesteps_of_any_sign_and_order_are_what_the_model_gets(tmp_path, graph, timesteps):
    bundle = export_flow(tmp_path / "bundle", flow_table(timesteps), kind=graph)
    assert bundle.table.timesteps == timesteps
    assert isinstance(timesteps[0], float) == (
        "float32" in [input_dtypes(bundle).get(n) for n in ("timesteps", "timestep")]
    )
    expected = plain_loop(Wave(), START, timesteps)
    np.testing.assert_allclose(OrtSampler(bundle)(3, seeds=SEEDS), expected, atol=1e-5)


@pytest.mark.parametrize("graph", ["loop", "step"])
def test_a_table_that_adds_noise(tmp_path, graph):
    bundle = export_flow(tmp_path / "bundle", flow_table(noise=0.3), kind=graph, stochastic=True)
    noise = [0.3 * normal_numpy(SEEDS, step, SHAPE) for step in range(3)]
    np.testing.assert_allclose(OrtSampler(bundle)(3, seeds=SEEDS), plain_loop(Wave(), START, noise=noise), atol=1e-5)


def test_a_seeded_file_scales_the_start_that_it_draws(tmp_path):
    bundle = export_flow(tmp_path / "bundle", flow_table(noise=0.3), seeded=True, stochastic=True)
    assert sorted(input_dtypes(bundle)) == ["coefficients", "seed", "timesteps"]
    noise = [0.3 * normal_numpy(SEEDS, step, SHAPE) for step in range(3)]
    np.testing.assert_allclose(OrtSampler(bundle)(3, seeds=SEEDS), plain_loop(Wave(), START, noise=noise), atol=1e-5)


@pytest.mark.parametrize("graph", ["loop", "step"])
def test_a_half_precision_model_gets_timesteps_in_float32(tmp_path, graph):
    bundle = export_flow(tmp_path / "bundle", kind=graph, dtype="float16")
    weights = {tensor.data_type for tensor in onnx.load(bundle.model_path).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in weights or graph == "loop"
    # float16 has no number between 987.5 and 988.
    np.testing.assert_allclose(OrtSampler(bundle)(3, seeds=SEEDS), plain_loop(Wave(), START), atol=5e-3)


NOT_FOR_TABLES = {
    "num_inference_steps: 20 with a StepTable, which has its steps already; leave it out": {"num_inference_steps": 20},
    "eta: 0.5 with a StepTable": {"eta": 0.5, "stochastic": True},
    "bake_schedule: True with a StepTable": {"bake_schedule": True},
    "per_sample_steps: True with a StepTable|bake_schedule: True with a StepTable": {
        "bake_schedule": True, "per_sample_steps": True,
    },
    "use_clipped_model_output: False with a StepTable": {"use_clipped_model_output": False},
}  # fmt: skip


@pytest.mark.parametrize("message", NOT_FOR_TABLES)
def test_options_that_need_a_schedule_are_named(tmp_path, message):
    with pytest.raises(ValueError, match=message):
        export_flow(tmp_path / "bundle", **NOT_FOR_TABLES[message])
    assert list(tmp_path.iterdir()) == []


def test_what_a_table_or_a_scheduler_does_not_take_is_named(tmp_path):
    with pytest.raises(ValueError, match="stochastic: False, but the table adds noise; pass stochastic=True"):
        export_flow(tmp_path / "bundle", flow_table(noise=0.1))
    with pytest.raises(ValueError, match=r"limit: Clip\(range=1.0\), but a scheduler's configuration has its own"):
        export_flow(tmp_path / "bundle", DDIMConfig(), Clip())
    with pytest.raises(TypeError, match=r"scheduler_or_table: str; pass a fastddim Schedule.* or a StepTable"):
        export_flow(tmp_path / "bundle", "ddim")
    infinite = np.zeros((2, 6))
    infinite[1, 3] = math.inf
    with pytest.raises(ValueError, match=r"scheduler_or_table: row 1 has next_from_output inf.*; leave out timestep 5"):
        export_flow(tmp_path / "bundle", StepTable.from_columns([9, 5], infinite))
    assert list(tmp_path.iterdir()) == []


def test_calls_that_need_a_schedule_are_named(flow):
    sampler = OrtSampler(flow)
    for name, value in {"num_inference_steps": 3, "timesteps": [5, 3], "eta": 0.0}.items():
        with pytest.raises(ValueError, match=rf"{name}: .*, but this bundle was made from a table and has no schedule"):
            sampler(1, seeds=0, **{name: value})


BAD_TABLES = {
    r"table: timesteps: row 1 is nan; pass finite numbers; export it again": put(math.nan, "table", "timesteps", 1),
    r"table: timesteps: row 2 is inf": put(math.inf, "table", "timesteps", 2),
    r"\$\.table\.timesteps\[0\]: '7' is not of type 'number'": put("7", "table", "timesteps", 0),
    r"\$\.table\.start_scale: 0 is less than or equal to the minimum": put(0, "table", "start_scale"),
    r"table: start_scale: inf; pass a finite number > 0": put(math.inf, "table", "start_scale"),
    r"table: columns: shape \(2, 6\); pass \(3, 6 or 7\)": put([[0] * 6] * 2, "table", "coefficients"),
    r"\$\.table\.coefficients\[1\]": put([0] * 5, "table", "coefficients", 1),
    r"\$\.table: 'noising' is a required property": put(None, "table", "noising"),
    r"table: noising: \[nan, 1\]; pass two finite numbers": put([math.nan, 1], "table", "noising"),
    r"\$\.sampling\.limit": put({"kind": "clip"}, "sampling", "limit"),
    r"limit: clip_sample_range: -1; pass a finite number > 0": put({"kind": "clip", "range": -1}, "sampling", "limit"),
}


@pytest.mark.parametrize("message", BAD_TABLES)
def test_a_manifest_whose_table_cannot_be_run_is_refused(flow, tmp_path, message):
    folder = shutil.copytree(flow.path, tmp_path / "bundle")
    BAD_TABLES[message](folder)
    with pytest.raises(BundleError, match=message):
        open_bundle(folder)


def test_timesteps_of_another_dtype_than_the_graphs_are_refused(flow, tmp_path):
    folder = shutil.copytree(flow.path, tmp_path / "bundle")
    edit(
        folder,
        lambda manifest: [item.update(dtype="int64") for item in manifest["inputs"] if "timestep" in item["name"]],
    )
    with pytest.raises(BundleError, match="table: timesteps: float32, but the graph takes int64"):
        open_bundle(folder)


# Written by the commit before format 2 (4c3cba4), with what its OrtSampler made of them.
RUNS = {
    "loop": {"guidance_scale": 2.0},
    "step": {},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_bundle_of_the_first_format_runs_as_it_did(kind):
    bundle = open_bundle(BUNDLES / f"{kind}-1")
    assert (bundle.kind, bundle.runtime, bundle.manifest["format_version"]) == (kind, "onnx", 3)
    assert bundle.table.start_scale == 1 and bundle.table.noising is None
    assert bundle.limit == (Clip(1.0) if kind == "loop" else DynamicThreshold(0.995, 1.5))
    expected = np.load(BUNDLES / "expected-1.npz")
    for name, steps in (("own", None), ("5", 5)):
        samples = OrtSampler(bundle)(2, seeds=7, num_inference_steps=steps, class_labels=np.array([3, 1]), **RUNS[kind])
        np.testing.assert_allclose(samples, expected[f"{kind} {name}"], atol=1e-5)


def test_a_damaged_bundle_of_the_first_format_is_named(tmp_path):
    for message, damage in {
        r"\$\.kind: None is not": put(None, "graph"),
        "schedule: beta_start, beta_end: 0.0001, 2; pass": put(2, "schedule", "beta_end"),
        r"\$: 'schedule' is a required property": put(None, "schedule"),
        r"\$\.table: 'timesteps' is a required property": put(None, "table", "timesteps"),
        r"\$\.table: 7 is not of type 'object'": put(7, "table"),
    }.items():
        folder = shutil.copytree(BUNDLES / "loop-1", tmp_path / "bundle", dirs_exist_ok=True)
        damage(folder)
        with pytest.raises(BundleError, match=message):
            open_bundle(folder)
