"""What a reader must know before trusting a number: warnings, copies, scores beyond the floor."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from record_factory import metric, record
from scipy.stats import binom

from cmbench.leaderboard.best_groups import best_groups
from cmbench.leaderboard.export import row_table
from cmbench.leaderboard.floors import marked_by_floor
from cmbench.leaderboard.rows import REPORTED, Row, aggregate
from cmbench.leaderboard.sections import sections
from cmbench.records.binomial import binomial_tail
from cmbench.records.record import CopyCount, Record, read_record, write_record
from cmbench.report.environment import Templates
from cmbench.report.page import build_page


def rows(*records: Record) -> list[Row]:
    return aggregate([(Path(f"{r.cell}.json"), r) for r in records])


def seeds(method: str, value: float, **fields: Any) -> list[Record]:
    return [record(method, seed=s, value=value + s / 100, **fields) for s in range(3)]


MANY = CopyCount(samples=2000, copies=2000, held_out=1797, held_out_copies=2)
FEW = CopyCount(samples=2000, copies=3, held_out=1797, held_out_copies=2)


@pytest.mark.parametrize("least", [0, 1, 7, 30, 60, 100])
@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9])
def test_the_tail_of_a_binomial_is_that_of_scipy(least: int, p: float) -> None:
    assert binomial_tail(least, 100, p) == pytest.approx(binom.sf(least - 1, 100, p), rel=1e-9)


def test_the_tail_of_many_trials_is_fast_and_near() -> None:
    found = binomial_tail(500_300, 10**6, 0.5)
    assert found == pytest.approx(binom.sf(500_299, 10**6, 0.5), rel=1e-3)
    assert binomial_tail(2**50, 2**51, 0.5) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("samples", "copies", "held_out", "held_out_copies", "significant"),
    [
        (2000, 2000, 1797, 0, True),
        (2000, 40, 2000, 0, True),
        (50_000, 1, 50_000, 0, False),  # one copy is chance
        (2000, 40, 2000, 40, False),  # the data hold as many duplicates
        (2000, 400, 2000, 200, True),
        (2000, 200, 2000, 400, False),  # fewer than the data
        (2000, 0, 2000, 0, False),
        (0, 5, 10, 0, False),  # nonsense of a damaged record is no proof
        (5, 5, 0, 0, False),
    ],
)
def test_copies_are_significant_against_held_out_images(
    samples: int, copies: int, held_out: int, held_out_copies: int, significant: bool
) -> None:
    count = CopyCount(
        samples=samples, copies=copies, held_out=held_out, held_out_copies=held_out_copies
    )
    assert count.significant is significant
    assert 0 <= count.p <= 1


def test_a_row_of_copies_is_shown_and_never_ranked() -> None:
    cheat = seeds("cheat", 0.1)
    cheat[1] = cheat[1].model_copy(update={"copies": {"pixels": MANY}})
    made = rows(*cheat, *seeds("honest", 1.0, copies={"features": FEW}), *seeds("other", 2.0))
    assert {row.method: row.findings for row in made} == {
        "cheat": ("copies of real images",),
        "honest": (),
        "other": (),
    }
    ranked, copied = sections(made)
    assert [row.method for row in ranked.rows] == ["honest", "other"]
    assert ({row.method for row in copied.rows}, copied.ranked) == ({"cheat"}, False)
    assert "held-out real images; never ranked" in copied.reason
    (group,) = best_groups(made, "fd-digits")
    assert group.best is not None
    assert [group.best.method, *(item.row.method for item in group.compared)] == ["honest", "other"]


def test_records_without_copies_keep_their_bytes(tmp_path: Path) -> None:
    without, counted = record("alpha"), record("beta", copies={"pixels": FEW})
    assert "copies" not in without.to_json()
    for made in (without, counted):
        assert read_record(write_record(made, tmp_path)) == made


# ---- beyond the floor ---------------------------------------------------------------------------


def floored(method: str, value: float, *, higher: bool = False, **floor: Any) -> list[Record]:
    facts = {"value": 0.8, "std": 0.01, "samples": 1797, "reference_samples": 898, "splits": 20}
    return [
        record(
            method,
            seed=s,
            metrics={
                "fd-digits": metric(
                    value, higher=higher, standard_error=0.02, detail={"floor": facts | floor}
                )
            },
        )
        for s in range(2)
    ]


@pytest.mark.parametrize(
    ("value", "options", "found"),
    [
        (0.76, {}, ("below the floor",)),
        (0.78, {}, ()),
        (0.9, {}, ()),
        (0.9, {"higher": True}, ("above the ceiling",)),
        (0.7, {"higher": True}, ()),
        (0.76, {"samples": 1000}, ()),  # at other counts than the row's
        (0.76, {"splits": 1}, ()),  # an older record's two halves
        (0.76, {"std": None}, ()),  # then the metric's own error counts
        (0.73, {"std": None}, ("below the floor",)),
    ],
)
def test_rows_beyond_the_floor_are_marked_and_stay_ranked(
    value: float, options: dict[str, Any], found: tuple[str, ...]
) -> None:
    made = marked_by_floor(
        rows(*floored("lucky", value, **options), *floored("usual", 0.8, **options))
    )
    assert {row.method: row.findings for row in made}["lucky"] == found
    (section,) = sections(made)
    assert section.ranked
    assert {row.method for row in section.rows} == {"lucky", "usual"}


def test_reported_rows_under_the_same_key_are_marked_only() -> None:
    (measured,) = rows(*floored("usual", 1.0))
    low = replace(
        measured.measurements["fd-digits"],
        interval=replace(measured.measurements["fd-digits"].interval, mean=0.5),
    )
    reported = replace(measured, id="r", kind=REPORTED, cells=(), measurements={"fd-digits": low})
    other = replace(low, key="another key")
    elsewhere = replace(reported, id="e", measurements={"fd-digits": other})
    marked = marked_by_floor([measured, reported, elsewhere])
    assert [row.findings for row in marked] == [(), ("below the floor",), ()]


# ---- in all formats -----------------------------------------------------------------------------


def test_every_format_marks_warned_rows(tmp_path: Path) -> None:
    made = [
        *seeds("alpha", 1.0, warnings=["19 of 64 samples are duplicates"]),
        *seeds("beta", 1.0),
        *seeds("gamma", 1.0, copies={"pixels": MANY}, warnings=["2000 of 2000 samples are copies"]),
    ]
    paths = [write_record(item, tmp_path) for item in made]
    page = build_page("digits", list(zip(paths, made, strict=True)), None, {}, "cmbench report")
    engine = Templates()
    texts = {f: engine.render(f"table.{f}.j2", {"page": page}) for f in ("md", "tex", "csv")}
    lines = {row["method"]: row for row in csv.DictReader(io.StringIO(texts["csv"]))}
    marks = {"alpha": "warnings", "beta": "", "gamma": "copies of real images, warnings"}
    assert {method: line["marks"] for method, line in lines.items()} == marks
    flat = row_table({"digits": tmp_path}).rows
    assert {row["method"]: row["marks"] for row in flat} == marks
    for text in (texts["md"], texts["tex"]):
        for method, mark in marks.items():
            (line,) = [x for x in text.splitlines() if method in x and "1.0" in x]
            assert mark in line
            assert ("warnings" in line) == ("warnings" in mark)


def test_a_page_without_findings_has_no_column_of_marks(tmp_path: Path) -> None:
    made = seeds("alpha", 1.0)
    page = build_page("digits", [(tmp_path / "a.json", r) for r in made], None, {}, "")
    assert "Marks" not in [column.title for _, column in page.shown]
