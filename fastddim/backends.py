"""Which implementation takes a step: the fused kernel where it can run, the reference elsewhere, compiled code by choice."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from fastddim import compiled, reference
from fastddim.coefficients import Coefficient, StepTable
from fastddim.compiled.code import require_compiler
from fastddim.config import Limit, require_choice
from fastddim.noise import STREAM_INITIAL, normal_for
from fastddim.step import Guidance, StepOptions

if TYPE_CHECKING:
    from fastddim.kernels import PreparedStep, Workspace

BACKENDS = ("auto", "reference", "triton", "compiled")
VARIABLE = "FASTDDIM_BACKEND"

_log = logging.getLogger("fastddim")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Why the kernel was not used, each logged once; and the devices on which it did not compile.
_logged: set[str] = set()
_unavailable: dict[torch.device, str] = {}


def check_backend(backend: str) -> str:
    """`backend`, but `"reference"` for `"auto"` where the environment variable FASTDDIM_BACKEND says so.

    Raises:
        ValueError: not one of `BACKENDS`; the message names the argument or the variable.
        CompilerMissingError: `"compiled"` where there is neither a C++ compiler nor code that one has made before.
    """
    if backend not in BACKENDS:
        require_choice("backend", backend, BACKENDS)
    if backend == "compiled" and not torch.compiler.is_compiling():
        require_compiler()
    if backend != "auto":
        return backend
    switched = os.environ.get(VARIABLE)
    if not switched:
        return backend
    require_choice(VARIABLE, switched, ("auto", "reference"))
    return switched


def try_fused(
    backend: str,
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    options: StepOptions,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The fused step's result, or None where the reference has to take the step.

    Where a GPU is left unused for a reason that its owner would not expect, that is logged, once.
    """
    if not takes_kernel(backend, (sample, model_output, options.noise, options.out, options.model_input)):
        return None
    from fastddim.kernels import launch

    if torch.compiler.is_compiling():
        from fastddim.kernels import operator

        return operator.ddim_step(model_output, sample, table, step, options)
    try:
        return launch.ddim_step(model_output, sample, table, step, options)
    except launch.KernelUnavailableError as error:
        _give_up(backend, sample.device, error)
        return None


def take_step(
    backend: str,
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    options: StepOptions,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`ddim_step` with its options as they are handed down."""
    if check_backend(backend) == "compiled":
        return compiled.ddim_step(model_output, sample, table, step, options)
    fused = try_fused(backend, model_output, sample, table, step, options)
    return reference.ddim_step(model_output, sample, table, step, options) if fused is None else fused


def prepare_step(
    backend: str, model_output: torch.Tensor, sample: torch.Tensor, table: StepTable, options: StepOptions
) -> PreparedStep | reference.PreparedStep | compiled.PreparedStep | None:
    """A step bound to these arguments, of which the model's output and the row change; None where a step cannot be bound."""
    if torch.compiler.is_compiling():
        return None
    if check_backend(backend) == "compiled":
        return (
            compiled.PreparedStep(model_output, sample, table, options)
            if compiled.can_prepare(sample, options)
            else None
        )
    tensors = (sample, model_output, options.noise, options.out, options.model_input)
    if takes_kernel(backend, tensors):
        from fastddim.kernels import KernelUnavailableError, PreparedStep

        try:
            return PreparedStep(model_output, sample, table, options)
        except KernelUnavailableError as error:
            _give_up(backend, sample.device, error)
    return reference.PreparedStep(model_output, sample, table, options)


def draw_start(backend: str, seeds: torch.Tensor, out: torch.Tensor, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
    """Fill `out` `[B, ...]` with the starting states of seeds `[B]` (`noise.seed_tensor`), without reading them on the host.

    The states are standard normal noise times `scale`, a number or a tensor `[]` on the device.
    """
    scaled = isinstance(scale, torch.Tensor) or scale != 1
    # A scaled start is rounded to half precision once, after the product.
    drawn = torch.empty_like(out, dtype=torch.float32) if scaled and out.dtype.itemsize < 4 else out
    if takes_kernel(backend, (drawn,)):
        from fastddim.kernels import draw_normal

        draw_normal(seeds, drawn, STREAM_INITIAL)
    elif check_backend(backend) == "compiled":
        drawn.copy_(compiled.draw_normal(seeds, 0, drawn.shape[1:], STREAM_INITIAL))
    else:
        drawn.copy_(normal_for(seeds, 0, drawn.shape[1:], STREAM_INITIAL))
    return torch.mul(drawn, scale, out=out) if scaled else out


def takes_kernel(backend: str, tensors: tuple[Any, ...]) -> bool:
    """Whether the kernel takes a step over `tensors`, the state first; where a GPU is left unused, the reason is logged."""
    chosen = check_backend(backend)
    if chosen != "auto":
        return chosen == "triton"
    if not _is_on_gpu(tensors[0]):
        return False
    reason = _unavailable.get(tensors[0].device) or _reason_against(tensors)
    if reason is not None:
        _log_once(reason)
    return reason is None


def _give_up(backend: str, device: torch.device, error: Exception) -> None:
    """The kernel does not compile: use the reference from now on, unless the kernel was asked for by name."""
    if backend == "triton":
        raise error
    _unavailable[device] = str(error)
    _log_once(str(error))


def _is_on_gpu(sample: Any) -> bool:
    return isinstance(sample, torch.Tensor) and sample.is_cuda


def _reason_against(tensors: tuple[Any, ...]) -> str | None:
    given = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    for tensor in given:
        if tensor.dtype not in _KERNEL_DTYPES:
            return f"it takes float32, float16 and bfloat16, not {tensor.dtype}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return "it has no gradients, and a tensor requires them"
    try:
        import fastddim.kernels.launch  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def _log_once(reason: str) -> None:
    if torch.compiler.is_compiling() or reason in _logged:
        return
    _logged.add(reason)
    _log.warning("the fused DDIM kernel is not used, the torch reference takes the step instead: %s", reason)


def ddim_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    *,
    guidance: Guidance | Coefficient | None = None,
    limit: Limit = None,
    limit_values: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    first_row: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_x0: bool = True,
    model_input: torch.Tensor | None = None,
    advance: bool = False,
    timesteps: torch.Tensor | None = None,
    next_timestep: torch.Tensor | None = None,
    previous_x0: torch.Tensor | None = None,
    ratios: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One DDIM step (arXiv:2010.02502, equation 12) for a batch, by the fused kernel on a GPU and by plain torch elsewhere.

    Arithmetic is float32, or in plain torch float64 where a tensor is. In plain torch the step is differentiable, unless
    `out` or `model_input` is given; what the kernel does differently is listed at `fastddim.kernels.launch.ddim_step`.

    Args:
        model_output: the model's output `[B, ...]`, or with guidance `[2 * B, ...]`, both halves stacked; any float dtype.
        sample: the current state `[B, ...]`, any rank, any float dtype.
        table: the run's `StepTable`, or its `[num_steps, 6]` or `[num_steps, 7]` tensor on the state's device.
        step: the row for all samples, or an integer tensor `[]` or `[B]` with each sample's own row; in a tensor,
            negative numbers count from the end.
        guidance: a `Guidance`, or its scale alone, a number or a tensor `[B]`; None for an unguided step.
        limit, limit_values, noise, seeds, first_row, out, return_x0, model_input, advance, timesteps, next_timestep,
            previous_x0, ratios, workspace: as the attributes of `fastddim.step.StepOptions`.
        backend: `"reference"` or `"triton"` to choose; `"auto"` takes the kernel wherever it can run, and can be
            switched off with the environment variable `FASTDDIM_BACKEND=reference`. `"compiled"`, for a state on a CPU, is
            the reference's maths as one loop, made by torch's Inductor and a C++ compiler, to the same bits on x86-64
            with FMA where nothing is summed over a sample: guidance with a rescale, and `"apg"`, agree to rounding. Each
            kind of step (guidance, limit, with noise or not, dtypes) takes seconds to compile, once for a machine: it is
            kept in the folder of the environment variable `FASTDDIM_CACHE`, `~/.cache/fastddim` by default. It has no
            gradients, and reads rows and values in tensors on the host.

    Returns:
        `(x_next, x0)`, the next state and the limited prediction of x0, both of the state's shape and dtype; with
        `previous_x0`, x0 is that tensor.

    Raises:
        TypeError: something that is not a tensor, a guidance or a limit where one is needed.
        ValueError: shapes, dtypes or devices that do not fit, arguments that exclude each other, or a row that adds noise
            without noise or seeds.
        IndexError: an integer `step` outside the table.
        KernelUnavailableError: `backend="triton"` where the kernel does not compile.
        CompilerMissingError: `backend="compiled"` without a C++ compiler.

    Example:
        >>> import fastddim, torch
        >>> schedule = fastddim.Schedule(fastddim.DDIMConfig())
        >>> table = fastddim.StepTable.build(schedule, schedule.pairs(50))
        >>> x, output = torch.randn(2, 4, 64, 64), torch.randn(4, 4, 64, 64)
        >>> x_next, x0 = fastddim.ddim_step(output, x, table, 0, guidance=7.5, limit=fastddim.Clip())
        >>> x_next.shape, bool(x0.abs().max() <= 1)
        (torch.Size([2, 4, 64, 64]), True)
    """
    if guidance is not None and not isinstance(guidance, Guidance):
        guidance = Guidance(guidance)
    options = StepOptions(
        guidance=guidance, limit=limit, limit_values=limit_values, noise=noise, seeds=seeds, first_row=first_row, out=out,
        return_x0=return_x0, model_input=model_input, advance=advance, timesteps=timesteps, next_timestep=next_timestep,
        previous_x0=previous_x0, ratios=ratios, workspace=workspace,
    )  # fmt: skip
    return take_step(backend, model_output, sample, table, step, options)
