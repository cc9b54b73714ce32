"""Running a bundle with ONNX Runtime. numpy in, numpy out; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from fastddim.coefficients import StepTable
from fastddim.config import DDIMConfig
from fastddim.export.bundle import Bundle, open_bundle
from fastddim.noise import STREAM_INITIAL, check_seeds, normal_numpy
from fastddim.schedule import Schedule

Array = npt.NDArray[Any]

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_INSTALL = {
    "CUDAExecutionProvider": "pip install 'fastddim[gpu]'",
    "TensorrtExecutionProvider": "pip install 'fastddim[gpu,tensorrt]'",
}
_OWN = ("sample", "timestep", "timesteps", "coefficients", "noise", "guidance_scale", "guidance_rescale",
        "num_inference_steps", "seed")  # fmt: skip


class NotFiniteError(ArithmeticError):
    """The model returned NaN or an infinity; the message says at which step."""


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


class OrtSampler:
    """Samples from an exported bundle: the same seeds give the same samples as `fastddim.Sampler`, to float rounding.

    Args:
        bundle: a folder that `fastddim export` wrote, or an opened bundle.
        providers: as `choose_providers`'.
        session_options: `onnxruntime.SessionOptions`, e.g. for threads.
        check_finite: look for NaN and infinities in the result, and find the step at which they appeared.

    Attributes:
        bundle: with its manifest.
        session: ONNX Runtime's.

    Raises:
        BundleError: a bundle that is damaged; ValueError: a provider that is not there.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        providers: str | Sequence[str] | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
        check_finite: bool = False,
    ) -> None:
        chosen = choose_providers(providers)
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        self.session = onnxruntime.InferenceSession(
            str(self.bundle.model_path), sess_options=session_options, providers=chosen
        )
        self.check_finite = check_finite
        manifest = self.bundle.manifest
        self._sampling = manifest["sampling"]
        self._inputs = {item["name"]: item for item in manifest["inputs"]}
        self._conditions = [name for name in self._inputs if name not in _OWN and not name.startswith("uncond_")]
        self._schedule = Schedule(DDIMConfig.from_dict(manifest["schedule"]))
        self._on_gpu = self.session.get_providers()[0] != _PROVIDERS["cpu"]

    def __call__(
        self,
        start: int | Array,
        *,
        seeds: int | Sequence[int] | None = None,
        num_inference_steps: int | Sequence[int] | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        guidance_scale: float | Array | None = None,
        guidance_rescale: float | Array = 0.0,
        size: tuple[int, int] | None = None,
        uncond_kwargs: Mapping[str, Array] | None = None,
        **conditions: Array,
    ) -> Array:
        """Sample.

        Args:
            start: how many samples to draw from `seeds`, or the starting state `[B, ...]`. A seeded bundle takes no state.
            seeds: one per sample, or an integer s for s, s + 1, ...
            num_inference_steps, timesteps, eta: of this run; the bundle's own by default. A baked schedule takes
                `num_inference_steps` alone, one for each sample where it was exported with `per_sample_steps`.
            guidance_scale, guidance_rescale: numbers or `[B]`, for bundles with guidance.
            size: `(height, width)` of the samples, for bundles of any size; the model's own by default.
            uncond_kwargs: the conditions' unconditional halves, where the bundle knows none.
            **conditions: the model's other inputs `[B, ...]`.

        Returns:
            float32 `[B, ...]`.

        Raises:
            ValueError: inputs that the bundle does not take, or of the wrong shape or dtype.
            NotFiniteError: with `check_finite`.
        """
        shape = self._shape(start, size)
        feeds: dict[str, Array] = {}
        if self._sampling.get("per_sample_steps"):
            feeds["num_inference_steps"] = self._counts(num_inference_steps, shape[0])
            num_inference_steps = int(feeds["num_inference_steps"].max())
        table = self._table(num_inference_steps, timesteps, eta)
        seeded = self._sampling.get("seeded", False)
        noisy = self._sampling["stochastic"] and bool((table.columns[:, -1] != 0).any())
        if seeded and isinstance(start, np.ndarray):
            raise ValueError("start: an array, but this bundle draws its states from seeds; pass a batch size")
        if seeds is None and (not isinstance(start, np.ndarray) or noisy):
            raise ValueError("seeds: None; pass one integer per sample, or one integer s for s, s + 1, ...")
        seed_list = None if seeds is None else check_seeds(seeds, shape[0])
        if isinstance(start, np.ndarray):
            sample = np.ascontiguousarray(start, dtype=np.float32)
        else:
            assert seed_list is not None
            if seeded:
                feeds["seed"] = np.array(seed_list, dtype=np.uint64).view(np.int64)
                # The graph draws what this one only has the shape of.
                sample = np.zeros(shape, dtype=np.float32)
            else:
                sample = normal_numpy(seed_list, 0, shape[1:], STREAM_INITIAL)
        feeds |= {
            **self._scales(shape[0], guidance_scale, guidance_rescale),
            **self._condition_feeds(shape[0], conditions, uncond_kwargs),
        }
        run = self._run_loop if self.bundle.graph == "loop" else self._run_steps
        result = run(sample, table, seed_list if noisy else None, feeds)
        if self.check_finite and not np.isfinite(result).all():
            raise NotFiniteError(self._blame(sample, table, seed_list if noisy else None, feeds))
        return result

    def _counts(self, num_inference_steps: int | Sequence[int] | None, batch: int) -> Array:
        """Of each sample."""
        given = len(self.bundle.manifest["table"]["timesteps"]) if num_inference_steps is None else num_inference_steps
        counts = np.asarray(given)
        most = self._schedule.config.num_train_timesteps
        fits = counts.shape in ((), (batch,)) and np.issubdtype(counts.dtype, np.integer)
        if not fits or counts.min() < 1 or counts.max() > most:
            raise ValueError(
                f"num_inference_steps: {num_inference_steps!r}; pass an integer in [1, {most}], or one for each of {batch}"
                " samples"
            )
        return np.ascontiguousarray(np.broadcast_to(counts, (batch,)), dtype=np.int64)

    def _table(self, num_inference_steps: int | Sequence[int] | None, timesteps: Sequence[int] | None, eta: float | None) -> StepTable:
        default = self.bundle.manifest["table"]
        if num_inference_steps is not None and not isinstance(num_inference_steps, (int, np.integer)):
            raise ValueError(
                f"num_inference_steps: {num_inference_steps!r}; pass an integer, or export with per_sample_steps=True"
            )
        if self._sampling["baked_schedule"]:
            if timesteps is not None or (eta is not None and eta != self._sampling["eta"]):
                raise ValueError("timesteps, eta: this bundle derives its table itself; pass num_inference_steps alone")
            num_inference_steps = num_inference_steps or len(default["timesteps"])
        if num_inference_steps is None and timesteps is None and eta is None:
            return StepTable.from_columns(default["timesteps"], np.array(default["coefficients"]))
        if num_inference_steps is None and timesteps is None:
            num_inference_steps = len(default["timesteps"])
        eta = self._sampling["eta"] if eta is None else eta
        table = StepTable.build(
            self._schedule,
            self._schedule.pairs(num_inference_steps, timesteps=timesteps),
            eta=eta,
            use_clipped_model_output=self._sampling["use_clipped_model_output"],
        )
        if eta and not self._sampling["stochastic"]:
            raise ValueError(f"eta: {eta!r}, but this bundle has no input for noise; export it with stochastic=True")
        return table

    def _shape(self, start: int | Array, size: tuple[int, int] | None) -> tuple[int, ...]:
        own = self.bundle.manifest["sample"]["shape"]
        expected = self._inputs.get("sample", {"shape": ["batch", *own]})["shape"]
        text = f"[{', '.join(map(str, expected))}]"
        if isinstance(start, np.ndarray):
            fits = start.ndim == len(expected) and all(
                isinstance(want, str) or want == have for want, have in zip(expected, start.shape, strict=True)
            )
            if not fits or not np.issubdtype(start.dtype, np.floating):
                raise ValueError(f"start: {start.dtype} of shape {start.shape}; pass a float32 state {text}")
            return start.shape
        if isinstance(start, bool) or not isinstance(start, (int, np.integer)) or start < 1:
            raise ValueError(f"start: {start!r}; pass a batch size >= 1, or a state {text}")
        if size is None:
            return (int(start), *own)
        if not self.bundle.any_size and tuple(size) != tuple(own[-2:]):
            raise ValueError(f"size: {tuple(size)}; this bundle makes samples of {tuple(own[-2:])} alone")
        return (int(start), own[0], *size)

    def _scales(self, batch: int, scale: float | Array | None, rescale: float | Array) -> dict[str, Array]:
        feeds = {}
        if not self._sampling["guided"]:
            if scale is not None:
                raise ValueError(f"guidance_scale: {scale!r}, but this bundle was exported without guidance")
        elif scale is None:
            raise ValueError("guidance_scale: None; this bundle has guidance, pass a number or one per sample")
        else:
            feeds["guidance_scale"] = _per_sample("guidance_scale", scale, batch)
        if self._sampling["guidance_rescale"]:
            feeds["guidance_rescale"] = _per_sample("guidance_rescale", rescale, batch)
        elif np.any(np.asarray(rescale) != 0):
            raise ValueError(f"guidance_rescale: {rescale!r}, but this bundle was exported without it")
        return feeds

    def _condition_feeds(
        self, batch: int, conditions: Mapping[str, Array], uncond_kwargs: Mapping[str, Array] | None
    ) -> dict[str, Array]:
        uncond = dict(uncond_kwargs or {})
        for name in (*conditions, *uncond):
            if name not in self._conditions:
                raise ValueError(f"{name}: this bundle takes {', '.join(self._conditions) or 'no conditions'}")
        feeds = {}
        for name in self._conditions:
            if name not in conditions:
                raise ValueError(f"{name}: missing; pass an array {self._inputs[name]['shape']}")
            feeds[name] = fit_array(name, conditions[name], self._inputs[name], batch)
            other = f"uncond_{name}"
            if other not in self._inputs:
                continue
            null = self._sampling["null_values"].get(name)
            if name in uncond:
                feeds[other] = fit_array(other, uncond[name], self._inputs[other], batch)
            elif null is not None:
                feeds[other] = np.full_like(feeds[name], null)
            else:
                raise ValueError(f"uncond_kwargs: {name!r} is missing, and the bundle knows no value for it; pass it")
        return feeds

    def _run_loop(self, sample: Array, table: StepTable, seeds: list[int] | None, feeds: Mapping[str, Array]) -> Array:
        steps = len(table)
        given: dict[str, Array] = {"sample": sample, **feeds} if "sample" in self._inputs else dict(feeds)
        if self._sampling["baked_schedule"]:
            given.setdefault("num_inference_steps", np.array(steps, dtype=np.int64))
        else:
            given["timesteps"] = np.array(table.timesteps, dtype=np.int64)
            given["coefficients"] = table.columns.astype(np.float32)
        if "noise" in self._inputs:
            noise = np.zeros((steps, *sample.shape), dtype=np.float32)
            if seeds is not None:
                for step in range(steps):
                    noise[step] = normal_numpy(seeds, step, sample.shape[1:])
            given["noise"] = noise
        (result,) = self.session.run(["samples"], given)
        samples: Array = result
        return samples

    def _run_steps(self, sample: Array, table: StepTable, seeds: list[int] | None, feeds: Mapping[str, Array]) -> Array:
        batch = sample.shape[0]
        device = "cuda" if self._on_gpu else "cpu"
        place = onnxruntime.OrtValue.ortvalue_from_numpy
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, place(value, device, 0))
        state = place(sample, device, 0)
        silent = None if "noise" not in self._inputs else np.zeros_like(sample)
        for step, timestep in enumerate(table.timesteps):
            binding.bind_ortvalue_input("sample", state)
            binding.bind_ortvalue_input("timestep", place(np.full(batch, timestep, dtype=np.int64), device, 0))
            row = np.repeat(table.columns[step : step + 1].astype(np.float32), batch, axis=0)
            binding.bind_ortvalue_input("coefficients", place(row, device, 0))
            if silent is not None:
                drawn = silent if seeds is None else normal_numpy(seeds, step, sample.shape[1:])
                binding.bind_ortvalue_input("noise", place(drawn, device, 0))
            # The state stays where it is from step to step.
            binding.bind_output("next_sample", device, 0)
            self.session.run_with_iobinding(binding)
            (state,) = binding.get_outputs()
        result: Array = state.numpy()
        return result

    def _blame(self, sample: Array, table: StepTable, seeds: list[int] | None, feeds: Mapping[str, Array]) -> str:
        """At which step a run stopped being finite, by runs of the table's first rows."""
        if not np.isfinite(sample).all():
            return "start: has NaN or infinite values"
        if self._sampling["baked_schedule"]:
            return "the result has NaN or infinite values; a bundle with a baked schedule cannot tell at which step"
        run = self._run_loop if self.bundle.graph == "loop" else self._run_steps
        good, bad = 0, len(table)
        while bad - good > 1:
            middle = (good + bad) // 2
            part = StepTable.from_columns(table.timesteps[:middle], table.columns[:middle])
            if np.isfinite(run(sample, part, seeds, feeds)).all():
                good = middle
            else:
                bad = middle
        return f"the state has NaN or infinite values after step {bad - 1} (timestep {table.timesteps[bad - 1]})"


def fit_array(name: str, value: Array, item: Mapping[str, Any], batch: int | None = None) -> Array:
    """An argument as an input of a graph.

    Args:
        name: of the argument, for errors.
        value: the array.
        item: the manifest's description of the input.
        batch: the first dimension, where it is known.

    Raises:
        ValueError: another shape, or a dtype that does not convert.
    """
    dtype = np.dtype(item["dtype"])
    array = np.asarray(value)
    shape = tuple(batch if dim == "batch" and batch is not None else dim for dim in item["shape"])
    fits = array.ndim == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(f"{name}: {array.dtype} of shape {array.shape}; pass {dtype} of shape {shape}")
    return np.ascontiguousarray(array, dtype=dtype)


def _per_sample(name: str, value: float | Array, batch: int) -> Array:
    array = np.asarray(value, dtype=np.float32)
    if array.shape not in ((), (batch,)) or not all(map(math.isfinite, array.reshape(-1).tolist())):
        raise ValueError(f"{name}: {value!r}; pass a finite number, or one for each of {batch} samples")
    return np.ascontiguousarray(np.broadcast_to(array, (batch,)))
