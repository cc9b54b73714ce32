"""TensorRT engines: built with TensorRT-RTX on the CPU, and run over a stand-in for the library against ONNX Runtime."""

import contextlib
import copy
import functools
import json
import os
import re
import resource
import shutil
import sys

import diffusers
import jsonschema
import numpy as np
import onnx
import pytest
import tensorrt_rtx
import torch
from PIL import Image

import fake_tensorrt
import fastddim
from damage import edit
from fastddim import DDIMConfig
from fastddim.cli import main
from fastddim.export import (
    BundleError,
    ExportError,
    ExportOptions,
    NotFiniteError,
    OrtPipeline,
    OrtSampler,
    Profile,
    TensorRTOptions,
    TensorRTSampler,
    export_onnx,
    export_pipeline,
    export_tensorrt,
    open_bundle,
    open_sampler,
)
from fastddim.export.bundle import FORMAT, sha256
from fastddim.export.tensorrt import exporter
from fastddim.export.tensorrt import sampler as sampler_module
from fastddim.models.policy import ActionUNet1d
from fastddim.noise import STREAM_INITIAL, normal_numpy
from flow import SHAPE, START_SCALE, Wave, flow_table, plain_loop
from test_export import LABELS, XL, Tiny, conditional_unet, export_tiny
from test_export_pipelines import make as make_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

RTX = TensorRTOptions(flavour="rtx", profiles=(Profile(batch=(1, 2, 4)),), compute_capabilities=("8.9",))


def write_tiny(folder, **options):
    return export_tiny(folder, **{"guided": True, **options})


# Real builds, without a GPU.


def dit():
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=6, norm_num_groups=2,
    ).eval()  # fmt: skip


def write_digits(folder, **options):
    pipe = fastddim.load_pipeline()
    return export_onnx(pipe.unet, pipe.scheduler, folder, ExportOptions(guided=True, **options), parity_steps=())


def write_unet(unet, folder, **options):
    return export_onnx(
        unet, DDIMConfig(clip_sample=False), folder, ExportOptions(guided=True, **options), parity_steps=()
    )


def write_policy(folder):
    policy = ActionUNet1d(action_dim=3, obs_dim=5, channels=(16, 32), horizon=8)
    observation = {"observation": torch.zeros(2, 5)}
    return export_onnx(
        policy, DDIMConfig(), folder, sample_shape=(8, 3), example_kwargs=observation, parity_steps=()
    )  # fmt: skip


def write_thresholded(side, folder):
    config = DDIMConfig(thresholding=True, sample_max_value=2.0)
    return export_onnx(
        Tiny(3), config, folder, sample_shape=(3, side, side), example_kwargs={"labels": LABELS}, parity_steps=()
    )  # fmt: skip


def write_flow(folder, **options):
    return export_onnx(Wave(), flow_table(), folder, ExportOptions(**options), sample_shape=SHAPE, parity_steps=())


BUILDS = {
    "digits, loop": write_digits,
    "digits, step": functools.partial(write_digits, kind="step", stochastic=True),
    "schedule in the graph": lambda folder: write_tiny(folder, bake_schedule=True),
    "DiT": lambda folder: write_unet(dit(), folder),
    "policy": write_policy,
    "fractional timesteps, loop": write_flow,
    "fractional timesteps, step": functools.partial(write_flow, kind="step"),
    "threshold, 64": functools.partial(write_thresholded, 64),
    "threshold, 256": functools.partial(write_thresholded, 256),
    "Stable Diffusion XL": lambda folder: write_unet(conditional_unet(**XL), folder, kind="step"),
    "Stable Diffusion, float16": lambda folder: write_unet(conditional_unet(), folder, dtype="float16"),
}
SLOW = ("digits, loop", "digits, step", "DiT", "Stable Diffusion XL", "Stable Diffusion, float16")
NAMED = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in BUILDS]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """The ONNX bundle of each kind, written once."""
    folder = tmp_path_factory.mktemp("graphs")

    @functools.cache
    def write(name):
        return BUILDS[name](folder / re.sub(r"\W", "_", name))

    return write


@pytest.mark.parametrize("name", NAMED)
def test_engines_are_built_without_a_gpu(graphs, tmp_path, name):
    source = graphs(name)
    bundle = export_tensorrt(source, tmp_path / "engine", RTX)
    manifest = bundle.manifest
    jsonschema.validate(json.loads((bundle.path / "manifest.json").read_text()), FORMAT.schema())
    assert bundle.runtime == "tensorrt" and manifest["model"] == "model.engine"
    assert sorted(manifest["files"]) == ["README.md", "build.log", "model.engine"]
    content = bundle.model_path.read_bytes()
    assert content[:4] == b"vtrt"
    assert ".".join(map(str, content[24:28])) == tensorrt_rtx.__version__ == manifest["engine"]["version"]
    # The weights are in it.
    assert len(content) > 0.9 * source.model_path.stat().st_size
    engine = manifest["engine"]
    assert engine["flavour"] == "rtx" and engine["gpu"] is None and engine["compute_capabilities"] == ["8.9"]
    assert engine["source"] == {"model.onnx": sha256(source.model_path)}
    (profile,) = engine["profiles"]
    # A table runs as it is, or its first steps.
    most = [3, 3] if manifest["schedule"] is None else [50, 1000]
    steps = {"steps": [1, *most]} if manifest["kind"] == "loop" else {}
    assert profile == {"batch": [1, 2, 4], **steps}
    for key in ("inputs", "outputs", "sampling", "table", "schedule"):
        assert manifest[key] == source.manifest[key]
    log = (bundle.path / "build.log").read_text()
    assert log.startswith("== model.engine\n") and "INFO: Engine generation completed" in log
    assert "ERROR" not in log and "VERBOSE" not in log and str(source.path) not in log


def test_profiles_give_every_input_its_range(graphs, tmp_path, monkeypatch):
    """What is asked of TensorRT itself, for each of two profiles."""
    asked = []

    def add(build, builder, config, network, described, ranges):
        real = builder.create_optimization_profile
        kept = {}

        def create():
            kept["profile"] = real()
            return kept["profile"]

        monkeypatch.setattr(type(builder), "create_optimization_profile", lambda self: create())
        original(build, builder, config, network, described, ranges)
        monkeypatch.setattr(type(builder), "create_optimization_profile", real)
        profile = kept["profile"]
        names = [network.get_input(index).name for index in range(network.num_inputs)]
        asked.append({name: [tuple(shape) for shape in profile.get_shape(name)] for name in names})

    original = exporter._Build._add_profile
    monkeypatch.setattr(exporter._Build, "_add_profile", add)
    profiles = (Profile(batch=(1, 1, 2), steps=(1, 5, 9)), Profile(batch=(3, 4, 8), steps=(10, 20, 30)))
    options = TensorRTOptions(flavour="rtx", profiles=profiles)
    bundle = export_tensorrt(graphs("policy"), tmp_path / "engine", options)
    assert [one["sample"] for one in asked] == [[(1, 8, 3), (1, 8, 3), (2, 8, 3)], [(3, 8, 3), (4, 8, 3), (8, 8, 3)]]
    assert asked[1]["coefficients"] == [(10, 6), (20, 6), (30, 6)] and asked[0]["timesteps"] == [(1,), (5,), (9,)]
    assert asked[1]["observation"] == [(3, 5), (4, 5), (8, 5)]
    assert bundle.manifest["engine"]["compute_capabilities"] == []


def test_any_size_asks_for_ranges(tiny):
    manifest = copy.deepcopy(dict(tiny.manifest))
    manifest["inputs"][0]["shape"][2:] = ["height", "width"]
    with pytest.raises(ValueError, match=r"profiles: width is missing, and this bundle takes any"):
        Profile(height=(4, 8, 16)).ranges(manifest)
    ranges = Profile(height=(4, 8, 16), width=(8, 8, 8)).ranges(manifest)
    assert ranges == {"batch": (1, 1, 8), "height": (4, 8, 16), "steps": (1, 50, 1000), "width": (8, 8, 8)}


@pytest.mark.slow
def test_any_size_is_built(tmp_path):
    source = write_unet(conditional_unet(), tmp_path / "graph", kind="step", dynamic_size=True)
    sides = (8, 16, 32)
    options = TensorRTOptions(flavour="rtx", profiles=(Profile(height=sides, width=sides),))
    bundle = export_tensorrt(source, tmp_path / "engine", options)
    assert bundle.manifest["engine"]["profiles"] == [{"batch": [1, 1, 8], "height": [*sides], "width": [*sides]}]


def check_components(bundle, names):
    engines = ["model.engine", *(f"{name}.engine" for name in names)]
    assert sorted(name for name in bundle.manifest["files"] if name.endswith(".engine")) == sorted(engines)
    assert {name: bundle.component_path(name).name for name in bundle.components} == {
        name: f"{name}.engine" for name in names
    }
    assert sorted(bundle.manifest["engine"]["source"]) == sorted(name.replace(".engine", ".onnx") for name in engines)
    log = (bundle.path / "build.log").read_text()
    assert [line[3:] for line in log.splitlines() if line.startswith("== ")] == engines


def test_each_graph_of_a_pipeline_is_built(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny.path, tmp_path / "graph")
    names = ["text_encoder", "vae_decoder"]
    for name in names:
        shutil.copy(folder / "model.onnx", folder / f"{name}.onnx")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "words.txt").write_text("a")

    def add(manifest):
        kept = {key: manifest[key] for key in ("inputs", "outputs")}
        manifest["components"] = {name: {"model": f"{name}.onnx", "meaning": "a part", **kept} for name in names}
        manifest["files"] |= {f"{name}.onnx": manifest["files"]["model.onnx"] for name in names}
        words = folder / "tokenizer" / "words.txt"
        manifest["files"]["tokenizer/words.txt"] = {"sha256": sha256(words), "bytes": 1}

    edit(folder, add)
    bundle = export_tensorrt(folder, tmp_path / "engine", RTX)
    check_components(bundle, names)
    assert (bundle.path / "tokenizer" / "words.txt").read_text() == "a"
    with pytest.raises(BundleError, match=r"is of runtime 'tensorrt', not 'onnx'"):
        OrtPipeline(bundle)
    assert main(["run", str(bundle.path), "--prompt", "a"]) == 2
    assert "is a whole pipeline for 'tensorrt'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_whole_pipelines_are_built(tmp_path):
    write = functools.partial(export_pipeline, make_pipeline("sdxl"), parity_steps=())
    bundle = export_tensorrt(write, tmp_path / "engine", RTX)
    check_components(bundle, ["text_encoder", "text_encoder_2", "vae_decoder"])
    assert any(name.startswith("tokenizer_2/") for name in bundle.manifest["files"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "graph", stochastic=True)


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    return export_tensorrt(tiny, tmp_path_factory.mktemp("built") / "engine", RTX).path


def test_the_same_build_has_the_same_manifest_but_for_the_bytes(tiny, built, tmp_path):
    # TensorRT's own bytes differ from build to build.
    first = dict(open_bundle(built).manifest)
    second = dict(export_tensorrt(tiny, tmp_path / "engine", RTX).manifest)
    assert {key: value for key, value in first.items() if key != "files"} == {
        key: value for key, value in second.items() if key != "files"
    }


def refused(folder, *operators):
    """A tiny bundle whose graph has operators that TensorRT refuses."""
    source = write_tiny(folder, kind="step")
    model = onnx.load(source.model_path)
    (value,) = (output for output in model.graph.output if output.name == "next_sample")
    value.name = "again"
    previous = "next_sample"
    for k, operator in enumerate(operators):
        following = "again" if k == len(operators) - 1 else f"odd_{k}"
        model.graph.node.append(onnx.helper.make_node(operator, [previous], [following], name=f"the_{operator}"))
        previous = following
    onnx.save(model, source.model_path)
    changed = {"sha256": sha256(source.model_path), "bytes": source.model_path.stat().st_size}
    edit(source.path, lambda manifest: manifest["files"].update({"model.onnx": changed}))
    return source.path


def test_refused_nodes_are_named(tmp_path):
    source = refused(tmp_path / "graph", "Det", "StringNormalizer")
    with pytest.raises(
        ExportError, match=r"TensorRT-RTX .* refuses model.onnx: node 'the_Det' \(Det\): .*; node 'the_Str"
    ):
        export_tensorrt(source, tmp_path / "engine", RTX)
    assert os.listdir(tmp_path) == ["graph"]


def test_a_build_that_fails_says_why_and_leaves_nothing(tiny, tmp_path):
    options = TensorRTOptions(flavour="rtx", profiles=RTX.profiles, version_compatible=True)
    with pytest.raises(ExportError, match=r"cannot build model.onnx: ERROR: .*libnvinfer_lean"):
        export_tensorrt(tiny, tmp_path / "engine", options)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(tiny, tmp_path):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = set(os.listdir(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"File too large"):
            export_tensorrt(tiny, tmp_path / "engine", RTX)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert set(os.listdir(tmp_path)) == before


BAD_OPTIONS = {
    "flavour: 'lite' is not one of": {"flavour": "lite"},
    r"profiles: \(\); pass one or more": {"profiles": ()},
    "workspace: 0; pass an integer >= 1": {"workspace": 0},
    r"builder_optimization_level: 6; pass an integer in \[0, 5\]": {"builder_optimization_level": 6},
    r"hardware_compatibility: 'any' is not one of": {"hardware_compatibility": "any"},
    r"compute_capabilities: '89'; pass such as '8.9'": {"compute_capabilities": ("89",)},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options_are_named(message):
    with pytest.raises(ValueError, match=message):
        TensorRTOptions(**BAD_OPTIONS[message])


BAD_PROFILES = {
    r"batch \(2, 1, 4\); pass 1 <= min <= opt <= max": "batch=2:1:4",
    r"batch \(1, 5, 4\); pass 1 <= min <= opt <= max": "batch=1:5:4",
    r"steps \(0, 1, 4\); pass 1 <= min <= opt <= max": "steps=0:1:4",
    r"batch \(1, 2\); pass three integers \(min, opt, max\)": "batch=1:2",
    "'depth' in 'depth=1:2:3'; pass each of batch, steps, height, width at most once": "depth=1:2:3",
    "'batch' in 'batch=1:2:3,batch=1:2:3'; pass each": "batch=1:2:3,batch=1:2:3",
    "'steps=1:x:3' in 'steps=1:x:3'; pass steps=MIN:OPT:MAX": "steps=1:x:3",
    "'batch' in 'batch'; pass batch=MIN:OPT:MAX": "batch",
}


@pytest.mark.parametrize("message", BAD_PROFILES)
def test_bad_profiles_are_named(message):
    with pytest.raises(ValueError, match=f"profiles: {message}"):
        Profile.parse(BAD_PROFILES[message])


UNFIT = {
    "profiles: height is no dimension of this bundle, which has batch, steps": {
        "profiles": (Profile(height=(1, 2, 3)),),
    },
    r"compute_capabilities: '9.0'; TensorRT-RTX .* builds for 7.5, 8.0, 8.6, 8.9, 12.0": {
        "compute_capabilities": ("8.9", "9.0"),
    },
    r"timing_cache: TensorRT-RTX .* \(flavour 'rtx'\) has no such option": {"timing_cache": "cache"},
    r"hardware_compatibility: TensorRT-RTX .* has no such option": {"hardware_compatibility": "ampere_plus"},
}  # fmt: skip


@pytest.mark.parametrize("message", UNFIT)
def test_what_a_flavour_or_bundle_does_not_have_is_refused(tiny, tmp_path, message):
    with pytest.raises(ValueError, match=message):
        export_tensorrt(tiny, tmp_path / "engine", TensorRTOptions(flavour="rtx", **UNFIT[message]))
    assert os.listdir(tmp_path) == []


def test_a_source_that_is_no_onnx_bundle_is_refused(built, tmp_path):
    with pytest.raises(BundleError, match=r"is of runtime 'tensorrt', not 'onnx'"):
        export_tensorrt(built, tmp_path / "engine", RTX)
    with pytest.raises(BundleError, match=r"is of runtime 'tensorrt', not 'onnx'; run it with .*TensorRTSampler"):
        OrtSampler(built)


def test_graphs_with_integers_that_tensorrt_lacks_are_refused(tiny, tmp_path):
    for name in ("per_sample_steps", "seeded"):
        folder = shutil.copytree(tiny.path, tmp_path / name)
        edit(folder, lambda manifest, name=name: manifest["sampling"].update({name: True}))
        with pytest.raises(ValueError, match="per_sample_steps, seeded: TensorRT takes no such graph"):
            export_tensorrt(folder, tmp_path / "engine", RTX)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("flavour", ["auto", "standard", "rtx"])
def test_a_missing_library_is_named_with_its_remedy(tiny, tmp_path, flavour, monkeypatch):
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    extra = r"pip install 'fastddim\[tensorrt\]'" if flavour != "rtx" else r"pip install 'fastddim\[rtx\]'"
    with pytest.raises(ImportError, match=extra):
        export_tensorrt(tiny, tmp_path / "engine", TensorRTOptions(flavour=flavour))


def set_bytes(folder, start, content):
    """Change a file without the manifest noticing."""
    file = folder / "model.engine"
    changed = bytearray(file.read_bytes())
    changed[start : start + len(content)] = content
    file.write_bytes(changed)
    restamp(folder)


def cut(folder, size):
    file = folder / "model.engine"
    file.write_bytes(file.read_bytes()[:size])
    restamp(folder)


def restamp(folder):
    file = folder / "model.engine"
    told = {"sha256": sha256(file), "bytes": file.stat().st_size}
    edit(folder, lambda manifest: manifest["files"].update({"model.engine": told}))


def edit_engine(folder, **changes):
    edit(folder, lambda manifest: manifest["engine"].update(changes))


FOREIGN = {
    "is not the file that was exported": lambda folder: (folder / "model.engine").write_bytes(
        bytes((folder / "model.engine").stat().st_size)
    ),
    "is no TensorRT engine": lambda folder: set_bytes(folder, 0, b"junk"),
    "is no TensorRT engine; export it again": lambda folder: cut(folder, 20),
    "is of flavour 'standard', the manifest says 'rtx'": lambda folder: set_bytes(folder, 0, b"ftrt"),
    "is of version 9.7.1.116, the manifest says": lambda folder: set_bytes(folder, 24, b"\x09"),
    r"was built by version 1.0.1.116 of tensorrt_rtx, .* is installed; install that version": lambda folder: (
        set_bytes(folder, 24, b"\x01\x00\x01\x74"),
        edit_engine(folder, version="1.0.1.116"),
    ),
    "is for plan9 mips, this machine is .*; export it here": lambda folder: edit_engine(folder, platform="plan9 mips"),
    "the manifest has a profile without 'steps'; export it again": lambda folder: edit_engine(
        folder, profiles=[{"batch": [1, 2, 4]}]
    ),
    r"'engine' is a required property": lambda folder: edit(folder, lambda manifest: manifest.pop("engine")),
    "'slow' is not one of": lambda folder: edit_engine(folder, flavour="slow"),
}


@pytest.mark.parametrize("message", FOREIGN)
def test_a_foreign_or_damaged_engine_is_refused_before_it_is_read(built, tmp_path, message):
    folder = shutil.copytree(built, tmp_path / "engine")
    FOREIGN[message](folder)
    with pytest.raises(BundleError, match=message):
        TensorRTSampler(folder)


def test_a_sampler_says_that_it_needs_a_gpu(built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device: TensorRT needs an NVIDIA GPU"):
        TensorRTSampler(built)


def test_the_build_from_the_shell(tiny, tmp_path, capsys):
    out = str(tmp_path / "engine")
    command = ["export", "tensorrt", str(tiny.path), "--out", out, "--flavour", "rtx"]
    profile = ["--profile", "batch=1:2:4,steps=1:4:9", "--profile", "batch=5:6:7"]
    assert main([*command, *profile, "--compute-capability", "8.9", "--compute-capability", "12.0"]) == 0
    assert "loop, " in capsys.readouterr().out
    engine = open_bundle(out).manifest["engine"]
    assert engine["compute_capabilities"] == ["8.9", "12.0"]
    assert engine["profiles"] == [
        {"batch": [1, 2, 4], "steps": [1, 4, 9]},
        {"batch": [5, 6, 7], "steps": [1, 50, 1000]},
    ]
    for arguments, message in (
        (command, "--force"),
        ([*command, "--guidance"], "--guidance: is decided in the ONNX bundle; leave it out"),
        ([*command, "--parity-steps", "1"], "--parity-steps: is decided in the ONNX bundle"),
        ([*command, "--sampler-only"], "--sampler-only: is decided in the ONNX bundle"),
        ([*command, "--force", "--profile", "batch=9:8:7"], "--profile: batch (9, 8, 7); pass 1 <= min <= opt <= max"),
        ([*command, "--force", "--profile", "width=1:2:3"], "--profile: width is no dimension of this bundle"),
        ([*command, "--force", "--optimization-level", "6"], "--optimization-level: 6; pass an integer in [0, 5]"),
        ([*command, "--force", "--timing-cache", f"{out}.cache"], "--timing-cache: TensorRT-RTX"),
        (["run", out, "--labels", "1"], "no pictures"),
    ):
        assert main(arguments) == 2
        assert message in " ".join(capsys.readouterr().err.split())


# The sampler and the standard flavour, over a stand-in for the library.


@pytest.fixture
def fake(monkeypatch):
    module = fake_tensorrt.make_module()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(exporter, "_build_target", lambda library, options: ("A GPU", ["8.9"]))
    monkeypatch.setattr(sampler_module, "_pick_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(sampler_module, "compute_capability", lambda device: "8.9")
    return module


STANDARD = TensorRTOptions(
    flavour="standard", profiles=(Profile(batch=(1, 2, 3)), Profile(batch=(4, 4, 6), steps=(1, 3, 9)))
)


@functools.cache
def labels(batch):
    return np.resize(LABELS.numpy(), batch)


def call(sampler, batch=3, **arguments):
    given = {"seeds": 5, "guidance_scale": 2.0, "labels": labels(batch), "num_inference_steps": 4, **arguments}
    given.setdefault("uncond_kwargs", {"labels": np.zeros(batch, dtype=np.int64)})
    return sampler(batch, **given)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("steps") / "graph", kind="step", stochastic=True)


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("baked") / "graph", bake_schedule=True)


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["direct", "graph"])
@pytest.mark.parametrize("kind", ["tiny", "steps", "baked"])
def test_samples_are_those_of_the_graph(kind, cuda_graph, fake, tmp_path, request):
    source = request.getfixturevalue(kind)
    profiles = STANDARD.profiles
    bundle = export_tensorrt(source, tmp_path / "engine", TensorRTOptions(
        flavour="standard", profiles=tuple(Profile(batch=p.batch) for p in profiles) if kind == "steps" else profiles
    ))  # fmt: skip
    sampler = open_sampler(bundle, cuda_graph=cuda_graph)
    reference = OrtSampler(source)
    assert isinstance(sampler, TensorRTSampler) and sampler.device() == f"TensorRT {fake_tensorrt.VERSION}"
    for batch, count, eta in ((3, 4, 0.0), (5, 3, 0.7), (3, 4, 0.0), (1, 1, 0.0)):
        options = {"num_inference_steps": count, "eta": None if kind == "baked" else eta}
        actual = call(sampler, batch, **options)
        assert actual.dtype == torch.float32 and actual.shape == (batch, 2, 6, 6)
        np.testing.assert_allclose(actual.numpy(), call(reference, batch, **options), atol=2e-6)
    assert {c[1] for c in fake.calls if c[0] == "set_optimization_profile_async"} == {0, 1}
    contexts = sum(c[0] == "create_execution_context" for c in fake.calls)
    # One for each profile, or for each capture.
    assert contexts == (3 if cuda_graph else 2)


@pytest.mark.parametrize("graph", ["loop", "step"])
def test_an_engine_gets_a_tables_own_timesteps(graph, fake, tmp_path):
    source = write_flow(tmp_path / "graph", kind=graph)
    sampler = TensorRTSampler(export_tensorrt(source, tmp_path / "engine", TensorRTOptions(flavour="standard")))
    start = START_SCALE * normal_numpy([5, 6], 0, SHAPE, STREAM_INITIAL)
    np.testing.assert_allclose(sampler(2, seeds=5).numpy(), plain_loop(Wave(), start), atol=1e-5)
    with pytest.raises(ValueError, match="num_inference_steps: 3, but this bundle was made from a table"):
        sampler(2, seeds=5, num_inference_steps=3)


def test_the_engine_reads_and_writes_the_tensors_themselves(tiny, steps, fake, tmp_path):
    start = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    aligned = torch.empty(2 * 72 + 64)
    offset = (-aligned.data_ptr() % 256) // 4
    start = aligned[offset : offset + 144].view(2, 2, 6, 6).copy_(start)
    before = start.clone()
    for k, source in enumerate((tiny, steps)):
        bundle = export_tensorrt(source, tmp_path / f"engine{k}", TensorRTOptions(flavour="standard"))
        sampler = TensorRTSampler(bundle)
        fake.calls.clear()
        uncond = {"labels": np.zeros(2, dtype=np.int64)}
        result = sampler(start, num_inference_steps=5, guidance_scale=2.0, labels=labels(2), uncond_kwargs=uncond)
        placed = [c[2] for c in fake.calls if c[:2] == ("set_tensor_address", "sample")]
        output = "samples" if k == 0 else "next_sample"
        written = [c[2] for c in fake.calls if c[:2] == ("set_tensor_address", output)]
        assert placed[0] == start.data_ptr() and written[-1] == result.data_ptr()
        # Each step reads what the last one wrote, two states of its own in turn.
        assert placed[1:] == written[:-1] and len(set(written)) <= 2 and start.data_ptr() not in written
        assert sum(c[0] == "execute_async_v3" for c in fake.calls) == (1 if k == 0 else 5)
        assert torch.equal(start, before)


def test_an_address_that_tensorrt_would_refuse_is_copied(tiny, fake, tmp_path):
    sampler = TensorRTSampler(export_tensorrt(tiny, tmp_path / "engine", TensorRTOptions(flavour="standard")))
    storage = torch.zeros(200)
    first = next(k for k in range(64) if storage[k:].data_ptr() % 256)
    start = storage[first : first + 72].view(1, 2, 6, 6)
    uncond = {"labels": np.zeros(1, dtype=np.int64)}
    fake.calls.clear()
    sampler(start, num_inference_steps=2, guidance_scale=2.0, labels=labels(1), uncond_kwargs=uncond)
    assert ("set_tensor_address", "sample", start.data_ptr()) not in fake.calls


def test_a_capture_is_replayed_for_the_same_sizes_alone(steps, fake, tmp_path):
    options = TensorRTOptions(flavour="standard")
    sampler = TensorRTSampler(export_tensorrt(steps, tmp_path / "engine", options), cuda_graph=True)
    call(sampler, 2)
    first = call(sampler, 2)
    before = first.clone()
    fake.calls.clear()
    second = call(sampler, 2, seeds=6)
    # Only replays: no shape or address is set again, and an earlier result stays as it was.
    assert {c[0] for c in fake.calls} == {"execute_async_v3"} and len(fake.calls) == 4
    assert torch.equal(first, before) and not torch.equal(first, second) and torch.equal(first, call(sampler, 2))
    call(sampler, 3)
    assert sum(c[0] == "create_execution_context" for c in fake.calls) == 1


def test_a_number_of_steps_that_the_host_reads_is_part_of_a_capture(baked, fake, tmp_path):
    options = TensorRTOptions(flavour="standard")
    sampler = TensorRTSampler(export_tensorrt(baked, tmp_path / "engine", options), cuda_graph=True)
    for count in (3, 4, 3):
        call(sampler, 2, num_inference_steps=count)
    assert sum(c[0] == "create_execution_context" for c in fake.calls) == 2


def test_sizes_that_no_profile_has_are_named(tiny, fake, tmp_path):
    sampler = TensorRTSampler(export_tensorrt(tiny, tmp_path / "engine", STANDARD))
    with pytest.raises(
        ValueError, match=r"batch: 7; this engine takes 1 to 3, or 4 to 6; build one with such a profile"
    ):
        call(sampler, 7)
    with pytest.raises(ValueError, match=r"'steps': 20.*: none of this engine's profiles has all these sizes"):
        call(sampler, 5, num_inference_steps=20)
    assert torch.isfinite(call(sampler, 5, num_inference_steps=9)).all()


def test_what_is_loaded_goes_to_the_samplers_own_gpu(tiny, fake, tmp_path, monkeypatch):
    bundle = export_tensorrt(tiny, tmp_path / "engine", TensorRTOptions(flavour="standard", weight_streaming=True))

    @contextlib.contextmanager
    def current(device):
        fake.calls.append(("enter", device))
        yield
        fake.calls.append(("leave",))

    monkeypatch.setattr(sampler_module, "_current", current)
    fake.calls.clear()
    TensorRTSampler(bundle, weight_streaming_budget=1)
    assert [c[0] for c in fake.calls] == ["enter", "deserialize_cuda_engine", "leave"]


def test_errors_are_the_calls_own_and_warnings_are_logged(tiny, fake, tmp_path, caplog):
    sampler = TensorRTSampler(export_tensorrt(tiny, tmp_path / "engine", STANDARD))
    for severity, reason in ((fake.ILogger.Severity.ERROR, "first"), (fake.ILogger.Severity.WARNING, "slow tactic")):
        fake.messages = [(severity, reason)]
        fake.refuse.add("execute_async_v3")
        expected = "ERROR: first" if reason == "first" else "it gives no reason"
        with pytest.raises(RuntimeError, match=f"does not run the engine: {expected}"):
            call(sampler)
    assert [record.getMessage() for record in caplog.records] == ["TensorRT 10.14.1.48: WARNING: slow tactic"]
    fake.refuse.clear()
    for _ in range(3):
        call(sampler)
    assert len(sampler._log) == 1


@pytest.mark.parametrize(
    "refusal", ["set_input_shape", "set_tensor_address", "execute_async_v3", "create_execution_context"]
)
def test_what_tensorrt_refuses_is_an_error(tiny, fake, tmp_path, refusal):
    sampler = TensorRTSampler(export_tensorrt(tiny, tmp_path / "engine", STANDARD))
    fake.refuse.add(refusal)
    with pytest.raises(RuntimeError, match=r"TensorRT 10.14.1.48 "):
        call(sampler)
    fake.refuse.clear()
    assert torch.isfinite(call(sampler)).all()


def test_bad_calls_are_named_as_for_every_sampler(tiny, fake, tmp_path):
    sampler = TensorRTSampler(export_tensorrt(tiny, tmp_path / "engine", STANDARD))
    for arguments, message in (
        ({"guidance_scale": None}, "guidance_scale: None; this bundle has guidance"),
        ({"labels": np.zeros(3)}, r"labels: torch.float64 of shape \(3,\); pass int64"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0"),
        ({"seeds": None}, "seeds: None"),
    ):
        with pytest.raises(ValueError, match=message):
            call(sampler, **arguments)


def test_nan_is_blamed_on_its_step(fake, tmp_path):
    class Overflows(torch.nn.Module):
        def forward(self, x, t):
            return x * 0.1 + torch.where(t < 500, torch.inf, 0.0).reshape(-1, 1, 1, 1) * 1.0

    source = export_onnx(
        Overflows(), DDIMConfig(clip_sample=False), tmp_path / "graph", sample_shape=(1, 2, 2), parity_steps=()
    )
    bundle = export_tensorrt(source, tmp_path / "engine", TensorRTOptions(flavour="standard"))
    with pytest.raises(NotFiniteError, match=r"after step 5 \(timestep 400\)"):
        TensorRTSampler(bundle, check_finite=True)(1, seeds=0, num_inference_steps=10)


def test_the_options_reach_the_builder(tiny, fake, tmp_path):
    cache = tmp_path / "timings"
    options = TensorRTOptions(
        flavour="standard", workspace=1 << 20, builder_optimization_level=5, version_compatible=True,
        hardware_compatibility="ampere_plus", refit=True, weight_streaming=True, timing_cache=cache,
    )  # fmt: skip
    bundle = export_tensorrt(tiny, tmp_path / "engine", options)
    assert ("create_network", 2) in fake.calls
    assert ("set_memory_pool_limit", "WORKSPACE", 1 << 20) in fake.calls and ("clear_flag", "TF32") in fake.calls
    assert {c[1] for c in fake.calls if c[0] == "set_flag"} == {"VERSION_COMPATIBLE", "REFIT", "WEIGHT_STREAMING"}
    assert ("build", 5, fake.HardwareCompatibilityLevel.AMPERE_PLUS) in fake.calls
    recorded = bundle.manifest["engine"]["options"]
    assert recorded["hardware_compatibility"] == "ampere_plus" and recorded["tf32"] is False
    fake.calls.clear()
    export_tensorrt(tiny, tmp_path / "rounded", TensorRTOptions(flavour="standard", tf32=True))
    assert ("clear_flag", "TF32") not in fake.calls
    assert "timing_cache" not in recorded
    # The cache is written, read by the next build, and one of another version is left.
    assert cache.read_bytes() == b"timings of 10.14.1.48"
    export_tensorrt(tiny, tmp_path / "second", options)
    assert fake.calls[-1][0] != "set_timing_cache" and ("set_timing_cache", cache.read_bytes()) in fake.calls
    cache.write_bytes(b"timings of 9.0")
    fake.calls.clear()
    export_tensorrt(tiny, tmp_path / "third", options)
    assert [c[1] for c in fake.calls if c[0] == "set_timing_cache"] == [b"timings of 9.0", b""]
    assert cache.read_bytes() == b"timings of 10.14.1.48"
    # A damaged one is replaced.
    cache.write_bytes(b"junk")
    export_tensorrt(tiny, tmp_path / "fourth", options)
    assert cache.read_bytes() == b"timings of 10.14.1.48"


def test_an_engine_is_reused_only_if_all_that_made_it_is_the_same(tiny, fake, tmp_path):
    out = export_tensorrt(tiny, tmp_path / "engine", STANDARD).path
    stamp = (out / "model.engine").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match=r"exists; pass another folder"):
        export_tensorrt(tiny, out, STANDARD)

    def reuses(source=tiny, options=STANDARD):
        export_tensorrt(source, out, options, reuse=True)
        nonlocal stamp
        before, stamp = stamp, (out / "model.engine").stat().st_mtime_ns
        return before == stamp

    assert reuses()
    other = write_tiny(tmp_path / "other", stochastic=True, config=DDIMConfig(clip_sample_range=2.0))
    assert not reuses(other) and reuses(other)
    assert not reuses() and reuses()
    options = TensorRTOptions(flavour="standard", profiles=(Profile(batch=(1, 2, 5)),))
    assert not reuses(options=options) and reuses(options=options)
    edit(out, lambda manifest: manifest["engine"].update(version="1.0.0.0"))
    assert not reuses(options=options)
    # The graph is the same, and takes the table that the bundle says.
    rescheduled = tmp_path / "rescheduled"
    shutil.copytree(tiny.path, rescheduled)
    edit(rescheduled, lambda manifest: manifest["schedule"].update(beta_schedule="squaredcos_cap_v2"))
    assert not reuses(rescheduled, options) and reuses(rescheduled, options)
    assert open_bundle(out).manifest["schedule"]["beta_schedule"] == "squaredcos_cap_v2"
    # A damaged one is no reason to stop.
    (out / "model.engine").write_bytes(b"short")
    assert not reuses(options=options) and reuses(options=options)
    with pytest.raises(FileExistsError, match=r"is no TensorRT bundle, and reuse replaces no other"):
        export_tensorrt(tiny, other.path, STANDARD, reuse=True)
    (other.path / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(FileExistsError, match=r"is no TensorRT bundle, and reuse replaces no other"):
        export_tensorrt(tiny, other.path, STANDARD, reuse=True)
    assert sorted(os.listdir(tmp_path)) == ["engine", "other", "rescheduled"]


def test_members_that_a_version_lacks_are_named(tiny, fake, tmp_path):
    del fake.HardwareCompatibilityLevel
    options = TensorRTOptions(flavour="standard", hardware_compatibility="ampere_plus")
    with pytest.raises(
        ValueError, match=r"hardware_compatibility: TensorRT 10.14.1.48 \(flavour 'standard'\) has no such"
    ):
        export_tensorrt(tiny, tmp_path / "engine", options)
    # Even where a version has members of that name.
    fake.IBuilderConfig.set_compute_capability = None
    with pytest.raises(ValueError, match=r"compute_capabilities: TensorRT 10.14.1.48 .* has no such option"):
        export_tensorrt(tiny, tmp_path / "engine", TensorRTOptions(flavour="standard", compute_capabilities=("8.9",)))
    # TensorRT 11 has typed networks alone.
    fake.NetworkDefinitionCreationFlag = object()
    export_tensorrt(tiny, tmp_path / "engine", TensorRTOptions(flavour="standard"))
    assert ("create_network", 0) in fake.calls


def test_the_standard_flavour_says_that_it_builds_on_a_gpu(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make_module())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"flavour: TensorRT 10.14.1.48 builds for the GPU that is here"):
        export_tensorrt(tiny, tmp_path / "engine", TensorRTOptions())


def test_progress_is_told_and_may_end_the_build(tiny, fake, tmp_path):
    told = []
    export_tensorrt(tiny, tmp_path / "engine", STANDARD, progress=lambda *arguments: told.append(arguments))
    assert told[0] == ("Building engine", None, 0, 2) and ("Timing", "Building engine", 2, 3) in told
    assert told[-1] == ("Building engine", None, 2, 2)

    def interrupt(phase, parent, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_tensorrt(tiny, tmp_path / "other", STANDARD, progress=interrupt)
    assert os.listdir(tmp_path) == ["engine"]


def test_real_builds_are_told_and_ended_too(tiny, tmp_path):
    told = []

    def stop(phase, parent, done, total):
        told.append((phase, parent, done, total))
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_tensorrt(tiny, tmp_path / "engine", RTX, progress=stop)
    assert told[0][0] == "Building engine" and told[-1][2] == 4 and os.listdir(tmp_path) == []


def test_a_failed_build_has_the_logs_first_error(tiny, fake, tmp_path):
    fake.refuse.add("build")
    with pytest.raises(ExportError, match=r"TensorRT 10.14.1.48 cannot build model.onnx: ERROR: no tactic fits"):
        export_tensorrt(tiny, tmp_path / "engine", STANDARD)
    assert os.listdir(tmp_path) == []


def test_an_engine_for_another_gpu_or_version_is_refused(tiny, fake, tmp_path, monkeypatch):
    bundle = export_tensorrt(tiny, tmp_path / "engine", STANDARD)
    fake.refuse.add("deserialize_cuda_engine")
    with pytest.raises(BundleError, match=r"does not load with TensorRT 10.14.1.48: ERROR: cudaError 35"):
        TensorRTSampler(bundle)
    fake.refuse.clear()
    monkeypatch.setattr(sampler_module, "compute_capability", lambda device: "12.0")
    with pytest.raises(BundleError, match=r"is for compute capability 8.9, this GPU has 12.0; export it for this one"):
        TensorRTSampler(bundle)
    assert sum(c[0] == "deserialize_cuda_engine" for c in fake.calls) == 1
    compatible = TensorRTOptions(
        flavour="standard", hardware_compatibility="ampere_plus", version_compatible=True, profiles=STANDARD.profiles
    )
    newer = export_tensorrt(tiny, tmp_path / "newer", compatible)
    TensorRTSampler(newer)
    assert fake.calls[-1] == ("deserialize_cuda_engine", True)
    fake.__version__ = "10.16.0.72"
    TensorRTSampler(newer)
    monkeypatch.setattr(sampler_module, "compute_capability", lambda device: "8.9")
    with pytest.raises(BundleError, match=r"was built by version 10.14.1.48 of tensorrt, 10.16.0.72 is installed"):
        TensorRTSampler(bundle)
    fake.__version__ = "11.0.0.114"
    with pytest.raises(BundleError, match=r"was built by version 10.14.1.48"):
        TensorRTSampler(newer)


def test_weights_come_from_the_bundle_that_the_engine_is_from(tiny, steps, fake, tmp_path):
    stripped = export_tensorrt(tiny, tmp_path / "engine", TensorRTOptions(flavour="standard", strip_plan=True))
    with pytest.raises(ValueError, match=r"weights: None, but this engine was built without them"):
        TensorRTSampler(stripped)
    with pytest.raises(BundleError, match=r"is not the bundle that the engine was built from"):
        TensorRTSampler(stripped, weights=steps)
    sampler = TensorRTSampler(stripped, weights=tiny.path)
    assert fake.calls[-2:] == [("refit_from_file", str(tiny.model_path)), ("refit_cuda_engine",)]
    assert torch.isfinite(call(sampler)).all()
    fake.refuse.add("refit_cuda_engine")
    with pytest.raises(BundleError, match=r"weights: .* does not fit the engine"):
        TensorRTSampler(stripped, weights=tiny)
    plain = export_tensorrt(tiny, tmp_path / "plain", TensorRTOptions(flavour="standard"))
    with pytest.raises(ValueError, match=r"weights: given, but this engine cannot take others"):
        TensorRTSampler(plain, weights=tiny)


def test_options_of_a_sampler_that_its_engine_lacks_are_named(tiny, fake, tmp_path):
    streamed = export_tensorrt(tiny, tmp_path / "streamed", TensorRTOptions(flavour="standard", weight_streaming=True))
    assert TensorRTSampler(streamed, weight_streaming_budget=1000).engine.weight_streaming_budget_v2 == 1000
    plain = export_tensorrt(tiny, tmp_path / "plain", TensorRTOptions(flavour="standard"))
    with pytest.raises(ValueError, match=r"weight_streaming_budget: given, but this engine was built without"):
        TensorRTSampler(plain, weight_streaming_budget=1000)
    with pytest.raises(ValueError, match=r"runtime_cache: TensorRT 10.14.1.48 has none"):
        TensorRTSampler(plain, runtime_cache=tmp_path / "cache")
    assert json.loads(TensorRTSampler(plain).inspect()) == {"Layers": [], "form": "JSON"}


def test_the_commands_run_and_verify_an_engine(graphs, fake, tmp_path, capsys):
    export_tensorrt(graphs("digits, loop"), tmp_path / "engine", TensorRTOptions(flavour="standard"))
    arguments = ["--labels", "3,1,4", "--steps", "4", "--seed", "7"]
    assert main(["run", str(tmp_path / "engine"), *arguments, "--out", str(tmp_path / "engine.png")]) == 0
    assert "on TensorRT 10.14.1.48" in capsys.readouterr().out
    assert main(["run", str(graphs("digits, loop").path), *arguments, "--out", str(tmp_path / "graph.png")]) == 0
    ours, theirs = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("engine", "graph"))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1
    assert main(["run", str(tmp_path / "engine"), "--providers", "cpu"]) == 2
    assert "this bundle is of runtime 'tensorrt'" in " ".join(capsys.readouterr().err.split())
    assert main(["run", str(tmp_path / "engine"), "--weights", str(graphs("digits, loop").path)]) == 2
    assert "weights: given, but this engine cannot take others" in " ".join(capsys.readouterr().err.split())
    assert main(["run", str(graphs("digits, loop").path), "--weights", str(tmp_path)]) == 2
    assert "but this bundle is of runtime 'onnx'; leave it out" in " ".join(capsys.readouterr().err.split())
    assert main(["verify", str(tmp_path / "engine"), "--parity-steps", "3"]) == 0
    assert "3 steps: largest difference from torch" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True], ids=["direct", "graph"])
@pytest.mark.parametrize("kind", ["tiny", "steps", "baked"])
def test_engines_sample_as_the_graph_does_on_a_gpu(kind, cuda_graph, tmp_path, request):
    pytest.importorskip("tensorrt", reason="needs a GPU and TensorRT")
    source = request.getfixturevalue(kind)
    options = TensorRTOptions(flavour="standard", profiles=(Profile(batch=(1, 2, 4)),))
    sampler = TensorRTSampler(export_tensorrt(source, tmp_path / "engine", options), cuda_graph=cuda_graph)
    reference = OrtSampler(source, providers="cpu")
    for batch, count in ((3, 4), (1, 7), (3, 4)):
        options = {"num_inference_steps": count}
        actual = call(sampler, batch, **options).cpu().numpy()
        np.testing.assert_allclose(actual, call(reference, batch, **options), atol=1e-4)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        again = call(sampler, 3)
    stream.synchronize()
    np.testing.assert_allclose(again.cpu().numpy(), call(reference, 3), atol=1e-4)
    assert json.loads(sampler.inspect())
