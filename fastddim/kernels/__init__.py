"""The DDIM step as one fused Triton kernel, with the reference step's signature."""

from fastddim.kernels.draw import draw_normal
from fastddim.kernels.launch import KernelUnavailableError, Workspace, ddim_step
from fastddim.kernels.prepared import PreparedStep

__all__ = ["KernelUnavailableError", "PreparedStep", "Workspace", "ddim_step", "draw_normal"]
