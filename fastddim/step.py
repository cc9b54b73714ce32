"""The checks every step implementation makes before any work: each message names the argument, its value and the fix."""

from __future__ import annotations

from typing import Any

import torch

from fastddim.coefficients import NUM_COLUMNS, StepTable

_INDEX_DTYPES = (torch.int32, torch.int64)


def check_step_arguments(
    model_output: Any,
    sample: Any,
    table: Any,
    step: Any,
    *,
    limit: Any = None,
    limit_values: Any = None,
    noise: Any = None,
    seeds: Any = None,
    first_row: Any = None,
    guidance_scale: Any = None,
    guidance_rescale: Any = 0.0,
    out: Any = None,
    model_input: Any = None,
    advance: bool = False,
    timesteps: Any = None,
    next_timestep: Any = None,
) -> None:
    """Check the arguments of `ddim_step`, which says what they are.

    Raises:
        TypeError: something that is not a tensor where one is needed.
        ValueError: shapes, dtypes or devices that do not fit, or arguments that exclude each other.
        IndexError: an integer `step` outside the table.
    """
    _check_float_tensor("sample", sample)
    shape = tuple(sample.shape)
    if not shape:
        raise ValueError("sample: a scalar; pass a state [B, ...]")
    batch, guided = shape[0], guidance_scale is not None
    stacked = (2 * batch, *shape[1:]) if guided else shape
    for name, tensor, wanted in (
        ("model_output", model_output, stacked),
        ("noise", noise, shape),
        ("out", out, shape),
        ("model_input", model_input, stacked),
    ):
        if tensor is None and name != "model_output":
            continue
        _check_float_tensor(name, tensor)
        if tuple(tensor.shape) != wanted:
            halves = " (unconditional and conditional halves stacked)" if guided and wanted == stacked else ""
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; for a state of {shape} pass {wanted}{halves}")
        _check_device(name, tensor, sample)
    if limit_values is not None:
        _check_limit_values(limit, limit_values, sample)
    if noise is not None and seeds is not None:
        raise ValueError("noise, seeds: both given; pass the noise, or the seeds to draw it from")
    if first_row is not None and seeds is None:
        raise ValueError("first_row: given without seeds; it only counts the steps of the noise that seeds draw")
    for name, tensor in (("seeds", seeds), ("first_row", first_row)):
        if tensor is not None:
            _check_index(name, tensor, sample, ((batch,),))
    if seeds is not None and seeds.dtype != torch.int64:
        raise ValueError(f"seeds: dtype {seeds.dtype}; pass an int64 tensor, e.g. fastddim.noise.seed_tensor(...)")
    _check_table(table, sample)
    if isinstance(step, torch.Tensor):
        _check_index("step", step, sample, ((), (batch,)))
    elif isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step: {type(step).__name__}; pass an integer, or an integer tensor [] or [{batch}]")
    elif not 0 <= step < len(table):
        raise IndexError(f"step: {step} is outside the table of {len(table)} steps")
    _check_per_sample("guidance_scale", guidance_scale, sample)
    _check_per_sample("guidance_rescale", guidance_rescale, sample)
    if not guided and (isinstance(guidance_rescale, torch.Tensor) or guidance_rescale != 0):
        raise ValueError(f"guidance_rescale: {guidance_rescale!r} without guidance_scale; pass both")
    _check_advance(step, sample, num_rows(table), guided, advance, timesteps, next_timestep)
    inputs = (sample, model_output, noise)
    written = out is not None or model_input is not None
    if written and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise ValueError("out, model_input: not differentiable; leave them out, or call under torch.no_grad()")


def num_rows(table: StepTable | torch.Tensor) -> int:
    """Steps of a table; of a traced tensor a symbol, where `len` would fix the number."""
    return table.shape[0] if isinstance(table, torch.Tensor) else len(table)


def _check_limit_values(limit: Any, limit_values: Any, sample: torch.Tensor) -> None:
    if limit is None:
        raise ValueError(
            "limit_values: given without a limit; pass a Clip or a DynamicThreshold for them, or leave them out"
        )
    if not isinstance(limit_values, torch.Tensor):
        raise TypeError(f"limit_values: {type(limit_values).__name__}; pass a float64 tensor [2]")
    if limit_values.dtype != torch.float64 or tuple(limit_values.shape) != (2,) or not limit_values.is_contiguous():
        raise ValueError(
            f"limit_values: {limit_values.dtype} of shape {tuple(limit_values.shape)}; pass a contiguous float64 tensor [2]"
        )
    _check_device("limit_values", limit_values, sample)


def _check_advance(
    step: Any, sample: torch.Tensor, num_steps: int, guided: bool, advance: bool, timesteps: Any, next_timestep: Any
) -> None:
    if advance and not isinstance(step, torch.Tensor):
        raise ValueError(f"advance: True, but step is the number {step}; pass an integer tensor that can move on")
    if (timesteps is None) != (next_timestep is None):
        raise ValueError("timesteps, next_timestep: one without the other; pass both, or neither")
    if timesteps is None:
        return
    if not advance:
        raise ValueError("next_timestep: given without advance; pass advance=True with a tensor step")
    for name, tensor, wanted in (
        ("timesteps", timesteps, num_steps),
        ("next_timestep", next_timestep, sample.shape[0] * (2 if guided else 1)),
    ):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: {type(tensor).__name__}; pass a tensor [{wanted}]")
        if tuple(tensor.shape) != (wanted,) or not tensor.is_contiguous():
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; pass a contiguous tensor [{wanted}]")
        _check_device(name, tensor, sample)


def _check_float_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__}; pass a tensor")
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: dtype {tensor.dtype}; pass a floating-point tensor")


def _check_device(name: str, tensor: torch.Tensor, sample: torch.Tensor) -> None:
    if tensor.device != sample.device:
        raise ValueError(f"{name}: on {tensor.device}, but the state is on {sample.device}; move one of them")


def _check_index(name: str, tensor: Any, sample: torch.Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    wanted = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__}; pass an integer tensor {wanted}")
    if tensor.dtype not in _INDEX_DTYPES:
        raise ValueError(f"{name}: dtype {tensor.dtype}; pass int64 (or int32)")
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; for a state of {tuple(sample.shape)} pass {wanted}")
    _check_device(name, tensor, sample)


def _check_table(table: Any, sample: torch.Tensor) -> None:
    if isinstance(table, StepTable):
        return
    if not isinstance(table, torch.Tensor):
        raise TypeError(f"table: {type(table).__name__}; pass a StepTable, or its tensor [num_steps, {NUM_COLUMNS}]")
    if table.ndim != 2 or table.shape[1] != NUM_COLUMNS or not table.shape[0] or not table.is_floating_point():
        raise ValueError(
            f"table: {table.dtype} of shape {tuple(table.shape)}; pass a floating-point [num_steps, {NUM_COLUMNS}]"
        )
    if table.device != sample.device:
        raise ValueError(
            f"table: on {table.device}, but the state is on {sample.device}; pass table.to({str(sample.device)!r})"
        )


def _check_per_sample(name: str, value: Any, sample: torch.Tensor) -> None:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return
    batch = sample.shape[0]
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: {type(value).__name__}; pass a number or a tensor [{batch}]")
    if tuple(value.shape) not in ((), (batch,)):
        raise ValueError(f"{name}: shape {tuple(value.shape)}; pass a number or a tensor [{batch}]")
    if not value.is_floating_point():
        raise ValueError(f"{name}: dtype {value.dtype}; pass a floating-point tensor")
    _check_device(name, value, sample)
