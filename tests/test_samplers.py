"""Sampling methods against diffusers' schedulers in the same run, and against a float64 Gaussian whose solution is known."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from fastddim import DDIMConfig, Schedule
from fastddim.levels import NoiseLevels, beta_levels, flow_levels, scaled_levels
from fastddim.samplers.dpm_solver import dpm_solver
from fastddim.samplers.euler import euler, euler_ancestral
from fastddim.samplers.lcm import lcm
from fastddim.samplers.tcd import tcd

SHAPE = (3, 2, 5)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def make_levels(schedule: Schedule, timesteps, sigmas, prediction_type: str) -> NoiseLevels:
    """diffusers' own levels, exactly: rescaled where the sigmas are those of `x0 + sigma * noise`."""
    return scaled_levels(timesteps, sigmas, prediction_type)


def model(x, t):
    """Any smooth function of both."""
    return torch.tanh(0.7 * x + torch.sin(torch.as_tensor(t, dtype=x.dtype) / 211)) + 0.1 * x


def run_table(table, x, noises, called=model):
    """The table in float64, from a state in its own scale; returns the last state."""
    previous = torch.zeros_like(x)
    for step, row in enumerate(table.rows):
        out = called(x, table.timesteps[step])
        x0 = row.x0_from_x * x + row.x0_from_output * out
        following = row.next_from_x * x + row.next_from_output * out + row.next_from_x0 * x0
        x = following + row.noise_scale * noises[step] + row.next_from_previous_x0 * previous
        previous = x0
    return x


def run_diffusers(scheduler, x, noises, monkeypatch, **step_options):
    """diffusers' loop on float64 states, its noise drawn from `noises`."""
    module = __import__(type(scheduler).__module__, fromlist=["x"])
    drawn = iter(noises)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(drawn), raising=False)
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(given, t.double()), t, x, return_dict=False, **step_options)[0].double()
    return x


def start_and_noises(n):
    generator = torch.Generator().manual_seed(n)
    return (
        torch.randn(SHAPE, generator=generator, dtype=torch.float64),
        [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(n)],
    )


def close(ours, theirs):
    scale = theirs.abs().max()
    assert float((ours - theirs).abs().max() / scale) < 3e-6


@pytest.mark.parametrize("n", [1, 4, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_of_flow_matching(n, shift, monkeypatch):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(n)
    x, noises = start_and_noises(n)
    table = euler(flow_levels(scheduler.timesteps.tolist(), scheduler.sigmas))
    close(run_table(table, x, noises), run_diffusers(scheduler, x, noises, monkeypatch))


@pytest.mark.parametrize("n", [2, 10, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", [{"timestep_spacing": "linspace"}, {"timestep_spacing": "leading", "steps_offset": 1},
                                     {"use_karras_sigmas": True}])  # fmt: skip
@pytest.mark.parametrize("method", ["euler", "euler_ancestral"])
def test_euler_of_discrete_betas(n, prediction_type, spacing, method, monkeypatch):
    if method == "euler_ancestral" and "use_karras_sigmas" in spacing:
        return
    kinds = {
        "euler": (diffusers.EulerDiscreteScheduler, euler),
        "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, euler_ancestral),
    }
    kind, ours = kinds[method]
    scheduler = kind(**SD, prediction_type=prediction_type, **spacing)
    scheduler.set_timesteps(n)
    x, noises = start_and_noises(n)
    levels = scaled_levels(scheduler.timesteps.tolist(), scheduler.sigmas, prediction_type)
    norm = float((scheduler.sigmas[0] ** 2 + 1) ** 0.5)
    theirs = run_diffusers(scheduler, x * norm, noises, monkeypatch)
    close(run_table(ours(levels), x, noises), theirs)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_of_edm(prediction_type, monkeypatch):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(12)
    x, noises = start_and_noises(12)
    kind = "edm" if prediction_type == "epsilon" else prediction_type
    table = euler(scaled_levels(scheduler.timesteps.tolist(), scheduler.sigmas, kind, data_scale=0.5))
    norm = float((scheduler.sigmas[0] ** 2 + 0.25) ** 0.5)
    close(run_table(table, x, noises), run_diffusers(scheduler, x * norm, noises, monkeypatch))


@pytest.mark.parametrize("n", [1, 4, 8])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("method", ["lcm", "tcd", "tcd 0", "tcd 1"])
def test_distilled(n, prediction_type, method, monkeypatch):
    kind = diffusers.LCMScheduler if method == "lcm" else diffusers.TCDScheduler
    scheduler = kind(**SD, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(n)
    x, noises = start_and_noises(n)
    schedule = Schedule(DDIMConfig(**SD, prediction_type=prediction_type))
    levels = beta_levels(schedule, schedule.pairs(timesteps=scheduler.timesteps.tolist()))
    gamma = float(method.partition(" ")[2] or 0.3)
    options = {} if method == "lcm" else {"eta": gamma}
    table = lcm(levels) if method == "lcm" else tcd(schedule, levels, gamma=gamma)
    close(run_table(table, x, noises), run_diffusers(scheduler, x, noises, monkeypatch, **options))


@pytest.mark.parametrize("n", [1, 5, 15, 25])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("options", [{}, {"final_sigmas_type": "sigma_min"}, {"lower_order_final": False},
                                     {"use_karras_sigmas": True, "prediction_type": "v_prediction"}])  # fmt: skip
def test_dpm_solver(n, algorithm, order, options, monkeypatch):
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD, algorithm_type=algorithm, solver_order=order, **options)
    scheduler.set_timesteps(n)
    x, noises = start_and_noises(n)
    levels = scaled_levels(scheduler.timesteps.tolist(), scheduler.sigmas, options.get("prediction_type", "epsilon"))
    table = dpm_solver(
        levels, order=order, algorithm=algorithm, lower_order_final=options.get("lower_order_final", True)
    )
    assert table.columns.shape[1] == (7 if order == 2 and n > 2 else 6)
    close(run_table(table, x, noises), run_diffusers(scheduler, x, noises, monkeypatch))


def test_orders_of_convergence():
    """Data of deviation c: the ideal eps is `sigma / (c**2 signal**2 + sigma**2) * x`, and the ODE keeps `x / deviation`."""
    c, errors = 0.4, {}
    for n in (80, 160, 320):
        sigmas = np.geomspace(20, 0.02, n + 1)
        levels = scaled_levels(np.arange(n, 0.0, -1), sigmas, "epsilon")
        by_timestep = dict(zip(levels.timesteps, zip(levels.signal, levels.sigma, strict=True), strict=False))

        def ideal(x, t, by_timestep=by_timestep):
            signal, sigma = by_timestep[t]
            return float(sigma / ((c * signal) ** 2 + sigma**2)) * x

        deviation = np.hypot(c * levels.signal, levels.sigma)
        expected = float(deviation[-1] / deviation[0])
        for name, table in (("euler", euler(levels)), ("1", dpm_solver(levels, order=1)), ("2", dpm_solver(levels))):
            x = run_table(table, torch.ones(1, dtype=torch.float64), [0.0] * n, ideal)
            errors.setdefault(name, []).append(abs(float(x) - expected))
    orders = {name: np.log2(e[-2] / e[-1]) for name, e in errors.items()}
    assert orders["euler"] == pytest.approx(1, abs=0.1)
    assert orders["1"] == pytest.approx(1, abs=0.1)
    assert orders["2"] == pytest.approx(2, abs=0.25)
