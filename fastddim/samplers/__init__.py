"""Sampling methods: a file each, with a function `(schedule, steps, **options) -> StepTable` that reads like its paper.

    from fastddim.samplers.dpm_solver import dpm_solver

    table = dpm_solver(Schedule(config), 20)

`METHODS` has them by name, as `Sampler(method=...)` takes them.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastddim.samplers.method import METHODS as METHODS
from fastddim.samplers.method import Method as Method
from fastddim.samplers.spacings import SPACINGS as SPACINGS
from fastddim.samplers.steps import Steps as Steps

# Each module registers its method, so that a new one is a file and nothing else.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
