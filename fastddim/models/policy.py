"""`ActionUNet1d`: the network of Diffusion Policy (arXiv:2303.04137), a UNet along the time axis of an action chunk."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from fastddim.config import require_int

GROUPS = 8
KERNEL_SIZE = 5
TIME_EMBEDDING_DIM = 64
COND_DIM = 128
MAX_PERIOD = 10_000


class ActionUNet1d(nn.Module):
    """Predicts the noise in a chunk of robot actions from the timestep and an observation.

    The convolutional network of Diffusion Policy (arXiv:2303.04137, section 3.1): residual blocks of Conv1d, GroupNorm and
    Mish along the chunk's time axis, halved and doubled between levels, each block modulated (FiLM, arXiv:1709.07871) by the
    timestep's embedding and the observation. No operation waits for the device, and no branch depends on a value, so that
    the call can be captured in a CUDA graph or exported with a dynamic batch.

    Args:
        action_dim: numbers in one action.
        obs_dim: numbers in the observation.
        channels: how many each level has, from the full horizon to the shortest; multiples of 8, the groups of GroupNorm.
        horizon: actions in a chunk, divisible by `2 ** (len(channels) - 1)`.

    Attributes:
        sample_shape: `(horizon, action_dim)`, what `Sampler` takes under this name.

    Raises:
        ValueError: a size out of range, or a horizon that the levels cannot halve; the message names it.
    """

    def __init__(
        self, action_dim: int, obs_dim: int, channels: Sequence[int] = (64, 128, 256), horizon: int = 16
    ) -> None:
        super().__init__()
        require_int("action_dim", action_dim, 1)
        require_int("obs_dim", obs_dim, 1)
        require_int("horizon", horizon, 1)
        channels = tuple(channels)
        if not channels:
            raise ValueError("channels: (); pass at least one level's channels")
        for count in channels:
            require_int("channels", count, GROUPS)
            if count % GROUPS:
                raise ValueError(f"channels: {count}; pass multiples of {GROUPS}, the groups of GroupNorm")
        divisor = 2 ** (len(channels) - 1)
        if horizon % divisor:
            raise ValueError(f"horizon: {horizon}; {len(channels)} levels of channels need a multiple of {divisor}")
        for level, count in enumerate(channels):
            # The norm of a single number is a constant.
            if count // GROUPS * (horizon >> level) < 2:
                raise ValueError(f"channels: {count} where the horizon is 1; pass at least {2 * GROUPS} there")
        self.sample_shape = (horizon, action_dim)
        self.obs_dim = obs_dim
        self.condition = nn.Sequential(
            nn.Linear(TIME_EMBEDDING_DIM + obs_dim, 2 * COND_DIM),
            nn.Mish(),
            nn.Linear(2 * COND_DIM, COND_DIM),
            nn.Mish(),
        )
        first, last = channels[0], channels[-1]
        self.conv_in = nn.Conv1d(action_dim, first, KERNEL_SIZE, padding="same")
        self.down_blocks, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        self.upsamplers, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for here, below in itertools.pairwise(channels):
            self.down_blocks.append(ResidualBlock1d(here, here))
            self.downsamplers.append(nn.Conv1d(here, below, 3, stride=2, padding=1))
            self.upsamplers.insert(0, nn.ConvTranspose1d(below, here, 4, stride=2, padding=1))
            self.up_blocks.insert(0, ResidualBlock1d(2 * here, here))
        self.mid_blocks = nn.ModuleList(ResidualBlock1d(last, last) for _ in range(2))
        self.norm_out = _normalised(nn.Conv1d(first, first, KERNEL_SIZE, padding="same"))
        self.conv_out = nn.Conv1d(first, action_dim, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, *, observation: torch.Tensor) -> torch.Tensor:
        """The predicted noise.

        Args:
            x: noisy actions `[B, horizon, action_dim]`, in the parameters' dtype.
            t: training timesteps `[B]` int64.
            observation: `[B, obs_dim]`, in the parameters' dtype.

        Returns:
            `[B, horizon, action_dim]`, contiguous, in the dtype of `x`.

        Raises:
            ValueError: an argument of another shape.
        """
        batch_size = x.shape[0]
        _require_shape("x", x, (batch_size, *self.sample_shape))
        _require_shape("t", t, (batch_size,))
        _require_shape("observation", observation, (batch_size, self.obs_dim))
        time = sinusoidal_embedding(t, TIME_EMBEDDING_DIM, x.dtype)
        cond = self.condition(torch.cat([time, observation], dim=1))
        h = self.conv_in(x.transpose(1, 2))
        skips = []
        for block, downsample in zip(self.down_blocks, self.downsamplers, strict=True):
            h = block(h, cond)
            skips.append(h)
            h = downsample(h)
        for block in self.mid_blocks:
            h = block(h, cond)
        for upsample, block in zip(self.upsamplers, self.up_blocks, strict=True):
            h = block(torch.cat([upsample(h), skips.pop()], dim=1), cond)
        actions: torch.Tensor = self.conv_out(self.norm_out(h))
        return actions.transpose(1, 2).contiguous()


class ResidualBlock1d(nn.Module):
    """Two convolutions with GroupNorm and Mish, FiLM between them, and a shortcut: `[B, C_in, L]` -> `[B, C_out, L]`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _normalised(nn.Conv1d(in_channels, out_channels, KERNEL_SIZE, padding="same"))
        self.film = nn.Linear(COND_DIM, 2 * out_channels)
        self.conv2 = _normalised(nn.Conv1d(out_channels, out_channels, KERNEL_SIZE, padding="same"))
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """`x` `[B, C_in, L]` modulated by `cond` `[B, 128]`: `[B, C_out, L]`."""
        scale, shift = self.film(cond)[:, :, None].chunk(2, dim=1)
        h = self.conv1(x) * (1 + scale) + shift
        return cast(torch.Tensor, self.conv2(h) + self.shortcut(x))


def sinusoidal_embedding(t: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Sines and cosines of `t` `[B]` at `dim / 2` frequencies from 1 to 1 / 10,000 (arXiv:1706.03762, section 3.5).

    Computed in float32 or wider, as half precision cannot hold the phase. Returns `[B, dim]` in `dtype`.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(dim // 2, dtype=wide, device=t.device) / (dim // 2 - 1)
    phases = t[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([phases.sin(), phases.cos()], dim=1).to(dtype)


def _normalised(convolution: nn.Conv1d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, convolution.out_channels), nn.Mish())


def _require_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; pass [{', '.join(map(str, shape))}]")
