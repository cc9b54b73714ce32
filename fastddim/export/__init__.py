"""Exporters: a model and its sampler in one file, and what runs such files."""

from __future__ import annotations

import importlib
from typing import Any

_ROOM_OF = {
    "Bundle": "bundle",
    "BundleError": "bundle",
    "ExportError": "plan",
    "ExportOptions": "plan",
    "NotFiniteError": "ort",
    "OrtPipeline": "ort_pipeline",
    "OrtSampler": "ort",
    "ParityError": "validate",
    "TritonOptions": "triton_repository",
    "export_onnx": "to_onnx",
    "export_pipeline": "pipelines",
    "load_exportable": "pipelines",
    "open_bundle": "bundle",
    "verify_bundle": "validate",
    "verify_pipeline": "pipelines",
    "write_triton_repository": "triton_repository",
}

__all__ = [
    "Bundle",
    "BundleError",
    "ExportError",
    "ExportOptions",
    "NotFiniteError",
    "OrtPipeline",
    "OrtSampler",
    "ParityError",
    "TritonOptions",
    "export_onnx",
    "export_pipeline",
    "load_exportable",
    "open_bundle",
    "verify_bundle",
    "verify_pipeline",
    "write_triton_repository",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'fastddim.export' has no attribute {name!r}")
    try:
        room = importlib.import_module(f"fastddim.export.{_ROOM_OF[name]}")
    except ImportError as error:
        raise ImportError(f"fastddim.export.{name} needs {error.name}: pip install 'fastddim[onnx]'") from error
    return getattr(room, name)
