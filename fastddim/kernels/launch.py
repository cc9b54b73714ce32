"""The checking launcher of the fused step: `ddim_step` as the reference has it, on the device, in one launch.

The first call with new shapes, dtypes or options checks them, plans the launches and compiles. Those that follow look
the plan up and hand addresses to the compiled kernel, past Triton's own argument processing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

from fastddim.coefficients import Coefficient, StepTable
from fastddim.config import DynamicThreshold, Limit
from fastddim.kernels.plan import ARGUMENT_OF, STEP_POINTERS, KernelCall, Plan, StepShape, make_plan
from fastddim.step import check_step_arguments, num_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TABLE_DTYPES = (torch.float64, torch.float32)

# A HIP device has the same type.
_DEVICE_TYPES = ("cuda",)
_MAX_KEPT = 1024
_INT32_RANGE = 1 << 31


class KernelUnavailableError(RuntimeError):
    """The kernel cannot be compiled for, or loaded on, this device."""


class Workspace:
    """Scratch memory of steps that follow each other on one stream: cleared once, then left clear by every step.

    Give each stream, and each captured graph, one of its own. Without one, a step whose plan needs scratch memory
    (statistics of large samples, an index that several programs read and one moves on) allocates and clears it.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def zeros(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """At least `size` zeros, as long as whoever writes to them leaves them zero."""
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size or kept.device != device:
            kept = self._kept[name] = torch.zeros(size, dtype=dtype, device=device)
        return kept


class _Launcher:
    """A kernel call with its compiled code, for each combination of aligned addresses."""

    def __init__(self, call: KernelCall) -> None:
        self.call = call
        self.tail = (*call.numbers, *call.constants.values())
        self._compiled: dict[tuple[bool, ...], tuple[Any, Any, Any]] = {}

    def __call__(self, tensors: Sequence[torch.Tensor | None], device: torch.device) -> None:
        call = self.call
        if _interpreted():
            call.kernel[call.grid](*tensors, *call.numbers, **call.constants)
            return
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        run, function, metadata = self.compiled(addresses, tensors)
        hooks = triton.knobs.runtime
        run(
            *call.grid, 1, driver.active.get_current_stream(device.index), function, metadata, None,
            hooks.launch_enter_hook, hooks.launch_exit_hook, *addresses, *self.tail,
        )  # fmt: skip

    def compiled(self, addresses: Sequence[int | None], tensors: Sequence[torch.Tensor | None]) -> tuple[Any, Any, Any]:
        """Triton's launch function, the kernel's handle and its metadata, for tensors aligned as these are."""
        aligned = tuple([address is None or not address & 15 for address in addresses])
        compiled = self._compiled.get(aligned)
        if compiled is None:
            compiled = self._compiled[aligned] = self._compile(tensors)
        return compiled

    def _compile(self, tensors: Sequence[torch.Tensor | None]) -> tuple[Any, Any, Any]:
        call = self.call
        try:
            compiled = call.kernel.warmup(
                *tensors,
                *call.numbers,
                **call.constants,
                grid=call.grid,
                num_warps=call.num_warps,
                enable_fp_fusion=False,
            )
            if hasattr(compiled, "result"):
                compiled = compiled.result()
            # `run` loads the binary, which is what sets `function`.
            run = compiled.run
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[-1]
            raise KernelUnavailableError(
                f"the fused step does not compile here: {type(error).__name__}: {reason}"
            ) from error
        return run, compiled.function, compiled.packed_metadata


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Entry:
    """What the arguments' shapes, dtypes, strides and options lead to.

    Attributes:
        plan: the launches.
        memory_format: of the results.
        copied: which of `output`, `sample` and `noise` have strides that the kernel does not take.
        rescale: whether there is a guidance rescale.
        launchers: the plan's calls with their compiled code.
    """

    plan: Plan
    memory_format: torch.memory_format
    copied: tuple[bool, bool, bool]
    rescale: bool
    launchers: tuple[_Launcher, ...]


_ENTRIES: dict[Any, Entry] = {}
_SCALARS: dict[tuple[float, torch.device], torch.Tensor] = {}


def ddim_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    *,
    limit: Limit = None,
    limit_values: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    first_row: torch.Tensor | None = None,
    guidance_scale: Coefficient | None = None,
    guidance_rescale: Coefficient = 0.0,
    cond_first: bool = False,
    out: torch.Tensor | None = None,
    return_x0: bool = True,
    model_input: torch.Tensor | None = None,
    advance: bool = False,
    timesteps: torch.Tensor | None = None,
    next_timestep: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`fastddim.reference.ddim_step` fused: the same arguments, results and errors, in one launch.

    What differs:
        - float32, float16 and bfloat16 tensors, in any combination; arithmetic is float32, a `table` tensor is
          float64 (or float32, which makes half-precision results a little less exact).
        - No gradients.
        - `model_output` and `model_input` may be channels-last beside a contiguous state; where everything is
          channels-last, and no seeds are given, so are the results. Other strides are copied first.
        - `out`, `model_input` and what moves on may not share memory with anything else, except `out` with `sample`, or
          with an unguided `model_output`.
        - An index tensor is not read on the host: a row outside the table gives NaN.
        - Samples of more than 16,384 elements take two more launches with dynamic thresholding, and one more with
          `guidance_rescale`.

    Args:
        workspace: scratch memory for the steps of one stream; allocated and cleared for each call by default.

    Raises:
        TypeError, ValueError, IndexError: as the reference, and for what differs.
        KernelUnavailableError: the kernel does not compile for this device.
    """
    request = assemble(
        model_output, sample, table, step, limit, limit_values, noise, seeds, first_row, guidance_scale,
        guidance_rescale, cond_first, out, return_x0, model_input, advance, timesteps, next_timestep, workspace,
    )  # fmt: skip
    if sample.numel():
        request.run()
    return request.x_next, request.x0


class Request(NamedTuple):
    """A checked step: what to launch over which tensors.

    Attributes:
        entry: the plan and its compiled code.
        tensors: of `STEP_POINTERS`.
        counters: scratch memory of the launches before the step.
        x_next, x0: the results.
    """

    entry: Entry
    tensors: tuple[torch.Tensor | None, ...]
    counters: torch.Tensor | None
    x_next: torch.Tensor
    x0: torch.Tensor | None

    def run(self) -> None:
        """Launch."""
        device = self.x_next.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            self._launch(device)
            return
        with torch.cuda.device(device):
            self._launch(device)

    def _launch(self, device: torch.device) -> None:
        launchers = self.entry.launchers
        if len(launchers) > 1:
            slots = {**dict(zip(STEP_POINTERS, self.tensors, strict=True)), "counters": self.counters}
            for launcher in launchers[:-1]:
                launcher([slots[name] for name in launcher.call.pointers], device)
        launchers[-1](self.tensors, device)


def assemble(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    limit: Limit,
    limit_values: torch.Tensor | None,
    noise: torch.Tensor | None,
    seeds: torch.Tensor | None,
    first_row: torch.Tensor | None,
    guidance_scale: Coefficient | None,
    guidance_rescale: Coefficient,
    cond_first: bool,
    out: torch.Tensor | None,
    return_x0: bool,
    model_input: torch.Tensor | None,
    advance: bool,
    timesteps: torch.Tensor | None,
    next_timestep: torch.Tensor | None,
    workspace: Workspace | None,
) -> Request:
    """Check `ddim_step`'s arguments, allocate its results and gather what its kernels take."""
    try:
        key = (
            _spec(model_output), _spec(sample), _spec(noise), _spec(seeds), _spec(first_row), _spec(out),
            _spec(model_input), _spec(timesteps), _spec(next_timestep),
            _spec(table) if isinstance(table, torch.Tensor) else len(table),
            _spec(step) if isinstance(step, torch.Tensor) else type(step),
            _spec(guidance_scale) if isinstance(guidance_scale, torch.Tensor) else type(guidance_scale),
            _spec(guidance_rescale)
            if isinstance(guidance_rescale, torch.Tensor)
            else (type(guidance_rescale), guidance_rescale != 0),
            limit, _spec(limit_values), cond_first, advance,
        )  # fmt: skip
        entry = _ENTRIES.get(key)
    except (AttributeError, TypeError):
        # Something is no tensor: the check below says which argument.
        key, entry = None, None
    if entry is None:
        entry = make_entry(
            model_output, sample, table, step, limit=limit, limit_values=limit_values, noise=noise, seeds=seeds,
            first_row=first_row, guidance_scale=guidance_scale, guidance_rescale=guidance_rescale,
            cond_first=cond_first, out=out, model_input=model_input, advance=advance, timesteps=timesteps,
            next_timestep=next_timestep,
        )  # fmt: skip
        if len(_ENTRIES) >= _MAX_KEPT:
            _ENTRIES.clear()
        _ENTRIES[key] = entry
    _check_values(model_output, sample, table, step, noise, seeds)

    device = sample.device
    copy_output, copy_sample, copy_noise = entry.copied
    x_next = torch.empty_like(sample, memory_format=entry.memory_format) if out is None else out
    x0 = torch.empty_like(x_next) if return_x0 else None
    if isinstance(table, StepTable):
        table, index = table.on(device)
    else:
        index = None
    if not isinstance(step, torch.Tensor):
        step = torch.full((), step, device=device) if index is None else index[step]
    plan = entry.plan
    tickets = statistics = counters = None
    if plan.tickets or plan.statistics:
        scratch = Workspace() if workspace is None else workspace
        if plan.tickets:
            tickets = scratch.zeros("tickets", plan.tickets, torch.int32, device)
        if plan.statistics:
            statistics = scratch.zeros("statistics", plan.statistics, torch.float32, device)
            counters = scratch.zeros("counters", plan.counters, torch.int32, device)
    tensors = (
        model_output.contiguous() if copy_output else model_output,
        sample.contiguous() if copy_sample else sample,
        table,
        step,
        None if guidance_scale is None else _scalar_tensor(guidance_scale, device),
        _scalar_tensor(guidance_rescale, device) if entry.rescale else None,
        limit_values,
        statistics,
        noise.contiguous() if copy_noise and noise is not None else noise,
        None if seeds is None else seeds.contiguous(),
        None if first_row is None else first_row.contiguous(),
        x_next,
        x0,
        model_input,
        timesteps,
        next_timestep,
        tickets,
    )
    if out is not None or model_input is not None or advance:
        _check_overlaps(tensors, advance)
    return Request(entry, tensors, counters, x_next, x0)


def make_entry(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    *,
    limit: Limit,
    cond_first: bool,
    **optional: Any,
) -> Entry:
    """Check the arguments of `ddim_step` (`optional` has its other tensors and numbers), and plan.

    Raises:
        TypeError, ValueError, IndexError: as `ddim_step`.
    """
    check_step_arguments(model_output, sample, table, step, limit=limit, **optional)
    noise, seeds, out, model_input = (optional[name] for name in ("noise", "seeds", "out", "model_input"))
    guidance_scale, guidance_rescale = optional["guidance_scale"], optional["guidance_rescale"]
    if sample.device.type not in _DEVICE_TYPES and not _interpreted():
        raise ValueError(
            f"sample: on {sample.device}; the fused step needs a GPU: move it, or pass backend='reference'"
        )
    states = {"sample": sample, "model_output": model_output, "noise": noise, "out": out, "model_input": model_input}
    for name, tensor in states.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name}: dtype {tensor.dtype}; the fused step takes float32, float16 and bfloat16: convert it, or pass"
                " backend='reference'"
            )
    if isinstance(table, torch.Tensor) and (table.dtype not in _TABLE_DTYPES or not table.is_contiguous()):
        raise ValueError(
            f"table: {table.dtype} with strides {table.stride()}; pass contiguous rows of float64 (or float32), as"
            " StepTable.tensor(device) has them"
        )
    # One layout for all, whatever it is, needs no index arithmetic. Drawn noise counts elements in C order.
    shared_layout = seeds is None and all(t is None or _is_channels_last(t) for t in states.values())
    for name, tensor in (("out", out), ("model_input", model_input)):
        if tensor is None or tensor.is_contiguous() or shared_layout:
            continue
        if name == "out" or not _is_channels_last(tensor):
            kinds = "contiguous" if name == "out" else "contiguous or channels-last"
            raise ValueError(f"{name}: strides {tensor.stride()}; pass a {kinds} tensor, as it is written in place")
    for name, tensor in (("step", step), *((name, optional[name]) for name in ("timesteps", "next_timestep"))):
        if isinstance(tensor, torch.Tensor) and not tensor.is_contiguous():
            raise ValueError(f"{name}: strides {tensor.stride()}; pass a contiguous tensor")
    output_channels_last = not shared_layout and _is_channels_last(model_output)
    input_channels_last = not shared_layout and model_input is not None and _is_channels_last(model_input)
    rescale = isinstance(guidance_rescale, torch.Tensor) or guidance_rescale != 0
    elements = math.prod(sample.shape[1:])
    indexed = output_channels_last or input_channels_last or rescale
    if elements >= _INT32_RANGE and (indexed or isinstance(limit, DynamicThreshold)):
        raise ValueError(
            f"sample: {elements} elements each; with channels-last tensors, guidance_rescale or dynamic thresholding pass"
            " fewer than 2**31"
        )
    shape = StepShape(
        batch=sample.shape[0],
        elements=elements,
        num_steps=num_rows(table),
        channels=sample.shape[1] if sample.ndim > 1 else 1,
        guided=guidance_scale is not None,
        cond_first=bool(cond_first),
        scale_per_sample=_is_per_sample(guidance_scale),
        rescale=rescale,
        rescale_per_sample=_is_per_sample(guidance_rescale),
        row_per_sample=_is_per_sample(step),
        limit=limit,
        limit_on_device=optional["limit_values"] is not None,
        drawn=seeds is not None,
        output_channels_last=output_channels_last,
        input_channels_last=input_channels_last,
        advance=bool(optional["advance"]),
    )
    plan = make_plan(shape)
    copied = tuple(
        tensor is not None
        and not (shared_layout or tensor.is_contiguous())
        and not (name == "model_output" and output_channels_last)
        for name, tensor in (("model_output", model_output), ("sample", sample), ("noise", noise))
    )
    return Entry(
        plan=plan,
        memory_format=torch.preserve_format if shared_layout else torch.contiguous_format,
        copied=(copied[0], copied[1], copied[2]),
        rescale=rescale,
        launchers=tuple(_Launcher(call) for call in plan.calls),
    )


def _spec(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.stride(), tensor.device)


def _is_per_sample(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 1


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """Channels-last, and not contiguous as well, as tensors with one channel or one pixel are."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.is_contiguous() or tensor.ndim not in formats:
        return False
    return tensor.is_contiguous(memory_format=formats[tensor.ndim])


def _check_values(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    noise: torch.Tensor | None,
    seeds: torch.Tensor | None,
) -> None:
    """What a kept entry says nothing of: the number of the step, and whether gradients are wanted."""
    if not isinstance(step, torch.Tensor):
        if not 0 <= step < len(table):
            raise IndexError(f"step: {step} is outside the table of {len(table)} steps")
        if noise is None and seeds is None and isinstance(table, StepTable) and table.rows[step].noise_scale != 0:
            raise ValueError(f"noise: None, but step {step} adds noise; pass a standard normal tensor, or seeds")
    if torch.is_grad_enabled() and (
        sample.requires_grad or model_output.requires_grad or (noise is not None and noise.requires_grad)
    ):
        raise ValueError(
            "sample, model_output, noise: the fused step has no gradients: call it under torch.no_grad(), detach them, or"
            " pass backend='reference'"
        )


def _scalar_tensor(value: Coefficient, device: torch.device) -> torch.Tensor:
    """A number as a kept `[1]` tensor: copying one to a device is a transfer, which a graph could not hold."""
    if isinstance(value, torch.Tensor):
        return value.contiguous()
    kept = _SCALARS.get((value, device))
    if kept is None:
        if len(_SCALARS) >= _MAX_KEPT:
            _SCALARS.clear()
        with torch.inference_mode(False):
            kept = _SCALARS[value, device] = torch.tensor([value], dtype=torch.float32, device=device)
    return kept


_WRITTEN = ("next", "input", "step", "next_timestep")


def _check_overlaps(tensors: Sequence[torch.Tensor | None], advance: bool) -> None:
    """Refuse results that share memory with something else, but for `out` on a state that is read element for element."""
    spans = [
        (name, start := tensor.data_ptr(), start + tensor.nbytes, tensor.numel())
        for name, tensor in zip(STEP_POINTERS, tensors, strict=True)
        if tensor is not None
    ]
    for name, start, end, size in spans:
        if name not in _WRITTEN or (name == "step" and not advance):
            continue
        for other, other_start, other_end, other_size in spans:
            if start >= other_end or other_start >= end or other == name:
                continue
            # Guided, there are two halves of outputs to one of results; of half the precision they have the same span.
            if name == "next" and other in ("sample", "output") and (start, end, size) == (
                other_start, other_end, other_size,
            ):  # fmt: skip
                continue
            first, second = ARGUMENT_OF.get(name, name), ARGUMENT_OF.get(other, other)
            raise ValueError(f"{first}: shares memory with {second}; pass memory of its own")
