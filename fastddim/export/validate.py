"""An exported file against the torch reference: measured at export, and again on demand."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddim.coefficients import StepTable
from fastddim.export.bundle import Bundle
from fastddim.export.bundle_sampler import BundleSampler, open_sampler
from fastddim.export.modules import DTYPES, Denoiser, describe, prepared
from fastddim.noise import STREAM_INITIAL, normal
from fastddim.reference import ddim_step
from fastddim.schedule import Schedule

PARITY_STEPS = (1, 10, 50)
LARGEST_BATCH = 3
# Half-precision models round at every layer, and runtimes fuse them differently.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}
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

    A bfloat16 ONNX file is compared in float32 arithmetic on its bfloat16 weights: ONNX Runtime's CPU has no bfloat16.

    Raises:
        ParityError: a larger difference; the message has the sizes and both numbers.
    """
    dtype = next((p.dtype for p in denoiser.model.parameters() if p.is_floating_point()), torch.float32)
    small = large = denoiser.sample_shape
    if bundle.any_size:
        large = (small[0], 2 * small[1], small[2])
    results = []
    with _opened(bundle, denoiser.model, dtype) as (exported, dtype):
        opened = exported.bundle
        parts = _tables(opened, steps)
        for batch, shape in ((1, small), (LARGEST_BATCH, large)):
            for table in parts:
                if opened.schedule is None:
                    exported.bundle = _with_steps(opened, len(table))
                entry = _compare(exported, denoiser, table, batch, shape, dtype, tolerance)
                _require_parity(entry, f"after {len(table)} steps of a batch of {batch} of {shape}")
                results.append(entry)
    return results


def _tables(bundle: Bundle, steps: Sequence[int]) -> list[StepTable]:
    """The runs to compare, by their numbers of steps."""
    if bundle.schedule is None:
        own = len(bundle.table)
        return [_with_steps(bundle, count).table for count in sorted({min(count, own) for count in steps})]
    schedule, sampling = Schedule(bundle.schedule), bundle.manifest["sampling"]
    options = {name: sampling[name] for name in ("eta", "use_clipped_model_output")}
    return [StepTable.build(schedule, schedule.pairs(count), **options) for count in steps]


def _with_steps(bundle: Bundle, count: int) -> Bundle:
    """A bundle with the first rows of its table alone."""
    table = dict(bundle.manifest["table"])
    table |= {name: table[name][:count] for name in ("timesteps", "coefficients")}
    return Bundle(bundle.path, {**bundle.manifest, "table": table})


@contextlib.contextmanager
def _opened(bundle: Bundle, model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[BundleSampler, torch.dtype]]:
    """What samples from the bundle, and the dtype of its arithmetic, which is the model's meanwhile."""
    if bundle.runtime != "onnx":
        yield open_sampler(bundle), dtype
        return
    with _runnable(bundle.model_path, model, dtype) as (path, runs_in):
        sampling = {**bundle.manifest["sampling"], "dtype": str(runs_in).removeprefix("torch.")}
        opened = Bundle(path.parent, {**bundle.manifest, "sampling": sampling})
        yield open_sampler(opened, providers="cpu", session_options=_session_options()), runs_in


@contextlib.contextmanager
def _runnable(path: Path, model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[Path, torch.dtype]]:
    """A graph that a CPU runs, and the dtype of its arithmetic, which is the model's meanwhile."""
    if dtype != torch.bfloat16:
        yield path, dtype
        return
    with tempfile.TemporaryDirectory() as folder, prepared(model, torch.float32):
        import onnx

        from fastddim.export.graph import widen

        widened = Path(folder, path.name)
        beside = path.with_name(f"{path.name}.data")
        if beside.exists():
            shutil.copyfile(beside, widened.with_name(beside.name))
        onnx.save_model(widen(onnx.load(path, load_external_data=False)), widened)
        yield widened, torch.float32


def measure_component(
    path: Path,
    name: str,
    module: torch.nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    dtype: torch.dtype,
    tolerance: float | None = None,
) -> list[dict[str, Any]]:
    """Largest differences between a component's file and its module, for the manifest.

    Args:
        path: of the graph.
        name: of the component.
        module: in evaluation mode; takes a dictionary of inputs and returns a tuple.
        batches: inputs `[B, ...]` to compare with.
        dtype: of the module's weights.
        tolerance: the largest difference. By default what the dtype explains, of the largest value where that is above 1.

    Raises:
        ParityError: a larger difference; the message has the component and both numbers.
    """
    import onnxruntime

    with _runnable(path, module, dtype) as (file, dtype), torch.no_grad():
        session = onnxruntime.InferenceSession(str(file), _session_options(), providers=["CPUExecutionProvider"])
        arrays = [{key: value.numpy() for key, value in inputs.items()} for inputs in batches]
        pairs = [
            (module(dict(inputs)), session.run(None, given)) for inputs, given in zip(batches, arrays, strict=True)
        ]
    results = []
    for inputs, (expected, actual) in zip(batches, pairs, strict=True):
        first = next(iter(inputs.values()))
        largest = max(float(value.abs().max()) for value in expected)
        # numpy's maximum keeps a NaN, Python's need not.
        error = float(np.max([np.abs(have - want.numpy()).max() for have, want in zip(actual, expected, strict=True)]))
        entry = {
            "component": name,
            "batch": first.shape[0],
            "size": list(first.shape[1:]),
            "largest_error": error if math.isfinite(error) else math.inf,
            "tolerance": _TOLERANCES[dtype] * max(1.0, largest) if tolerance is None else tolerance,
        }
        _require_parity(entry, f"in {name}, a batch of {first.shape[0]} of {tuple(first.shape[1:])}")
        results.append(entry)
    return results


def _session_options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Threads that spin between calls would slow torch, whose turn it is then.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _require_parity(entry: Mapping[str, Any], where: str) -> None:
    if not entry["largest_error"] <= entry["tolerance"]:
        raise ParityError(
            f"model: the exported file differs from torch by {entry['largest_error']:.3g} (tolerance"
            f" {entry['tolerance']:.3g}) {where}"
        )


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
    conditions, uncond = _draw_conditions(denoiser, batch, device)
    scales: dict[str, Any] = {"guidance_rescale": 0.5 if sampling["guidance_rescale"] else 0.0}
    given = conditions
    if sampling["guided"]:
        scales["guidance_scale"] = 2.0
        given = {name: torch.cat([uncond[name], value]) for name, value in conditions.items()}
    options = {"limit": bundle.limit, **scales}
    start = normal(range(batch), 0, shape, STREAM_INITIAL, device=device) * table.start_scale
    expected = _sample(denoiser, table, start, given, dtype, options)
    if tolerance is None:
        # A random model is chaotic: what a last-bit change of the start does says how far two programs may be apart.
        nudged = _sample(denoiser, table, start * (1 + 2**-23), given, dtype, options)
        tolerance = max(_TOLERANCES[dtype], _AMPLIFIED * float((nudged - expected).abs().max()))
    arrays: dict[str, Any] = {name: value.numpy(force=True) for name, value in conditions.items()}
    actual = exported(
        batch if sampling.get("seeded") else start.numpy(force=True),
        seeds=0,
        num_inference_steps=None if bundle.schedule is None else len(table),
        uncond_kwargs={name: value.numpy(force=True) for name, value in uncond.items()} if sampling["guided"] else None,
        **scales,
        **arrays,
    )
    error = float((torch.as_tensor(actual, device=device) - expected).abs().max())
    return {
        "batch": batch,
        "size": list(shape),
        "steps": len(table),
        "largest_error": error if math.isfinite(error) else math.inf,
        "tolerance": tolerance,
    }


@torch.no_grad()
def _sample(
    denoiser: Denoiser,
    table: StepTable,
    x: torch.Tensor,
    conditions: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """A run of seeds 0, 1, ... in plain torch, from the state `x`; `options` are the step's, `dtype` is the model's."""
    batch, copies = x.shape[0], 2 if "guidance_scale" in options else 1
    timesteps = torch.tensor(table.timesteps, dtype=getattr(torch, table.timestep_dtype), device=x.device)
    for step in range(len(table)):
        called = torch.cat([x] * copies).to(dtype)
        output = denoiser.call(called, timesteps[step].repeat(copies * batch), conditions).float()
        noise = normal(range(batch), step, x.shape[1:], device=x.device) if table.stochastic else None
        x, _ = ddim_step(output, x, table, step, noise=noise, **options)
    return x


def _draw_conditions(
    denoiser: Denoiser, batch: int, device: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random conditions, and their unconditional counterparts."""
    generator = torch.Generator().manual_seed(1)
    conditions, uncond = {}, {}
    for name, condition in denoiser.conditions.items():
        shape = (batch, *condition.example.shape[1:])
        if condition.example.is_floating_point():
            conditions[name] = torch.randn(shape, generator=generator).to(condition.example.dtype)
            uncond[name] = torch.randn(shape, generator=generator).to(condition.example.dtype)
        else:
            highest = max(1, int(condition.example.max()) if condition.null is None else condition.null)
            conditions[name] = torch.randint(0, highest, shape, generator=generator)
            uncond[name] = torch.full(shape, 0 if condition.null is None else condition.null)
    placed = [{name: value.to(device) for name, value in group.items()} for group in (conditions, uncond)]
    return placed[0], placed[1]
