"""Running a bundle's AOTInductor package with torch. Tensors in, tensors out."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddim.export.bundle import Bundle, BundleError
from fastddim.export.bundle_sampler import BundleSampler, PreparedCall
from fastddim.export.machine import compute_capability, cpu_features
from fastddim.export.torch_arrays import TorchArrays, as_tensor
from fastddim.tracing import quiet


class AotiSampler(BundleSampler):
    """Samples from an AOTInductor bundle: the same seeds give the same samples as `fastddim.Sampler`, to float rounding.

    Arrays are torch tensors on any device, or numpy's; the results are tensors on the package's device.

    Args:
        bundle: a folder that `export_aoti` wrote, or an opened bundle.
        device: where a CUDA package runs, e.g. `"cuda:1"`; the current GPU by default.
        check_finite: look for NaN and infinities in the result, and find the step at which they appeared.

    Attributes:
        bundle: the opened bundle.

    Raises:
        BundleError: a bundle that is damaged, of another runtime, or compiled for other machines than this one.
        ValueError: a device that the package is not for.
    """

    runtime = "aoti"

    def __init__(
        self, bundle: str | Path | Bundle, *, device: str | torch.device | None = None, check_finite: bool = False
    ) -> None:
        super().__init__(bundle, check_finite)
        target = self.bundle.manifest["target"]
        place = torch.device(target["device"] if device is None else device)
        if place.type != target["device"]:
            raise ValueError(f"device: '{place}', but this package is for {target['device']}")
        require_target(self.bundle, place)
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", torch.cuda.current_device())
        self._device = place
        self._arrays = TorchArrays(place)
        index = -1 if place.index is None else place.index
        try:
            with quiet():
                self._package = torch._inductor.aoti_load_package(str(self.bundle.model_path), device_index=index)
        except RuntimeError as error:
            built = self.bundle.manifest["versions"].get("torch")
            raise BundleError(
                f"bundle: {str(self.bundle.model_path)!r} of torch {built} does not load with {torch.__version__}: {error}"
            ) from error

    def device(self) -> str:
        """CPU, or CUDA."""
        return self._device.type.upper()

    def _sample_loop(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            # A number of steps is numpy's, and stays on the host.
            results = self._package({name: as_tensor(inputs[name]) for name in self._inputs})
        return dict(zip(self.bundle.names("outputs"), results, strict=True))

    def _run_steps(self, call: PreparedCall) -> dict[str, Any]:
        sample, table, seeds = call.sample, call.table, call.seeds
        batch = sample.shape[0]
        rows = torch.from_numpy(table.columns.astype(np.float32)).to(self._device)
        timesteps = torch.tensor(table.timesteps, dtype=getattr(torch, table.timestep_dtype), device=self._device)
        noise, previous = torch.zeros_like(sample), torch.zeros_like(sample)
        for step in range(len(table)):
            if seeds is not None:
                noise = self._arrays.normal(seeds, step, sample.shape[1:])
            given = {
                "sample": sample,
                "timestep": timesteps[step].expand(batch).contiguous(),
                "coefficients": rows[step].expand(batch, -1).contiguous(),
                "previous_x0": previous,
                "noise": noise,
                **call.feeds,
            }
            results = self._sample_loop(given)
            sample, previous = results["next_sample"], results["pred_original_sample"]
            late = call.is_late()
            if late:
                break
        return {
            "samples": results["pred_original_sample" if late else self.last_output],
            **{name: results[name] for name in self._made},
        }


def require_target(bundle: Bundle, device: torch.device) -> None:
    """Check that this machine runs a bundle's code: where it cannot, calling it would end the process.

    Args:
        bundle: whose manifest has `target`.
        device: where it is to run, of the target's kind.

    Raises:
        BundleError: what the machine lacks, and the fix.
    """
    target = bundle.manifest["target"]
    name = f"bundle: {str(bundle.path)!r} is"
    built, here = (target["platform"], target["machine"]), (sys.platform, platform.machine())
    if built != here:
        raise BundleError(f"{name} for {' '.join(built)}, this machine is {' '.join(here)}; export it here")
    missing = sorted(set(target["cpu_features"]) - cpu_features())
    if missing:
        raise BundleError(
            f"{name} for a CPU with {', '.join(missing)}, which this one has not; export it here, or with cpu_isa='avx2'"
        )
    if target["device"] == "cpu":
        return
    if not torch.cuda.is_available():
        raise BundleError(f"{name} for CUDA, and torch {torch.__version__} finds no GPU here; export it for the CPU")
    capability = compute_capability(device)
    if target["compute_capability"] != capability:
        raise BundleError(
            f"{name} for compute capability {target['compute_capability']}, '{device}' has {capability}; export it here"
        )
