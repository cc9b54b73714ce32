import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fastddim.noise import (
    STREAM_INITIAL,
    STREAM_STEP,
    check_seeds,
    normal,
    normal_for,
    normal_numpy,
    philox,
    seed_tensor,
)

ONES = 0xFFFFFFFF
# Random123's own kat_vectors file, philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected):
    for to_array in (lambda word: np.array([word], dtype=np.int64), lambda word: torch.tensor([word])):
        words = philox([to_array(word) for word in counter], [to_array(word) for word in key])
        assert tuple(int(word[0]) for word in words) == expected


def scalar_normals(seed: int, step: int, group: int, stream: int) -> list[float]:
    """Box-Muller by the math library on Python integers."""
    counter = [group & ONES, group >> 32, step, stream]
    key = [seed & ONES, seed >> 32]
    for _ in range(10):
        p0, p1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(p1 >> 32) ^ counter[1] ^ key[0], p1 & ONES, (p0 >> 32) ^ counter[3] ^ key[1], p0 & ONES]
        key = [(key[0] + 0x9E3779B9) & ONES, (key[1] + 0xBB67AE85) & ONES]
    values = []
    for radius_word, angle_word in (counter[:2], counter[2:]):
        radius = math.sqrt(-2 * math.log((radius_word + 0.5) / 2**32))
        # The lower 30 bits are the angle around the quadrant's middle, an eighth of a turn on either side of 0.
        angle = ((angle_word & 0x3FFFFFFF) - 2**29) / 2**30 * math.pi / 2 + (angle_word >> 30) * math.pi / 2
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return values


@given(SEEDS, st.integers(0, 1000), st.sampled_from([STREAM_STEP, STREAM_INITIAL]))
def test_values_are_box_muller_of_philox(seed, step, stream):
    expected = [value for group in range(3) for value in scalar_normals(seed, step, group, stream)]
    np.testing.assert_allclose(normal_numpy([seed], step, (12,), stream)[0], expected, atol=3e-6, rtol=1e-6)


@given(
    st.lists(SEEDS, min_size=1, max_size=3), st.integers(0, 999), st.lists(st.integers(1, 9), min_size=0, max_size=3)
)
def test_numpy_and_torch_give_the_same_bits(seeds, step, shape):
    a, b = normal_numpy(seeds, step, shape), normal(seeds, step, shape)
    assert a.shape == tuple(b.shape) == (len(seeds), *shape)
    assert (a.view(np.int32) == b.numpy().view(np.int32)).all()


def test_numpy_and_torch_give_the_same_bits_over_a_million_values():
    a, b = normal_numpy([7], 3, (1_000_003,)), normal([7], 3, (1_000_003,))
    assert (a.view(np.int32) == b.numpy().view(np.int32)).all()


@given(SEEDS, st.integers(1, 64), st.integers(1, 64))
def test_a_sample_depends_on_its_own_seed_alone_and_elements_on_their_index(seed, n, more):
    alone = normal_numpy([seed], 5, (n,))[0]
    batch = normal_numpy([1, 2, seed, 3], 5, (n + more,))
    assert (batch[2, :n] == alone).all()
    assert not (batch[1, :n] == alone).all() or seed == 2


def test_torchs_own_arithmetic_gives_the_same_bits_too(monkeypatch):
    """What a GPU without the kernel computes; on a CPU numpy takes its place."""
    seeds = [0, 2**40 + 3, 2**64 - 1]
    steps = torch.tensor([0, 5, 0xFFFFFFFF])
    expected = normal_for(seed_tensor(seeds), steps, (7, 333))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    values = normal_for(seed_tensor(seeds), steps, (7, 333))
    assert torch.equal(values.view(torch.int32), expected.view(torch.int32))
    assert np.array_equal(normal(seeds[:1], 4, (1_000_003,)), normal_numpy(seeds[:1], 4, (1_000_003,)))


def test_values_are_standard_normal():
    values = normal_numpy([2**63 + 11], 0, (400_000,))[0].astype(np.float64)
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(values.mean()) < 4 / math.sqrt(len(values))
    assert abs(values.std() - 1) < 4 / math.sqrt(2 * len(values))
    assert abs(stats.kurtosis(values)) < 0.05
    assert np.isfinite(values).all()
    assert 4 < np.abs(values).max() < 6.8


def test_seeds_steps_streams_and_neighbours_are_uncorrelated():
    n = 200_000
    base = normal_numpy([1], 0, (n,))[0]
    others = [
        normal_numpy([2], 0, (n,))[0],
        normal_numpy([1 + (1 << 32)], 0, (n,))[0],
        normal_numpy([1], 1, (n,))[0],
        normal_numpy([1], 0, (n,), STREAM_INITIAL)[0],
        np.roll(base, 1),
        np.roll(base, 2),
    ]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / math.sqrt(n)


def test_a_dtype_rounds_the_finished_values():
    values = normal([4], 0, (100,), dtype=torch.bfloat16)
    assert torch.equal(values, torch.tensor(normal_numpy([4], 0, (100,))).bfloat16())


def test_an_integer_seed_counts_up():
    assert check_seeds(5, 3) == [5, 6, 7]
    assert check_seeds((9, 1), 2) == [9, 1]


@pytest.mark.parametrize(
    ("seeds", "batch", "message"),
    [([1, 2], 3, "seeds: 2 for a batch of 3"), ([-1], 1, r"seeds: -1; .*2\*\*64"), (2**64, 1, "18446744073709551616")],
)
def test_bad_seeds_are_refused(seeds, batch, message):
    with pytest.raises(ValueError, match=message):
        check_seeds(seeds, batch)
