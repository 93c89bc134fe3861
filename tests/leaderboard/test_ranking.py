"""Sections: what is ranked together."""

from __future__ import annotations

import csv
from pathlib import Path

from record_factory import metric, record

from cmbench.errors import first_names
from cmbench.leaderboard.best_groups import best_groups
from cmbench.leaderboard.rows import Row, aggregate
from cmbench.leaderboard.sections import sections
from cmbench.records.folders import read_records
from cmbench.records.record import Record


def rows(records: list[Record]) -> list[Row]:
    return aggregate([(Path(f"{r.cell}.json"), r) for r in records])


def several(method: str, values: list[float], **fields: object) -> list[Record]:
    return [record(method, seed=s, value=v, **fields) for s, v in enumerate(values)]


def test_fewer_samples_and_other_keys_are_never_ranked_together() -> None:
    short = several("beta", [0.1, 0.1], sampling={"num_samples": 10})
    other = [
        record("gamma", seed=s, metrics={"fd-digits": metric(0.2, key="other")}) for s in range(2)
    ]
    records = several("alpha", [1.0, 1.1]) + short + other
    assert [
        (g.best.method if g.best else "", g.compared)
        for g in best_groups(rows(records), "fd-digits")
    ] == [("alpha", ()), ("gamma", ())]
    titles = [(s.title, len(s.rows), s.ranked) for s in sections(rows(records))]
    assert titles == [
        ("Measured", 1, True),
        ("Measured under another protocol (other)", 1, True),
        ("Fewer samples than the protocol", 1, False),
    ]


def test_sections_of_one_kind_say_what_differs_and_short_ones_are_not_ranked() -> None:
    def short(name: str, count: int, version: str) -> list[Record]:
        key = f"fd:cnn@1:n={count}:{version}"
        return [
            record(
                name,
                seed=s,
                metrics={"fd-digits": metric(value + s / 1e4, key=key)},
                sampling={"num_samples": count},
            )
            for s, value in enumerate((1.0, 1.0, 1.0))
        ]

    found = sections(rows([*short("alpha", 100, "v1"), *short("beta", 200, "v1")]))
    assert [s.title for s in found] == [
        "Fewer samples than the protocol (n=100)",
        "Fewer samples than the protocol (n=200)",
    ]
    assert not any(s.ranked for s in found)
    (one,) = sections(rows(short("alpha", 100, "v1")))
    assert one.title == "Fewer samples than the protocol"


def test_records_that_differ_in_anything_but_seeds_do_not_mix() -> None:
    base = several("alpha", [1.0, 1.1])
    changed = record("alpha", seed=2, value=9.0, training={"config_sha256": "0" * 64})
    newer = record("alpha", seed=3, value=9.0, sampling={"dtype": "bfloat16"})
    assert sorted(len(r.cells) for r in rows([*base, changed, newer])) == [1, 1, 2]
    assert len(rows(base)[0].cells) == 2


def test_row_ids_are_those_of_the_committed_pages() -> None:
    """Links to a row hold its id, so a renamed field must not change it."""
    root = Path(__file__).parents[2]
    cells = read_records(root / "leaderboards" / "digits" / "records")
    found = aggregate([(path, item) for path, item in cells if isinstance(item, Record)])
    with (root / "reports" / "digits.csv").open(encoding="utf-8", newline="") as file:
        shown = {line["id"] for line in csv.DictReader(file)}
    assert {row.id for row in found} == shown


def test_failed_and_skipped_cells_make_no_row() -> None:
    failed = record("alpha", status="failed", metrics={})
    assert rows([failed]) == []


def test_a_list_that_was_cut_says_so() -> None:
    assert first_names([], 2) == ""
    assert first_names(["a", "b"], 2) == "a, b"
    assert first_names(["a", "b", "c"], 2) == "a, b, …"
