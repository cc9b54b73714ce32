"""Quality against time on the digits: Frechet distance and classifier agreement of fastddim's and diffusers' samplers.

    python examples/quality_time.py --json benchmarks/results/quality-cpu-2-cores-2026-11-21.json

Quality is that of a few hundred images in batches, time that of one image. `make performance` draws the plot and the table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch

from digits_data import NUM_CLASSES
from evaluate_digits import BATCH, STEPS, Judge, draw
from fastddim import Sampler, load_pipeline
from fastddim.bench import report
from fastddim.files import check_writable

# By which benchmarks/quality.py knows its results.
FORMAT = "quality 1"
DDPM_STEPS = 1000
LABEL = 3
# For one sampler's times: at least so many rounds, and so many seconds.
ROUNDS, SECONDS = 3, 4.0

Sample = Callable[[], object]


@dataclass(frozen=True)
class Way:
    """One way to sample: a row of the table.

    Attributes:
        images: draws so many: flattened images `[N, 256]` in [-1, 1], and the labels asked for.
        one: draws one image.
    """

    sampler: str
    eta: float
    steps: int
    images: Callable[[int], tuple[np.ndarray, np.ndarray]]
    one: Sample


def ways(pipeline) -> list[Way]:
    """fastddim's and diffusers' DDIM at eta 0 and 1, and diffusers' DDPM over all training timesteps."""
    rows = []
    for eta in (0.0, 1.0):
        for steps in STEPS:
            rows.append(
                Way(
                    "fastddim.Sampler", eta, steps, lambda count, eta=eta, steps=steps: draw(pipeline, count, steps, eta=eta),
                    partial(Sampler(pipeline.unet, pipeline.scheduler, steps, eta=eta), 1, seeds=0,
                            class_labels=torch.tensor([LABEL])),
                )
            )  # fmt: skip
            scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
            rows.append(with_diffusers(pipeline, scheduler, "diffusers.DDIMScheduler", eta, steps, {"eta": eta}))
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    rows.append(with_diffusers(pipeline, scheduler, "diffusers.DDPMScheduler", 1.0, DDPM_STEPS, {}))
    return rows


def with_diffusers(pipeline, scheduler, name: str, eta: float, steps: int, options: dict[str, float]) -> Way:
    """A loop over a diffusers scheduler, as its pipelines have it; `options` are its step's."""
    scheduler.set_timesteps(steps)

    def sample(labels: torch.Tensor, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(len(labels), 1, 16, 16, generator=generator)
        for t in scheduler.timesteps:
            output = pipeline.unet(x, t, class_labels=labels).sample
            x = scheduler.step(output, t, x, generator=generator, **options).prev_sample
        return x

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = torch.arange(count) % NUM_CLASSES
        drawn = [sample(labels[start : start + BATCH], start) for start in range(0, count, BATCH)]
        return torch.cat(drawn).flatten(1).clamp(-1, 1).numpy(), labels.numpy()

    return Way(name, eta, steps, images, lambda: sample(torch.tensor([LABEL]), 0))


def time_in_turn(rows: list[Way]) -> list[float]:
    """The median seconds of one image of each, in turn; those with fewest steps get most rounds."""
    times: list[list[float]] = [[] for _ in rows]
    for way in rows:
        way.one()
    while any(len(each) < ROUNDS or sum(each) < SECONDS for each in times):
        for way, taken in zip(rows, times, strict=True):
            if len(taken) >= ROUNDS and sum(taken) >= SECONDS:
                continue
            start = time.perf_counter()
            way.one()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="images of each sampler")
    parser.add_argument("--json", type=Path, required=True, help="the results")
    args = parser.parse_args()
    if args.count < 100:
        parser.error(f"--count: {args.count}; pass at least 100, or the distance means nothing")
    try:
        check_writable(args.json, "--json")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    pipeline = load_pipeline()
    judge = Judge()
    rows = ways(pipeline)
    seconds = time_in_turn(rows)
    result = {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "count": args.count,
        "floor": judge.floor,
        "real_agreement": judge.real_score,
        "environment": report.environment(),
        "rows": [],
    }
    for way, taken in zip(rows, seconds, strict=True):
        images, labels = way.images(args.count)
        finite = bool(np.isfinite(images).all())
        row = {
            "sampler": way.sampler,
            "eta": way.eta,
            "steps": way.steps,
            "seconds_per_image": taken,
            "frechet_distance": judge.distance(images) if finite else None,
            "agreement": judge.agreement(images, labels) if finite else None,
        }
        result["rows"].append(row)
        print(row, flush=True)
    report.write_text("--json", args.json, report.make_json(result))


if __name__ == "__main__":
    main()
