"""`DDIMScheduler` and `DDIMInverseScheduler`: drop-in for diffusers', same numbers and quirks, fewer passes.

They inherit configuration, loading, saving and timestep lists from diffusers' classes and replace `step`: a timestep's
six coefficients are computed at its first use, with diffusers' own float32 roundings, and kept.
"""

from __future__ import annotations

import operator
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput as _DiffusersOutput
from diffusers.utils.torch_utils import randn_tensor

from fastddim import compiled
from fastddim.backends import check_backend, try_fused
from fastddim.coefficients import StepCoefficients, columns
from fastddim.config import PREDICTION_TYPES, Limit, limit_from, require_choice
from fastddim.reference import goes_by_blocks, step_by_blocks, step_with_row
from fastddim.schedule import FloatArray
from fastddim.step import StepOptions

_KEPT_TABLES = 16
_LEAST_SIGNAL = 1e-30


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


class _TimestepTable:
    """A row for each timestep a diffusers scheduler accepts: `[-N, N)`, indexed as Python indexes.

    Args:
        columns_of: the columns `[n, 6]` float64 of int64 timesteps `[n]`, or `[1, 6]` of a 0-dim one.
        n_train: N.
    """

    def __init__(self, columns_of: Callable[[torch.Tensor], FloatArray], n_train: int) -> None:
        self._columns_of = columns_of
        self._n_train = n_train
        self._rows: dict[int, StepCoefficients] = {}
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def row(self, timestep: int | torch.Tensor) -> StepCoefficients:
        """The row of a timestep that the host knows, as Python numbers."""
        index = operator.index(timestep)
        row = self._rows.get(index)
        if row is None:
            if not -self._n_train <= index < self._n_train:
                raise IndexError(f"timestep: {index} is outside the {self._n_train} training timesteps")
            columns = self._columns_of(torch.tensor(index, device="cpu"))
            row = self._rows[index] = StepCoefficients(*columns[0].tolist())
        return row

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept on a device: the rows of timesteps 0 ... N - 1, NaN, then -N ... -1; and those timesteps as 0-dim tensors."""
        kept = self._on_device.get(device)
        if kept is None:
            halves = (torch.arange(first, first + self._n_train, device="cpu") for first in (0, -self._n_train))
            every = self._columns_of(torch.cat([*halves]))
            ascending, negative = np.split(every, 2)
            # NaN between the two halves: no host checks a device timestep past the end, so it has to show.
            rows = np.concatenate([ascending, np.full_like(ascending, np.nan), negative])
            # Kept for later calls, which may need gradients.
            with torch.inference_mode(False):
                index = torch.arange(len(rows), device=device)
                kept = self._on_device[device] = (torch.tensor(rows, dtype=torch.float32, device=device), index)
        return kept

    def index(self, timestep: int | torch.Tensor, device: torch.device) -> torch.Tensor:
        """The row of a timestep as an integer tensor `[]` on a device, without reading a device tensor on the host."""
        if isinstance(timestep, torch.Tensor) and timestep.device == device:
            return timestep.reshape(()).long()
        number = operator.index(timestep)
        self.row(number)  # refuses what is outside
        return self.on(device)[1][number]


def _row_at(rows: torch.Tensor, index: torch.Tensor) -> StepCoefficients:
    """The row of an index `[]`, which is not read on the host, as indexing with a 0-dim tensor would."""
    return StepCoefficients(*rows[index.reshape(1)][0].unbind())


class _TableStep:
    """What the two schedulers share: the tables' cache and the step through a row."""

    alphas_cumprod: torch.Tensor
    num_inference_steps: int | None
    _cache: dict[tuple[float, bool], _TimestepTable]
    _cache_key: tuple[Any, ...] = ()
    # The number of steps as a trace can guard it: a second integer would become symbolic.
    _run: str = ""
    backend: str = "auto"
    _limit: Limit

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps of a run, as diffusers does; `timesteps` is int64 on `device`."""
        super().set_timesteps(num_inference_steps, device)  # type: ignore[misc]
        self._run = str(num_inference_steps)

    @abstractmethod
    def _columns(self, timesteps: torch.Tensor, eta: float, use_clipped_model_output: bool) -> FloatArray:
        """The columns `[n, 6]` of int64 timesteps `[n]` or `[]`, with diffusers' roundings."""

    def _table(self, eta: float, use_clipped_model_output: bool) -> _TimestepTable:
        config = self._internal_dict  # type: ignore[attr-defined]
        alphas, n = self.alphas_cumprod, self.num_inference_steps
        key = self._cache_key
        if not key or key[0] is not config or key[1] is not alphas or key[2] != n:
            if n is None:
                raise ValueError("num_inference_steps: None; call set_timesteps(num_inference_steps) before step()")
            self._limit = limit_from(config)
            self._cache, self._cache_key = {}, (config, alphas, n)
        table = self._cache.get((eta, use_clipped_model_output))
        if table is None:
            if len(self._cache) >= _KEPT_TABLES:
                self._cache.clear()
            columns_of = partial(self._columns, eta=eta, use_clipped_model_output=use_clipped_model_output)
            table = _TimestepTable(columns_of, len(alphas))
            self._cache[(eta, use_clipped_model_output)] = table
        return table

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _traced_rows(
        self, own_id: int, run: str, eta: float, use_clipped_model_output: bool, device: torch.device
    ) -> torch.Tensor:
        """The rows on a device, found while torch traces instead of by the trace: its arguments are what the trace guards."""
        return self._table(eta, use_clipped_model_output).on(device)[0]

    def _step(
        self,
        eta: float,
        use_clipped_model_output: bool,
        timestep: int | torch.Tensor,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device, rows = sample.device, None
        tracing = torch.compiler.is_compiling()
        if tracing:
            rows = self._traced_rows(id(self), self._run, eta, use_clipped_model_output, device)
            index = torch.as_tensor(timestep, device=device).reshape(())
        elif self.backend not in ("auto", "compiled") or (device.type != "cpu" and self.backend == "auto"):
            table = self._table(eta, use_clipped_model_output)
            rows, index = table.on(device)[0], table.index(timestep, device)
        if rows is not None:
            fused = self._try_fused(rows, index, model_output, sample, noise)
            if fused is not None:
                return fused
        on_device = isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu"
        if rows is not None and (tracing or on_device):
            row = _row_at(rows, index)
        else:
            row = self._table(eta, use_clipped_model_output).row(timestep)
        dtype = sample.dtype
        if model_output.shape != sample.shape:
            model_output, sample = torch.broadcast_tensors(model_output, sample)  # type: ignore[no-untyped-call]
        if self.backend == "compiled" and not compiled.is_traced(model_output, sample) and sample.ndim:
            check_backend(self.backend)
            return compiled.step_with_row(model_output, sample, row, self._limit, noise)
        if dtype == torch.float32 and model_output.dtype == torch.float32:
            return step_with_row(model_output, sample, row, self._limit, noise)
        dtype = torch.promote_types(dtype, model_output.dtype)
        options = StepOptions(out=torch.empty_like(sample, dtype=dtype) if sample.dtype != dtype else None)
        if goes_by_blocks(model_output, sample, row, self._limit, noise, options):
            x_next, x0 = step_by_blocks(model_output, sample, row, self._limit, noise, options)
            assert x0 is not None
            return x_next, x0
        compute = torch.promote_types(dtype, torch.float32)
        if noise is not None:
            noise = noise.to(compute)
        x_next, x0 = step_with_row(model_output.to(compute), sample.to(compute), row, self._limit, noise)
        return x_next.to(dtype), x0.to(dtype)

    def _try_fused(
        self,
        rows: torch.Tensor,
        index: torch.Tensor,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if model_output.shape != sample.shape:
            return None
        out = None
        if model_output.dtype != sample.dtype:
            out = torch.empty_like(sample, dtype=torch.promote_types(sample.dtype, model_output.dtype))
        options = StepOptions(limit=self._limit, noise=noise, out=out)
        fused = try_fused(self.backend, model_output, sample, rows, index, options)
        if fused is None:
            return None
        prev_sample, pred_original_sample = fused
        assert pred_original_sample is not None
        return prev_sample, pred_original_sample

    def _transition(
        self, timesteps: torch.Tensor, final_alpha_cumprod: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 alpha_bar at each t, and at diffusers' neighbour `t - N // num_inference_steps` or the clean end."""
        assert self.num_inference_steps is not None
        alphas = self.alphas_cumprod.cpu()
        before = (timesteps - len(alphas) // self.num_inference_steps).clamp_max(len(alphas) - 1)
        return alphas[timesteps], torch.where(before >= 0, alphas[before.clamp_min(0)], final_alpha_cumprod.cpu())

    def _as_columns(self, *roots: torch.Tensor, use_clipped_model_output: bool) -> FloatArray:
        kind = self._internal_dict["prediction_type"]  # type: ignore[attr-defined]
        require_choice("prediction_type", kind, PREDICTION_TYPES)
        signal, sigma, signal_next, direction, noise_scale = (root.double().reshape(-1).numpy() for root in roots)
        # Without signal diffusers divides by 0 and clips the infinity; a huge number clips alike and stays a number.
        signal = np.maximum(signal, _LEAST_SIGNAL)
        return columns(signal, sigma, signal_next, direction, noise_scale, kind, use_clipped_model_output)

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

    Attributes:
        backend: which implementation takes the step: `"auto"` (the fused kernel on a GPU), `"triton"`, `"reference"` or, for
            states on a CPU, `"compiled"`; see `fastddim.ddim_step`. Not part of the configuration.
    """

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

    def _columns(self, timesteps: torch.Tensor, eta: float, use_clipped_model_output: bool) -> FloatArray:
        alpha_bar, alpha_bar_next = self._transition(timesteps, self.final_alpha_cumprod)
        # diffusers' own float32 operations, one by one: their roundings matter where 1 - alpha_bar is small.
        variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
        std_dev = eta * variance**0.5
        direction = (1 - alpha_bar_next - std_dev**2) ** 0.5
        roots = (alpha_bar**0.5, (1 - alpha_bar) ** 0.5, alpha_bar_next**0.5, direction, std_dev)
        return self._as_columns(*roots, use_clipped_model_output=use_clipped_model_output)

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
        stepped = self._step(eta, bool(use_clipped_model_output), timestep, model_output, sample, noise)
        return DDIMSchedulerOutput(*stepped) if return_dict else stepped


class DDIMInverseScheduler(_TableStep, diffusers.DDIMInverseScheduler):  # type: ignore[misc]
    """diffusers' `DDIMInverseScheduler` (from a clean state towards noise) with a faster `step`, same numbers."""

    def _columns(self, timesteps: torch.Tensor, eta: float, use_clipped_model_output: bool) -> FloatArray:
        alpha_bar_next, alpha_bar = self._transition(timesteps, self.initial_alpha_cumprod)
        direction = (1 - alpha_bar_next) ** 0.5
        roots = (alpha_bar**0.5, (1 - alpha_bar) ** 0.5, alpha_bar_next**0.5, direction, torch.zeros_like(alpha_bar))
        return self._as_columns(*roots, use_clipped_model_output=use_clipped_model_output)

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
        stepped = self._step(0.0, False, timestep, model_output, sample, None)
        return DDIMSchedulerOutput(*stepped) if return_dict else stepped
