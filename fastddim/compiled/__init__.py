"""The reference's step as one pass over memory: its maths through Inductor, for CPUs."""

from fastddim.compiled.code import CompilerMissingError
from fastddim.compiled.step import PreparedStep, can_prepare, ddim_step, draw_normal, is_traced, step_with_row

__all__ = [
    "CompilerMissingError",
    "PreparedStep",
    "can_prepare",
    "ddim_step",
    "draw_normal",
    "is_traced",
    "step_with_row",
]
