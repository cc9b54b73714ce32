"""A plan's kernels compiled ahead of time, for any GPU and without one: the types and what tensors would specialise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from fastddim.kernels.plan import KernelCall, StepShape, make_plan

# Triton specialises pointers and numbers that can be divided by it, those apart that a kernel exempts.
ALIGNMENT = 16


def pointer_types(
    shape: StepShape,
    state: str = "fp32",
    model: str = "fp32",
    *,
    x0: bool = False,
    model_input: bool = False,
    noise: bool = False,
    first_row: bool = False,
    timesteps: str = "i64",
) -> dict[str, str]:
    """The dtype of every pointer that a step's kernels get, by its name in the plan; the others are None.

    Args:
        shape: what is asked of the step.
        state, model: Triton's dtypes of the state (and x0, and the noise), and of the model's output and input.
        x0, model_input, noise, first_row: the optional ones that `shape` says nothing of.
        timesteps: Triton's dtype of the timesteps, where the row moves on.
    """
    types = {"output": model, "sample": state, "table": "fp64", "step": "i64", "next": state}
    types |= {"x0": state} if x0 else {}
    types |= {"input": model} if model_input else {}
    types |= {"guidance": "fp32"} if shape.guided else {}
    types |= {"rescale": "fp32"} if shape.rescale else {}
    types |= {"limit": "fp64"} if shape.limit_on_device else {}
    types |= {"noise": state} if noise else {}
    types |= {"seeds": "i64"} if shape.drawn else {}
    types |= {"first_row": "i64"} if first_row else {}
    types |= {"timesteps": timesteps, "next_timestep": timesteps} if shape.advance else {}
    plan = make_plan(shape)
    types |= {"tickets": "i32"} if plan.tickets else {}
    types |= {"statistics": "fp32", "counters": "i32"} if plan.statistics else {}
    return types


def make_source(call: KernelCall, types: dict[str, str]) -> ASTSource:
    """A call's kernel with the specialisation that Triton gives it for aligned tensors of `types`."""
    names = call.kernel.arg_names
    pointers = {name: types[pointer] for name, pointer in zip(names, call.pointers, strict=False) if pointer in types}
    numbers = dict(zip(names[len(call.pointers) :], call.numbers, strict=False))
    return specialise(call.kernel, pointers, numbers, call.constants)


def specialise(
    kernel: Any, pointers: Mapping[str, str], numbers: Mapping[str, int], constants: Mapping[str, Any]
) -> ASTSource:
    """A kernel as Triton specialises it for aligned tensors.

    Args:
        pointers: the dtypes of its tensors, by argument.
        numbers: its integers, by argument.
        constants: its compile-time arguments; what is in none of the three is None.
    """
    loose = {p.name for p in kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    fixed = {**constants, **{name: 1 for name, number in numbers.items() if number == 1 and name not in loose}}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        aligned = name not in loose
        if name in pointers:
            signature[name] = f"*{pointers[name]}"
        elif name in numbers and name not in fixed:
            signature[name] = "i32" if numbers[name] < 1 << 31 else "i64"
            aligned = aligned and numbers[name] % ALIGNMENT == 0
        else:
            signature[name] = "constexpr"
            continue
        if aligned:
            attributes[(i,)] = [["tt.divisibility", ALIGNMENT]]
    values = {name: fixed.get(name) for name, kind in signature.items() if kind == "constexpr"}
    return ASTSource(kernel, signature, values, attributes)


def compile_call(call: KernelCall, types: dict[str, str], target: GPUTarget, **options: Any) -> CompiledKernel:
    """Compile a call's kernel, as `launch.py` lets Triton compile it.

    Args:
        options: further options of Triton's compiler.
    """
    return compile_source(make_source(call, types), call.num_warps, target, **options)


def compile_source(source: ASTSource, num_warps: int, target: GPUTarget, **options: Any) -> CompiledKernel:
    """Compile a kernel without the paths of this machine, which is what lines are told by."""
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        options = {"num_warps": num_warps, "enable_fp_fusion": False, **options}
        return triton.compile(source, target=target, options=options)
