"""What is fixed in exported kernels, checked before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastddim.config import Limit, require_choice, require_guidance_method, require_int
from fastddim.kernels.aot import pointer_types
from fastddim.kernels.plan import StepShape
from fastddim.step import Guidance, StepOptions

TRITON_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
TIMESTEP_DTYPES = {"int64": "i64", "float32": "fp32"}
NOISES = ("none", "given", "drawn")
_MAX_ELEMENTS = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """What is fixed in exported kernels. The table of coefficients, and so the number of steps, is not.

    Attributes:
        shape: one sample's sizes, such as `(4, 64, 64)`.
        batches: sizes of a batch; each has a plan.
        state_dtype, model_dtype: the dtype of the state, and that of the model's output and input: `"float32"`,
            `"float16"` or `"bfloat16"`.
        guided: classifier-free guidance over a stacked model output.
        guidance_rescale: `guidance_rescale` is an argument too.
        guidance_method, apg_eta, apg_norm_threshold: as `method` and the others of `fastddim.Guidance`.
        per_sample: each sample has a row and guidance of its own; otherwise all share one.
        limit: the limit applied to x0, its numbers included.
        noise: `"none"`; `"given"`, an argument; `"drawn"`, from seeds in the kernel.
        x0: the prediction of x0 is a result.
        model_input: the next model input is a result.
        advance: the step moves its row's index on and writes the next timestep, so that a captured launch serves all steps.
        timestep_dtype: with `advance`, the dtype of the table's timesteps: `"int64"` or `"float32"`.

    Raises:
        ValueError: options out of range, or that exclude each other.
    """

    shape: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    state_dtype: str = "float32"
    model_dtype: str = "float32"
    guided: bool = False
    guidance_rescale: bool = False
    guidance_method: str = "cfg"
    apg_eta: float = 0.0
    apg_norm_threshold: float = 0.0
    per_sample: bool = False
    limit: Limit = None
    noise: str = "none"
    x0: bool = False
    model_input: bool = False
    advance: bool = False
    timestep_dtype: str = "int64"

    def __post_init__(self) -> None:
        if not self.shape:
            raise ValueError("shape: empty; pass the sizes of one sample, such as (4, 64, 64)")
        if not self.batches or len(set(self.batches)) < len(self.batches):
            raise ValueError(f"batches: {self.batches!r}; pass one or more sizes, none twice")
        for name in ("shape", "batches"):
            for size in getattr(self, name):
                require_int(name, size, 1)
        if math.prod(self.shape) > _MAX_ELEMENTS:
            raise ValueError(f"shape: {self.shape} has {math.prod(self.shape)} elements; pass fewer than 2**31")
        for name in ("state_dtype", "model_dtype"):
            require_choice(name, getattr(self, name), TRITON_DTYPES)
        require_choice("noise", self.noise, NOISES)
        require_choice("timestep_dtype", self.timestep_dtype, TIMESTEP_DTYPES)
        if self.timestep_dtype != "int64" and not self.advance:
            raise ValueError(f"timestep_dtype: {self.timestep_dtype!r} without advance, which takes them; pass both")
        if self.guidance_rescale and not self.guided:
            raise ValueError("guidance_rescale: True without guided; pass both")
        require_guidance_method(
            "guidance_method", self.guidance_method, self.apg_eta, self.apg_norm_threshold, self.guided, "guided"
        )

    def step_shape(self, batch: int) -> StepShape:
        """What the plan of a batch depends on."""
        each = torch.empty(batch, device="meta")
        own = each if self.per_sample else 1.0
        guidance = Guidance(
            own, own if self.guidance_rescale else 0.0, method=self.guidance_method, apg_eta=self.apg_eta,
            apg_norm_threshold=self.apg_norm_threshold,
        )  # fmt: skip
        options = StepOptions(
            guidance=guidance if self.guided else None,
            limit=self.limit,
            seeds=each if self.noise == "drawn" else None,
            advance=self.advance,
        )
        shape = StepShape(batch, math.prod(self.shape), channels=self.shape[0], row_per_sample=self.per_sample)
        return shape.with_options(options)

    def pointer_types(self, batch: int) -> dict[str, str]:
        """The dtype of every pointer that the kernels of a batch get, by its name in the plan."""
        return pointer_types(
            self.step_shape(batch),
            TRITON_DTYPES[self.state_dtype],
            TRITON_DTYPES[self.model_dtype],
            x0=self.x0,
            model_input=self.model_input,
            noise=self.noise == "given",
            first_row=self.noise == "drawn" and self.per_sample,
            timesteps=TIMESTEP_DTYPES[self.timestep_dtype],
        )
