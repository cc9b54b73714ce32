"""Running an exported policy: observations by name to a chunk of actions, by any runtime. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastddim.export.bundle import Bundle, BundleError, open_bundle
from fastddim.export.bundle_sampler import open_sampler
from fastddim.noise import STREAM_INITIAL, check_seeds, normal_numpy
from fastddim.policies.chunk import IMAGE, KNOWN, Chunk, check_observations

Array = npt.NDArray[Any]
# How far 255 times a pixel may be from an integer: float32 rounds to less.
_PIXEL_ROUNDING = 1e-2


class PolicySampler:
    """Samples chunks of actions from a bundle that `export_policy` wrote.

    Args:
        bundle: the folder, or an opened bundle.
        **options: those of the runtime's sampler, such as `providers` of `OrtSampler`.

    Attributes:
        sampler: the `BundleSampler` that runs the file.
        bundle: the opened bundle; `bundle.manifest["policy"]` describes the policy.

    Raises:
        BundleError: a bundle that is damaged, no policy's, or that this machine cannot run.
    """

    def __init__(self, bundle: str | Path | Bundle, **options: Any) -> None:
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        if "policy" not in opened.manifest:
            raise BundleError(f"bundle: {str(opened.path)!r} is no policy's; run it with fastddim.export.open_sampler")
        self.sampler, self.bundle = open_sampler(opened, **options), opened
        self._policy = opened.manifest["policy"]
        self._features = {
            name: (described["kind"], tuple(described["shape"]))
            for name, described in self._policy["observations"].items()
        }
        self._dtypes = {name: item["dtype"] for name, item in opened.taken.items()}

    def __call__(
        self,
        observations: Mapping[str, Any],
        *,
        noise: Any = None,
        seeds: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        method: str | None = None,
        eta: float | None = None,
        previous: Any = None,
        strength: float = 1.0,
        known: Any = None,
        mask: Any = None,
        deadline: float | None = None,
    ) -> Chunk:
        """A chunk for each sample.

        Args:
            observations: raw, by the features' names, `[B, n_obs_steps, *shape]`: floating-point numbers, pictures uint8 or
                in [0, 1].
            noise: the start, standard normal `[B, horizon, state_dim]`; drawn from `seeds` by default.
            seeds: one for each sample, or an integer s for s, s + 1, ...; needed unless a start is given and no step adds
                noise.
            num_inference_steps, method, eta: the steps of this run; the bundle's own by default. `method="ddim"` takes few
                steps of a policy that is sampled by DDPM.
            previous: `[B, horizon, state_dim]`, normalised: where the run starts instead, noised as far as `strength` says,
                such as the last chunk's `samples`, shifted by what was executed.
            strength: in (0, 1]: the part of the steps that is taken from there.
            known: committed actions `[B, horizon, action_dim]` in the robot's units, which the chunk keeps.
            mask: bool, of this shape: which actions are committed.
            deadline: a time of `time.perf_counter`, after whose passing the next finished step ends the run, with its x0; for
                files of one step.

        Raises:
            ValueError: observations or arguments that do not fit, before the network runs; the message names them.
        """
        values = {name: np.asarray(value) for name, value in observations.items()}
        batch = check_observations(values, self._features, self._policy["n_obs_steps"])
        feeds: dict[str, Any] = {name: self._placed(name, value) for name, value in values.items()}
        shape = tuple(self.bundle.manifest["sample"]["shape"])
        seeded = self.bundle.manifest["sampling"]["seeded"]
        if noise is not None and previous is not None:
            raise ValueError("noise: given with previous, whose noise seeds draw; leave out one of them")
        if (strength < 1) != (previous is not None):
            raise ValueError(f"strength: {strength!r} {'without' if previous is None else 'with'} previous; pass both")
        drawn = None
        if noise is not None:
            start: Any = np.asarray(noise, np.float32)
        elif seeds is None:
            raise ValueError(
                "seeds: None without noise; pass one integer for each sample, or an integer s for s, s + 1, ..."
            )
        else:
            start = drawn = None if seeded else normal_numpy(check_seeds(seeds, batch), 0, shape, STREAM_INITIAL)
        if previous is not None:
            start = self._noised(previous, drawn, (batch, *shape), num_inference_steps, method, eta, strength)
        feeds |= self._known(known, mask, batch, drawn if noise is None else start)
        results = self.sampler.outputs(
            batch if seeded else start, seeds=seeds, num_inference_steps=num_inference_steps, method=method, eta=eta,
            strength=strength, deadline=deadline, **feeds,
        )  # fmt: skip
        return Chunk(results["actions"], results["normalised"], results["samples"])

    def _placed(self, name: str, value: Array) -> Array:
        """An observation in the dtype that the file takes."""
        kind, wanted = self._features[name][0], self._dtypes[name]
        if kind != IMAGE or str(value.dtype) == wanted:
            return value
        if wanted != "uint8":
            return (value / np.float32(255)).astype(np.float32) if value.dtype == np.uint8 else value
        pixels = np.rint(value.astype(np.float64) * 255)
        if np.abs(value * 255.0 - pixels).max() > _PIXEL_ROUNDING:
            raise ValueError(
                f"{name}: pixels that are no 255ths, and this file takes uint8; pass uint8, or export with"
                " image_dtype='float32'"
            )
        return pixels.astype(np.uint8)

    def _noised(
        self,
        previous: Any,
        noise: Array | None,
        shape: tuple[int, ...],
        num_inference_steps: int | None,
        method: str | None,
        eta: float | None,
        strength: float,
    ) -> Array:
        """The last chunk at the level of the first step that is taken."""
        if noise is None:
            raise ValueError("previous: this bundle draws its own start from seeds; export it without seeded")
        value = np.asarray(previous, np.float32)
        if value.shape != shape:
            raise ValueError(f"previous: shape {value.shape}; pass {list(shape)}")
        table = self.sampler.table(num_inference_steps, eta=eta, method=method, strength=strength)
        if table.noising is None:
            raise ValueError("previous: this bundle's table has no noising rule; leave it out")
        from_x0, from_noise = (np.float32(factor) for factor in table.noising)
        noised: Array = value * from_x0 + noise * from_noise
        return noised

    def _known(self, known: Any, mask: Any, batch: int, noise: Any) -> dict[str, Array]:
        """The committed actions as the file takes them; none where it does and none are given."""
        if not self._policy["committed"]:
            if known is not None or mask is not None:
                raise ValueError("known, mask: this file takes none; export it with committed=True (--committed)")
            return {}
        if (known is None) != (mask is None):
            raise ValueError("known, mask: one of the two; pass both, or none")
        shape = (batch, self._policy["horizon"], self._policy["action_dim"])
        chosen = np.zeros(shape, bool) if mask is None else np.asarray(mask)
        decided = np.zeros(shape, np.float32) if known is None else np.asarray(known, np.float32)
        for name, value in (("known", decided), ("mask", chosen)):
            if value.shape != shape:
                raise ValueError(f"{name}: shape {value.shape}; pass {list(shape)}")
        if chosen.dtype != bool:
            raise ValueError(f"mask: {chosen.dtype}; pass bool")
        if not np.isfinite(decided[chosen]).all():
            raise ValueError("known: has NaN or infinite values where mask is True")
        noise = np.zeros(shape, np.float32) if noise is None else noise[..., : self._policy["action_dim"]]
        return dict(zip(KNOWN, (decided, chosen, np.ascontiguousarray(noise)), strict=True))
