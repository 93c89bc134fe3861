"""Merging folders of records."""

from __future__ import annotations

from pathlib import Path

import pytest
from record_factory import on_disk, png, record, with_artifact

from cmbench.errors import UserError
from cmbench.leaderboard.merge import merge
from cmbench.records.record import Artifact, read_record


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


@pytest.mark.parametrize("status", ["failed", "skipped"])
@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
def test_of_two_unfinished_records_the_later_one_is_kept(
    tmp_path: Path, status: str, order: tuple[str, str]
) -> None:
    for name, day in (("old", 1), ("new", 2)):
        made = record("alpha", status=status, reason=name, metrics={})
        made = made.model_copy(update={"created": f"2026-01-0{day}T00:00:00+00:00"})
        on_disk(tmp_path / name / "digits", [made])
    path = tmp_path / "all" / "digits" / "digits-alpha-demo-nfe1-s0.json"
    merge([tmp_path / name for name in order], tmp_path / "all")
    assert read_record(path).reason == "new"
    for name in order:  # one after the other as well
        merge([tmp_path / name], tmp_path / "each")
    assert read_record(tmp_path / "each" / "digits" / path.name).reason == "new"


def test_folders_without_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        merge([tmp_path / "nope"], tmp_path / "all")
    with pytest.raises(UserError, match="has no records"):
        merge([tmp_path], tmp_path / "all")


def test_an_unreadable_record_is_left_out_and_listed(tmp_path: Path) -> None:
    on_disk(tmp_path / "one" / "digits", [record("alpha")])
    (tmp_path / "one" / "digits" / "torn.json").write_text("{")
    result = merge([tmp_path / "one"], tmp_path / "all")
    assert result.added == ("digits/digits-alpha-demo-nfe1-s0",)
    (error,) = result.unreadable
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


def test_one_curve_measured_on_two_machines_is_a_conflict(tmp_path: Path) -> None:
    for name, nfe, curve in (("one", 1, b"nimg,loss\n1,2\n"), ("two", 2, b"nimg,loss\n1,3\n")):
        folder = tmp_path / name / "digits"
        made = with_artifact(folder, record("alpha", nfe=nfe), "curve", "curves/run.csv", curve)
        on_disk(folder, [made])
    target = tmp_path / "all"
    merge([tmp_path / "one"], target)
    for sources in ([tmp_path / "two"], [tmp_path / "one", tmp_path / "two"]):
        with pytest.raises(UserError, match=r"artifact.*run\.csv.*nfe2") as caught:
            merge(sources, target)
        assert str(tmp_path / "two") in str(caught.value)
    assert (target / "digits/curves/run.csv").read_bytes() == b"nimg,loss\n1,2\n"
    assert len(list((target / "digits").glob("*.json"))) == 1
    with pytest.raises(UserError, match="2 conflicting artifact"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_an_artifact_cannot_replace_another_record(tmp_path: Path) -> None:
    victim = record("alpha")
    target = tmp_path / "all"
    on_disk(target / "digits", [victim])
    folder = tmp_path / "one" / "digits"
    bad = Artifact(file=f"{victim.cell}.json", sha256="0" * 64)
    on_disk(folder, [record("beta", artifacts={"grid": bad})])
    with pytest.raises(UserError, match="has the name of a record"):
        merge([folder], target)
    assert read_record(target / "digits" / f"{victim.cell}.json") == victim


def test_only_the_artifact_that_was_measured_is_copied(tmp_path: Path) -> None:
    folder = tmp_path / "one" / "digits"
    on_disk(folder, [with_artifact(folder, record("alpha"), "grid", "a.png", png())])
    (folder / "a.png").write_bytes(b"another")
    result = merge([folder], tmp_path / "all")
    assert len(result.added) == 1
    assert "a.png is missing or has another hash" in result.left_out[0]
    assert not (tmp_path / "all/digits/a.png").exists()


def test_records_named_after_another_cell_are_left_out(tmp_path: Path) -> None:
    [(path, _)] = on_disk(tmp_path / "one" / "digits", [record("alpha")])
    path.rename(path.with_name("other.json"))
    result = merge([tmp_path / "one"], tmp_path / "all")
    assert result.added == ()
    assert "other.json: has the cell 'digits-alpha" in str(result.unreadable[0])
