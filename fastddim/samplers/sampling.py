"""`Sampling`: what a scheduler is sampled with: its schedule, a method and the method's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fastddim.coefficients import StepTable
from fastddim.config import DDIMConfig, Limit
from fastddim.samplers.levels import AnySchedule
from fastddim.samplers.method import METHODS, get_method
from fastddim.samplers.steps import Steps
from fastddim.schedule import EDMSchedule, FlowSchedule, Schedule

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
        schedule: of the model.
        method: a name in `METHODS`.
        options: of the method, by name; those that are left out are the method's defaults.
        spacing: how a number of steps is spaced, as in `Steps`; None is the schedule's own.
        limit: of the configuration.
    """

    schedule: AnySchedule
    method: str = "ddim"
    options: Mapping[str, Any] = field(default_factory=dict)
    spacing: str | None = None
    limit: Limit = None

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
        ValueError: an unknown method, a class of diffusers that is none of these methods, or a configuration that the
            method cannot take; the message names what would work.
    """
    if method != "auto":
        get_method(method)
    if isinstance(scheduler, Sampling):
        return scheduler if method in ("auto", scheduler.method) else Sampling(scheduler.schedule, method, limit=scheduler.limit)
    if isinstance(scheduler, DDIMConfig):
        scheduler = Schedule(scheduler)
    if isinstance(scheduler, (Schedule, FlowSchedule, EDMSchedule)):
        own = "ddim" if isinstance(scheduler, Schedule) else "euler"
        limit = scheduler.config.limit if isinstance(scheduler, Schedule) else None
        return Sampling(scheduler, own if method == "auto" else method, limit=limit)
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"{argument}: {type(scheduler).__name__}; pass a fastddim Schedule, a DDIMConfig, a diffusers scheduler or a"
            " StepTable"
        )
    bases = [base.__name__ for base in type(scheduler).__mro__]
    # What is none of diffusers' has a configuration that DDIM can take.
    known = [name for name, found in METHODS.items() if set(bases) & set(found.schedulers)]
    own = known[0] if known else None if "SchedulerMixin" in bases else "ddim"
    if own is None and method == "auto":
        classes = sorted({name for found in METHODS.values() for name in found.schedulers})
        raise ValueError(
            f"{argument}: {type(scheduler).__name__} is no linear sampler with one model call a step; pass one of"
            f" {', '.join(classes)}, or method= to sample its model by one of {', '.join(METHODS)}"
        )
    chosen = own if method == "auto" else method
    assert chosen is not None
    # DDIM's options are no configuration's, and another method than the class's own takes its defaults.
    return _read_config(config, chosen, chosen != "ddim" and chosen in known, clips=own in ("ddim", None))


def _read_config(config: Mapping[str, Any], method: str, configured: bool, clips: bool) -> Sampling:
    """`configured`: whether the configuration has the method's options; `clips`: whether x0 is clipped by default."""
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
        unclipped = {} if clips or "clip_sample" in config else {"clip_sample": False}
        schedule = Schedule(DDIMConfig.from_dict({**config, **unclipped}, ignore_unknown=True))
        limit = schedule.config.limit
    names = get_method(method).options if configured else ()
    options = {name: config[name] for name in names if config.get(name) is not None}
    spacing = next((name for flag, name in _SPACING_FLAGS.items() if configured and config.get(flag)), None)
    return Sampling(schedule, method, options, spacing, limit)


def _fields_of(kind: type[FlowSchedule] | type[EDMSchedule], config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        item.name: config[item.name] for item in fields(kind) if config.get(item.name) is not None
    }
