import functools
import importlib
import os
from collections.abc import Generator

# The tests' tensors are small: on a busy machine torch's threads wait for each other 20 times as long as they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.onnx._internal._lazy_import import onnxscript_apis

# torch has onnxscript write down all its operators at each export anew: a fifth of what a small one takes.
onnxscript_apis.get_torchlib_ops = functools.cache(
    lambda: importlib.import_module(onnxscript_apis._name).get_torchlib_ops()
)

# Kernels run on the GPU, in Triton's interpreter where it is asked for, and else as compiled PTX on a machine in tests/ptx.
ON_MACHINE = not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:
    # The files of property tests say so themselves; scripts/gpu_check.sh takes the others to machines without it.
    pass
else:
    too_slow = [HealthCheck.too_slow]
    settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True, suppress_health_check=too_slow)
    settings.register_profile("sweep", max_examples=3000, deadline=None, suppress_health_check=too_slow)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """For scripts/gpu_check.sh, which installs nothing: a file that imports what is missing is skipped, and named."""
    report = yield
    error = None if report.call.excinfo is None else report.call.excinfo.value
    # pytest's own error has the import's as its cause, and that of fastddim.export the missing package's.
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    if error is not None and os.environ.get("FASTDDIM_SKIP_MISSING") == "1":
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {error.name} is not installed")
    return report


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    has_gpu = torch.cuda.is_available()
    for item in items:
        # The fixtures that build, or run what scripts/make_cpp.sh unpacks, in the files that are not about C++ alone.
        if item.path.name.startswith("test_cpp") or {"program", "driver", "driven"} & set(item.fixturenames):
            item.add_marker(pytest.mark.cpp)
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and this machine has none"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`machine`, under what launches kernels: sm_90 for every test, sm_80 for a sample, all targets where asked for."""
    if "machine" not in metafunc.fixturenames:
        return
    kinds = [None]
    if ON_MACHINE:
        sampled = metafunc.definition.get_closest_marker("sampled") is not None
        marks = {80: () if sampled else pytest.mark.slow, 90: (), 100: pytest.mark.slow, 120: pytest.mark.slow}
        kinds = [pytest.param(target, marks=marks[target], id=f"sm_{target}") for target in (90, 80, 100, 120)]
    metafunc.parametrize("machine", kinds, indirect=True, scope="module")


@pytest.fixture(scope="module")
def machine(request: pytest.FixtureRequest) -> Generator[object, None, None]:
    """The machine that kernels are launched on, in shuffled order; None where that is a GPU or Triton's interpreter."""
    if request.param is None:
        yield None
        return
    from ptx.launcher import Machine

    device = Machine(request.param, seed=0)
    with device.installed():
        yield device


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """The order of a test's launches is its own, whatever ran before."""
    device = getattr(item, "funcargs", {}).get("machine")
    if device is not None:
        device.launches = 0
