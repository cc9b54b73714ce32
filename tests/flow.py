"""Flow matching as a table with fractional timesteps, and the same run as a plain float64 loop without a table."""

import copy
import itertools

import diffusers
import numpy as np
import torch

from fastddim import Clip, StepTable
from fastddim.export import ExportOptions, export_onnx

SIGMAS = (0.9876, 0.6203, 0.2504, 0.0)
TIMESTEPS = (987.6, 620.3, 250.4)
START_SCALE = 1.7
SHAPE = (2, 6, 6)


class Wave(torch.nn.Module):
    """Fast to export, and as different at 987.6 from what it is at 987 as a test needs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, t):
        return torch.tanh(self.conv(x)) + torch.sin(t / 3).to(x.dtype)[:, None, None, None]


def flow_table(timesteps=TIMESTEPS, noise=0.0):
    """`x0 = x - sigma * v`, then on the line from x0 to x: `x_next = x0 + sigma_next / sigma * (x - x0)`."""
    rows = [
        (1, -sigma, following / sigma, 0, 1 - following / sigma, noise)
        for sigma, following in itertools.pairwise(SIGMAS)
    ]
    return StepTable.from_columns(timesteps, rows, start_scale=START_SCALE, noising=(1 - SIGMAS[0], SIGMAS[0]))


@torch.no_grad()
def plain_loop(model, start, timesteps=TIMESTEPS, limit=lambda x0: x0, noise=None):
    """The run from a state `[B, ...]`: the model is called with the timesteps as they are, all of it in float64."""
    model, x = copy.deepcopy(model).double(), torch.as_tensor(start, dtype=torch.float64)
    for step, t in enumerate(timesteps):
        sigma, following = SIGMAS[step], SIGMAS[step + 1]
        v = model(x, torch.full((len(x),), t, dtype=torch.float64))
        x0 = limit(x - sigma * v)
        x = x0 + following / sigma * (x - x0)
        if noise is not None:
            x = x + torch.from_numpy(noise[step])
    return x.numpy().astype(np.float32)


def export_class_flow(path):
    """A guided model of four classes and grey pictures that tells 987.6 from 987, with the table."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D",), mid_block_type=None, up_block_types=("UpBlock2D",), num_class_embeds=5,
    )  # fmt: skip
    with torch.no_grad():
        unet.time_embedding.linear_1.weight.mul_(4)
    return export_onnx(unet, flow_table(), path, ExportOptions(guided=True), limit=Clip(1.0), parity_steps=())
