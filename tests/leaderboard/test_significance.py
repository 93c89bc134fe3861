"""Intervals, paired t tests, Holm: known answers, and silent where nothing can be said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cmbench.leaderboard.significance import Difference, compare_units, holm, pair_units, pairwise_p
from cmbench.leaderboard.statistics import Unit, interval_over_seeds

FINITE = st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 3))


def units(*values: float, sampling: bool = False) -> list[Unit]:
    return [Unit(0 if sampling else i, i, v) for i, v in enumerate(values)]


# ---- intervals ----------------------------------------------------------------------------------


def test_interval_is_student_t_over_training_seeds() -> None:
    found = interval_over_seeds(units(1.0, 2.0, 4.0))
    low, high = stats.t.interval(0.95, 2, np.mean([1, 2, 4]), stats.sem([1, 2, 4]))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.seeds == 3


def test_sampling_seeds_of_one_training_do_not_pass_for_trainings() -> None:
    repeated = [Unit(t, s, 10.0 * t + 0.1 * s) for t in range(2) for s in range(5)]
    assert interval_over_seeds(repeated).seeds == 2
    assert interval_over_seeds(units(1.0, 2.0, sampling=True)).seeds == 2
    assert interval_over_seeds(units(1.0)).low is None


# ---- t tests ------------------------------------------------------------------------------------


def compared(a: Sequence[float], b: Sequence[float], *, paired: bool = True) -> Difference:
    """Compare two rows whose seeds are the same, or have nothing in common."""
    first = units(*a)
    second = units(*b) if paired else [Unit(50 + i, 50 + i, v) for i, v in enumerate(b)]
    found = compare_units(first, second)
    assert found is not None
    return found


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_paired_seeds_get_the_paired_t_test(n: int) -> None:
    generator = np.random.default_rng(n)
    a, b = generator.normal(0, 1, n), generator.normal(1, 2, n)
    found, known = compared(a.tolist(), b.tolist()), stats.ttest_rel(a, b)
    assert found.p == pytest.approx(known.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(known.confidence_interval(0.95), rel=1e-9)
    assert (found.mean, found.pairs) == (pytest.approx(np.mean(a - b)), n)


@pytest.mark.parametrize("sizes", [(2, 2), (6, 5), (3, 9)])
def test_rows_without_common_seeds_get_welchs_test(sizes: tuple[int, int]) -> None:
    generator = np.random.default_rng(sum(sizes))
    a, b = generator.normal(0, 1, sizes[0]), generator.normal(2, 3, sizes[1])
    found = compared(a.tolist(), b.tolist(), paired=False)
    known = stats.ttest_ind(a, b, equal_var=False)
    assert found.p == pytest.approx(known.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(known.confidence_interval(0.95), rel=1e-9)
    assert found.pairs == 0


def test_three_seeds_of_one_sign_are_no_certainty() -> None:
    assert compared([0.5, 1.5, 4.0], [0.0] * 3).p > 0.05
    assert compared([1.00, 1.01, 0.99], [0.0] * 3).p < 0.001


@given(st.lists(FINITE, min_size=2, max_size=7))
def test_differences_are_antisymmetric_and_agree_with_their_interval(values: list[float]) -> None:
    zeros = [0.0] * len(values)
    found, mirrored = compared(values, zeros), compared(zeros, values)
    assert found.p == pytest.approx(mirrored.p, abs=1e-12)
    assert found.low == pytest.approx(-mirrored.high, abs=1e-9)
    assert found.low <= found.mean <= found.high
    if abs(found.p - 0.05) > 1e-6:
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_shared_noise_cancels() -> None:
    noise = [0.0, 3.0, -2.0, 5.0]
    a, b = [10 + x for x in noise], [10.5 + x + 0.01 * x for x in noise]
    assert compared(a, b).pairs == 4
    assert compared(a, b).p < 0.01
    assert compared(a, b, paired=False).pairs == 0
    assert compared(a, b, paired=False).p > 0.5


def test_seeds_pair_by_training_and_sampling_then_by_sampling() -> None:
    a = [Unit(0, 0, 1.0), Unit(1, 1, 2.0), Unit(2, 2, 4.0)]
    assert pair_units(a, [Unit(2, 2, 1.0), Unit(1, 1, 1.0)]) == [1.0, 3.0]
    imported = [Unit(0, s, 1.0) for s in range(3)]
    assert pair_units(a, imported) == [0.0, 1.0, 3.0]
    assert pair_units(a, [Unit(9, 9, 1.0)]) == []


def test_trainings_that_share_a_sampling_seed_count_by_their_mean() -> None:
    a = [Unit(t, s, 10.0 * t + s) for t in range(3) for s in range(2)]  # means 10 and 11
    b = [Unit(9, 0, 4.0), Unit(9, 1, 6.0)]
    assert pair_units(a, b) == [6.0, 5.0]
    assert pair_units(b, a) == [-6.0, -5.0]


def test_several_sampling_seeds_of_one_training_count_once() -> None:
    a = [Unit(t, s, float(t + s)) for t in range(2) for s in range(5)]
    b = [Unit(t, s, 0.1 * t) for t in range(2) for s in range(5)]
    found = compare_units(a, b)
    assert found is not None
    assert found.pairs == 2


def test_one_seed_cannot_be_compared() -> None:
    assert compare_units(units(1.0), units(2.0)) is None
    assert compare_units(units(1.0), units(2.0, 3.0)) is None
    groups = [units(1.0), units(2.0), units(3.0, 4.0), units(5.0, 6.0)]
    assert list(pairwise_p(groups)) == [(2, 3)]


def test_ties_have_no_significance_and_equal_differences_that_of_the_sign_test() -> None:
    tie = compared([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert tie == Difference(0.0, 0.0, 0.0, 1.0, 3)
    for n, p in ((2, 0.5), (3, 0.25), (6, 1 / 32)):
        rounded = [0.3 - 0.2, 0.4 - 0.3] + [0.1] * (n - 2)  # equal but for the last bits
        found = compared(rounded, [0.0] * n)
        assert found.p == p
        assert (found.low > 0) == (p < 0.05)
        apart = compared([1.0] * n, [0.5] * n, paired=False)
        assert (apart.p, apart.pairs) == (p, 0)
        assert pairwise_p([units(*[1.0] * n), units(*[0.5] * n)]) == {(0, 1): p}


# ---- Holm ---------------------------------------------------------------------------------------


def test_holm_known_answer() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_is_between_raw_and_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    adjusted = holm(p)
    for raw, new in zip(p, adjusted):
        assert raw <= new <= min(1, len(p) * raw) or new == pytest.approx(raw)
    order = sorted(range(len(p)), key=lambda i: p[i])
    values = [adjusted[i] for i in order]
    assert values == sorted(values)
