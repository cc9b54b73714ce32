"""Between two states: the spherical interpolation of the DDIM paper's appendix D.5."""

from __future__ import annotations

import math

import torch

from fastddim.config import require_int

# Below this sine, 1 / sine would multiply what the angle's own rounding leaves.
_LEAST_SINE = 1e-6


def slerp(a: torch.Tensor, b: torch.Tensor, n: int) -> torch.Tensor:
    """States along the great circle from `a` to `b`, at equal angles (arXiv:2010.02502, equation 67).

    The angle is that of the whole tensors as vectors. Between two normal states the way stays where normal states are,
    on the sphere of radius sqrt(dimensions), which the straight line leaves. Parallel, opposite or zero tensors, which
    have no one great circle, are interpolated on the line.

    Args:
        a, b: `[...]` of one shape, floating-point.
        n: how many, at least 2: both ends are among them.

    Returns:
        `[n, ...]` in the wider of the two dtypes, `a` first and `b` last; computed in float64.

    Raises:
        TypeError: something that is not a tensor.
        ValueError: `n` below 2, tensors of different shapes, or of integers.
    """
    require_int("n", n, 2)
    for name, state in (("a", a), ("b", b)):
        if not isinstance(state, torch.Tensor):
            raise TypeError(f"{name}: {type(state).__name__}; pass a tensor")
        if not state.is_floating_point():
            raise ValueError(f"{name}: {state.dtype}; pass a floating-point tensor")
    if a.shape != b.shape:
        raise ValueError(f"a, b: shapes {tuple(a.shape)} and {tuple(b.shape)}; pass two states of one shape")
    # MPS has no float64.
    device = torch.device("cpu") if a.device.type == "mps" else a.device
    start, end = (state.to(device).double().flatten() for state in (a, b))
    weight = torch.linspace(0, 1, n, dtype=torch.float64, device=device)[:, None]
    start_weight, end_weight = 1 - weight, weight
    angle = _angle(start, end)
    if math.sin(angle) > _LEAST_SINE:
        start_weight, end_weight = (torch.sin(w * angle) / math.sin(angle) for w in (start_weight, end_weight))
    between = start_weight * start + end_weight * end
    # The ends are the states themselves, to the bit.
    between[0], between[-1] = start, end
    return between.to(torch.promote_types(a.dtype, b.dtype)).reshape(n, *a.shape).to(a.device)


def _angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """The angle between two vectors, 0 if one is zero; twice an arctangent, since an arccosine is blunt near 0 and pi."""
    a_norm, b_norm = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
    if not a_norm * b_norm:
        return 0.0
    a_unit, b_unit = a / a_norm, b / b_norm
    return 2 * math.atan2(float((a_unit - b_unit).norm()), float((a_unit + b_unit).norm()))
