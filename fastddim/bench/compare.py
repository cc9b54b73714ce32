"""Two runs side by side, by ratios alone: absolute times drift from machine to machine and from day to day."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastddim.bench.timing import OK, Row

# A ratio that is lower by less than this is no regression, however steady both runs were.
TOLERANCE = 0.05

WORSE, BETTER, SAME, MISSING = "worse", "better", "same", "not in this run"


@dataclass(frozen=True)
class Change:
    """A baseline's ratio, its time over ours, in two runs.

    Attributes:
        old, new: the ratio in each run; `new` is None where this run has none.
        verdict: `worse` if ours lost against it by more than the tolerance and beyond both runs' p20 to p80.
    """

    suite: str
    case: str
    candidate: str
    old: float
    new: float | None
    verdict: str


def compare(old: Sequence[Row], new: Sequence[Row], tolerance: float = TOLERANCE) -> list[Change]:
    """The changes of all ratios of the older run, matched by device, suite, case and candidate.

    Raises:
        ValueError: the runs have no ratio in common.
    """
    measured = {(row.device, *_key(row)): row for row in new if row.status == OK and row.ratio is not None}
    changes = []
    for row in old:
        if row.status != OK or row.ratio is None:
            continue
        now = measured.get((row.device, *_key(row)))
        verdict = MISSING if now is None else _judge(row, now, tolerance)
        changes.append(Change(*_key(row), row.ratio, None if now is None else now.ratio, verdict))
    if all(change.verdict == MISSING for change in changes):
        raise ValueError(
            "--compare: no case and candidate of that file has a ratio in this run; compare the same suite on a"
            " device of the same kind"
        )
    return changes


def has_regressed(changes: Sequence[Change]) -> bool:
    """Whether some ratio became worse."""
    return any(change.verdict == WORSE for change in changes)


def _judge(old: Row, new: Row, tolerance: float) -> str:
    assert old.ratio is not None and new.ratio is not None
    assert old.ratio_p20 is not None and old.ratio_p80 is not None
    assert new.ratio_p20 is not None and new.ratio_p80 is not None
    if new.ratio < old.ratio * (1 - tolerance) and new.ratio_p80 < old.ratio_p20:
        return WORSE
    if new.ratio > old.ratio * (1 + tolerance) and new.ratio_p20 > old.ratio_p80:
        return BETTER
    return SAME


def _key(row: Row) -> tuple[str, str, str]:
    return row.suite, row.case, row.candidate
