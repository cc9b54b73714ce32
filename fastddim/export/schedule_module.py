"""The schedule as a torch module: a number of steps becomes timesteps and coefficients inside the exported file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastddim.coefficients import columns, noise_factors
from fastddim.schedule import Schedule


class ScheduleModule(torch.nn.Module):
    """`Schedule.pairs` and `StepTable.build` of a number of steps known at run time, in float64 as they are.

    Args:
        schedule: gives alpha_bar, spacing and prediction type.
        eta: of every step.
        use_clipped_model_output: as in `StepTable.build`.

    Raises:
        ValueError: a spacing that is not a formula of the number of steps.
    """

    alphas_cumprod: torch.Tensor

    def __init__(self, schedule: Schedule, eta: float, use_clipped_model_output: bool) -> None:
        super().__init__()
        self._config = schedule.config
        if self._config.timestep_spacing == "quadratic":
            raise ValueError(
                "bake_schedule: True with timestep_spacing 'quadratic'; pass the table at run time instead"
            )
        # The clean end last, so that timestep -1 indexes it.
        bars = np.append(schedule.alphas_cumprod, schedule.final_alpha_cumprod)
        self.register_buffer("alphas_cumprod", torch.from_numpy(bars))
        self._eta = eta
        self._rederive = use_clipped_model_output

    def forward(self, num_inference_steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`num_inference_steps` int64 `[]` to timesteps int64 `[n]` and coefficients float32 `[n, 6]`."""
        count: Any = num_inference_steps.item()
        torch._check(count >= 1)  # type: ignore[no-untyped-call]
        ascending = self._ascending(torch.arange(count), num_inference_steps)
        t = ascending.flip(0)
        # The next timestep of the last one is the clean end.
        t_next = torch.cat([t[1:], t[:1] * 0 + self._config.num_train_timesteps])
        alpha_bar: Any = self.alphas_cumprod[t]
        alpha_bar_next: Any = self.alphas_cumprod[t_next]
        direction, noise_scale = noise_factors(
            alpha_bar, alpha_bar_next, alpha_bar * 0 + self._eta, "fixed_small", xp=torch
        )
        rows: Any = columns(
            alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), alpha_bar_next.sqrt(), direction, noise_scale,
            self._config.prediction_type, self._rederive, xp=torch,
        )  # fmt: skip
        return t, rows.float()

    def _ascending(self, k: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """`make_timesteps` in ascending order, with numpy's own float64 arithmetic."""
        config = self._config
        n_train = config.num_train_timesteps
        if config.timestep_spacing == "leading":
            return k * torch.div(n * 0 + n_train, n, rounding_mode="floor") + config.steps_offset
        count = n.double()
        if config.timestep_spacing == "trailing":
            # numpy.arange adds multiples of the difference of its first two numbers.
            difference = (n_train - (count * 0 + n_train) / count) - n_train
            return (n_train + k * difference).round().long().flip(0) - 1
        spread = (count * 0 + n_train - 1) / (count - 1).clamp(min=1.0)
        return (k * spread).round().long()
