import dataclasses
import pickle
from typing import get_args

import diffusers
import numpy as np
import pytest

from fastddim.config import LIMITS, Clip, DDIMConfig, DynamicThreshold, Limit, limit_numbers, with_numbers
from fastddim.export.bundle import FORMAT


def test_defaults_are_diffusers_own():
    theirs = diffusers.DDIMScheduler().config
    for field in dataclasses.fields(DDIMConfig):
        assert getattr(DDIMConfig(), field.name) == theirs[field.name], field.name


def test_a_diffusers_configuration_is_taken_field_by_field():
    theirs = diffusers.DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, steps_offset=1
    ).config
    ours = DDIMConfig.from_dict(theirs)
    for field in dataclasses.fields(DDIMConfig):
        assert getattr(ours, field.name) == theirs[field.name], field.name


def test_bookkeeping_keys_are_skipped_and_unknown_ones_refused():
    assert DDIMConfig.from_dict({"_class_name": "DDIMScheduler"}) == DDIMConfig()
    with pytest.raises(ValueError, match="configuration key: 'solver_order' is not one of"):
        DDIMConfig.from_dict({"solver_order": 2})
    assert DDIMConfig.from_dict({"solver_order": 2}, ignore_unknown=True) == DDIMConfig()


def test_a_configuration_survives_a_dictionary_and_pickling_and_is_hashable():
    config = DDIMConfig(trained_betas=np.array([0.1, 0.2]), prediction_type="sample")
    assert DDIMConfig.from_dict(dataclasses.asdict(config)) == config
    again = pickle.loads(pickle.dumps(config))
    assert again == config and hash(again) == hash(config)


def test_a_configuration_cannot_be_assigned_to():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DDIMConfig().steps_offset = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Clip().range = 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        DynamicThreshold().ratio = 0.5


def test_trained_betas_set_the_number_of_timesteps():
    config = DDIMConfig(trained_betas=[0.1, 0.2, 1.0])
    assert config.trained_betas == (0.1, 0.2, 1.0)
    assert config.num_train_timesteps == 3


def test_numpy_integers_are_integers_and_booleans_are_not():
    assert DDIMConfig(num_train_timesteps=np.int64(10)).num_train_timesteps == 10
    with pytest.raises(ValueError, match="num_train_timesteps: True; pass an integer"):
        DDIMConfig(num_train_timesteps=True)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Clip(float("nan")), ["clip_sample_range", "nan", "> 0"]),
        (lambda: Clip(float("inf")), ["clip_sample_range", "inf", "finite"]),
        (lambda: Clip(-1.0), ["clip_sample_range", "-1.0", "> 0"]),
        (lambda: DynamicThreshold(float("nan")), ["dynamic_thresholding_ratio", "nan", "[0, 1]"]),
        (lambda: DynamicThreshold(-0.1), ["dynamic_thresholding_ratio", "-0.1", "[0, 1]"]),
        (lambda: DynamicThreshold(0.9, float("inf")), ["sample_max_value", "inf", "finite"]),
        (lambda: DDIMConfig(steps_offset=1000), ["steps_offset", "1000", "[0, 999]"]),
        (lambda: DDIMConfig(beta_start=0.0), ["beta_start", "0.0", "0 < beta_start"]),
        (lambda: DDIMConfig(beta_end=1.0), ["beta_end", "1.0", "< 1"]),
        (
            lambda: DDIMConfig(num_train_timesteps=1, rescale_betas_zero_snr=True),
            ["rescale_betas_zero_snr", "True", "num_train_timesteps >= 2"],
        ),
    ],
)
def test_a_value_out_of_range_names_itself_and_what_is_valid(make, parts):
    with pytest.raises(ValueError) as caught:
        make()
    assert all(part in str(caught.value) for part in parts), caught.value


def test_every_limit_has_one_name_here_and_in_a_manifest():
    assert {type(None), *LIMITS.values()} == set(get_args(Limit))
    _, *described = FORMAT.schema()["properties"]["sampling"]["properties"]["limit"]["oneOf"]
    fields = {kind: {"kind", *(field.name for field in dataclasses.fields(made))} for kind, made in LIMITS.items()}
    assert {item["properties"]["kind"]["const"]: set(item["required"]) for item in described} == fields


def test_a_limit_takes_the_numbers_of_another_of_its_kind():
    assert with_numbers(Clip(3.0), *limit_numbers(Clip(0.7))) == Clip(0.7)
    other = DynamicThreshold(0.9, 3.5)
    assert with_numbers(DynamicThreshold(), *limit_numbers(other)) == other
    assert with_numbers(None, *limit_numbers(None)) is None
