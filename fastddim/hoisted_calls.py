"""A pipeline's model calls in two parts: what is constant over the steps of a run is computed at its first one.

The pipeline calls the model with whatever it has at a step. So each call is looked at: a timestep that is not the run's, a
condition that is another tensor than at the first step, or was written to, and the model is called whole.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch.utils import _pytree as pytree

from fastddim.deferral import Deferred, version
from fastddim.hoisting import Hoisted, HoistedModel
from fastddim.model_call import Hoister

# What the state is called among a denoiser's arguments.
_STATES = ("sample", "hidden_states")
# Transformers of flow matching are called with parts of the scheduler's timesteps.
_DIVISORS = (1, 1000)


class _Output(BaseOutput):  # type: ignore[misc]
    sample: torch.Tensor


def _call(model: Any, state: str, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> Any:
    return model(**{state: x, "timestep": t}, **kwargs)


class Predict:
    """The part of a model that is in the loop, as an operation: equal to another of the same parts."""

    def __init__(self, model: torch.nn.Module, parts: HoistedModel) -> None:
        self.model, self._parts = model, parts

    def __call__(self, x: torch.Tensor, t: torch.Tensor, conditions: Any, values: Any) -> torch.Tensor:
        return self._parts.predict(x, t, conditions, values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Predict) and other._parts is self._parts

    def __hash__(self) -> int:
        return id(self._parts)


class HoistedCalls:
    """The calls of one model in a pipeline.

    Args:
        model: a denoiser, called with a state and a timestep.
        limit: as for `split_model`.

    Attributes:
        nbytes: memory of what left the steps of the last run.
    """

    def __init__(self, model: torch.nn.Module, limit: int) -> None:
        self._model = model
        self._signature = inspect.signature(model.forward)
        names = self._signature.parameters
        self._state = next((name for name in _STATES if name in names), "") if "timestep" in names else ""
        # The first call shows whether the model returns a prediction alone.
        self._has_one_output: bool | None = None if self._state else False
        self._hoister = Hoister(partial(_call, model, self._state), limit)
        self._divisor = 0
        self._timesteps: list[float] = []
        self._parts: HoistedModel | None = None
        self._values: Hoisted | None = None
        self._conditions: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self._called = torch.empty(0)
        self.nbytes = 0

    def begin(self, timesteps: list[float]) -> None:
        """A run over the scheduler's `timesteps` begins."""
        self._timesteps, self._parts, self._values, self._conditions = timesteps, None, None, []

    def note(self, result: Any) -> None:
        """What the whole model returned."""
        if self._has_one_output is None:
            self._has_one_output = len(pytree.tree_leaves(result)) == 1

    def take_apart(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], step: int | None
    ) -> tuple[Predict, Any] | None:
        """An operation and its arguments, of which the model's prediction comes; None where the model has to be called.

        Args:
            args, kwargs: what the pipeline calls the model with.
            step: the step's number among the run's timesteps; None at the first one, wherever that is.
        """
        if not self._has_one_output or not self._timesteps:
            return None
        given = dict(self._signature.bind(*args, **kwargs).arguments)
        x, t = given.pop(self._state), given.pop("timestep")
        given.update(given.pop("kwargs", {}))
        tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        if not isinstance(t, torch.Tensor) or any(isinstance(each, Deferred) for each in (x, t, *tensors)):
            return None
        t = t.to(x.device).expand(len(x))
        parts = self._hoister.find(x, t, given, steps=len(self._timesteps))
        if parts is None:
            return None
        if step is None or not self._divisor:
            step = self._find(t)
        if step is None:
            return None
        if parts is not self._parts:
            self._parts, self._values = parts, self._prepare(parts, t, tensors)
        if self._values is None or not self._are_the_same(tensors):
            return None
        if t.device.type == "cpu" and float(t[0]) != float(self._called[step]):
            return None
        rows = parts.rows_of(self._values, step, len(x))
        return Predict(self._model, parts), (x, t, tensors, rows)

    def _find(self, t: torch.Tensor) -> int | None:
        """The number of the run's first step, by what the model is called with."""
        number = t[:1].cpu()
        for divisor in [self._divisor] if self._divisor else _DIVISORS:
            at = (self._divided(t.dtype, divisor) == number).nonzero()
            if len(at):
                self._divisor = divisor
                return int(at[0])
        return None

    def _divided(self, dtype: torch.dtype, divisor: int) -> torch.Tensor:
        timesteps = torch.tensor(self._timesteps, device="cpu").to(dtype)
        return timesteps if divisor == 1 else timesteps / divisor

    def _prepare(self, parts: HoistedModel, t: torch.Tensor, tensors: list[torch.Tensor]) -> Hoisted:
        self._conditions = [(weakref.ref(tensor), version(tensor)) for tensor in tensors]
        self._called = self._divided(t.dtype, self._divisor)
        values = parts.prepare(self._called.to(t.device), tensors)
        self.nbytes = values.nbytes
        return values

    def _are_the_same(self, tensors: list[torch.Tensor]) -> bool:
        return len(tensors) == len(self._conditions) and all(
            kept() is tensor and written == version(tensor)
            for (kept, written), tensor in zip(self._conditions, tensors, strict=True)
        )

    def wrap(self, prediction: torch.Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The prediction as the model itself would return it from a call with `args` and `kwargs`."""
        as_output = self._signature.bind(*args, **kwargs).arguments.get("return_dict", True)
        return _Output(sample=prediction) if as_output else (prediction,)
