"""The fused step as TensorRT launches a plugin's kernel: its inputs, then integers, then its outputs, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastddim.kernels.aot import compile_source, specialise
from fastddim.kernels.plan import StepShape, make_grid, make_plan
from fastddim.kernels.step import NUM_COLUMNS, ddim_step_kernel
from fastddim.step import StepOptions

INPUTS = ("model_output", "sample", "coefficients", "noise", "guidance_scale", "guidance_rescale")
NUMBERS = ("n", "batch")
OUTPUTS = ("next_sample", "pred_original_sample")
# Triton's own version of PTX may be too new for the driver or TensorRT: the first one with all of a target, and CUDA 12's.
_PTX_VERSIONS = {range(80, 100): 80, range(100, 103): 87, range(120, 121): 87}


@triton.jit(do_not_specialize=["batch"])
def ddim_step_in_plugin(
    model_output,
    sample,
    coefficients,
    noise,
    guidance_scale,
    guidance_rescale,
    n,
    batch,
    next_sample,
    pred_original_sample,
    GUIDED: tl.constexpr,
    METHOD: tl.constexpr,
    APG_ETA: tl.constexpr,
    APG_NORM_THRESHOLD: tl.constexpr,
    LIMIT: tl.constexpr,
    RANGE: tl.constexpr,
    RATIO: tl.constexpr,
    WHOLE: tl.constexpr,
    SAMPLE_AXIS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`ddim_step_kernel` with a row of coefficients, a scale and a rescale for each sample."""
    ddim_step_kernel(
        output_ptr=model_output, sample_ptr=sample, table_ptr=coefficients, ratios_ptr=None, step_ptr=None,
        guidance_ptr=guidance_scale, rescale_ptr=guidance_rescale, limit_ptr=None, statistics_ptr=None, noise_ptr=noise,
        seeds_ptr=None, first_row_ptr=None, next_ptr=next_sample, x0_ptr=pred_original_sample, input_ptr=None,
        timesteps_ptr=None, next_timestep_ptr=None, tickets_ptr=None, n=n, batch=batch, num_steps=batch, channels=1,
        rows=batch, GUIDED=GUIDED, COND_FIRST=False, METHOD=METHOD, APG_ETA=APG_ETA,
        APG_NORM_THRESHOLD=APG_NORM_THRESHOLD, SCALE_PER_SAMPLE=True, RESCALE_PER_SAMPLE=True, ROW_PER_SAMPLE=True,
        LIMIT=LIMIT, RANGE=RANGE, RATIO=RATIO, WHOLE=WHOLE, SAMPLE_AXIS=SAMPLE_AXIS, OUTPUT_CHANNELS_LAST=False,
        INPUT_CHANNELS_LAST=False, ADVANCE=False, DEPENDENT=False, EVEN=EVEN, BLOCK=BLOCK, CHUNK=CHUNK,
        COLUMNS=NUM_COLUMNS,
    )  # fmt: skip


@dataclass(frozen=True)
class PluginStep:
    """How the step is launched for any batch.

    Attributes:
        inputs: the kernel's inputs, in order.
        elements: the size of one sample.
        constants: the kernel's compile-time arguments.
        blocks: programs for each sample.
        num_warps: warps of a program.
    """

    inputs: tuple[str, ...]
    elements: int
    constants: dict[str, Any]
    blocks: int
    num_warps: int

    def grid(self, batch: Any) -> tuple[Any, Any]:
        """Programs in two dimensions; `batch` may be symbolic."""
        return (self.blocks, batch) if self.constants["SAMPLE_AXIS"] else (batch, self.blocks)


def plan_plugin_step(batch: int, elements: int, options: StepOptions, largest_batch: int) -> PluginStep | None:
    """Choose the constants, which are the same for every batch.

    Args:
        batch: the usual batch size.
        elements: the size of one sample.
        options: a limit, and noise and guidance with values for each sample; their tensors may be on the meta device.
        largest_batch: the largest batch size of all calls.

    Returns:
        None where the step takes several launches: a threshold, rescale or projection of samples too large for one program.
    """
    shape = StepShape(batch, elements, row_per_sample=True).with_options(options)
    plan = make_plan(shape)
    if len(plan.calls) > 1:
        return None
    (call,) = plan.calls
    asked = {"noise": options.noise is not None, "guidance_scale": shape.guided, "guidance_rescale": shape.rescale}
    constants = {name: value for name, value in call.constants.items() if name in ddim_step_in_plugin.arg_names}
    blocks = triton.cdiv(elements, constants["BLOCK"])
    constants["SAMPLE_AXIS"], _ = make_grid(largest_batch, blocks, elements)
    inputs = tuple(name for name in INPUTS if asked.get(name, True))
    return PluginStep(inputs, elements, constants, blocks, call.num_warps)


@dataclass(frozen=True)
class PluginKernel:
    """A compiled step.

    Attributes:
        step: what was compiled.
        model_dtype: Triton's dtype of the model's output; the other tensors are float32.
        target: the GPU's architecture, such as `"sm_90a"`.
        entry: the kernel's name in the PTX.
        ptx: the code, whose parameters are the step's inputs, `NUMBERS` and `OUTPUTS`.
        threads: threads of a block.
        shared_bytes: shared memory of a block.
    """

    step: PluginStep
    model_dtype: str
    target: str
    entry: str
    ptx: str
    threads: int
    shared_bytes: int


def compile_plugin_step(step: PluginStep, model_dtype: str, capability: int) -> PluginKernel:
    """Compile a step, no GPU needed.

    Args:
        model_dtype: Triton's dtype of the model's output.
        capability: the GPU's compute capability, times ten.

    Raises:
        ValueError: this version of Triton gives the kernel other parameters.
    """
    version = next((version for targets, version in _PTX_VERSIONS.items() if capability in targets), None)
    options = {} if version is None else {"ptx_version": version}
    compiled = compile_source(_source(step, model_dtype), step.num_warps, GPUTarget("cuda", capability, 32), **options)
    ptx = drop_scratch(compiled.asm["ptx"], _parameters(step))
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    metadata = compiled.metadata
    return PluginKernel(step, model_dtype, target, metadata.name, ptx, metadata.num_warps * 32, metadata.shared)


def _source(step: PluginStep, model_dtype: str) -> ASTSource:
    # TensorRT's tensors begin at multiples of 256 bytes.
    pointers = dict.fromkeys((*step.inputs, *OUTPUTS), "fp32") | {"model_output": model_dtype}
    # An n of 1 would become a constant, and TensorRT passes it all the same.
    numbers = {"n": max(2, step.elements), "batch": 0}
    return specialise(ddim_step_in_plugin, pointers, numbers, step.constants)


def _parameters(step: PluginStep) -> list[str]:
    """The PTX types of what TensorRT passes."""
    return [*["u64"] * len(step.inputs), *["u32"] * len(NUMBERS), *["u64"] * len(OUTPUTS)]


def drop_scratch(ptx: str, parameters: Sequence[str]) -> str:
    """PTX without the pointers to scratch memory that Triton appends to a kernel's parameters, and that nothing reads.

    Args:
        ptx: the code of one kernel.
        parameters: the types of the parameters that stay, such as `"u64"`.

    Raises:
        ValueError: others are declared, or the kernel reads the pointers.
    """
    head = re.search(r"\.entry \w+\(\n(.*?)\n\)", ptx, re.DOTALL)
    declared = [] if head is None else head[1].split(",\n")
    found = [re.findall(r"\.param \.(\w+) .*?(\w+)$", line) for line in declared]
    kinds = [kind for each in found for kind, _ in each]
    scratch = [name for each in found[len(parameters) :] for _, name in each]
    read = [name for name in scratch if len(re.findall(rf"\b{name}\b", ptx)) > 1]
    if head is None or kinds[: len(parameters)] != list(parameters) or set(kinds[len(parameters) :]) - {"u64"} or read:
        raise ValueError(
            f"Triton {triton.__version__} gives the kernel parameters {kinds} and reads {read or 'no'} scratch memory, TensorRT"
            f" passes {list(parameters)}; install a version that fastddim supports"
        )
    kept = ",\n".join(declared[: len(parameters)])
    return ptx[: head.start(1)] + kept + ptx[head.end(1) :]
