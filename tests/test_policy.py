"""`ActionUNet1d` keeps its contract, exports with a dynamic batch, learns, and the example that trains it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastddim
from fastddim.models.policy import ActionUNet1d, sinusoidal_embedding

ROOT = Path(fastddim.__file__).parents[1]
CHANNELS = (8, 16, 24)


def make_model(**options: Any) -> ActionUNet1d:
    torch.manual_seed(0)
    options = {"action_dim": 3, "obs_dim": 5, "channels": CHANNELS, "horizon": 12} | options
    return ActionUNet1d(**options).eval().requires_grad_(False)


def draw(model: ActionUNet1d, batch_size: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(batch_size, *model.sample_shape, generator=generator, dtype=dtype),
        "t": torch.randint(100, (batch_size,), generator=generator),
        "observation": torch.randn(batch_size, model.obs_dim, generator=generator, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch_size", "action_dim", "channels", "horizon"),
    [(1, 7, (64, 128, 256), 16), (3, 1, (16,), 1), (2, 2, (16, 8), 6), (5, 3, (8, 24, 16, 8), 40)],
)
def test_the_output_has_the_shape_and_dtype_of_the_actions(
    batch_size: int, action_dim: int, channels: tuple[int, ...], horizon: int, dtype: torch.dtype
) -> None:
    model = make_model(action_dim=action_dim, channels=channels, horizon=horizon).to(dtype)
    output = model(**draw(model, batch_size, dtype))
    assert output.shape == (batch_size, horizon, action_dim)
    assert output.dtype == dtype and output.is_contiguous()
    assert output.isfinite().all() and output.std() > 0


@pytest.mark.parametrize("horizon", [1, 2, 6, 15, 17])
def test_a_horizon_that_the_levels_cannot_halve_is_refused(horizon: int) -> None:
    with pytest.raises(ValueError, match=f"horizon: {horizon}; 3 levels of channels need a multiple of 4"):
        make_model(horizon=horizon)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action_dim": 0}, "action_dim: 0; pass an integer >= 1"),
        ({"obs_dim": -1}, "obs_dim: -1; pass an integer >= 1"),
        ({"obs_dim": 2.0}, "obs_dim: 2.0; pass an integer >= 1"),
        ({"horizon": 0}, "horizon: 0; pass an integer >= 1"),
        ({"channels": ()}, "channels: (); pass at least one level's channels"),
        ({"channels": (8, 0)}, "channels: 0; pass an integer >= 8"),
        ({"channels": (16, 8), "horizon": 2}, "channels: 8 where the horizon is 1; pass at least 16 there"),
        ({"channels": (8, 20)}, "channels: 20; pass multiples of 8, the groups of GroupNorm"),
    ],
)
def test_sizes_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_model(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 8, 3), "x: shape (2, 8, 3); pass [2, 12, 3]"),
        ("x", (2, 3, 12), "x: shape (2, 3, 12); pass [2, 12, 3]"),
        ("t", (), "t: shape (); pass [2]"),
        ("t", (1,), "t: shape (1,); pass [2]"),
        ("observation", (1, 5), "observation: shape (1, 5); pass [2, 5]"),
        ("observation", (2, 6), "observation: shape (2, 6); pass [2, 5]"),
    ],
)
def test_arguments_of_another_shape_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    model = make_model()
    inputs = draw(model, 2)
    inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    with pytest.raises(ValueError) as caught:
        model(**inputs)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["x", "t", "observation"])
def test_every_action_depends_on_every_input(name: str) -> None:
    model = make_model()
    inputs = draw(model, 2)
    other = inputs | {name: inputs[name] + 1}
    change = (model(**inputs) - model(**other)).abs()
    assert (change > 1e-6).all()


def test_every_observed_number_counts() -> None:
    model = make_model().double()
    inputs = draw(model, 1, torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda observation: model(**(inputs | {"observation": observation})).sum((0, 1)), inputs["observation"]
    )
    assert (jacobian.abs() > 1e-8).all()


def test_a_sample_alone_is_that_sample_in_a_batch() -> None:
    model = make_model().double()
    inputs = draw(model, 5, torch.float64)
    together = model(**inputs)
    for k in range(5):
        alone = model(**{name: value[k : k + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone, together[k : k + 1], rtol=0, atol=1e-13)


def test_the_embedding_is_that_of_the_transformer() -> None:
    t = torch.tensor([0, 1, 99, 999])
    expected = [[t * 10_000 ** (-k / 3) for k in range(4)] for t in t.tolist()]
    phases = torch.tensor(expected, dtype=torch.float64)
    embedding = sinusoidal_embedding(t, 8, torch.float64)
    torch.testing.assert_close(embedding, torch.cat([phases.sin(), phases.cos()], 1), rtol=0, atol=1e-12)
    # The phase of a late timestep survives a half-precision model.
    half = sinusoidal_embedding(t, 8, torch.bfloat16)
    torch.testing.assert_close(half.double(), embedding, rtol=0, atol=2**-8)


def test_it_exports_with_a_dynamic_batch() -> None:
    model = make_model()
    batch = torch.export.Dim("batch", max=64)
    inputs = draw(model, 2)
    program = torch.export.export(model, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs})
    for batch_size in (1, 2, 7):
        inputs = draw(model, batch_size)
        torch.testing.assert_close(program.module()(**inputs), model(**inputs))
    # Nothing in it fetches a value from the device.
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.conv1d.default" in targets
    assert not [target for target in targets if "aten.item" in target or "_local_scalar" in target]


def test_training_lowers_the_loss() -> None:
    model = make_model().train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    inputs = draw(model, 16)
    noise = inputs["x"].flip(1)
    losses = []
    for _ in range(40):
        loss = (model(**inputs) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_sampler_takes_it_as_it_is() -> None:
    model = make_model()
    config = fastddim.DDIMConfig(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    sampler = fastddim.Sampler(model, config, 10, sample_shape=model.sample_shape)
    observation = draw(model, 3)["observation"]
    together = sampler(3, seeds=4, observation=observation)
    assert isinstance(together, torch.Tensor)
    assert together.shape == (3, 12, 3) and together.abs().max() <= 1
    torch.testing.assert_close(sampler(1, seeds=6, observation=observation[2:]), together[2:], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_example_runs_and_repeats_itself(tmp_path: Path) -> None:
    plot = tmp_path / "trajectories.png"
    command = [sys.executable, str(ROOT / "examples" / "policy.py"), "--quick"]
    runs = []
    for options in (["--plot", str(plot)], []):
        done = subprocess.run(
            [*command, *options],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        runs.append(done.stdout)
    lines = [[line for line in run.splitlines() if line.startswith(("step", "8 episodes", "largest"))] for run in runs]
    assert len(lines[0]) == 4 and lines[0] == lines[1]
    assert runs[0].count("p50") == runs[0].count("p99") == 3
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_example_refuses_a_plot_it_cannot_write(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "policy.py"), "--quick", "--plot", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode != 0
    assert "is a folder" in done.stderr and done.stdout == ""
