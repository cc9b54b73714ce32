"""What a step of diffusers' DDIM schedulers calls and reads, and the rows of coefficients that this makes.

Rows are kept under the very values that the step reads, so that a change of them is seen whichever way it was made.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from fastddim.coefficients import StepCoefficients, columns
from fastddim.config import PREDICTION_TYPES, Clip, DynamicThreshold, Limit, require_choice
from fastddim.schedule import FloatArray

_KEPT_TABLES = 16
_LEAST_SIGNAL = 1e-30
# Beyond it a coefficient is a quotient by 0.
_LARGEST = 1e20
_MISSING = object()
# Equal ones are interchangeable, and nothing changes one in place.
_CONSTANTS = frozenset({int, float, bool, str, type(None), np.int64, np.float64})
TENSORS = (torch.Tensor, torch.nn.Parameter)
_INTEGERS = (int, np.int64)
_NUMBERS = (int, float, np.float64)
_DTYPES = (torch.float32, torch.float64)

# The square roots of a step: signal and sigma at t, signal_next, direction, noise_scale.
Roots = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Original:
    """diffusers' own code of a step: the members and the globals that it uses, as they are when this is made.

    Args:
        scheduler: the class whose `step` it is.

    Attributes:
        module: the name of that class's module.
    """

    def __init__(self, scheduler: Any) -> None:
        members: dict[str, Any] = {}
        used: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        names = ["step"]
        while names:
            name = names.pop()
            member = inspect.getattr_static(scheduler, name, None)
            if member is None or name in members:
                continue
            members[name] = getattr(scheduler, name)
            function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
            for found in _names_in(getattr(function, "__code__", None)):
                names.append(found)
                if found in function.__globals__:
                    used[id(function.__globals__), found] = (function.__globals__, found, function.__globals__[found])
        self.module: str = scheduler.__module__
        self._scheduler, self._step = scheduler, members.pop("step")
        self._names, self._members, self._globals = frozenset(members), tuple(members.items()), tuple(used.values())

    def runs_in(self, scheduler: Any) -> bool:
        """Whether a step of a scheduler would run this code alone: nothing of it is overridden or patched."""
        # torch.compile guards what this reads of the dictionary, but not that `name in vars(scheduler)` is false.
        if self._scheduler.step is not self._step or not self._names.isdisjoint(vars(scheduler)):
            return False
        kind = type(scheduler)
        # Loops, as it follows no getter of several attributes.
        for name, member in self._members:
            if getattr(kind, name) is not member:
                return False
        for namespace, name, value in self._globals:  # noqa: SIM110  (a generator takes longer)
            if namespace.get(name) is not value:
                return False
        return True


def _names_in(code: CodeType | None) -> Iterator[str]:
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _names_in(constant)


def _forward_roots(alpha_bar: torch.Tensor, alpha_bar_next: torch.Tensor, eta: float) -> Roots:
    # diffusers' own operations, one by one, in its dtype: their roundings matter where 1 - alpha_bar is small.
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    std_dev = eta * variance**0.5
    direction = (1 - alpha_bar_next - std_dev**2) ** 0.5
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5, alpha_bar_next**0.5, direction, std_dev


def _inverse_roots(alpha_bar_next: torch.Tensor, alpha_bar: torch.Tensor, eta: float) -> Roots:
    direction = (1 - alpha_bar_next) ** 0.5
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5, alpha_bar_next**0.5, direction, torch.zeros_like(alpha_bar)


# All that a step reads of its scheduler: `alphas_cumprod` as bytes, alpha_bar beyond the training timesteps, their dtype,
# the number of inference steps, and the configuration's values in the order of `StepKind.read_config`.
_Values = tuple[bytes, float, torch.dtype, int, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class StepKind:
    """What differs between the steps of diffusers' two classes.

    Attributes:
        original: diffusers' own code.
        end: the attribute with alpha_bar beyond the training timesteps.
        roots: the step's square roots, of alpha_bar at the timestep, at its neighbour, and eta.
        read_config: what the step reads of the configuration: `num_train_timesteps`, `prediction_type`, and its limit's.
        clamps: whether the neighbour is kept inside `num_train_timesteps`.
    """

    original: Original
    end: str
    roots: Callable[[torch.Tensor, torch.Tensor, float], Roots]
    read_config: Callable[[Any], tuple[Any, ...]]
    clamps: bool = False

    def columns(
        self,
        alphas: torch.Tensor,
        end: torch.Tensor,
        timesteps: torch.Tensor,
        n: int,
        config: tuple[Any, ...],
        eta: float,
        use_clipped_model_output: bool,
    ) -> torch.Tensor:
        """The columns `[n, 6]` float64 of int64 timesteps `[n]`, with diffusers' roundings.

        Args:
            alphas, end: alpha_bar at the timesteps, `[N]`, and beyond them, of one dtype.
            n: the number of inference steps.
            config: what `read_config` gave.
        """
        n_train, prediction_type, *_ = config
        neighbours = timesteps - n_train // n
        if self.clamps:
            neighbours = neighbours.clamp_max(n_train - 1)
        beyond = torch.where(neighbours >= 0, alphas[neighbours.clamp_min(0)], end)
        roots = self.roots(alphas[timesteps], beyond, eta)
        signal, sigma, signal_next, direction, noise_scale = (root.double() for root in roots)
        # Without signal diffusers divides by 0 and clips the infinity; a huge number clips alike and stays a number.
        signal = signal.clamp_min(_LEAST_SIGNAL)
        made: Any = columns
        rows: torch.Tensor = made(
            signal, sigma, signal_next, direction, noise_scale, prediction_type, use_clipped_model_output, torch
        )
        return rows


def _forward_config(config: Any) -> tuple[Any, ...]:
    return (*_inverse_config(config), config.thresholding, config.dynamic_thresholding_ratio, config.sample_max_value)


def _inverse_config(config: Any) -> tuple[Any, ...]:
    # Nothing of a threshold, though the configuration of a DDIM scheduler that it was made from may have one.
    return config.num_train_timesteps, config.prediction_type, config.clip_sample, config.clip_sample_range


FORWARD = StepKind(
    Original(diffusers.DDIMScheduler),
    "final_alpha_cumprod",
    _forward_roots,
    _forward_config,
)
INVERSE = StepKind(
    Original(diffusers.DDIMInverseScheduler),
    "initial_alpha_cumprod",
    _inverse_roots,
    _inverse_config,
    clamps=True,
)


class StepRows:
    """The rows of one reading of a scheduler.

    Attributes:
        values: what was read.
        limit: applied to x0.
        prediction_type: the configuration's.
        dtype: that of `alphas_cumprod`.
    """

    def __init__(self, kind: StepKind, values: _Values) -> None:
        alphas, end, self.dtype, self._n, self._config = self.values = values
        self.limit, self.prediction_type = _limit_of(self._config), self._config[1]
        require_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        self._kind = kind
        self._alphas = torch.frombuffer(bytearray(alphas), dtype=self.dtype)
        self._end = torch.tensor(end, dtype=self.dtype, device="cpu")
        self._tables: dict[tuple[float, bool], TimestepTable] = {}

    def table(self, eta: float, use_clipped_model_output: bool) -> TimestepTable:
        """The rows of every timestep, for one way to step."""
        table = self._tables.get((eta, use_clipped_model_output))
        if table is None:
            if len(self._tables) >= _KEPT_TABLES:
                self._tables.clear()
            columns_of = partial(self.columns, eta=eta, use_clipped_model_output=use_clipped_model_output)
            table = TimestepTable(columns_of, len(self._alphas))
            self._tables[eta, use_clipped_model_output] = table
        return table

    def columns(self, timesteps: NDArray[np.int64], eta: float, use_clipped_model_output: bool) -> FloatArray:
        """The columns `[n, 6]` of timesteps `[n]`."""
        index = torch.from_numpy(timesteps)
        rows = self._kind.columns(self._alphas, self._end, index, self._n, self._config, eta, use_clipped_model_output)
        return rows.numpy()


class TimestepTable:
    """A row for each timestep a diffusers scheduler accepts: `[-N, N)`, indexed as Python indexes.

    Args:
        columns_of: the columns `[n, 6]` float64 of int64 timesteps `[n]`.
        n_train: N.
    """

    def __init__(self, columns_of: Callable[[NDArray[np.int64]], FloatArray], n_train: int) -> None:
        self._columns_of = columns_of
        self._n_train = n_train
        self._rows: dict[int, Any] = {}
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def row(self, timestep: int | torch.Tensor) -> StepCoefficients | None:
        """The row of a timestep that the host knows, as Python numbers; None where diffusers divides by 0."""
        index = operator.index(timestep)
        row: StepCoefficients | None = self._rows.get(index, _MISSING)
        if row is _MISSING:
            if not -self._n_train <= index < self._n_train:
                raise IndexError(f"timestep: {index} is outside the {self._n_train} training timesteps")
            found = StepCoefficients(*self._columns_of(np.array([index]))[0].tolist())
            row = found if all(abs(number) < _LARGEST for number in map(float, found)) else None
            self._rows[index] = row
        return row

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept on a device: the rows of timesteps 0 ... N - 1, NaN, then -N ... -1; and those timesteps as 0-dim tensors."""
        kept = self._on_device.get(device)
        if kept is None:
            n = self._n_train
            every = self._columns_of(np.concatenate([np.arange(n), np.arange(-n, 0)]))
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


class _HostView:
    """A tensor's numbers on the host: an array over its memory, or, of one on a device, a copy."""

    def __init__(self) -> None:
        self._kept: tuple[torch.Tensor, tuple[Any, ...], NDArray[Any]] | None = None

    def read(self, tensor: torch.Tensor) -> Any:
        """A number, or bytes; None for an inference tensor on a device, as nothing counts what is written to it."""
        on_host = tensor.is_cpu
        if not on_host and (tensor.is_meta or tensor.is_inference()):
            return None
        # `tensor.data = ...` gives it other memory; a copy is as old as its last write.
        state = (tensor.data_ptr(), tensor.shape, tensor.stride(), 0 if on_host else tensor._version)
        kept = self._kept
        if kept is None or kept[0] is not tensor or kept[1] != state:
            self._kept = kept = (tensor, state, tensor.cpu().numpy())
        return kept[2].tobytes() if tensor.ndim else kept[2].item()


class RowCache:
    """What a scheduler keeps of its last reading; a copied or unpickled one starts empty."""

    def __init__(self) -> None:
        self._alphas, self._end = _HostView(), _HostView()
        self._rows: StepRows | None = None

    def __reduce__(self) -> Any:
        return RowCache, ()

    def rows(self, scheduler: Any, kind: StepKind) -> StepRows | None:
        """The rows of a scheduler as it is now; None where its code or its values are such that there are none.

        Raises:
            ValueError: called before `set_timesteps`, or with an unknown prediction type.
        """
        read = _read(scheduler, kind)
        if read is None:
            return None
        alphas, end, n, config = read
        content, beyond = self._alphas.read(alphas), self._end.read(end)
        if content is None or beyond is None:
            return None
        values, rows = (content, beyond, alphas.dtype, _require_steps(n), config), self._rows
        if rows is None or rows.values != values:
            if not _has_rows(n, config):
                return None
            rows = self._rows = StepRows(kind, values)
        return rows


_Read = tuple[torch.Tensor, torch.Tensor, int | None, tuple[Any, ...]]


def _read(scheduler: Any, kind: StepKind) -> _Read | None:
    """`alphas_cumprod`, alpha_bar beyond it, the number of inference steps, and the configuration's values.

    None where the scheduler's step is not diffusers' own, or where no row is made of such values.
    """
    if not kind.original.runs_in(scheduler):
        return None
    alphas, end = scheduler.alphas_cumprod, getattr(scheduler, kind.end)
    if type(alphas) not in TENSORS or type(end) not in TENSORS or alphas.requires_grad or end.requires_grad:
        return None
    if alphas.ndim != 1 or end.ndim or alphas.dtype not in _DTYPES or end.dtype is not alphas.dtype:
        return None
    config, n = scheduler.config, scheduler.num_inference_steps
    try:
        read = kind.read_config(config)
    except AttributeError:
        return None
    return (alphas, end, n, read) if _CONSTANTS.issuperset(map(type, (n, *read))) else None


def _require_steps(n: int | None) -> int:
    if n is None:
        raise ValueError("num_inference_steps: None; call set_timesteps(num_inference_steps) before step()")
    return n


def _has_rows(n: Any, config: tuple[Any, ...]) -> bool:
    """Whether a row and a `Limit` take the numbers, of which diffusers takes others too."""
    n_train, _, clips, clip_range, *threshold = config
    for count in (n, n_train):
        if type(count) not in _INTEGERS or count < 1:
            return False
    if threshold and threshold[0]:
        _, ratio, max_value = threshold
        return type(ratio) in _NUMBERS and 0 <= ratio <= 1 and type(max_value) in _NUMBERS and 0 < max_value < math.inf
    return not clips or (type(clip_range) in _NUMBERS and 0 < clip_range < math.inf)


def _limit_of(config: tuple[Any, ...]) -> Limit:
    """The limit applied to x0, of the values of `StepKind.read_config`."""
    _, _, clips, clip_range, *threshold = config
    if threshold and threshold[0]:
        return DynamicThreshold(threshold[1], threshold[2])
    return Clip(clip_range) if clips else None


class TracedRows:
    """The rows of a scheduler inside a trace, which computes them anew at each run, so that it sees what has changed.

    Attributes:
        limit, prediction_type, dtype: as those of `StepRows`.
    """

    def __init__(
        self, kind: StepKind, alphas: torch.Tensor, end: torch.Tensor, n: int, config: tuple[Any, ...]
    ) -> None:
        self._kind, self._alphas, self._end, self._n, self._config = kind, alphas, end, n, config
        self.limit, self.prediction_type, self.dtype = _limit_of(config), config[1], alphas.dtype

    def at(self, timestep: torch.Tensor, eta: float, use_clipped_model_output: bool) -> torch.Tensor:
        """The columns `[1, 6]` float64 of a timestep on its device."""
        alphas, end = self._alphas.to(timestep.device), self._end.to(timestep.device)
        index = timestep.reshape(1).long()
        return self._kind.columns(alphas, end, index, self._n, self._config, eta, use_clipped_model_output)


def read_traced(scheduler: Any, kind: StepKind) -> TracedRows | None:
    """`RowCache.rows` inside a trace."""
    read = _read(scheduler, kind)
    if read is None:
        return None
    alphas, end, n, config = read
    steps = _require_steps(n)
    return TracedRows(kind, alphas, end, steps, config) if _has_rows(steps, config) else None


def has_rows(scheduler: Any, kind: StepKind) -> bool:
    """Whether `RowCache.rows` gives a scheduler's rows, once its timesteps are set."""
    read = _read(scheduler, kind)
    return read is not None and _HostView().read(read[0]) is not None and _has_rows(read[2] or 1, read[3])
