"""A permutation of [0, n) has to be one, for every n and key."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.data.permutation import permute

KEYS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 4095, 4096, 4097])
def test_every_place_is_taken_once(n: int) -> None:
    assert sorted(permute(np.arange(n), n, 7, 3)) == list(range(n))


@given(st.integers(1, 20_000), KEYS, KEYS)
def test_every_place_is_taken_once_for_any_key(n: int, seed: int, epoch: int) -> None:
    assert (np.bincount(permute(np.arange(n), n, seed, epoch), minlength=n) == 1).all()


@given(st.integers(1, 2**48), KEYS, st.lists(st.integers(0, 2**48), min_size=2, max_size=50, unique=True))
def test_one_at_a_time_equals_all_at_once_and_none_collide(n: int, seed: int, indices: list[int]) -> None:
    index = np.unique(np.array(indices) % n)
    together = permute(index, n, seed)
    assert together.tolist() == [int(permute(np.array([i]), n, seed)[0]) for i in index]
    assert len(set(together.tolist())) == len(index)
    assert (together < n).all()


@given(KEYS, KEYS, KEYS)
def test_other_keys_give_another_order(seed: int, one: int, other: int) -> None:
    same = (permute(np.arange(1000), 1000, seed, one) == permute(np.arange(1000), 1000, seed, other)).mean()
    assert same == 1 if one == other else same < 0.05


def test_the_order_of_the_key_counts() -> None:
    assert not np.array_equal(permute(np.arange(100), 100, 1, 2), permute(np.arange(100), 100, 2, 1))


def test_places_look_uniform() -> None:
    """Over many keys, each index lands everywhere equally often: chi-squared over a 16 x 16 table, 225 degrees."""
    table = np.zeros((16, 16))
    for key in range(2000):
        table[np.arange(16), permute(np.arange(16), 16, key)] += 1
    assert ((table - 125) ** 2 / 125).sum() < 225 + 5 * np.sqrt(2 * 225)


def test_neighbours_do_not_stay_neighbours() -> None:
    placed = permute(np.arange(10_000), 10_000, 0)
    assert abs(np.corrcoef(placed[:-1], placed[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=r"outside of \[0, 10\)"):
        permute(np.array([index]), 10, 0)
