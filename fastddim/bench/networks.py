"""The networks of the loop suite, built in memory; all but the embedded one with random weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastddim.bench.cases import Needs, installed

STEPS = (1, 4, 10, 20, 50)
BATCHES = (1, 4, 16)

_DIFFUSERS = installed("diffusers", "pip install diffusers")
_POLICY_OBS_DIM = 20
# Two moments of an image's 64 features and two joints.
_ENCODED_DIM = 132
_DIGIT = 3
# A random network's error grows from step to step; with less output, float32 stays close to float64.
_OUTPUT_SCALE = 0.1


@dataclass(frozen=True)
class Network:
    """A network to sample with.

    Attributes:
        name: its name in those of cases.
        sample_shape: the shape of one sample, without the batch.
        build: from a device's name to the network on that device, in eval mode and without gradients.
        make_kwargs: from a batch's size and a device's name to the network's keyword arguments, on that device.
        dtype: the dtype of weights and state on a GPU; on a CPU it is float32.
        needs: says what this machine lacks for it.
        usual_steps: how many steps it is usually sampled with.
        repeats: whether a batch repeats one sample, as a float64 run of several would take minutes.
        schedule: the fields that its `LoopProblem`s have in common.
    """

    name: str
    sample_shape: tuple[int, ...]
    build: Callable[[str], Any]
    make_kwargs: Callable[[int, str], dict[str, Any]] = lambda batch, device: {}
    dtype: str = "float32"
    needs: Needs = _DIFFUSERS
    usual_steps: int = 20
    repeats: bool = False
    schedule: tuple[tuple[str, Any], ...] = (("num_train_timesteps", 1000),)


def _policy(device: str) -> Any:
    import torch

    from fastddim.models.policy import ActionUNet1d

    with _seeded(device):
        model = ActionUNet1d(7, _POLICY_OBS_DIM, horizon=16).eval().requires_grad_(False).to(device)
        with torch.no_grad():
            model.conv_out.weight.mul_(0.5)
    return model


def _observation(batch: int, device: str) -> dict[str, Any]:
    return {"observation": _draw(1, batch, _POLICY_OBS_DIM).to(device)}


def _diffusion_policy(device: str) -> Any:
    import torch

    from fastddim.policies.networks import ConditionalUnet1d

    with _seeded(device):
        model = ConditionalUnet1d(2, _ENCODED_DIM, (256, 512, 1024), diffusion_step_embed_dim=256)
    model = model.eval().requires_grad_(False).to(device)
    with torch.no_grad():
        model.final_conv[-1].weight.mul_(_OUTPUT_SCALE)  # type: ignore[operator]
    return model


def _encoded(batch: int, device: str) -> dict[str, Any]:
    return {"global_cond": _draw(1, batch, _ENCODED_DIM).to(device)}


def _digits(device: str) -> Any:
    from diffusers import UNet2DModel

    from fastddim.pipeline import EMBEDDED_MODEL

    return UNet2DModel.from_pretrained(EMBEDDED_MODEL / "unet").to(device)


def _label(batch: int, device: str) -> dict[str, Any]:
    import torch

    return {"class_labels": torch.full((batch,), _DIGIT, device=device)}


def _random(kind: str, device: str, **config: Any) -> Any:
    """A network of diffusers' class `kind`."""
    import diffusers
    import torch

    with _seeded(device), torch.device(device):
        model = getattr(diffusers, kind)(**config).eval().requires_grad_(False)
    model.conv_out.weight.data.mul_(_OUTPUT_SCALE)
    return model


@contextlib.contextmanager
def _seeded(device: str) -> Iterator[None]:
    """The same random weights each time; torch's own state stays as it was."""
    import torch

    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        torch.manual_seed(0)
        yield


def _draw(seed: int, *shape: int) -> Any:
    """Standard normal numbers on the CPU, the same for every device."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _text(length: int, width: int, batch: int, device: str) -> dict[str, Any]:
    return {"encoder_hidden_states": _draw(1, batch, length, width).to(device).half()}


def _sdxl_kwargs(batch: int, device: str) -> dict[str, Any]:
    import torch

    sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]], dtype=torch.float16, device=device)
    added = {"text_embeds": _draw(2, batch, 1280).to(device).half(), "time_ids": sizes.repeat(batch, 1)}
    return {**_text(77, 2048, batch, device), "added_cond_kwargs": added}


_DOWN, _UP = "DownBlock2D", "UpBlock2D"
_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

POLICY = Network(
    "policy",
    (16, 7),
    _policy,
    _observation,
    needs=lambda: None,
    usual_steps=10,
    schedule=(("num_train_timesteps", 100),),
)
# Of the size of Diffusion Policy's own for images (arXiv:2303.04137), as LeRobot builds it.
DIFFUSION_POLICY = Network(
    "diffusion-policy",
    (16, 2),
    _diffusion_policy,
    _encoded,
    needs=lambda: None,
    usual_steps=10,
    schedule=(("num_train_timesteps", 100),),
)
DIGITS = Network(
    "digits",
    (1, 16, 16),
    _digits,
    _label,
    schedule=(("num_train_timesteps", 1000), ("prediction_type", "v_prediction"), ("timestep_spacing", "trailing")),
)
# Options that the networks of DDPM share.
_DDPM: dict[str, Any] = {
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
# google/ddpm-cifar10-32.
CIFAR10 = Network(
    "cifar10",
    (3, 32, 32),
    partial(
        _random,
        "UNet2DModel",
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=(_DOWN, "AttnDownBlock2D", _DOWN, _DOWN),
        up_block_types=(_UP, _UP, "AttnUpBlock2D", _UP),
        **_DDPM,
    ),
)
# google/ddpm-celebahq-256 and google/ddpm-church-256, LSUN's.
LSUN256 = Network(
    "lsun256",
    (3, 256, 256),
    partial(
        _random,
        "UNet2DModel",
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(_DOWN, _DOWN, _DOWN, _DOWN, "AttnDownBlock2D", _DOWN),
        up_block_types=(_UP, "AttnUpBlock2D", _UP, _UP, _UP, _UP),
        **_DDPM,
    ),
    repeats=True,
)
SD15 = Network(
    "sd15",
    (4, 64, 64),
    partial(
        _random,
        "UNet2DConditionModel",
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=(_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN),
        up_block_types=(_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP),
        cross_attention_dim=768,
        attention_head_dim=8,
    ),
    partial(_text, 77, 768),
    dtype="float16",
    repeats=True,
)
# Of Stable Diffusion's kind, 142 M parameters, of a size that a CPU samples in seconds.
SD_SMALL = Network(
    "sd-small",
    (4, 32, 32),
    partial(
        _random,
        "UNet2DConditionModel",
        sample_size=32,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=(_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN),
        up_block_types=(_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP),
        cross_attention_dim=768,
        attention_head_dim=8,
    ),
    lambda batch, device: {"encoder_hidden_states": _draw(1, batch, 77, 768).to(device)},
    usual_steps=10,
    repeats=True,
)
SDXL = Network(
    "sdxl",
    (4, 128, 128),
    partial(
        _random,
        "UNet2DConditionModel",
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=(_DOWN, _CROSS_DOWN, _CROSS_DOWN),
        up_block_types=(_CROSS_UP, _CROSS_UP, _UP),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    _sdxl_kwargs,
    dtype="float16",
    repeats=True,
)

NETWORKS = (POLICY, DIFFUSION_POLICY, DIGITS, CIFAR10, SD_SMALL, LSUN256, SD15, SDXL)
