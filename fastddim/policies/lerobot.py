"""LeRobot's diffusion policies: a folder that `save_pretrained` wrote, or the objects in memory, as a `Policy`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fastddim.config import DDIMConfig, require_choice
from fastddim.policies.chunk import IMAGE, STATE
from fastddim.policies.networks import ConditionalUnet1d, ImageEncoder
from fastddim.policies.normalisation import STATISTICS, Normalisation
from fastddim.policies.policy import Feature, Policy
from fastddim.samplers.sampling import Sampling
from fastddim.schedule import Schedule

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_PROCESSORS = {"preprocessor": "policy_preprocessor.json", "postprocessor": "policy_postprocessor.json"}
# What a processor's steps may do without changing numbers, beside normalising them.
_NEUTRAL_STEPS = ("rename_observations_processor", "to_batch_processor", "device_processor")
_NORMALISING = {"preprocessor": "normalizer_processor", "postprocessor": "unnormalizer_processor"}
_STATE, _ENVIRONMENT, _ACTION = "observation.state", "observation.environment_state", "action"
# Where checkpoints before LeRobot 0.4 have their statistics: among the weights.
_OLD_GROUPS = ("normalize_inputs", "unnormalize_outputs", "normalize_targets")


def is_lerobot_folder(path: str | Path) -> bool:
    """Whether a folder is a policy of LeRobot's, of any type."""
    config = Path(path) / CONFIG_FILE
    if not config.is_file():
        return False
    try:
        values = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "output_features" in values and "type" in values


def load_policy(path: str | Path) -> Policy:
    """A robot's diffusion policy, of a folder that LeRobot's `save_pretrained` wrote, on the CPU.

    Args:
        path: with `config.json`, `model.safetensors`, `policy_preprocessor.json`, `policy_postprocessor.json` and the files
            that these name; checkpoints before LeRobot 0.4 have no processors, but statistics among their weights.

    Raises:
        FileNotFoundError: a file that is missing.
        ValueError: another type of policy, or a part that is damaged, missing or not known; the message names the file and
            the field.
    """
    folder = Path(path)
    config = _read_json(folder / CONFIG_FILE)
    weights = _read_tensors(folder / WEIGHTS_FILE)
    old = any(name.startswith(_OLD_GROUPS) for name in weights)
    if old:
        statistics = {"preprocessor": _old_statistics(weights), "postprocessor": _old_statistics(weights)}
        eps = 1e-8
    else:
        statistics, eps = {}, 1e-8
        for kind, file in _PROCESSORS.items():
            statistics[kind], eps = _read_processor(folder, file, kind)
    weights = {name: value for name, value in weights.items() if not name.startswith(_OLD_GROUPS)}
    return _build(config, weights, statistics, eps, str(folder / CONFIG_FILE))


def from_lerobot(policy: Any, preprocessor: Any = None, postprocessor: Any = None) -> Policy:
    """A LeRobot `DiffusionPolicy` in memory, its weights copied to the CPU.

    Args:
        policy: with `config` and `diffusion`.
        preprocessor, postprocessor: LeRobot's pipelines for it, as `make_pre_post_processors` gives them; policies before
            LeRobot 0.4 have their own statistics.

    Raises:
        TypeError: something else.
        ValueError: as `load_policy`.
    """
    if not (hasattr(policy, "config") and hasattr(policy, "diffusion")):
        raise TypeError(f"policy: {type(policy).__name__}; pass LeRobot's DiffusionPolicy")
    weights = {name: value.detach().cpu() for name, value in policy.state_dict().items()}
    if any(name.startswith(_OLD_GROUPS) for name in weights):
        statistics = dict.fromkeys(_PROCESSORS, _old_statistics(weights))
        eps = 1e-8
    else:
        statistics, eps = {}, 1e-8
        for kind, pipeline in (("preprocessor", preprocessor), ("postprocessor", postprocessor)):
            if pipeline is None:
                raise ValueError(f"{kind}: None, and the policy has no statistics of its own; pass LeRobot's {kind}")
            statistics[kind], eps = _statistics_of(pipeline, kind)
    weights = {name: value for name, value in weights.items() if not name.startswith(_OLD_GROUPS)}
    config = {name: getattr(policy.config, name) for name in vars(policy.config)}
    return _build({"type": "diffusion", **config}, weights, statistics, eps, "policy.config")


class _Encoder(nn.Module):
    """State, pictures' features and the environment's state of each moment, side by side: `[B, cond]`."""

    def __init__(self, cameras: Sequence[str], encoders: nn.ModuleList, names: Sequence[str]) -> None:
        super().__init__()
        self.rgb_encoder = encoders
        self._cameras, self._names = tuple(cameras), tuple(names)

    def forward(self, observations: Mapping[str, torch.Tensor]) -> torch.Tensor:
        parts = [observations[_STATE]]
        for index, name in enumerate(self._cameras):
            images = observations[name]
            # One for all cameras, or one for each.
            encoder = self.rgb_encoder[index if len(self.rgb_encoder) > 1 else 0]
            parts.append(encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2]))
        if _ENVIRONMENT in self._names:
            parts.append(observations[_ENVIRONMENT])
        return torch.cat(parts, dim=-1).flatten(1)


def _build(
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    statistics: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]],
    eps: float,
    where: str,
) -> Policy:
    kind = config.get("type")
    if kind != "diffusion":
        raise ValueError(f"type: {kind!r} in {where}; of LeRobot's policies 'diffusion' can be sampled here")
    reader = _Config(config, where)
    inputs = {name: _feature(value) for name, value in reader["input_features"].items()}
    outputs = {name: _feature(value) for name, value in reader["output_features"].items()}
    if _ACTION not in outputs:
        raise ValueError(f"output_features: no {_ACTION!r} in {where}; it has {', '.join(outputs) or 'none'}")
    if _STATE not in inputs:
        raise ValueError(f"input_features: no {_STATE!r} in {where}; it has {', '.join(inputs) or 'none'}")
    cameras = [name for name, (type_, _) in inputs.items() if type_ == "VISUAL"]
    names = [_STATE, *cameras, *([_ENVIRONMENT] if _ENVIRONMENT in inputs else [])]
    modes = {name: str(getattr(mode, "value", mode)) for name, mode in reader["normalization_mapping"].items()}
    modes = {getattr(name, "value", name): mode for name, mode in modes.items()}

    def normalisation(name: str, type_: str, kind: str) -> Normalisation:
        # LeRobot's types of states share one entry, but for those that have their own.
        mode = modes.get(type_, "IDENTITY").lower()
        require_choice(f"normalization_mapping.{type_}", mode, tuple(STATISTICS))
        found = statistics[kind].get(name, {})
        missing = [statistic for statistic in STATISTICS[mode] if statistic not in found]
        if missing:
            raise ValueError(
                f"{name}: no {' and '.join(missing)} among the statistics of the {kind}, which mode {mode.upper()!r} takes;"
                " save the policy with the processors of its dataset"
            )
        chosen = {statistic: found[statistic].float() for statistic in STATISTICS[mode]}
        if type_ == "VISUAL":
            chosen = {statistic: value.reshape(-1, 1, 1) for statistic, value in chosen.items()}
        try:
            return Normalisation(mode, chosen, eps)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    features = {
        name: Feature(
            inputs[name][1],
            IMAGE if name in cameras else STATE,
            normalisation(name, inputs[name][0], "preprocessor"),
        )
        for name in names
    }
    action_shape = outputs[_ACTION][1]
    encoders = nn.ModuleList()
    if cameras:
        count = len(cameras) if reader["use_separate_rgb_encoder_per_camera"] else 1
        encoders.extend(_image_encoder(reader, inputs[cameras[0]][1]) for _ in range(count))
    n_obs_steps, horizon = reader["n_obs_steps"], reader["horizon"]
    width = sum(shape[0] for name, (_, shape) in inputs.items() if name in (_STATE, _ENVIRONMENT))
    width += sum(encoders[index if len(encoders) > 1 else 0].feature_dim for index in range(len(cameras)))  # type: ignore[misc]
    network = ConditionalUnet1d(
        action_shape[0],
        n_obs_steps * width,
        reader["down_dims"],
        kernel_size=reader["kernel_size"],
        n_groups=reader["n_groups"],
        diffusion_step_embed_dim=reader["diffusion_step_embed_dim"],
        use_film_scale_modulation=reader["use_film_scale_modulation"],
    )
    encoder = _Encoder(cameras, encoders, names)
    _load_weights(encoder, network, weights, where)
    sampling = _sampling(reader)
    steps = reader["num_inference_steps"]
    return Policy(
        features,
        encoder.eval(),
        network.eval(),
        normalisation(_ACTION, outputs[_ACTION][0], "postprocessor"),
        sampling,
        action_dim=action_shape[0],
        horizon=horizon,
        n_obs_steps=n_obs_steps,
        n_action_steps=reader["n_action_steps"],
        first_action=n_obs_steps - 1,
        num_inference_steps=sampling.most_steps if steps is None else steps,
    ).eval()


class _Config:
    """A configuration whose missing fields are errors that name them."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self._where = values, where

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise ValueError(f"{name}: missing in {self._where}; save the policy with LeRobot 0.2 or later")
        return self._values[name]

    def get(self, name: str) -> Any:
        return self._values.get(name)


def _feature(value: Any) -> tuple[str, tuple[int, ...]]:
    """Type and shape, of JSON or of LeRobot's `PolicyFeature`."""
    if not isinstance(value, Mapping):
        value = {"type": value.type, "shape": value.shape}
    kind = value["type"]
    return str(getattr(kind, "value", kind)), tuple(value["shape"])


def _sampling(config: _Config) -> Sampling:
    method = {"DDIM": "ddim", "DDPM": "ddpm"}.get(config["noise_scheduler_type"])
    if method is None:
        raise ValueError(f"noise_scheduler_type: {config['noise_scheduler_type']!r}; 'DDIM' and 'DDPM' can be sampled")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "clip_sample",
             "clip_sample_range")  # fmt: skip
    schedule = Schedule(DDIMConfig(**{name: config[name] for name in names}))
    return Sampling(schedule, method, limit=schedule.config.limit)


def _image_encoder(config: _Config, shape: tuple[int, ...]) -> ImageEncoder:
    # Fields that came with LeRobot 0.4 are None before.
    resize, crop, ratio = config.get("resize_shape"), config["crop_shape"], config.get("crop_ratio") or 1.0
    if resize is not None:
        crop = [int(side * ratio) for side in resize] if ratio < 1 else None
    return ImageEncoder(
        shape,
        config["vision_backbone"],
        resize_shape=resize,
        crop_shape=crop,
        num_keypoints=config["spatial_softmax_num_keypoints"],
        use_group_norm=config["use_group_norm"],
    )


def _load_weights(
    encoder: _Encoder, network: ConditionalUnet1d, weights: Mapping[str, torch.Tensor], where: str
) -> None:
    # A compiled network's names have one part more.
    named = {name.removeprefix("diffusion.").replace("_orig_mod.", ""): value for name, value in weights.items()}
    shared = len(encoder.rgb_encoder) == 1 and not any(name.startswith("rgb_encoder.0.") for name in named)
    wanted: dict[str, torch.Tensor] = {}
    for part, prefix in ((encoder, ""), (network, "unet.")):
        for name, value in part.state_dict().items():
            wanted[prefix + (name.replace("rgb_encoder.0.", "rgb_encoder.") if shared else name)] = value
    for name, value in wanted.items():
        if name not in named:
            raise ValueError(f"diffusion.{name}: missing among the weights of a policy as {where} describes it")
        if named[name].shape != value.shape:
            raise ValueError(
                f"diffusion.{name}: shape {tuple(named[name].shape)}, but {where} makes it {tuple(value.shape)}"
            )
        value.copy_(named[name])
    extra = sorted(set(named) - set(wanted))
    if extra:
        raise ValueError(f"diffusion.{extra[0]}: a weight that no part of a policy as {where} describes it has")


def _old_statistics(weights: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Of names such as `normalize_inputs.buffer_observation_state.min`."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in weights.items():
        if name.startswith(_OLD_GROUPS):
            _, buffer, statistic = name.split(".")
            found.setdefault(buffer.removeprefix("buffer_"), {})[statistic] = value.float()
    # An underscore was a dot of the feature's name, or an underscore.
    return _Underscored(found)


class _Underscored(dict[str, dict[str, torch.Tensor]]):
    """Statistics of features whose names have underscores for dots."""

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.replace(".", "_"), default)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name}: not in {str(path.parent)!r}; pass a folder that LeRobot's save_pretrained wrote"
        )
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: {str(path)!r} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}: {str(path)!r} is no JSON object")
    return values


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name}: not in {str(path.parent)!r}; pass a folder that LeRobot's save_pretrained wrote"
        )
    try:
        return dict(load_file(path))
    except Exception as error:  # safetensors raises its own type
        raise ValueError(f"{path.name}: {str(path)!r} cannot be read: {error}") from None


def _read_processor(folder: Path, file: str, kind: str) -> tuple[dict[str, dict[str, torch.Tensor]], float]:
    statistics: dict[str, dict[str, torch.Tensor]] = {}
    eps = 1e-8
    for step in _read_json(folder / file).get("steps", ()):
        name = step.get("registry_name") or step.get("class")
        _require_known(name, kind, file)
        if name != _NORMALISING[kind]:
            continue
        eps = step.get("config", {}).get("eps", eps)
        state = step.get("state_file")
        for flat, value in (_read_tensors(folder / state) if state else {}).items():
            feature, statistic = flat.rsplit(".", 1)
            statistics.setdefault(feature, {})[statistic] = value.float()
    return statistics, eps


def _statistics_of(pipeline: Any, kind: str) -> tuple[dict[str, dict[str, torch.Tensor]], float]:
    """As `_read_processor`, of a pipeline in memory."""
    statistics: dict[str, dict[str, torch.Tensor]] = {}
    eps = 1e-8
    for step in pipeline.steps:
        name = getattr(type(step), "_registry_name", type(step).__name__)
        _require_known(name, kind, kind)
        if name == _NORMALISING[kind]:
            eps = step.eps
            for flat, value in step.state_dict().items():
                feature, statistic = flat.rsplit(".", 1)
                statistics.setdefault(feature, {})[statistic] = value.float().cpu()
    return statistics, eps


def _require_known(name: str, kind: str, where: str) -> None:
    known = (*_NEUTRAL_STEPS, _NORMALISING[kind])
    if name not in known:
        raise ValueError(f"steps: {name!r} in {where}, which cannot be exported; {', '.join(known)} can")
