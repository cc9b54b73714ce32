"""Errors of the fused step against the float64 textbook step, the tables of docs/numerics.md.

    TRITON_INTERPRET=1 python benchmarks/kernel_errors.py     # on a CPU; without the variable, on the GPU

float32: the largest error, in ulps of the step's scale, the largest magnitude among the result and the terms it is the
sum of. Half precision: the share of elements that are the correctly rounded value, and how far off the worst is, in ulps.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import torch

import fastddim
from fastddim.bench.textbook import StepProblem, draw_inputs, textbook_step

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPE = (2, 3, 64, 64)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROBLEMS = {
    "clip": StepProblem(shape=SHAPE),
    "clip, guidance 7.5": StepProblem(shape=SHAPE, guidance_scale=7.5),
    "clip, v prediction": StepProblem(shape=SHAPE, prediction_type="v_prediction"),
    "clip, eta 1": StepProblem(shape=SHAPE, eta=1.0),
    "threshold": StepProblem(shape=SHAPE, threshold=2.0),
    "threshold, guidance 7.5": StepProblem(shape=SHAPE, threshold=2.0, guidance_scale=7.5),
}


def measure(backend: str, problem: StepProblem, state: torch.dtype, model: torch.dtype) -> tuple[str, str]:
    """The error of `x_next` and of x0, as a cell each."""
    rounded = [
        torch.from_numpy(array).to(dtype)
        for array, dtype in zip(draw_inputs(problem), (model, state, state), strict=True)
    ]
    exact = textbook_step(problem, *(tensor.double().numpy() for tensor in rounded))
    output, sample, noise = (tensor.to(DEVICE) for tensor in rounded)
    config = fastddim.DDIMConfig(prediction_type=problem.prediction_type)
    schedule = fastddim.Schedule(config)
    table = fastddim.StepTable.build(schedule, schedule.pairs(problem.num_steps), eta=problem.eta)
    limit = (
        fastddim.Clip() if problem.threshold is None else fastddim.DynamicThreshold(problem.ratio, problem.threshold)
    )
    results = fastddim.ddim_step(
        output, sample, table, problem.index, limit=limit, noise=noise if problem.eta else None,
        guidance=problem.guidance_scale, backend=backend,
    )  # fmt: skip
    row = table.rows[problem.index]
    # Where x0 is a difference, its terms are what was rounded.
    grown = (2 * problem.guidance_scale - 1) if problem.guidance_scale else 1.0
    terms = abs(row.x0_from_output) * grown * float(output.abs().max()) + abs(row.x0_from_x) * float(sample.abs().max())
    scales = (max(abs(row.next_from_x0) * terms, np.abs(exact[0]).max()), max(terms, np.abs(exact[1]).max()))
    first, second = (_cell(*pair) for pair in zip(results, exact, scales, strict=True))
    return first, second


def _cell(actual: torch.Tensor, exact: np.ndarray, scale: float) -> str:
    if actual.dtype == torch.float32:
        error = np.abs(actual.double().cpu().numpy() - exact).max()
        return f"{error / np.spacing(np.float32(scale)):.2f} ulp"
    steps = (_ordered(actual.cpu()) - _ordered(torch.from_numpy(exact).to(actual.dtype))).abs()
    return f"{100 * float((steps == 0).double().mean()):.2f}%, {int(steps.max())} ulp"


def _ordered(half: torch.Tensor) -> torch.Tensor:
    bits = half.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def main() -> None:
    print(f"State {list(SHAPE)}, 50 steps, step {StepProblem(shape=SHAPE).index}; {DEVICE}.\n")
    print(
        "| case | state | model output | kernel: x_next | kernel: x0 | torch reference: x_next | torch reference: x0 |"
    )
    print("|---|---|---|---|---|---|---|")
    for (name, problem), (state, model) in itertools.product(PROBLEMS.items(), itertools.product(DTYPES, DTYPES)):
        # Every pair of dtypes for one case, equal ones for the others.
        if state != model and name != "clip, guidance 7.5":
            continue
        dtypes = DTYPES[state], DTYPES[model]
        cells = [cell for backend in ("triton", "reference") for cell in measure(backend, problem, *dtypes)]
        print(f"| {name} | {state} | {model} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
