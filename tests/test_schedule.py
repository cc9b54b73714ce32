import math
import pickle
from itertools import pairwise

import diffusers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastddim.config import BETA_SCHEDULES, TIMESTEP_SPACINGS, Clip, DDIMConfig, DynamicThreshold
from fastddim.schedule import Schedule, make_betas, make_timesteps

BETA_OPTIONS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": tuple(np.linspace(0.001, 0.03, 200))},
]


@pytest.mark.parametrize("options", BETA_OPTIONS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_cumprod_are_diffusers_to_its_float32_rounding(options, zero_snr):
    ours = Schedule(DDIMConfig(**options, rescale_betas_zero_snr=zero_snr)).alphas_cumprod
    theirs = diffusers.DDIMScheduler(**options, rescale_betas_zero_snr=zero_snr).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=5e-6, atol=1e-9)
    assert ours.dtype == np.float64
    assert (np.diff(ours) < 0).all()


def test_alphas_cumprod_are_the_textbook_product():
    ours = Schedule(DDIMConfig(beta_start=0.1, beta_end=0.4, num_train_timesteps=4)).alphas_cumprod
    np.testing.assert_allclose(ours, [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7, 0.9 * 0.8 * 0.7 * 0.6], rtol=1e-15)


def test_zero_snr_ends_at_exactly_zero_and_keeps_the_start():
    plain, rescaled = Schedule(DDIMConfig()), Schedule(DDIMConfig(rescale_betas_zero_snr=True))
    assert rescaled.alphas_cumprod[-1] == 0.0
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-12)


def test_every_name_is_a_schedule_or_spacing_of_its_own():
    betas = {tuple(make_betas(DDIMConfig(beta_schedule=name))) for name in BETA_SCHEDULES}
    timesteps = {tuple(make_timesteps(DDIMConfig(timestep_spacing=name), 7)) for name in TIMESTEP_SPACINGS}
    assert len(betas) == len(BETA_SCHEDULES) and len(timesteps) == len(TIMESTEP_SPACINGS)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_diffusers_for_every_step_count(spacing):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    config = DDIMConfig(timestep_spacing=spacing)
    one_too_many = []
    for n in range(1, 1001):
        scheduler.set_timesteps(n)
        theirs = scheduler.timesteps.tolist()
        if len(theirs) == n + 1:
            # diffusers' trailing list ends at -1 where its arange rounds up.
            one_too_many.append(n)
            assert theirs.pop() == -1
        assert make_timesteps(config, n) == theirs
    assert bool(one_too_many) == (spacing == "trailing")


@given(st.sampled_from(TIMESTEP_SPACINGS), st.integers(1, 1200), st.data())
def test_timesteps_descend_strictly_within_training(spacing, n_train, data):
    n = data.draw(st.integers(1, n_train))
    timesteps = make_timesteps(DDIMConfig(timestep_spacing=spacing, num_train_timesteps=n_train), n)
    assert len(timesteps) == n
    assert all(a > b for a, b in pairwise(timesteps))
    assert 0 <= timesteps[-1] <= timesteps[0] < n_train


def test_quadratic_is_the_papers_tau():
    # tau_i = floor(c * i**2) with the last one at the end of training: c = 999 / 9**2.
    timesteps = make_timesteps(DDIMConfig(timestep_spacing="quadratic"), 10)
    assert timesteps == [math.floor(999 / 81 * i**2 + 1e-9) for i in range(9, -1, -1)]


def test_pairs_chain_through_the_list_and_end_clean():
    pairs = Schedule(DDIMConfig(timestep_spacing="trailing")).pairs(30)
    assert all(t_next == t for (_, t_next), (t, _) in pairwise(pairs))
    assert pairs[-1][1] is None


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [7, 30, 50])
def test_diffusers_transitions_step_back_by_the_integer_ratio(spacing, n):
    pairs = Schedule(DDIMConfig(timestep_spacing=spacing)).pairs(n, transitions="diffusers")
    assert all(t_next == (t - 1000 // n if t - 1000 // n >= 0 else None) for t, t_next in pairs)


def test_the_two_transitions_differ_where_the_count_does_not_divide():
    schedule = Schedule(DDIMConfig(timestep_spacing="trailing"))
    assert schedule.pairs(30)[1] == (966, 932)
    assert schedule.pairs(30, transitions="diffusers")[1] == (966, 933)


@pytest.mark.parametrize("strength", [0.02, 0.3, 0.5, 0.77, 1.0])
def test_strength_keeps_the_last_steps_as_image_to_image_pipelines_do(strength):
    schedule, n = Schedule(DDIMConfig()), 50
    kept = min(int(n * strength), n)
    assert schedule.pairs(n, strength=strength) == schedule.pairs(n)[n - kept :]


def test_explicit_timesteps_are_used_as_they_are():
    assert Schedule().pairs(timesteps=[900, 500, 3]) == ((900, 500), (500, 3), (3, None))


def test_final_alpha_is_one_or_the_first_timesteps():
    assert Schedule(DDIMConfig()).final_alpha_cumprod == 1.0
    schedule = Schedule(DDIMConfig(set_alpha_to_one=False))
    assert schedule.alpha_bar([None])[0] == schedule.alphas_cumprod[0] == pytest.approx(1 - 0.0001)
    with pytest.raises(ValueError, match="timesteps: -1; pass training timesteps >= 0, or None"):
        schedule.alpha_bar([5, -1])


def test_a_schedule_cannot_be_changed_and_survives_pickling():
    schedule = Schedule(DDIMConfig(beta_schedule="scaled_linear"))
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 1.0
    with pytest.raises(AttributeError):
        schedule.config.beta_start = 0.5
    again = pickle.loads(pickle.dumps(schedule))
    assert again.config == schedule.config
    assert (again.alphas_cumprod == schedule.alphas_cumprod).all()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"prediction_type": "eps"}, ["prediction_type", "'eps'", "'epsilon'"]),
        ({"beta_schedule": "cosine"}, ["beta_schedule", "'cosine'", "squaredcos_cap_v2"]),
        ({"timestep_spacing": "lead"}, ["timestep_spacing", "'lead'", "Did you mean 'leading'"]),
        ({"num_train_timesteps": 0}, ["num_train_timesteps", "0", ">= 1"]),
        ({"num_train_timesteps": 10.5}, ["num_train_timesteps", "10.5", "integer"]),
        ({"beta_start": 0.5, "beta_end": 0.1}, ["beta_start", "0.5", "0.1"]),
        ({"beta_end": float("nan")}, ["beta_end", "nan"]),
        ({"trained_betas": ()}, ["trained_betas", "empty"]),
        ({"trained_betas": (0.1, -0.2)}, ["trained_betas", "-0.2", "(0, 1)"]),
        ({"trained_betas": (0.1, 0.2), "num_train_timesteps": 3}, ["num_train_timesteps", "3", "2"]),
        ({"steps_offset": -1}, ["steps_offset", "-1"]),
        ({"clip_sample_range": 0.0}, ["clip_sample_range", "0.0"]),
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, ["dynamic_thresholding_ratio", "1.5", "[0, 1]"]),
        ({"thresholding": True, "sample_max_value": -1.0}, ["sample_max_value", "-1.0"]),
    ],
)
def test_a_bad_configuration_names_field_value_and_what_is_valid(options, parts):
    with pytest.raises(ValueError) as caught:
        DDIMConfig(**options)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_unknown_keys_are_errors_unless_another_schedulers_configuration_is_taken():
    with pytest.raises(ValueError, match=r"beta_begin.*Did you mean 'beta_end'|beta_begin.*Did you mean 'beta_start'"):
        DDIMConfig.from_dict({"beta_begin": 0.1})
    # A bundle's reader and the command line say more behind it.
    with pytest.raises(ValueError, match=r"prediction_type: 'zzz' is not one of 'epsilon', 'sample', 'v_prediction'$"):
        DDIMConfig(prediction_type="zzz")
    config = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction").config
    assert DDIMConfig.from_dict(config, ignore_unknown=True).prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda s: s.pairs(), ["num_inference_steps", "timesteps", "exactly one"]),
        (lambda s: s.pairs(5, timesteps=[3]), ["num_inference_steps", "timesteps", "exactly one"]),
        (lambda s: s.pairs(1001), ["num_inference_steps", "1001", "[1, 1000]"]),
        (lambda s: s.pairs(0), ["num_inference_steps", "0"]),
        (lambda s: s.pairs(timesteps=[]), ["timesteps", "empty"]),
        (lambda s: s.pairs(timesteps=[5, 5]), ["timesteps", "entry 1", "descending"]),
        (lambda s: s.pairs(timesteps=[1000]), ["timesteps", "1000", "[0, 999]"]),
        (lambda s: s.pairs(10, strength=0.0), ["strength", "0.0", "(0, 1]"]),
        (lambda s: s.pairs(10, strength=0.05), ["strength", "0.05", "at least 0.1"]),
        (lambda s: s.pairs(10, transitions="theirs"), ["transitions", "'theirs'", "'diffusers'"]),
    ],
)
def test_bad_step_lists_are_refused(call, parts):
    with pytest.raises(ValueError) as caught:
        call(Schedule())
    assert all(part in str(caught.value) for part in parts), caught.value


def test_an_offset_that_leaves_training_is_refused_with_the_largest_that_fits():
    with pytest.raises(ValueError, match=r"steps_offset: 1 .* pass steps_offset <= 0"):
        Schedule(DDIMConfig(steps_offset=1)).pairs(1000)


def test_the_limit_follows_diffusers_precedence():
    assert DDIMConfig(thresholding=True, sample_max_value=2.0).limit == DynamicThreshold(0.995, 2.0)
    assert DDIMConfig(clip_sample_range=2.0).limit == Clip(2.0)
    assert DDIMConfig(clip_sample=False).limit is None
