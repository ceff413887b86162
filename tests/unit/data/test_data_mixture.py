"""Dealing global samples to sources: exact counts, nothing skipped, nothing twice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.data.mixture import MAX_SAMPLES, SCALE, Mixture
from treadle.errors import ConfigError

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@given(WEIGHTS, st.integers(1, 3000))
def test_each_source_gets_its_samples_once_and_in_order(weights: list[float], samples: int) -> None:
    source, number = Mixture(weights).locate(np.arange(samples))
    for k in range(len(weights)):
        mine = number[source == k]
        assert mine.tolist() == list(range(len(mine)))
    assert np.bincount(source, minlength=len(weights)).tolist() == Mixture(weights).counts(samples)


@given(WEIGHTS, st.integers(0, MAX_SAMPLES - 1001))
def test_far_on_it_is_the_same_function(weights: list[float], first: int) -> None:
    mixture = Mixture(weights)
    source, number = mixture.locate(np.arange(first, first + 1000))
    for k, before in enumerate(mixture.counts(first)):
        mine = number[source == k]
        assert mine.tolist() == list(range(before, before + len(mine)))


@given(WEIGHTS, st.integers(0, 100_000))
def test_at_every_split_the_share_is_exact_to_one_sample(weights: list[float], samples: int) -> None:
    counts = Mixture(weights).counts(samples)
    for k in range(len(weights) - 1):
        rest = sum(counts[k:])
        share = weights[k] / sum(weights[k:])
        # One sample, and what rounding a share to 1 / 2^20 adds over so many samples.
        assert abs(counts[k] - rest * share) <= 1 + rest / SCALE


def test_one_source_gets_everything() -> None:
    source, number = Mixture([3.0]).locate(np.array([0, 5, 9]))
    assert source.tolist() == [0, 0, 0]
    assert number.tolist() == [0, 5, 9]


def test_halves_alternate() -> None:
    assert Mixture([1, 1]).locate(np.arange(6))[0].tolist() == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="positive"):
        Mixture(weights)


@pytest.mark.parametrize("weights", [[1.0, 1e-8], [1e-8, 1.0]])
def test_a_weight_that_would_never_be_drawn_is_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="never draw"):
        Mixture(weights)


def test_samples_beyond_exact_arithmetic_are_refused() -> None:
    with pytest.raises(IndexError):
        Mixture([1, 2]).locate(np.array([MAX_SAMPLES]))
