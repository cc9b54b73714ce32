"""Runtimes: what runs an exported file, what writes it, and the command that does so. One record describes each of them."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import re
from dataclasses import dataclass
from typing import Any

from fastddim.config import require_choice

logger = logging.getLogger(__name__)

# Each of these packages has its record, `RUNTIME`.
BUILT_IN = ("onnx", "aoti", "tensorrt", "cubin")
ENTRY_POINTS = "fastddim.runtimes"
_NAME = re.compile("[a-z][a-z0-9_-]*")
_PATH = re.compile(r"[\w.]+:\w+")

_registered: dict[str, Runtime] = {}
_entry_points_read = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What runs exported files of one kind, and what writes them.

    The parts are paths, `"module:name"`, which are imported when they are needed.

    Attributes:
        name: what a manifest's `runtime` says, and the command's name: `fastddim export NAME`.
        exporter: the function that writes a bundle.
        command: the function that is the command, its parameters declared for typer.
        options: the class of the exporter's options.
        sampler: the `BundleSampler` that runs a bundle; None where a host program alone runs it.
        pipeline: the class that runs the bundle of a whole text-to-image pipeline; None where there is none.
        others: more parts, which `fastddim.export` has under their names, as it has all parts of fastddim's own runtimes.
        install: the line that installs what the parts import.
        loads: what loads the file, a sentence for the note in a bundle.
        needs: what `sampler` needs, for the same note: "which needs ...".
        server: the inference server's backend, and the file name that it looks for; None where it has none.
    """

    name: str
    exporter: str
    command: str
    options: str = "fastddim.export.sampler_plan:ExportOptions"
    sampler: str | None = None
    pipeline: str | None = None
    others: tuple[str, ...] = ()
    install: str
    loads: str = ""
    needs: str = ""
    server: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r}; pass small letters, digits, '-' and '_', the first a letter")
        for path in (*self.parts().values(), self.command):
            if not _PATH.fullmatch(path):
                raise ValueError(f"{self.name}: {path!r}; pass a part as 'module:name'")

    def parts(self) -> dict[str, str]:
        """The path of each part but the command, by the part's own name."""
        paths = (self.exporter, self.options, self.sampler, self.pipeline, *self.others)
        return {path.rpartition(":")[2]: path for path in paths if path is not None}

    def load(self, path: str) -> Any:
        """Import a part by its path. Raises as `load_part`."""
        return load_part(path, self.install)


def load_part(path: str, install: str) -> Any:
    """Import what a path names.

    Args:
        path: `"module:name"`.
        install: the line that installs what the module imports.

    Raises:
        ImportError: something that it imports is not installed; the message has the line.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(f"{public_name(path)} needs {error.name or error}: {install}") from error


def public_name(path: str) -> str:
    """The name that users import a part by."""
    module, _, name = path.partition(":")
    return f"fastddim.export.{name}" if module.startswith("fastddim.export.") else f"{module}.{name}"


def register_runtime(runtime: Runtime) -> None:
    """Make a runtime known: to `fastddim export`, to `open_sampler` and to `fastddim run`.

    An installed package needs no call: an entry point of the group `fastddim.runtimes` that names its `Runtime` does it.

    Raises:
        ValueError: there is another runtime of that name.
    """
    if runtime.name in BUILT_IN or _registered.get(runtime.name, runtime) != runtime:
        raise ValueError(f"runtime: {runtime.name!r} is registered already; pass another name")
    _registered[runtime.name] = runtime


def runtimes() -> dict[str, Runtime]:
    """All runtimes by name: fastddim's own, then those that were registered and those of installed packages."""
    global _entry_points_read
    if not _entry_points_read:
        _entry_points_read = True
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
            try:
                register_runtime(point.load())
            # Another package's fault, which is no reason to fail here.
            except Exception as error:
                logger.warning("%s %r cannot be loaded: %s", ENTRY_POINTS, point.name, error)
    return {**{name: _built_in(name) for name in BUILT_IN}, **_registered}


def get_runtime(name: str) -> Runtime:
    """A runtime by its name.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    if name in BUILT_IN:
        return _built_in(name)
    if name not in _registered:
        require_choice("runtime", name, tuple(runtimes()))
    return _registered[name]


def _built_in(name: str) -> Runtime:
    runtime: Runtime = importlib.import_module(f"fastddim.export.{name}").RUNTIME
    return runtime
