"""A module as a graph: what the exporters and `hoisting` ask of `torch.export`."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping

import torch
from torch.export import Dim, ExportedProgram


class ExportError(ValueError):
    """A model that cannot be exported; the message names the module or operator."""


def trace(
    module: torch.nn.Module, examples: Mapping[str, torch.Tensor], dynamic: Mapping[str, Collection[int]], kind: str
) -> ExportedProgram:
    """Trace a module whose `forward` takes a dictionary of tensors.

    Args:
        module: in evaluation mode.
        examples: each input, its dynamic dimensions of 2 or more.
        dynamic: the dynamic dimensions of each input.
        kind: the model's name for errors.

    Raises:
        ExportError: code that cannot be exported, or that fixes a dynamic dimension.
    """
    shapes = {name: dict.fromkeys(dynamic[name], Dim.DYNAMIC) for name in examples}
    with quiet(), _keep_attributes(module):
        try:
            return torch.export.export(module, (dict(examples),), dynamic_shapes=(shapes,), strict=False)
        except Exception as error:
            raise ExportError(f"model: {kind} cannot be exported: {told(error)}") from error


@contextlib.contextmanager
def _keep_attributes(module: torch.nn.Module) -> Iterator[None]:
    """Lists and dictionaries on modules as they were: torch puts copies in their place, and the traced code may fill them."""
    kept = [
        (attributes, name, value, copy.copy(value))
        for attributes in map(vars, module.modules())
        for name, value in attributes.items()
        if type(value) in (list, dict, set) and not name.startswith("_")
    ]
    try:
        yield
    finally:
        for attributes, name, value, copied in kept:
            if value != copied:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(copied)
            attributes[name] = value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's own notes on what it exports, compiles or loads."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._inductor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def told(error: BaseException) -> str:
    """The innermost reason of an exporter's error, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
