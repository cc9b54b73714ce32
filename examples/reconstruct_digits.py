"""Measure how well the embedded model's DDIM inverts, and write `docs/inversion.md` and `docs/interpolation.png`.

    python examples/reconstruct_digits.py --out docs

The paper's Table 2 (arXiv:2010.02502, section 5.4) on the held-out real digits, which the model has not seen: encode to
x_T, decode, both in S steps, without class and guidance.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from digits_data import NUM_CLASSES, load_split
from fastddim import DDIMConfig, Sampler, load_pipeline
from fastddim.pictures import make_grid, save_picture

# S and the paper's error on the CIFAR-10 test set, rounded there.
PAPER = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}
STRIP_STEPS, STRIP_COLUMNS = 50, 11
STRIP_SEEDS = ((0, 1), (2, 3), (4, 5))
# Held-out digits, by their number: a row goes from one to the other through their encodings.
STRIP_DIGITS = ((0, 1), (2, 3))


def no_class(count: int) -> dict[str, torch.Tensor]:
    return {"class_labels": torch.full((count,), NUM_CLASSES)}


def error(reconstruction: torch.Tensor, x0: torch.Tensor) -> float:
    """Mean squared error per dimension of pictures scaled from [-1, 1] to [0, 1]."""
    return float(((reconstruction - x0) / 2).square().mean())


def mean_squares(x: torch.Tensor, data: torch.Tensor) -> tuple[int, float, float]:
    """Of states `[B, ...]`: the dimensions that the data `[N, ...]` spans, and the mean squares within and outside them."""
    _, sizes, directions = torch.linalg.svd(data.flatten(1), full_matrices=True)
    dimensions = int((sizes > 1e-4 * sizes[0]).sum())
    squares = (x.flatten(1) @ directions.T).square().mean(0)
    return dimensions, float(squares[:dimensions].mean()), float(squares[dimensions:].mean())


def draw_strip(pipeline, digits: torch.Tensor, path: Path) -> None:
    sampler = Sampler(pipeline.unet, pipeline.scheduler, STRIP_STEPS)
    encoded = sampler.invert(digits, **no_class(len(digits)))
    ends = [*STRIP_SEEDS, *((encoded[a], encoded[b]) for a, b in STRIP_DIGITS)]
    rows = [sampler.interpolate(a, b, STRIP_COLUMNS, **no_class(STRIP_COLUMNS)) for a, b in ends]
    names = [*(f"seeds {a}, {b}" for a, b in STRIP_SEEDS), *(f"real digits {k + 1}" for k in range(len(STRIP_DIGITS)))]
    labels = [name for name in names for _ in range(STRIP_COLUMNS)]
    headings = [f"{weight:.1f}" for weight in np.linspace(0, 1, STRIP_COLUMNS)]
    save_picture(make_grid(torch.cat(rows), labels, STRIP_COLUMNS, headings=headings), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="diffusers folder; the embedded model by default")
    parser.add_argument("--count", type=int, default=100, help="digits per figure")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the two files")
    args = parser.parse_args()
    pipeline = load_pipeline(args.model)
    x0 = load_split("held_out")[0][: args.count]
    draw_strip(pipeline, x0, args.out / "interpolation.png")

    configured = DDIMConfig.from_dict(pipeline.scheduler.config, ignore_unknown=True)
    unlimited = dataclasses.replace(configured, clip_sample=False)
    rows, errors = [], []
    for steps, paper in PAPER.items():
        limited, free = (Sampler(pipeline.unet, config, steps) for config in (configured, unlimited))
        x = limited.invert(x0, **no_class(len(x0)))
        clipped, unclipped = (error(sampler(x, **no_class(len(x0))), x0) for sampler in (limited, free))
        rows.append(f"| {steps} | {clipped:.2g} | {unclipped:.2g} | {paper:g} |")
        errors.append(clipped)
        print(rows[-1], flush=True)

    # x is the last and finest encoding.
    dimensions, within, outside = mean_squares(x, load_split("train")[0])
    lines = [
        "# Inversion and interpolation",
        "",
        "Written by `python examples/reconstruct_digits.py`; do not edit.",
        "",
        f"## Reconstruction error, {len(x0)} held-out real digits",
        "",
        "Section 5.4 of the DDIM paper: encode with `Sampler.invert`, decode with the same sampler, both in S steps. The",
        "error is the mean squared error per dimension with pictures scaled to [0, 1]. No class, no guidance; the embedded",
        f"model, {configured.timestep_spacing} spacing, float32. The sampler clips x0 as the model's configuration asks, the",
        "inversion never does; the second column decodes without the clip. The paper's column is its Table 2, another model",
        "on CIFAR-10, so the fall with S compares, not the size.",
        "",
        "| S | digits | digits, no clip | paper, CIFAR-10 |",
        "|---|---|---|---|",
        *rows,
        "",
        f"The digits are 8x8 images made 16x16, so they span {dimensions} of {x[0].numel()} dimensions. At {steps} steps",
        f"x_T has the mean square {within:.2f} in these and {outside:.3f} in the others, where noise has 1 in all: it",
        "decodes to the digit, but is no draw of the noise that sampling starts from.",
        "",
        "## Interpolation",
        "",
        f"Section 5.3: `Sampler.interpolate`, {STRIP_STEPS} steps, no class; over the columns is the weight of the right end.",
        "The last rows go between held-out real digits, through their encodings.",
        "",
        "![Digits between the digits of two starting states](interpolation.png)",
        "",
    ]
    (args.out / "inversion.md").write_text("\n".join(lines))
    print(f"wrote {args.out / 'inversion.md'}")
    if errors != sorted(errors, reverse=True):
        raise SystemExit("the error does not fall with the number of steps")


if __name__ == "__main__":
    main()
