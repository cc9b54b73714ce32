"""The kernels compiled for real, in processes without Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=900
    )


def check_budget(folder, *options):
    file = folder / "figures.json"
    done = run(ROOT / "benchmarks" / "kernel_budget.py", "--json", file, *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads(file.read_text())["figures"]
    assert {figure["target"] for figure in figures} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert not any(figure["spills"] for figure in figures)
    return figures


@pytest.mark.slow
def test_the_kernels_keep_their_budget_on_every_target(tmp_path):
    figures = check_budget(tmp_path, "--quick")
    instructions = {figure["case"]: figure["instructions"] for figure in figures if figure["target"] == "sm_90"}
    assert instructions["guidance + clip"] <= 12
    assert instructions["guidance + clip + drawn noise, fp32"] <= 64


@pytest.mark.slow
def test_every_variant_keeps_its_budget(tmp_path):
    assert len(check_budget(tmp_path)) >= 200


def test_a_variant_over_budget_is_an_error(tmp_path):
    """The check can fail."""
    program = (
        "import kernel_budget as k;"
        "f = k.Figure('guidance + clip', 'ddim_step_kernel', 'sm_90', 2048, 2, 12.5, 99, 8, 31, 32, 9000, 15.0);"
        "kept = {'guidance + clip: ddim_step_kernel: sm_90': "
        "{'instructions': 12.0, 'registers': 80, 'in_flight': 10000, 'executed': 14.0}};"
        "print(*k.check([f], kept), sep='\\n')"
    )
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line, end in zip(
        lines,
        (
            "8 bytes spilled; 0 asked",
            "31 accesses of full width; 32 asked",
            "12.5 instructions an element; at most 12 asked",
            "12.5 instructions, 12.0 before; mend it, or run with --update and say why",
            "99 registers, 80 before; mend it, or run with --update and say why",
            "15.0 executed, 14.0 before; mend it, or run with --update and say why",
            "9000 bytes in flight, 10000 before; mend it, or run with --update and say why",
        ),
        strict=True,
    ):
        assert line == f"guidance + clip: ddim_step_kernel: sm_90: {end}"


COUNT = """
import json, sys
import launch_cost

def count(candidates, rounds):
    counts = {}
    for name, candidate in candidates.items():
        events = []
        sys.setprofile(lambda frame, event, argument: events.append(event))
        candidate()
        sys.setprofile(None)
        counts[name] = sum(event in ("call", "c_call") for event in events)
    print(json.dumps(counts))
    raise SystemExit

# It is called once the candidates are known to launch the step once a call.
launch_cost.measure = count
launch_cost.main()
"""


def test_a_prepared_step_makes_few_calls_beside_the_drivers_own_launch():
    """Calls of Python and C functions, in Triton's own launcher over a stub of the CUDA driver: a busy machine makes no more
    of them. The microseconds are `launch_cost.py`'s to report."""
    done = run("-c", COUNT)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    (driver,) = (count for name, count in counts.items() if name.startswith("driver"))
    (prepared,) = (count for name, count in counts.items() if name.startswith("PreparedStep"))
    assert 0 < driver < prepared <= driver + 8
    assert prepared < counts["plain Triton launch"] / 3


CONSTANT_NUMBERS = """
from kernel_budget import TARGETS
from fastddim.config import Clip, DynamicThreshold
from fastddim.kernels.aot import compile_source, pointer_types, specialise
from fastddim.kernels.plan import StepShape, make_plan

threshold = DynamicThreshold(0.995, 2.0)
shapes = [
    StepShape(1, 16384, guided=True, limit=Clip(1.0), num_steps=50),
    StepShape(2, 16384, guided=True, cond_first=True, limit=Clip(1.0), advance=True),
    StepShape(1, 3 * 64 * 64, guided=True, drawn=True, row_per_sample=True, advance=True),
    StepShape(1, 4096, guided=True, rescale=True, limit=threshold, output_channels_last=True, input_channels_last=True),
    StepShape(1, 65536, guided=True, rescale=True, limit=threshold),
    StepShape(1, 65536, guided=True, rescale=True, limit=DynamicThreshold(0.5, 1.0004), output_channels_last=True),
    StepShape(1, 1, guided=True, limit=threshold, drawn=True),
]
constant = set()
for shape in shapes:
    types = pointer_types(shape, x0=True, model_input=True, first_row=shape.drawn)
    for call in make_plan(shape).calls:
        names = call.kernel.arg_names
        pointers = {name: types[pointer] for name, pointer in zip(names, call.pointers) if pointer in types}
        numbers = dict(zip(names[len(call.pointers):], call.numbers))
        ones = {name: 1 for name, number in numbers.items() if number == 1}
        others = {name: number for name, number in numbers.items() if number != 1}
        compile_source(specialise(call.kernel, pointers, others, {**call.constants, **ones}), call.num_warps, TARGETS["sm_90"])
        constant |= ones.keys()
print(*sorted(constant))
"""


def test_the_kernels_compile_where_an_integer_of_1_is_a_constant():
    """torch's Inductor makes it one, whatever the kernel says of its specialisation."""
    done = run("-c", CONSTANT_NUMBERS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["batch", "channels", "n", "num_steps", "rows", "shift"]


FUSION = r"""
import re
from collections import Counter
from kernel_budget import TARGETS, case_types, make_cases
from fastddim.kernels.aot import compile_call
from fastddim.kernels.plan import make_plan

drawn = "guidance + clip + drawn noise"
wanted = (f"{drawn}, fp32", f"{drawn}, bf16", "threshold + rescale", "large threshold + rescale")
for case in make_cases():
    for call in make_plan(case.shape).calls if case.name in wanted else ():
        for target in ("sm_90", "sm_120"):
            counts, contractible = [], []
            for fusion in (False, True):
                ptx = compile_call(call, case_types(case), TARGETS[target], enable_fp_fusion=fusion).asm["ptx"]
                counts.append(Counter(re.findall(r"\bfma[.\w]*", ptx)).most_common())
                products = set(re.findall(r"\bmul(?:\.f32x2|\.f32|\.f64)\s+(%\w+)", ptx))
                sums = re.findall(r"\b(?:add|sub)\.f(?:32x2|32|64)\s+%\w+, (%\w+), (%\w+)", ptx)
                # Quotients and roots of a unit's own precision.
                assert not re.search(r"\.approx|\.full\.", ptx)
                contractible += [terms for terms in sums if products & set(terms)]
            print(case.name, call.kernel.__name__, target, counts, contractible)
            assert counts[0] and counts[0] == counts[1] and not contractible
"""


def test_every_operation_is_rounded_by_itself_also_where_the_compiler_may_contract():
    """Inductor drops `enable_fp_fusion=False`; the bits of drawn noise, and of the statistics, must not depend on it."""
    done = run("-c", FUSION)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 14


HOOKS = """
import gc, json, weakref
import stub_cuda
stub = stub_cuda.install()
import torch
import triton
from fastddim import Clip, DynamicThreshold, Schedule, DDIMConfig, StepTable, ddim_step
from fastddim.kernels import PreparedStep, launch
from fastddim.kernels.step import ddim_step_kernel
from fastddim.step import StepOptions

launch._DEVICE_TYPES = ("cuda", "cpu")
schedule = Schedule(DDIMConfig())
table = StepTable.build(schedule, schedule.pairs(10))
x = torch.randn(1, 20000)
prepared = PreparedStep(x, x.clone(), table, StepOptions(limit=Clip()))
told = []
before, after = (lambda metadata, when=when: told.append((when, metadata.get()["name"])) for when in ("before", "after"))

def step():
    ddim_step(x, x.clone(), table, 3, limit=DynamicThreshold(0.9, 2.0), backend="triton")
    prepared(x, 3)

step()
hooks = triton.knobs.runtime
hooks.launch_enter_hook.add(before)
hooks.launch_exit_hook.add(after)
step()
hooks.launch_enter_hook.remove(before)
step()
hooks.launch_exit_hook.remove(after)
step()
kernels = [weakref.ref(kernel) for kernel in ddim_step_kernel.device_caches[0][0].values()]
ddim_step_kernel.device_caches.clear()
gc.collect()
kept = sum(kernel() is not None for kernel in kernels)
print(json.dumps({"told": told, "launches": stub.launches, "kernels": len(kernels), "kept": kept}))
"""


def test_tritons_launch_hooks_are_told_of_every_launch_and_the_compiled_kernels_are_kept():
    """Hooks as profilers set them. From Triton 3.8 on a compiled kernel that nobody keeps takes its code with it."""
    done = run("-c", HOOKS)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    names = ["histogram_kernel"] * 2 + ["ddim_step_kernel"] * 2
    both = [[when, name] for name in names for when in ("before", "after")]
    assert report["told"] == both + [["after", name] for name in names]
    assert report["launches"] == 4 * len(names)
    assert report["kept"] == report["kernels"] == 2
