"""A CUDA driver that does nothing, under Triton's own NVIDIA launcher: what a launch costs the host, without a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import triton
from triton.backends.nvidia import driver as nvidia

HEADERS = Path(nvidia.__file__).with_name("include")
_SOURCE = Path(__file__).with_name("libcuda_stub.c")
# Until the process ends: some Triton releases link each kernel's launcher to the library.
_FOLDER = tempfile.TemporaryDirectory(prefix="stub-cuda-")
# As long as the library, which calls them.
_CALLBACKS: list[object] = []
_ANSWER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)


class Stub:
    """What reached the stub driver."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._count = ctypes.c_ulonglong.in_dll(library, "stub_launch_count")
        self._grid = (ctypes.c_int * 3).in_dll(library, "stub_last_grid")
        self._machine = ctypes.c_void_p.in_dll(library, "stub_machine")

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return self._count.value

    @property
    def grid(self) -> tuple[int, ...]:
        """Programs of the last launch, in three dimensions."""
        return tuple(self._grid)

    def let_answer(self, answer: Callable[[str], str]) -> None:
        """Let a function do what is called: a line of the record -> a `CUresult`, a space and a text of one line.

        The kernels' images are beside the record, so STUB_CUDA_RECORD has to be set.
        """

        def call(line: bytes, text: int, size: int) -> int:
            code, _, said = answer(line.decode()).partition(" ")
            encoded = said.encode()[: size - 1] + b"\0"
            ctypes.memmove(text, encoded, len(encoded))
            return int(code)

        callback = _ANSWER(call)
        _CALLBACKS.append(callback)
        self._machine.value = ctypes.cast(callback, ctypes.c_void_p).value


class _Driver(nvidia.CudaDriver):
    """Triton's driver with one device, of compute capability 9.0, and one stream, none of which asks torch.cuda."""

    def __init__(self) -> None:
        super().__init__()
        self.get_device_capability = lambda *_: (9, 0)
        self.get_current_device = self.get_current_stream = lambda *_: 0
        self.set_current_device = lambda *_: None

    @staticmethod
    def is_active() -> bool:
        return True


def build(folder: Path, *command: str) -> Path:
    """Compile the stub as `libcuda.so.1` in a folder.

    Args:
        command: a compiler and options for it; Triton's compiler by default.

    Raises:
        RuntimeError: no C compiler.
    """
    # As Triton looks for one.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("no C compiler: install gcc (apt-get install gcc), or name one in CC")
    library = folder / "libcuda.so.1"
    options = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{HEADERS}"]
    subprocess.run([*(command or [compiler]), *options, "-o", library, _SOURCE], check=True)
    return library


def install(cache: Path | None = None) -> Stub:
    """Put the stub under Triton for the rest of this process, which has used no GPU yet.

    Args:
        cache: Triton's cache, which no process with a GPU may share; by default one that goes when this process ends.

    Raises:
        RuntimeError: no C compiler, Triton's interpreter is on, or a CUDA driver is loaded already.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: unset it, the interpreter launches nothing")
    library = build(Path(_FOLDER.name))
    stub = Stub(ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL))
    # Triton opens the library by this name, which the loader takes for the one loaded first.
    if not hasattr(ctypes.CDLL("libcuda.so.1"), "stub_launch_count"):
        raise RuntimeError("a CUDA driver is loaded already: install the stub in a fresh process, first of all")
    triton.knobs.nvidia.libcuda_path = _FOLDER.name
    # Nothing linked to the stub may reach a process with a GPU.
    triton.knobs.cache.dir = str(cache or Path(_FOLDER.name) / "cache")
    triton.runtime.driver.set_active(_Driver())
    return stub
