"""The search for noise levels, on functions whose minimum is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmbench.sampling.search import GOLDEN, golden_section, search_levels

Levels = tuple[float, ...]


@given(st.floats(-3.0, 4.0), st.integers(2, 25))
def test_golden_section_finds_the_minimum_of_a_unimodal_function(
    minimum: float, evaluations: int
) -> None:
    low, high, asked = -3.5, 4.5, []

    def skewed(x: float) -> float:
        asked.append(x)
        return (x - minimum) ** 2 if x < minimum else math.expm1(x - minimum)

    point, value = golden_section(skewed, low, high, evaluations)
    assert len(asked) == evaluations
    assert all(low < x < high for x in asked)
    assert abs(point - minimum) <= GOLDEN ** (evaluations - 1) * (high - low) + 1e-12
    assert value == min(skewed(x) for x in list(asked))


def test_golden_section_reuses_one_point_a_step() -> None:
    asked: list[float] = []
    golden_section(lambda x: asked.append(x) or x, 0.0, 1.0, 6)
    assert len({round(x, 12) for x in asked}) == 6


@pytest.mark.parametrize(("low", "high", "evaluations"), [(1.0, 1.0, 5), (2.0, 1.0, 5), (0, 1, 1)])
def test_golden_section_refuses_nonsense(low: float, high: float, evaluations: int) -> None:
    with pytest.raises(ValueError, match="golden section"):
        golden_section(abs, low, high, evaluations)


def distance(*wanted: float) -> object:
    """Squared distance from the wanted levels in ln sigma, the first one free."""

    def value(levels: Levels) -> float:
        assert levels[0] == 80.0
        assert all(a > b for a, b in pairwise(levels))
        return sum(math.log(a / b) ** 2 for a, b in zip(levels[1:], wanted, strict=True))

    return value


def test_one_level_is_found() -> None:
    found = search_levels(distance(0.7), (80.0, 5.0), 0.02, evaluations=20)
    assert found.levels[1] == pytest.approx(0.7, rel=2e-3)
    assert found.evaluations == 21


def test_several_levels_are_found_one_at_a_time() -> None:
    wanted = (9.0, 1.1, 0.2)
    found = search_levels(
        distance(*wanted), (80.0, 40.0, 20.0, 10.0), 0.02, evaluations=18, rounds=6
    )
    assert found.levels[1:] == pytest.approx(wanted, rel=1e-2)


def test_it_stops_when_a_round_brings_nothing() -> None:
    asked = []

    def flat(levels: Levels) -> float:
        asked.append(levels)
        return 1.0

    found = search_levels(flat, (80.0, 2.0, 0.5), 0.02, evaluations=5, rounds=50)
    assert found.levels == (80.0, 2.0, 0.5)
    assert found.evaluations == len(asked) == 11


def test_never_worse_than_the_start_and_nan_is_the_worst() -> None:
    start = (80.0, 1.2345)
    found = search_levels(lambda s: 0.0 if s == start else math.nan, start, 0.02)
    assert (found.levels, found.value) == (start, 0.0)


def test_a_last_level_below_the_floor_stays_allowed() -> None:
    found = search_levels(distance(0.005), (80.0, 0.001), 0.02, evaluations=25)
    assert found.levels[1] == pytest.approx(0.005, rel=1e-3)


@pytest.mark.parametrize("start", [(80.0,), (80.0, 80.0), (1.0, 2.0)])
def test_levels_must_descend(start: Levels) -> None:
    with pytest.raises(ValueError, match="at least two, descending"):
        search_levels(lambda s: 0.0, start, 0.02)
