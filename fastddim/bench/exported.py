"""Candidates that run an exported file, built once for each network and process."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastddim.bench.breakdown import seconds_of, with_host
from fastddim.bench.cases import Candidate, Work, a_compiler, a_gpu, installed
from fastddim.bench.loop_case import LoopInputs
from fastddim.bench.profiles import Node, find_step_nodes, node_operations, node_parts, read_onnxruntime


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


def tensorrt_missing() -> str | None:
    """What TensorRT, the standard one or that for RTX, lacks."""
    if any(map(importlib.util.find_spec, ("tensorrt", "tensorrt_rtx"))):
        return missing("TensorRTSampler") or a_gpu()
    return "not installed: tensorrt (pip install 'fastddim[tensorrt]')"


def _ort_work(inputs: LoopInputs, **options: Any) -> Work:
    import torch

    from fastddim.export import OrtSampler, export_onnx
    from fastddim.export.bundle import open_bundle
    from fastddim.export.onnx.sampler import yielding_options

    device = inputs.start.device.type
    load = partial(OrtSampler, providers=device)
    session_options = partial(yielding_options, torch.get_num_threads())
    kwargs = {name: value.cpu().numpy() for name, value in inputs.kwargs.items()}
    start = inputs.start.float().cpu().numpy()
    work = _work(
        inputs, export_onnx, lambda folder: load(folder, session_options=session_options()), start, kwargs, **options
    )
    if device == "cuda":
        # Its profiler has what a launch takes, torch's the kernels.
        return work

    def nodes() -> list[Node]:
        """Those of a warm run, in a session of its own, as a profiler stays with its session."""
        profiled = session_options()
        profiled.enable_profiling = True
        profiled.profile_file_prefix = str(_folder() / "profile")
        sampler = load(folder, session_options=profiled)
        for _ in range(2):
            sampler(start, num_inference_steps=inputs.problem.num_steps, **kwargs)
        path = Path(sampler.session.end_profiling())
        read = read_onnxruntime(path)
        path.unlink()
        return read

    folder, _ = _build(inputs, export_onnx, **options)

    def parts() -> dict[str, float]:
        of_step = find_step_nodes(open_bundle(folder).model_path)
        known = node_parts(nodes(), of_step)
        if options.get("hoist") is False:
            # What is left before the loop are its sizes.
            del known["hoisted"]
        return with_host(known, seconds_of(work.call, device))

    return replace(work, parts=parts, operations=lambda: node_operations(nodes()))


def _aoti_work(inputs: LoopInputs) -> Work:
    from fastddim.export import AotiSampler, export_aoti

    export = partial(export_aoti, device=inputs.start.device.type)
    return _work(inputs, export, AotiSampler, inputs.start.float(), inputs.kwargs)


def _tensorrt_work(inputs: LoopInputs) -> Work:
    from fastddim.export import TensorRTSampler, export_tensorrt

    return _work(inputs, export_tensorrt, TensorRTSampler, inputs.start.float(), inputs.kwargs)


ORT_LOOP = Candidate("fastddim.export.OrtSampler", _ort_work, "onnxruntime", ort_missing)
AOTI_LOOP = Candidate("fastddim.export.AotiSampler", _aoti_work, "aotinductor", aoti_missing)
UNHOISTED_ORT_LOOP = Candidate(
    "fastddim.export.OrtSampler, hoist=False", partial(_ort_work, hoist=False), "onnxruntime", ort_missing
)
TENSORRT_LOOP = Candidate("fastddim.export.TensorRTSampler", _tensorrt_work, "tensorrt", tensorrt_missing)


def _work(
    inputs: LoopInputs,
    export: Callable[..., Any],
    load: Callable[[Path], Any],
    start: Any,
    kwargs: dict[str, Any],
    **options: Any,
) -> Work:
    """The whole run as one file with these options, on as many threads as torch has."""
    folder, facts = _build(inputs, export, **options)
    sampler, load_s = _timed(lambda: load(folder))
    steps = inputs.problem.num_steps
    device = inputs.start.device.type

    def sample() -> tuple[Any]:
        return (sampler(start, num_inference_steps=steps, **kwargs),)

    return Work(
        sample,
        facts=lambda: {**facts, "load_s": load_s},
        parts=lambda: {"run": seconds_of(sample, device)},
    )


# Bundles by exporter, network and options, with their size and the seconds that they took to build.
_BUILT: dict[tuple[str, str, str], tuple[Path, dict[str, float]]] = {}


def _build(inputs: LoopInputs, export: Callable[..., Any], **chosen: Any) -> tuple[Path, dict[str, float]]:
    key = (getattr(export, "func", export).__name__, inputs.key, repr(chosen))
    if key not in _BUILT:
        import fastddim
        from fastddim.export import ExportOptions

        steps = inputs.problem.num_steps
        options = ExportOptions(num_inference_steps=steps, use_clipped_model_output=False, **chosen)
        folder = _folder() / f"{len(_BUILT)}"
        extra: dict[str, Any] = {}
        if not hasattr(inputs.model, "config"):
            extra["sample_shape"] = inputs.problem.shape[1:]
            # Two rows, as a batch of one would be exported as a constant.
            extra["example_kwargs"] = {
                name: each[:1].repeat_interleave(2, dim=0) for name, each in inputs.kwargs.items()
            }
        config = fastddim.DDIMConfig(**inputs.problem.config)
        _, seconds = _timed(lambda: export(inputs.model, config, folder, options, parity_steps=(), **extra))
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        _BUILT[key] = folder, {"build_s": seconds, "size_bytes": float(size)}
    return _BUILT[key]


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="fastddim-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start
