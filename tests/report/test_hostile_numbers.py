"""Records whose numbers and names are extreme: refused when read, or shown; never a crash."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_factory import metric, record, sha

from cmbench.errors import UserError
from cmbench.leaderboard.verify import verify_record
from cmbench.records.fields import LARGEST
from cmbench.records.folders import read_records
from cmbench.records.record import finite_or_none, read_record
from cmbench.report.render import render

Place = tuple[str | int, ...]
ARTIFACTS = {
    "grid": {"file": "a.png", "sha256": sha("a")},
    "curve": {"file": "c.csv", "sha256": sha("c")},
}


def template() -> dict[str, Any]:
    metrics = {
        "fd-digits": metric(
            1.0,
            standard_error=0.1,
            interval=(0.9, 1.1),
            detail={"floor": 0.8, "infinity": {"value": 1.0, "interval": [0.9, 1.1]}},
        )
    }
    data: dict[str, Any] = json.loads(record(metrics=metrics).to_json())
    return copy.deepcopy({**data, "artifacts": ARTIFACTS})


def numbers(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every place of the record that holds a number."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, (*place, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from numbers(inner, (*place, index))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield place


NUMBERS = list(numbers(template()))
EXTREME = st.one_of(
    st.sampled_from(
        [
            0,
            -1,
            2**53,
            2**53 + 1,
            2**64,
            10**400,
            -(10**400),
            1e50,
            -1e50,
            1.7e308,
            -1.7e308,
            5e-324,
            1e-200,
            sys.float_info.max,
        ]
    ),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
)


def changed(data: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    inner: Any = data
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    return data


def written(folder: Path, items: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(items):
        text = json.dumps({**data, "cell": f"cell-{index}"})
        (folder / f"cell-{index}.json").write_text(text)
    return folder


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(NUMBERS), EXTREME), min_size=1, max_size=3))
def test_numbers_are_refused_or_shown(changes: list[tuple[Place, Any]]) -> None:
    items = [template() for _ in range(3)]
    for seed, data in enumerate(items):
        data["training"]["seed"] = seed
    for index, (place, value) in enumerate(changes):
        changed(items[index], place, value)
    with TemporaryDirectory() as name:
        folder = written(Path(name) / "digits", items)
        render({"digits": read_records(folder)}, Path(name) / "out")
        for path in folder.glob("*.json"):
            verify_record(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("training", "parameters"), 10**400),
        (("training", "images_seen"), 10**400),
        (("environment", "world_size"), 10**400),
        (("training", "parameters"), -1),
        (("metrics", "fd-digits", "detail", "floor"), 10**400),
        (("metrics", "fd-digits", "value"), 1.7e308),
        (("metrics", "fd-digits", "value"), -1e200),
        (("training", "seconds_by_phase", "train"), 1e308),
        (("artifacts", "grid", "file"), "a\0b.png"),
        (("training", "run"), "a\0b"),
    ],
)
def test_what_no_reader_can_bear_is_refused_by_file_and_place(
    tmp_path: Path, place: Place, value: Any
) -> None:
    folder = written(tmp_path / "digits", [changed(template(), place, value)])
    with pytest.raises(UserError, match=r"cell-0\.json"):
        read_record(folder / "cell-0.json")
    render({"digits": read_records(folder)}, tmp_path / "out")


def test_a_loop_of_links_beside_a_record_costs_its_picture_only(tmp_path: Path) -> None:
    folder = written(tmp_path / "digits", [template()])
    (folder / "a.png").symlink_to("a.png")
    (folder / "c.csv").symlink_to("c.csv")
    render({"digits": read_records(folder)}, tmp_path / "out")
    page = (tmp_path / "out" / "digits.html").read_text()
    assert page.count("cannot be read") == 2
    assert {c.name: c.state for c in verify_record(folder / "cell-0.json")}["record"] == "ok"


def test_numbers_that_no_record_holds_become_none() -> None:
    assert finite_or_none(LARGEST) == LARGEST
    for value in (2 * LARGEST, float("inf"), float("nan"), None):
        assert finite_or_none(value) is None
