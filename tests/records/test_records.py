"""Records: they survive a round trip, are never changed, and are not trusted when they are read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cmbench.errors import UserError
from cmbench.records.fields import LARGEST
from cmbench.records.folders import read_records
from cmbench.records.record import (
    DatasetRecord,
    EnvironmentRecord,
    MetricRecord,
    PluginRecord,
    Record,
    SamplingRecord,
    TrainingRecord,
    finite_or_none,
    read_record,
    write_record,
)

FINITE = st.floats(-LARGEST, LARGEST)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | FINITE | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,30}", fullmatch=True)


def record(**fields: Any) -> Record:
    base: dict[str, Any] = {
        "cell": "m-demo-s0-nfe1-0123456789",
        "status": "finished",
        "created": "2026-01-01T00:00:00+00:00",
        "method": "m",
        "plugin": PluginRecord(name="p", distribution="d", version="1"),
        "dataset": DatasetRecord(name="digits"),
        "training": TrainingRecord(
            run="digits/m-demo-s0-0",
            seed=0,
            recipe="demo",
            config={"lr": 1e-3},
            config_sha256="0",
            parameters=3,
            images_seen=7,
        ),
        "sampling": SamplingRecord(nfe=1, seed=0, num_samples=2, protocol_samples=2, batch_size=2),
        "metrics": {"fd": MetricRecord(value=1.5, higher_is_better=False, key="fd|digits")},
        "environment": EnvironmentRecord(cmbench="0", python="3"),
    }
    return Record(**(base | fields))


@given(
    cell=NAMES,
    method=NAMES,
    reason=TEXT,
    value=st.none() | FINITE,
    detail=st.dictionaries(TEXT, JSON),
    interval=st.none() | st.tuples(FINITE, FINITE),
    config=st.dictionaries(TEXT, JSON),
    times=st.lists(FINITE),
    warnings=st.lists(TEXT),
    status=st.sampled_from(["finished", "failed"]),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    cell: str,
    method: str,
    reason: str,
    value: float | None,
    detail: dict[str, Any],
    interval: tuple[float, float] | None,
    config: dict[str, Any],
    times: list[float],
    warnings: list[str],
    status: Any,
) -> None:
    metric = MetricRecord(
        value=value, higher_is_better=True, key="k", interval=interval, detail=detail
    )
    made = record(cell=cell, method=method, reason=reason, status=status, warnings=warnings)
    made = made.model_copy(
        update={
            "metrics": {"x": metric},
            "training": made.training.model_copy(update={"config": config}),
            "sampling": made.sampling.model_copy(update={"sigmas": times}),
        }
    )
    path = write_record(made, tmp_path_factory.mktemp("r"))
    assert path.name == f"{cell}.json"
    assert read_record(path) == made
    assert read_record(path).sha256 == made.sha256
    assert path.read_text(encoding="utf-8") == made.to_json()


def test_records_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        record().status = "failed"  # type: ignore[misc]


def test_a_finished_record_is_never_changed(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(UserError) as raised:
        write_record(record(reason="better"), tmp_path)
    assert str(raised.value) == (
        f"record {path}: is already finished and records are immutable; use another workspace, or "
        "move the file away to measure the cell again"
    )
    assert path.read_bytes() == before


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_a_failed_or_skipped_record_gives_way_to_a_later_attempt(
    tmp_path: Path, status: Any
) -> None:
    write_record(record(status=status, reason="why"), tmp_path)
    path = write_record(record(), tmp_path)
    assert read_record(path).status == "finished"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        MetricRecord(value=value, higher_is_better=True, key="k")
    with pytest.raises(ValidationError, match="finite number"):
        record(sampling=record().sampling.model_dump() | {"seconds": value})
    detail = MetricRecord(value=1, higher_is_better=True, key="k", detail={"x": value})
    assert '"x": null' in record(metrics={"m": detail}).to_json()
    assert finite_or_none(value) is None
    assert finite_or_none(2.0) == 2.0
    assert finite_or_none(None) is None


# ---- untrusted ----------------------------------------------------------------------------------


def refused(folder: Path, text: str | bytes) -> str:
    path = folder / "r.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as raised:
        read_record(path)
    line = str(raised.value)
    assert line.startswith(f"record {path}: ")
    assert "\n" not in line
    return line.removeprefix(f"record {path}: ")


def changed(*path: str | int, value: Any) -> str:
    data = json.loads(record().to_json())
    inner = data
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "is not JSON (Expecting value"),
        (record().to_json()[:-20], "is not JSON ("),
        ("[" * 100_000, "is not JSON ("),
        (b"\xff\xfe", "cannot be read ("),
        (changed("reason", value=float("nan")), "is not JSON (NaN is not allowed)"),
        (
            changed("metrics", "fd", "value", value=0)
            .replace("0.0", "0")
            .replace('"value": 0', '"value": 1e999'),
            "is not JSON (1e999 is too large",
        ),
        ("[]", "is not a JSON object; check the file"),
        ("{}", "has schema version None; allowed: 1 to 4; update cmbench"),
        (changed("schema_version", value=5), "has schema version 5; allowed: 1 to 4; update"),
        (changed("schema_version", value="1"), "has schema version '1'"),
        (changed("surprise", value=1), "field 'surprise': Extra inputs are not permitted"),
        (changed("metrics", "fd", "hint", value=1), "field 'metrics.fd.hint': Extra inputs"),
        (changed("status", value="perfect"), "field 'status': Input should be 'finished', "),
        (changed("cell", value="../up"), "field 'cell': String should match pattern"),
        (changed("cell", value="a\n"), "field 'cell': String should match pattern"),
        (changed("method", value="<b>"), "field 'method': String should match pattern"),
        (changed("dataset", "name", value=""), "field 'dataset.name': String should match"),
        (changed("sampling", "nfe", value="many"), "field 'sampling.nfe': Input should be a valid"),
        (changed("reason", value="\ud800"), "is not JSON ('utf-8' codec can't encode"),
    ],
)
def test_a_bad_file_names_file_and_field(tmp_path: Path, text: str | bytes, found: str) -> None:
    line = refused(tmp_path, text)
    assert line.startswith(found)


def test_a_folder_or_nothing_in_a_records_place(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for name in ("folder.json", "missing.json"):
        with pytest.raises(UserError, match=r"cannot be read .*check the file"):
            read_record(tmp_path / name)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    refused(tmp_path_factory.mktemp("r"), data)


@given(data=st.data())
def test_any_change_of_a_value_is_read_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    table = copy.deepcopy(json.loads(record().to_json()))
    inner = table
    while True:
        key = data.draw(st.sampled_from(sorted(inner)))
        if not isinstance(inner[key], dict) or not inner[key] or data.draw(st.booleans()):
            break
        inner = inner[key]
    inner[key] = data.draw(JSON)
    path = tmp_path_factory.mktemp("r") / "r.json"
    path.write_text(json.dumps(table))
    ((_, found),) = read_records(path.parent)
    assert found.to_json() if isinstance(found, Record) else "\n" not in str(found)


def test_a_folder_of_records_yields_each_or_its_error(tmp_path: Path) -> None:
    write_record(record(cell="b"), tmp_path)
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "notes.txt").write_text("not a record")
    (tmp_path / ".c.json.1.tmp").write_text("cut off")
    found = list(read_records(tmp_path))
    assert [path.name for path, _ in found] == ["a.json", "b.json"]
    assert [type(f) for _, f in found] == [UserError, Record]


# ---- snapshots of a reconstructed average --------------------------------------------------------


def with_snapshots(snapshots: object) -> Record:
    base = record().model_dump(mode="json")
    base["training"]["snapshots"] = snapshots
    return Record.model_validate(base)


def test_snapshots_are_kept(tmp_path: Path) -> None:
    named = with_snapshots({"00000000002048.safetensors": "a" * 64})
    assert read_record(write_record(named, tmp_path)) == named


# ---- version 1 -----------------------------------------------------------------------------------

OLD_RECORDS = sorted((Path(__file__).parents[2] / "leaderboards" / "digits").rglob("*nfe2*.json"))


@pytest.mark.parametrize("path", OLD_RECORDS[:3], ids=lambda path: path.name)
def test_a_record_of_version_1_is_read_and_keeps_its_bytes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    old = read_record(path)
    assert (old.schema_version, json.loads(text)["schema_version"]) == (1, 1)
    assert old.sampling.sigmas == json.loads(text)["sampling"]["times"]
    assert len(old.sampling.sigmas) == 2
    assert old.first_samples is None
    assert old.to_json() == text


def test_a_record_of_version_1_with_snapshots_keeps_its_bytes(tmp_path: Path) -> None:
    old = with_snapshots({"a.safetensors": "a" * 64}).model_copy(update={"schema_version": 1})
    path = write_record(old, tmp_path)
    assert read_record(path).to_json() == path.read_text(encoding="utf-8")
    assert read_record(path).training.snapshots == {"a.safetensors": "a" * 64}


# ---- snapshots of a reconstructed average: what is refused ---------------------------------------


@pytest.mark.parametrize(
    "snapshots", [{"../x": "a" * 64}, {"a/b": "a" * 64}, {"a": "A" * 64}, {"a": "b"}, ["a"], "a"]
)
def test_snapshots_name_files_and_hashes(snapshots: object) -> None:
    with pytest.raises(ValidationError, match="snapshots"):
        with_snapshots(snapshots)
