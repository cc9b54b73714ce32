"""A call of the model: its prediction, and its two parts where what is constant over the steps leaves the loop."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fastddim.capture_checks import ModelState, find_modules, is_compiled
from fastddim.hoisting import DEFAULT_HOIST_LIMIT, HoistedModel, split_model
from fastddim.tracing import ExportError

Model = Callable[..., Any]
# How many kinds of calls are kept in parts.
_MOST_KINDS = 16


def prediction_of(output: Any) -> torch.Tensor:
    """The prediction in what a model returned: a tensor, the first of a tuple, or `.sample`.

    Raises:
        TypeError: something else.
    """
    if isinstance(output, torch.Tensor):
        return output
    output = getattr(output, "sample", output)
    first = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(first, torch.Tensor):
        raise TypeError(f"model: returned {type(first).__name__}; it must return a tensor, a tuple, or `.sample`")
    return first


def mean_of(prediction: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The prediction for x `[B, C, ...]`: the first half of `[B, 2 * C, ...]`, whose other one is a learned variance."""
    same = prediction.shape == x.shape
    if same or x.ndim < 2 or prediction.shape != (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        return prediction
    return prediction[:, : x.shape[1]].contiguous()


def null_class(model: Any) -> int | None:
    """The label that means "no class" for a diffusers model; None for one without classes.

    The last embedding of a UNet's, or the one behind those that a DiT counts.
    """
    config = getattr(model, "config", None)
    num_classes = getattr(config, "num_class_embeds", None)
    return getattr(config, "num_embeds_ada_norm", None) if num_classes is None else num_classes - 1


def sample_shape_of(model: Any) -> tuple[int, ...] | None:
    """What a diffusers model's configuration says; None for one of videos, which leaves the frames open."""
    config = getattr(model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    kind = type(model).__name__
    if channels is None or size is None or any(word in kind for word in ("3D", "Motion", "SpatioTemporal")):
        return None
    # More channels than come out are conditions beside the state, as those of inpainting.
    channels = min(channels, getattr(config, "out_channels", None) or channels)
    if isinstance(size, int):
        return (channels, size) if "1D" in kind else (channels, size, size)
    return (channels, *size)


def call_model(model: Model, x: torch.Tensor, t: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The prediction of `model(x, t, **kwargs)`, in memory of its own; raises as `prediction_of`."""
    tensor = mean_of(prediction_of(model(x, t, **kwargs)), x)
    storage = x.untyped_storage()
    start = storage.data_ptr()
    if start <= tensor.data_ptr() < start + storage.nbytes():
        # A view of its input, over which the step writes while it reads the output.
        tensor = tensor.clone()
    return tensor


class Hoister:
    """A model's two parts for each kind of call, traced at the first one. Thread-safe.

    Parts are traced anew when the model changes (`ModelState`); weights that change in place are seen, since the values
    belong to a run.

    Args:
        model: `model(x, t, **kwargs)`.
        limit: as for `split_model`.
        compile: a mode of `torch.compile` for the part in the loop; None leaves it as it is.
    """

    def __init__(self, model: Model, limit: int = DEFAULT_HOIST_LIMIT, compile: str | None = None) -> None:
        self._model, self._limit, self._compile = model, limit, compile
        self._lock = threading.Lock()
        self._state: ModelState | None = None
        self._parts: dict[Hashable, HoistedModel | None] = {}
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Hoister, (self._model, self._limit, self._compile)

    def find(self, x: torch.Tensor, t: torch.Tensor, kwargs: Mapping[str, Any], *, steps: int) -> HoistedModel | None:
        """The parts for calls like `model(x, t, **kwargs)`; None where the model has to stay whole.

        Args:
            x, t: of the shapes, dtypes and memory format of a call: `[R, ...]`, `[R]`.
            kwargs: tensors of R rows may come with other numbers of them.
            steps: how many steps a run has.
        """
        with self._lock:
            if self._state is None or self._state.difference() is not None:
                self._parts.clear()
                self._state = ModelState(self._model)
            key: Hashable = None
            try:
                key = _call_key(x, t, kwargs)
                if key not in self._parts:
                    if len(self._parts) >= _MOST_KINDS:
                        self._parts.clear()
                    self._parts[key] = self._split(x, t, kwargs, steps)
            # Arguments that cannot be told from others have no key.
            except (ExportError, TypeError) as error:
                self._parts[key] = None
                self._warn(error)
            return self._parts[key]

    def _split(self, x: torch.Tensor, t: torch.Tensor, kwargs: Mapping[str, Any], steps: int) -> HoistedModel | None:
        model, rows = self._model, x.shape[0]
        if is_compiled(model):
            raise ExportError(f"model: {_kind_of(model)} is compiled already, and has no graph to take apart")
        leaves, structure = pytree.tree_flatten(dict(kwargs))
        at = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        # A batch of one would be taken for a constant.
        several = torch.arange(max(rows, 2), device=x.device) % rows

        def call(x: torch.Tensor, t: torch.Tensor, conditions: Sequence[torch.Tensor]) -> torch.Tensor:
            given = list(leaves)
            for index, condition in zip(at, conditions, strict=True):
                given[index] = condition
            return prediction_of(model(x, t, **pytree.tree_unflatten(given, structure)))

        batched = [has_rows(leaves[index], rows) for index in at]
        # Tensors made in inference mode cannot be traced outside of it, nor others within.
        with torch.inference_mode(False), torch.no_grad():
            conditions = [
                leaves[index][several] if in_batch else leaves[index].clone()
                for index, in_batch in zip(at, batched, strict=True)
            ]
            example = x[several]
            if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
                example = example.contiguous(memory_format=torch.channels_last)
            parts = split_model(
                call, find_modules(model), example, t[several], conditions, batched=batched,
                kind=_kind_of(model), steps=steps, limit=self._limit,
            )  # fmt: skip
        if parts is not None and self._compile is not None:
            parts.compile(self._compile)
        return parts

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"hoist: {error}; every step computes all of it", RuntimeWarning, stacklevel=7)


def _kind_of(model: Model) -> str:
    if isinstance(model, partial):
        model = model.args[0]
    return type(model).__name__ if isinstance(model, torch.nn.Module) else getattr(model, "__qualname__", repr(model))


def has_rows(value: Any, rows: int) -> bool:
    """Whether a model's argument has a row for each row of its input."""
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == rows


def _call_key(x: torch.Tensor, t: torch.Tensor, kwargs: Mapping[str, Any]) -> Hashable:
    """What the parts of a call are of: all but the number of rows."""
    leaves, structure = pytree.tree_flatten(dict(kwargs))
    described = tuple(
        (leaf.shape[1:] if has_rows(leaf, x.shape[0]) else (None, *leaf.shape), leaf.dtype)
        if isinstance(leaf, torch.Tensor)
        else (type(leaf), leaf)
        for leaf in leaves
    )
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    key = (x.shape[1:], x.dtype, x.device, x.stride()[1:], t.dtype, described, structure, autocast)
    hash(key)
    return key
