"""Which kernels a step launches, with which constants and grids: decided from sizes and options alone, without tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from fastddim.coefficients import NUM_COLUMNS, Coefficient
from fastddim.config import Limit, limit_kind, limit_numbers
from fastddim.kernels.statistics import BINS, SLOTS, histogram_kernel, projection_kernel, rescale_kernel
from fastddim.kernels.step import ddim_step_kernel
from fastddim.step import Guidance, StepOptions

STEP_POINTERS = (
    "output", "sample", "table", "ratios", "step", "guidance", "rescale", "limit", "statistics", "noise", "seeds",
    "first_row", "next", "x0", "input", "timesteps", "next_timestep", "tickets",
)  # fmt: skip
# What `ddim_step` calls those that have another name there.
ARGUMENT_OF = {
    "output": "model_output", "guidance": "guidance_scale", "rescale": "guidance_rescale", "limit": "limit_values",
    "next": "out", "input": "model_input",
}  # fmt: skip
_PROJECTION_POINTERS = ("output", "guidance", "statistics", "counters")
_RESCALE_POINTERS = ("output", "guidance", "rescale", "statistics", "counters")
_HISTOGRAM_POINTERS = ("sample", "output", "table", "ratios", "step", "guidance", "limit", "statistics", "counters")

# The largest sample whose statistics one program takes without spilling registers, on every supported Triton.
WHOLE_SAMPLE = 16384
# The same where few samples have a threshold in a captured step: there three launches of many programs take less time than
# the bisection that leaves most of the GPU idle.
FEW_SAMPLES, WHOLE_OF_FEW = 16, 8192
STATISTICS_BLOCK = 2048
# 16 elements a thread: with 8 or 32 there are fewer bytes in flight.
_STATISTICS_WARPS = 4
LARGEST_BLOCK = 2048
# Two warps give a thread 32 elements of the largest block: enough loads in flight, and little overhead for each.
NUM_WARPS = 2
# Programs enough for a few waves of any current GPU; below that, smaller blocks.
_ENOUGH_PROGRAMS = 512
# What a program that has a whole sample's statistics updates at a time; more elements a thread would spill.
_CHUNK = 4096
_MAX_GRID_Y = 65535
# What Triton knows of a size: whether it is a multiple of this.
_ALIGNED = 16


@dataclass(frozen=True)
class StepShape:
    """All that a plan depends on.

    Attributes:
        batch, elements: samples, and elements of each.
        num_steps: rows of the table.
        channels: the samples' channels, for channels-last tensors.
        row_per_sample: whether each sample has a row of its own.
        guided, cond_first: whether there is guidance, and whether the conditional half comes first.
        guidance_method, apg_eta, apg_norm_threshold: as `method` and the others of `Guidance`.
        scale_per_sample, rescale_per_sample: whether each sample has a guidance scale, and a rescale, of its own.
        rescale: whether there is a guidance rescale.
        limit: the limit applied to x0.
        limit_on_device: whether its numbers come from memory; `config.limit_kind` alone is fixed then.
        drawn: whether the kernel draws the noise.
        output_channels_last, input_channels_last: the layout of the model's output and of its next input.
        advance: whether the index moves on.
        looks_back: whether the table has the column of the previous x0.
    """

    batch: int
    elements: int
    num_steps: int = 1
    channels: int = 1
    guided: bool = False
    cond_first: bool = False
    guidance_method: str = "cfg"
    apg_eta: float = 0.0
    apg_norm_threshold: float = 0.0
    scale_per_sample: bool = False
    rescale: bool = False
    rescale_per_sample: bool = False
    row_per_sample: bool = False
    limit: Limit = None
    limit_on_device: bool = False
    drawn: bool = False
    output_channels_last: bool = False
    input_channels_last: bool = False
    advance: bool = False
    looks_back: bool = False

    def with_options(self, options: StepOptions) -> StepShape:
        """This shape with all that a step's options fix; of their tensors only the number of dimensions is looked at."""
        guidance = options.guidance or Guidance(1.0)
        return replace(
            self,
            guided=options.guidance is not None,
            cond_first=bool(guidance.cond_first),
            guidance_method=guidance.method,
            apg_eta=float(guidance.apg_eta),
            apg_norm_threshold=float(guidance.apg_norm_threshold),
            scale_per_sample=_is_per_sample(guidance.scale),
            rescale=guidance.rescaled,
            rescale_per_sample=_is_per_sample(guidance.rescale),
            limit=options.limit,
            limit_on_device=options.limit_values is not None,
            drawn=options.seeds is not None,
            advance=bool(options.advance),
            looks_back=options.previous_x0 is not None,
        )

    @property
    def projected(self) -> bool:
        """Whether guidance is projected."""
        return self.guidance_method == "apg"

    @property
    def summed(self) -> bool:
        """Whether guidance takes sums over whole samples."""
        return self.rescale or self.projected


def _is_per_sample(value: Coefficient) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 1


@dataclass(frozen=True)
class KernelCall:
    """One launch.

    Attributes:
        kernel: the jitted function.
        pointers: what its pointer arguments stand for, in order; they come first.
        numbers: its other run-time arguments, in order.
        constants: its compile-time arguments, in order.
        grid: programs in two dimensions.
        num_warps: warps of a program.
    """

    kernel: Any
    pointers: tuple[str, ...]
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    grid: tuple[int, int]
    num_warps: int


@dataclass(frozen=True)
class Plan:
    """The launches of a step, and how much scratch memory they need.

    Attributes:
        tier: `"elements"`; `"whole"`, a sample in one program; or `"statistics"`, with launches before the step.
        flat: the batch is treated as one sample, as no sample differs from another.
        calls: the launches, the step last.
        tickets, counters, statistics: elements of scratch memory, int32, int32 and float32.
    """

    tier: str
    flat: bool
    calls: tuple[KernelCall, ...]
    tickets: int = 0
    counters: int = 0
    statistics: int = 0


def make_plan(shape: StepShape) -> Plan:
    """Choose the tier, the blocks and the constants for a step.

    Args:
        shape: sizes and options; `batch` may be symbolic, and then decides nothing.
    """
    batch, n = shape.batch, shape.elements
    limit_name, magnitude = limit_kind(shape.limit, numbers_change=shape.limit_on_device)
    limit_range, ratio = (1.0, 1.0) if shape.limit_on_device else limit_numbers(shape.limit)
    needs_statistics = limit_name == "threshold" or shape.summed
    whole = needs_statistics and n <= _whole_sample(shape, limit_name)
    channels_last = shape.output_channels_last or shape.input_channels_last
    differ = shape.scale_per_sample or shape.row_per_sample or shape.drawn or needs_statistics or channels_last
    flat = not differ
    if flat:
        batch, n = 1, batch * n
    if whole:
        block = max(64, triton.next_power_of_2(n))
        num_warps = min(16, max(1, block // 512))
    else:
        block, num_warps = _element_block(batch, n), NUM_WARPS
    blocks = 1 if whole else triton.cdiv(n, block)
    sample_axis, grid = make_grid(batch, blocks, n)
    num_columns = NUM_COLUMNS + shape.looks_back
    halves, method = {"COND_FIRST": shape.cond_first}, {"METHOD": shape.guidance_method}
    projected = {"APG_ETA": shape.apg_eta, "APG_NORM_THRESHOLD": shape.apg_norm_threshold}
    scaled = {"SCALE_PER_SAMPLE": shape.scale_per_sample}
    constants: dict[str, Any] = {
        "GUIDED": shape.guided,
        **halves,
        **method,
        **projected,
        **scaled,
        "RESCALE_PER_SAMPLE": shape.rescale_per_sample,
        "ROW_PER_SAMPLE": shape.row_per_sample,
        "LIMIT": limit_name,
        "RANGE": limit_range,
        "RATIO": ratio,
        "WHOLE": whole,
        "SAMPLE_AXIS": sample_axis,
        "OUTPUT_CHANNELS_LAST": shape.output_channels_last,
        "INPUT_CHANNELS_LAST": shape.input_channels_last,
        "ADVANCE": shape.advance,
        "DEPENDENT": False,
        "EVEN": not whole and isinstance(n, int) and n % block == 0,
        "BLOCK": block,
        "CHUNK": min(block, _CHUNK) if whole else block,
        "COLUMNS": num_columns,
    }
    numbers: tuple[int, ...] = (n, batch, shape.num_steps, shape.channels, shape.batch)
    step = KernelCall(ddim_step_kernel, STEP_POINTERS, numbers, constants, grid, num_warps)
    tickets = 0
    if shape.advance and not (blocks == 1 and (shape.row_per_sample or batch == 1)):
        tickets = shape.batch if shape.row_per_sample else 1
    if whole or not needs_statistics:
        return Plan("whole" if whole else "elements", flat, (step,), tickets)

    blocks = triton.cdiv(n, STATISTICS_BLOCK)
    sample_axis, grid = make_grid(batch, blocks, n)
    row_size = SLOTS.value
    layout = {
        "SAMPLE_AXIS": sample_axis,
        "OUTPUT_CHANNELS_LAST": shape.output_channels_last,
        "BLOCK": STATISTICS_BLOCK,
    }
    calls = []
    if limit_name == "threshold":
        # Bins of `1 << shift` bit patterns are wide enough for all of (1, max_value].
        shift = max(0, magnitude - (BINS.value - 1).bit_length())
        row_size += BINS.value + (1 << shift)
        for refine in (False, True):
            histogram = {
                "REFINE": refine,
                "GUIDED": shape.guided,
                "RESCALED": shape.rescale,
                **halves,
                **method,
                **scaled,
                "ROW_PER_SAMPLE": shape.row_per_sample,
                "RATIO": ratio,
                "MAX_VALUE": limit_range,
                "COLUMNS": num_columns,
                **layout,
            }
            numbers = (n, batch, shape.num_steps, shape.channels, row_size, shift)
            calls.append(KernelCall(histogram_kernel, _HISTOGRAM_POINTERS, numbers, histogram, grid, _STATISTICS_WARPS))
    if shape.rescale:
        rescale = {**halves, **method, **scaled, "RESCALE_PER_SAMPLE": shape.rescale_per_sample, **layout}
        numbers = (n, batch, shape.channels, row_size)
        calls.insert(0, KernelCall(rescale_kernel, _RESCALE_POINTERS, numbers, rescale, grid, _STATISTICS_WARPS))
    if shape.projected:
        numbers, constants = (n, batch, shape.channels, row_size), {**halves, **projected, **scaled, **layout}
        calls.insert(
            0, KernelCall(projection_kernel, _PROJECTION_POINTERS, numbers, constants, grid, _STATISTICS_WARPS)
        )
    statistics = (4 if shape.projected else 2) * batch + (4 * batch * blocks if shape.summed else 0)
    return Plan("statistics", flat, (*calls, step), tickets, batch * row_size, statistics)


def _whole_sample(shape: StepShape, limit_name: str) -> int:
    """The largest sample whose statistics one program finds.

    A threshold is exact, so that its bits are the same either way; the sums of a rescale or a projection are rounded, so that
    the batch must not choose how they are taken. A step that moves its index on is captured: elsewhere each launch costs the
    host.
    """
    batch = shape.batch
    exact = limit_name == "threshold" and not shape.summed
    few = not isinstance(batch, torch.SymInt) and batch <= FEW_SAMPLES
    return min(WHOLE_SAMPLE, WHOLE_OF_FEW) if exact and few and shape.advance else WHOLE_SAMPLE


def _element_block(batch: int, n: int) -> int:
    if isinstance(batch, torch.SymInt) or isinstance(n, torch.SymInt):
        return LARGEST_BLOCK // 2
    block = LARGEST_BLOCK
    while block > 256 and batch * triton.cdiv(n, block) < _ENOUGH_PROGRAMS:
        block //= 2
    return min(block, max(64, int(triton.next_power_of_2(n))))


def make_grid(batch: int, blocks: int, n: int) -> tuple[int, tuple[int, int]]:
    """Which axis counts the samples of n elements, and the grid: the second one, the short one, unless there are too many.

    -1 where there is one sample, so that its number is known to the compiler: a short block has a quarter fewer instructions.
    Not where its halves are aligned differently, which would get them different layouts.
    """
    if isinstance(batch, torch.SymInt):
        return 1, (blocks, batch)
    if batch == 1 and not isinstance(n, torch.SymInt) and n % _ALIGNED == 0:
        return -1, (blocks, 1)
    return (1, (blocks, batch)) if batch <= _MAX_GRID_Y else (0, (batch, blocks))
