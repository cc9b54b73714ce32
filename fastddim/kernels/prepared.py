"""A step bound to its buffers: for loops, where only the model's output and the row change from step to step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from triton.runtime import driver

from fastddim.coefficients import StepTable
from fastddim.kernels.launch import Workspace, assemble, launch_hooks, make_dependent, spec
from fastddim.kernels.plan import STEP_POINTERS
from fastddim.step import StepOptions

# Places in the list of arguments of Triton's launch function.
_STREAM, _HOOKS = 3, slice(6, 9)
_OUTPUT = 9 + STEP_POINTERS.index("output")
_STEP = STEP_POINTERS.index("step")
_ROW = 9 + _STEP


class PreparedStep:
    """`ddim_step` with everything but `model_output` and `step` given already, at the cost of a bare launch.

    It holds references to the tensors it was made with; do not move or resize them. Each call overwrites `x_next` and
    `x0`, so use it from one thread.

    Attributes:
        x_next: `[B, ...]` the next state; `out`, where that was given.
        x0: `[B, ...]` the limited prediction of x0, or None.
    """

    def __init__(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        table: StepTable,
        options: StepOptions,
        *,
        dependent_launch: bool = False,
    ) -> None:
        """Check and plan. Arguments as `fastddim.kernels.launch.ddim_step`'s; nothing is launched.

        Args:
            model_output: a tensor of the shape, dtype and strides that all calls' will have.
            options: without `advance`; the row is given to each call.
            dependent_launch: start while the model's last kernel ends, and wait for it there: NVIDIA's programmatic dependent
                launch, from compute capability 9.0 on. Without effect elsewhere, and on the results everywhere. Not measured
                on a GPU yet.

        Raises:
            TypeError, ValueError: as `ddim_step`; a stochastic table without noise or seeds.
        """
        if not isinstance(table, StepTable):
            raise TypeError(f"table: {type(table).__name__}; pass a StepTable")
        if options.noise is None and options.seeds is None and table.stochastic:
            raise ValueError("noise: None, but the table adds noise; pass a standard normal tensor, or seeds")
        if options.workspace is None:
            options = replace(options, workspace=Workspace())
        # The last row adds the least noise; which row this is does not matter to the plan.
        step = next((k for k, row in enumerate(table.rows) if row.noise_scale == 0), 0)
        request = assemble(model_output, sample, table, step, options)
        self._request = request._replace(entry=make_dependent(request.entry)) if dependent_launch else request
        self.x_next, self.x0 = self._request.x_next, self._request.x0
        self._spec = spec(model_output)
        self._rows = table.on(sample.device)[1]
        self._in_place = options.guidance is None and not self._request.entry.reordered
        self._contiguous = model_output.is_contiguous()
        self._out, self._out_end = _span(self.x_next)
        self._input, self._input_end = (0, 0) if options.model_input is None else _span(options.model_input)
        self._nbytes = model_output.nbytes
        self._fast = self._bind() if self._can_bind() else None

    def fits(self, model_output: torch.Tensor) -> bool:
        """Whether `model_output` has the shape, dtype, strides and device that this step was prepared for."""
        return spec(model_output) == self._spec

    def __call__(self, model_output: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take the step: `(x_next, x0)`, the same tensors each time.

        Raises:
            ValueError: a `model_output` unlike the first one, or sharing memory with what the step writes.
            IndexError: a `step` outside the table.
        """
        # `fits`, without the cost of a call, or of strides where there is nothing to them.
        shape, dtype, strides, device = self._spec
        if (
            model_output.shape != shape
            or model_output.dtype is not dtype
            or model_output.device != device
            or (not model_output.is_contiguous() if self._contiguous else model_output.stride() != strides)
        ):
            raise ValueError(
                f"model_output: {model_output.dtype} {tuple(model_output.shape)} on {model_output.device} with strides"
                f" {model_output.stride()}; this step was prepared for {dtype} {tuple(shape)} on {device} with {strides}"
            )
        if step < 0:
            raise IndexError(f"step: {step} is outside the table of {len(self._rows)} steps")
        address = model_output.data_ptr()
        end = address + self._nbytes
        if address < self._out_end and self._out < end and not (self._in_place and address == self._out):
            raise ValueError("model_output: shares memory with out; pass memory of its own")
        if address < self._input_end and self._input < end:
            raise ValueError("model_output: shares memory with model_input; pass memory of its own")
        if self._fast is None or address & 15:
            return self._slowly(model_output, step)
        run, arguments, rows, index, kernel, grid, current_stream = self._fast
        arguments[_STREAM] = stream = current_stream(index)
        arguments[_HOOKS] = launch_hooks(kernel, grid, stream)
        arguments[_OUTPUT], arguments[_ROW] = address, rows[step]
        run(*arguments)
        return self.x_next, self.x0

    def _slowly(self, model_output: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = model_output.contiguous() if self._request.entry.copied[0] else model_output
        given = self._request.tensors
        tensors = (output, *given[1:_STEP], self._rows[step], *given[_STEP + 1 :])
        self._request._replace(tensors=tensors).run()
        return self.x_next, self.x0

    def _can_bind(self) -> bool:
        entry, device = self._request.entry, self.x_next.device
        plain = len(entry.launchers) == 1 and not any(entry.copied)
        output = self._request.tensors[0]
        aligned = output is not None and not output.data_ptr() & 15
        # With several devices the current one may be another at any call.
        one_device = device.type != "cuda" or torch.cuda.device_count() == 1
        return plain and aligned and one_device and bool(self._nbytes) and not triton.knobs.runtime.interpret

    def _bind(self) -> tuple[Any, ...]:
        request = self._request
        launcher = request.entry.launchers[-1]
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in request.tensors]
        run, function, metadata, kernel = launcher.compiled(addresses, request.tensors)
        rows = tuple(row.data_ptr() for row in self._rows)
        # In the order of Triton's launch function: grid, stream, function, metadata, launch metadata, hooks, arguments.
        arguments = [*launcher.call.grid, 1, None, function, metadata, None, None, None, *addresses, *launcher.tail]
        index, current_stream = self.x_next.device.index, driver.active.get_current_stream
        return run, arguments, rows, index, kernel, launcher.call.grid, current_stream


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
