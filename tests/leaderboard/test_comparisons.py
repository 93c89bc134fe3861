"""Comparisons and joins: each border, direction and message."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from record_factory import metric, record, sha
from scipy.stats import ttest_rel
from test_compare_and_joins import published, rows, several

from cmbench.errors import UserError
from cmbench.leaderboard.compare import compare
from cmbench.leaderboard.joins import join_reported, protocol_text
from cmbench.leaderboard.rows import Row
from cmbench.leaderboard.selection import select
from cmbench.records.record import Record

FAR = {"alpha": [1.0, 1.01, 1.02, 1.03], "beta": [5.0, 5.02, 5.01, 5.05]}


def higher(method: str, values: list[float], **fields: Any) -> list[Record]:
    return [
        record(method, seed=s, metrics={"fd-digits": metric(v, higher=True)}, **fields)
        for s, v in enumerate(values)
    ]


def refusal(call: Any) -> str:
    with pytest.raises(UserError) as raised:
        call()
    return str(raised.value)


# ---- comparing two methods ----------------------------------------------------------------------


@pytest.mark.parametrize(("made", "verdict"), [(several, "A is better"), (higher, "B is better")])
def test_a_comparison_says_which_is_which_and_by_how_much(made: Any, verdict: str) -> None:
    found = rows([item for method, values in FAR.items() for item in made(method, values)])
    (result,) = compare(select(found, "alpha"), select(found, "beta"))
    assert (result.a.method, result.b.method) == ("alpha", "beta")
    assert (result.metric, result.verdict, result.reason) == ("fd-digits", verdict, "")
    assert result.difference is not None
    assert result.difference.mean == pytest.approx(-4.005)
    assert result.difference.p < 0.05
    (turned,) = compare(select(found, "beta"), select(found, "alpha"))
    assert (turned.a.method, turned.b.method) == ("beta", "alpha")
    assert turned.verdict == {"A is better": "B is better", "B is better": "A is better"}[verdict]


def test_p_values_are_corrected_over_what_could_be_compared() -> None:
    found = rows(
        [
            item
            for nfe in (1, 2, 4)
            for method, values in FAR.items()
            for item in several(method, values if nfe != 2 else values[:1], nfe=nfe)
        ]
    )
    results = compare(select(found, "alpha"), select(found, "beta"))
    assert [r.a.nfe for r in results] == [1, 2, 4]
    one, none, two = results
    assert (none.difference, none.verdict) == (None, "not comparable")
    assert none.reason == "one seed: an interval needs at least two"
    assert none.metric == "fd-digits"
    for result in (one, two):
        assert result.difference is not None
        alone = ttest_rel(FAR["alpha"], FAR["beta"]).pvalue
        assert result.difference.p == pytest.approx(2 * alone), "Holm, of two"


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value": None}, "the rank metric was not computed"),
        ({"sampling": {"num_samples": 10}}, "fewer samples than the protocol asks for"),
    ],
)
def test_either_side_can_stand_in_the_way(side: str, change: dict[str, Any], reason: str) -> None:
    fine = rows(several("fine", [1.0, 1.1]))
    other = rows([record("other", seed=s, **({"value": 2.0 + s} | change)) for s in range(2)])
    first, second = (other, fine) if side == "a" else (fine, other)
    (result,) = compare(first, second)
    assert (result.verdict, result.reason) == ("not comparable", reason)


def test_approximate_rows_and_unstated_costs_are_not_compared() -> None:
    key = "fd:inception@0123abcd:tf1-bilinear+bfloat16:round:n-1:float64:ref=0:n=50:v1"

    def approximate(method: str, value: float) -> list[Record]:
        made = {"fd-digits": metric(value, key=key)}
        return [record(method, seed=s, metrics=made) for s in range(2)]

    (result,) = compare(rows(approximate("alpha", 1.0)), rows(approximate("beta", 2.0)))
    assert result.reason == "measured under an approximate extractor"
    (result,) = compare(
        rows(several("alpha", [1.0, 1.1], nfe=0)), rows(several("beta", [2.0, 2.1], nfe=0))
    )
    assert result.reason == "NFE not stated: equal cost cannot be assumed"
    one, other = (rows([record(m, metrics={"fd-digits": metric(1, key=m)})]) for m in ("k", "l"))
    assert compare(one, other)[0].reason == "metric keys differ: k and l"


def test_selectors_are_method_recipe_and_sampler_or_the_start_of_an_id() -> None:
    named = {"recipe": "digits:demo"}
    found = rows(several("alpha", [1.0], training=named) + several("beta", [2.0]))
    alpha, beta = found
    assert select(found, "alpha:demo:multistep") == [alpha], "the recipe's last part"
    assert select(found, alpha.id[:6]) == [alpha]
    assert select([*found, published("9.0")], "alpha") == [alpha], "measured rows only"
    short = replace(beta, id="alphabeta")
    assert select([alpha, short], "alpha") == [alpha], "five letters are no id"
    assert "no measured rows match" in refusal(lambda: select(found, alpha.id[:5]))
    for selector in ("alpha:demo:heun", "alpha:paper", "alph", "alpha:demo:multistep:x"):
        assert refusal(lambda selector=selector: select(found, selector)) == (
            f"compare: no measured rows match {selector!r}; allowed: alpha:demo, beta:demo; give "
            "METHOD, METHOD:RECIPE, METHOD:RECIPE:SAMPLER, each also with [key=value,...]; or a row"
            " id"
        )
    assert "allowed: none; " in refusal(lambda: select([], "alpha"))


def test_what_is_not_one_row_for_each_setting_is_named() -> None:
    first, second = rows(several("alpha", [1.0]) + several("alpha", [2.0], recipe="paper"))
    assert refusal(lambda: compare([first, second], [first])) == (
        "compare: A selects 2 rows at digits NFE 1 conditional; allowed: alpha:demo or "
        "alpha:paper; give one of them, in quotes"
    )
    refused = refusal(lambda: compare([first], [first, second]))
    assert refused.startswith("compare: B selects 2 rows")
    other = replace(second, nfe=2)
    (result,) = compare([first, other, other], [first])
    assert result.a is first, "A is ambiguous only where B has nothing"
    unknown = replace(second, nfe=None)
    assert refusal(lambda: compare([first], [unknown])) == (
        "compare: A and B share no dataset, NFE and conditioning; allowed: A has digits NFE 1 "
        "conditional; B has digits NFE not stated conditional; measure both at a common NFE and "
        "conditioning"
    )
    for change in ({"dataset": "other"}, {"conditional": False}):
        assert "share no dataset" in refusal(
            lambda change=change: compare([first], [replace(second, **change)])
        )


def test_rows_as_the_recipe_says_come_first() -> None:

    def rated(lr: float, **overrides: float) -> dict[str, Any]:
        config = {"optimizer": {"lr": lr}}
        hashed = {"config": config, "config_sha256": sha(str(config))}
        return {"training": {**hashed, "overrides": overrides}}

    rate, usual = rated(0.01, **{"optimizer.lr": 0.01}), rated(0.001)
    given = {"sampling": {"sigmas": [80.0, 0.3], "overrides": {"sigmas": [80.0, 0.3]}}}
    found = rows(
        [
            *several("ict", [5.0, 5.1], **usual),
            *several("ict", [5.2, 5.3], nfe=2, **usual),
            *several("ict", [1.0, 1.1], **rate),
            *several("ict", [2.0, 2.1], nfe=2, **usual, **given),
            *several("ict", [1.5, 1.6], nfe=2, **rate, **given),
        ]
    )

    def means(selector: str) -> list[float]:
        chosen = select(found, selector)
        return sorted(row.measurements["fd-digits"].mean for row in chosen)

    for selector in ("ict", "ict:demo", "ict:demo[]", "ict:demo[optimizer.lr=1e-3]"):
        assert means(selector) == pytest.approx([5.05, 5.25]), selector
    assert means("ict:demo[optimizer.lr=1e-2]") == pytest.approx([1.05, 1.55])
    assert means("ict:demo[sigmas=80,0.3]") == pytest.approx([2.05])
    assert means("ict:demo[sigmas=80,0.3,optimizer.lr=1e-2]") == pytest.approx([1.55])
    sides = select(found, "ict:demo"), select(found, "ict:demo[optimizer.lr=1e-2]")
    results = compare(*sides, found)
    assert [(r.a.nfe, round(r.difference.mean, 6)) for r in results if r.difference] == [
        (1, 4.0),
        (2, 3.7),
    ]
    changed = select(found, "ict:demo[sigmas=80,0.3,optimizer.lr=1e-2]")
    assert select(changed, "ict:demo") == changed, "where there is no other"
    assert "no measured rows match 'ict:demo[]'" in refusal(lambda: select(changed, "ict:demo[]"))


# ---- joins --------------------------------------------------------------------------------------


def test_what_stands_beside_a_measured_row() -> None:
    (row,) = rows(several("alpha", [3.0, 3.2]))
    key = row.measurements["fd-digits"].key
    near = replace(published("2.5", key=key), protocol=("Paper", "why"))
    far = published("2.0")
    found = join_reported([far, row, near])[row.id]
    assert [r.id for r in found.rows] == ["p2.0", "p2.5"], "in the order given"
    assert (found.metric, found.key, found.withheld) == ("fd-digits", key, "")
    assert found.difference == pytest.approx(0.6), "measured minus reported"
    assert found.text == "2.0; 2.5"
    assert found.under == f"no protocol named (no metric key); Paper (key {key})"
    assert protocol_text(replace(near, rank_metric="kid")) == "Paper (no metric key)"
    twice = join_reported([row, near, replace(near, id="again")])[row.id]
    assert (twice.text, twice.difference) == ("2.5", pytest.approx(0.6)), "each number once"
    assert twice.under == f"Paper (key {key})"


def test_why_a_difference_is_withheld() -> None:
    key = record().metrics["fd-digits"].key

    def withheld(row: Row, *reported: Row) -> tuple[str, float | None]:
        found = join_reported([row, *reported])[row.id]
        return found.withheld, found.difference

    (row,) = rows(several("alpha", [3.0]))
    equal = published("2.5", key=key)
    assert withheld(row, published("2.5")) == ("keys differ", None)
    assert withheld(row, equal, published("2.6", key=key)) == ("sources disagree", None)
    (short,) = rows(several("alpha", [3.0], sampling={"num_samples": 5}))
    assert withheld(short, equal) == ("fewer samples", None)
    (none,) = rows([record("alpha", value=None)])
    assert withheld(none, equal) == ("not measured", None)
    no_key = replace(row.measurements["fd-digits"], key="")
    unknown = replace(row, measurements={"fd-digits": no_key})
    assert withheld(unknown, published("2.5")) == ("keys differ", None), "no key equals no key"
    assert withheld(row, equal) == ("", 0.5)


def test_published_rows_join_by_method_and_cost() -> None:
    (row,) = rows(several("alpha", [3.0]))
    assert join_reported([row, replace(published("1.0"), method="beta")]) == {}
    assert join_reported([published("1.0")]) == {}
    unknown = replace(row, nfe=None)
    assert join_reported([unknown, published("1.0")]) == {}
    assert list(join_reported([unknown, replace(published("1.0"), nfe=None)])) == [row.id]
