"""Intervals, paired t tests, Holm: known answers, and silent where nothing can be said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cmbench.leaderboard.significance import (
    Difference,
    MeanDifference,
    compare_units,
    differences,
    holm,
    holm_levels,
    in_logs,
    pair_units,
)
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


def test_an_interval_counts_the_noise_that_all_rows_share() -> None:
    """Three noise seeds that happen to agree must not make the interval narrow."""
    lucky = [Unit(s, s, 2.85 + 0.001 * s, standard_error=0.156) for s in range(3)]
    assert interval_over_seeds(lucky).half_width == pytest.approx(1.959964 * 0.156 / 3**0.5)
    spread = [Unit(s, s, 2.0 + s, standard_error=0.01) for s in range(3)]
    assert interval_over_seeds(spread).half_width == pytest.approx(stats.t.ppf(0.975, 2) / 3**0.5)
    one_noise = [Unit(s, 7, 2.85 + 0.001 * s, standard_error=0.156) for s in range(3)]
    assert interval_over_seeds(one_noise).half_width == pytest.approx(1.959964 * 0.156)


def test_shared_noise_is_covered() -> None:
    """Trainings at one sampling seed: the t interval alone covers far less than 95 %."""
    generator, held, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        noise = generator.normal(0, 0.17)
        values = 2.85 + noise + generator.normal(0, 0.12, 3)
        found = interval_over_seeds([Unit(i, 0, v, 0.17) for i, v in enumerate(values.tolist())])
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 2.85 <= found.high
    assert held >= 0.95 * trials


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_refused_with_its_seeds(value: float) -> None:
    with pytest.raises(
        ValueError, match=r"Unit: the value of training seed 3, sampling seed 4 is"
    ) as found:
        Unit(3, 4, value)
    assert f"is {value}; allowed: finite numbers; leave it out" in str(found.value)


# ---- t tests ------------------------------------------------------------------------------------


def estimated(a: Sequence[float], b: Sequence[float], *, paired: bool = True) -> MeanDifference:
    """Compare two rows whose seeds are the same, or have nothing in common."""
    first = units(*a)
    second = units(*b) if paired else [Unit(50 + i, 50 + i, v) for i, v in enumerate(b)]
    found = compare_units(first, second)
    assert found is not None
    return found


def compared(a: Sequence[float], b: Sequence[float], *, paired: bool = True) -> Difference:
    (found,) = differences([(estimated(a, b, paired=paired), False)])
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


def test_ties_have_no_significance_and_equal_differences_that_of_the_sign_test() -> None:
    tie = compared([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert tie == Difference(0.0, 0.0, 0.0, 1.0, 3, False)
    for n, p in ((2, 0.5), (3, 0.25), (6, 1 / 32)):
        rounded = [0.3 - 0.2, 0.4 - 0.3] + [0.1] * (n - 2)  # equal but for the last bits
        found = compared(rounded, [0.0] * n)
        assert found.p == p
        assert (found.low > 0) == (p < 0.05)
        apart = compared([1.0] * n, [0.5] * n, paired=False)
        assert (apart.p, apart.pairs) == (p, 0)
        one_sided = estimated([1.0] * n, [0.5] * n)
        assert (one_sided.p_greater, one_sided.p_less) == (p / 2, 1.0)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=2, max_size=7))
def test_one_sided_p_values_are_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    a, b = ([pair[side] for pair in pairs] for side in (0, 1))
    found = estimated(a, b)
    if found.error > 1e-6 * (1 + abs(found.mean)):
        for name, p in (("greater", found.p_greater), ("less", found.p_less)):
            assert p == pytest.approx(stats.ttest_rel(a, b, alternative=name).pvalue, rel=1e-6)


@given(st.lists(FINITE, min_size=2, max_size=7), st.floats(0.001, 0.4))
def test_the_interval_of_a_level_leaves_out_0_if_the_test_rejects(
    values: list[float], alpha: float
) -> None:
    found = estimated(values, [0.0] * len(values))
    low, high = found.interval(alpha)
    for p, beyond in ((found.p_greater, low > 0), (found.p_less, high < 0)):
        if abs(p - alpha) > 1e-6:
            assert (p < alpha) == beyond


def test_unpaired_rows_keep_the_noise_of_both() -> None:
    """Spreads that happen to vanish do not make two independent rows certain."""
    a = [Unit(i, i, 1.0 + 1e-4 * i, 0.1) for i in range(5)]
    b = [Unit(50 + i, 50 + i, 1.2 + 1e-4 * i, 0.3) for i in range(5)]
    found = compare_units(a, b)
    assert found is not None
    assert found.pairs == 0
    assert found.error == pytest.approx((0.1**2 / 5 + 0.3**2 / 5) ** 0.5)
    assert found.p > 0.05


def test_logarithms_need_positive_values_and_carry_their_errors() -> None:
    made = in_logs([[Unit(0, 0, 2.0, 0.1)], [Unit(1, 1, 4.0)]])
    assert made is not None
    assert [unit for units in made for unit in units] == [
        Unit(0, 0, float(np.log(2.0)), 0.05),
        Unit(1, 1, float(np.log(4.0))),
    ]
    for value in (0.0, -1e-3):
        assert in_logs([[Unit(0, 0, 2.0)], [Unit(0, 0, value)]]) is None


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


@given(st.lists(st.floats(0, 1), max_size=20))
def test_levels_of_holm_say_what_its_adjusted_p_values_say(p: list[float]) -> None:
    for raw, adjusted, level in zip(p, holm(p), holm_levels(p)):
        if abs(adjusted - 0.05) > 1e-9:
            assert (raw <= level) == (adjusted <= 0.05)


def test_levels_of_holm_known_answer() -> None:
    assert holm_levels([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.05 / 3, 0.025, 0.025, 0.0125])


def test_differences_of_logarithms_become_shares() -> None:
    a, b = [1.2, 1.3, 1.25], [1.0, 1.02, 1.1]
    logs = in_logs([units(*a), units(*b)])
    assert logs is not None
    estimate = compare_units(*logs)
    assert estimate is not None
    (found,) = differences([(estimate, True)])
    known = stats.ttest_rel(np.log(a), np.log(b))
    assert found.mean == pytest.approx(np.expm1(np.mean(np.log(a) - np.log(b))))
    assert found.p == pytest.approx(known.pvalue)
    interval = known.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(np.expm1(interval)))
    (huge,) = differences([(MeanDifference(900.0, 1.0, 2.0, 3, 3), True)])
    assert np.isfinite(huge.mean)
