"""Train the embedded model: a class-conditional UNet on scikit-learn's real handwritten digits, in minutes on two cores.

    python examples/train_digits.py --out runs/digits

writes a diffusers folder (`unet/`, `scheduler/`, `model_index.json`) that `fastddim sample --model` and diffusers load.
The model sees the training split of `examples/digits_data.py` only: the held-out digits stay unseen for the evaluation.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn import functional

from digits_data import NUM_CLASSES, load_split
from fastddim.config import DDIMConfig
from fastddim.schedule import Schedule

SCHEDULER = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": True,
}
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.999


def build_unet() -> UNet2DModel:
    """1.1 M parameters for 1x16x16 images; the last of the 11 classes means "no class"."""
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=NUM_CLASSES + 1,
    )


def train(num_steps: int, batch_size: int, learning_rate: float, seed: int) -> UNet2DModel:
    """Train with v prediction (arXiv:2202.00512) and label dropout; returns the exponential moving average."""
    torch.manual_seed(seed)
    images, labels = load_split("train")
    alphas_cumprod = torch.tensor(Schedule(DDIMConfig.from_dict(SCHEDULER)).alphas_cumprod, dtype=torch.float32)
    unet = build_unet()
    ema = copy.deepcopy(unet).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    columns = (
        *Progress.get_default_columns()[:3],
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, refresh_per_second=0.2) as progress:
        task = progress.add_task("training", total=num_steps, loss=float("nan"))
        average = 0.0
        for step in range(num_steps):
            index = torch.randint(len(images), (batch_size,))
            x0, label = images[index], labels[index].clone()
            label[torch.rand(batch_size) < LABEL_DROPOUT] = NUM_CLASSES
            t = torch.randint(len(alphas_cumprod), (batch_size,))
            alpha_bar = alphas_cumprod[t].view(-1, 1, 1, 1)
            noise = torch.randn_like(x0)
            x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
            velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
            loss = functional.mse_loss(unet(x_t, t, class_labels=label).sample, velocity)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            cosine.step()
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(unet.parameters()), 1 - decay)
            average = loss.item() if step == 0 else 0.99 * average + 0.01 * loss.item()
            progress.update(task, advance=1, loss=average)
            if step % 500 == 0:
                print(f"step {step}: loss {average:.4f}", flush=True)
    return ema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet")
    parser.add_argument("--num-steps", type=int, default=9000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    unet = train(args.num_steps, args.batch_size, args.learning_rate, args.seed)
    unet.half().save_pretrained(args.out / "unet")
    DDIMScheduler(**SCHEDULER).save_pretrained(args.out / "scheduler")
    index = {
        "_class_name": "DDIMPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (args.out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
