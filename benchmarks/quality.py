"""What `examples/quality_time.py` and `examples/quality_methods.py` measured, as tables and plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastddim.bench.plots import new_figure, style_of
from fastddim.bench.report import format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT, METHODS_FORMAT = "quality 1", "quality methods 1"
METHODS_HEADING = "## Quality against steps, for each method"
# What other methods are compared with: the model's own scheduler.
_USUAL = "DDIM"
_ADVISED = (4, 8, 20, 50)


def is_quality(value: Any) -> bool:
    """Whether a JSON file's content is such a result."""
    return isinstance(value, dict) and value.get("format") == FORMAT


def make_markdown(result: dict[str, Any]) -> list[str]:
    """Lines: what was measured, the speed-up over DDPM that costs no quality, and a row for each sampler.

    A row without quality is of a sampler whose images were not finite.
    """
    lines = [
        f"{result['count']} images of the embedded digits model for each row, without guidance. Frechet distance is to the"
        f" held-out real digits, from which the training digits are at {result['floor']:.2f}; agreement is that of a"
        f" classifier which is right about {result['real_agreement']:.1%} of the held-out digits. Times are of one image.",
        "",
    ]
    ddpm = next((row for row in result["rows"] if "DDPM" in row["sampler"]), None)
    if ddpm is not None:
        lines += [_speed_up(result["rows"], ddpm), ""]
    lines += ["| sampler | eta | steps | one image | Frechet distance | agreement |", "|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {row['sampler']} | {row['eta']:g} | {row['steps']} | {format_seconds(row['seconds_per_image'])} | {_judged(row)} |"
        for row in result["rows"]
    ]
    return lines


def is_methods(value: Any) -> bool:
    """Whether a JSON file's content is what `examples/quality_methods.py` writes."""
    return isinstance(value, dict) and value.get("format") == METHODS_FORMAT


def make_methods_markdown(result: dict[str, Any], plot: str) -> list[str]:
    """The section of `docs/quality.md`: table, plot, and what to use at how many steps."""
    distances = _distances(result)
    methods, steps = _names(distances)
    lines = [
        METHODS_HEADING,
        "",
        "Written by `make performance` from what `python examples/quality_methods.py` measured; do not edit. The Frechet"
        f" distance of the table above, here of {result['count']} images without guidance, which puts all of it higher:"
        f" compare within this table alone. The mean of {result['sets']} sets of seeds, and their least and largest. A set is"
        " the same starting states for every method, so most of that spread is common to all.",
        "",
        f"![Frechet distance against steps]({plot})",
        "",
        "| method | " + " | ".join(f"{each} steps" for each in steps) + " |",
        "|---|" + "---:|" * len(steps),
    ]
    for method in methods:
        cells = [distances[method, each] for each in steps]
        lines.append(
            f"| {method} | " + " | ".join(f"{d.mean():.2f} ({d.min():.2f}-{d.max():.2f})" for d in cells) + " |"
        )
    lines += [
        "",
        "What to use, for this model. A method is behind where it is further from the digits in every set, by more on average"
        " than that difference varies from set to set. Named beside the best is what is not behind, with a mean within the"
        " best's own sets.",
        "",
        *(_advice(distances, methods, each) for each in _ADVISED if each in steps),
        "",
        "Euler's step is DDIM's and Euler ancestral's is DDPM's, in other units, and so are the figures. `karras` spaces all of"
        " training's noise levels; this model's cosine schedule ends at noise thousands of times the picture's scale,"
        " where most of few steps are then spent. LCM and TCD are for models distilled for them, and not here.",
    ]
    return lines


def _distances(result: dict[str, Any]) -> dict[tuple[str, int], npt.NDArray[np.float64]]:
    return {(row["method"], row["steps"]): np.array(row["frechet_distances"]) for row in result["rows"]}


def _names(distances: dict[tuple[str, int], Any]) -> tuple[list[str], list[int]]:
    return list(dict.fromkeys(method for method, _ in distances)), sorted({steps for _, steps in distances})


def _advice(distances: dict[tuple[str, int], npt.NDArray[np.float64]], methods: list[str], steps: int) -> str:
    best = min(methods, key=lambda method: float(distances[method, steps].mean()))
    more = {method: distances[method, steps] - distances[best, steps] for method in methods if method != best}
    # Sets are paired: the same starting states.
    behind = {name for name, d in more.items() if d.min() > 0 and d.mean() > d.max() - d.min()}
    reach = distances[best, steps].max()
    beside = [name for name in more if name not in behind and distances[name, steps].mean() <= reach]
    text = f"- **{steps} steps**: {best} ({distances[best, steps].mean():.2f})"
    if beside:
        text += f", or as well {'; '.join(beside)}"
    if _USUAL in behind:
        d = more[_USUAL]
        text += f". {_USUAL} is {d.mean():.2f} behind ({d.min():.2f} to {d.max():.2f})"
    return text + "."


def draw_methods(result: dict[str, Any]) -> Figure:
    """Frechet distance against steps, and its difference to DDIM's in a set; bars reach from least to largest."""
    figure, (distance, difference) = new_figure(11, 5.4, columns=2)
    distances = _distances(result)
    methods, steps = _names(distances)
    for index, method in enumerate(methods):
        # Where lines lie on each other, both are seen.
        style = {**style_of(index), "linestyle": "--" if method.startswith("Euler") else "-", "capsize": 2}
        for axes, values, label in (
            (distance, [distances[method, each] for each in steps], method),
            (difference, [distances[method, each] - distances[_USUAL, each] for each in steps], None),
        ):
            means = [float(each.mean()) for each in values]
            bars = [
                [m - float(v.min()) for m, v in zip(means, values, strict=True)],
                [float(v.max()) - m for m, v in zip(means, values, strict=True)],
            ]
            axes.errorbar(steps, means, yerr=bars, label=label, **style)
    distance.axhline(result["floor"], color="black", linestyle=":", label="real training digits")
    distance.set(yscale="log", ylabel="Frechet distance (lower is better)", title="Frechet distance")
    difference.set(ylim=(-0.5, 1.1), ylabel="difference", title=f"Difference to {_USUAL} from the same starting states")
    for axes in (distance, difference):
        axes.set(xscale="log", xlabel="steps")
        axes.set_xticks(steps, [str(each) for each in steps])
        axes.minorticks_off()
        axes.grid(True, which="major", alpha=0.3)
    ticks = [each for each in (0.5, 0.7, 1, 1.5, 2, 3, 5, 8) if each >= 0.9 * result["floor"]]
    distance.set_yticks(ticks, [f"{each:g}" for each in ticks])
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Quality against steps, embedded digits model, {result['sets']} sets of {result['count']} images")
    return figure


def _judged(row: dict[str, Any]) -> str:
    if row["frechet_distance"] is None:
        return "NaN | NaN"
    return f"{row['frechet_distance']:.2f} | {row['agreement']:.1%}"


def _speed_up(rows: list[dict[str, Any]], ddpm: dict[str, Any]) -> str:
    """The paper's claim (arXiv:2010.02502): samples as good as DDPM's of 1000 steps 10 to 50 times faster."""
    ours = [row for row in rows if row["sampler"].startswith("fastddim") and row["eta"] == 0 and row["agreement"]]
    good = [row for row in ours if row["frechet_distance"] <= ddpm["frechet_distance"]]
    claim = f"The paper's claim, DDPM's quality of {ddpm['steps']} steps 10 to 50 times faster"
    if not good:
        return f"{claim}: no DDIM row here has a Frechet distance as low as DDPM's {ddpm['frechet_distance']:.2f}."
    fastest = min(good, key=lambda row: row["seconds_per_image"])
    return (
        f"{claim}: here DDIM's {fastest['steps']} steps are at {fastest['frechet_distance']:.2f} and DDPM at"
        f" {ddpm['frechet_distance']:.2f}, {ddpm['steps'] / fastest['steps']:.0f} times fewer model calls and"
        f" {ddpm['seconds_per_image'] / fastest['seconds_per_image']:.0f} times faster."
    )


def draw(result: dict[str, Any]) -> Figure:
    """Frechet distance and disagreement against the time of one image, a line for each sampler and eta."""
    figure, (distance, agreement) = new_figure(11, 5, columns=2)
    lines: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in filter(lambda row: row["agreement"] is not None, result["rows"]):
        lines.setdefault((row["sampler"], row["eta"]), []).append(row)
    for index, ((sampler, eta), rows) in enumerate(lines.items()):
        milliseconds = [1e3 * row["seconds_per_image"] for row in rows]
        # Ours and diffusers' at one eta lie on each other where they should.
        style = {**style_of(index), "linestyle": "-" if sampler.startswith("fastddim") else "--"}
        distance.plot(milliseconds, [row["frechet_distance"] for row in rows], label=f"{sampler}, eta {eta:g}", **style)
        agreement.plot(milliseconds, [100 * row["agreement"] for row in rows], **style)
        if sampler.startswith("fastddim") and eta == 0:
            for at, row in zip(milliseconds, rows, strict=True):
                distance.annotate(
                    f"{row['steps']} steps", (at, row["frechet_distance"]), xytext=(0, -13), textcoords="offset points",
                    fontsize=8, ha="center", color=style["color"],
                )  # fmt: skip
    distance.axhline(result["floor"], color="black", linestyle=":", label="real training digits")
    agreement.axhline(100 * result["real_agreement"], color="black", linestyle=":")
    distance.set(
        xscale="log", xlabel="one image (ms)", ylabel="Frechet distance (lower is better)", title="Frechet distance"
    )
    agreement.set(xscale="log", xlabel="one image (ms)", ylabel="agreement (%)", title="classifier agreement")
    distance.set_ylim(bottom=0)
    for axes in (distance, agreement):
        axes.grid(True, which="major", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    known = result["environment"]
    figure.suptitle(f"Quality against time, embedded digits model\nCPU: {known['device']}, threads: {known['threads']}")
    return figure
