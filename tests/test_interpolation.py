import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastddim
from fastddim import slerp

shapes = st.sampled_from([(), (1,), (2,), (7,), (3, 4, 4)])
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


def states(seed, shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype).unbind()


@given(st.integers(0, 2**32), shapes, dtypes, st.integers(2, 12))
def test_shape_dtype_and_exact_ends(seed, shape, dtype, n):
    a, b = states(seed, shape, dtype)
    between = slerp(a, b, n)
    assert between.shape == (n, *shape) and between.dtype == dtype
    assert torch.equal(between[0], a) and torch.equal(between[-1], b)


@given(st.integers(0, 2**32), st.sampled_from([(2,), (7,), (3, 4, 4)]), st.integers(3, 12), st.floats(1e-150, 1e150))
def test_states_of_one_norm_stay_on_the_sphere_at_equal_angles(seed, shape, n, norm):
    a, b = (norm * state / state.norm() for state in states(seed, shape))
    between = (slerp(a, b, n) / norm).flatten(1).numpy()
    np.testing.assert_allclose(np.linalg.norm(between, axis=1), 1, rtol=1e-9)
    chords = np.linalg.norm(np.diff(between, axis=0), axis=1)
    np.testing.assert_allclose(chords, chords[0], rtol=1e-6)


@given(st.integers(0, 2**32), st.integers(2, 9))
def test_the_way_back_is_the_way_there(seed, n):
    a, b = states(seed, (5,))
    torch.testing.assert_close(slerp(a, b, n).flip(0), slerp(b, a, n))


def test_the_papers_equation():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    angles = np.linspace(0, np.pi / 2, 5)
    np.testing.assert_allclose(slerp(a, b, 5), np.stack([3 * np.cos(angles), np.sin(angles)], axis=1), atol=1e-7)


@pytest.mark.parametrize("factor", [2.0, 1.0, 0.0, -1.0, -0.5])
def test_parallel_opposite_and_zero_states_go_straight(factor):
    a = torch.tensor([1.0, -2.0, 3.0])
    expected = torch.stack([a * (1 + w * (factor - 1)) for w in np.linspace(0, 1, 5)])
    torch.testing.assert_close(slerp(a, factor * a, 5), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slerp(factor * a, a, 5), expected.flip(0), rtol=1e-6, atol=1e-6)


@given(st.integers(0, 2**32), st.sampled_from([1, -1]), st.floats(0, 1e-4))
def test_nearly_parallel_and_nearly_opposite_states_stay_in_the_ball(seed, sign, distance):
    a, b = states(seed, (5,))
    end = sign * a + distance * b
    end *= a.norm() / end.norm()
    assert slerp(a, end, 7).norm(dim=1).max() <= 1.001 * a.norm()


def test_the_wider_dtype_wins():
    assert slerp(torch.ones(2), torch.ones(2, dtype=torch.float64), 2).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ((torch.ones(2), torch.ones(2), 1), ValueError, ["n: 1", ">= 2"]),
        ((torch.ones(2), torch.ones(2), 2.0), ValueError, ["n: 2.0"]),
        ((torch.ones(2), torch.ones(3), 2), ValueError, ["a, b", "(2,)", "(3,)"]),
        ((torch.ones(2), torch.ones(2, dtype=torch.int64), 2), ValueError, ["b: torch.int64", "floating-point"]),
        (([1.0], torch.ones(1), 2), TypeError, ["a: list", "tensor"]),
    ],
)
def test_bad_arguments_are_refused(arguments, error, parts):
    with pytest.raises(error) as caught:
        slerp(*arguments)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_it_is_public():
    assert "slerp" in fastddim.__all__ and fastddim.slerp is slerp
