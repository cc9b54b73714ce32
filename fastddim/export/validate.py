"""An exported file against the torch reference: measured at export, and again on demand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastddim.coefficients import StepTable
from fastddim.config import require_int
from fastddim.export.bundle import Bundle
from fastddim.export.bundle_sampler import Array, BundleSampler, PreparedCall, load_sampler_class
from fastddim.export.denoisers import DTYPES, Denoiser, describe, prepared
from fastddim.noise import STREAM_INITIAL, normal, normal_numpy
from fastddim.policies.chunk import IMAGE
from fastddim.policies.policy import Policy
from fastddim.sampler import Sampler
from fastddim.samplers import Steps
from fastddim.samplers.sampling import Sampling

PARITY_STEPS = (1, 10, 50)
LARGEST_BATCH = 3
# Half-precision models round at every layer, and runtimes fuse them differently.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}
# How much larger than the effect of a rounding of the start the difference may be.
_AMPLIFIED = 100.0


class ParityError(ValueError):
    """A file whose results differ from the torch reference's."""


def measure_parity(
    bundle: Bundle,
    denoiser: Denoiser,
    *,
    steps: Sequence[int] = PARITY_STEPS,
    tolerance: float | None = None,
) -> list[dict[str, Any]]:
    """Largest differences between the bundle and the torch reference, for the manifest.

    Args:
        bundle: what was written; its hashes need not be there yet.
        denoiser: the model in torch, of the bundle's dtype and on its device.
        steps: numbers of steps to compare; of a bundle made from a table, the first ones of its own, as far as it goes.
        tolerance: the largest difference. By default what the model's dtype explains, or, for models that amplify it, a
            hundred times the effect of a last-bit change of the starting state.

    Raises:
        ParityError: a larger difference; the message has the sizes and both numbers.
    """
    dtype = next((p.dtype for p in denoiser.model.parameters() if p.is_floating_point()), torch.float32)
    small = large = denoiser.sample_shape
    if bundle.any_size:
        large = (small[0], 2 * small[1], small[2])
    results = []
    with load_sampler_class(bundle).compared(bundle, denoiser.model, dtype) as (exported, dtype):
        opened = exported.bundle
        tables = _tables(opened, steps)
        for batch, shape in ((1, small), (LARGEST_BATCH, large)):
            for table in tables:
                if opened.scheduling is None:
                    exported.bundle = _with_steps(opened, len(table))
                results.append(_compare(exported, denoiser, table, batch, shape, dtype, tolerance))
    return results


def _tables(bundle: Bundle, steps: Sequence[int]) -> list[StepTable]:
    """The runs to compare, by their numbers of steps."""
    scheduling = bundle.scheduling
    steps = fit_parity_steps(steps, scheduling)
    if scheduling is None:
        own = len(bundle.table)
        return [_with_steps(bundle, count).table for count in sorted({min(count, own) for count in steps})]
    return [scheduling.build(Steps(count)) for count in steps]


def fit_parity_steps(steps: Sequence[int], sampling: Sampling | None) -> Sequence[int]:
    """The numbers of steps to compare after, checked; the default ones as far as the schedule goes.

    Raises:
        ValueError: a number that the schedule does not have.
    """
    most = None if sampling is None else sampling.most_steps
    if most is not None and tuple(steps) == PARITY_STEPS:
        return sorted({min(count, most) for count in steps})
    for count in steps:
        require_int("parity_steps", count, 1, most)
    return steps


def _with_steps(bundle: Bundle, count: int) -> Bundle:
    """A bundle with the first rows of its table alone."""
    table = dict(bundle.manifest["table"])
    table |= {name: table[name][:count] for name in ("timesteps", "coefficients")}
    return Bundle(bundle.path, {**bundle.manifest, "table": table})


def parity_entry(error: float, tolerance: float, where: str, **compared: Any) -> dict[str, Any]:
    """A comparison as the manifest has it: `compared`, `largest_error` and `tolerance`.

    Raises:
        ParityError: the error is above the tolerance.
    """
    error = error if math.isfinite(error) else math.inf
    if error > tolerance:
        raise ParityError(
            f"model: the exported file differs from torch by {error:.3g} (tolerance {tolerance:.3g}) {where}"
        )
    return {**compared, "largest_error": error, "tolerance": tolerance}


def verify_bundle(
    bundle: Bundle,
    model: torch.nn.Module,
    *,
    example_kwargs: Mapping[str, torch.Tensor] | None = None,
    steps: Sequence[int] = PARITY_STEPS,
    tolerance: float | None = None,
) -> list[dict[str, Any]]:
    """Compare an opened bundle with the model it was exported from, as `export_onnx` does.

    Args:
        bundle: from `open_bundle`.
        model: in torch; it is not changed.
        example_kwargs: as for `export_onnx`.
        steps, tolerance: as `measure_parity`'s.

    Returns:
        The measured entries.

    Raises:
        ParityError: as `measure_parity`.
    """
    if isinstance(model, Policy):
        images = [name for name, feature in model.features.items() if feature.kind == IMAGE]
        dtypes = {name: item["dtype"] for name, item in bundle.taken.items() if name in images}
        committed = bool(bundle.manifest.get("policy", {}).get("committed"))
        example_kwargs = model.example_inputs(next(iter(dtypes.values()), "uint8"), committed)
    denoiser = describe(model, tuple(bundle.manifest["sample"]["shape"]), example_kwargs)
    with prepared(model, DTYPES[bundle.manifest["sampling"]["dtype"]], bundle.device):
        return measure_parity(bundle, denoiser, steps=steps, tolerance=tolerance)


def _compare(
    exported: BundleSampler,
    denoiser: Denoiser,
    table: StepTable,
    batch: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float | None,
) -> dict[str, Any]:
    bundle = exported.bundle
    sampling, device = bundle.manifest["sampling"], bundle.device

    def model(x: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        return (denoiser.repeated or denoiser.call)(x.to(dtype), t, conditions).float()

    sampler = Sampler(
        model,
        table,
        limit=bundle.limit,
        guidance_scale=2.0 if sampling["guided"] else None,
        guidance_rescale=0.5 if sampling["guidance_rescale"] else 0.0,
        guidance_method=sampling.get("guidance_method", "cfg"),
        apg_eta=sampling.get("apg_eta", 0.0),
        apg_norm_threshold=sampling.get("apg_norm_threshold", 0.0),
        sample_shape=shape,
        backend="reference",
        graph="off",
    )
    conditions, uncond = _draw_conditions(denoiser, batch, device)
    kwargs: dict[str, Any] = {**conditions, "uncond_kwargs": uncond if sampling["guided"] else None}
    start = normal(range(batch), 0, shape, STREAM_INITIAL, device=device) * table.start_scale

    def finish(samples: Any) -> Any:
        return samples if denoiser.finish is None else denoiser.finish.module(samples, conditions)[0]

    expected: Any = finish(sampler(start, seeds=0, **kwargs))
    if tolerance is None:
        # A random model is chaotic: what a last-bit change of the start does says how far two programs may be apart.
        nudged: Any = finish(sampler(start * (1 + 2**-23), seeds=0, **kwargs))
        tolerance = max(TOLERANCES[dtype], _AMPLIFIED * float((nudged - expected).abs().max()))
    arrays: dict[str, Any] = {name: value.numpy(force=True) for name, value in conditions.items()}
    given = batch if sampling.get("seeded") else start.numpy(force=True)
    arrays |= {
        "seeds": 0,
        "num_inference_steps": None if bundle.scheduling is None else len(table),
        "guidance_scale": sampler.guidance_scale,
        "guidance_rescale": sampler.guidance_rescale,
    }
    if sampling["guided"]:
        arrays["uncond_kwargs"] = {name: value.numpy(force=True) for name, value in uncond.items()}
    own = exported.outputs(given, **arrays)
    results = [own["samples"]]
    if bundle.before is not None and batch > 1:
        results.append(_run_staggered(exported, exported.prepare(given, **arrays)))
    # A maximum of torch's, which a NaN stays in.
    error = float((torch.stack([torch.as_tensor(actual, device=device) for actual in results]) - expected).abs().max())
    if denoiser.finish is not None:
        made = denoiser.finish.module(torch.as_tensor(own["samples"], device=device), conditions)[1:]
        for name, value in zip(denoiser.finish.outputs, made, strict=True):
            apart = torch.as_tensor(own[name], device=device) - value
            error = max(error, float((apart / value.abs().clamp(min=1)).abs().max()))
    steps = len(table)
    where = f"after {steps} steps of a batch of {batch} of {shape}"
    return parity_entry(error, tolerance, where, batch=batch, size=list(shape), steps=steps)


def _run_staggered(exported: BundleSampler, call: PreparedCall) -> Array:
    """A run in which sample k starts k steps late, so that the samples of a step are at different ones."""
    table, batch = call.table, call.sample.shape[0]
    values = exported.compute_values(table, call.feeds)
    timesteps, rows = np.array(table.timesteps, dtype=table.timestep_dtype), table.columns.astype(np.float32)
    state: Array = call.sample.copy()
    previous = np.zeros_like(state)
    for tick in range(len(table) + batch - 1):
        samples = [k for k in range(batch) if 0 <= tick - k < len(table)]
        steps = [tick - k for k in samples]
        given = {
            **{name: value[samples] for name, value in call.feeds.items()},
            **values.of_samples(samples),
            **values.of_steps(steps, samples),
            "sample": state[samples],
            "timestep": timesteps[steps],
            "coefficients": rows[steps],
            "previous_x0": previous[samples],
            "noise": np.zeros_like(state[samples]),
        }
        if call.seeds is not None:
            drawn = [normal_numpy([call.seeds[k]], tick - k, state.shape[1:]) for k in samples]
            given["noise"] = np.concatenate(drawn)
        taken = {name: given[name] for name in exported.bundle.names("inputs")}
        state[samples], previous[samples] = exported.step(taken)
    return {"next_sample": state, "pred_original_sample": previous}[exported.last_output]


def _draw_conditions(
    denoiser: Denoiser, batch: int, device: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random conditions, and the unconditional counterparts of those that have one."""
    generator = torch.Generator().manual_seed(1)
    conditions, uncond = {}, {}
    for name, condition in denoiser.conditions.items():
        shape, dtype = (batch, *condition.example.shape[1:]), condition.example.dtype
        if dtype.is_floating_point:
            drawn, other = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        else:
            highest = max(1, int(condition.example.max()) if condition.null is None else condition.null)
            # Of truth values both.
            highest += dtype == torch.bool
            drawn = torch.randint(0, highest, shape, generator=generator).to(dtype)
            other = torch.full(shape, condition.null or 0, dtype=dtype)
        conditions[name] = drawn.to(device)
        if not condition.shared:
            uncond[name] = other.to(device)
    return conditions, uncond
