"""Tables for the terminal: each case under its name, in as many columns as there is room for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastddim.bench.compare import BETTER, MISSING, TOLERANCE, WORSE, Change
from fastddim.bench.explain import Explanation
from fastddim.bench.report import (
    TEXT_COLUMNS,
    attempted,
    cells_of,
    columns_of,
    describe_absent,
    format_seconds,
    groups_of,
)
from fastddim.bench.timing import ABSENT, FAILURES, Row

# What a narrow terminal shows in any case, and what it leaves out first.
_KEPT, _FIRST_OUT = ("candidate", "median", "ratio", "target"), (["p99"], ["p20", "p80"])
_STYLES = {WORSE: "red", BETTER: "green", MISSING: "dim"}

# Wider than any table.
_UNBOUNDED = 10_000

# A row's cells by heading, and its style.
_Line = tuple[Mapping[str, str | Text], str | None]


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print the times of candidates that ran, then what did not run and why.

    Columns for which the console is too narrow are left out and named.
    """
    shown = [row for row in attempted(rows) if row.status != ABSENT]
    columns = [heading for heading in columns_of(shown) if heading != "case"]
    groups = {f"{group[0].suite}: {group[0].case}": [_line(row) for row in group] for group in groups_of(shown)}
    hidden: list[str] = []
    unbounded = console.options.update(max_width=_UNBOUNDED)
    for headings in [*_FIRST_OUT, *([heading] for heading in reversed(columns) if heading not in _KEPT)]:
        if console.measure(_make_table(columns, groups), options=unbounded).maximum <= console.width:
            break
        hidden += [heading for heading in headings if heading in columns]
        columns = [heading for heading in columns if heading not in headings]
    console.print(_make_table(columns, groups))
    notes = ["ratio: a candidate's time over ours, round by round; above 1 ours is faster"]
    if hidden:
        notes.append(f"without room here, but in --json and --markdown: {', '.join(hidden)}")
    absent = Counter(f"{row.candidate}: {row.message}" for row in attempted(rows) if row.status == ABSENT)
    notes += [f"not run: {line}" + (f", in {count} cases" if count > 1 else "") for line, count in absent.items()]
    notes += [f"not run: {line}" for line in describe_absent(rows)]
    for note in notes:
        console.print(Text(note, style="dim"))


def print_explanations(explanations: Sequence[Explanation], console: Console) -> None:
    """Print a table for each candidate: its costliest operations."""
    for each in explanations:
        console.print(Text(each.candidate, style="bold"))
        if each.call_s is None:
            known = each.message or ""
            text = f"not run: {known}" if each.status == ABSENT else f"{each.status.upper()}: {known}"
            console.print(Text(text, style="dim" if each.status == ABSENT else "red"))
            continue
        call, total = format_seconds(each.call_s), format_seconds(each.operations_s)
        console.print(f"a call {call}; in a profile {total} in {each.num_operations} operations", highlight=False)
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("operation", overflow="fold")
        for heading in ("calls", "self", "share"):
            table.add_column(heading, justify="right", no_wrap=True)
        for op in each.operations:
            share = op.self_s / each.operations_s if each.operations_s else 0.0
            table.add_row(Text(op.name), str(op.calls), format_seconds(op.self_s), f"{share:.1%}")
        console.print(table)
    console.print(Text("self: without the operations that it calls; share: of all operations", style="dim"))


def print_changes(changes: Sequence[Change], console: Console) -> None:
    """Print what became of the ratios of an earlier run."""
    groups: dict[str, list[_Line]] = {}
    for change in changes:
        cells = {"candidate": change.candidate, "then": f"{change.old:.2f}x", "verdict": change.verdict}
        if change.new is not None:
            cells |= {"now": f"{change.new:.2f}x", "change": f"{change.new / change.old - 1:+.1%}"}
        groups.setdefault(f"{change.suite}: {change.case}", []).append((cells, _STYLES.get(change.verdict)))
    title = f"Ratios, then and now; worse: lower by more than {TOLERANCE:.0%}, and beyond both runs' p20 to p80"
    console.print(Text(title, style="italic"))
    console.print(_make_table(("candidate", "then", "now", "change", "verdict"), groups))


def _line(row: Row) -> _Line:
    cells: dict[str, str | Text] = {**cells_of(row)}
    if row.status in FAILURES:
        # The whole message is printed as an error.
        return {**cells, "candidate": f"{row.candidate}: {row.status.upper()}"}, "red"
    if row.target_met is not None:
        cells["target"] = Text(str(cells["target"]), style="green" if row.target_met else "yellow")
    return cells, None


def _make_table(columns: Sequence[str], groups: Mapping[str, Sequence[_Line]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in columns:
        text = heading in (*TEXT_COLUMNS, "verdict")
        # What is too long for any column is folded, never cut.
        table.add_column(heading, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for name, lines in groups.items():
        # Text, as names hold brackets that rich would read as markup.
        table.add_row(Text(name, style="bold"))
        for cells, style in lines:
            texts = [cells.get(heading, "") for heading in columns]
            texts = [each if isinstance(each, Text) else Text(each) for each in texts]
            table.add_row(*texts, style=style, end_section=cells is lines[-1][0])
    return table
