"""Exporters: a model and its sampler in one file, and what runs such files."""

from __future__ import annotations

import importlib
from typing import Any

_ROOM_OF = {
    "AotiSampler": "aoti",
    "Bundle": "bundle",
    "BundleError": "bundle",
    "ExportError": "plan",
    "ExportOptions": "plan",
    "KernelBundle": "kernel_bundle",
    "KernelOptions": "to_cubin",
    "NotFiniteError": "bundle_sampler",
    "OrtPipeline": "ort_pipeline",
    "OrtSampler": "ort",
    "ParityError": "validate",
    "Profile": "trt_options",
    "TensorRTOptions": "trt_options",
    "TensorRTSampler": "trt",
    "TritonOptions": "triton_repository",
    "export_aoti": "to_aoti",
    "export_cubin": "to_cubin",
    "export_onnx": "to_onnx",
    "export_pipeline": "pipelines",
    "export_tensorrt": "to_tensorrt",
    "load_exportable": "pipelines",
    "open_bundle": "bundle",
    "open_kernels": "kernel_bundle",
    "open_sampler": "bundle_sampler",
    "verify_bundle": "validate",
    "verify_pipeline": "pipelines",
    "write_triton_repository": "triton_repository",
}

__all__ = [
    "AotiSampler",
    "Bundle",
    "BundleError",
    "ExportError",
    "ExportOptions",
    "KernelBundle",
    "KernelOptions",
    "NotFiniteError",
    "OrtPipeline",
    "OrtSampler",
    "ParityError",
    "Profile",
    "TensorRTOptions",
    "TensorRTSampler",
    "TritonOptions",
    "export_aoti",
    "export_cubin",
    "export_onnx",
    "export_pipeline",
    "export_tensorrt",
    "load_exportable",
    "open_bundle",
    "open_kernels",
    "open_sampler",
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
