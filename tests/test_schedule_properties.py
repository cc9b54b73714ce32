import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
from diffusers import StableDiffusionImg2ImgPipeline
from hypothesis import given
from hypothesis import strategies as st

from fastddim.coefficients import StepTable
from fastddim.config import DDIMConfig
from fastddim.schedule import Schedule, make_timesteps


@given(
    st.sampled_from(["leading", "linspace"]),
    st.integers(2, 1200),
    st.sampled_from([0, 1, 3]),
    st.data(),
)
def test_timesteps_are_diffusers_for_any_training_length_and_offset(spacing, n_train, offset, data):
    offset = min(offset, n_train - 1)
    n = data.draw(st.integers(1, n_train))
    theirs = diffusers.DDIMScheduler(num_train_timesteps=n_train, timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(n)
    config = DDIMConfig(num_train_timesteps=n_train, timestep_spacing=spacing, steps_offset=offset)
    if theirs.timesteps[0] >= n_train:
        with pytest.raises(ValueError, match=f"steps_offset: {offset} .*past the last training timestep {n_train - 1}"):
            make_timesteps(config, n)
    else:
        assert make_timesteps(config, n) == theirs.timesteps.tolist()


def test_trailing_has_exactly_n_entries_where_diffusers_has_one_too_many():
    timesteps = make_timesteps(DDIMConfig(timestep_spacing="trailing"), 61)
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(61)
    assert len(theirs.timesteps) == 62
    assert len(timesteps) == 61
    assert timesteps[0] == 999 and timesteps[-1] >= 0
    assert all(a > b for a, b in itertools.pairwise(timesteps))


@pytest.mark.parametrize("n", [2, 5, 10, 25, 50, 100, 500, 1000])
def test_quadratic_runs_from_the_end_of_training_to_zero_on_the_papers_parabola(n):
    timesteps = make_timesteps(DDIMConfig(timestep_spacing="quadratic"), n)
    assert timesteps[0] == 999 and timesteps[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(timesteps))
    for i, t in enumerate(reversed(timesteps)):
        # The parabola itself, or above it only where repeats near 0 were moved up.
        parabola = math.floor(999 * i**2 / (n - 1) ** 2)
        assert t == max(parabola, i) or parabola < i <= t


@given(st.integers(1, 1000), st.floats(0.001, 1.0))
def test_strength_keeps_the_steps_that_diffusers_image_to_image_keeps(n, strength):
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(n)
    # Their rule needs a scheduler alone, not a whole pipeline.
    kept, count = StableDiffusionImg2ImgPipeline.get_timesteps(SimpleNamespace(scheduler=scheduler), n, strength, None)
    if count == 0:
        with pytest.raises(ValueError, match=r"strength: .* leaves none; pass at least"):
            Schedule().pairs(n, strength=strength)
    else:
        assert [t for t, _ in Schedule().pairs(n, strength=strength)] == kept.tolist()


def test_trained_betas_are_used_as_they_are():
    betas = (0.1, 0.3, 0.2)
    schedule = Schedule(DDIMConfig(trained_betas=betas))
    theirs = diffusers.DDIMScheduler(trained_betas=list(betas)).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.9, 0.63, 0.504], rtol=1e-15)
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs, rtol=3e-6)


def test_alphas_cumprod_are_diffusers_to_three_millionths():
    ours = Schedule().alphas_cumprod
    np.testing.assert_allclose(ours, diffusers.DDIMScheduler().alphas_cumprod.double().numpy(), rtol=3e-6)


def test_threads_that_share_a_schedule_build_the_same_table():
    schedule = Schedule(DDIMConfig(timestep_spacing="trailing"))
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(lambda _: StepTable.build(schedule, schedule.pairs(61), eta=0.5), range(16)))
    assert all((table.columns == tables[0].columns).all() for table in tables)
    assert tables[0].timesteps[-1] >= 0 and schedule.pairs(61)[-1][1] is None


def test_explicit_timesteps_that_are_not_integers_are_refused():
    with pytest.raises(ValueError, match="timesteps"):
        Schedule().pairs(timesteps=[500.7, 3.2])


def test_a_step_between_two_timesteps_without_signal_is_refused():
    # Two timesteps without any signal would follow each other, and alpha_bar / alpha_bar_next be 0 / 0.
    with pytest.raises(ValueError, match=r"trained_betas: entry 1 is 1\.0"):
        DDIMConfig(trained_betas=(0.1, 1.0, 0.1), prediction_type="v_prediction")
