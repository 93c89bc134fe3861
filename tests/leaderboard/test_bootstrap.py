"""Paired bootstrap, Holm, ranks: calibrated, symmetric, and silent where nothing can be said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cmbench.leaderboard.bootstrap import (
    compare_units,
    holm,
    independent_difference,
    pair_units,
    paired_difference,
    paired_p,
    pairwise_p,
    resample_weights,
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
    assert (found.seeds, found.scope) == (3, "training seeds")


def test_sampling_seeds_of_one_training_do_not_pass_for_trainings() -> None:
    repeated = [Unit(t, s, 10.0 * t + 0.1 * s) for t in range(2) for s in range(5)]
    assert interval_over_seeds(repeated).seeds == 2
    alone = interval_over_seeds(units(1.0, 2.0, sampling=True))
    assert alone.scope == "sampling seeds of one training"
    assert interval_over_seeds(units(1.0)).low is None


# ---- bootstrap ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 6])
def test_all_resamples_are_enumerated(n: int) -> None:
    shares, weights = resample_weights(n)
    assert weights.sum() == pytest.approx(1)
    assert np.allclose(shares.sum(1), 1)
    data = np.arange(n, dtype=float)
    assert weights @ (shares @ data) == pytest.approx(data.mean())
    assert weights @ (shares @ data - data.mean()) ** 2 == pytest.approx(data.var() / n)


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_false_alarms_stay_near_five_percent(n: int) -> None:
    generator = np.random.default_rng(n)
    trials = 2000
    alarms = int((paired_p(generator.standard_normal((trials, n))) < 0.05).sum())
    # three standard deviations of a binomial share
    assert alarms / trials < 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5
    assert alarms > 0


def test_three_seeds_of_one_sign_are_no_certainty() -> None:
    assert paired_difference([0.5, 1.5, 4.0]).p > 0.05
    assert paired_difference([1.00, 1.01, 0.99]).p < 0.001


def test_the_interval_excludes_zero_exactly_when_p_is_small() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        found = paired_difference(generator.normal(0.8, 1, 4))
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


@settings(deadline=None)
@given(st.lists(FINITE, min_size=2, max_size=7))
def test_differences_are_antisymmetric_and_never_surer_than_a_t_test(values: list[float]) -> None:
    found, mirrored = paired_difference(values), paired_difference([-v for v in values])
    assert found.p == pytest.approx(mirrored.p, abs=1e-12)
    assert found.low == pytest.approx(-mirrored.high, abs=1e-6)
    assert found.low <= found.mean <= found.high
    if np.std(values) > 1e-6:
        assert found.p >= stats.ttest_1samp(values, 0).pvalue - 1e-12


def test_shared_noise_cancels() -> None:
    noise = [0.0, 3.0, -2.0, 5.0]
    a, b = units(*(10 + x for x in noise)), units(*(10.5 + x + 0.01 * x for x in noise))
    paired = compare_units(a, b)
    assert paired is not None
    assert paired.pairs == 4
    assert paired.p < 0.01
    apart = compare_units(a, [Unit(u.training_seed + 50, u.sampling_seed + 50, u.value) for u in b])
    assert apart is not None
    assert apart.pairs == 0
    assert apart.p > 0.5


def test_seeds_pair_by_training_and_sampling_then_by_sampling() -> None:
    a = [Unit(0, 0, 1.0), Unit(1, 1, 2.0), Unit(2, 2, 4.0)]
    assert pair_units(a, [Unit(2, 2, 1.0), Unit(1, 1, 1.0)]) == [1.0, 3.0]
    imported = [Unit(0, s, 1.0) for s in range(3)]
    assert pair_units(a, imported) == [0.0, 1.0, 3.0]
    assert pair_units(a, [Unit(9, 9, 1.0)]) == []


def test_one_seed_cannot_be_compared() -> None:
    assert compare_units(units(1.0), units(2.0)) is None
    assert compare_units(units(1.0), units(2.0, 3.0)) is None


def test_independent_groups_agree_with_welch() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.normal(0, 1, 6), generator.normal(2, 3, 5)
    found = independent_difference(a, b)
    welch = stats.ttest_ind(a, b, equal_var=False).pvalue
    assert welch <= found.p < 1.5 * welch
    assert found.pairs == 0


def test_no_spread_at_all() -> None:
    assert paired_difference([0.0, 0.0]).p == 1.0
    for n, p in ((2, 0.5), (3, 0.25), (6, 1 / 32)):
        rounded = [0.3 - 0.2, 0.4 - 0.3] + [0.1] * (n - 2)  # equal but for the last bits
        found = paired_difference(rounded)
        assert found.p == p
        assert (found.low > 0) == (p < 0.05)
        apart = independent_difference([1.0] * n, [0.5] * n)
        assert (apart.p, apart.pairs) == (p, 0)
        assert pairwise_p([units(*[1.0] * n), units(*[0.5] * n)]) == {(0, 1): p}


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(FINITE, min_size=3, max_size=3), min_size=2, max_size=4))
def test_bulk_p_values_equal_single_ones(rows: list[list[float]]) -> None:
    groups = [units(*row) for row in rows]
    bulk = pairwise_p(groups)
    assert len(bulk) == len(groups) * (len(groups) - 1) // 2
    for (i, j), p in bulk.items():
        found = compare_units(groups[i], groups[j])
        assert found is not None
        assert p == pytest.approx(found.p, abs=1e-9)


# ---- Holm ---------------------------------------------------------------------------------------


SPREAD = st.sampled_from([0.0, 0.01, 0.02, 0.5, 1.0, 1.02, 3.0, 9.0, 100.0])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(SPREAD, min_size=3, max_size=4), min_size=2, max_size=7))
def test_leaving_out_hopeless_bootstraps_rejects_the_same_pairs(rows: list[list[float]]) -> None:
    groups = [units(*values) for values in rows]

    def rejected(alpha: float | None) -> set[tuple[int, int]]:
        found = pairwise_p(groups, alpha)
        return {pair for pair, p in zip(found, holm(list(found.values()))) if p <= 0.05}

    assert rejected(0.05) == rejected(None)


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
