"""Between a policy and a robot: queues of actions, ensembles over time, and chunks that go on from the last one."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastddim import DDIMConfig, FlowSchedule, Sampler, Schedule
from fastddim.policies import ActionQueue, Chunk, RealTimeChunking, TemporalEnsemble, chunk_weights
from fastddim.policies.policy import Denoiser
from fastddim.samplers.sampling import Sampling

HORIZON, EXECUTED, FIRST, N_OBS = 16, 8, 1, 2


class Recorder:
    """A sampler whose action for moment k of call c is `[100 c + k]`, and that keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.go = threading.Event()
        self.go.set()
        self.threads: set[str] = set()

    def __call__(self, observations: dict[str, Any], **options: Any) -> Chunk:
        self.go.wait(10)
        self.threads.add(threading.current_thread().name)
        self.calls.append({"observations": observations, **options})
        samples = 100.0 * (len(self.calls) - 1) + np.arange(HORIZON)[None, :, None]
        actions = samples[:, FIRST : FIRST + EXECUTED]
        return Chunk(actions, actions, samples)


def queue(sample: Any, **options: Any) -> ActionQueue:
    return ActionQueue(
        sample, n_obs_steps=N_OBS, n_action_steps=EXECUTED, horizon=HORIZON, first_action=FIRST, **options
    )


def test_a_chunk_is_executed_whole_and_the_history_filled() -> None:
    sample = Recorder()
    actions = queue(sample, seed=5, options={"num_inference_steps": 3})
    executed = [float(actions.act({"state": np.array([float(tick)])})[0]) for tick in range(10)]
    assert executed == [1, 2, 3, 4, 5, 6, 7, 8, 101, 102]
    first, second = sample.calls
    # The first observation stands for those before it; then the newest two.
    assert first["observations"]["state"].tolist() == [[[0.0], [0.0]]]
    assert second["observations"]["state"].tolist() == [[[7.0], [8.0]]]
    assert (first["seeds"], second["seeds"], first["num_inference_steps"]) == (5, 6, 3)
    actions.reset()
    assert actions.act({"state": np.array([9.0])})[0] == 201
    assert sample.calls[-1]["observations"]["state"].tolist() == [[[9.0], [9.0]]]


def test_the_next_chunk_is_sampled_while_this_one_is_executed() -> None:
    sample = Recorder()
    with queue(sample, lead=3, commit=True) as actions:
        executed = []
        for tick in range(14):
            if tick == 5:
                # Sampling from here on takes until it is let go: the control steps meanwhile do not wait for it.
                sample.go.clear()
            if tick == 8:
                sample.go.set()
            executed.append(float(actions.act({"state": np.array([float(tick)])})[0]))
    # The next chunk saw the observation of tick 5, so its first three actions are those of ticks 5 to 7.
    assert executed == [1, 2, 3, 4, 5, 6, 7, 8, 104, 105, 106, 107, 108, 204]
    assert any("fastddim-policy" in name for name in sample.threads)
    second = sample.calls[1]
    assert second["observations"]["state"].tolist() == [[[4.0], [5.0]]]
    # Of its horizon, which begins one moment earlier, what was executed at tick 4 and what is executed at ticks 5 to 7.
    assert second["known"][0, :5, 0].tolist() == [5, 6, 7, 8, 0]
    assert second["mask"][0, :, 0].tolist() == [True] * 4 + [False] * 12


def test_warm_starts_are_shifted_by_what_was_executed() -> None:
    sample = Recorder()
    actions = queue(sample, strength=0.4)
    for tick in range(9):
        actions.act({"state": np.array([float(tick)])})
    first, second = sample.calls
    assert "previous" not in first
    assert second["strength"] == 0.4
    assert second["previous"][0, :, 0].tolist() == [8, 9, 10, 11, 12, 13, 14, 15] + [15] * 8


def test_an_error_of_the_sampler_reaches_the_loop_and_the_queue_goes_on() -> None:
    failing = [True]
    recorder = Recorder()

    def sample(observations: dict[str, Any], **options: Any) -> Chunk:
        if failing[0]:
            raise ArithmeticError("the network returned NaN")
        return recorder(observations, **options)

    for lead in (0, 2):
        failing[0] = lead == 0
        with queue(sample, lead=lead) as actions:
            if lead == 0:
                with pytest.raises(ArithmeticError):
                    actions.act({"state": np.zeros(1)})
                failing[0] = False
            assert actions.act({"state": np.zeros(1)}).shape == (1,)
            for _ in range(EXECUTED - 1 - lead):
                actions.act({"state": np.zeros(1)})
            failing[0] = True
            for _ in range(lead):
                actions.act({"state": np.zeros(1)})
            with pytest.raises(ArithmeticError):
                actions.act({"state": np.zeros(1)})
            failing[0] = False
            assert actions.act({"state": np.zeros(1)}).shape == (1,)


def test_queues_refuse_numbers_by_name() -> None:
    for options, words in (
        ({"lead": 8}, "lead: 8"),
        ({"commit": True}, "commit: True with lead 0"),
        ({"strength": 1.5}, "strength: 1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            queue(Recorder(), **options)


@settings(max_examples=30, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    coefficient=st.floats(-1, 1),
    seed=st.integers(0, 1000),
)
def test_ensembles_are_acts_weighted_means(chunks: list[int], coefficient: float, seed: int) -> None:
    """arXiv:2304.13705, algorithm 2, by its definition: all chunks that say something of this moment, oldest first."""
    generator = np.random.default_rng(seed)
    drawn = [generator.standard_normal((length, 2)) for length in chunks]
    ensemble = TemporalEnsemble(coefficient)
    for now, chunk in enumerate(drawn):
        said = [own[now - begin] for begin, own in enumerate(drawn[: now + 1]) if now - begin < len(own)]
        weights = np.exp(-coefficient * np.arange(len(said)))
        expected = np.average(said, axis=0, weights=weights)
        np.testing.assert_allclose(ensemble.act(chunk), expected, rtol=1e-12, atol=1e-12)
    ensemble.reset()
    np.testing.assert_allclose(ensemble.act(drawn[0]), drawn[0][0])
    with pytest.raises(ValueError, match="actions: shape"):
        ensemble.act(drawn[0][0])


def test_chunk_weights_are_the_papers() -> None:
    """Equation 5 of arXiv:2506.07339."""
    horizon, delay, executed = 16, 3, 6
    weights = chunk_weights(horizon, delay, executed)
    for i in range(horizon):
        if i < delay:
            expected = 1.0
        elif i < horizon - executed:
            c = (horizon - executed - i) / (horizon - executed - delay + 1)
            expected = c * (np.exp(c) - 1) / (np.e - 1)
        else:
            expected = 0.0
        assert weights[i].item() == pytest.approx(expected, abs=1e-6)
    assert (weights.diff() <= 0).all()


class _Network(nn.Module):
    """A small network with a Jacobian that is no identity."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 6, generator=generator) / 6)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.flatten(1) @ self.weight + cond).view_as(x) + 0.3 * x


@pytest.mark.parametrize("kind", ["flow", "epsilon", "sample", "v_prediction"])
def test_guidance_is_algorithm_1(kind: str) -> None:
    """One call against the paper's formulas in its own coordinates, with a Jacobian by finite differences in float64."""
    network = _Network()
    schedule: Any = FlowSchedule() if kind == "flow" else Schedule(DDIMConfig(prediction_type=kind))
    denoiser = Denoiser(network, Sampling(schedule, "euler" if kind == "flow" else "ddim"), action_dim=2)
    guided = RealTimeChunking(denoiser, max_guidance=5.0)
    generator = torch.Generator().manual_seed(1)
    x, previous = (torch.randn(1, 3, 2, generator=generator) for _ in range(2))
    cond, weights = torch.randn(1, 6, generator=generator), torch.tensor([1.0, 0.5, 0.0])
    t = torch.tensor([600.0 if kind == "flow" else 600])
    with torch.no_grad():
        output = guided(x, t, cond, previous, weights).double()
    if kind == "flow":
        signal, sigma = 0.4, 0.6
    else:
        alpha_bar = float(schedule.alphas_cumprod[600])
        signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    network.double()

    def x0_and_noise(state: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x0 = {
            "flow": state - sigma * out,
            "epsilon": (state - sigma * out) / signal,
            "sample": out,
            "v_prediction": signal * state - sigma * out,
        }[kind]
        return x0, (state - signal * x0) / sigma

    def predicted(scaled: torch.Tensor) -> torch.Tensor:
        state = scaled * (signal + sigma)
        return x0_and_noise(state, network(state, t, cond.double()))[0]

    tau = signal / (signal + sigma)
    scaled = x.double() / (signal + sigma)
    with torch.no_grad():
        jacobian = torch.autograd.functional.jacobian(predicted, scaled).view(6, 6)
        apart = ((previous.double() - predicted(scaled)) * weights.double()[:, None]).flatten()
        spread = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        strength = min(5.0, (1 - tau) / (tau * spread))
        clean, noise = x0_and_noise(x.double(), network(x.double(), t, cond.double()))
        velocity = clean - noise + strength * (apart @ jacobian).view(1, 3, 2)
        expected = scaled + (1 - tau) * velocity
    found = x0_and_noise(x.double(), output)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_guided_run_goes_on_from_the_last_chunk() -> None:
    network = _Network()
    sampling = Sampling(FlowSchedule(), "euler")
    denoiser = Denoiser(network, sampling, action_dim=2)
    cond = torch.zeros(1, 6)
    previous, weights = torch.full((1, 3, 2), 0.7), torch.tensor([1.0, 0.5, 0.0])
    free: Any = Sampler(denoiser, sampling, 10, sample_shape=(3, 2))(1, seeds=0, cond=cond)
    guided: Any = Sampler(RealTimeChunking(denoiser), sampling, 10, sample_shape=(3, 2))(
        1, seeds=0, cond=cond, previous=previous, weights=weights
    )
    apart = [(x - previous)[0].abs().amax(1) for x in (free, guided)]
    assert apart[1][0] < 0.3 * apart[0][0]
    assert torch.isfinite(guided).all()
