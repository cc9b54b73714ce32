"""A machine that executes the compiled PTX of kernels on tensors' own memory: `docs/testing.md`."""

from ptx.execute import launch
from ptx.memory import Memory
from ptx.parse import Kernel, PtxError, load
from ptx.program import Program, prepare

__all__ = ["Kernel", "Memory", "Program", "PtxError", "launch", "load", "prepare"]
