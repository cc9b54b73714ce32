"""The TensorRT exporter: the graphs of an ONNX bundle, built into engines."""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddim.export.bundle import (
    Bundle,
    BundleError,
    check_destination,
    open_bundle,
    require_runtime,
    write_bundle,
)
from fastddim.export.manifest import NOTE_FILE, note
from fastddim.export.tensorrt.library import PLUGIN_FLAG, Library, current_platform, first_error, load_library
from fastddim.export.tensorrt.options import Range, TensorRTOptions
from fastddim.files import check_writable, write_whole
from fastddim.tracing import ExportError

if TYPE_CHECKING:
    import onnx

ENGINE_SUFFIX = ".engine"
LOG_FILE = "build.log"

Progress = Callable[[str, str | None, int, int], None]


def export_tensorrt(
    source: str | Path | Bundle | Callable[[Path], Bundle],
    out: str | Path,
    options: TensorRTOptions | None = None,
    *,
    force: bool = False,
    reuse: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Build a bundle of TensorRT engines, one for each graph of an ONNX bundle.

    The rtx flavour needs no GPU to build. The engines are not run here; the graphs were compared with torch when they
    were exported.

    Args:
        source: the ONNX bundle, or a function that writes one to the folder it is given, such as
            `functools.partial(export_onnx, model, scheduler)`.
        out: the folder to write: `model.engine`, one engine for each component, and `build.log`.
        options: how to build; what they fix.
        force: replace a bundle that is there.
        reuse: keep a TensorRT bundle that is there if the same ONNX bundle, options, version and target made it, and
            build it anew otherwise.
        progress: called with a phase of the build, the phase it is part of, and how many of its steps are done, of how
            many.

    Returns:
        The bundle, opened; its manifest has `engine`.

    Raises:
        ImportError: TensorRT is not there, or with `fused_step` triton.
        ValueError: options that this flavour or version of TensorRT does not have, or that do not fit the bundle.
        ExportError: TensorRT refuses a graph; the message names its nodes.
        BundleError: `source` is damaged, or no ONNX bundle.
        FileExistsError, NotADirectoryError, PermissionError: `out`, before any work.
    """
    options = TensorRTOptions() if options is None else options
    target = check_destination(out, force or reuse)
    library = load_library(options.flavour)
    settings = _settings(library, options)
    if options.timing_cache is not None:
        check_writable(options.timing_cache, "timing_cache")
    if options.fused_step:
        from fastddim.export.tensorrt.plugin import fuse, require_fusible, require_plugins

        require_plugins(library)
    gpu, capabilities = _build_target(library, options)
    kept = _find_kept(target, force) if reuse and target.exists() else None
    with _opened(source) as bundle:
        sampling = bundle.manifest["sampling"]
        if sampling.get("per_sample_steps") or sampling.get("seeded"):
            raise ValueError("per_sample_steps, seeded: TensorRT takes no such graph; export one without")
        if bundle.before is not None:
            raise ValueError(
                f"source: {str(bundle.path)!r} has a second graph, {bundle.before['model']!r}, that engines are not built of;"
                " export it without hoist=True, or with kind='loop'"
            )
        if options.fused_step:
            require_fusible(bundle.manifest)
        ranges = [profile.ranges(bundle.manifest) for profile in options.profiles]
        graphs = {
            name: sha["sha256"] for name, sha in bundle.manifest["files"].items() if name.endswith((".onnx", ".data"))
        }
        engine = {
            "flavour": library.flavour,
            "version": library.version,
            "platform": current_platform(),
            "gpu": gpu,
            "compute_capabilities": capabilities,
            "profiles": [{name: list(sizes) for name, sizes in profile.items()} for profile in ranges],
            "options": options.identity(),
            "source": graphs,
        }
        fused = {}
        if options.fused_step:
            # Code for later capabilities is for one alone.
            capability = "8.0" if options.hardware_compatibility == "ampere_plus" else capabilities[0]
            graph, engine["fused_step"] = fuse(library, bundle, ranges, capability)
            fused[bundle.model_path.name] = graph
        if kept is not None and kept.manifest["engine"] == engine and _carried(kept) == _carried(bundle):
            return kept
        build = _Build(library, settings, ranges, options.timing_cache, progress, fused)
        return write_bundle(target, force or reuse, functools.partial(_fill, bundle, engine, build))


@contextlib.contextmanager
def _opened(source: str | Path | Bundle | Callable[[Path], Bundle]) -> Iterator[Bundle]:
    if callable(source):
        with tempfile.TemporaryDirectory(prefix="fastddim-onnx-") as folder:
            yield source(Path(folder) / "bundle")
        return
    bundle = source if isinstance(source, Bundle) else open_bundle(source)
    require_runtime(bundle, "onnx")
    yield bundle


def _carried(bundle: Bundle) -> dict[str, Any]:
    """What an engine's bundle takes over from the graphs', beside the graphs: schedule, table and tokenizers too."""
    own = ("model", "components", "files", "parity", "runtime", "engine", "versions")
    carried = {name: value for name, value in bundle.manifest.items() if name not in own}
    carried["components"] = {name: {**described, "model": None} for name, described in bundle.components.items()}
    carried["files"] = {name: told for name, told in bundle.manifest["files"].items() if "/" in name}
    return carried


def _find_kept(target: Path, force: bool) -> Bundle | None:
    """The TensorRT bundle that may be kept; None for a damaged one, or with `force` any other.

    Raises:
        FileExistsError: another bundle.
    """
    try:
        found = open_bundle(target)
    except BundleError:
        found = None
    if found is not None and found.runtime == "tensorrt":
        return found
    if not force and (found is not None or not any(target.glob(f"*{ENGINE_SUFFIX}"))):
        raise FileExistsError(
            f"out: {str(target)!r} is no TensorRT bundle, and reuse replaces no other; pass another folder, or --force to"
            " replace it"
        )
    return None


Setting = Callable[[Any], object]


def _settings(library: Library, options: TensorRTOptions) -> list[Setting]:
    """What is to be set on a builder's configuration, all of it there in this flavour and version."""
    trt, rtx = library.module, library.flavour == "rtx"

    def part(option: str, path: str, there: bool = True) -> Any:
        """What an option needs of the library's API."""
        with contextlib.suppress(AttributeError):
            if there:
                return attrgetter(path)(trt)
        raise ValueError(f"{option}: {library.name} (flavour {library.flavour!r}) has no such option; leave it out")

    settings: list[Setting] = []
    for option in ("version_compatible", "refit", "strip_plan", "weight_streaming"):
        if getattr(options, option):
            settings.append(methodcaller("set_flag", part(option, f"BuilderFlag.{option.upper()}")))
    if not options.tf32:
        settings.append(methodcaller("clear_flag", part("tf32", "BuilderFlag.TF32")))
    if options.workspace is not None:
        pool = part("workspace", "MemoryPoolType.WORKSPACE")
        settings.append(methodcaller("set_memory_pool_limit", pool, options.workspace))
    if options.builder_optimization_level is not None:
        option = "builder_optimization_level"
        part(option, f"IBuilderConfig.{option}")
        settings.append(methodcaller("__setattr__", option, options.builder_optimization_level))
    if options.hardware_compatibility is not None:
        path = f"HardwareCompatibilityLevel.{options.hardware_compatibility.upper()}"
        # TensorRT-RTX has the attribute, and ignores it with a warning.
        level = part("hardware_compatibility", path, there=not rtx)
        settings.append(methodcaller("__setattr__", "hardware_compatibility_level", level))
    if options.timing_cache is not None:
        # TensorRT-RTX compiles on the machine that runs the engine, and keeps a cache there.
        part("timing_cache", "IBuilderConfig.create_timing_cache", there=not rtx)
    if options.compute_capabilities:
        part("compute_capabilities", "IBuilderConfig.set_compute_capability", there=rtx)
        members = [_capability(library, capability) for capability in options.compute_capabilities]
        settings.append(functools.partial(_set_capabilities, members))
    return settings


def _capability(library: Library, capability: str) -> Any:
    kinds = library.module.ComputeCapability
    name = f"SM{capability.replace('.', '')}"
    if not hasattr(kinds, name):
        known = [f"{key[2:-1]}.{key[-1]}" for key in dir(kinds) if key.startswith("SM") and key[2:].isdecimal()]
        known.sort(key=float)
        raise ValueError(f"compute_capabilities: {capability!r}; {library.name} builds for {', '.join(known)}")
    return getattr(kinds, name)


def _set_capabilities(members: Sequence[Any], config: Any) -> None:
    config.num_compute_capabilities = len(members)
    for index, member in enumerate(members):
        config.set_compute_capability(member, index)


def _build_target(library: Library, options: TensorRTOptions) -> tuple[str | None, list[str]]:
    """The GPU's name, where it decides the engine, and the compute capabilities; none for all of a flavour's."""
    if library.flavour == "rtx":
        return None, list(options.compute_capabilities)
    import torch

    from fastddim.export.machine import compute_capability

    if not torch.cuda.is_available():
        raise ValueError(
            f"flavour: {library.name} builds for the GPU that is here, and torch {torch.__version__} finds none; build on"
            " the machine that will run the engine, or pass flavour='rtx'"
        )
    return torch.cuda.get_device_name(), [compute_capability()]


@dataclass(frozen=True)
class _Build:
    """How to build each graph of a bundle.

    Attributes:
        library: TensorRT.
        settings: what is set on the builder's configuration.
        ranges: each dimension's range, for each profile.
        timing_cache: the file of measured kernels.
        progress: as `export_tensorrt`'s.
        fused: graphs with a plugin, by the names of the files whose place they take.
    """

    library: Library
    settings: Sequence[Setting]
    ranges: Sequence[Mapping[str, Range]]
    timing_cache: str | Path | None
    progress: Progress | None
    fused: Mapping[str, onnx.ModelProto]

    def write(self, graph: Path, described: Mapping[str, Any], engine: Path, lines: list[str]) -> None:
        """Build the file `engine` from an ONNX file that the manifest describes; the log's lines grow."""
        trt = self.library.module
        start = len(lines)
        logger = self.library.logger(lines.append)
        builder = trt.Builder(logger)
        # Newer versions know no other networks.
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        flags = 0 if typed is None else 1 << int(typed)
        fused = self.fused.get(graph.name)
        if fused is not None:
            flags |= 1 << int(getattr(trt.NetworkDefinitionCreationFlag, PLUGIN_FLAG))
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, logger)
        # The path is where weights beside the file are.
        parse = parser.parse_from_file if fused is None else functools.partial(parser.parse, fused.SerializeToString())
        if not parse(str(graph)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            refused = "; ".join(f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in errors)
            raise ExportError(f"model: {self.library.name} refuses {graph.name}: {refused}")
        config = builder.create_builder_config()
        for setting in self.settings:
            setting(config)
        cache = self._load_timing_cache(config)
        for ranges in self.ranges:
            self._add_profile(builder, config, network, described, ranges)
        monitor = _monitor(trt, self.progress) if self.progress is not None else None
        if monitor is not None:
            config.progress_monitor = monitor
        built = builder.build_serialized_network(network, config)
        if monitor is not None and monitor.failed is not None:
            raise monitor.failed
        if built is None:
            raise ExportError(f"model: {self.library.name} cannot build {graph.name}: {first_error(lines[start:])}")
        with engine.open("wb") as file:
            file.write(memoryview(built))
        if cache is not None and self.timing_cache is not None:
            content = bytes(memoryview(cache.serialize()))
            write_whole(self.timing_cache, lambda file: file.write(content), "timing_cache")

    def _load_timing_cache(self, config: Any) -> Any:
        if self.timing_cache is None:
            return None
        file = Path(self.timing_cache)
        cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
        # One that is damaged, or of another version or GPU, is not taken.
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
        return cache

    def _add_profile(
        self, builder: Any, config: Any, network: Any, described: Mapping[str, Any], ranges: Mapping[str, Range]
    ) -> None:
        dims = {item["name"]: item["shape"] for item in described["inputs"]}
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            if tensor.is_shape_tensor:
                # The number of steps of a baked schedule.
                profile.set_shape_input(tensor.name, *([size] for size in ranges["steps"]))
                continue
            shape = dims[tensor.name]
            profile.set_shape(
                tensor.name,
                *(tuple(ranges[dim][k] if isinstance(dim, str) else dim for dim in shape) for k in range(3)),
            )
        config.add_optimization_profile(profile)


def _monitor(trt: Any, progress: Progress) -> Any:
    """TensorRT's own progress interface around a function; what the function raises ends the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.failed: BaseException | None = None
            self._phases: dict[str, tuple[str | None, int]] = {}

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self._phases[name] = parent, num_steps
            self._tell(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            self._tell(name, step + 1)
            return self.failed is None

        def phase_finish(self, name: str) -> None:
            self._tell(name, self._phases[name][1])

        def _tell(self, name: str, done: int) -> None:
            parent, total = self._phases[name]
            try:
                if self.failed is None:
                    progress(name, parent, done, total)
            # TensorRT's own frames are between here and the caller; it takes no for an answer, but no exception.
            except BaseException as error:
                self.failed = error

    return Monitor()


def _fill(source: Bundle, engine: Mapping[str, Any], build: _Build, folder: Path) -> dict[str, Any]:
    """Write the engines, their log and the rest of the bundle; returns the manifest."""
    manifest: dict[str, Any] = copy.deepcopy(dict(source.manifest))
    del manifest["files"]
    lines: list[str] = []
    for described in (manifest, *manifest.get("components", {}).values()):
        graph = source.path / described["model"]
        described["model"] = graph.with_suffix(ENGINE_SUFFIX).name
        lines.append(f"== {described['model']}")
        build.write(graph, described, folder / described["model"], lines)
    # Without the folder, which may be a temporary one.
    (folder / LOG_FILE).write_text("\n".join(lines).replace(f"{source.path}/", "") + "\n", "utf-8")
    for name in source.manifest["files"]:
        # A tokenizer's.
        if "/" in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, folder / name)
    # Parity was measured on the graphs, not on the engines.
    manifest["parity"] = []
    manifest["runtime"] = "tensorrt"
    manifest["engine"] = dict(engine)
    manifest["versions"][build.library.package] = build.library.version
    (folder / NOTE_FILE).write_text(note(manifest), "utf-8")
    return manifest
