"""AOTInductor packages against the sampler, from Python; what needs a GPU is traced here and run where there is one."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import stub_cuda
import torch
from cpp_driver import CppError, CppSampler, build
from PIL import Image

from damage import edit, flip_a_byte
from fastddim import Clip, DDIMConfig, Sampler
from fastddim.cli import main
from fastddim.export import (
    AotiSampler,
    BundleError,
    ExportError,
    ExportOptions,
    NotFiniteError,
    OrtSampler,
    ParityError,
    export_aoti,
    export_onnx,
    open_bundle,
    open_sampler,
    verify_bundle,
)
from fastddim.export.aoti import exporter
from fastddim.export.aoti import sampler as sampler_module
from fastddim.export.machine import compute_capability, cpu_features
from fastddim.noise import STREAM_INITIAL, normal_numpy
from flow import START_SCALE, Wave, flow_table, plain_loop
from test_export import CONFIGS, LABELS, SHAPE, Tiny, class_pipeline, conditional_unet, sample_tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


KEPT = CONFIGS["threshold"]
# torch 2.11 compiles for the machine that it is on.
CHOOSES_ISA = os.uname().machine == "x86_64" and hasattr(torch._inductor.config.cpp, "march")


def export_tiny(folder, config=None, *, model=None, parity_steps=(1, 4), device="cpu", cpu_isa=None, **options):
    return export_aoti(
        model or Tiny(),
        config or DDIMConfig(),
        folder,
        ExportOptions(**options),
        device=device,
        cpu_isa=cpu_isa,
        sample_shape=SHAPE,
        example_kwargs={"labels": LABELS},
        parity_steps=parity_steps,
    )


def run_tiny(bundle, batch=3, **arguments):
    labels = torch.from_numpy(np.resize(LABELS.numpy(), batch))
    uncond = {"labels": torch.zeros_like(labels)} if open_bundle(bundle).manifest["sampling"]["guided"] else None
    samples = AotiSampler(bundle)(batch, seeds=5, labels=labels, uncond_kwargs=uncond, **arguments)
    assert isinstance(samples, torch.Tensor) and samples.dtype == torch.float32
    return samples.numpy(force=True)


@contextlib.contextmanager
def temporary_folder(folder):
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A loop with all inputs and a threshold; Inductor's own files lie in the temporary folder."""
    folder = tmp_path_factory.mktemp("kept")
    with temporary_folder(folder):
        export_tiny(folder / "bundle", KEPT, guided=True, guidance_rescale=True, stochastic=True)
    return folder / "bundle"


@pytest.fixture
def copied(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "bundle")


def test_the_loop_samples_as_the_sampler_does(kept):
    for batch, steps, eta in ((1, 1, 0.0), (3, 7, 0.5), (8, 12, 1.0)):
        actual = run_tiny(kept, batch, num_inference_steps=steps, eta=eta, guidance_scale=3.0, guidance_rescale=0.7)
        expected = sample_tiny(KEPT, steps, batch, eta=eta, guidance_scale=3.0, guidance_rescale=0.7)
        np.testing.assert_allclose(actual, expected, atol=2e-5)


# A method that looks back carries the previous x0.
GUIDED = [
    pytest.param(DDIMConfig(), {"guidance_method": "cfg++"}, marks=pytest.mark.slow),
    (
        DDIMConfig(clip_sample=False),
        {"guidance_method": "apg", "apg_eta": 0.3, "apg_norm_threshold": 5.0, "method": "dpmsolver++"},
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "options"), GUIDED, ids=["cfg++", "apg, looks back"])
def test_the_loop_guides_as_the_sampler_does(tmp_path, config, options):
    export_tiny(tmp_path / "bundle", config, guided=True, **options)
    for batch, steps in ((1, 2), (3, 9)):
        actual = run_tiny(tmp_path / "bundle", batch, num_inference_steps=steps, guidance_scale=0.7)
        expected = sample_tiny(config, steps, batch, guidance_scale=0.7, **options)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_table_brings_prediction_type_and_spacing(copied, prediction):
    changes = {"prediction_type": prediction, "timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"}
    edit(copied, lambda manifest: manifest["schedule"].update(changes))
    # Another default device changes nothing.
    with torch.device("meta"):
        actual = run_tiny(copied, num_inference_steps=9, guidance_scale=2.0)
    np.testing.assert_allclose(actual, sample_tiny(replace(KEPT, **changes), 9, guidance_scale=2.0), atol=2e-5)


def test_arrays_and_tensors_are_the_same(kept):
    sampler = AotiSampler(kept)
    start = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    arguments = {"num_inference_steps": 4, "guidance_scale": torch.tensor([1.5, 6.0])}
    labels, null = LABELS[:2], torch.zeros(2, dtype=torch.int64)
    tensors = sampler(start, labels=labels, uncond_kwargs={"labels": null}, **arguments)
    arguments["guidance_scale"] = np.array([1.5, 6.0])
    arrays = sampler(start.numpy(), labels=labels.numpy(), uncond_kwargs={"labels": null.numpy()}, **arguments)
    assert torch.equal(tensors, arrays)
    for k, scale in enumerate((1.5, 6.0)):
        expected = Sampler(Tiny(), KEPT, 4, sample_shape=SHAPE, guidance_scale=scale)(
            start.float(), labels=labels, uncond_kwargs={"labels": null}
        )
        np.testing.assert_allclose(tensors[k], expected[k], atol=1e-5)


STEP = {"method": "dpmsolver++", "method_options": {"algorithm_type": "sde-dpmsolver++"}}


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """One step, which looks back, with noise and no limit."""
    folder = tmp_path_factory.mktemp("step") / "bundle"
    return export_tiny(folder, CONFIGS["v, trailing"], kind="step", stochastic=True, **STEP)


def test_one_step_a_call(step):
    assert step.names("outputs") == ["next_sample", "pred_original_sample"]
    for batch, steps in ((1, 1), (5, 7)):
        expected = sample_tiny(CONFIGS["v, trailing"], steps, batch, **STEP)
        np.testing.assert_allclose(
            run_tiny(step.path, batch, num_inference_steps=steps), expected, rtol=1e-4,
            atol=2e-5 * np.abs(expected).max(),
        )  # fmt: skip


@pytest.fixture(scope="module")
def driver():
    return build("aoti", "aoti_driver") / "aoti_driver"


def test_the_cpp_loader_makes_the_same_samples(kept, step, driver):
    labels, null = LABELS.numpy(), {"labels": np.zeros(3, dtype=np.int64)}
    guided = {"guidance_scale": 3.0, "guidance_rescale": 0.7, "uncond_kwargs": null, "eta": 0.5}
    for folder, arguments in ((kept, guided), (step.path, {})):
        arguments = {"seeds": 5, "labels": labels, "num_inference_steps": 7, **arguments}
        python = AotiSampler(folder)
        with CppSampler(driver, folder) as sampler:
            expected = python(3, **arguments).numpy()
            np.testing.assert_allclose(sampler(3, **arguments), expected, atol=1e-4)
            start = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
            np.testing.assert_allclose(sampler(start, **arguments), python(start, **arguments), atol=1e-4)
            several = sampler.concurrent([(3, arguments)] * 4).reshape(4, *expected.shape)
            np.testing.assert_allclose(several, np.broadcast_to(expected, several.shape), atol=1e-4)
            with pytest.raises(CppError, match="seeds: missing"):
                sampler(3, **{**arguments, "seeds": None})


@pytest.mark.slow
def test_a_tables_own_timesteps_in_both_languages(driver, tmp_path):
    options = ExportOptions(stochastic=True)
    table = flow_table(noise=0.3)
    with temporary_folder(tmp_path):
        bundle = export_aoti(Wave(), table, tmp_path / "bundle", options, limit=Clip(1.5), sample_shape=SHAPE)
    assert {item["name"]: item["dtype"] for item in bundle.manifest["inputs"]}["timesteps"] == "float32"
    assert bundle.limit == Clip(1.5) and bundle.table == table
    start = START_SCALE * normal_numpy([5, 6], 0, SHAPE, STREAM_INITIAL)
    noise = [0.3 * normal_numpy([5, 6], step, SHAPE) for step in range(3)]
    expected = plain_loop(Wave(), start, limit=lambda x0: x0.clamp(-1.5, 1.5), noise=noise)
    np.testing.assert_allclose(AotiSampler(bundle)(2, seeds=5).numpy(), expected, atol=1e-5)
    with CppSampler(driver, bundle.path) as sampler:
        np.testing.assert_allclose(sampler(2, seeds=5), expected, atol=1e-5)


def test_the_cpp_loader_refuses_what_this_machine_cannot_run(copied, driver, tmp_path):
    with CppSampler(driver) as reader:
        assert reader.open(copied)["steps"] == 50
    for message, change in {
        "a CPU with quantum, which this one has not": {"cpu_features": ["quantum"]},
        "is for win32 .*, this program is for linux": {"platform": "win32"},
    }.items():
        kept_target = open_bundle(copied).manifest["target"]
        edit(copied, lambda manifest, change=change: manifest["target"].update(change))
        with pytest.raises(CppError, match=message) as caught:
            CppSampler(driver, copied)
        assert caught.value.kind == "BundleError"
        edit(copied, lambda manifest, target=kept_target: manifest.update(target=target))
    edit(copied, lambda manifest: manifest["target"].update(device="cuda", compute_capability="9.0"))
    with pytest.raises(CppError, match="is for CUDA, and there is no GPU 0 here; export it for the CPU"):
        CppSampler(driver, copied)
    stub_cuda.build(tmp_path)
    stub = {"LD_LIBRARY_PATH": str(tmp_path)}
    with pytest.raises(CppError, match=r"is for compute capability 9\.0, this GPU has 8\.6; export it here"):
        CppSampler(driver, copied, env={**stub, "STUB_CUDA_CAPABILITY": "86"})
    with pytest.raises(CppError, match=r"model.pt2' cannot be loaded: "):
        CppSampler(driver, copied, env=stub)
    edit(copied, lambda manifest: manifest.update(target=kept_target))
    (copied / "model.pt2").write_bytes(b"no package")
    content = {"sha256": hashlib.sha256(b"no package").hexdigest(), "bytes": 10}
    edit(copied, lambda manifest: manifest["files"].update({"model.pt2": content}))
    with pytest.raises(CppError, match=r"model.pt2' cannot be loaded: "):
        CppSampler(driver, copied)
    with pytest.raises(BundleError, match=r"model.pt2' of torch .* does not load with "):
        AotiSampler(copied)
    edit(copied, lambda manifest: manifest.update(runtime="onnx"))
    with pytest.raises(CppError, match="is of runtime 'onnx', not 'aoti'"):
        CppSampler(driver, copied)


def test_the_bundle_says_what_it_is_and_holds_no_more(kept):
    bundle = open_bundle(kept)
    assert sorted(bundle.manifest["files"]) == ["README.md", "model.pt2"]
    assert bundle.runtime == "aoti" and bundle.device == "cpu" and bundle.manifest["versions"]["torch"]
    target = bundle.manifest["target"]
    assert (target["platform"], target["machine"]) == (sys.platform, os.uname().machine)
    if CHOOSES_ISA:
        assert "avx2" in target["cpu_features"] and not any("avx512" in name for name in target["cpu_features"])
    assert bundle.names("inputs") == [
        "sample", "timesteps", "coefficients", "noise", "guidance_scale", "guidance_rescale", "labels", "uncond_labels",
    ]  # fmt: skip
    shapes = {item["name"]: item["shape"] for item in bundle.manifest["inputs"]}
    assert shapes["noise"] == ["steps", "batch", *SHAPE] and shapes["labels"] == ["batch"]
    assert "AotiSampler" in (kept / "README.md").read_text() and "libtorch" in (kept / "README.md").read_text()
    # Neither beside the bundle, nor left in the temporary folder.
    assert os.listdir(kept.parent) == ["bundle"]


def test_each_runtime_refuses_the_others_bundle(kept, tmp_path):
    with pytest.raises(BundleError, match=r"of runtime 'aoti', not 'onnx'; run it with fastddim.export.AotiSampler"):
        OrtSampler(kept)
    other = export_onnx(
        Tiny(), DDIMConfig(), tmp_path / "onnx", sample_shape=SHAPE, example_kwargs={"labels": LABELS}, parity_steps=()
    )
    with pytest.raises(BundleError, match=r"of runtime 'onnx', not 'aoti'; run it with fastddim.export.OrtSampler"):
        AotiSampler(other)
    assert type(open_sampler(kept)) is AotiSampler and type(open_sampler(other)) is OrtSampler
    edit(other.path, lambda manifest: manifest.update(runtime="abacus"))
    with pytest.raises(BundleError, match=r"runtime: 'abacus' is not one of"):
        open_sampler(other.path)


DAMAGE = {
    "SHA-256": lambda folder: flip_a_byte(folder, "model.pt2"),
    "bytes, the manifest says": lambda folder: (folder / "model.pt2").write_bytes(b"x"),
    "model.pt2' is missing": lambda folder: (folder / "model.pt2").unlink(),
    r"\$: 'target' is a dependency of|'target' is a required property": lambda folder: edit(
        folder, lambda manifest: manifest.pop("target")
    ),
    r"is for win32 .*, this machine is .*; export it here": lambda folder: edit(
        folder, lambda manifest: manifest["target"].update(platform="win32")
    ),
    "for a CPU with quantum, which this one has not": lambda folder: edit(
        folder, lambda manifest: manifest["target"]["cpu_features"].append("quantum")
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_bundle_that_is_damaged_or_for_another_machine_is_refused(copied, message):
    AotiSampler(copied)
    DAMAGE[message](copied)
    with pytest.raises(BundleError, match=message):
        AotiSampler(copied)


def test_without_a_gpu_cuda_is_refused(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    edit(copied, lambda manifest: manifest["target"].update(device="cuda", compute_capability="9.0"))
    with pytest.raises(BundleError, match=r"is for CUDA, and torch .* finds no GPU here"):
        AotiSampler(copied)
    with pytest.raises(ValueError, match=r"device: 'cuda', but torch .* finds no GPU here"):
        export_tiny(tmp_path / "other", device="cuda")
    assert os.listdir(tmp_path) == ["bundle"]


def test_the_gpu_that_is_named_is_the_one_that_is_checked(copied, monkeypatch):
    edit(copied, lambda manifest: manifest["target"].update(device="cuda", compute_capability="9.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sampler_module, "compute_capability", lambda device: "8.0" if device.index == 1 else "9.0")
    with pytest.raises(BundleError, match=r"is for compute capability 9.0, 'cuda:1' has 8.0; export it here"):
        AotiSampler(copied, device="cuda:1")


BAD_CALLS = {
    "guidance_scale: None; this bundle has guidance": {"guidance_scale": None},
    "guidance_scale: nan": {"guidance_scale": float("nan")},
    "guidance_scale: .*; pass a finite number, or one for each of 3": {"guidance_scale": torch.ones(2)},
    "num_inference_steps: 0": {"num_inference_steps": 0},
    r"labels: torch.int64 of shape \(2,\); pass int64 of shape \(3,\)": {"labels": torch.zeros(2, dtype=torch.int64)},
    "labels: torch.float32": {"labels": torch.zeros(3)},
    "uncond_kwargs: 'labels' is missing": {"uncond_kwargs": None},
    "seeds: None": {"seeds": None},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_are_named(kept, message):
    arguments = {
        "seeds": 0, "guidance_scale": 2.0, "labels": LABELS, "uncond_kwargs": {"labels": torch.zeros_like(LABELS)}
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        AotiSampler(kept)(3, **{**arguments, **BAD_CALLS[message]})


def test_states_and_devices_that_do_not_fit_are_named(kept):
    sampler = AotiSampler(kept)
    for start in (torch.zeros(1, 2, 5, 6), torch.zeros(1, *SHAPE, dtype=torch.int64), np.zeros(SHAPE), 0, True):
        with pytest.raises(ValueError, match="start: "):
            sampler(start, seeds=0, guidance_scale=1.0, labels=LABELS[:1])
    with pytest.raises(ValueError, match="device: 'cuda', but this package is for cpu"):
        AotiSampler(kept, device="cuda")


def test_the_step_at_which_nan_appears_is_found(kept):
    start = torch.full((1, *SHAPE), torch.nan)
    sampler = AotiSampler(kept, check_finite=True)
    arguments = {"guidance_scale": 1.0, "labels": LABELS[:1], "uncond_kwargs": {"labels": LABELS[:1] * 0}}
    with pytest.raises(NotFiniteError, match="start: has NaN"):
        sampler(start, **arguments)
    # x0 is clipped, and noise this large overflows where the third row adds it.
    real = sampler._arrays.normal
    sampler._arrays.normal = lambda seeds, step, *rest: real(seeds, step, *rest) * (torch.inf if step == 2 else 1.0)
    with pytest.raises(NotFiniteError, match="after step 2 "):
        sampler(1, seeds=0, num_inference_steps=6, eta=1.0, **arguments)


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    import torch._inductor.config as inductor

    with (
        temporary_folder(tmp_path),
        inductor.patch({"cpp.cxx": (None, "false")}),
        pytest.raises(ExportError, match="model: Tiny cannot be compiled: "),
    ):
        export_tiny(tmp_path / "bundle")
    assert os.listdir(tmp_path) == []
    with (
        inductor.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(RuntimeError, match="apt-get install g"),
    ):
        export_tiny(tmp_path / "bundle")
    with pytest.raises(ValueError, match="device: 'tpu' is not one of 'cpu', 'cuda'"):
        export_tiny(tmp_path / "bundle", device="tpu")
    with pytest.raises(ValueError, match=r"cpu_isa: 'mmx' is not one of 'avx2', 'avx512'|leave it out"):
        export_tiny(tmp_path / "bundle", cpu_isa="mmx")
    monkeypatch.setattr(exporter, "cpu_features", lambda: frozenset({"mmx"}))
    if CHOOSES_ISA:
        with pytest.raises(ValueError, match=r"cpu_isa: 'avx2', but this CPU lacks abm, avx, avx2"):
            export_tiny(tmp_path / "bundle")
    assert os.listdir(tmp_path) == []


class DataDependent(torch.nn.Module):
    def forward(self, x, t):
        return x * float(x.sum() > 0)


def test_models_that_cannot_be_exported_are_named(tmp_path):
    for graph in ("loop", "step"):
        with pytest.raises(ExportError, match=r"model: DataDependent cannot be (exported|compiled): "):
            export_aoti(
                DataDependent(), DDIMConfig(), tmp_path / "bundle", ExportOptions(kind=graph), sample_shape=(2, 4, 4)
            )
    with pytest.raises(ValueError, match="dynamic_size: True for a Tiny"):
        export_tiny(tmp_path / "bundle", dynamic_size=True)
    assert os.listdir(tmp_path) == []


def test_a_bundle_is_compared_again_with_its_model(kept, monkeypatch):
    model = Tiny().train()
    entries = verify_bundle(open_bundle(kept), model, example_kwargs={"labels": LABELS}, steps=(2,))
    assert [entry["batch"] for entry in entries] == [1, 3] and model.training
    real = Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda *arguments, **options: real(*arguments, **options) + 1e-3)
    with pytest.raises(ParityError, match=r"differs from torch by 0\.001"):
        verify_bundle(open_bundle(kept), model, example_kwargs={"labels": LABELS}, steps=(2,))


@pytest.mark.slow
def test_classes_from_the_shell(tmp_path, capsys):
    class_pipeline().save_pretrained(tmp_path / "pipeline")
    quick = [str(tmp_path / "pipeline"), "--parity-steps", "1,8"]
    bundle, picture, sampled = tmp_path / "classes", tmp_path / "classes.png", tmp_path / "sampled.png"
    assert main(["export", "aoti", *quick, "--out", str(bundle), "--guidance", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert max(entry["largest_error"] for entry in told["parity"]) <= 1e-4
    run = ["run", str(bundle), "--labels", "3,1,2", "--steps", "20", "--seed", "7"]
    assert main([*run, "--out", str(picture)]) == 0
    assert "s per image on CPU" in capsys.readouterr().out
    sample = ["sample", "--model", quick[0], "--labels", "3,1,2", "--num-images", "3", "--steps", "20", "--seed", "7"]
    assert main([*sample, "--guidance-scale", "2", "--out", str(sampled)]) == 0
    ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in (picture, sampled))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1
    assert main(["verify", str(bundle), *quick]) == 0
    capsys.readouterr()
    assert main([*run, "--providers", "cpu", "--out", str(picture)]) == 2
    assert "--providers: 'cpu', but this bundle is of runtime 'aoti'" in capsys.readouterr().err


# Triton's kernels cannot be traced where its interpreter has replaced them.
TRACE = """
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from fastddim import DDIMConfig
from fastddim.export import ExportOptions
from fastddim.export.aoti import exporter
from fastddim.export.sampler_plan import plan_sampler

class Model(torch.nn.Module):
    def forward(self, x, t):
        return torch.tanh(x) * torch.cos(t.to(x.dtype)).reshape(-1, 1, 1, 1)

class Positional(torch.nn.Module):
    def __init__(self, program, names):
        super().__init__()
        self.module, self.names = program.module(), names
    def forward(self, *tensors):
        return self.module(dict(zip(self.names, tensors)))

torch.set_grad_enabled(False)
guided = dict(guided=True, guidance_rescale=True, stochastic=True)
threshold = DDIMConfig(thresholding=True, sample_max_value=1.5)
for graph, config, options in (
    ("loop", threshold, guided), ("step", threshold, guided), ("loop", DDIMConfig(), {}), ("step", DDIMConfig(), {}),
):
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        plan = plan_sampler(Model(), config, ExportOptions(kind=graph, **options), (2, 6, 6))
        program, dims, outputs = exporter._trace(plan, None, "cuda:0")
        values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
        assert isinstance(values["inputs_sample"].shape[0], torch.SymInt), values
        assert isinstance(values["inputs_coefficients"].shape[0], torch.SymInt), values
        (examples,), _ = program.example_inputs
        # As AOTInductor lowers it: an operator that it does not know the inside of would stay one.
        lowered, _ = aot_export_module(Positional(program, list(examples)), list(examples.values()), trace_joint=False)
        modules = [module for module in lowered.modules() if isinstance(module, torch.fx.GraphModule)]
        targets = [str(node.target) for module in modules for node in module.graph.nodes]
        assert "triton_kernel_wrapper_functional" in targets, targets
        assert not any("fastddim" in target for target in targets), targets
        assert ("while_loop" in targets) == (graph == "loop"), targets
print("traced")
"""


def test_on_a_gpu_the_step_is_the_fused_kernel():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", TRACE], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.strip().endswith("traced"), done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["loop", "step"])
def test_a_package_for_a_gpu(tmp_path, graph):
    options = {"guided": True, "guidance_rescale": True, "stochastic": True}
    bundle = export_tiny(tmp_path / "bundle", CONFIGS["threshold"], device="cuda", kind=graph, **options)
    assert bundle.device == "cuda" and bundle.manifest["target"]["compute_capability"] == compute_capability()
    for batch, steps, eta in ((1, 1, 0.0), (3, 7, 0.5)):
        arguments = {"eta": eta, "guidance_scale": 3.0, "guidance_rescale": 0.7}
        actual = run_tiny(bundle.path, batch, num_inference_steps=steps, **arguments)
        np.testing.assert_allclose(actual, sample_tiny(CONFIGS["threshold"], steps, batch, **arguments), atol=1e-4)


@pytest.mark.slow
def test_a_baked_schedule_needs_a_number_of_steps_alone(tmp_path):
    config = DDIMConfig(timestep_spacing="trailing", prediction_type="v_prediction")
    bundle = export_tiny(tmp_path / "bundle", config, bake_schedule=True, stochastic=True, eta=1.0)
    assert sorted(bundle.names("inputs")) == ["labels", "noise", "num_inference_steps", "sample"]
    for steps in (1, 7, 30):
        actual = run_tiny(bundle.path, num_inference_steps=steps)
        np.testing.assert_allclose(actual, sample_tiny(config, steps, eta=1.0), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("graph", ["loop", "step"])
def test_every_kind_of_limit(tmp_path, name, graph):
    bundle = export_tiny(tmp_path / "bundle", CONFIGS[name], kind=graph, stochastic=True)
    for batch, steps, eta in ((1, 1, 0.0), (3, 7, 0.5), (8, 12, 1.0)):
        actual = run_tiny(bundle.path, batch, num_inference_steps=steps, eta=eta)
        np.testing.assert_allclose(actual, sample_tiny(CONFIGS[name], steps, batch, eta=eta), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["loop", "step"])
def test_dynamic_sizes(tmp_path, graph):
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    config = DDIMConfig(thresholding=True, sample_max_value=1.5)
    options = ExportOptions(dynamic_size=True, stochastic=True, kind=graph)
    bundle = export_aoti(unet, config, tmp_path / "bundle", options, parity_steps=(1, 3))
    actual = AotiSampler(bundle)(2, seeds=1, num_inference_steps=4, eta=0.5, size=(12, 16))
    expected = Sampler(unet, config, 4, eta=0.5, sample_shape=(1, 12, 16))(2, seeds=1)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.slow
def test_text_conditioned_unets_and_half_precision(tmp_path):
    unet = conditional_unet()
    config = DDIMConfig(clip_sample=False)
    for dtype, tolerance in (("float32", 1e-4), ("float16", 2e-2)):
        options = ExportOptions(guided=True, dtype=dtype)
        bundle = export_aoti(unet, config, tmp_path / dtype, options, parity_steps=(1, 4))
        embeds, null = torch.randn(2, 2, 77, 12, generator=torch.Generator().manual_seed(3))
        arguments = {"encoder_hidden_states": embeds, "uncond_kwargs": {"encoder_hidden_states": null}}
        actual = AotiSampler(bundle)(2, seeds=0, num_inference_steps=10, guidance_scale=5.0, **arguments)
        expected = Sampler(unet, config, 10, guidance_scale=5.0)(2, seeds=0, **arguments)
        np.testing.assert_allclose(actual, expected, atol=tolerance * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.skipif("avx512f" not in cpu_features(), reason="needs a CPU with AVX-512")
def test_wider_instructions_are_asked_for(tmp_path):
    bundle = export_tiny(tmp_path / "bundle", cpu_isa="avx512")
    assert "avx512f" in bundle.manifest["target"]["cpu_features"]
    np.testing.assert_allclose(run_tiny(bundle.path, num_inference_steps=6), sample_tiny(DDIMConfig(), 6), atol=2e-5)


def test_nothing_is_left_in_the_temporary_folder_by_a_run(kept, tmp_path):
    with temporary_folder(tmp_path):
        run_tiny(kept, num_inference_steps=2, guidance_scale=1.0)
    assert glob.glob(str(tmp_path / "*")) == []
