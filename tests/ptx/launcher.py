"""Triton's driver over the machine: kernels launched on tensors in the host's memory run as compiled PTX.

A device's number is its compute capability times ten: 90 is a GPU of sm_90.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime.jit import JITFunction

from fastddim.kernels import draw, statistics, step
from fastddim.kernels import launch as kernel_launch
from ptx.execute import launch
from ptx.memory import Memory
from ptx.parse import PtxError
from ptx.parse import load as parse
from ptx.program import Program, prepare

# What a block may have at most on the smallest of the supported GPUs, sm_120.
_SHARED_BYTES = 99 * 1024


class Machine:
    """The device.

    Attributes:
        capability: the GPU's compute capability, times ten.
        seed: draws the order of blocks and warps, another one for each launch; None runs them in order.
        memory: what kernels may touch.
        launches: how many there were.
        edit: changes a kernel's PTX before it is loaded: a fault that is planted.
    """

    def __init__(self, capability: int, seed: int | None = None) -> None:
        self.capability, self.seed = capability, seed
        self.memory = Memory()
        self.launches = 0
        self.edit: Callable[[str], str] | None = None
        self._programs: dict[str, Program] = {}

    def load(self, ptx: str) -> Program:
        if self.edit is not None:
            ptx = self.edit(ptx)
        program = self._programs.get(ptx)
        if program is None:
            program = self._programs[ptx] = prepare(parse(ptx))
        return program

    def take(self, tensor: torch.Tensor) -> int:
        """Let kernels touch a tensor; returns its address."""
        address = _data_ptr(tensor)
        if tensor.numel():
            self.memory.add(address, span(tensor))
        return address

    def take_unwritten(self, tensor: torch.Tensor) -> None:
        """Let kernels write a tensor that nobody has, and only then read it."""
        if tensor.numel():
            region = self.memory.add(_data_ptr(tensor), span(tensor), written=False)
            # Other tensors will have this memory.
            weakref.finalize(tensor, self.memory.unwritten.pop, region, None)

    def launch(self, program: Program, grid: tuple[int, int, int], arguments: Sequence[Any], shared: int) -> None:
        """Run a kernel on tensors, numbers, and addresses of tensors that were taken."""
        values = [self.take(each) if isinstance(each, torch.Tensor) else int(each) for each in arguments]
        # To scratch memory, of which these kernels have none.
        values += [0] * (len(program.kernel.parameters) - len(values))
        seed = None if self.seed is None else self.seed + self.launches
        self.launches += 1
        launch(program, grid, values, shared, self.memory, seed)

    @contextmanager
    def installed(self, driver: GPUDriver | None = None) -> Iterator[None]:
        """Under Triton in this process: CPU tensors pass for a GPU's, and what kernels are given is taken.

        Args:
            driver: Triton's driver, which leads to this machine; by default one that loads the PTX, without an assembler.
        """

        def data_ptr(tensor: torch.Tensor) -> int:
            return _data_ptr(tensor) if tensor.is_meta else self.take(tensor)

        def empty_like(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = _empty_like(*args, **kwargs)
            if not tensor.is_meta and sys._getframe(1).f_globals["__name__"].startswith("fastddim.kernels."):
                self.take_unwritten(tensor)
            return tensor

        # What was compiled before runs on the driver of then.
        for module in (step, statistics, draw):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()
        before = triton.runtime.driver._active
        with pytest.MonkeyPatch.context() as patch, triton.knobs.compilation.scope(), triton.knobs.runtime.scope():
            patch.setattr(torch.Tensor, "data_ptr", data_ptr)
            patch.setattr(torch, "empty_like", empty_like)
            patch.setattr(kernel_launch, "_DEVICE_TYPES", ("cuda", "cpu"))
            # Those kept are bound to another target's code.
            patch.setattr(kernel_launch, "_ENTRIES", {})
            triton.knobs.compilation.disable_line_info = True
            if driver is None:
                triton.knobs.runtime.add_stages_inspection_hook = _stop_at_ptx
            triton.runtime.driver.set_active(driver or _Driver(self))
            try:
                yield
            finally:
                triton.runtime.driver._active = before


_data_ptr, _empty_like = torch.Tensor.data_ptr, torch.empty_like


def span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _stop_at_ptx(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str]:
    """Triton's hook for its stages, also called for the key of its cache: the binary is the PTX, no assembler runs."""
    if stages is not None:
        stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return "stop at PTX", "stop at PTX"


class _Driver(GPUDriver):
    """Triton's interface to a device; loads "binaries" that are PTX."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.utils = _Utils()
        self.launcher_cls = _Launch
        # A device's number is its capability, so that Triton keeps its kernels apart.
        self.get_current_device = lambda: machine.capability
        self.get_current_stream = lambda device: 0

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.machine.capability, 32)

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_BYTES}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """A module, a function, registers, spilled bytes and the largest block."""
        return None, (binary.decode(), shared), 0, 0, 1024


class _Launch:
    """Triton's launcher of one signature, on the machine that is installed when it is called."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._kinds = list(source.signature.values())
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise PtxError(f"{metadata.name}: asks for scratch memory, which the machine does not give")

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, metadata: Any, launch_metadata: Any, enter: Any,
        leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        machine = triton.runtime.driver.active.machine
        # Loaded here, as a kernel that Triton cannot load is taken for one that does not compile.
        ptx, shared = function
        given = [each for each, kind in zip(arguments, self._kinds, strict=True) if kind != "constexpr"]
        machine.launch(machine.load(ptx), (x, y, z), given, shared)
