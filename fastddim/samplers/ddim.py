"""DDIM (arXiv:2010.02502): `StepTable.build` on the transitions of a run."""

from __future__ import annotations

from collections.abc import Sequence

from fastddim.coefficients import StepTable
from fastddim.samplers.method import method
from fastddim.samplers.steps import Steps, to_steps
from fastddim.schedule import Schedule


@method(
    "ddim",
    Schedule,
    schedulers=(
        "DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
        "PNDMScheduler", "CogVideoXDDIMScheduler",
    ),
)  # fmt: skip
def ddim(
    schedule: Schedule,
    steps: Steps | int,
    *,
    eta: float | Sequence[float] = 0.0,
    variance_type: str = "fixed_small",
    use_clipped_model_output: bool = False,
    transitions: str = "exact",
) -> StepTable:
    """Equations 12 and 16.

    Args:
        schedule: the model's.
        steps: the run's; a number, or a list of training timesteps.
        eta, variance_type, use_clipped_model_output: as for `StepTable.build`.
        transitions: as for `Schedule.pairs`.

    Raises:
        ValueError: a value out of range.
    """
    steps = to_steps(steps).without_sigmas("ddim")
    pairs = schedule.pairs(
        steps.num_inference_steps, timesteps=steps.timesteps, strength=steps.strength, transitions=transitions
    )
    return StepTable.build(
        schedule,
        pairs,
        eta=eta,
        variance_type=variance_type,
        use_clipped_model_output=use_clipped_model_output,
    )
