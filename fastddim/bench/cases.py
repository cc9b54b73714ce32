"""What a comparison is made of: cases, their candidates, and what keeps either from running on a machine."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastddim.bench.profiles import Operation

Call = Callable[[], Sequence[Any]]
# Why something cannot run here; None where it can.
Needs = Callable[[], str | None]

# The largest error over the result's largest magnitude. float32, and diffusers' float32 alphas_cumprod, cost a tenth of it.
TOLERANCE = 2e-5

NEEDS_GPU = "needs a GPU"
LEFT_OUT = "left out by --quick"

# What users would pick instead, as `--baseline` takes them.
BASELINES = (
    "diffusers",
    "compile-reduce-overhead",
    "compile-max-autotune",
    "compile-step",
    "cuda-graph",
    "eager",
    "onnxruntime",
    "aotinductor",
    "tensorrt",
    "torch-tensorrt",
    "import",
)


@dataclass(frozen=True)
class Scope:
    """The sizes, the device and the method of a run.

    Attributes:
        quick: small sizes, and only what needs no long preparation.
        device: where candidates run, `cpu` or `cuda`.
        method: the sampling method of the loop suite; None is DDIM, against all that users would pick instead.
    """

    quick: bool = False
    device: str = "cpu"
    method: str | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Work:
    """What a candidate made of a case's inputs, where there is more to it than a call.

    Attributes:
        call: the work to verify and time.
        facts: numbers to report besides times, asked for after the timing.
        parts: what the call's time goes to, seconds by `breakdown.PARTS`, measured after the timing.
        operations: a profile of the call, where torch's profiler would not see its operations.
    """

    call: Call
    facts: Callable[[], dict[str, float]] = dict
    parts: Callable[[], dict[str, float]] = dict
    operations: Callable[[], list[Operation]] | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to do a case's work.

    Attributes:
        name: its name in reports.
        make: from the case's inputs, which it must not modify, to the call that is verified and timed; the call
            returns the case's results as tensors or arrays.
        baseline: which of `BASELINES` it is; None for ours.
        needs: says what this machine lacks for it.
        target: the least ratio of its time to ours that meets the bar, where it is another one than the case's.
        slack: in half precision, how many times the case's tolerance its error may be, for the rounding after each operation.
    """

    name: str
    make: Callable[[Any], Call | Work]
    baseline: str | None = None
    needs: Needs = lambda: None
    slack: float = 1.0
    target: float | None = None


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        suite: the suite it belongs to.
        name: unique in the suite.
        candidates: ours first, then the baselines.
        inputs: makes the inputs that the candidates share.
        reference: from the inputs to the expected results, float64 arrays.
        target: the least ratio of diffusers' time to ours that meets the bar; None without one.
        tolerance: the largest error, relative to the largest magnitude of each expected result; or a function of inputs
            and expected results that gives it.
        blocks: how often results repeat the rows of the expected ones.
        device: where it runs, `cpu` or `cuda`.
        needs: what this machine lacks for the whole case; None if it can run.
        nbytes: bytes that a call has to read and write at least.
        num_steps: sampling steps in a call.
        about: elements, dtype, model, batch and the like, for plots and tables.
    """

    suite: str
    name: str
    candidates: tuple[Candidate, ...]
    inputs: Callable[[], Any]
    reference: Callable[[Any], Sequence[Any]]
    target: float | None = None
    tolerance: float | Callable[[Any, Sequence[Any]], float] = TOLERANCE
    blocks: int = 1
    device: str = "cpu"
    needs: str | None = None
    nbytes: int | None = None
    num_steps: int = 1
    about: dict[str, Any] = field(default_factory=dict)


def installed(package: str, remedy: str | None = None) -> Needs:
    """Needs a package."""

    def needs() -> str | None:
        if importlib.util.find_spec(package):
            return None
        return f"not installed: {package}" + (f" ({remedy})" if remedy else "")

    return needs


def a_gpu() -> str | None:
    """Needs a CUDA device."""
    import torch

    return None if torch.cuda.is_available() else NEEDS_GPU


def a_compiler() -> str | None:
    """Needs a compiler for the code that `torch.compile` generates: triton on a GPU, a C++ compiler on a CPU."""
    import torch

    if torch.cuda.is_available():
        return installed("triton")()
    return None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "not installed: a C++ compiler"


def all_of(*needs: Needs) -> Needs:
    """Needs several things; names the first that is missing."""
    return lambda: next(filter(None, (need() for need in needs)), None)


def unless_quick(scope: Scope, *candidates: Candidate) -> list[Candidate]:
    """Candidates that take too long for `--quick`, which leaves out those that could run."""
    if not scope.quick:
        return list(candidates)
    return [replace(each, needs=all_of(each.needs, lambda: LEFT_OUT)) for each in candidates]
