"""A GPU's work on a machine without one, for `scripts/gpu_check.sh --rehearse`: what is on "cuda" is on the host, captures are
on the tape of tests/tape.py, and kernels run on the machine in tests/ptx.

    pytest -p rehearsal ...                       tests marked `gpu` run
    python -m rehearsal SCRIPT|-c CODE ARGUMENT   a program runs; a bench's suite takes its quick sizes and no time
    python -m rehearsal ncu|compute-sanitizer     the tool checks its command line, and the program that it is given runs
"""

from __future__ import annotations

import argparse
import re
import runpy
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastddim import cuda_graph, loop
from fastddim.bench import gpu
from ptx.launcher import Machine
from ptx.stub import StubDevice, serve
from tape import OWN_FILES, Tape, TapedMachine

CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")
# Asked for a tensor's.
DEVICE_OF, IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__
TARGET = 90
OWN_FILES.add(__file__)
# By the ends of tests' names: what no stand-in does.
NOT_CARRIED = {
    "test_a_package_for_a_gpu": "AOTInductor's code for a GPU",
    "test_engines_sample_as_the_graph_does_on_a_gpu": "TensorRT",
    "test_an_engine_with_the_plugin_samples_as_onnx_runtime": "TensorRT",
}
ELEMENTS = 1 << 14
TOOLS: dict[str, dict[str, Any]] = {
    "compute-sanitizer": {
        "--tool": {"choices": ["memcheck", "racecheck", "synccheck", "initcheck"], "required": True},
        "--report-api-errors": {"choices": ["all", "explicit", "no"]},
        "--error-exitcode": {"type": int, "required": True},
    },
    "ncu": {
        "--csv": {"action": "store_true", "required": True},
        "--clock-control": {"choices": ["base", "boost", "none", "reset"]},
        "--kernel-name": {"type": lambda text: re.compile(text.removeprefix("regex:")), "required": True},
        "--metrics": {"type": lambda text: text.split(","), "required": True},
    },
}


class OnHost(TorchFunctionMode):
    """Takes "cuda" for the host, and says of the host's tensors that they are on "cuda"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (DEVICE_OF, IS_CUDA):
            device = DEVICE_OF(args[0])
            device = CUDA if device == HOST else device
            return device if func == DEVICE_OF else device == CUDA
        if func in (torch.Tensor.pin_memory, torch.Tensor.cuda):
            return args[0]
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        return func(*map(on_host, args), **{name: on_host(value) for name, value in (kwargs or {}).items()})


def on_host(value: Any) -> Any:
    if isinstance(value, torch.device):
        return HOST if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and re.fullmatch(r"cuda(:\d+)?", value) else value


def given_on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, **options: function(*map(on_host, given), **options)


def _is_available() -> bool:
    """For fastddim and its tests: torch itself would go on to the driver."""
    return not sys._getframe(1).f_code.co_filename.startswith(str(Path(torch.__file__).parent))


@contextmanager
def emulated() -> Iterator[TapedMachine]:
    """A GPU of sm_90, in threads that are started in this context too."""
    is_captured, run_thread = cuda_graph.is_captured, threading.Thread.run

    def run_on_host(thread: threading.Thread) -> None:
        with OnHost():
            run_thread(thread)

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        machine = TapedMachine(Tape().install(patch), TARGET, seed=0)
        stack.enter_context(machine.installed())
        for name, value in {
            "is_available": _is_available, "device_count": lambda: 1, "current_device": lambda: 0,
            "device_of": lambda tensor: nullcontext(), "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda: None, "max_memory_allocated": lambda: 0,
            "set_sync_debug_mode": lambda mode: None, "get_sync_debug_mode": lambda: 0,
            "get_device_capability": lambda device=None: divmod(TARGET, 10),
            "get_device_properties": lambda device: SimpleNamespace(
                name="none: a rehearsal", total_memory=0, multi_processor_count=0, major=TARGET // 10, minor=TARGET % 10
            ),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        for module in (cuda_graph, loop):
            patch.setattr(module, "is_captured", is_captured)
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
            patch.setattr(torch, name, given_on_host(getattr(torch, name)))
        fork_rng = torch.random.fork_rng
        patch.setattr(torch.random, "fork_rng", lambda devices: fork_rng([]))
        patch.setattr(threading.Thread, "run", run_on_host)
        # A gigabyte by default.
        patch.setattr(gpu, "_COPY_BYTES", {"cuda": 1 << 20})
        stack.enter_context(OnHost())
        yield machine


# Tests.

_session = ExitStack()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before the tests' modules ask whether there is a GPU."""
    _session.enter_context(emulated())


def pytest_unconfigure() -> None:
    _session.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = NOT_CARRIED.get(getattr(item, "originalname", ""))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"not rehearsed: {reason}"))


@pytest.fixture(autouse=True)
def _driver_of_other_processes(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    if request.node.originalname != "test_on_a_gpu_cpp_gives_tritons_bits":
        yield
        return
    import stub_cuda

    stub_cuda.build(tmp_path)
    with serve(StubDevice(Machine(TARGET, seed=0), tmp_path)) as variables:
        folders = {"LD_LIBRARY_PATH": str(tmp_path), "STUB_CUDA_RECORD": str(tmp_path / "record")}
        for name, value in {**folders, **variables}.items():
            monkeypatch.setenv(name, value)
        yield


# Programs.


def run_program(arguments: Sequence[str], note: Callable[[str], None] = lambda kernel: None) -> None:
    """Run a script, or `-c` and code, as Python would; `note` is told the name of each kernel that is launched."""
    from fastddim.bench import run as bench
    from fastddim.bench.cases import Scope
    from fastddim.bench.suites import select_cases

    real = bench.run_suite

    def run_suite(suite: str, *, device: str, patterns: Any, baselines: Any, **options: Any) -> Any:
        # What the real run takes.
        select_cases(suite, Scope(device=device), patterns, baselines)
        options |= {"quick": True, "budget_s": 0.0}
        return real(suite, device=device, patterns=patterns, baselines=baselines, **options)

    arguments = list(arguments)
    if "--elements" in arguments:
        at = arguments.index("--elements") + 1
        arguments[at] = str(ELEMENTS + int(arguments[at]) % ELEMENTS)
    with pytest.MonkeyPatch.context() as patch, emulated() as machine:
        launch = machine.launch

        def launch_noted(program: Any, *rest: Any) -> None:
            note(program.kernel.name)
            launch(program, *rest)

        patch.setattr(machine, "launch", launch_noted)
        patch.setattr(bench, "run_suite", run_suite)
        if arguments[0] == "-c":
            patch.setattr(sys, "argv", ["-c", *arguments[2:]])
            exec(arguments[1], {"__name__": "__main__"})
        else:
            patch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")


def run_tool(name: str, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog=name, allow_abbrev=False)
    for option, how in TOOLS[name].items():
        parser.add_argument(option, **how)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    python, *program = options.command
    if not shutil.which(python):
        parser.error(f"{python!r} cannot be started")
    kernels: list[str] = []
    run_program(program, kernels.append)
    if name == "ncu":
        profiled = [kernel for kernel in kernels if options.kernel_name.search(kernel)]
        if not profiled:
            print("==WARNING== No kernels were profiled.")
        for number, kernel in enumerate(profiled):
            for metric in options.metrics:
                print(f'"{number}","{kernel}","{metric}","rehearsed","0"')


if __name__ == "__main__":
    first, *others = sys.argv[1:]
    if first in TOOLS:
        run_tool(first, others)
    else:
        run_program(sys.argv[1:])
