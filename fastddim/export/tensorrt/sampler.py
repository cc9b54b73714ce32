"""Running a bundle's TensorRT engine on a GPU. Tensors in, tensors out, without a copy of the states."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddim.cuda_graph import CaptureError, Graph, GraphCache, MemoryPool
from fastddim.export.bundle import Bundle, BundleError, open_bundle, require_runtime
from fastddim.export.bundle_sampler import BundleSampler, PreparedCall
from fastddim.export.machine import compute_capability
from fastddim.export.tensorrt.library import first_error, load_library, require_capability, require_loadable
from fastddim.export.torch_arrays import TorchArrays, as_tensor
from fastddim.files import check_writable, write_whole

logger = logging.getLogger(__name__)

# What TensorRT asks of addresses.
_ALIGNMENT = 256
# The inputs of a step that are outputs of the one before it.
_FED_BACK = {"sample": "next_sample", "previous_x0": "pred_original_sample"}


class TensorRTSampler(BundleSampler):
    """Samples from a TensorRT bundle: the same seeds give the same samples as `fastddim.Sampler`, to the engine's rounding.

    Arrays are torch tensors on any device, or numpy's; the results are tensors on the GPU. The work goes to torch's current
    stream, and nothing waits for its result. Calls from several threads take turns.

    Args:
        bundle: a folder that `export_tensorrt` wrote, or an opened bundle.
        device: where it runs, e.g. `"cuda:1"`; the current GPU by default.
        cuda_graph: capture the engine for each combination of sizes and replay it; inputs are then copied. The last eight
            are kept, each with the engine's scratch memory.
        weights: the ONNX bundle to take the weights from, of an engine built with `strip_plan` or `refit`.
        weight_streaming_budget: bytes of weights to keep on the GPU, of an engine built with `weight_streaming`.
        runtime_cache: rtx: a file of compiled kernels, read where it exists; `save_runtime_cache` writes it.
        check_finite: look for NaN and infinities in the result, and find the step at which they appeared.

    Attributes:
        bundle: the opened bundle.
        engine: TensorRT's.

    Raises:
        ImportError: TensorRT is not there.
        BundleError: a bundle that is damaged, of another runtime, version or flavour, or for another GPU than this one.
        ValueError: no GPU, or an option that the engine was not built for.
    """

    runtime = "tensorrt"

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        device: str | torch.device | None = None,
        cuda_graph: bool = False,
        weights: str | Path | Bundle | None = None,
        weight_streaming_budget: int | None = None,
        runtime_cache: str | Path | None = None,
        check_finite: bool = False,
    ) -> None:
        super().__init__(bundle, check_finite)
        described = self.bundle.manifest["engine"]
        options = described["options"]
        self._library = load_library(described["flavour"])
        require_loadable(self.bundle, self.bundle.model_path, self._library)
        if weights is None and options["strip_plan"]:
            raise ValueError("weights: None, but this engine was built without them; pass the ONNX bundle it is from")
        if weights is not None and not (options["strip_plan"] or options["refit"]):
            raise ValueError("weights: given, but this engine cannot take others; build it with refit")
        if weight_streaming_budget is not None and not options["weight_streaming"]:
            raise ValueError("weight_streaming_budget: given, but this engine was built without weight_streaming")
        if runtime_cache is not None:
            if not hasattr(self._library.module, "IRuntimeCache"):
                raise ValueError(f"runtime_cache: {self._library.name} has none; leave it out")
            check_writable(runtime_cache, "runtime_cache")
        self._device = _pick_device(device)
        self._arrays = TorchArrays(self._device)
        require_capability(self.bundle, compute_capability(self._device))
        self._profiles: list[dict[str, list[int]]] = described["profiles"]
        self._outputs = {item["name"]: getattr(torch, item["dtype"]) for item in self.bundle.manifest["outputs"]}
        self._runtime_cache = None if runtime_cache is None else Path(runtime_cache)
        self._log: list[str] = []
        self._logger = self._library.logger(_keep_in(self._log, self._library.name))
        with _current(self._device):
            self._load(options["version_compatible"])
            if weights is not None:
                self._refit(weights)
            if weight_streaming_budget is not None:
                self.engine.weight_streaming_budget_v2 = weight_streaming_budget
            self._config = self._runtime_config()
        self._contexts: GraphCache[_Context | _Replayed] = GraphCache()
        self._cuda_graph = cuda_graph
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def device(self) -> str:
        """TensorRT, with its version."""
        return self._library.name

    def inspect(self) -> str:
        """The engine's layers as TensorRT describes them, in JSON."""
        inspector = self.engine.create_engine_inspector()
        text: str = inspector.get_engine_information(self._library.module.LayerInformationFormat.JSON)
        return text

    def save_runtime_cache(self) -> None:
        """Write the kernels that were compiled so far to the file `runtime_cache`.

        Raises:
            ValueError: there is no such file; OSError: it could not be written.
        """
        if self._runtime_cache is None:
            raise ValueError("runtime_cache: None; pass a file when the sampler is made")
        content = bytes(memoryview(self._config.get_runtime_cache().serialize()))
        write_whole(self._runtime_cache, lambda file: file.write(content), "runtime_cache")

    def _load(self, version_compatible: bool) -> None:
        self._runtime = self._library.module.Runtime(self._logger)
        # The engine brings the runtime of its own version with it.
        self._runtime.engine_host_code_allowed = version_compatible
        self.engine = self._runtime.deserialize_cuda_engine(self.bundle.model_path.read_bytes())
        if self.engine is None:
            raise BundleError(
                f"bundle: {str(self.bundle.model_path)!r} does not load with {self._library.name}:"
                f" {first_error(self._log)}"
            )

    def _refit(self, weights: str | Path | Bundle) -> None:
        source = weights if isinstance(weights, Bundle) else open_bundle(weights)
        require_runtime(source, "onnx")
        described = self.bundle.manifest["engine"]
        hashes = {name: source.manifest["files"].get(name, {}).get("sha256") for name in described["source"]}
        if described["options"]["strip_plan"] and hashes != described["source"]:
            raise BundleError(f"weights: {str(source.path)!r} is not the bundle that the engine was built from")
        trt = self._library.module
        refitter = trt.Refitter(self.engine, self._logger)
        parser = trt.OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_file(str(source.model_path)) or not refitter.refit_cuda_engine():
            raise BundleError(f"weights: {str(source.model_path)!r} does not fit the engine: {first_error(self._log)}")

    def _runtime_config(self) -> Any:
        if self._runtime_cache is None:
            return None
        config = self.engine.create_runtime_config()
        cache = config.create_runtime_cache()
        if self._runtime_cache.exists():
            cache.deserialize(self._runtime_cache.read_bytes())
        config.set_runtime_cache(cache)
        return config

    def _make_context(self, profile: int) -> Any:
        given = () if self._config is None else (self._config,)
        context = self.engine.create_execution_context(*given)
        if context is None or not context.set_optimization_profile_async(profile, _stream_handle(self._device)):
            raise self._failed("has no context")
        return context

    def _failed(self, what: str) -> RuntimeError:
        return RuntimeError(f"{self._library.name} {what}: {first_error(self._log)}")

    def _pick_profile(self, inputs: Mapping[str, Any]) -> int:
        """The first profile with a call's sizes."""
        sizes: dict[str, int] = {}
        for name, item in self._inputs.items():
            sizes |= {
                dim: size for dim, size in zip(item["shape"], inputs[name].shape, strict=True) if isinstance(dim, str)
            }
        if "num_inference_steps" in inputs:
            sizes["steps"] = int(inputs["num_inference_steps"])
        fitting = [
            index
            for index, ranges in enumerate(self._profiles)
            if all(ranges[dim][0] <= size <= ranges[dim][2] for dim, size in sizes.items())
        ]
        if fitting:
            return fitting[0]
        for dim, size in sizes.items():
            taken = [f"{ranges[dim][0]} to {ranges[dim][2]}" for ranges in self._profiles]
            if all(not ranges[dim][0] <= size <= ranges[dim][2] for ranges in self._profiles):
                raise ValueError(
                    f"{dim}: {size}; this engine takes {', or '.join(taken)}; build one with such a profile"
                )
        raise ValueError(f"{sizes}: none of this engine's profiles has all these sizes; build one with such a profile")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The engine's turn on the current stream, or on its own where that is the default one, which TensorRT waits for."""
        if self._stream is None:
            with self._contexts.turn(self._device):
                yield
            return
        with torch.cuda.device(self._device):
            caller = torch.cuda.current_stream()
            stream = self._stream if caller == torch.cuda.default_stream() else caller
            stream.wait_stream(caller)
            with torch.cuda.stream(stream), self._contexts.turn(self._device):
                yield
            caller.wait_stream(stream)

    def _start(self, inputs: Mapping[str, Any]) -> _Execution:
        """An execution with a call's inputs in place."""
        # Errors of earlier calls are not this one's.
        self._log.clear()
        profile = self._pick_profile(inputs)
        if self._cuda_graph:
            try:
                replayed = self._contexts.get(
                    _capture_key(inputs),
                    lambda: _Replayed(self, self._make_context(profile), inputs, self._contexts.pool(self._device)),
                )
            except CaptureError as error:
                logger.warning("the engine is run without a CUDA graph: %s", error)
                self._cuda_graph = False
            else:
                assert isinstance(replayed, _Replayed)
                replayed.load(inputs)
                return replayed
        kept = self._contexts.get(profile, lambda: _Context(self._make_context(profile)))
        assert isinstance(kept, _Context)
        return _Execution(self, kept.context, inputs)

    def _sample_loop(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        with self._turn():
            # A number of steps stays on the host, where TensorRT reads it.
            execution = self._start({name: as_tensor(value) for name, value in inputs.items()})
            execution.run()
            return {name: self._kept(execution.result(name)) for name in ("samples", *self._made)}

    def _run_steps(self, call: PreparedCall) -> dict[str, Any]:
        sample, table, seeds, feeds = call.sample, call.table, call.seeds, call.feeds
        batch = sample.shape[0]
        with self._turn():
            timesteps = torch.tensor(table.timesteps, dtype=getattr(torch, table.timestep_dtype), device=self._device)
            rows = torch.from_numpy(table.columns.astype(np.float32)).to(self._device)
            given = {
                "sample": sample,
                "timestep": timesteps[:1].repeat(batch),
                "coefficients": rows[:1].repeat(batch, 1),
            }
            for name in ("noise", "previous_x0"):
                if name in self._inputs:
                    given[name] = torch.zeros_like(sample)
            execution = self._start({**given, **feeds})
            result = self.last_output
            for step in range(len(table)):
                if step:
                    execution.feed_back()
                execution.inputs["timestep"].copy_(timesteps[step].expand(batch))
                execution.inputs["coefficients"].copy_(rows[step].expand(batch, -1))
                if seeds is not None:
                    execution.inputs["noise"].copy_(self._arrays.normal(seeds, step, sample.shape[1:]))
                execution.run()
                if call.is_late():
                    result = "pred_original_sample"
                    break
            made = {name: self._kept(execution.result(name)) for name in self._made}
            return {"samples": self._kept(execution.result(result)), **made}

    def _kept(self, result: torch.Tensor) -> torch.Tensor:
        """A result that the caller's stream may go on with."""
        if self._stream is not None:
            result.record_stream(torch.cuda.default_stream(self._device))
        return result


class _Context:
    """A context without buffers, which takes the tensors of each call as they are."""

    nbytes = 0

    def __init__(self, context: Any) -> None:
        self.context = context


class _Execution:
    """A context with the shapes and addresses of a call's tensors, and new tensors for what it writes.

    Attributes:
        inputs: by name.
    """

    def __init__(self, sampler: TensorRTSampler, context: Any, inputs: Mapping[str, torch.Tensor]) -> None:
        self._sampler, self._context = sampler, context
        self.inputs: dict[str, torch.Tensor] = {}
        self._spare: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        for name, tensor in inputs.items():
            # A view's address may be anywhere; a new tensor's is not.
            self.inputs[name] = tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise sampler._failed(f"refuses {name} of shape {tuple(tensor.shape)}")
            self._place(name, self.inputs[name])
        missing = context.infer_shapes()
        if missing:
            raise sampler._failed(f"has no value for {', '.join(missing)}")
        for name, dtype in sampler._outputs.items():
            shape = tuple(context.get_tensor_shape(name))
            self._outputs[name] = torch.empty(shape, dtype=dtype, device=sampler._device)
            self._place(name, self._outputs[name])

    def _place(self, name: str, tensor: torch.Tensor) -> None:
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise self._sampler._failed(f"refuses the address of {name}")

    def run(self) -> None:
        """Put the work on the current stream."""
        if not self._context.execute_async_v3(_stream_handle(self._sampler._device)):
            raise self._sampler._failed("does not run the engine")

    def feed_back(self) -> None:
        """Let the next run start from the states that the last one wrote."""
        for name, result in _FED_BACK.items():
            if name not in self.inputs:
                continue
            written = self._outputs[result]
            # The first state is the caller's, which is not written over.
            spare = self._spare[name] if name in self._spare else torch.empty_like(written)
            self.inputs[name] = self._spare[name] = written
            self._outputs[result] = spare
            self._place(name, written)
            self._place(result, spare)

    def result(self, name: str) -> torch.Tensor:
        """What the last run wrote."""
        return self._outputs[name]


class _Replayed(_Execution):
    """An execution over tensors of its own, captured."""

    def __init__(
        self, sampler: TensorRTSampler, context: Any, inputs: Mapping[str, torch.Tensor], pool: MemoryPool | None
    ) -> None:
        super().__init__(sampler, context, {name: tensor.clone() for name, tensor in inputs.items()})
        self._graph = Graph(super().run, sampler._device, pool)
        self.nbytes = self._graph.nbytes + sum(t.nbytes for t in (*self.inputs.values(), *self._outputs.values()))

    def load(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Copy a call's inputs to where the capture reads them."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)

    def run(self) -> None:
        self._graph.replay()

    def feed_back(self) -> None:
        for name, result in _FED_BACK.items():
            if name in self.inputs:
                self.inputs[name].copy_(self._outputs[result])

    def result(self, name: str) -> torch.Tensor:
        return self._outputs[name].clone()


def _capture_key(inputs: Mapping[str, torch.Tensor]) -> Hashable:
    """The sizes of a call; a number of steps that is read on the host is captured too."""
    host = inputs.get("num_inference_steps")
    return (*((name, value.shape) for name, value in sorted(inputs.items())), None if host is None else int(host))


def _pick_device(device: str | torch.device | None) -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError(f"device: TensorRT needs an NVIDIA GPU, and torch {torch.__version__} finds none here")
    place = torch.device("cuda" if device is None else device)
    if place.type != "cuda":
        raise ValueError(f"device: '{place}', but TensorRT runs on CUDA devices alone")
    return torch.device("cuda", torch.cuda.current_device()) if place.index is None else place


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """The device as the current one, on which TensorRT puts what it loads."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _keep_in(lines: list[str], name: str) -> Callable[[str], None]:
    """What keeps TensorRT's messages for errors, and logs its warnings."""

    def keep(line: str) -> None:
        if line.startswith("WARNING"):
            logger.warning("%s: %s", name, line)
        lines.append(line)

    return keep


def _stream_handle(device: torch.device) -> int:
    """The current stream's handle; 0 without CUDA."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
