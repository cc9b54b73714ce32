"""scikit-learn's 1,797 real 8x8 handwritten digits as 16x16 images, split once for training and evaluation."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional

NUM_CLASSES = 10


def load_split(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[N, 1, 16, 16]` float32 in [-1, 1] and labels `[N]` int64 of `"train"` (75%) or `"held_out"` (25%)."""
    digits = load_digits()
    train, held_out = train_test_split(
        range(len(digits.target)), test_size=0.25, stratify=digits.target, random_state=0
    )
    index = {"train": train, "held_out": held_out}[split]
    images = torch.tensor(digits.images[index], dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target[index], dtype=torch.int64)
    return functional.interpolate(images, scale_factor=2, mode="bilinear"), labels
