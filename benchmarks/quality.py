"""What `examples/quality_time.py` measured, as a table and a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastddim.bench.plots import new_figure, style_of
from fastddim.bench.report import format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "quality 1"


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
