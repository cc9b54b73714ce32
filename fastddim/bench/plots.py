"""Plots of a report: step latency against size with the roofline, and what loops spend their time on."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddim.bench.breakdown import PARTS
from fastddim.bench.report import rows_of
from fastddim.bench.timing import OK, Row
from fastddim.files import check_folder, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEP_PLOT, LOOP_PLOT = "step-latency.png", "loop-breakdown.png"

# Okabe and Ito's palette, which readers tell apart who do not see all colours.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
_PART_COLOURS = {
    "model": _COLOURS[0], "hoisted": _COLOURS[3], "step": _COLOURS[1], "host": _COLOURS[2], "run": _COLOURS[6],
}  # fmt: skip
_PART_LABELS = {"hoisted": "hoisted, before the loop", "run": "not broken down"}
_MARKERS = "osD^vPX*"
_DPI = 130
# Fewer make no line.
_LEAST_SIZES = 3


def check_plots(folder: Path) -> None:
    """Refuse before a run what `draw_all` could not do.

    Raises:
        ValueError: matplotlib is missing.
        OSError: a folder that is not there, or cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: matplotlib is not installed; pip install 'fastddim[bench]'")
    check_folder(folder, "--plot")


def draw_all(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots that the report has numbers for; returns their paths."""
    rows = [row for row in rows_of(report) if row.status == OK and row.median_s is not None]
    drawn = []
    sizes = [row for row in rows if row.suite == "step" and row.about.get("option") == "size"]
    if len({row.about["elements"] for row in sizes if row.about["dtype"] == "float32"}) >= _LEAST_SIZES:
        drawn.append((folder / STEP_PLOT, _draw_step(sizes, report)))
    loops = [row for row in rows if row.suite == "loop"]
    if any(row.parts for row in loops):
        drawn.append((folder / LOOP_PLOT, _draw_loops(loops, report)))
    for path, figure in drawn:
        save(figure, path)
    return [path for path, _ in drawn]


def save(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all."""
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=_DPI, bbox_inches="tight"), "--plot")


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure that belongs to no window, with its axes in reading order; `heights` are the rows', to each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    return figure, list(axes.flat)


def style_of(index: int) -> dict[str, Any]:
    """Colour and marker of the line of this number."""
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)], "markersize": 5}


def where(report: dict[str, Any], rows: Sequence[Row]) -> str:
    """The device, for a plot's title."""
    known = report["environment"]
    if rows and rows[0].device == "cuda" and known.get("gpu"):
        return str(known["gpu"]["name"])
    return f"CPU: {known['device']}, threads: {known['threads']}"


def _draw_step(rows: Sequence[Row], report: dict[str, Any]) -> Figure:
    """Latency against the number of elements, a panel for each dtype, with the time of a copy of as many bytes."""
    dtypes = [
        dtype
        for dtype in ("float32", "float16", "bfloat16")
        if len({row.about["elements"] for row in rows if row.about["dtype"] == dtype}) >= _LEAST_SIZES
    ]
    figure, panels = new_figure(5.2 * len(dtypes) + 1.5, 4.4, columns=len(dtypes))
    names = list(dict.fromkeys(row.candidate for row in rows))
    bandwidth = report.get("copy_gb_per_s")
    for dtype, axes in zip(dtypes, panels, strict=True):
        for index, name in enumerate(names):
            line = sorted(
                (row for row in rows if row.candidate == name and row.about["dtype"] == dtype),
                key=lambda row: row.about["elements"],
            )
            sizes = [row.about["elements"] for row in line]
            axes.plot(sizes, [1e6 * (row.median_s or 0) for row in line], label=name, **style_of(index))
            axes.fill_between(
                sizes,
                [1e6 * (row.p20_s or 0) for row in line],
                [1e6 * (row.p80_s or 0) for row in line],
                color=style_of(index)["color"],
                alpha=0.15,
                linewidth=0,
            )
        ours = [row for row in rows if row.ours and row.about["dtype"] == dtype and row.gb_per_s and row.median_s]
        if bandwidth and ours:
            floor = {row.about["elements"]: row.gb_per_s * row.median_s / bandwidth for row in ours}  # type: ignore[operator]
            sizes = sorted(floor)
            label = f"roofline: a copy's {bandwidth:.3g} GB/s"
            axes.plot(sizes, [1e6 * floor[size] for size in sizes], "--", color="black", label=label)
        axes.set(xscale="log", yscale="log", xlabel="elements of the state", title=dtype)
        axes.set_xscale("log", base=2)
        axes.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("one step (µs)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"One DDIM step, median and p20 to p80\n{where(report, rows)}")
    return figure


def _draw_loops(rows: Sequence[Row], report: dict[str, Any]) -> Figure:
    """A panel for each network at batch 1: bars of what its runs' time goes to, per step."""
    chosen: dict[str, list[Row]] = {}
    for row in rows:
        if row.about["batch"] == 1:
            chosen.setdefault(row.about["model"], []).append(row)
    cases = []
    for group in chosen.values():
        # The network's run with most candidates, which is the usual one.
        ((case, _),) = Counter(row.case for row in group).most_common(1)
        cases.append([row for row in group if row.case == case])
    heights = [0.34 * len(group) + 0.75 for group in cases]
    figure, panels = new_figure(9.5, 1.4 + sum(heights), rows=len(cases), heights=heights)
    for axes, group in zip(panels, cases, strict=True):
        _draw_breakdown(axes, group)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"Time per sampling step at batch 1, whole runs\n{where(report, rows)}")
    return figure


def _draw_breakdown(axes: Axes, rows: Sequence[Row]) -> None:
    seconds = [(row.median_s or 0) / row.num_steps for row in rows]
    unit, scale = ("ms", 1e3) if max(seconds) >= 1e-3 else ("µs", 1e6)
    for place, (row, total) in enumerate(zip(rows, (scale * each for each in seconds), strict=True)):
        left = 0.0
        parts = dict(row.parts) or {"run": row.median_s or 0.0}
        if not {"host", "run"} & parts.keys():
            # An older file's are of the work done alone, which on a busy machine may take longer than the whole.
            parts["host"] = max(0.0, (row.median_s or 0.0) - sum(parts.values()))
        for name in PARTS:
            if name in parts:
                width = total * parts[name] / sum(parts.values())
                axes.barh(place, width, left=left, color=_PART_COLOURS[name], label=_PART_LABELS.get(name, name))
                left += width
        axes.text(total, place, f"  {total:.3g} {unit}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.candidate for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.14 * scale * max(seconds))
    axes.set_title(rows[0].case, fontsize=9, loc="left")
    axes.set_xlabel(f"{unit} per step", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
