"""Merging folders of records."""

from __future__ import annotations

from pathlib import Path

import pytest
from record_factory import on_disk, png, record, with_artifact

from cmbench.bench.record import read_record
from cmbench.errors import UserError
from cmbench.leaderboard.merge import merge


def test_records_and_artifacts_come_together_once(tmp_path: Path) -> None:
    folder = tmp_path / "one" / "records" / "digits"
    first = with_artifact(folder, record("alpha"), "grid", "pictures/a.png", png())
    on_disk(folder, [first])
    on_disk(tmp_path / "two" / "digits", [record("alpha", artifacts=first.artifacts)])
    on_disk(tmp_path / "two" / "digits", [record("beta")])
    target = tmp_path / "all"
    result = merge([tmp_path / "one", tmp_path / "two"], target)
    cells = ["digits/digits-alpha-demo-nfe1-s0", "digits/digits-beta-demo-nfe1-s0"]
    assert sorted(result.added) == cells
    assert (target / "digits" / "pictures" / "a.png").read_bytes() == png()
    again = merge([tmp_path / "two"], target)
    assert (again.added, again.replaced, len(again.equal)) == ((), (), 2)


def test_conflicting_records_are_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    on_disk(tmp_path / "one" / "digits", [record("alpha", value=1.0), record("gamma")])
    on_disk(tmp_path / "two" / "digits", [record("alpha", value=2.0), record("beta")])
    target = tmp_path / "all"
    with pytest.raises(UserError) as caught:
        merge([tmp_path / "one", tmp_path / "two"], target)
    message = str(caught.value)
    assert "1 conflicting cell(s): digits/digits-alpha-demo-nfe1-s0 in " in message
    assert str(tmp_path / "one") in message
    assert str(tmp_path / "two") in message
    assert not target.exists()


def test_a_finished_record_replaces_a_failed_one(tmp_path: Path) -> None:
    failed = record("alpha", status="failed", reason="no memory", metrics={})
    target = tmp_path / "all"
    on_disk(target / "digits", [failed])
    on_disk(tmp_path / "one" / "digits", [record("alpha")])
    assert merge([tmp_path / "one"], target).replaced == ("digits/digits-alpha-demo-nfe1-s0",)
    path = target / "digits" / f"{failed.cell}.json"
    assert read_record(path).status == "finished"
    on_disk(tmp_path / "two" / "digits", [failed])
    assert merge([tmp_path / "two"], target).replaced == ()
    assert read_record(path).status == "finished"


def test_folders_without_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        merge([tmp_path / "nope"], tmp_path / "all")
    with pytest.raises(UserError, match="holds no records"):
        merge([tmp_path], tmp_path / "all")


def test_an_unreadable_record_is_left_out_and_listed(tmp_path: Path) -> None:
    on_disk(tmp_path / "one" / "digits", [record("alpha")])
    (tmp_path / "one" / "digits" / "torn.json").write_text("{")
    result = merge([tmp_path / "one"], tmp_path / "all")
    assert result.added == ("digits/digits-alpha-demo-nfe1-s0",)
    error, = result.unreadable
    assert "torn.json: is not JSON" in str(error)
    assert len(list((tmp_path / "all").rglob("*.json"))) == 1


def test_an_unreadable_record_of_the_target_is_not_replaced(tmp_path: Path) -> None:
    on_disk(tmp_path / "one" / "digits", [record("alpha"), record("beta")])
    later = tmp_path / "all" / "digits" / "digits-alpha-demo-nfe1-s0.json"
    later.parent.mkdir(parents=True)
    later.write_text('{"schema_version": 99}')
    result = merge([tmp_path / "one"], tmp_path / "all")
    assert result.added == ("digits/digits-beta-demo-nfe1-s0",)
    assert len(result.unreadable) == 1
    assert later.read_text() == '{"schema_version": 99}'


def test_only_what_the_sources_hold_is_counted(tmp_path: Path) -> None:
    on_disk(tmp_path / "all" / "digits", [record("alpha"), record("beta"), record("gamma")])
    on_disk(tmp_path / "one" / "digits", [record("alpha"), record("delta")])
    result = merge([tmp_path / "one"], tmp_path / "all")
    assert result.added == ("digits/digits-delta-demo-nfe1-s0",)
    assert result.equal == ("digits/digits-alpha-demo-nfe1-s0",)


def test_artifacts_that_leave_their_folder_are_not_copied(tmp_path: Path) -> None:
    folder = tmp_path / "one" / "digits"
    on_disk(folder, [with_artifact(folder, record("alpha"), "grid", "../../secret.png", png())])
    merge([tmp_path / "one"], tmp_path / "deep" / "all")
    assert [p.name for p in (tmp_path / "deep").rglob("*.png")] == []
