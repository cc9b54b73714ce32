"""The C++ sampler against Python's `OrtSampler`: the embedded model, batch 1, 50 steps, one thread each, in turn.

    python benchmarks/cpp_sampler.py [--quick] [--json FILE]

Needs what `make cpp` prepares. `run` is one call; the C++ side's is timed from here, its pipe included. `start` is a
whole process from its start to the file with the first picture, and has a bar of its own, `START_S`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from cpp_driver import CppSampler, build
from rich.console import Console

import fastddim
from fastddim.bench import report, table
from fastddim.bench.cases import TOLERANCE, Candidate, Case
from fastddim.bench.timing import OK, QUICK, Settings, run_case
from fastddim.export import ExportOptions, OrtSampler, export_onnx

STEPS, SEED, LABEL = 50, 7, 3
START_S = 0.5
SETTINGS = Settings(min_rounds=40, max_rounds=400, budget_s=60.0)

PYTHON_START = """
import sys
import numpy as np
import onnxruntime
from fastddim.export import OrtSampler
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
bundle, steps, seed, label, out = sys.argv[1:]
sampler = OrtSampler(bundle, session_options=options)
samples = sampler(1, seeds=int(seed), num_inference_steps=int(steps), class_labels=np.array([int(label)]))
samples.tofile(out)
"""


def reference(pipe: Any) -> Sequence[Any]:
    """The same run by torch in float64."""
    sampler = fastddim.Sampler(pipe.unet.double(), pipe.scheduler, STEPS, dtype=torch.float64)
    start = torch.from_numpy(fastddim.noise.normal_numpy([SEED], 0, (1, 16, 16), fastddim.noise.STREAM_INITIAL))
    return (sampler(start.double(), class_labels=torch.tensor([LABEL])).numpy(),)


def python_call(bundle: Path) -> Callable[[], Sequence[Any]]:
    """Python's sampler on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sampler = OrtSampler(bundle, session_options=options)
    return lambda: (sampler(1, seeds=SEED, num_inference_steps=STEPS, class_labels=np.array([LABEL])),)


def start_call(command: Sequence[Any], out: Path) -> Callable[[], Sequence[Any]]:
    """A process that writes raw samples to `out`."""

    def call() -> Sequence[Any]:
        subprocess.run([*map(str, command)], check=True)
        return (np.fromfile(out, np.float32).reshape(1, 1, 16, 16),)

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: does everything work?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    arguments = parser.parse_args()
    programs = build("release", "driver", "sample")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pipe = fastddim.load_pipeline()
        options = ExportOptions(num_inference_steps=STEPS)
        bundle = export_onnx(pipe.unet, pipe.scheduler, f"{folder}/bundle", options, parity_steps=()).path
        expected = reference(pipe)
        out = Path(folder) / "samples.raw"
        sample = [
            programs / "sample", bundle, "--seed", SEED, "--labels", LABEL, "--steps", STEPS, "--threads", 1, "--out", out,
        ]  # fmt: skip
        start = [sys.executable, "-c", PYTHON_START, bundle, STEPS, SEED, LABEL, out]
        with CppSampler(programs / "driver", bundle) as cpp:

            def cpp_call(_: Any) -> Callable[[], Sequence[Any]]:
                return lambda: (cpp(1, seeds=SEED, num_inference_steps=STEPS, class_labels=np.array([LABEL])),)

            candidates = {
                "run": (
                    Candidate("fastddim::OrtSampler (C++)", cpp_call),
                    Candidate("fastddim.export.OrtSampler", lambda _: python_call(bundle)),
                    1 / 1.03,
                ),
                "start": (
                    Candidate("cpp/examples/sample", lambda _: start_call(sample, out)),
                    Candidate("python, OrtSampler", lambda _: start_call(start, out)),
                    None,
                ),
            }
            rows = []
            for name, (ours, theirs, target) in candidates.items():
                case = Case("cpp", f"{name} [1,1,16,16]", (ours, theirs), lambda: None, lambda _: expected, target,
                            TOLERANCE)  # fmt: skip
                rows += run_case(case, QUICK if arguments.quick else SETTINGS)
    table.print_rows(rows, Console())
    started = next(row for row in rows if row.case.startswith("start"))
    if started.median_s is not None:
        print(f"start to first picture: {started.median_s:.3f} s, the bar is {START_S} s")
    for row in rows:
        if row.status != OK:
            print(f"{row.status}: {row.case}: {row.candidate}: {row.message}", file=sys.stderr)
    if arguments.json:
        report.write_text(
            "--json", arguments.json, report.make_json(report.make_report(rows, "cpp", arguments.quick, "system"))
        )
    return int(any(row.status != OK for row in rows))


if __name__ == "__main__":
    sys.exit(main())
