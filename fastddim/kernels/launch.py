"""The checking launcher of the fused step: `ddim_step` as the reference has it, on the device, in one launch.

The first call with new shapes, dtypes or options checks them, plans the launches and compiles. Those that follow look
the plan up and hand addresses to the compiled kernel, past Triton's own argument processing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

from fastddim.coefficients import Coefficient, StepTable
from fastddim.config import DynamicThreshold
from fastddim.kernels.plan import ARGUMENT_OF, STEP_POINTERS, KernelCall, Plan, StepShape, make_plan
from fastddim.reference import kept_scalar
from fastddim.step import StepOptions, check_step, num_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TABLE_DTYPES = (torch.float64, torch.float32)

# A HIP device has the same type.
_DEVICE_TYPES = ("cuda",)
_MAX_KEPT = 1024
_INT32_RANGE = 1 << 31
# Triton parses a kernel's source to compile it, which CPython 3.11 cannot do in two threads at once.
COMPILING = threading.Lock()
# The compute capability, times ten, from which on a kernel can be launched before the one before it has ended.
_DEPENDENT_LAUNCH = 90


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
        self._compiled: dict[tuple[bool, ...], tuple[Any, Any, Any, Any]] = {}

    def __call__(self, tensors: Sequence[torch.Tensor | None], device: torch.device) -> None:
        call = self.call
        if _interpreted():
            call.kernel[call.grid](*tensors, *call.numbers, **call.constants)
            return
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        run, function, metadata, kernel = self.compiled(addresses, tensors)
        stream = driver.active.get_current_stream(device.index)
        hooks = launch_hooks(kernel, call.grid, stream)
        run(*call.grid, 1, stream, function, metadata, *hooks, *addresses, *self.tail)

    def compiled(
        self, addresses: Sequence[int | None], tensors: Sequence[torch.Tensor | None]
    ) -> tuple[Any, Any, Any, Any]:
        """Triton's launch function, the kernel's handle, its metadata and itself, for tensors aligned as these are.

        From Triton 3.8 on the handle is good for as long as the kernel itself is kept.
        """
        aligned = tuple([not address & 15 for address in addresses if address])
        compiled = self._compiled.get(aligned)
        if compiled is None:
            compiled = self._compiled[aligned] = self._compile(tensors)
        return compiled

    def _compile(self, tensors: Sequence[torch.Tensor | None]) -> tuple[Any, Any, Any, Any]:
        call = self.call
        # Other backends do not know the option.
        dependent = {"launch_pdl": True} if call.constants.get("DEPENDENT") else {}
        try:
            with COMPILING:
                compiled = call.kernel.warmup(
                    *tensors,
                    *call.numbers,
                    **call.constants,
                    grid=call.grid,
                    num_warps=call.num_warps,
                    enable_fp_fusion=False,
                    **dependent,
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
        return run, compiled.function, compiled.packed_metadata, compiled


def make_dependent(entry: Entry) -> Entry:
    """The entry with a step that is launched while the kernel before it ends, and waits for that; itself where none can."""
    if _interpreted():
        return entry
    target = driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < _DEPENDENT_LAUNCH:
        return entry
    call = entry.plan.calls[-1]
    call = replace(call, constants={**call.constants, "DEPENDENT": True})
    plan = replace(entry.plan, calls=(*entry.plan.calls[:-1], call))
    return replace(entry, plan=plan, launchers=(*entry.launchers[:-1], _Launcher(call)))


def launch_hooks(kernel: Any, grid: tuple[int, int], stream: int) -> tuple[Any, Any, Any]:
    """What Triton's hooks are told of a launch, and those before and after it: None where nobody listens."""
    hooks = triton.knobs.runtime
    before, after = hooks.launch_enter_hook, hooks.launch_exit_hook
    if getattr(before, "calls", before) or getattr(after, "calls", after):
        return kernel.launch_metadata(grid, stream), before, after
    return None, None, None


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Entry:
    """What the arguments' shapes, dtypes, strides and options lead to.

    Attributes:
        plan: the launches.
        memory_format: the results' layout.
        copied: which of `output`, `sample` and `noise` have strides that the kernel does not take.
        launchers: the plan's calls with their compiled code.
        apart: the places in `STEP_POINTERS` and the sizes in bytes of a tensor that is written and of one that must not
            share its memory, and whether they may all the same be one and the same.
    """

    plan: Plan
    memory_format: torch.memory_format
    copied: tuple[bool, bool, bool]
    launchers: tuple[_Launcher, ...]
    apart: tuple[tuple[int, int, int, int, bool], ...] = ()

    @property
    def reordered(self) -> bool:
        """Whether the model's output has its elements in another order than the results."""
        return bool(self.plan.calls[-1].constants["OUTPUT_CHANNELS_LAST"])


_ENTRIES: dict[Any, Entry] = {}


def ddim_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    options: StepOptions,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`fastddim.reference.ddim_step` fused: the same arguments, results and errors, in one launch.

    What differs:
        - float32, float16 and bfloat16 tensors, in any combination; arithmetic is float32, a `table` tensor is
          float64 (or float32, which makes half-precision results a little less exact).
        - No gradients.
        - `model_output` and `model_input` may be channels-last beside a contiguous state; where everything is
          channels-last, and no seeds are given, so are the results. Other strides are copied first.
        - `out`, `model_input` and what moves on may not share memory with anything else, except `out` with `sample`, or
          with an unguided `model_output` of its layout.
        - An index tensor is not read on the host: a row outside the table gives NaN.
        - Samples of more than 16,384 elements take two more launches with dynamic thresholding (of more than 8,192 where few
          samples advance without a rescale or a projection), one more with a guidance rescale, and one with projected guidance.

    Raises:
        TypeError, ValueError, IndexError: as the reference, and for what differs.
        KernelUnavailableError: the kernel does not compile for this device.
    """
    request = assemble(model_output, sample, table, step, options)
    if sample.numel():
        request.run()
    return request.x_next, request.x0


class Request(NamedTuple):
    """A checked step: what to launch over which tensors.

    Attributes:
        entry: the plan and its compiled code.
        tensors: what `STEP_POINTERS` point to, in their order.
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
        if self.counters is not None:
            slots = {**dict(zip(STEP_POINTERS, self.tensors, strict=True)), "counters": self.counters}
            try:
                for launcher in launchers[:-1]:
                    launcher([slots[name] for name in launcher.call.pointers], device)
            except BaseException:
                # What one launch counted waits for the next; without that it would go into the next step's statistics.
                self.counters.zero_()
                raise
        launchers[-1](self.tensors, device)


def assemble(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    options: StepOptions,
) -> Request:
    """Check `ddim_step`'s arguments, allocate its results and gather what its kernels take."""
    guidance, noise, seeds, out = options.guidance, options.noise, options.seeds, options.out
    try:
        key = _key(model_output, sample, table, step, options)
        entry = _ENTRIES.get(key)
    except (AttributeError, TypeError):
        # Something is no tensor: the check below says which argument.
        key, entry = None, None
    if entry is None:
        entry = make_entry(model_output, sample, table, step, options)
        # Not there: traced tensors have no size in bytes.
        entry = replace(entry, apart=_find_apart(entry, model_output, sample, table, step, options))
        if len(_ENTRIES) >= _MAX_KEPT:
            _ENTRIES.clear()
        _ENTRIES[key] = entry
    _check_values(model_output, sample, table, step, options)

    device = sample.device
    copy_output, copy_sample, copy_noise = entry.copied
    x_next = torch.empty_like(sample, memory_format=entry.memory_format) if out is None else out
    previous = options.previous_x0
    x0 = torch.empty_like(x_next) if previous is None and options.return_x0 else previous
    index, ratios = None, options.ratios
    if isinstance(table, StepTable):
        table, index, ratios = table.on(device)
    if sample.dtype == torch.float32:
        ratios = None
    if not isinstance(step, torch.Tensor):
        step = torch.full((), step, device=device) if index is None else index[step]
    plan = entry.plan
    tickets = statistics = counters = None
    if plan.tickets or plan.statistics:
        scratch = Workspace() if options.workspace is None else options.workspace
        if plan.tickets:
            tickets = scratch.zeros("tickets", plan.tickets, torch.int32, device)
        if plan.statistics:
            statistics = scratch.zeros("statistics", plan.statistics, torch.float32, device)
            counters = scratch.zeros("counters", plan.counters, torch.int32, device)
    first_row = options.first_row
    tensors = (
        model_output.contiguous() if copy_output else model_output,
        sample.contiguous() if copy_sample else sample,
        table,
        ratios,
        step,
        None if guidance is None else scalar_tensor(guidance.scale, device),
        scalar_tensor(guidance.rescale, device) if guidance is not None and guidance.rescaled else None,
        options.limit_values,
        statistics,
        noise.contiguous() if copy_noise and noise is not None else noise,
        None if seeds is None else seeds.contiguous(),
        None if first_row is None else first_row.contiguous(),
        x_next,
        x0,
        options.model_input,
        options.timesteps,
        options.next_timestep,
        tickets,
    )
    _check_overlaps(tensors, entry)
    return Request(entry, tensors, counters, x_next, x0 if options.return_x0 else None)


def _key(model_output: Any, sample: Any, table: Any, step: Any, options: StepOptions) -> tuple[Any, ...]:
    """All that an entry depends on, as something to look it up by."""
    guidance, noise, out, model_input = options.guidance, options.noise, options.out, options.model_input
    limit_values, seeds, first_row = options.limit_values, options.seeds, options.first_row
    timesteps, next_timestep, previous = options.timesteps, options.next_timestep, options.previous_x0
    ratios = options.ratios
    guided: Any = None
    if guidance is not None:
        scale, rescale = guidance.scale, guidance.rescale
        guided = (
            spec(scale) if isinstance(scale, torch.Tensor) else type(scale),
            spec(rescale) if isinstance(rescale, torch.Tensor) else (type(rescale), rescale != 0),
            guidance.fixed,
        )
    rest: Any = None
    # One comparison for what most steps do not have.
    if not (limit_values is seeds is first_row is timesteps is next_timestep is previous is ratios is None):
        others = (limit_values, seeds, first_row, timesteps, next_timestep, previous, ratios)
        rest = tuple([None if t is None else spec(t) for t in others])
    return (
        spec(model_output),
        spec(sample),
        None if noise is None else spec(noise),
        None if out is None else out is sample or spec(out),
        None if model_input is None else spec(model_input),
        spec(table) if isinstance(table, torch.Tensor) else table.columns.shape,
        spec(step) if isinstance(step, torch.Tensor) else type(step),
        guided,
        options.limit,
        options.advance,
        rest,
    )


def make_entry(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    options: StepOptions,
) -> Entry:
    """Check the arguments of `ddim_step`, and plan.

    Raises:
        TypeError, ValueError, IndexError: as `ddim_step`.
    """
    check_step(model_output, sample, table, step, options)
    noise, out, model_input = options.noise, options.out, options.model_input
    if sample.device.type not in _DEVICE_TYPES and not _interpreted():
        raise ValueError(
            f"sample: on {sample.device}; the fused step needs a GPU: move it, or pass backend='reference'"
        )
    previous_x0 = options.previous_x0
    states = {
        "sample": sample, "model_output": model_output, "noise": noise, "out": out, "model_input": model_input,
        "previous_x0": previous_x0,
    }  # fmt: skip
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
    shared_layout = options.seeds is None and all(t is None or _is_channels_last(t) for t in states.values())
    for name, tensor in (("out", out), ("model_input", model_input), ("previous_x0", previous_x0)):
        if tensor is None or tensor.is_contiguous() or shared_layout:
            continue
        if name != "model_input" or not _is_channels_last(tensor):
            kinds = "contiguous or channels-last" if name == "model_input" else "contiguous"
            raise ValueError(f"{name}: strides {tensor.stride()}; pass a {kinds} tensor, as it is written in place")
    if isinstance(step, torch.Tensor) and not step.is_contiguous():
        raise ValueError(f"step: strides {step.stride()}; pass a contiguous tensor")
    output_channels_last = not shared_layout and _is_channels_last(model_output)
    input_channels_last = not shared_layout and model_input is not None and _is_channels_last(model_input)
    elements = math.prod(sample.shape[1:])
    shape = StepShape(
        batch=sample.shape[0],
        elements=elements,
        num_steps=num_rows(table),
        channels=sample.shape[1] if sample.ndim > 1 else 1,
        row_per_sample=isinstance(step, torch.Tensor) and step.ndim == 1,
        output_channels_last=output_channels_last,
        input_channels_last=input_channels_last,
    ).with_options(options)
    indexed = output_channels_last or input_channels_last or shape.summed
    if elements >= _INT32_RANGE and (indexed or isinstance(options.limit, DynamicThreshold)):
        raise ValueError(
            f"sample: {elements} elements each; with channels-last tensors, a guidance rescale, projected guidance or dynamic"
            " thresholding pass fewer than 2**31"
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
        launchers=tuple(_Launcher(call) for call in plan.calls),
    )


def spec(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, tuple[int, ...], torch.device]:
    """What of a tensor decides how it is launched with."""
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.device


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """Channels-last, and not contiguous as well, as tensors with one channel or one pixel are."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.is_contiguous() or tensor.ndim not in formats:
        return False
    return tensor.is_contiguous(memory_format=formats[tensor.ndim])


def _check_values(model_output: Any, sample: Any, table: Any, step: Any, options: StepOptions) -> None:
    """What a kept entry says nothing of: the number of the step, and whether gradients are wanted."""
    noise = options.noise
    if not isinstance(step, torch.Tensor):
        if not 0 <= step < len(table):
            raise IndexError(f"step: {step} is outside the table of {len(table)} steps")
        if (
            noise is None
            and options.seeds is None
            and isinstance(table, StepTable)
            and table.rows[step].noise_scale != 0
        ):
            raise ValueError(f"noise: None, but step {step} adds noise; pass a standard normal tensor, or seeds")
    if torch.is_grad_enabled() and (
        sample.requires_grad or model_output.requires_grad or (noise is not None and noise.requires_grad)
    ):
        raise ValueError(
            "sample, model_output, noise: the fused step has no gradients: call it under torch.no_grad(), detach them, or"
            " pass backend='reference'"
        )


def scalar_tensor(value: Coefficient, device: torch.device) -> torch.Tensor:
    """A number as a kept tensor `[]`: copying one to a device is a transfer, which a graph could not hold."""
    if isinstance(value, torch.Tensor):
        return value.contiguous()
    if torch.compiler.is_compiling():
        return torch.full((), value, dtype=torch.float32, device=device)
    return kept_scalar(value, torch.float32, device)


def _find_apart(
    entry: Entry, model_output: Any, sample: Any, table: Any, step: Any, options: StepOptions
) -> tuple[tuple[int, int, int, int, bool], ...]:
    """`Entry.apart`."""
    given = {"output": model_output, "sample": sample, "table": table, "step": step}
    if options.guidance is not None:
        given |= {"guidance": options.guidance.scale, "rescale": options.guidance.rescale}
    names = ("limit", "noise", "seeds", "first_row", "next", "input", "timesteps", "next_timestep")
    given["x0"] = options.previous_x0
    given |= {name: getattr(options, ARGUMENT_OF.get(name, name)) for name in names}
    # Size in bytes and in elements: guided, there are two halves of outputs to one of results; of half the precision they
    # have as many bytes.
    sizes = {name: (value.nbytes, value.numel()) for name, value in given.items() if isinstance(value, torch.Tensor)}
    written = ("next", "x0", "input", *(("step", "next_timestep") if options.advance else ()))
    in_place = ("sample",) if entry.reordered else ("sample", "output")
    return tuple(
        (
            STEP_POINTERS.index(name),
            STEP_POINTERS.index(other),
            sizes[name][0],
            sizes[other][0],
            name == "next" and other in in_place and sizes[name] == sizes[other],
        )
        for name in written
        for other in sizes
        if name in sizes and other != name
    )


def _check_overlaps(tensors: Sequence[torch.Tensor | None], entry: Entry) -> None:
    """Refuse results that share memory with something else, but for `out` on a state that is read element for element."""
    for written, other, written_size, other_size, same in entry.apart:
        start, other_start = tensors[written].data_ptr(), tensors[other].data_ptr()  # type: ignore[union-attr]
        if start >= other_start + other_size or other_start >= start + written_size or (same and start == other_start):
            continue
        names = {**ARGUMENT_OF, "x0": "previous_x0"}
        first, second = (names.get(name, name) for name in (STEP_POINTERS[written], STEP_POINTERS[other]))
        raise ValueError(f"{first}: shares memory with {second}; pass memory of its own")
