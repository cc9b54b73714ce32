"""The networks of diffusion policies, under the parameter names of LeRobot's checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from fastddim.config import require_int
from fastddim.models.policy import sinusoidal_embedding

# Blocks in each of the four stages of a ResNet, and whether each is a bottleneck of three convolutions (arXiv:1512.03385).
RESNETS: dict[str, tuple[tuple[int, ...], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}
_BOTTLENECK_EXPANSION = 4
_LAST_GROUPS = 8
# Of a group normalisation in place of a batch normalisation.
_CHANNELS_PER_GROUP = 16


class ConditionalUnet1d(nn.Module):
    """A UNet along the time axis of an action chunk (arXiv:2303.04137, section 3.1), as LeRobot builds it.

    Args:
        action_dim: numbers in one action.
        global_cond_dim: numbers that describe the observations.
        down_dims: channels of each level, each a multiple of `n_groups`.
        kernel_size: of the convolutions, odd.
        n_groups: of the group normalisations.
        diffusion_step_embed_dim: numbers that describe the timestep, even.
        use_film_scale_modulation: whether conditions scale each block's channels, or only shift them.

    Raises:
        ValueError: a size out of range; the message names it.
    """

    def __init__(
        self,
        action_dim: int,
        global_cond_dim: int,
        down_dims: Sequence[int] = (512, 1024, 2048),
        *,
        kernel_size: int = 5,
        n_groups: int = 8,
        diffusion_step_embed_dim: int = 128,
        use_film_scale_modulation: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("action_dim", action_dim), ("n_groups", n_groups)):
            require_int(name, value, 1)
        require_int("global_cond_dim", global_cond_dim, 0)
        if not down_dims:
            raise ValueError("down_dims: empty; pass at least one level's channels")
        for channels in down_dims:
            require_int("down_dims", channels, 1)
            if channels % n_groups:
                raise ValueError(f"down_dims: {channels}; pass multiples of n_groups, {n_groups}")
        if down_dims[0] % _LAST_GROUPS:
            raise ValueError(f"down_dims: {down_dims[0]} first; pass a multiple of {_LAST_GROUPS} there")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: {kernel_size}; pass an odd number")
        if diffusion_step_embed_dim % 2 or diffusion_step_embed_dim < 4:
            raise ValueError(f"diffusion_step_embed_dim: {diffusion_step_embed_dim}; pass an even number >= 4")
        width = diffusion_step_embed_dim
        # The first has no weights; the names of the others count it.
        self.diffusion_step_encoder = nn.Sequential(
            nn.Identity(), nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
        )
        self._width = width
        cond_dim = width + global_cond_dim

        def block(in_channels: int, out_channels: int) -> ConditionalResidualBlock1d:
            return ConditionalResidualBlock1d(
                in_channels, out_channels, cond_dim, kernel_size, n_groups, use_film_scale_modulation
            )

        levels = list(itertools.pairwise([action_dim, *down_dims]))
        self.down_modules = nn.ModuleList()
        for level, (above, here) in enumerate(levels):
            last = level == len(levels) - 1
            halve = nn.Identity() if last else nn.Conv1d(here, here, 3, stride=2, padding=1)
            self.down_modules.append(nn.ModuleList([block(above, here), block(here, here), halve]))
        self.mid_modules = nn.ModuleList(block(down_dims[-1], down_dims[-1]) for _ in range(2))
        self.up_modules = nn.ModuleList()
        for above, here in reversed(levels[1:]):
            double = nn.ConvTranspose1d(above, above, 4, stride=2, padding=1)
            self.up_modules.append(nn.ModuleList([block(2 * here, above), block(above, above), double]))
        self.final_conv = nn.Sequential(
            # Of eight groups whatever the others have, as in LeRobot and Diffusion Policy.
            ConvBlock1d(down_dims[0], down_dims[0], kernel_size, _LAST_GROUPS),
            nn.Conv1d(down_dims[0], action_dim, 1),
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, global_cond: torch.Tensor) -> torch.Tensor:
        """The prediction.

        Args:
            x: noisy actions `[B, horizon, action_dim]`, in the parameters' dtype; the horizon is a multiple of
                `2 ** (len(down_dims) - 1)`.
            t: training timesteps `[B]` int64.
            global_cond: `[B, global_cond_dim]`, in the parameters' dtype.

        Returns:
            `[B, horizon, action_dim]` in the dtype of `x`.
        """
        cond = torch.cat(
            [self.diffusion_step_encoder(sinusoidal_embedding(t, self._width, x.dtype)), global_cond], dim=-1
        )
        h = x.transpose(1, 2)
        skips = []
        for level in self.down_modules:
            first, second, halve = cast(nn.ModuleList, level)
            h = second(first(h, cond), cond)
            skips.append(h)
            h = halve(h)
        for block in self.mid_modules:
            h = block(h, cond)
        for level in self.up_modules:
            first, second, double = cast(nn.ModuleList, level)
            h = double(second(first(torch.cat([h, skips.pop()], dim=1), cond), cond))
        prediction: torch.Tensor = self.final_conv(h)
        return prediction.transpose(1, 2).contiguous()


class ConvBlock1d(nn.Module):
    """A convolution of the same length, group normalisation and Mish: `[B, C_in, L]` -> `[B, C_out, L]`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, n_groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(n_groups, out_channels),
            nn.Mish(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.block(x))


class ConditionalResidualBlock1d(nn.Module):
    """Two `ConvBlock1d` with FiLM (arXiv:1709.07871) between them, and a shortcut: `[B, C_in, L]` -> `[B, C_out, L]`."""

    def __init__(
        self, in_channels: int, out_channels: int, cond_dim: int, kernel_size: int, n_groups: int, scales: bool
    ) -> None:
        super().__init__()
        self.conv1 = ConvBlock1d(in_channels, out_channels, kernel_size, n_groups)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, (2 if scales else 1) * out_channels))
        self.conv2 = ConvBlock1d(out_channels, out_channels, kernel_size, n_groups)
        same = in_channels == out_channels
        self.residual_conv = nn.Identity() if same else nn.Conv1d(in_channels, out_channels, 1)
        self._scales = scales

    def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """`x` `[B, C_in, L]` modulated by `cond` `[B, cond_dim]`: `[B, C_out, L]`."""
        h = self.conv1(x)
        modulation = self.cond_encoder(cond)[:, :, None]
        if self._scales:
            scale, shift = modulation.chunk(2, dim=1)
            h = scale * h + shift
        else:
            h = h + modulation
        return cast(torch.Tensor, self.conv2(h) + self.residual_conv(x))


class ImageEncoder(nn.Module):
    """A camera's pictures as points where features are: resize, centre crop, ResNet, spatial softmax, one linear layer.

    Args:
        image_shape: `(channels, height, width)` of a picture.
        backbone: a name in `RESNETS`.
        resize_shape, crop_shape: `(height, width)`, or None to leave it out; the crop is the centre.
        num_keypoints: how many points; the features are their coordinates, two for each.
        use_group_norm: group normalisation in place of batch normalisation.

    Raises:
        ValueError: an unknown backbone, or a crop that is larger than the picture.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        backbone: str = "resnet18",
        *,
        resize_shape: Sequence[int] | None = None,
        crop_shape: Sequence[int] | None = None,
        num_keypoints: int = 32,
        use_group_norm: bool = False,
    ) -> None:
        super().__init__()
        channels, *size = image_shape
        self._resize = None if resize_shape is None else (*size, *resize_shape)
        size = list(resize_shape or size)
        self._crop: tuple[slice, slice] | None = None
        if crop_shape is not None:
            if any(part > whole for part, whole in zip(crop_shape, size, strict=True)):
                raise ValueError(f"crop_shape: {tuple(crop_shape)} of a picture of {tuple(size)}; pass a smaller one")
            # torchvision's CenterCrop rounds halves to even, as Python does.
            starts = [round((whole - part) / 2) for part, whole in zip(crop_shape, size, strict=True)]
            rows, columns = (slice(start, start + part) for start, part in zip(starts, crop_shape, strict=True))
            self._crop, size = (rows, columns), list(crop_shape)
        self.backbone = _resnet(backbone, channels, use_group_norm)
        # Five halvings, each rounded up.
        height, width = (-(-side // 32) for side in size)
        features = 512 * (_BOTTLENECK_EXPANSION if RESNETS[backbone][1] else 1)
        self.pool = SpatialSoftmax(features, height, width, num_keypoints)
        self.feature_dim = 2 * num_keypoints
        self.out = nn.Linear(self.feature_dim, self.feature_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures `[N, C, H, W]` as the network was trained on them, normalised: features `[N, feature_dim]`."""
        if self._resize is not None:
            images = _resize(images, *self._resize)
        if self._crop is not None:
            images = images[:, :, self._crop[0], self._crop[1]]
        return functional.relu(self.out(self.pool(self.backbone(images)).flatten(1)))


class SpatialSoftmax(nn.Module):
    """The expected position of each feature map's softmax (arXiv:1504.00702, section 5.2).

    Takes `[N, C, height, width]`, gives `[N, K, 2]`: x and y in [-1, 1].
    """

    def __init__(self, channels: int, height: int, width: int, num_keypoints: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(channels, num_keypoints, 1)
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.register_buffer("pos_grid", torch.stack([x.flatten(), y.flatten()], dim=1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        attention = self.nets(features).flatten(2).softmax(dim=-1)
        return cast(torch.Tensor, attention @ self.pos_grid.to(attention.dtype))


def _resize(images: torch.Tensor, height: int, width: int, new_height: int, new_width: int) -> torch.Tensor:
    """Bilinear with antialiasing, as torchvision's `Resize`, as two products: `[N, C, h, w]` -> `[N, C, h', w']`."""
    rows, columns = (_resize_matrix(*sizes).to(images) for sizes in ((height, new_height), (width, new_width)))
    return rows @ images @ columns.T


def _resize_matrix(size: int, new_size: int) -> torch.Tensor:
    """`[new_size, size]`: what each new pixel of a line takes of each old one."""
    if size == new_size:
        return torch.eye(size)
    # torch's result of pictures one pixel wide is wrong.
    return functional.interpolate(torch.eye(size)[None, None], (new_size, size), mode="bilinear", antialias=True)[0, 0]


def _resnet(name: str, channels: int, use_group_norm: bool) -> nn.Sequential:
    """A ResNet without its pooling and classifier, its parts numbered as those of torchvision's."""
    if name not in RESNETS:
        raise ValueError(f"backbone: {name!r}; pass one of {', '.join(RESNETS)}")
    counts, bottleneck = RESNETS[name]
    parts: list[nn.Module] = [
        nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False),
        _norm(64, use_group_norm),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    into = 64
    for stage, count in enumerate(counts):
        width = 64 << stage
        blocks = []
        for index in range(count):
            stride = 2 if stage and not index else 1
            blocks.append(ResidualBlock2d(into, width, stride, bottleneck, use_group_norm))
            into = width * (_BOTTLENECK_EXPANSION if bottleneck else 1)
        parts.append(nn.Sequential(*blocks))
    return nn.Sequential(*parts)


class ResidualBlock2d(nn.Module):
    """A ResNet's block: two convolutions, or three of which the middle one is 3 x 3 and has the stride."""

    def __init__(self, into: int, width: int, stride: int, bottleneck: bool, use_group_norm: bool) -> None:
        super().__init__()
        out = width * (_BOTTLENECK_EXPANSION if bottleneck else 1)
        plan = [(into, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        plan = plan if bottleneck else [(into, width, 3, stride), (width, width, 3, 1)]
        self._count = len(plan)
        for index, (source, target, kernel, own_stride) in enumerate(plan, 1):
            convolution = nn.Conv2d(source, target, kernel, own_stride, padding=kernel // 2, bias=False)
            self.add_module(f"conv{index}", convolution)
            self.add_module(f"bn{index}", _norm(target, use_group_norm))
        self.downsample = None
        if stride > 1 or into != out:
            shortcut = nn.Conv2d(into, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, _norm(out, use_group_norm))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x
        for index in range(1, self._count + 1):
            h = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(h))
            h = functional.relu(h) if index < self._count else h
        return functional.relu(h + (x if self.downsample is None else self.downsample(x)))


def _norm(channels: int, use_group_norm: bool) -> nn.Module:
    return nn.GroupNorm(channels // _CHANNELS_PER_GROUP, channels) if use_group_norm else nn.BatchNorm2d(channels)
