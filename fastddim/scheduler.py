"""`DDIMScheduler` and `DDIMInverseScheduler`: drop-in for diffusers', same numbers and quirks, fewer passes.

They inherit configuration, loading, saving and timestep lists from diffusers' classes and replace `step`: a timestep's
six coefficients are computed at its first use, with diffusers' own roundings, and kept for as long as all that they are made
of has the same values (`scheduler_rows`). A step that is not of six coefficients is diffusers' own.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput as _DiffusersOutput
from diffusers.utils.torch_utils import randn_tensor

from fastddim import compiled
from fastddim.backends import check_backend, try_fused
from fastddim.coefficients import StepCoefficients
from fastddim.config import Limit
from fastddim.reference import goes_by_blocks, step_by_blocks, step_with_row
from fastddim.scheduler_rows import FORWARD, INVERSE, TENSORS, RowCache, StepKind, StepRows, TracedRows, read_traced
from fastddim.step import StepOptions

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128)
_INDICES = (torch.int64, torch.int32)


@dataclass(init=False)
class DDIMSchedulerOutput(_DiffusersOutput):  # type: ignore[misc]
    """A step's result.

    Attributes:
        prev_sample: the next, less noisy state, of the state's shape.
        pred_original_sample: the limited prediction of x0, of the same shape.
    """

    def __init__(self, prev_sample: torch.Tensor, pred_original_sample: torch.Tensor | None = None) -> None:
        # diffusers' generic constructor inspects the fields each time, at the cost of a tensor operation.
        OrderedDict.__setitem__(self, "prev_sample", prev_sample)
        object.__setattr__(self, "prev_sample", prev_sample)
        object.__setattr__(self, "pred_original_sample", pred_original_sample)
        if pred_original_sample is not None:
            OrderedDict.__setitem__(self, "pred_original_sample", pred_original_sample)


def _row_at(rows: torch.Tensor, index: torch.Tensor) -> StepCoefficients:
    """The row of an index `[]`, which is not read on the host, as indexing with a 0-dim tensor would."""
    return StepCoefficients(*rows[index.reshape(1)][0].unbind())


def _fits(rows: StepRows | TracedRows, model_output: Any, timestep: Any, sample: Any, eta: Any, noise: Any) -> bool:
    """Whether a step through a row gives the dtypes and shapes that diffusers' operations give."""
    if type(sample) not in TENSORS or type(model_output) not in TENSORS or type(eta) not in (float, int):
        return False
    dtype, shape = sample.dtype, sample.shape
    if dtype not in _DTYPES or model_output.dtype not in _DTYPES or not shape or not model_output.ndim:
        return False
    alike = model_output.dtype is dtype and model_output.shape == shape
    if not alike and rows.prediction_type == "sample":
        return False
    if type(timestep) in TENSORS:
        if timestep.dtype not in _INDICES:
            return False
        # alpha_bar at a timestep [1] is no scalar, so it has a part in the result's dtype.
        if timestep.ndim and not (timestep.shape == (1,) and alike and dtype is rows.dtype):
            return False
    elif type(timestep) is not int and not isinstance(timestep, np.integer):
        return False
    if noise is None or eta <= 0:
        return True
    same = type(noise) in TENSORS and noise.dtype is dtype and noise.shape == shape
    return same and alike and noise.device == sample.device


# Attributes of modules that are looked up once, as this is asked at each step.
_FOLLOWERS = (torch._C._functorch.maybe_current_level, torch._C._len_torch_dispatch_stack, torch._C._is_tracing)


def _is_followed() -> bool:
    """Whether torch follows each operation: a transform of `torch.func`, a dispatch mode, or a trace of `torch.jit`."""
    level, modes, tracing = _FOLLOWERS
    return level() is not None or modes() > 0 or tracing()


# The limit, and a row: of numbers where the host knows the timestep; and the rows on a device, with its index in them.
_Row = tuple[Limit, StepCoefficients | None, torch.Tensor | None, torch.Tensor | None]


class _TableStep:
    """What the two schedulers share: how they are saved, whose step is taken, and the step through a row."""

    alphas_cumprod: torch.Tensor
    backend: str = "auto"
    _kind: ClassVar[StepKind]
    _row_cache: RowCache

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self: Any = object.__new__(cls)
        self._row_cache = RowCache()
        if cls.__module__ == __name__:
            # What a pipeline's model_index.json names; a subclass is found in its own module.
            self.__module__ = cls._kind.original.module
        return self

    def _find_row(
        self, model_output: Any, timestep: Any, sample: Any, eta: Any, use_clipped_model_output: Any, noise: Any
    ) -> _Row | None:
        """The row of a step; None where diffusers' own step takes it.

        That is where something of it is overridden or patched, where the scheduler or the call has what no row is made of, and
        where torch follows each operation.
        """
        rows: StepRows | TracedRows | None
        if torch.compiler.is_compiling():
            rows = read_traced(self, self._kind)
        else:
            rows = None if _is_followed() else self._row_cache.rows(self, self._kind)
        if rows is None or not _fits(rows, model_output, timestep, sample, eta, noise):
            return None
        device, rederive = sample.device, bool(use_clipped_model_output)
        if isinstance(rows, TracedRows):
            at = torch.as_tensor(timestep, device=device).reshape(())
            return rows.limit, None, rows.at(at, eta, rederive), torch.zeros_like(at)
        table, columns, index = rows.table(eta, rederive), None, None
        if self.backend not in ("auto", "compiled") or (device.type != "cpu" and self.backend == "auto"):
            columns, index = table.on(device)[0], table.index(timestep, device)
        if columns is not None and isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            return rows.limit, None, columns, index
        row = table.row(timestep)
        return None if row is None else (rows.limit, row, columns, index)

    def _step(
        self, found: _Row, model_output: torch.Tensor, sample: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        limit, row, columns, index = found
        if columns is not None and index is not None:
            fused = self._try_fused(columns, index, limit, model_output, sample, noise)
            if fused is not None:
                return fused
            if row is None:
                row = _row_at(columns, index)
        assert row is not None
        dtype = sample.dtype
        if model_output.shape != sample.shape:
            model_output, sample = torch.broadcast_tensors(model_output, sample)  # type: ignore[no-untyped-call]
        if self.backend == "compiled" and not compiled.is_traced(model_output, sample):
            check_backend(self.backend)
            return compiled.step_with_row(model_output, sample, row, limit, noise)
        if dtype == torch.float32 and model_output.dtype == torch.float32:
            return step_with_row(model_output, sample, row, limit, noise)
        dtype = torch.promote_types(dtype, model_output.dtype)
        options = StepOptions(out=torch.empty_like(sample, dtype=dtype) if sample.dtype != dtype else None)
        if goes_by_blocks(model_output, sample, row, limit, noise, options):
            x_next, x0 = step_by_blocks(model_output, sample, row, limit, noise, options)
            assert x0 is not None
            return x_next, x0
        compute = torch.promote_types(dtype, torch.float32)
        if noise is not None:
            noise = noise.to(compute)
        x_next, x0 = step_with_row(model_output.to(compute), sample.to(compute), row, limit, noise)
        return x_next.to(dtype), x0.to(dtype)

    def _try_fused(
        self,
        columns: torch.Tensor,
        index: torch.Tensor,
        limit: Limit,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if model_output.shape != sample.shape:
            return None
        out = None
        if model_output.dtype != sample.dtype:
            out = torch.empty_like(sample, dtype=torch.promote_types(sample.dtype, model_output.dtype))
        options = StepOptions(limit=limit, noise=noise, out=out)
        fused = try_fused(self.backend, model_output, sample, columns.float(), index, options)
        if fused is None:
            return None
        prev_sample, pred_original_sample = fused
        assert pred_original_sample is not None
        return prev_sample, pred_original_sample

    @contextmanager
    def _alphas_kept(self) -> Iterator[None]:
        # diffusers moves alphas_cumprod to its argument's device; a step would have to read it back.
        alphas = self.alphas_cumprod
        try:
            yield
        finally:
            self.alphas_cumprod = alphas

    def add_noise(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """diffusers' `add_noise`; `alphas_cumprod` stays where it is instead of following the samples' device."""
        with self._alphas_kept():
            noisy: torch.Tensor = super().add_noise(*args, **kwargs)  # type: ignore[misc]
        return noisy

    def get_velocity(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """diffusers' `get_velocity`; `alphas_cumprod` stays where it is."""
        with self._alphas_kept():
            velocity: torch.Tensor = super().get_velocity(*args, **kwargs)  # type: ignore[misc]
        return velocity


class DDIMScheduler(_TableStep, diffusers.DDIMScheduler):  # type: ignore[misc]
    """diffusers' `DDIMScheduler` with a faster `step`: same arguments, same numbers to float32 rounding.

    Takes every constructor argument of `diffusers.DDIMScheduler` and accepts whatever it accepts; it warns where that
    is almost surely a mistake (`fastddim.Sampler` refuses there). Half-precision states are computed in float32 and
    rounded once, which is more exact than diffusers.

    Each step has the numbers of what is set at that moment: configuration attributes, `alphas_cumprod` (written to in place
    too), `final_alpha_cumprod`, `num_inference_steps`. diffusers' own step runs where a subclass or a patch replaces something
    that it calls, where a value or an argument is none that a row is made of (a tensor `eta`, `alphas_cumprod` with gradients,
    noise of another shape), under the transforms of `torch.func` and under dispatch modes. Under `torch.compile` a
    timestep in a tensor is not read, and the row is computed at each run. One thing cannot be seen: what is written through
    `.data` to an `alphas_cumprod` on a device.

    What is saved is diffusers': `scheduler_config.json` and a pipeline's `model_index.json` name its class, so that both load
    without fastddim; `from_config` and `fastddim.load_pipeline` make it this class again.

    Attributes:
        backend: which implementation takes the step: `"auto"` (the fused kernel on a GPU), `"triton"`, `"reference"` or, for
            states on a CPU, `"compiled"`; see `fastddim.ddim_step`. No part of the configuration: a copy or a pickle keeps it,
            what is loaded or made by `from_config` starts with `"auto"`.
    """

    _kind = FORWARD

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps of a run, as diffusers does; `timesteps` is int64, descending, on `device`."""
        super().set_timesteps(num_inference_steps, device)
        config = self.config
        if (
            config.rescale_betas_zero_snr
            and config.prediction_type == "epsilon"
            and config.timestep_spacing != "leading"
        ):
            warnings.warn(
                "prediction_type 'epsilon' with rescale_betas_zero_snr starts at a timestep without signal, where x0"
                " cannot be told from epsilon; use a v_prediction or sample model, or timestep_spacing='leading'",
                stacklevel=2,
            )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step from `timestep` to `timestep - num_train_timesteps // num_inference_steps`.

        Args:
            model_output: what the model predicts (`config.prediction_type`), `[B, ...]`, any float dtype.
            timestep: a Python integer or a one-element integer tensor, which stays on its device.
            sample: the current state `[B, ...]`.
            eta: 0 is DDIM, 1 is DDPM.
            use_clipped_model_output: derive epsilon from the clipped x0.
            generator: draws the noise where `eta > 0`; a list has one for each sample.
            variance_noise: `[B, ...]` noise to use instead.
            return_dict: return a `DDIMSchedulerOutput` rather than `(prev_sample, pred_original_sample)`.

        Raises:
            ValueError: called before `set_timesteps`, or with both a generator and a `variance_noise`.
        """
        row = self._find_row(model_output, timestep, sample, eta, use_clipped_model_output, variance_noise)
        if row is None:
            return super().step(  # type: ignore[no-any-return]
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        noise = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("generator, variance_noise: both given; pass at most one of the two")
            if eta > 1:
                warnings.warn(f"eta: {eta!r} is outside [0, 1]; 0 is DDIM, 1 is DDPM", stacklevel=2)
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
        stepped = self._step(row, model_output, sample, noise)
        return DDIMSchedulerOutput(*stepped) if return_dict else stepped


class DDIMInverseScheduler(_TableStep, diffusers.DDIMInverseScheduler):  # type: ignore[misc]
    """diffusers' `DDIMInverseScheduler` (from a clean state towards noise) with a faster `step`, same numbers."""

    _kind = INVERSE

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step of the inversion, to `timestep` from the timestep before it. Arguments as `DDIMScheduler.step`'s.

        Raises:
            ValueError: called before `set_timesteps`.
        """
        row = self._find_row(model_output, timestep, sample, 0.0, False, None)
        if row is None:
            return super().step(model_output, timestep, sample, return_dict)  # type: ignore[no-any-return]
        stepped = self._step(row, model_output, sample, None)
        return DDIMSchedulerOutput(*stepped) if return_dict else stepped
