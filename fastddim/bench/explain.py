"""The costliest operations of one case's candidates: `fastddim bench --explain`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastddim.bench.breakdown import seconds_of
from fastddim.bench.cases import Candidate, Case, Scope, Work
from fastddim.bench.profiles import Operation, torch_operations
from fastddim.bench.report import environment
from fastddim.bench.suites import select_cases
from fastddim.bench.timing import ABSENT, OK, noting, set_allocator

FORMAT = 1
SHOWN = 10
_SUGGESTED = 5
_LISTED = 12


@dataclass
class Explanation:
    """What a candidate's call consists of.

    Attributes:
        status, message: as a `Row`'s.
        call_s: seconds of a warm call without a profiler.
        operations_s: seconds in all operations, in a call under a profiler, which slows short ones.
        operations: the costliest ones.
        num_operations: how many kinds of them there are.
    """

    candidate: str
    status: str = OK
    message: str | None = None
    call_s: float | None = None
    operations_s: float = 0.0
    operations: list[Operation] = field(default_factory=list)
    num_operations: int = 0


def find_case(cases: Sequence[Case], name: str) -> Case:
    """The case of this name, or of a name that this is a part of, as `policy [1,16,7] x10` or `loop: policy [1,16,7] x10`.

    Raises:
        ValueError: no such case, or several; the message lists close names, or those.
    """
    named = {f"{case.suite}: {case.name}": case for case in cases}
    exact = [full for full, case in named.items() if name in (full, case.name)]
    fitting = exact or [full for full in named if name in full]
    if len(fitting) == 1:
        return named[fitting[0]]
    if fitting:
        left = f" and {len(fitting) - _LISTED} others" if len(fitting) > _LISTED else ""
        raise ValueError(
            f"--explain: {name!r} is a part of {_listed(fitting[:_LISTED])}{left}; pass the name of one of them"
        )
    short = {case.name: full for full, case in named.items()}
    close = difflib.get_close_matches(name, [*named, *short], _SUGGESTED, cutoff=0.0)
    raise ValueError(
        f"--explain: {name!r} is no case; pass one of {_listed([short.get(each, each) for each in close])}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(names)))


def choose_case(name: str, suite: str, scope: Scope, baselines: Sequence[str] = ()) -> Case:
    """The case of a suite, or of all, that can run here; arguments and errors as `select_cases`' and `find_case`'s."""
    case = find_case(select_cases(suite, scope, (), baselines), name)
    if case.needs is not None:
        raise ValueError(f"--explain: {case.suite}: {case.name} does not run here: {case.needs}")
    return case


def explain_case(case: Case, shown: int = SHOWN) -> list[Explanation]:
    """The costliest operations of each candidate's warm call, without autograd. Results are not verified."""
    import torch

    set_allocator("keep")
    with torch.no_grad():
        inputs = case.inputs()
        return [_explain(candidate, inputs, case.device, shown) for candidate in case.candidates]


def _compiled_kernels_named() -> Any:
    """What Inductor compiles for a CPU here tells profilers of its kernels."""
    from torch._inductor import config

    return config.patch({"cpp.enable_kernel_profile": True})


def _explain(candidate: Candidate, inputs: Any, device: str, shown: int) -> Explanation:
    made = Explanation(candidate.name)
    missing = candidate.needs()
    if missing is not None:
        made.status, made.message = ABSENT, missing
        return made
    with noting(made), _compiled_kernels_named():
        work = candidate.make(inputs)
        work = work if isinstance(work, Work) else Work(work)
        for _ in range(2):
            work.call()
        made.call_s = seconds_of(work.call, device)
        operations = work.operations() if work.operations is not None else torch_operations(work.call, device)
        made.operations_s = sum(each.self_s for each in operations)
        made.operations, made.num_operations = operations[:shown], len(operations)
    return made


def make_explanation(case: Case, explanations: Sequence[Explanation]) -> dict[str, Any]:
    """What `--json` writes."""
    return {
        "format": FORMAT,
        "suite": case.suite,
        "case": case.name,
        "num_steps": case.num_steps,
        "device": case.device,
        "environment": environment(),
        "explanations": [asdict(each) for each in explanations],
    }
