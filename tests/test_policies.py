"""Policies: LeRobot's folders and objects, in torch, against what LeRobot made of the same observations and noise."""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from fastddim import FlowSchedule, accelerate, unaccelerate
from fastddim.models.action_transformer import ActionTransformer
from fastddim.noise import STREAM_INITIAL, normal
from fastddim.policies import Feature, Normalisation, Policy, from_diffusion_policy, from_lerobot, load_policy, shifted
from fastddim.policies.networks import RESNETS, ConditionalUnet1d, ImageEncoder
from fastddim.reference import step_with_row
from fastddim.samplers.sampling import Sampling
from lerobot_policies import NAMES, golden, make_policy
from tape import Tape

# What float32 leaves: LeRobot's own results are as far from those of float64.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("policies")
    return {name: make_policy(name, root) for name in NAMES}


def assert_lerobots(chunk: Any, expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(np.asarray(chunk.normalised), expected["normalised"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(np.asarray(chunk.actions), expected["actions"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in NAMES if "ddpm" not in name])
def test_actions_are_lerobots(folders: dict[str, Path], name: str) -> None:
    observations, expected = golden(name)
    policy = load_policy(folders[name])
    chunk = policy.sample(observations, noise=torch.from_numpy(expected["noise"]))
    assert chunk.samples.shape == (2, 16, 3)
    assert_lerobots(chunk, expected)


def test_ddpm_is_the_default_of_a_checkpoint_that_says_so(folders: dict[str, Path]) -> None:
    observations, expected = golden("state-ddpm-epsilon")
    policy = load_policy(folders["state-ddpm-epsilon"])
    sampler = policy.sampler()
    assert (sampler.method, len(sampler.table)) == ("ddpm", 20)
    # LeRobot's noise is torch's, from the default generator.
    torch.manual_seed(1234)
    x = torch.from_numpy(expected["noise"])
    cond = policy.encode({key: torch.from_numpy(value) for key, value in observations.items()})
    with torch.no_grad():
        for row, t in zip(sampler.table.rows, sampler.table.timesteps, strict=True):
            output = policy.denoiser(x, torch.full((2,), t), cond)
            noise = torch.randn(x.shape) if t > 0 else None
            x = step_with_row(output, x, row, sampler.limit, noise)[0]
    assert_lerobots(policy.decode(x), expected)
    few = policy.sampler(method="ddim", num_inference_steps=5)
    assert few.table == type(few.table).build(  # the network's own epsilon, as in LeRobot
        policy.sampling.schedule, few.pairs, use_clipped_model_output=False
    )


def test_samples_of_a_batch_are_those_alone(folders: dict[str, Path]) -> None:
    observations, _ = golden("images-ddim")
    policy = load_policy(folders["images-ddim"])
    both = policy.sample(observations, seeds=[4, 9]).actions
    alone = policy.sample({name: value[1:] for name, value in observations.items()}, seeds=[9]).actions
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=2 * TOLERANCE)
    floats = {
        name: value / np.float32(255) if value.dtype == np.uint8 else value for name, value in observations.items()
    }
    assert torch.equal(policy.sample(floats, seeds=[4, 9]).actions, both)


def test_committed_actions_are_kept(folders: dict[str, Path]) -> None:
    name = "state-ddim-epsilon"
    observations, _ = golden(name)
    policy = load_policy(folders[name])
    generator = torch.Generator().manual_seed(0)
    known, mask = torch.full((2, 16, 3), torch.nan), torch.zeros(2, 16, 3, dtype=torch.bool)
    mask[:, :4] = True
    known[:, :4] = torch.rand(2, 4, 3, generator=generator) - 0.5
    chunk = policy.sample(observations, seeds=1, known=known, mask=mask)
    assert torch.equal(chunk.actions[:, :3], known[:, 1:4])
    free = policy.sample(observations, seeds=1)
    assert (chunk.actions[:, 3:] - free.actions[:, 3:]).abs().max() > 1e-3
    # By hand: before each call the known entries are the known ones noised to the level.
    schedule, sampler = policy.sampling.schedule, policy.sampler()
    clean = policy.action.normalise(known[:, :4])
    cond = policy.encode({key: torch.from_numpy(value) for key, value in observations.items()})
    noise = x = normal([1, 2], 0, (16, 3), STREAM_INITIAL)
    with torch.no_grad():
        for row, t in zip(sampler.table.rows, sampler.table.timesteps, strict=True):
            alpha_bar = schedule.alphas_cumprod[t]
            x = x.clone()
            x[:, :4] = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise[:, :4]
            x = step_with_row(policy.denoiser(x, torch.full((2,), t), cond), x, row, sampler.limit, None)[0]
    torch.testing.assert_close(chunk.samples[:, 4:], x[:, 4:], rtol=0, atol=TOLERANCE)


def test_warm_start_and_deadline(folders: dict[str, Path]) -> None:
    name = "state-ddim-epsilon"
    observations, _ = golden(name)
    policy = load_policy(folders[name])
    first = policy.sample(observations, seeds=1)
    moved = shifted(first.samples, 8)
    assert torch.equal(moved[:, :8], first.samples[:, 8:]) and torch.equal(
        moved[:, 8:], first.samples[:, -1:].expand(2, 8, 3)
    )
    sampler = policy.sampler(strength=0.3)
    calls: list[int] = []
    handle = policy.denoiser.register_forward_hook(lambda *_: calls.append(1))
    warm = policy.sample(observations, sampler=sampler, previous=moved, seeds=1)
    assert len(calls) == len(sampler.table) == 3
    given: dict[str, Any] = policy.condition({key: torch.from_numpy(value) for key, value in observations.items()})
    expected = sampler(sampler.add_noise(moved, 1), **given)
    assert torch.equal(warm.samples, expected)
    calls.clear()
    late = policy.sample(observations, seeds=1, deadline=time.perf_counter())
    handle.remove()
    assert len(calls) == 1
    # The x0 of the first step.
    x0: list[torch.Tensor] = []
    policy.sampler()(2, seeds=1, callback=lambda step, t, x, own: x0.append(own.clone()), **given)
    assert torch.equal(late.samples, x0[0])


def damaged(folder: Path, target: Path, change: Any) -> Path:
    shutil.copytree(folder, target)
    change(target)
    return target


def edit_json(file: str, **values: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, **values}))

    return change


def drop(file: str, name: str) -> Any:
    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        del tensors[name]
        save_file(tensors, folder / file)

    return change


_STATISTICS = "policy_preprocessor_step_3_normalizer_processor.safetensors"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (edit_json("config.json", type="act"), ValueError, "type: 'act'.*'diffusion'"),
        (edit_json("config.json", noise_scheduler_type="PNDM"), ValueError, "noise_scheduler_type: 'PNDM'"),
        (edit_json("config.json", horizon=None), ValueError, "horizon: None"),
        (edit_json("config.json", down_dims=[24, 32]), ValueError, "diffusion.unet.*shape"),
        (edit_json("config.json", output_features={}), ValueError, "output_features: no 'action'"),
        (edit_json("config.json", n_action_steps=16), ValueError, "n_action_steps"),
        (drop(_STATISTICS, "observation.state.max"), ValueError, "observation.state: no max among the statistics"),
        (drop("model.safetensors", "diffusion.unet.final_conv.1.bias"), ValueError, "final_conv.1.bias: missing"),
        (lambda folder: (folder / _STATISTICS).unlink(), FileNotFoundError, _STATISTICS),
        (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors"),
        (lambda folder: (folder / "policy_postprocessor.json").unlink(), FileNotFoundError, "policy_postprocessor"),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, "config.json: .*no JSON"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), ValueError, "model.safetensors: .*read"),
        (
            edit_json("policy_preprocessor.json", steps=[{"registry_name": "delta_actions"}]),
            ValueError,
            "steps: 'delta_actions'",
        ),
    ],
)  # fmt: skip
def test_damaged_folders_name_what_is_wrong(
    folders: dict[str, Path], tmp_path: Path, change: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        load_policy(damaged(folders["state-ddim-epsilon"], tmp_path / "policy", change))


def test_observations_that_do_not_fit_are_named(folders: dict[str, Path]) -> None:
    policy = load_policy(folders["images-ddim"])
    good, _ = golden("images-ddim")
    top, state = "observation.images.top", "observation.state"
    for changed, words in (
        ({"observation.effort": good[state]}, "observation.effort: no observation"),
        ({top: None}, f"{top}: missing"),
        ({state: good[state][:, :1]}, f"{state}: shape"),
        ({state: good[state].astype(np.int64)}, f"{state}: int64"),
        ({state: np.where(np.arange(4) == 2, np.nan, good[state])}, f"{state}: has NaN"),
        ({top: good[top].astype(np.float32)}, f"{top}: pixels from 0 to 255; pass uint8, or divide"),
        ({top: good[top][..., :32]}, f"{top}: shape"),
        ({state: good[state][:1]}, "observations: .*as many of each"),
    ):
        observations = {name: value for name, value in {**good, **changed}.items() if value is not None}
        with pytest.raises(ValueError, match=words):
            policy.sample(observations, seeds=0)
    with pytest.raises(ValueError, match="seeds: None without noise"):
        policy.sample(good)
    with pytest.raises(ValueError, match="known, mask: one of the two"):
        policy.sample(good, seeds=0, known=torch.zeros(2, 16, 3))


def test_objects_in_memory_and_old_checkpoints(folders: dict[str, Path], tmp_path: Path) -> None:
    """LeRobot's objects by what they have, and the statistics that checkpoints before 0.4 have among their weights."""
    name = "state-ddim-epsilon"
    observations, expected = golden(name)
    noise = torch.from_numpy(expected["noise"])
    weights = load_file(folders[name] / "model.safetensors")
    statistics = load_file(folders[name] / _STATISTICS)
    config = SimpleNamespace(**json.loads((folders[name] / "config.json").read_text()))

    def pipeline(registry_name: str) -> Any:
        step = type("Step", (), {"_registry_name": registry_name, "eps": 1e-8, "state_dict": lambda self: statistics})()
        return SimpleNamespace(steps=[step])

    def in_memory(state: dict[str, torch.Tensor]) -> Any:
        return SimpleNamespace(config=config, diffusion=None, state_dict=lambda: state)

    found = from_lerobot(in_memory(weights), pipeline("normalizer_processor"), pipeline("unnormalizer_processor"))
    assert_lerobots(found.sample(observations, noise=noise), expected)
    with pytest.raises(ValueError, match="preprocessor: None"):
        from_lerobot(in_memory(weights))
    old = dict(weights)
    for key, value in statistics.items():
        feature, statistic = key.rsplit(".", 1)
        group = "unnormalize_outputs" if feature == "action" else "normalize_inputs"
        old[f"{group}.buffer_{feature.replace('.', '_')}.{statistic}"] = value
    assert_lerobots(from_lerobot(in_memory(old)).sample(observations, noise=noise), expected)
    folder = damaged(folders[name], tmp_path / "old", lambda folder: save_file(old, folder / "model.safetensors"))
    for file in folder.glob("policy_*"):
        file.unlink()
    assert_lerobots(load_policy(folder).sample(observations, noise=noise), expected)
    # What LeRobot fills statistics with that it has not.
    old["normalize_inputs.buffer_observation_state.min"].fill_(torch.inf)
    with pytest.raises(ValueError, match=r"observation.state: min: has NaN or infinite"):
        from_lerobot(in_memory(old))


@pytest.mark.parametrize("mode", ["mean_std", "min_max", "quantiles", "quantile10", "affine", "identity"])
def test_normalisations_invert(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator)
    statistics = {"mean": x.mean(0), "std": x.std(0), "min": x.amin(0), "max": x.amax(0), "scale": torch.tensor([2.0, 3, 4]),
                  "offset": torch.tensor([1.0, -1, 0])}  # fmt: skip
    for name, q in (("q01", 0.01), ("q99", 0.99), ("q10", 0.1), ("q90", 0.9)):
        statistics[name] = x.quantile(q, dim=0)
    normalisation = Normalisation(mode, statistics)
    normalised = normalisation.normalise(x)
    torch.testing.assert_close(normalisation.denormalise(normalised), x, rtol=1e-5, atol=1e-6)
    if mode == "min_max":
        assert normalised.amin() == -1 and normalised.amax() == 1
    if mode == "mean_std":
        torch.testing.assert_close(normalised.std(0), torch.ones(3), rtol=1e-5, atol=1e-5)


def test_image_encoder_resizes_and_crops_as_torch_does() -> None:
    """The parts before the network, each against torch's own operations."""
    encoder = ImageEncoder((3, 50, 64), resize_shape=(33, 40), crop_shape=(30, 31), num_keypoints=4).eval()
    seen: list[torch.Tensor] = []
    encoder.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.rand(2, 3, 50, 64, generator=torch.Generator().manual_seed(0))
    assert encoder(images).shape == (2, 8)
    resized = functional.interpolate(images, (33, 40), mode="bilinear", antialias=True)
    # Halves are rounded to even: 1.5 to 2, 4.5 to 4.
    torch.testing.assert_close(seen[0], resized[:, :, 2:32, 4:35], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"crop_shape: .*smaller"):
        ImageEncoder((3, 20, 20), crop_shape=(24, 20))
    # The sizes of the feature maps that the pooling expects.
    for name in RESNETS:
        assert ImageEncoder((3, 65, 33), name, num_keypoints=2)(torch.rand(1, 3, 65, 33)).shape == (1, 4)


def test_networks_refuse_sizes_by_name() -> None:
    for wrong, words in (
        ({"down_dims": (12, 16)}, "down_dims: 12"),
        ({"down_dims": ()}, "down_dims: empty"),
        ({"kernel_size": 4}, "kernel_size: 4"),
        ({"diffusion_step_embed_dim": 3}, "diffusion_step_embed_dim: 3"),
        ({"n_groups": 4, "down_dims": (12,)}, "down_dims: 12 first"),
    ):
        with pytest.raises(ValueError, match=words):
            ConditionalUnet1d(2, 4, **wrong)  # type: ignore[arg-type]


def test_a_policy_is_a_module(folders: dict[str, Path]) -> None:
    """Saved, copied and moved as any other; its sampler sees new weights."""
    observations, expected = golden("state-ddim-epsilon")
    noise = torch.from_numpy(expected["noise"])
    policy = load_policy(folders["state-ddim-epsilon"])
    assert isinstance(policy, Policy) and not policy.training
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    sampler = other.sampler()
    zeros = other.sample(observations, sampler=sampler, noise=noise)
    other.load_state_dict(policy.state_dict())
    assert_lerobots(other.sample(observations, sampler=sampler, noise=noise), expected)
    assert not torch.equal(zeros.actions, other.sample(observations, sampler=sampler, noise=noise).actions)
    half = copy.deepcopy(policy).to(torch.bfloat16)
    chunk = half.sample(observations, noise=noise)
    # The loop's state stays float32.
    assert chunk.samples.dtype == torch.float32 and torch.isfinite(chunk.actions).all()


class _Conditioned(torch.nn.Module):
    """Called as Diffusion Policy's `ConditionalUnet1D` is."""

    def __init__(self, width: int, cond: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix, self.by_cond = (
            torch.nn.Parameter(torch.randn(rows, width, generator=generator) / rows**0.5) for rows in (width, cond)
        )

    def forward(
        self, sample: torch.Tensor, timestep: Any, local_cond: Any = None, global_cond: Any = None
    ) -> torch.Tensor:
        h = sample @ self.mix + sample.roll(1, dims=1)
        if global_cond is not None:
            h = h + (global_cond @ self.by_cond)[:, None]
        if local_cond is not None:
            h = h + local_cond @ self.by_cond
        return torch.tanh(h)


@pytest.mark.parametrize("role", ["global", "steps-only", "local", "inpainting", "pictures"])
def test_diffusion_policys_objects(role: str) -> None:
    """Objects that have what Diffusion Policy's have, against the loop that its code runs with diffusers' scheduler."""
    horizon, n_obs, executed, action_dim, obs_dim = 8, 2, 3, 2, 5
    width = obs_dim + 1 if role == "pictures" else obs_dim
    state_dim = action_dim + (obs_dim if role == "inpainting" else 0)
    model = _Conditioned(state_dim, obs_dim if role == "local" else n_obs * width)
    generator = torch.Generator().manual_seed(1)

    def affine(count: int) -> dict[str, torch.Tensor]:
        drawn = torch.rand(2, count, generator=generator)
        return {"scale": 0.5 + drawn[0], "offset": drawn[1] - 0.5}

    scheduler = diffusers.DDIMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    common = {"model": model, "noise_scheduler": scheduler, "horizon": horizon, "action_dim": action_dim, "kwargs": {},
              "n_obs_steps": n_obs, "n_action_steps": executed, "num_inference_steps": 5}  # fmt: skip
    normalisers = {"action": affine(action_dim), "obs": affine(obs_dim), "agent": affine(obs_dim), "camera": affine(1)}
    if role == "pictures":

        class Encoder(torch.nn.Module):
            obs_shapes = (("agent", (obs_dim,)), ("camera", (3, 4, 4)))

            def forward(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
                return torch.cat([obs["agent"], obs["camera"].mean((1, 2, 3))[:, None]], dim=1)

        own = SimpleNamespace(obs_encoder=Encoder(), obs_as_global_cond=True, obs_feature_dim=width)
        observations = {
            "agent": torch.randn(2, n_obs, obs_dim, generator=generator),
            "camera": torch.rand(2, n_obs, 3, 4, 4, generator=generator),
        }
    else:
        own = SimpleNamespace(
            obs_dim=obs_dim,
            obs_as_global_cond=role in ("global", "steps-only"),
            obs_as_local_cond=role == "local",
            pred_action_steps_only=role == "steps-only",
            oa_step_convention=False,
        )
        observations = {"obs": torch.randn(2, n_obs, obs_dim, generator=generator)}
    policy = SimpleNamespace(**common, **vars(own), normalizer=SimpleNamespace(params_dict=normalisers))
    found = from_diffusion_policy(policy)
    length = executed if role == "steps-only" else horizon
    noise = torch.randn(2, length, state_dim, generator=generator)
    # `conditional_sample` and `predict_action` of diffusion_policy's two classes.
    normal = {
        name: value * normalisers[name]["scale"] + normalisers[name]["offset"] for name, value in observations.items()
    }
    given: dict[str, Any] = {}
    mask, data = torch.zeros(2, length, state_dim, dtype=torch.bool), torch.zeros(2, length, state_dim)
    if role == "pictures":
        given["global_cond"] = policy.obs_encoder({name: value.flatten(0, 1) for name, value in normal.items()}).view(
            2, -1
        )
    elif role == "local":
        given["local_cond"] = torch.zeros(2, length, obs_dim)
        given["local_cond"][:, :n_obs] = normal["obs"]
    elif role == "inpainting":
        mask[:, :n_obs, action_dim:], data[:, :n_obs, action_dim:] = True, normal["obs"]
    else:
        given["global_cond"] = normal["obs"].reshape(2, -1)
    scheduler.set_timesteps(5)
    x = noise.clone()
    with torch.no_grad():
        for t in scheduler.timesteps:
            x[mask] = data[mask]
            x = scheduler.step(model(x, t, **given), t, x).prev_sample
    start = {"steps-only": 0, "pictures": n_obs - 1}.get(role, n_obs)
    actions = (x[..., :action_dim] - normalisers["action"]["offset"]) / normalisers["action"]["scale"]
    chunk = found.sample(observations, noise=noise)
    torch.testing.assert_close(chunk.actions, actions[:, start : start + executed], rtol=0, atol=TOLERANCE)
    with pytest.raises(TypeError, match="has no model"):
        from_diffusion_policy(torch.nn.Linear(1, 1))


class _DiffusionModel(torch.nn.Module):
    """What LeRobot's `DiffusionModel` has, and the loop of its `conditional_sample`."""

    def __init__(self, unet: torch.nn.Module, noise_scheduler: Any, num_inference_steps: int) -> None:
        super().__init__()
        self.unet = unet
        self.noise_scheduler = noise_scheduler
        self.num_inference_steps = num_inference_steps

    def conditional_sample(
        self, batch_size: int, global_cond: torch.Tensor, generator: Any = None, noise: Any = None
    ) -> torch.Tensor:
        sample = torch.randn(batch_size, 16, 3, generator=generator) if noise is None else noise
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            output = self.unet(sample, torch.full(sample.shape[:1], t, dtype=torch.long), global_cond=global_cond)
            sample = self.noise_scheduler.step(output, t, sample, generator=generator).prev_sample
        return sample


class _DiffusionPolicy(torch.nn.Module):
    """As LeRobot's: the loop is its `diffusion`'s."""

    def __init__(self, diffusion: torch.nn.Module) -> None:
        super().__init__()
        self.diffusion = diffusion


@pytest.mark.parametrize("name", ["state-ddim-epsilon", "state-ddpm-epsilon"])
def test_accelerated_policies_are_their_own(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same actions and generators, by captured calls and fused steps; on the tape, which replays what was recorded."""
    kind = diffusers.DDPMScheduler if "ddpm" in name else diffusers.DDIMScheduler
    config = json.loads((folders[name] / "config.json").read_text())
    fields = ("num_train_timesteps", "beta_schedule", "prediction_type", "clip_sample", "clip_sample_range")
    scheduler = kind(**{field: config[field] for field in fields})
    unet = load_policy(folders[name]).denoiser.network
    policy = _DiffusionPolicy(_DiffusionModel(unet, scheduler, load_policy(folders[name]).num_inference_steps))
    cond = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))

    def run(seed: int) -> torch.Tensor:
        with torch.no_grad():
            return policy.diffusion.conditional_sample(1, cond, torch.Generator().manual_seed(seed))

    own = [run(seed) for seed in range(3)]
    Tape().install(monkeypatch)
    assert accelerate(policy, graph="step") is policy
    assert isinstance(policy.diffusion, _DiffusionModel) and policy.diffusion.unet is unet
    for seed, expected in enumerate(own):
        torch.testing.assert_close(run(seed), expected, rtol=0, atol=TOLERANCE)
    assert not caplog.records and len(policy.diffusion._acceleration.captures.graphs) == 1
    copied = copy.deepcopy(policy)
    torch.testing.assert_close(
        copied.diffusion.conditional_sample(1, cond, torch.Generator().manual_seed(2)).detach(),
        own[2],
        rtol=0,
        atol=TOLERANCE,
    )
    assert list(policy.state_dict()) == [f"diffusion.unet.{key}" for key in unet.state_dict()]
    unaccelerate(policy)
    assert type(policy.diffusion) is _DiffusionModel and torch.equal(run(1), own[1])
    with pytest.raises(TypeError, match="or a policy of LeRobot"):
        accelerate(unet)


def flow_policy() -> Policy:
    """A small policy of flow matching with random weights, its states' statistics known."""
    torch.manual_seed(0)
    network = ActionTransformer(3, 8, 16, width=16, depth=1, heads=2).eval()
    statistics = {"mean": torch.arange(4.0), "std": torch.ones(4) * 2}
    feature = Feature((4,), normalisation=Normalisation("mean_std", statistics))
    action = Normalisation("min_max", {"min": -torch.ones(3), "max": torch.tensor([1.0, 2, 3])})
    sampling = Sampling(FlowSchedule(), "euler", spacing="uniform")

    class Encoder(torch.nn.Module):
        def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
            return observations["observation.state"].flatten(1)

    return Policy(
        {"observation.state": feature}, Encoder(), network, action, sampling, action_dim=3, horizon=16, n_obs_steps=2,
        n_action_steps=8, first_action=0, num_inference_steps=10,
    )  # fmt: skip


def test_flow_matching_policies_take_lerobots_steps() -> None:
    """`x += dt * v`, from time 1 to 0, as pi0's and SmolVLA's `sample_actions` have it."""
    policy = flow_policy()
    generator = torch.Generator().manual_seed(1)
    observations = {"observation.state": torch.randn(2, 2, 4, generator=generator)}
    noise = torch.randn(2, 16, 3, generator=generator)
    cond = ((observations["observation.state"] - torch.arange(4.0)) / 2).flatten(1)
    for steps in (10, 3):
        x, time, dt = noise, 1.0, -1.0 / steps
        with torch.no_grad():
            for _ in range(steps):
                x = x + dt * policy.denoiser.network(x, torch.full((2,), 1000 * time), cond)
                time += dt
        chunk = policy.sample(observations, sampler=policy.sampler(num_inference_steps=steps), noise=noise)
        torch.testing.assert_close(chunk.samples, x, rtol=0, atol=TOLERANCE)
        expected = (x[:, :8] + 1) / 2 * (torch.tensor([1.0, 2, 3]) + 1) - 1
        torch.testing.assert_close(chunk.actions, expected, rtol=0, atol=3 * TOLERANCE)
    known, mask = torch.full((2, 16, 3), 0.5), torch.zeros(2, 16, 3, dtype=torch.bool)
    mask[:, :4] = True
    kept = policy.sample(observations, noise=noise, known=known, mask=mask)
    assert torch.equal(kept.actions[:, :4], known[:, :4]) and not torch.equal(kept.actions[:, 4:], chunk.actions[:, 4:])


def test_transformers_refuse_sizes_by_name() -> None:
    for wrong, words in (({"width": 12}, "width: 12"), ({"depth": 0}, "depth: 0"), ({"horizon": 0}, "horizon: 0")):
        with pytest.raises(ValueError, match=words):
            ActionTransformer(2, 4, **wrong)  # type: ignore[arg-type]
