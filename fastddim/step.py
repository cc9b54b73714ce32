"""What a step is asked for, described once, and the checks that every implementation makes before any work.

Each message names the argument, its value and the fix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from fastddim.coefficients import NUM_COLUMNS, Coefficient, StepTable
from fastddim.config import LIMIT_CLASSES, Limit, require_guidance_method

if TYPE_CHECKING:
    from fastddim.kernels import Workspace


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance (arXiv:2207.12598) with the rescale of arXiv:2305.08891, section 3.4.

    CFG++ (arXiv:2406.08070) takes x0 from the guided output and the direction, epsilon, from the unconditional one, so the
    table needs an epsilon term: `StepTable.has_epsilon_term`. Adaptive projected guidance (arXiv:2410.02416, algorithm 1,
    without its momentum) takes `cond + (scale - 1) * (diff - (1 - apg_eta) * parallel)`: `diff` is `cond - uncond`, for each
    sample shortened to a norm of at most `apg_norm_threshold`, and `parallel` its projection on cond. So a scale of 1 gives
    cond, as in the paper; diffusers' `AdaptiveProjectedGuidance` by default adds `scale` times that sum to uncond. It is
    applied to the model's outputs, whatever they predict, and a NaN or an infinity in a sample's halves leaves nothing finite
    of its output.

    Attributes:
        scale: the factor in `uncond + scale * (cond - uncond)`, a number or a floating-point tensor `[B]`; the paper's lambda,
            in [0, 1], for CFG++.
        rescale: phi in [0, 1], a number or `[B]`: how far to pull each sample's standard deviation back to the conditional
            half's.
        cond_first: whether the conditional half of the model's output comes first, as in DiT.
        method: `"cfg"`, `"cfg++"` or `"apg"`.
        apg_eta: a number in [0, 1]: how much of the part of `diff` that is parallel to cond is left; 1 leaves all of it.
        apg_norm_threshold: the largest norm of `diff`; 0 is no limit.
    """

    scale: Coefficient
    rescale: Coefficient = 0.0
    cond_first: bool = False
    method: str = "cfg"
    apg_eta: float = 0.0
    apg_norm_threshold: float = 0.0

    @property
    def rescaled(self) -> bool:
        """Whether there is a rescale: anything but the number 0."""
        return isinstance(self.rescale, torch.Tensor) or self.rescale != 0

    @property
    def fixed(self) -> Any:
        """All that a kept plan or capture is of, to look it up by: every field but the two numbers."""
        return _GUIDANCE_FIXED(self)


# Once, as a step's host time has no room for `fields`.
_GUIDANCE_FIXED = attrgetter(*(field.name for field in fields(Guidance) if field.name not in ("scale", "rescale")))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepOptions:
    """What a step is asked for beside the model's output, the state and its row: the options of `fastddim.ddim_step`.

    Attributes:
        guidance: None for an unguided step; otherwise the model's output has two halves, `[2 * B, ...]`.
        limit: the limit applied to x0, a `Clip` or a `DynamicThreshold`, or None.
        limit_values: `[2]` float64, `(range, any)` or `(max_value, ratio)`, to limit with instead of the numbers in
            `limit`, which then gives the kind alone (`config.limit_kind`): a captured step can change them. The reference
            reads them on the host, the fused step on the device.
        noise: `[B, ...]` standard normal. Noise or seeds are needed where the row's `noise_scale` is not 0, which is not
            checked for rows on a GPU.
        seeds: `[B]` int64, the 64 bits of each sample's seed (`noise.seed_tensor`), to draw `noise.normal`'s noise from.
        first_row: `[B]` integers, the row at which each sample's run starts, from which its noise counts the steps. The
            table's first row by default.
        out: `[B, ...]` to write the next state to; may be the state itself. Its dtype is the result's.
        return_x0: whether x0 is wanted; without, None is returned for it.
        model_input: `[B, ...]`, or `[2 * B, ...]` with guidance, to write the next state to as well, in its own dtype and
            for both halves.
        advance: whether one is added to the tensor `step` after the step.
        timesteps: `[num_steps]`, with `next_timestep`: what the model is called with at each row.
        next_timestep: `[B]`, or `[2 * B]` with guidance, which gets the timestep of the row advanced to, and is kept as it
            is after the last row.
        previous_x0: `[B, ...]` with a table that looks back: the limited x0 of the step before, over which this step writes
            its own. A row that does not look back does not read it.
        ratios: `[num_steps, 2]` float32, the `StepTable.ratios` of a table that is given as a tensor: the fused step of a
            half-precision state divides without it. The reference has no use for it.
        workspace: scratch memory of the fused steps on one stream; by default it is allocated and cleared for each step.
    """

    guidance: Guidance | None = None
    limit: Limit = None
    limit_values: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    seeds: torch.Tensor | None = None
    first_row: torch.Tensor | None = None
    out: torch.Tensor | None = None
    return_x0: bool = True
    model_input: torch.Tensor | None = None
    advance: bool = False
    timesteps: torch.Tensor | None = None
    next_timestep: torch.Tensor | None = None
    previous_x0: torch.Tensor | None = None
    ratios: torch.Tensor | None = None
    workspace: Workspace | None = None


def check_step(model_output: Any, sample: Any, table: Any, step: Any, options: StepOptions) -> None:
    """Check the arguments of `fastddim.ddim_step`.

    Raises:
        TypeError: something that is not a tensor, a guidance or a limit where one is needed.
        ValueError: shapes, dtypes or devices that do not fit, or arguments that exclude each other.
        IndexError: an integer `step` outside the table.
    """
    if not isinstance(sample, torch.Tensor):
        raise TypeError(f"sample: {type(sample).__name__}; pass a tensor")
    shape = sample.shape
    if not shape or not sample.is_floating_point():
        raise ValueError(f"sample: {sample.dtype} of shape {tuple(shape)}; pass a floating-point state [B, ...]")
    guidance, noise, seeds, first_row = options.guidance, options.noise, options.seeds, options.first_row
    if guidance is not None:
        _check_guidance(guidance, sample)
    batch = shape[0]
    stacked, halves = (2 * batch, *shape[1:]), " (unconditional and conditional halves stacked)"
    if guidance is None:
        stacked, halves = shape, ""
    _check_tensor("model_output", model_output, sample, stacked, hint=halves)
    if noise is not None:
        _check_tensor("noise", noise, sample, shape)
    if options.out is not None:
        _check_tensor("out", options.out, sample, shape)
    if options.model_input is not None:
        _check_tensor("model_input", options.model_input, sample, stacked, hint=halves)
    _check_limit(options.limit, options.limit_values, sample)
    if noise is not None and seeds is not None:
        raise ValueError("noise, seeds: both given; pass the noise, or the seeds to draw it from")
    if first_row is not None and seeds is None:
        raise ValueError("first_row: given without seeds; it only counts the steps of the noise that seeds draw")
    if seeds is not None:
        _check_tensor("seeds", seeds, sample, (batch,), kind="an int64", hint=", e.g. fastddim.noise.seed_tensor(...)")
    if first_row is not None:
        _check_tensor("first_row", first_row, sample, (batch,), kind="an int64 or int32")
    _check_table(table, sample)
    if guidance is not None and guidance.method == "cfg++" and isinstance(table, StepTable):
        require_epsilon_term(table, "guidance.method")
    looks_back = num_columns(table) > NUM_COLUMNS
    if looks_back != (options.previous_x0 is not None):
        raise ValueError(
            "previous_x0: None with a table that looks back; pass a tensor like the state"
            if looks_back
            else "previous_x0: given with a table that does not look back; leave it out"
        )
    if options.previous_x0 is not None:
        _check_tensor("previous_x0", options.previous_x0, sample, shape)
    if isinstance(step, torch.Tensor):
        _check_tensor("step", step, sample, (), (batch,), kind="an int64 or int32")
    elif isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step: {type(step).__name__}; pass an integer, or an integer tensor [] or [{batch}]")
    elif not 0 <= step < len(table):
        raise IndexError(f"step: {step} is outside the table of {len(table)} steps")
    if options.ratios is not None:
        _check_tensor("ratios", options.ratios, sample, (num_rows(table), 2), kind="a contiguous float32")
    _check_advance(step, sample, num_rows(table), options)
    inputs = (sample, model_output, noise)
    written = any(t is not None for t in (options.out, options.model_input, options.previous_x0))
    if written and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise ValueError(
            "out, model_input, previous_x0: not differentiable; leave them out, or call under torch.no_grad()"
        )


def num_rows(table: StepTable | torch.Tensor) -> int:
    """Steps of a table; of a traced tensor a symbol, where `len` would fix the number."""
    return table.shape[0] if isinstance(table, torch.Tensor) else len(table)


def num_columns(table: StepTable | torch.Tensor) -> int:
    """6, or 7 for a table that looks back."""
    return table.shape[1] if isinstance(table, torch.Tensor) else table.columns.shape[1]


def require_epsilon_term(table: StepTable, name: str, sampled_by: str | None = None) -> None:
    """Raise a `ValueError` for a table that CFG++ has no meaning for.

    Args:
        name: the argument that asks for CFG++.
        sampled_by: the name of the table's method, where it is known.
    """
    if not table.has_epsilon_term:
        owner = "this table" if sampled_by is None else f"method {sampled_by!r}"
        raise ValueError(
            f"{name}: 'cfg++' with {owner}, whose steps here have no epsilon of the model's output to take from the"
            " unconditional half; pass use_clipped_model_output=False with method 'ddim', 'euler' or 'euler_ancestral', or"
            " method 'tcd', or 'cfg'"
        )


def _check_guidance(guidance: Any, sample: torch.Tensor) -> None:
    if not isinstance(guidance, Guidance):
        raise TypeError(f"guidance: {type(guidance).__name__}; pass a Guidance")
    for name, value in (("guidance.scale", guidance.scale), ("guidance.rescale", guidance.rescale)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _check_tensor(name, value, sample, (), sample.shape[:1], kind="a number or a floating-point")
    require_guidance_method("guidance.method", guidance.method, guidance.apg_eta, guidance.apg_norm_threshold)


def _check_limit(limit: Any, limit_values: Any, sample: torch.Tensor) -> None:
    if not isinstance(limit, Limit):
        raise TypeError(f"limit: {type(limit).__name__}; pass {LIMIT_CLASSES} or None")
    if limit_values is None:
        return
    if limit is None:
        raise ValueError("limit_values: given without a limit; pass limit too, or leave them out")
    _check_tensor("limit_values", limit_values, sample, (2,), kind="a contiguous float64")


def _check_advance(step: Any, sample: torch.Tensor, num_steps: int, options: StepOptions) -> None:
    timesteps, next_timestep = options.timesteps, options.next_timestep
    if options.advance and not isinstance(step, torch.Tensor):
        raise ValueError(f"advance: True, but step is the number {step}; pass an integer tensor that can move on")
    if (timesteps is None) != (next_timestep is None):
        raise ValueError("timesteps, next_timestep: one without the other; pass both, or neither")
    if timesteps is None:
        return
    if not options.advance:
        raise ValueError("next_timestep: given without advance; pass advance=True with a tensor step")
    copies = 1 if options.guidance is None else 2
    _check_tensor("timesteps", timesteps, sample, (num_steps,), kind="a contiguous")
    _check_tensor("next_timestep", next_timestep, sample, (copies * sample.shape[0],), kind="a contiguous")


# What a tensor has to be, as messages say it.
_KINDS: dict[str, Callable[[torch.Tensor], bool]] = {
    "a floating-point": torch.Tensor.is_floating_point,
    "a number or a floating-point": torch.Tensor.is_floating_point,
    "an int64": lambda tensor: tensor.dtype == torch.int64,
    "an int64 or int32": lambda tensor: tensor.dtype in (torch.int64, torch.int32),
    "a contiguous": torch.Tensor.is_contiguous,
    "a contiguous float32": lambda tensor: tensor.dtype == torch.float32 and tensor.is_contiguous(),
    "a contiguous float64": lambda tensor: tensor.dtype == torch.float64 and tensor.is_contiguous(),
}


def _check_tensor(
    name: str,
    tensor: Any,
    sample: torch.Tensor,
    *shapes: tuple[int, ...],
    kind: str = "a floating-point",
    hint: str = "",
) -> None:
    """Check an argument against the state: its type, one of `_KINDS`, one of `shapes`, and the state's device."""
    error: type[Exception] = ValueError
    if not isinstance(tensor, torch.Tensor):
        error, found = TypeError, type(tensor).__name__
    elif tensor.shape not in shapes:
        found = f"shape {tuple(tensor.shape)}"
    elif not _KINDS[kind](tensor):
        found = f"dtype {tensor.dtype}, strides {tensor.stride()}"
    elif tensor.device != sample.device:
        raise ValueError(f"{name}: on {tensor.device}, but the state is on {sample.device}; move one of them")
    else:
        return
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    raise error(f"{name}: {found}; for a state of {tuple(sample.shape)} pass {kind} tensor {wanted}{hint}")


def _check_table(table: Any, sample: torch.Tensor) -> None:
    if isinstance(table, StepTable):
        return
    if not isinstance(table, torch.Tensor):
        raise TypeError(f"table: {type(table).__name__}; pass a StepTable, or its tensor [num_steps, {NUM_COLUMNS}]")
    if (
        table.ndim != 2
        or table.shape[1] not in (NUM_COLUMNS, NUM_COLUMNS + 1)
        or not table.shape[0]
        or not table.is_floating_point()
    ):
        raise ValueError(
            f"table: {table.dtype} of shape {tuple(table.shape)}; pass a floating-point [num_steps, {NUM_COLUMNS}]"
        )
    if table.device != sample.device:
        raise ValueError(
            f"table: on {table.device}, but the state is on {sample.device}; pass table.to({str(sample.device)!r})"
        )
