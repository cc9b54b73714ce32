"""The bench judges rightly, survives what candidates do, and writes what it promises."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import performance
import pytest
import quality
import torch
from rich.console import Console

import fastddim
from fastddim.bench import breakdown, compare, explain, gpu, plots, profiles, report, run, table, timing
from fastddim.bench.cases import BASELINES, LEFT_OUT, NEEDS_GPU, Call, Candidate, Case, Scope, Work
from fastddim.bench.exported import ORT_LOOP, UNHOISTED_ORT_LOOP
from fastddim.bench.import_suite import import_suite
from fastddim.bench.loop_case import LoopInputs, loop_case
from fastddim.bench.loop_suite import DIFFUSERS_LOOP, FASTDDIM_SAMPLER, HOISTED_SAMPLER, loop_suite
from fastddim.bench.networks import DIGITS, POLICY
from fastddim.bench.scheduler_loop import in_float64, make_scheduler, run_scheduler
from fastddim.bench.step_suite import DIFFUSERS_SCHEDULER, FASTDDIM_SCHEDULER, StepInputs, step_case, step_suite
from fastddim.bench.suites import SUITES
from fastddim.bench.textbook import StepProblem, draw_inputs, textbook_loop, textbook_step
from fastddim.cli import main
from fastddim.samplers import METHODS, Method
from fastddim.schedule import FlowSchedule

FAST = timing.Settings(min_rounds=1, max_rounds=10, budget_s=0.05)
CPU, QUICK = Scope(), Scope(quick=True)
TINY = (2, 3, 8, 8)
LOOPS = [loop_case(*run, CPU, (FASTDDIM_SAMPLER, DIFFUSERS_LOOP)) for run in ((POLICY, 1, 10), (DIGITS, 1, 20))]
PROBLEMS = {
    "epsilon": StepProblem(shape=TINY),
    "v_prediction": StepProblem(shape=TINY, prediction_type="v_prediction"),
    "eta": StepProblem(shape=TINY, eta=1.0),
    "threshold": StepProblem(shape=TINY, threshold=2.0),
}


def toy_case(*candidates: Candidate, target: float | None = None, expected: Any = (0.0, 4.0)) -> Case:
    return Case("step", "toy", candidates, lambda: None, lambda _: (np.array(expected),), target)


def constant(name: str, *values: float, baseline: str | None = None) -> Candidate:
    return Candidate(name, lambda _: lambda: (torch.tensor(values),), baseline)


def broken(name: str, good_calls: int) -> Candidate:
    """Right for some calls over all its lifetime, then it raises."""
    calls = []

    def call() -> tuple[torch.Tensor]:
        calls.append(None)
        if len(calls) > good_calls:
            raise RuntimeError(f"planted\nafter {good_calls}")
        return (torch.tensor([0.0, 4.0]),)

    return Candidate(name, lambda _: call)


def planted(column: str, offset: float) -> Candidate:
    """`ddim_step` with one coefficient off."""

    def make(inputs: StepInputs) -> Call:
        problem = inputs.problem
        schedule = fastddim.Schedule(fastddim.DDIMConfig(prediction_type=problem.prediction_type))
        table = fastddim.StepTable.build(schedule, schedule.pairs(problem.num_steps), eta=problem.eta)
        values = table.columns.copy()
        values[:, table.rows[0]._fields.index(column)] += offset
        table = fastddim.StepTable.from_columns(table.timesteps, values)
        limit = fastddim.Clip() if problem.threshold is None else fastddim.DynamicThreshold(0.995, problem.threshold)
        return lambda: fastddim.ddim_step(
            inputs.model_output, inputs.sample, table, problem.index, limit=limit, noise=inputs.noise
        )

    return Candidate(f"{column} + {offset}", make)


def planted_loop(num_steps: int = 10, observed: float = 0.0, **changes: Any) -> Candidate:
    """A run of `Sampler` with something changed."""

    def make(inputs: LoopInputs) -> Call:
        config = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}
        options = {"use_clipped_model_output": False, "sample_shape": inputs.problem.shape[1:]}
        observation = inputs.kwargs["observation"] + observed
        for key, value in changes.items():
            (options if key in ("eta", "use_clipped_model_output") else config)[key] = value
        sampler = fastddim.Sampler(inputs.model, fastddim.DDIMConfig(**config), num_steps, **options)
        return lambda: (sampler(inputs.start, seeds=0, observation=observation),)

    return Candidate("planted", make)


class Clock:
    """In the bench's place of `time`: it stands still but for what candidates spend, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    perf_counter = monotonic = read

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def candidate(self, name: str, *seconds: float) -> Candidate:
        """Right, and its calls take so long, in turn."""
        lengths = itertools.cycle(seconds)

        def call() -> tuple[torch.Tensor]:
            self.spend(next(lengths))
            return (torch.tensor([0.0, 4.0]),)

        return Candidate(name, lambda _: call)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (run, timing):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put the given cases in the place of the step suite."""

    def replace(*cases: Case) -> None:
        monkeypatch.setitem(SUITES, "step", lambda scope: list(cases))

    return replace


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_textbook_agrees_with_diffusers_in_float64(name: str) -> None:
    problem = PROBLEMS[name]
    output, sample, noise = draw_inputs(problem)
    scheduler = diffusers.DDIMScheduler(
        prediction_type=problem.prediction_type,
        thresholding=problem.threshold is not None,
        sample_max_value=problem.threshold or 1.0,
    )
    scheduler.set_timesteps(problem.num_steps)
    assert int(scheduler.timesteps[problem.index]) == problem.timestep
    tensors = [torch.from_numpy(array) for array in (output, sample, noise)]
    kwargs = {"eta": problem.eta, "variance_noise": tensors[2]} if problem.eta else {}
    theirs = scheduler.step(tensors[0], problem.timestep, tensors[1], return_dict=False, **kwargs)
    # diffusers' alphas_cumprod is float32, whatever the state's dtype.
    assert timing.relative_error(theirs, textbook_step(problem, output, sample, noise)) < 5e-6


@pytest.mark.parametrize("case", LOOPS, ids=lambda case: case.name)
def test_the_textbook_loop_agrees_with_diffusers_in_float64(case: Case) -> None:
    problem = case.inputs().problem
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=problem.num_train_timesteps,
        beta_schedule=problem.beta_schedule,
        prediction_type=problem.prediction_type,
        timestep_spacing=problem.timestep_spacing,
    )
    scheduler.set_timesteps(problem.num_steps)
    assert scheduler.timesteps.tolist() == problem.timesteps()
    # A smooth model, whose x0 is beyond the clip in places.
    start = np.random.default_rng(0).standard_normal(problem.shape)
    x = torch.from_numpy(start)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(x * (1 + t / 1000)), t, x).prev_sample
    ours = textbook_loop(problem, lambda x, t: np.sin(x * (1 + t / 1000)), start)
    # diffusers' alphas_cumprod is float32, whatever the state's dtype.
    assert timing.relative_error([x], [ours]) < 2e-5
    assert float((np.abs(ours) < 1).mean()) > 0.2


@pytest.mark.parametrize("case", LOOPS, ids=lambda case: case.name)
def test_a_loop_ends_inside_the_clip_and_depends_on_its_condition(case: Case) -> None:
    inputs = case.inputs()
    with torch.no_grad():
        (expected,) = case.reference(inputs)
        others = {name: value + 1 for name, value in inputs.kwargs.items()}
        (other,) = case.reference(dataclasses.replace(inputs, kwargs=others))
        tolerance = case.tolerance(inputs, [expected])
    assert expected.dtype == np.float64
    assert float((np.abs(expected) < 1).mean()) > 0.5
    assert tolerance == 2e-5
    assert timing.relative_error([other], [expected]) > 100 * tolerance


@pytest.mark.parametrize("problem", [StepProblem(shape=(8, 3, 64, 64), threshold=2.0)])
def test_inputs_give_both_limits_work(problem: StepProblem) -> None:
    free = dataclasses.replace(problem, threshold=1e9)
    _, x0 = textbook_step(free, *draw_inputs(free))
    _, clipped = textbook_step(dataclasses.replace(problem, threshold=None), *draw_inputs(problem))
    beyond = float((np.abs(clipped) == 1).mean())
    assert 0.02 < beyond < 0.3
    # Dividing by s > 1, and not by its cap, is what makes the threshold's quantile count.
    ratio = clipped[np.abs(clipped) < 0.5] / x0[np.abs(clipped) < 0.5]
    assert 1.2 < ratio.min() < ratio.max() < 1.95


@pytest.mark.parametrize(
    "case", [*(case for case in step_suite(QUICK) if case.needs is None), *LOOPS], ids=lambda case: case.name
)
def test_registered_candidates_are_right_far_within_the_tolerance(case: Case) -> None:
    rows = timing.run_case(case, FAST)
    ran = [row for row in rows if row.message != LEFT_OUT]
    assert [row.status for row in ran] == ["ok", "ok"]
    # Rounding the result to half precision is most of its tolerance.
    share = 1 / 4 if case.about["dtype"] == "float32" else 1
    assert all(row.error is not None and row.error < share * row.tolerance for row in ran)
    if case.about["dtype"] == "float32":
        assert all(row.tolerance == 2e-5 for row in ran)
    theirs = ran[1]
    assert theirs.ratio_p20 <= theirs.ratio <= theirs.ratio_p80
    for row in ran:
        assert row.rounds >= 1
        assert 0 < row.p20_s <= row.median_s <= row.p80_s <= row.p99_s
        assert row.cold_s > 0
        assert row.launches is row.synchronizations is row.peak_bytes is None


@pytest.mark.parametrize("offset", [1e-3, -1e-3])
@pytest.mark.parametrize(
    ("name", "column"),
    [
        *((name, column) for name in PROBLEMS for column in ("x0_from_x", "x0_from_output", "next_from_x0")),
        *((name, "next_from_output") for name in PROBLEMS),
        ("v_prediction", "next_from_x"),
        ("eta", "noise_scale"),
    ],
)
def test_a_coefficient_off_by_a_thousandth_is_wrong(name: str, column: str, offset: float) -> None:
    wrong, right = planted(column, offset), planted(column, 0.0)
    rows = timing.run_case(step_case(name, PROBLEMS[name], CPU, (wrong, right, DIFFUSERS_SCHEDULER)), FAST)
    assert [row.status for row in rows] == ["wrong", "ok", "ok"]
    assert rows[0].median_s is rows[0].cold_s is None
    assert "relative error" in rows[0].message


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "ok"),
        ({"num_steps": 9}, "wrong"),
        ({"timestep_spacing": "trailing"}, "wrong"),
        ({"steps_offset": 1}, "wrong"),
        ({"clip_sample_range": 1.001}, "wrong"),
        ({"use_clipped_model_output": True}, "wrong"),
        ({"eta": 0.01}, "wrong"),
        ({"observed": 1e-2}, "wrong"),
    ],
    ids=str,
)
def test_a_loop_with_something_changed_is_wrong(changes: dict[str, Any], status: str) -> None:
    case = dataclasses.replace(LOOPS[0], candidates=(planted_loop(**changes),))
    (row,) = timing.run_case(case, FAST)
    assert row.status == status, row.message
    assert (row.median_s is None) == (status == "wrong")


@pytest.mark.parametrize("method", ["ddim", "ddpm", "euler", "euler_ancestral", "lcm", "tcd", "dpmsolver++"])
def test_methods_are_right_and_timed_against_diffusers(method: str) -> None:
    cases = loop_suite(dataclasses.replace(QUICK, method=method))
    case = next(case for case in cases if case.name == f"policy [4,16,7] x10 {method}")
    ours, theirs = timing.run_case(case, FAST)
    assert (ours.candidate, theirs.baseline) == ("fastddim.Sampler", "diffusers")
    for row in (ours, theirs):
        assert row.status == "ok", row.message
        assert row.error < row.tolerance / 3 and row.tolerance < 5e-5
        assert row.median_s > 0 and row.parts["model"] > 0
        assert row.about["method"] == method
    assert theirs.ratio > 0


@pytest.mark.parametrize("method", ["euler", "euler_ancestral", "dpmsolver++"])
def test_methods_start_where_a_cosine_schedule_ends(method: str) -> None:
    """The digits' first step is at a sigma of 20,000, where float32 is what their loop, not ours, loses."""
    case = loop_case(DIGITS, 1, 4, CPU, (FASTDDIM_SAMPLER,), method=method)
    (row,) = timing.run_case(case, FAST)
    assert row.status == "ok" and row.error < 5e-6, row.message


def test_the_method_s_reference_is_float64() -> None:
    """With DDIM, diffusers' loop and the textbook's share no code."""
    problem = LOOPS[1].inputs().problem
    start = np.random.default_rng(0).standard_normal(problem.shape)
    with in_float64("ddim"):
        scheduler = make_scheduler("ddim", problem)
        theirs = run_scheduler(scheduler, lambda x, t: torch.sin(x * (1 + int(t) / 1000)), torch.from_numpy(start))
    expected = textbook_loop(problem, lambda x, t: np.sin(x * (1 + t / 1000)), start)
    assert timing.relative_error([theirs], [expected]) < 1e-12
    for method in ("euler", "dpmsolver++"):
        with in_float64(method):
            assert make_scheduler(method, problem).alphas_cumprod.dtype == torch.float64
        assert make_scheduler(method, problem).alphas_cumprod.dtype == torch.float32


@pytest.mark.parametrize(
    ("method", "options", "first_seed"),
    [
        ("dpmsolver++", {"method_options": {"solver_type": "heun"}}, 0),
        ("dpmsolver++", {"method": "euler"}, 0),
        ("ddpm", {"variance_type": "fixed_large"}, 0),
        ("tcd", {"method_options": {"gamma": 0.31}}, 0),
        ("euler_ancestral", {}, 1),
    ],
)
def test_another_method_or_noise_is_wrong(method: str, options: dict[str, Any], first_seed: int) -> None:
    def make(inputs: LoopInputs) -> Call:
        scheduler = make_scheduler(method, inputs.problem)
        shape = inputs.problem.shape[1:]
        sampler = fastddim.Sampler(inputs.model, scheduler, 10, sample_shape=shape, **{"method": method, **options})
        start = inputs.start * sampler.table.start_scale
        return lambda: (sampler(start, seeds=first_seed, **inputs.kwargs),)

    case = loop_case(POLICY, 1, 10, CPU, (Candidate("planted", make), FASTDDIM_SAMPLER), method=method)
    assert [row.status for row in timing.run_case(case, FAST)] == ["wrong", "ok"]


def test_a_batch_that_repeats_a_block_repeats_its_noise() -> None:
    network = dataclasses.replace(POLICY, repeats=True)
    case = loop_case(network, 3, 4, CPU, (FASTDDIM_SAMPLER,), method="ddpm")
    inputs = case.inputs()
    assert inputs.seeds == [0, 0, 0] and case.blocks == 3
    assert [row.status for row in timing.run_case(case, FAST)] == ["ok"]


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ((0.0, 4.0), "ok"),
        ((0.0, 4.0 + 6e-5), "ok"),
        ((1e-4, 4.0), "wrong"),
        ((float("nan"), 4.0), "wrong"),
        ((0.0, float("inf")), "wrong"),
        ((0.0, 4.0, 0.0), "raised"),
    ],
)
def test_verdicts(values: tuple[float, ...], status: str) -> None:
    (row,) = timing.run_case(toy_case(constant("it", *values)), FAST)
    assert row.status == status
    assert (row.median_s is not None) == (status == "ok")
    json.dumps(dataclasses.asdict(row), allow_nan=False)


def test_a_wrong_candidate_is_never_timed() -> None:
    calls = []

    def call() -> tuple[torch.Tensor]:
        calls.append(None)
        return (torch.tensor([1.0, 4.0]),)

    timing.run_case(toy_case(Candidate("wrong", lambda _: call)), FAST)
    assert len(calls) == 1


def test_candidates_take_turns_without_autograd(clock: Clock) -> None:
    turns: list[str] = []

    def noted(name: str) -> Candidate:
        def call() -> tuple[torch.Tensor]:
            assert not torch.is_grad_enabled()
            # Longer than a sample, so that each sample is one call.
            clock.spend(3e-3)
            turns.append(name)
            return (torch.tensor([0.0, 4.0]),)

        return Candidate(name, lambda _: call)

    rows = timing.run_case(toy_case(noted("A"), noted("B")), timing.Settings(4, 4, 0.0))
    # One call to warm the caches before each that is timed.
    assert "".join(turns[-16:]) == "AABB" * 4
    assert [row.rounds for row in rows] == [4, 4]


def test_a_ratio_is_the_median_of_the_rounds_quotients(clock: Clock) -> None:
    # Longer than what is called twice a round; one call verifies, one warms up, and three rounds follow.
    ours = clock.candidate("ours", 9.0, 9.0, 1.0, 2.0, 4.0)
    theirs = clock.candidate("theirs", 9.0, 9.0, 3.0, 3.0, 3.0)
    first, second = timing.run_case(toy_case(ours, theirs), timing.Settings(3, 3, 0.0))
    assert (first.cold_s, first.median_s, second.median_s) == (9.0, 2.0, 3.0)
    assert (first.p20_s, first.p80_s) == pytest.approx((1.4, 3.2))
    # The quotients are 3 / 1, 3 / 2 and 3 / 4.
    assert (second.ratio_p20, second.ratio, second.ratio_p80) == pytest.approx((1.05, 1.5, 2.4))
    assert first.ratio is None


# One call verifies, three or fewer warm up, and the others are timed.
@pytest.mark.parametrize("good_calls", [0, 1, 10])
def test_a_candidate_that_raises_leaves_the_others_alone(good_calls: int) -> None:
    rows = timing.run_case(toy_case(broken("bad", good_calls), constant("good", 0.0, 4.0)), FAST)
    assert [row.status for row in rows] == ["raised", "ok"]
    assert rows[0].message == f"RuntimeError: planted after {good_calls}"
    assert rows[0].median_s is None
    assert rows[1].median_s is not None
    assert rows[1].ratio is None


def test_a_case_that_cannot_be_set_up_is_reported_for_each_candidate() -> None:
    case = dataclasses.replace(toy_case(constant("a", 0.0, 4.0), constant("b", 0.0, 4.0)), inputs=lambda: 1 / 0)
    rows = timing.run_case(case, FAST)
    assert [row.status for row in rows] == ["raised", "raised"]
    assert "ZeroDivisionError" in rows[0].message


@pytest.mark.parametrize(("target", "met"), [(1e-9, True), (1e9, False), (None, None)])
def test_targets_are_for_baselines(target: float | None, met: bool | None) -> None:
    names = {"ours": None, "ours too": None, "theirs": "diffusers"}
    case = toy_case(*(constant(name, 0.0, 4.0, baseline=each) for name, each in names.items()), target=target)
    rows = timing.run_case(case, FAST)
    assert [row.target_met for row in rows] == [None, None, met]
    assert rows[0].ratio is None


def test_allocator_modes_decide_whether_large_tensors_cost_page_faults() -> None:
    code = (
        "import resource, sys, torch\n"
        "from fastddim.bench.timing import set_allocator\n"
        "assert set_allocator(sys.argv[1]) == sys.argv[1]\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "x = torch.ones(1 << 20); [x + 1 for _ in range(10)]; start = faults()\n"
        "[None for _ in range(100) if (x + 1) is None]; print(faults() - start)"
    )
    # Each of the 100 sums has 4 MB, 1024 pages unless the kernel hands out larger ones.
    faults = {}
    for mode in ("keep", "fresh"):
        command = [sys.executable, "-c", code, mode]
        done = subprocess.run(command, cwd=Path(fastddim.__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        faults[mode] = int(done.stdout)
    assert faults["keep"] < 50
    assert faults["fresh"] > 100


def test_suites_have_the_bars() -> None:
    bars = {case.name: case.target for case in step_suite(CPU) if case.target}
    assert bars == {"default [1,4,64,64]": 4.0, "default [8,3,256,256]": 5.0, "threshold [8,3,256,256]": 5.0}
    assert import_suite(CPU)[0].target == pytest.approx(1 / 1.5)
    assert not any(case.target for case in step_suite(QUICK))
    assert not any(case.target for case in loop_suite(CPU))


@pytest.mark.parametrize("scope", [CPU, QUICK, Scope(device="cuda")], ids=str)
def test_suites_list_what_the_issue_asks_for_whatever_the_machine(scope: Scope) -> None:
    for make_cases in SUITES.values():
        cases = make_cases(scope)
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            names = [candidate.name for candidate in case.candidates]
            assert len(set(names)) == len(names)
    sizes = {case.about["elements"] for case in step_suite(scope) if case.about["option"] == "size"}
    assert sizes == {1 << exponent for exponent in range(12, 29, 2)}
    loops = loop_suite(scope)
    for model in ("policy", "digits", "cifar10", "lsun256", "sd15", "sdxl"):
        about = [case.about for case in loops if case.about["model"] == model]
        assert {each["steps"] for each in about} == {1, 4, 10, 20, 50}
        assert {each["batch"] for each in about} == {1, 4, 16}
        listed = {
            each.baseline for case in loops if case.about["model"] == model for each in case.candidates if each.baseline
        }
        wanted = set(BASELINES) - {"import"} - (set() if scope.on_gpu else {"eager"})
        assert listed == wanted
    if not scope.on_gpu:
        large = [case for case in loops if case.about["model"] in ("lsun256", "sd15", "sdxl")]
        assert {case.needs for case in large} == {NEEDS_GPU}


def test_a_failing_import_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    case = import_suite(CPU)[0]
    call = case.candidates[0].make(None)
    np.testing.assert_array_equal(call(), case.reference(None))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="import fastddim"):
        call()


def test_quick_run_writes_both_files(
    tmp_path: Path, only: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = constant("theirs", 0.0, 4.0, baseline="diffusers")
    only(toy_case(constant("ours [x]", 0.0, 4.0), theirs, target=1e-9))
    paths = tmp_path / "out.json", tmp_path / "out.md"
    paths[0].write_text("earlier")
    arguments = ["--suite", "step", "--quick", "--json", str(paths[0]), "--markdown", str(paths[1])]
    assert main(["bench", *arguments]) == 0
    shown = capfd.readouterr()
    assert "ours [x]" in shown.out
    assert shown.err == ""

    result = json.loads(paths[0].read_text())
    assert (result["format"], result["suite"], result["quick"], result["complete"]) == (2, "step", True, True)
    assert result["allocator"] in timing.ALLOCATORS
    known = result["environment"]
    assert known["device"]
    assert known["threads"] == torch.get_num_threads()
    assert known["versions"]["torch"] == torch.__version__
    assert known["versions"]["diffusers"] == diffusers.__version__
    assert {"python", "triton", "fastddim"} <= known["versions"].keys()
    assert "commit" in known
    ours, other = result["rows"]
    assert (ours["candidate"], ours["ours"], other["ours"]) == ("ours [x]", True, False)
    assert other["ratio"] > 0
    assert other["target_met"] is True
    table = [line for line in paths[1].read_text().splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    assert sorted(os.listdir(tmp_path)) == ["out.json", "out.md"]


@pytest.mark.parametrize("bad", [constant("bad", 1.0, 4.0), broken("bad", 0)], ids=["wrong", "raised"])
def test_a_failure_is_status_1_and_in_the_files(
    tmp_path: Path, only: Callable[..., None], capfd: pytest.CaptureFixture[str], bad: Candidate
) -> None:
    only(toy_case(bad), toy_case(constant("good", 0.0, 4.0)))
    path = tmp_path / "out.json"
    assert main(["bench", "--suite", "step", "--quick", "--json", str(path)]) == 1
    rows = json.loads(path.read_text())["rows"]
    assert [row["status"] == "ok" for row in rows] == [False, True]
    shown = capfd.readouterr()
    assert rows[0]["message"] in shown.err
    assert rows[0]["status"].upper() in shown.out


def refused(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one-line error of a command that must fail before it runs a case."""
    assert main(["bench", "--quick", *arguments]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert len(shown.err.strip().splitlines()) == 1
    return shown.err


def test_user_errors_come_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "CaseRun", lambda *_: pytest.fail("the run started"))
    message = refused(["--suite", "stepp"], capfd)
    assert all(name in message for name in ("'stepp'", "'step'", "'serve'", "'import'", "'all'"))
    assert all(name in refused(["--allocator", "new"], capfd) for name in ("'new'", "'keep'", "'fresh'", "'system'"))
    for option in ("--json", "--markdown"):
        for path in (tmp_path, tmp_path / "no" / "out", "/dev/full", tmp_path / ("x" * 300)):
            message = refused([option, str(path)], capfd)
            assert option in message
            assert repr(str(path)) in message
    assert "two files" in refused(["--json", str(tmp_path / "a"), "--markdown", str(tmp_path / "a")], capfd)
    assert "--nope" in refused(["--nope"], capfd)
    message = refused(["--suite", "import", "--case", "nope"], capfd)
    assert all(name in message for name in ("'nope'", "import", "first use"))
    assert all(name in refused(["--baseline", "difusers"], capfd) for name in ("'difusers'", *map(repr, BASELINES)))
    assert "--device" in refused(["--device", "gpu"], capfd)
    message = refused(["--suite", "loop", "--method", "eulerr"], capfd)
    assert all(name in message for name in ("--method", "'eulerr'", "'euler'", "'dpmsolver++'"))
    assert "--suite loop" in refused(["--method", "euler"], capfd)
    monkeypatch.setitem(METHODS, "flowing", Method("flowing", lambda schedule, steps: None, (), (FlowSchedule,)))
    message = refused(["--suite", "loop", "--method", "flowing"], capfd)
    assert "'flowing'" in message and "no diffusers scheduler" in message and "'tcd'" in message
    assert "--minutes" in refused(["--minutes", "0"], capfd)
    assert "--threads: 0" in refused(["--threads", "0"], capfd)
    assert repr(str(tmp_path / "no")) in refused(["--plot", str(tmp_path / "no")], capfd)
    assert "cannot be read" in refused(["--compare", str(tmp_path / "no.json")], capfd)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    path.write_text("earlier")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"--json: .*out\.json' was not written \(No space left"):
        report.write_text("--json", path, "later")
    assert path.read_text() == "earlier"
    assert os.listdir(tmp_path) == ["out.json"]


def test_the_quick_step_suite_runs_as_a_command(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    root = Path(fastddim.__file__).parents[1]
    cases = ["--case", "size*32,32]", "--case", "size*4096*"]
    done = subprocess.run(
        [sys.executable, "-m", "fastddim.bench", "--suite", "step", *cases, "--quick", "--json", str(path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing here was measured on a GPU" in done.stdout
    rows = json.loads(path.read_text())["rows"]
    ran = [row for row in rows if row["status"] == "ok"]
    assert len(ran) == 2
    assert {row["message"] for row in rows if row not in ran} == {LEFT_OUT, NEEDS_GPU}
    assert all(row["of_copy"] > 0 and row["gb_per_s"] > 0 for row in ran)


def test_importing_the_bench_loads_none_of_what_it_can_do_without() -> None:
    code = (
        "import sys\n"
        "for name in ('diffusers', 'matplotlib', 'rich', 'typer', 'onnxruntime', 'triton'): sys.modules[name] = None\n"
        "import fastddim.bench.run as run\n"
        "assert 'torch' not in sys.modules\n"
        "made = run.run_suite('loop', quick=True, patterns=['policy*1,16,7] x10', 'digits [1,1,16,16] x4'], budget_s=0.1)\n"
        "for row in made['rows']: print(row['candidate'], row['status'], row['message'], sep='|')\n"
    )
    root = Path(fastddim.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert rows[0] == ["fastddim.Sampler", "ok", "None"]
    # Compiled code is left out of a quick run.
    assert rows[1][:2] == ["fastddim.Sampler, backend='compiled'", "absent"]
    assert rows[2] == ["fastddim.Sampler, hoist", "ok", "None"]
    assert all(status == "absent" and message for _, status, message in rows[3:])
    assert any("not installed: diffusers" in message for _, _, message in rows)


def absent(name: str, reason: str) -> Candidate:
    return Candidate(name, lambda _: pytest.fail("it was made"), needs=lambda: reason)


def test_what_is_missing_is_listed_and_no_failure(
    tmp_path: Path, only: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    whole = dataclasses.replace(
        toy_case(constant("a", 0.0, 4.0), constant("b", 0.0, 4.0)), name="large", needs=NEEDS_GPU
    )
    only(toy_case(constant("ours", 0.0, 4.0), absent("rival", "not installed: rival (pip install rival)")), whole)
    paths = tmp_path / "out.json", tmp_path / "out.md"
    assert main(["bench", "--suite", "step", "--json", str(paths[0]), "--markdown", str(paths[1])]) == 0
    shown = capfd.readouterr()
    for text in (shown.out, paths[1].read_text()):
        assert "rival: not installed: rival (pip install rival)" in text
        assert "needs a GPU, 1 cases: step: large" in text
    rows = json.loads(paths[0].read_text())["rows"]
    assert [(row["candidate"], row["status"]) for row in rows] == [
        ("ours", "ok"), ("rival", "absent"), ("a", "absent"), ("b", "absent"),
    ]  # fmt: skip


def test_baselines_are_known_and_chosen(only: Callable[..., None], tmp_path: Path) -> None:
    for make_cases in SUITES.values():
        for scope in (Scope(), Scope(device="cuda")):
            named = {candidate.baseline for case in make_cases(scope) for candidate in case.candidates}
            assert named <= {None, *BASELINES}
    kept = dataclasses.replace(constant("kept", 0.0, 4.0), baseline="diffusers")
    left = dataclasses.replace(constant("left", 0.0, 4.0), baseline="eager")
    only(toy_case(constant("ours", 0.0, 4.0), left, kept))
    path = tmp_path / "out.json"
    assert main(["bench", "--suite", "step", "--quick", "--baseline", "diffusers", "--json", str(path)]) == 0
    assert [row["candidate"] for row in json.loads(path.read_text())["rows"]] == ["ours", "kept"]


@pytest.mark.parametrize(("rows", "status"), [(6, "ok"), (3, "raised"), (9, "raised"), (7, "raised")])
def test_repeated_blocks_are_all_judged(rows: int, status: str) -> None:
    case = dataclasses.replace(
        toy_case(Candidate("it", lambda _: lambda: (torch.ones(rows, 2),))),
        reference=lambda _: (np.ones((3, 2)),),
        blocks=2,
    )
    (row,) = timing.run_case(case, FAST)
    assert row.status == status
    spoiled = torch.ones(6, 2)
    spoiled[5, 1] = 1.001
    case = dataclasses.replace(case, candidates=(Candidate("it", lambda _: lambda: (spoiled,)),))
    assert timing.run_case(case, FAST)[0].status == "wrong"


def test_a_large_step_repeats_its_block_in_both_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddim.bench.step_suite._BLOCK", 2 * 3 * 8 * 8)
    problem = StepProblem(shape=(6, 3, 8, 8), guidance_scale=3.0, eta=1.0)
    case = step_case("guided", problem, CPU, (FASTDDIM_SCHEDULER, DIFFUSERS_SCHEDULER))
    assert case.blocks == 3
    inputs = case.inputs()
    assert inputs.model_output.shape == (12, 3, 8, 8)
    assert len(inputs.model_output.unique(dim=0)) == 4
    assert len(inputs.model_output[:6].unique(dim=0)) == 2
    assert [row.status for row in timing.run_case(case, FAST)] == ["ok", "ok"]


def test_parts_and_facts_are_reported(clock: Clock) -> None:
    turns: list[str] = []

    def make(_: Any) -> Work:
        def call() -> tuple[torch.Tensor]:
            turns.append("call")
            clock.spend(3e-3)
            return (torch.tensor([0.0, 4.0]),)

        return Work(call, lambda: {"size_bytes": 5.0}, lambda: {"model": 9.0, "host": 3.0})

    (row,) = timing.run_case(toy_case(Candidate("it", make)), FAST)
    # The shares are another run's; the sum is the median.
    assert row.parts == {"model": pytest.approx(2.25e-3), "host": pytest.approx(0.75e-3)}
    assert row.facts == {"size_bytes": 5.0}
    assert turns


def test_a_watch_tells_the_parts_of_a_run_and_the_host_has_the_rest(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breakdown, "time", clock)
    watch = breakdown.Watch("cpu")
    model, step = watch.around("model", clock.spend), watch.around("step", clock.spend)
    # The fourth run is the median.
    slower = iter((0.05, 0.005, 0.09, 0.01, 0.0025))

    def run() -> None:
        factor = next(slower)
        for _ in range(2):
            model(3.0 * factor)
            step(1.0 * factor)
        clock.spend(4.0 * factor)

    assert watch.split(run) == pytest.approx({"model": 0.06, "step": 0.02, "host": 0.04})
    # A profiler's seconds beyond the run's shrink to it; nothing seen is nothing told.
    assert breakdown.with_host({"model": 6.0, "step": 2.0}, 4.0) == {"model": 3.0, "step": 1.0, "host": 0.0}
    assert breakdown.with_host({}, 4.0) == {"run": 4.0}


@pytest.mark.slow
def test_loops_say_what_their_time_goes_to() -> None:
    candidates = FASTDDIM_SAMPLER, HOISTED_SAMPLER, DIFFUSERS_LOOP, ORT_LOOP, UNHOISTED_ORT_LOOP
    rows = timing.run_case(loop_case(POLICY, 1, 2, CPU, candidates), FAST)
    for row in rows:
        assert row.status == "ok", row.message
        assert min(row.parts.values()) >= 0 and sum(row.parts.values()) == pytest.approx(row.median_s)
        assert {"model", "step", "host"} <= row.parts.keys()
    assert ["hoisted" in row.parts for row in rows] == [False, True, False, True, False]


class Planted(torch.nn.Module):
    """One matrix product of 512 among tiny ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            x = torch.tanh(x) + 1
        return x.flatten()[:2] + (torch.ones(512, 512) @ torch.ones(512, 512))[0, :2] * 0


def test_the_costliest_operation_comes_first(
    only: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, path = Planted(), tmp_path / "out.json"
    planted = Candidate("planted", lambda _: lambda: (model(torch.zeros(1, 2)),))
    only(toy_case(planted, broken("bad", 2), absent("rival", "not installed: rival")))
    assert main(["bench", "--explain", "toy", "--suite", "step", "--threads", "1", "--json", str(path)]) == 1
    first, bad, rival = json.loads(path.read_text())["explanations"]
    assert (first["status"], bad["status"], rival["status"]) == ("ok", "raised", "absent")
    operations = first["operations"]
    assert operations[0]["name"] == "aten::mm" and operations[0]["calls"] == 1
    assert len(operations) == 10 < first["num_operations"]
    seconds = [each["self_s"] for each in operations]
    assert seconds == sorted(seconds, reverse=True) and min(seconds) >= 0 and sum(seconds) <= first["operations_s"]
    shown = capfd.readouterr().out
    assert "aten::mm" in shown and "RAISED: RuntimeError: planted after 2" in shown
    assert "not run: not installed: rival" in shown


@pytest.mark.parametrize("width", [60, 80, 120, 1000])
def test_explanations_fit_their_terminal_and_cut_no_name(width: int) -> None:
    name = "Conv node_" + "q" * 100
    operations = [profiles.Operation(name, 1000, 1.2345), profiles.Operation("aten::[mm]", 1, 0.0)]
    output = io.StringIO()
    made = explain.Explanation(
        "a [long] name", call_s=2.0, operations_s=1.2345, operations=operations, num_operations=2
    )
    table.print_explanations([made], Console(file=output, width=width, color_system=None))
    text = output.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert "1.23 s" in text and "100.0%" in text and "aten::[mm]" in text and "a [long] name" in text
    assert text.count("q") == 100


def test_a_profile_of_onnxruntime_is_its_last_run_and_knows_the_loop(tmp_path: Path) -> None:
    def event(name: str, ts: int, dur: int, operator: str | None = None) -> dict[str, Any]:
        if operator is None:
            return {"cat": "Session", "name": name, "ts": ts, "dur": dur, "args": {}}
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": operator}}

    events = [
        event("model_run", 0, 100), event("conv", 1, 90, "Conv"),
        event("model_run", 200, 100), event("embed", 201, 5, "Gemm"), event("steps", 210, 80, "Loop"),
        event("conv", 211, 30, "Conv"), event("add", 242, 4, "Add"),
        event("conv", 250, 20, "Conv"), event("add", 271, 2, "Add"),
    ]  # fmt: skip
    (tmp_path / "profile.json").write_text(json.dumps(events))
    nodes = profiles.read_onnxruntime(tmp_path / "profile.json")
    assert profiles.node_parts(nodes, {"add"}) == pytest.approx({"model": 50e-6, "step": 6e-6, "hoisted": 5e-6})
    assert [(each.name, each.calls) for each in profiles.node_operations(nodes)] == [
        ("Conv conv", 2), ("Add add", 2), ("Gemm embed", 1),
    ]  # fmt: skip


def test_the_case_to_explain_is_one(only: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    cases = [
        dataclasses.replace(toy_case(constant("it", 0.0, 4.0)), name=name, needs=needs)
        for name, needs in (("size [1] x1", None), ("size [1] x10", None), ("large [9]", NEEDS_GPU))
    ]
    only(*cases)
    assert explain.choose_case("size [1] x1", "step", QUICK) is cases[0]
    assert explain.choose_case("step: size [1] x1", "step", QUICK) is cases[0]
    assert explain.choose_case("x10", "step", QUICK) is cases[1]
    step = ["--suite", "step", "--explain"]
    assert all(f"'step: {case.name}'" in refused([*step, "size [1]"], capfd) for case in cases[:2])
    message = refused([*step, "sise [1] x1"], capfd)
    assert "'sise [1] x1' is no case" in message and message.index("'step: size [1] x1'") < message.index("x10")
    assert NEEDS_GPU in refused([*step, "large"], capfd)
    assert "--case" in refused([*step, "x10", "--case", "x10"], capfd)


def test_facts_are_asked_of_what_was_timed_and_their_error_is_the_rows(only: Callable[..., None]) -> None:
    def make(good_calls: int, latencies: list[float]) -> Candidate:
        call = broken("it", good_calls).make(None)
        return Candidate(f"{good_calls} calls", lambda _: Work(call, lambda: {"p50": latencies[0]}))

    # The first raises once it is warm: nobody asks for what it could not note.
    only(toy_case(make(1, []), make(1 << 30, []), make(1 << 30, [0.5])))
    made = run.run_suite("step", quick=True, budget_s=0.05)
    assert [row["status"] for row in made["rows"]] == ["raised", "raised", "ok"]
    first, second, third = made["rows"]
    assert "planted" in first["message"] and "IndexError" in second["message"]
    assert third["facts"] == {"p50": 0.5}


def test_launches_are_told_from_what_else_the_profiler_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {
        "cudaLaunchKernel": 1, "cudaLaunchKernelExC_v11060": 2, "cuLaunchKernelEx": 4, "cudaGraphLaunch": 8,
        "cudaMemcpyAsync": 16, "cuMemsetD32Async": 32,
    }  # fmt: skip
    others = (
        "cudaDeviceSynchronize",
        "cudaStreamSynchronize",
        "aten::copy_",
        "Memcpy HtoD",
        "cutlass_gemm",
        "cudaEventRecord",
    )
    events = [SimpleNamespace(key=key, count=count) for key, count in (counted | dict.fromkeys(others, 1000)).items()]
    profiler = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu.count_launches(lambda: None) == 63
    events.clear()
    assert gpu.count_launches(lambda: None) is None


def test_a_run_out_of_time_says_so_and_keeps_what_it_has(
    tmp_path: Path, only: Callable[..., None], clock: Clock
) -> None:
    path = tmp_path / "out.json"
    seen = []

    def look() -> None:
        seen.append(json.loads(path.read_text()) if path.exists() else None)
        clock.spend(0.7)

    cases = [dataclasses.replace(toy_case(clock.candidate("it", 0.1)), name=f"{k}", inputs=look) for k in range(3)]
    only(*cases)
    assert main(["bench", "--suite", "step", "--quick", "--minutes", "0.01", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "absent", "absent"]
    assert "out of time" in rows[1]["message"]

    seen.clear()
    path.unlink()
    assert main(["bench", "--suite", "step", "--json", str(path)]) == 0
    assert seen[0] is None
    assert [len(each["rows"]) for each in seen[1:]] == [1, 2]
    assert not any(each["complete"] for each in seen[1:])


def test_a_quick_run_measures_all_cases_in_every_pass(only: Callable[..., None], clock: Clock) -> None:
    order: list[str] = []

    def noted(name: str) -> Candidate:
        def call() -> tuple[torch.Tensor]:
            order.append(name)
            clock.spend(0.02)
            return (torch.tensor([0.0, 4.0]),)

        return Candidate(name, lambda _: call)

    only(*(dataclasses.replace(toy_case(noted(name)), name=name) for name in "AB"))
    settings = timing.QUICK
    made = run.run_suite("step", quick=True)
    assert "".join(name for name, _ in itertools.groupby(order)) == "AB" * (1 + settings.passes)
    assert [row["rounds"] >= settings.passes for row in made["rows"]] == [True, True]


def test_the_faster_candidates_samples_are_a_share_of_the_slowest_ones(clock: Clock) -> None:
    rows = timing.run_case(
        toy_case(clock.candidate("ours", 1e-3), clock.candidate("theirs", 0.21), broken("bad", 1)), FAST
    )
    # 5% of 210 ms.
    assert (rows[0].calls, rows[1].calls) == (11, 1)
    assert [row.status for row in rows] == ["ok", "ok", "raised"]


def test_threads_are_torchs_and_in_the_report(only: Callable[..., None]) -> None:
    seen = []

    def count() -> tuple[torch.Tensor]:
        seen.append(torch.get_num_threads())
        return (torch.tensor([0.0, 4.0]),)

    before = torch.get_num_threads()
    only(toy_case(Candidate("it", lambda _: count)))
    try:
        for options, threads in (({"threads": 2}, 2), ({}, 1), ({"threads": 3}, 3)):
            made = run.run_suite("step", quick=True, budget_s=0.05, **options)
            assert (set(seen), made["environment"]["threads"]) == ({threads}, threads)
            seen.clear()
    finally:
        torch.set_num_threads(before)


def test_a_slower_candidate_of_ours_is_a_regression(
    tmp_path: Path, only: Callable[..., None], clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    command = ["bench", "--suite", "step", "--quick"]
    slow = clock.candidate
    only(toy_case(slow("ours", 3e-3), slow("theirs", 12e-3)))
    assert main([*command, "--json", str(path)]) == 0
    assert main([*command, "--compare", str(path)]) == 0
    only(toy_case(slow("ours", 12e-3), slow("theirs", 12e-3)))
    capfd.readouterr()
    assert main([*command, "--compare", str(path)]) == 1
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.rstrip().endswith("worse")]
    assert line.split() == ["theirs", "4.00x", "1.00x", "-75.0%", "worse"]
    # Ours became faster: no regression.
    only(toy_case(slow("ours", 1e-3), slow("theirs", 12e-3)))
    assert main([*command, "--compare", str(path)]) == 0
    # Nothing in common.
    only(toy_case(slow("ours", 1e-3), slow("others", 2e-3)))
    assert main([*command, "--compare", str(path)]) == 2


@pytest.mark.parametrize(
    ("now", "low", "high", "verdict"),
    [
        (3.9, 3.8, 4.0, "same"),
        (3.0, 2.9, 3.1, "worse"),
        (3.0, 2.5, 3.95, "same"),
        (5.0, 4.9, 5.1, "better"),
        (4.1, 4.09, 4.11, "same"),
        (5.0, 4.0, 6.0, "same"),
    ],
)
def test_a_change_counts_beyond_tolerance_and_spread(now: float, low: float, high: float, verdict: str) -> None:
    def row(ratio: float, p20: float, p80: float, case: str = "case") -> timing.Row:
        made = timing.Row("step", case, "theirs", False, "ok", 1e-5)
        made.ratio, made.ratio_p20, made.ratio_p80 = ratio, p20, p80
        return made

    old = [row(4.0, 3.9, 4.1), row(2.0, 1.9, 2.1, "gone")]
    first, second = compare.compare(old, [row(now, low, high)])
    assert (first.verdict, second.verdict) == (verdict, "not in this run")
    assert compare.has_regressed([first, second]) == (verdict == "worse")
    # What a GPU makes of it says nothing of a CPU.
    with pytest.raises(ValueError, match="device of the same kind"):
        compare.compare([dataclasses.replace(old[0], device="cuda")], [row(now, low, high)])


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 1, "rows": []}', '{"format": 2}', '{"format": 2, "rows": [{"case": 1}]}']
)
def test_a_file_to_compare_with_is_checked_before_the_run(
    tmp_path: Path, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    assert "--compare" in refused(["--compare", str(path)], capfd)


# Committed reports of every suite, as the bench prints them.
REPORTS = sorted(path for path in performance.RESULTS.glob("*.json") if report.is_report(json.loads(path.read_text())))


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("width", [80, 120, 1000])
def test_a_table_fits_its_terminal_and_cuts_no_cell(path: Path, width: int) -> None:
    made = json.loads(path.read_text())
    rows = report.rows_of(made)
    output = io.StringIO()
    table.print_rows(rows, Console(file=output, width=width, color_system=None))
    text = output.getvalue()
    assert "…" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    ran = [row for row in rows if row.status == "ok"]
    # Each case is a heading over its candidates; a name may take several lines, the first of which has time and ratio.
    headings = [line.strip() for line in lines if re.match(r"  \w+: ", line)]
    assert headings == [f"{row.suite}: {row.case}" for row in ran if row.ours]
    times = [line for line in lines if re.search(r"\d (s|ms|us)\b", line)]
    for row, line in zip(ran, times, strict=True):
        assert row.candidate.startswith(line.split()[0])
        cells = re.split(r"\s{2,}", line.strip())
        assert report.format_seconds(row.median_s) in cells
        assert row.ours or f"{row.ratio:.2f}x" in cells
    # What there is no room for is named.
    shown = re.split(r"\s{2,}", next(line for line in lines if line.startswith("  candidate")).strip())
    said = re.search(r"in --json and --markdown: ([\w\s,/]+?)\n(?=not run|\Z)", text)
    left = re.split(r",\s+", said[1].replace("\n", " ").replace("  ", " ")) if said else []
    assert sorted([*shown, *left, "case"]) == sorted(report.columns_of(ran))
    assert width < 1000 or not left
    if path.name.endswith("loop.json"):
        assert "not run: diffusers, UNet as a CUDA graph: needs a GPU, in 18 cases" in " ".join(text.split())
        assert "needs a GPU, 25 cases" in text


@pytest.mark.parametrize("width", [30, 80])
def test_changes_fit_their_terminal(width: int) -> None:
    output = io.StringIO()
    names = "diffusers, compiled UNet (reduce-overhead)", "fastddim.export.TensorRTSampler"
    changes = [
        compare.Change("loop", "digits [1,1,16,16] x20", names[0], 2.0, 1.0, compare.WORSE),
        compare.Change("loop", "digits [1,1,16,16] x20", names[1], 12.345, None, compare.MISSING),
    ]
    table.print_changes(changes, Console(file=output, width=width, color_system=None))
    text = output.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    if width == 80:
        assert all(
            said in text for said in ("digits [1,1,16,16] x20", "2.00x", "-50.0%", "worse", "12.35x", "not in this run")
        )


def test_plots_show_what_was_measured(tmp_path: Path) -> None:
    rows = [
        timing.Row(
            "step", f"size {elements}", name, name == "ours", "ok", 1e-5, median_s=1e-9 * elements * k, p20_s=1e-9 * elements,
            p80_s=4e-9 * elements, gb_per_s=1.0, about={"elements": elements, "dtype": "float32", "option": "size"},
        )
        for k, name in ((1, "ours"), (2, "theirs"))
        for elements in (1 << 12, 1 << 16, 1 << 20)
    ]  # fmt: skip
    made = report.make_report(rows, "step", True, "keep")
    assert [path.name for path in plots.draw_all(made, tmp_path)] == ["step-latency.png"]
    parts = {"model": 0.5e-3, "step": 0.2e-3}
    loops = [
        timing.Row("loop", "m [1] x2", name, name == "ours", "ok", 1e-5, median_s=1e-3, parts=p, num_steps=2,
                   about={"model": "m", "batch": 1, "steps": 2, "dtype": "float32"})
        for name, p in (("ours", {**parts, "hoisted": 0.1e-3, "host": 0.2e-3}), ("older", parts), ("theirs", {}))
    ]  # fmt: skip
    made["rows"] += report.as_dicts(loops)
    paths = plots.draw_all(made, tmp_path)
    assert [path.name for path in paths] == ["step-latency.png", "loop-breakdown.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size < 200_000 for path in paths)
    assert plots.draw_all(report.make_report([], "step", True, "keep"), tmp_path) == []


def test_the_performance_page_is_what_the_results_give() -> None:
    page = performance.DOCS / performance.PAGE
    made = performance.make_page(performance.RESULTS, performance.DOCS)
    assert page.read_text() == made, "docs/performance.md is not up to date: make performance"
    for name in re.findall(r"\]\(([^)]+)\)", made):
        assert (performance.DOCS / name).exists(), name
    reports, qualities = performance.load(performance.RESULTS)
    assert reports and qualities
    assert all(name in made for name in (*reports, *qualities))
    assert all(path.stat().st_size < 200_000 for path in performance.DOCS.glob("*.png"))


def test_the_quality_page_is_what_the_results_give() -> None:
    page = (performance.DOCS / performance.QUALITY_PAGE).read_text()
    made = performance.make_quality_page(performance.RESULTS, performance.DOCS)
    assert page == made, "docs/quality.md is not up to date: make performance"
    assert quality.METHODS_HEADING in page and (performance.DOCS / performance.METHODS_PLOT).exists()


def test_advice_is_what_stands_outside_the_spread(tmp_path: Path) -> None:
    distances = {
        # Sets that rise and fall together.
        "DDIM": (1.5, 2.0, 1.7), "best": (1.2, 1.7, 1.4),
        # As good in one set; and far behind, but by amounts that vary as much.
        "beside": (1.25, 1.6, 1.5), "unsteady": (1.3, 4.0, 2.0),
    }  # fmt: skip
    rows = [
        {"method": name, "steps": steps, "options": {}, "frechet_distances": values, "agreements": [1.0] * 3}
        for name, values in distances.items()
        for steps in (4, 12)
    ]
    result = {"format": quality.METHODS_FORMAT, "created": "2026", "count": 100, "sets": 3, "floor": 0.5, "rows": rows}
    (tmp_path / "older.json").write_text(json.dumps(result | {"created": "2025", "rows": []}))
    (tmp_path / "newer.json").write_text(json.dumps(result))
    (tmp_path / performance.QUALITY_PAGE).write_text(f"# Before\n\n{quality.METHODS_HEADING}\n\nolder\n")
    assert [path.name for path in performance.draw_plots(tmp_path, tmp_path)] == [performance.METHODS_PLOT]
    page = performance.make_quality_page(tmp_path, tmp_path)
    assert page.startswith("# Before\n\n## Quality") and "older" not in page
    assert "| unsteady | 2.43 (1.30-4.00) | 2.43 (1.30-4.00) |" in page
    (advice,) = [line for line in page.splitlines() if line.startswith("- **")]
    assert advice == "- **4 steps**: best (1.43), or as well beside. DDIM is 0.30 behind (0.30 to 0.30)."


def test_the_performance_page_follows_its_results(tmp_path: Path) -> None:
    result = {
        "format": quality.FORMAT, "created": "2026-01-01", "count": 100, "floor": 0.5, "real_agreement": 0.98,
        "environment": report.environment(),
        "rows": [
            {"sampler": name, "eta": eta, "steps": steps, "seconds_per_image": steps * cost, "frechet_distance": distance,
             "agreement": None if distance is None else 0.9}
            for name, eta, steps, cost, distance in (
                ("fastddim.Sampler", 0.0, 10, 1e-3, 1.2), ("fastddim.Sampler", 0.0, 50, 1e-3, 0.9),
                ("fastddim.Sampler", 0.0, 100, 1e-3, 0.8), ("diffusers.DDPMScheduler", 1.0, 1000, 2e-3, 1.0),
                ("diffusers.DDIMScheduler", 1.0, 5, 1e-3, None),
            )
        ],
    }  # fmt: skip
    (tmp_path / "quality.json").write_text(json.dumps(result))
    row = timing.Row("step", "case [1|2]", "ours", True, "ok", 1e-5, median_s=1.5e-3, about={"option": "default"})
    row.device = "cuda"
    made = report.make_report([row], "step", False, "keep")
    made["environment"]["gpu"] = {"name": "A GPU", "memory_bytes": 2**34, "cuda": "13.0"}
    (tmp_path / "step.json").write_text(report.make_json(made))
    (tmp_path / "other.json").write_text('{"format": 1}')
    assert [path.name for path in performance.draw_plots(tmp_path, tmp_path)] == ["quality-time.png"]
    page = performance.make_page(tmp_path, tmp_path)
    assert "20 times fewer model calls and 40 times faster" in page
    assert "| diffusers.DDIMScheduler | 1 | 5 | 5 ms | NaN | NaN |" in page
    assert "| step: case [1\\|2] | ours | 1.5 ms |" in page
    assert "Suite step" in page and "A GPU" in page and "No result from a GPU" not in page
    assert "(quality-time.png)" in page and "(step-latency.png)" not in page
    (tmp_path / "step.json").unlink()
    assert "No result from a GPU is here yet" in performance.make_page(tmp_path, tmp_path)
