"""The whole loop as a torch module, for runtimes that take `while_loop`, and its step with the fused kernel on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch._higher_order_ops.while_loop import while_loop

from fastddim.coefficients import NUM_COLUMNS
from fastddim.export.schedule_module import ScheduleModule, TablesModule
from fastddim.export.step_module import SAMPLED, BeforeLoop, FinishModule, StepModule

_EXAMPLE_STEPS = 3


class FusedStepModule(StepModule):
    """`StepModule` with the fused kernel where the state is on a GPU."""

    def update(self, output: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, rows = inputs["sample"], inputs["coefficients"]
        if not x.is_cuda:
            return super().update(output, inputs)
        if "previous_x0" in inputs:
            # The kernel writes over it, and a loop may not write over what it carries.
            inputs = {**inputs, "previous_x0": inputs["previous_x0"].clone()}
        from fastddim.kernels.operator import ddim_step

        shared = rows.shape[0] == 1
        step = (
            torch.zeros((), dtype=torch.int64, device=x.device) if shared else torch.arange(x.shape[0], device=x.device)
        )
        x_next, x0 = ddim_step(output, x, rows, step, self.options(inputs))
        assert x0 is not None
        return x_next, x0


class LoopModule(torch.nn.Module):
    """All steps of a run, as many as the table has rows.

    Args:
        step: one of them; it takes one row of coefficients for the whole batch too.
        schedule: with it, the loop takes a number of steps and derives the table.
        before: with it, what the step's hoisted model takes is computed before the first of them.
        finish: with it, the samples go through it.

    The inputs of `forward`, in order, those in brackets where the step has them:
        sample: `[B, ...]` float32, the starting state.
        timesteps: `[N]` int64 or float32.
        coefficients: `[N, 6]` or `[N, 7]` float32. With a schedule, num_inference_steps `[]` int64 instead of these two.
        [noise]: `[N, B, ...]` float32.
        the step's others.
    Returns `outputs`, samples `[B, ...]` float32 first.
    """

    def __init__(
        self,
        step: StepModule,
        schedule: ScheduleModule | TablesModule | None = None,
        before: BeforeLoop | None = None,
        finish: FinishModule | None = None,
    ) -> None:
        super().__init__()
        self.step = step
        self.schedule = schedule
        self.before = before
        self.finish = finish

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what `forward` returns."""
        return ("samples",) if self.finish is None else self.finish.outputs

    def example_inputs(self) -> dict[str, torch.Tensor]:
        """Tensors of two samples and three steps to trace with."""
        values = {}
        for name, value in self.step.whole_example_inputs().items():
            if name == "timestep" and self.schedule is None:
                values["timesteps"] = torch.arange(_EXAMPLE_STEPS, dtype=value.dtype).flip(0)
            elif name == "timestep":
                values["num_inference_steps"] = torch.tensor(_EXAMPLE_STEPS)
            elif name == "coefficients" and self.schedule is None:
                values[name] = torch.full((_EXAMPLE_STEPS, value.shape[1]), 0.5)
            elif name == "noise":
                values[name] = value.expand(_EXAMPLE_STEPS, *value.shape).contiguous()
            elif name not in ("coefficients", "previous_x0"):
                values[name] = value
        return values

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        fixed = dict(inputs)
        sample, noise = fixed.pop("sample"), fixed.pop("noise", None)
        if self.schedule is None:
            timesteps, coefficients = fixed.pop("timesteps"), fixed.pop("coefficients")
            steps: int | torch.Tensor = timesteps.shape[0]
        else:
            # A tensor: `while_loop` takes no size that is only known at run time.
            steps = self.schedule.nearest(fixed.pop("num_inference_steps"))
            timesteps, coefficients = (rows.to(sample.device) for rows in self.schedule(steps))

        hoisted = {}
        if self.before is not None:
            values = self.before({**fixed, "timesteps": timesteps})
            hoisted = dict(zip(self.before.outputs, values, strict=True))
        rows = {name: hoisted.pop(name) for name in ("step_values", "both_values") if name in hoisted}
        fixed |= hoisted

        # The condition's counter is on the CPU, so that no step waits for the device.
        def go_on(count: torch.Tensor, row: torch.Tensor, x: torch.Tensor, *previous: torch.Tensor) -> torch.Tensor:
            return count < steps

        def body(
            count: torch.Tensor, row: torch.Tensor, x: torch.Tensor, *previous: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            given = {
                "sample": x,
                "timestep": timesteps.index_select(0, row).expand(x.shape[0]),
                "coefficients": coefficients.index_select(0, row),
            }
            if "step_values" in rows:
                given["step_values"] = rows["step_values"].index_select(0, row).expand(x.shape[0], -1)
            if "both_values" in rows:
                given["both_values"] = rows["both_values"].index_select(0, row).squeeze(0)
            if noise is not None:
                given["noise"] = noise.index_select(0, row).squeeze(0)
            if previous:
                (given["previous_x0"],) = previous
            x_next, x0 = self.step({**given, **fixed})
            return count + 1, row + 1, x_next, *([x0] if previous else [])

        first = torch.zeros(1, dtype=torch.int64, device=sample.device)
        states = (sample, torch.zeros_like(sample)) if coefficients.shape[1] > NUM_COLUMNS else (sample,)
        start = (torch.zeros((), dtype=torch.int64), first, *states)
        samples = while_loop(go_on, body, start)[2]  # type: ignore[no-untyped-call]
        return (samples,) if self.finish is None else self.finish({**inputs, SAMPLED: samples})
