"""The fused step as TensorRT's plugin: its values, its graph, TensorRT's own Python classes around it, over a stub of the
libraries, and the PTX that they are given, launched as they are told to on the machine in tests/ptx."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import triton
from cpp_driver import ROOT

import fake_tensorrt
import fastddim
from fastddim import Clip, DDIMConfig, DynamicThreshold, Schedule, StepTable
from fastddim.cli import main
from fastddim.export import (
    ExportError,
    ExportOptions,
    OrtSampler,
    Profile,
    TensorRTOptions,
    export_onnx,
    export_tensorrt,
    open_bundle,
    open_sampler,
)
from fastddim.export.bundle import FORMAT, read_limit
from fastddim.export.onnx.graph import find_model_output
from fastddim.export.tensorrt import exporter
from fastddim.export.tensorrt import plugin as trt_plugin
from fastddim.export.tensorrt.library import Library
from fastddim.kernels import plugin
from fastddim.kernels.plugin import INPUTS, PluginKernel, ddim_step_in_plugin, drop_scratch, plan_plugin_step
from fastddim.reference import ddim_step as reference_step
from fastddim.step import Guidance, StepOptions
from oracle import ddim, guide
from pairwise import pairwise
from ptx.launcher import Machine
from test_cubin import TOOLS, parameter_sizes
from test_export import LABELS, Tiny
from test_export_tensorrt import dit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")

TARGETS = {80: "sm_80", 90: "sm_90a", 100: "sm_100a", 120: "sm_120a"}
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"

# Values.


def launch(step, tensors, model_output):
    """Both results of the kernel, from poisoned memory."""
    sample = tensors["sample"]
    given = {**tensors, "model_output": model_output}
    assert [name for name in INPUTS if name in given] == list(step.inputs)
    inputs = [given[name].to(DEVICE) if name in given else None for name in INPUTS]
    outputs = [torch.full_like(sample, float("nan"), device=DEVICE) for _ in range(2)]
    ddim_step_in_plugin[step.grid(len(sample))](
        *inputs,
        step.elements,
        len(sample),
        *outputs,
        **step.constants,
        num_warps=step.num_warps,
        enable_fp_fusion=False,
    )
    return [output.cpu() for output in outputs]


def rows(schedule, batch, **options):
    """A row of another step for each sample, and the transitions."""
    pairs = schedule.pairs(10)
    chosen = [(3 * k + 2) % len(pairs) for k in range(batch)]
    table = StepTable.build(schedule, pairs, **options)
    columns = torch.tensor(np.asarray(table.columns)[chosen], dtype=torch.float32)
    return columns, [schedule.alpha_bar(list(pairs[row])) for row in chosen]


LIMITS = {"none": None, "clip": Clip(1.2), "fixed": DynamicThreshold(0.9, 0.5), "threshold": DynamicThreshold(0.9, 1.5)}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# One element has no deviation.
GUIDANCE = [
    (shape, *options)
    for shape in [(3, 5, 7), (4, 4, 8, 8), (1, 1)]
    for options in [(False, False), (True, False), (True, True)]
    if options[1] <= (shape != (1, 1))
]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("case", "limit", "noise"), pairwise(GUIDANCE, LIMITS, (False, True)))
def test_the_step_is_the_oracles(case, limit, noise):
    shape, guided, rescale = case
    batch, generator = shape[0], torch.Generator().manual_seed(3)
    dtype = DTYPES["float32" if limit == "none" else "float16" if guided else "bfloat16"]
    kind = "v_prediction" if noise else "epsilon"
    schedule = Schedule(DDIMConfig(prediction_type=kind))
    rederive = LIMITS[limit] is not None
    eta = 1.0 if noise else 0.0
    coefficients, transitions = rows(schedule, batch, eta=eta, use_clipped_model_output=rederive)
    draw = functools.partial(torch.randn, generator=generator)
    output = draw((batch * (1 + guided), *shape[1:])).to(dtype)
    tensors = {"sample": draw(shape), "coefficients": coefficients}
    tensors |= {"noise": draw(shape)} if noise else {}
    tensors |= {"guidance_scale": torch.linspace(1.5, 7.5, batch)} if guided else {}
    tensors |= {"guidance_rescale": torch.linspace(0.3, 0.9, batch)} if rescale else {}
    guidance = Guidance(tensors["guidance_scale"], tensors.get("guidance_rescale", 0.0)) if guided else None
    options = StepOptions(guidance=guidance, limit=LIMITS[limit], noise=tensors.get("noise"))
    step = plan_plugin_step(batch, int(np.prod(shape[1:])), options, batch)
    assert step.constants["WHOLE"] == (limit == "threshold" or rescale)
    actual = launch(step, tensors, output)

    wide = {name: value.double().numpy() for name, value in tensors.items()}
    predicted = output.double().numpy()
    for b, (alpha_bar, alpha_bar_next) in enumerate(transitions):
        one = slice(b, b + 1)
        out = predicted[one]
        if guided:
            cond, scale = predicted[batch + b : batch + b + 1], wide["guidance_scale"][b]
            out = guide(out, cond, scale, wide["guidance_rescale"][b]) if rescale else out + scale * (cond - out)
        of = LIMITS[limit]
        expected = ddim(
            wide["sample"][one], out, alpha_bar, alpha_bar_next, kind, eta=eta, noise=wide["noise"][one] if noise else None,
            clip=of.range if isinstance(of, Clip) else None,
            threshold=(of.ratio, of.max_value) if isinstance(of, DynamicThreshold) else None, rederive=rederive,
        )  # fmt: skip
        largest = np.abs(expected.x0_unlimited).max()
        for found, wanted in zip(actual, (expected.x_next, expected.x0), strict=True):
            np.testing.assert_allclose(found[one].numpy(), wanted, rtol=0, atol=2e-6 * max(1.0, largest))


@pytest.mark.usefixtures("machine")
def test_blocks_are_the_first_profiles_and_the_grid_holds_any_batch():
    plan = functools.partial(plan_plugin_step, 4, 5000, StepOptions(limit=Clip()))
    step = plan(70_000)
    block = step.constants["BLOCK"]
    assert step.constants["SAMPLE_AXIS"] == 0 and step.grid(70_000) == (70_000, -(-5000 // block))
    assert plan(9).grid(9) == (-(-5000 // block), 9)
    sample = torch.randn(2, 5000)
    tensors = {"sample": sample, "coefficients": torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0, 0.0]] * 2)}
    for largest in (9, 70_000):
        result, x0 = launch(plan(largest), tensors, 2 * sample)
        assert torch.equal(result, (2 * sample).clamp(-1, 1)) and torch.equal(result, x0)


# Graphs.


def export_step(model, folder, config=None, **options):
    shape = options.pop("sample_shape", None)
    labels = {"labels": LABELS} if isinstance(model, Tiny) else None
    chosen = ExportOptions(kind="step", **options)
    return export_onnx(
        model, config or DDIMConfig(), folder, chosen, sample_shape=shape, example_kwargs=labels, parity_steps=()
    )


def digits(folder):
    pipe = fastddim.load_pipeline()
    return export_step(pipe.unet, folder, pipe.scheduler, guided=True, stochastic=True)


THRESHOLD = DDIMConfig(thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9)
BUNDLES = {
    "plain": lambda folder: export_step(Tiny(), folder, sample_shape=(2, 6, 6)),
    "noise": lambda folder: export_step(Tiny(4), folder, stochastic=True, sample_shape=(4, 65, 64)),
    "threshold": lambda folder: export_step(
        Tiny(4), folder, THRESHOLD, guided=True, guidance_rescale=True, stochastic=True, sample_shape=(4, 64, 64)
    ),
    "bfloat16": lambda folder: export_step(Tiny(), folder, guided=True, dtype="bfloat16", sample_shape=(2, 6, 6)),
    "cfg++": lambda folder: export_step(Tiny(), folder, guided=True, guidance_method="cfg++", sample_shape=(2, 6, 6)),
    "apg": lambda folder: export_step(
        Tiny(), folder, guided=True, guidance_method="apg", apg_norm_threshold=4.0, sample_shape=(2, 6, 6)
    ),
    "variance": lambda folder: export_step(dit(), folder, guided=True),
    "digits": digits,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The bundle of each name, written once."""
    folder = tmp_path_factory.mktemp("bundles")
    return functools.cache(lambda name: BUNDLES[name](folder / name))


@pytest.fixture(scope="module")
def driven(bundles, tmp_path_factory):
    """What TensorRT's own Python classes make of every bundle's plugin."""
    folder = tmp_path_factory.mktemp("driven")
    libraries = folder / "libraries"
    libraries.mkdir()
    first = libraries / "libnvinfer.so.11"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", first, ROOT / "tests" / "stub_tensorrt.cpp"], check=True)
    for name in ("libnvinfer_plugin.so.11", "libnvonnxparser.so.11"):
        (libraries / name).symlink_to(first)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "build" / "tensorrt" / "python")])
    environment |= {"LD_LIBRARY_PATH": str(libraries), "TRITON_CACHE_DIR": str(folder / "cache")}
    out = folder / "out"
    out.mkdir()
    (folder / "bundles").mkdir()
    for name in BUNDLES:
        (folder / "bundles" / name).symlink_to(bundles(name).path)
    command = [sys.executable, ROOT / "tests" / "trt_plugin_runs.py", folder / "bundles", out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


def told(driven, name):
    return json.loads((driven / f"{name}.json").read_text())


def draw_inputs(bundle, batch):
    """Numpy arrays for a step's graph: rows of steps of their own, labels, noise, scales."""
    generator = np.random.default_rng(batch)
    table = bundle.manifest["table"]
    chosen = generator.integers(0, len(table["timesteps"]), batch)
    made = {
        "timestep": np.array(table["timesteps"])[chosen],
        "coefficients": np.array(table["coefficients"], np.float32)[chosen],
        "guidance_scale": np.linspace(1.5, 5.0, batch, dtype=np.float32),
        "guidance_rescale": np.linspace(0.2, 0.9, batch, dtype=np.float32),
    }
    for item in bundle.manifest["inputs"]:
        shape = [batch, *item["shape"][1:]]
        if item["dtype"] == "int64":
            made.setdefault(item["name"], generator.integers(0, 4, shape))
        made.setdefault(item["name"], generator.standard_normal(shape).astype(np.float32))
    return {item["name"]: made[item["name"]] for item in bundle.manifest["inputs"]}


def execute(compiled, ptx, inputs, model_output):
    """Both results of code that is launched as TensorRT is told to."""
    machine = Machine(90, seed=0)
    kernel = machine.load(ptx)
    (asked,) = (each for each in compiled["launches"] if each["batch"] == len(inputs["sample"]))
    tensors = [model_output, *(torch.from_numpy(inputs[name]) for name in compiled["inputs"][1:])]
    outputs = [torch.full(shape, float("nan")) for shape in asked["outputs"]]
    arguments = [*tensors, *asked["scalars"], *outputs]
    assert compiled["entry"] == kernel.kernel.name and len(arguments) == len(kernel.kernel.parameters)
    assert asked["block"] == [kernel.kernel.threads, 1, 1]
    machine.launch(kernel, tuple(asked["grid"]), arguments, asked["shared"])
    return outputs


def check_results(actual, expected, rows):
    for found, wanted in zip(actual, expected, strict=True):
        for b, row in enumerate(rows):
            np.testing.assert_allclose(found[b], wanted[b], rtol=0, atol=2e-6 * max(1.0, np.abs(row).max()))


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled: a stand-in, as Triton's interpreter has the tests' process. `(dtype, compute capability)` of each."""
    asked = []

    def compile_step(step, dtype, capability):
        asked.append((dtype, capability))
        return PluginKernel(step, dtype, "sm_90a", "entry", f"// {dtype}", 32 * step.num_warps, 0)

    monkeypatch.setattr(plugin, "compile_plugin_step", compile_step)
    return asked


@pytest.fixture
def fake(compiled, monkeypatch):
    module = fake_tensorrt.make_module(plugins=True)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", module.plugin)
    monkeypatch.setattr(exporter, "_build_target", lambda library, options: ("A GPU", ["9.0"]))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    return module


def fuse(bundle, fake):
    return trt_plugin.fuse(Library("standard", fake), bundle, [{"batch": (1, 4, 9)}], "9.0")[0]


# ONNX Runtime has no bfloat16 convolution.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUNDLES if name != "bfloat16"])
def test_the_graph_with_the_plugin_computes_the_graph(bundles, driven, fake, name):
    """ONNX Runtime as far as the node, the code launched as TensorRT is told to, against the operations it replaces."""
    bundle = bundles(name)
    model = fuse(bundle, fake)
    node = model.graph.node[-1]
    assert [value.name for value in model.graph.output] == list(node.output) == ["next_sample", "pred_original_sample"]
    # Nothing of the step is left but sizes, and no weight that nothing reads.
    others = [other for other in model.graph.node[:-1] if other.op_type != "Shape"]
    read = {each for other in others for each in other.input}
    assert not read & {"coefficients", "noise", "guidance_scale", "guidance_rescale"}
    assert {weight.name for weight in model.graph.initializer} <= read

    before = onnx.ModelProto()
    before.CopyFrom(model)
    del before.graph.node[-1]
    del before.graph.output[:]
    before.graph.output.add().name = node.input[0]
    before = onnx.shape_inference.infer_shapes(before)
    model_output = onnxruntime.InferenceSession(before.SerializeToString(), providers=["CPUExecutionProvider"])
    whole = onnxruntime.InferenceSession(bundle.model_path, providers=["CPUExecutionProvider"])
    compiled = told(driven, name)
    assert compiled["constants"]["SAMPLE_AXIS"] == (name != "noise")
    for batch in (1, 4):
        inputs = draw_inputs(bundle, batch)
        known = {value.name for value in model_output.get_inputs()}
        (output,) = model_output.run(None, {key: value for key, value in inputs.items() if key in known})
        actual = execute(compiled, compiled["ptx"], inputs, torch.from_numpy(output))
        check_results(actual, whole.run(None, inputs), inputs["coefficients"])


def test_the_models_output_is_taken_before_it_is_widened(bundles, fake, compiled):
    for name, expected in (("bfloat16", "bf16"), ("digits", "fp32"), ("variance", "fp32")):
        model = fuse(bundles(name), fake)
        assert compiled[-1] == (expected, 90)
        (producer,) = (node for node in model.graph.node if model.graph.node[-1].input[0] in node.output)
        assert producer.op_type != "Cast"


def test_a_graph_whose_step_cannot_be_told_is_an_error(bundles, fake, monkeypatch):
    model = onnx.load(bundles("plain").model_path)
    inputs = ["sample", "coefficients"]
    assert find_model_output(model.graph, inputs) is not None
    # A path from the timestep around the model's output.
    graph = model.graph
    late = onnx.helper.make_node("Cast", ["timestep"], ["late"], to=onnx.TensorProto.FLOAT)
    mean = onnx.helper.make_node("ReduceMean", ["late"], ["mean"], keepdims=0)
    last = next(node for node in graph.node if "next_sample" in node.output)
    last.output[0] = "early"
    graph.node.extend([late, mean, onnx.helper.make_node("Add", ["early", "mean"], ["next_sample"])])
    assert find_model_output(graph, inputs) is None
    monkeypatch.setattr(onnx, "load", lambda *arguments, **options: model)
    with pytest.raises(ExportError, match=r"fused_step: True, but the model's output cannot be told"):
        fuse(bundles("plain"), fake)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["noise", "threshold", "bfloat16"])
def test_the_code_for_every_target_takes_the_references_step(bundles, driven, name, target):
    manifest, compiled = bundles(name).manifest, told(driven, name)
    sampling, inputs = manifest["sampling"], draw_inputs(bundles(name), 4)
    given = {key: torch.from_numpy(value) for key, value in inputs.items()}
    generator = torch.Generator().manual_seed(2)
    output = torch.randn((4 * (1 + sampling["guided"]), *manifest["sample"]["shape"]), generator=generator)
    output = output.to(DTYPES[sampling["dtype"]])
    guidance = Guidance(given["guidance_scale"], given.get("guidance_rescale", 0.0)) if sampling["guided"] else None
    options = StepOptions(guidance=guidance, limit=read_limit(manifest), noise=given.get("noise"))
    expected = reference_step(output, given["sample"], given["coefficients"], torch.arange(4), options)
    ptx = (driven / name / f"sm_{target}.ptx").read_text()
    check_results(execute(compiled, ptx, inputs, output), expected, inputs["coefficients"])


# TensorRT's own classes.


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLES)
def test_tensorrts_own_classes_take_the_plugin(bundles, driven, name):
    found, manifest = told(driven, name), bundles(name).manifest
    sampling, elements = manifest["sampling"], int(np.prod(manifest["sample"]["shape"]))
    asked = {"noise": sampling["stochastic"], "guidance_scale": sampling["guided"],
             "guidance_rescale": sampling["guidance_rescale"]}  # fmt: skip
    optional = [key for key, wanted in asked.items() if wanted]
    assert found["type"] == "_TemplateAOTPlugin"
    assert found["operator"] == "_".join(["ddim_step", *optional])
    assert found["inputs"][1:] == ["sample", "coefficients", *optional]
    assert found["outputs"] == ["FLOAT", "FLOAT"] and found["scalar_types"] == ["INT32"]
    dtype = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}[sampling["dtype"]]
    assert found["supported"] == [[kind, "LINEAR"] for kind in (dtype, *["FLOAT"] * (len(found["inputs"]) + 1))]
    assert found["identity"]["target"] == "sm_90a"
    block = found["constants"]["BLOCK"]
    for each in found["launches"]:
        batch = each["batch"]
        programs = [-(-elements // block), batch]
        assert each["grid"] == [*(programs if found["constants"]["SAMPLE_AXIS"] else programs[::-1]), 1]
        assert each["shared"] < 48 * 1024 and each["scalars"] == [elements, batch]


# PTX.


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["noise", "threshold", "bfloat16"])
def test_the_ptx_has_the_parameters_that_tensorrt_passes(driven, tmp_path, name, target):
    """Triton's own PTX and the one without its two pointers are the same code."""
    inputs = told(driven, name)["inputs"]
    sizes = [*[8] * len(inputs), 4, 4, 8, 8]
    codes = []
    for kind, expected in (("ptx", sizes), ("raw.ptx", [*sizes, 8, 8])):
        file = driven / name / f"sm_{target}.{kind}"
        text = file.read_text()
        assert f".target {TARGETS[target]}\n" in text and (f".version {'8.0' if target <= 90 else '8.7'}\n") in text
        assert str(ROOT) not in text
        # Accesses of full width where a sample's size lets them be aligned.
        assert ("ld.global.v4.b32" in text) == (name != "bfloat16")
        cubin = tmp_path / f"{kind}.cubin"
        command = [TOOLS / "ptxas-blackwell", "-v", f"--gpu-name={TARGETS[target]}", file, "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
        assert parameter_sizes(cubin, "ddim_step_in_plugin") == expected
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
        codes.append([line.strip() for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)])
    assert codes[0] == codes[1] and len(codes[0]) > 50


HEAD = ".visible .entry step(\n\t.param .u64 .ptr .global .align 1 step_param_0,\n\t.param .u32 step_param_1"
SCRATCH = ",\n\t.param .u64 .ptr .global .align 1 step_param_2,\n\t.param .u64 .ptr .global .align 1 step_param_3\n)\n"


def test_scratch_pointers_are_dropped_unless_something_reads_them():
    ptx = HEAD + SCRATCH + "{\n\tld.param.b64 %rd1, [step_param_0];\n}\n"
    assert drop_scratch(ptx, ["u64", "u32"]) == HEAD + "\n)\n{\n\tld.param.b64 %rd1, [step_param_0];\n}\n"
    for changed, message in (
        (ptx.replace("[step_param_0]", "[step_param_2]"), r"reads \['step_param_2'\] scratch"),
        (ptx.replace(".u32", ".u64"), r"parameters \['u64', 'u64', 'u64', 'u64'\]"),
        (ptx.replace(".u64 .ptr .global .align 1 step_param_3", ".u32 step_param_3"), "TensorRT passes"),
        ("// nothing", r"parameters \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            drop_scratch(changed, ["u64", "u32"])


# Engines, over a stand-in for the library.


FUSED = TensorRTOptions(flavour="standard", fused_step=True)


def test_an_engine_is_built_from_the_graph_with_the_plugin(bundles, fake, tmp_path):
    source = bundles("digits")
    plain = export_tensorrt(source, tmp_path / "plain", TensorRTOptions(flavour="standard"))
    assert not any(call[0] in ("register", "parse") for call in fake.calls) and ("create_network", 2) in fake.calls
    assert "fused_step" not in plain.manifest["engine"] and plain.manifest["engine"]["options"]["fused_step"] is False
    fake.calls.clear()
    bundle = export_tensorrt(source, tmp_path / "engine", FUSED)
    names = [call[0] for call in fake.calls]
    assert names.index("register") < names.index("aot_impl") < names.index("create_network") < names.index("parse")
    assert ("create_network", 1 << 1 | 1 << 3) in fake.calls
    (parsed,) = (call for call in fake.calls if call[0] == "parse")
    assert parsed[2] == str(source.model_path)
    node = onnx.load_from_string(parsed[1]).graph.node[-1]
    (registered,) = (call for call in fake.calls if call[0] == "register")
    assert registered[1] == f"fastddim::{node.op_type}"
    assert registered[2] == ["model_output", *node.input[1:], "kernel"]
    (implemented,) = (call for call in fake.calls if call[0] == "aot_impl")
    assert implemented[2] == [*registered[2], "outputs", "tactic"]
    jsonschema.validate(json.loads((bundle.path / "manifest.json").read_text()), FORMAT.schema())
    engine = bundle.manifest["engine"]
    assert engine["options"]["fused_step"] is True and engine["fused_step"]["target"] == "sm_90a"
    told_kernel = {each.name: each.s.decode() for each in node.attribute}
    assert told_kernel == {
        "plugin_namespace": "fastddim", "plugin_version": "1", "kernel": engine["fused_step"]["sha256"],
    }  # fmt: skip


def test_reuse_asks_for_the_same_kernel(bundles, fake, tmp_path, monkeypatch):
    build = functools.partial(export_tensorrt, bundles("plain"), tmp_path / "engine", reuse=True)
    build(FUSED)

    def builds(options):
        fake.calls.clear()
        build(options)
        return any(call[0] == "build" for call in fake.calls)

    assert not builds(FUSED)
    assert builds(TensorRTOptions(flavour="standard")) and builds(FUSED) and not builds(FUSED)
    # Tuned for another batch it may have other blocks; another version of kernel or compiler has other PTX.
    monkeypatch.setattr(
        plugin, "compile_plugin_step", lambda *_: PluginKernel(*_[:2], "sm_90a", "entry", "// new", 64, 0)
    )
    assert builds(FUSED)


def test_code_for_later_gpus_is_for_the_least_of_them(bundles, fake, compiled, tmp_path):
    for k, level in enumerate((None, "ampere_plus")):
        options = TensorRTOptions(flavour="standard", fused_step=True, hardware_compatibility=level)
        export_tensorrt(bundles("plain"), tmp_path / f"engine{k}", options)
    assert compiled == [("fp32", 90), ("fp32", 80)]


def test_what_cannot_be_fused_is_refused_before_any_work(bundles, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "write_bundle", None)
    monkeypatch.setattr(onnx, "load", None)
    out = tmp_path / "engine"
    limit = {"kind": "threshold", "ratio": 0.995, "max_value": 2.0}
    large = {"sampling": {**bundles("noise").manifest["sampling"], "limit": limit}}
    projected = {"sampling": {**bundles("noise").manifest["sampling"], "guided": True, "guidance_method": "apg"}}

    def refused(message, source="plain", error=ValueError, options=FUSED, **changes):
        bundle = bundles(source)
        changed = type(bundle)(bundle.path, {**bundle.manifest, **changes})
        with pytest.raises(error, match=message):
            export_tensorrt(changed, out, options)
        assert not out.exists()

    refused(r"fused_step: True for a bundle of kind 'loop'; export it with kind='step'", kind="loop")
    refused(
        r"fused_step: True for samples of 16640 elements with dynamic thresholding, .*16384.*leave", "noise", **large
    )
    refused(r"fused_step: True for samples of 16640 elements .* guidance_method 'apg', .*16384", "noise", **projected)
    inputs = [
        {**item, "shape": ["batch", 2, "height", "width"]} if item["name"] == "sample" else item
        for item in bundles("plain").manifest["inputs"]
    ]
    refused(r"fused_step: True for a bundle with dynamic_size.*leave", inputs=inputs)
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", True)
        refused(r"fused_step: True with TRITON_INTERPRET set.*unset it")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        refused(r"fused_step: True needs triton .*pip install triton", error=ImportError)
    rtx = TensorRTOptions(flavour="rtx", fused_step=True)
    refused(r"fused_step: True with flavour 'rtx', which has no such plugins; pass flavour='standard'", options=rtx)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make_module("10.7.0.23"))
    refused(r"fused_step: True, but TensorRT 10.7.0.23 has no ahead-of-time plugins; install TensorRT 10.8 or later")


def test_a_kernel_that_does_not_compile_is_an_error(bundles, fake, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("a trace\nptxas: no such target")

    monkeypatch.setattr(plugin, "compile_plugin_step", fail)
    with pytest.raises(
        ExportError, match=r"fused_step: the step does not compile for 9.0: RuntimeError: ptxas: no such"
    ):
        export_tensorrt(bundles("plain"), tmp_path / "engine", FUSED)
    assert not (tmp_path / "engine").exists()


def test_the_option_from_the_shell(bundles, fake, tmp_path, capsys):
    out = tmp_path / "engine"
    command = ["export", "tensorrt", "--flavour", "standard", "--fused-step", "--out", str(out)]
    assert main(command) == 2
    assert "--fused-step: given with --kind loop; pass --kind step" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
    assert main([*command, str(bundles("plain").path)]) == 0
    assert open_bundle(out).manifest["engine"]["options"]["fused_step"] is True


# A GPU and TensorRT itself.


@pytest.mark.gpu
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is None, reason="needs the full TensorRT, which is not installed"
)
@pytest.mark.parametrize("name", ["plain", "noise", "digits"])
def test_an_engine_with_the_plugin_samples_as_onnx_runtime(bundles, tmp_path, name):
    profiles = (Profile(batch=(1, 2, 4)), Profile(batch=(5, 6, 8)))
    source = bundles(name)
    sampling = source.manifest["sampling"]
    for fused in (False, True):
        options = TensorRTOptions(flavour="standard", profiles=profiles, fused_step=fused)
        bundle = export_tensorrt(source, tmp_path / f"engine{fused}", options)
        log = (bundle.path / "build.log").read_text()
        assert ("ddim_step" in log) == fused
        for batch in (1, 3, 7):
            labels = [item["name"] for item in source.manifest["inputs"] if item["name"] in ("labels", "class_labels")]
            given = {key: np.arange(batch) % 4 for key in labels}
            if sampling["guided"]:
                given |= {"guidance_scale": 2.0, "uncond_kwargs": {key: np.full(batch, 10) for key in labels}}
            options = {"seeds": 5, "num_inference_steps": 4, "eta": 1.0 if sampling["stochastic"] else None, **given}
            expected = OrtSampler(source)(batch, **options)
            actual = open_sampler(bundle)(batch, **options)
            np.testing.assert_allclose(actual.cpu().numpy(), expected, atol=2e-4)
