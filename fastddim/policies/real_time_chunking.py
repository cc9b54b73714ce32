"""Real-time chunking (arXiv:2506.07339): a chunk that goes on from the last one, guided there through the network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastddim.config import require_int, require_number
from fastddim.policies.policy import Denoiser
from fastddim.schedule import Schedule


def chunk_weights(horizon: int, delay: int, executed: int) -> torch.Tensor:
    """How far each action of a chunk is held to the last chunk's: equation 5 of arXiv:2506.07339.

    Args:
        horizon: actions of a chunk.
        delay: the first ones, which are executed before the chunk is there: weight 1.
        executed: how many of a chunk are executed before the next one: the last `executed` ones are new, weight 0.

    Returns:
        `[horizon]` float32, falling between the two.
    """
    require_int("horizon", horizon, 1)
    require_int("delay", delay, 0, horizon)
    require_int("executed", executed, 0, horizon)
    index = torch.arange(horizon, dtype=torch.float64)
    fading = (horizon - executed - index) / (horizon - executed - delay + 1)
    weights = fading * torch.expm1(fading) / (math.e - 1)
    weights = torch.where(index < delay, torch.ones_like(index), weights)
    return torch.where(index >= max(delay, horizon - executed), torch.zeros_like(index), weights).float()


class RealTimeChunking(nn.Module):
    """A policy's denoiser whose predicted chunk is pulled to the last one's, by the network's vector-Jacobian product.

    A model for `Sampler`, in torch. In the coordinates of the paper, where a state is `tau * x0 + (1 - tau) * noise`, it adds
    to the velocity `min(max_guidance, (1 - tau) / (tau * r**2))` times the gradient of the squared distance between the
    predicted x0 and the last chunk (equations 2 to 4, algorithm 1); a diffusion model's state is scaled to them.

    Args:
        denoiser: a policy's `denoiser`.
        prediction_type: what it predicts: `"epsilon"`, `"sample"`, `"v_prediction"` or `"flow"`; its schedule's by default.
        max_guidance: the paper's beta.

    Example:
        >>> policy = load_policy(folder)
        >>> sampler = Sampler(RealTimeChunking(policy.denoiser), policy.sampling, 10, sample_shape=policy.sample_shape)
        >>> sampler(1, seeds=0, cond=policy.encode(observations), previous=shifted(last, 8),
        ...         weights=chunk_weights(16, delay=2, executed=8))
    """

    def __init__(self, denoiser: Denoiser, prediction_type: str | None = None, max_guidance: float = 5.0) -> None:
        super().__init__()
        require_number("max_guidance", max_guidance, 0.0, 1e6)
        schedule = denoiser.schedule
        own = schedule.config.prediction_type if isinstance(schedule, Schedule) else "flow"
        self.denoiser, self._type, self._max_guidance = denoiser, prediction_type or own, max_guidance

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        cond: torch.Tensor,
        previous: torch.Tensor,
        weights: torch.Tensor,
        **known: Any,
    ) -> torch.Tensor:
        """The guided prediction.

        Args:
            x, t, cond: as the denoiser's.
            previous: the last chunk, normalised and shifted, `[B, horizon, state_dim]`.
            weights: `[horizon]`, as of `chunk_weights`.
            **known: as the denoiser's.

        Returns:
            As the denoiser's, in whose terms the guided velocity is written.
        """
        signal, sigma = (level.float() for level in self.denoiser.levels_at(t, torch.float32))
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            output = self.denoiser(state, t, cond, **known)
            x0 = self._x0_of(state.float(), output.float(), signal, sigma)
            apart = ((previous.float() - x0) * weights.to(x0.device)[:, None]).detach()
            # By the state in the paper's coordinates, x / (signal + sigma).
            (gradient,) = torch.autograd.grad(x0, state, apart)
        gradient = gradient.float() * (signal + sigma)
        tau = signal / (signal + sigma)
        spread = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        strength = ((1 - tau) / (tau * spread)).nan_to_num(posinf=math.inf).clamp(max=self._max_guidance)
        # Where the state has no noise left nothing is guided.
        guided = x0.detach() + (1 - tau) * strength * gradient
        return self._output_of(x.float(), guided, output.detach().float(), signal, sigma).to(output.dtype)

    def _x0_of(self, x: torch.Tensor, output: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if self._type == "sample":
            return output
        if self._type == "epsilon":
            return (x - sigma * output) / signal
        return x - sigma * output if self._type == "flow" else signal * x - sigma * output

    def _output_of(
        self, x: torch.Tensor, x0: torch.Tensor, output: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        if self._type == "sample":
            return x0
        if self._type == "epsilon":
            made = (x - signal * x0) / sigma
        elif self._type == "flow":
            made = (x - x0) / sigma
        else:
            made = (signal * x - x0) / sigma
        return torch.where(sigma > 0, made, output)
