"""Runtimes: one from outside the package, from its registration to a picture; and the commands of all of them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

import fastddim.export
import toy_runtime
from damage import edit
from fastddim import Sampler
from fastddim.cli import main
from fastddim.export import BundleError, Runtime, get_runtime, open_bundle, open_sampler, register_runtime, runtimes
from fastddim.export import runtime as registry
from fastddim.export.runtime import BUILT_IN
from fastddim.noise import STREAM_INITIAL, normal_numpy
from flow import SHAPE, START_SCALE, Wave, flow_table, plain_loop
from test_export import class_pipeline

# As messages list them.
QUOTED, COMMAS = ", ".join(map(repr, BUILT_IN)), ", ".join(BUILT_IN)


@pytest.fixture
def fresh(monkeypatch):
    """A registry of its own, without installed packages."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_entry_points_read", True)


@pytest.fixture
def toy(fresh):
    register_runtime(toy_runtime.RUNTIME)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "pipeline"
    class_pipeline().save_pretrained(folder)
    return folder


def told(capsys):
    return " ".join(capsys.readouterr().err.split())


BAD_RUNS = {
    "--steps 0": "--steps: 0; pass an integer in [1, 1000]",
    "--seed -1": "--seed: -1; pass integers in [0, 2**64)",
    "--eta 2": "--eta: 2.0; pass numbers in [0, 1]",
    "--size 3x3": "--size: (3, 3); this bundle makes samples of (8, 8) alone",
    "--num-images 0": "--num-images: 0; pass an integer >= 1",
    "--out grid.txt": "--out: 'grid.txt' has the suffix '.txt'; pass one of .png",
    "--labels 99": "--labels: 99; pass integers in [0, ",
}


def test_a_toy_runtime_from_its_registration_to_a_picture(toy, pipeline, tmp_path, capsys):
    out = tmp_path / "bundle"
    assert main(["export"]) == 0
    assert "  toy         Pickle a model.\n" in capsys.readouterr().out
    assert main(["export", "toy", str(pipeline), "--out", str(out), "--word", "bear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(out)
    bundle = open_bundle(out)
    assert bundle.manifest["word"] == "bear" and bundle.runtime == "toy" and bundle.kind == "loop"
    note = (out / "README.md").read_text("utf-8")
    assert "Python's pickle loads it." in note and "`toy_runtime.ToySampler(FOLDER)`, which needs a toy." in note

    labels = np.array([3, 1, 2])
    pipe = class_pipeline()
    expected = Sampler(pipe.unet, pipe.scheduler, 8)(3, seeds=5, class_labels=torch.from_numpy(labels)).numpy()
    sampler = open_sampler(out)
    assert isinstance(sampler, toy_runtime.ToySampler)
    np.testing.assert_allclose(
        sampler(3, seeds=5, num_inference_steps=8, class_labels=labels), expected, rtol=0, atol=1e-5
    )

    picture, sampled = tmp_path / "run.png", tmp_path / "sample.png"
    options = ["--labels", "3,1,2", "--steps", "8", "--seed", "5"]
    assert main(["run", str(out), *options, "--out", str(picture)]) == 0
    assert "on a toy" in capsys.readouterr().out
    sample = ["sample", "--model", str(pipeline), *options, "--num-images", "3", "--guidance-scale", "1"]
    assert main([*sample, "--out", str(sampled)]) == 0
    ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in (picture, sampled))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1
    assert main(["run", str(out), "--providers", "cpu"]) == 2
    assert "--providers: 'cpu', but this bundle is of runtime 'toy'; leave it out" in told(capsys)
    for line, message in BAD_RUNS.items():
        assert main(["run", str(out), *line.split()]) == 2
        assert f"error: {message}" in told(capsys)
    assert main(["verify", str(out), str(pipeline), "--parity-steps", "1,1001"]) == 2
    assert "error: --parity-steps: 1001; pass an integer in [1, 1000]" in told(capsys)
    assert main(["verify", str(out), str(pipeline), "--parity-steps", "1,8"]) == 0
    assert capsys.readouterr().out.count("largest difference from torch") == 4
    assert main(["export", "repository", str(out), "--out", str(tmp_path / "models")]) == 2
    assert "is for 'toy', which the server has no backend for; export it for onnx or tensorrt" in told(capsys)


def test_a_toy_runtime_in_python(toy, pipeline, tmp_path):
    runtime = get_runtime("toy")
    assert list(runtimes()) == [*BUILT_IN, "toy"]
    pipe = class_pipeline()
    bundle = runtime.load(runtime.exporter)(pipe.unet, pipe.scheduler, tmp_path / "bundle")
    assert runtime.load(runtime.sampler) is type(open_sampler(bundle))
    with pytest.raises(BundleError, match=r"is of runtime 'toy', not 'onnx'; run it with toy_runtime\.ToySampler"):
        fastddim.export.OrtSampler(bundle)
    register_runtime(toy_runtime.RUNTIME)
    assert list(runtimes()) == [*BUILT_IN, "toy"]


def test_a_toy_sampling_method_in_a_toy_runtime(toy, tmp_path):
    model = Wave()
    bundle = toy_runtime.export_toy(model, flow_table(), tmp_path / "bundle", sample_shape=SHAPE)
    start = START_SCALE * normal_numpy([5, 6, 7], 0, SHAPE, STREAM_INITIAL)
    expected = plain_loop(model, start)
    for sampler in (Sampler(model, flow_table(), sample_shape=SHAPE), open_sampler(bundle)):
        samples = np.asarray(sampler(3, seeds=5))
        np.testing.assert_allclose(samples, expected, rtol=0, atol=1e-5)


def test_the_note_of_a_runtime_without_a_sampler_names_none(fresh, tmp_path):
    register_runtime(dataclasses.replace(toy_runtime.RUNTIME, sampler=None))
    pipe = class_pipeline()
    bundle = toy_runtime.export_toy(pipe.unet, pipe.scheduler, tmp_path / "bundle")
    note = (bundle.path / "README.md").read_text("utf-8")
    assert "Python's pickle loads it." in note and "With Python" not in note and "(FOLDER)" not in note
    with pytest.raises(BundleError, match="is for 'toy', which has no sampler in Python"):
        open_sampler(bundle)


def test_an_unknown_runtime_gets_the_list(toy, pipeline, tmp_path, monkeypatch, capsys):
    pipe = class_pipeline()
    bundle = toy_runtime.export_toy(pipe.unet, pipe.scheduler, tmp_path / "bundle")
    monkeypatch.setattr(registry, "_registered", {})
    with pytest.raises(ValueError, match=f"runtime: 'toy' is not one of {QUOTED}"):
        get_runtime("toy")
    with pytest.raises(BundleError, match=rf"manifest.json': runtime: 'toy' is not one of {QUOTED}"):
        open_bundle(bundle.path)
    assert main(["export", "toy"]) == 2
    assert f"No such command 'toy'; pass one of {COMMAS}, repository." in told(capsys)
    edit(bundle.path, lambda manifest: manifest.update(runtime="cubin"))
    with pytest.raises(BundleError, match="is for 'cubin', which has no sampler in Python"):
        open_sampler(bundle.path)


PARTS = {"exporter": "a:b", "command": "a:c", "install": "pip install a"}
BAD_RUNTIMES = {
    "runtime: 'onnx' is registered already": {"name": "onnx"},
    "runtime: 'toy' is registered already": {"name": "toy"},
    "name: 'My runtime'; pass small letters": {"name": "My runtime"},
    "name: ''; pass small letters": {"name": ""},
    "mine: 'a.b'; pass a part as 'module:name'": {"name": "mine", "sampler": "a.b"},
    "mine: 'a'; pass a part as 'module:name'": {"name": "mine", "command": "a"},
}


@pytest.mark.parametrize("message", BAD_RUNTIMES)
def test_bad_registrations_are_named(toy, message):
    with pytest.raises(ValueError, match=message):
        register_runtime(Runtime(**{**PARTS, **BAD_RUNTIMES[message]}))
    assert list(runtimes()) == [*BUILT_IN, "toy"]


def test_a_missing_package_is_named_with_the_line_that_installs_it(fresh, tmp_path, capsys, monkeypatch):
    register_runtime(Runtime(**{**PARTS, "name": "absent", "command": "no_such_package.command:export"}))
    assert main(["export", "absent"]) == 2
    assert "no_such_package.command.export needs no_such_package: pip install a" in told(capsys)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "fastddim.export.onnx.sampler", raising=False)
    with pytest.raises(ImportError, match=r"fastddim\.export\.OrtSampler needs .*: pip install 'fastddim\[onnx\]'"):
        _ = fastddim.export.OrtSampler


def test_installed_packages_add_runtimes(fresh, tmp_path, monkeypatch, caplog):
    """An entry point as pip leaves it; another package's faults are logged, and hide no runtime."""
    monkeypatch.setattr(registry, "_entry_points_read", False)
    info = tmp_path / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fastddim.runtimes]\ntoy = toy_runtime:RUNTIME\nbroken = no_such_package:RUNTIME\nonnx = toy_runtime:NONE\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_runtime("onnx").name == "onnx" and not registry._registered
    assert get_runtime("toy") is toy_runtime.RUNTIME
    assert list(runtimes()) == [*BUILT_IN, "toy"]
    assert "'broken' cannot be loaded: No module named 'no_such_package'" in caplog.text
    assert "'onnx' cannot be loaded: " in caplog.text


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_record_names_parts_that_are_there(name):
    runtime = get_runtime(name)
    assert runtime.name == name
    for part, path in runtime.parts().items():
        assert runtime.load(path) is getattr(fastddim.export, part)
        assert part in fastddim.export.__all__
    if runtime.sampler is not None:
        assert runtime.load(runtime.sampler).runtime == name


# The commands.


COMMANDS = [[], *([name] for name in (*BUILT_IN, "repository"))]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS, ids=["export", *(command[0] for command in COMMANDS[1:])])
def test_help_fits_a_screen(fresh, command, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERMINAL_WIDTH", str(columns))
    assert main(["export", *command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert not any("…" in line or line.endswith("...") for line in lines[1:])


def test_help_loads_nothing_of_the_runtimes():
    code = """
    import sys
    from fastddim.cli import main
    from fastddim.export.runtime import BUILT_IN
    assert main(["--help"]) == 0
    loaded = set(sys.modules)
    assert not any(name.endswith(".command") and name.count(".") == 3 and "server" not in name for name in loaded)
    for name in (*BUILT_IN, "repository"):
        assert main(["export", name, "--help"]) == 0
    heavy = {"torch", "diffusers", "onnx", "onnxruntime", "jsonschema", "triton", "tensorrt", "tensorrt_rtx"}
    print(sorted(heavy.intersection(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


OLD_LINES = {
    "--out digits": "fastddim export onnx --out digits",
    "--guidance --out digits": "fastddim export onnx --out digits --guidance",
    "--format tensorrt --trt rtx --model X --out Y": "fastddim export tensorrt X --out Y --flavour rtx",
    "--format=tensorrt --from X --out=Y --profile batch=1:2:4": "fastddim export tensorrt X --out Y --profile batch=1:2:4",
    "--model a/b --graph step --no-noise --out Y": "fastddim export onnx a/b --out Y --kind step",
    "--format aoti --sampler-only --device cuda --out Y": "fastddim export aoti --out Y --device cuda",
    "--format cubin --shape 1x8x8 --draw-noise --out Y": "fastddim export cubin --out Y --shape 1x8x8 --noise drawn",
    "--format cubin --shape 1x8x8 --noise --out Y": "fastddim export cubin --out Y --shape 1x8x8 --noise given",
    "--verify Y --model X --parity-steps 3": "fastddim verify Y X --parity-steps 3",
    "--from Y --triton-repository R --triton-name n": "fastddim export repository Y --out R --name n",
    "--out Y --seeded --triton-repository R --max-batch-size 4 --force": (
        "fastddim export onnx --out Y --seeded --force &&"
        " fastddim export repository Y --out R --max-batch-size 4 --force"
    ),
    "--noise": "fastddim export onnx --noise",
}


@pytest.mark.parametrize("line", OLD_LINES)
def test_the_old_spelling_gets_the_new_one(fresh, line, capsys):
    assert main(["export", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: export: '--") and error.count("\n") == 1
    assert error.rstrip().endswith(f"; type {OLD_LINES[line]}")


def test_the_new_spelling_can_be_pasted(fresh, capsys):
    assert main(["export", "--out", "my digits", "--triton-repository", "$HOME/models"]) == 2
    line = capsys.readouterr().err.partition("; type ")[2]
    words = subprocess.run(
        ["sh", "-c", line.replace("fastddim", "printf '%s\\n'")], capture_output=True, text=True, check=True
    )
    assert words.stdout.splitlines() == [
        "export", "onnx", "--out", "my digits",
        "export", "repository", "my digits", "--out", "$HOME/models",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tflite"], f"No such command 'tflite'; pass one of {COMMAS}, repository. See fastddim export"),
        (["onnx", "--gidance"], "No such option: --gidance (Possible options: --guidance"),
        (["aoti", "--zzz"], "No such option: --zzz (Possible options: --variant, --out, --force, --json, --kind, "),
        (["onnx", "--cpu-isa", "avx2"], "No such option: --cpu-isa"),
        (["onnx", "a", "b", "--out", "x"], "unexpected extra argument"),
        (["tensorrt"], "Missing option '--out'. See fastddim export tensorrt --help."),
        (["onnx", "--out", "x", "--kind", "all"], "--kind: 'all' is not one of 'loop', 'step'"),
        (["onnx", "--out", "x", "--guidance-rescale"], "--guidance-rescale: True without --guidance; pass both"),
        (["aoti", "--out", "x", "--eta", "1"], "--eta: 1.0 adds noise; pass --noise, which makes noise an input"),
        (["onnx", "--out", "x", "--steps", "0"], "--steps: 0; pass an integer >= 1"),
        (["onnx", "--out", "x", "--tolerance", "nan"], "--tolerance: nan; pass a number in [0, inf]"),
        (["aoti", "--out", "no/x"], "/no' is no folder; create it first"),
        (["onnx", "--out", "/proc/x"], "error: --out: '/proc' cannot be written to (No such file or directory); pass"),
        (["onnx", "./nowhere", "--out", "x"], "MODEL: 'nowhere' is no folder; pass a diffusers folder or a hub id"),
        (["repository", "nowhere", "--out", "x"], "manifest.json' is missing; pass a folder that `fastddim export` wrote"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(fresh, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 2
    assert message in told(capsys)
    assert os.listdir() == []


def test_a_model_is_not_read_for_a_folder_that_is_there(fresh, tmp_path, capsys, monkeypatch):
    for name in ("onnx", "aoti", "tensorrt"):
        path = f"fastddim.export.{name}.command"
        __import__(path)
        monkeypatch.setattr(sys.modules[path], "load_model", lambda model: pytest.fail("the model was read"))
        assert main(["export", name, "--out", str(tmp_path)]) == 2
        assert "exists; pass another folder, or --force" in told(capsys)
    shutil.rmtree(tmp_path)
