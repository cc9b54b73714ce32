"""A small network of diffusers for the tests, with random weights."""

from typing import Any

import diffusers


def small_unet(attention: bool = False, **options: Any) -> diffusers.UNet2DModel:
    """Two levels, of 8 and 16 channels, for samples of 1x8x8; `options` are diffusers' and come before these."""
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    if attention:
        blocks = {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
    defaults = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16),
                "layers_per_block": 1, "norm_num_groups": 4, **blocks}  # fmt: skip
    return diffusers.UNet2DModel(**(defaults | options))
