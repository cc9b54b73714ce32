"""The fused DDIM step: one Triton kernel from the raw model output to the next model input.

For each element of each sample, in float32, with the sample's own row of coefficients:

    out    = uncond + guidance_scale * (cond - uncond), rescaled towards cond's standard deviation
    x0     = limit(x0_from_x * x + x0_from_output * out)
    x_next = next_from_x * x + next_from_output * out + next_from_x0 * x0 + noise_scale * noise

and, from a table that looks back, next_from_previous_x0 times the x0 of the step before. With CFG++ `next_from_output` is
the factor of uncond; adaptive projected guidance is `out = cond + excess * ((cond - uncond) - kept * cond)`. A coefficient of 0
leaves its term out, as in the reference: an infinite model output must not turn into NaN there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from fastddim.kernels.philox import STREAM_STEP, normal_block, product

ONE_BITS = tl.constexpr(0x3F800000)
INFINITY_BITS = tl.constexpr(0x7F800000)
LARGEST_INT = tl.constexpr(0x7FFFFFFF)
NUM_COLUMNS = tl.constexpr(6)
# Set, if at all, before triton is imported, which decides what `jit` makes of these functions.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def fused(a, b, c):
    """`a * b + c`, rounded once; `a` may be a scalar."""
    if INTERPRETED:
        # The interpreter's own rounds the product too. float64 holds it exactly.
        result = (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        result = tl.fma(tl.zeros_like(c) + a, b, c)
    return result


@triton.jit
def add_term(total, coefficient, term):
    """`total + coefficient * term`, where a coefficient of 0 leaves even an infinite term out."""
    if coefficient != 0.0:
        total = fused(coefficient, term, total)
    return total


@triton.jit
def load_split(column):
    """A column as two float32 numbers: its rounding, and what that leaves of a float64 column."""
    exact = tl.load(column)
    high = exact.to(tl.float32)
    return high, tl.where(tl.abs(high) < float("inf"), exact - high, 0.0).to(tl.float32)


@triton.jit
def row_of_ratios(ratios_ptr, place):
    """Where a row's two ratios are; None where there are none."""
    ratios = None
    if ratios_ptr is not None:
        ratios = ratios_ptr + place * 2
    return ratios


@triton.jit
def load_x0_columns(columns, ratios, poison, DTYPE: tl.constexpr):
    """What `predict` needs of a row for a state of DTYPE: `(x0_from_x, x0_from_output, ratio, ratio_low)`.

    Where the terms of x0 cancel, an ulp of a half-precision x0 is as small as their float32 rounding. There x0 is
    `x0_from_x * (x + (ratio + ratio_low) * out)`, unless a column is 0: then so is the ratio. ratios: where the row's two
    numbers are, or None.
    """
    from_x, from_x_low = load_split(columns)
    from_output, from_output_low = load_split(columns + 1)
    ratio = tl.full([], 0.0, tl.float32)
    ratio_low = tl.full([], 0.0, tl.float32)
    if DTYPE != tl.float32:
        if ratios is not None:
            ratio = tl.load(ratios)
            ratio_low = tl.load(ratios + 1)
        elif from_x != 0.0:
            ratio = tl.div_rn(from_output, from_x)
            rest = fused(-ratio, from_x, from_output) + fused(-ratio, from_x_low, from_output_low)
            ratio_low = tl.div_rn(rest, from_x)
    return from_x + poison, from_output + poison, ratio, ratio_low


@triton.jit
def program_place(SAMPLE_AXIS: tl.constexpr):
    """A program's sample, and its place among the programs of that sample and their number. SAMPLE_AXIS: `make_grid`'s."""
    if SAMPLE_AXIS < 0:
        b = tl.full([], 0, tl.int64)
        block = tl.program_id(0)
        blocks = tl.num_programs(0)
    else:
        b = tl.program_id(SAMPLE_AXIS).to(tl.int64)
        block = tl.program_id(1 - SAMPLE_AXIS)
        blocks = tl.num_programs(1 - SAMPLE_AXIS)
    return b, block, blocks


@triton.jit
def table_row(row, num_steps):
    """The row of an index, negative ones counted from the end, and whether there is one; row 0 if not."""
    counted = tl.where(row < 0, row + num_steps, row)
    # Unsigned, so that one comparison has both ends.
    inside = counted.to(tl.uint64) < tl.cast(num_steps, tl.uint64)
    return tl.where(inside, counted.to(tl.int32), 0), inside


@triton.jit
def locate(ptr, first, where, CHANNELS_LAST: tl.constexpr):
    """The addresses of elements `start + lanes` (in C order) of the sample whose memory begins at `ptr + first`.

    where: `(b, batch, start, lanes, n, channels)`: the sample, how many there are, and what it is of n elements and
    channels.
    """
    _, _, start, lanes, n, channels = where
    if CHANNELS_LAST:
        element = start.to(tl.int32) + lanes
        pixels = n // channels
        address = ptr + first + ((element % pixels) * channels + element // pixels)
    else:
        # The scalars first: one 64-bit addition a program, and the lanes stay 32-bit.
        address = (ptr + (first + start)) + lanes
    return address


@triton.jit
def live_lanes(start, lanes, n, EVEN: tl.constexpr):
    """Which of the elements `start + lanes` a sample of n has; None where all of them."""
    live = None
    if not EVEN:
        live = lanes < tl.minimum(n - start, lanes.shape[0]).to(tl.int32)
    return live


@triton.jit
def load(ptr, first, where, live, CHANNELS_LAST: tl.constexpr):
    """The elements that `locate` finds, in float32."""
    return tl.load(locate(ptr, first, where, CHANNELS_LAST), mask=live).to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Round float32 to DTYPE, ties to even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter's own conversion truncates.
        bits = x.to(tl.int32, bitcast=True)
        rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000) >> 16
        result = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(DTYPE)
    return result


@triton.jit
def store(ptr, first, where, live, x, CHANNELS_LAST: tl.constexpr):
    """The counterpart of `load`, rounded to the pointer's dtype."""
    tl.store(locate(ptr, first, where, CHANNELS_LAST), narrow(x, ptr.dtype.element_ty), mask=live)


@triton.jit
def load_halves(output_ptr, where, live, GUIDED: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The two halves of a stacked model output, in its dtype; without guidance twice the same one."""
    b, batch, _, _, n, _ = where
    first = tl.load(locate(output_ptr, b * n, where, CHANNELS_LAST), mask=live)
    second = first
    if GUIDED:
        half = tl.cast(batch, tl.int64) * n
        second = tl.load(locate(output_ptr, b * n + half, where, CHANNELS_LAST), mask=live)
    return first, second


@triton.jit
def load_inputs(sample_ptr, output_ptr, where, live, GUIDED: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The state and the halves of the model's output, in their dtypes, from addresses that no other load decides."""
    b, _, _, _, n, _ = where
    x = tl.load(locate(sample_ptr, b * n, where, False), mask=live)
    return x, load_halves(output_ptr, where, live, GUIDED, CHANNELS_LAST)


@triton.jit
def load_guidance(guidance_ptr, b, SCALE_PER_SAMPLE: tl.constexpr):
    """The sample's guidance scale; None where there is none."""
    scale = None
    if guidance_ptr is not None:
        scale = tl.load(guidance_ptr + (b if SCALE_PER_SAMPLE else 0)).to(tl.float32)
    return scale


@triton.jit
def split_halves(halves, COND_FIRST: tl.constexpr):
    """`(cond, uncond)` in float32."""
    first, second = halves
    if COND_FIRST:
        cond, uncond = first, second
    else:
        cond, uncond = second, first
    return cond.to(tl.float32), uncond.to(tl.float32)


@triton.jit
def guide(cond, uncond, scale, METHOD: tl.constexpr):
    """`uncond + scale * (cond - uncond)`; projected, with the two numbers of `projection` in place of the scale."""
    if METHOD == "apg":
        excess, kept = scale
        out = fused(excess, fused(-kept, cond, cond - uncond), cond)
    else:
        # torch.lerp starts from the nearer end, which decides where infinities cancel.
        from_cond = scale >= 0.5
        weight = tl.where(from_cond, scale - 1.0, scale)
        out = fused(weight, cond - uncond, tl.where(from_cond, cond, uncond))
    return out


@triton.jit
def projection_sums(cond, uncond, live):
    """The sums of diff * diff, diff * cond and cond * cond over the live elements, diff being `cond - uncond`."""
    diff = tl.where(live, cond - uncond, 0.0)
    kept = tl.where(live, cond, 0.0)
    return tl.sum(product(diff, diff), 0), tl.sum(product(diff, kept), 0), tl.sum(product(kept, kept), 0)


@triton.jit
def projection(sums, scale, APG_ETA: tl.constexpr, APG_NORM_THRESHOLD: tl.constexpr):
    """`(excess, kept)` of a sample's adaptive projected guidance, from its `projection_sums`."""
    square, along, size = sums
    excess = scale - 1.0
    if APG_NORM_THRESHOLD > 0.0:
        shrink = tl.div_rn(tl.full([], APG_NORM_THRESHOLD, tl.float32), tl.sqrt_rn(square))
        # Not `minimum`, which would lose a NaN.
        excess = product(excess, tl.where(shrink > 1.0, 1.0, shrink))
    share = tl.where(size == 0.0, 0.0, tl.div_rn(along, size))
    return excess, product(share, 1.0 - APG_ETA)


@triton.jit
def load_projection(statistics_ptr, b):
    """What the launch before has left of a sample's `projection`."""
    return tl.load(statistics_ptr + b * 4 + 2), tl.load(statistics_ptr + b * 4 + 3)


@triton.jit
def predict(
    inputs,
    scale,
    x0_columns,
    factor,
    GUIDED: tl.constexpr,
    RESCALED: tl.constexpr,
    COND_FIRST: tl.constexpr,
    METHOD: tl.constexpr,
):
    """The state, the output that epsilon comes from, and x0 before the limit, in float32.

    That output is the model's (guided, rescaled) one; with METHOD "cfg++" its unconditional half.

    inputs, x0_columns: of `load_inputs` and `load_x0_columns`.
    scale: what `load_guidance` gives, or `projection` with METHOD "apg".
    """
    raw, halves = inputs
    x = raw.to(tl.float32)
    if GUIDED:
        cond, uncond = split_halves(halves, COND_FIRST)
        out = guide(cond, uncond, scale, METHOD)
        if RESCALED:
            out = out * factor
    else:
        out = halves[0].to(tl.float32)
    x0_from_x, x0_from_output, ratio, ratio_low = x0_columns
    if raw.dtype != tl.float32 and ratio != 0.0:
        total = fused(ratio, out, x)
        # An infinity has to stay one.
        x0 = x0_from_x * tl.where(tl.abs(total) < float("inf"), fused(ratio_low, out, total), total)
    else:
        x0 = add_term(x0_from_x * x, x0_from_output, out)
    if METHOD == "cfg++":
        out = uncond
    return x, out, x0


@triton.jit
def deviation(x, live, n):
    """Unbiased standard deviation of the n live elements; NaN for one element, as in torch."""
    count = tl.cast(n, tl.float32)
    mean = tl.div_rn(tl.sum(tl.where(live, x, 0.0), 0), count)
    centred = tl.where(live, x - mean, 0.0)
    return tl.sqrt_rn(tl.div_rn(tl.sum(product(centred, centred), 0), count - 1.0))


@triton.jit
def rescale_factor(std_cond, std_guided, phi):
    return product(phi, tl.div_rn(std_cond, std_guided)) + (1.0 - phi)


@triton.jit
def load_limit(limit_ptr, RANGE: tl.constexpr, RATIO: tl.constexpr):
    """The limit's range (float32) and ratio (float64): the constants, or what `limit_ptr` has in their place."""
    if limit_ptr is not None:
        limit_range = tl.load(limit_ptr).to(tl.float32)
        ratio = tl.load(limit_ptr + 1).to(tl.float64)
    else:
        limit_range = tl.full([], RANGE, tl.float32)
        ratio = tl.full([], RATIO, tl.float64)
    return limit_range, ratio


@triton.jit
def quantile_rank(n, ratio):
    """`torch.quantile`'s rank of a float64 ratio among n: the lower index, and the weight of the one above it."""
    if n > 16777216:
        # torch counts in float64 where float32 cannot.
        exact = product(ratio, tl.cast(n - 1, tl.float64))
        lower = exact.to(tl.int32)
        weight = (exact - lower.to(tl.float64)).to(tl.float32)
    else:
        rank = product(ratio.to(tl.float32), tl.cast(n - 1, tl.float32))
        lower = rank.to(tl.int32)
        weight = rank - lower.to(tl.float32)
    return lower, weight


@triton.jit
def limit_scale(below_bits, above_bits, weight, max_value):
    """torch.lerp between two neighbouring order statistics (given as bit patterns), clamped to [1, max_value]."""
    below = below_bits.to(tl.float32, bitcast=True)
    above = above_bits.to(tl.float32, bitcast=True)
    gap = above - below
    near_below = weight < 0.5
    # torch.lerp fuses its multiplication and addition; float64 holds the product of two float32 exactly.
    base = tl.where(near_below, below, above).to(tl.float64)
    factor = tl.where(near_below, weight, -(1.0 - weight)).to(tl.float64)
    quantile = tl.fma(factor, gap.to(tl.float64), base).to(tl.float32)
    clamped = tl.where(quantile > max_value, max_value, tl.where(quantile < 1.0, 1.0, quantile))
    return clamped.to(tl.float32)


@triton.jit
def threshold_scale(x0, live, n, ratio, max_value):
    """The dynamic threshold of a whole sample in one program: `clamp(torch.quantile(|x0|, ratio), 1, max_value)`.

    Magnitudes are ordered as their bit patterns are, so bisection on the pattern ends at the exact order statistic.
    """
    lower, weight = quantile_rank(n, ratio)
    upper = lower + (weight > 0.0).to(tl.int32)
    bits = tl.abs(x0).to(tl.int32, bitcast=True)
    top = tl.max(tl.where(live, bits, 0), 0)
    bits = tl.where(live, bits, LARGEST_INT)
    at_most_one = tl.sum((bits <= ONE_BITS).to(tl.int32), 0)
    scale = tl.full([], 1.0, tl.float32)
    if top > INFINITY_BITS:
        scale = float("nan")
    elif at_most_one <= upper:
        lo = tl.full([], ONE_BITS, tl.int32)
        hi = top
        hi_count = tl.cast(n, tl.int32)
        if at_most_one > lower:
            hi = lo
            hi_count = at_most_one
        else:
            ceiling = max_value.to(tl.int32, bitcast=True)
            if (top > ceiling) & (top < INFINITY_BITS):
                count = tl.sum((bits <= ceiling).to(tl.int32), 0)
                if count > lower:
                    hi = ceiling
                    hi_count = count
                else:
                    # The quantile is over max_value, by how much does not matter.
                    lo = top
            # count(lo) <= lower < count(hi); with just lower + 1 up to hi, the largest of them is the one.
            while (hi - lo > 1) & (hi_count != lower + 1):
                middle = lo + ((hi - lo) >> 1)
                count = tl.sum((bits <= middle).to(tl.int32), 0)
                if count > lower:
                    hi = middle
                    hi_count = count
                else:
                    lo = middle
        below = tl.max(tl.where(bits <= hi, bits, 0), 0)
        above = below
        if hi_count <= upper:
            above = tl.min(tl.where(bits > hi, bits, LARGEST_INT), 0)
        scale = limit_scale(below, above, weight, max_value)
    return scale


@triton.jit
def clamp(x, bound):
    """`clamp(x, -bound, bound)`, where NaN stays NaN."""
    upper = tl.zeros_like(x) + bound
    return tl.clamp(x, -upper, upper, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def apply_threshold(x0, scale):
    """`clamp(x0, -scale, scale) / scale`; a scale that is NaN makes every element NaN."""
    limited = clamp(x0, scale)
    if scale != 1.0:
        # One correction of the reciprocal's product is the rounded quotient, but where its remainder is denormal.
        inverse = tl.div_rn(tl.full([], 1.0, tl.float32), scale)
        quotient = limited * inverse
        limited = fused(inverse, fused(-scale, quotient, limited), quotient)
    return limited


@triton.jit
def advance_step(
    step_ptr,
    timesteps_ptr,
    next_timestep_ptr,
    index,
    row,
    num_steps,
    rows,
    ROW_PER_SAMPLE: tl.constexpr,
    COPIES: tl.constexpr,
):
    """Move an index on and write the timestep the next model call needs, for one sample or (a shared index) for all."""
    tl.store(step_ptr + index, (row + 1).to(step_ptr.dtype.element_ty))
    if timesteps_ptr is not None:
        if (row + 1 >= 0) & (row + 1 < num_steps):
            timestep = tl.load(timesteps_ptr + row + 1).to(next_timestep_ptr.dtype.element_ty)
            if ROW_PER_SAMPLE:
                for copy in tl.static_range(COPIES):
                    tl.store(next_timestep_ptr + index + copy * rows, timestep)
            else:
                for k in range(0, rows * COPIES, 128):
                    lanes = k + tl.arange(0, 128)
                    tl.store(next_timestep_ptr + lanes, timestep, mask=lanes < rows * COPIES)


@triton.jit(
    do_not_specialize=["batch", "num_steps", "channels", "rows"],
    do_not_specialize_on_alignment=[
        "table_ptr",
        "ratios_ptr",
        "step_ptr",
        "guidance_ptr",
        "rescale_ptr",
        "limit_ptr",
        "statistics_ptr",
        "seeds_ptr",
        "first_row_ptr",
        "timesteps_ptr",
        "next_timestep_ptr",
        "tickets_ptr",
    ],
)
def ddim_step_kernel(
    output_ptr,
    sample_ptr,
    table_ptr,
    ratios_ptr,
    step_ptr,
    guidance_ptr,
    rescale_ptr,
    limit_ptr,
    statistics_ptr,
    noise_ptr,
    seeds_ptr,
    first_row_ptr,
    next_ptr,
    x0_ptr,
    input_ptr,
    timesteps_ptr,
    next_timestep_ptr,
    tickets_ptr,
    n,
    batch,
    num_steps,
    channels,
    rows,
    GUIDED: tl.constexpr,
    COND_FIRST: tl.constexpr,
    METHOD: tl.constexpr,
    APG_ETA: tl.constexpr,
    APG_NORM_THRESHOLD: tl.constexpr,
    SCALE_PER_SAMPLE: tl.constexpr,
    RESCALE_PER_SAMPLE: tl.constexpr,
    ROW_PER_SAMPLE: tl.constexpr,
    LIMIT: tl.constexpr,
    RANGE: tl.constexpr,
    RATIO: tl.constexpr,
    WHOLE: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    OUTPUT_CHANNELS_LAST: tl.constexpr,
    INPUT_CHANNELS_LAST: tl.constexpr,
    ADVANCE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One step of BLOCK elements of one sample; with WHOLE, of a whole sample, which is updated CHUNK by CHUNK.

    step_ptr: None where the table has a row for each sample, in order.
    statistics_ptr: `[batch, 2]` float32, each sample's threshold and rescale factor, where WHOLE cannot give them; with METHOD
        "apg" `[batch, 4]`, with its `projection` behind them.
    tickets_ptr: int32 zeros, one for each index of step_ptr, where several programs read an index that moves on.
    METHOD, APG_ETA, APG_NORM_THRESHOLD: as the attributes of `Guidance`.
    rows: the batch size, also where `n` elements are those of a whole batch.
    LIMIT: "none", "clip" to RANGE, "threshold" with RATIO and at most RANGE, or "fixed", the threshold RANGE.
    limit_ptr: float64 range and ratio that take the place of RANGE and RATIO.
    COLUMNS: of the table; with the seventh, x0_ptr has the x0 of the step before.
    DEPENDENT: launched while the kernel before may still run; from sm_90 on.
    """
    if DEPENDENT:
        gdc_wait()
    b, block, blocks = program_place(SAMPLE_AXIS)
    start = block.to(tl.int64) * BLOCK
    first = b * n

    # Before anything that waits for the row: all loads of the large tensors are under way while that is read.
    lanes = tl.arange(0, CHUNK)
    early = None
    if not WHOLE:
        where = (b, batch, start, lanes, n, channels)
        present = live_lanes(start, lanes, n, EVEN)
        early = load_inputs(sample_ptr, output_ptr, where, present, GUIDED, OUTPUT_CHANNELS_LAST)
        # ptxas would move them behind the wait for the row.
        tl.debug_barrier()
    guidance = load_guidance(guidance_ptr, b, SCALE_PER_SAMPLE)
    row = b
    if step_ptr is not None:
        row = tl.load(step_ptr + (b if ROW_PER_SAMPLE else 0)).to(tl.int64)
    place, inside = table_row(row, num_steps)
    # No host sees this index, so one outside the table has to show: its results are NaN.
    poison = tl.where(inside, 0.0, float("nan"))
    columns = table_ptr + place * COLUMNS
    ratios = row_of_ratios(ratios_ptr, place)
    x0_columns = load_x0_columns(columns, ratios, poison, sample_ptr.dtype.element_ty)

    # A whole sample is reduced to two scalars; then the inputs are read again, as registers cannot hold both.
    factor = tl.full([], 1.0, tl.float32)
    scale = tl.full([], 1.0, tl.float32)
    limit_range, ratio = load_limit(limit_ptr, RANGE, RATIO)
    if WHOLE:
        every = tl.arange(0, BLOCK)
        present = every < tl.cast(n, tl.int32)
        sample = (b, batch, start, every, n, channels)
        if METHOD == "apg":
            halves = load_halves(output_ptr, sample, present, GUIDED, OUTPUT_CHANNELS_LAST)
            cond, uncond = split_halves(halves, COND_FIRST)
            guidance = projection(projection_sums(cond, uncond, present), guidance, APG_ETA, APG_NORM_THRESHOLD)
            tl.debug_barrier()
        if GUIDED and rescale_ptr is not None:
            phi = tl.load(rescale_ptr + (b if RESCALE_PER_SAMPLE else 0)).to(tl.float32)
            halves = load_halves(output_ptr, sample, present, GUIDED, OUTPUT_CHANNELS_LAST)
            cond, uncond = split_halves(halves, COND_FIRST)
            std_cond = deviation(cond, present, n)
            factor = rescale_factor(std_cond, deviation(guide(cond, uncond, guidance, METHOD), present, n), phi)
            tl.debug_barrier()
        if LIMIT == "threshold":
            early = load_inputs(sample_ptr, output_ptr, sample, present, GUIDED, OUTPUT_CHANNELS_LAST)
            _, _, whole = predict(
                early, guidance, x0_columns, factor, GUIDED, rescale_ptr is not None, COND_FIRST, METHOD
            )
            scale = threshold_scale(whole, present, n, ratio, limit_range)
            tl.debug_barrier()
    elif statistics_ptr is not None:
        size: tl.constexpr = 4 if METHOD == "apg" else 2
        scale = tl.load(statistics_ptr + b * size)
        factor = tl.load(statistics_ptr + b * size + 1)
        if METHOD == "apg":
            guidance = load_projection(statistics_ptr, b)

    # Not before: the statistics need every register.
    next_from_x = tl.load(columns + 2).to(tl.float32)
    next_from_output = tl.load(columns + 3).to(tl.float32)
    next_from_x0 = tl.load(columns + 4).to(tl.float32)
    noise_scale = tl.load(columns + 5).to(tl.float32)
    next_from_previous = tl.full([], 0.0, tl.float32)
    if COLUMNS > NUM_COLUMNS:
        next_from_previous = tl.load(columns + 6).to(tl.float32)

    for offset in range(0, n if WHOLE else 1, CHUNK):
        here = start + offset
        live = live_lanes(here, lanes, n, EVEN)
        where = (b, batch, here, lanes, n, channels)
        inputs = early
        if WHOLE:
            inputs = load_inputs(sample_ptr, output_ptr, where, live, GUIDED, OUTPUT_CHANNELS_LAST)
        x, out, x0 = predict(inputs, guidance, x0_columns, factor, GUIDED, rescale_ptr is not None, COND_FIRST, METHOD)
        if LIMIT == "clip":
            x0 = clamp(x0, limit_range)
        if LIMIT == "fixed":
            x0 = apply_threshold(x0, limit_range)
        if LIMIT == "threshold":
            x0 = apply_threshold(x0, scale)
        if COLUMNS > NUM_COLUMNS:
            previous = tl.zeros_like(x0)
            # At a run's first step it was never written.
            if next_from_previous != 0.0:
                previous = load(x0_ptr, first, where, live, False)
        # Before the noise is drawn, which needs the registers.
        if x0_ptr is not None:
            store(x0_ptr, first, where, live, x0, False)

        x_next = add_term(next_from_x0 * x0, next_from_output, out)
        x_next = add_term(x_next, next_from_x, x)
        if COLUMNS > NUM_COLUMNS:
            x_next = add_term(x_next, next_from_previous, previous)
        if noise_ptr is not None:
            noise = load(noise_ptr, first, where, live, False)
            x_next = add_term(x_next, noise_scale, noise)
        if seeds_ptr is not None:
            if noise_scale != 0.0:
                noise_step = row
                if first_row_ptr is not None:
                    noise_step = row - tl.load(first_row_ptr + b).to(tl.int64)
                noise = normal_block(tl.load(seeds_ptr + b), noise_step, here, CHUNK, STREAM_STEP)
                x_next = fused(noise_scale, noise, x_next)

        store(next_ptr, first, where, live, x_next, False)
        if input_ptr is not None:
            store(input_ptr, first, where, live, x_next, INPUT_CHANNELS_LAST)
            if GUIDED:
                second = first + tl.cast(batch, tl.int64) * n
                store(input_ptr, second, where, live, x_next, INPUT_CHANNELS_LAST)

    if ADVANCE:
        # Every warp has to have read the index before one of them moves it on.
        tl.debug_barrier()
        index = b if ROW_PER_SAMPLE else b * 0
        last = True
        if tickets_ptr is not None:
            readers = blocks
            if not ROW_PER_SAMPLE and SAMPLE_AXIS >= 0:
                readers = blocks * tl.num_programs(SAMPLE_AXIS)
            last = tl.atomic_add(tickets_ptr + index, 1, sem="acq_rel") == readers - 1
            if last:
                tl.store(tickets_ptr + index, 0)
        if last:
            copies: tl.constexpr = 2 if GUIDED else 1
            advance_step(
                step_ptr, timesteps_ptr, next_timestep_ptr, index, row, num_steps, rows, ROW_PER_SAMPLE, copies,
            )  # fmt: skip
