"""The machine behind the stub of the CUDA driver in benchmarks/stub_cuda, for callers in this process and in others.

The stub tells every call by the line of JSON that it records, and waits for a `CUresult` and a text. The images that it
loads are beside the record. A cubin is executed as the PTX that Triton made it from, which is beside it in Triton's cache.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ptx.launcher import Machine
from ptx.memory import RUBBISH, Memory, Region
from ptx.parse import PtxError
from ptx.program import Program, parameter_size

_LAUNCH_FAILED = 719
_MEMORY_BYTES = 1 << 26
_MAP_FIXED_NOREPLACE = 0x100000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Allocations(Memory):
    """What a driver has given out: a pointer may lead into the middle."""

    def at(self, address: int) -> Region:
        inside = (each for each in self._regions.values() if each.address <= address < each.end)
        return next(inside, None) or super().at(address)

    def remove(self, address: int) -> None:
        del self._regions[self.at(address).address]


class StubDevice:
    """Does what the stub's callers ask of a GPU.

    Args:
        machine: what executes the kernels. Its memory becomes what a caller in another process allocates.
        cache: Triton's cache, with every cubin that is loaded and its PTX.
    """

    def __init__(self, machine: Machine, cache: Path) -> None:
        self._machine, self._cache = machine, cache
        self._programs: dict[int, Program] = {}
        self._mapped: list[tuple[int, int]] = []

    def answer(self, line: str) -> str:
        """A line that the stub tells -> the code of an error, or 0, and a text of one line."""
        told = json.loads(line)
        do: Callable[[dict[str, Any]], str | None] | None = getattr(self, f"_{told['call']}", None)
        try:
            return f"0 {do(told) or ''}" if do else "0 "
        except Exception as error:
            # Whoever called is beyond C, where only this text arrives.
            return f"{_LAUNCH_FAILED} {type(error).__name__}: {' '.join(str(error).split())}"

    def close(self) -> None:
        """The caller has ended: nothing is left of what it had."""
        for address, size in self._mapped:
            _libc.munmap(address, size)
        self._mapped.clear()
        self._programs.clear()

    def _map(self, told: dict[str, Any]) -> None:
        with open(told["path"], "r+b") as file:
            size = os.fstat(file.fileno()).st_size
            flags = mmap.MAP_SHARED | _MAP_FIXED_NOREPLACE
            where = _libc.mmap(told["address"], size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file.fileno(), 0)
        if where != told["address"]:
            raise OSError(f"memory: {told['address']:#x} is taken in this process ({os.strerror(ctypes.get_errno())})")
        self._mapped.append((where, size))
        self._machine.memory = Allocations()

    def _alloc(self, told: dict[str, Any]) -> None:
        self._machine.memory.add(told["address"], told["bytes"])
        ctypes.memset(told["address"], RUBBISH, told["bytes"])

    def _free(self, told: dict[str, Any]) -> None:
        self._machine.memory.remove(told["address"])  # type: ignore[attr-defined]

    def _function(self, told: dict[str, Any]) -> str:
        program = self._machine.load(self._find_ptx(Path(told["path"]).read_bytes()))
        if program.kernel.name != told["entry"]:
            raise PtxError(f"{told['entry']}: not in the image, which has {program.kernel.name}")
        self._programs[told["image"]] = program
        return ",".join(str(parameter_size(parameter)) for parameter in program.kernel.parameters)

    def _launch(self, told: dict[str, Any]) -> None:
        program = self._programs[told["image"]]
        threads = program.kernel.threads
        if told["block"] != [threads, 1, 1]:
            raise PtxError(f"{told['entry']}: launched in blocks of {told['block']} threads, and is for {threads}")
        values = [int.from_bytes(bytes.fromhex(each), "little") for each in told["parameters"]]
        self._machine.launch(program, tuple(told["grid"]), values, told["shared"])

    def _find_ptx(self, image: bytes) -> str:
        if not image.startswith(b"\x7fELF"):
            return image.decode()
        for cubin in self._cache.rglob("*.cubin"):
            if cubin.read_bytes() == image:
                return cubin.with_suffix(".ptx").read_text()
        raise PtxError(f"a cubin of {len(image)} bytes that is not in {self._cache}, so that its PTX is not known")


@contextmanager
def serve(device: StubDevice) -> Iterator[dict[str, str]]:
    """Answer the stub of other processes, one at a time; gives what their environment needs beside STUB_CUDA_RECORD."""
    with tempfile.TemporaryDirectory(prefix="machine-") as folder, socket.socket(socket.AF_UNIX) as listener:
        with open(f"{folder}/memory", "wb") as memory:
            memory.truncate(_MEMORY_BYTES)
        listener.bind(f"{folder}/socket")
        listener.listen()
        thread = threading.Thread(target=_answer_callers, args=(listener, device))
        thread.start()
        try:
            yield {"STUB_CUDA_MACHINE": folder}
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _answer_callers(listener: socket.socket, device: StubDevice) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, connection.makefile("rw") as lines:
            for line in lines:
                lines.write(device.answer(line) + "\n")
                lines.flush()
        device.close()
