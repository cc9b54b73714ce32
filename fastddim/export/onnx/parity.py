"""ONNX files against torch: what ONNX Runtime's CPU runs of them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch

from fastddim.export.denoisers import prepared
from fastddim.export.onnx.graph import widen


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
