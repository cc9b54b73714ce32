"""Compile the step's kernels for every supported GPU, none needed, and hold them to a budget.

    python benchmarks/kernel_budget.py [--quick] [--update] [--json FILE]

For each variant and target: spilled bytes (0 asked), the width of the accesses to the large tensors (128 bits asked where
sizes allow), and instructions an element, registers and bytes in flight, which may not be worse than in the committed
`kernel_budget.json`. On NVIDIA's also the PTX instructions an element that the machine in tests/ptx executes: a loop's as
often as it runs, none behind a branch not taken. `--update` rewrites that file; `--quick` compiles a sample. Status 1 if a
variant is over budget.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import triton
from triton.backends.compiler import GPUTarget

from fastddim import DDIMConfig, Schedule, StepTable
from fastddim.config import Clip, DynamicThreshold, limit_numbers
from fastddim.kernels.aot import compile_call, pointer_types
from fastddim.kernels.plan import KernelCall, Plan, StepShape, make_plan

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import ptx

BUDGET_FILE = Path(__file__).with_suffix(".json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Compilers differ a little from one build to the next; a variant that grew by more has changed.
SLACK = 1.02
NOISE_LIMIT = 64.0
GUIDED_CLIP_LIMIT = 12.0
# Of an SM: its registers, what a warp's are a multiple of, and the most warps, 48 on sm_120.
SM_REGISTERS, REGISTER_UNIT, SM_WARPS = 65536, 256, {"sm_120": 48}

LATENT = {"batch": 64, "elements": 16384}
PIXELS = {"batch": 8, "elements": 3 * 256 * 256}
# Bits of an element.
WIDTHS = {"fp32": 32, "fp16": 16, "bf16": 16}
# bfloat16's bits.
NUMPY_TYPES = {
    "fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "fp64": np.float64, "i64": np.int64, "i32": np.int32,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A variant: what is asked of the step, and the dtypes.

    Attributes:
        shape: sizes and options.
        state, model: dtypes of the state, and of the model's output and input.
        outputs: optional results, of `x0` and `input`.
        noise: `"given"` adds a noise tensor (of the state's dtype); drawn noise is in `shape`.
        quick: part of the sample.
    """

    name: str
    shape: StepShape
    state: str = "fp32"
    model: str = "fp32"
    outputs: tuple[str, ...] = ()
    noise: str | None = None
    quick: bool = False


@dataclass(frozen=True)
class Figure:
    """What a kernel compiled to.

    Attributes:
        wide, wide_asked: its widest accesses, and those that the large tensors need.
        in_flight: bytes that an SM has under way: what a thread reads by its widest loads before it uses any of it, times
            the threads that the registers allow; 0 on AMD.
        executed: PTX instructions that were executed, an element; 0 on AMD.
    """

    case: str
    kernel: str
    target: str
    block: int
    num_warps: int
    instructions: float
    registers: int
    spills: int
    wide: int
    wide_asked: int
    in_flight: int
    executed: float


def make_cases() -> list[Case]:
    """The variants: every option, every pair of dtypes, every tier."""
    clip, threshold = Clip(1.0), DynamicThreshold(0.995, 2.0)
    guided = StepShape(**PIXELS, guided=True, limit=clip)
    cases = [Case("guidance + clip", guided, quick=True)]
    cases += [
        Case(
            f"guidance + clip, {state} state, {model} model",
            guided,
            state,
            model,
            quick=(state, model) == ("bf16", "bf16"),
        )
        for state in WIDTHS
        for model in WIDTHS
        if (state, model) != ("fp32", "fp32")
    ]
    for state in WIDTHS:
        drawn = StepShape(**PIXELS, guided=True, limit=clip, drawn=True)
        cases.append(Case(f"guidance + clip + drawn noise, {state}", drawn, state, state, quick=state == "fp32"))
    everything = ("x0", "input")
    options = {"scale_per_sample": True, "row_per_sample": True}
    cases += [
        Case("plain", StepShape(**PIXELS)),
        Case("clip", StepShape(**PIXELS, limit=clip), quick=True),
        Case("fixed threshold", StepShape(**PIXELS, limit=DynamicThreshold(0.9, 0.5))),
        Case("given noise", StepShape(**PIXELS, limit=clip), noise="given"),
        Case("conditional half first", StepShape(**PIXELS, guided=True, cond_first=True, limit=clip)),
        Case("rows and scales per sample", StepShape(**PIXELS, guided=True, limit=clip, **options)),
        Case("x0 and model input", guided, outputs=everything),
        Case("x0 and half model input", guided, model="fp16", outputs=everything, quick=True),
        Case("advance", StepShape(**PIXELS, guided=True, limit=clip, advance=True), outputs=everything),
        Case("advance per sample", StepShape(**PIXELS, guided=True, limit=clip, advance=True, **options), outputs=everything),
        Case("looking back", StepShape(**PIXELS, guided=True, limit=clip, looks_back=True), outputs=everything, quick=True),
        Case("small", StepShape(2, 16384, guided=True, limit=clip), quick=True),
        Case("small, drawn noise", StepShape(2, 16384, guided=True, limit=clip, drawn=True)),
        Case("action sequence", StepShape(8, 112, limit=clip, row_per_sample=True)),
        Case("ragged", StepShape(8, 3 * 61 * 61, guided=True, limit=clip, drawn=True)),
        Case("ragged, flat", StepShape(8, 3 * 61 * 61, guided=True, limit=clip), outputs=everything),
        Case("channels-last model", StepShape(**PIXELS, channels=3, guided=True, limit=clip, output_channels_last=True,
                                              input_channels_last=True), model="bf16", outputs=everything),
    ]  # fmt: skip
    for n in (1024, 4096, 12288, 16384):
        whole = StepShape(64, n, guided=True, limit=threshold)
        cases.append(Case(f"threshold, sample of {n}", whole, quick=n == 16384))
    one_program = {"batch": 64, "elements": 16384, "guided": True}
    projected = {"guidance_method": "apg", "apg_norm_threshold": 50.0}
    cases += [
        Case("threshold, unguided", StepShape(64, 16384, limit=threshold)),
        Case("threshold, bf16", StepShape(**one_program, limit=threshold), "bf16", "bf16", everything),
        Case("threshold + rescale", StepShape(**one_program, limit=threshold, rescale=True), outputs=everything, quick=True),
        Case("threshold + rescale + drawn noise", StepShape(**one_program, limit=threshold, rescale=True, drawn=True,
                                                            advance=True, **options), outputs=everything),
        Case("rescale", StepShape(**one_program, limit=clip, rescale=True), quick=True),
        Case("large threshold", StepShape(**PIXELS, guided=True, limit=threshold), quick=True),
        Case("large threshold, unguided bf16", StepShape(**PIXELS, limit=threshold), "bf16", "bf16"),
        Case("threshold on the device", StepShape(**one_program, limit=threshold, limit_on_device=True)),
        Case("large threshold on the device", StepShape(**PIXELS, guided=True, limit=threshold, limit_on_device=True)),
        Case("captured step", StepShape(**PIXELS, guided=True, limit=clip, limit_on_device=True, drawn=True, advance=True),
             model="fp16", outputs=everything),
        Case("large rescale", StepShape(**PIXELS, guided=True, limit=clip, rescale=True)),
        Case("large threshold + rescale", StepShape(**PIXELS, guided=True, limit=threshold, rescale=True)),
        Case("CFG++", StepShape(**PIXELS, guided=True, limit=clip, guidance_method="cfg++"), quick=True),
        Case("projected guidance", StepShape(**one_program, limit=clip, **projected), quick=True),
        Case("threshold + rescale + projected guidance", StepShape(**one_program, limit=threshold, rescale=True, **projected),
             outputs=everything),
        Case("large projected guidance", StepShape(**PIXELS, guided=True, limit=clip, **projected), quick=True),
        Case("large threshold + rescale + projected guidance", StepShape(**PIXELS, guided=True, limit=threshold, rescale=True,
                                                                         **projected)),
    ]  # fmt: skip
    return cases


def case_types(case: Case) -> dict[str, str]:
    """The dtype of every pointer that the case's kernels get."""
    types = pointer_types(
        case.shape,
        case.state,
        case.model,
        x0="x0" in case.outputs,
        model_input="input" in case.outputs,
        noise=case.noise is not None,
        first_row=case.shape.drawn,
    )
    return types if case.state == "fp32" else {**types, "ratios": "fp32"}


def measure(case: Case, target: str) -> list[Figure]:
    """Compile the case's kernels for a target."""
    figures = []
    types, plan = case_types(case), make_plan(case.shape)
    compiled = [compile_call(call, types, TARGETS[target]) for call in plan.calls]
    nvidia = target.startswith("sm_")
    executed = _execute(case.shape, plan, types, compiled) if nvidia else [0.0] * len(compiled)
    for call, binary, run in zip(plan.calls, compiled, executed, strict=True):
        count, registers, spills, widths, ahead = (_nvidia if nvidia else _amd)(binary)
        block = call.constants["BLOCK"]
        threads = call.num_warps * TARGETS[target].warp_size
        # A whole sample is updated in chunks, by a loop whose body is there once.
        share = call.constants.get("CHUNK", block) // threads
        # Bits that one thread moves of each large tensor, in accesses as wide as that allows.
        moved = [share * WIDTHS[types[name]] for name in _large_accesses(call, types)]
        best = min(128, *moved)
        warps = min(SM_WARPS.get(target, 64), SM_REGISTERS // (-(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT))
        figures.append(
            Figure(
                case.name, call.kernel.__name__ + (" (refine)" if call.constants.get("REFINE") else ""), target, block,
                call.num_warps, round(count / (block / threads), 2), registers, spills,
                sum(width >= best for width in widths), sum(bits // min(128, bits) for bits in moved),
                ahead * warps // call.num_warps * threads, round(run, 2),
            )
        )  # fmt: skip
    return figures


def _execute(
    shape: StepShape, plan: Plan, types: dict[str, str], compiled: list[triton.compiler.CompiledKernel]
) -> list[float]:
    """PTX instructions an element that each launch of a step in the middle of a run executes.

    The model finds the noise, and what is left of x0 has its threshold between 1 and the largest one asked for here.
    """
    schedule = Schedule(DDIMConfig())
    noisy = "noise" in types or shape.drawn
    table = StepTable.build(
        schedule, schedule.pairs(10), eta=float(noisy), use_clipped_model_output=shape.limit is not None
    )
    total = shape.batch * shape.elements
    rng = np.random.default_rng(0)
    clean, noise, further = rng.standard_normal((3, total), np.float32)
    x0_from_x, x0_from_output = table.columns[4, :2]
    values = {
        "sample": (0.55 * clean - x0_from_output * noise) / x0_from_x,
        "output": np.tile(noise, 1 + shape.guided),
        "noise": further,
        "table": np.append(table.columns[4:5], np.full((1, int(shape.looks_back)), 0.25), axis=1),
        "ratios": table.ratios[4:5],
        "guidance": np.full(shape.batch, 7.5),
        "rescale": np.full(shape.batch, 0.7),
        "limit": np.array(limit_numbers(shape.limit)),
        "statistics": np.zeros(plan.statistics),
        "counters": np.zeros(plan.counters),
        "tickets": np.zeros(plan.tickets),
    }
    sizes = {"next": total, "x0": total, "input": total * (1 + shape.guided)}
    memory, addresses = ptx.Memory(), {}
    for name, kind in types.items():
        given = values.get(name, np.zeros(sizes.get(name, 2 * shape.batch)))
        if kind == "bf16":
            given = given.astype(np.float32).view(np.uint32) >> 16
        # Kept, as the machine goes by addresses.
        array = values[name] = np.ascontiguousarray(given.astype(NUMPY_TYPES[kind]))
        addresses[name] = array.ctypes.data
        memory.add(array.ctypes.data, array.nbytes)
    counts = []
    for call, binary in zip(plan.calls, compiled, strict=True):
        program = ptx.prepare(ptx.load(binary.asm["ptx"]))
        parameters = [addresses[name] for name in call.pointers if name in addresses]
        # A number that is 1 may be a constant.
        exempt = {each.name for each in call.kernel.params if each.do_not_specialize}
        names = call.kernel.arg_names[len(call.pointers) :]
        parameters += [
            number for name, number in zip(names, call.numbers, strict=False) if number != 1 or name in exempt
        ]
        parameters += [0] * (len(program.kernel.parameters) - len(parameters))
        counts.append(ptx.launch(program, (*call.grid, 1), parameters, binary.metadata.shared, memory) / total)
    return counts


def _large_accesses(call: KernelCall, types: dict[str, str]) -> list[str]:
    """Each large tensor once for every time that the kernel goes through it: two halves of what is stacked."""
    large = [
        name for name in ("output", "sample", "noise", "next", "x0", "input") if name in call.pointers and name in types
    ]
    stacked = "guidance" in types
    return large + [name for name in large if stacked and name in ("output", "input")]


def _nvidia(compiled: triton.compiler.CompiledKernel) -> tuple[int, int, int, list[int], int]:
    """Instructions, registers, spilled bytes, the widths in bits of the global accesses, and a thread's bytes in flight."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(tools / "cuobjdump", "-res-usage", cubin)
        sass = _run(tools / "nvdisasm", "-c", cubin)
    lines = [line for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line) and " NOP" not in line]
    widths = []
    for line in lines:
        access = re.search(r"\b(?:LDG|STG)\.([\w.]+)", line)
        if access:
            sizes = re.findall(r"\b(?:U8|U16|S16|64|128|256)\b", access[1].replace(".", " "))
            widths.append({"U8": 8, "U16": 16, "S16": 16}.get(sizes[-1], 0) or int(sizes[-1]) if sizes else 32)
    # The kernels have no arrays, so what they have on the stack is spilled.
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, f"cuobjdump prints something else than expected: {usage}"
    return len(lines), int(found[1]), int(found[2]), widths, _loaded_ahead(lines)


def _loaded_ahead(lines: list[str]) -> int:
    """Bytes that a thread reads by 128-bit (or 64-bit) loads before it uses any of them."""
    width = next((bits for bits in (128, 64) if any(f" LDG.E.{bits} " in line for line in lines)), 32)
    waited_for: set[int] = set()
    loaded = 0
    for line in lines:
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", line)]
        load = f" LDG.E.{width} " in line
        # The first register is written, but where a store has none.
        if waited_for.intersection(registers if " ST" in line else registers[1:]):
            break
        if load:
            waited_for.update(range(registers[0], registers[0] + width // 32))
            loaded += width // 8
    return loaded


def _amd(compiled: triton.compiler.CompiledKernel) -> tuple[int, int, int, list[int], int]:
    assembly = compiled.asm["amdgcn"]
    lines = [line for line in assembly.splitlines() if re.match(r"\s+(?:[vs]|global|buffer|ds|flat)_\w+", line)]
    names = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8}
    widths = []
    for line in lines:
        access = re.match(r"\s+(?:global|buffer)_(?:load|store)_(\w+)", line)
        if access:
            widths.append(next((bits for name, bits in names.items() if access[1].startswith(name)), 32))
    found = {
        key: re.search(rf"\.{key}:\s+(\d+)", assembly) for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    counts = {key: int(match[1]) for key, match in found.items() if match is not None}
    return len(lines), counts["vgpr_count"], counts["vgpr_spill_count"] + counts["sgpr_spill_count"], widths, 0


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def check(figures: list[Figure], kept: dict[str, dict[str, float]] | None) -> Iterator[str]:
    """What is over budget. `kept` is the committed table, of the same Triton, or None."""
    for figure in figures:
        where = f"{figure.case}: {figure.kernel}: {figure.target}"
        if figure.spills:
            yield f"{where}: {figure.spills} bytes spilled; 0 asked"
        vectors = not figure.case.startswith(("ragged", "action", "channels-last"))
        if vectors and figure.wide < figure.wide_asked:
            yield f"{where}: {figure.wide} accesses of full width; {figure.wide_asked} asked"
        limit = {"guidance + clip": GUIDED_CLIP_LIMIT, "guidance + clip + drawn noise, fp32": NOISE_LIMIT}.get(
            figure.case
        )
        if limit is not None and figure.target == "sm_90" and figure.instructions > limit:
            yield f"{where}: {figure.instructions} instructions an element; at most {limit:g} asked"
        if kept is None:
            continue
        before = kept.get(where)
        if before is None:
            yield f"{where}: not in {BUDGET_FILE.name}; run with --update and commit it"
            continue
        for name in ("instructions", "registers", "executed"):
            now = getattr(figure, name)
            if now > before[name] * SLACK:
                yield f"{where}: {now} {name}, {before[name]} before; mend it, or run with --update and say why"
        if figure.in_flight * SLACK < before["in_flight"]:
            fewer = f"{figure.in_flight} bytes in flight, {before['in_flight']} before"
            yield f"{where}: {fewer}; mend it, or run with --update and say why"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sample of the variants")
    parser.add_argument("--update", action="store_true", help="rewrite the committed budget")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    arguments = parser.parse_args()
    cases = [case for case in make_cases() if case.quick or not arguments.quick]
    jobs = [(case, target) for case in cases for target in TARGETS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        figures = [figure for group in pool.map(measure, *zip(*jobs, strict=True)) for figure in group]
    print(f"Triton {triton.__version__}")
    print("Instructions an element / executed ones / registers / KiB in flight")
    print(
        f"{'variant':42} {'kernel':26} {'block':>5} {'warps':>5} | " + " ".join(f"{target:>18}" for target in TARGETS)
    )
    rows: dict[tuple[str, str], dict[str, Figure]] = {}
    for figure in figures:
        rows.setdefault((figure.case, figure.kernel), {})[figure.target] = figure
    for (case, kernel), row in rows.items():
        first = next(iter(row.values()))
        figured = [
            f"{each.instructions:.1f}/{each.executed:.1f}/{each.registers}/{each.in_flight >> 10}"
            for each in row.values()
        ]
        cells = " ".join(f"{cell:>18}" for cell in figured)
        print(f"{case:42} {kernel:26} {first.block:5} {first.num_warps:5} | {cells}")
    if arguments.json:
        report = {"triton": triton.__version__, "figures": [asdict(figure) for figure in figures]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.update:
        table = {
            f"{figure.case}: {figure.kernel}: {figure.target}": {
                "instructions": figure.instructions, "registers": figure.registers,
                "in_flight": figure.in_flight, "executed": figure.executed,
            }
            for figure in figures
        }  # fmt: skip
        BUDGET_FILE.write_text(json.dumps({"triton": triton.__version__, "budget": table}, indent=1) + "\n")
    kept = json.loads(BUDGET_FILE.read_text()) if BUDGET_FILE.exists() else None
    same_compiler = kept is not None and kept["triton"] == triton.__version__
    problems = list(check(figures, kept["budget"] if kept is not None and same_compiler else None))
    if not same_compiler:
        print(f"{BUDGET_FILE.name} is of another Triton: only spills and widths are checked")
    for problem in problems:
        print(f"over budget: {problem}", file=sys.stderr)
    print(f"{len(figures)} kernels, {len(problems)} over budget")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
