"""`Policy`: a robot's diffusion policy as one object, from raw observations to a chunk of actions."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastddim.config import require_choice, require_int
from fastddim.noise import STREAM_INITIAL, check_seeds, normal
from fastddim.policies.chunk import IMAGE, KNOWN, STATE, Chunk, check_observations
from fastddim.policies.normalisation import Normalisation
from fastddim.sampler import Sampler
from fastddim.samplers.sampling import Sampling
from fastddim.schedule import FlowSchedule, Schedule

IMAGE_DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
_KNOWN_MEANINGS = {
    "known": "committed actions in the robot's units, which the chunk keeps",
    "mask": "which actions are committed",
    "known_noise": "standard normal, to noise committed actions with; the start, where that is standard normal",
}


@dataclass(frozen=True)
class Feature:
    """One input of a policy.

    Attributes:
        shape: of one moment's value: `(n,)`, or `(channels, height, width)` of a picture.
        kind: `"state"`, numbers, or `"image"`: uint8, or floating-point numbers in [0, 1].
        normalisation: of its numbers, of a picture's in [0, 1].
    """

    shape: tuple[int, ...]
    kind: str = STATE
    normalisation: Normalisation = field(default_factory=Normalisation)

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, (STATE, IMAGE))


class Denoiser(nn.Module):
    """The network of a policy, and the levels to which known actions are noised for it.

    Args:
        network: called as `network(x, t, cond)`.
        sampling: the schedule.
        action_dim: how many of a moment's numbers are the action.
    """

    levels: torch.Tensor

    def __init__(self, network: nn.Module, sampling: Sampling, action_dim: int) -> None:
        super().__init__()
        self.network, self._action_dim = network, action_dim
        self.schedule = sampling.schedule
        if isinstance(self.schedule, Schedule):
            alpha_bar = torch.tensor(self.schedule.alphas_cumprod)
            levels = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], dim=1).float()
            self.register_buffer("levels", levels, persistent=False)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        cond: torch.Tensor,
        known: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        known_noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The prediction for a state whose known actions are replaced by themselves, noised to the timestep's level.

        What a step makes of the known ones has no part in the others, and the next call replaces it.

        Args:
            x: `[B, horizon, state_dim]`, in the network's dtype.
            t: timesteps `[B]`.
            cond: what `Policy.encode` gave.
            known: normalised actions `[B, horizon, action_dim]`.
            mask: bool, of this shape: which of them are known.
            known_noise: standard normal, of this shape.

        Returns:
            As `x`.
        """
        if known is not None:
            assert mask is not None and known_noise is not None
            signal, sigma = self.levels_at(t, x.dtype)
            noised = signal * known.to(x.dtype) + sigma * known_noise.to(x.dtype)
            actions = torch.where(mask, noised, x[..., : self._action_dim])
            x = actions if x.shape[-1] == self._action_dim else torch.cat([actions, x[..., self._action_dim :]], dim=-1)
        prediction: torch.Tensor = self.network(x, t, cond)
        return prediction

    def levels_at(self, t: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and sigma `[B, 1, 1]` at timesteps `[B]`."""
        if isinstance(self.schedule, FlowSchedule):
            sigma = (t / self.schedule.num_train_timesteps).to(dtype)[:, None, None]
            return 1 - sigma, sigma
        signal, sigma = self.levels[t].to(dtype)[:, :, None, None].unbind(1)
        return signal, sigma


class Policy(nn.Module):
    """A diffusion policy: encoder, network, normalisations and schedule, as its checkpoint has them.

    As a module it is what the exporters take, `policy(x, t, **observations)`; `sample` is for use in torch.

    Args:
        features: the observations by name.
        encoder: from a dictionary of normalised observations `[B, n_obs_steps, *shape]` to what conditions the network,
            `[B, ...]`.
        network: called as `network(x, t, cond)`.
        action: the normalisation of actions.
        sampling: schedule, method and limit. Epsilon is the network's own where x0 is limited, as policies have it.
        action_dim: numbers in one action: the first ones of each moment of what is sampled.
        horizon, n_obs_steps, n_action_steps: how many control steps are sampled, observed and executed.
        first_action: the first of the horizon that is executed.
        num_inference_steps: the steps of a run.
        state_dim: numbers for each moment of the horizon; `action_dim` by default.

    Attributes:
        sample_shape: `(horizon, state_dim)`.
        facts: more that a manifest says of it, by `described`.

    Raises:
        ValueError: lengths that do not fit; the message names them.
    """

    def __init__(
        self,
        features: Mapping[str, Feature],
        encoder: nn.Module,
        network: nn.Module,
        action: Normalisation,
        sampling: Sampling,
        *,
        action_dim: int,
        horizon: int,
        n_obs_steps: int,
        n_action_steps: int,
        first_action: int,
        num_inference_steps: int,
        state_dim: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("action_dim", action_dim), ("horizon", horizon), ("n_obs_steps", n_obs_steps)):
            require_int(name, value, 1)
        require_int("first_action", first_action, 0, horizon - 1)
        require_int("n_action_steps", n_action_steps, 1, horizon - first_action)
        require_int("num_inference_steps", num_inference_steps, 1, sampling.most_steps)
        if not features:
            raise ValueError("features: empty; pass at least one observation")
        self.sampling = sampling.with_options({}, sampling.limit, rederive=False)
        self.features, self.action = dict(features), action
        self.encoder, self.denoiser = encoder, Denoiser(network, sampling, action_dim)
        self.action_dim, self.horizon = action_dim, horizon
        self.n_obs_steps, self.n_action_steps, self.first_action = n_obs_steps, n_action_steps, first_action
        self.num_inference_steps = num_inference_steps
        self.facts: dict[str, Any] = {}
        self.sample_shape = (horizon, state_dim or action_dim)

    def forward(self, x: torch.Tensor, t: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """The network's prediction.

        Args:
            x: `[B, horizon, state_dim]`, in the network's dtype.
            t: timesteps `[B]`.
            **inputs: raw observations by name; `known` in the robot's units, `mask` and `known_noise` where actions are
                committed.

        Returns:
            As `x`.
        """
        prediction: torch.Tensor = self.denoiser(x, t, **self.condition(inputs))
        return prediction

    def condition(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the denoiser takes beside x and t, of `forward`'s other inputs."""
        given = {name: inputs[name] for name in KNOWN if name in inputs}
        observations = {name: value for name, value in inputs.items() if name not in given}
        if given:
            # Where nothing is known there may be anything.
            known = inputs["known"].float().masked_fill(~inputs["mask"], 0.0)
            given["known"] = self.action.normalise(known)
        return {"cond": self.encode(observations), **given}

    def encode(self, observations: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What conditions the network, in its dtype: of raw observations by name, `[B, n_obs_steps, *shape]` each."""
        dtype = next((p.dtype for p in self.denoiser.parameters() if p.is_floating_point()), torch.float32)
        normalised = {}
        for name, feature in self.features.items():
            value = observations[name]
            value = value.float() / 255 if value.dtype == torch.uint8 else value.float()
            normalised[name] = feature.normalisation.normalise(value).to(dtype)
        cond: torch.Tensor = self.encoder(normalised)
        return cond

    def decode(
        self, samples: torch.Tensor, known: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> Chunk:
        """The chunk of finished samples.

        Args:
            samples: `[B, horizon, state_dim]`.
            known: `[B, horizon, action_dim]` in the robot's units, which the chunk has as they are.
            mask: bool, of this shape: which of them are known.
        """
        executed = slice(self.first_action, self.first_action + self.n_action_steps)
        samples = samples.float()
        if known is not None:
            assert mask is not None
            decided = torch.where(mask, self.action.normalise(known), samples[..., : self.action_dim])
            samples = torch.cat([decided, samples[..., self.action_dim :]], dim=-1)
        normalised = samples[:, executed, : self.action_dim]
        actions = self.action.denormalise(normalised)
        if known is not None:
            assert mask is not None
            actions = torch.where(mask[:, executed], known[:, executed], actions)
        return Chunk(actions, normalised, samples)

    def described(self, rate: float | None = None, units: Mapping[str, str] | None = None) -> Policy:
        """The same policy, of whose manifest more is known: the control rate in Hz, and units by name."""
        other = copy.copy(self)
        other.facts = {"rate": rate, "units": dict(units or {})}
        return other

    def meaning(self, name: str) -> str:
        """What an input of `forward` is, in words."""
        if name in _KNOWN_MEANINGS:
            return _KNOWN_MEANINGS[name]
        unit = self.facts.get("units", {}).get(name)
        kind = "pictures, uint8 or in [0, 1]" if self.features[name].kind == IMAGE else "raw numbers"
        return f"the last {self.n_obs_steps} observations, {kind}{f' in {unit}' if unit else ''}; the newest last"

    def record(self, inputs: Collection[str]) -> dict[str, Any]:
        """What a manifest says of the policy, of those of its inputs that a file takes."""
        return {
            "n_obs_steps": self.n_obs_steps,
            "horizon": self.horizon,
            "n_action_steps": self.n_action_steps,
            "first_action": self.first_action,
            "action_dim": self.action_dim,
            "observations": {
                name: {"kind": feature.kind, "shape": list(feature.shape)} for name, feature in self.features.items()
            },
            "committed": KNOWN[0] in inputs,
            "action": self.action.record(),
            "num_inference_steps": self.num_inference_steps,
            "rate": self.facts.get("rate"),
            "units": dict(self.facts.get("units", {})),
        }

    def example_inputs(self, image_dtype: str = "uint8", committed: bool = False) -> dict[str, torch.Tensor]:
        """Inputs of `forward` of two samples, to trace with.

        Args:
            image_dtype: `"uint8"`, or `"float32"` for pictures in [0, 1].
            committed: with `known`, `mask` and `known_noise`.
        """
        require_choice("image_dtype", image_dtype, IMAGE_DTYPES)
        generator = torch.Generator().manual_seed(0)
        inputs = {}
        for name, feature in self.features.items():
            shape = (2, self.n_obs_steps, *feature.shape)
            if feature.kind == IMAGE:
                pixels = torch.randint(0, 256, shape, generator=generator)
                inputs[name] = pixels.byte() if image_dtype == "uint8" else pixels / 255
            else:
                inputs[name] = torch.randn(shape, generator=generator)
        if committed:
            shape = (2, self.horizon, self.action_dim)
            inputs["known"] = torch.randn(shape, generator=generator)
            inputs["mask"] = torch.arange(math.prod(shape)).view(shape) % 3 == 0
            inputs["known_noise"] = torch.randn(shape, generator=generator)
        return inputs

    def sampler(self, **options: Any) -> Sampler:
        """A `Sampler` of the policy's schedule and convention; its calls take `cond=` of `encode`.

        Args:
            **options: of `SamplerOptions`; `method` and `num_inference_steps` are the policy's own by default.
        """
        options = {"num_inference_steps": self.num_inference_steps, "sample_shape": self.sample_shape, **options}
        if options.get("timesteps") is not None or options.get("sigmas") is not None:
            options["num_inference_steps"] = None
        sampling = self.sampling.by(options.pop("method", "auto"), rederive=False)
        return Sampler(self.denoiser, sampling, **options)

    @torch.no_grad()
    def sample(
        self,
        observations: Mapping[str, Any],
        *,
        sampler: Sampler | None = None,
        noise: torch.Tensor | None = None,
        seeds: int | Sequence[int] | None = None,
        previous: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        deadline: float | None = None,
    ) -> Chunk:
        """A chunk of actions for each sample.

        Args:
            observations: raw, by the features' names, `[B, n_obs_steps, *shape]`: floating-point numbers, pictures also
                uint8.
            sampler: from `sampler`, kept by the caller; one of the policy's defaults where it is left out.
            noise: the start, standard normal `[B, horizon, state_dim]`; drawn from `seeds` by default.
            seeds: one for each sample, or an integer s for s, s + 1, ...; needed unless a start is given and no step adds
                noise.
            previous: `[B, horizon, state_dim]`, normalised: where the run starts instead, noised to a sampler's `strength`,
                such as the last chunk's `samples`, `shifted`.
            known: committed actions `[B, horizon, action_dim]` in the robot's units, which the chunk keeps.
            mask: bool, of this shape: which actions are committed.
            deadline: a time of `time.perf_counter`, after whose passing the next finished step ends the run, with its x0.

        Raises:
            ValueError: observations or arguments that do not fit; the message names them.
        """
        sampler = self.sampler() if sampler is None else sampler
        features = {name: (feature.kind, feature.shape) for name, feature in self.features.items()}
        batch = check_observations(observations, features, self.n_obs_steps)
        if (known is None) != (mask is None):
            raise ValueError("known, mask: one of the two; pass both, or none")
        if noise is not None and previous is not None:
            raise ValueError("noise: given with previous, whose noise seeds draw; leave out one of them")
        if noise is not None:
            start = noise = noise.to(sampler.device)
        elif seeds is None:
            raise ValueError(
                "seeds: None without noise; pass one integer for each sample, or an integer s for s, s + 1, ..."
            )
        else:
            noise = normal(check_seeds(seeds, batch), 0, self.sample_shape, STREAM_INITIAL, device=sampler.device)
            start = noise * sampler.table.start_scale if previous is None else sampler.add_noise(previous, seeds)
        values = {name: torch.as_tensor(value, device=sampler.device) for name, value in observations.items()}
        if known is not None and mask is not None:
            shape = (batch, self.horizon, self.action_dim)
            known, mask = (torch.as_tensor(value, device=sampler.device) for value in (known, mask))
            for name, value in (("known", known), ("mask", mask)):
                if tuple(value.shape) != shape:
                    raise ValueError(f"{name}: shape {tuple(value.shape)}; pass {list(shape)}")
            if mask.dtype != torch.bool:
                raise ValueError(f"mask: {mask.dtype}; pass torch.bool")
            values |= {"known": known, "mask": mask, "known_noise": noise[..., : self.action_dim]}
        best: list[torch.Tensor] = []

        def stop(step: int, t: float, x: torch.Tensor, x0: torch.Tensor) -> None:
            if deadline is not None and time.perf_counter() >= deadline:
                best.append(x0.clone())
                raise _TimeIsUpError

        given: dict[str, Any] = self.condition(values)
        try:
            samples: Any = sampler(start, seeds=seeds, callback=None if deadline is None else stop, **given)
        except _TimeIsUpError:
            (samples,) = best
        return self.decode(samples, known, mask)


class _TimeIsUpError(Exception):
    pass


def shifted(samples: torch.Tensor, steps: int) -> torch.Tensor:
    """A chunk `[B, horizon, ...]` some control steps later: the first ones are gone, the last one is repeated."""
    horizon = samples.shape[1]
    require_int("steps", steps, 0, horizon)
    index = torch.arange(steps, horizon + steps, device=samples.device).clamp(max=horizon - 1)
    return samples[:, index]
