"""What a compiled step is of, and the numbers that it reads."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """What a step is compiled for; nothing else compiles another one.

    Attributes:
        guidance: `""` for none, or a name in `config.GUIDANCE_METHODS`.
        cond_first: which half of the model's output is the conditional one.
        rescaled: whether guidance has a rescale.
        limit: `"none"`, `"clip"` to the bound, or `"threshold"`, which divides by the bound too.
        noise, looks_back: whether there is noise, and an x0 of the step before.
        in_place: whether the next state is written over the state.
        by_sample: whether each sample has numbers of its own: tensors are `[B, n]` instead of `[B * n]`.
        parallel: whether the loop is shared among torch's threads.
        dtypes: names of the dtypes of model output, state, noise, next state and x0.
        compute: name of the dtype of the arithmetic.
    """

    guidance: str
    cond_first: bool
    rescaled: bool
    limit: str
    noise: bool
    looks_back: bool
    in_place: bool
    by_sample: bool
    parallel: bool
    dtypes: tuple[str, str, str, str, str]
    compute: str


# The numbers of a step, in the order of their columns. `*_first` says which term leads a sum: 0 the state, 1 the output, 2 x0.
NUMBERS = (
    "x0_first", "x0_ratio", "x0_scale", "next_first", "next_second", "next_ratio", "next_scale", "from_x0",
    "from_previous_x0", "noise_scale", "bound", "weight", "from_cond", "rescale", "kept_parallel", "norm_threshold",
)  # fmt: skip
