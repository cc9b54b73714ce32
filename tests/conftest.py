import os
from collections.abc import Generator

# Before anything imports triton: kernels run in its interpreter where there is no GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# The tests' tensors are small: on a busy machine torch's threads wait for each other 20 times as long as they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

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
