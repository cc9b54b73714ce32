"""Robot policies in C++: LeRobot's numbers, Python's runs, and a hot path without allocations or locks of ours."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpp_driver import ROOT, RUNTIME, build

from fastddim.export import ExportOptions, PolicySampler, export_policy
from fastddim.policies import ActionQueue, load_policy
from lerobot_policies import golden, make_policy

pytestmark = pytest.mark.cpp
STATE, DDPM = "state-ddim-epsilon", "state-ddpm-epsilon"
TOLERANCE = 1e-5


class Driver:
    """A C++ `PolicySampler` in a process of its own."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the program has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def sample(self, observations: dict[str, Any], **call: Any) -> dict[str, Any]:
        given = {name: np.asarray(value, np.float64).ravel().tolist() for name, value in observations.items()}
        lists = {
            name: value.ravel().tolist() if isinstance(value, np.ndarray) else value for name, value in call.items()
        }
        return self.ask(sample={"observations": given, **lists})

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    # A replaced operator new would hide what AddressSanitizer sees, so this one is plain.
    made = Driver(build("release", "policy_driver") / "policy_driver")
    yield made
    made.close()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("policies")
    made: dict[str, Path] = {}

    def bundle(name: str) -> Path:
        if name not in made:
            options = ExportOptions(kind="step") if name == "step" else None
            source = STATE if name == "step" else name
            policy = load_policy(make_policy(source, root / f"of-{name}" / "saved"))
            export_policy(policy, root / name, options, committed=source == STATE, parity_steps=(2,))
            made[name] = root / name
        return made[name]

    return bundle


KINDS = [STATE, pytest.param("step", marks=pytest.mark.slow)]


def check(answer: dict[str, Any], expected: Any, atol: float = 2 * TOLERANCE) -> None:
    assert "error" not in answer, answer
    for name in ("actions", "normalised", "samples"):
        wanted = np.asarray(getattr(expected, name))[0].ravel()
        np.testing.assert_allclose(answer[name], wanted, rtol=0, atol=atol)
    # Of the runtime's own calls nothing is counted.
    assert (answer["allocations"], answer["locks"]) == (0, 0)


@pytest.mark.parametrize("name", KINDS)
def test_chunks_are_lerobots_and_pythons(driver: Driver, bundles: Any, name: str) -> None:
    observations, expected = golden(STATE)
    one = {key: value[:1] for key, value in observations.items()}
    assert driver.ask(load=str(bundles(name))) == {}
    answer = driver.sample(one, noise=expected["noise"][0])
    np.testing.assert_allclose(answer["normalised"], expected["normalised"][0].ravel(), rtol=0, atol=TOLERANCE)
    python = PolicySampler(bundles(name))
    check(driver.sample(one, seed=7), python(one, seeds=[7]))
    check(driver.sample(one, seed=7, num_inference_steps=4), python(one, seeds=[7], num_inference_steps=4))
    last = python(one, seeds=[3]).samples
    index = np.minimum(np.arange(16) + 5, 15)
    warm = driver.sample(one, seed=8, strength=0.3, previous=last[0], shift=5)
    assert warm["steps"] == 3
    check(warm, python(one, seeds=[8], strength=0.3, previous=last[:, index]))
    mask = np.zeros((1, 16, 3), bool)
    mask[:, :4, :2] = True
    known = np.where(mask, np.float32(0.3), np.float32(0))
    kept = driver.sample(one, seed=9, known=known, mask=mask.astype(int))
    check(kept, python(one, seeds=[9], known=known, mask=mask))
    assert np.array_equal(np.float32(kept["actions"]).reshape(8, 3)[:3, :2], known[0, 1:4, :2])
    if name == "step":
        # The x0 of the first step.
        late = driver.sample(one, seed=7, late=True)
        check(late, python(one, seeds=[7], deadline=0.0))


@pytest.mark.slow
def test_a_ddpm_policy_runs_as_ddpm_and_as_ddim(driver: Driver, bundles: Any) -> None:
    observations, _ = golden(DDPM)
    one = {key: value[:1] for key, value in observations.items()}
    assert driver.ask(load=str(bundles(DDPM))) == {}
    python = PolicySampler(bundles(DDPM))
    check(driver.sample(one, seed=5), python(one, seeds=[5]))
    few = {"num_inference_steps": 5}
    check(driver.sample(one, seed=5, ddim=True, **few), python(one, seeds=[5], method="ddim", **few))


def test_what_does_not_fit_is_refused_before_the_network(driver: Driver, bundles: Any, tmp_path: Path) -> None:
    observations, _ = golden(STATE)
    one = {key: value[:1] for key, value in observations.items()}
    assert driver.ask(load=str(bundles(STATE))) == {}
    # JSON has no infinity; this is one in float32.
    bad = {**one, "observation.state": np.where(np.arange(4) == 2, 1e300, one["observation.state"].astype(np.float64))}
    for given, call, words in (
        (bad, {}, "observation.state: has NaN or infinite values"),
        (one, {"previous": np.zeros(48)}, "previous: given for a whole run"),
        (one, {"strength": 0.5}, "previous: missing"),
        (one, {"known": np.zeros(48)}, "known, mask: one of the two"),
        (one, {"late": True}, "deadline: given for a file that takes all steps at once"),
        (one, {"num_inference_steps": 0}, "num_inference_steps: 0"),
        (one, {"eta": 0.5}, "eta: "),
        ({"observation.effort": np.zeros(4)}, {}, "observation.effort: no observation of this policy"),
    ):
        assert words in driver.sample(given, **call).get("error", "")
    plain = shutil.copytree(bundles(STATE), tmp_path / "plain")
    manifest = json.loads((plain / "manifest.json").read_text())
    del manifest["policy"]
    (plain / "manifest.json").write_text(json.dumps(manifest))
    assert "no policy's" in driver.ask(load=str(plain))["error"]


@pytest.mark.parametrize(
    "options",
    [{}, {"lead": 3}, {"lead": 3, "commit": True}, {"strength": 0.5, "lead": 2}],
    ids=lambda each: "-".join(each),
)
def test_queues_execute_what_pythons_do(driver: Driver, bundles: Any, options: dict[str, Any]) -> None:
    """The same actions over three chunks, sampled in time or while the last one is executed."""
    assert driver.ask(load=str(bundles(STATE))) == {}
    said = PolicySampler(bundles(STATE)).bundle.manifest["policy"]
    sizes = {name: said[name] for name in ("n_obs_steps", "n_action_steps", "horizon", "first_action")}
    generator = np.random.default_rng(0)
    ticks = [
        {
            name: generator.standard_normal(each["shape"]).astype(np.float32)
            for name, each in said["observations"].items()
        }
        for _ in range(22)
    ]
    with ActionQueue(PolicySampler(bundles(STATE)), seed=4, **sizes, **options) as python:
        expected = [python.act(tick) for tick in ticks]
    listed = [{name: value.tolist() for name, value in tick.items()} for tick in ticks]
    answer = driver.ask(queue={"ticks": listed, "seed": 4, **options})
    assert "error" not in answer, answer
    np.testing.assert_allclose(answer["actions"], expected, rtol=0, atol=3 * TOLERANCE)
    assert (answer["allocations"], answer["locks"]) == (0, 0)


def test_queues_refuse_options_by_name(driver: Driver, bundles: Any) -> None:
    assert driver.ask(load=str(bundles(STATE))) == {}
    for options, words in (
        ({"lead": 8}, "lead: 8; pass less than the 8"),
        ({"commit": True}, "commit: true with lead 0"),
    ):
        assert words in driver.ask(queue={"ticks": [], **options})["error"]


def test_the_bench_prints_what_it_measured(bundles: Any) -> None:
    program = build("release", "policy_bench") / "policy_bench"
    line = [program, bundles(STATE), "--chunks", "5", "--cycles", "30", "--rate", "500"]
    printed = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert "10 steps, 8 actions a chunk" in printed and "a cycle after its time: p50" in printed
    counts = [int(each) for each in re.findall(r"ms +([0-9]+)", printed)]
    assert sum(counts) == 30 and max(len(each) for each in printed.splitlines()) <= 80
    wrong = subprocess.run([program, bundles(STATE), "--rate", "0"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--rate: '0'" in wrong.stderr


def test_the_readmes_program_runs(bundles: Any, tmp_path: Path) -> None:
    text = (ROOT / "cpp" / "README.md").read_text()
    (program,) = (block for block in re.findall(r"```cpp\n(.*?)```", text, re.DOTALL) if "action_queue.hpp" in block)
    (tmp_path / "main.cpp").write_text(program)
    libraries = RUNTIME / "lib"
    command = ["g++", "-std=c++17", f"-I{ROOT / 'cpp' / 'include'}", f"-I{RUNTIME / 'include'}", "main.cpp",
               "-o", "main", f"-L{libraries}", "-lonnxruntime", "-pthread", f"-Wl,-rpath,{libraries}"]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / "policy").symlink_to(bundles(STATE))
    printed = subprocess.run([tmp_path / "main"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert np.isfinite([[float(each) for each in line.split()] for line in printed.splitlines()]).all()
    assert len(printed.splitlines()) == 20
