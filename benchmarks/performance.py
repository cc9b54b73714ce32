"""Write `docs/performance.md`, the methods' section of `docs/quality.md` and their plots: `make performance`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import quality

from fastddim.bench import plots, report
from fastddim.bench.suites import SUITES
from fastddim.bench.timing import OK

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
PAGE, QUALITY_PLOT = "performance.md", "quality-time.png"
QUALITY_PAGE, METHODS_PLOT = "quality.md", "quality-methods.png"

_CAPTIONS = {
    plots.STEP_PLOT: "Latency of one step against size",
    plots.LOOP_PLOT: "What a sampling step's time goes to",
    QUALITY_PLOT: "Quality against time",
}


def load(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The reports of the bench and the quality results in a folder, by file name: a GPU's first, then the newest day's."""
    read = {path.name: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}
    reports = {name: value for name, value in read.items() if report.is_report(value)}
    suites = {suite: index for index, suite in enumerate(SUITES)}
    order = sorted(reports, key=lambda name: suites.get(reports[name]["suite"], len(suites)))
    order.sort(key=lambda name: (_on_gpu(reports[name]), reports[name]["created"][:10]), reverse=True)
    qualities = {name: value for name, value in read.items() if quality.is_quality(value)}
    return {name: reports[name] for name in order}, qualities


def make_page(folder: Path, docs: Path) -> str:
    """The page's text; it shows the plots that are in `docs`."""
    reports, qualities = load(folder)
    lines = [
        "# Performance",
        "",
        "Written by `make performance` from [benchmarks/results](../benchmarks/results); do not edit. Each table is one run"
        " of `python -m fastddim.bench` on one machine, in which every candidate was right before it was timed, and the"
        " candidates of a case took turns. **ratio** is a candidate's time over that of the case's first one, ours, round"
        " by round: compare ratios within a table, not times between tables.",
        "",
        "`cold` is the first call. `median`, `p20`, `p80` and `p99` are of the warm rounds, per call: a step, or a whole run."
        " `of copy` is what a call has to read and write at least, a second, over what a copy of a large tensor does; small"
        " states are in caches, and may be above 100%. `model`, `hoisted` (before the loop), `step` and `host` (the rest) are"
        " what the median goes to, by a run of its own, with timers or a profiler; in results without `host` the same work"
        " done alone. `fastddim bench --explain CASE` prints a case's costliest operations.",
        "",
    ]
    if not any(_on_gpu(each) for each in reports.values()):
        lines += ["No result from a GPU is here yet: `make gpu` measures one.", ""]
    for name, caption in _CAPTIONS.items():
        if name != QUALITY_PLOT and (docs / name).exists():
            lines += [f"![{caption}]({name})", ""]
    for name, result in qualities.items():
        lines += ["## Quality against time", ""]
        if (docs / QUALITY_PLOT).exists():
            lines += [f"![{_CAPTIONS[QUALITY_PLOT]}]({QUALITY_PLOT})", ""]
        lines += [*quality.make_markdown(result), "", f"From [{name}](../benchmarks/results/{name}).", ""]
    for name, result in reports.items():
        rows = report.rows_of(result)
        quick = ", quick" if result["quick"] else ""
        lines += [
            f"## Suite {result['suite']}{quick}, {result['created'][:10]}, {_device(result)}",
            "",
            *(f"- {line}" for line in report.describe_environment(result)),
            f"- allocator {result['allocator']}, [{name}](../benchmarks/results/{name})",
            "",
            *report.markdown_table(rows),
            "",
            *(f"Not run: {line}.\n" for line in report.describe_absent(rows)),
        ]
    return "\n".join(lines).rstrip() + "\n"


def load_methods(folder: Path) -> dict[str, Any] | None:
    """The newest result of `examples/quality_methods.py` in a folder; None without one."""
    read = (json.loads(path.read_text("utf-8")) for path in folder.glob("*.json"))
    return max(filter(quality.is_methods, read), key=lambda value: str(value["created"]), default=None)


def make_quality_page(folder: Path, docs: Path) -> str:
    """The quality page with the methods' section that a folder's results give."""
    text = (docs / QUALITY_PAGE).read_text("utf-8").partition(quality.METHODS_HEADING)[0].rstrip() + "\n"
    methods = load_methods(folder)
    return text if methods is None else "\n".join([text, *quality.make_methods_markdown(methods, METHODS_PLOT), ""])


def draw_plots(folder: Path, docs: Path) -> list[Path]:
    """Draw each plot from the first report that has the numbers."""
    reports, qualities = load(folder)
    drawn: list[Path] = []
    for name, suite in ((plots.STEP_PLOT, "step"), (plots.LOOP_PLOT, "loop")):
        for result in reports.values():
            rows = [row for row in result["rows"] if row["suite"] == suite and row["status"] == OK]
            written = plots.draw_all({**result, "rows": rows}, docs)
            if docs / name in written:
                drawn.append(docs / name)
                break
    for result in qualities.values():
        plots.save(quality.draw(result), docs / QUALITY_PLOT)
        drawn.append(docs / QUALITY_PLOT)
    methods = load_methods(folder)
    if methods is not None:
        plots.save(quality.draw_methods(methods), docs / METHODS_PLOT)
        drawn.append(docs / METHODS_PLOT)
    return drawn


def _on_gpu(result: dict[str, Any]) -> bool:
    return any(row.get("device") == "cuda" for row in result["rows"])


def _device(result: dict[str, Any]) -> str:
    gpu = result["environment"].get("gpu")
    return str(gpu["name"]) if gpu and _on_gpu(result) else f"CPU, threads: {result['environment']['threads']}"


def main() -> int:
    for path in draw_plots(RESULTS, DOCS):
        print(path.relative_to(ROOT))
    for name, make in ((PAGE, make_page), (QUALITY_PAGE, make_quality_page)):
        report.write_text("docs", DOCS / name, make(RESULTS, DOCS))
        print((DOCS / name).relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
