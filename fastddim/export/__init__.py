"""Exporters: a model and its sampler in one file, and what runs such files."""

from __future__ import annotations

from typing import Any

from fastddim.export.runtime import BUILT_IN, Runtime, get_runtime, load_part, register_runtime, runtimes

_INSTALL = "pip install 'fastddim[onnx]'"
_SHARED = {
    "bundle": ("Bundle", "BundleError", "open_bundle"),
    "bundle_sampler": ("BundleSampler", "NotFiniteError", "open_sampler"),
    "inference_server.options": ("InferenceServerOptions",),
    "inference_server.repository": ("write_repository",),
    "models": ("load_exportable",),
    "policy_exporter": ("export_policy",),
    "policy_sampler": ("PolicySampler",),
    "sampler_plan": ("ExportOptions",),
    "validate": ("ParityError", "verify_bundle"),
}
# The path of each public name, and the line that installs what it imports; the names load on first use.
_PATHS = {
    **{
        name: (path, runtime.install)
        for runtime in map(get_runtime, BUILT_IN)
        for name, path in runtime.parts().items()
    },
    **{name: (f"fastddim.export.{module}:{name}", _INSTALL) for module, names in _SHARED.items() for name in names},
    "ExportError": ("fastddim.tracing:ExportError", _INSTALL),
}

__all__ = ["Runtime", "get_runtime", "register_runtime", "runtimes", *_PATHS]


def __getattr__(name: str) -> Any:
    if name not in _PATHS:
        raise AttributeError(f"module 'fastddim.export' has no attribute {name!r}")
    return load_part(*_PATHS[name])
