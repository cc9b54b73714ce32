"""The reference's maths for Inductor, in which everything that a row, a guidance or a limit is made of is data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._inductor import inductor_prims

from fastddim.compiled.kinds import NUMBERS, Kind
from fastddim.noise import normal_groups


class StepModule(torch.nn.Module):
    """A step of one kind, which writes its results to its last arguments."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, tensors: Sequence[torch.Tensor]) -> tuple[()]:
        kind, given = self.kind, iter(tensors)
        compute = getattr(torch, kind.compute)
        next(given)
        stacked, state, numbers = next(given), next(given), next(given)
        noise = next(given) if kind.noise else None
        x0_out = next(given)
        x_next = state if kind.in_place else next(given)
        previous = x0_out if kind.looks_back else None
        columns = numbers.unbind(-1)
        at = {name: each[:, None] if kind.by_sample else each for name, each in zip(NUMBERS, columns, strict=True)}

        x, output, direction = state.to(compute), stacked.to(compute), None
        if kind.guidance:
            uncond, cond = (output[1], output[0]) if kind.cond_first else (output[0], output[1])
            direction = uncond if kind.guidance == "cfg++" else None
            output = _guide(kind, uncond, cond, at)
        direction = output if direction is None else direction
        x0 = _sum(
            _pick(at["x0_first"], x, output), _pick(1 - at["x0_first"], x, output), at["x0_ratio"], at["x0_scale"]
        )
        if kind.limit != "none":
            x0 = torch.minimum(torch.maximum(x0, -at["bound"]), at["bound"])
        if kind.limit == "threshold":
            x0 = x0 / at["bound"]
        terms = x, direction, x0
        result = _sum(
            _pick(at["next_first"], *terms), _pick(at["next_second"], *terms), at["next_ratio"], at["next_scale"]
        )
        result = _add(result, x0, at["from_x0"])
        if previous is not None:
            result = _add(result, previous.to(compute), at["from_previous_x0"])
        if noise is not None:
            result = _add(result, noise.to(compute), at["noise_scale"])
        x_next.copy_(result)
        x0_out.copy_(x0)
        return ()


def _pick(which: torch.Tensor, *terms: torch.Tensor) -> torch.Tensor:
    picked = terms[-1]
    for index, term in reversed([*enumerate(terms[:-1])]):
        picked = torch.where(which == index, term, picked)
    return picked


def _sum(first: torch.Tensor, second: torch.Tensor, ratio: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return _add(first, second, ratio) * scale


def _add(total: torch.Tensor, term: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`total + factor * term` with one rounding, as torch's `add` has it; a factor of 0 leaves even an infinite term out."""
    return torch.where(factor == 0, total, _fused(term, factor, total))


def _fused(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """`a * b + c` with one rounding."""
    broadcast = torch.broadcast_tensors(a, b, c)  # type: ignore[no-untyped-call]
    fused: torch.Tensor = inductor_prims.fma(*broadcast)
    return fused


def _guide(kind: Kind, uncond: torch.Tensor, cond: torch.Tensor, at: dict[str, torch.Tensor]) -> torch.Tensor:
    """`reference.combine_guidance`."""
    difference = cond - uncond
    if kind.guidance == "apg":
        norm = _dot(difference, difference).sqrt()
        excess = at["weight"] * (at["norm_threshold"] / norm).clamp(max=1.0)
        size = _dot(cond, cond)
        share = torch.where(size == 0, 0.0, _dot(difference, cond) / size)
        guided = cond + excess * (difference - at["kept_parallel"] * share * cond)
    else:
        base = torch.where(at["from_cond"] != 0, cond, uncond)
        guided = _fused(at["weight"], difference, base)
    if not kind.rescaled:
        return guided
    ratio = cond.std(1, keepdim=True) / guided.std(1, keepdim=True)
    return guided * (at["rescale"] * ratio + (1 - at["rescale"]))


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(1, keepdim=True)


class DrawModule(torch.nn.Module):
    """`noise.normal_for`: writes `[B, ceil(n / 4), 4]`, for seeds `[B]`, steps `[B]` and a stream `[]`, all int64."""

    def forward(self, seeds: torch.Tensor, steps: torch.Tensor, stream: torch.Tensor, out: torch.Tensor) -> tuple[()]:
        words = [(seeds[:, None] >> shift) & 0xFFFFFFFF for shift in (0, 32)]
        group = torch.arange(out.shape[1], dtype=torch.int64, device=seeds.device)[None]
        drawn = normal_groups(torch, words, group, steps[:, None] & 0xFFFFFFFF, stream)
        out.copy_(drawn.view(out.shape))
        return ()
