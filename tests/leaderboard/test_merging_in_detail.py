"""Merging: which record of a cell is kept, in which order, and what each message says."""

from __future__ import annotations

from pathlib import Path

import pytest
from record_factory import on_disk, png, record, sha, with_artifact

from cmbench.errors import MissingError, UserError
from cmbench.leaderboard.merge import MergeResult, find_records, merge
from cmbench.records.record import Artifact, Record, read_record

CELL = "digits-alpha-demo-nfe1-s0"


def made(status: str, day: int, reason: str = "") -> Record:
    created = f"2026-01-{day:02d}T00:00:00+00:00"
    item = record("alpha", status=status, reason=reason, created=created)
    return item if status == "finished" else item.model_copy(update={"metrics": {}})


def placed(folder: Path, item: Record) -> Path:
    on_disk(folder / "digits", [item])
    return folder


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (("failed", 1), ("failed", 2), 2),
        (("failed", 2), ("failed", 1), 1),
        (("failed", 1), ("failed", 1), 1),
        (("failed", 1), ("skipped", 2), 2),
        (("failed", 2), ("finished", 1), 2),
        (("finished", 1), ("failed", 2), 1),
        (("skipped", 1), ("finished", 2), 2),
    ],
)
def test_which_record_of_a_cell_is_kept(
    tmp_path: Path, first: tuple[str, int], second: tuple[str, int], kept: int
) -> None:
    """``kept`` is 1 for the first source, 2 for the second."""
    sources = [
        placed(tmp_path / str(i), made(*which, reason=f"{i}"))
        for i, which in enumerate((first, second), start=1)
    ]
    merge(sources, tmp_path / "all")
    assert read_record(tmp_path / "all" / "digits" / f"{CELL}.json").reason == str(kept)


def test_what_was_done_is_told_by_cell(tmp_path: Path) -> None:
    target = tmp_path / "all"
    on_disk(target / "digits", [made("failed", 1), record("beta"), record("untouched")])
    source = tmp_path / "one"
    on_disk(source / "digits", [made("finished", 1), record("beta"), record("gamma")])
    on_disk(source / "gmm", [record("alpha", dataset="gmm")])
    result = merge([source], target)
    assert result == MergeResult(
        added=("digits/digits-gamma-demo-nfe1-s0", "gmm/gmm-alpha-demo-nfe1-s0"),
        equal=("digits/digits-beta-demo-nfe1-s0",),
        replaced=(f"digits/{CELL}",),
    )
    assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*.json")) == [
        f"digits/{CELL}.json",
        "digits/digits-beta-demo-nfe1-s0.json",
        "digits/digits-gamma-demo-nfe1-s0.json",
        "digits/digits-untouched-demo-nfe1-s0.json",
        "gmm/gmm-alpha-demo-nfe1-s0.json",
    ]


def test_where_records_are_looked_for(tmp_path: Path) -> None:
    item = record("alpha")
    (workspace,) = [p for p, _ in on_disk(tmp_path / "w" / "records" / "digits", [item])]
    (folder,) = [p for p, _ in on_disk(tmp_path / "f" / "digits", [item])]
    assert find_records(tmp_path / "w") == [workspace]
    assert find_records(tmp_path / "w" / "records") == [workspace]
    assert find_records(tmp_path / "f") == find_records(tmp_path / "f" / "digits") == [folder]
    on_disk(tmp_path / "w" / "digits", [item])
    assert find_records(tmp_path / "w") == [workspace], "a workspace's records, nothing else"
    missing = tmp_path / "missing"
    with pytest.raises(MissingError) as raised:
        find_records(missing)
    assert str(raised.value) == (
        f"merge: {missing} is not a folder; allowed: workspaces or folders of records; check the "
        "path"
    )
    with pytest.raises(UserError, match="is not a folder") as other:
        find_records(folder)
    assert type(other.value) is UserError
    with pytest.raises(UserError) as empty:
        find_records(tmp_path)
    assert str(empty.value) == f"merge: {tmp_path} has no records; check the path"


def test_every_conflict_is_named_with_both_files(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        on_disk(tmp_path / name / "digits", [record(m, value=value) for m in ("alpha", "beta")])
    with pytest.raises(UserError) as raised:
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "all")
    cells = [f"digits-{m}-demo-nfe1-s0" for m in ("alpha", "beta")]
    told = "; ".join(
        f"digits/{cell} in {tmp_path / 'one' / 'digits' / cell}.json and "
        f"{tmp_path / 'two' / 'digits' / cell}.json (metric fd-digits: 2 again, 1 stored, allowed "
        "±0.01 (1 %))"
        for cell in cells
    )
    assert str(raised.value) == (
        f"merge: 2 conflicting cell(s): {told}; records are immutable: keep one of each pair and "
        "move the other away"
    )
    assert merge([tmp_path / "one", tmp_path / "one"], tmp_path / "all").added == tuple(
        f"digits/{cell}" for cell in cells
    )


def test_a_record_under_another_name_is_told(tmp_path: Path) -> None:
    [(path, _)] = on_disk(tmp_path / "one" / "digits", [record("alpha")])
    other = path.rename(path.with_name("other.json"))
    (error,) = merge([tmp_path / "one"], tmp_path / "all").unreadable
    assert str(error) == (
        f"record {other}: has the cell {CELL!r}, which is not its name; allowed: {CELL}.json; "
        "rename the file, or delete it if it is a copy"
    )


# ---- artifacts ----------------------------------------------------------------------------------


def with_file(folder: Path, name: str, data: bytes, **fields: object) -> Path:
    item = with_artifact(folder / "digits", record(**fields), "curve", name, data)
    return placed(folder, item)


def conflict(sources: list[Path], target: Path) -> str:
    with pytest.raises(UserError) as raised:
        merge(sources, target)
    text = str(raised.value)
    end = "; keep the records of one of the machines and move the others away"
    assert text.endswith(end)
    return text.removesuffix(end)


def test_each_conflict_of_artifacts_is_told(tmp_path: Path) -> None:
    target = tmp_path / "all"
    one = with_file(tmp_path / "one", "c.csv", b"1")
    (target / "digits").mkdir(parents=True)
    (target / "digits" / "c.csv").write_bytes(b"stray")
    assert conflict([one], target) == (
        f"merge: 1 conflicting artifact(s): 'c.csv' of digits/{CELL} in "
        f"{one / 'digits' / 'c.csv'} differs from {target / 'digits' / 'c.csv'}"
    )
    assert not list(target.rglob("*.json")), "nothing is written"
    (target / "digits" / "c.csv").write_bytes(b"1")
    assert merge([one], target).added == (f"digits/{CELL}",), "the same bytes are no conflict"
    two = with_file(tmp_path / "two", "c.csv", b"2", nfe=2)
    assert conflict([two], target) == (
        "merge: 1 conflicting artifact(s): 'c.csv' of digits/digits-alpha-demo-nfe2-s0 in "
        f"{two / 'digits' / 'c.csv'} is another file than other records have"
    )
    named = with_file(tmp_path / "named", "x.JSON", b"{}", nfe=4)
    assert "'x.JSON' of digits/digits-alpha-demo-nfe4-s0 has the name of a record" in conflict(
        [named], target
    )
    (target / "digits" / "folder.csv").mkdir()
    there = with_file(tmp_path / "there", "folder.csv", b"1", nfe=8)
    assert "differs from" in conflict([there], target)


def test_why_artifacts_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "one" / "digits"
    artifacts = {
        "outside": Artifact(file="../a.png", sha256=sha(png())),
        "self": Artifact(file=".", sha256=sha(png())),
        "lost": Artifact(file="lost.png", sha256=sha(png())),
        "loop": Artifact(file="loop/x.png", sha256=sha(png())),
    }
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(png())
    on_disk(folder, [record("alpha", artifacts=artifacts)])
    (folder / "loop").symlink_to("loop")
    result = merge([tmp_path / "one"], tmp_path / "all")
    told = {text.partition(" of ")[0]: text.partition(": ")[2] for text in result.left_out}
    assert told == {
        "'../a.png'": "leaves its folder",
        "'.'": "leaves its folder",
        "'lost.png'": f"{folder / 'lost.png'} is missing or has another hash",
        "'loop/x.png'": "leaves its folder",
    }
    assert not list((tmp_path / "all").rglob("*.png"))


def test_a_merge_into_itself_changes_nothing(tmp_path: Path) -> None:
    one = with_file(tmp_path / "one", "c.csv", b"1")
    before = {p: p.stat().st_mtime_ns for p in one.rglob("*")}
    result = merge([one], one)
    assert (result.equal, result.added, result.left_out) == ((f"digits/{CELL}",), (), ())
    assert {p: p.stat().st_mtime_ns for p in one.rglob("*")} == before


def test_a_replaced_records_artifact_makes_no_conflict(tmp_path: Path) -> None:
    """The failed record's curve goes with it; what others want at its place is what counts."""
    target = with_file(tmp_path / "all", "c.csv", b"1", status="failed", metrics={})
    source = with_file(tmp_path / "one", "d.csv", b"2")
    assert merge([source], target).replaced == (f"digits/{CELL}",)
    assert (target / "digits" / "d.csv").read_bytes() == b"2"
    other = with_file(tmp_path / "two", "c.csv", b"1", nfe=2)
    assert merge([other], target).added == ("digits/digits-alpha-demo-nfe2-s0",)
