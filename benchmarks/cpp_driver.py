"""cpp/'s programs for the tests and benchmarks: built with CMake, and its sampler behind a pipe."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import stub_cuda
import torch

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "build" / "onnxruntime"
LIBTORCH = Path(torch.utils.cmake_prefix_path)

# Optimised by GCC, and by Clang with every check that it has; without ONNX Runtime where only kernels are launched. The
# fuzzer runs six times as often when it is optimised, and takes as much longer to compile as the short test runs.
_RELEASE = ["-DCMAKE_CXX_COMPILER=g++", "-DCMAKE_BUILD_TYPE=Release"]
_CHECKED = ["-DCMAKE_CXX_COMPILER=clang++", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-gline-tables-only",
            "-DFASTDDIM_SANITIZE=address,undefined"]  # fmt: skip
_FUZZERS = "-DFASTDDIM_BUILD_FUZZERS=ON"
_KERNELS = ["-DFASTDDIM_STEP_KERNEL=ON", f"-DCUDA_INCLUDE_DIR={stub_cuda.HEADERS}"]
BUILDS = {
    "release": _RELEASE,
    "checked": [*_CHECKED, *_KERNELS, _FUZZERS],
    "fuzz": [*_CHECKED, "-DFASTDDIM_ORT=OFF", "-DCMAKE_CXX_FLAGS=-O1", _FUZZERS],
    # libtorch does its work: less to optimise than to compile.
    "aoti": [*_RELEASE, "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG", "-DFASTDDIM_ORT=OFF", "-DFASTDDIM_AOTI=ON"],
    "kernels": [*_RELEASE, "-DFASTDDIM_ORT=OFF", *_KERNELS],
}


def build(name: str, *programs: str) -> Path:
    """The folder with the programs of one of `BUILDS`, all or some, built as far as they are not up to date.

    Raises:
        RuntimeError: with what the build printed.
    """
    folder = ROOT / "build" / f"cpp-{name}"
    configure = ["cmake", "-S", str(ROOT / "cpp"), "-B", str(folder), f"-DONNXRUNTIME_ROOT={RUNTIME}"]
    configure.append(f"-DCMAKE_PREFIX_PATH={LIBTORCH}")
    options = ["-DFASTDDIM_BUILD_TESTS=ON", "-DFASTDDIM_STRICT=ON", *BUILDS[name]]
    make = ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count()), "--target", *(programs or ["all"])]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        # Tests that run at a time share the folder.
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in ([*configure, *options], make):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return folder


class CppError(Exception):
    """An exception of the C++ side; `kind` is its class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class CppSampler:
    """A sampler of cpp/ in a process of its own, called as Python's is.

    Args:
        program: the driver of a runtime, of a build.
        bundle: the folder to load; without one, `open` alone works.
        env: environment variables of the process.
        **options: the sampler's options, such as `check_finite`.
    """

    def __init__(
        self, program: Path, bundle: Path | None = None, *, env: Mapping[str, str] | None = None, **options: int | str
    ) -> None:
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **(env or {})}
        )
        if bundle is not None:
            try:
                self._ask({"load": str(bundle), "threads": 1, **options})
            except CppError:
                self.close()
                raise

    def __enter__(self) -> CppSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process.

        Raises:
            RuntimeError: it did not end well, as where a sanitizer found something.
        """
        self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"the C++ program ended with status {self._process.returncode}")

    def open(self, bundle: Path, check_hashes: bool = True) -> dict[str, Any]:
        """Open a bundle, and nothing else."""
        answer, _ = self._ask({"open": str(bundle), "check_hashes": check_hashes})
        return answer

    def __call__(self, start: int | np.ndarray, **arguments: Any) -> np.ndarray:
        """As `OrtSampler.__call__`."""
        answer, values = self._ask({"sample": _to_call(start, arguments)})
        return values.reshape(answer["shape"])

    def concurrent(self, calls: Sequence[tuple[int, Mapping[str, Any]]]) -> np.ndarray:
        """All calls at once, a thread each; their results one after the other, flat."""
        return self._ask({"concurrent": [_to_call(start, arguments) for start, arguments in calls]})[1]

    def _ask(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the C++ program ended with status {self._process.wait()}")
        answer = json.loads(line)
        values = np.frombuffer(self._process.stdout.read(answer["bytes"]), np.float32)
        if "error" in answer:
            raise CppError(answer["error"], answer["message"])
        return answer, values


def _to_call(start: int | np.ndarray, arguments: Mapping[str, Any]) -> dict[str, Any]:
    own = {"seeds", "num_inference_steps", "timesteps", "eta", "table", "size"}
    call: dict[str, Any] = {"start": _to_json(start)} if isinstance(start, np.ndarray) else {"batch": start}
    conditions = {}
    for name, value in arguments.items():
        if value is None:
            continue
        if name in ("guidance_scale", "guidance_rescale"):
            call[name] = np.atleast_1d(value).tolist()
        elif name == "uncond_kwargs":
            call["uncond_conditions"] = {key: _to_json(array) for key, array in value.items()}
        elif name in own:
            call[name] = value.tolist() if isinstance(value, np.ndarray) else value
        else:
            conditions[name] = _to_json(value)
    return call | {"conditions": conditions}


def _to_json(array: np.ndarray) -> dict[str, Any]:
    """float16 numbers as their bits, and truth values as bytes."""
    array = np.ascontiguousarray(array)
    dtype = "uint8" if array.dtype == bool else str(array.dtype)
    plain = array.view({"float16": np.uint16, "bool": np.uint8}.get(str(array.dtype), array.dtype))
    return {"dtype": dtype, "shape": list(array.shape), "values": plain.reshape(-1).tolist()}
