"""Learning-rate schedules against the formulas of their papers."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.train.schedules import (
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    ScheduleConfig,
    WSDConfig,
)

KINDS = [
    ConstantConfig(),
    LinearConfig(final=0.1),
    CosineConfig(final=0.1),
    WSDConfig(final=0.1),
    WSDConfig(final=0.1, shape="sqrt"),
    InverseSqrtConfig(),
]


@pytest.mark.parametrize("schedule", KINDS, ids=lambda s: f"{s.kind}-{getattr(s, 'shape', '')}")
def test_warmup_rises_in_equal_steps_to_the_peak(schedule):
    warm = schedule.model_copy(update={"warmup": 8})
    assert [warm.factor(step, 100) for step in range(8)] == [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1.0]
    assert warm.factor(8, 100) == pytest.approx(1.0)
    assert schedule.factor(0, 100) == pytest.approx(1.0)


def test_constant():
    assert {ConstantConfig().factor(step, 100) for step in range(100)} == {1.0}


@pytest.mark.parametrize(("step", "expected"), [(20, 1.0), (40, 0.8), (60, 0.6), (100, 0.2), (140, 0.2)])
def test_linear(step, expected):
    assert LinearConfig(warmup=20, final=0.2).factor(step, 100) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(20, 1.0), (40, 0.5 + 0.5 * (1 + math.sqrt(0.5)) / 2), (60, 0.75), (100, 0.5), (140, 0.5)],
)
def test_cosine(step, expected):
    """Loshchilov and Hutter, eq. 5: min + (max - min) / 2 * (1 + cos(pi t / T)), here with min 0.5."""
    assert CosineConfig(warmup=20, final=0.5).factor(step, 100) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "step", "expected"),
    [
        ("linear", 20, 1.0),
        ("linear", 60, 1.0),
        ("linear", 70, 0.75),
        ("linear", 80, 0.5),
        ("linear", 100, 0.0),
        ("sqrt", 60, 1.0),
        ("sqrt", 70, 0.5),
        ("sqrt", 100, 0.0),
    ],
)
def test_wsd_decays_over_its_share_of_the_whole_run(shape, step, expected):
    """decay=0.4 of a run of 100 steps is its last 40, however long the warm-up."""
    assert WSDConfig(warmup=20, decay=0.4, shape=shape).factor(step, 100) == pytest.approx(expected)


def test_wsd_that_decays_from_the_start():
    wsd = WSDConfig(warmup=50, decay=1.0)
    assert [wsd.factor(step, 100) for step in (49, 50, 75, 100)] == pytest.approx([1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(("step", "expected"), [(10, 1.0), (310, 0.5), (810, 1 / 3)])
def test_inverse_sqrt(step, expected):
    assert InverseSqrtConfig(warmup=10, timescale=100).factor(step, 1000) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", [LinearConfig, CosineConfig, WSDConfig], ids=lambda s: s.__name__)
@pytest.mark.parametrize("final", [0.0, 0.3, 1.0])
def test_ends_at_final(schedule, final):
    assert schedule(warmup=7, final=final).factor(50, 50) == pytest.approx(final)


@st.composite
def schedules(draw) -> ScheduleConfig:
    warmup, final = draw(st.integers(0, 50)), draw(st.floats(0, 1))
    share = draw(st.floats(0, 1, exclude_min=True))
    return draw(
        st.sampled_from(
            [
                ConstantConfig(warmup=warmup),
                LinearConfig(warmup=warmup, final=final),
                CosineConfig(warmup=warmup, final=final),
                WSDConfig(warmup=warmup, final=final, decay=share),
                WSDConfig(warmup=warmup, final=final, decay=share, shape="sqrt"),
                InverseSqrtConfig(warmup=warmup, timescale=1000 * share),
            ]
        )
    )


@given(schedules(), st.integers(1, 200))
def test_factors_are_shares_of_the_peak_and_fall_after_warmup(schedule, steps):
    factors = [schedule.factor(step, steps) for step in range(steps + 5)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    after = factors[schedule.warmup :]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
