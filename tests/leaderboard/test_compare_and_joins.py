"""Compare two methods, and put reported numbers beside measured ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from record_factory import metric, record
from scipy import stats

from cmbench.errors import UserError
from cmbench.leaderboard.best_groups import best_groups, bold_values
from cmbench.leaderboard.compare import compare
from cmbench.leaderboard.joins import join_reported
from cmbench.leaderboard.rows import Row, aggregate
from cmbench.leaderboard.selection import select
from cmbench.leaderboard.statistics import Interval, Unit
from cmbench.records.record import Record
from cmbench.report.render import render


def rows(records: list[Record]) -> list[Row]:
    return aggregate([(Path(f"{r.cell}.json"), r) for r in records])


def several(method: str, values: list[float], **fields: object) -> list[Record]:
    return [record(method, seed=s, value=v, **fields) for s, v in enumerate(values)]


def published(value: str, *, key: str = "", nfe: int = 1, conditional: bool | None = True) -> Row:
    base = rows(several("alpha", [1.0], nfe=nfe))[0]
    number = float(value)
    found = replace(
        base.measurements["fd-digits"],
        key=key,
        text=value,
        interval=Interval(number, None, None, 0),
        units=(Unit(0, 0, number),),
    )
    return replace(
        base,
        id=f"p{value}",
        kind="reported",
        cells=(),
        conditional=conditional,
        measurements={"fd-digits": found},
    )


# ---- compare ------------------------------------------------------------------------------------


def test_the_better_method_wins_on_shared_noise() -> None:
    found = rows(
        several("alpha", [1.0, 3.0, 2.0, 5.0])
        + several("beta", [1.5, 3.51, 2.49, 5.5])
        + several("alpha", [1.0, 1.1], nfe=2)
        + several("beta", [1.0, 1.1], nfe=2)
    )
    results = compare(select(found, "alpha"), select(found, "beta"))
    assert [(c.a.nfe, c.verdict) for c in results] == [
        (1, "A is better"),
        (2, "no difference shown"),
    ]
    first = results[0]
    assert first.difference is not None
    assert first.difference.pairs == 4
    assert first.difference.high < 0
    assert compare(select(found, "beta"), select(found, "alpha"))[0].verdict == "B is better"


def test_interval_p_and_verdict_agree_where_one_comparison_alone_would_be_significant() -> None:
    better = [[1.0, 3.0, 2.0], [1.0, 1.1, 1.05], [5.0, 5.1, 5.2]]
    worse = [[1.5, 3.7, 2.35], [1.0, 1.11, 1.04], [5.0, 5.12, 5.18]]
    found = rows(
        [r for n, v in zip((1, 2, 4), better, strict=True) for r in several("alpha", v, nfe=n)]
        + [r for n, v in zip((1, 2, 4), worse, strict=True) for r in several("beta", v, nfe=n)]
    )
    results = compare(select(found, "alpha"), select(found, "beta"))
    first = results[0].difference
    assert first is not None
    alone = stats.ttest_rel(better[0], worse[0])
    assert alone.pvalue < 0.05
    assert first.p == pytest.approx(3 * alone.pvalue)
    assert (first.low, first.high) == pytest.approx(
        alone_interval := tuple(alone.confidence_interval(1 - 0.05 / 3))
    )
    assert alone_interval[1] > 0
    assert [(r.verdict, r.reason) for r in results] == [("no difference shown", "")] * 3


def test_what_cannot_be_compared_says_why() -> None:
    found = rows(
        several("alpha", [1.0])
        + several("beta", [2.0, 2.1])
        + several("gamma", [2.0, 2.1], sampling={"num_samples": 10})
        + [record("delta", seed=s, metrics={"fd-digits": metric(1, key="x")}) for s in range(2)]
        + [record("eps", seed=s, value=None) for s in range(2)]
    )
    reasons = {
        name: compare(select(found, "beta"), select(found, name))[0].reason
        for name in ("alpha", "gamma", "delta", "eps")
    }
    assert "one seed" in reasons["alpha"]
    assert "fewer samples" in reasons["gamma"]
    assert "metric keys differ" in reasons["delta"]
    assert "not computed" in reasons["eps"]


def test_rows_whose_nfe_nobody_stated_are_not_compared() -> None:
    found = rows(several("alpha", [1.0, 1.1], nfe=0) + several("beta", [2.0, 2.1], nfe=0))
    (result,) = compare(select(found, "alpha"), select(found, "beta"))
    assert result.verdict == "not comparable"
    assert result.reason.startswith("NFE not stated")


def test_selectors_name_method_recipe_sampler_or_row() -> None:
    found = rows(several("alpha", [1.0]) + several("alpha", [2.0], recipe="paper"))
    assert len(select(found, "alpha")) == 2
    assert select(found, "alpha:paper")[0].recipe == "paper"
    assert select(found, "alpha:paper:multistep")[0].recipe == "paper"
    assert select(found, found[0].id[:8]) == [found[0]]
    with pytest.raises(UserError, match=r"no measured rows match 'zeta'.*alpha:demo, alpha:paper"):
        select(found, "zeta")


def test_ambiguous_and_disjoint_selections_are_refused() -> None:
    found = rows(
        several("alpha", [1.0])
        + several("alpha", [2.0], recipe="paper")
        + several("beta", [1.0], nfe=4)
    )
    with pytest.raises(
        UserError, match=r"A selects 2 rows at digits NFE 1 c.*alpha:demo or alpha:p"
    ):
        compare(select(found, "alpha"), select(found, "alpha:demo"))
    with pytest.raises(UserError, match=r"share no dataset, NFE.*NFE 1 conditional.*NFE 4 cond"):
        compare(select(found, "alpha:demo"), select(found, "beta"))


# ---- joins --------------------------------------------------------------------------------------


def test_the_difference_needs_equal_keys() -> None:
    row = rows(several("alpha", [3.0, 3.2]))[0]
    key = row.measurements["fd-digits"].key
    other = join_reported([row, published("2.5")])[row.id]
    assert (other.text, other.difference) == ("2.5", None)
    same = join_reported([row, published("2.5", key=key)])[row.id]
    assert same.difference == pytest.approx(0.6)


def test_reported_numbers_that_disagree_are_all_shown_and_not_subtracted() -> None:
    row = rows(several("alpha", [3.0]))[0]
    key = row.measurements["fd-digits"].key
    found = join_reported([row, published("7.85", key=key), published("7.80", key=key)])[row.id]
    assert (found.text, found.difference) == ("7.85; 7.80", None)


def test_only_the_same_nfe_and_conditioning_joins() -> None:
    row = rows(several("alpha", [3.0]))[0]
    assert join_reported([row, published("1.0", nfe=2)]) == {}
    assert join_reported([row, published("1.0", conditional=False)]) == {}
    assert join_reported([row, published("1.0", conditional=None)])[row.id].text == "1.0"


# ---- bold ---------------------------------------------------------------------------------------


def test_ties_with_the_leader_are_bold_and_single_seeds_never() -> None:
    found = rows(
        several("alpha", [1.0, 1.2, 1.1, 1.3])
        + several("beta", [1.05, 1.15, 1.2, 1.25])
        + several("gamma", [9.0, 9.1, 9.2, 9.3])
        + several("delta", [0.1])
    )
    best = {row.method for row in found if (row.id, "fd-digits") in bold_values(best_groups(found))}
    assert best == {"alpha", "beta"}


def test_reported_rows_are_bold_by_what_is_printed() -> None:
    found = [published("2.5"), published("2.6"), replace(published("2.5"), id="other")]
    assert bold_values(best_groups(found)) == {("p2.5", "fd-digits"), ("other", "fd-digits")}


SHARES = {"alpha": [0.90, 0.92, 0.91], "beta": [0.50, 0.51, 0.53]}


def test_the_largest_value_is_bold_where_higher_is_better(tmp_path: Path) -> None:
    """Both rows in the same order by both metrics: one of them is bold by precision alone."""
    records = [
        record(
            method,
            seed=seed,
            metrics={
                "fd-digits": metric(10 * share),
                "precision": metric(share, "precision", higher=True),
            },
        )
        for method, shares in SHARES.items()
        for seed, share in enumerate(shares)
    ]
    ids = {row.method: row.id for row in rows(records)}
    expected = {(ids["alpha"], "precision"), (ids["beta"], "fd-digits")}
    assert bold_values(best_groups(rows(records))) == expected
    found = {"digits": [(Path(f"{r.cell}.json"), r) for r in records]}
    render(found, tmp_path)
    table = (tmp_path / "digits.md").read_text()
    bold = {
        line.split("|")[1].strip(): line.count("**") // 2
        for line in table.splitlines()
        if line.startswith(("| alpha", "| beta"))
    }
    assert bold == {"alpha": 1, "beta": 1}
    assert "**0.91" in table
    assert "**5.1" in table


def test_the_largest_printed_value_is_bold_where_higher_is_better() -> None:
    found = [
        replace(
            row,
            measurements={
                name: replace(m, higher_is_better=True) for name, m in row.measurements.items()
            },
        )
        for row in (published("0.5"), published("0.9"), published("0.7"))
    ]
    assert bold_values(best_groups(found)) == {("p0.9", "fd-digits")}
