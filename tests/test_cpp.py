"""The C++ headers against Python's noise, tables and `OrtSampler`, under sanitizers; and a bundle's every damage."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import stub_cuda
import torch
from cpp_driver import ROOT, RUNTIME, CppError, CppSampler, build

import fastddim
from damage import edited, flip_a_byte, put
from fastddim import DDIMConfig, Schedule, StepTable
from fastddim.config import BETA_SCHEDULES, PREDICTION_TYPES, TIMESTEP_SPACINGS
from fastddim.export import Bundle, ExportOptions, OrtSampler, export_onnx, open_bundle
from fastddim.export.run_values import RunValues
from fastddim.noise import STREAM_INITIAL, STREAM_STEP, normal_numpy
from fastddim.samplers import METHODS, Steps
from fastddim.samplers.sampling import Sampling
from fastddim.samplers.spacings import SPACINGS
from fastddim.schedule import EDMSchedule, FlowSchedule
from flow import SHAPE, START_SCALE, Wave, flow_table, plain_loop
from test_step_files import conditions as text_conditions
from test_step_files import export as export_text
from unets import small_unet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="session")
def checked():
    return build("checked")


@pytest.fixture(scope="session")
def release():
    return build("release", "sample")


@pytest.fixture(scope="session")
def fused(tmp_path_factory):
    """`numbers` by both compilers for this machine's own instructions, without the option that CMake's target brings."""
    folder = tmp_path_factory.mktemp("fused")
    for compiler in ("g++", "clang++"):
        subprocess.run(
            [compiler, "-std=c++17", "-O3", "-march=native", f"-I{ROOT}/cpp/include",
             f"{ROOT}/cpp/tests/numbers.cpp", "-o", folder / compiler],
            check=True,
        )  # fmt: skip
    return folder


PROGRAMS = ["checked", pytest.param("fused g++", marks=pytest.mark.slow), "fused clang++"]


@pytest.fixture(params=PROGRAMS)
def numbers(request):
    """Runs requests of cpp/tests/numbers.cpp; returns its output and its error lines."""
    kind, _, compiler = request.param.partition(" ")
    program = request.getfixturevalue(kind) / (compiler or "numbers")

    def run(lines):
        done = subprocess.run([program], input="\n".join(lines).encode(), capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout, done.stderr.decode().splitlines()

    return run


def test_the_noise_is_pythons_bit_for_bit(numbers):
    draw = random.Random(0)
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, *(draw.getrandbits(64) for _ in range(40))]
    requests = [(2**64 - 7, 3, STREAM_STEP, 1_000_003)]
    for seed in seeds:
        for step in (0, 1, 49, 2**31, 2**32 - 1):
            requests.append((seed, step, draw.choice((STREAM_STEP, STREAM_INITIAL)), draw.randint(1, 700)))
    requests += [(draw.getrandbits(64), 0, STREAM_INITIAL, count) for count in (0, 1, 2, 3, 4, 5, 6, 7, 255, 256, 257)]
    output, _ = numbers(["noise {} {} {} {}".format(*request) for request in requests])
    actual = np.frombuffer(output, np.uint32)
    expected = [
        normal_numpy([seed], step, (count,), stream).ravel().view(np.uint32) for seed, step, stream, count in requests
    ]
    assert len(actual) > 1_000_000
    np.testing.assert_array_equal(actual, np.concatenate(expected))


def draw_table(draw):
    """A configuration, and how `StepTable.build` is to be called; some are refused."""
    trained = draw.choice((None, None, None, tuple(draw.uniform(1e-5, 0.3) for _ in range(draw.randint(1, 60)))))
    n_train = len(trained) if trained else draw.choice((1000, 1000, 1000, 1, 2, 37, 100, 4000))
    # From the largest, alphas_cumprod underflows.
    beta_start = draw.choice((10 ** draw.uniform(-6, -2), 10 ** draw.uniform(-6, -2), draw.uniform(0.3, 0.9)))
    fields = {
        "num_train_timesteps": n_train,
        "beta_start": beta_start,
        "beta_end": draw.choice((beta_start, min(0.9, beta_start * 10 ** draw.uniform(0, 3)))),
        "beta_schedule": draw.choice(BETA_SCHEDULES),
        "trained_betas": trained,
        "prediction_type": draw.choice(PREDICTION_TYPES),
        "timestep_spacing": draw.choice(TIMESTEP_SPACINGS),
        "steps_offset": min(draw.choice((0, 0, 0, 1, 7)), n_train - 1),
        "set_alpha_to_one": draw.random() < 0.7,
        "rescale_betas_zero_snr": n_train > 1 and draw.random() < 0.3,
    }
    eta = draw.choice((0.0, 1.0, draw.random()))
    steps = draw.choice((1, 2, 7, 10, 50, draw.randint(1, n_train), draw.randint(0, n_train + 1)))
    timesteps = []
    if draw.random() < 0.3:
        timesteps = sorted(draw.sample(range(n_train), draw.randint(1, min(n_train, 40))), reverse=True)
        if draw.random() < 0.1:
            timesteps.append(timesteps[-1])
    return fields, eta, draw.random() < 0.5, steps, timesteps


def table_request(fields, eta, clipped, steps, timesteps):
    names = {
        "beta_schedule": BETA_SCHEDULES,
        "prediction_type": PREDICTION_TYPES,
        "timestep_spacing": TIMESTEP_SPACINGS,
    }
    plain = {name: names[name].index(value) if name in names else value for name, value in fields.items()}
    trained = plain.pop("trained_betas") or ()
    words = [*(int(value) if isinstance(value, bool) else repr(value) for value in plain.values()), repr(eta)]
    return " ".join(map(str, ["table", *words, int(clipped), steps, *map(repr, trained), ".", *timesteps, "."]))


def test_tables_are_pythons_bit_for_bit(numbers):
    draw = random.Random(1)
    cases = [draw_table(draw) for _ in range(1500)]
    output, messages = numbers([table_request(*case) for case in cases])
    refused, offset = [], 0
    for fields, eta, clipped, steps, timesteps in cases:
        (count,) = struct.unpack_from("<q", output, offset)
        offset += 8
        try:
            schedule = Schedule(DDIMConfig(**fields))
            pairs = schedule.pairs(timesteps=timesteps) if timesteps else schedule.pairs(steps)
            table = StepTable.build(schedule, pairs, eta=eta, use_clipped_model_output=clipped)
        except ValueError as error:
            assert count == -1
            refused.append(str(error))
            continue
        assert count == len(table)
        assert np.frombuffer(output, np.int64, count, offset).tolist() == list(table.timesteps)
        columns = np.frombuffer(output, np.float64, 6 * count, offset + 8 * count).reshape(count, 6)
        floats = np.frombuffer(output, np.float32, 6 * count, offset + 56 * count).reshape(count, 6)
        offset += 80 * count
        with np.errstate(over="ignore"):
            expected = table.columns.astype(np.float32)
        np.testing.assert_array_equal(floats, expected, err_msg=str(fields))
        # numpy's cosine may be another than the C library's, by a unit in the last place.
        exact = fields["beta_schedule"] != "squaredcos_cap_v2" or fields["trained_betas"]
        np.testing.assert_allclose(columns, table.columns, rtol=0 if exact else 1e-9, atol=0, err_msg=str(fields))
    assert offset == len(output)
    assert 50 < len(refused) < 600
    for ours, theirs in zip(messages, refused, strict=True):
        assert ours.split(":")[0] == theirs.split(":")[0]


SPACINGS_HERE = (None, *(name for name in SPACINGS if name != "beta"))
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
DYNAMIC = FlowSchedule(use_dynamic_shifting=True)
SCHEDULES = [
    *(
        Schedule(DDIMConfig(**{**SD, **changes}))
        for changes in (
            {"steps_offset": 1},
            {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
            {"timestep_spacing": "linspace", "prediction_type": "sample", "set_alpha_to_one": False},
            {"timestep_spacing": "quadratic"},
            {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {"beta_schedule": "squaredcos_cap_v2"},
        )
    ),
    FlowSchedule(), FlowSchedule(shift=3.0), DYNAMIC, FlowSchedule(shift=2.0, shift_terminal=0.1),
    EDMSchedule(), EDMSchedule(sigma_schedule="exponential", prediction_type="v_prediction", sigma_data=1.0),
]  # fmt: skip
SDE = {"algorithm_type": "sde-dpmsolver++"}
OPTIONS = {
    "ddim": [
        {},
        {"eta": 0.4, "use_clipped_model_output": True},
        {"eta": 1.0, "variance_type": "fixed_large", "transitions": "diffusers"},
    ],
    "ddpm": [{}, {"variance_type": "fixed_large"}],
    "euler": [
        {},
        {"final_sigmas_type": "sigma_min", "stochastic_sampling": True},
        {"timestep_type": "continuous", "use_clipped_model_output": True, "sigma_min": 0.1, "sigma_max": 10.0},
    ],
    "euler_ancestral": [{}, {"eta": 0.3, "final_sigmas_type": "sigma_min", "use_clipped_model_output": True}],
    "lcm": [{}, {"original_inference_steps": 20, "timestep_scaling": 3.0}],
    "tcd": [{}, {"gamma": 0.0}, {"gamma": 1.0, "original_inference_steps": 100}],
    "dpmsolver++": [
        {},
        {"solver_order": 1},
        {"solver_type": "heun", "final_sigmas_type": "sigma_min", "euler_at_final": True},
        SDE,
        {**SDE, "solver_type": "heun", "lower_order_final": False, "lambda_min_clipped": -5.1},
    ],
}
LISTS = [
    Steps(timesteps=[900, 700, 33, 1]), Steps(timesteps=[900.5, 700, 33.25]), Steps(timesteps=[900, 901]),
    Steps(sigmas=[9.0, 3.0, 0.5, 0.0]), Steps(sigmas=[0.9, 0.3, 0.05]), Steps(sigmas=[0.9, 0.3, 0.5]),
    Steps(timesteps=[900, 500, 20], sigmas=[9.0, 3.0, 0.5, 0.1]), Steps(timesteps=[900, 500], sigmas=[0.9, 0.4, 0.0]),
    Steps(timesteps=[900, 700, 33, 1], strength=0.5), Steps(sigmas=[0.9, 0.3, 0.05], strength=0.1),
]  # fmt: skip


@functools.cache
def every_method():
    """Each method with its options, on each schedule, in each spacing, by numbers of steps, parts of them, and lists; and
    Python's tables, or messages."""
    cases = []
    numbers = [Steps(n) for n in (1, 2, 14, 15, 50)] + [Steps(30, strength=0.6), Steps(61)]
    for schedule, (name, options) in itertools.product(SCHEDULES, OPTIONS.items()):
        for given in options:
            given = {**given, "mu": 1.1} if schedule is DYNAMIC and "mu" in METHODS[name].options else given
            cases += [(Sampling(schedule, name, given), steps) for steps in LISTS]
            # A spacing ends at sigma_min, so that another step to it is one of rounding alone.
            ends = isinstance(schedule, Schedule) and "final_sigmas_type" in given and name != "euler"
            for spacing, steps in itertools.product([None] if ends else SPACINGS_HERE, numbers):
                cases.append((Sampling(schedule, name, given, spacing), steps))
    return [(*case, table_or_message(*case)) for case in cases]


def table_or_message(sampling, steps):
    try:
        return sampling.build(steps)
    except ValueError as error:
        return str(error)


def has_pythons_bits(sampling, steps):
    """Whether arithmetic and square roots alone make the table, and the C library's `hypot`."""
    schedule, options = sampling.schedule, sampling.options
    if sampling.spacing or steps.sigmas or isinstance(schedule, EDMSchedule) or schedule is DYNAMIC:
        return False
    if isinstance(schedule, Schedule) and schedule.config.beta_schedule == "squaredcos_cap_v2":
        return False
    if sampling.method == "dpmsolver++":
        return options.get("solver_order") == 1
    return options.get("timestep_type") != "continuous" or isinstance(schedule, FlowSchedule)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_tables_of_every_method_are_pythons(numbers):
    cases = every_method()
    requests = [{**sampling.record(), "steps": dataclasses.asdict(steps)} for sampling, steps, _ in cases]
    output, messages = numbers([f"method {json.dumps(request)}" for request in requests])
    offset, refused, compared = 0, iter(messages), {True: [], False: []}
    for sampling, steps, table in cases:
        (count,) = struct.unpack_from("<q", output, offset)
        offset += 8
        if isinstance(table, str):
            assert count == -1, (sampling, steps, table)
            ours, theirs = next(refused), table.split(":")[0]
            assert ours.split(":")[0] == ("bundle" if theirs == "method" else theirs), (ours, table)
            continue
        assert count == len(table), (sampling, steps)
        columns, floats = struct.unpack_from("<qq", output, offset)
        assert (columns == 7) == table.looks_back and bool(floats) == (table.timestep_dtype == "float32")
        actual = np.frombuffer(output, np.float64, 3 + count * (1 + columns), offset + 16)
        offset += 16 + actual.nbytes
        expected = [table.start_scale, *table.noising, *table.timesteps, *table.columns.ravel()]
        compared[has_pythons_bits(sampling, steps)].append((actual, expected))
    assert offset == len(output) and next(refused, None) is None
    for exact, pairs in compared.items():
        assert len(pairs) > 500
        actual, expected = (np.concatenate(values) for values in zip(*pairs, strict=True))
        # Of a signal that is 0 its rounding is left.
        rtol, atol = (0, 0) if exact else (1e-12, 1e-15)
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def test_digests_are_hashlibs(numbers, tmp_path):
    contents = [random.Random(size).randbytes(size) for size in (*range(130), 1_000_003)]
    for k, content in enumerate(contents):
        (tmp_path / str(k)).write_bytes(content)
    output, _ = numbers([f"sha256 {tmp_path / str(k)}" for k in range(len(contents))])
    assert output.decode() == "".join(hashlib.sha256(content).hexdigest() for content in contents)


class Typed(torch.nn.Module):
    """Fast to export, with conditions of every dtype that the loader takes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(2, 2, 3, padding=1)
        self.embedding = torch.nn.Embedding(5, 2)

    def forward(self, x, t, labels, weights, doubles, shorts, flags, halves):
        shift = torch.cos(t.to(x.dtype) / 200)[:, None] + self.embedding(labels) * weights
        shift = shift + doubles.float() + shorts.float()[:, None] / 10 + halves.float()
        shift = torch.where(flags[:, None], shift, -shift)
        return torch.tanh(self.conv(x)) + shift[:, :, None, None]


def typed_conditions(batch):
    draw = np.random.default_rng(batch)
    return {
        "labels": draw.integers(0, 5, batch),
        "weights": draw.standard_normal((batch, 2)).astype(np.float32),
        "doubles": draw.standard_normal((batch, 2)),
        "shorts": draw.integers(-9, 9, batch).astype(np.int32),
        "flags": draw.random(batch) < 0.5,
        "halves": draw.standard_normal((batch, 2)).astype(np.float16),
    }


def export_typed(folder, config=None, **options):
    example = {name: torch.from_numpy(value) for name, value in typed_conditions(3).items()}
    return export_onnx(
        Typed(),
        config or DDIMConfig(),
        folder,
        ExportOptions(num_inference_steps=3, **options),
        sample_shape=(2, 6, 6),
        example_kwargs=example,
        parity_steps=(),
    ).path


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Bundles by name, each exported at its first use."""
    folder = tmp_path_factory.mktemp("bundles")
    all_options = {"guided": True, "stochastic": True}
    recipes = {
        "digits": lambda path: export_digits(path, **all_options),
        "typed": lambda path: export_typed(path, **all_options, guidance_rescale=True),
        "typed, step": lambda path: export_typed(path, **all_options, kind="step"),
        "typed, baked": lambda path: export_typed(path, bake_schedule=True, stochastic=True, eta=1.0),
        "plain": export_typed,
        "resizable": export_resizable,
        "two graphs": lambda path: export_two(path, stochastic=True, guidance_rescale=True),
        "two graphs, half": lambda path: export_two(path, method="dpmsolver++", dtype="float16"),
        "flow": export_flow,
        "flow, step": lambda path: export_flow(path, kind="step"),
    }

    def get(name):
        path = folder / name.replace(", ", "-")
        return path if path.exists() else recipes[name](path)

    return get


def export_digits(path, **options):
    pipe = fastddim.load_pipeline()
    return export_onnx(pipe.unet, pipe.scheduler, path, ExportOptions(**options), parity_steps=()).path


def export_flow(path, table=None, **options):
    options = ExportOptions(**options)
    return export_onnx(Wave(), table or flow_table(), path, options, sample_shape=SHAPE, parity_steps=()).path


def export_two(path, **options):
    return export_text(path, config=DDIMConfig(), guided=True, hoist=True, **options).path


def export_resizable(path):
    torch.manual_seed(0)
    unet = small_unet(add_attention=False)
    config = DDIMConfig(thresholding=True, sample_max_value=1.5)
    return export_onnx(unet, config, path, ExportOptions(dynamic_size=True), parity_steps=()).path


@pytest.fixture
def both(checked, bundles):
    """Python's and C++'s sampler of a bundle, by its name."""
    running = []

    def load(name, **options):
        running.append(CppSampler(checked / "driver", bundles(name), **options))
        return OrtSampler(bundles(name), **options), running[-1]

    yield load
    for process in running:
        process.close()


def assert_same(samplers, start, **arguments):
    theirs, ours = (sampler(start, **arguments) for sampler in samplers)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4, err_msg=str(arguments))
    return ours


RUNS = (
    {"num_inference_steps": 20},
    {"num_inference_steps": 10, "eta": 0.7},
    {"timesteps": [999, 700, 312, 5], "eta": 1.0},
    {},
)


def test_the_digits_are_pythons(both):
    samplers = both("digits")
    for batch in (1, 3):
        for run in RUNS:
            labels = np.array([3, 1, 4])[:batch]
            digits = assert_same(samplers, batch, seeds=2**64 - 3, guidance_scale=2.0, class_labels=labels, **run)
            assert digits.std() > 0.3


def test_one_step_a_call(both):
    samplers = both("typed, step")
    for batch in (1, 3):
        guidance = {"guidance_scale": 2.0, "uncond_kwargs": typed_conditions(batch)}
        for run in RUNS:
            assert_same(samplers, batch, seeds=2**64 - 3, **typed_conditions(batch), **guidance, **run)


@pytest.mark.parametrize("name", ["two graphs", "two graphs, half"])
def test_a_step_with_values_of_a_second_graph(both, name):
    samplers = both(name)
    for batch in (1, 3):
        given = {**text_conditions(batch), "guidance_scale": [1.5, 3.0, 5.0][:batch], "seeds": 2**64 - 3}
        given["uncond_kwargs"] = text_conditions(batch, seed=5)
        runs = RUNS if name == "two graphs" else ({"num_inference_steps": 9}, {})
        drawn = [assert_same(samplers, batch, **given, **run) for run in runs]
        assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
    _, ours = samplers
    for message, changed in {
        "text: missing; pass an array": {"text": None},
        r"label: float32 of shape \[3\] with 3 values; pass int64": {"label": np.zeros(3, np.float32)},
        "both_values: this bundle takes label, text": {"both_values": np.zeros((2, 3, 8), np.float32)},
    }.items():
        with pytest.raises(CppError, match=message) as caught:
            ours(3, **given | changed)
        assert caught.value.kind == "invalid_argument"


def test_rows_of_a_run_are_pythons(numbers):
    draw = random.Random(3)
    requests, expected = [], []
    for shape in (
        ["steps", 5],
        ["steps"],
        ["steps", 2, "batch", 3, 2],
        ["steps", "batch"],
        [2, "batch", 7],
        ["batch"],
        [4, 3],
    ):
        for _ in range(20):
            sizes = {"steps": draw.randint(1, 9), "batch": draw.randint(1, 5)}
            count = draw.randint(1, 6)
            steps, samples = ([draw.randrange(sizes[name]) for _ in range(count)] for name in ("steps", "batch"))
            own = [sizes.get(dim, dim) for dim in shape]
            value = np.arange(math.prod(own), dtype=np.float32).reshape(own)
            values = RunValues({"value": value}, [{"name": "value", "shape": shape}])
            expected.append((values.of_steps(steps, samples) | values.of_samples(samples))["value"])
            requests.append(rows_request(sizes.values(), shape, steps, samples))
    output, _ = numbers(requests)
    for rows in expected:
        head = np.array([rows.ndim, *rows.shape]).tobytes() + rows.tobytes()
        assert output.startswith(head)
        output = output[len(head) :]
    assert not output
    bad = [([6], [0]), ([0], [2]), ([0, 1], [1])]
    output, errors = numbers([rows_request((6, 2), ["steps", 3, "batch"], *rows) for rows in bad])
    assert np.frombuffer(output, np.int64).tolist() == [-1] * 3
    assert errors == [
        "step 6 of sample 0; the run has 6 steps and 2 samples",
        "step 0 of sample 2; the run has 6 steps and 2 samples",
        "steps, samples: pass as many of both",
    ]


def rows_request(*parts):
    sizes, *lists = (" ".join(map(str, part)) for part in parts)
    return " ".join(["rows", sizes, *(f"{part} ." for part in lists)])


def test_a_baked_schedule_takes_a_number_of_steps(both):
    samplers = both("typed, baked")
    assert_same(samplers, 2, seeds=[5, 900], num_inference_steps=9, **typed_conditions(2))
    assert_same(samplers, 2, seeds=[5, 900], **typed_conditions(2))
    _, ours = samplers
    with pytest.raises(CppError, match="timesteps, eta: this bundle derives its table itself"):
        ours(2, seeds=0, timesteps=[5, 3], **typed_conditions(2))


@pytest.mark.parametrize("name", ["flow", "flow, step"])
def test_a_table_calls_the_model_with_its_own_numbers(both, name):
    samplers = both(name)
    samples = assert_same(samplers, 3, seeds=[5, 2**63, 7])
    start = START_SCALE * normal_numpy([5, 2**63, 7], 0, SHAPE, STREAM_INITIAL)
    np.testing.assert_allclose(samples, plain_loop(Wave(), start), atol=1e-5)
    assert_same(samplers, start.astype(np.float32))
    _, ours = samplers
    for option, value in {"num_inference_steps": 3, "timesteps": [5, 3], "eta": 0.0}.items():
        with pytest.raises(CppError, match=f"{option}: given, but this bundle was made from a table") as caught:
            ours(1, seeds=0, **{option: value})
        assert caught.value.kind == "invalid_argument"


@pytest.mark.parametrize(("graph", "timesteps"), [("loop", (-3, 5, 5)), ("step", (-0.25, 1.5, 900.5))], ids=str)
def test_timesteps_of_any_sign_and_order_are_what_the_model_gets(checked, tmp_path, graph, timesteps):
    path = export_flow(tmp_path / "bundle", flow_table(timesteps, noise=0.3), kind=graph, stochastic=True)
    start = START_SCALE * normal_numpy([5, 6], 0, SHAPE, STREAM_INITIAL)
    noise = [0.3 * normal_numpy([5, 6], step, SHAPE) for step in range(3)]
    with CppSampler(checked / "driver", path) as sampler:
        np.testing.assert_allclose(sampler(2, seeds=5), plain_loop(Wave(), start, timesteps, noise=noise), atol=1e-5)


BETAS, FLOW = DDIMConfig(**SD), FlowSchedule(shift=3.0)
METHOD_EXPORTS = {
    "dpm, loop": (BETAS, {"method": "dpmsolver++", "spacing": "karras"}),
    "dpm, step": (BETAS, {"method": "dpmsolver++", "kind": "step"}),
    "dpm, baked and seeded": (BETAS, {"method": "dpmsolver++", "bake_schedule": True, "seeded": True}),
    "sde, step": (FLOW, {"method": "dpmsolver++", "kind": "step", "stochastic": True, "method_options": SDE}),
    "flow": (FLOW, {}),
    "edm, step": (EDMSchedule(), {"kind": "step"}),
    "euler, baked": (DDIMConfig(**SD, timestep_spacing="linspace"), {"method": "euler", "bake_schedule": True}),
    "ancestral": (BETAS, {"method": "euler_ancestral", "stochastic": True}),
    "lcm, baked and seeded": (BETAS, {"method": "lcm", "stochastic": True, "bake_schedule": True, "seeded": True}),
    "tcd, step": (BETAS, {"method": "tcd", "stochastic": True, "kind": "step"}),
    "ddpm": (BETAS, {"method": "ddpm", "stochastic": True}),
    "ddim, seeded": (BETAS, {"stochastic": True, "seeded": True, "eta": 1.0}),
}  # fmt: skip


@pytest.fixture(scope="module")
def of_method(tmp_path_factory):
    """The bundle of each name, exported at its first use."""
    folder = tmp_path_factory.mktemp("methods")

    @functools.cache
    def export(name):
        schedule, options = METHOD_EXPORTS[name]
        options, path = ExportOptions(num_inference_steps=6, **options), folder / name.replace(", ", "-")
        return export_onnx(Wave(), schedule, path, options, sample_shape=SHAPE, parity_steps=()).path

    return export


@pytest.mark.parametrize("name", METHOD_EXPORTS)
def test_bundles_of_every_method_take_any_number_of_steps(checked, of_method, name):
    schedule, options = METHOD_EXPORTS[name]
    chosen = {key: value for key, value in options.items() if key in ("method", "method_options", "spacing", "eta")}
    with CppSampler(checked / "driver", of_method(name)) as sampler:
        for steps in (None, 1, 2, 17):
            expected = fastddim.Sampler(Wave(), schedule, steps or 6, sample_shape=SHAPE, **chosen)(
                2, seeds=[5, 2**64 - 1]
            )
            samples = sampler(2, seeds=[5, 2**64 - 1], num_inference_steps=steps)
            np.testing.assert_allclose(samples, expected, rtol=1e-4, atol=1e-4)
        # A baked schedule keeps so many.
        for steps in (0, 101) if "bake_schedule" in options else (0,):
            with pytest.raises(CppError, match=f"num_inference_steps: {steps}; pass an integer in"):
                sampler(1, seeds=0, num_inference_steps=steps)
        if "seeded" in options:
            with pytest.raises(CppError, match="start: a state, but this bundle draws its own from seeds"):
                sampler(np.zeros((1, *SHAPE)), seeds=0)


def to_json(table):
    return {"timesteps": table.timesteps, "coefficients": table.columns.tolist(), "start_scale": table.start_scale,
            "noising": None}  # fmt: skip


def test_a_table_at_run_time(checked, of_method, tmp_path):
    """Any that the graph has the columns for; Python's sampler has it from a manifest."""
    options = ExportOptions(method="dpmsolver++", kind="step", spacing="beta", num_inference_steps=5)
    bundle = export_onnx(Wave(), BETAS, tmp_path / "dpm", options, sample_shape=SHAPE, parity_steps=())
    first_order = METHODS["dpmsolver++"].build(Schedule(BETAS), 4, solver_order=1)
    second_order = METHODS["dpmsolver++"].build(Schedule(BETAS), Steps(9, spacing="beta"))
    noisy = METHODS["ddpm"].build(Schedule(BETAS), 3)
    fractional = METHODS["euler"].build(FLOW, 3)
    with CppSampler(checked / "driver", bundle.path) as sampler:
        for table in (second_order, first_order):
            kept = dict(to_json(table))
            if not table.looks_back:
                kept["coefficients"] = [[*row, 0.0] for row in kept["coefficients"]]
            expected = OrtSampler(Bundle(bundle.path, {**bundle.manifest, "table": kept}))(2, seeds=7)
            np.testing.assert_allclose(sampler(2, seeds=7, table=to_json(table)), expected, atol=1e-5)
        np.testing.assert_allclose(sampler(2, seeds=7), OrtSampler(bundle)(2, seeds=7), atol=1e-5)
        for message, arguments in {
            "spacing: 'beta' takes quantiles of the beta distribution.*pass the table at run time": {
                "num_inference_steps": 4
            },
            "table, eta: a table has its steps already": {"table": to_json(first_order), "eta": 0.0},
            "table: its steps add noise, but this bundle has no input for noise": {"table": to_json(noisy)},
            r"timesteps: 751\.\d+; this bundle's graph takes int64, pass whole numbers": {"table": to_json(fractional)},
            "eta: no option of method 'dpmsolver\\+\\+'": {"eta": 0.5, "timesteps": [500, 3]},
        }.items():
            with pytest.raises(CppError, match=message) as caught:
                sampler(1, seeds=0, **arguments)
            assert caught.value.kind == "invalid_argument"
    for name, message in {
        "flow": "table: it looks back at the previous x0",
        "euler, baked": "table: this bundle derives",
    }.items():
        with (
            CppSampler(checked / "driver", of_method(name)) as sampler,
            pytest.raises(CppError, match=message),
        ):
            sampler(1, seeds=0, table=to_json(second_order))


def test_the_compiled_step_refuses_a_table_that_looks_back(checked, tmp_path):
    stub_cuda.build(tmp_path, "clang", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    tables = [METHODS["dpmsolver++"].build(Schedule(BETAS), 4, solver_order=order) for order in (1, 2)]
    done = subprocess.run(
        [checked / "step_driver"], input="".join(json.dumps({"table": to_json(table)}) + "\n" for table in tables),
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken, refused = map(json.loads, done.stdout.splitlines())
    assert "error" not in taken and refused["error"] == "invalid_argument"
    assert refused["message"].startswith(
        "table: it looks back at the previous x0, which the compiled step does not; pass one"
    )


def test_a_baked_method_takes_no_more_steps_than_it_keeps(checked, tmp_path):
    options = ExportOptions(method="euler", bake_schedule=True)
    export_onnx(Wave(), BETAS, tmp_path / "bundle", options, sample_shape=SHAPE, parity_steps=())
    most = open_bundle(tmp_path / "bundle").scheduling.most_baked
    with (
        CppSampler(checked / "driver", tmp_path / "bundle") as sampler,
        pytest.raises(CppError, match=rf"num_inference_steps: {most + 1}; pass an integer in \[1, {most}\]"),
    ):
        sampler(1, seeds=0, num_inference_steps=most + 1)


def test_a_bundle_of_the_second_format_runs_as_it_did(checked, bundles, tmp_path):
    """The method's options were among those of the sampling."""
    folder = shutil.copytree(bundles("typed, baked"), tmp_path / "bundle")

    def downgrade(manifest):
        options = manifest.pop("method")["options"]
        assert options["eta"] == 1.0
        manifest["sampling"] |= {"use_clipped_model_output": True, **options}
        del manifest["schedule_type"]
        manifest["format_version"] = 2

    edited(downgrade)(folder)
    with CppSampler(checked / "driver", folder) as sampler:
        assert_same(
            (OrtSampler(bundles("typed, baked")), sampler), 2, seeds=5, num_inference_steps=9, **typed_conditions(2)
        )
        with pytest.raises(CppError, match="timesteps, eta: this bundle derives its table itself"):
            sampler(2, seeds=0, eta=0.5, **typed_conditions(2))


@pytest.mark.parametrize("kind", ["loop", "step"])
def test_a_bundle_of_the_first_format_runs_as_it_did(checked, kind):
    """Those of test_export_tables.py."""
    folder = Path(__file__).parent / "bundles"
    scale = {"guidance_scale": 2.0} if kind == "loop" else {}
    expected = np.load(folder / "expected-1.npz")
    with CppSampler(checked / "driver", folder / f"{kind}-1") as sampler:
        for name, steps in (("own", None), ("5", 5)):
            samples = sampler(2, seeds=7, num_inference_steps=steps, class_labels=np.array([3, 1]), **scale)
            np.testing.assert_allclose(samples, expected[f"{kind} {name}"], atol=1e-5)


def test_conditions_of_every_dtype_scales_of_each_sample_and_given_starts(both):
    start = np.random.default_rng(0).standard_normal((3, 2, 6, 6)).astype(np.float32)
    arguments = {
        **typed_conditions(3), "uncond_kwargs": typed_conditions(3), "guidance_scale": np.array([1.5, 3.0, 7.5]),
        "guidance_rescale": np.array([0.0, 0.7, 1.0]), "num_inference_steps": 6,
    }  # fmt: skip
    samplers = both("typed")
    assert_same(samplers, start, **arguments)
    assert_same(samplers, start, **arguments, eta=0.5, seeds=[8, 2**63, 1])
    # numpy's casts within a kind, and integers where floats are wanted.
    arguments |= {"labels": arguments["labels"].astype(np.int32), "weights": arguments["weights"].astype(np.float64)}
    arguments |= {"shorts": arguments["shorts"].astype(np.int64), "doubles": np.array([[1, 2], [3, 4], [5, 6]])}
    assert_same(samplers, 3, **arguments, seeds=4)


@pytest.mark.slow
def test_a_model_of_any_size(both):
    samplers = both("resizable")
    for size in (None, (8, 8), (12, 20)):
        assert_same(samplers, 2, seeds=1, num_inference_steps=4, size=size)
    _, ours = samplers
    for size in ((0, 8), (2**40, 2**40), (-8, 8)):
        with pytest.raises(CppError, match="batch, size: shape"):
            ours(2, seeds=1, size=size)


def test_threads_share_a_sampler(both):
    theirs, ours = both("digits")
    calls = [
        (1 + k % 3, {"seeds": 10 * k, "num_inference_steps": 4 + k, "eta": 0.3 * (k % 2), "guidance_scale": 2.0,
                     "class_labels": np.arange(1 + k % 3)})
        for k in range(8)
    ]  # fmt: skip
    expected = np.concatenate([theirs(start, **arguments).ravel() for start, arguments in calls])
    for _ in range(3):
        np.testing.assert_allclose(ours.concurrent(calls), expected, rtol=0, atol=1e-4)


BAD_CALLS = {
    "guidance_scale: missing; this bundle has guidance": {"guidance_scale": None},
    "guidance_scale: 2 values; pass a finite number, or one for each of 3": {"guidance_scale": np.ones(2)},
    "guidance_rescale: 2 values": {"guidance_rescale": [0.5, 0.5]},
    r"eta: 1.5; pass a number in \[0, 1\]": {"eta": 1.5},
    r"num_inference_steps: 0; pass an integer in \[1, 1000\]": {"num_inference_steps": 0},
    r"num_inference_steps: 1001; pass an integer in": {"num_inference_steps": 1001},
    "num_inference_steps, timesteps: pass one of the two": {"num_inference_steps": 2, "timesteps": [5]},
    r"timesteps: entry 1 \(7\) is not below entry 0 \(5\)": {"timesteps": [5, 7]},
    "timesteps: 1000; pass an integer in": {"timesteps": [1000]},
    "timesteps: empty": {"timesteps": []},
    r"labels: int64 of shape \[2\] with 2 values; pass int64 of shape \[batch\], the batch is 3": {
        "labels": np.zeros(2, dtype=np.int64)
    },
    "labels: float64 of shape": {"labels": np.zeros(3)},
    "flags: int64 of shape": {"flags": np.zeros(3, dtype=np.int64)},
    "halves: float32 of shape": {"halves": np.zeros((3, 2), dtype=np.float32)},
    "class_labels: this bundle takes labels, weights, doubles, shorts, flags, halves": {"class_labels": np.zeros(3)},
    "uncond_conditions: 'labels' is missing": {"uncond_kwargs": None},
    "uncond_conditions: flags: int64": {"uncond_kwargs": {**typed_conditions(3), "flags": np.zeros(3, dtype=np.int64)}},
    "seeds: missing; pass one integer": {"seeds": None},
    "seeds: 2 for a batch of 3": {"seeds": [1, 2]},
    r"seeds: 18446744073709551615 and the 2 after it; pass integers in \[0, 2\*\*64\)": {"seeds": 2**64 - 1},
    r"size: \[8, 8\]; this bundle makes samples \[2, 6, 6\] alone": {"size": (8, 8)},
    "batch: 0; pass an integer >= 1": {"start": 0},
    r"start: shape \[3, 2, 6, 5\] with 180 values; pass a state \[batch, 2, 6, 6\]": {"start": np.zeros((3, 2, 6, 5))},
}


def test_bad_calls_are_named(both):
    _, ours = both("typed")
    good = {
        "start": 3, "seeds": 0, "guidance_scale": 2.0, **typed_conditions(3), "uncond_kwargs": typed_conditions(3),
    }  # fmt: skip
    assert np.isfinite(ours(**good)).all()
    for message, changes in BAD_CALLS.items():
        with pytest.raises(CppError, match=message) as caught:
            ours(**{**good, **changes})
        assert caught.value.kind == "invalid_argument"
    missing = {name: value for name, value in good.items() if name != "weights"}
    with pytest.raises(CppError, match=r"weights: missing; pass an array \[batch, 2\]"):
        ours(**missing)


def test_what_a_bundle_lacks_is_named(both):
    _, ours = both("plain")
    good = {"seeds": 0, **typed_conditions(1)}
    for message, changes in {
        "guidance_scale: given, but this bundle was exported without guidance": {"guidance_scale": 2.0},
        "guidance_rescale: given, but this bundle was exported without it": {"guidance_rescale": 0.5},
        "eta: 0.5, but this bundle has no input for noise": {"eta": 0.5},
    }.items():
        with pytest.raises(CppError, match=message):
            ours(1, **good, **changes)
    np.testing.assert_array_equal(ours(1, **good, guidance_rescale=0.0), ours(1, **good, eta=0.0))


@pytest.mark.parametrize("graph", ["loop", "step"])
def test_the_step_at_which_nan_appears_is_found(checked, tmp_path, graph):
    class Overflows(torch.nn.Module):
        def forward(self, x, t):
            # Infinite from timestep 500 down.
            return x * 0.1 + torch.where(t < 500, torch.inf, 0.0).reshape(-1, 1, 1, 1) * 1.0

    path = tmp_path / "bundle"
    options = ExportOptions(kind=graph)
    export_onnx(Overflows(), DDIMConfig(clip_sample=False), path, options, sample_shape=(1, 2, 2), parity_steps=())
    with CppSampler(checked / "driver", path, check_finite=True) as sampler:
        with pytest.raises(CppError, match=r"after step 5 \(timestep 400\)") as caught:
            sampler(1, seeds=0, num_inference_steps=10)
        assert caught.value.kind == "NotFiniteError"
        assert np.isfinite(sampler(1, seeds=0, timesteps=[900, 600])).all()
    with CppSampler(checked / "driver", path) as sampler:
        assert np.isnan(sampler(1, seeds=0, num_inference_steps=10)).any()


def input_of(manifest, name):
    return next(info for info in manifest["inputs"] if info["name"] == name)


def set_shape(name, shape):
    return edited(lambda manifest: input_of(manifest, name).update(shape=shape))


def truncate(folder):
    file = folder / "manifest.json"
    file.write_bytes(file.read_bytes()[:-40])


def link_out(folder):
    outside = folder.parent / "outside.onnx"
    (folder / "model.onnx").rename(outside)
    (folder / "model.onnx").symlink_to(outside)


def link_folder_out(folder):
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / "model.onnx").rename(outside / "model.onnx")
    (folder / "deep").symlink_to(outside)

    def rename(manifest):
        manifest["files"]["deep/model.onnx"] = manifest["files"].pop("model.onnx")
        manifest["model"] = "deep/model.onnx"

    edited(rename)(folder)


ENTRY = {"sha256": "", "bytes": 1}
DAMAGE = {
    r"model.onnx' is not the file that was exported \(SHA-256\)": flip_a_byte,
    "model.onnx' has 1 bytes, the manifest says": lambda folder: (folder / "model.onnx").write_bytes(b"x"),
    "model.onnx' is missing": lambda folder: (folder / "model.onnx").unlink(),
    "manifest.json' is missing; pass a folder": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json' cannot be read: .*parse error": truncate,
    "manifest.json' cannot be read: .*out_of_range": lambda folder: (folder / "manifest.json").write_text("[1e999]"),
    "manifest.json' cannot be read: .*UTF-8": lambda folder: (folder / "manifest.json").write_bytes(b'"\xff"'),
    "manifest.json' cannot be read: nested deeper than 32; export it again": lambda folder: (
        folder / "manifest.json"
    ).write_text('{"format": "fastddim-bundle", "format_version": 1, "graph": ' + "[" * 10**5 + "]" * 10**5 + "}"),
    "manifest.json' cannot be read: a NUL byte": lambda folder: (folder / "manifest.json").write_bytes(
        (folder / "manifest.json").read_bytes() + b"\0x"
    ),
    "is no manifest of a fastddim bundle": lambda folder: (folder / "manifest.json").write_text("[]"),
    "'' is no manifest|manifest.json' is no manifest": put("onnx-bundle", "format"),
    "format_version 4, this fastddim reads up to 3; update fastddim": put(4, "format_version"),
    r"\$\.format_version: \"x\" is not an integer": put("x", "format_version"),
    "format_version 0, this fastddim reads from 1 up to 3; write it anew: `fastddim export onnx --out": put(
        0, "format_version"
    ),
    r"\$\.format_version: true is not an integer": put(True, "format_version"),
    r"\$\.format_version: 1\.0 is not an integer": put(1.0, "format_version"),
    r"\$\.kind: \"whole\" is not one of 'loop', 'step'": put("whole", "kind"),
    r"\$: 'runtime' is a required property": put(None, "runtime"),
    r"\$: 'sampling' is a required property": put(None, "sampling"),
    r"\$\.table: 'timesteps' is a required property": put(None, "table", "timesteps"),
    r"\$\.table\.timesteps\[1\]: \"7\" is not an integer": put("7", "table", "timesteps", 1),
    r"\$\.table\.timesteps\[1\]: 1000 is not in \[0, 999\]": put(1000, "table", "timesteps", 1),
    r"\$\.table\.timesteps\[1\]: 18446744073709551615 is not an integer": put(2**64 - 1, "table", "timesteps", 1),
    r"\$\.table\.timesteps\[0\]: 1e\+30 is not an integer": put(10**30, "table", "timesteps", 0),
    r"\$\.table\.coefficients: 1 rows for 3 timesteps": put([[0] * 6], "table", "coefficients"),
    r"\$\.table\.coefficients\[2\]: 5 numbers, not 6 or 7": put([0] * 5, "table", "coefficients", 2),
    r"\$\.table\.coefficients\[2\]\[0\]: false is not a number": put([False] * 6, "table", "coefficients", 2),
    r"\$\.inputs\[0\]\.shape\[1\]: 0 is not >= 1": put(0, "inputs", 0, "shape", 1),
    r"\$\.inputs\[0\]\.shape\[1\]: an empty name": put("", "inputs", 0, "shape", 1),
    r"\$\.inputs\[0\]\.shape: \"batch\" is not an array": put("batch", "inputs", 0, "shape"),
    r"\$\.runtime: 7 is not a string": put(7, "runtime"),
    r"\$: 'target' is a required property": put("aoti", "runtime"),
    r"\$\.inputs: no 'sample'": put("simple", "inputs", 0, "name"),
    r"\$\.inputs\[1\]: a second 'sample'": put("sample", "inputs", 1, "name"),
    r"\$\.inputs: 'timesteps' has not 1 dimensions": set_shape("timesteps", []),
    r"\$\.inputs: 'noise' has not 5 dimensions": set_shape("noise", ["steps", "batch"]),
    r"\$\.inputs: 'noise', which 'sampling' has no use for": put(False, "sampling", "stochastic"),
    r"\$\.inputs: 'uncond_labels' without a 'labels' of as many dimensions": set_shape("labels", ["batch", 1]),
    r"\$\.inputs: 'uncond_flags' without a 'flags'": edited(
        lambda manifest: input_of(manifest, "flags").update(name="banners")
    ),
    r"\$\.outputs: no 'samples'": put([], "outputs"),
    r"\$\.sample\.shape: is not that of the input 'sample'": put([2, 6], "sample", "shape"),
    r"\$\.sample\.range: \[1\] is not a lowest and a highest value": put([1], "sample", "range"),
    r"\$\.sampling\.guided: 1 is not true or false": put(1, "sampling", "guided"),
    r"\$\.sampling\.null_values\['labels'\]: 1\.5 is not an integer": put({"labels": 1.5}, "sampling", "null_values"),
    r"\$\.sampling: a baked schedule in a graph of one step": edited(
        lambda manifest: manifest.update(kind="step", sampling=manifest["sampling"] | {"baked_schedule": True})
    ),
    r"\$\.table\.coefficients: rows of 6 numbers and of 7": put([0] * 7, "table", "coefficients", 2),
    r"\$\.table\.coefficients\[0\]: the first step looks back": put([0] * 6 + [1], "table", "coefficients", 0),
    r"\$\.inputs: 'coefficients' has 6 columns, the table 7": put([[0] * 7] * 3, "table", "coefficients"),
    r"\$: 'method' is a required property": put(None, "method"),
    r"\$: 'schedule_type' is a required property": put(None, "schedule_type"),
    r"\$\.schedule_type: \"alphas\" is not one of 'betas', 'flow', 'edm'": put("alphas", "schedule_type"),
    r"\$\.schedule: 'beta_start' is no field of a flow schedule|'\w+' is no field of a flow schedule": put(
        "flow", "schedule_type"
    ),
    r"\$\.method\.name: \"ddim\" takes no schedule of type \"edm\"": edited(
        lambda manifest: manifest.update(schedule_type="edm", schedule={})
    ),
    r"\$\.schedule: sigma_min, sigma_max, sigma_data: 90, 80, 0.5; pass": edited(
        lambda manifest: manifest.update(schedule_type="edm", schedule={"sigma_min": 90})
    ),
    r"\$\.schedule: shift: 0; pass a finite number > 0": edited(
        lambda manifest: manifest.update(schedule_type="flow", schedule={"shift": 0})
    ),
    r"\$\.method\.name: \"heun\" is not one of 'ddim', 'ddpm', 'dpmsolver\+\+', 'euler'": put("heun", "method", "name"),
    r"\$\.method\.options: 'gamma' is no option of method 'ddim'": put(0.3, "method", "options", "gamma"),
    r"\$\.method\.options\['eta'\]: \"1\" is not a number": put("1", "method", "options", "eta"),
    r"\$\.method\.spacing: \"cubic\" is not one of 'karras'": put("cubic", "method", "spacing"),
    r"\$\.sampling\.per_sample_steps: is on, and this loader takes": put(True, "sampling", "per_sample_steps"),
    r"\$\.inputs: no 'seed'": put(True, "sampling", "seeded"),
    r"\$\.schedule: 'betas' is no field of a schedule": put([], "schedule", "betas"),
    r"\$\.schedule\['beta_end'\]: \"0\.02\" is not a number": put("0.02", "schedule", "beta_end"),
    r"\$\.schedule: beta_start, beta_end: .*, 1; pass": put(1, "schedule", "beta_end"),
    r"\$\.schedule: num_train_timesteps: 100000000000; pass an integer in": put(
        10**11, "schedule", "num_train_timesteps"
    ),
    r"\$\.schedule: trained_betas: entry 1 is 2;": put([0.1, 2], "schedule", "trained_betas"),
    r"\$\.schedule: trained_betas: empty": put([], "schedule", "trained_betas"),
    r"\$\.schedule\['timestep_spacing'\]: \"even\" is not one of 'leading', 'trailing', 'linspace', 'quadratic'": put(
        "even", "schedule", "timestep_spacing"
    ),
    r"\$\.noise\.stream_step: -1 is not >= 0": put(-1, "noise", "stream_step"),
    r"\$\.parity\[0\]: 'batch' is a required property": put([{}], "parity"),
    r"\$\.versions\['torch'\]: 2 is not a string": put({"torch": 2}, "versions"),
    r"\$\.files\['model\.onnx'\]: 'bytes' is a required property": put({"sha256": ""}, "files", "model.onnx"),
    r"\$\.files\['model\.onnx'\]\.bytes: -1 is not >= 0": put(-1, "files", "model.onnx", "bytes"),
    r"\$\.model: no file \"other\.onnx\" among 'files'": put("other.onnx", "model"),
    r"\$\.components\['vae_decoder'\]\.model: no file \"vae.onnx\" among 'files'": put(
        {"vae_decoder": {"model": "vae.onnx", "inputs": [], "outputs": [], "meaning": ""}}, "components"
    ),
    r"\$\.components\['vae_decoder'\]\.upscale: 0 is not >= 1": put(
        {"vae_decoder": {"model": "model.onnx", "inputs": [], "outputs": [], "meaning": "", "upscale": 0}}, "components"
    ),
    r"\$\.zeros_for_empty_prompt: 0 is not true or false": put(0, "zeros_for_empty_prompt"),
    "names '../model.onnx', which leads out of the folder": put(ENTRY, "files", "../model.onnx"),
    "names 'a/../../b', which leads out of the folder": put(ENTRY, "files", "a/../../b"),
    "names '/etc/passwd', which leads out of the folder": put(ENTRY, "files", "/etc/passwd"),
    r"names '..\\b', which leads out of the folder": put(ENTRY, "files", "..\\b"),
    "names 'model.onnx', which leads out of the folder": put(ENTRY, "files", "model.onnx\0.txt"),
    "onnx' leads out of the folder": link_out,
    "deep/model.onnx' leads out of the folder": link_folder_out,
}


def test_a_damaged_bundle_is_refused(checked, bundles, tmp_path):
    with CppSampler(checked / "driver") as reader:
        for k, (message, damage) in enumerate(DAMAGE.items()):
            folder = tmp_path / str(k) / "bundle"
            shutil.copytree(bundles("typed"), folder)
            assert reader.open(folder)["steps"] == 3
            damage(folder)
            with pytest.raises(CppError, match=message) as caught:
                reader.open(folder)
            assert caught.value.kind == "BundleError" and str(folder) in str(caught.value)


def output_of(manifest, name):
    return next(item for item in manifest["before"]["outputs"] if item["name"] == name)


BAD_BEFORE = {
    r"\$\.before: 'meaning' is a required property": put(None, "before", "meaning"),
    r"\$\.before\.model: no file \"other\.onnx\" among 'files'": put("other.onnx", "before", "model"),
    r"\$\.before\.inputs: no 'timesteps'": put("labels", "before", "inputs", 0, "name"),
    r"\$\.before\.inputs: 'timesteps' is not \[steps\] of the table's dtype": put(
        ["steps", "batch"], "before", "inputs", 0, "shape"
    ),
    r"\$\.before\.inputs: 'noise' is not that of the steps": put("noise", "before", "inputs", 1, "name"),
    r"\$\.before\.outputs: 'more' is no input of the steps": put("more", "before", "outputs", 0, "name"),
    r"\$\.before\.outputs: 'sample' is no input of the steps": put("sample", "before", "outputs", 0, "name"),
    r"\$\.before\.outputs: 'both_values' is no input of the steps": edited(
        lambda manifest: output_of(manifest, "both_values").update(shape=["steps", 1, "batch", 4])
    ),
    r"\$\.before\.outputs: 'kept_0' is no input of the steps": edited(
        lambda manifest: output_of(manifest, "kept_0").update(dtype="float64")
    ),
    r"\$\.before: is there, in a bundle of kind 'step' for 'tensorrt'": edited(
        lambda manifest: manifest.update(runtime="tensorrt", engine=ENGINE)
    ),
    "before.onnx' is not the file that was exported": lambda folder: flip_a_byte(folder, "before.onnx"),
}


def test_a_damaged_second_graph_is_refused(checked, bundles, tmp_path):
    with CppSampler(checked / "driver") as reader:
        for k, (message, damage) in enumerate(BAD_BEFORE.items()):
            folder = shutil.copytree(bundles("two graphs"), tmp_path / str(k))
            assert reader.open(folder)["steps"] == 6
            damage(folder)
            with pytest.raises(CppError, match=message) as caught:
                reader.open(folder)
            assert caught.value.kind == "BundleError"


def test_a_second_graph_that_gives_something_else_is_named(checked, bundles, tmp_path):
    """Its manifest and the steps' graph as they were, so that only running it shows."""
    folder = shutil.copytree(bundles("two graphs"), tmp_path / "other")
    graph = onnx.load(folder / "before.onnx")
    for output in graph.graph.output:
        if output.name == "step_values":
            # A row too few: of the first step alone.
            last = next(node for node in graph.graph.node if output.name in node.output)
            last.output[list(last.output).index(output.name)] = "all_rows"
            cut = [onnx.helper.make_tensor(f"cut_{k}", onnx.TensorProto.INT64, [1], [k]) for k in (0, 1)]
            graph.graph.initializer.extend(cut)
            graph.graph.node.append(onnx.helper.make_node("Slice", ["all_rows", "cut_0", "cut_1"], [output.name]))
    onnx.save(graph, folder / "before.onnx")
    told = {"sha256": hashlib.sha256((folder / "before.onnx").read_bytes()).hexdigest()}
    put(told | {"bytes": (folder / "before.onnx").stat().st_size}, "files", "before.onnx")(folder)
    given = {**text_conditions(2), "guidance_scale": 2.0, "seeds": 0, "uncond_kwargs": text_conditions(2, seed=5)}
    with CppSampler(checked / "driver", folder) as ours:
        with pytest.raises(CppError, match=r"before.onnx' returns step_values: shape \[1, \d+\] with") as caught:
            ours(2, **given)
        assert caught.value.kind == "BundleError"


BAD_TABLES = {
    r"\$\.table\.timesteps\[1\]: 1e\+39 is not finite in float32": put(1e39, "table", "timesteps", 1),
    r"\$\.table\.timesteps\[1\]: \"7\" is not a number": put("7", "table", "timesteps", 1),
    "manifest.json' cannot be read: .*987.6, N": put(math.nan, "table", "timesteps", 1),
    r"\$\.table\.coefficients: 2 rows for 3 timesteps": put([[0] * 6] * 2, "table", "coefficients"),
    r"\$\.table\.start_scale: 0 is not > 0": put(0, "table", "start_scale"),
    r"\$\.table\.start_scale: -1\.5 is not > 0": put(-1.5, "table", "start_scale"),
    r"\$\.table: 'start_scale' is a required property": put(None, "table", "start_scale"),
    r"\$\.table\.noising: \[1\] is not a factor of x0 and one of the noise": put([1], "table", "noising"),
    r"\$\.sampling\.baked_schedule: is on, and there is no schedule": put(True, "sampling", "baked_schedule"),
    r"\$\.sampling\.limit\.kind: \"box\" is not one of": put({"kind": "box"}, "sampling", "limit"),
    r"\$\.sampling\.limit\.range: 0 is not > 0": put({"kind": "clip", "range": 0}, "sampling", "limit"),
    r"\$\.sampling\.limit\.ratio: 2 is not in \[0, 1\]": put(
        {"kind": "threshold", "ratio": 2, "max_value": 1}, "sampling", "limit"
    ),
    r"\$\.inputs: 'timesteps' is int32, not int64 or float32": edited(
        lambda manifest: (
            input_of(manifest, "timesteps").update(dtype="int32"), manifest["table"].update(timesteps=[3, -2, 1])
        )
    ),
    r"\$\.table\.timesteps\[0\]: 987\.6 is not an integer": edited(
        lambda manifest: input_of(manifest, "timesteps").update(dtype="int64")
    ),
}  # fmt: skip


def test_a_table_that_cannot_be_run_is_refused(checked, bundles, tmp_path):
    with CppSampler(checked / "driver") as reader:
        for k, (message, damage) in enumerate(BAD_TABLES.items()):
            folder = shutil.copytree(bundles("flow"), tmp_path / str(k) / "bundle")
            damage(folder)
            with pytest.raises(CppError, match=message) as caught:
                reader.open(folder)
            assert caught.value.kind == "BundleError"


def test_a_damaged_bundle_of_the_first_format_is_named(checked, tmp_path):
    damages = {
        r"\$\.kind: null is not a string": put(None, "graph"),
        r"\$: 'schedule' is a required property": put(None, "schedule"),
        r"\$\.schedule: beta_start, beta_end: .*, 2; pass": put(2, "schedule", "beta_end"),
        r"\$\.table: 7 is not an object": put(7, "table"),
    }
    with CppSampler(checked / "driver") as reader:
        for k, (message, damage) in enumerate(damages.items()):
            folder = shutil.copytree(Path(__file__).parent / "bundles" / "loop-1", tmp_path / str(k) / "bundle")
            damage(folder)
            with pytest.raises(CppError, match=message):
                reader.open(folder)


def test_a_whole_pipelines_components_are_known(checked, bundles, tmp_path):
    folder = shutil.copytree(bundles("typed"), tmp_path / "bundle")
    tensor = {"name": "latents", "dtype": "float32", "shape": ["batch", 4, "height", "width"], "meaning": ""}
    decoder = {"model": "model.onnx", "inputs": [tensor], "outputs": [], "meaning": "", "upscale": 8}
    parity = [{"component": "vae_decoder", "batch": 1, "largest_error": 0.0, "tolerance": 1.0}]
    changes = {"components": {"vae_decoder": decoder}, "zeros_for_empty_prompt": True, "parity": parity}
    edited(lambda manifest: manifest.update(changes))(folder)
    with CppSampler(checked / "driver") as reader:
        assert reader.open(folder)["components"] == {"vae_decoder": [str(folder / "model.onnx"), 8]}


def test_hashes_are_left_out_when_asked(checked, bundles, tmp_path):
    folder = shutil.copytree(bundles("typed"), tmp_path / "bundle")
    flip_a_byte(folder)
    with CppSampler(checked / "driver") as reader:
        assert reader.open(folder, check_hashes=False)["model"] == str(folder / "model.onnx")


def test_a_graph_that_cannot_be_loaded_is_named(checked, bundles, tmp_path):
    folder = shutil.copytree(bundles("typed"), tmp_path / "bundle")
    (folder / "model.onnx").write_bytes(b"no graph")
    entry = {"sha256": hashlib.sha256(b"no graph").hexdigest(), "bytes": 8}
    put(entry, "files", "model.onnx")(folder)
    with pytest.raises(CppError, match=r"model\.onnx' cannot be loaded: ") as caught:
        CppSampler(checked / "driver", folder)
    assert caught.value.kind == "BundleError"
    folder = shutil.copytree(bundles("typed"), tmp_path / "other")
    put("bfloat16", "inputs", 2, "dtype")(folder)
    with pytest.raises(CppError, match=r"has an input '\w+' of dtype bfloat16"):
        CppSampler(checked / "driver", folder)
    target = {"device": "cpu", "platform": "linux", "machine": "x86_64", "cpu_features": []}
    edited(lambda manifest: manifest.update(runtime="aoti", target=target))(folder)
    with pytest.raises(CppError, match=r"is of runtime 'aoti', not 'onnx'"):
        CppSampler(checked / "driver", folder)


def test_a_graph_that_returns_something_else_is_named(checked, bundles, tmp_path):
    folder = shutil.copytree(bundles("resizable"), tmp_path / "bundle")
    model = onnx.load(folder / "model.onnx")
    (last,) = (node for node in model.graph.node if "samples" in node.output)
    last.output[list(last.output).index("samples")] = "whole"
    model.graph.node.append(onnx.helper.make_node("Flatten", ["whole"], ["samples"]))
    (output,) = (value for value in model.graph.output if value.name == "samples")
    output.CopyFrom(onnx.helper.make_tensor_value_info("samples", onnx.TensorProto.FLOAT, None))
    content = model.SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    put({"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}, "files", "model.onnx")(folder)
    with (
        CppSampler(checked / "driver", folder) as sampler,
        pytest.raises(CppError, match=r"returns \[2, 64\] for a state \[2, 1, 8, 8\]; export it again") as caught,
    ):
        sampler(2, seeds=0, num_inference_steps=1)
    assert caught.value.kind == "BundleError"


ENGINE = {
    "flavour": "rtx",
    "version": "1.2.3.4",
    "compute_capabilities": ["8.9"],
    "profiles": [{"batch": [1, 2, 3]}],
    "options": {"hardware_compatibility": None, "version_compatible": False, "strip_plan": False},
}
TARGET = {
    "device": "cuda",
    "platform": "linux",
    "machine": "x86_64",
    "cpu_features": ["avx2"],
    "compute_capability": "9.0",
}
KERNELS = {
    "format": "fastddim-kernels",
    "format_version": 1,
    "files": {"k.cubin": {"sha256": "", "bytes": 1}},
    "arguments": {
        name: {"dtype": "float32", "written": name == "out"}
        for name in ("table", "step", "model_output", "sample", "out")
    },
    "kernels": [
        {
            "name": "k", "entry": "k", "num_warps": 4,
            "parameters": [
                {"name": "sample", "type": "float32*", "divisible_by": 16},
                {"name": "n", "type": "int32", "divisible_by": 4},
                {"name": "num_steps", "type": "int64", "divisible_by": 1},
                {"name": "tickets", "type": "int32*", "divisible_by": 1},
                {"name": "global_scratch", "type": "uint8*", "divisible_by": 1},
            ],
            "images": [
                {"kind": "cubin", "target": "sm_80", "compute_capability": [8, 0], "file": "k.cubin", "shared_bytes": 0}
            ],
        }
    ],
    "plans": [
        {
            "batch": 2, "tier": "whole", "scratch": {"tickets": 4},
            "shapes": {"table": ["num_steps", 6], "step": [1], "model_output": [2, 8], "sample": [2, 8], "out": [2, 8]},
            "launches": [{"kernel": "k", "grid": [1, 1, 1], "numbers": {"n": 16}}],
        }
    ],
}  # fmt: skip


def fuzz(program, bundles, folder, runs):
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "kernels").write_text(json.dumps(KERNELS))
    shutil.copy(bundles("two graphs") / "manifest.json", corpus / "two-graphs")
    for name in ("typed", "plain", "flow"):
        manifest = json.loads((bundles(name) / "manifest.json").read_text())
        tensors = {group: manifest[group] for group in ("inputs", "outputs")}
        component = {"model": manifest["model"], **tensors, "meaning": "", "upscale": 8}
        for kind, fields in {
            "onnx": {"components": {"decoder": component}, "zeros_for_empty_prompt": True},
            "aoti": {"target": TARGET},
            "tensorrt": {"engine": ENGINE},
        }.items():
            (corpus / f"{name}-{kind}").write_text(json.dumps({**manifest, **fields, "runtime": kind}))
    # In a folder of the test's, where it leaves an input that crashes; freed memory that the checker keeps back would
    # count as the program's.
    done = subprocess.run(
        [program, corpus, f"-runs={runs}", "-seed=1", "-max_len=16384",
         "-rss_limit_mb=4096", "-malloc_limit_mb=1024", "-timeout=300", "-print_final_stats=1"],
        env={**os.environ, "ASAN_OPTIONS": "quarantine_size_mb=16"},
        cwd=folder, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    executed = next(line for line in done.stderr.splitlines() if "number_of_executed_units" in line)
    assert int(executed.split()[-1]) >= runs


def test_some_made_up_manifests(checked, bundles, tmp_path):
    fuzz(checked / "fuzz_manifest", bundles, tmp_path, 100)


@pytest.mark.slow
def test_many_made_up_manifests(bundles, tmp_path):
    fuzz(build("fuzz", "fuzz_manifest") / "fuzz_manifest", bundles, tmp_path, 40_000)


def read_pgm(path):
    magic, size, largest, pixels = path.read_bytes().split(b"\n", 3)
    assert (magic, largest) == (b"P5", b"255")
    width, height = map(int, size.split())
    return np.frombuffer(pixels, np.uint8).reshape(height, width)


@pytest.mark.parametrize("kind", ["checked", "release"])
def test_the_example_writes_the_digits(kind, bundles, request, tmp_path):
    program = request.getfixturevalue(kind) / "sample"
    arguments = ["--labels", "3,1,4", "--steps", "20", "--seed", "7", "--threads", "1"]
    expected = OrtSampler(bundles("digits"))(
        3, seeds=7, num_inference_steps=20, guidance_scale=2.0, class_labels=np.array([3, 1, 4])
    )
    for out in (tmp_path / "pi.pgm", tmp_path / "pi.raw"):
        subprocess.run([program, bundles("digits"), *arguments, "--out", out], check=True)
    np.testing.assert_allclose(np.fromfile(tmp_path / "pi.raw", np.float32), expected.ravel(), atol=1e-4)
    levels = (np.concatenate(expected[:, 0], axis=1).clip(-1, 1) + 1) * 127.5
    assert np.abs(read_pgm(tmp_path / "pi.pgm") - levels).max() < 0.6
    assert sorted(os.listdir(tmp_path)) == ["pi.pgm", "pi.raw"]


def test_the_example_names_what_is_wrong(checked, bundles, tmp_path):
    bundle = bundles("resizable")
    (tmp_path / "there.pgm").write_text("earlier")
    for message, arguments in {
        "BUNDLE: missing": [],
        "manifest.json' is missing": [tmp_path],
        "--seed: 'x'; pass an integer in [0, 2**64)": [bundle, "--seed", "x"],
        "--seed: '-1'; pass an integer in [0, 2**64)": [bundle, "--seed", "-1"],
        "--steps: '2.5'; pass an integer": [bundle, "--steps", "2.5"],
        "--eta: '1x'; pass a number": [bundle, "--eta", "1x"],
        "--seed: no value": [bundle, "--seed"],
        "--nope: no such option": [bundle, "--nope", "1"],
        "a second bundle": [bundle, bundle],
        "num_inference_steps: 0": [bundle, "--steps", "0"],
        "--size: '8'": [bundle, "--size", "8"],
        "class_labels: this bundle takes no conditions": [bundle, "--labels", "1"],
        "cannot be written; pass another file": [bundle, "--steps", "1", "--out", tmp_path / "none" / "x.pgm"],
    }.items():
        done = subprocess.run([checked / "sample", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert os.listdir(tmp_path) == ["there.pgm"]
    helped = subprocess.run([checked / "sample", "--help"], capture_output=True, text=True, check=True)
    assert helped.stdout.startswith("usage: sample BUNDLE")
    out = tmp_path / "there.pgm"
    subprocess.run([checked / "sample", bundle, "--size", "8,12", "--batch", "2", "--out", out], check=True)
    assert read_pgm(out).shape == (8, 24)


CONSUMER = """
cmake_minimum_required(VERSION 3.18)
project(consumer CXX)
find_package(fastddim {version} REQUIRED COMPONENTS ort)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE fastddim::ort)
"""


def test_the_readmes_program_finds_an_installed_copy(release, bundles, tmp_path):
    prefix = tmp_path / "prefix"
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER.format(version=fastddim.__version__))
    blocks = re.findall(r"```cpp\n(.*?)```", (ROOT / "cpp" / "README.md").read_text(), re.DOTALL)
    # The other one is run in tests/test_cpp_policies.py.
    program, _ = (block for block in blocks if "int main" in block)
    (tmp_path / "main.cpp").write_text(program)
    for command in (
        ["cmake", "--install", release, "--prefix", prefix],
        ["cmake", "-S", tmp_path, "-B", tmp_path / "out", f"-DCMAKE_PREFIX_PATH={prefix}",
         f"-DONNXRUNTIME_ROOT={RUNTIME}", "-DCMAKE_CXX_COMPILER=clang++"],
        ["cmake", "--build", tmp_path / "out"],
    ):  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "digits").symlink_to(bundles("digits"))
    done = subprocess.run([tmp_path / "out" / "consumer"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "768 numbers\n", done.stderr


def test_flags_that_would_change_the_bits_are_refused():
    command = [
        "g++",
        "-std=c++17",
        "-fsyntax-only",
        f"-I{ROOT}/cpp/include",
        "-include",
        "fastddim/philox.hpp",
        "-xc++",
    ]
    flags = {"-ffast-math": "-ffast-math and -Ofast change the bits", "-Ofast": "-ffast-math and -Ofast"}
    if platform.machine() == "x86_64":
        flags["-mfpmath=387"] = "float arithmetic in a wider type"
    for flag, message in flags.items():
        done = subprocess.run([*command, flag, "/dev/null"], capture_output=True, text=True)
        assert done.returncode != 0 and message in done.stderr
    assert subprocess.run([*command, "/dev/null"]).returncode == 0


HEADERS = sorted(path.name for path in (ROOT / "cpp" / "include" / "fastddim").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("headers", [*([name] for name in HEADERS), HEADERS], ids=[*HEADERS, "all at once"])
def test_headers_compile_alone_and_together(headers, compiler):
    # libtorch's headers are C++20.
    standard = "c++20" if "aoti_sampler.hpp" in headers else "c++17"
    torch_headers = Path(torch.__file__).parent / "include"
    folders = [RUNTIME / "include", stub_cuda.HEADERS, ROOT / "build" / "tensorrt" / "include", torch_headers,
               torch_headers / "torch" / "csrc" / "api" / "include"]  # fmt: skip
    done = subprocess.run(
        [compiler, f"-std={standard}", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion",
         "-Werror", f"-I{ROOT}/cpp/include", *(f"-isystem{folder}" for folder in folders), "-xc++", "-"],
        input="".join(f'#include "fastddim/{name}"\n' for name in headers), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:4000]


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "cpp_sampler.py", "--quick", "--json", tmp_path / "out.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok"] * 4
