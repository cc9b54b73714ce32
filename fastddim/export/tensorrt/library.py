"""TensorRT's two flavours behind one API: which library is there, and which engines it loads on which GPU."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastddim.export.bundle import Bundle, BundleError
from fastddim.export.tensorrt.options import open_dimensions

# The flag of networks with plugins that are compiled ahead of time; TensorRT 10.8 is the first to have it.
PLUGIN_FLAG = "PREFER_AOT_PYTHON_PLUGINS"

# An engine's first bytes, those before its version, and the bytes of its version.
_HEADER = 28
_VERSION = slice(24, 28)


@dataclass(frozen=True)
class _Flavour:
    module: str
    extra: str
    magic: bytes


_FLAVOURS = {
    "standard": _Flavour("tensorrt", "tensorrt", b"ftrt"),
    "rtx": _Flavour("tensorrt_rtx", "rtx", b"vtrt"),
}


@dataclass(frozen=True)
class Library:
    """An imported flavour of TensorRT.

    Attributes:
        flavour: `"standard"` or `"rtx"`.
        module: the Python module.
    """

    flavour: str
    module: Any

    @property
    def version(self) -> str:
        """The library's version."""
        return str(self.module.__version__)

    @property
    def name(self) -> str:
        """The library with its version, for messages."""
        return f"TensorRT {self.version}" if self.flavour == "standard" else f"TensorRT-RTX {self.version}"

    @property
    def package(self) -> str:
        """The module's name."""
        return _FLAVOURS[self.flavour].module

    def logger(self, keep: Callable[[str], object]) -> Any:
        """A logger that passes on what is worth reading: `SEVERITY: message`."""
        severity = self.module.ILogger.Severity

        class Log(self.module.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()

            def log(self, level: Any, message: str) -> None:
                if level != severity.VERBOSE:
                    keep(f"{level.name}: {message}")

        return Log()


def current_platform() -> str:
    """The operating system and the machine, which an engine's are to be."""
    return f"{sys.platform} {platform.machine()}"


def load_library(flavour: str) -> Library:
    """Import a flavour.

    Args:
        flavour: `"standard"`, `"rtx"`, or `"auto"` for the first of them that is installed.

    Raises:
        ImportError: it is not there; the message has the line that installs it.
    """
    failed = []
    for name in _FLAVOURS if flavour == "auto" else [flavour]:
        try:
            return Library(name, importlib.import_module(_FLAVOURS[name].module))
        except ImportError as error:
            failed.append(f"{error}; pip install 'fastddim[{_FLAVOURS[name].extra}]'")
    raise ImportError(f"flavour: {flavour!r}: " + ", or ".join(failed))


def first_error(lines: list[str]) -> str:
    """The first error in a log, or what stands for one."""
    errors = [line for line in lines if line.startswith(("ERROR", "INTERNAL_ERROR"))]
    return errors[0] if errors else "it gives no reason"


def require_loadable(bundle: Bundle, model: Path, library: Library) -> None:
    """Check an engine's description, its first bytes, version and platform, before TensorRT reads the file `model`.

    Raises:
        BundleError: a damaged engine, or one of another flavour, version or platform.
    """
    engine = bundle.manifest["engine"]
    with model.open("rb") as file:
        header = file.read(_HEADER)
    named = f"bundle: {str(model)!r}"
    for dim in sorted(open_dimensions(bundle.manifest)):
        if any(dim not in ranges for ranges in engine["profiles"]):
            raise BundleError(f"{named}: the manifest has a profile without {dim!r}; export it again")
    found = {flavour.magic: name for name, flavour in _FLAVOURS.items()}.get(header[:4])
    if found is None or len(header) < _HEADER:
        raise BundleError(f"{named} is no TensorRT engine; export it again")
    if found != engine["flavour"]:
        raise BundleError(f"{named} is of flavour {found!r}, the manifest says {engine['flavour']!r}; export it again")
    built = _numbers(engine["version"])
    # A byte for each number.
    inside = tuple(header[_VERSION])
    if inside[: len(built)] != tuple(number % 256 for number in built):
        told = ".".join(map(str, inside))
        raise BundleError(f"{named} is of version {told}, the manifest says {engine['version']}; export it again")
    if engine["platform"] != current_platform():
        raise BundleError(f"{named} is for {engine['platform']}, this machine is {current_platform()}; export it here")
    here = _numbers(library.version)
    newer = engine["options"]["version_compatible"] and here[0] == built[0] and here >= built
    if here[:3] != built[:3] and not newer:
        raise BundleError(
            f"{named} was built by version {engine['version']} of {library.package}, {library.version} is installed;"
            " install that version, or export it again"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The first four parts of a version."""
    return tuple(int(part) for part in version.split(".")[:4] if part.isdecimal())


def require_capability(bundle: Bundle, capability: str) -> None:
    """Check that an engine is for a GPU of a compute capability such as `"8.9"`; a BundleError names those it is for."""
    engine: Mapping[str, Any] = bundle.manifest["engine"]
    built = engine["compute_capabilities"]
    ampere = engine["options"]["hardware_compatibility"] == "ampere_plus" and _numbers(capability) >= (8,)
    if built and capability not in built and not ampere:
        raise BundleError(
            f"bundle: {str(bundle.path)!r} is for compute capability {', '.join(built)}, this GPU has {capability};"
            " export it for this one"
        )
