"""Model repositories: their configurations against the server's own schema, and requests through a server that batches."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import shutil
import sys
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from PIL import Image

import fastddim
from damage import edit, flip_a_byte
from fastddim import DDIMConfig, Sampler
from fastddim.cli import main
from fastddim.export import (
    Bundle,
    ExportOptions,
    InferenceServerOptions,
    OrtSampler,
    export_onnx,
    write_repository,
)
from fastddim.export.inference_server import repository
from fastddim.export.onnx import exporter as onnx_exporter
from fastddim.export.onnx.graph import as_loop, symbolic_dims
from fastddim.export.onnx.noise_module import _split
from fastddim.export.schedule_module import ScheduleModule
from fastddim.noise import STREAM_INITIAL, STREAM_STEP, normal_numpy, split_bits
from fastddim.pictures import make_grid
from fastddim.schedule import Schedule
from flow import Wave, flow_table
from test_export import Tiny, class_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SHAPE = (2, 5, 3)
LABELS = torch.tensor([1, 4, 2])
SEEDS = [3, 2**64 - 1, 7]
CONFIG = DDIMConfig(timestep_spacing="trailing", prediction_type="v_prediction")


def export_tiny(folder, **options):
    return export_onnx(
        Tiny(), CONFIG, folder, ExportOptions(**options), sample_shape=SHAPE, example_kwargs={"labels": LABELS},
        parity_steps=(1, 4),
    )  # fmt: skip


PER_SAMPLE = {"guided": True, "bake_schedule": True, "per_sample_steps": True, "seeded": True}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A bundle whose inputs all have the batch first: seeds, steps, scales, labels; its table adds noise."""
    return export_tiny(tmp_path_factory.mktemp("served") / "tiny", **PER_SAMPLE, stochastic=True, eta=0.7)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A bundle that takes a table, which has no batch."""
    return export_tiny(tmp_path_factory.mktemp("plain") / "plain")


# What the graph does.


@pytest.mark.parametrize("stream", [STREAM_STEP, STREAM_INITIAL])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (4, 2)])
def test_a_graph_draws_the_bits_of_the_noise(stream, shape):
    graph = onnx_exporter._noise_graph(shape, "noise" if stream == STREAM_STEP else "sample", 20)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    seeds = [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 0xDEADBEEFCAFE]
    for step in (0, 1, 999) if stream == STREAM_STEP else (0,):
        feeds = {"seed": np.array(seeds, dtype=np.uint64).view(np.int64), "step_index": np.array(step)}
        (drawn,) = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
        np.testing.assert_array_equal(drawn.view(np.int32), normal_numpy(seeds, step, shape, stream).view(np.int32))


def test_comparisons_split_floats_as_their_bits_do():
    words = np.concatenate([[0, 1, 2**32 - 1], np.random.default_rng(0).integers(0, 2**32, 100_000)])
    u = words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    # The borders of mantissas, and their neighbours on both sides.
    borders = np.float32(np.sqrt(0.5)) * np.float32(2.0) ** -np.arange(33, dtype=np.float32)
    u = np.concatenate([u, borders, np.nextafter(borders, np.float32(0)), np.nextafter(borders, np.float32(1))])
    u = u[u >= np.float32(2.0**-33)]
    for ours, bits in zip(_split(torch, torch.from_numpy(u)), split_bits(np, u), strict=True):
        np.testing.assert_array_equal(ours.numpy(), bits)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_each_samples_table_is_the_schedules_own(spacing):
    config = DDIMConfig(timestep_spacing=spacing)
    schedule = Schedule(config)
    counts = [1, 2, 7, 30, 333, 1000, 61, 999]
    timesteps, coefficients, going = ScheduleModule(schedule, 0.3, True, True)(torch.tensor(counts))
    assert timesteps.shape == going.shape == (1000, len(counts)) and coefficients.shape == (1000, len(counts), 6)
    for k, count in enumerate(counts):
        assert going[:, k].tolist() == [True] * count + [False] * (1000 - count)
        pairs = schedule.pairs(count)
        assert timesteps[:count, k].tolist() == [t for t, _ in pairs]
        table = fastddim.StepTable.build(schedule, pairs, eta=0.3, use_clipped_model_output=True)
        np.testing.assert_allclose(coefficients[:count, k], table.columns, rtol=1e-6, atol=1e-7)
    assert np.isfinite(coefficients.numpy()).all() and timesteps.min() >= 0 and timesteps.max() < 1000


def test_step_counts_out_of_range_are_taken_as_the_nearest():
    """A client's 0 must not divide by zero, nor its billion take the server's memory."""
    for per_sample in (False, True):
        module = ScheduleModule(Schedule(CONFIG), 0.0, True, per_sample)
        for given, nearest in ((0, 1), (-5, 1), (10**9, 1000)):
            timesteps = module(torch.tensor([given] if per_sample else given))[0]
            assert timesteps.flatten().tolist() == [t for t, _ in Schedule(CONFIG).pairs(nearest)]


def run_served(bundle, seeds, steps, scales=(1.5, 3.0, 5.0)):
    uncond = {"labels": np.zeros(len(seeds), dtype=np.int64)}
    return OrtSampler(bundle)(
        len(seeds), seeds=seeds, num_inference_steps=steps, guidance_scale=np.array(scales), labels=LABELS.numpy(),
        uncond_kwargs=uncond,
    )  # fmt: skip


def sample_alone(seed, steps, label, scale, eta=0.7):
    sampler = Sampler(Tiny(), CONFIG, steps, sample_shape=SHAPE, guidance_scale=scale, eta=eta)
    uncond = {"labels": torch.zeros(1, dtype=torch.int64)}
    return sampler(1, seeds=[seed], labels=torch.tensor([label]), uncond_kwargs=uncond).numpy()[0]


@pytest.mark.parametrize("steps", [[5, 20, 50], [50, 5, 20], [1, 333, 1], [7, 7, 7]])
def test_a_batch_mixes_numbers_of_steps(served, steps):
    assert [item["shape"] for item in served.manifest["inputs"]] == [["batch"]] * 5
    together = run_served(served, SEEDS, steps)
    for k, (label, scale) in enumerate(zip(LABELS.tolist(), (1.5, 3.0, 5.0), strict=True)):
        alone = sample_alone(SEEDS[k], steps[k], label, scale)
        np.testing.assert_allclose(together[k], alone, atol=2e-5)


def test_finished_samples_stay_as_they_are_bit_for_bit(served):
    short, mixed = run_served(served, SEEDS, [5, 5, 5]), run_served(served, SEEDS, [5, 20, 50])
    np.testing.assert_array_equal(mixed[0].view(np.int32), short[0].view(np.int32))
    assert not np.array_equal(mixed[1], short[1])


def test_finished_samples_take_no_part_in_a_step():
    """A step that adds its number of samples, and the logarithm of their timesteps: infinite for one that is finished."""
    value = onnx.helper.make_tensor_value_info
    sample = ["batch", 2]
    step = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Cast", ["timestep"], ["t"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Log", ["t"], ["log_t"]),
            onnx.helper.make_node("Unsqueeze", ["log_t", "axis"], ["output"]),
            onnx.helper.make_node("ReduceSum", ["coefficients", "axis"], ["row"]),
            onnx.helper.make_node("Mul", ["output", "row"], ["change"]),
            onnx.helper.make_node("Shape", ["scale"], ["shape"]),
            onnx.helper.make_node("Cast", ["shape"], ["count"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Add", ["change", "count"], ["whole_change"]),
            onnx.helper.make_node("Add", ["sample", "whole_change"], ["next_sample"]),
        ],
        "step",
        [
            value("sample", onnx.TensorProto.FLOAT, sample),
            value("timestep", onnx.TensorProto.INT64, ["batch"]),
            value("coefficients", onnx.TensorProto.FLOAT, ["batch", 6]),
            value("scale", onnx.TensorProto.FLOAT, ["batch"]),
        ],
        [value("next_sample", onnx.TensorProto.FLOAT, sample)],
        initializer=[onnx.numpy_helper.from_array(np.array([1]), "axis")],
    )
    model = onnx.helper.make_model(step, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    loop = as_loop(model, per_sample=True)
    onnx.checker.check_model(loop, full_check=True)
    going = np.array([[True, True, True], [False, True, True], [False, True, False]])
    start = np.array([[3.0, 2.0], [5.0, 7.0], [1.0, -1.0]], dtype=np.float32)
    feeds = {
        "sample": start,
        "scale": np.ones(3, dtype=np.float32),
        "timesteps": np.where(going, 1, 0),
        "coefficients": np.ones((3, 3, 6), dtype=np.float32),
        "going": going,
    }
    (samples,) = onnxruntime.InferenceSession(loop.SerializeToString()).run(None, feeds)
    np.testing.assert_array_equal(samples, start + np.array([[3], [3 + 2 + 1], [3 + 2]], dtype=np.float32))


BAD_CALLS = {
    r"num_inference_steps: \[1, 2\]; pass an integer in \[1, 1000\], or one for each of 3": {"steps": [1, 2]},
    "num_inference_steps: 0": {"steps": 0},
    "num_inference_steps: 1001": {"steps": 1001},
    r"num_inference_steps: \[0.5, 1, 2\]": {"steps": [0.5, 1, 2]},
    "start: a state, but this bundle draws its own": {"start": np.zeros((3, *SHAPE), np.float32)},
    "seeds: None": {"seeds": None},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_are_named(served, message):
    given = {"start": 3, "seeds": SEEDS, "steps": 4, **BAD_CALLS[message]}
    with pytest.raises(ValueError, match=message):
        OrtSampler(served)(
            given["start"], seeds=given["seeds"], num_inference_steps=given["steps"], guidance_scale=1.0,
            labels=LABELS.numpy(), uncond_kwargs={"labels": LABELS.numpy()},
        )  # fmt: skip


def test_step_counts_of_samples_need_a_bundle_that_takes_them(plain):
    with pytest.raises(ValueError, match="export with per_sample_steps=True"):
        OrtSampler(plain)(3, seeds=0, num_inference_steps=[1, 2, 3], labels=LABELS.numpy())


BAD_EXPORTS = {
    "per_sample_steps: True without bake_schedule": {"per_sample_steps": True},
    "per_sample_steps: True with stochastic": {
        "per_sample_steps": True, "bake_schedule": True, "stochastic": True,
    },
    "seeded: True with kind 'step'": {"seeded": True, "kind": "step"},
    "seeded: True with dynamic_size": {"seeded": True, "dynamic_size": True},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_EXPORTS)
def test_export_options_that_exclude_each_other_are_named(message):
    with pytest.raises(ValueError, match=message):
        ExportOptions(**BAD_EXPORTS[message])


# What the server reads.


@pytest.fixture(scope="module")
def schema():
    """The server's protobuf messages, of its client's package."""
    folder = Path(importlib.util.find_spec("tritonclient").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("model_config_pb2", folder / "grpc" / "model_config_pb2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_config(schema, folder):
    return text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), schema.ModelConfig())


def data_type(schema, tensor):
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type))
    names = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "bool": "TYPE_BOOL", "float16": "TYPE_FP16"}
    return schema.DataType.Value(names[dtype])


def require_described(schema, folder):
    """Every input and output of the file is in the configuration, as the server asks of its backend."""
    config = read_config(schema, folder)
    graph = onnx.load(folder / "1" / "model.onnx", load_external_data=False).graph
    batched = config.max_batch_size > 0
    dims = symbolic_dims(graph)
    for described, values in ((config.input, graph.input), (config.output, graph.output)):
        assert [tensor.name for tensor in described] == [value.name for value in values]
        for tensor, value in zip(described, values, strict=True):
            assert tensor.data_type == data_type(schema, value)
            assert len(tensor.dims) >= 1
            shape = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
            assert np.prod(shape) == np.prod(list(tensor.dims)) or -1 in shape
            whole = [-1, *shape] if batched else shape
            assert whole == [dim if isinstance(dim, int) else -1 for dim in dims[value.name]]
            assert not batched or dims[value.name][0] == "batch"
    return config


def test_a_batching_model_is_described(served, schema, tmp_path):
    folder = write_repository(served, tmp_path / "models")
    assert folder == tmp_path / "models" / "tiny"
    assert sorted(os.listdir(folder)) == ["1", "README.md", "config.pbtxt"] and os.listdir(folder / "1") == [
        "model.onnx"
    ]
    assert (folder / "1" / "model.onnx").read_bytes() == served.model_path.read_bytes()
    config = require_described(schema, folder)
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 8)
    assert config.HasField("dynamic_batching") and config.version_policy.latest.num_versions == 1
    seed = config.input[0]
    # Requests have no empty shapes.
    assert seed.name == "seed" and list(seed.dims) == [1] and seed.HasField("reshape") and not seed.reshape.shape
    assert list(config.output[0].dims) == list(SHAPE) and not config.output[0].HasField("reshape")
    note = (folder / "README.md").read_text("utf-8")
    body = json.loads(note[note.index("-d '") + 4 : note.rindex("'")])
    assert [item["name"] for item in body["inputs"]] == [item.name for item in config.input]
    assert all(item["shape"] == [1, 1] and len(item["data"]) == 1 for item in body["inputs"])


def test_every_option_is_in_the_configuration(served, schema, tmp_path):
    options = InferenceServerOptions(
        name="all.of-it", max_batch_size=16, preferred_batch_sizes=(4, 16), max_queue_delay_microseconds=2000,
        queue_timeout_microseconds=500_000, timeout_action="delay", max_queue_size=64, instances=2, kind="gpu",
        gpus=(0, 2), warmup_batch_sizes=(1, 16), parameters={"intra_op_thread_count": "4"}, accelerator="tensorrt",
        accelerator_parameters={"precision_mode": "FP16", "trt_engine_cache_path": 'C:\\"ä"'}, versions=(1, 3),
    )  # fmt: skip
    config = require_described(schema, write_repository(served, tmp_path, options))
    assert config.name == "all.of-it" and config.max_batch_size == 16
    batching = config.dynamic_batching
    assert list(batching.preferred_batch_size) == [4, 16] and batching.max_queue_delay_microseconds == 2000
    policy = batching.default_queue_policy
    assert policy.timeout_action == schema.ModelQueuePolicy.DELAY
    assert (policy.default_timeout_microseconds, policy.max_queue_size) == (500_000, 64)
    (group,) = config.instance_group
    assert (group.count, group.kind, list(group.gpus)) == (2, schema.ModelInstanceGroup.KIND_GPU, [0, 2])
    assert config.parameters["intra_op_thread_count"].string_value == "4"
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert dict(accelerator.parameters) == {"precision_mode": "FP16", "trt_engine_cache_path": 'C:\\"ä"'}
    assert list(config.version_policy.specific.versions) == [1, 3]
    assert [sample.batch_size for sample in config.model_warmup] == [1, 16]
    for sample in config.model_warmup:
        assert sorted(sample.inputs) == sorted(tensor.name for tensor in config.input)
        for tensor in config.input:
            given = sample.inputs[tensor.name]
            assert given.zero_data and given.data_type == tensor.data_type and given.dims == tensor.dims


def test_accelerators_of_cpus_and_all_versions(served, schema, tmp_path):
    options = InferenceServerOptions(accelerator="openvino", kind="cpu", versions="all")
    config = read_config(schema, write_repository(served, tmp_path, options))
    (accelerator,) = config.optimization.execution_accelerators.cpu_execution_accelerator
    assert accelerator.name == "openvino" and config.version_policy.HasField("all")


def test_a_table_is_served_without_batching(plain, schema, tmp_path):
    with pytest.raises(ValueError, match=r"max_batch_size: 8, .*timesteps, coefficients is no batch; export with"):
        write_repository(plain, tmp_path / "models")
    assert os.listdir(tmp_path) == []
    options = InferenceServerOptions(max_batch_size=0, warmup_batch_sizes=(1,))
    config = require_described(schema, write_repository(plain, tmp_path / "models", options))
    assert not config.HasField("dynamic_batching")
    assert {tensor.name: list(tensor.dims) for tensor in config.input} == {
        "sample": [-1, *SHAPE], "labels": [-1], "timesteps": [-1], "coefficients": [-1, 6],
    }  # fmt: skip
    (warmup,) = config.model_warmup
    assert warmup.batch_size == 1 and list(warmup.inputs["coefficients"].dims) == [1, 6]


def edited(bundle, **changes):
    return Bundle(bundle.path, {**bundle.manifest, **changes})


def as_engine(bundle, *profiles, flavour="standard", strip_plan=False, **changes):
    """A bundle as if an engine were built of it."""
    engine = {"flavour": flavour, "options": {"strip_plan": strip_plan}, "profiles": profiles or [{"batch": [1, 4, 8]}]}
    return edited(bundle, runtime="tensorrt", engine=engine, **changes)


@pytest.mark.parametrize("graph", ["loop", "step"])
def test_a_tables_fractional_timesteps_are_floats_to_the_server(graph, schema, tmp_path):
    options = ExportOptions(kind=graph)
    bundle = export_onnx(Wave(), flow_table(), tmp_path / "flow", options, sample_shape=(2, 6, 6), parity_steps=())
    served = InferenceServerOptions(max_batch_size=4 if graph == "step" else 0, warmup_batch_sizes=(1,))
    config = require_described(schema, write_repository(bundle, tmp_path / "models", served))
    names = {tensor.name: schema.DataType.Name(tensor.data_type) for tensor in config.input}
    assert names["timesteps" if graph == "loop" else "timestep"] == "TYPE_FP32"


def test_engines_are_for_the_tensorrt_backend(served, plain, schema, tmp_path):
    engine = as_engine(served, {"batch": [1, 1, 1]}, {"batch": [2, 4, 8]})
    folder = write_repository(engine, tmp_path, InferenceServerOptions(max_batch_size=4))
    config = read_config(schema, folder)
    assert config.backend == "tensorrt" and os.listdir(folder / "1") == ["model.plan"]
    # Otherwise the server would take the first alone.
    assert list(config.instance_group[0].profile) == ["0", "1"]
    scalar = {"name": "num_inference_steps", "dtype": "int64", "shape": [], "meaning": ""}
    baked = as_engine(plain, inputs=[*plain.manifest["inputs"], scalar])
    with pytest.raises(ValueError, match="'num_inference_steps' shapes an engine's loop"):
        write_repository(baked, tmp_path, InferenceServerOptions(max_batch_size=0))
    assert os.listdir(tmp_path) == ["tiny"]


def test_an_engines_warmup_fits_its_first_profile(plain, schema, tmp_path):
    engine = as_engine(plain, {"batch": [2, 2, 4], "steps": [5, 10, 20]})
    options = InferenceServerOptions(max_batch_size=0, warmup_batch_sizes=(1,))
    (warmup,) = read_config(schema, write_repository(engine, tmp_path, options)).model_warmup
    assert {name: list(tensor.dims) for name, tensor in warmup.inputs.items()} == {
        "sample": [2, *SHAPE], "labels": [2], "timesteps": [5], "coefficients": [5, 6],
    }  # fmt: skip


BAD_ENGINES = {
    "accelerator: are the ONNX Runtime backend's, and this bundle is tensorrt": ({}, {"accelerator": "cuda"}),
    r"flavour: 'rtx', but the server's backend loads .* \(--flavour standard\)": ({"flavour": "rtx"}, {}),
    "strip_plan: True, but the server has no weights": ({"strip_plan": True}, {}),
    "kind: 'cpu', but engines run on GPUs alone; pass 'gpu' or 'auto'": ({}, {"kind": "cpu"}),
    "max_batch_size: 9, but the engine takes batches of 1 to 8; pass at most that": ({}, {"max_batch_size": 9}),
}


@pytest.mark.parametrize("message", BAD_ENGINES)
def test_engines_that_the_server_would_not_load_are_named(served, tmp_path, message):
    engine, options = BAD_ENGINES[message]
    with pytest.raises(ValueError, match=message):
        write_repository(as_engine(served, **engine), tmp_path, InferenceServerOptions(**options))
    with pytest.raises(ValueError, match="takes batches of 2 to 8; pass at most that, or build one whose profiles"):
        write_repository(as_engine(served, {"batch": [2, 4, 8]}), tmp_path)
    assert os.listdir(tmp_path) == []


def test_bundles_that_the_server_cannot_run_are_named(served, tmp_path):
    component = {"model": "decoder.onnx", "inputs": [], "outputs": [], "meaning": ""}
    half = [{**item, "dtype": "bfloat16"} for item in served.manifest["inputs"]]
    for changes, message in (
        ({"runtime": "aoti"}, "is for 'aoti', which the server has no backend for; export it for onnx or tensorrt"),
        ({"components": {"vae_decoder": component}}, r"is a whole pipeline.*--sampler-only"),
        ({"inputs": half}, "'seed' is bfloat16, which the server does not have"),
    ):
        with pytest.raises(ValueError, match=message):
            write_repository(edited(served, **changes), tmp_path / "models")
    assert os.listdir(tmp_path) == []


BAD_OPTIONS = {
    "name: '../x'; pass letters": {"name": "../x"},
    "name: '.hidden'; pass letters": {"name": ".hidden"},
    "max_batch_size: -1; pass an integer >= 0": {"max_batch_size": -1},
    r"preferred_batch_sizes: 9; pass an integer in \[1, 8\]": {"preferred_batch_sizes": (4, 9)},
    r"warmup_batch_sizes: 2; pass an integer in \[1, 1\]": {"max_batch_size": 0, "warmup_batch_sizes": (2,)},
    "max_queue_size: 3 with max_batch_size 0": {"max_batch_size": 0, "max_queue_size": 3},
    "timeout_action: 'drop' is not one of": {"timeout_action": "drop"},
    "kind: 'tpu' is not one of": {"kind": "tpu"},
    "instances: 0; pass an integer >= 1": {"instances": 0},
    r"gpus: \(0,\) with kind 'auto'; pass kind='gpu'": {"gpus": (0,)},
    "parameters: 'threads' is not one of": {"parameters": {"threads": "1"}},
    "accelerator: 'xla' is not one of": {"accelerator": "xla"},
    "accelerator: 'openvino' with kind 'gpu'; pass kind='cpu'": {"accelerator": "openvino", "kind": "gpu"},
    "accelerator_parameters: without an accelerator": {"accelerator_parameters": {"precision_mode": "FP16"}},
    r"versions: \(2,\) without 1": {"versions": (2,)},
    "versions: 'some'; pass an integer, 'all', or": {"versions": "some"},
    "versions: 0; pass an integer >= 1": {"versions": 0},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options_are_named(message):
    with pytest.raises(ValueError, match=message):
        InferenceServerOptions(**BAD_OPTIONS[message])


def test_a_repository_holds_several_models(served, plain, tmp_path):
    models = tmp_path / "models"
    first = write_repository(served, models)
    before = {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()}
    write_repository(plain, models, InferenceServerOptions(max_batch_size=0))
    assert sorted(os.listdir(models)) == ["plain", "tiny"] and os.listdir(tmp_path) == ["models"]
    assert {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()} == before
    with pytest.raises(FileExistsError, match=r"out: .*tiny' exists; pass another name, or --force"):
        write_repository(served, models)
    (first / "2").mkdir()
    write_repository(served, models, InferenceServerOptions(max_batch_size=2), force=True)
    assert sorted(os.listdir(first)) == ["1", "README.md", "config.pbtxt"] and os.listdir(tmp_path) == ["models"]
    assert "max_batch_size: 2\n" in (first / "config.pbtxt").read_text()


def test_what_is_no_model_is_not_replaced(served, tmp_path):
    thesis = tmp_path / "models" / "tiny" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("mine")
    with pytest.raises(FileExistsError, match="is no model, so --force does not replace it"):
        write_repository(served, tmp_path / "models", force=True)
    assert thesis.read_text() == "mine"
    with pytest.raises(NotADirectoryError, match=r"out: .*none' is no folder"):
        write_repository(served, tmp_path / "none" / "models")
    with pytest.raises(NotADirectoryError, match=r"thesis\.txt"):
        write_repository(served, thesis)
    with pytest.raises(FileExistsError, match="is a bundle; pass another folder"):
        write_repository(served, served.path)
    assert not (served.path / "tiny").exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_crash_leaves_nothing_half_written(served, tmp_path, monkeypatch, there):
    models = tmp_path / "models"
    if there:
        models.mkdir()

    def fail(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository.shutil, "copyfile", fail)
    with pytest.raises(OSError, match="No space left"):
        write_repository(served, models)
    assert list(tmp_path.rglob("*")) == ([models] if there else [])


def test_weights_beside_the_graph_come_along(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_exporter, "_LARGEST_FILE", 1000)
    bundle = export_onnx(
        Tiny(channels=24), CONFIG, tmp_path / "large", ExportOptions(kind="step"), sample_shape=(24, 4, 4),
        example_kwargs={"labels": LABELS}, parity_steps=(1,),
    )  # fmt: skip
    folder = write_repository(bundle, tmp_path / "models", InferenceServerOptions(name="step"))
    shutil.rmtree(bundle.path)
    assert sorted(os.listdir(folder / "1")) == ["model.onnx", "model.onnx.data"]
    onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"))


# From request to picture.


class Server:
    """KServe's v2 protocol over a repository, with ONNX Runtime. Requests wait for each other, `joined` at a time.

    Attributes:
        address: host and port.
        batches: how many samples each run had.
    """

    def __init__(self, schema, repository, joined):
        self.batches = []
        self._joined = joined
        self._queue = queue.Queue()
        self._types = {value: name.removeprefix("TYPE_") for name, value in schema.DataType.items()}
        self._models = {}
        for folder in repository.iterdir():
            config = read_config(schema, folder)
            assert config.name == folder.name and config.backend == "onnxruntime"
            self._models[folder.name] = (config, onnxruntime.InferenceSession(str(folder / "1" / "model.onnx")))
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(lambda: (server.describe(self.path.split("/")[3]), None))

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                length = int(self.headers.get("Inference-Header-Content-Length", len(body)))
                self.answer(lambda: server.infer(self.path.split("/")[3], json.loads(body[:length]), body[length:]))

            def answer(self, work):
                try:
                    status, (header, raw) = 200, work()
                except Exception as error:
                    status, header, raw = 400, {"error": f"{type(error).__name__}: {error}"}, None
                text = json.dumps(header).encode()
                self.send_response(status)
                if raw is not None:
                    self.send_header("Inference-Header-Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text + (raw or b""))

            def log_message(self, *arguments):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._http.server_port}"
        for target in (self._http.serve_forever, self._batch):
            threading.Thread(target=target, daemon=True).start()

    def close(self):
        self._queue.put(None)
        self._http.shutdown()
        self._http.server_close()

    def describe(self, name):
        config, _ = self._models[name]
        return {"name": name} | {
            f"{group}s": [
                {"name": tensor.name, "datatype": self._types[tensor.data_type], "shape": [-1, *tensor.dims]}
                for tensor in getattr(config, group)
            ]
            for group in ("input", "output")
        }

    def infer(self, name, header, raw):
        config, _ = self._models[name]
        described = {tensor.name: tensor for tensor in config.input}
        inputs = {}
        for item in header["inputs"]:
            tensor = described[item["name"]]
            dtype = {"FP32": np.float32, "INT64": np.int64}[item["datatype"]]
            assert item["datatype"] == self._types[tensor.data_type], item
            assert item["shape"][1:] == list(tensor.dims) and 1 <= item["shape"][0] <= config.max_batch_size, item
            if "data" in item:
                array = np.array(item["data"], dtype=dtype)
            else:
                size = item["parameters"]["binary_data_size"]
                array, raw = np.frombuffer(raw[:size], dtype), raw[size:]
            array = array.reshape(item["shape"])
            if tensor.HasField("reshape"):
                array = array.reshape(array.shape[0], *tensor.reshape.shape)
            inputs[item["name"]] = array
        assert inputs.keys() == described.keys() and not raw
        future = Future()
        self._queue.put((name, inputs, future))
        output = future.result(timeout=60)
        described = {"name": config.output[0].name, "datatype": "FP32", "shape": list(output.shape)}
        if "outputs" in header:
            return {"outputs": [described]}, output.tobytes()
        return {"outputs": [{**described, "data": output.ravel().tolist()}]}, None

    def _batch(self):
        while True:
            waiting = [self._queue.get() for _ in range(self._joined)]
            if None in waiting:
                return
            name = waiting[0][0]
            joined = {key: np.concatenate([inputs[key] for _, inputs, _ in waiting]) for key in waiting[0][1]}
            sizes = [len(next(iter(inputs.values()))) for _, inputs, _ in waiting]
            self.batches.append(sum(sizes))
            try:
                (output,) = self._models[name][1].run(None, joined)
            except Exception as error:
                for _, _, future in waiting:
                    future.set_exception(error)
                continue
            for (_, _, future), part in zip(waiting, np.split(output, np.cumsum(sizes)[:-1]), strict=True):
                future.set_result(part)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder as a user's: a pipeline with classes, its bundle, and the repository with it."""
    folder = tmp_path_factory.mktemp("shop")
    class_pipeline().save_pretrained(folder / "pipeline")
    line = ["export", "onnx", str(folder / "pipeline"), "--out", str(folder / "shapes"), "--parity-steps", "1,10"]
    assert main([*line, "--guidance", "--bake-schedule", "--per-sample-steps", "--seeded", "--json"]) == 0
    line = ["export", "repository", str(folder / "shapes"), "--out", str(folder / "models")]
    assert main([*line, "--max-batch-size", "4", "--queue-delay", "1000"]) == 0
    return folder


@pytest.fixture(scope="module")
def client():
    path = Path(fastddim.__file__).parents[1] / "examples" / "inference_client.py"
    spec = importlib.util.spec_from_file_location("inference_client", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["inference_client"] = module
    spec.loader.exec_module(module)
    return module


def start_server(schema, repository, joined, request):
    server = Server(schema, repository, joined)
    request.addfinalizer(server.close)
    return server


def test_a_clients_seeds_become_the_samplers_pictures(shop, schema, client, tmp_path, request, capsys):
    require_described(schema, shop / "models" / "shapes")
    server = start_server(schema, shop / "models", 3, request)
    values = {
        "num_inference_steps": [3, 10, 20], "class_labels": [3, 1, 2], "uncond_class_labels": [4],
        "guidance_scale": [2.0, 1.0, 3.0],
    }  # fmt: skip
    seeds = [7, 2**63 + 5, 0]
    samples = client.draw(server.address, "shapes", seeds, values)
    assert server.batches == [3]
    pipe = fastddim.load_pipeline(shop / "pipeline")
    for k, seed in enumerate(seeds):
        steps, label, scale = values["num_inference_steps"][k], values["class_labels"][k], values["guidance_scale"][k]
        sampler = Sampler(pipe.unet, pipe.scheduler, steps, guidance_scale=scale)
        uncond = {"class_labels": torch.tensor([4])}
        expected = sampler(1, seeds=[seed], class_labels=torch.tensor([label]), uncond_kwargs=uncond)
        np.testing.assert_allclose(samples[k], expected[0], atol=1e-4)
    picture = tmp_path / "client.png"
    line = ["--server", server.address, "--model", "shapes", "--seeds", "7,8,9", "--steps", "10", "--out", str(picture)]
    client.main([*line, "--set", "class_labels=3,1,2", "--set", "uncond_class_labels=4", "--set", "guidance_scale=2"])
    assert "3 pictures" in capsys.readouterr().out
    scaled = OrtSampler(shop / "shapes")(
        3, seeds=7, num_inference_steps=10, guidance_scale=2.0, class_labels=np.array([3, 1, 2])
    )
    ours, theirs = (np.asarray(image).astype(int) for image in (Image.open(picture), make_grid(scaled)))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1


def test_a_client_draws_the_states_that_a_model_takes(schema, client, tmp_path, request):
    options = ExportOptions(bake_schedule=True, per_sample_steps=True)
    bundle = export_onnx(Tiny(), CONFIG, tmp_path / "states", options, sample_shape=SHAPE,
                         example_kwargs={"labels": LABELS}, parity_steps=(1,))  # fmt: skip
    write_repository(bundle, tmp_path / "models")
    server = start_server(schema, tmp_path / "models", 2, request)
    samples = client.draw(server.address, "states", SEEDS[:2], {"num_inference_steps": [4, 9], "labels": [1]})
    for sample, seed, steps in zip(samples, SEEDS[:2], (4, 9), strict=True):
        expected = Sampler(Tiny(), CONFIG, steps, sample_shape=SHAPE)(1, seeds=[seed], labels=torch.tensor([1]))
        np.testing.assert_allclose(sample, expected[0], atol=2e-5)


def test_the_notes_own_request_is_answered(shop, schema, client, request):
    note = (shop / "models" / "shapes" / "README.md").read_text("utf-8")
    body = note[note.index("-d '") + 4 : note.rindex("'")].encode()
    server = start_server(schema, shop / "models", 1, request)
    answer, _ = client.call(f"http://{server.address}/v2/models/shapes/infer", body)
    (output,) = json.loads(answer)["outputs"]
    sample = np.array(output["data"], dtype=np.float32).reshape(output["shape"])
    labels = np.array([0])
    expected = OrtSampler(shop / "shapes")(1, seeds=0, num_inference_steps=20, guidance_scale=2.0, class_labels=labels)
    np.testing.assert_allclose(sample, expected, atol=1e-6)


def test_a_client_is_told_what_is_wrong(shop, schema, client, request):
    server = start_server(schema, shop / "models", 1, request)
    with pytest.raises(ValueError, match="guidance_scale: has no value; pass --set guidance_scale=NUMBER"):
        client.draw(server.address, "shapes", [0], {"num_inference_steps": [1]})
    values = {"num_inference_steps": [1], "class_labels": [99], "uncond_class_labels": [4], "guidance_scale": [1]}
    with pytest.raises(RuntimeError, match="400"):
        client.draw(server.address, "shapes", [0], values)
    with pytest.raises(RuntimeError, match=r"v2/models/none: 400"):
        client.draw(server.address, "none", [0], {})


# From the shell.


def test_a_bundle_is_served_from_the_shell(shop, schema, tmp_path, capsys):
    models = tmp_path / "models"
    line = ["export", "repository", str(shop / "shapes"), "--out", str(models)]
    named = ["--name", "ten", "--preferred-batch-sizes", "4,8", "--warmup", "1,8", "--instance-kind", "gpu"]
    more = ["--gpus", "0,1", "--backend-parameter", "intra_op_thread_count=2", "--model-versions", "1,2"]
    assert main([*line, *named, *more]) == 0
    assert f"-v {models}:/models" in capsys.readouterr().out
    config = require_described(schema, models / "ten")
    assert list(config.instance_group[0].gpus) == [0, 1] and len(config.model_warmup) == 2
    assert list(config.version_policy.specific.versions) == [1, 2]
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(models / "shapes")
    assert main(line) == 2
    assert "shapes' exists; pass another name, or --force" in capsys.readouterr().err


BAD_LINES = {
    "--max-batch-size: 9, but the engine takes batches of 1 to 4": ("engine", ["--max-batch-size", "9"]),
    "flavour: 'rtx', but the server's backend loads the standard TensorRT's engines": ("rtx", []),
    "strip_plan: True, but the server has no weights": ("stripped", ["--max-batch-size", "4"]),
    "--instance-kind: 'cpu', but engines run on GPUs alone": ("engine", ["--instance-kind", "cpu"]),
    "is for 'aoti', which the server has no backend for; export it for onnx or tensorrt": ("aoti", []),
    "--max-batch-size: 8, but the server joins requests along the first dimension": ("table", []),
    "--max-batch-size: -1; pass an integer >= 0": ("shapes", ["--max-batch-size", "-1"]),
    "--instance-kind: 'tpu' is not one of": ("shapes", ["--instance-kind", "tpu"]),
    "--backend-parameter: 'threads'; pass KEY=VALUE": ("shapes", ["--backend-parameter", "threads"]),
    "--name: 'a/b'; pass letters": ("shapes", ["--name", "a/b"]),
    "--name: '-a'; pass letters": ("shapes", ["--name=-a"]),
    "--warmup: 'x' in 'x'": ("shapes", ["--warmup", "x"]),
    "--out: '": ("shapes", ["--name", "old"]),
}


@pytest.fixture(scope="module")
def foreign(shop, tmp_path_factory):
    """Bundles by name whose manifests say what the server asks about; their files are those of "shapes"."""
    folder = tmp_path_factory.mktemp("foreign")
    profiles = [{"batch": [1, 2, 4]}]
    options = {
        "version_compatible": False, "hardware_compatibility": None, "refit": False, "strip_plan": False,
        "weight_streaming": False,
    }  # fmt: skip
    engine = {
        "flavour": "standard", "version": "10.8", "platform": "linux x86_64", "gpu": None, "compute_capabilities": [],
        "profiles": profiles, "options": options, "source": {},
    }  # fmt: skip
    target = {"device": "cpu", "platform": "linux", "machine": "x86_64", "cpu_features": []}
    changes = {
        "engine": {"runtime": "tensorrt", "engine": engine},
        "rtx": {"runtime": "tensorrt", "engine": {**engine, "flavour": "rtx"}},
        "stripped": {"runtime": "tensorrt", "engine": {**engine, "options": {**options, "strip_plan": True}}},
        "aoti": {"runtime": "aoti", "target": target},
        "shapes": {},
    }
    for name, change in changes.items():
        shutil.copytree(shop / "shapes", folder / name)
        edit(folder / name, lambda manifest, change=change: manifest.update(change))
    export_tiny(folder / "table")
    return folder


@pytest.mark.parametrize("message", BAD_LINES)
def test_bad_lines_are_named_before_the_files_are_read(message, foreign, tmp_path, capsys, monkeypatch):
    read = "fastddim.export.bundle.sha256"
    monkeypatch.setattr(read, lambda path: pytest.fail(f"{path} was read"))
    (tmp_path / "old").mkdir()
    name, more = BAD_LINES[message]
    assert main(["export", "repository", str(foreign / name), "--out", str(tmp_path), *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert os.listdir(tmp_path) == ["old"]


def test_a_damaged_bundle_is_not_served(shop, tmp_path, capsys):
    folder = shutil.copytree(shop / "shapes", tmp_path / "shapes")
    flip_a_byte(folder)
    assert main(["export", "repository", str(folder), "--out", str(tmp_path / "models")]) == 2
    assert "is not the file that was exported (SHA-256)" in " ".join(capsys.readouterr().err.split())
    assert os.listdir(tmp_path) == ["shapes"]
