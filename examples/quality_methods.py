"""Quality against steps on the digits: the Frechet distance of each sampling method, over several sets of seeds.

    python examples/quality_methods.py --json benchmarks/results/quality-methods.json

Twenty minutes of one core on a busy machine. `make performance` writes the table and the plot.
"""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from evaluate_digits import Judge, draw
from fastddim import load_pipeline
from fastddim.bench import report
from fastddim.files import check_writable

# By which benchmarks/quality.py knows its results.
FORMAT = "quality methods 1"
STEPS = (4, 8, 12, 20, 50)
DPM = {"method": "dpmsolver++"}
# What a `Sampler` is told, by the name of the row.
METHODS: dict[str, dict[str, Any]] = {
    "DDIM": {"method": "ddim"},
    "DDPM": {"method": "ddpm"},
    "Euler": {"method": "euler"},
    "Euler ancestral": {"method": "euler_ancestral"},
    "DPM-Solver++ 2M, midpoint": DPM,
    "DPM-Solver++ 2M, heun": {**DPM, "method_options": {"solver_type": "heun"}},
    "DPM-Solver++ 2M, karras": {**DPM, "spacing": "karras"},
    "SDE-DPM-Solver++ 2M": {**DPM, "method_options": {"algorithm_type": "sde-dpmsolver++"}},
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="images of a set")
    parser.add_argument("--sets", type=int, default=4, help="sets of seeds; the same ones for all methods")
    parser.add_argument("--json", type=Path, required=True, help="the results")
    args = parser.parse_args()
    for name, least, why in (("count", 100, "or the distance means nothing"), ("sets", 2, "or there is no spread")):
        if getattr(args, name) < least:
            parser.error(f"--{name}: {getattr(args, name)}; pass at least {least}, {why}")
    try:
        check_writable(args.json, "--json")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    pipeline, judge = load_pipeline(), Judge()
    rows = []
    for method, options in METHODS.items():
        for steps in STEPS:
            distances, agreements = [], []
            for each in range(args.sets):
                images, labels = draw(pipeline, args.count, steps, first_seed=each * args.count, **options)
                distances.append(judge.distance(images))
                agreements.append(judge.agreement(images, labels))
            rows.append(
                {
                    "method": method,
                    "steps": steps,
                    "options": options,
                    "frechet_distances": distances,
                    "agreements": agreements,
                }
            )
            print(f"{method}, {steps} steps: {', '.join(f'{each:.2f}' for each in distances)}", flush=True)
    result = {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "count": args.count,
        "sets": args.sets,
        "floor": judge.floor,
        "environment": report.environment(),
        "rows": rows,
    }
    report.write_text("--json", args.json, report.make_json(result))


if __name__ == "__main__":
    main()
