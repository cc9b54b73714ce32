"""CFG++ and adaptive projected guidance: the reference, the fused step and the sampler, against the papers and diffusers."""

import functools

import numpy as np
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance

import fastddim
import oracle
from fastddim import Clip, DDIMConfig, DynamicThreshold, Guidance, Sampler, Schedule, StepTable
from fastddim.kernels import Workspace, launch, plan
from fastddim.reference import combine_guidance
from fastddim.samplers import METHODS, Steps
from fastddim.schedule import EDMSchedule, FlowSchedule
from fastddim.step import StepOptions

fused_step, reference_step = (functools.partial(fastddim.ddim_step, backend=name) for name in ("triton", "reference"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEDULE = Schedule(DDIMConfig())
PAIRS = SCHEDULE.pairs(10)
ROW = 6
LIMITS = {"none": None, "clip": Clip(1.0), "threshold": DynamicThreshold(0.9, 1.5)}
APG = [(0.0, 0.0), (0.0, 4.0), (0.3, 0.0), (0.5, 7.0), (1.0, 4.0)]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def numpy64(tensor):
    return tensor.double().cpu().numpy()


def table(prediction_type="epsilon", **options):
    return StepTable.build(SCHEDULE, PAIRS, prediction_type=prediction_type, **options)


def cfg_plus_plus(uncond, cond, x, scale, prediction_type="epsilon", **options):
    """The oracle's step of arXiv:2406.08070, float64."""
    uncond, cond, x = map(numpy64, (uncond, cond, x))
    bars = SCHEDULE.alpha_bar(PAIRS[ROW])
    guided = uncond + scale * (cond - uncond)
    return oracle.ddim(x, guided, *bars, prediction_type, direction_output=uncond, **options)


def threshold_of(limit):
    return (limit.ratio, limit.max_value) if isinstance(limit, DynamicThreshold) else None


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_cfg_plus_plus_takes_the_direction_from_the_unconditional_half(prediction_type, limit, eta):
    x, uncond, cond, noise = (draw(2, 3, 5, dtype=torch.float64, seed=k) for k in range(4))
    limits = LIMITS[limit]
    x_next, x0 = reference_step(
        torch.cat([uncond, cond]), x, table(prediction_type, eta=eta), ROW, limit=limits, noise=noise,
        guidance=Guidance(0.6, method="cfg++"),
    )  # fmt: skip
    clip = limits.range if isinstance(limits, Clip) else None
    expected = cfg_plus_plus(
        uncond, cond, x, 0.6, prediction_type, eta=eta, noise=numpy64(noise), clip=clip, threshold=threshold_of(limits)
    )
    np.testing.assert_allclose(numpy64(x0), expected.x0, atol=1e-12)
    np.testing.assert_allclose(numpy64(x_next), expected.x_next, atol=1e-12)


@pytest.mark.parametrize("schedule", [FlowSchedule(shift=3.0), EDMSchedule()])
def test_cfg_plus_plus_with_eulers_method_for_flows_and_edm(schedule):
    """With the model's x0 and epsilon written out: flow matching's velocity, and the preconditioning of arXiv:2206.00364."""
    steps = Sampler(torch.zeros_like, schedule, 8, guidance_scale=0.6, guidance_method="cfg++").table
    x, uncond, cond = (draw(2, 7, dtype=torch.float64, seed=k) for k in range(3))
    x_next, _ = reference_step(torch.cat([uncond, cond]), x, steps, 3, guidance=Guidance(0.6, method="cfg++"))
    x, uncond, cond = map(numpy64, (x, uncond, cond))
    guided = uncond + 0.6 * (cond - uncond)
    diffusers = {"FlowSchedule": flow_levels, "EDMSchedule": edm_levels}[type(schedule).__name__]
    sigma, sigma_next = diffusers(8)[3:5]
    if isinstance(schedule, FlowSchedule):
        expected = (1 - sigma_next) * (x - sigma * guided) + sigma_next * (x + (1 - sigma) * uncond)
    else:
        data, norm = 0.5, np.hypot(sigma, 0.5)

        def denoise(output):
            # The state is divided by norm, which is how the model takes it.
            return data**2 / norm**2 * (x * norm) + sigma * data / norm * output

        eps = (x * norm - denoise(uncond)) / sigma
        expected = (denoise(guided) + sigma_next * eps) / np.hypot(sigma_next, data)
    np.testing.assert_allclose(numpy64(x_next), expected, atol=1e-6)


def flow_levels(n):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(n)
    return scheduler.sigmas.double().numpy()


def edm_levels(n):
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(n)
    return scheduler.sigmas.double().numpy()


@pytest.mark.parametrize("cond_first", [False, True])
@pytest.mark.parametrize(("eta", "norm_threshold"), APG)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_projected_guidance_is_the_papers_and_diffusers(cond_first, eta, norm_threshold, rescale):
    uncond, cond = draw(3, 4, 6, 6, dtype=torch.float64), draw(3, 4, 6, 6, seed=1, dtype=torch.float64) * 0.3
    stacked = torch.cat([cond, uncond] if cond_first else [uncond, cond])
    guidance = Guidance(3.5, rescale, cond_first, "apg", eta, norm_threshold)
    guided = combine_guidance(stacked, guidance)
    if not rescale:
        expected = oracle.project(numpy64(uncond), numpy64(cond), 3.5, eta, norm_threshold)
        np.testing.assert_allclose(numpy64(guided), expected, atol=1e-12)
    # There the original formulation counts the scale from the conditional output.
    theirs = AdaptiveProjectedGuidance(
        2.5, None, norm_threshold, eta=eta, guidance_rescale=rescale, use_original_formulation=True
    )
    torch.testing.assert_close(guided, theirs.forward(cond, uncond).pred, rtol=0, atol=1e-12)
    scales = torch.tensor([1.0, 2.0, 7.0], dtype=torch.float64)
    each = combine_guidance(stacked, Guidance(scales, rescale, cond_first, "apg", eta, norm_threshold))
    for k, scale in enumerate(scales.tolist()):
        halves = torch.stack([cond[k], uncond[k]] if cond_first else [uncond[k], cond[k]])
        one = combine_guidance(halves, Guidance(scale, rescale, cond_first, "apg", eta, norm_threshold))
        torch.testing.assert_close(each[k : k + 1], one, rtol=0, atol=1e-12)


def test_projected_guidance_without_anything_to_project():
    zero, cond = torch.zeros(2, 5), draw(2, 5)
    apg = Guidance(3.0, method="apg", apg_norm_threshold=2.0)
    # Equal halves leave nothing to be guided by, and an empty direction nothing to be taken away.
    assert torch.equal(combine_guidance(torch.cat([cond, cond]), apg), cond)
    diff = -cond
    shrunk = diff * (2.0 / torch.linalg.vector_norm(diff, dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(combine_guidance(torch.cat([cond, zero]), apg), 2 * shrunk)


def test_everything_left_is_classifier_free_guidance():
    stacked = draw(6, 50, dtype=torch.float64)
    torch.testing.assert_close(
        combine_guidance(stacked, Guidance(3.0, method="apg", apg_eta=1.0)), combine_guidance(stacked, Guidance(3.0))
    )


METHODS_OF_GUIDANCE = {
    "cfg++": {"method": "cfg++"},
    "apg": {"method": "apg", "apg_eta": 0.25},
    "apg, limited": {"method": "apg", "apg_norm_threshold": 6.0},
}


def oracle_step(name, stacked, x, scale, limit, rescale=0.0):
    """x_next in float64, from epsilon outputs."""
    halves = stacked.chunk(2)
    uncond, cond = map(numpy64, halves)
    options = METHODS_OF_GUIDANCE[name]
    if name == "cfg++":
        guided = oracle.guide(uncond, cond, scale, rescale)
    else:
        guided = oracle.project(
            uncond, cond, scale, options.get("apg_eta", 0.0), options.get("apg_norm_threshold", 0.0)
        )
        std = [
            half.reshape(len(half), -1).std(1, ddof=1).reshape(-1, *[1] * (half.ndim - 1)) for half in (cond, guided)
        ]
        guided = guided * (rescale * std[0] / std[1] + 1 - rescale)
    return oracle.ddim(
        numpy64(x), guided, *SCHEDULE.alpha_bar(PAIRS[ROW]), clip=limit.range if isinstance(limit, Clip) else None,
        threshold=threshold_of(limit), direction_output=uncond if name == "cfg++" else None,
    )  # fmt: skip


@pytest.mark.usefixtures("machine")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", METHODS_OF_GUIDANCE)
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("large", [False, True])
def test_the_fused_step_guides_as_the_oracle(name, limit, rescale, large, monkeypatch):
    if large:
        monkeypatch.setattr(plan, "WHOLE_SAMPLE", 0)
        monkeypatch.setattr(plan, "STATISTICS_BLOCK", 64)
    launch._ENTRIES.clear()
    x, stacked = draw(3, 2, 11, 13), draw(6, 2, 11, 13, seed=1) * 1.3 + 0.2
    scales = torch.tensor([0.3, 1.0, 6.0], device=DEVICE)
    guidance = Guidance(scales, rescale, **METHODS_OF_GUIDANCE[name])
    workspace = Workspace()
    launches = 1 + (name != "cfg++") + (rescale > 0) + 2 * (limit == "threshold")
    summed = name != "cfg++" or rescale > 0 or limit == "threshold"
    tier = "elements" if not summed else "statistics" if large else "whole"
    for _ in range(2):
        x_next, x0 = fused_step(
            stacked, x, table(), ROW, guidance=guidance, limit=LIMITS[limit], workspace=workspace,
            out=torch.full_like(x, float("nan")),
        )  # fmt: skip
        (entry,) = launch._ENTRIES.values()
        assert (entry.plan.tier, len(entry.plan.calls)) == (tier, launches if tier == "statistics" else 1)
        for k, scale in enumerate(scales.tolist()):
            expected = oracle_step(name, stacked[k::3], x[k : k + 1], scale, LIMITS[limit], rescale)
            np.testing.assert_allclose(numpy64(x_next[k : k + 1]), expected.x_next, rtol=0, atol=3e-5)
            np.testing.assert_allclose(numpy64(x0[k : k + 1]), expected.x0, rtol=0, atol=3e-5)
    assert tier != "statistics" or not workspace._kept["counters"].any()
    # A sample's bits are the same in any batch.
    for k in range(3):
        alone = Guidance(scales[k], rescale, **METHODS_OF_GUIDANCE[name])
        one, _ = fused_step(stacked[k::3].contiguous(), x[k : k + 1], table(), ROW, guidance=alone, limit=LIMITS[limit])
        assert torch.equal(one[0], x_next[k])


@pytest.mark.usefixtures("machine")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", METHODS_OF_GUIDANCE)
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("half", [0, 1])
def test_nan_and_infinity_end_as_in_the_reference(name, large, value, half, monkeypatch):
    if large:
        monkeypatch.setattr(plan, "WHOLE_SAMPLE", 0)
        monkeypatch.setattr(plan, "STATISTICS_BLOCK", 64)
    launch._ENTRIES.clear()
    x, stacked = draw(2, 150), draw(4, 150, seed=1)
    stacked[2 * half, 140] = value
    for scale in (0.3, 1.0, 6.0):
        for limit in (None, Clip(1.0)):
            options = {"guidance": Guidance(scale, **METHODS_OF_GUIDANCE[name]), "limit": limit}
            ours = fused_step(stacked, x, table(), ROW, **options)
            theirs = reference_step(stacked, x, table(), ROW, **options)
            for actual, expected in zip(ours, theirs, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
                assert actual[1].isfinite().all()
            if name != "cfg++" and limit is None:
                assert not ours[0][0].isfinite().any()


@pytest.mark.usefixtures("machine")
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", METHODS_OF_GUIDANCE)
def test_the_operator_guides_as_the_launcher(name):
    from fastddim.kernels.operator import ddim_step

    x, stacked = draw(2, 50), draw(4, 50, seed=1)
    guidance = Guidance(0.7, 0.2, **METHODS_OF_GUIDANCE[name])
    traced, x0 = ddim_step(stacked, x, table(), ROW, StepOptions(guidance=guidance))
    expected = fused_step(stacked, x, table(), ROW, guidance=guidance)
    assert torch.equal(traced, expected[0]) and torch.equal(x0, expected[1])


def build(name, **options):
    kinds = {Schedule: SCHEDULE, FlowSchedule: FlowSchedule(), EDMSchedule: EDMSchedule()}
    method = METHODS[name]
    return method.build(kinds[method.schedules[0]], Steps(8), **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lcm", {}),
        ("ddpm", {}),
        ("dpmsolver++", {}),
        ("dpmsolver++", {"solver_order": 1}),
        ("dpmsolver++", {"algorithm_type": "sde-dpmsolver++"}),
        ("ddim", {"use_clipped_model_output": True}),
        ("euler", {"use_clipped_model_output": True}),
        ("euler", {"stochastic_sampling": True}),
    ],
)
def test_methods_without_an_epsilon_term_are_refused_by_name(name, options):
    with pytest.raises(ValueError, match=rf"^guidance_method: 'cfg\+\+' with method '{name.replace('+', '[+]')}'"):
        Sampler(
            torch.zeros_like,
            SCHEDULE,
            8,
            method=name,
            method_options=options,
            guidance_scale=0.6,
            guidance_method="cfg++",
        )
    x, output = draw(2, 5), draw(4, 5)
    steps = build(name, **options)
    previous = torch.zeros(2, 5) if steps.looks_back else None
    with pytest.raises(ValueError, match=r"^guidance.method: 'cfg\+\+' with this table"):
        reference_step(output, x, steps, 1, guidance=Guidance(0.6, method="cfg++"), noise=x, previous_x0=previous)


def test_a_table_whose_x0_takes_no_part_is_refused():
    """Euler's step as the state and the velocity: the unconditional output in its place would leave the guidance out."""
    rows = [[1.0, -0.5, 1.0, -0.1, 0.0, 0.0]] * 3
    steps = StepTable.from_columns([3, 2, 1], rows)
    with pytest.raises(ValueError, match=r"^guidance_method: 'cfg\+\+' with this table"):
        Sampler(torch.zeros_like, steps, guidance_scale=0.6, guidance_method="cfg++")


@pytest.mark.parametrize(
    ("name", "options"),
    [("ddim", {}), ("ddim", {"eta": 1.0}), ("euler", {}), ("euler_ancestral", {}), ("tcd", {})],
)
def test_methods_with_an_epsilon_term_are_taken(name, options):
    assert build(name, **options).has_epsilon_term


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [("epsilon", False), ("sample", False), ("sample", True), ("v_prediction", False), ("v_prediction", True),
     ("flow", True)],
)  # fmt: skip
def test_epsilon_of_the_output_is_told_from_a_rederived_one(steps, prediction_type, zero_snr):
    """Refused alone where the two differ: a single step has no epsilon, and a start without signal is epsilon itself."""
    scheduler = FlowSchedule()
    if prediction_type != "flow":
        scheduler = DDIMConfig(
            rescale_betas_zero_snr=zero_snr, prediction_type=prediction_type, timestep_spacing="trailing"
        )
    sampler = Sampler(torch.zeros_like, scheduler, steps, guidance_scale=0.6, guidance_method="cfg++")
    options = {"method_options": {"use_clipped_model_output": True}}
    if steps == 1 or (steps == 2 and zero_snr):
        rederived = sampler.replace(**options)
        x, output = draw(2, 5), draw(2, 5)
        for one in (sampler, rederived):
            for row in one.table.rows:
                # Whatever stands for the unconditional output has no part.
                assert row.next_from_output == 0
        for step in range(steps):
            expected = reference_step(output, x, sampler.table, step)[0]
            torch.testing.assert_close(reference_step(output, x, rederived.table, step)[0], expected)
    else:
        with pytest.raises(ValueError, match=r"^guidance_method: 'cfg\+\+' with method"):
            sampler.replace(**options)


def test_epsilon_is_not_derived_from_a_limited_x0_by_default():
    sampler = Sampler(torch.zeros_like, DDIMConfig(), 8, limit=Clip(1.0), guidance_scale=3.0)
    assert not sampler.table.has_epsilon_term
    assert sampler.replace(guidance_method="cfg++", guidance_scale=0.6).table.has_epsilon_term
    assert not sampler.replace(guidance_method="apg").table.has_epsilon_term


def model(x, t, c):
    """Neither linear in x nor alike in its halves."""
    return torch.tanh(x * 0.7 + c[:, None] * 0.3) - 0.1 * c[:, None]


@pytest.mark.parametrize("graph", ["off", "step", "loop"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", METHODS_OF_GUIDANCE)
def test_a_run_is_the_oracles(graph, batched, name):
    """All the steps in float64, with guidance on for some of them."""
    options = dict(METHODS_OF_GUIDANCE[name])
    method = options.pop("method")
    sampler = Sampler(
        model, DDIMConfig(), 6, limit=None, guidance_scale=0.8, guidance_method=method, guidance_interval=(0.0, 0.7),
        batched_guidance=batched, graph=graph, dtype=torch.float64, sample_shape=(40,), backend="reference", **options,
    )  # fmt: skip
    cond, uncond = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    start = draw(3, 40, dtype=torch.float64).cpu()
    for _ in range(2):
        final = sampler(start, c=cond, uncond_kwargs={"c": uncond})
    x = start.numpy()
    for k, (t, t_next) in enumerate(sampler.pairs):
        halves = [model(torch.from_numpy(x), t, c).numpy() for c in (uncond, cond)]
        direction = None
        output = halves[1]
        if k < int(0.7 * 6):
            if method == "cfg++":
                output, direction = halves[0] + 0.8 * (halves[1] - halves[0]), halves[0]
            else:
                output = oracle.project(
                    *halves, 0.8, options.get("apg_eta", 0.0), options.get("apg_norm_threshold", 0.0)
                )
        bars = SCHEDULE.alpha_bar([t, t_next])
        x = oracle.ddim(x, output, *bars, direction_output=direction).x_next
    np.testing.assert_allclose(final.numpy(), x, atol=1e-9)


@pytest.mark.usefixtures("machine")
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", METHODS_OF_GUIDANCE)
@pytest.mark.parametrize("large", [False, True])
def test_a_captured_run_of_the_fused_step_is_the_references(name, large, monkeypatch):
    """Where scales, the limit's numbers and the row come from memory, and the scratch memory is the steps' own."""
    if large:
        monkeypatch.setattr(plan, "WHOLE_SAMPLE", 0)
        monkeypatch.setattr(plan, "STATISTICS_BLOCK", 64)
    launch._ENTRIES.clear()
    options = {f"guidance_{key}" if key == "method" else key: value for key, value in METHODS_OF_GUIDANCE[name].items()}
    sampler = Sampler(
        model, DDIMConfig(), 4, guidance_scale=0.8, guidance_rescale=0.3, limit=DynamicThreshold(0.9, 1.5), graph="step",
        sample_shape=(150,), backend="triton", device=DEVICE, **options,
    )  # fmt: skip
    arguments = {"seeds": 0, "c": torch.ones(2, device=DEVICE), "uncond_kwargs": {"c": torch.zeros(2, device=DEVICE)}}
    expected = sampler.replace(graph="off", backend="reference")(2, **arguments)
    for _ in range(3):
        torch.testing.assert_close(sampler(2, **arguments), expected, rtol=0, atol=2e-5)
    assert len(sampler.graphs) == 1


def test_captures_are_of_one_method_and_its_numbers():
    sampler = Sampler(model, DDIMConfig(), 4, guidance_scale=0.5, graph="step", sample_shape=(8,), backend="reference")
    changes = ({}, {"guidance_method": "cfg++"}, {"guidance_method": "apg"}, {"guidance_method": "apg", "apg_eta": 0.5})
    for change in changes:
        each, plain = sampler.replace(**change), sampler.replace(graph="off", **change)
        results = [one(2, seeds=0, c=torch.ones(2), uncond_kwargs={"c": torch.zeros(2)}) for one in (each, each, plain)]
        for result in results:
            torch.testing.assert_close(result, results[-1], rtol=0, atol=1e-5)
    assert len(sampler.graphs) == len(changes)


def test_inversion_is_exact_where_the_output_does_not_depend_on_the_state():
    """So that the step backwards takes the same epsilons: then it has to undo the step."""

    def constant(x, t, c):
        return (c[:, None] * torch.linspace(-1, 1, 8)).to(x.dtype)

    sampler = Sampler(
        constant, DDIMConfig(), 10, limit=None, guidance_scale=0.6, guidance_method="cfg++",
        dtype=torch.float64, sample_shape=(8,),
    )  # fmt: skip
    arguments = {"c": torch.ones(2), "uncond_kwargs": {"c": torch.full((2,), 0.3)}}
    x0 = draw(2, 8, dtype=torch.float64).cpu() * 0.5
    again = sampler(sampler.invert(x0, **arguments), **arguments)
    np.testing.assert_allclose(again.numpy(), x0.numpy(), atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_method": "cfgpp"}, r"guidance_method: 'cfgpp' is not one of 'cfg', 'cfg\+\+', 'apg'"),
        (
            {"guidance_method": "apg", "guidance_scale": None},
            "guidance_method: 'apg' without guidance_scale; pass both",
        ),
        ({"guidance_method": "apg", "apg_eta": -0.5}, r"apg_eta: -0.5; pass a number in \[0, 1\]"),
        ({"guidance_method": "apg", "apg_norm_threshold": -1.0}, "apg_norm_threshold: -1.0; pass a number"),
        ({"apg_eta": 0.5}, "apg_eta: 0.5 with guidance_method 'cfg'; pass guidance_method='apg', or leave it out"),
        (
            {"guidance_method": "cfg++", "apg_norm_threshold": 2.0},
            r"apg_norm_threshold: 2.0 with guidance_method 'cfg\+\+'",
        ),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Sampler(torch.zeros_like, SCHEDULE, 4, **{"guidance_scale": 2.0, **options})
    if options.get("guidance_scale", 2.0) is not None:
        given = {name.replace("guidance_", ""): value for name, value in options.items()}
        for step in (reference_step, fused_step):
            with pytest.raises(ValueError, match=f"^{message.replace('guidance_method', 'guidance.method')}"):
                step(draw(4, 3), draw(2, 3), table(), 0, guidance=Guidance(2.0, **given))
