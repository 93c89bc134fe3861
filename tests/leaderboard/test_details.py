"""What readers are told of a record's floor, interval and extrapolation, old and new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from record_factory import metric, record

from cmbench.cli.show import describe
from cmbench.leaderboard.details import Floor, extrapolation_of, floor_of, interval_of
from cmbench.records.record import MetricRecord, read_record, write_record
from cmbench.report.render import render

NEW = {"value": 0.3359, "std": 0.111, "samples": 2000, "reference_samples": 1797, "splits": 20}
INFINITY = {"value": 1.5, "interval": [1.2, 1.8], "reliable": True}


def new(**changes: Any) -> MetricRecord:
    fields = {"standard_error": 0.1, "interval": (1.7, 2.1)} | changes
    return metric(1.9, detail={"floor": NEW, "infinity": INFINITY}, **fields)


def old(**changes: Any) -> MetricRecord:
    """As the records of the first version: one split, and the extrapolation's interval."""
    detail = {
        "floor": 0.887,
        "floor_count": 898,
        "real_halves": 0.887,
        "real_half_samples": 898,
        "infinity": INFINITY,
    }
    fields = {"standard_error": 0.1, "interval": (1.2, 1.8)} | changes
    return metric(1.9, detail=detail, **fields)


def test_the_floor_of_new_records_is_for_the_rows_counts() -> None:
    floor = floor_of(new())
    assert floor == Floor(0.3359, 0.111, 2000, 1797, 20, higher_is_better=False)
    assert floor.number == "0.3359 ± 0.11"
    assert floor.meaning == "a perfect generator with 2,000 samples against 1,797 real images"


def test_the_floor_of_old_records_is_called_what_it_is() -> None:
    floor = floor_of(old())
    assert floor == Floor(0.887, None, 898, 898, 1, higher_is_better=False)
    assert floor.number == "0.887"
    assert floor.meaning == "one split of the real images into halves of 898 each"
    share = metric(0.9, higher=True, detail={"real_halves": 0.93})
    ceiling = floor_of(share)
    assert ceiling is not None
    assert (ceiling.name, ceiling.value) == ("ceiling", 0.93)
    assert ceiling.meaning == "one split of the real images into halves"


@pytest.mark.parametrize(
    "floor", ["high", True, None, [1], {}, {"value": "x"}, {"value": float("inf")}]
)
def test_what_is_no_floor_is_none(floor: Any) -> None:
    assert floor_of(metric(1.0, detail={"floor": floor})) is None
    assert floor_of(metric(1.0)) is None


def test_an_interval_is_that_of_the_value() -> None:
    assert interval_of(new()) == (1.7, 2.1)
    low, high = interval_of(old()) or (0.0, 0.0)
    assert (low, high) == pytest.approx((1.9 - 0.196, 1.9 + 0.196), abs=1e-5)
    assert interval_of(old(standard_error=None)) is None
    assert (interval_of(old(standard_error=2.0)) or (1,))[0] == 0.0, "a distance is not negative"
    assert interval_of(metric(1.0, interval=(0.9, 1.1))) == (0.9, 1.1)


def test_an_interval_needs_a_value_and_its_error() -> None:
    """Of a record whose interval is that of the extrapolation."""
    for missing in ({"value": None}, {"standard_error": None}):
        found = new(interval=(1.2, 1.8)).model_copy(update=missing)
        assert interval_of(found) is None


@pytest.mark.parametrize("count", [-1, 2.5, "many", None, 2**53])
def test_a_count_that_is_none_is_zero(count: Any) -> None:
    found = floor_of(metric(1.9, detail={"floor": {**NEW, "samples": count}}))
    assert found is not None
    assert (found.samples, found.reference_samples, found.splits) == (0, 1797, 20)


@pytest.mark.parametrize("found", ["far", {}, {"value": "x", "interval": [0, 1]}, {"value": 1.0}])
def test_what_is_no_extrapolation_is_none(found: Any) -> None:
    assert extrapolation_of(metric(1.0, detail={"infinity": found})) is None


def test_show_names_every_number() -> None:
    lines = describe(record(metrics={"fd-digits": new()}))
    at = next(i for i, line in enumerate(lines) if line.startswith("  fd-digits"))
    value, extrapolated, floor = (" ".join(line.split()) for line in lines[at : at + 3])
    assert value.startswith("fd-digits 1.9 95 % [1.7 2.1] ")
    assert extrapolated == "1.5 95 % [1.2 1.8] extrapolated to infinitely many samples"
    assert floor == (
        "0.3359 ± 0.11 floor: a perfect generator with 2,000 samples against 1,797 real images"
    )


def test_pages_say_which_floor_they_draw(tmp_path: Path) -> None:
    for seed, found in enumerate((new(), new(), old())):
        item = record(metrics={"fd-digits": found}, training={"seed": seed})
        item = item.model_copy(update={"cell": f"cell-{seed}"})
        write_record(item, tmp_path / "records")
    files = sorted((tmp_path / "records").glob("*.json"))
    render({"digits": [(f, read_record(f)) for f in files]}, tmp_path / "out")
    text = (tmp_path / "out" / "digits.md").read_text()
    assert (
        "Floor of fd-digits: 0.3359 ± 0.11 (a perfect generator with 2,000 samples against" in text
    )
    assert (
        "Floor of fd-digits: 0.887 (one split of the real images into halves of 898 each)." in text
    )
    assert text.count("Floor of fd-digits: ") == 2
    page = (tmp_path / "out" / "digits.html").read_text()
    assert '"label":"floor: two halves of the real images"' in page
    assert '"label":"floor: perfect generator"' in page


def test_pages_draw_floors_of_their_rank_metric_only(tmp_path: Path) -> None:
    """Records of `cmbench eval` may be ranked by other metrics."""
    item = record(metrics={"fd-digits": new()})
    ceiling = metric(0.9, "precision", higher=True, detail={"floor": {**NEW, "value": 0.9}})
    other = record("other", metrics={"precision": ceiling}, rank_metric="precision")
    more = record("more", metrics={"fd-digits": new()})
    for made in (item, other, more):
        write_record(made, tmp_path / "records")
    files = sorted((tmp_path / "records").glob("*.json"))
    render({"digits": [(f, read_record(f)) for f in files]}, tmp_path / "out")
    text = (tmp_path / "out" / "digits.md").read_text()
    assert text.count("Floor of ") == 1
    assert "Ceiling of" not in text
