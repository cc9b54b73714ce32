"""Diffusion Policy's own objects (github.com/real-stanford/diffusion_policy) as a `Policy`, by what they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastddim.policies.chunk import IMAGE, STATE
from fastddim.policies.normalisation import Normalisation
from fastddim.policies.policy import Feature, Policy
from fastddim.samplers.sampling import read_scheduler

_ATTRIBUTES = ("model", "noise_scheduler", "normalizer", "horizon", "action_dim", "n_obs_steps", "n_action_steps")
# How a policy hands its observations to the network.
_GLOBAL, _LOCAL, _INPAINTING = "global", "local", "inpainting"


def from_diffusion_policy(policy: Any) -> Policy:
    """A policy of Diffusion Policy's in memory, whose own modules the result has.

    Args:
        policy: a `DiffusionUnetLowdimPolicy`, whose one observation is `obs`, or a `DiffusionUnetHybridImagePolicy`, whose
            observations are those of its encoder.

    Raises:
        TypeError: something else; the message names what it lacks.
        ValueError: a scheduler or an argument of its steps that is not sampled here.
    """
    missing = [name for name in _ATTRIBUTES if not hasattr(policy, name)]
    if missing:
        raise TypeError(
            f"policy: {type(policy).__name__} has no {missing[0]}; pass a DiffusionUnetLowdimPolicy or a"
            " DiffusionUnetHybridImagePolicy"
        )
    role = _GLOBAL
    if getattr(policy, "obs_as_local_cond", False):
        role = _LOCAL
    elif not getattr(policy, "obs_as_global_cond", True):
        role = _INPAINTING
    kind = "DDPM" if "DDPM" in type(policy.noise_scheduler).__name__ else "DDIM"
    sampling = read_scheduler(policy.noise_scheduler, kind.lower(), "noise_scheduler")
    # What the policy passes to each step of its scheduler.
    options = dict(getattr(policy, "kwargs", {}))
    sampling = sampling.with_options(options, sampling.limit, rederive=False)
    pictures = getattr(policy, "obs_encoder", None)
    shapes = {"obs": (policy.obs_dim,)} if pictures is None else dict(pictures.obs_shapes)
    features = {
        name: Feature(tuple(shape), IMAGE if len(shape) == 3 else STATE, _affine(policy.normalizer, name))
        for name, shape in shapes.items()
    }
    width = policy.obs_dim if pictures is None else policy.obs_feature_dim
    alone = getattr(policy, "pred_action_steps_only", False)
    horizon = policy.n_action_steps if alone else policy.horizon
    # The hybrid policies' first action is that of the newest observation.
    newest = pictures is not None or getattr(policy, "oa_step_convention", False)
    return Policy(
        features,
        _Encoder(pictures, role, policy.n_obs_steps, horizon),
        _Network(policy.model, role, policy.action_dim),
        _affine(policy.normalizer, "action"),
        sampling,
        action_dim=policy.action_dim,
        horizon=horizon,
        n_obs_steps=policy.n_obs_steps,
        n_action_steps=policy.n_action_steps,
        first_action=0 if alone else policy.n_obs_steps - newest,
        num_inference_steps=policy.num_inference_steps,
        state_dim=policy.action_dim + width if role == _INPAINTING else None,
    ).eval()


def _affine(normalizer: Any, name: str) -> Normalisation:
    parameters = normalizer.params_dict[name]
    statistics = {key: parameters[key].detach().cpu().float() for key in ("scale", "offset")}
    return Normalisation("affine", statistics)


class _Encoder(nn.Module):
    """Normalised observations `[B, n_obs_steps, *shape]` as what the network takes."""

    def __init__(self, encoder: nn.Module | None, role: str, n_obs_steps: int, horizon: int) -> None:
        super().__init__()
        self.encoder = encoder
        self._role, self._after = role, horizon - n_obs_steps

    def forward(self, observations: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.encoder is None:
            features = observations["obs"]
        else:
            batch, steps = next(iter(observations.values())).shape[:2]
            encoded = self.encoder({name: value.flatten(0, 1) for name, value in observations.items()})
            features = encoded.unflatten(0, (batch, steps))
        if self._role == _GLOBAL:
            return features.flatten(1)
        # Nothing is known of the moments to come.
        return torch.nn.functional.pad(features, (0, 0, 0, self._after)) if self._role == _LOCAL else features


class _Network(nn.Module):
    """The network, called as its policy calls it."""

    def __init__(self, model: nn.Module, role: str, action_dim: int) -> None:
        super().__init__()
        self.model = model
        self._role, self._action_dim = role, action_dim

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        if self._role == _INPAINTING:
            # Observations stand in the state as they are, without noise.
            seen = torch.cat([x[:, : cond.shape[1], : self._action_dim], cond], dim=-1)
            prediction = self.model(torch.cat([seen, x[:, cond.shape[1] :]], dim=1), t)
        else:
            prediction = self.model(x, t, **{f"{self._role}_cond": cond})
        result: torch.Tensor = prediction
        return result
