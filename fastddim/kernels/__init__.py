"""The DDIM step as one fused Triton kernel: what `fastddim.ddim_step` launches on a GPU."""

from fastddim.kernels.draw import draw_normal
from fastddim.kernels.launch import KernelUnavailableError, Workspace
from fastddim.kernels.prepared import PreparedStep

__all__ = ["KernelUnavailableError", "PreparedStep", "Workspace", "draw_normal"]
