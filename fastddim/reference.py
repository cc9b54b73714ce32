"""The DDIM step in plain torch: the truth that every faster step is compared with, and the CPU's own path."""

from __future__ import annotations

import math

import torch

from fastddim.coefficients import Coefficient, StepCoefficients, StepTable
from fastddim.config import Clip, DynamicThreshold, Limit
from fastddim.noise import normal_for
from fastddim.step import check_step_arguments

# Above this many elements float32 no longer counts them one by one.
EXACT_FLOAT32_COUNT = 1 << 24


def abs_quantile(sample: torch.Tensor, ratio: float) -> torch.Tensor:
    """`torch.quantile(sample.flatten(1).abs(), ratio, dim=1)` to the bit, without its sort and its size limit.

    Args:
        sample: `[B, ...]`, float32 or float64.
        ratio: in [0, 1].

    Returns:
        `[B]`, the dtype of `sample`. A sample with a NaN gives NaN.
    """
    magnitudes = sample.reshape(sample.shape[0], math.prod(sample.shape[1:])).abs()
    n = magnitudes.shape[1]
    # torch.quantile takes the rank in the data's own dtype.
    exact = sample.dtype == torch.float64 or n > EXACT_FLOAT32_COUNT
    rank_dtype = torch.float64 if exact else torch.float32
    rank = torch.tensor(ratio, dtype=rank_dtype) * (n - 1)
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


def apply_limit(x0: torch.Tensor, limit: Limit) -> torch.Tensor:
    """Clip or dynamically threshold a fresh `x0` `[B, ...]`, in place where that is possible."""
    if limit is None:
        return x0
    if isinstance(limit, Clip):
        return x0.clamp_(-limit.range, limit.range)
    if limit.max_value <= 1:
        # The quantile is clamped to [1, max_value] from above last, so it cannot matter.
        return x0.clamp_(-limit.max_value, limit.max_value).div_(limit.max_value)
    scale = abs_quantile(x0, limit.ratio).clamp(1.0, limit.max_value).view(-1, *[1] * (x0.ndim - 1))
    return torch.clamp(x0, -scale, scale).div_(scale)


def combine_guidance(
    model_output: torch.Tensor,
    guidance_scale: Coefficient,
    guidance_rescale: Coefficient = 0.0,
    *,
    cond_first: bool = False,
) -> torch.Tensor:
    """Classifier-free guidance (arXiv:2207.12598) with the rescale of arXiv:2305.08891, section 3.4.

    Args:
        model_output: `[2 * B, ...]`, unconditional half first, as diffusers stacks them.
        guidance_scale: `uncond + guidance_scale * (cond - uncond)`; a number, or `[B]`.
        guidance_rescale: phi in [0, 1]; how far to pull each sample's standard deviation back to the conditional one's.
        cond_first: the conditional half comes first, as in DiT.

    Returns:
        `[B, ...]`, the dtype of `model_output`.

    Raises:
        ValueError: an odd number of rows, or per-sample values that are not `[B]`.
    """
    batch, odd = divmod(model_output.shape[0], 2)
    if odd:
        raise ValueError(f"model_output: {model_output.shape[0]} rows; pass two halves of one batch, [2 * B, ...]")
    first, second = model_output[:batch], model_output[batch:]
    uncond, cond = (second, first) if cond_first else (first, second)
    guided = torch.lerp(uncond, cond, _per_sample(guidance_scale, cond))
    if isinstance(guidance_rescale, (int, float)) and guidance_rescale == 0:
        return guided
    # One row per sample: over no dimension at all, as a state [B] would have it, torch reduces the whole batch.
    ratio = cond.reshape(batch, -1).std(1) / guided.reshape(batch, -1).std(1)
    ratio = ratio.view(-1, *[1] * (cond.ndim - 1))
    phi = _per_sample(guidance_rescale, cond)
    return guided * (phi * ratio + (1 - phi))


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
    workspace: object = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One DDIM step for a batch: guidance, x0, limit, direction, noise, and the next model input.

    Arithmetic is float64 where a tensor is, float32 otherwise. Differentiable, unless `out` or `model_input` is given.

    Args:
        model_output: `[B, ...]`, or `[2 * B, ...]` stacked with guidance; any float dtype.
        sample: the current state `[B, ...]`, any rank, any float dtype.
        table: the run's `StepTable`, or its `[num_steps, 6]` tensor on the state's device.
        step: the row for all samples, or an integer tensor `[]` or `[B]` with each sample's own row; in a tensor,
            negative numbers count from the end.
        limit: `Clip`, `DynamicThreshold` or None.
        limit_values: `[2]` float64, `(range, any)` or `(max_value, ratio)`, to limit with instead of the numbers in
            `limit`, which then says the kind alone (`config.limit_kind`): a captured step can change them. Read on the
            host here, on the device by the fused step.
        noise: `[B, ...]` standard normal; noise or seeds are needed where the row's `noise_scale` is not 0 (not checked
            for rows on a GPU).
        seeds: `[B]` int64, the 64 bits of each sample's seed (`noise.seed_tensor`): the noise is `noise.normal`'s.
        first_row: `[B]`, the row at which each sample's run starts; its noise counts its steps from there. The table's
            first row by default.
        guidance_scale: None for an unguided step, else a number or `[B]`.
        guidance_rescale: phi in [0, 1], a number or `[B]`.
        cond_first: the conditional half of `model_output` comes first.
        out: `[B, ...]` to write the next state to; may be `sample` itself. Its dtype is the result's.
        return_x0: whether x0 is wanted; without, None is returned for it.
        model_input: `[B, ...]`, or `[2 * B, ...]` with guidance, to write the next state to as well, in its own dtype
            and for both halves.
        advance: add one to the tensor `step` after the step.
        timesteps: `[num_steps]`, with `next_timestep`: what the model is called with at each row.
        next_timestep: `[B]`, or `[2 * B]` with guidance, which gets the timestep of the row advanced to; kept as it is
            after the last row.
        workspace: scratch memory of the fused kernel; not needed here.

    Returns:
        `(x_next, x0)`, both of the state's shape and dtype: the next state and the limited prediction of x0.

    Raises:
        TypeError: something that is not a tensor where one is needed.
        ValueError: shapes, devices or dtypes that do not fit; a stochastic row without noise.
        IndexError: a `step` outside the table.
    """
    check_step_arguments(
        model_output,
        sample,
        table,
        step,
        limit=limit,
        limit_values=limit_values,
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
    if out is not None and noise is not None and out.data_ptr() == noise.data_ptr():
        raise ValueError("out: the same memory as noise, which is read last; pass the state or another tensor")
    if limit_values is not None:
        limit = _with_values(limit, *limit_values.tolist())
    tensors = (model_output, sample) if noise is None else (model_output, sample, noise)
    compute = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    row = _look_up(table, step, sample, compute)
    if noise is None and seeds is None and _is_stochastic(row):
        raise ValueError(
            f"noise: None, but step {step} adds noise; pass a standard normal tensor like the state, or seeds"
        )
    if seeds is not None and not _is_zero(row.noise_scale):
        rows = torch.as_tensor(step, device=sample.device) if first_row is None else step - first_row
        noise = normal_for(seeds, rows, sample.shape[1:])
    output = model_output.to(compute)
    if guidance_scale is not None:
        output = combine_guidance(output, guidance_scale, guidance_rescale, cond_first=cond_first)
    state_dtype = sample.dtype if out is None else out.dtype
    direct_out = out if out is not None and out.dtype == compute else None
    x_next, x0 = step_with_row(
        output, sample.to(compute), row, limit, None if noise is None else noise.to(compute), direct_out
    )
    if model_input is not None:
        model_input.view(-1, *sample.shape).copy_(x_next)
    if advance:
        assert isinstance(step, torch.Tensor)
        step.add_(1)
        if timesteps is not None and next_timestep is not None:
            following = timesteps[step.clamp_max(len(timesteps) - 1).reshape(-1)].to(next_timestep.dtype)
            kept = next_timestep.view(-1, sample.shape[0])
            kept.copy_(torch.where(step < len(timesteps), following, kept))
    if direct_out is None:
        x_next = x_next.to(state_dtype) if out is None else out.copy_(x_next)
    return x_next, x0.to(state_dtype) if return_x0 else None


def _with_values(limit: Limit, limit_range: float, ratio: float) -> Limit:
    if isinstance(limit, Clip):
        return Clip(limit_range)
    return None if limit is None else DynamicThreshold(ratio, limit_range)


def step_with_row(
    output: torch.Tensor,
    x: torch.Tensor,
    row: StepCoefficients,
    limit: Limit,
    noise: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two lines of maths, on checked tensors of one dtype, in as few passes as torch has: `(x_next, x0)`."""
    x0 = apply_limit(_combine(x, row.x0_from_x, output, row.x0_from_output), limit)
    if _is_zero(row.next_from_x):
        x_next = _combine(output, row.next_from_output, x0, row.next_from_x0, out)
    elif _is_zero(row.next_from_output):
        x_next = _combine(x, row.next_from_x, x0, row.next_from_x0, out)
    else:
        x_next = _combine(x, row.next_from_x, output, row.next_from_output, out)
        x_next = _add_scaled(x_next, x0, row.next_from_x0)
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


_SCALARS: dict[tuple[float, torch.dtype], torch.Tensor] = {}


def _scalar(value: float, dtype: torch.dtype) -> torch.Tensor | float:
    """`value` as a kept 0-dim tensor: torch makes a new one of a Python factor each time, at the cost of a small operation."""
    if torch.compiler.is_compiling():
        return value
    kept = _SCALARS.get((value, dtype))
    if kept is None:
        with torch.inference_mode(False):
            kept = torch.tensor(value, dtype=dtype, device="cpu")
        if type(kept) is not torch.Tensor:  # a tracer's stand-in must not outlive its trace
            return kept
        if len(_SCALARS) >= 4096:
            _SCALARS.clear()
        _SCALARS[value, dtype] = kept
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
    rows = columns[step.to(columns.device).reshape(-1)]
    return StepCoefficients(*(column.view(-1, *[1] * (like.ndim - 1)) for column in rows.unbind(1)))
