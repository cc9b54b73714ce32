"""The fused step inside an engine: the Triton kernel as an ahead-of-time plugin, in place of the graph's operations."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, helper

from fastddim.export.bundle import Bundle, read_limit
from fastddim.export.onnx.graph import find_model_output, with_fused_step
from fastddim.export.tensorrt.library import PLUGIN_FLAG, Library
from fastddim.export.tensorrt.options import Range
from fastddim.tracing import ExportError

if TYPE_CHECKING:
    from fastddim.kernels.plugin import PluginKernel, PluginStep

NAMESPACE = "fastddim"
_OPERATOR = "ddim_step"
_TRITON_DTYPES = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
_DATA_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
# The compiled steps that nodes name: all that a plugin's attribute holds is the key.
_KERNELS: dict[str, PluginKernel] = {}


def require_plugins(library: Library) -> None:
    """Check that the fused step can be compiled here, and that TensorRT takes it.

    Raises:
        ValueError: what is in the way, and the fix.
        ImportError: no triton.
    """
    trt = library.module
    if library.flavour == "rtx":
        raise ValueError("fused_step: True with flavour 'rtx', which has no such plugins; pass flavour='standard'")
    if not hasattr(trt.NetworkDefinitionCreationFlag, PLUGIN_FLAG):
        raise ValueError(
            f"fused_step: True, but {library.name} has no ahead-of-time plugins; install TensorRT 10.8 or later"
        )
    try:
        import triton
    except ImportError as error:
        raise ImportError(f"fused_step: True needs triton ({error}); pip install triton") from error
    if triton.knobs.runtime.interpret:
        raise ValueError("fused_step: True with TRITON_INTERPRET set, so that Triton compiles nothing; unset it")


def require_fusible(manifest: Mapping[str, Any]) -> None:
    """Check that a bundle has a graph of one step, of one size, that one launch computes.

    Raises:
        ValueError: what is in the way, and the fix.
    """
    from fastddim.kernels.plan import WHOLE_SAMPLE

    if manifest["kind"] != "step":
        raise ValueError(
            f"fused_step: True for a bundle of kind {manifest['kind']!r}; export it with kind='step', or leave it out"
        )
    if any(item["name"] == "previous_x0" for item in manifest["inputs"]):
        raise ValueError("fused_step: True for a method that looks back at the previous x0; leave fused_step out")
    (sample,) = (item for item in manifest["inputs"] if item["name"] == "sample")
    if any(isinstance(dim, str) for dim in sample["shape"][1:]):
        raise ValueError(
            "fused_step: True for a bundle with dynamic_size, but the kernel is for one size; export it without, or leave"
            " fused_step out"
        )
    if _plan(manifest, 1, 1) is None:
        raise ValueError(
            f"fused_step: True for samples of {math.prod(manifest['sample']['shape'])} elements with dynamic thresholding,"
            f" guidance_rescale or guidance_method 'apg', which beyond {WHOLE_SAMPLE} are several launches; leave fused_step"
            " out"
        )


def fuse(
    library: Library, bundle: Bundle, ranges: Sequence[Mapping[str, Range]], capability: str
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Compile a bundle's step, register it with TensorRT and put it in its operations' place.

    Args:
        bundle: an ONNX bundle, which `require_fusible` has checked.
        ranges: the dimensions' ranges, for each profile; the kernel's blocks are those for the first one's usual batch.
        capability: the GPU's compute capability, such as `"9.0"`.

    Returns:
        The graph, and for the engine's manifest what tells the kernel from others.

    Raises:
        ExportError: a graph that is no step's, or a kernel that Triton does not compile.
    """
    import triton

    from fastddim.kernels.plugin import OUTPUTS, compile_plugin_step

    manifest = bundle.manifest
    model = onnx.load(bundle.model_path, load_external_data=False)
    step = _plan(manifest, ranges[0]["batch"][1], max(each["batch"][2] for each in ranges))
    assert step is not None
    output, dtype = _model_output(model, step.inputs, manifest["sample"]["shape"])
    try:
        kernel = compile_plugin_step(step, dtype, round(10 * float(capability)))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[-1]
        raise ExportError(
            f"fused_step: the step does not compile for {capability}: {type(error).__name__}: {reason}"
        ) from error
    key = hashlib.sha256(repr(kernel).encode()).hexdigest()
    _KERNELS[key] = kernel
    # A plugin has a fixed number of inputs.
    operator = "_".join([_OPERATOR, *step.inputs[3:]])
    _register(library.module, operator, step.inputs)
    node = helper.make_node(
        operator,
        [output, *step.inputs[1:]],
        OUTPUTS,
        name=_OPERATOR,
        domain=NAMESPACE,
        plugin_namespace=NAMESPACE,
        plugin_version="1",
        kernel=key,
    )
    identity = {"target": kernel.target, "sha256": key, "triton": triton.__version__}
    return with_fused_step(model, node), identity


def _plan(manifest: Mapping[str, Any], batch: int, largest_batch: int) -> PluginStep | None:
    import torch

    from fastddim.kernels.plugin import plan_plugin_step
    from fastddim.step import Guidance, StepOptions

    sampling = manifest["sampling"]
    each = torch.empty(batch, device="meta")
    guidance = Guidance(
        each,
        each if sampling["guidance_rescale"] else 0.0,
        method=sampling.get("guidance_method", "cfg"),
        apg_eta=sampling.get("apg_eta", 0.0),
        apg_norm_threshold=sampling.get("apg_norm_threshold", 0.0),
    )
    options = StepOptions(
        guidance=guidance if sampling["guided"] else None,
        limit=read_limit(manifest),
        noise=each if sampling["stochastic"] else None,
    )
    return plan_plugin_step(batch, math.prod(manifest["sample"]["shape"]), options, largest_batch)


def _model_output(model: onnx.ModelProto, inputs: Sequence[str], sample_shape: Sequence[int]) -> tuple[str, str]:
    """The tensor of the model's output, and its dtype as Triton names it."""
    name = find_model_output(model.graph, inputs[1:])
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.input)}
    kind = kinds.get(name or "")
    dims = [] if kind is None else [dim.dim_value for dim in kind.shape.dim]
    fits = len(dims) == 1 + len(sample_shape) and all(
        dim in (0, size) for dim, size in zip(dims[1:], sample_shape, strict=True)
    )
    if name is None or kind is None or kind.elem_type not in _TRITON_DTYPES or not fits:
        raise ExportError(
            "fused_step: True, but the model's output cannot be told from the step in this graph; leave fused_step out"
        )
    return name, _TRITON_DTYPES[kind.elem_type]


def _register(trt: Any, operator: str, inputs: Sequence[str]) -> None:
    """Register the plugin of these inputs, which TensorRT takes once a process."""
    plugin = importlib.import_module(f"{trt.__name__}.plugin")
    if hasattr(getattr(plugin.op, NAMESPACE, None), operator):
        return
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    arguments = [inspect.Parameter(name, kind, annotation=plugin.TensorDesc) for name in inputs]
    arguments.append(inspect.Parameter("kernel", kind, annotation=str))

    def describe(*tensors: Any, kernel: str) -> tuple[Any, Any]:
        compiled = _find_kernel(kernel)
        dtypes = [compiled.model_dtype, *["fp32"] * (len(inputs) - 1)]
        for name, tensor, dtype in zip(inputs, tensors, dtypes, strict=True):
            expected = getattr(trt.DataType, _DATA_TYPES[dtype])
            if tensor.dtype != expected:
                raise TypeError(f"{name}: {tensor.dtype}; the step was compiled for {expected}")
        return tensors[1].like(), tensors[1].like()

    def launch(*arguments: Any) -> tuple[str, str, Any, Any]:
        compiled = _find_kernel(arguments[len(inputs)])
        batch = arguments[1].shape_expr[0]
        grid = compiled.step.grid(batch)
        parameters = plugin.KernelLaunchParams(
            grid_x=grid[0], grid_y=grid[1], block_x=compiled.threads, shared_mem=compiled.shared_bytes
        )
        numbers = plugin.SymIntExprs(2)
        numbers[0], numbers[1] = plugin.SymInt32(compiled.step.elements), batch
        return compiled.entry, compiled.ptx, parameters, numbers

    # TensorRT reads a plugin's inputs and attributes from signatures.
    tensors = tuple[plugin.TensorDesc, plugin.TensorDesc]  # type: ignore[name-defined]
    describe.__signature__ = inspect.Signature(arguments, return_annotation=tensors)  # type: ignore[attr-defined]
    extra = [inspect.Parameter("outputs", kind, annotation=tensors), inspect.Parameter("tactic", kind, annotation=int)]
    results = tuple[str, str, plugin.KernelLaunchParams, plugin.SymExprs]  # type: ignore[name-defined]
    launch.__signature__ = inspect.Signature([*arguments, *extra], return_annotation=results)  # type: ignore[attr-defined]
    name = f"{NAMESPACE}::{operator}"
    plugin.register(name)(describe)
    plugin.aot_impl(name)(launch)


def _find_kernel(key: str) -> PluginKernel:
    # As a C string it may end in a zero.
    return _KERNELS[key.rstrip("\0")]
