"""Sampling methods against diffusers' schedulers in the same run, and by their order of convergence."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch

import fastddim
import method_oracle
from fastddim import Clip, DDIMConfig, DynamicThreshold, Guidance, Sampler, Schedule, StepTable
from fastddim.noise import STREAM_INITIAL, normal_numpy, seed_tensor
from fastddim.samplers import METHODS, Steps
from fastddim.samplers.ddpm import ddpm
from fastddim.samplers.dpm_solver import dpm_solver
from fastddim.samplers.euler import euler, euler_ancestral
from fastddim.samplers.lcm import lcm
from fastddim.samplers.sampling import read_scheduler
from fastddim.samplers.tcd import tcd
from fastddim.schedule import EDMSchedule, FlowSchedule
from fastddim.step import StepOptions

SHAPE = (3, 2, 5)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}

SCHEDULES = {
    "ddpm": Schedule(DDIMConfig(**SD, clip_sample=False)),
    "flow": FlowSchedule(shift=3.0),
    "edm": EDMSchedule(),
}


def model(x, t):
    """Any smooth function of both."""
    return torch.tanh(0.7 * x + torch.sin(torch.as_tensor(t, dtype=x.dtype) / 211)) + 0.1 * x


def run_table(table, x, noises, called=model):
    """The table in float64; returns the last state."""
    previous = torch.zeros_like(x)
    for step, row in enumerate(table.rows):
        out = called(x, table.timesteps[step])
        x0 = row.x0_from_x * x + row.x0_from_output * out
        following = row.next_from_x * x + row.next_from_output * out + row.next_from_x0 * x0
        x = following + row.noise_scale * noises[step] + row.next_from_previous_x0 * previous
        previous = x0
    return x


def exact(scheduler):
    """A scheduler whose alphas are those of float64, so that nothing but its step is compared."""
    if hasattr(scheduler, "alphas_cumprod"):
        alphas = Schedule(DDIMConfig.from_dict(scheduler.config, ignore_unknown=True)).alphas_cumprod.copy()
        if scheduler.config.rescale_betas_zero_snr and not isinstance(
            scheduler, (diffusers.DDPMScheduler, diffusers.LCMScheduler, diffusers.TCDScheduler)
        ):
            alphas[-1] = 2**-24
        scheduler.alphas_cumprod = torch.from_numpy(alphas)
    if hasattr(scheduler, "alphas"):
        scheduler.alphas = torch.from_numpy(1 - np.append(0.0, 1 - alphas[1:] / alphas[:-1]))
    return scheduler


def run_diffusers(scheduler, x, noises, monkeypatch, **step_options):
    """diffusers' loop on float64 states, its noise drawn from `noises`; `scheduler` has its timesteps."""
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


def compare(scheduler, n, monkeypatch, tolerance=1e-6, build=None, step_options=None, **given):
    """Sample from the same noise with the scheduler and with its table; returns the table."""
    exact(scheduler).set_timesteps(**({"num_inference_steps": n} | given))
    table = read_scheduler(scheduler).build(Steps(n)) if build is None else build()
    noise, noises = start_and_noises(n)
    assert len(table) == len(scheduler.timesteps)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps, rtol=2e-6, atol=2e-4)
    theirs = run_diffusers(
        scheduler, noise * getattr(scheduler, "init_noise_sigma", 1.0), noises, monkeypatch, **(step_options or {})
    )
    ours = run_table(table, noise * table.start_scale, noises)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance
    return table


@pytest.mark.parametrize("n", [2, 20, 50])
@pytest.mark.parametrize(
    "options",
    [{"shift": 1.0}, {"shift": 3.0}, {"shift": 3.0, "shift_terminal": 0.1}, {"shift": 3.0, "use_karras_sigmas": True},
     {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}, {"stochastic_sampling": True}],
)  # fmt: skip
def test_euler_of_flow_matching(n, options, monkeypatch):
    compare(diffusers.FlowMatchEulerDiscreteScheduler(**options), n, monkeypatch)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift(kind, monkeypatch):
    """Flux passes its own list and the shift of the image's size."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    sampling = read_scheduler(scheduler)
    # FluxPipeline's `calculate_shift` of 1,024 tokens.
    mu = 1024 * (1.15 - 0.5) / (4096 - 256) + 0.5 - 256 * (1.15 - 0.5) / (4096 - 256)
    assert sampling.schedule.mu(1024) == pytest.approx(mu)
    sigmas = np.linspace(1.0, 1 / 8, 8)
    build = lambda: sampling.build(Steps(sigmas=sigmas), mu=mu)  # noqa: E731
    compare(scheduler, 8, monkeypatch, build=build, sigmas=sigmas.tolist(), mu=mu)
    compare(scheduler, 8, monkeypatch, build=lambda: sampling.build(Steps(8), mu=mu), mu=mu)


SPACINGS = [
    {"timestep_spacing": "linspace"}, {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}, {"use_beta_sigmas": True},
]  # fmt: skip


@pytest.mark.parametrize("n", [2, 10, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("method", ["euler", "euler_ancestral"])
def test_euler_of_betas(n, prediction_type, spacing, method, monkeypatch):
    kinds = {"euler": diffusers.EulerDiscreteScheduler, "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler}
    if method == "euler_ancestral":
        spacing = {name: value for name, value in spacing.items() if "sigma" not in name}
    # At a sigma of 4096 diffusers' float32 sigmas are further off.
    tolerance = 3e-5 if "rescale_betas_zero_snr" in spacing else 3e-6
    compare(kinds[method](**SD, prediction_type=prediction_type, **spacing), n, monkeypatch, tolerance)


def test_explicit_lists_of_euler(monkeypatch):
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    sampling, sigmas = read_scheduler(scheduler), [14.0, 5.5, 1.25, 0.25, 0.0]
    given = {"num_inference_steps": None}
    compare(scheduler, 4, monkeypatch, build=lambda: sampling.build(Steps(sigmas=sigmas)), sigmas=sigmas, **given)
    timesteps = [999, 700, 300, 20]
    compare(
        scheduler,
        4,
        monkeypatch,
        build=lambda: sampling.build(Steps(timesteps=timesteps)),
        timesteps=timesteps,
        **given,
    )
    # Stable Video Diffusion's.
    video = diffusers.EulerDiscreteScheduler(
        **SD, prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002,
        sigma_max=700.0,
    )  # fmt: skip
    compare(video, 12, monkeypatch)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", [diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("options", [{}, {"sigma_schedule": "exponential", "final_sigmas_type": "sigma_min"}])
def test_edm(prediction_type, kind, options, monkeypatch):
    if kind is diffusers.EDMEulerScheduler:
        options = {name: value for name, value in options.items() if name != "final_sigmas_type"}
    compare(kind(prediction_type=prediction_type, **options), 12, monkeypatch, 3e-6)


@pytest.mark.parametrize("n", [1, 4, 8, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("method", ["lcm", "tcd", "tcd 0.0", "tcd 1.0"])
def test_distilled(n, prediction_type, method, monkeypatch):
    kind = diffusers.LCMScheduler if method == "lcm" else diffusers.TCDScheduler
    scheduler = kind(**SD, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=True)
    if method == "lcm":
        compare(scheduler, n, monkeypatch)
        return
    gamma = float(method.partition(" ")[2] or 0.3)
    build = lambda: read_scheduler(scheduler).build(Steps(n), gamma=gamma)  # noqa: E731
    compare(scheduler, n, monkeypatch, build=build, step_options={"eta": gamma})


@pytest.mark.parametrize("n", [1, 2, 5])
def test_consistency_models(n, monkeypatch):
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(n)
    sigmas = [*scheduler.sigmas[:n].tolist(), 0.0]
    table = METHODS["consistency"].build(EDMSchedule(), Steps(sigmas=sigmas))
    x, noises = start_and_noises(n)
    theirs = run_diffusers(scheduler, x * float(scheduler.sigmas[0]), noises, monkeypatch)
    ours = run_table(table, x * sigmas[0] * table.noising[0], noises)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps, rtol=1e-5)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.77])
@pytest.mark.parametrize("kind", [diffusers.LCMScheduler, diffusers.TCDScheduler])
def test_a_distillations_steps_at_a_strength_are_diffusers(kind, strength):
    scheduler = kind(**SD)
    scheduler.set_timesteps(4, strength=strength)
    table = read_scheduler(scheduler).build(Steps(4, strength=strength))
    assert list(table.timesteps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("n", [1, 2, 5, 15, 25, 50])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("solver", [(1, "midpoint"), (2, "midpoint"), (2, "heun")])
@pytest.mark.parametrize(
    "options",
    [{}, {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading", "steps_offset": 1},
     {"lower_order_final": False, "timestep_spacing": "trailing"},
     {"use_karras_sigmas": True, "prediction_type": "v_prediction"}, {"use_exponential_sigmas": True},
     {"euler_at_final": True, "use_beta_sigmas": True, "prediction_type": "sample"},
     {"lambda_min_clipped": -3.0, "beta_schedule": "squaredcos_cap_v2", "final_sigmas_type": "sigma_min"}],
)  # fmt: skip
def test_dpm_solver(n, algorithm, solver, options, monkeypatch):
    order, kind = solver
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD | options, algorithm_type=algorithm, solver_order=order, solver_type=kind
    )
    table = compare(scheduler, n, monkeypatch, 3e-6)
    assert table.looks_back == (order == 2)


@pytest.mark.parametrize("n", [2, 10, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm(n, prediction_type, variance_type, monkeypatch):
    scheduler = diffusers.DDPMScheduler(
        **SD, prediction_type=prediction_type, variance_type=variance_type, clip_sample=False
    )
    build = lambda: read_scheduler(scheduler, "ddpm").build(Steps(n))  # noqa: E731
    compare(scheduler, n, monkeypatch, build=build)
    assert read_scheduler(scheduler).method == "ddim"


def test_a_class_heeds_its_own_parameters_of_a_configuration():
    """`from_config` keeps the others for the way back."""
    ddim = diffusers.DDIMScheduler(**SD, clip_sample=True, rescale_betas_zero_snr=True, thresholding=True)
    karras = diffusers.EulerDiscreteScheduler.from_config({**ddim.config, "use_karras_sigmas": True})
    assert karras.config["clip_sample"] is True
    assert read_scheduler(karras).limit is None and read_scheduler(karras).spacing == "karras"
    ancestral = read_scheduler(diffusers.EulerAncestralDiscreteScheduler.from_config(karras.config))
    assert ancestral.limit is None and ancestral.spacing is None
    solver = read_scheduler(diffusers.DPMSolverMultistepScheduler.from_config(karras.config))
    assert solver.limit == DynamicThreshold(0.995, 1.0) and solver.spacing == "karras"
    lcm_clipped = read_scheduler(diffusers.LCMScheduler(clip_sample=True, clip_sample_range=2.0))
    assert lcm_clipped.limit == Clip(2.0)
    # Asked for by name, DDIM samples as diffusers' class from this configuration would, and others as that class does.
    assert read_scheduler(karras, "ddim").limit == DynamicThreshold(0.995, 1.0)
    assert read_scheduler(ddim, "euler").limit == DynamicThreshold(0.995, 1.0)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    assert read_scheduler(diffusers.EulerDiscreteScheduler.from_config(flow.config)).schedule == Schedule(
        DDIMConfig(clip_sample=False, timestep_spacing="linspace")
    )


def test_orders_of_convergence():
    """Data of deviation c: the ideal eps is `sigma / (c**2 signal**2 + sigma**2) * x`, and the ODE keeps `x / deviation`."""
    c, errors = 0.4, {}
    for n in (80, 160, 320):
        noise = np.geomspace(20, 0.02, n + 1)
        norm = np.hypot(noise, 1.0)
        steps = Steps(timesteps=np.arange(n, 0.0, -1), sigmas=noise)

        def ideal(x, t, noise=noise, n=n):
            s = noise[n - int(t)]
            signal, sigma = 1 / math.hypot(s, 1), s / math.hypot(s, 1)
            return float(sigma / ((c * signal) ** 2 + sigma**2)) * x

        schedule = Schedule(DDIMConfig(**SD))
        tables = {
            "1": dpm_solver(schedule, steps, solver_order=1, lower_order_final=False),
            "2": dpm_solver(schedule, steps, lower_order_final=False),
            "heun": dpm_solver(schedule, steps, solver_type="heun", lower_order_final=False),
            "euler": euler(schedule, steps),
        }
        deviation = np.hypot(c, noise) / norm
        for name, table in tables.items():
            end = deviation[-1] if name != "euler" else deviation[-1] * norm[-1]
            x = run_table(table, torch.ones(1, dtype=torch.float64), [0.0] * n, ideal)
            errors.setdefault(name, []).append(abs(float(x) - end / deviation[0]))
    orders = {name: np.log2(e[-2] / e[-1]) for name, e in errors.items()}
    assert orders["euler"] == pytest.approx(1, abs=0.1)
    assert orders["1"] == pytest.approx(1, abs=0.1)
    assert orders["2"] == pytest.approx(2, abs=0.25)
    assert orders["heun"] == pytest.approx(2, abs=0.25)


def numpy_model(x, t):
    return np.tanh(0.7 * x + np.sin(t / 211)) + 0.1 * x


BARS = SCHEDULES["ddpm"].alphas_cumprod
TIMESTEPS = [961, 700, 333, 120, 17]
SIGMAS = [14.5, 6.0, 2.0, 0.5, 0.1, 0.0]
FLOW_SIGMAS = [1.0, 0.8, 0.5, 0.3, 0.1]
SCALED = np.sqrt(np.array(SIGMAS) ** 2 + 1)
# Levels and timesteps as they are.
BOTH = {"timesteps": TIMESTEPS, "sigmas": SIGMAS}


def vp(x, sigma, i):
    return method_oracle.denoise(x, sigma, TIMESTEPS[i], numpy_model)


def edm(x, sigma, i):
    return method_oracle.edm_denoise(x, sigma, numpy_model)


def x0_of(x, i):
    return (x - SIGMAS[i] / SCALED[i] * numpy_model(x, TIMESTEPS[i])) * SCALED[i]


def solver_oracle(x, noise, algorithm, kind):
    noise = noise if algorithm == "sde-dpmsolver++" else None
    return method_oracle.dpm_solver_2m(x, 1 / SCALED, SIGMAS / SCALED, x0_of, noise, kind == "heun")


# How a table is made, and the oracle from the same state and noise.
PAPERS = {
    "flow": (
        euler, "flow", {"sigmas": FLOW_SIGMAS}, {},
        lambda x, noise: method_oracle.flow_euler(x, [*shifted(FLOW_SIGMAS, 3.0), 0.0], numpy_model),
    ),
    "euler": (euler, "ddpm", BOTH, {}, lambda x, noise: method_oracle.euler(x * SCALED[0], SIGMAS, vp)),
    "euler, edm": (
        euler, "edm", {"sigmas": SIGMAS}, {},
        lambda x, noise: method_oracle.euler(x * np.hypot(SIGMAS[0], 0.5), SIGMAS, edm),
    ),
    "ancestral": (
        euler_ancestral, "ddpm", BOTH, {"eta": 0.7},
        lambda x, noise: method_oracle.euler_ancestral(x * SCALED[0], SIGMAS, vp, noise, 0.7),
    ),
    "ddpm": (
        ddpm, "ddpm", {"timesteps": TIMESTEPS}, {},
        lambda x, noise: method_oracle.ddpm(x, BARS, TIMESTEPS, numpy_model, noise, False),
    ),
    "ddpm, large": (
        ddpm, "ddpm", {"timesteps": TIMESTEPS}, {"variance_type": "fixed_large"},
        lambda x, noise: method_oracle.ddpm(x, BARS, TIMESTEPS, numpy_model, noise, True),
    ),
    "lcm": (
        lcm, "ddpm", {"timesteps": TIMESTEPS}, {},
        lambda x, noise: method_oracle.lcm(x, BARS, TIMESTEPS, numpy_model, noise),
    ),
    "tcd": (
        tcd, "ddpm", {"timesteps": TIMESTEPS}, {"gamma": 0.4},
        lambda x, noise: method_oracle.tcd(x, BARS, TIMESTEPS, numpy_model, noise, 0.4),
    ),
    **{
        f"{algorithm}, {kind}": (
            dpm_solver, "ddpm", BOTH, {"solver_type": kind, "algorithm_type": algorithm},
            lambda x, noise, kind=kind, algorithm=algorithm: solver_oracle(x, noise, algorithm, kind),
        )
        for algorithm in ("dpmsolver++", "sde-dpmsolver++")
        for kind in ("midpoint", "heun")
    },
}  # fmt: skip


def shifted(sigmas, shift):
    """arXiv:2403.03206, equation 23."""
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]


@pytest.mark.parametrize("name", PAPERS)
def test_a_table_is_the_papers_method(name):
    build, schedule, steps, options, oracle = PAPERS[name]
    table = build(SCHEDULES[schedule], Steps(**steps), **options)
    x, noises = start_and_noises(5)
    ours = run_table(table, x, noises, lambda x, t: torch.from_numpy(numpy_model(x.numpy(), float(t))))
    np.testing.assert_allclose(ours.numpy(), oracle(x.numpy(), torch.stack(noises).numpy()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["ddpm", "flow", "edm"])
def test_eulers_method_is_inverted(kind):
    """The reconstruction's error falls with the steps' size."""
    x0 = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    errors = []
    for n in (20, 80):
        sampler = Sampler(lambda x, t: 0.05 * torch.tanh(x), SCHEDULES[kind], n, method="euler", sample_shape=SHAPE)
        errors.append((sampler(sampler.invert(x0)) - x0).abs().max())
        noise = torch.from_numpy(normal_numpy([3, 4], 0, SHAPE, STREAM_INITIAL))
        from_x0, from_noise = sampler.table.noising
        torch.testing.assert_close(sampler.add_noise(x0, 3), from_x0 * x0 + from_noise * noise)
    assert errors[0] < 0.7 and errors[1] < errors[0] / 3


@pytest.mark.parametrize(
    ("schedule", "options", "said"),
    [
        ("flow", {"method": "lcm"}, r"method: 'lcm' with a FlowSchedule; that is sampled by 'dpmsolver\+\+', 'euler'"),
        ("edm", {"method": "ddim"}, "method: 'ddim' with a EDMSchedule; that is sampled by"),
        ("ddpm", {"method": "heun"}, "method: 'heun' is not one of .*'ddim', "),
        ("ddpm", {"method": "ddim", "spacing": "karras"}, "spacing: 'karras' for method 'ddim', which steps through"),
        ("ddpm", {"method": "euler", "spacing": "karass"}, "spacing: 'karass' is not one of .* Did you mean 'karras'"),
        (
            "ddpm",
            {"method": "euler", "eta": 0.5},
            "eta: no option of method 'euler', which takes .*; it is one of 'ddim'",
        ),
        ("ddpm", {"method": "tcd", "method_options": {"gamma": 2}}, r"gamma: 2; pass a number in \[0, 1\]"),
        (
            "ddpm",
            {"method": "lcm", "num_inference_steps": 51},
            "num_inference_steps: 51, but the model is distilled for 50",
        ),
        ("ddpm", {"method": "dpmsolver++", "method_options": {"solver_order": 3}}, "solver_order: 3; pass 1 or 2"),
        ("ddpm", {"method": "euler", "sigmas": [1.0, 2.0, 0.0]}, r"the noise rises at step 0 .*; pass them descending"),
        ("ddpm", {"method": "euler", "timesteps": [10, 500]}, "the noise rises at step 0"),
        ("ddpm", {"method": "lcm", "timesteps": [10, 500]}, r"entry 1 \(500\) is not below entry 0"),
        (
            "flow",
            {"method_options": {"mu": 0.5}},
            "mu: 0.5 with use_dynamic_shifting False; leave it out, or pass shift",
        ),
        ("flow", {"sigmas": [5.0, 0.5]}, "sigmas: 5 with a FlowSchedule; pass numbers above 0 and up to 1"),
        ("flow", {"timesteps": [2000, 10]}, "timesteps: 2000 with a FlowSchedule; pass numbers above 0 and up to 1000"),
        ("flow", {"timesteps": [10, 0]}, "timesteps: 0 with a FlowSchedule"),
        *(
            ("flow", {"method": method, "method_options": {name: value}}, f"{name}: {value!r} with a FlowSchedule")
            for method, name, value in (
                ("euler", "final_sigmas_type", "sigma_min"),
                ("euler", "sigma_max", 10.0),
                ("euler", "timestep_type", "continuous"),
                ("dpmsolver++", "lambda_min_clipped", -3.0),
            )
        ),
        ("edm", {"timesteps": [3, 2]}, "timesteps: given to an EDMSchedule"),
        ("edm", {"method_options": {"mu": 0.5}}, "mu: 0.5 with a EDMSchedule, which has none; leave it out"),
        ("edm", {"method_options": {"sigma_min": 0.1}}, "sigma_min: 0.1 with a EDMSchedule"),
        ("edm", {"method_options": {"final_sigmas_type": "none"}}, "final_sigmas_type: 'none' is not one of"),
        ("edm", {"method": "consistency", "sigmas": [2.0, 1.0]}, "sigmas: 1 at the end, .*; pass 0"),
        ("ddpm", {"method": "euler", "method_options": {"mu": 0.5}}, "mu: 0.5 with a Schedule"),
        *(
            (kind, {"method": "dpmsolver++", "sigmas": sigmas}, said)
            for kind in ("ddpm", "edm")
            for sigmas, said in (
                ([5.0, -1.0], "sigmas: entry 1 is -1.0; pass numbers above 0"),
                ([1.0, 0.0, 0.0], "sigmas: entry 1 is 0.0; pass numbers above 0, and 0 at the end alone"),
                ([math.inf, 1.0], "sigmas: entry 0 is inf; pass finite numbers"),
                ([5.0, "1"], "sigmas: entry 1 is '1'; pass finite numbers"),
                ([[5.0, 0.0]], r"sigmas: entry 0 is \[5.0, 0.0\]; pass finite"),
                ([5.0], "sigmas: 1 for 0 timesteps; pass one more"),
            )
        ),
        ("ddpm", {"method": "euler", "timesteps": [2000, 10]}, r"timesteps: 2000; pass numbers in \[0, 999\]"),
        ("ddpm", {"method": "dpmsolver++", "timesteps": [10, -0.5]}, r"timesteps: -0.5; pass numbers in \[0, 999\]"),
        ("ddpm", {"method": "dpmsolver++", "timesteps": [math.nan]}, "timesteps: entry 0 is nan; pass finite"),
        (
            "ddpm",
            {"method": "dpmsolver++", "num_inference_steps": 1000},
            r"num_inference_steps: 1000; .* in \[1, 999\]",
        ),
        *(
            ("ddpm", {"method": method, "method_options": {**options, name: value}}, f"{name}.*: .*; pass")
            for method, name, value, options in (
                ("dpmsolver++", "lambda_min_clipped", 20.0, {}),
                ("dpmsolver++", "lambda_min_clipped", math.nan, {}),
                ("dpmsolver++", "lower_order_final", "no", {}),
                ("lcm", "timestep_scaling", 0, {}),
                ("ddim", "eta", "much", {}),
            )
        ),
        *(
            (
                "ddpm",
                {"method": "euler", "spacing": "karras", "method_options": {"sigma_min": low}},
                f"sigma_min.*{said}",
            )
            for low, said in ((0.0, "0.0; pass a number"), (100.0, "100, .*; pass sigma_min <= sigma_max"))
        ),
        ("ddpm", {"method": "euler", "method_options": 3}, "method_options: 3; pass a mapping"),
        ("ddpm", {"sigmas": [1.0, 0.5]}, "sigmas: .* for method 'ddim'"),
        *(
            ("ddpm", {"method": name, "num_inference_steps": 0}, "num_inference_steps: 0; pass an integer")
            for name in METHODS
            if name != "consistency"
        ),
        ("edm", {"num_inference_steps": 1.5}, r"num_inference_steps: 1\.5; pass an integer >= 1"),
        ("flow", {"num_inference_steps": 0}, "num_inference_steps: 0; pass an integer >= 1"),
        ("ddpm", {"method": "euler", "timesteps": []}, "timesteps: empty; pass at least one"),
        ("flow", {"spacing": "align_your_steps_sdxl"}, "spacing: 'align_your_steps_sdxl' has levels above 1"),
    ],
)
def test_what_a_method_cannot_take_is_named(schedule, options, said):
    steps = {} if {"timesteps", "sigmas"} & options.keys() else {"num_inference_steps": 5}
    with pytest.raises(ValueError, match=said):
        Sampler(Network(), SCHEDULES[schedule], sample_shape=SHAPE, **{**steps, **options})


@pytest.mark.parametrize(
    ("kind", "mu"), [("exponential", 800.0), ("exponential", math.nan), ("linear", 0.0), ("linear", "3")]
)
def test_a_shift_that_is_none_is_named(kind, mu):
    schedule = FlowSchedule(use_dynamic_shifting=True, time_shift_type=kind)
    with pytest.raises(ValueError, match=f"mu: {mu!r}; pass a number in"):
        euler(schedule, 5, mu=mu)


@pytest.mark.parametrize("method", ["euler", "euler_ancestral", "dpmsolver++"])
def test_edms_last_level_is_the_least_however_few_the_steps(method):
    """One step goes all the way: with an x0 of 0, the state shrinks as the noise does."""
    for n in (1, 3):
        table = METHODS[method].build(SCHEDULES["edm"], Steps(n), final_sigmas_type="sigma_min")
        expected = METHODS[method].build(
            SCHEDULES["edm"], Steps(sigmas=[*(math.exp(4 * t) for t in table.timesteps), 0.002])
        )
        np.testing.assert_allclose(table.columns, expected.columns, rtol=1e-9, atol=1e-9)


def test_each_number_of_trailing_steps_gives_as_many():
    """diffusers' list has a timestep -1 too many for some, of which 61 is one."""
    schedule = Schedule(DDIMConfig(**SD, timestep_spacing="trailing"))
    for n in range(1, 101):
        table = dpm_solver(schedule, n)
        assert len(table) == n and min(table.timesteps) >= 0


def test_a_step_between_two_levels_without_signal_is_none():
    table = dpm_solver(FlowSchedule(), Steps(sigmas=[1.0, 1.0, 0.5]))
    np.testing.assert_array_equal(table.columns[0, 2:], [1, 0, 0, 0, 0])
    assert np.isfinite(table.columns).all()


def test_a_method_without_an_inverse_says_which_have_one():
    sampler = Sampler(Network(), SCHEDULES["ddpm"], 5, method="dpmsolver++", sample_shape=SHAPE)
    with pytest.raises(ValueError, match=r"method: 'dpmsolver.*' has no inverse; pass method='ddim' or 'euler'"):
        sampler.invert(torch.zeros(1, *SHAPE))


@pytest.mark.parametrize("method", ["ddim", "ddpm", "lcm", "tcd"])
def test_epsilon_without_signal_is_refused_by_every_method(method):
    schedule = Schedule(DDIMConfig(**SD, rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    with pytest.raises(ValueError, match="prediction_type: 'epsilon' at timestep 999, which has no signal"):
        Sampler(Network(), schedule, 5, method=method, sample_shape=SHAPE)


class Network(torch.nn.Module):
    """`model` for a sampler: one timestep for each row."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x, t, shift=None):
        out = model(x, t.view(-1, *[1] * (x.ndim - 1)).double())
        return (out if shift is None else out + shift.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)


EVERY = [
    (name, kind)
    for name, method in METHODS.items()
    for kind, schedule in SCHEDULES.items()
    if isinstance(schedule, method.schedules)
]


@pytest.mark.parametrize("graph", ["off", "step", "loop"])
@pytest.mark.parametrize(("method", "kind"), EVERY)
def test_a_sampler_is_the_table_in_float64(method, kind, graph):
    n, seeds = 9, [3, 4]
    sampler = Sampler(Network(), SCHEDULES[kind], n, method=method, sample_shape=SHAPE, graph=graph)
    assert sampler.method == method and len(sampler.table) == n
    sampler.warmup(2)
    start = torch.from_numpy(normal_numpy(seeds, 0, SHAPE, STREAM_INITIAL)).double()
    noises = [torch.from_numpy(normal_numpy(seeds, step, SHAPE)).double() for step in range(n)]
    called = lambda x, t: model(x, torch.tensor(t, dtype=torch.float32).double())  # noqa: E731
    expected = run_table(sampler.table, start * sampler.table.start_scale, noises, called)
    torch.testing.assert_close(sampler(2, seeds=seeds).double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("limit", [Clip(0.7), DynamicThreshold(0.9, 2.0)])
@pytest.mark.parametrize("method", ["dpmsolver++", "euler", "lcm", "ddpm"])
def test_a_limit_and_guidance_are_those_of_diffusers(method, limit, monkeypatch):
    """x0 of every method is limited; what the limited x0 leaves of epsilon points the direction."""
    sampler = Sampler(
        Network(), SCHEDULES["ddpm"], 6, method=method, sample_shape=SHAPE, limit=limit, guidance_scale=3.0
    )
    shift = torch.linspace(-1, 1, 2)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    _, states = sampler(x, seeds=5, shift=shift, uncond_kwargs={"shift": 0 * shift}, return_trajectory=True)
    state, previous = x.double(), None
    for step, row in enumerate(sampler.table.rows):
        t = torch.tensor(float(sampler.table.timesteps[step]))
        uncond = model(state, t)
        out = uncond + 3.0 * (shift.view(-1, 1, 1, 1).double())
        x0 = row.x0_from_x * state + row.x0_from_output * out
        if isinstance(limit, Clip):
            x0 = x0.clamp(-0.7, 0.7)
        else:
            s = x0.abs().flatten(1).quantile(0.9, dim=1).clamp(1, 2.0).view(-1, 1, 1, 1)
            x0 = x0.clamp(-s, s) / s
        following = row.next_from_x * state + row.next_from_output * out + row.next_from_x0 * x0
        noise = torch.from_numpy(normal_numpy([5, 6], step, SHAPE)).double()
        state = following + row.noise_scale * noise
        if previous is not None:
            state = state + row.next_from_previous_x0 * previous
        previous = x0
        torch.testing.assert_close(states[step + 1].double(), state, rtol=1e-4, atol=1e-4)
    assert (sampler.table.columns[:, 3] == 0).all()


def looking_back(noisy=False, n=6):
    """A table each of whose steps but the first looks back; `noisy`, all of them add noise."""
    columns = np.random.default_rng(0).uniform(0.2, 0.8, (n, 7))
    columns[0, 6] = 0
    columns[:, 5] *= noisy
    return StepTable.from_columns(range(n, 0, -1), columns)


STEPS = {
    "plain": ((3, 4, 6, 7), {}),
    "guided, clipped, drawn": ((3, 5, 8), {"guidance": 2.5, "limit": Clip(0.7), "seeds": True}),
    "threshold of a whole sample": ((2, 3, 9, 9), {"limit": DynamicThreshold(0.9, 1.5), "guidance": 2.0}),
    "threshold of a large one, rescaled": (
        (2, 17000), {"limit": DynamicThreshold(0.9, 1.5), "guidance": Guidance(2.0, 0.5)}
    ),
    "rows of their own": ((4, 33), {"step": [0, 3, 5, 1], "seeds": True}),
}  # fmt: skip


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STEPS)
def test_the_kernel_looks_back_as_the_reference_does(name, dtype):
    shape, options = STEPS[name]
    from fastddim.kernels.operator import ddim_step as operator_step

    options, table = dict(options), looking_back("seeds" in options)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    x, output, previous = (
        draw(*shape),
        draw(2 * shape[0] if "guidance" in options else shape[0], *shape[1:]),
        draw(*shape),
    )
    if options.pop("seeds", False):
        options["seeds"] = seed_tensor(range(shape[0]), "cpu")
    own_rows = options.pop("step", None)
    steps = [0, 4] if own_rows is None else [torch.tensor(own_rows)]
    for step in steps:
        # A row that does not look back must not read what was never written.
        given = previous.clone()
        first = torch.tensor([step == 0] * shape[0]) if own_rows is None else torch.tensor(own_rows) == 0
        given[first] = torch.nan
        ours, theirs = given.clone(), given.clone()
        rows = table if own_rows is None else table.tensor()
        x_next, x0 = fastddim.ddim_step(output, x, rows, step, previous_x0=ours, backend="triton", **options)
        expected, expected_x0 = fastddim.ddim_step(
            output, x, rows, step, previous_x0=theirs, backend="reference", **options
        )
        assert x0 is ours and expected_x0 is theirs and expected.isfinite().all()
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(x_next, expected, **tolerance)
        torch.testing.assert_close(ours, theirs, **tolerance)
        # As an exported program calls it.
        guidance = options.get("guidance")
        guidance = guidance if guidance is None or isinstance(guidance, Guidance) else Guidance(guidance)
        traced = given.clone()
        again, again_x0 = operator_step(
            output, x, rows, step, StepOptions(**{**options, "guidance": guidance, "previous_x0": traced})
        )
        assert torch.equal(again, x_next) and again_x0 is traced and torch.equal(traced, ours)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("graph", ["off", "step", "loop"])
def test_a_fused_run_looks_back(graph):
    sampler = Sampler(
        Network(), SCHEDULES["ddpm"], 7, method="dpmsolver++", sample_shape=SHAPE, graph=graph, backend="triton",
        limit=Clip(2.0), guidance_scale=2.0,
    )  # fmt: skip
    expected = sampler.replace(backend="reference", graph="off")(2, seeds=0, uncond_kwargs={})
    sampler.warmup(2, uncond_kwargs={})
    for _ in range(2):
        torch.testing.assert_close(sampler(2, seeds=0, uncond_kwargs={}), expected, rtol=1e-5, atol=1e-5)


def test_a_table_and_the_previous_x0_come_together():
    x = torch.zeros(2, 3)
    plain = StepTable.from_columns([2, 1], np.ones((2, 6)))
    for table, previous, said in (
        (looking_back(), None, "previous_x0: None with a table that looks back"),
        (plain, torch.zeros(2, 3), "previous_x0: given with a table that does not"),
        (looking_back(), torch.zeros(2, 4), r"previous_x0: shape \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=said):
            fastddim.ddim_step(x, x, table, 0, previous_x0=previous)
    with pytest.raises(ValueError, match="columns: the first step has next_from_previous_x0"):
        StepTable.from_columns([2, 1], np.ones((2, 7)))
    with pytest.raises(ValueError, match="not differentiable"):
        fastddim.ddim_step(x.clone().requires_grad_(), x, looking_back(), 1, previous_x0=x.clone())


@pytest.mark.parametrize("method", ["auto", "ddim", "euler"])
def test_a_class_without_a_clip_is_sampled_without_one(method):
    # Checkpoints of 2022 have PNDM's configuration, without `clip_sample`, for latents.
    scheduler = diffusers.PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True)
    assert Sampler(torch.zeros_like, scheduler, 4, method=method).limit is None
    assert Sampler(torch.zeros_like, diffusers.EulerDiscreteScheduler(), 4, method="ddim").limit is None
    assert Sampler(torch.zeros_like, diffusers.DDPMScheduler(), 4, method=method).limit == Clip(1.0)
