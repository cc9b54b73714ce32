import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddim.coefficients import NUM_COLUMNS, StepTable
from fastddim.config import BETA_SCHEDULES, PREDICTION_TYPES, TIMESTEP_SPACINGS, DDIMConfig
from fastddim.schedule import Schedule
from oracle import ddim, predict_x0_and_eps


@st.composite
def runs(draw):
    """A schedule over the whole configuration space, and a run's options."""
    prediction_type = draw(st.sampled_from(PREDICTION_TYPES))
    config = DDIMConfig(
        beta_schedule=draw(st.sampled_from(BETA_SCHEDULES)),
        prediction_type=prediction_type,
        timestep_spacing=draw(st.sampled_from(TIMESTEP_SPACINGS)),
        rescale_betas_zero_snr=prediction_type != "epsilon" and draw(st.booleans()),
        set_alpha_to_one=draw(st.booleans()),
    )
    large = draw(st.booleans())
    return Schedule(config), {
        "num_inference_steps": draw(st.integers(1, 1000)),
        "strength": draw(st.sampled_from([1.0, 0.9999, 0.5])) if draw(st.booleans()) else 1.0,
        "transitions": draw(st.sampled_from(["exact", "diffusers"])),
        "eta": 1.0 if large else draw(st.floats(0, 1)),
        "variance_type": "fixed_large" if large else "fixed_small",
        "use_clipped_model_output": draw(st.booleans()),
    }


def pairs_of(schedule, options):
    n, strength = options["num_inference_steps"], options["strength"]
    if int(n * strength) == 0:
        strength = 1.0
    return schedule.pairs(n, strength=strength, transitions=options["transitions"])


def table_of(schedule, pairs, options):
    keys = ("eta", "variance_type", "use_clipped_model_output")
    return StepTable.build(schedule, pairs, **{key: options[key] for key in keys})


@given(runs(), st.data())
def test_the_six_columns_are_the_textbook_step_in_float64(run, data):
    schedule, options = run
    pairs = pairs_of(schedule, options)
    table = table_of(schedule, pairs, options)
    i = data.draw(st.integers(0, len(pairs) - 1))
    rng = np.random.default_rng(i)
    x, output, noise = rng.standard_normal((3, 2, 40))
    clip = data.draw(st.sampled_from([None, 0.7]))
    alpha_bar, alpha_bar_next = schedule.alpha_bar(pairs[i])
    expected = ddim(
        x,
        output,
        alpha_bar,
        alpha_bar_next,
        schedule.config.prediction_type,
        eta=options["eta"],
        noise=noise,
        clip=clip,
        rederive=options["use_clipped_model_output"],
        large_variance=options["variance_type"] == "fixed_large",
    )
    x0_x, x0_out, next_x, next_out, next_x0, scale = table.columns[i]
    x0 = x0_x * x + x0_out * output
    size = np.abs(expected.x0_unlimited).max()
    np.testing.assert_allclose(
        x0, expected.x0_unlimited, rtol=0, atol=1e-13 * max(size, 1 / np.sqrt(max(alpha_bar, 1e-30)) if x0_x > 1 else 1)
    )
    x0 = x0 if clip is None else x0.clip(-clip, clip)
    x_next = next_x * x + next_out * output + next_x0 * x0 + scale * noise
    terms = max(abs(next_x), abs(next_out), abs(next_x0) * max(np.abs(x0).max(), 1), 1)
    # Near timestep 0 both sides divide by 1 - alpha_bar, whose own rounding is 1e-16 / (1 - alpha_bar).
    np.testing.assert_allclose(x_next, expected.x_next, rtol=0, atol=3e-12 * terms)


def test_eta_one_is_ddpm_and_zero_adds_no_noise():
    schedule = Schedule()
    pairs = [*((t, t - 1) for t in range(999, 0, -1)), (0, None)]
    assert not StepTable.build(schedule, pairs).stochastic
    table = StepTable.build(schedule, pairs, eta=1.0)
    betas = np.linspace(0.0001, 0.02, 1000)
    alphas_cumprod = np.cumprod(1 - betas)
    # DDPM's posterior variance, arXiv:2006.11239, equation 7; the last step is clean.
    posterior = (1 - alphas_cumprod[:-1]) / (1 - alphas_cumprod[1:]) * betas[1:]
    np.testing.assert_allclose(table.columns[:-1, 5] ** 2, posterior[::-1], rtol=1e-9)
    assert table.columns[-1, 5] == 0
    large = StepTable.build(schedule, pairs, eta=1.0, variance_type="fixed_large")
    np.testing.assert_allclose(large.columns[:, 5] ** 2, betas[::-1], rtol=1e-9)


def test_eta_may_differ_by_step():
    schedule = Schedule()
    pairs = schedule.pairs(4)
    mixed = StepTable.build(schedule, pairs, eta=[0.0, 1.0, 0.5, 0.0])
    for i, eta in enumerate([0.0, 1.0, 0.5, 0.0]):
        assert (mixed.columns[i] == StepTable.build(schedule, pairs, eta=eta).columns[i]).all()


def test_a_table_is_immutable_shared_by_threads_and_survives_pickling():
    schedule = Schedule()
    table = StepTable.build(schedule, schedule.pairs(50), eta=0.3)
    with pytest.raises(ValueError, match="read-only"):
        table.columns[0, 0] = 0.0
    with pytest.raises(AttributeError):
        table.rows = ()
    again = pickle.loads(pickle.dumps(table))
    assert (again.columns == table.columns).all()
    tensor = table.tensor()
    tensor.zero_()
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(lambda _: float(table.tensor(dtype=torch.float64).sum()), range(32)))
    assert sums == [float(torch.tensor(table.columns).sum())] * 32


def test_the_tensor_is_the_columns_rounded_at_most_once():
    schedule = Schedule(DDIMConfig(prediction_type="v_prediction"))
    table = StepTable.build(schedule, schedule.pairs(20), eta=1.0)
    assert table.tensor().shape == (20, NUM_COLUMNS)
    assert (table.tensor().numpy() == table.columns).all()
    assert (table.tensor(dtype=torch.float32).numpy() == table.columns.astype(np.float32)).all()
    assert [tuple(row)[:NUM_COLUMNS] for row in table.rows] == [tuple(row) for row in table.columns.tolist()]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"eta": 1.5}, ["eta", "1.5", "[0, 1]"]),
        ({"eta": -0.1}, ["eta", "-0.1"]),
        ({"eta": float("nan")}, ["eta", "nan"]),
        ({"eta": [0.0, 1.0]}, ["eta", "(2,)", "10 steps"]),
        ({"variance_type": "fixed_large"}, ["variance_type", "eta"]),
        ({"variance_type": "large"}, ["variance_type", "'large'", "'fixed_large'"]),
        ({"prediction_type": "noise"}, ["prediction_type", "'noise'", "'epsilon'"]),
        ({"pairs": []}, ["pairs", "empty"]),
        ({"pairs": [(5, 5)]}, ["pairs", "(5, 5)"]),
        ({"pairs": [(5, -1)]}, ["pairs", "(5, -1)", "or None as t_next"]),
        ({"pairs": [(1000, 5)]}, ["pairs", "(1000, 5)", "1000"]),
    ],
)
def test_bad_options_are_refused(options, parts):
    schedule = Schedule()
    pairs = options.pop("pairs", schedule.pairs(10))
    with pytest.raises(ValueError) as caught:
        StepTable.build(schedule, pairs, **options)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.filterwarnings("error")
def test_steps_between_states_without_signal_keep_their_variance(prediction_type, eta):
    # The product of these alphas underflows to 0 long before the end.
    schedule = Schedule(DDIMConfig(beta_start=0.9, beta_end=0.99, prediction_type=prediction_type))
    pairs = schedule.pairs(10)
    assert not schedule.alpha_bar([pairs[0][1]]).any()
    table = StepTable.build(schedule, pairs, eta=eta)
    assert np.isfinite(table.columns).all()
    assert table.inverse is None
    # Both predictions' epsilon is the state itself there: what it keeps and what is drawn make up unit variance.
    np.testing.assert_allclose(np.hypot(table.rows[0].next_from_x, table.rows[0].noise_scale), 1)
    # Equation 16 with alpha_bar and the quotient of the two both 0.
    assert table.rows[0].noise_scale == eta
    with pytest.raises(ValueError, match=r"pairs.*\(900, 800\).*without signal.*leave out"):
        StepTable.build_inverse(schedule, pairs)


@pytest.mark.filterwarnings("error")
def test_no_table_warns_where_a_training_timestep_adds_no_noise():
    config = DDIMConfig(trained_betas=(1e-20, 0.5, 0.5), prediction_type="sample")
    table = StepTable.build(Schedule(config), Schedule(config).pairs(3), use_clipped_model_output=False)
    # alpha_bar of the last timestep is 1, so what is predicted there is the clean state.
    assert (table.rows[-1].x0_from_output, table.rows[-1].noise_scale) == (1, 0)


def test_epsilon_from_a_timestep_without_signal_is_refused():
    schedule = Schedule(DDIMConfig(rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    with pytest.raises(ValueError, match=r"'epsilon' at timestep 999.*v_prediction"):
        StepTable.build(schedule, schedule.pairs(10))
    assert len(StepTable.build(schedule, schedule.pairs(10), prediction_type="v_prediction")) == 10
    assert len(StepTable.build(schedule, schedule.pairs(10)[1:])) == 9


@given(runs(), st.data())
def test_the_inverse_rows_are_the_ode_backwards_in_float64(run, data):
    schedule, options = run
    pairs = pairs_of(schedule, options)
    table = StepTable.build_inverse(schedule, pairs)
    timesteps = [t for t, _ in pairs]
    assert list(table.timesteps) == [timesteps[-1], *timesteps[:0:-1]]
    assert not table.stochastic
    i = data.draw(st.integers(0, len(pairs) - 1))
    x, output = np.random.default_rng(i).standard_normal((2, 40))
    alpha_bar_noisier, alpha_bar, alpha_bar_called = schedule.alpha_bar((*pairs[::-1][i], table.timesteps[i]))
    _, eps = predict_x0_and_eps(x, output, alpha_bar_called, schedule.config.prediction_type)
    # Equation 13, from the clean side: x / sqrt(alpha_bar) moves by epsilon times the change of sqrt(1 / alpha_bar - 1).
    here, there = np.sqrt(alpha_bar), np.sqrt(alpha_bar_noisier)
    expected = there / here * (x - np.sqrt(1 - alpha_bar) * eps) + np.sqrt(1 - alpha_bar_noisier) * eps
    x0_x, x0_out, next_x, next_out, next_x0, _ = table.columns[i]
    x0 = x0_x * x + x0_out * output
    terms = max(np.abs(eps).max(), np.abs(x).max() / here, 1)
    np.testing.assert_allclose(x0, (x - np.sqrt(1 - alpha_bar) * eps) / here, rtol=0, atol=1e-12 * terms / here)
    np.testing.assert_allclose(
        next_x * x + next_out * output + next_x0 * x0, expected, rtol=0, atol=1e-12 * terms / here
    )


@given(runs())
def test_where_epsilon_stays_the_same_sampling_undoes_the_inverse(run):
    schedule, options = run
    pairs = pairs_of(schedule, options)
    # A zero terminal SNR has no epsilon prediction to sample from.
    pairs = [pair for pair in pairs if schedule.alphas_cumprod[pair[0]] > 0]
    if not pairs:
        return
    tables = [build(schedule, pairs, prediction_type="epsilon") for build in (StepTable.build_inverse, StepTable.build)]
    x = x0 = np.linspace(-1, 1, 9)
    eps = np.cos(7 * x0)
    for table in tables:
        for row in table.rows:
            x = row.next_from_x0 * (row.x0_from_x * x + row.x0_from_output * eps) + row.next_from_output * eps
    np.testing.assert_allclose(x, x0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"prediction_type": "noise"}, ["prediction_type", "'noise'", "'epsilon'"]),
        ({"pairs": []}, ["pairs", "empty"]),
        ({"pairs": [(5, 5)]}, ["pairs", "(5, 5)"]),
        ({"pairs": [(1000, 5)]}, ["pairs", "(1000, 5)", "1000"]),
    ],
)
def test_bad_options_of_an_inverse_are_refused(options, parts):
    schedule = Schedule()
    with pytest.raises(ValueError) as caught:
        StepTable.build_inverse(schedule, **{"pairs": schedule.pairs(10), **options})
    assert all(part in str(caught.value) for part in parts), caught.value


def test_an_inverse_ends_where_no_signal_is_left():
    schedule = Schedule(DDIMConfig(rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    with pytest.raises(ValueError, match="'epsilon' at timestep 999"):
        StepTable.build_inverse(schedule, schedule.pairs(10))
    last = StepTable.build_inverse(schedule, schedule.pairs(10), prediction_type="v_prediction").rows[-1]
    assert last.next_from_x0 == 0
    # Nothing of x0 is left, so the state is epsilon, at the timestep where the model was called.
    np.testing.assert_allclose([last.next_from_x**2 + last.next_from_output**2], [1])
