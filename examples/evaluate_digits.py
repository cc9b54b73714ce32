"""Measure the embedded model and write `docs/quality.md`: classifier agreement and the paper's Table 1, on digits.

    python examples/evaluate_digits.py --out docs/quality.md

The classifier (an SVM) and the feature space (PCA) see the training split only; distances are to the held-out digits.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from digits_data import NUM_CLASSES, load_split
from fastddim import Sampler, load_pipeline

STEPS = (5, 10, 20, 50, 100)
BATCH = 100
PCA_DIMENSIONS = 32
# Row name, eta, variance type: the rows of the paper's Table 1 (arXiv:2010.02502).
ROWS = (
    ("0 (DDIM)", 0.0, "fixed_small"),
    ("0.5", 0.5, "fixed_small"),
    ("1 (DDPM)", 1.0, "fixed_small"),
    ("sigma-hat", 1.0, "fixed_large"),
)
AGREEMENT_BAR = 0.97


def draw(
    pipeline,
    count: int,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    first_seed: int = 0,
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """`count` flattened images in [-1, 1] and the labels that were asked for, classes in turn, seeds from the first on."""
    sampler = Sampler(pipeline.unet, pipeline.scheduler, num_inference_steps, guidance_scale=guidance_scale, **options)
    images, labels = [], torch.arange(count) % NUM_CLASSES
    for start in range(0, count, BATCH):
        batch = labels[start : start + BATCH]
        uncond = None if guidance_scale is None else {"class_labels": torch.full_like(batch, NUM_CLASSES)}
        images.append(sampler(len(batch), seeds=first_seed + start, class_labels=batch, uncond_kwargs=uncond))
    return torch.cat(images).flatten(1).clamp(-1, 1).numpy(), labels.numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features `[N, D]` (arXiv:1706.08500)."""
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float(difference @ difference + np.trace(cov_a + cov_b - 2 * root))


class Judge:
    """What images are judged by: an SVM and principal components of the training split, and the held-out digits.

    Attributes:
        real_score: the share of the held-out digits that the classifier gets right.
        floor: the Frechet distance of the training digits to the held-out ones.
        num_held_out: how many these are.
    """

    def __init__(self) -> None:
        (train, train_labels), (held_out, held_out_labels) = load_split("train"), load_split("held_out")
        train_x, held_out_x = train.flatten(1).numpy(), held_out.flatten(1).numpy()
        self._classifier = SVC(gamma="scale", C=10).fit(train_x, train_labels)
        self._pca = PCA(PCA_DIMENSIONS, random_state=0).fit(train_x)
        self._features = self._pca.transform(held_out_x)
        self.real_score = self._classifier.score(held_out_x, held_out_labels)
        self.floor = self.distance(train_x)
        self.num_held_out = len(held_out_x)

    def agreement(self, images: np.ndarray, labels: np.ndarray) -> float:
        """The share of images `[N, 256]` that the classifier takes for what was asked for."""
        return float((self._classifier.predict(images) == labels).mean())

    def distance(self, images: np.ndarray) -> float:
        """The Frechet distance of images `[N, 256]` to the held-out digits."""
        return frechet_distance(self._pca.transform(images), self._features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="diffusers folder; the embedded model by default")
    parser.add_argument("--count", type=int, default=500, help="samples per figure")
    parser.add_argument("--out", type=Path, default=Path("docs/quality.md"))
    args = parser.parse_args()
    pipeline = load_pipeline(args.model)
    judge = Judge()

    agreement = {}
    for steps, scale in itertools.product((20, 50), (1.0, 2.0, 3.0)):
        images, labels = draw(pipeline, args.count, steps, None if scale == 1 else scale)
        agreement[steps, scale] = judge.agreement(images, labels)
        print(f"{steps} steps, guidance {scale:g}: agreement {agreement[steps, scale]:.1%}", flush=True)

    distance = {}
    for (name, eta, variance_type), steps in itertools.product(ROWS, STEPS):
        images, _ = draw(pipeline, args.count, steps, eta=eta, variance_type=variance_type)
        distance[name, steps] = judge.distance(images)
        print(f"eta {name}, {steps} steps: Frechet distance {distance[name, steps]:.2f}", flush=True)

    lines = [
        "# Quality of the embedded model",
        "",
        "Written by `python examples/evaluate_digits.py`; do not edit. The judge is an SVM trained on the same training",
        f"split as the model; it scores {judge.real_score:.1%} on the {judge.num_held_out} held-out real digits.",
        "",
        f"## Agreement of the classifier with the asked label, {args.count} samples",
        "",
        "| steps | guidance 1 | guidance 2 | guidance 3 |",
        "|---|---|---|---|",
        *(
            f"| {steps} | " + " | ".join(f"{agreement[steps, s]:.1%}" for s in (1.0, 2.0, 3.0)) + " |"
            for steps in (20, 50)
        ),
        "",
        f"## Frechet distance to the held-out digits, {args.count} samples without guidance",
        "",
        f"In the space of {PCA_DIMENSIONS} principal components of the real training digits; the training digits themselves",
        f"are at {judge.floor:.2f}. The paper's Table 1 on digits: DDIM (eta 0) is ahead of DDPM, most of all at 5 steps.",
        "",
        "| eta | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |",
        "|---|" + "---|" * len(STEPS),
        *(f"| {name} | " + " | ".join(f"{distance[name, steps]:.2f}" for steps in STEPS) + " |" for name, _, _ in ROWS),
        "",
    ]
    # `make performance` writes the rest of the page.
    _, heading, rest = (args.out.read_text() if args.out.exists() else "").partition("## Quality against steps")
    args.out.write_text("\n".join(lines) + (f"\n{heading}{rest}" if heading else ""))
    print(f"wrote {args.out}")
    if min(agreement.values()) < AGREEMENT_BAR:
        raise SystemExit(f"agreement below {AGREEMENT_BAR:.0%}")


if __name__ == "__main__":
    main()
