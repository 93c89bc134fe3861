"""Folders of records: copies, hidden files, records of other datasets, and hostile ones."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmbench.errors import UserError
from cmbench.files import DEEPEST, FormatError, parse_json
from cmbench.records.folders import read_cell, read_records
from cmbench.records.record import Record
from cmbench.records.workspace import Workspace

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from record_factory import on_disk, record


@pytest.fixture
def folder(workspace: Workspace) -> Path:
    """A dataset's folder with one record."""
    place = workspace.records("digits")
    on_disk(place, [record("alpha", seed=0), record("alpha", seed=1)])
    return place


def rows(found: Any) -> list[dict[str, str]]:
    data: list[dict[str, str]] = json.loads(found.out)
    return data


def test_a_copy_under_another_name_is_told_and_does_not_count(
    cmbench: Callable[..., Any], folder: Path
) -> None:
    (first, *_) = sorted(folder.glob("*.json"))
    shutil.copy(first, folder / "copy of it.json")
    found = cmbench("report")
    assert found.code == 1
    assert "which is not its name; allowed" in found.err
    assert "delete it if it is a copy" in found.err
    (row,) = rows(cmbench("export", "json"))
    assert row["seeds"] == 2
    assert len(row["cells"].split()) == 2


def test_hidden_files_are_passed_over_and_said_once(
    cmbench: Callable[..., Any], folder: Path, workspace: Workspace
) -> None:
    for name in ("._a.json", "._b.json"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    (workspace.all_records / ".trash").mkdir()
    for verb in (("report",), ("status",), ("export", "json"), ("compare", "alpha", "alpha")):
        found = cmbench(*verb)
        assert found.code == 0, found.err
        assert found.err.count("not read: 2 hidden file(s), such as ._a.json") == 1
    target = workspace.root / "merged"
    assert cmbench("merge", str(workspace.root), "--workspace", str(target)).code == 0
    assert not list(target.rglob(".*"))


def test_a_record_in_another_datasets_folder_is_told(
    cmbench: Callable[..., Any], folder: Path, workspace: Workspace
) -> None:
    strange = record("beta", dataset="gmm")
    on_disk(folder, [strange])
    found = cmbench("report")
    assert found.code == 1
    assert "is of dataset 'gmm'; allowed: records of 'digits' in this folder; move it" in found.err
    assert "beta" not in (workspace.reports / "digits.csv").read_text()
    with pytest.raises(UserError, match="is of dataset 'gmm'"):
        read_cell(folder / f"{strange.cell}.json", "digits")


@pytest.mark.parametrize("depth", [260, 900, 100_000])
def test_one_deeply_nested_record_costs_one_line(
    cmbench: Callable[..., Any], folder: Path, depth: int
) -> None:
    (first, *_) = sorted(folder.glob("*.json"))
    data = json.loads(first.read_text())
    data["cell"] = "x"
    data["metrics"]["fd-digits"]["detail"] = {"deep": "HERE"}
    text = json.dumps(data).replace('"HERE"', '{"a":' * depth + "1" + "}" * depth)
    (folder / "x.json").write_text(text)
    for verb in (("report",), ("export", "json", "--cells"), ("status",)):
        found = cmbench(*verb)
        assert found.code == 1
        assert len([line for line in (found.err + found.out).splitlines() if "x.json" in line]) == 1
    assert len([r for _, r in read_records(folder) if isinstance(r, Record)]) == 2


def test_depth_is_limited_where_it_is_said_to_be() -> None:
    good = "[" * DEEPEST + "]" * DEEPEST
    parse_json(good)
    with pytest.raises(FormatError, match=f"more than {DEEPEST} levels"):
        parse_json(f"[{good}]")


def test_verify_takes_folders_and_notices_where_a_record_lies(
    cmbench: Callable[..., Any], folder: Path, workspace: Workspace
) -> None:
    for place in (workspace.root, workspace.all_records, folder):
        found = cmbench("verify", str(place), "--no-resample")
        assert found.out.count("record: valid") == 2
        assert "folder:" not in found.out
    moved = workspace.records("gmm")
    moved.mkdir()
    shutil.copy(next(folder.glob("*.json")), moved)
    found = cmbench("verify", str(moved), "--no-resample")
    assert found.code == 1
    assert "failed       folder: the record belongs to digits, but is stored under gmm" in found.out
    empty = workspace.root / "empty"
    empty.mkdir()
    assert f"cmbench verify: {empty} has no records" in cmbench("verify", str(empty)).err
