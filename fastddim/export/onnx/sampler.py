"""Running a bundle with ONNX Runtime. numpy in, numpy out; no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from fastddim.coefficients import StepTable
from fastddim.export.bundle import Bundle
from fastddim.export.bundle_sampler import Array, BundleSampler, PreparedCall
from fastddim.export.run_values import RunValues
from fastddim.noise import normal_numpy

if TYPE_CHECKING:
    import torch

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_INSTALL = {
    "CUDAExecutionProvider": "pip install 'fastddim[gpu]'",
    "TensorrtExecutionProvider": "pip install 'fastddim[gpu,tensorrt]'",
}


def choose_providers(wanted: str | Sequence[str] | None) -> list[str]:
    """Execution providers in the order to try, the CPU last.

    Args:
        wanted: `"cpu"`, `"cuda"`, `"tensorrt"`, ONNX Runtime's own names, or several; None takes CUDA where it is there.

    Raises:
        ValueError: one that is not there, with the line that installs it.
    """
    there = onnxruntime.get_available_providers()
    if wanted is None:
        return [name for name in (_PROVIDERS["cuda"], _PROVIDERS["cpu"]) if name in there]
    names = [_PROVIDERS.get(name, name) for name in ([wanted] if isinstance(wanted, str) else wanted)]
    for name in names:
        if name not in there:
            fix = f"; {_INSTALL[name]}" if name in _INSTALL else ""
            raise ValueError(f"providers: {name!r} is not among {', '.join(there)}{fix}")
    return [*names, *([_PROVIDERS["cpu"]] if _PROVIDERS["cpu"] not in names else [])]


def yielding_options(num_threads: int = 0) -> onnxruntime.SessionOptions:
    """Options for a session whose threads sleep between calls, where spinning would slow whoever has the turn.

    Args:
        num_threads: threads for each operator; 0 is one for each core.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class OrtSampler(BundleSampler):
    """Samples from an exported bundle: the same seeds give the same samples as `fastddim.Sampler`, to float rounding.

    Args:
        bundle: a folder that `fastddim export` wrote, or an opened bundle.
        providers: as `choose_providers`'.
        session_options: `onnxruntime.SessionOptions`, e.g. for threads.
        check_finite: look for NaN and infinities in the result, and find the step at which they appeared.

    Attributes:
        bundle: the opened bundle.
        session: ONNX Runtime's.
        session_before: that of the graph before the steps; None where the bundle has none.

    Raises:
        BundleError: a bundle that is damaged, or no ONNX file; ValueError: a provider that is not there.
    """

    runtime = "onnx"

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        providers: str | Sequence[str] | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
        check_finite: bool = False,
    ) -> None:
        chosen = choose_providers(providers)
        super().__init__(bundle, check_finite)
        if self._sampling["dtype"] == "bfloat16" and chosen == [_PROVIDERS["cpu"]]:
            raise ValueError(
                "providers: ONNX Runtime's CPU has no bfloat16 convolutions; pass 'cuda' or 'tensorrt', or export the"
                " model with another dtype"
            )

        def load(path: Path) -> onnxruntime.InferenceSession:
            return onnxruntime.InferenceSession(str(path), sess_options=session_options, providers=chosen)

        self.session = load(self.bundle.model_path)
        self.session_before = None if self.bundle.before is None else load(self.bundle.before_path)
        self._on_gpu = self.session.get_providers()[0] != _PROVIDERS["cpu"]

    @classmethod
    @contextlib.contextmanager
    def compared(
        cls, bundle: Bundle, model: torch.nn.Module, dtype: torch.dtype
    ) -> Iterator[tuple[BundleSampler, torch.dtype]]:
        from fastddim.export.onnx.parity import runnable

        with runnable(bundle.model_path, model, dtype) as (path, runs_in):
            sampling = {**bundle.manifest["sampling"], "dtype": str(runs_in).removeprefix("torch.")}
            opened = Bundle(path.parent, {**bundle.manifest, "sampling": sampling})
            yield cls(opened, providers="cpu", session_options=yielding_options()), runs_in

    def device(self) -> str:
        """The first execution provider: CPU, CUDA or Tensorrt."""
        first: str = self.session.get_providers()[0]
        return first.removesuffix("ExecutionProvider")

    def _sample_loop(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        names = ["samples", *self._made]
        return dict(zip(names, self.session.run(names, dict(inputs)), strict=True))

    def compute_values(self, table: StepTable, feeds: Mapping[str, Array]) -> RunValues:
        if self.bundle.before is None or self.session_before is None:
            raise ValueError("compute_values: this bundle has no graph before its steps; export it with hoist=True")
        given = {"timesteps": np.array(table.timesteps, dtype=table.timestep_dtype), **feeds}
        outputs = self.bundle.before["outputs"]
        names = [item["name"] for item in outputs]
        inputs = {item["name"]: given[item["name"]] for item in self.bundle.before["inputs"]}
        return RunValues(dict(zip(names, self.session_before.run(names, inputs), strict=True)), outputs)

    def step(self, inputs: Mapping[str, Array]) -> tuple[Array, Array]:
        state, x0 = self.session.run(["next_sample", "pred_original_sample"], dict(inputs))
        return state, x0

    def _run_steps(self, call: PreparedCall) -> dict[str, Array]:
        sample, table, seeds, feeds = call.sample, call.table, call.seeds, call.feeds
        batch = sample.shape[0]
        device = "cuda" if self._on_gpu else "cpu"
        place = onnxruntime.OrtValue.ortvalue_from_numpy
        binding = self.session.io_binding()
        values = RunValues({}, ()) if self.bundle.before is None else self.compute_values(table, feeds)
        for name, value in {**feeds, **values.of_samples()}.items():
            if name in self._inputs:
                binding.bind_ortvalue_input(name, place(value, device, 0))
        state = place(sample, device, 0)
        previous = place(np.zeros_like(sample), device, 0) if table.looks_back else None
        late, results = False, {}
        silent = None if "noise" not in self._inputs else np.zeros_like(sample)
        timesteps = np.repeat(np.array(table.timesteps, dtype=table.timestep_dtype)[:, None], batch, axis=1)
        for step, timestep in enumerate(timesteps):
            binding.bind_ortvalue_input("sample", state)
            row = np.repeat(table.columns[step : step + 1].astype(np.float32), batch, axis=0)
            changed = {"timestep": timestep, "coefficients": row, **values.of_steps([step] * batch)}
            for name, value in changed.items():
                if name in self._inputs:
                    binding.bind_ortvalue_input(name, place(value, device, 0))
            if silent is not None:
                drawn = silent if seeds is None else normal_numpy(seeds, step, sample.shape[1:])
                binding.bind_ortvalue_input("noise", place(drawn, device, 0))
            # The states stay where they are from step to step.
            names = {"next_sample"}
            if previous is not None:
                binding.bind_ortvalue_input("previous_x0", previous)
                names.add("pred_original_sample")
            if step == len(table) - 1 or call.deadline is not None:
                names |= {"pred_original_sample", *self._made}
            for name in names:
                binding.bind_output(name, device, 0)
            self.session.run_with_iobinding(binding)
            results = dict(zip(names, binding.get_outputs(), strict=True))
            state, previous = results["next_sample"], None if previous is None else results["pred_original_sample"]
            binding.clear_binding_outputs()
            late = call.is_late()
            if late:
                break
        return {
            "samples": results["pred_original_sample" if late else self.last_output].numpy(),
            **{name: results[name].numpy() for name in self._made},
        }
