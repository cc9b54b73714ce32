"""A step as six numbers: a `StepTable`, and DDIM's, of `(t, t_next)` pairs.

Every deterministic or stochastic DDIM step (arXiv:2010.02502, equations 12 and 16), and that of every other linear method
(`fastddim.samplers`), is

    x0     = limit(x0_from_x * x + x0_from_output * out)
    x_next = next_from_x * x + next_from_output * out + next_from_x0 * x0 + noise_scale * noise

so method, prediction type, eta, spacing and the epsilon convention end in a table and no step implementation branches on
them. A method of second order adds `next_from_previous_x0` times the x0 of the step before.

Notation: alpha_bar is the paper's alpha_t (diffusers' `alphas_cumprod[t]`), `signal = sqrt(alpha_bar)`,
`sigma = sqrt(1 - alpha_bar)`, the suffix `_next` the less noisy side of the step; `std_dev` is the paper's sigma_t(eta).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fastddim.config import PREDICTION_TYPES, VARIANCE_TYPES, require_choice
from fastddim.schedule import FloatArray, Pair, Schedule

if TYPE_CHECKING:
    import torch

# torch is imported where it is used, because exported files are run without it.
Coefficient: TypeAlias = "float | torch.Tensor"


class StepCoefficients(NamedTuple):
    """One row of a `StepTable`: Python numbers, or tensors that broadcast over the state."""

    x0_from_x: Coefficient
    x0_from_output: Coefficient
    next_from_x: Coefficient
    next_from_output: Coefficient
    next_from_x0: Coefficient
    noise_scale: Coefficient
    next_from_previous_x0: Coefficient = 0.0


# Of a table that does not look back at the previous x0, which takes one column more.
NUM_COLUMNS = 6


def epsilon_factors(
    signal: FloatArray, sigma: FloatArray, prediction_type: str, data_scale: float = 1.0
) -> tuple[FloatArray, FloatArray]:
    """`(from_x, from_output)`: the model's epsilon in terms of the state and its output, `[n]` each."""
    if prediction_type == "epsilon":
        return signal * 0, signal * 0 + 1
    if prediction_type == "sample":
        return 1 / sigma, -signal / sigma
    if prediction_type == "flow":
        return signal * 0 + 1, signal
    if prediction_type == "edm":
        return sigma, -data_scale * signal
    return sigma, signal


def columns(
    signal: FloatArray,
    sigma: FloatArray,
    signal_next: FloatArray,
    direction: FloatArray,
    noise_scale: FloatArray,
    prediction_type: str,
    use_clipped_model_output: bool,
    xp: Any = np,
    data_scale: float = 1.0,
) -> FloatArray:
    """`[n, 6]` float64 columns of `n` steps from their square roots, `[n]` each.

    Args:
        signal, sigma: `sqrt(alpha_bar)` and `sqrt(1 - alpha_bar)` at `t`.
        signal_next: `sqrt(alpha_bar_next)`.
        direction: the factor of epsilon, `sqrt(1 - alpha_bar_next - std_dev**2)`.
        noise_scale: the factor of the noise.
        prediction_type: what the model predicts: `epsilon`, `sample`, `v_prediction`, `flow` (noise - x0), or `edm`, the
            output of EDM's preconditioning.
        use_clipped_model_output: derive epsilon from the limited x0 instead of the raw model output.
        xp: `numpy`, or `torch` for tensors.
        data_scale: sigma_data for `edm`, with which `(data_scale * signal)**2 + sigma**2` is 1. With -1 it is
            `v_prediction`.
    """
    zero = signal * 0
    # A step from pure noise (signal 0) or from a clean state (sigma 0) has infinite columns, as diffusers' step has.
    with np.errstate(divide="ignore", invalid="ignore") if xp is np else nullcontext():
        if prediction_type == "epsilon":
            x0 = (1 / signal, -sigma / signal)
        elif prediction_type == "sample":
            x0 = (zero, zero + 1)
        elif prediction_type == "flow":
            x0 = (zero + 1, -sigma)
        elif prediction_type == "edm":
            x0 = (data_scale * data_scale * signal, data_scale * sigma)
        else:
            x0 = (signal, -sigma)
        eps = (*epsilon_factors(signal, sigma, prediction_type, data_scale), zero)
        if use_clipped_model_output:
            eps = (1 / sigma, zero, -signal / sigma)
        from_x, from_output, from_x0 = (direction * factor for factor in eps)
    rows: FloatArray = xp.stack([*x0, from_x, from_output, signal_next + from_x0, noise_scale], axis=-1)
    return rows


def noise_factors(
    alpha_bar: FloatArray, alpha_bar_next: FloatArray, eta: FloatArray, variance_type: str, xp: Any = np
) -> tuple[FloatArray, FloatArray]:
    """`(direction, noise_scale)` of each step, float64 `[n]`.

    `fixed_small` is equation 16, sigma_t(eta). `fixed_large` keeps the direction of eta 1 and draws noise at the
    paper's sigma-hat, `sqrt(1 - alpha_bar / alpha_bar_next)` (appendix D.3): DDPM with the larger variance.
    """
    tiny = np.finfo(np.float64).tiny
    # A product of many alphas underflows to 0, and so does the quotient of two; `large` is 1 there.
    least_next = xp.clip(alpha_bar_next, tiny, None)
    large = 1 - alpha_bar / least_next
    ratio = (1 - alpha_bar_next) / xp.clip(1 - alpha_bar, tiny, None)
    std_dev = eta * xp.sqrt(ratio * large)
    # 1 - alpha_bar_next - std_dev**2 as a sum of positive terms: at eta 1 the difference cancels to nothing.
    direction = xp.sqrt(ratio * ((1 - eta**2) * large + alpha_bar * (1 - alpha_bar_next) / least_next))
    return direction, std_dev if variance_type == "fixed_small" else xp.sqrt(large)


def _check_eta(eta: float | Sequence[float], num_steps: int, variance_type: str) -> FloatArray:
    try:
        values = np.asarray(eta, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"eta: {eta!r}; pass numbers in [0, 1] (0 is DDIM, 1 is DDPM)") from None
    if values.ndim > 1 or (values.ndim == 1 and len(values) != num_steps):
        raise ValueError(f"eta: shape {values.shape}; pass one number, or one for each of the {num_steps} steps")
    if not np.all((values >= 0) & (values <= 1)):
        raise ValueError(f"eta: {eta!r}; pass numbers in [0, 1] (0 is DDIM, 1 is DDPM)")
    if variance_type == "fixed_large" and not np.all(values == 1):
        raise ValueError(f"variance_type: 'fixed_large' is DDPM's larger variance, so eta is 1 there; eta: {eta!r}")
    return np.broadcast_to(values, (num_steps,))


def _check_transitions(
    schedule: Schedule, pairs: Sequence[Pair], prediction_type: str | None
) -> tuple[str, FloatArray, FloatArray]:
    """The prediction type, and alpha_bar on both sides of each pair, float64 `[n]`."""
    kind = schedule.config.prediction_type if prediction_type is None else prediction_type
    require_choice("prediction_type", kind, PREDICTION_TYPES)
    if not pairs:
        raise ValueError("pairs: empty; pass at least one (t, t_next)")
    n_train = schedule.config.num_train_timesteps
    for t, t_next in pairs:
        if not (0 <= t < n_train and (t_next is None or 0 <= t_next < t)):
            raise ValueError(
                f"pairs: ({t}, {t_next}); pass 0 <= t_next < t < {n_train}, or None as t_next for the clean end"
            )
    timesteps, following = zip(*pairs, strict=True)
    alpha_bar, alpha_bar_next = schedule.alpha_bar(timesteps), schedule.alpha_bar(following)
    require_signal(kind, timesteps, alpha_bar)
    return kind, alpha_bar, alpha_bar_next


def require_signal(prediction_type: str, timesteps: Sequence[float], signal: FloatArray) -> None:
    """Raise a `ValueError` for an epsilon prediction at a timestep without signal, from which x0 cannot be told."""
    if prediction_type == "epsilon" and signal.min() == 0:
        raise ValueError(
            f"prediction_type: 'epsilon' at timestep {timesteps[int(signal.argmin())]}, which has no signal (zero"
            " terminal SNR), so x0 cannot be told from it; use a v_prediction or sample model, or a spacing that"
            " does not start there ('leading')"
        )


def _check_called(timesteps: Sequence[float] | npt.NDArray[Any]) -> tuple[int, ...] | tuple[float, ...]:
    """Timesteps as Python integers, or as floating-point numbers if any of them is one."""
    values = np.asarray(timesteps)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "iuf":
        raise ValueError(
            f"timesteps: {values.dtype} of shape {values.shape}; pass a list of numbers, one for each step"
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"timesteps: row {bad[0]} is {values[bad[0]]}; pass finite numbers")
    return tuple(values.tolist())


@dataclass(frozen=True)
class StepTable:
    """Everything that a run needs beside its model, immutable: threads and samplers share it freely.

    A sampling method is a function that returns one, and `Sampler` takes it in place of a scheduler.

    Attributes:
        timesteps: what the model is called with at each step: all integers, or all floating-point numbers.
        columns: `[num_steps, 6]` float64, read-only, in the order of `StepCoefficients`; `[num_steps, 7]` where a step
            looks back at the x0 of the step before it.
        rows: the same as Python numbers; each step implementation rounds them once, to its own precision.
        start_scale: a run starts from standard normal noise times this number (diffusers' `init_noise_sigma`).
        noising: `(from_x0, from_noise)`, which bring a clean state to the first step (diffusers' `add_noise`) as
            `from_x0 * x0 + from_noise * noise`; None where the method has no such rule.
        inverse: the table that encodes a clean state to the state from which this one samples it, or None.
    """

    timesteps: tuple[int, ...] | tuple[float, ...]
    columns: FloatArray = field(compare=False)
    rows: tuple[StepCoefficients, ...]
    start_scale: float = 1.0
    noising: tuple[float, float] | None = None
    inverse: StepTable | None = None
    _on_device: dict[torch.device, tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def from_columns(
        cls,
        timesteps: Sequence[float] | npt.NDArray[Any],
        values: npt.ArrayLike,
        *,
        start_scale: float = 1.0,
        noising: tuple[float, float] | None = None,
        inverse: StepTable | None = None,
    ) -> StepTable:
        """The table of `n` steps.

        Args:
            timesteps: `[n]`, in the order of the steps. Integers call the model with int64; if any is a floating-point
                number, or the array has such a dtype, the model is called with float32. In which direction they go, and
                whether they repeat, is up to the method.
            values: `[n, 6]` or `[n, 7]` numbers in the order of `StepCoefficients`.
            start_scale, noising, inverse: as the attributes.

        Raises:
            ValueError: shapes that do not fit, or a timestep or scale that is not finite; the message names the row.
        """
        owned = np.array(values, dtype=np.float64)
        called = _check_called(timesteps)
        if owned.shape not in ((len(called), NUM_COLUMNS), (len(called), NUM_COLUMNS + 1)):
            raise ValueError(f"columns: shape {owned.shape}; pass ({len(called)}, {NUM_COLUMNS} or {NUM_COLUMNS + 1})")
        if not 0 < start_scale < float("inf"):
            raise ValueError(f"start_scale: {start_scale!r}; pass a finite number > 0")
        if noising is not None and (len(noising) != 2 or not np.isfinite(noising).all()):
            raise ValueError(f"noising: {noising!r}; pass two finite numbers, (from_x0, from_noise)")
        if owned.shape[1] > NUM_COLUMNS and owned[0, -1] != 0:
            raise ValueError(
                f"columns: the first step has next_from_previous_x0 {owned[0, -1]}; pass 0, as nothing is before it"
            )
        owned.setflags(write=False)
        rows = tuple(StepCoefficients(*row) for row in owned.tolist())
        pair = None if noising is None else (float(noising[0]), float(noising[1]))
        return cls(called, owned, rows, float(start_scale), pair, inverse)

    @classmethod
    def build(
        cls,
        schedule: Schedule,
        pairs: Sequence[Pair],
        *,
        eta: float | Sequence[float] = 0.0,
        variance_type: str = "fixed_small",
        prediction_type: str | None = None,
        use_clipped_model_output: bool = False,
    ) -> StepTable:
        """The table of a list of transitions.

        Args:
            schedule: where alpha_bar comes from.
            pairs: `(t, t_next)` in sampling order, e.g. `schedule.pairs(50)`; None is the clean end.
            eta: a number in [0, 1] for all steps, or one per step; 0 is DDIM, 1 is DDPM.
            variance_type: `"fixed_small"`, or `"fixed_large"` for the paper's sigma-hat (needs eta 1).
            prediction_type: what the model predicts; the schedule's own by default.
            use_clipped_model_output: derive epsilon from the limited x0 (Glide's convention).

        Raises:
            ValueError: a value out of range, a pair that does not descend, or an epsilon prediction at a timestep
                without signal (zero terminal SNR), from which x0 cannot be told.
        """
        require_choice("variance_type", variance_type, VARIANCE_TYPES)
        kind, alpha_bar, alpha_bar_next = _check_transitions(schedule, pairs, prediction_type)
        etas = _check_eta(eta, len(pairs), variance_type)
        direction, noise_scale = noise_factors(alpha_bar, alpha_bar_next, etas, variance_type)
        sigma, signal = np.sqrt(1 - alpha_bar), np.sqrt(alpha_bar)
        invertible = alpha_bar_next.all() and not noise_scale.any()
        return cls.from_columns(
            [t for t, _ in pairs],
            columns(signal, sigma, np.sqrt(alpha_bar_next), direction, noise_scale, kind, use_clipped_model_output),
            noising=(float(signal[0]), float(sigma[0])),
            inverse=cls.build_inverse(schedule, pairs, prediction_type=kind) if invertible else None,
        )

    @classmethod
    @np.errstate(divide="ignore", invalid="ignore")
    def build_inverse(
        cls, schedule: Schedule, pairs: Sequence[Pair], *, prediction_type: str | None = None
    ) -> StepTable:
        """The table that encodes a clean state to the state from which `pairs`, at eta 0 and without a limit, sample it.

        The reverse of the ODE of arXiv:2010.02502, section 4.3: each row inverts one sampling step, with epsilon
        predicted at the step's end, which is where sampling calls the model next. The clean state has no timestep of
        its own, so there the model is called with the last one of sampling.

        Args:
            schedule: where alpha_bar comes from.
            pairs: `(t, t_next)` in sampling order, as for `build`.
            prediction_type: what the model predicts; the schedule's own by default.

        Returns:
            One row per pair, from the clean state to the first pair's `t`; none adds noise.

        Raises:
            ValueError: what `build` raises for the same arguments, and a pair that ends in a state without signal, from
                which nothing can be encoded.
        """
        kind, alpha_bar, alpha_bar_next = _check_transitions(schedule, pairs, prediction_type)
        if not alpha_bar_next.all():
            t, t_next = pairs[int(alpha_bar_next.argmin())]
            raise ValueError(
                f"pairs: ({t}, {t_next}) ends in a state without signal, from which nothing can be encoded; leave out"
                " the timesteps without signal"
            )
        timesteps = [t for t, _ in pairs]
        called = [*timesteps[1:], timesteps[-1]]
        called_alpha_bar = schedule.alpha_bar(called)
        # The output becomes epsilon with alpha_bar at the timestep that the model was called with.
        eps_x, eps_output = epsilon_factors(np.sqrt(called_alpha_bar), np.sqrt(1 - called_alpha_bar), kind)
        signal, sigma = np.sqrt(alpha_bar_next), np.sqrt(1 - alpha_bar_next)
        noisier, direction = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        x0 = ((1 - sigma * eps_x) / signal, -sigma * eps_output / signal)
        values = np.stack([*x0, direction * eps_x, direction * eps_output, noisier, np.zeros_like(signal)], axis=1)
        return cls.from_columns(called[::-1], values[::-1])

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def timestep_dtype(self) -> str:
        """The dtype of the timesteps that the model is called with: `"int64"` or `"float32"`."""
        return "float32" if isinstance(self.timesteps[0], float) else "int64"

    @property
    def looks_back(self) -> bool:
        """Whether the table has the column of the previous x0."""
        return bool(self.columns.shape[1] > NUM_COLUMNS)

    @cached_property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return bool((self.columns[:, 5] != 0).any())

    @property
    def has_epsilon_term(self) -> bool:
        """Whether `next_from_output` is the output's part of an epsilon beside the term of x0, so that both may come from
        different outputs: not where x_next is a sum of the state and x0, or of the state and the output."""
        from_output, from_x0 = self.columns[:, 3] != 0, self.columns[:, 4] != 0
        rest = (self.columns[:, [2, *range(5, self.columns.shape[1])]] != 0).any(axis=1)
        # A first state without signal is epsilon itself.
        rest[0] &= self.noising is None or self.noising[0] != 0
        return bool((from_x0 | ~from_output).all() and (from_output.any() or not rest.any()))

    def swap_outputs(self) -> StepTable:
        """The same steps written with epsilon's term in the place of x0, and x0's in that of epsilon; for tables of 6 columns.

        CFG++ backwards: solved for the noisier state, its step has x0 of the unconditional output and epsilon of the guided
        one.
        """
        x0_x, x0_output, eps_x, eps_output, from_x0, noise = self.columns.T
        values = np.stack(
            [eps_x, eps_output, from_x0 * x0_x, from_x0 * x0_output, np.ones_like(from_x0), noise], axis=1
        )
        return StepTable.from_columns(self.timesteps, values)

    def tensor(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy of the columns on a device, float64 by default."""
        import torch

        return torch.tensor(self.columns, dtype=torch.float64 if dtype is None else dtype, device=device)

    @cached_property
    def ratios(self) -> npt.NDArray[np.float32]:
        """`[num_steps, 2]` float32: `x0_from_output / x0_from_x` and what its rounding leaves; 0 where x0_from_x is 0.

        With it the fused step finds x0 of half precision without a division.
        """
        from_x, from_output = self.columns[:, 0], self.columns[:, 1]
        with np.errstate(invalid="ignore", over="ignore"):
            ratio = np.divide(from_output, from_x, out=np.zeros_like(from_x), where=from_x != 0)
            high = ratio.astype(np.float32)
            low = np.where(np.isfinite(high), ratio - high, 0.0)
        return np.stack([high, low.astype(np.float32)], axis=1)

    def on(self, device: torch.device) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
        """The float64 columns, each row's number as int64 `[]`, and `ratios`, kept on a device.

        Do not write to them.
        """
        kept = self._on_device.get(device)
        if kept is None:
            import torch

            with torch.inference_mode(False):
                rows = torch.arange(len(self), device=device).unbind()
                kept = (self.tensor(device), rows, torch.tensor(self.ratios, device=device))
            self._on_device[device] = kept
        return kept
