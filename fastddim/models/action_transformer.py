"""`ActionTransformer`: a small transformer over an action chunk, the network of a flow-matching policy."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from fastddim.config import require_int
from fastddim.models.policy import sinusoidal_embedding


class ActionTransformer(nn.Module):
    """Predicts the velocity `noise - actions` of a chunk from the time and a condition (flow matching, arXiv:2210.02747).

    A transformer encoder as the action experts of pi0 and SmolVLA have one, without their language model: a token for each
    action, and one for the condition and the time, which all others attend to.

    Args:
        action_dim: numbers in one action.
        cond_dim: numbers that describe the observations.
        horizon: actions in a chunk.
        width, depth, heads: of the transformer; the width is a multiple of the heads.
        num_train_timesteps: what the time counts to, as the schedule has it.

    Raises:
        ValueError: a size out of range; the message names it.
    """

    def __init__(
        self,
        action_dim: int,
        cond_dim: int,
        horizon: int = 16,
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        sizes = {"action_dim": action_dim, "cond_dim": cond_dim, "horizon": horizon, "depth": depth, "heads": heads}
        for name, value in {**sizes, "num_train_timesteps": num_train_timesteps}.items():
            require_int(name, value, 1)
        if width % (2 * heads):
            raise ValueError(f"width: {width}; pass a multiple of {2 * heads}, twice the heads")
        self.sample_shape = (horizon, action_dim)
        self._width, self._num_train_timesteps = width, num_train_timesteps
        self.conv_in, self.condition = nn.Linear(action_dim, width), nn.Linear(cond_dim + width, width)
        self.positions = nn.Parameter(torch.randn(horizon + 1, width) / width**0.5)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm_out, self.conv_out = nn.LayerNorm(width), nn.Linear(width, action_dim)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """The velocity.

        Args:
            x: noisy actions `[B, horizon, action_dim]`, in the parameters' dtype.
            t: `[B]` float32, from `num_train_timesteps`, noise, down to 0.
            cond: `[B, cond_dim]`, in the parameters' dtype.

        Returns:
            `[B, horizon, action_dim]` in the dtype of `x`.
        """
        time = sinusoidal_embedding(t * (1000.0 / self._num_train_timesteps), self._width, x.dtype)
        token = self.condition(torch.cat([cond, time], dim=-1))[:, None]
        h = torch.cat([token, self.conv_in(x)], dim=1) + self.positions
        for block in self.blocks:
            h = block(h)
        velocity: torch.Tensor = self.conv_out(self.norm_out(h[:, 1:]))
        return velocity


class _Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and beside a shortcut: `[B, L, width]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self._heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(h)).chunk(3, -1)
        )
        h = h + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        result: torch.Tensor = h + self.feed_forward(self.norm2(h))
        return result
