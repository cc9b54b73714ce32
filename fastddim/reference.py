"""The DDIM step in plain torch: the truth that every faster step is compared with, and the CPU's own path."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastddim.coefficients import Coefficient, StepCoefficients, StepTable
from fastddim.config import Clip, DynamicThreshold, Limit, with_numbers
from fastddim.noise import normal_for
from fastddim.step import Guidance, StepOptions, check_step

# A threshold's quantile of magnitudes: `[B, ...]` -> `[B]`.
Quantile = Callable[[torch.Tensor, DynamicThreshold], torch.Tensor]

# Above this many elements float32 no longer counts them one by one.
EXACT_FLOAT32_COUNT = 1 << 24
# Elements of a block, for each thread.
_BLOCK = 1 << 17
_LONG_ROW = 1 << 12


def abs_quantile(sample: torch.Tensor, ratio: float) -> torch.Tensor:
    """`torch.quantile(sample.flatten(1).abs(), ratio, dim=1)` to the bit, without its sort and its size limit.

    Args:
        sample: `[B, ...]`, float32 or float64.
        ratio: the quantile's, in [0, 1].

    Returns:
        `[B]`, the dtype of `sample`. A sample with a NaN gives NaN.
    """
    magnitudes = sample.reshape(sample.shape[0], math.prod(sample.shape[1:])).abs()
    n = magnitudes.shape[1]
    # torch.quantile takes the rank in the data's own dtype.
    exact = sample.dtype == torch.float64 or n > EXACT_FLOAT32_COUNT
    rank_dtype = torch.float64 if exact else torch.float32
    rank = torch.tensor(ratio, dtype=rank_dtype, device="cpu") * (n - 1)
    lower = int(rank)
    weight = float(rank - lower)
    upper = lower + (weight > 0)
    if 2 * lower >= n:
        largest = magnitudes.topk(n - lower, dim=1).values
        below, above, top = largest[:, n - lower - 1], largest[:, n - upper - 1], largest[:, 0]
    else:
        smallest = magnitudes.topk(upper + 1, dim=1, largest=False).values
        below, above, top = smallest[:, lower], smallest[:, upper], magnitudes.amax(dim=1)
    return torch.where(top.isnan(), top, torch.lerp(below, above, weight))


def apply_limit(x0: torch.Tensor, limit: Limit, quantile: Quantile | None = None) -> torch.Tensor:
    """Clip or dynamically threshold a fresh `x0` `[B, ...]`, in place where that is possible.

    Args:
        quantile: gives a threshold's `[B]` in place of `abs_quantile`, for graphs.
    """
    if limit is None:
        return x0
    if isinstance(limit, Clip):
        return x0.clamp_(-limit.range, limit.range)
    if limit.max_value <= 1:
        # The quantile is clamped to [1, max_value] from above last, so it cannot matter.
        return x0.clamp_(-limit.max_value, limit.max_value).div_(limit.max_value)
    found = abs_quantile(x0, limit.ratio) if quantile is None else quantile(x0, limit)
    scale = found.clamp(1.0, limit.max_value).view(-1, *[1] * (x0.ndim - 1))
    return torch.clamp(x0, -scale, scale).div_(scale)


def combine_guidance(model_output: torch.Tensor, guidance: Guidance) -> torch.Tensor:
    """The guided output of a stacked one, as `Guidance` describes it.

    Args:
        model_output: `[2 * B, ...]`, unconditional half first (unless `cond_first`), as diffusers stacks them.
        guidance: how to combine the halves.

    Returns:
        `[B, ...]`, the dtype of `model_output`.

    Raises:
        ValueError: an odd number of rows, or per-sample values that are not `[B]`.
    """
    batch = model_output.shape[0] // 2
    if 2 * batch != model_output.shape[0]:
        raise ValueError(f"model_output: {model_output.shape[0]} rows; pass two halves of one batch, [2 * B, ...]")
    uncond, cond = split_halves(model_output, guidance)
    scale = _per_sample(guidance.scale, cond)
    guided = _project(uncond, cond, scale, guidance) if guidance.method == "apg" else torch.lerp(uncond, cond, scale)
    if not guidance.rescaled:
        return guided
    # One row per sample: over no dimension at all, as a state [B] would have it, torch reduces the whole batch.
    ratio = _std(cond.reshape(batch, -1)) / _std(guided.reshape(batch, -1))
    ratio = ratio.view(-1, *[1] * (cond.ndim - 1))
    phi = _per_sample(guidance.rescale, cond)
    return guided * (phi * ratio + (1 - phi))


def _std(rows: torch.Tensor) -> torch.Tensor:
    """`rows.std(1)`; one by one where they are long, for which torch has a faster kernel that sums in float64."""
    if rows.device.type != "cpu" or rows.shape[1] < _LONG_ROW or torch.compiler.is_compiling():
        return rows.std(1)
    return torch.stack([row.std() for row in rows]) if len(rows) else rows.std(1)


def split_halves(model_output: torch.Tensor, guidance: Guidance) -> tuple[torch.Tensor, torch.Tensor]:
    """The unconditional and the conditional half of a stacked output, `[B, ...]` each."""
    batch = model_output.shape[0] // 2
    first, second = model_output[:batch], model_output[batch:]
    return (second, first) if guidance.cond_first else (first, second)


def find_direction(model_output: torch.Tensor, guidance: Guidance) -> torch.Tensor | None:
    """The output `[B, ...]` that epsilon comes from; None where that is the guided one."""
    return split_halves(model_output, guidance)[0] if guidance.method == "cfg++" else None


def _project(uncond: torch.Tensor, cond: torch.Tensor, scale: Coefficient, guidance: Guidance) -> torch.Tensor:
    """Adaptive projected guidance, in terms of three sums for each sample."""
    difference = cond - uncond

    def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).reshape(a.shape[0], -1).sum(1).view(-1, *[1] * (a.ndim - 1))

    excess = scale - 1
    if guidance.apg_norm_threshold:
        norm = dot(difference, difference).sqrt()
        excess = excess * (guidance.apg_norm_threshold / norm).clamp(max=1.0)
    size = dot(cond, cond)
    # A conditional half of zeros has no direction to project on.
    share = torch.where(size == 0, 0.0, dot(difference, cond) / size)
    return cond + excess * (difference - (1 - guidance.apg_eta) * share * cond)


def ddim_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    options: StepOptions,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`fastddim.ddim_step` in plain torch: guidance, x0, limit, direction, noise, and the next model input.

    Arithmetic is float64 where a tensor is, float32 otherwise. Differentiable, unless `out` or `model_input` is given.

    Raises:
        TypeError, ValueError, IndexError: as `fastddim.ddim_step`.
    """
    check_step(model_output, sample, table, step, options)
    limit, out = options.limit, options.out
    if out is not None and options.noise is not None and out.data_ptr() == options.noise.data_ptr():
        raise ValueError("out: the same memory as noise, which is read last; pass the state or another tensor")
    if options.limit_values is not None:
        limit = with_numbers(limit, *options.limit_values.tolist())
    row = _look_up(table, step, sample, compute_dtype(model_output, sample, options.noise))
    if options.noise is None and options.seeds is None and _is_stochastic(row):
        raise ValueError(
            f"noise: None, but step {step} adds noise; pass a standard normal tensor like the state, or seeds"
        )
    results = _take(model_output, sample, row, step, limit, options)
    if options.advance:
        assert isinstance(step, torch.Tensor)
        advance(step, options, sample.shape[0])
    return results


def compute_dtype(model_output: torch.Tensor, sample: torch.Tensor, noise: torch.Tensor | None) -> torch.dtype:
    """The dtype of a step's arithmetic."""
    wide = torch.float64 in (model_output.dtype, sample.dtype, None if noise is None else noise.dtype)
    return torch.float64 if wide else torch.float32


def _take(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    row: StepCoefficients,
    step: int | torch.Tensor,
    limit: Limit,
    options: StepOptions,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A checked step: its results, and the model's input."""
    noise, seeds, out = options.noise, options.seeds, options.out
    compute = compute_dtype(model_output, sample, noise)
    if seeds is not None and not _is_zero(row.noise_scale):
        first = options.first_row
        rows = torch.as_tensor(step, device=sample.device) if first is None else step - first
        noise = normal_for(seeds, rows, sample.shape[1:])
    if goes_by_blocks(model_output, sample, row, limit, noise, options):
        return step_by_blocks(model_output, sample, row, limit, noise, options)
    output, direction = _cast(model_output, compute), None
    if options.guidance is not None:
        direction = find_direction(output, options.guidance)
        output = combine_guidance(output, options.guidance)
    state_dtype = sample.dtype if out is None else out.dtype
    direct_out = out if out is not None and out.dtype == compute else None
    previous = None if options.previous_x0 is None else _cast(options.previous_x0, compute)
    noise = None if noise is None else _cast(noise, compute)
    x_next, x0 = step_with_row(
        output, _cast(sample, compute), row, limit, noise, direct_out, previous_x0=previous, direction=direction
    )
    if options.previous_x0 is not None:
        x0 = options.previous_x0.copy_(x0)
    if options.model_input is not None:
        options.model_input.view(-1, *sample.shape).copy_(x_next)
    if direct_out is None:
        x_next = _cast(x_next, state_dtype) if out is None else out.copy_(x_next)
    if options.previous_x0 is None:
        x0 = _cast(x0, state_dtype)
    return x_next, x0 if options.return_x0 else None


def goes_by_blocks(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    row: StepCoefficients,
    limit: Limit,
    noise: torch.Tensor | None,
    options: StepOptions,
) -> bool:
    """Whether `step_by_blocks` takes a step: a large one in half precision on a CPU, in which no element needs another."""
    guidance, out = options.guidance, options.out
    if sample.numel() <= _BLOCK or sample.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if sample.dtype.itemsize > 2 and (out is None or out.dtype.itemsize > 2) and model_output.dtype.itemsize > 2:
        return False
    numbers = (*row, *(() if guidance is None else (guidance.scale, guidance.rescale)))
    if any(isinstance(number, torch.Tensor) for number in numbers):
        return False
    if guidance is not None and (guidance.rescaled or guidance.method == "apg"):
        return False
    if isinstance(limit, DynamicThreshold) and limit.max_value > 1:
        return False
    read = [model_output, sample] if noise is None else [model_output, sample, noise]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read):
        return False
    written = [tensor for tensor in (out, options.previous_x0, options.model_input) if tensor is not None]
    in_place = out is not None and out.data_ptr() == sample.data_ptr() and out.dtype == sample.dtype
    if in_place:
        del read[1]
    # A block must not write over what a later one reads.
    storages = {tensor.untyped_storage().data_ptr() for tensor in read}
    return all(tensor.is_contiguous() for tensor in (*read, sample, *written)) and not any(
        tensor.untyped_storage().data_ptr() in storages for tensor in written
    )


def step_by_blocks(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    row: StepCoefficients,
    limit: Limit,
    noise: torch.Tensor | None,
    options: StepOptions,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A step in blocks of elements whose float32 values stay in the processor's cache, on contiguous tensors."""
    guidance, compute = options.guidance, compute_dtype(model_output, sample, noise)
    x_next = torch.empty_like(sample) if options.out is None else options.out
    x0 = torch.empty_like(x_next) if options.previous_x0 is None else options.previous_x0
    n = sample.numel()
    block = min(n, _BLOCK * torch.get_num_threads())
    read, written = (model_output, sample, noise, options.previous_x0), (x_next, x0, options.model_input)
    # The same memory for each block's float32 values.
    spare = [None if each is None or each.dtype == compute else _room(each, n, block, compute) for each in read]
    # The state is not needed for the next one; its memory, and that of the output, is free for the results.
    frees_state = _is_zero(row.next_from_x) and spare[1] is not None and (spare[0] is not None or guidance is not None)
    for given in zip(*(_blocks(each, n, block) for each in (*read, *written)), strict=True):
        output, x, drawn, previous = map(_widen, given[:4], spare)
        direction = None
        if guidance is not None:
            direction = find_direction(output, guidance)
            output = combine_guidance(output, guidance)
        x0_room, room = (x, output) if frees_state else (None, None if spare[1] is None else x)
        values, x0_values = step_with_row(
            output, x, row, limit, drawn, room, previous_x0=previous, direction=direction, x0_out=x0_room
        )
        for result, found in zip(given[4:], (values, x0_values, values), strict=True):
            if result is not None:
                result.copy_(found)
    return x_next, x0 if options.return_x0 else None


def _room(tensor: torch.Tensor, n: int, block: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tensor.numel() // n, block, dtype=dtype, device=tensor.device)


def _blocks(tensor: torch.Tensor | None, n: int, block: int) -> Iterable[torch.Tensor | None]:
    """Columns of `[copies, n]`, `block` at a time."""
    if tensor is None:
        return itertools.repeat(None, -(-n // block))
    blocks: tuple[torch.Tensor, ...] = torch.split(tensor.view(-1, n), block, 1)
    return blocks


def _widen(block: torch.Tensor | None, spare: torch.Tensor | None) -> Any:
    """A block's values in `spare`; the block itself where it needs none."""
    if block is None or spare is None:
        return block
    return (spare if spare.shape == block.shape else spare[:, : block.shape[1]]).copy_(block)


def advance(step: torch.Tensor, options: StepOptions, batch: int) -> None:
    """Add one to the row, and fill `next_timestep` with what the model is called with there."""
    step.add_(1)
    timesteps, next_timestep = options.timesteps, options.next_timestep
    if timesteps is not None and next_timestep is not None:
        following = timesteps[step.clamp_max(len(timesteps) - 1).reshape(-1)].to(next_timestep.dtype)
        kept = next_timestep.view(-1, batch)
        kept.copy_(torch.where(step < len(timesteps), following, kept))


class PreparedStep:
    """`ddim_step` with everything but `model_output` and `step` given, and checked once.

    It holds references to the tensors it was made with.
    """

    def __init__(
        self, model_output: torch.Tensor, sample: torch.Tensor, table: StepTable, options: StepOptions
    ) -> None:
        """Check. Arguments as `ddim_step`'s.

        Args:
            model_output: a tensor of the shape, dtype and device that all calls' will have.
            options: without `advance`; the row is given to each call.

        Raises:
            TypeError, ValueError: as `ddim_step`; a stochastic table without noise or seeds.
        """
        check_prepared(model_output, sample, table, options)
        limit = options.limit
        self._limit = limit if options.limit_values is None else with_numbers(limit, *options.limit_values.tolist())
        self._sample, self._rows, self._options = sample, table.rows, options
        self._shape, self._dtype, self._device = model_output.shape, model_output.dtype, model_output.device
        dtypes = {model_output.dtype, sample.dtype, None if options.out is None else options.out.dtype}
        extra = (options.guidance, options.noise, options.seeds, options.previous_x0, options.model_input)
        # Nothing but the two lines of maths.
        self._bare = dtypes == {torch.float32} and all(each is None for each in extra)

    def fits(self, model_output: torch.Tensor) -> bool:
        """Whether `model_output` has the shape, dtype and device that this step was prepared for."""
        return (
            model_output.shape == self._shape
            and model_output.dtype is self._dtype
            and model_output.device == self._device
        )

    def __call__(self, model_output: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take the step: `(x_next, x0)`. `model_output` is one that `fits`, and `step` in the table."""
        if self._bare:
            return step_with_row(model_output, self._sample, self._rows[step], self._limit, None, self._options.out)
        return _take(model_output, self._sample, self._rows[step], step, self._limit, self._options)


def check_prepared(model_output: torch.Tensor, sample: torch.Tensor, table: StepTable, options: StepOptions) -> None:
    """Check the arguments of a step that is prepared for all rows of a table.

    Raises:
        TypeError, ValueError: as `ddim_step`; a stochastic table without noise or seeds.
    """
    if not isinstance(table, StepTable):
        raise TypeError(f"table: {type(table).__name__}; pass a StepTable")
    check_step(model_output, sample, table, 0, options)
    out, noise = options.out, options.noise
    if noise is None and options.seeds is None and table.stochastic:
        raise ValueError("noise: None, but the table adds noise; pass a standard normal tensor, or seeds")
    if out is not None and noise is not None and out.data_ptr() == noise.data_ptr():
        raise ValueError("out: the same memory as noise, which is read last; pass the state or another tensor")


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, which costs as much as a small operation where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def step_with_row(
    output: torch.Tensor,
    x: torch.Tensor,
    row: StepCoefficients,
    limit: Limit,
    noise: torch.Tensor | None,
    out: torch.Tensor | None = None,
    quantile: Quantile | None = None,
    previous_x0: torch.Tensor | None = None,
    direction: torch.Tensor | None = None,
    x0_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two lines of maths, on checked tensors of one dtype, in as few passes as torch has: `(x_next, x0)`.

    Args:
        direction: what `next_from_output` is the factor of, where that is not the output of x0.
        x0_out: where x0 goes; may be `x`, where `next_from_x` is 0.
    """
    x0 = apply_limit(_combine(x, row.x0_from_x, output, row.x0_from_output, x0_out), limit, quantile)
    output = output if direction is None else direction
    if _is_zero(row.next_from_x):
        x_next = _combine(output, row.next_from_output, x0, row.next_from_x0, out)
    elif _is_zero(row.next_from_output):
        x_next = _combine(x, row.next_from_x, x0, row.next_from_x0, out)
    else:
        x_next = _combine(x, row.next_from_x, output, row.next_from_output, out)
        x_next = _add_scaled(x_next, x0, row.next_from_x0)
    if previous_x0 is not None and not _is_zero(row.next_from_previous_x0):
        x_next = _add_scaled(x_next, previous_x0, row.next_from_previous_x0)
    if noise is not None and not _is_zero(row.noise_scale):
        x_next = _add_scaled(x_next, noise, row.noise_scale)
    return x_next, x0


def _is_stochastic(row: StepCoefficients) -> bool:
    scale = row.noise_scale
    if isinstance(scale, torch.Tensor):
        # Rows on a device are not read on the host: there the caller answers for the noise.
        return scale.device.type == "cpu" and not torch.compiler.is_compiling() and bool((scale != 0).any())
    return scale != 0


def _is_zero(coefficient: Coefficient) -> bool:
    return coefficient.__class__ is float and coefficient == 0.0


def _combine(
    a: torch.Tensor, a_scale: Coefficient, b: torch.Tensor, b_scale: Coefficient, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`a_scale * a + b_scale * b` in a new tensor or `out`, which may be `a` or `b`."""
    if isinstance(a_scale, torch.Tensor) or isinstance(b_scale, torch.Tensor):
        return torch.add(_scaled(a, a_scale), _scaled(b, b_scale), out=out)
    # Factoring out the larger number leaves two roundings of the result's own size, and `alpha` is the cheapest scalar.
    if abs(a_scale) < abs(b_scale):
        a, a_scale, b, b_scale = b, b_scale, a, a_scale
    if b_scale == 0:
        return torch.mul(a, _scalar(a_scale, a.dtype), out=out)
    return torch.add(a, b, alpha=b_scale / a_scale, out=out).mul_(_scalar(a_scale, a.dtype))


_CPU = torch.device("cpu")
_SCALARS: dict[tuple[float, torch.dtype, torch.device], torch.Tensor] = {}


def _scalar(value: float, dtype: torch.dtype) -> torch.Tensor | float:
    """`value` as a tensor `[]`: torch makes a new one of a Python factor each time, at the cost of a small operation."""
    return value if torch.compiler.is_compiling() else kept_scalar(value, dtype, _CPU)


def kept_scalar(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A number as a tensor `[]` on a device, made once and kept; do not write to it."""
    kept = _SCALARS.get((value, dtype, device))
    if kept is None:
        with torch.inference_mode(False):
            kept = torch.tensor(value, dtype=dtype, device=device)
        # A tracer's stand-in and a transform's wrapper must not outlive them.
        if type(kept) is not torch.Tensor or torch._C._functorch.maybe_current_level() is not None:
            return kept
        if len(_SCALARS) >= 4096:
            _SCALARS.clear()
        _SCALARS[value, dtype, device] = kept
    return kept


def _scaled(term: torch.Tensor, coefficient: Coefficient) -> torch.Tensor:
    """`coefficient * term`, where a coefficient of 0 leaves even an infinite term out, as a row of numbers does."""
    if isinstance(coefficient, torch.Tensor):
        return torch.where(coefficient == 0, 0.0, term * coefficient)
    return term * coefficient


def _add_scaled(total: torch.Tensor, term: torch.Tensor, coefficient: Coefficient) -> torch.Tensor:
    """`total += coefficient * term` in one pass."""
    if isinstance(coefficient, torch.Tensor):
        return total.add_(_scaled(term, coefficient))
    return total.add_(term, alpha=coefficient)


def _per_sample(value: Coefficient, like: torch.Tensor) -> Coefficient:
    """A number as it is; a `[B]` tensor shaped to broadcast over `like`'s other dimensions."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != like.shape[0]):
        raise ValueError(f"per-sample value: shape {tuple(value.shape)}; pass a number or a [{like.shape[0]}] tensor")
    return value.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def _look_up(
    table: StepTable | torch.Tensor, step: int | torch.Tensor, like: torch.Tensor, compute: torch.dtype
) -> StepCoefficients:
    """The row, as Python floats where the step is one number and as broadcastable tensors where it is a tensor."""
    if isinstance(table, StepTable) and not isinstance(step, torch.Tensor):
        return table.rows[step]
    columns = table.tensor(like.device, compute) if isinstance(table, StepTable) else table.to(compute)
    if not isinstance(step, torch.Tensor):
        return StepCoefficients(*columns[step].unbind())
    return spread_columns(columns[step.to(columns.device).reshape(-1)], like)


def spread_columns(rows: torch.Tensor, like: torch.Tensor) -> StepCoefficients:
    """The columns of rows, `[B, 6]` or `[1, 6]` or with 7 columns, shaped to broadcast over `like`'s other dimensions."""
    return StepCoefficients(*(column.view(-1, *[1] * (like.ndim - 1)) for column in rows.unbind(1)))
