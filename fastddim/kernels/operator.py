"""The fused step as a torch operator, `fastddim::ddim_step`, for `torch.compile` and `torch.export`: no graph break."""

from typing import Any, List, Optional  # noqa: UP035

import torch
from torch.library import triton_op, wrap_triton

from fastddim.coefficients import Coefficient, StepTable
from fastddim.config import Clip, DynamicThreshold, Limit, limit_numbers
from fastddim.kernels.launch import make_entry
from fastddim.kernels.plan import STEP_POINTERS


# torch builds the operators' schemas from these annotations, and knows Optional and List but not `|`.
@triton_op("fastddim::ddim_step", mutates_args=())
def _ddim_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    guidance_scale: Optional[torch.Tensor],  # noqa: UP045
    guidance_rescale: Optional[torch.Tensor],  # noqa: UP045
    noise: Optional[torch.Tensor],  # noqa: UP045
    seeds: Optional[torch.Tensor],  # noqa: UP045
    first_row: Optional[torch.Tensor],  # noqa: UP045
    limit: str,
    limit_range: float,
    limit_ratio: float,
    cond_first: bool,
    return_x0: bool,
) -> List[torch.Tensor]:  # noqa: UP006
    results = [torch.empty_like(sample) for _ in range(2 if return_x0 else 1)]
    _launch(
        model_output, sample, table, step, guidance_scale, guidance_rescale, noise, seeds, first_row, results[0],
        results[1] if return_x0 else None, None, limit, limit_range, limit_ratio, cond_first,
    )  # fmt: skip
    return results


# In a loop's body torch takes no operator of which an argument that it may write is None, hence the one above.
@triton_op("fastddim::ddim_step_", mutates_args={"out", "x0", "model_input"})
def _ddim_step_in_place(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    guidance_scale: Optional[torch.Tensor],  # noqa: UP045
    guidance_rescale: Optional[torch.Tensor],  # noqa: UP045
    noise: Optional[torch.Tensor],  # noqa: UP045
    seeds: Optional[torch.Tensor],  # noqa: UP045
    first_row: Optional[torch.Tensor],  # noqa: UP045
    out: torch.Tensor,
    x0: Optional[torch.Tensor],  # noqa: UP045
    model_input: Optional[torch.Tensor],  # noqa: UP045
    limit: str,
    limit_range: float,
    limit_ratio: float,
    cond_first: bool,
) -> None:
    _launch(
        model_output, sample, table, step, guidance_scale, guidance_rescale, noise, seeds, first_row, out, x0,
        model_input, limit, limit_range, limit_ratio, cond_first,
    )  # fmt: skip


def _launch(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    guidance_scale: torch.Tensor | None,
    guidance_rescale: torch.Tensor | None,
    noise: torch.Tensor | None,
    seeds: torch.Tensor | None,
    first_row: torch.Tensor | None,
    out: torch.Tensor,
    x0: torch.Tensor | None,
    model_input: torch.Tensor | None,
    limit: str,
    limit_range: float,
    limit_ratio: float,
    cond_first: bool,
) -> None:
    limits: dict[str, Limit] = {"none": None}
    if limit == "clip":
        limits["clip"] = Clip(limit_range)
    elif limit == "threshold":
        limits["threshold"] = DynamicThreshold(limit_ratio, limit_range)
    entry = make_entry(
        model_output, sample, table, step, limit=limits[limit], limit_values=None, cond_first=cond_first, noise=noise,
        seeds=seeds, first_row=first_row, guidance_scale=guidance_scale,
        guidance_rescale=0.0 if guidance_rescale is None else guidance_rescale, out=out, model_input=model_input,
        advance=False, timesteps=None, next_timestep=None,
    )  # fmt: skip
    plan = entry.plan
    slots: dict[str, Any] = dict.fromkeys(STEP_POINTERS)
    slots |= {
        "output": model_output.contiguous() if entry.copied[0] else model_output,
        "sample": sample.contiguous() if entry.copied[1] else sample,
        "table": table,
        "step": step,
        "guidance": guidance_scale,
        "rescale": guidance_rescale,
        "noise": noise.contiguous() if noise is not None and entry.copied[2] else noise,
        "seeds": seeds,
        "first_row": first_row,
        "next": out,
        "x0": x0,
        "input": model_input,
    }
    if plan.statistics:
        slots["statistics"] = torch.zeros(plan.statistics, dtype=torch.float32, device=sample.device)
        slots["counters"] = torch.zeros(plan.counters, dtype=torch.int32, device=sample.device)
    for call in plan.calls:
        wrap_triton(call.kernel)[call.grid](
            *(slots[name] for name in call.pointers),
            *call.numbers,
            **call.constants,
            num_warps=call.num_warps,
            enable_fp_fusion=False,
        )


def ddim_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    *,
    limit: Limit = None,
    limit_values: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    first_row: torch.Tensor | None = None,
    guidance_scale: "Coefficient | None" = None,
    guidance_rescale: Coefficient = 0.0,
    cond_first: bool = False,
    out: torch.Tensor | None = None,
    return_x0: bool = True,
    model_input: torch.Tensor | None = None,
    advance: bool = False,
    timesteps: torch.Tensor | None = None,
    next_timestep: torch.Tensor | None = None,
    workspace: object = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`fastddim.kernels.ddim_step` while torch traces: the same arguments and results, as one node of the graph.

    Raises:
        ValueError: `advance`, which a traced graph has no place for: advance the index with torch; `limit_values`.
    """
    if limit_values is not None:
        raise ValueError("limit_values: given under torch.compile or torch.export; pass the numbers in limit")
    if advance or timesteps is not None or next_timestep is not None:
        raise ValueError("advance: True under torch.compile or torch.export; move the index on with torch instead")
    device = sample.device
    if isinstance(table, StepTable):
        table = table.tensor(device)
    if not isinstance(step, torch.Tensor):
        step = torch.full((1,), step, dtype=torch.int64, device=device).reshape(())
    rescaled = isinstance(guidance_rescale, torch.Tensor) or guidance_rescale != 0
    name = {Clip: "clip", DynamicThreshold: "threshold"}.get(type(limit), "none")
    inputs = (
        model_output, sample.contiguous(), table, step,
        None if guidance_scale is None else _scalar_tensor(guidance_scale, device),
        _scalar_tensor(guidance_rescale, device) if rescaled else None,
        noise, seeds, first_row,
    )  # fmt: skip
    constants = (name, *limit_numbers(limit), bool(cond_first))
    if out is None and model_input is None:
        results = torch.ops.fastddim.ddim_step(*inputs, *constants, return_x0)
        return results[0], results[1] if return_x0 else None
    x_next = torch.empty_like(sample, memory_format=torch.contiguous_format) if out is None else out
    x0 = torch.empty_like(x_next) if return_x0 else None
    torch.ops.fastddim.ddim_step_(*inputs, x_next, x0, model_input, *constants)
    return x_next, x0


def _scalar_tensor(value: Coefficient, device: torch.device) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=torch.float32, device=device)
