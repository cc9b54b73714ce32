"""Which implementation takes a step: the fused kernel where it can run, the reference elsewhere."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from fastddim.coefficients import StepTable
from fastddim.config import require_choice
from fastddim.noise import STREAM_INITIAL, normal_for
from fastddim.reference import ddim_step as reference_step

if TYPE_CHECKING:
    from fastddim.kernels import PreparedStep

BACKENDS = ("auto", "reference", "triton")
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
    """
    require_choice("backend", backend, BACKENDS)
    if backend != "auto":
        return backend
    switched = os.environ.get(VARIABLE) or "auto"
    require_choice(VARIABLE, switched, ("auto", "reference"))
    return switched


def try_fused(
    backend: str,
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The fused step's result, or None where the reference has to take the step.

    A reason that the owner of a GPU would not expect is logged, once.

    Args:
        backend: as `ddim_step`'s.
        model_output, sample, table, step, arguments: `fastddim.reference.ddim_step`'s.
    """
    tensors = (sample, model_output, *(arguments.get(name) for name in ("noise", "out", "model_input")))
    if not takes_kernel(backend, tensors):
        return None
    from fastddim.kernels import launch

    if torch.compiler.is_compiling():
        from fastddim.kernels import operator

        return operator.ddim_step(model_output, sample, table, step, **arguments)
    try:
        return launch.ddim_step(model_output, sample, table, step, **arguments)
    except launch.KernelUnavailableError as error:
        _give_up(backend, sample.device, error)
        return None


def prepare_step(
    backend: str, model_output: torch.Tensor, sample: torch.Tensor, table: StepTable, **arguments: Any
) -> PreparedStep | None:
    """A `fastddim.kernels.PreparedStep` of these arguments, or None where the reference has to take the steps."""
    tensors = (sample, model_output, *(arguments.get(name) for name in ("out", "model_input")))
    if torch.compiler.is_compiling() or not takes_kernel(backend, tensors):
        return None
    from fastddim.kernels import KernelUnavailableError, PreparedStep

    try:
        return PreparedStep(model_output, sample, table, **arguments)
    except KernelUnavailableError as error:
        _give_up(backend, sample.device, error)
        return None


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
    else:
        drawn.copy_(normal_for(seeds, 0, drawn.shape[1:], STREAM_INITIAL))
    return torch.mul(drawn, scale, out=out) if scaled else out


def takes_kernel(backend: str, tensors: tuple[Any, ...]) -> bool:
    """Whether the kernel takes a step over `tensors`, the state first; why not is logged where a GPU's owner would ask."""
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
    backend: str = "auto",
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One DDIM step for a batch, by the fused kernel on a GPU and by plain torch elsewhere.

    Args:
        backend: `"reference"` or `"triton"` to choose; `"auto"` takes the kernel wherever it can run, and can be
            switched off with the environment variable `FASTDDIM_BACKEND=reference`.
        model_output, sample, table, step, options: `fastddim.reference.ddim_step`'s, whose results these are. What the
            kernel does differently is listed at `fastddim.kernels.ddim_step`.

    Returns:
        `(x_next, x0)`.

    Raises:
        TypeError, ValueError, IndexError: as the implementation.
        KernelUnavailableError: `backend="triton"` where the kernel does not compile.
    """
    fused = try_fused(backend, model_output, sample, table, step, **options)
    return reference_step(model_output, sample, table, step, **options) if fused is None else fused
