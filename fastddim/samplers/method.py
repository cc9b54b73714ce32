"""`Method`: a sampling method by name, with the diffusers schedulers that sample by it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastddim.coefficients import StepTable
from fastddim.config import require_choice

METHODS: dict[str, Method] = {}


@dataclass(frozen=True)
class Method:
    """A sampling method.

    Attributes:
        name: what `Sampler(method=...)` calls it.
        build: `(schedule, steps, **options) -> StepTable`.
        schedulers: the names of diffusers' classes that sample by it.
        schedules: the kinds of schedule that it takes.
    """

    name: str
    build: Callable[..., StepTable]
    schedulers: tuple[str, ...]
    schedules: tuple[type, ...]

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Its options with their defaults."""
        parameters = list(inspect.signature(self.build).parameters.values())[2:]
        return {parameter.name: parameter.default for parameter in parameters}

    def check(self, schedule: Any, options: Mapping[str, Any]) -> None:
        """Refuse a schedule or an option that the method does not take.

        Raises:
            ValueError: the message names both, and what the method takes.
        """
        if not isinstance(schedule, self.schedules):
            fits = [name for name, method in METHODS.items() if isinstance(schedule, method.schedules)]
            raise ValueError(
                f"method: {self.name!r} with a {type(schedule).__name__}; that is sampled by {', '.join(map(repr, fits))}"
            )
        for name, value in options.items():
            if name not in self.options:
                others = [other for other, method in METHODS.items() if name in method.options]
                hint = f"; it is one of {', '.join(map(repr, others))}" if others else ""
                raise ValueError(
                    f"{name}: no option of method {self.name!r}, which takes {', '.join(self.options) or 'none'}{hint}"
                )
            if isinstance(self.options[name], bool) and not isinstance(value, bool):
                raise ValueError(f"{name}: {value!r}; pass True or False")


Build = TypeVar("Build", bound=Callable[..., StepTable])


def method(name: str, *schedules: type, schedulers: tuple[str, ...] = ()) -> Callable[[Build], Build]:
    """Register a method under a name: a decorator of its function."""

    def register(build: Build) -> Build:
        if name in METHODS:
            raise ValueError(f"method: {name!r} is registered already; choose another name")
        METHODS[name] = Method(name, build, schedulers, schedules)
        return build

    return register


def get_method(name: str) -> Method:
    """A method by name.

    Raises:
        ValueError: an unknown name.
    """
    require_choice("method", name, METHODS)
    return METHODS[name]
