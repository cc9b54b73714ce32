"""The C++ loader of TensorRT engines, under sanitizers over a stand-in for TensorRT and CUDA, and against their headers."""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import cpp_driver
import numpy as np
import pytest
import torch
import triton
from cpp_driver import ROOT, CppError, build

import fake_tensorrt
from damage import edit
from fastddim import DDIMConfig, Sampler
from fastddim.export import Profile, TensorRTOptions, export_tensorrt
from fastddim.export.tensorrt import exporter
from fastddim.noise import STREAM_INITIAL, normal_numpy
from flow import SHAPE, START_SCALE, flow_table, plain_loop
from test_export import export_tiny
from test_export_tensorrt import restamp, set_bytes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CppSampler = partial(cpp_driver.CppSampler, runtime="tensorrt")
PROFILES = (Profile(batch=(1, 2, 3)), Profile(batch=(4, 4, 6)))
CONFIG = DDIMConfig(clip_sample=False)


@pytest.fixture(scope="module")
def driver():
    return build("checked", "driver") / "driver"


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """A bundle for each graph; the stand-in's engine is the same whatever is in the file."""
    folder = tmp_path_factory.mktemp("engines")
    options = TensorRTOptions(flavour="standard", profiles=PROFILES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", fake_tensorrt.make_module())
        patch.setattr(exporter, "_build_target", lambda library, options: ("A GPU", ["8.9"]))
        for graph in ("loop", "step"):
            source = export_tiny(folder / f"{graph}-onnx", CONFIG, kind=graph, guided=True, stochastic=True)
            export_tensorrt(source, folder / graph, options)
            source = export_tiny(folder / f"flow-{graph}-onnx", flow_table(), kind=graph, guided=True)
            export_tensorrt(source, folder / f"flow-{graph}", options)
            source = export_tiny(folder / f"dpm-{graph}-onnx", CONFIG, kind=graph, guided=True, method="dpmsolver++")
            export_tensorrt(source, folder / f"dpm-{graph}", options)
    return folder


@pytest.fixture
def copied(engines, tmp_path):
    return shutil.copytree(engines / "loop", tmp_path / "engine")


def conditions(batch):
    return {
        "labels": np.resize(np.array([1, 4, 2]), batch),
        "uncond_kwargs": {"labels": np.resize(np.array([0, 3]), batch)},
        "guidance_scale": np.linspace(1.5, 3.0, batch, dtype=np.float32),
    }


def expected(batch, steps, eta=None, **options):
    """The stand-in's model, its guidance done by hand, in torch."""
    given = conditions(batch)
    cond, uncond = given["labels"], given["uncond_kwargs"]["labels"]
    shift = torch.from_numpy(uncond + given["guidance_scale"] * (cond - uncond)).float()[:, None, None, None]
    sampler = Sampler(lambda x, t: 0.1 * x + shift, CONFIG, steps, eta=eta, sample_shape=(2, 6, 6), **options)
    return sampler(batch, seeds=7).numpy()


def run(sampler, batch, steps=4, eta=0.0):
    return sampler(batch, seeds=7, num_inference_steps=steps, eta=eta, **conditions(batch))


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["direct", "graph"])
@pytest.mark.parametrize("graph", ["loop", "step"])
def test_samples_are_pythons(driver, engines, graph, cuda_graph, tmp_path):
    log = tmp_path / "log"
    calls = [(3, 4, 0.0), (3, 4, 0.0), (5, 3, 0.6), (3, 4, 0.9), (1, 1, 0.0), (2, 9, 1.0), (2, 9, 1.0), (2, 9, 0.0)]
    with CppSampler(driver, engines / graph, env={"FAKE_LOG": str(log)}, cuda_graph=cuda_graph) as sampler:
        for batch, steps, eta in calls:
            actual = run(sampler, batch, steps, eta)
            np.testing.assert_allclose(actual, expected(batch, steps, eta), rtol=1e-5, atol=1e-5)
    told = [line.split() for line in log.read_text().splitlines()]
    names = [line[0] for line in told]
    # A context for each profile, not for each call or size.
    assert [line[1] for line in told if line[0] == "setOptimizationProfileAsync"] == ["0", "1"]
    steps = sum(count for _, count, _ in calls)
    if cuda_graph:
        assert names.count("cudaStreamBeginCapture") == names.count("cudaGraphInstantiate") > 0
        assert names.count("cudaGraphLaunch") + names.count("enqueueV3") - names.count("cudaStreamBeginCapture") == (
            len(calls) if graph == "loop" else steps
        )
    else:
        assert names.count("enqueueV3") == (len(calls) if graph == "loop" else steps) and "cudaGraphLaunch" not in names


@pytest.mark.parametrize("graph", ["loop", "step"])
def test_the_previous_x0_is_carried(driver, engines, graph):
    with CppSampler(driver, engines / f"dpm-{graph}") as sampler:
        for batch, steps in ((3, 4), (2, 9), (3, 4)):
            actual = sampler(batch, seeds=7, num_inference_steps=steps, **conditions(batch))
            np.testing.assert_allclose(actual, expected(batch, steps, method="dpmsolver++"), rtol=1e-5, atol=1e-5)


class StandIn(torch.nn.Module):
    """The stand-in's model for all samples at label 1, where timesteps are float."""

    def forward(self, x, t):
        return 0.1 * x + 1 + t[:, None, None, None] / 1000


@pytest.mark.parametrize("graph", ["loop", "step"])
def test_a_tables_own_timesteps_are_what_the_engine_gets(driver, engines, graph):
    labels = {"labels": np.ones(3, dtype=np.int64), "guidance_scale": np.ones(1, dtype=np.float32)}
    start = START_SCALE * normal_numpy([7, 8, 9], 0, SHAPE, STREAM_INITIAL)
    with CppSampler(driver, engines / f"flow-{graph}", env={"FAKE_FLOATS": "1"}) as sampler:
        samples = sampler(3, seeds=7, uncond_kwargs={"labels": np.zeros(3, dtype=np.int64)}, **labels)
    np.testing.assert_allclose(samples, plain_loop(StandIn(), start), rtol=1e-5, atol=1e-5)
    with pytest.raises(CppError, match=r"has no 'timesteps?' of dtype float32 as the manifest says"):
        CppSampler(driver, engines / f"flow-{graph}")


def test_the_state_stays_on_the_gpu(driver, engines, tmp_path):
    log = tmp_path / "log"
    with CppSampler(driver, engines / "step", env={"FAKE_LOG": str(log)}) as sampler:
        run(sampler, 2, steps=5)
    copies = [
        tuple(map(int, line.split()[1:])) for line in log.read_text().splitlines() if line.startswith("cudaMemcpy")
    ]
    size = 2 * 2 * 6 * 6 * 4
    to_device, to_host, on_device = ([size for kind, size in copies if kind == wanted] for wanted in (1, 2, 3))
    # The start, and zeros for noise in each step; the rest of the states are on the device, but for the result.
    assert to_device.count(size) == 1 + 5 and on_device == [size] * 4 and to_host == [size]
    # Conditions and scales go there once, rows and timesteps in each step.
    assert to_device.count(2 * 6 * 4) == 5 and to_device.count(2 * 8) == 2 + 5 and to_device.count(2 * 4) == 1


def test_threads_take_turns(driver, engines):
    calls = [(batch, {"seeds": 7, "num_inference_steps": 5, **conditions(batch)}) for batch in (1, 2, 3, 4, 5, 6)]
    with CppSampler(driver, engines / "step", cuda_graph=True, device=1) as sampler:
        results = sampler.concurrent(calls)
        np.testing.assert_allclose(run(sampler, 2), expected(2, 4, 0.0), rtol=1e-5, atol=1e-5)
    whole = np.concatenate([expected(batch, 5, 0.0).ravel() for batch, _ in calls])
    np.testing.assert_allclose(results, whole, rtol=1e-5, atol=1e-5)


def test_sizes_that_no_profile_has_are_named(driver, engines):
    with CppSampler(driver, engines / "loop") as sampler:
        with pytest.raises(
            CppError, match=r"batch 7, steps 4; this engine takes batch 1 to 3, steps 1 to 1000, batch 4"
        ):
            run(sampler, 7)
        with pytest.raises(CppError, match="guidance_scale: missing"):
            sampler(2, seeds=0, num_inference_steps=2, labels=np.zeros(2, np.int64))
        np.testing.assert_allclose(run(sampler, 2), expected(2, 4, 0.0), rtol=1e-5, atol=1e-5)


REFUSALS = {
    "createExecutionContext": "TensorRT has no context: no",
    "setOptimizationProfileAsync": "TensorRT refuses a profile: no",
    "setInputShape": r"TensorRT refuses guidance_scale \[2\]: no",
    "setTensorAddress": "TensorRT refuses the address of guidance_scale: no",
    "inferShapes": "TensorRT has no value for sample: no",
    "enqueueV3": "TensorRT does not run the engine: no",
    "cudaMalloc": "cudaMalloc: out of memory",
    "cudaMemcpyAsync": "cudaMemcpyAsync: out of memory",
    "cudaStreamSynchronize": "cudaStreamSynchronize: out of memory",
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_tensorrt_refuses_is_an_error(driver, engines, refusal):
    message = REFUSALS[refusal].replace("no context: no", "no context: it gives no reason")
    with CppSampler(driver, engines / "loop", env={"FAKE_REFUSE": refusal}) as sampler:
        for _ in range(2):
            with pytest.raises(CppError, match=message) as raised:
                run(sampler, 2)
            assert raised.value.kind == "other"


@pytest.mark.parametrize("refusal", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_an_engine_that_cannot_be_captured_is_run_without_a_graph(driver, engines, refusal, tmp_path):
    log = tmp_path / "log"
    settings = {"FAKE_REFUSE": refusal, "FAKE_LOG": str(log)}
    with CppSampler(driver, engines / "step", env=settings, cuda_graph=True) as sampler:
        np.testing.assert_allclose(run(sampler, 2), expected(2, 4, 0.0), rtol=1e-5, atol=1e-5)
    told = log.read_text().split()
    assert told.count(refusal) == 1 and "cudaGraphLaunch" not in told


def edit_engine(folder, **changes):
    edit(folder, lambda manifest: manifest["engine"].update(changes))


def edit_options(folder, **changes):
    edit(folder, lambda manifest: manifest["engine"]["options"].update(changes))


FOREIGN = {
    "is no engine of flavour 'standard'": lambda folder: set_bytes(folder, 0, b"vtrt"),
    "is of flavour 'rtx', this program has 'standard'": lambda folder: edit_engine(folder, flavour="rtx"),
    "is not of version 10.14.1.48 as the manifest says": lambda folder: set_bytes(folder, 25, b"\x07"),
    "was built without its weights": lambda folder: edit_options(folder, strip_plan=True),
    "is for compute capability 9.0, 12.0, this GPU has 8.9": lambda folder: edit_engine(
        folder, compute_capabilities=["9.0", "12.0"]
    ),
    r"\$: 'engine' is a required property": lambda folder: edit(folder, lambda manifest: manifest.pop("engine")),
    r"\$.engine.profiles: no profile": lambda folder: edit_engine(folder, profiles=[]),
    "is not a least, best and largest size": lambda folder: edit_engine(folder, profiles=[{"batch": [1, 2]}]),
    "has no 'samples' of dtype float16 as the manifest says": lambda folder: edit(
        folder, lambda manifest: manifest["outputs"][0].update(dtype="float16")
    ),
    "not the file that was exported": lambda folder: (folder / "model.engine").write_bytes(
        bytes((folder / "model.engine").stat().st_size)
    ),
    "'standard', 'rtx'": lambda folder: edit_engine(folder, flavour="slow"),
    "is of runtime 'onnx', not 'tensorrt'": lambda folder: edit(
        folder, lambda manifest: manifest.update(runtime="onnx")
    ),
}


@pytest.mark.parametrize("message", FOREIGN)
def test_a_foreign_engine_is_refused(driver, copied, message):
    FOREIGN[message](copied)
    with pytest.raises(CppError, match=message) as raised:
        CppSampler(driver, copied)
    assert raised.value.kind == "BundleError"


def test_a_short_engine_is_refused(driver, copied):
    (copied / "model.engine").write_bytes(b"ftrt")
    restamp(copied)
    with pytest.raises(CppError, match="is no engine of flavour 'standard'"):
        CppSampler(driver, copied)


def test_versions_and_gpus_that_an_engine_takes(driver, copied):
    newer = {"FAKE_VERSION": "10.16.0"}
    with pytest.raises(CppError, match=r"was built by version 10.14.1.48, this is 10.16.0; install that version"):
        CppSampler(driver, copied, env=newer)
    edit_options(copied, version_compatible=True)
    for env in ({"FAKE_VERSION": "10.13.9"}, {"FAKE_VERSION": "11.0.0"}):
        with pytest.raises(CppError, match=r"was built by version 10.14.1.48"):
            CppSampler(driver, copied, env=env)
    edit_options(copied, hardware_compatibility="ampere_plus")
    with pytest.raises(CppError, match=r"this GPU has 7.5"):
        CppSampler(driver, copied, env={**newer, "FAKE_CAPABILITY": "7.5"})
    with CppSampler(driver, copied, env={**newer, "FAKE_CAPABILITY": "12.0"}) as sampler:
        assert run(sampler, 1).shape == (1, 2, 6, 6)
    with pytest.raises(CppError, match="does not load: it is for another planet; export it again"):
        CppSampler(driver, copied, env={**newer, "FAKE_REFUSE": "deserializeCudaEngine"})


def test_nan_is_blamed_on_its_step(driver, copied):
    # An infinite coefficient in the third row.
    def spoil(manifest):
        manifest["table"]["coefficients"][2][5] = 1e300

    edit(copied, spoil)
    with (
        CppSampler(driver, copied, check_finite=True) as sampler,
        pytest.raises(CppError, match="NaN or infinite values after step 2 ") as raised,
    ):
        sampler(2, seeds=7, **conditions(2))
    assert raised.value.kind == "NotFiniteError"


@pytest.mark.parametrize(
    "definition", [[], pytest.param(["-DFASTDDIM_TENSORRT_RTX"], marks=pytest.mark.slow)], ids=["standard", "rtx"]
)
def test_the_loader_compiles_against_tensorrts_own_headers(definition, tmp_path):
    source = tmp_path / "loader.cpp"
    source.write_text('#include "fastddim/trt_sampler.hpp"\nfastddim::Array<float> f(const fastddim::TrtSampler& sampler)'
                      " { return sampler(fastddim::Call{}); }\n")  # fmt: skip
    includes = [f"-I{ROOT}/cpp/include", "-isystem", f"{ROOT}/build/tensorrt/include"]
    cuda = ["-isystem", str(Path(triton.__file__).parent / "backends" / "nvidia" / "include")]
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"]
    done = subprocess.run(["g++", *flags, *definition, *includes, *cuda, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rtx", ["OFF", "ON"])
def test_cmake_finds_tensorrt_where_it_is_told(rtx, tmp_path):
    command = ["cmake", "-S", str(ROOT / "cpp"), "-B", str(tmp_path / "build"), "-DFASTDDIM_ORT=OFF",
               "-DFASTDDIM_TENSORRT=ON", f"-DFASTDDIM_TENSORRT_RTX={rtx}", f"-DTENSORRT_ROOT={tmp_path}",
               f"-DCUDAToolkit_ROOT={tmp_path}"]  # fmt: skip
    missing = subprocess.run(command, capture_output=True, text=True)
    assert missing.returncode != 0 and "pass -DTENSORRT_ROOT=FOLDER" in " ".join(missing.stderr.split())
    shutil.copytree(ROOT / "cpp" / "tests" / "tensorrt", tmp_path / "include")
    (tmp_path / "lib").mkdir()
    for name in ("tensorrt_rtx" if rtx == "ON" else "nvinfer", "cudart"):
        (tmp_path / "lib" / f"lib{name}.so").write_bytes(b"")
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    prefix = [f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'installed'}", "-P", str(tmp_path / "build" / "cmake_install.cmake")]
    subprocess.run(["cmake", *prefix], check=True, capture_output=True)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(user CXX)\nfind_package(fastddim REQUIRED COMPONENTS tensorrt)\n"
        'get_target_property(defined fastddim::tensorrt INTERFACE_COMPILE_DEFINITIONS)\nmessage(STATUS "it is ${defined}")\n'
    )
    user = ["cmake", "-S", str(tmp_path / "user"), "-B", str(tmp_path / "user" / "build"),
            f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}", *command[-2:]]  # fmt: skip
    done = subprocess.run(user, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("FASTDDIM_TENSORRT_RTX" in done.stdout.split("it is ")[1]) == (rtx == "ON")
