"""The schedule as a torch module: numbers of steps become timesteps and coefficients inside the exported file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastddim.coefficients import columns, noise_factors
from fastddim.samplers import Steps
from fastddim.samplers.sampling import Sampling
from fastddim.schedule import Schedule


def bake(sampling: Sampling, per_sample: bool = False) -> ScheduleModule | TablesModule:
    """What makes the tables of a baked schedule.

    Raises:
        ValueError: a schedule that cannot be baked.
    """
    if sampling.method != "ddim":
        return TablesModule(sampling, per_sample)
    assert isinstance(sampling.schedule, Schedule)
    options = sampling.options
    if set(options) - {"eta", "use_clipped_model_output"}:
        raise ValueError(
            f"bake_schedule: True with {', '.join(options)}; pass the table at run time instead, or eta and"
            " use_clipped_model_output alone"
        )
    return ScheduleModule(
        sampling.schedule, options.get("eta", 0.0), options.get("use_clipped_model_output", False), per_sample
    )


class ScheduleModule(torch.nn.Module):
    """`Schedule.pairs` and `StepTable.build` of a number of steps known at run time, in float64 as they are.

    Args:
        schedule: gives alpha_bar, spacing and prediction type.
        eta: the noise of every step, as in `StepTable.build`.
        use_clipped_model_output: as in `StepTable.build`.
        per_sample: each sample has a number of steps of its own.

    Raises:
        ValueError: a spacing that is not a formula of the number of steps.
    """

    alphas_cumprod: torch.Tensor

    def __init__(
        self, schedule: Schedule, eta: float, use_clipped_model_output: bool, per_sample: bool = False
    ) -> None:
        super().__init__()
        self._config = schedule.config
        spacing = self._config.timestep_spacing
        if spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(
                f"bake_schedule: True with timestep_spacing {spacing!r}; pass the table at run time instead"
            )
        # The clean end comes last, at the index `num_train_timesteps`.
        bars = np.append(schedule.alphas_cumprod, schedule.final_alpha_cumprod)
        self.register_buffer("alphas_cumprod", torch.from_numpy(bars))
        self._eta = eta
        self._rederive = use_clipped_model_output
        self._per_sample = per_sample

    def forward(self, num_inference_steps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The table of `num_inference_steps` int64, each taken as the nearest in `[1, num_train_timesteps]`.

        `[]` gives timesteps int64 `[n]` and coefficients float32 `[n, 6]`. `per_sample`, `[B]` gives `[n, B]` and
        `[n, B, 6]`, n the largest number, and `going` bool `[n, B]`: whether the sample still takes that step.
        """
        n_train = self._config.num_train_timesteps
        n = self.nearest(num_inference_steps)
        count: Any = (n.max() if self._per_sample else n).item()
        torch._check(count >= 1)  # type: ignore[no-untyped-call]
        k = torch.arange(count)
        k = k[:, None] if self._per_sample else k
        t = self._timesteps(k, n)
        # The next timestep of the last one is the clean end.
        t_next = torch.where(k + 1 < n, self._timesteps(k + 1, n), n_train)
        alpha_bar: Any = self.alphas_cumprod[t]
        alpha_bar_next: Any = self.alphas_cumprod[t_next]
        direction, noise_scale = noise_factors(
            alpha_bar, alpha_bar_next, alpha_bar * 0 + self._eta, "fixed_small", xp=torch
        )
        rows: Any = columns(
            alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), alpha_bar_next.sqrt(), direction, noise_scale,
            self._config.prediction_type, self._rederive, xp=torch,
        )  # fmt: skip
        table = (t, rows.float())
        return (*table, k < n) if self._per_sample else table

    def nearest(self, num_inference_steps: torch.Tensor) -> torch.Tensor:
        """The number of steps that is taken: one in `[1, num_train_timesteps]`."""
        return num_inference_steps.clamp(1, self._config.num_train_timesteps)

    def _timesteps(self, k: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """The timestep of step k of n, as `make_timesteps` has it in numpy's float64; after the last step, any."""
        config = self._config
        n_train = config.num_train_timesteps
        ascending = (n - 1 - k).clamp(min=0)
        if config.timestep_spacing == "leading":
            return ascending * torch.div(n * 0 + n_train, n, rounding_mode="floor") + config.steps_offset
        count = n.double()
        if config.timestep_spacing == "trailing":
            # numpy.arange adds multiples of the difference of its first two numbers.
            difference = (n_train - (count * 0 + n_train) / count) - n_train
            return ((n_train + k * difference).round().long() - 1).clamp(min=0)
        spread = (count * 0 + n_train - 1) / (count - 1).clamp(min=1.0)
        return (ascending * spread).round().long()


class TablesModule(torch.nn.Module):
    """The tables of a method at each number of steps up to `Sampling.most_baked`, one after another.

    Arguments and results are as `ScheduleModule`'s; the coefficients have 7 columns where the method looks back, and
    timesteps are float32 where it has such.
    """

    timesteps: torch.Tensor
    rows: torch.Tensor

    def __init__(self, sampling: Sampling, per_sample: bool = False) -> None:
        super().__init__()
        self._most = sampling.most_baked
        self._per_sample = per_sample
        tables = [sampling.build(Steps(n)) for n in range(1, self._most + 1)]
        short = next((n for n, table in enumerate(tables, 1) if len(table) != n), None)
        if short is not None:
            raise ValueError(
                f"bake_schedule: {short} steps of method {sampling.method!r} are {len(tables[short - 1])} with these options;"
                " leave out lambda_min_clipped, or do not bake the schedule"
            )
        self.start_scales = {table.start_scale for table in tables}
        dtype = getattr(torch, tables[0].timestep_dtype)
        self.register_buffer("timesteps", torch.tensor([t for table in tables for t in table.timesteps], dtype=dtype))
        self.register_buffer("rows", torch.cat([table.tensor(dtype=torch.float32) for table in tables]))

    def forward(self, num_inference_steps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `ScheduleModule.forward`."""
        n = self.nearest(num_inference_steps)
        count: Any = (n.max() if self._per_sample else n).item()
        torch._check(count >= 1)  # type: ignore[no-untyped-call]
        k = torch.arange(count)
        k = k[:, None] if self._per_sample else k
        # The tables of fewer steps come first; past a table's end its last row.
        row = torch.div(n * (n - 1), 2, rounding_mode="floor") + torch.minimum(k, n - 1)
        table = (self.timesteps[row], self.rows[row])
        return (*table, k < n) if self._per_sample else table

    def nearest(self, num_inference_steps: torch.Tensor) -> torch.Tensor:
        """The number of steps that is taken: one that has a table."""
        return num_inference_steps.clamp(1, self._most)
