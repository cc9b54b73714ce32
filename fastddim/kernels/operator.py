"""The fused step as a torch operator, `fastddim::ddim_step`, for `torch.compile` and `torch.export`: no graph break."""

from typing import Any, List, Optional  # noqa: UP035

import torch
from torch.library import triton_op, wrap_triton
from triton.runtime.jit import JITFunction

from fastddim.coefficients import NUM_COLUMNS, StepTable
from fastddim.config import LIMITS, limit_name, limit_numbers, with_numbers
from fastddim.kernels.launch import make_entry, scalar_tensor
from fastddim.kernels.plan import STEP_POINTERS
from fastddim.step import Guidance, StepOptions, require_epsilon_term


# torch builds the operators' schemas from these annotations, and knows Optional and List but not `|`.
def _write_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    guidance_scale: Optional[torch.Tensor],  # noqa: UP045
    guidance_rescale: Optional[torch.Tensor],  # noqa: UP045
    cond_first: bool,
    guidance_method: str,
    apg_eta: float,
    apg_norm_threshold: float,
    limit: str,
    limit_range: float,
    limit_ratio: float,
    noise: Optional[torch.Tensor],  # noqa: UP045
    seeds: Optional[torch.Tensor],  # noqa: UP045
    first_row: Optional[torch.Tensor],  # noqa: UP045
    out: torch.Tensor,
    x0: Optional[torch.Tensor],  # noqa: UP045
    model_input: Optional[torch.Tensor],  # noqa: UP045
) -> None:
    guidance = None
    if guidance_scale is not None:
        rescale = 0.0 if guidance_rescale is None else guidance_rescale
        guidance = Guidance(guidance_scale, rescale, cond_first, guidance_method, apg_eta, apg_norm_threshold)
    named = None if limit == "none" else with_numbers(LIMITS[limit](), limit_range, limit_ratio)
    options = StepOptions(
        guidance=guidance, limit=named, noise=noise, seeds=seeds, first_row=first_row, out=out, model_input=model_input,
        previous_x0=x0 if table.shape[1] > NUM_COLUMNS else None,
    )  # fmt: skip
    entry = make_entry(model_output, sample, table, step, options)
    plan = entry.plan
    slots: dict[str, Any] = dict.fromkeys(STEP_POINTERS)
    slots |= {
        "output": model_output.contiguous() if entry.copied[0] else model_output,
        "sample": sample.contiguous() if entry.copied[1] else sample,
        "table": table,
        "step": step,
        "noise": noise.contiguous() if noise is not None and entry.copied[2] else noise,
        "next": out,
        "x0": x0,
        "input": model_input,
    }
    # Here and not before the operator: a traced graph is later called with tensors of other strides.
    values = {"guidance": guidance_scale, "rescale": guidance_rescale, "seeds": seeds, "first_row": first_row}
    slots |= {name: value.contiguous() for name, value in values.items() if value is not None}
    if plan.statistics:
        slots["statistics"] = torch.zeros(plan.statistics, dtype=torch.float32, device=sample.device)
        slots["counters"] = torch.zeros(plan.counters, dtype=torch.int32, device=sample.device)
    for call in plan.calls:
        # torch 2.11 refuses to wrap a kernel that Triton interprets.
        kernel = wrap_triton(call.kernel) if isinstance(call.kernel, JITFunction) else call.kernel
        kernel[call.grid](
            *(slots[name] for name in call.pointers),
            *call.numbers,
            **call.constants,
            num_warps=call.num_warps,
            enable_fp_fusion=False,
        )


triton_op("fastddim::ddim_step_", _write_step, mutates_args={"out", "x0", "model_input"})


# In a loop's body torch takes no operator that may write to an argument which is None, hence this one.
@triton_op("fastddim::ddim_step", mutates_args=())
def _make_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    guidance_scale: Optional[torch.Tensor],  # noqa: UP045
    guidance_rescale: Optional[torch.Tensor],  # noqa: UP045
    cond_first: bool,
    guidance_method: str,
    apg_eta: float,
    apg_norm_threshold: float,
    limit: str,
    limit_range: float,
    limit_ratio: float,
    noise: Optional[torch.Tensor],  # noqa: UP045
    seeds: Optional[torch.Tensor],  # noqa: UP045
    first_row: Optional[torch.Tensor],  # noqa: UP045
    previous_x0: Optional[torch.Tensor],  # noqa: UP045
    return_x0: bool,
) -> List[torch.Tensor]:  # noqa: UP006
    results = [torch.empty_like(sample) for _ in range(2 if return_x0 else 1)]
    if previous_x0 is not None:
        results[1:] = [previous_x0.clone()]
    _write_step(
        model_output, sample, table, step, guidance_scale, guidance_rescale, cond_first, guidance_method, apg_eta,
        apg_norm_threshold, limit, limit_range, limit_ratio, noise, seeds, first_row, results[0],
        results[1] if len(results) > 1 else None, None,
    )  # fmt: skip
    return results


def ddim_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    table: StepTable | torch.Tensor,
    step: int | torch.Tensor,
    options: StepOptions,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`fastddim.kernels.launch.ddim_step` while torch traces: the same arguments and results, as one node of the graph.

    Raises:
        ValueError: `advance`, which a traced graph has no place for: advance the index with torch; `limit_values`.
    """
    if options.limit_values is not None:
        raise ValueError("limit_values: given under torch.compile or torch.export; pass the numbers in limit")
    if options.advance or options.timesteps is not None or options.next_timestep is not None:
        raise ValueError("advance: True under torch.compile or torch.export; move the index on with torch instead")
    device, guidance = sample.device, options.guidance
    plain = Guidance(1.0) if guidance is None else guidance
    if isinstance(table, StepTable):
        # The operator sees a tensor of it, which says nothing of its method.
        if plain.method == "cfg++":
            require_epsilon_term(table, "guidance.method")
        table = table.tensor(device)
    if not isinstance(step, torch.Tensor):
        step = torch.full((1,), step, dtype=torch.int64, device=device).reshape(())
    inputs = (
        model_output,
        sample.contiguous(),
        table,
        step,
        None if guidance is None else scalar_tensor(guidance.scale, device),
        scalar_tensor(guidance.rescale, device) if guidance is not None and guidance.rescaled else None,
        bool(plain.cond_first),
        plain.method,
        float(plain.apg_eta),
        float(plain.apg_norm_threshold),
        limit_name(options.limit),
        *limit_numbers(options.limit),
        options.noise,
        options.seeds,
        options.first_row,
    )
    previous = options.previous_x0
    if options.out is None and options.model_input is None:
        results = torch.ops.fastddim.ddim_step(*inputs, previous, options.return_x0)
        if previous is not None:
            results[1] = previous.copy_(results[1])
        return results[0], results[1] if options.return_x0 else None
    x_next = torch.empty_like(sample, memory_format=torch.contiguous_format) if options.out is None else options.out
    x0 = torch.empty_like(x_next) if previous is None and options.return_x0 else previous
    torch.ops.fastddim.ddim_step_(*inputs, x_next, x0, options.model_input)
    return x_next, x0 if options.return_x0 else None
