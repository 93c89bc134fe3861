"""Sections and ranks."""

from __future__ import annotations

import csv
from pathlib import Path

from record_factory import metric, record

from cmbench.errors import first_names
from cmbench.leaderboard.best import best_values
from cmbench.leaderboard.ranking import Rank, rank_all
from cmbench.leaderboard.rows import Row, aggregate
from cmbench.leaderboard.sections import sections
from cmbench.leaderboard.significance import compare_units
from cmbench.records.folders import read_records
from cmbench.records.record import Record


def rows(records: list[Record]) -> list[Row]:
    return aggregate([(Path(f"{r.cell}.json"), r) for r in records])


def ranks(records: list[Record]) -> dict[str, Rank]:
    found = rows(records)
    by_id = rank_all(sections(found))
    return {f"{r.method}@{r.nfe_text}": by_id[r.id] for r in found if r.id in by_id}


def several(method: str, values: list[float], **fields: object) -> list[Record]:
    return [record(method, seed=s, value=v, **fields) for s, v in enumerate(values)]


def test_clear_differences_are_ranked_and_unclear_ones_tie() -> None:
    noise = [0.0, 0.02, -0.01, 0.01, 0.005]
    found = ranks(
        several("alpha", [1 + n for n in noise])
        + several("beta", [1.001 + n * (-1) ** i for i, n in enumerate(noise)])
        + several("gamma", [5 + 1.1 * n for n in noise])
    )
    assert found["alpha@1"].text == found["beta@1"].text == "1–2"
    assert found["gamma@1"].text == "3"


def test_three_seeds_separate_what_is_far_apart_and_tie_the_rest() -> None:
    records = (
        several("alpha", [1.00, 1.02, 0.99])
        + several("beta", [1.01, 1.00, 1.03])
        + several("gamma", [50.0, 51.0, 50.5])
        + several("delta", [0.1])
    )
    found = ranks(records)
    assert {key: rank.text for key, rank in found.items()} == {
        "alpha@1": "1–2",
        "beta@1": "1–2",
        "gamma@1": "3",
    }


def test_lower_precision_is_ranked_by_itself() -> None:
    values = [1.0, 1.02, 0.99]
    made = rows(
        several("alpha", [5 * v for v in values])
        + several("beta", [9 * v for v in values])
        + several("gamma", values, sampling={"dtype": "bfloat16"})
    )
    by_id = rank_all(sections(made))
    assert {r.method: by_id[r.id].text for r in made if r.id in by_id} == {
        "alpha": "1",
        "beta": "2",
    }
    assert {r.method: r.marks for r in made}["gamma"] == ("bfloat16",)


def test_bold_are_the_best_mean_and_what_one_comparison_cannot_tell_from_it() -> None:
    """Twenty of the mean is not bold because 28 corrected comparisons of three seeds are silent."""
    noise = [0.0, 0.05, -0.04]
    records = [
        item
        for step in range(8)
        for item in several(f"m{step}", [1 + 0.06 * step + n * (1 + step % 3) for n in noise])
    ] + several("worst", [21.0, 17.0, 24.0])
    made = rows(records)
    units = {row.method: row.measurements["fd-digits"].units for row in made}
    best = min(made, key=lambda row: row.measurements["fd-digits"].mean).method
    expected = {
        name
        for name, theirs in units.items()
        if name == best or compare_units(theirs, units[best]).p > 0.05  # type: ignore[union-attr]
    }
    bold = best_values(made)
    assert {row.method for row in made if (row.id, "fd-digits") in bold} == expected
    assert 1 < len(expected) < len(made)
    assert "worst" not in expected
    worst = next(row.id for row in made if row.method == "worst")
    assert rank_all(sections(made))[worst].low == 1


def test_rows_whose_nfe_nobody_stated_have_no_rank_and_are_never_bold() -> None:
    records = [
        item.model_copy(update={"kind": "scored samples"})
        for item in several("alpha", [1.0, 1.1, 1.05], nfe=0)
        + several("beta", [9.0, 9.1, 9.05], nfe=0)
    ]
    assert ranks(records) == {}
    assert best_values(rows(records)) == set()


def test_a_single_seed_has_no_rank() -> None:
    assert ranks(several("alpha", [1.0]) + several("beta", [2.0, 2.1, 2.2])) == {}
    several_each = several("alpha", [1.0, 1.1]) + several("beta", [2.0, 2.1, 2.2])
    assert ranks(several_each).keys() == {"alpha@1", "beta@1"}


def test_rows_are_ranked_within_their_nfe_and_conditioning() -> None:
    found = ranks(
        several("alpha", [9.0, 9.1, 9.05])
        + several("alpha", [1.0, 1.1, 1.05], nfe=2)
        + several("beta", [0.1, 0.11, 0.12], conditional=False)
    )
    assert found == {}


def test_higher_is_better_turns_the_order_round() -> None:
    def made(method: str, base: float) -> list[Record]:
        return [
            record(method, seed=s, metrics={"fd-digits": metric(base * factor, higher=True)})
            for s, factor in enumerate([1.0, 1.01, 1.02, 1.03])
        ]

    found = ranks(made("alpha", 1.0) + made("beta", 3.0))
    assert (found["beta@1"].text, found["alpha@1"].text) == ("1", "2")


def test_fewer_samples_and_other_keys_are_never_ranked_together() -> None:
    short = several("beta", [0.1, 0.1], sampling={"num_samples": 10})
    other = [
        record("gamma", seed=s, metrics={"fd-digits": metric(0.2, key="other")}) for s in range(2)
    ]
    records = several("alpha", [1.0, 1.1]) + short + other
    assert ranks(records) == {}
    titles = [(s.title, len(s.rows), s.ranked) for s in sections(rows(records))]
    assert titles == [
        ("Measured", 1, True),
        ("Measured under another protocol (other)", 1, True),
        ("Fewer samples than the protocol", 1, False),
    ]


def test_sections_of_one_kind_say_what_differs_and_short_ones_have_no_bold() -> None:
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
    assert not any(s.bold or s.ranked for s in found)
    (one,) = sections(rows(short("alpha", 100, "v1")))
    assert one.title == "Fewer samples than the protocol"
    assert sections(rows(several("alpha", [1.0, 1.1])))[0].bold


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


def test_an_approximate_extractor_is_never_ranked() -> None:
    key = "fd:inception@0123abcd:tf1-bilinear{}:round:n-1:float64:ref=01234567:n=50:v1"

    def made(method: str, suffix: str, values: list[float]) -> list[Record]:
        return [
            record(method, seed=s, metrics={"fd-digits": metric(v, key=key.format(suffix))})
            for s, v in enumerate(values)
        ]

    records = made("quick", "+bfloat16", [1.0, 1.01, 1.02]) + made("other", "+bfloat16", [5.0, 5.1])
    records += made("exact", "", [2.0, 2.01]) + made("worse", "", [9.0, 9.1])
    found = ranks(records)
    assert found["exact@1"].text == "1"
    assert not {"quick@1", "other@1"} & found.keys()
    quick = next(row for row in rows(records) if row.method == "quick")
    assert not any(identity == quick.id for identity, _ in best_values(rows(records)))


def test_a_list_that_was_cut_says_so() -> None:
    assert first_names([], 2) == ""
    assert first_names(["a", "b"], 2) == "a, b"
    assert first_names(["a", "b", "c"], 2) == "a, b, …"
