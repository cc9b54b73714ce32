"""`python -m fastddim.bench`: status 0, 1 if a candidate was wrong or raised, 2 for an error of the user's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fastddim.bench import report
from fastddim.bench.cases import SUITES, Case
from fastddim.bench.timing import ALLOCATORS, OK, QUICK, Row, Settings, run_case, set_allocator
from fastddim.config import require_choice
from fastddim.files import check_writable

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130

_ALL = "all"
_PIPE_WIDTH = 160
# typer may bring its own copy of click, and exports of it only this subclass of the usage error.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(name="fastddim.bench", add_completion=False, pretty_exceptions_enable=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks' command line and return its exit status.

    Args:
        arguments: without the program's name; `sys.argv` by default.
    """
    try:
        status = app(
            args=None if arguments is None else list(arguments),
            prog_name="python -m fastddim.bench",
            standalone_mode=False,
        )
    except _UsageError as error:
        return _fail(f"{error.format_message()} See --help.")
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return status if isinstance(status, int) else 0


def _fail(message: str) -> int:
    Console(stderr=True).print(Text(f"error: {' '.join(message.split())}", style="red"), soft_wrap=True)
    return USER_ERROR


@app.command()
def bench(
    suite: Annotated[str, typer.Option(help=f"One of {', '.join([*SUITES, _ALL])}.")] = _ALL,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes and few rounds: does everything work?")] = False,
    allocator: Annotated[
        str,
        typer.Option(help=f"Memory of large tensors, reused or new from the kernel: one of {', '.join(ALLOCATORS)}."),
    ] = ALLOCATORS[0],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results here.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table here.")] = None,
) -> int:
    """Verify every candidate against a float64 computation, then time ours and the baselines in turn."""
    require_choice("--suite", suite, [*SUITES, _ALL])
    require_choice("--allocator", allocator, ALLOCATORS)
    files = [(option, path) for option, path in (("--json", json_file), ("--markdown", markdown)) if path is not None]
    for option, path in files:
        check_writable(path, option)
    if len({path.resolve() for _, path in files}) < len(files):
        raise ValueError(f"--json, --markdown: both {str(json_file)!r}; pass two files")
    chosen = SUITES if suite == _ALL else {suite: SUITES[suite]}
    cases = [case for make_cases in chosen.values() for case in make_cases(quick)]
    in_force = set_allocator(allocator)
    rows = _run(cases, QUICK if quick else Settings())

    output = Console()
    # A pipe has no width to fit, and a table folded to 80 columns cannot be read.
    Console(width=None if output.is_terminal else _PIPE_WIDTH).print(report.make_table(rows))
    result = report.make_report(rows, suite, quick, in_force)
    for option, path in files:
        text = report.make_json(result) if option == "--json" else report.make_markdown(result, rows)
        report.write_text(option, path, text)
    failed = [row for row in rows if row.status != OK]
    for row in failed:
        line = f"{row.status}: {row.suite}: {row.case}: {row.candidate}: {row.message}"
        Console(stderr=True).print(Text(line, style="red"), soft_wrap=True)
    return FAILED if failed else 0


def _run(cases: Sequence[Case], settings: Settings) -> list[Row]:
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    rows: list[Row] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(cases))
        for case in cases:
            bar.update(task, description=f"{case.suite}: {case.name}")
            rows += run_case(case, settings)
            bar.advance(task)
    return rows


if __name__ == "__main__":
    sys.exit(main())
