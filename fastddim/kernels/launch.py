"""The checking launcher of the fused step: `ddim_step` as the reference has it, on the device, in one launch.

The first call with new shapes, dtypes or options checks them, plans the launches and compiles; what follows looks the
plan up and hands addresses to the compiled kernel, past Triton's own argument processing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

from fastddim.arguments import check_step_arguments
from fastddim.coefficients import Coefficient, StepTable
from fastddim.config import Clip, DynamicThreshold, Limit
from fastddim.kernels.statistics import BINS, SLOTS, histogram_kernel, rescale_kernel
from fastddim.kernels.step import ddim_step_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The largest sample whose statistics one program takes without spilling registers, on every supported Triton.
WHOLE_SAMPLE = 16384
_STATISTICS_BLOCK = 4096
_MAX_GRID_Y = 65535
# Programs enough for a few waves of any current GPU; below that, smaller blocks.
_ENOUGH_PROGRAMS = 512
_MAX_KEPT = 1024
_INT32 = 1 << 31


class Workspace:
    """Scratch memory of steps that follow each other on one stream: cleared once, then left clear by every step.

    Give each stream, and each captured graph, one of its own. Without one a step allocates and clears its own memory,
    which is a launch more where statistics of large samples, or an index that moves on, need it.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def zeros(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """`[>= size]` zeros, as long as whoever writes to them leaves them zero."""
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size or kept.device != device:
            kept = self._kept[name] = torch.zeros(size, dtype=dtype, device=device)
        return kept


class Variant(NamedTuple):
    """Which kernel a plan launches, and how: what a test asserts and a budget lists."""

    tier: str
    """`"elements"`, `"whole"` (a sample in a program) or `"statistics"` (launches before the step)."""
    block: int
    num_warps: int
    flat: bool
    """The batch is treated as one sample: no sample differs from another, and alignment does not depend on its size."""


@dataclass
class Launch:
    """One kernel of a plan.

    Attributes:
        kernel: the jitted function.
        pointers: names of its pointer arguments, in order.
        numbers: its other runtime arguments, in order.
        constants: its compile-time arguments.
        grid: two dimensions.
        num_warps: of a program.
    """

    kernel: Any
    pointers: tuple[str, ...]
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    grid: tuple[int, int]
    num_warps: int
    compiled: dict[tuple[bool, ...], tuple[Any, Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tail = (*self.numbers, *self.constants.values())

    def run(self, tensors: Sequence[torch.Tensor | None], device_index: int | None) -> None:
        """Launch over `tensors`, one for each of `pointers`, on the device's current stream."""
        if _interpreted():
            self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
            return
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        aligned = tuple(address is None or not address & 15 for address in addresses)
        entry = self.compiled.get(aligned)
        if entry is None:
            entry = self.compiled[aligned] = self._compile(tensors)
        run, function, metadata = entry
        active = driver.active
        stream = active.get_current_stream(device_index)
        hooks = triton.knobs.runtime
        run(
            *self.grid, 1, stream, function, metadata, None, hooks.launch_enter_hook, hooks.launch_exit_hook,
            *addresses, *self.tail,
        )  # fmt: skip

    def _compile(self, tensors: Sequence[torch.Tensor | None]) -> tuple[Any, Any, Any]:
        compiled = self.kernel.warmup(
            *tensors, *self.numbers, **self.constants, grid=self.grid, num_warps=self.num_warps, enable_fp_fusion=False
        )
        if hasattr(compiled, "result"):
            compiled = compiled.result()
        # `run` loads the binary, which is what sets `function`.
        run = compiled.run
        return run, compiled.function, compiled.packed_metadata


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


STEP_POINTERS = (
    "output", "sample", "table", "step", "guidance", "rescale", "statistics", "noise", "seeds", "first_row",
    "next", "x0", "input", "timesteps", "next_timestep", "tickets",
)  # fmt: skip
_RESCALE_POINTERS = ("output", "guidance", "rescale", "statistics", "counters")
_HISTOGRAM_POINTERS = ("sample", "output", "table", "step", "guidance", "statistics", "counters")


@dataclass(frozen=True)
class StepShape:
    """All that a plan depends on: no tensors, so that plans can be made and compiled for GPUs that are not there.

    Attributes:
        batch, elements: samples, and elements of each.
        channels: of the samples, for channels-last tensors.
        guided, cond_first, scale_per_sample, rescale, rescale_per_sample, row_per_sample: as in `ddim_step`.
        limit: of x0.
        noise: `"none"`, `"given"` or `"seeds"`.
        output_channels_last, input_channels_last: the layout of the model's output and of its next input.
        advance: whether the index moves on.
    """

    batch: int
    elements: int
    channels: int = 1
    guided: bool = False
    cond_first: bool = False
    scale_per_sample: bool = False
    rescale: bool = False
    rescale_per_sample: bool = False
    row_per_sample: bool = False
    limit: Limit = None
    noise: str = "none"
    output_channels_last: bool = False
    input_channels_last: bool = False
    advance: bool = False
    num_steps: int = 1


@dataclass(frozen=True)
class Plan:
    """The launches of a step, and the sizes of the scratch memory they need."""

    variant: Variant
    launches: tuple[Launch, ...]
    tickets: int
    counters: int
    statistics: int


def make_plan(shape: StepShape) -> Plan:
    """Choose the tier, the blocks and the constants for a step."""
    batch, n = shape.batch, shape.elements
    limit_name, limit_range, ratio = _limit_constants(shape.limit)
    needs_statistics = limit_name == "threshold" or shape.rescale
    whole = needs_statistics and n <= WHOLE_SAMPLE
    channels_last = shape.output_channels_last or shape.input_channels_last
    per_sample = (
        shape.scale_per_sample or shape.row_per_sample or shape.noise == "seeds" or needs_statistics or channels_last
    )
    flat = not per_sample or batch == 1
    if flat and not channels_last:
        batch, n = 1, batch * n
    if whole:
        block = max(64, triton.next_power_of_2(n))
        num_warps = min(16, max(1, block // 512))
    else:
        block, num_warps = _element_block(batch, n)
    blocks = 1 if whole else triton.cdiv(n, block)
    sample_axis, grid = _grid(batch, blocks)
    readers = blocks * (1 if shape.row_per_sample else batch)
    guidance = dict(COND_FIRST=shape.cond_first, SCALE_PER_SAMPLE=shape.scale_per_sample)
    constants: dict[str, Any] = dict(
        GUIDED=shape.guided,
        **guidance,
        RESCALE_PER_SAMPLE=shape.rescale_per_sample,
        ROW_PER_SAMPLE=shape.row_per_sample,
        LIMIT=limit_name,
        RANGE=limit_range,
        RATIO=ratio,
        WHOLE=whole,
        SAMPLE_AXIS=sample_axis,
        OUTPUT_CHANNELS_LAST=shape.output_channels_last,
        INPUT_CHANNELS_LAST=shape.input_channels_last,
        ADVANCE=shape.advance,
        INTERPRETED=_interpreted(),
        EVEN=not whole and n % block == 0,
        BLOCK=block,
    )
    numbers = (n, batch, shape.num_steps, shape.channels, shape.batch)
    step = Launch(ddim_step_kernel, STEP_POINTERS, numbers, constants, grid, num_warps)
    tickets = (shape.batch if shape.row_per_sample else 1) if shape.advance and readers > 1 else 0
    if whole or not needs_statistics:
        return Plan(Variant("whole" if whole else "elements", block, num_warps, flat), (step,), tickets, 0, 0)

    block, blocks = _STATISTICS_BLOCK, triton.cdiv(n, _STATISTICS_BLOCK)
    sample_axis, grid = _grid(batch, blocks)
    maximum = limit_range if limit_name == "threshold" else 1.0
    shift = _bin_shift(maximum)
    row_size = SLOTS.value + BINS.value + (1 << shift) if limit_name == "threshold" else SLOTS.value
    layout = dict(SAMPLE_AXIS=sample_axis, OUTPUT_CHANNELS_LAST=shape.output_channels_last, BLOCK=block)
    launches = []
    if shape.rescale:
        rescale = dict(**guidance, RESCALE_PER_SAMPLE=shape.rescale_per_sample, **layout)
        rescale_numbers = (n, batch, shape.channels, row_size)
        launches.append(Launch(rescale_kernel, _RESCALE_POINTERS, rescale_numbers, rescale, grid, 8))
    if limit_name == "threshold":
        histogram_numbers = (n, batch, shape.num_steps, shape.channels, row_size, shift)
        for refine in (False, True):
            histogram = dict(
                REFINE=refine,
                GUIDED=shape.guided,
                RESCALED=shape.rescale,
                **guidance,
                ROW_PER_SAMPLE=shape.row_per_sample,
                RATIO=ratio,
                MAX_VALUE=maximum,
                **layout,
            )
            launches.append(Launch(histogram_kernel, _HISTOGRAM_POINTERS, histogram_numbers, histogram, grid, 8))
    statistics = 2 * batch + (4 * batch * blocks if shape.rescale else 0)
    variant = Variant("statistics", step.constants["BLOCK"], num_warps, flat)
    return Plan(variant, (*launches, step), tickets, batch * row_size, statistics)


def _limit_constants(limit: Limit) -> tuple[str, float, float]:
    if limit is None:
        return "none", 1.0, 1.0
    if isinstance(limit, Clip):
        return "clip", float(limit.range), 1.0
    if limit.max_value > 1:
        return "threshold", float(limit.max_value), float(limit.ratio)
    # The quantile is clamped to at most max_value last, so it cannot matter.
    return ("clip" if limit.max_value == 1 else "fixed"), float(limit.max_value), 1.0


def _element_block(batch: int, n: int) -> tuple[int, int]:
    block = 2048
    while block > 256 and (batch * triton.cdiv(n, block) < _ENOUGH_PROGRAMS or n <= block // 2):
        block //= 2
    return min(block, max(64, triton.next_power_of_2(n))), 2


def _grid(batch: int, blocks: int) -> tuple[int, tuple[int, int]]:
    """Which axis counts the samples: the second one, which is the short one, unless there are too many."""
    return (1, (blocks, batch)) if batch <= _MAX_GRID_Y else (0, (batch, blocks))


def _bin_shift(maximum: float) -> int:
    """Bins wide enough for all bit patterns of (1, maximum]."""
    bits = int(torch.tensor(maximum, dtype=torch.float32).view(torch.int32))
    return max(0, math.ceil(math.log2(max(1, bits - 0x3F800000))) - int(math.log2(BINS.value)))


# A CUDA and a HIP device have the same type.
_DEVICE_TYPES = ("cuda",)
_SCALARS: dict[tuple[float, torch.device], torch.Tensor] = {}


def _device_scalar(value: float, device: torch.device) -> torch.Tensor:
    """A number as a kept `[1]` tensor: copying one to a device is a transfer, which a graph could not hold."""
    kept = _SCALARS.get((value, device))
    if kept is None:
        if len(_SCALARS) >= _MAX_KEPT:
            _SCALARS.clear()
        with torch.inference_mode(False):
            kept = _SCALARS[value, device] = torch.tensor([value], dtype=torch.float32, device=device)
    return kept


def _spec(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.stride(), tensor.device)


def ddim_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    *,
    limit: Limit = None,
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

    Beyond the reference:
        - float32, float16 and bfloat16 tensors, in any combination; arithmetic is float32; `table` is float32.
        - No gradients.
        - `model_output` and `model_input` may be channels-last beside a contiguous state; where everything is
          channels-last, and no seeds are given, so are the results. Other strides are copied first.
        - `out`, `model_input` and x0 may not share memory with each other or with an input, except `out` with `sample`.
        - An index tensor is not read on the host: a row outside the table gives NaN.
        - Samples of more than 16,384 elements take three launches with dynamic thresholding, one more with
          `guidance_rescale`.

    Args:
        workspace: scratch memory for the steps of one stream; allocated and cleared for each call by default.

    Raises:
        TypeError, ValueError, IndexError: as the reference; and for what this kernel cannot do.
    """
    try:
        key = (
            _spec(model_output),
            _spec(sample),
            _spec(table) if isinstance(table, torch.Tensor) else len(table),
            _spec(step) if isinstance(step, torch.Tensor) else None,
            _spec(noise),
            _spec(seeds),
            _spec(first_row),
            _spec(guidance_scale) if isinstance(guidance_scale, torch.Tensor) else guidance_scale is not None,
            _spec(guidance_rescale) if isinstance(guidance_rescale, torch.Tensor) else guidance_rescale != 0,
            _spec(out),
            _spec(model_input),
            _spec(timesteps),
            _spec(next_timestep),
            limit,
            cond_first,
            advance,
        )
        entry = _ENTRIES.get(key)
    except (AttributeError, TypeError):
        # Something that is no tensor: the check says which argument it is.
        entry, key = None, None
    arguments = dict(
        noise=noise,
        seeds=seeds,
        first_row=first_row,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        out=out,
        model_input=model_input,
        advance=advance,
        timesteps=timesteps,
        next_timestep=next_timestep,
    )
    if entry is None:
        check_step_arguments(model_output, sample, table, step, **arguments)
        entry = _make_entry(model_output, sample, table, step, limit, cond_first, arguments)
        if len(_ENTRIES) >= _MAX_KEPT:
            _ENTRIES.clear()
        _ENTRIES[key] = entry
    _check_values(table, step, noise, seeds, model_output, sample)

    given = out
    x_next = torch.empty_like(sample, memory_format=entry.memory_format) if out is None else out
    x0 = torch.empty_like(x_next) if return_x0 else None
    if isinstance(table, StepTable):
        table, index = table.on(sample.device)
        if not isinstance(step, torch.Tensor):
            step = index[step : step + 1]
    elif not isinstance(step, torch.Tensor):
        step = torch.full((1,), step, device=sample.device)
    slots = dict(
        output=model_output.contiguous() if entry.copy_output else model_output,
        sample=sample.contiguous() if entry.copy_sample else sample,
        table=table,
        step=step,
        guidance=_scalar_tensor(guidance_scale, sample.device) if guidance_scale is not None else None,
        rescale=_scalar_tensor(guidance_rescale, sample.device) if entry.rescale else None,
        statistics=None,
        noise=noise.contiguous() if noise is not None and entry.copy_noise else noise,
        seeds=seeds if seeds is None else seeds.contiguous(),
        first_row=first_row if first_row is None else first_row.contiguous(),
        next=x_next,
        x0=x0,
        input=model_input,
        timesteps=timesteps,
        next_timestep=next_timestep,
        tickets=None,
    )
    if given is not None or model_input is not None or advance:
        _check_overlaps(slots, given is not None, advance)
    if not sample.numel():
        return x_next, x0
    plan = entry.plan
    if plan.tickets or plan.statistics:
        scratch = Workspace() if workspace is None else workspace
        if plan.tickets:
            slots["tickets"] = scratch.zeros("tickets", plan.tickets, torch.int32, sample.device)
        if plan.statistics:
            slots["statistics"] = scratch.zeros("statistics", plan.statistics, torch.float32, sample.device)
            slots["counters"] = scratch.zeros("counters", plan.counters, torch.int32, sample.device)
    with _on_device(sample.device):
        for launch in plan.launches:
            launch.run([slots[name] for name in launch.pointers], sample.device.index)
    return x_next, x0


@dataclass(frozen=True)
class _Entry:
    """What the arguments' shapes, dtypes, strides and options lead to."""

    plan: Plan
    memory_format: torch.memory_format
    copy_output: bool
    copy_sample: bool
    copy_noise: bool
    rescale: bool


_ENTRIES: dict[Any, _Entry] = {}


def _make_entry(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    limit: Limit,
    cond_first: bool,
    arguments: dict[str, Any],
) -> _Entry:
    noise, seeds, out, model_input = (arguments[name] for name in ("noise", "seeds", "out", "model_input"))
    guidance_scale, guidance_rescale = arguments["guidance_scale"], arguments["guidance_rescale"]
    if sample.device.type not in _DEVICE_TYPES and not _interpreted():
        raise ValueError(f"sample: on {sample.device}; the fused step needs a GPU, so pass backend='reference'")
    state_like = {"sample": sample, "model_output": model_output, "noise": noise, "out": out, "model_input": model_input}
    for name, tensor in state_like.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name}: dtype {tensor.dtype}; the fused step takes float32, float16 and bfloat16, so convert it, or pass"
                " backend='reference'"
            )
    if isinstance(table, torch.Tensor) and (table.dtype != torch.float32 or not table.is_contiguous()):
        raise ValueError(f"table: {table.dtype}, strides {table.stride()}; pass StepTable.tensor(device), float32 rows")
    # One layout for all, whatever it is, needs no index arithmetic; drawn noise counts elements in C order.
    shared_layout = (
        seeds is None
        and not sample.is_contiguous()
        and _is_channels_last(sample)
        and all(tensor is None or _is_channels_last(tensor) for tensor in state_like.values())
    )
    for name, tensor, others in (("out", out, False), ("model_input", model_input, True)):
        if tensor is None or tensor.is_contiguous() or shared_layout or (others and _is_channels_last(tensor)):
            continue
        kinds = "a contiguous or channels-last tensor" if others else "a contiguous tensor"
        raise ValueError(f"{name}: strides {tensor.stride()}; pass {kinds}, as it is written in place")
    for name in ("step", "timesteps", "next_timestep"):
        tensor = step if name == "step" else arguments[name]
        if isinstance(tensor, torch.Tensor) and not tensor.is_contiguous():
            raise ValueError(f"{name}: strides {tensor.stride()}; pass a contiguous tensor")
    batch = sample.shape[0]
    elements = math.prod(sample.shape[1:])
    output_channels_last = not shared_layout and not model_output.is_contiguous() and _is_channels_last(model_output)
    input_channels_last = (
        model_input is not None
        and not shared_layout
        and not model_input.is_contiguous()
        and _is_channels_last(model_input)
    )
    rescale = isinstance(guidance_rescale, torch.Tensor) or guidance_rescale != 0
    shape = StepShape(
        batch=batch,
        elements=elements,
        channels=sample.shape[1] if sample.ndim > 1 else 1,
        guided=guidance_scale is not None,
        cond_first=bool(cond_first),
        scale_per_sample=isinstance(guidance_scale, torch.Tensor) and guidance_scale.ndim == 1,
        rescale=rescale,
        rescale_per_sample=isinstance(guidance_rescale, torch.Tensor) and guidance_rescale.ndim == 1,
        row_per_sample=isinstance(step, torch.Tensor) and step.ndim == 1,
        limit=limit,
        noise="seeds" if seeds is not None else "none" if noise is None else "given",
        output_channels_last=output_channels_last,
        input_channels_last=input_channels_last,
        advance=bool(arguments["advance"]),
        num_steps=len(table),
    )
    if elements >= _INT32 and (output_channels_last or input_channels_last or rescale or _thresholds(limit)):
        raise ValueError(
            f"sample: {elements} elements each; channels-last tensors, guidance_rescale and dynamic thresholding take fewer"
            " than 2**31"
        )
    return _Entry(
        plan=make_plan(shape),
        memory_format=torch.preserve_format if shared_layout else torch.contiguous_format,
        copy_output=not (shared_layout or output_channels_last or model_output.is_contiguous()),
        copy_sample=not (shared_layout or sample.is_contiguous()),
        copy_noise=noise is not None and not (shared_layout or noise.is_contiguous()),
        rescale=rescale,
    )


def _thresholds(limit: Limit) -> bool:
    return isinstance(limit, DynamicThreshold) and limit.max_value > 1


def _is_channels_last(tensor: torch.Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.ndim in formats and tensor.is_contiguous(memory_format=formats[tensor.ndim])


def _check_values(
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    noise: torch.Tensor | None,
    seeds: torch.Tensor | None,
    model_output: torch.Tensor,
    sample: torch.Tensor,
) -> None:
    """What a kept entry says nothing of: numbers, and whether gradients are wanted."""
    if not isinstance(step, torch.Tensor):
        if not 0 <= step < len(table):
            raise IndexError(f"step: {step} is outside the table of {len(table)} steps")
        if noise is None and seeds is None and isinstance(table, StepTable) and table.rows[step].noise_scale != 0:
            raise ValueError(f"noise: None, but step {step} adds noise; pass a standard normal tensor, or seeds")
    if torch.is_grad_enabled() and (
        sample.requires_grad or model_output.requires_grad or (noise is not None and noise.requires_grad)
    ):
        raise ValueError(
            "sample, model_output, noise: the fused step has no gradients; call it under torch.no_grad(), detach them, or"
            " pass backend='reference'"
        )


def _scalar_tensor(value: Coefficient, device: torch.device) -> torch.Tensor:
    return value.contiguous() if isinstance(value, torch.Tensor) else _device_scalar(float(value), device)


_ARGUMENT_OF = {"output": "model_output", "guidance": "guidance_scale", "rescale": "guidance_rescale", "next": "out"}


def _check_overlaps(slots: dict[str, torch.Tensor | None], out_given: bool, advance: bool) -> None:
    """Refuse results that share memory with something else, but for `out` on `sample`, element for element."""
    spans = {
        name: (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
        for name, tensor in slots.items()
        if tensor is not None and tensor.numel()
    }
    written = [name for name in ("next", "input", "next_timestep", "step") if name in spans]
    for name in written:
        if (name == "next" and not out_given) or (name == "step" and not advance):
            continue
        start, end = spans[name]
        for other, (other_start, other_end) in spans.items():
            if other == name or start >= other_end or other_start >= end:
                continue
            if name == "next" and other == "sample" and spans[name] == spans[other]:
                continue
            first, second = _ARGUMENT_OF.get(name, name), _ARGUMENT_OF.get(other, other)
            raise ValueError(f"{first}: shares memory with {second}; pass memory of its own")


def _on_device(device: torch.device) -> Any:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
