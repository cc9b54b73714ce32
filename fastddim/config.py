"""Configuration: frozen dataclasses that validate themselves once, with diffusers' names."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace", "quadratic")
VARIANCE_TYPES = ("fixed_small", "fixed_large")
TRANSITIONS = ("exact", "diffusers")
GUIDANCE_METHODS = ("cfg", "cfg++", "apg")


def require_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a `ValueError` that names the argument and lists what is valid, unless `value` is one of `choices`."""
    valid = tuple(choices)
    if value not in valid:
        close = difflib.get_close_matches(str(value), valid, n=1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, valid))}{hint}")


def require_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise a `ValueError` unless `value` is an integer in `[low, high]`."""
    bound = f">= {low}" if high is None else f"in [{low}, {high}]"
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integral or value < low or (high is not None and value > high):
        raise ValueError(f"{name}: {value!r}; pass an integer {bound}")


def require_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise a `ValueError` unless `value` is a finite number in `[low, high]`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= float(value) <= high:
        raise ValueError(f"{name}: {value!r}; pass a number in [{low:g}, {high:g}]")


def require_guidance_method(
    name: str, method: Any, apg_eta: Any, apg_norm_threshold: Any, guided: bool = True, without: str = "guidance_scale"
) -> None:
    """Raise a `ValueError` for a way of guidance that there is not, or for numbers that it does not take.

    Args:
        name: what the argument `method` is called.
        guided: whether there is guidance at all.
        without: the argument that asks for it.
    """
    require_choice(name, method, GUIDANCE_METHODS)
    require_number("apg_eta", apg_eta, 0.0, 1.0)
    require_number("apg_norm_threshold", apg_norm_threshold, 0.0, 1e30)
    if not guided and method != "cfg":
        raise ValueError(f"{name}: {method!r} without {without}; pass both")
    for option, value in (("apg_eta", apg_eta), ("apg_norm_threshold", apg_norm_threshold)):
        if value and method != "apg":
            raise ValueError(f"{option}: {value!r} with {name} {method!r}; pass {name}='apg', or leave it out")


@dataclass(frozen=True, slots=True)
class Clip:
    """Limit the predicted x0 to `[-range, range]` (`clip_sample`, `clip_sample_range` in diffusers)."""

    range: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.range < float("inf"):
            raise ValueError(f"clip_sample_range: {self.range!r}; pass a finite number > 0")

    def __str__(self) -> str:
        return f"clip to [-{self.range:g}, {self.range:g}]"


@dataclass(frozen=True, slots=True)
class DynamicThreshold:
    """Dynamic thresholding of the predicted x0 (Imagen, arXiv:2205.11487, section 2.3).

    Per sample, `s` is the `ratio` quantile of `|x0|`, clamped to `[1, max_value]`; x0 becomes `clip(x0, -s, s) / s`.
    With `max_value` 1, diffusers' default, this is a clip to `[-1, 1]`.
    """

    ratio: float = 0.995
    max_value: float = 1.0

    def __post_init__(self) -> None:
        require_number("dynamic_thresholding_ratio", self.ratio, 0.0, 1.0)
        if not 0 < self.max_value < float("inf"):
            raise ValueError(f"sample_max_value: {self.max_value!r}; pass a finite number > 0")

    def __str__(self) -> str:
        return f"dynamic threshold, quantile {self.ratio:g}, at most {self.max_value:g}"


Limit = Clip | DynamicThreshold | None
# By the names that manifests and commands have for them.
LIMITS: dict[str, type[Clip | DynamicThreshold]] = {"clip": Clip, "threshold": DynamicThreshold}
# As messages list what is valid beside None.
LIMIT_CLASSES = ", ".join(f"a {made.__name__}" for made in LIMITS.values())


def limit_name(limit: Limit) -> str:
    """A limit's name in `LIMITS`, or `"none"`.

    Raises:
        TypeError: something else.
    """
    if limit is None:
        return "none"
    for name, made in LIMITS.items():
        if isinstance(limit, made):
            return name
    raise TypeError(f"limit: {type(limit).__name__}; pass {LIMIT_CLASSES} or None")


def limit_from(config: Any) -> Limit:
    """The limit that a configuration with diffusers' fields asks for: thresholding goes before clipping."""
    if getattr(config, "thresholding", False):
        return DynamicThreshold(config.dynamic_thresholding_ratio, config.sample_max_value)
    return Clip(config.clip_sample_range) if config.clip_sample else None


def limit_kind(limit: Limit, *, numbers_change: bool = False) -> tuple[str, int]:
    """The parts of a limit that are fixed when a step is compiled: its name, and the binary magnitude of a threshold.

    `"none"`; `"clip"`; `"threshold"`; `"fixed"`, a threshold that is always `max_value`, as that is below 1. The magnitude
    is the number of bits that count the float32 numbers in (1, max_value]; where the limit's numbers may change, it has
    room for a `max_value` up to 256.
    """
    if limit is None:
        return "none", 0
    if isinstance(limit, Clip):
        return "clip", 0
    if limit.max_value <= 1:
        # The quantile is clamped to at most max_value last, so it cannot matter.
        return ("clip" if limit.max_value == 1 else "fixed"), 0
    (bits,) = struct.unpack("<i", struct.pack("<f", limit.max_value))
    return "threshold", max(26 if numbers_change else 0, max(0, bits - 0x3F800000 - 1).bit_length())


def limit_numbers(limit: Limit) -> tuple[float, float]:
    """A limit's range or `max_value`, and its ratio; 1 for what it does not have."""
    if isinstance(limit, DynamicThreshold):
        return float(limit.max_value), float(limit.ratio)
    return (1.0 if limit is None else float(limit.range)), 1.0


def with_numbers(limit: Limit, number: float, ratio: float) -> Limit:
    """A limit of the same kind with other numbers, as `limit_numbers` gives them."""
    if isinstance(limit, DynamicThreshold):
        return DynamicThreshold(ratio, number)
    return None if limit is None else dataclasses.replace(limit, range=number)


@dataclass(frozen=True, slots=True, kw_only=True)
class DDIMConfig:
    """What the schedule and the step need to know of a model. Fields and defaults are diffusers' `DDIMScheduler`'s.

    Beyond diffusers: `timestep_spacing="quadratic"`, the paper's tau (arXiv:2010.02502, appendix D.2).

    Raises:
        ValueError: a value is out of range; the message names the field, the value and what is valid.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(float(beta) for beta in self.trained_betas))
            object.__setattr__(self, "num_train_timesteps", self._count_trained_betas())
        require_int("num_train_timesteps", self.num_train_timesteps, 1)
        require_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        require_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        require_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        require_int("steps_offset", self.steps_offset, 0, self.num_train_timesteps - 1)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start, beta_end: {self.beta_start!r}, {self.beta_end!r}; pass 0 < beta_start <= beta_end < 1"
            )
        if self.rescale_betas_zero_snr and self.num_train_timesteps < 2:
            raise ValueError("rescale_betas_zero_snr: True needs num_train_timesteps >= 2")
        self.limit  # noqa: B018  (builds the limit once, which validates its fields)

    def _count_trained_betas(self) -> int:
        betas = self.trained_betas or ()
        last = len(betas) - 1
        bad = next((i for i, beta in enumerate(betas) if not (0 < beta < 1 or (beta == 1 and i == last))), None)
        if not betas or bad is not None:
            what = "empty" if bad is None else f"entry {bad} is {betas[bad]!r}"
            raise ValueError(
                f"trained_betas: {what}; pass one number in (0, 1) per training timestep, the last may be 1"
            )
        if self.num_train_timesteps not in (1000, len(betas)):
            raise ValueError(
                f"num_train_timesteps: {self.num_train_timesteps} differs from the {len(betas)} trained_betas;"
                f" pass num_train_timesteps={len(betas)}"
            )
        return len(betas)

    @property
    def limit(self) -> Limit:
        """What keeps the predicted x0 in range."""
        return limit_from(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, ignore_unknown: bool = False) -> DDIMConfig:
        """Build from a mapping, e.g. a `scheduler_config.json` or a diffusers `scheduler.config`.

        Args:
            values: configuration; keys that start with `_` (diffusers' bookkeeping) are skipped.
            ignore_unknown: skip keys that DDIM has no use for, as other schedulers' configurations have them.

        Raises:
            ValueError: an unknown key, unless `ignore_unknown`, or an invalid value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        public = {key: value for key, value in values.items() if not key.startswith("_")}
        if not ignore_unknown:
            for key in public:
                require_choice("configuration key", key, sorted(known))
        return cls(**{key: value for key, value in public.items() if key in known})
