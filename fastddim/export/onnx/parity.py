"""ONNX files against torch: what ONNX Runtime's CPU runs of them, and how a pipeline's components are compared."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from fastddim.export.denoisers import prepared
from fastddim.export.onnx.graph import widen
from fastddim.export.onnx.sampler import yielding_options
from fastddim.export.validate import TOLERANCES, require_parity


@contextlib.contextmanager
def runnable(path: Path, model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[Path, torch.dtype]]:
    """A graph that a CPU runs, and the dtype of its arithmetic, which is the model's meanwhile.

    ONNX Runtime's CPU has no bfloat16: such a graph becomes one of float32 arithmetic on the bfloat16 weights.
    """
    if dtype != torch.bfloat16:
        yield path, dtype
        return
    with tempfile.TemporaryDirectory() as folder, prepared(model, torch.float32):
        widened = Path(folder, path.name)
        beside = path.with_name(f"{path.name}.data")
        if beside.exists():
            shutil.copyfile(beside, widened.with_name(beside.name))
        onnx.save_model(widen(onnx.load(path, load_external_data=False)), widened)
        yield widened, torch.float32


def measure_component(
    path: Path,
    name: str,
    module: torch.nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    dtype: torch.dtype,
    tolerance: float | None = None,
) -> list[dict[str, Any]]:
    """Largest differences between a component's file and its module, for the manifest.

    Args:
        path: the graph's file.
        name: the component's name.
        module: in evaluation mode; takes a dictionary of inputs and returns a tuple.
        batches: inputs `[B, ...]` to compare with.
        dtype: the dtype of the module's weights.
        tolerance: the largest difference. By default what the dtype explains, of the largest value where that is above 1.

    Raises:
        ParityError: a larger difference; the message has the component and both numbers.
    """
    with runnable(path, module, dtype) as (file, dtype), torch.no_grad():
        session = onnxruntime.InferenceSession(str(file), yielding_options(), providers=["CPUExecutionProvider"])
        arrays = [{key: value.numpy() for key, value in inputs.items()} for inputs in batches]
        pairs = [
            (module(dict(inputs)), session.run(None, given)) for inputs, given in zip(batches, arrays, strict=True)
        ]
    results = []
    for inputs, (expected, actual) in zip(batches, pairs, strict=True):
        first = next(iter(inputs.values()))
        largest = max(float(value.abs().max()) for value in expected)
        # numpy's maximum keeps a NaN, Python's need not.
        error = float(np.max([np.abs(have - want.numpy()).max() for have, want in zip(actual, expected, strict=True)]))
        entry = {
            "component": name,
            "batch": first.shape[0],
            "size": list(first.shape[1:]),
            "largest_error": error if math.isfinite(error) else math.inf,
            "tolerance": TOLERANCES[dtype] * max(1.0, largest) if tolerance is None else tolerance,
        }
        require_parity(entry, f"in {name}, a batch of {first.shape[0]} of {tuple(first.shape[1:])}")
        results.append(entry)
    return results
