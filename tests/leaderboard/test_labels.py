"""A row is identified by what decides it: names, series, selections."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from record_factory import metric, record, sha, with_artifact

from cmbench.errors import UserError
from cmbench.leaderboard.compare import compare
from cmbench.leaderboard.labels import row_labels
from cmbench.leaderboard.rows import Row, aggregate
from cmbench.leaderboard.selection import select, selectors
from cmbench.records.configuration import configured_method
from cmbench.records.record import Record
from cmbench.report.render import render

PLAIN = {"optimizer": {"lr": 1e-3, "name": "adam"}, "steps": 20}
CHANGED = {"optimizer": {"lr": 1e-2, "name": "adam"}, "steps": 20}


def trained(
    config: dict[str, Any], overrides: dict[str, Any] | None, **fields: Any
) -> list[Record]:
    """Two seeds of one configuration at NFE 1 and 2."""
    training = {"config": config, "config_sha256": sha(str(config))}
    return [
        record(
            seed=seed,
            nfe=nfe,
            value=value + seed,
            recipe="smoke",
            training={**training, "overrides": overrides},
            **fields,
        )
        for seed in range(2)
        for nfe, value in ((1, 5.0), (2, 4.0))
    ]


def rows(records: list[Record]) -> list[Row]:
    return aggregate([(Path(f"{i}.json"), r) for i, r in enumerate(records)])


def pages(records: list[Record], folder: Path) -> dict[str, str]:
    found = {"digits": [(folder / f"{i}.json", r) for i, r in enumerate(records)]}
    render(found, folder)
    return {end: (folder / f"digits.{end}").read_text() for end in ("html", "md", "csv", "tex")}


def payload(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


BOTH = trained(PLAIN, {}) + trained(CHANGED, {"optimizer.lr": 0.01})


def test_what_differs_from_the_recipe_is_in_every_format(tmp_path: Path) -> None:
    text = pages(BOTH, tmp_path)
    assert "| smoke \\+optimizer.lr=0.01 |" in text["md"]
    assert "smoke +optimizer.lr=0.01" in text["tex"].replace("\\", "")
    lines = list(csv.DictReader(io.StringIO(text["csv"])))
    assert sorted(line["recipe"] for line in lines) == [
        *["smoke"] * 2,
        *["smoke +optimizer.lr=0.01"] * 2,
    ]
    assert ">smoke +optimizer.lr=0.01</td>" in text["html"]
    labels = {row["label"] for row in payload(text["html"])["rows"]}
    assert labels == {"alpha, smoke", "alpha, smoke +optimizer.lr=0.01"}


def test_a_single_changed_run_says_so() -> None:
    found = rows(trained(CHANGED, {"optimizer.lr": 0.01}))
    assert set(row_labels(found).values()) == {"alpha, smoke +optimizer.lr=0.01"}
    assert configured_method(found[0].cells[0][1]) == "alpha +optimizer.lr=0.01"


def test_series_and_pairs_never_mix_configurations(tmp_path: Path) -> None:
    """The changed run was measured at NFE 1 only, the plain one at NFE 2 only: no pair."""
    some = [r for r in trained(PLAIN, {}) if r.sampling.nfe == 2]
    some += [r for r in trained(CHANGED, {"optimizer.lr": 0.01}) if r.sampling.nfe == 1]
    for overrides in ({"optimizer.lr": 0.01}, None):
        here = [
            r.model_copy(
                update={"training": r.training.model_copy(update={"overrides": overrides})}
            )
            if r.sampling.nfe == 1
            else r
            for r in some
        ]
        data = payload(pages(here, tmp_path)["html"])
        series = {row["nfe"]: row["series"] for row in data["rows"]}
        assert series[1] != series[2]
    assert len({row.series for row in rows(BOTH)}) == 2


def test_older_records_are_told_apart_by_the_options_that_differ() -> None:
    """They do not say what the recipe has; both show the option."""
    found = rows(trained(PLAIN, None) + trained(CHANGED, None))
    assert set(row_labels(found).values()) == {
        "alpha, smoke [optimizer.lr=0.001]",
        "alpha, smoke [optimizer.lr=0.01]",
    }


@pytest.mark.parametrize(
    ("sampling", "training", "mark"),
    [
        ({"sigmas": [80.0, 0.5], "overrides": {"sigmas": [80.0, 0.5]}}, {}, "sigmas 80,0.5"),
        ({"overrides": {"ema": "ema-0.05"}}, {"ema": "ema-0.05"}, "ema ema-0.05"),
        ({"sampler": "heun", "overrides": {"sampler": "heun"}}, {}, "heun"),
        ({"sigmas": [80.0, 0.5]}, {}, "demo [sigmas=80,0.5]"),
        ({}, {"ema": "ema-0.05"}, "demo [ema=ema-0.05]"),
    ],
)
def test_how_samples_were_made_is_part_of_the_name(
    sampling: dict[str, Any], training: dict[str, Any], mark: str, tmp_path: Path
) -> None:
    usual = [record(nfe=nfe, seed=seed) for nfe in (1, 2) for seed in range(2)]
    other = [record(nfe=2, seed=s, sampling=sampling, training=training) for s in range(2)]
    found = rows(usual + other)
    labels = row_labels(found)
    by_nfe: dict[int | None, set[str]] = {}
    for row in found:
        by_nfe.setdefault(row.nfe, set()).add(labels[row.id])
    assert len(by_nfe[2]) == 2
    assert any(label.endswith(mark) for label in by_nfe[2])
    assert len({row.series for row in found if row.nfe == 2}) == 2
    table = pages(usual + other, tmp_path)["md"]
    lines = [line for line in table.splitlines() if line.startswith("| alpha |")]
    assert len({re.sub(r"\d\.\d+", "", line.split("|", 4)[4]) for line in lines}) >= 2


def test_one_metric_more_on_the_same_samples_is_told_apart() -> None:
    more = {"fd-digits": metric(1.0), "kd-digits": metric(0.2, "kd-digits")}
    found = rows([record(), record(metrics={"fd-digits": metric(1.0)}), record(metrics=more)])
    assert len(set(row_labels(found).values())) == 3


def test_curves_of_two_configurations_have_two_names(tmp_path: Path) -> None:
    curve = b"nimg,loss\n1,2.0\n2,1.0\n"
    items = [
        with_artifact(
            tmp_path,
            item.model_copy(
                update={"training": item.training.model_copy(update={"run": f"digits/r{i}"})}
            ),
            "curve",
            f"c{i}.csv",
            curve,
        )
        for i, item in enumerate(BOTH)
    ]
    data = payload(pages(items, tmp_path)["html"])
    names = {curve["name"] for curve in data["curves"]}
    assert names == {"alpha, smoke", "alpha, smoke +optimizer.lr=0.01"}


def test_options_in_brackets_select_by_value() -> None:
    found = rows(BOTH)
    for text in ("1e-2", "0.01", "0.010"):
        chosen = select(found, f"alpha:smoke[optimizer.lr={text}]")
        assert {row.overrides for row in chosen} == {("optimizer.lr=0.01",)}
    assert [row.overrides for row in select(found, "alpha[steps=20]")] == [(), ()], "plain first"
    assert len(select([row for row in found if row.overrides], "alpha[steps=20]")) == 2
    assert len(select(found, "alpha:smoke[optimizer.lr=1e-3,steps=20]")) == 2
    assert [row.nfe for row in select(found, "alpha[optimizer.lr=1e-3,sigmas=80,0.8]")] == [2]
    assert [row.nfe for row in select(found, "alpha[sigmas=[80,0.8],optimizer.lr=1e-3]")] == [2]
    with pytest.raises(UserError, match=r"no measured rows match 'alpha\[steps=21\]'"):
        select(found, "alpha[steps=21]")
    with pytest.raises(UserError, match=r"\[steps\] is not \[key=value\]"):
        select(found, "alpha[steps]")


def test_an_ambiguous_selection_lists_what_would_select_one() -> None:
    large = {"optimizer": {"lr": 1e-1, "name": "adam"}, "steps": 20}
    found = rows(trained(large, {"optimizer.lr": 0.1}) + trained(CHANGED, {"optimizer.lr": 0.01}))
    with pytest.raises(UserError) as caught:
        compare(select(found, "alpha:smoke"), select(found, "alpha:smoke"))
    larger, changed = "alpha:smoke[optimizer.lr=0.1]", "alpha:smoke[optimizer.lr=0.01]"
    assert larger in str(caught.value)
    assert changed in str(caught.value)
    (first, second) = compare(select(found, larger), select(found, changed))
    assert (first.a.overrides, first.b.overrides) == (("optimizer.lr=0.1",), ("optimizer.lr=0.01",))
    assert second.a.nfe == 2


def test_what_would_select_one_is_told_from_all_rows_of_the_workspace() -> None:
    """The noise levels alone would tell the two rows apart, and select a row of the other run."""
    two = [{"sigmas": [80.0, 5.0]}, {"sigmas": [80.0, 7.0]}]
    chosen = [{**sigmas, "overrides": sigmas} for sigmas in two]
    changed = [r for c in chosen for r in trained(CHANGED, {"optimizer.lr": 0.01}, sampling=c)]
    more = [*trained(PLAIN, {}, sampling=chosen[0]), *changed]
    found = rows(trained(PLAIN, {}) + [r for r in more if r.sampling.nfe == 2])
    side = select(found, "alpha[optimizer.lr=1e-2]")
    with pytest.raises(UserError, match="A selects 2 rows at digits NFE 2") as caught:
        compare(side, side, found)
    said = str(caught.value).partition("allowed: ")[2].partition("; give one of them")[0]
    for text in said.split(" or "):
        assert len([row for row in select(found, text) if row.nfe == 2]) == 1


def test_the_plain_recipe_comes_first() -> None:
    assert [row.overrides for row in rows(BOTH[::-1])] == [(), (), *[("optimizer.lr=0.01",)] * 2]


def test_a_selector_that_cannot_be_written_is_the_rows_id() -> None:
    config = [{"ema": [{"kimg": n, "name": "a,b"}]} for n in (1, 2)]
    found = [row for c in config for row in rows(trained(c, {})) if row.nfe == 1]
    assert selectors(found) == [row.id for row in found]


def test_labels_of_strange_records_stay_short_and_differ() -> None:
    """Cut names are told apart by what was cut."""
    many = {f"option{i}": i for i in range(500)}
    first = trained({**many, "long": "x" * 1000 + "a"}, {**many, "long": "x" * 1000 + "a"})
    second = trained({**many, "long": "x" * 1000 + "b"}, {**many, "long": "x" * 1000 + "b"})
    labels = set(row_labels(rows(first + second)).values())
    assert len(labels) == 2
    assert all(len(label) < 400 for label in labels)
