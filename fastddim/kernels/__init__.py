"""The DDIM step as one fused Triton kernel, with the reference step's signature."""

from fastddim.kernels.launch import Workspace, ddim_step

__all__ = ["Workspace", "ddim_step"]
