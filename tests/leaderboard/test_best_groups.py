"""Which rows may be best: the same answer as scipy, duplicates, unpaired rows, reported numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_factory import metric, record
from scipy.stats import ttest_ind, ttest_rel
from test_compare_and_joins import published, rows, several

from cmbench.leaderboard.best_groups import BestGroup, best_groups, bold_values
from cmbench.leaderboard.rows import Row
from cmbench.leaderboard.significance import holm
from cmbench.records.record import Record

#: A key of a Fréchet distance and one of an unbiased distance.
FRECHET, KERNEL = "fd:cnn@1:none:round:n=2000:v1", "kd:cnn@1:none:round:n=2000:v1"


def made(method: str, values: Sequence[float], key: str = FRECHET, **fields: Any) -> list[Record]:
    higher = fields.pop("higher", False)
    return [
        record(method, seed=s, metrics={"fd-digits": metric(v, key=key, higher=higher)}, **fields)
        for s, v in enumerate(values)
    ]


def board(values: Mapping[str, Sequence[float]], key: str = FRECHET, **fields: Any) -> list[Row]:
    return rows(
        [item for name, found in values.items() for item in made(name, found, key, **fields)]
    )


def group_of(found: Sequence[Row]) -> BestGroup:
    (group,) = best_groups(found, "fd-digits")
    return group


def names(group: BestGroup) -> list[str]:
    assert group.best is not None
    return [group.best.method, *(item.row.method for item in group.members)]


POSITIVE = st.floats(0.1, 50).map(lambda x: round(x, 3))
BOARDS = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(POSITIVE, min_size=n, max_size=n), min_size=2, max_size=6)
)


@given(BOARDS, st.booleans(), st.booleans())
def test_the_group_is_that_of_scipy_and_holm(
    values: list[list[float]], logs: bool, higher: bool
) -> None:
    found = board(
        {f"m{i}": v for i, v in enumerate(values)}, FRECHET if logs else KERNEL, higher=higher
    )
    group = group_of(found)
    assert group.best is not None
    scale = np.log if logs else np.asarray
    by_name = {f"m{i}": scale(v) for i, v in enumerate(values)}
    best = by_name[group.best.method]
    others = [item.row.method for item in group.compared]
    spreads = [float(np.std(by_name[name] - best)) for name in others]
    if min(spreads) < 1e-6:
        return  # scipy has no answer
    alternative = "less" if higher else "greater"
    p = [float(ttest_rel(by_name[n], best, alternative=alternative).pvalue) for n in others]
    for item, adjusted in zip(group.compared, holm(p), strict=True):
        assert item.difference.p == pytest.approx(adjusted, rel=1e-6, abs=1e-12)
        assert item.may_be_best == (item.difference.p > 0.05)
        if abs(item.difference.p - 0.05) > 1e-9:
            edge = item.difference.high if higher else item.difference.low
            assert item.may_be_best == (edge * (-1 if higher else 1) <= 0)
        assert item.difference.low <= item.difference.mean <= item.difference.high
        assert item.difference.relative == logs
    means = [row.measurements["fd-digits"].mean for row in found]
    assert group.best.measurements["fd-digits"].mean == (max if higher else min)(means)
    assert len(group.compared) == len(values) - 1
    assert bold_values([group]) == {(i, "fd-digits") for i in group.ids}


def test_the_difference_is_a_share_of_the_best() -> None:
    noise = np.array([0.0, 0.05, -0.04, 0.02, -0.01])
    found = board(
        {
            "ect": (1.27 * np.exp(noise)).tolist(),
            "sct": (1.33 * np.exp([0.1, -0.03, 0.06, -0.07, -0.02])).tolist(),
            "cd": (9.0 * np.exp(1.3 * noise)).tolist(),
        }
    )
    group = group_of(found)
    assert names(group) == ["ect", "sct"]
    (item,) = group.members
    assert item.difference.mean == pytest.approx(1.33 / 1.27 * np.exp(0.008 - 0.004) - 1)
    assert item.difference.pairs == 5
    assert not item.difference.unpaired


def test_solvers_that_take_the_same_steps_count_once() -> None:
    values = [2.0, 2.1, 2.3]
    heun = made("edm", values, sampling={"sampler": "heun"})
    euler = made("edm", values, sampling={"sampler": "euler"})
    others = made("ect", [2.05, 2.1, 2.2]) + made("ict", [5.0, 5.2, 5.3])
    group, without = group_of(rows(heun + euler + others)), group_of(rows(heun + others))
    assert list(group.duplicates) == [next(r.id for r in rows(heun))]
    assert [c.difference for c in group.compared] == [c.difference for c in without.compared]
    assert group.ids == without.ids | set(group.duplicates) | {
        group.duplicates[next(iter(group.duplicates))]
    }
    equal = rows(made("edm", values) + made("ddpm", values))
    assert group_of(equal).duplicates == {}, "two methods that tie are two rows"
    other = made(
        "edm", values, training={"checkpoint_sha256": "0" * 64}, sampling={"sampler": "heun"}
    )
    assert group_of(rows(euler + other)).duplicates == {}, "another training"


def test_rows_without_common_seeds_are_compared_by_welchs_test_and_marked() -> None:
    a, b = [1.0, 1.1, 0.9, 1.05], [1.6, 1.8, 1.5]
    imported = [
        record("gan", seed=50 + i, metrics={"fd-digits": metric(v, key=FRECHET)})
        for i, v in enumerate(b)
    ]
    (item,) = group_of(rows(made("ect", a) + imported)).compared
    known = ttest_ind(np.log(b), np.log(a), equal_var=False, alternative="greater")
    assert item.difference.unpaired
    assert item.difference.p == pytest.approx(known.pvalue)
    assert not item.may_be_best


def test_one_seed_gets_no_verdict() -> None:
    found = rows(made("ect", [1.0, 1.1]) + made("lucky", [0.2]) + made("ict", [1.05, 1.2]))
    group = group_of(found)
    assert names(group) == ["ect", "ict"]
    assert [row.method for row in group.unjudged] == ["lucky"]
    single = group_of(rows(made("ect", [1.0]) + made("ict", [0.9])))
    assert single.best is not None
    assert (single.best.method, single.judged, single.compared, single.ids) == (
        "ict",
        False,
        (),
        frozenset(),
    )
    assert [row.method for row in single.unjudged] == ["ect"]


def test_negative_unbiased_values_are_compared_as_they_are() -> None:
    found = board({"ect": [-0.01, 0.02, 0.0], "ict": [0.5, 0.6, 0.55]}, KERNEL)
    (item,) = group_of(found).compared
    assert not item.difference.relative
    assert item.difference.mean == pytest.approx(0.55 - 0.01 / 3)
    # A Fréchet distance of 0 has no logarithm.
    (zero,) = group_of(board({"ect": [0.0, 0.02, 0.01], "ict": [0.5, 0.6, 0.55]})).compared
    assert not zero.difference.relative


def test_groups_are_those_of_equal_key_nfe_conditioning_and_precision() -> None:
    base = made("ect", [1.0, 1.1]) + made("ict", [1.2, 1.5])
    found = best_groups(
        rows(
            base
            + made("ect", [1.0, 1.1], nfe=2)
            + made("ict", [0.1, 0.2], key="fd:other")
            + made("sct", [0.1, 0.2], conditional=False)
            + made("sct", [0.1, 0.2], sampling={"dtype": "bfloat16"})
            + made("short", [0.1, 0.2], sampling={"num_samples": 5})
        ),
        "fd-digits",
    )
    told = [(g.nfe, g.conditional, g.dtype, g.key, g.best.method if g.best else "") for g in found]
    assert told == [
        (1, False, "float32", FRECHET, "sct"),
        (1, True, "bfloat16", FRECHET, "sct"),
        (1, True, "float32", FRECHET, "ect"),
        (1, True, "float32", "fd:other", "ict"),
        (2, True, "float32", FRECHET, "ect"),
    ]
    unstated = [
        r.model_copy(update={"kind": "scored samples"}) for r in made("x", [1.0, 1.1], nfe=0)
    ]
    assert best_groups(rows(unstated)) == []
    approximate = "fd:cnn@1:none+bfloat16:round:n=2000:v1"
    assert best_groups(rows(made("quick", [1.0, 1.1], approximate))) == []


def test_every_metric_has_groups_of_its_own() -> None:
    found = best_groups(rows(several("alpha", [1.0, 1.1]) + several("beta", [5.0, 5.1])))
    assert [g.metric for g in found] == ["fd-digits", "precision", "recall"]
    assert [g.higher_is_better for g in found] == [False, True, True]


# ---- reported rows ------------------------------------------------------------------------------


def printed(value: str, conditional: bool | None, **fields: Any) -> Row:
    return replace(published(value, conditional=conditional), id=f"p{value}{conditional}", **fields)


def test_unknown_conditioning_never_splits_reported_rows() -> None:
    found = [printed("4.06", None), printed("2.04", True), printed("9.0", False)]
    group = group_of(found)
    assert group.best is None
    assert [row.id for row in group.reported] == ["p2.04True"]
    assert bold_values([group]) == {("p2.04True", "fd-digits")}
    split = best_groups(found[1:], "fd-digits")
    assert [(g.conditional, [r.id for r in g.reported]) for g in split] == [
        (False, ["p9.0False"]),
        (True, ["p2.04True"]),
    ]


def test_the_best_printed_number_stands_beside_the_measured_group() -> None:
    measured = rows(made("ect", [3.0, 3.1]) + made("ict", [4.0, 4.5]))
    beside = [printed("2.5", True), printed("1.5", False), printed("2.6", True)]
    assert [row.id for row in group_of([*measured, beside[0], beside[2]]).reported] == ["p2.5True"]
    unknown = [*beside, printed("1.0", None)]
    assert [row.id for row in group_of([*measured, *unknown]).reported] == ["p1.0None"]
    elsewhere = printed("0.5", True, nfe=2)
    groups = best_groups([*measured, elsewhere], "fd-digits")
    assert [(g.nfe, g.best is None, len(g.reported)) for g in groups] == [
        (1, False, 0),
        (2, True, 1),
    ]


def test_a_measured_row_hides_no_reported_ones_of_the_other_conditioning() -> None:
    measured = rows(made("ect", [3.0, 3.1]) + made("ict", [4.0, 4.5]))
    beside = [printed("2.5", True), printed("1.5", False), printed("2.6", True)]
    groups = best_groups([*measured, *beside], "fd-digits")
    found = [(g.conditional, g.best is None, [row.id for row in g.reported]) for g in groups]
    assert found == [(False, True, ["p1.5False"]), (True, False, ["p2.5True"])]
    alone = bold_values(best_groups(beside, "fd-digits"))
    assert alone == {(f"p{name}", "fd-digits") for name in ("2.5True", "1.5False")}
    assert alone <= bold_values(groups)


def test_equal_printed_numbers_are_all_best_and_direction_counts() -> None:
    found = [printed("2.5", True), replace(printed("2.5", True), id="other"), printed("2.6", True)]
    assert {row.id for row in group_of(found).reported} == {"p2.5True", "other"}
    turned = [
        replace(
            r,
            measurements={n: replace(m, higher_is_better=True) for n, m in r.measurements.items()},
        )
        for r in found
    ]
    assert [row.id for row in group_of(turned).reported] == ["p2.6True"]
