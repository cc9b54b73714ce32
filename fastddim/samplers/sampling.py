"""`Sampling`: what a scheduler is sampled with: its schedule, a method and the method's options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from fastddim.coefficients import StepTable
from fastddim.config import DDIMConfig, Limit, require_choice
from fastddim.samplers.levels import AnySchedule
from fastddim.samplers.method import METHODS, get_method
from fastddim.samplers.steps import Steps
from fastddim.schedule import EDMSchedule, FloatArray, FlowSchedule, Schedule, shift_snr

SCHEDULE_TYPES: dict[str, type[Schedule] | type[FlowSchedule] | type[EDMSchedule]] = {
    "betas": Schedule,
    "flow": FlowSchedule,
    "edm": EDMSchedule,
}
_DEFAULT_STEPS = 50
# EDM's models know no number of training timesteps.
_MOST_STEPS = 1000
# More than a user takes with the methods whose tables are kept, and few enough to keep all of them.
_MOST_KEPT = 100
# What diffusers' classes can be told that no method here knows, with the value that leaves it out.
_LEFT_OUT: dict[str, Any] = {
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "interpolation_type": "linear",
    "invert_sigmas": False,
    "rho": 7.0,
}
_SPACING_FLAGS = {f"use_{name}_sigmas": name for name in ("karras", "exponential", "beta")}


@dataclass(frozen=True)
class Sampling:
    """What a scheduler is sampled with.

    Attributes:
        schedule: the model's.
        method: a name in `METHODS`.
        options: the method's, by name; those that are left out are the method's defaults.
        spacing: how a number of steps is spaced, as in `Steps`; None is the schedule's own.
        limit: the configuration's.
    """

    schedule: AnySchedule
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    spacing: str | None = None
    limit: Limit = None

    def record(self) -> dict[str, Any]:
        """All of it but the limit, for JSON: `schedule_type`, `schedule`, `method`."""
        kind = next(name for name, made in SCHEDULE_TYPES.items() if isinstance(self.schedule, made))
        config = self.schedule.config if isinstance(self.schedule, Schedule) else self.schedule
        method = {"name": self.method, "options": dict(self.options), "spacing": self.spacing}
        return {"schedule_type": kind, "schedule": asdict(config), "method": method}

    @classmethod
    def from_record(cls, values: Mapping[str, Any], limit: Limit = None) -> Sampling:
        """What `record` gave; other keys are left out.

        Raises:
            ValueError: a schedule, method or option that there is not.
        """
        require_choice("schedule_type", values["schedule_type"], SCHEDULE_TYPES)
        made = SCHEDULE_TYPES[values["schedule_type"]]
        config = values["schedule"]
        schedule: AnySchedule = Schedule(DDIMConfig.from_dict(config)) if made is Schedule else made(**config)
        method = values["method"]
        get_method(method["name"]).check(schedule, method["options"])
        return cls(schedule, method["name"], method["options"], method["spacing"], limit)

    @property
    def most_steps(self) -> int:
        """The most steps that a run can have."""
        method = get_method(self.method)
        config = self.schedule.config if isinstance(self.schedule, Schedule) else self.schedule
        trained = getattr(config, "num_train_timesteps", _MOST_STEPS)
        if self.method == "dpmsolver++" and getattr(config, "timestep_spacing", None) == "leading":
            # Its first step lies one stride below the end of training.
            trained = max(1, trained - 1)
        return int({**method.options, **self.options}.get("original_inference_steps", trained))

    @property
    def default_steps(self) -> int:
        """The steps of a run, where no number of them is given."""
        return min(_DEFAULT_STEPS, self.most_steps)

    @property
    def most_baked(self) -> int:
        """The most steps of a file that makes its tables itself: of other methods than DDIM it has them all inside."""
        return self.most_steps if self.method == "ddim" else min(self.most_steps, _MOST_KEPT)

    def with_options(
        self, options: Mapping[str, Any], limit: Limit, spacing: str | None = None, *, rederive: bool = True
    ) -> Sampling:
        """This with other options of the method, and with epsilon derived from the limited x0 where it is limited.

        With the raw epsilon, guidance and a limit drift the state away from any picture.

        Args:
            rederive: False where epsilon comes from another output than x0, as with CFG++.

        Raises:
            ValueError: an option that the method does not take.
        """
        rederives = "use_clipped_model_output"
        method = get_method(self.method)
        merged = {**self.options, **options}
        if limit is not None and rederives in method.options:
            merged.setdefault(rederives, rederive)
        method.check(self.schedule, merged)
        return replace(self, options=merged, spacing=spacing or self.spacing, limit=limit)

    def by(self, method: str, *, rederive: bool = True) -> Sampling:
        """The same schedule sampled by another method, with its defaults; `"auto"` is this one's.

        Args:
            method: a name in `METHODS`.
            rederive: as for `with_options`.

        Raises:
            ValueError: an unknown method, or one that does not take the schedule.
        """
        if method in ("auto", self.method):
            return self
        get_method(method).check(self.schedule, {})
        return Sampling(self.schedule, method, limit=self.limit).with_options({}, self.limit, rederive=rederive)

    def build(self, steps: Steps, **options: Any) -> StepTable:
        """The table of a run; `options` go before those of the attribute, and its spacing where steps have none.

        Raises:
            ValueError: what the method does not take.
        """
        method = get_method(self.method)
        merged = {**self.options, **options}
        method.check(self.schedule, merged)
        if self.spacing is not None and steps.spacing is None and steps.num_inference_steps is not None:
            steps = replace(steps, spacing=self.spacing)
        return method.build(self.schedule, steps, **merged)


def read_scheduler(scheduler: Any, method: str = "auto", argument: str = "scheduler") -> Sampling:
    """What a scheduler is sampled with.

    Args:
        scheduler: a `Schedule`, `FlowSchedule` or `EDMSchedule`, a `DDIMConfig`, a diffusers scheduler, or what this
            function returned for one.
        method: a name in `METHODS`; `"auto"` is the method of a diffusers class, and DDIM for the others, DDPM's and
            PNDM's classes among them.
        argument: what messages call the scheduler.

    Raises:
        TypeError: something else.
        ValueError: an unknown method, a class of diffusers that is none of these methods, a configuration that the
            method cannot take, or `alphas_cumprod` that are not the configuration's; the message names what would work.
    """
    if method != "auto":
        get_method(method)
    if isinstance(scheduler, Sampling):
        same = method in ("auto", scheduler.method)
        return scheduler if same else Sampling(scheduler.schedule, method, limit=scheduler.limit)
    if isinstance(scheduler, DDIMConfig):
        scheduler = Schedule(scheduler)
    if isinstance(scheduler, (Schedule, FlowSchedule, EDMSchedule)):
        default = "ddim" if isinstance(scheduler, Schedule) else "euler"
        limit = scheduler.config.limit if isinstance(scheduler, Schedule) else None
        return Sampling(scheduler, default if method == "auto" else method, limit=limit)
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"{argument}: {type(scheduler).__name__}; pass a fastddim Schedule, a DDIMConfig, a diffusers scheduler or a"
            " StepTable"
        )
    # diffusers' own code reads attributes, which can be assigned without the items.
    config = {**config, **{name: value for name, value in getattr(config, "__dict__", {}).items() if name in config}}
    bases = [base.__name__ for base in type(scheduler).__mro__]
    # What is none of diffusers' has a configuration that DDIM can take.
    known = [name for name, found in METHODS.items() if set(bases) & set(found.schedulers)]
    own = known[0] if known else None if "SchedulerMixin" in bases else "ddim"
    if own is None and method == "auto":
        classes = sorted({name for found in METHODS.values() for name in found.schedulers})
        raise ValueError(
            f"{argument}: {type(scheduler).__name__} is the class of no sampling method here; pass one of"
            f" {', '.join(classes)}, or method= to sample its model by one of {', '.join(METHODS)}"
        )
    chosen = own if method == "auto" else method
    assert chosen is not None
    # A configuration keeps what it was made from (`from_config`), of which a class heeds its own parameters alone.
    taken = inspect.signature(type(scheduler).__init__).parameters
    if "snr_shift_scale" in taken:
        # CogVideoX's classes limit nothing, whatever their configurations say.
        shifted = shift_snr(DDIMConfig.from_dict(config, ignore_unknown=True), config["snr_shift_scale"])
        config = {**asdict(shifted), "clip_sample": False}
    elif chosen != "ddim" and own not in ("ddim", None):
        config = {"clip_sample": False, **{name: value for name, value in config.items() if name in taken}}
    elif "SchedulerMixin" in bases and "clip_sample" not in taken:
        # A class that knows no clip has none, whatever DDIM's default; what a file says is kept for pipelines of DDIM's.
        config = {"clip_sample": False, **config}
    # DDIM's options are no configuration's, and another method than the class's own takes its defaults.
    sampling = _read_config(config, chosen, chosen != "ddim" and chosen in known)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is not None and not getattr(alphas, "is_meta", False) and isinstance(sampling.schedule, Schedule):
        _require_equal(alphas, sampling.schedule.alphas_cumprod)
    return sampling


def _require_equal(alphas: Any, configured: FloatArray) -> None:
    """Refuse `alphas_cumprod` that were replaced, as nothing here would see them."""
    own = np.asarray(alphas.double().cpu() if hasattr(alphas, "cpu") else alphas, dtype=np.float64)
    # A scheduler computes its own in float32.
    if own.shape != configured.shape or not np.allclose(own, configured, rtol=1e-3, atol=1e-6):
        raise ValueError(
            "alphas_cumprod: other numbers than the scheduler's configuration gives; pass one made with trained_betas="
        )


def _read_config(config: Mapping[str, Any], method: str, configured: bool) -> Sampling:
    """`configured`: whether the configuration has the method's options."""
    for name, without in _LEFT_OUT.items():
        if configured and config.get(name, without) != without:
            raise ValueError(f"{name}: {config[name]!r} is not sampled here; pass {without!r}")
    schedule: AnySchedule
    limit: Limit = None
    if "sigma_data" in config:
        schedule = EDMSchedule(**_fields_of(EDMSchedule, config))
    elif "base_image_seq_len" in config:
        schedule = FlowSchedule(**_fields_of(FlowSchedule, config))
    else:
        schedule = Schedule(DDIMConfig.from_dict(config, ignore_unknown=True))
        limit = schedule.config.limit
    defaults = get_method(method).options if configured else {}
    options = {name: config[name] for name, value in defaults.items() if config.get(name) not in (None, value)}
    spacing = next((name for flag, name in _SPACING_FLAGS.items() if configured and config.get(flag)), None)
    return Sampling(schedule, method, options, spacing, limit)


def _fields_of(kind: type[FlowSchedule] | type[EDMSchedule], config: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: config[item.name] for item in fields(kind) if config.get(item.name) is not None}
