"""Exporters: a model and its sampler in one file, and what runs such files."""

from __future__ import annotations

import importlib
from typing import Any

_ROOM_OF = {
    "AotiSampler": "aoti.sampler",
    "Bundle": "bundle",
    "BundleError": "bundle",
    "ExportError": "sampler_plan",
    "ExportOptions": "sampler_plan",
    "KernelBundle": "cubin.bundle",
    "KernelOptions": "cubin.exporter",
    "NotFiniteError": "bundle_sampler",
    "OrtPipeline": "onnx.pipeline",
    "OrtSampler": "onnx.sampler",
    "ParityError": "validate",
    "Profile": "tensorrt.options",
    "TensorRTOptions": "tensorrt.options",
    "TensorRTSampler": "tensorrt.sampler",
    "TritonOptions": "inference_server.repository",
    "export_aoti": "aoti.exporter",
    "export_cubin": "cubin.exporter",
    "export_onnx": "onnx.exporter",
    "export_pipeline": "onnx.pipeline_exporter",
    "export_tensorrt": "tensorrt.exporter",
    "load_exportable": "onnx.pipeline_exporter",
    "open_bundle": "bundle",
    "open_kernels": "cubin.bundle",
    "open_sampler": "bundle_sampler",
    "verify_bundle": "validate",
    "verify_pipeline": "onnx.pipeline_exporter",
    "write_triton_repository": "inference_server.repository",
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
