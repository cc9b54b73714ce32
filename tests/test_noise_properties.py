import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fastddim.noise import STREAM_INITIAL, STREAM_STEP, check_seeds, normal_numpy
from test_noise import scalar_normals


@pytest.mark.parametrize("seed", [0, 42, 2**64 - 1])
@pytest.mark.parametrize("stream", [STREAM_STEP, STREAM_INITIAL])
def test_the_first_eight_values_are_the_math_librarys_to_a_millionth(seed, stream):
    expected = [value for group in range(2) for value in scalar_normals(seed, 0, group, stream)]
    np.testing.assert_allclose(normal_numpy([seed], 0, (8,), stream)[0], expected, rtol=0, atol=1e-6)


def test_the_tails_have_the_normal_share():
    values = np.abs(normal_numpy([9], 0, (400_000,))[0])
    for bound in (1.0, 2.0, 3.0, 4.0):
        share = 2 * stats.norm.sf(bound)
        assert abs((values > bound).mean() - share) < 5 * math.sqrt(share / len(values))


def test_the_four_values_of_a_counter_do_not_depend_on_each_other():
    lanes = normal_numpy([3], 0, (400_000,))[0].reshape(-1, 4).astype(np.float64)
    for values in (lanes, lanes**2):
        # Squares show a dependence through the shared radius that plain correlation cannot.
        correlation = np.corrcoef(values.T) - np.eye(4)
        assert np.abs(correlation).max() < 5 / math.sqrt(len(lanes))


@given(st.integers(0, 2**64 - 1), st.integers(1, 40), st.integers(1, 6))
def test_a_shape_only_arranges_the_same_elements(seed, rows, width):
    flat = normal_numpy([seed], 2, (rows * width,))[0]
    assert (normal_numpy([seed], 2, (rows, width))[0].ravel() == flat).all()


def test_a_seed_that_is_not_an_integer_is_refused():
    with pytest.raises(ValueError, match="seeds"):
        check_seeds([1.9], 1)


def test_a_numpy_integer_seed_is_an_integer():
    assert check_seeds(np.int64(3), 2) == [3, 4]
