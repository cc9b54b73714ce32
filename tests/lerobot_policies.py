"""Tiny policies that LeRobot 0.6.1 saved, and what it made of given observations and noise: `tests/lerobot`.

Each folder's `golden.npz` has what LeRobot's own preprocessor, `DiffusionPolicy.predict_action_chunk(noise=...)` and
postprocessor gave for a batch of two, on a CPU in float32. The weights are a formula of their names (`formula`), with which
LeRobot's policies were filled too.
"""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fastddim.policies.networks import ConditionalUnet1d, ImageEncoder

FOLDER = Path(__file__).parent / "lerobot"
NAMES = ("state-ddim-epsilon", "state-ddim-sample", "state-ddpm-epsilon", "images-ddim")
CAMERAS = 2


def formula(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight of a name: what made LeRobot's policies too."""
    drawn = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    if name.endswith("running_var"):
        value = 1 + 0.1 * np.abs(drawn)
    elif drawn.ndim >= 2:
        value = drawn / np.sqrt(np.prod(shape[1:]))
    else:
        value = 1 + 0.1 * drawn if name.endswith("weight") else 0.1 * drawn
    return torch.from_numpy(value).float()


def make_policy(name: str, folder: Path) -> Path:
    """A folder as LeRobot's `save_pretrained` wrote it, with its weights."""
    target = folder / name
    shutil.copytree(FOLDER / name, target, ignore=shutil.ignore_patterns("golden.npz"))
    of_cameras = name == "images-ddim"
    width = 4 + (16 * CAMERAS if of_cameras else 6)
    unet = ConditionalUnet1d(3, 2 * width, (16, 32), kernel_size=3, n_groups=4, diffusion_step_embed_dim=16)
    names = {f"diffusion.unet.{key}": tuple(value.shape) for key, value in unet.state_dict().items()}
    if of_cameras:
        encoder = ImageEncoder((3, 64, 64), crop_shape=(56, 56), num_keypoints=8, use_group_norm=True)
        for camera in range(CAMERAS):
            prefix = f"diffusion.rgb_encoder.{camera}."
            names |= {prefix + key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    save_file({key: formula(key, shape) for key, shape in names.items()}, target / "model.safetensors")
    return target


def golden(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Observations by name, and `noise`, `normalised` and `actions`."""
    with np.load(FOLDER / name / "golden.npz") as file:
        arrays = dict(file.items())
    observations = {key.replace("__", "."): arrays.pop(key) for key in list(arrays) if key.startswith("observation")}
    return observations, arrays
