"""Robot policies as files: LeRobot's numbers by every route, what a run may ask, the command, and what is refused."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastddim.cli import app
from fastddim.export import BundleError, ExportOptions, PolicySampler, export_policy, open_bundle, verify_bundle
from fastddim.export.bundle import Bundle
from fastddim.policies import load_policy, shifted
from lerobot_policies import golden, make_policy
from test_policies import flow_policy

STATE = "state-ddim-epsilon"
TOLERANCE = 1e-5
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("policies")
    return {name: make_policy(name, root) for name in (STATE, "state-ddpm-epsilon", "images-ddim")}


class Bundles(dict[str, Path]):
    """Each policy as a file, written when it is first asked for; `step` is the first one, a step at a time."""

    def __init__(self, folders: dict[str, Path], root: Path) -> None:
        self._folders, self._root = folders, root

    def __missing__(self, name: str) -> Path:
        path = self[name] = self._root / name
        if name == STATE:
            # From the checkpoint to the file: one command.
            arguments = ["--committed", "--rate", "50", "--parity-steps", "3", "--json"]
            result = CliRunner().invoke(
                app, ["export", "onnx", str(self._folders[name]), "--out", str(path), *arguments]
            )
            assert result.exit_code == 0, result.output
            return path
        options = ExportOptions(kind="step") if name == "step" else None
        policy = load_policy(self._folders[STATE if name == "step" else name])
        export_policy(policy, path, options, committed=name == "step", parity_steps=(3,))
        return path


@pytest.fixture(scope="module")
def bundles(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Bundles(folders, tmp_path_factory.mktemp("bundles"))


def assert_lerobots(chunk: Any, expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(chunk.normalised, expected["normalised"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(chunk.actions, expected["actions"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    "name", [STATE, *(pytest.param(name, marks=pytest.mark.slow) for name in ("images-ddim", "step"))]
)
def test_files_give_lerobots_actions(bundles: dict[str, Path], name: str) -> None:
    observations, expected = golden(STATE if name == "step" else name)
    sampler = PolicySampler(bundles[name])
    assert_lerobots(sampler(observations, noise=expected["noise"]), expected)
    if name == "images-ddim":
        dtypes = {item["name"]: item["dtype"] for item in sampler.bundle.manifest["inputs"]}
        assert dtypes["observation.images.top"] == "uint8"
        with pytest.raises(ValueError, match="known, mask: this file takes none"):
            sampler(observations, seeds=0, mask=np.ones((2, 16, 3), bool))
        # The encoders are outside the loop, as they read no state.
        hoisted = sampler.bundle.manifest["sampling"]["hoisted"]
        assert hoisted["operations"] > 100
        floats = {
            key: value / np.float32(255) if value.dtype == np.uint8 else value for key, value in observations.items()
        }
        assert_lerobots(sampler(floats, noise=expected["noise"]), expected)
        key = "observation.images.top"
        with pytest.raises(ValueError, match=f"{key}: pixels that are no 255ths"):
            sampler({**floats, key: floats[key] * np.float32(0.999)}, seeds=0)


@pytest.mark.slow
def test_a_ddpm_file_runs_as_ddpm_and_in_few_steps_as_ddim(folders: dict[str, Path], bundles: dict[str, Path]) -> None:
    name = "state-ddpm-epsilon"
    observations, expected = golden(name)
    sampler, policy = PolicySampler(bundles[name]), load_policy(folders[name])
    table = sampler.bundle.table
    assert table.stochastic and len(table) == 20
    # LeRobot's noise of the steps is torch's; what the file takes is an input like any other.
    torch.manual_seed(1234)
    noise = np.zeros((20, 2, 16, 3), np.float32)
    for step in range(19):
        noise[step] = torch.randn(2, 16, 3).numpy()
    inputs = {"sample": expected["noise"], "timesteps": np.array(table.timesteps), "noise": noise, **observations}
    inputs["coefficients"] = table.columns.astype(np.float32)
    session = sampler.sampler.session  # type: ignore[attr-defined]  # OrtSampler's
    np.testing.assert_allclose(session.run(["normalised"], inputs)[0], expected["normalised"], rtol=0, atol=TOLERANCE)
    # Our own noise, in torch and in the file.
    start = torch.from_numpy(expected["noise"])
    for options in ({}, {"method": "ddim", "num_inference_steps": 5}):
        ours = policy.sample(observations, sampler=policy.sampler(**options), noise=start, seeds=3)
        file = sampler(observations, noise=expected["noise"], seeds=3, **options)
        np.testing.assert_allclose(file.normalised, ours.normalised.numpy(), rtol=0, atol=2 * TOLERANCE)


@pytest.mark.parametrize("name", [STATE, pytest.param("step", marks=pytest.mark.slow)])
def test_runs_are_those_of_torch(folders: dict[str, Path], bundles: dict[str, Path], name: str) -> None:
    """Seeds, warm starts, committed actions and deadlines."""
    observations, _ = golden(STATE)
    policy = load_policy(folders[STATE])
    mask = np.zeros((2, 16, 3), bool)
    mask[:, :4] = True
    known = np.where(mask, np.float32(0.25), np.float32(np.nan))
    sampler = PolicySampler(bundles[name])
    free = sampler(observations, seeds=[7, 3])
    last = shifted(torch.from_numpy(free.samples), 4)
    for ours, file in (
        (policy.sample(observations, seeds=[7, 3]), free),
        (
            policy.sample(observations, sampler=policy.sampler(strength=0.5), previous=last, seeds=1),
            sampler(observations, previous=last.numpy(), strength=0.5, seeds=1),
        ),
        (
            policy.sample(observations, known=torch.from_numpy(known), mask=torch.from_numpy(mask), seeds=1),
            sampler(observations, known=known, mask=mask, seeds=1),
        ),
    ):
        np.testing.assert_allclose(file.samples, ours.samples.numpy(), rtol=0, atol=3 * TOLERANCE)
        np.testing.assert_allclose(file.actions, ours.actions.numpy(), rtol=0, atol=3 * TOLERANCE)
    assert np.array_equal(file.actions[:, :3], known[:, 1:4])
    if name == STATE:
        with pytest.raises(ValueError, match=r"deadline: .*kind='step'"):
            sampler(observations, seeds=1, deadline=time.perf_counter())
        return
    late = sampler(observations, seeds=1, deadline=time.perf_counter())
    ours = policy.sample(observations, seeds=1, deadline=time.perf_counter())
    np.testing.assert_allclose(late.actions, ours.actions.numpy(), rtol=0, atol=3 * TOLERANCE)


def test_the_manifest_describes_the_policy(bundles: dict[str, Path]) -> None:
    bundle = open_bundle(bundles[STATE])
    said = bundle.manifest["policy"]
    assert said["observations"] == {
        "observation.state": {"kind": "state", "shape": [4]},
        "observation.environment_state": {"kind": "state", "shape": [6]},
    }
    assert (said["n_obs_steps"], said["horizon"], said["n_action_steps"], said["first_action"]) == (2, 16, 8, 1)
    assert (said["rate"], said["committed"], said["num_inference_steps"]) == (50.0, True, 10)
    assert bundle.names("outputs") == ["samples", "actions", "normalised"]
    # The network's own epsilon, as LeRobot has it.
    assert bundle.manifest["method"]["options"] == {"use_clipped_model_output": False}
    note = (bundles[STATE] / "README.md").read_text()
    assert "PolicySampler(FOLDER)" in note and "--observations" in note


def test_refusals_come_before_the_network(bundles: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    observations, _ = golden(STATE)
    sampler = PolicySampler(bundles[STATE])
    nan = {**observations, "observation.state": np.full((2, 2, 4), np.nan, np.float32)}
    for words, given, options in (
        ("observation.state: has NaN", nan, {"seeds": 0}),
        ("seeds: None without noise", observations, {}),
        ("strength: 0.5 without previous", observations, {"seeds": 0, "strength": 0.5}),
        (
            r"method: 'dpmsolver\+\+' needs x0",
            observations,
            {"seeds": 0, "method": "dpmsolver++", "num_inference_steps": 5},
        ),
        ("num_inference_steps", observations, {"seeds": 0, "num_inference_steps": 0}),
    ):
        with pytest.raises(ValueError, match=words):
            sampler(given, **options)
    mask = np.ones((2, 16, 3), bool)
    for words, options in (
        ("known, mask: one of the two", {"mask": mask}),
        ("known: has NaN", {"mask": mask, "known": np.full((2, 16, 3), np.nan)}),
        ("mask: int64", {"mask": mask.astype(np.int64), "known": np.zeros((2, 16, 3))}),
        ("known: shape", {"mask": mask, "known": np.zeros((2, 8, 3))}),
        ("previous: shape", {"previous": np.zeros((2, 8, 3)), "strength": 0.5}),
    ):
        with pytest.raises(ValueError, match=words):
            sampler(observations, seeds=0, **options)
    policy = load_policy(folders[STATE])
    for words, error, arguments in (
        ("guided, dynamic_size", ValueError, {"options": ExportOptions(guided=True)}),
        ("units: 'speed'", ValueError, {"units": {"speed": "m/s"}}),
        ("image_dtype: 'int8'", ValueError, {"image_dtype": "int8"}),
        ("runtime: 'tensorrt'", ValueError, {"runtime": "tensorrt"}),
        ("rate: -1", ValueError, {"rate": -1.0}),
    ):
        with pytest.raises(error, match=words):
            export_policy(policy, tmp_path / "no", **arguments)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="policy: Linear"):
        export_policy(torch.nn.Linear(1, 1), tmp_path / "no")  # type: ignore[arg-type]


def test_verify_measures_again_and_finds_other_weights(bundles: dict[str, Path], folders: dict[str, Path]) -> None:
    bundle, policy = open_bundle(bundles[STATE]), load_policy(folders[STATE])
    assert verify_bundle(bundle, policy, steps=(2,))[0]["largest_error"] < 1e-4
    with torch.no_grad():
        policy.denoiser.network.final_conv[1].bias += 0.1
    with pytest.raises(ValueError, match="differs from torch"):
        verify_bundle(bundle, policy, steps=(2,))


def test_the_commands(folders: dict[str, Path], bundles: dict[str, Path], tmp_path: Path) -> None:
    """From observations to actions, and the comparison again."""
    runner = CliRunner()
    out, name = bundles[STATE], STATE
    observations, expected = golden(name)
    np.savez(tmp_path / "in.npz", noise=expected["noise"], **observations)
    result = runner.invoke(
        app, ["run", str(out), "--observations", str(tmp_path / "in.npz"), "--out", str(tmp_path / "a.npz"), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["actions"] == [2, 8, 3]
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_allclose(file["normalised"], expected["normalised"], rtol=0, atol=TOLERANCE)
        assert set(file) == {"actions", "normalised", "samples"}
    for words, arguments in (
        ("--observations: missing", []),
        ("--out: 'a.png'", ["--observations", str(tmp_path / "in.npz"), "--out", "a.png"]),
        ("--observations: .*is not there", ["--observations", str(tmp_path / "none.npz")]),
        ("--prompt: .*robot policy", ["--observations", str(tmp_path / "in.npz"), "--prompt", "a cat"]),
        ("--method", ["--observations", str(tmp_path / "in.npz"), "--method", "none"]),
    ):
        result = runner.invoke(app, ["run", str(out), *arguments])
        assert result.exit_code != 0
        assert re.search(words, str(result.exception) + result.output), (words, result.output)
    result = runner.invoke(app, ["verify", str(out), str(folders[name]), "--parity-steps", "2"])
    assert result.exit_code == 0, result.output


def test_a_bundle_of_pictures_is_no_policy(tmp_path: Path, bundles: dict[str, Path]) -> None:
    manifest = json.loads((bundles[STATE] / "manifest.json").read_text())
    del manifest["policy"]
    with pytest.raises(BundleError, match="no policy's"):
        PolicySampler(Bundle(bundles[STATE], manifest))


@pytest.mark.slow
def test_flow_matching_policies_become_files_too(tmp_path: Path) -> None:
    policy = flow_policy()
    export_policy(policy, tmp_path / "flow", parity_steps=(3,), committed=True)
    sampler = PolicySampler(tmp_path / "flow")
    observations = {"observation.state": np.random.default_rng(0).standard_normal((2, 2, 4)).astype(np.float32)}
    for steps in (10, 4):
        ours = policy.sample(observations, sampler=policy.sampler(num_inference_steps=steps), seeds=[3, 8])
        file = sampler(observations, seeds=[3, 8], num_inference_steps=steps)
        np.testing.assert_allclose(file.actions, ours.actions.numpy(), rtol=0, atol=3 * TOLERANCE)


def test_the_code_of_the_page_runs(
    folders: dict[str, Path], bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`docs/policies.md`, over the file that is exported already, as an export takes long."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders[STATE], "my_policy")
    signature = inspect.signature(export_policy)

    def exported(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options).arguments
        assert given["committed"] and given["rate"] == open_bundle(bundles[STATE]).manifest["policy"]["rate"]
        return open_bundle(shutil.copytree(bundles[STATE], given["out"]))

    monkeypatch.setattr("fastddim.export.policy_exporter.export_policy", exported)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "policies.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/policies.md", "exec"), names)
    assert len(blocks) == 2 and names["action"].shape == (3,)
