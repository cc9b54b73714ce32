"""DDIM sampling at the speed of the hardware. The public names load on first use, so that the import itself is free."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "config": ("Clip", "DDIMConfig", "DynamicThreshold"),
    "schedule": ("EDMSchedule", "FlowSchedule", "Schedule"),
    "coefficients": ("StepTable",),
    "step": ("Guidance",),
    "interpolation": ("slerp",),
    "backends": ("ddim_step",),
    "scheduler": ("DDIMInverseScheduler", "DDIMScheduler", "DDIMSchedulerOutput"),
    "sampler": ("Sampler",),
    "sampler_options": ("SamplerOptions",),
    "pipeline": ("DDIMPipeline", "load_pipeline"),
    "acceleration": ("accelerate", "unaccelerate"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from fastddim.acceleration import accelerate as accelerate
    from fastddim.acceleration import unaccelerate as unaccelerate
    from fastddim.backends import ddim_step as ddim_step
    from fastddim.coefficients import StepTable as StepTable
    from fastddim.config import Clip as Clip
    from fastddim.config import DDIMConfig as DDIMConfig
    from fastddim.config import DynamicThreshold as DynamicThreshold
    from fastddim.interpolation import slerp as slerp
    from fastddim.pipeline import DDIMPipeline as DDIMPipeline
    from fastddim.pipeline import load_pipeline as load_pipeline
    from fastddim.sampler import Sampler as Sampler
    from fastddim.sampler_options import SamplerOptions as SamplerOptions
    from fastddim.schedule import EDMSchedule as EDMSchedule
    from fastddim.schedule import FlowSchedule as FlowSchedule
    from fastddim.schedule import Schedule as Schedule
    from fastddim.scheduler import DDIMInverseScheduler as DDIMInverseScheduler
    from fastddim.scheduler import DDIMScheduler as DDIMScheduler
    from fastddim.scheduler import DDIMSchedulerOutput as DDIMSchedulerOutput
    from fastddim.step import Guidance as Guidance


def __getattr__(name: str) -> Any:
    if name == "samplers":
        return importlib.import_module("fastddim.samplers")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fastddim' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastddim.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
