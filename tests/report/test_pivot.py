"""Pivot and sentences: the same values, intervals and group as the table; one line per name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from record_factory import metric, record

from cmbench.leaderboard.best_groups import best_groups, bold_values
from cmbench.leaderboard.labels import short_labels
from cmbench.leaderboard.rows import REPORTED, Row, aggregate
from cmbench.leaderboard.statistics import Interval
from cmbench.records.record import Record
from cmbench.report.numbers import format_mean
from cmbench.report.pivot import Pivot, first_nfes, group_text, pivot

KEY = "fd:cnn@1:none:round:n=2000:v1"


def made(method: str, values: Sequence[float], **fields: Any) -> list[Record]:
    metrics = [{"fd-digits": metric(v, key=KEY)} for v in values]
    return [record(method, seed=s, metrics=m, **fields) for s, m in enumerate(metrics)]


def rows(*records: Record) -> list[Row]:
    return aggregate([(Path(f"{i}.json"), item) for i, item in enumerate(records)])


def pivot_of(found: Sequence[Row]) -> Pivot:
    return pivot(found, best_groups(found), "fd-digits")


def texts(found: Sequence[Row]) -> list[str]:
    labels = short_labels(found)
    return [group_text(group, labels) for group in best_groups(found, "fd-digits")]


ECT, SCT = [1.20, 1.25, 1.31, 1.22, 1.28], [1.31, 1.22, 1.36, 1.20, 1.37]
CD = [6.1, 6.8, 6.4, 6.9, 6.5]


def board() -> list[Row]:
    return rows(*made("ect", ECT), *made("sct", SCT), *made("cd", CD), *made("ect", CD, nfe=2))


def test_the_pivot_has_the_values_of_the_rows_and_marks_the_group() -> None:
    found = board()
    shown = pivot_of(found)
    assert (shown.metric, shown.nfes, shown.samplers) == ("fd-digits", (1, 2), False)
    assert [line.label for line in shown.lines] == ["ect", "sct", "cd"], "best mean first"
    bold = bold_values(best_groups(found))
    by_id = {row.id: row for row in found}
    for line in shown.lines:
        for cell in line.cells:
            assert (cell.text == "") == (cell.ids == ())
            for i in cell.ids:
                assert cell.text == format_mean(by_id[i].measurements["fd-digits"].interval)
                assert cell.best == ((i, "fd-digits") in bold)
    assert [line.cells[0].best for line in shown.lines] == [True, True, False]


def test_higher_is_better_sorts_the_other_way_round() -> None:
    high = [
        record(m, seed=s, metrics={"fd-digits": metric(v, higher=True)})
        for m, v in (("alpha", 0.2), ("beta", 0.9))
        for s in range(2)
    ]
    assert [line.label for line in pivot_of(rows(*high)).lines] == ["beta", "alpha"]


def test_the_sampler_is_a_column_where_it_differs() -> None:
    heun = made("edm", CD, sampling={"sampler": "heun"})
    euler = made("edm", SCT, sampling={"sampler": "euler"})
    shown = pivot_of(rows(*heun, *euler))
    assert [(line.label, line.sampler) for line in shown.lines] == [
        ("edm", "euler"),
        ("edm", "heun"),
    ]
    assert shown.samplers
    assert not pivot_of(rows(*heun)).samplers


def test_students_per_nfe_are_one_line_and_rows_of_one_nfe_stay_apart() -> None:
    """A student per number of steps has seen other images at each NFE."""
    students = [
        item
        for nfe, seen in ((1, 200_000), (2, 170_000))
        for item in made("pd", ECT, nfe=nfe, training={"images_seen": seen})
    ]
    (line,) = pivot_of(rows(*students)).lines
    assert line.label == "pd"
    assert all(cell.text for cell in line.cells)
    twice = rows(*students, *made("pd", CD, nfe=1, training={"images_seen": 9}))
    assert {line.label for line in pivot_of(twice).lines} == {
        "pd, demo [images_seen=200000]",
        "pd, demo [images_seen=170000]",
        "pd, demo [images_seen=9]",
    }


def test_the_first_view_has_few_nfes() -> None:
    assert first_nfes([1, 2, 3, 4, 5, 8, 35]) == (1, 2, 4, 8)
    assert first_nfes([5, 10, 18, 35, 2000]) == (5, 10, 18, 35)
    assert first_nfes([]) == ()


def test_a_sentence_names_the_best_and_what_cannot_be_told_from_it() -> None:
    first, second = texts(board())
    assert first.startswith("NFE 1: best ect 1.252 ± 0.055; cannot be told from it: sct (+3 % [")
    assert first.count("(") == 1, "cd is not named"
    assert second == "NFE 2: best ect 6.54 ± 0.40"
    assert texts(rows(*made("ect", ECT), *made("cd", CD))) == [
        "NFE 1: best ect 1.252 ± 0.055; the other is worse"
    ]
    three = rows(*made("ect", ECT), *made("cd", CD), *made("ct", [2 * v for v in CD[::-1]]))
    assert texts(three) == ["NFE 1: best ect 1.252 ± 0.055; all others are worse"]


def test_a_sentence_says_where_there_is_no_verdict() -> None:
    assert texts(rows(*made("ect", [1.0]), *made("cd", [2.0]))) == [
        "NFE 1: lowest ect 1.000 (one seed: no verdict)"
    ]
    found = rows(*made("ect", ECT), *made("lucky", [0.5]), *made("cd", CD))
    assert texts(found) == [
        "NFE 1: best ect 1.252 ± 0.055; the other is worse; no verdict, one seed: lucky"
    ]
    late = [
        record("gan", seed=90 + s, metrics={"fd-digits": metric(v, key=KEY)})
        for s, v in enumerate(SCT)
    ]
    (told,) = texts(rows(*made("ect", ECT), *late))
    assert told.endswith(", unpaired)")


def test_a_sentence_ends_with_the_best_reported_number() -> None:
    (base,) = rows(*made("ect", [2.0]))
    found = replace(
        base.measurements["fd-digits"], key="", text="1.90", interval=Interval(1.9, None, None, 0)
    )
    printed = replace(
        base, id="p", kind=REPORTED, title="sCD-XXL", cells=(), measurements={"fd-digits": found}
    )
    assert texts([printed]) == ["NFE 1: best reported: sCD-XXL 1.90"]
    (told,) = texts([*rows(*made("ect", ECT)), printed])
    assert told == "NFE 1: best ect 1.252 ± 0.055; best reported: sCD-XXL 1.90"
    (line,) = pivot_of([printed]).lines
    assert (line.reported, line.label, line.cells[0].text) == (True, "sCD-XXL", "1.90")
    again = replace(printed, id="q", measurements={"fd-digits": replace(found, text="1.95")})
    (line,) = pivot_of([printed, again]).lines
    assert (line.cells[0].text, line.cells[0].ids) == ("1.90; 1.95", ("p", "q"))


@pytest.mark.parametrize("key", ["kd:cnn@1:n=5:v1"])
def test_differences_that_are_no_shares_are_printed_as_they_are(key: str) -> None:
    values = {"ect": [-0.01, 0.02, 0.01], "sct": [0.01, 0.01, 0.02]}
    found = rows(
        *(
            record(m, seed=s, metrics={"fd-digits": metric(v, key=key)})
            for m, vs in values.items()
            for s, v in enumerate(vs)
        )
    )
    (told,) = texts(found)
    assert "sct (+0.00667 [" in told
