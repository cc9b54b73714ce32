"""A stand-in for TensorRT's Python API: what is called is kept, and an engine runs its ONNX graph on the CPU, on the memory
at the addresses that it is given."""

import ctypes
import enum
import inspect
import types

import numpy as np
import onnxruntime

VERSION = "10.14.1.48"


def engine_bytes(version=VERSION, magic=b"ftrt", graph=""):
    """An engine as far as its header goes, and the path of the graph that it stands for."""
    numbers = bytes(int(part) % 256 for part in version.split(".")[:4])
    return magic + bytes(20) + numbers + bytes(36) + graph.encode()


def make_module(version=VERSION, plugins=False):
    """A module to put into `sys.modules`. `calls` has what was called, `refuse` names calls that are to fail, and
    `messages` are logged by each run.

    Args:
        plugins: it has those that are compiled ahead of time, in `module.plugin`, a module too.
    """
    module = types.ModuleType("tensorrt")
    module.__version__ = version
    module.calls, module.refuse, module.messages = [], set(), []

    def told(name, *arguments):
        module.calls.append((name, *arguments))
        return name not in module.refuse

    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        pass

    ILogger.Severity = Severity

    class Network:
        def __init__(self, flags):
            told("create_network", flags)

        @property
        def num_inputs(self):
            return len(self.session.get_inputs())

        def get_input(self, index):
            value = self.session.get_inputs()[index]
            return types.SimpleNamespace(name=value.name, is_shape_tensor=value.name == "num_inference_steps")

    class OnnxParser:
        def __init__(self, network, logger):
            self._network = network

        def parse_from_file(self, path):
            self._network.graph, self._network.session = path, onnxruntime.InferenceSession(path)
            return True

        def parse(self, model, path):
            told("parse", model, path)
            # Whatever the plugins are: the engine runs the file.
            return self.parse_from_file(path)

    class Profile:
        def set_shape(self, name, *sizes):
            told("set_shape", name, *sizes)

        def set_shape_input(self, name, *values):
            told("set_shape_input", name, *values)

    class TimingCache:
        def __init__(self, content):
            self.content = content

        def serialize(self):
            return b"timings of " + version.encode()

    class IBuilderConfig:
        builder_optimization_level = 3
        hardware_compatibility_level = progress_monitor = None

        def set_flag(self, flag):
            told("set_flag", flag.name)

        def clear_flag(self, flag):
            told("clear_flag", flag.name)

        def set_memory_pool_limit(self, pool, size):
            told("set_memory_pool_limit", pool.name, size)

        def create_timing_cache(self, content):
            return None if content and not content.startswith(b"timings") else TimingCache(content)

        def set_timing_cache(self, cache, ignore_mismatch):
            return told("set_timing_cache", cache.content) and (not cache.content or version.encode() in cache.content)

        def add_optimization_profile(self, profile):
            told("add_optimization_profile")

    class Builder:
        def __init__(self, logger):
            self._logger = logger

        def create_network(self, flags):
            return Network(flags)

        def create_builder_config(self):
            return IBuilderConfig()

        def create_optimization_profile(self):
            return Profile()

        def build_serialized_network(self, network, config):
            told("build", config.builder_optimization_level, config.hardware_compatibility_level)
            monitor = config.progress_monitor
            if monitor is not None:
                monitor.phase_start("Building engine", None, 2)
                monitor.phase_start("Timing", "Building engine", 3)
                for step in range(3):
                    if not monitor.step_complete("Timing", step):
                        return None
                monitor.phase_finish("Timing")
                monitor.phase_finish("Building engine")
            if "build" in module.refuse:
                self._logger.log(Severity.VERBOSE, "a detail")
                self._logger.log(Severity.ERROR, "no tactic fits")
                return None
            return memoryview(engine_bytes(version, graph=network.graph))

    class Context:
        def __init__(self, engine):
            self.engine, self.shapes, self.addresses = engine, {}, {}

        def set_optimization_profile_async(self, index, stream):
            return told("set_optimization_profile_async", index, stream)

        def set_input_shape(self, name, shape):
            self.shapes[name] = shape
            return told("set_input_shape", name, shape)

        def set_tensor_address(self, name, address):
            self.addresses[name] = address
            return told("set_tensor_address", name, address)

        def infer_shapes(self):
            told("infer_shapes")
            return [value.name for value in self.engine.session.get_inputs() if value.name not in self.shapes]

        def get_tensor_shape(self, name):
            return self.shapes["sample"]

        def execute_async_v3(self, stream):
            for message in module.messages:
                self.engine.logger.log(*message)
            if not told("execute_async_v3", stream):
                return False
            dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
            session = self.engine.session
            inputs = {
                value.name: memory(self.addresses[value.name], self.shapes[value.name], dtypes[value.type]).copy()
                for value in session.get_inputs()
            }
            for value, result in zip(session.get_outputs(), session.run(None, inputs), strict=True):
                memory(self.addresses[value.name], result.shape, np.float32)[...] = result
            return True

    class Engine:
        weight_streaming_budget_v2 = None

        def __init__(self, graph, logger):
            self.session, self.logger = onnxruntime.InferenceSession(graph), logger

        def create_execution_context(self):
            return Context(self) if told("create_execution_context") else None

        def create_engine_inspector(self):
            return types.SimpleNamespace(get_engine_information=lambda form: f'{{"Layers": [], "form": "{form.name}"}}')

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger):
            self._logger = logger

        def deserialize_cuda_engine(self, content):
            if not told("deserialize_cuda_engine", self.engine_host_code_allowed):
                self._logger.log(Severity.ERROR, "cudaError 35")
                return None
            return Engine(content[64:].decode(), self._logger)

    class Refitter:
        def __init__(self, engine, logger):
            pass

        def refit_cuda_engine(self):
            return told("refit_cuda_engine")

    class OnnxParserRefitter:
        def __init__(self, refitter, logger):
            pass

        def refit_from_file(self, path):
            return told("refit_from_file", path)

    for kind in (ILogger, IBuilderConfig, Builder, OnnxParser, Runtime, Refitter, OnnxParserRefitter):
        setattr(module, kind.__name__, kind)
    module.IProgressMonitor = type("IProgressMonitor", (), {})
    module.BuilderFlag = enum.Enum("BuilderFlag", "REFIT STRIP_PLAN VERSION_COMPATIBLE WEIGHT_STREAMING TF32")
    module.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
    if plugins:
        flags = {"STRONGLY_TYPED": 1, "PREFER_AOT_PYTHON_PLUGINS": 3}
        module.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", flags)
        module.plugin = make_plugin_module(told)
    module.MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
    module.HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS")
    module.LayerInformationFormat = enum.Enum("LayerInformationFormat", "JSON")
    return module


def make_plugin_module(told):
    """`tensorrt.plugin` as far as a plugin is registered with it."""
    plugin = types.ModuleType("tensorrt.plugin")
    plugin.op = types.SimpleNamespace()
    for name in ("TensorDesc", "KernelLaunchParams", "SymExprs"):
        setattr(plugin, name, type(name, (), {}))

    def register(name):
        namespace, operator = name.split("::")
        members = plugin.op.__dict__.setdefault(namespace, types.SimpleNamespace())
        assert not hasattr(members, operator), "TensorRT takes a plugin once"
        setattr(members, operator, None)
        return lambda function: told("register", name, list(inspect.signature(function).parameters))

    plugin.register = register
    plugin.aot_impl = lambda name: lambda function: told("aot_impl", name, list(inspect.signature(function).parameters))
    return plugin


def memory(address, shape, dtype):
    """The array at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape)
