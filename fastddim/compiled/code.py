"""Machine code of a kind of step: compiled by Inductor once, kept on disk, loaded without Inductor."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastddim.compiled.kinds import NUMBERS, Kind

FOLDER_VARIABLE = "FASTDDIM_CACHE"
# Compiled code writes to its last arguments.
Code = Callable[[list[torch.Tensor]], Any]

_log = logging.getLogger("fastddim")
_lock = threading.RLock()
_loaded: dict[Kind | str, Code] = {}
DRAW = "draw"
# Sizes of the traced example: of several vectors, and no multiple of one.
_SAMPLES, _ELEMENTS = 3, 4099


class CompilerMissingError(RuntimeError):
    """There is no C++ compiler."""


@functools.cache
def require_compiler() -> None:
    """Raise a `CompilerMissingError` where `backend="compiled"` can neither compile nor has compiled before."""
    if not _has_compiler(os.environ.get("CXX")) and not any(_folder().glob(f"{_fingerprint()}-*.so")):
        raise CompilerMissingError(_missing())


@functools.cache
def _has_compiler(name: str | None) -> bool:
    return shutil.which(name or _usual_compiler()) is not None


def _usual_compiler() -> str:
    return "clang++" if sys.platform == "darwin" else "g++"


def _missing() -> str:
    name = os.environ.get("CXX") or _usual_compiler()
    return (
        f"backend: 'compiled' needs a C++ compiler, and {name!r} is not there; apt-get install g++, set CXX to another"
        " one, or pass 'reference'"
    )


def code_of(kind: Kind | str) -> Code:
    """The code of a kind of step, or of `DRAW`, compiled now if it was never before on this machine.

    Raises:
        CompilerMissingError: it was not, and there is no compiler.
        RuntimeError: Inductor could not compile it.
    """
    loaded = _loaded.get(kind)
    if loaded is None:
        with _lock:
            loaded = _loaded.get(kind)
            if loaded is None:
                loaded = _loaded[kind] = _load_or_compile(kind)
    return loaded


def _load_or_compile(kind: Kind | str) -> Code:
    path = _path(kind)
    if path.exists():
        try:
            return _load(path)
        except RuntimeError as error:
            _log.warning("%s cannot be loaded and is compiled again: %s", path, error)
    if not _has_compiler(os.environ.get("CXX")):
        raise CompilerMissingError(_missing())
    _log.info("compiling the step, once for this machine: %s", kind)
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=path.parent) as folder:
        made = Path(folder) / "step.so"
        try:
            _compile(kind, made)
        except Exception as error:
            raise RuntimeError(
                f"backend: 'compiled' could not compile the step: {type(error).__name__}: {error}; pass 'reference'"
            ) from error
        os.replace(made, path)
    return _load(path)


def _path(kind: Kind | str) -> Path:
    name = hashlib.sha256(repr(kind).encode()).hexdigest()[:24]
    return _folder() / f"{_fingerprint()}-{name}.so"


def _load(path: Path) -> Code:
    aoti: Any = torch._C._aoti
    # As many calls at a time as there are processors; a further thread waits.
    run: Code = aoti.AOTIModelContainerRunnerCpu(str(path), min(os.cpu_count() or 1, 16)).run
    return run


@functools.cache
def _folder() -> Path:
    """Where code is kept; a folder of this process alone where that cannot be written."""
    kept = os.environ.get(FOLDER_VARIABLE)
    base = Path(kept) if kept else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastddim"
    try:
        folder = base.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=folder))
    except (OSError, RuntimeError):
        temporary = tempfile.TemporaryDirectory(prefix="fastddim-")
        _temporary.append(temporary)
        folder = Path(temporary.name)
    return folder


# Removed when the process ends.
_temporary: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def _fingerprint() -> str:
    """All that code depends on beside its kind: torch, the processor's features, and the maths' source."""
    features = ""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    described = [torch.__version__, sys.platform, platform.machine(), features]
    described += [os.environ.get(name, "") for name in ("CXX", "ATEN_CPU_CAPABILITY")]
    for module in ("fastddim.compiled.maths", "fastddim.compiled.kinds", "fastddim.compiled.code", "fastddim.noise"):
        found = importlib.util.find_spec(module)
        assert found is not None and found.origin is not None
        described.append(Path(found.origin).read_text("utf-8"))
    return hashlib.sha256("\0".join(described).encode()).hexdigest()[:16]


def _compile(kind: Kind | str, path: Path) -> None:
    from torch._inductor import aot_compile

    from fastddim.compiled.maths import DrawModule, StepModule

    # What the caller has switched on must not end in the code.
    with torch.no_grad(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        batch, columns = torch.export.Dim("batch", min=1), torch.export.Dim("n", min=1)
        module: torch.nn.Module
        if isinstance(kind, Kind):
            module, (arguments, shapes) = StepModule(kind), _example(kind, batch, columns)
        else:
            module = DrawModule()
            seeds, steps = (torch.arange(_SAMPLES, device="cpu") for _ in range(2))
            stream, out = torch.tensor(0, device="cpu"), torch.zeros(_SAMPLES, 5, 4, dtype=torch.float32, device="cpu")
            arguments = (seeds, steps, stream, out)
            shapes = ({0: batch}, {0: batch}, None, {0: batch, 1: columns})
        program = torch.export.export(module, arguments, dynamic_shapes=shapes)
        parallel = isinstance(kind, str) or kind.parallel
        options = {
            "aot_inductor.output_path": str(path),
            # Each product and sum is rounded as written; where the reference's are fused, so are these.
            "cpp.enable_floating_point_contract_flag": "off",
            # As many threads as torch has when it runs.
            "cpp.dynamic_threads": parallel,
            "cpp.threads": 2 if parallel else 1,
        }
        aot_compile(program.module(check_guards=False), arguments, options=options)


def _example(kind: Kind, batch: Any, columns: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of a `StepModule`, and which of their sizes differ from call to call."""
    shape = (_SAMPLES, _ELEMENTS) if kind.by_sample else (_ELEMENTS,)
    sizes: dict[int, Any] = {0: batch, 1: columns} if kind.by_sample else {0: columns}
    stacked = ((2, *shape), {k + 1: size for k, size in sizes.items()}) if kind.guidance else (shape, sizes)
    numbers = ((_SAMPLES, len(NUMBERS)), {0: batch}) if kind.by_sample else ((len(NUMBERS),), None)
    output, state, noise, x_next, x0 = kind.dtypes
    # Inductor's code takes each size from the first tensor that has it, and of the others the address alone.
    given: list[tuple[Any, Any, str]] = [(shape, sizes, "float32")]
    given += [(*stacked, output), (shape, sizes, state), (*numbers, kind.compute)]
    given += [(shape, sizes, noise)] if kind.noise else []
    given += [(shape, sizes, x0)]
    given += [] if kind.in_place else [(shape, sizes, x_next)]
    tensors = [torch.ones(size, dtype=getattr(torch, dtype), device="cpu") for size, _, dtype in given]
    return (tensors,), ([dims for _, dims, _ in given],)
