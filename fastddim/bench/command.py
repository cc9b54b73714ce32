"""`fastddim bench`, which `python -m fastddim.bench` is too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fastddim.bench.cases import Scope
from fastddim.cli_options import choice, integer, number, pick_device
from fastddim.config import require_choice, require_int
from fastddim.files import check_writable

if TYPE_CHECKING:
    from fastddim.bench.timing import Row

FAILED = 1

_PIPE_WIDTH = 1000
_DEVICES = ("cpu", "cuda")

app = typer.Typer()


@app.command()
def bench(
    suite: Annotated[str, choice(help="step, loop, export, serve, import or all.")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, and nothing that compiles for long.")] = False,
    case: Annotated[
        list[str] | None, typer.Option("--case", metavar="PATTERN", help="Cases whose name has this in it, or fits it.")
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option("--baseline", metavar="NAME", help="These baselines alone, beside ours.")
    ] = None,
    method: Annotated[
        str | None, choice(help="Loop suite: this sampling method, against diffusers' scheduler of it.")
    ] = None,
    device: Annotated[str | None, choice(help="cpu or cuda. Default: cuda where there is one.")] = None,
    minutes: Annotated[
        float | None,
        number(help="Start no further case after so many minutes."),
    ] = None,
    threads: Annotated[
        int | None,
        integer(help="torch's, on a CPU. Default: one a core; with --quick one in all."),
    ] = None,
    allocator: Annotated[
        str, choice(help="Memory of large CPU tensors: keep (reused), fresh (new from the kernel) or system.")
    ] = "keep",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the results here, after every case that is done."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table here.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write plots into this folder.")] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="CASE", help="Instead, print the ten costliest operations of each candidate of this case."
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare the ratios with those of an earlier --json; 1 if worse."),
    ] = None,
) -> int:
    """Verify every candidate, then time them in turn.

    The candidates are ours and what users would pick instead. A table also says what a loop's time goes to, measured in a
    run of its own: the model, what is hoisted out of the loop, the step, the host. With --explain nothing is verified, and
    --json is what is printed. The status is 1 if one was wrong or raised, or a ratio is
    worse than in the file to compare with.
    """
    from fastddim.bench import report, table
    from fastddim.bench.compare import compare as compare_runs
    from fastddim.bench.compare import has_regressed
    from fastddim.bench.run import has_failed, pick_threads, run_suite
    from fastddim.bench.timing import ALLOCATORS

    require_choice("--allocator", allocator, ALLOCATORS)
    if threads is not None:
        require_int("--threads", threads, 1)
    if minutes is not None and not 0 < minutes < float("inf"):
        raise ValueError(f"--minutes: {minutes!r}; pass a number above 0")
    files = [(option, path) for option, path in (("--json", json_file), ("--markdown", markdown)) if path is not None]
    for option, path in files:
        check_writable(path, option)
    if len({path.resolve() for _, path in files}) < len(files):
        raise ValueError(f"--json, --markdown: both {str(json_file)!r}; pass two files")
    if plot is not None:
        from fastddim.bench import plots

        plots.check_plots(plot)
    old = None if compare is None else report.read_report(compare, "--compare")
    if device is not None:
        require_choice("--device", device, _DEVICES)
    place = pick_device(device).type

    console = Console(stderr=True)
    output = Console()
    # A pipe has no width to fit.
    output = Console(width=None if output.is_terminal else _PIPE_WIDTH)
    # torch's profiler would write a line of its own for each profile.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    if explain is not None:
        others = {"--case": case, "--minutes": minutes, "--markdown": markdown, "--plot": plot, "--compare": compare}
        for option, value in others.items():
            if value:
                raise ValueError(f"--explain: {explain!r} with {option}; leave one of them out")
        pick_threads(threads, quick, place)
        return _explain(explain, suite, Scope(quick, place, method), baseline or (), json_file, output, console)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        made = run_suite(
            suite,
            place,
            quick,
            case or (),
            baseline or (),
            allocator,
            minutes,
            threads=threads,
            method=method,
            json_file=json_file,
            on_visit=lambda case, total: bar.update(
                task, advance=1, total=total, description=f"{case.suite}: {case.name}"
            ),
        )
    rows = report.rows_of(made)
    output.print("\n".join(report.describe_environment(made)), markup=False, highlight=False)
    table.print_rows(rows, output)
    if markdown is not None:
        report.write_text("--markdown", markdown, report.make_markdown(made))
    if plot is not None:
        for path in plots.draw_all(made, plot):
            output.print(str(path), markup=False, highlight=False)
    _show_failures(rows, console)
    if old is None:
        return FAILED if has_failed(made) else 0
    changes = compare_runs(old["rows"], rows)
    table.print_changes(changes, output)
    return FAILED if has_failed(made) or has_regressed(changes) else 0


def _explain(
    name: str,
    suite: str,
    scope: Scope,
    baselines: Sequence[str],
    json_file: Path | None,
    output: Console,
    console: Console,
) -> int:
    from fastddim.bench import report, table
    from fastddim.bench.explain import choose_case, explain_case, make_explanation
    from fastddim.bench.timing import FAILURES

    case = choose_case(name, suite, scope, baselines)
    with console.status(Text(f"{case.suite}: {case.name}")):
        explanations = explain_case(case)
    made = make_explanation(case, explanations)
    if json_file is not None:
        report.write_text("--json", json_file, report.make_json(made))
    output.print(Text(f"{case.suite}: {case.name}, {made['environment']['threads']} threads, {case.device}"))
    table.print_explanations(explanations, output)
    return FAILED if any(each.status in FAILURES for each in explanations) else 0


def _show_failures(rows: Sequence[Row], console: Console) -> None:
    from fastddim.bench.timing import FAILURES

    for row in rows:
        if row.status in FAILURES:
            line = f"{row.status}: {row.suite}: {row.case}: {row.candidate}: {row.message}"
            console.print(Text(line, style="red"), soft_wrap=True)
