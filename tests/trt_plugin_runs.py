"""What tests/test_trt_plugin.py does in a process without Triton's interpreter, over TensorRT's own Python bindings.

python trt_plugin_runs.py BUNDLES FOLDER   for every bundle: FOLDER/NAME.json, and for `COMPILED` FOLDER/NAME/TARGET.ptx

The libraries under the bindings are stub_tensorrt.cpp: TensorRT's Python classes take the plugin and call it as the builder
does, with dimensions that are evaluated for several batches.
"""

import ctypes
import json
import sys
import types
from pathlib import Path

import tensorrt as trt
import tensorrt.plugin
from triton.backends.compiler import GPUTarget

from fastddim.export import open_bundle
from fastddim.export.tensorrt.library import Library
from fastddim.export.tensorrt.plugin import _KERNELS, _find_kernel, fuse
from fastddim.kernels import plugin as kernel_plugin
from fastddim.kernels.aot import compile_source

# A grid's second axis holds 65,535 programs.
LARGEST = {"noise": 70_000}
COMPILED = ("noise", "threshold", "bfloat16")
TARGETS = (80, 90, 100, 120)
OPERATIONS = {
    "SUM": lambda a, b: a + b,
    "PROD": lambda a, b: a * b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}  # fmt: skip

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_make_expression = ctypes.CDLL("libnvinfer.so.11").make_expression
_make_expression.restype = ctypes.c_void_p


class Address:
    """Passes as any of the bindings' classes."""

    def __init__(self, address):
        self._address = address

    def _pybind11_conduit_v1_(self, *_):
        return _new_capsule(self._address, None, None)


class Expressions(trt.IExprBuilder):
    """Builds the bindings' own expressions, and knows what they stand for."""

    def __init__(self):
        super().__init__()
        self._kept = []

    def make(self, meaning):
        holder = trt.DimsExprs(1)
        holder[0] = Address(_make_expression())
        self._kept.append((holder[0], meaning))
        return holder[0]

    def constant(self, value):
        return self.make(lambda batch: value)

    def operation(self, operation, first, second):
        combine = OPERATIONS[operation.name]
        return self.make(lambda batch: combine(self.value(first, batch), self.value(second, batch)))

    def value(self, expression, batch):
        (meaning,) = (meaning for kept, meaning in self._kept if kept is expression)
        return meaning(batch)


class Scalar(tensorrt.plugin._tensor.SymExprImpl):
    """The bindings' symbolic scalar, whose properties can be set, but not read."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        self.__dict__[f"set_{name}"] = value


class Registry:
    """The plugins of this process."""

    def __init__(self):
        self._creators = {}

    def register_creator(self, creator, namespace):
        self._creators[creator.name, creator.plugin_version, creator.plugin_namespace] = creator

    def get_creator(self, name, version, namespace):
        return self._creators[name, version, namespace]


class Scalars(dict):
    """What the bindings fill with a kernel's integers."""

    nbSymExprs = None


def describe(dtype, dims):
    """A tensor whose batch is not known."""
    tensor = trt.DynamicPluginTensorDesc()
    tensor.desc.dims, tensor.min, tensor.opt, tensor.max = dims, *([abs(dim) for dim in dims] for _ in range(3))
    tensor.desc.type, tensor.desc.format = dtype, trt.TensorFormat.LINEAR
    return tensor


def drive(registry, bundle, capability):
    """Create a bundle's plugin as the ONNX parser does, and ask it for all that the builder asks."""
    largest = LARGEST.get(bundle.path.name, 9)
    ranges = [{"batch": (1, 4, 5)}, {"batch": (6, 6, largest)}]
    graph, identity = fuse(Library("standard", trt), bundle, ranges, capability)
    node = graph.graph.node[-1]
    told = {attribute.name: attribute.s.decode() for attribute in node.attribute}
    name, namespace = node.op_type, told["plugin_namespace"]
    creator = registry.get_creator(name, told["plugin_version"], namespace)
    # The parser takes the attributes that a creator names.
    fields = [trt.PluginField(field.name, told[field.name].encode(), field.type) for field in creator.field_names]
    plugin = creator.create_plugin(
        name, namespace, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.PREFER_AOT,
    )  # fmt: skip

    sample, sampling = tuple(bundle.manifest["sample"]["shape"]), bundle.manifest["sampling"]
    dtypes = {"float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16}
    inputs = []
    for k, tensor in enumerate(node.input):
        dims = {"coefficients": (6,), "guidance_scale": (), "guidance_rescale": ()}.get(tensor, sample)
        rows = 2 if k == 0 and sampling["guided"] else 1
        inputs.append((dtypes[sampling["dtype"]] if k == 0 else trt.float32, rows, dims))
    kinds = [kind for kind, _, _ in inputs]
    results = plugin.get_output_data_types(kinds, [1 + len(dims) for _, _, dims in inputs])

    build = Expressions()
    shapes = []
    for _, rows, dims in inputs:
        shape = trt.DimsExprs(1 + len(dims))
        shape[0] = build.make(lambda batch, rows=rows: rows * batch)
        for index, dim in enumerate(dims):
            shape[1 + index] = build.constant(dim)
        shapes.append(shape)
    outputs = plugin.get_output_shapes(shapes, [], build)

    in_out = [describe(kind, (-1, *dims)) for kind, _, dims in inputs]
    in_out += [describe(kind, (-1, *sample)) for kind in results]
    combinations = plugin.get_supported_format_combinations(in_out, len(inputs))
    plugin.set_tactic(0)
    launch, scalars = types.SimpleNamespace(), Scalars()
    plugin.get_launch_params(shapes, in_out, len(inputs), launch, scalars, build)
    descriptions = [tensor.desc for tensor in in_out]
    entry, ptx = plugin.get_kernel(descriptions[: len(inputs)], descriptions[len(inputs) :])
    assert scalars.nbSymExprs == len(scalars)

    def at(batch):
        return {
            "batch": batch,
            "grid": [build.value(getattr(launch, f"grid_{axis}").set_expr, batch) for axis in "xyz"],
            "block": [build.value(getattr(launch, f"block_{axis}").set_expr, batch) for axis in "xyz"],
            "shared": build.value(launch.shared_mem.set_expr, batch),
            "scalars": [build.value(scalars[index].set_expr, batch) for index in range(len(scalars))],
            "outputs": [[build.value(dim, batch) for dim in shape] for shape in outputs],
        }

    return {
        "type": type(plugin).__name__,
        "operator": name,
        "inputs": list(node.input),
        "outputs": [kind.name for kind in results],
        "supported": [[each.type.name, each.format.name] for each in combinations],
        "scalar_types": sorted({scalars[index].set_dtype.name for index in range(len(scalars))}),
        "launches": [at(batch) for batch in (1, 4, largest)],
        "entry": entry,
        "ptx": ptx.decode(),
        "ranges": ranges,
        "constants": _find_kernel(told["kernel"]).step.constants,
        "identity": identity,
    }


def compile_targets(folder, kernel):
    """The PTX for every target, as TensorRT gets it and as Triton made it."""
    for target in TARGETS:
        compiled = kernel_plugin.compile_plugin_step(kernel.step, kernel.model_dtype, target)
        (folder / f"sm_{target}.ptx").write_text(compiled.ptx)
        source = kernel_plugin._source(kernel.step, kernel.model_dtype)
        version = int(compiled.ptx.partition(".version ")[2][:3].replace(".", ""))
        raw = compile_source(source, kernel.step.num_warps, GPUTarget("cuda", target, 32), ptx_version=version)
        (folder / f"sm_{target}.raw.ptx").write_text(raw.asm["ptx"])


def main(bundles, out):
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    tensorrt.plugin._tensor.SymExprImpl = Scalar
    for path in sorted(bundles.iterdir()):
        driven = drive(registry, open_bundle(path), "9.0")
        (out / f"{path.name}.json").write_text(json.dumps(driven))
        if path.name in COMPILED:
            (out / path.name).mkdir()
            compile_targets(out / path.name, _KERNELS[driven["identity"]["sha256"]])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
