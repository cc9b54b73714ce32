"""Counter-based normal noise: (seed, step, element) gives the same bits in numpy, in torch, and on any device.

Philox4x32-10 (Salmon et al., SC'11) keyed by a 64-bit seed turns the counter `(element // 4, 0, step, stream)` into four
words, and Box-Muller turns those into four normals. Logarithm, sine and cosine are polynomials in float32 additions and
multiplications, so that any IEEE machine that does not contract them to fused multiply-adds gives the same bits.
Needs numpy only; torch is imported where a tensor is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Split = Callable[[ModuleType, Any], tuple[Any, Any]]

STREAM_STEP = 0
STREAM_INITIAL = 1

_MASK = 0xFFFFFFFF
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
# Minimax fits: sin(pi/2 f) / f and cos(pi/2 f) in f**2 on |f| <= 1/2 (5e-9, 3e-8), and (log(1 + t) - t + t**2 / 2) / t**3
# on [sqrt(1/2) - 1, sqrt(2) - 1] (3e-8 of the logarithm).
SIN = (1.57079632, -0.645963479, 0.0796802281, -0.00460217699)
COS = (0.999999972, -1.23369701, 0.253598644, -0.0204083525)
LOG = (0.333338379, -0.25001732, 0.199660708, -0.16566227, 0.148710846, -0.143447577, 0.0892735042)
SQRT_HALF_BITS = 0x3F3504F3
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4


def philox(counter: Sequence[Any], seed_words: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 over int64 arrays (numpy or torch) that hold 32-bit words: four counter words, two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed_words
    for _ in range(10):
        # The products pass 2**63 and wrap, which leaves both 32-bit halves right.
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _PHILOX_W[0]) & _MASK, (k1 + _PHILOX_W[1]) & _MASK
    return c0, c1, c2, c3


def _to_float(xp: ModuleType, words: Any) -> Any:
    return words.astype(np.float32) if xp is np else words.to(xp.float32)


def _sqrt(xp: ModuleType, x: Any) -> Any:
    # torch's float32 square root on a CPU is not correctly rounded (MKL); the rounded float64 one is.
    return np.sqrt(x) if xp is np else x.double().sqrt().float()


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    total = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        total = total * x + coefficient
    return total


def split_bits(xp: ModuleType, u: Any) -> tuple[Any, Any]:
    """Positive float32 `u` as an exponent of 2 and a mantissa in `[sqrt(1/2), sqrt(2))`, both float32."""
    bits = u.view(xp.int32) - SQRT_HALF_BITS
    exponent = bits >> 23
    return _to_float(xp, exponent), (bits - (exponent << 23) + SQRT_HALF_BITS).view(xp.float32)


def _log(exponent: Any, mantissa: Any) -> Any:
    """Natural logarithm of a split float32 in (0, 1], at most 0, relative error below 1e-6."""
    t = mantissa - 1.0
    square = t * t
    tail = square * t * _polynomial(t, LOG) - square * 0.5
    return exponent * LN2_HIGH + (t + (tail + exponent * LN2_LOW))


def box_muller(xp: ModuleType, word0: Any, word1: Any, split: Split = split_bits) -> tuple[Any, Any]:
    """Two independent float32 normals from two 32-bit words (int64 arrays of `xp`, numpy or torch)."""
    # A half-step off zero: the radius ends at 6.76 instead of infinity.
    u = _to_float(xp, word0) * 2.0**-32 + 2.0**-33
    radius = _sqrt(xp, _log(*split(xp, u)) * -2.0)
    # The top two bits choose the quadrant, the others the angle in it, in [-1/2, 1/2) quarter turns.
    f = _to_float(xp, (word1 & 0x3FFFFFFF) - 0x20000000) * 2.0**-30
    square = f * f
    sine, cosine = f * _polynomial(square, SIN), _polynomial(square, COS)
    odd, negative = (word1 & 0x40000000) != 0, (word1 & 0x80000000) != 0
    x, y = xp.where(odd, -sine, cosine), xp.where(odd, cosine, sine)
    return radius * xp.where(negative, -x, x), radius * xp.where(negative, -y, y)


def normal_groups(
    xp: ModuleType, seed_words: Sequence[Any], group: Any, step: Any, stream: Any, split: Split = split_bits
) -> Any:
    """`[B, 4 * groups]` from `[B, 1]` key words and `[1, groups]` element // 4; `split` as `split_bits`, the same values."""
    base = group + seed_words[0] * 0
    r0, r1, r2, r3 = philox((base & _MASK, base >> 32, base * 0 + step, base * 0 + stream), seed_words)
    parts = (*box_muller(xp, r0, r1, split), *box_muller(xp, r2, r3, split))
    return xp.stack(parts, -1).reshape(base.shape[0], 4 * base.shape[1])


def check_seeds(seeds: int | Sequence[int], batch_size: int) -> list[int]:
    """One seed per sample, of a sequence, array or tensor; an integer `s` stands for `s, s + 1, ..., s + batch_size - 1`.

    Raises:
        ValueError: no integers, another number of seeds than samples, or a seed outside [0, 2**64).
    """
    given: Any = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    if not isinstance(given, (int, Iterable)):
        raise ValueError(f"seeds: {given!r}; pass integers in [0, 2**64), one per sample, or one integer")
    values = [given + k for k in range(batch_size)] if isinstance(given, int) else list(given)
    if len(values) != batch_size:
        raise ValueError(f"seeds: {len(values)} for a batch of {batch_size}; pass one per sample, or one integer")
    values = [seed.tolist() if hasattr(seed, "tolist") else seed for seed in values]
    for seed in values:
        if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
            raise ValueError(f"seeds: {seed!r}; pass integers in [0, 2**64)")
    return values


def normal_numpy(
    seeds: Sequence[int], step: int, shape: Sequence[int], stream: int = STREAM_STEP
) -> npt.NDArray[np.float32]:
    """Standard normal noise for a batch, without torch.

    Args:
        seeds: one per sample, each in [0, 2**64).
        step: the index of the step in its run.
        shape: the shape of one sample, without the batch dimension.
        stream: `STREAM_STEP` for a step's noise, `STREAM_INITIAL` for the starting state.

    Returns:
        `[len(seeds), *shape]` float32. Sample k depends on `seeds[k]`, `step` and `stream` alone.
    """
    noise: npt.NDArray[np.float32] = _draw(np, seed_bits(seeds), step, shape, stream)
    return noise


def _draw(xp: ModuleType, seeds: Any, step: Any, shape: Sequence[int], stream: int, **place: Any) -> Any:
    """`[B, *shape]` float32 from int64 seeds `[B]` of `xp`, numpy or torch; `place` is the `device` of torch's."""
    n = int(np.prod(shape, dtype=np.int64))
    words = [(seeds[:, None] >> shift) & _MASK for shift in (0, 32)]
    group = xp.arange((n + 3) // 4, dtype=xp.int64, **place)[None]
    return normal_groups(xp, words, group, step, stream)[:, :n].reshape(seeds.shape[0], *shape)


def normal(
    seeds: Sequence[int],
    step: int,
    shape: Sequence[int],
    stream: int = STREAM_STEP,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`normal_numpy` as a torch tensor `[len(seeds), *shape]`, computed on `device`; the float32 bits are the same.

    `dtype` (float32 by default) rounds the finished values.
    """
    import torch

    return normal_for(seed_tensor(seeds, device), step, shape, stream).to(torch.float32 if dtype is None else dtype)


def seed_bits(seeds: Sequence[int]) -> npt.NDArray[np.int64]:
    """`[len(seeds)]` int64 with the 64 bits of each seed in [0, 2**64): those from 2**63 on become negative."""
    return np.array(seeds, dtype=np.uint64).view(np.int64)


def seed_tensor(seeds: Sequence[int], device: torch.device | str | None = None) -> torch.Tensor:
    """`seed_bits` as a tensor on a device."""
    import torch

    return torch.tensor(seed_bits(seeds), device=device)


def normal_for(
    seeds: torch.Tensor, step: int | torch.Tensor, shape: Sequence[int], stream: int = STREAM_STEP
) -> torch.Tensor:
    """`normal` where the seeds are on a device already: `[B, *shape]` float32 for seeds `[B]` of `seed_tensor`.

    `step` may be an integer tensor `[]` or `[B]`, each sample's own.
    """
    import torch

    steps = step.reshape(-1, 1).long() & _MASK if isinstance(step, torch.Tensor) else step
    # On a CPU numpy has several times less to do for each of these many small operations; MPS has no float64.
    tensors = [value for value in (seeds, steps) if isinstance(value, torch.Tensor)]
    plain = all(type(value) is torch.Tensor and value.device.type in ("cpu", "mps") for value in tensors)
    if plain and not torch.compiler.is_compiling():
        counters = steps.numpy(force=True) if isinstance(steps, torch.Tensor) else steps
        drawn = torch.from_numpy(_draw(np, seeds.numpy(force=True), counters, shape, stream))
        return drawn.to(seeds.device)
    noise: torch.Tensor = _draw(torch, seeds, steps, shape, stream, device=seeds.device)
    return noise
