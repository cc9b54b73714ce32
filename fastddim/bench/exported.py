"""Candidates that run an exported file, built once for each network and process."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddim.bench.cases import Work, a_compiler, a_gpu, installed

if TYPE_CHECKING:
    from fastddim.bench.loop_suite import LoopInputs


def missing(name: str) -> str | None:
    """What keeps a class of `fastddim.export` from loading."""
    import fastddim.export

    try:
        getattr(fastddim.export, name)
    except ImportError as error:
        return f"not installed: {error.name or error}"
    return None


def ort_missing() -> str | None:
    """What ONNX Runtime, on this machine's device, lacks."""
    absent = missing("OrtSampler") or missing("export_onnx") or installed("onnxruntime")()
    if absent is None and a_gpu() is None:
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "not installed: onnxruntime-gpu (pip install 'fastddim[gpu]')"
    return absent


def aoti_missing() -> str | None:
    """What AOTInductor lacks."""
    return missing("AotiSampler") or a_compiler()


def ort_work(inputs: LoopInputs) -> Work:
    """The run as one ONNX file, on as many threads as torch has."""
    import torch

    from fastddim.export import OrtSampler, export_onnx
    from fastddim.export.onnx.sampler import yielding_options

    folder, facts = _build(inputs, "onnx", export_onnx)
    options = yielding_options(torch.get_num_threads())
    device = inputs.start.device.type
    sampler, load_s = _timed(lambda: OrtSampler(folder, providers=device, session_options=options))
    start = inputs.start.float().cpu().numpy()
    kwargs = {name: value.cpu().numpy() for name, value in inputs.kwargs.items()}
    return _work(sampler, start, kwargs, inputs.problem.num_steps, {**facts, "load_s": load_s})


def aoti_work(inputs: LoopInputs) -> Work:
    """The run as one AOTInductor package."""
    from fastddim import export

    device = inputs.start.device.type
    folder, facts = _build(inputs, "aoti", functools.partial(export.export_aoti, device=device))
    sampler, load_s = _timed(lambda: export.AotiSampler(folder))
    return _work(sampler, inputs.start.float(), inputs.kwargs, inputs.problem.num_steps, {**facts, "load_s": load_s})


def tensorrt_work(inputs: LoopInputs) -> Work:
    """The run as one TensorRT engine."""
    from fastddim import export

    folder, facts = _build(inputs, "tensorrt", export.export_tensorrt)
    sampler, load_s = _timed(lambda: export.TensorRTSampler(folder))
    return _work(sampler, inputs.start.float(), inputs.kwargs, inputs.problem.num_steps, {**facts, "load_s": load_s})


def _work(sampler: Any, start: Any, kwargs: dict[str, Any], steps: int, facts: dict[str, float]) -> Work:
    return Work(lambda: (sampler(start, num_inference_steps=steps, **kwargs),), facts=lambda: facts)


# Bundles by exporter and network, with their size and the seconds that they took.
_BUILT: dict[tuple[str, str], tuple[Path, dict[str, float]]] = {}


def _build(inputs: LoopInputs, kind: str, export: Callable[..., Any]) -> tuple[Path, dict[str, float]]:
    key = (kind, inputs.key)
    if key not in _BUILT:
        import fastddim
        from fastddim.export import ExportOptions

        options = ExportOptions(num_inference_steps=inputs.problem.num_steps, use_clipped_model_output=False)
        folder = _folder() / f"{len(_BUILT)}"
        extra: dict[str, Any] = {}
        if not hasattr(inputs.model, "config"):
            # Two rows, as a batch of one would be exported as a constant.
            extra["sample_shape"] = inputs.problem.shape[1:]
            extra["example_kwargs"] = {name: _two_rows(value) for name, value in inputs.kwargs.items()}
        config = fastddim.DDIMConfig(**inputs.config)
        _, seconds = _timed(lambda: export(inputs.model, config, folder, options, parity_steps=(), **extra))
        _BUILT[key] = folder, {"build_s": seconds, "size_bytes": float(_size(folder))}
    return _BUILT[key]


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="fastddim-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _two_rows(value: Any) -> Any:
    return value[:1].repeat(2, *[1] * (value.ndim - 1))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start
