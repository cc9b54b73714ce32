"""Whole-sample statistics for samples that do not fit one program: projections, standard deviations and the dynamic
threshold, which is exact.

Many programs read a sample; the last of them to finish (a ticket counts) sums up. The threshold takes two such launches:
a histogram of the bit patterns of |x0| in (1, max_value], 2,048 bins wide, then one of single patterns within the bin
that holds the quantile's rank. Each launch leaves the counters it used at zero, so a workspace is cleared once, ever.

A workspace row is one sample's: `SLOTS` counters and the two histograms. Behind the `[batch, 2]` statistics (`[batch, 4]` with
projected guidance) lie four float32 sums for each program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastddim.kernels.philox import product
from fastddim.kernels.step import (
    INFINITY_BITS,
    LARGEST_INT,
    ONE_BITS,
    guide,
    limit_scale,
    load_guidance,
    load_halves,
    load_inputs,
    load_limit,
    load_projection,
    load_x0_columns,
    predict,
    program_place,
    projection,
    projection_sums,
    quantile_rank,
    rescale_factor,
    row_of_ratios,
    split_halves,
    table_row,
)

# The counters; the ticket is the first.
AT_MOST_ONE = tl.constexpr(1)
LARGEST_TO_ONE = tl.constexpr(2)
NANS = tl.constexpr(3)
# Infinities and NaNs.
INFINITIES = tl.constexpr(4)
# The smallest pattern above the bin, as its distance from the largest integer, so that zero means none.
ABOVE = tl.constexpr(5)
# What the first launch leaves for the second: the bin, counted from FIRST_BIN (DONE: the threshold is known already;
# UP_TO_ONE: the rank is the last one up to 1), and the count below it.
BIN = tl.constexpr(6)
BELOW_BIN = tl.constexpr(7)
SLOTS = tl.constexpr(16)
CHUNK = tl.constexpr(512)
BINS = tl.constexpr(2048)
DONE = tl.constexpr(0)
UP_TO_ONE = tl.constexpr(1)
FIRST_BIN = tl.constexpr(2)


@triton.jit
def take_ticket(counter_ptr, programs):
    """Whether this program is the last of `programs` to get here; the counter is back at zero then."""
    # All warps' atomics and stores have to be out before one thread takes the ticket.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def part(x, live, size):
    """Mean of a program's elements, and the sum of their squared distances from it."""
    mean = tl.div_rn(tl.sum(tl.where(live, x, 0.0), 0), size)
    centred = tl.where(live, x - mean, 0.0)
    return mean, tl.sum(product(centred, centred), 0)


@triton.jit
def combined_square(parts, blocks, n, BLOCK: tl.constexpr):
    """Sum of squared distances from the mean of all n elements, from each program's (mean, sum of squares)."""
    total = tl.full([], 0.0, tl.float32)
    for k in range(0, blocks, CHUNK):
        block = k + tl.arange(0, CHUNK)
        sizes = tl.minimum(tl.maximum(n - block.to(tl.int64) * BLOCK, 0), BLOCK).to(tl.float32)
        means = tl.load(parts + block * 4, mask=block < blocks, other=0.0, volatile=True)
        total += tl.sum(product(sizes, means), 0)
    mean = tl.div_rn(total, tl.cast(n, tl.float32))
    square = tl.full([], 0.0, tl.float32)
    for k in range(0, blocks, CHUNK):
        block = k + tl.arange(0, CHUNK)
        sizes = tl.minimum(tl.maximum(n - block.to(tl.int64) * BLOCK, 0), BLOCK).to(tl.float32)
        means = tl.load(parts + block * 4, mask=block < blocks, other=0.0, volatile=True)
        inner = tl.load(parts + block * 4 + 1, mask=block < blocks, other=0.0, volatile=True)
        square += tl.sum(tl.where(block < blocks, inner + product(sizes * (means - mean), means - mean), 0.0), 0)
    return square


@triton.jit
def combined_sum(parts, blocks):
    """The sum of one number of each program, in their order."""
    total = tl.full([], 0.0, tl.float32)
    for k in range(0, blocks, CHUNK):
        block = k + tl.arange(0, CHUNK)
        total += tl.sum(tl.load(parts + block * 4, mask=block < blocks, other=0.0, volatile=True), 0)
    return total


@triton.jit(
    do_not_specialize=["batch", "channels", "row_size"],
    do_not_specialize_on_alignment=["guidance_ptr", "statistics_ptr", "workspace_ptr"],
)
def projection_kernel(
    output_ptr,
    guidance_ptr,
    statistics_ptr,
    workspace_ptr,
    n,
    batch,
    channels,
    row_size,
    COND_FIRST: tl.constexpr,
    APG_ETA: tl.constexpr,
    APG_NORM_THRESHOLD: tl.constexpr,
    SCALE_PER_SAMPLE: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    OUTPUT_CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each sample's adaptive projected guidance into `statistics[b, 2]` and `statistics[b, 3]`."""
    b, block, blocks = program_place(SAMPLE_AXIS)
    start = block.to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    live = lanes < tl.minimum(n - start, BLOCK).to(tl.int32)
    where = (b, batch, start, lanes, n, channels)
    cond, uncond = split_halves(load_halves(output_ptr, where, live, True, OUTPUT_CHANNELS_LAST), COND_FIRST)
    square, along, size = projection_sums(cond, uncond, live)
    parts = statistics_ptr + batch * 4 + b * blocks * 4
    tl.store(parts + block * 4, square)
    tl.store(parts + block * 4 + 1, along)
    tl.store(parts + block * 4 + 2, size)
    if take_ticket(workspace_ptr + b * row_size, blocks):
        sums = (combined_sum(parts, blocks), combined_sum(parts + 1, blocks), combined_sum(parts + 2, blocks))
        scale = load_guidance(guidance_ptr, b, SCALE_PER_SAMPLE)
        excess, kept = projection(sums, scale, APG_ETA, APG_NORM_THRESHOLD)
        tl.store(statistics_ptr + b * 4 + 2, excess)
        tl.store(statistics_ptr + b * 4 + 3, kept)


@triton.jit(
    do_not_specialize=["batch", "channels", "row_size"],
    do_not_specialize_on_alignment=["guidance_ptr", "rescale_ptr", "statistics_ptr", "workspace_ptr"],
)
def rescale_kernel(
    output_ptr,
    guidance_ptr,
    rescale_ptr,
    statistics_ptr,
    workspace_ptr,
    n,
    batch,
    channels,
    row_size,
    COND_FIRST: tl.constexpr,
    METHOD: tl.constexpr,
    SCALE_PER_SAMPLE: tl.constexpr,
    RESCALE_PER_SAMPLE: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    OUTPUT_CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each sample's guidance rescale factor into `statistics[b, 1]`."""
    b, block, blocks = program_place(SAMPLE_AXIS)
    start = block.to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    size = tl.minimum(n - start, BLOCK).to(tl.int32)
    live = lanes < size
    where = (b, batch, start, lanes, n, channels)
    cond, uncond = split_halves(load_halves(output_ptr, where, live, True, OUTPUT_CHANNELS_LAST), COND_FIRST)
    stride: tl.constexpr = 4 if METHOD == "apg" else 2
    if METHOD == "apg":
        guidance = load_projection(statistics_ptr, b)
    else:
        guidance = load_guidance(guidance_ptr, b, SCALE_PER_SAMPLE)
    out = guide(cond, uncond, guidance, METHOD)
    parts = statistics_ptr + batch * stride + b * blocks * 4
    mean, square = part(out, live, size.to(tl.float32))
    cond_mean, cond_square = part(cond, live, size.to(tl.float32))
    tl.store(parts + block * 4, mean)
    tl.store(parts + block * 4 + 1, square)
    tl.store(parts + block * 4 + 2, cond_mean)
    tl.store(parts + block * 4 + 3, cond_square)
    if take_ticket(workspace_ptr + b * row_size, blocks):
        # Both deviations have the same denominator, and n - 1 > 0 here.
        std = tl.sqrt_rn(combined_square(parts, blocks, n, BLOCK))
        cond_std = tl.sqrt_rn(combined_square(parts + 2, blocks, n, BLOCK))
        phi = tl.load(rescale_ptr + (b if RESCALE_PER_SAMPLE else 0)).to(tl.float32)
        tl.store(statistics_ptr + b * stride + 1, rescale_factor(cond_std, std, phi))


@triton.jit(
    do_not_specialize=["batch", "num_steps", "channels", "row_size", "shift"],
    do_not_specialize_on_alignment=[
        "table_ptr",
        "ratios_ptr",
        "step_ptr",
        "guidance_ptr",
        "limit_ptr",
        "statistics_ptr",
        "workspace_ptr",
    ],
)
def histogram_kernel(
    sample_ptr,
    output_ptr,
    table_ptr,
    ratios_ptr,
    step_ptr,
    guidance_ptr,
    limit_ptr,
    statistics_ptr,
    workspace_ptr,
    n,
    batch,
    num_steps,
    channels,
    row_size,
    shift,
    REFINE: tl.constexpr,
    GUIDED: tl.constexpr,
    RESCALED: tl.constexpr,
    COND_FIRST: tl.constexpr,
    METHOD: tl.constexpr,
    SCALE_PER_SAMPLE: tl.constexpr,
    ROW_PER_SAMPLE: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    RATIO: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUT_CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The dynamic threshold of each sample into `statistics[b, 0]`: first the bin, then with REFINE the value.

    shift: the bins are `1 << shift` bit patterns wide, and the second histogram has as many.
    """
    b, block, blocks = program_place(SAMPLE_AXIS)
    start = block.to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    live = lanes < tl.minimum(n - start, BLOCK).to(tl.int32)
    where = (b, batch, start, lanes, n, channels)
    # The first launch reads every sample: its loads wait for nothing.
    if not REFINE:
        inputs = load_inputs(sample_ptr, output_ptr, where, live, GUIDED, OUTPUT_CHANNELS_LAST)
    stride: tl.constexpr = 4 if METHOD == "apg" else 2
    workspace = workspace_ptr + b * row_size
    coarse = workspace + SLOTS
    fine = coarse + BINS
    max_value, ratio = load_limit(limit_ptr, MAX_VALUE, RATIO)
    lower, weight = quantile_rank(n, ratio)
    upper = lower + (weight > 0.0).to(tl.int32)
    bin = tl.load(workspace + BIN)
    # A sample whose threshold the first launch knew is not read again.
    if not REFINE or bin != DONE:
        # x0 before the limit, as the step kernel computes it.
        place, _ = table_row(tl.load(step_ptr + (b if ROW_PER_SAMPLE else 0)).to(tl.int64), num_steps)
        factor = tl.full([], 1.0, tl.float32)
        if RESCALED:
            factor = tl.load(statistics_ptr + b * stride + 1)
        x0_columns = load_x0_columns(
            table_ptr + place * COLUMNS, row_of_ratios(ratios_ptr, place), 0.0, sample_ptr.dtype.element_ty
        )
        if REFINE:
            inputs = load_inputs(sample_ptr, output_ptr, where, live, GUIDED, OUTPUT_CHANNELS_LAST)
        if METHOD == "apg":
            guidance = load_projection(statistics_ptr, b)
        else:
            guidance = load_guidance(guidance_ptr, b, SCALE_PER_SAMPLE)
        _, _, x0 = predict(inputs, guidance, x0_columns, factor, GUIDED, RESCALED, COND_FIRST, METHOD)
        bits = tl.abs(x0).to(tl.int32, bitcast=True)
        if REFINE:
            # UP_TO_ONE is an empty bin: all of (1, ...) is above it.
            floor = ONE_BITS + 1 + tl.maximum(bin - FIRST_BIN, 0) * (1 << shift)
            end = ONE_BITS + (bin - UP_TO_ONE) * (1 << shift)
            inside = live & (bits >= floor) & (bits <= end)
            tl.atomic_add(fine + (bits - floor), 1, mask=inside, sem="relaxed")
            above = tl.max(tl.where(live & (bits > end), LARGEST_INT - bits, 0), 0)
            tl.atomic_max(workspace + ABOVE, above, sem="relaxed")
            if bin == UP_TO_ONE:
                largest = tl.max(tl.where(live & (bits <= ONE_BITS), bits, 0), 0)
                tl.atomic_max(workspace + LARGEST_TO_ONE, largest, sem="relaxed")
            if take_ticket(workspace, blocks):
                if bin == UP_TO_ONE:
                    below = tl.load(workspace + LARGEST_TO_ONE, volatile=True)
                    next_above = LARGEST_INT - tl.load(workspace + ABOVE, volatile=True)
                else:
                    seen = tl.load(workspace + BELOW_BIN, volatile=True)
                    below = LARGEST_INT - tl.load(workspace + ABOVE, volatile=True)
                    next_above = below
                    width = 1 << shift
                    for k in range(0, width, BINS):
                        entry = k + tl.arange(0, BINS)
                        counts = tl.load(fine + entry, mask=entry < width, other=0, volatile=True)
                        totals = seen + tl.cumsum(counts, 0)
                        patterns = floor + entry
                        # The first pattern at which the count passes the rank.
                        below = tl.minimum(below, tl.min(tl.where(totals > lower, patterns, LARGEST_INT), 0))
                        next_above = tl.minimum(next_above, tl.min(tl.where(totals > upper, patterns, LARGEST_INT), 0))
                        tl.store(fine + entry, tl.zeros_like(entry), mask=entry < width)
                        seen += tl.sum(counts, 0)
                # Every warp has to have read the counters before one of them clears these.
                tl.debug_barrier()
                tl.store(workspace + ABOVE, 0)
                tl.store(workspace + LARGEST_TO_ONE, 0)
                tl.store(workspace + BIN, DONE)
                tl.store(workspace + BELOW_BIN, 0)
                tl.store(statistics_ptr + b * stride, limit_scale(below, next_above, weight, max_value))
        else:
            ceiling = max_value.to(tl.int32, bitcast=True)
            # Two counts in one sum, of 16 bits each.
            tl.static_assert(BLOCK < 1 << 15)
            kinds = (bits <= ONE_BITS).to(tl.int32) + ((bits >= INFINITY_BITS).to(tl.int32) << 16)
            counted = tl.sum(tl.where(live, kinds, 0), 0)
            tl.atomic_add(workspace + AT_MOST_ONE, counted & 0xFFFF, sem="relaxed")
            if counted > 0xFFFF:
                tl.atomic_add(workspace + INFINITIES, counted >> 16, sem="relaxed")
                nans = tl.sum((live & (bits > INFINITY_BITS)).to(tl.int32), 0)
                tl.atomic_add(workspace + NANS, nans, sem="relaxed")
            between = live & (bits > ONE_BITS) & (bits <= ceiling)
            tl.atomic_add(coarse + ((bits - ONE_BITS - 1) >> shift), 1, mask=between, sem="relaxed")
            if take_ticket(workspace, blocks):
                at_most_one = tl.load(workspace + AT_MOST_ONE, volatile=True)
                nans = tl.load(workspace + NANS, volatile=True)
                finite = tl.cast(n, tl.int32) - tl.load(workspace + INFINITIES, volatile=True)
                entry = tl.arange(0, BINS)
                counts = tl.load(coarse + entry, volatile=True)
                totals = at_most_one + tl.cumsum(counts, 0)
                in_range = at_most_one + tl.sum(counts, 0)
                tl.store(coarse + entry, tl.zeros_like(entry))
                bin = tl.full([], DONE, tl.int32)
                scale = tl.full([], 1.0, tl.float32)
                below_bin = at_most_one
                if nans > 0:
                    scale = float("nan")
                elif at_most_one > upper:
                    scale = tl.full([], 1.0, tl.float32)
                elif at_most_one > lower:
                    bin = tl.full([], UP_TO_ONE, tl.int32)
                elif in_range > lower:
                    bin = tl.sum((totals <= lower).to(tl.int32), 0) + FIRST_BIN
                    below_bin = tl.max(tl.where(totals <= lower, totals, at_most_one), 0)
                else:
                    # Over max_value, unless torch.lerp's own arithmetic on infinities gives NaN.
                    below = tl.where(finite > lower, ceiling, INFINITY_BITS)
                    above = tl.where(finite > upper, ceiling, INFINITY_BITS)
                    scale = limit_scale(below, above, weight, max_value)
                if bin != DONE:
                    tl.store(workspace + BIN, bin)
                    tl.store(workspace + BELOW_BIN, below_bin)
                tl.store(workspace + AT_MOST_ONE, 0)
                tl.store(workspace + NANS, 0)
                tl.store(workspace + INFINITIES, 0)
                tl.store(statistics_ptr + b * stride, scale)
