"""Sampling from a bundle, whatever runs its file: the call's checks, table, noise and inputs. No torch."""

from __future__ import annotations

import bisect
import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastddim.coefficients import StepTable
from fastddim.config import require_int
from fastddim.export.bundle import Bundle, BundleError, open_bundle, require_runtime
from fastddim.export.run_values import RunValues
from fastddim.export.runtime import get_runtime
from fastddim.noise import STREAM_INITIAL, STREAM_STEP, check_seeds, normal_numpy
from fastddim.samplers import Steps

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

_RESULTS = ("samples", "next_sample", "pred_original_sample")

_OWN = ("sample", "timestep", "timesteps", "coefficients", "previous_x0", "noise", "guidance_scale", "guidance_rescale",
        "num_inference_steps", "seed")  # fmt: skip


class NotFiniteError(ArithmeticError):
    """The model returned NaN or an infinity; the message says at which step."""


class NumpyArrays:
    """What a sampler does with arrays, in numpy. A subclass does it with another library's."""

    def __contains__(self, value: object) -> bool:
        """Whether a value is an array, rather than a number or a list."""
        return isinstance(value, np.ndarray)

    def place(self, value: Any) -> Any:
        """A value as an array where the runtime wants it."""
        return np.asarray(value)

    def casts(self, array: Any, dtype: str) -> bool:
        """Whether an array converts to a dtype of numpy's name without changing its kind."""
        return bool(np.can_cast(array.dtype, np.dtype(dtype), "same_kind"))

    def is_floating(self, array: Any) -> bool:
        """Whether an array's dtype is a floating-point one."""
        return bool(np.issubdtype(array.dtype, np.floating))

    def cast(self, array: Any, dtype: str) -> Any:
        """A contiguous array of a dtype."""
        return np.ascontiguousarray(array, dtype=np.dtype(dtype))

    def full(self, shape: Sequence[int], value: float, dtype: str) -> Any:
        """A new array of one value."""
        return np.full(tuple(shape), value, dtype=np.dtype(dtype))

    def normal(self, seeds: Sequence[int], step: int, shape: Sequence[int], stream: int = STREAM_STEP) -> Any:
        """`fastddim.noise.normal_numpy`."""
        return normal_numpy(seeds, step, shape, stream)

    def is_finite(self, array: Any) -> bool:
        """Whether no element is NaN or infinite."""
        return bool(np.isfinite(array).all())


@dataclass(frozen=True)
class PreparedCall:
    """A call that its bundle takes.

    Attributes:
        sample: the starting state `[B, ...]` float32; of a file that draws its own, the shape alone.
        table: the steps.
        seeds: those of the steps' noise, where they add any; else None.
        feeds: by name, the inputs that stay the same in all steps, `[B, ...]`, of the graph before the steps too.
        deadline: the time of `time.perf_counter` after which the run ends with the next finished step's x0; None goes on.
    """

    sample: Any
    table: StepTable
    seeds: list[int] | None
    feeds: dict[str, Any]
    deadline: float | None = None

    def is_late(self) -> bool:
        """Whether the run's time is up."""
        return self.deadline is not None and time.perf_counter() >= self.deadline


class BundleSampler(ABC):
    """What the samplers of all runtimes share: a call is checked and becomes the file's inputs.

    Args:
        bundle: a folder that `fastddim export` wrote, or an opened bundle.
        check_finite: look for NaN and infinities in the result, and find the step at which they appeared.

    Attributes:
        runtime: the manifest's name of what runs the file.
        last_output: which of a last step's results the samples are; a policy's are x0, to which its runs lead.
        bundle: the opened bundle.

    Raises:
        BundleError: a bundle that is damaged, or of another runtime.
    """

    runtime: ClassVar[str]

    _arrays = NumpyArrays()

    def __init__(self, bundle: str | Path | Bundle, check_finite: bool) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        require_runtime(self.bundle, self.runtime)
        self.check_finite = check_finite
        manifest = self.bundle.manifest
        self._sampling = manifest["sampling"]
        self._inputs = {item["name"]: item for item in manifest["inputs"]}
        # What the file has beside a loop's samples or a step's two states.
        self._made = [name for name in self.bundle.names("outputs") if name not in _RESULTS]
        self.last_output = "pred_original_sample" if self._made else "next_sample"
        self._taken = self.bundle.taken
        computed = () if self.bundle.before is None else self.bundle.before["outputs"]
        own = {*_OWN, *(item["name"] for item in computed)}
        self._conditions = [name for name in self._taken if name not in own and not name.startswith("uncond_")]
        self._scheduling = self.bundle.scheduling

    @classmethod
    @contextlib.contextmanager
    def compared(
        cls, bundle: Bundle, model: torch.nn.Module, dtype: torch.dtype
    ) -> Iterator[tuple[BundleSampler, torch.dtype]]:
        """The sampler that is compared with torch, and the dtype of its arithmetic, which is the model's meanwhile.

        Args:
            bundle: what was written; its hashes need not be there yet.
            model: the model in torch.
            dtype: the dtype of its weights.
        """
        yield cls(bundle, check_finite=False), dtype

    @abstractmethod
    def device(self) -> str:
        """What the file runs on, for messages."""

    @abstractmethod
    def _sample_loop(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What a file that takes all steps gives, by name."""

    @abstractmethod
    def _run_steps(self, call: PreparedCall) -> dict[str, Any]:
        """What a file that takes one step gives after the last one: `samples`, and what it has beside its two states."""

    def compute_values(self, table: StepTable, feeds: Mapping[str, Any]) -> RunValues:
        """What the graph before the steps computes for a run, once; for a bundle that has one (`Bundle.before`).

        Args:
            table: the run's steps.
            feeds: a prepared call's.
        """
        raise NotImplementedError(f"{type(self).__name__} runs no graph before the steps")

    def step(self, inputs: Mapping[str, Array]) -> tuple[Array, Array]:
        """One step of a file that takes one: any samples, each with a timestep and a row of its own.

        Args:
            inputs: every input of the file, as the manifest describes it.

        Returns:
            The next state and the limited prediction of x0, `[B, ...]`.
        """
        raise NotImplementedError(f"{type(self).__name__} takes whole runs alone")

    def __call__(
        self,
        start: Any,
        *,
        seeds: int | Sequence[int] | None = None,
        num_inference_steps: int | Sequence[int] | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        method: str | None = None,
        strength: float = 1.0,
        guidance_scale: Any = None,
        guidance_rescale: Any = 0.0,
        size: tuple[int, int] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        deadline: float | None = None,
        **conditions: Any,
    ) -> Any:
        """Sample. Arrays are numpy's, or those that the subclass names.

        Args:
            start: how many samples to draw from `seeds`, or the starting state `[B, ...]`. A seeded bundle takes no state.
            seeds: one per sample, or an integer s for s, s + 1, ...
            num_inference_steps, timesteps, eta: the steps of this run; the bundle's own by default. A baked schedule takes
                `num_inference_steps` alone, one for each sample where it was exported with `per_sample_steps`. A bundle
                made from a table takes none of them: it runs its own.
            method: another sampling method, such as `"ddim"` for a model that is sampled by DDPM; the bundle's own by
                default.
            strength: in (0, 1]: below 1 the run starts that far into the chain, from a noised state.
            guidance_scale, guidance_rescale: numbers or `[B]`, for bundles with guidance.
            size: `(height, width)` of the samples, for bundles of any size; the model's own by default.
            uncond_kwargs: the conditions' unconditional halves, where the bundle knows none.
            deadline: a time of `time.perf_counter`: once it has passed, the next finished step ends the run, and its x0 is the
                result. For bundles of one step, as a loop that is stopped returns nothing.
            **conditions: the model's other inputs `[B, ...]`.

        Returns:
            float32 `[B, ...]`.

        Raises:
            ValueError: inputs that the bundle does not take, or of the wrong shape or dtype.
            NotFiniteError: with `check_finite`.
        """
        given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "eta": eta, "method": method}
        results = self.outputs(
            start, seeds=seeds, strength=strength, size=size, deadline=deadline, guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale, uncond_kwargs=uncond_kwargs, **given, **conditions,
        )  # fmt: skip
        return results["samples"]

    def outputs(self, start: Any, **arguments: Any) -> dict[str, Any]:
        """All that the file gives, by name: `samples`, and of a policy `actions` and `normalised`. Arguments as a call's."""
        call = self.prepare(start, **arguments)
        run = self._run_loop if self.bundle.kind == "loop" else self._run_steps
        results = run(call)
        if self.check_finite and not self._arrays.is_finite(results["samples"]):
            raise NotFiniteError(self._blame(call))
        return results

    def prepare(
        self,
        start: Any,
        *,
        seeds: int | Sequence[int] | None = None,
        num_inference_steps: int | Sequence[int] | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        method: str | None = None,
        strength: float = 1.0,
        guidance_scale: Any = None,
        guidance_rescale: Any = 0.0,
        size: tuple[int, int] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        deadline: float | None = None,
        **conditions: Any,
    ) -> PreparedCall:
        """Check a call, and make of it what the file takes, before any of its work; arguments and errors as a call's."""
        shape = self._shape(start, size)
        feeds: dict[str, Any] = {}
        if self._sampling.get("per_sample_steps"):
            counts = self._counts(num_inference_steps, shape[0])
            feeds["num_inference_steps"] = self._arrays.place(counts)
            num_inference_steps = int(counts.max())
        table = self.table(num_inference_steps, timesteps=timesteps, eta=eta, method=method, strength=strength)
        seeded = self._sampling.get("seeded", False)
        noisy = self._sampling["stochastic"] and table.stochastic
        given = start in self._arrays
        if seeded and given:
            raise ValueError("start: a state, but this bundle draws its own from seeds; pass a batch size")
        if seeds is None and (not given or noisy):
            raise ValueError("seeds: None; pass one integer per sample, or one integer s for s, s + 1, ...")
        seed_list = None if seeds is None else check_seeds(seeds, shape[0])
        if given:
            sample = self._arrays.cast(self._arrays.place(start), "float32")
        else:
            assert seed_list is not None
            if seeded:
                feeds["seed"] = self._arrays.place(np.array(seed_list, dtype=np.uint64).view(np.int64))
                # The file draws it; here is its shape.
                sample = self._arrays.full(shape, 0.0, "float32")
            else:
                sample = self._arrays.normal(seed_list, 0, shape[1:], STREAM_INITIAL) * table.start_scale
        feeds |= {
            **self._scales(shape[0], guidance_scale, guidance_rescale),
            **self._condition_feeds(shape[0], conditions, uncond_kwargs),
        }
        if deadline is not None and self.bundle.kind == "loop":
            raise ValueError("deadline: given for a file that takes all steps at once; export it with kind='step'")
        return PreparedCall(sample, table, seed_list if noisy else None, feeds, deadline)

    def _counts(self, num_inference_steps: int | Sequence[int] | None, batch: int) -> Array:
        """Each sample's number of steps."""
        given = len(self.bundle.manifest["table"]["timesteps"]) if num_inference_steps is None else num_inference_steps
        counts = _on_host(given)
        assert self._scheduling is not None
        most = self._scheduling.most_baked
        fits = counts.shape in ((), (batch,)) and np.issubdtype(counts.dtype, np.integer)
        if not fits or counts.min() < 1 or counts.max() > most:
            raise ValueError(
                f"num_inference_steps: {num_inference_steps!r}; pass an integer in [1, {most}], or one for each of {batch}"
                " samples"
            )
        return np.ascontiguousarray(np.broadcast_to(counts, (batch,)), dtype=np.int64)

    def table(
        self,
        num_inference_steps: int | Sequence[int] | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        method: str | None = None,
        strength: float = 1.0,
    ) -> StepTable:
        """The table of a run; arguments and errors as a call's."""
        default = self.bundle.table
        given: dict[str, Any] = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "eta": eta,
                                 "method": method, "strength": None if strength == 1 else strength}  # fmt: skip
        if self._scheduling is None:
            for name, value in given.items():
                if value is not None:
                    raise ValueError(
                        f"{name}: {value!r}, but this bundle was made from a table and has no schedule to make others"
                        " from; leave it out, or export another table"
                    )
            return default
        if num_inference_steps is not None and not isinstance(num_inference_steps, (int, np.integer)):
            raise ValueError(
                f"num_inference_steps: {num_inference_steps!r}; pass an integer, or export with per_sample_steps=True"
            )
        other_eta = eta is not None and eta != self._scheduling.options.get("eta", 0.0)
        others = (timesteps, method, given["strength"])
        if self._sampling["baked_schedule"] and (other_eta or any(value is not None for value in others)):
            raise ValueError(
                "timesteps, eta, method, strength: this bundle derives its table itself; pass num_inference_steps alone"
            )
        if all(value is None for value in given.values()):
            return default
        if num_inference_steps is None and timesteps is None:
            num_inference_steps = len(default)
        count = None if num_inference_steps is None else int(num_inference_steps)
        if count is not None and self._sampling["baked_schedule"]:
            require_int("num_inference_steps", count, 1, self._scheduling.most_baked)
        scheduling = self._scheduling
        if method is not None:
            # A policy keeps the network's epsilon where x0 is limited.
            scheduling = scheduling.by(method, rederive="policy" not in self.bundle.manifest)
        steps = Steps(count, timesteps, strength=strength)
        table = scheduling.build(steps, **({} if eta is None else {"eta": eta}))
        if table.looks_back != default.looks_back:
            raise ValueError(
                f"method: {method!r} {'needs' if table.looks_back else 'has no'} x0 of the step before, unlike this bundle;"
                " export with this method"
            )
        if table.stochastic and not self._sampling["stochastic"]:
            raise ValueError(f"eta: {eta!r}, but this bundle has no input for noise; export it with stochastic=True")
        return table

    def _shape(self, start: Any, size: tuple[int, int] | None) -> tuple[int, ...]:
        own = self.bundle.manifest["sample"]["shape"]
        expected = self._inputs["sample"]["shape"] if "sample" in self._inputs else ["batch", *own]
        text = f"[{', '.join(map(str, expected))}]"
        if start in self._arrays:
            if not _fits(start.shape, expected) or not self._arrays.is_floating(start):
                raise ValueError(f"start: {start.dtype} of shape {tuple(start.shape)}; pass a float32 state {text}")
            return tuple(start.shape)
        if isinstance(start, bool) or not isinstance(start, (int, np.integer)) or start < 1:
            raise ValueError(f"start: {start!r}; pass a batch size >= 1, or a state {text}")
        if size is None:
            return (int(start), *own)
        if not self.bundle.any_size and tuple(size) != tuple(own[-2:]):
            raise ValueError(f"size: {tuple(size)}; this bundle makes samples of {tuple(own[-2:])} alone")
        for side in size:
            require_int("size", side, 1)
        return (int(start), own[0], *size)

    def _scales(self, batch: int, scale: Any, rescale: Any) -> dict[str, Any]:
        feeds = {}
        if not self._sampling["guided"]:
            if scale is not None:
                raise ValueError(
                    f"guidance_scale: {scale!r}, but this bundle was exported without guidance; leave it out"
                )
        elif scale is None:
            raise ValueError("guidance_scale: None; this bundle has guidance, pass a number or one per sample")
        else:
            feeds["guidance_scale"] = self._per_sample("guidance_scale", scale, batch)
        if self._sampling["guidance_rescale"]:
            feeds["guidance_rescale"] = self._per_sample("guidance_rescale", rescale, batch)
        elif np.any(_on_host(rescale) != 0):
            raise ValueError(f"guidance_rescale: {rescale!r}, but this bundle was exported without it; leave it out")
        return feeds

    def _condition_feeds(
        self, batch: int, conditions: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        uncond = dict(uncond_kwargs or {})
        if uncond and not self._sampling["guided"]:
            raise ValueError("uncond_kwargs: given, but this bundle was exported without guidance; leave them out")
        for name in (*conditions, *uncond):
            if name not in self._conditions:
                raise ValueError(f"{name}: this bundle takes {', '.join(self._conditions) or 'no conditions'}")
        feeds = {}
        for name in self._conditions:
            if name not in conditions:
                raise ValueError(f"{name}: missing; pass an array {self._taken[name]['shape']}")
            feeds[name] = fit_array(name, conditions[name], self._taken[name], batch, self._arrays)
            null = self._sampling["null_values"].get(name)
            _check_labels(name, feeds[name], null)
            other = f"uncond_{name}"
            if other not in self._taken:
                if name in uncond:
                    raise ValueError(f"uncond_kwargs: {name!r} is one input for both halves here; leave it out")
                continue
            if name in uncond:
                feeds[other] = fit_array(other, uncond[name], self._taken[other], batch, self._arrays)
            elif null is not None:
                feeds[other] = self._arrays.full(feeds[name].shape, null, self._taken[other]["dtype"])
            else:
                raise ValueError(f"uncond_kwargs: {name!r} is missing, and the bundle knows no value for it; pass it")
        return feeds

    def _per_sample(self, name: str, value: Any, batch: int) -> Any:
        array = _on_host(value).astype(np.float32)
        if array.shape not in ((), (batch,)) or not all(map(math.isfinite, array.reshape(-1).tolist())):
            raise ValueError(f"{name}: {value!r}; pass a finite number, or one for each of {batch} samples")
        return self._arrays.place(np.ascontiguousarray(np.broadcast_to(array, (batch,))))

    def _run_loop(self, call: PreparedCall) -> dict[str, Any]:
        sample, table, seeds, feeds = call.sample, call.table, call.seeds, call.feeds
        steps = len(table)
        given: dict[str, Any] = {"sample": sample, **feeds} if "sample" in self._inputs else dict(feeds)
        if self._sampling["baked_schedule"]:
            given.setdefault("num_inference_steps", np.array(steps, dtype=np.int64))
        else:
            given["timesteps"] = self._arrays.place(np.array(table.timesteps, dtype=table.timestep_dtype))
            given["coefficients"] = self._arrays.place(table.columns.astype(np.float32))
        if "noise" in self._inputs:
            noise = self._arrays.full((steps, *sample.shape), 0.0, "float32")
            if seeds is not None:
                for step in range(steps):
                    noise[step] = self._arrays.normal(seeds, step, sample.shape[1:])
            given["noise"] = noise
        return self._sample_loop(given)

    def _blame(self, call: PreparedCall) -> str:
        """At which step a run stopped being finite, by runs of the table's first rows."""
        table = call.table
        if not self._arrays.is_finite(call.sample):
            return "start: has NaN or infinite values"
        if self._sampling["baked_schedule"]:
            return "the result has NaN or infinite values; a bundle with a baked schedule cannot tell at which step"
        run = self._run_loop if self.bundle.kind == "loop" else self._run_steps

        def breaks(step: int) -> bool:
            part = StepTable.from_columns(table.timesteps[: step + 1], table.columns[: step + 1])
            return not self._arrays.is_finite(run(replace(call, table=part))["samples"])

        step = bisect.bisect_left(range(len(table) - 1), True, key=breaks)
        return f"the state has NaN or infinite values after step {step} (timestep {table.timesteps[step]})"


def open_sampler(bundle: str | Path | Bundle, **options: Any) -> BundleSampler:
    """The sampler for a bundle's runtime.

    Args:
        bundle: a folder that `fastddim export` wrote, or an opened bundle.
        **options: arguments of the runtime's class, such as `OrtSampler`.

    Raises:
        BundleError: a bundle that is damaged, or that this machine cannot run.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    return load_sampler_class(opened)(opened, **options)


def load_sampler_class(bundle: Bundle) -> type[BundleSampler]:
    """The class that runs a bundle.

    Raises:
        BundleError: its runtime has none; ImportError: what it needs is not installed.
    """
    runtime = get_runtime(bundle.runtime)
    if runtime.sampler is None:
        raise BundleError(f"bundle: {str(bundle.path)!r} is for {bundle.runtime!r}, which has no sampler in Python")
    found: type[BundleSampler] = runtime.load(runtime.sampler)
    return found


def fit_array(
    name: str, value: Any, item: Mapping[str, Any], batch: int | None = None, arrays: NumpyArrays | None = None
) -> Any:
    """An argument as an input of a graph.

    Args:
        name: the argument's name, for errors.
        value: the array.
        item: the manifest's description of the input.
        batch: the first dimension, where it is known.
        arrays: the runtime's library of arrays; numpy's by default.

    Raises:
        ValueError: another shape, or a dtype that does not convert.
    """
    arrays = NumpyArrays() if arrays is None else arrays
    array = arrays.place(value)
    shape = tuple(batch if dim == "batch" and batch is not None else dim for dim in item["shape"])
    if not _fits(array.shape, shape) or not arrays.casts(array, item["dtype"]):
        raise ValueError(f"{name}: {array.dtype} of shape {tuple(array.shape)}; pass {item['dtype']} of shape {shape}")
    return arrays.cast(array, item["dtype"])


def _check_labels(name: str, labels: Any, null: int | None) -> None:
    """Refuse classes that a model has not, of which a graph takes negative ones from the end; a device is not asked."""
    known = name == "class_labels" and null is not None and isinstance(labels, np.ndarray)
    if known and not ((labels >= 0) & (labels <= null)).all():
        raise ValueError(f"{name}: {labels.tolist()}; pass integers in [0, {null}] ({null} is no class)")


def _fits(shape: Sequence[int], expected: Sequence[int | str]) -> bool:
    """Whether a shape is the expected one, names standing for any size."""
    return len(shape) == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, shape, strict=True)
    )


def _on_host(value: Any) -> Array:
    """Numbers, or a tensor on whatever device, in numpy."""
    return np.asarray(value.cpu() if hasattr(value, "cpu") else value)
