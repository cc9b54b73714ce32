"""The registry: which suites there are, and which of their cases and candidates a run takes."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import replace

from fastddim.bench.cases import BASELINES, Case, Scope
from fastddim.bench.export_suite import export_suite
from fastddim.bench.import_suite import import_suite
from fastddim.bench.loop_suite import loop_suite
from fastddim.bench.scheduler_loop import class_of
from fastddim.bench.serve_suite import serve_suite
from fastddim.bench.step_suite import step_suite
from fastddim.config import require_choice

SUITES: dict[str, Callable[[Scope], list[Case]]] = {
    "step": step_suite,
    "loop": loop_suite,
    "export": export_suite,
    "serve": serve_suite,
    "import": import_suite,
}
ALL = "all"


def select_cases(suite: str, scope: Scope, patterns: Sequence[str] = (), baselines: Sequence[str] = ()) -> list[Case]:
    """The cases of a suite, or of all, that a run takes.

    Args:
        suite: one of `SUITES`, or `all`.
        scope: sizes, device and method of the run.
        patterns: parts of case names, or shell patterns of whole ones, of which a case fits any; all cases where there is none.
        baselines: names of `BASELINES` to keep beside ours; all where none is named.

    Raises:
        ValueError: an unknown suite, baseline or method, a method for another suite, or a pattern that fits no case; the
            message lists what is valid.
    """
    require_choice("--suite", suite, [*SUITES, ALL])
    for baseline in baselines:
        require_choice("--baseline", baseline, BASELINES)
    if scope.method is not None:
        class_of(scope.method)
        if suite != "loop":
            raise ValueError(f"--method: {scope.method!r} with --suite {suite}; pass --suite loop")
    chosen = SUITES if suite == ALL else {suite: SUITES[suite]}
    cases = [case for make_cases in chosen.values() for case in make_cases(scope)]
    for pattern in patterns:
        if not any(_fits(case, pattern) for case in cases):
            known = ", ".join(sorted({case.name for case in cases}))
            raise ValueError(f"--case: {pattern!r} fits none of {known}")
    if patterns:
        cases = [case for case in cases if any(_fits(case, pattern) for pattern in patterns)]
    if baselines:
        cases = [
            replace(case, candidates=tuple(each for each in case.candidates if each.baseline in (None, *baselines)))
            for case in cases
        ]
    return cases


def _fits(case: Case, pattern: str) -> bool:
    # Names have brackets, which fnmatch would take for sets of characters.
    escaped = pattern.replace("[", "[[]")
    return pattern in case.name or fnmatch.fnmatchcase(case.name, escaped)
