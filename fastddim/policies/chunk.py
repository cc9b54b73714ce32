"""What goes into a policy and comes out of it, whatever runs it: names, shapes and their checks. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

STATE, IMAGE = "state", "image"
# What a run takes beside observations where actions are committed.
KNOWN = ("known", "mask", "known_noise")


class Chunk(NamedTuple):
    """What a policy gives.

    Attributes:
        actions: `[B, n_action_steps, action_dim]` float32, in the robot's units: what to execute.
        normalised: the same in the network's range.
        samples: `[B, horizon, state_dim]`, all that was sampled, in the network's range.
    """

    actions: Any
    normalised: Any
    samples: Any


def check_observations(
    observations: Mapping[str, Any], features: Mapping[str, tuple[str, Sequence[int]]], n_obs_steps: int
) -> int:
    """Refuse observations that are not a policy's.

    Args:
        observations: arrays of numpy or tensors by name, `[B, n_obs_steps, *shape]`.
        features: for each name the kind, `STATE` or `IMAGE`, and the shape of one moment.
        n_obs_steps: how many moments.

    Returns:
        B.

    Raises:
        ValueError: a name, a shape, a dtype, or numbers that are not finite or, of pictures, not in [0, 1]; the message
            names the observation.
    """
    for name in observations:
        if name not in features:
            raise ValueError(f"{name}: no observation of this policy, which takes {', '.join(features)}")
    batches = {}
    for name, (kind, shape) in features.items():
        wanted = f"[B, {n_obs_steps}, {', '.join(map(str, shape))}]"
        if name not in observations:
            raise ValueError(f"{name}: missing; pass an array {wanted}")
        value = observations[name]
        if value.ndim < 2 or tuple(value.shape[1:]) != (n_obs_steps, *shape) or not value.shape[0]:
            raise ValueError(f"{name}: shape {tuple(value.shape)}; pass {wanted}")
        batches[name] = int(value.shape[0])
        dtype = str(value.dtype).removeprefix("torch.")
        if kind == IMAGE and dtype == "uint8":
            continue
        if not dtype.startswith(("float", "bfloat")):
            kinds = "uint8, or floating-point numbers in [0, 1]" if kind == IMAGE else "floating-point numbers"
            raise ValueError(f"{name}: {dtype}; pass {kinds}")
        # A tensor on a GPU would be waited for.
        if getattr(value, "is_cuda", False):
            continue
        low, high = float(value.min()), float(value.max())
        if not (low - low == 0 and high - high == 0):
            raise ValueError(f"{name}: has NaN or infinite values; leave out this observation, or repeat the last one")
        if kind == IMAGE and not (low >= 0 and high <= 1):
            raise ValueError(f"{name}: pixels from {low:g} to {high:g}; pass uint8, or divide by 255")
    if len(set(batches.values())) > 1:
        raise ValueError(f"observations: {batches} samples; pass as many of each")
    return next(iter(batches.values()))
