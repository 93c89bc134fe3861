"""Submission archives: what is in them, byte for byte, and each reason why one is refused."""

from __future__ import annotations

import json
import stat
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from record_factory import on_disk, record, sha, with_artifact
from test_verify_and_submit import honest, zipped

from cmbench import __version__
from cmbench.errors import UserError
from cmbench.leaderboard import submit
from cmbench.leaderboard.submit import MANIFEST, pack, unpack
from cmbench.records.record import read_record

AGAIN = "ask for the archive again; `cmbench submit` makes it"
Files = dict[str, bytes]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    pack([honest(tmp_path / "r", method=m) for m in ("beta", "alpha")], tmp_path / "a.zip")
    return tmp_path / "a.zip"


def files_of(path: Path) -> Files:
    with zipfile.ZipFile(path) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_what_an_archive_holds(archive: Path, tmp_path: Path) -> None:
    files = files_of(archive)
    cells = [f"records/digits/digits-{m}-demo-nfe1-s0.json" for m in ("alpha", "beta")]
    manifest = json.loads(files[MANIFEST])
    assert [entry["record"] for entry in manifest["entries"]] == cells
    assert manifest["cmbench"] == __version__
    assert manifest["schema_version"] == 1
    assert manifest["files"] == {n: sha(data) for n, data in files.items() if n != MANIFEST}
    for entry in manifest["entries"]:
        made = json.loads(files[entry["record"]])
        assert json.loads(files[entry["recipe"]]) == {
            "method": made["method"],
            "recipe": made["training"]["recipe"],
            "config": made["training"]["config"],
        }
        assert json.loads(files[entry["environment"]]) == made["environment"]
        assert entry["checkpoint_sha256"] == made["training"]["checkpoint_sha256"]
        assert entry["recipe"] == f"recipes/{sha(files[entry['recipe']])[:16]}.json"
        assert entry["environment"] == f"environments/{sha(files[entry['environment']])[:16]}.json"
    assert set(files) == {
        MANIFEST,
        "records/digits/a.png",
        *(entry[part] for entry in manifest["entries"] for part in entry if part[:5] != "check"),
    }


def test_the_bytes_depend_on_the_content_alone(archive: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        infos = opened.infolist()
    assert [i.filename for i in infos] == sorted(i.filename for i in infos)
    assert {i.date_time for i in infos} == {(1980, 1, 1, 0, 0, 0)}
    assert {i.compress_type for i in infos} == {zipfile.ZIP_DEFLATED}
    assert {stat.S_IMODE(i.external_attr >> 16) for i in infos} == {0o644}


def test_what_cannot_be_packed_says_what_to_do(tmp_path: Path) -> None:
    def refused(call: Callable[[], object]) -> str:
        with pytest.raises(UserError) as raised:
            call()
        return str(raised.value)

    target = tmp_path / "a.zip"
    assert refused(lambda: pack([], target)) == (
        "submit: no records given; give at least one finished cell"
    )
    failed = on_disk(tmp_path / "f", [record(status="failed", reason="why", metrics={})])[0][0]
    assert refused(lambda: pack([failed], target)) == (
        f"submit: record {failed} is failed: why; allowed: finished records; leave it out or "
        "measure the cell again"
    )
    path = honest(tmp_path / "r")
    name = f"records/digits/{path.stem}.json"
    assert refused(lambda: pack([path, path], target)) == (
        f"submit: two records are named {name}; give each record once"
    )
    made = with_artifact(tmp_path / "j", record("beta"), "grid", "A.JSON", b"{}")
    named = on_disk(tmp_path / "j", [made])[0][0]
    assert refused(lambda: pack([named], target)) == (
        "submit: artifact records/digits/A.JSON has the name of a record; allowed: pictures and "
        "curves; leave the record out"
    )
    target.touch()
    assert refused(lambda: pack([path], target)) == (
        f"submit: {target} already exists; choose another name"
    )


def test_records_that_share_an_artifact_are_packed(tmp_path: Path) -> None:
    """A curve belongs to every cell of a run."""
    for nfe in (1, 2):
        made = with_artifact(tmp_path, record(nfe=nfe), "curve", "curves/run.csv", b"nimg\n1\n")
        on_disk(tmp_path, [made])
    pack(sorted(tmp_path.glob("*.json")), tmp_path / "a.zip")
    assert files_of(tmp_path / "a.zip")["records/digits/curves/run.csv"] == b"nimg\n1\n"


def test_extracted_files_are_those_of_the_archive(archive: Path, tmp_path: Path) -> None:
    found = unpack(archive, tmp_path / "out")
    files = files_of(archive)
    assert found == [
        tmp_path / "out" / f"records/digits/digits-{m}-demo-nfe1-s0.json" for m in ("alpha", "beta")
    ]
    there = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert there == set(files)
    assert all((tmp_path / "out" / name).read_bytes() == data for name, data in files.items())
    assert read_record(found[0]).method == "alpha"


# ---- what is refused ----------------------------------------------------------------------------


def changed(files: Files, change: Callable[[dict[str, Any]], object]) -> Files:
    manifest = json.loads(files[MANIFEST])
    change(manifest)
    return files | {MANIFEST: json.dumps(manifest).encode()}


def refusal(files: Files, tmp_path: Path) -> str:
    path = zipped(tmp_path / "bad.zip", list(files.items()))
    with pytest.raises(UserError) as raised:
        unpack(path, tmp_path / "out")
    text = str(raised.value)
    start, end = f"submission {path}", f"; {AGAIN}"
    assert text.startswith(start)
    assert text.endswith(end)
    return text[len(start) : -len(end)].removeprefix(": ")


def test_what_the_manifest_and_the_files_disagree_on(archive: Path, tmp_path: Path) -> None:
    files = files_of(archive)
    first = json.loads(files[MANIFEST])["entries"][0]
    assert refusal(files | {"more": b"x"}, tmp_path) == "'more' is not in its manifest"
    spoilt = files | {"records/digits/a.png": b"x"}
    assert refusal(spoilt, tmp_path) == (
        "'records/digits/a.png' has another hash than its manifest says"
    )
    for part in ("record", "recipe", "environment"):
        lost = {k: v for k, v in files.items() if k != first[part]}
        assert refusal(lost, tmp_path) == f"{first[part]!r} of its manifest is missing"
        unlisted = changed(files, lambda m, part=part: m["entries"][0].update({part: "other"}))
        assert refusal(unlisted, tmp_path) == "'other' of its manifest is missing"
    assert refusal({k: v for k, v in files.items() if k != MANIFEST}, tmp_path) == (
        "has no manifest.json"
    )
    assert not (tmp_path / "out").exists()


def test_every_record_is_an_entry_once(archive: Path, tmp_path: Path) -> None:
    files = files_of(archive)
    first, second = json.loads(files[MANIFEST])["entries"]
    for entries, told in (
        ([], "has no records"),
        ([first], f"the record {second['record']!r} is not among its entries"),
        ([first, second, second], f"the record {second['record']!r} is twice among its entries"),
    ):
        made = changed(files, lambda m, entries=entries: m.update(entries=entries))
        assert refusal(made, tmp_path) == told
    for name in ("records/digits/hidden.json", "RECORDS/digits/hidden.JSON"):
        hidden = changed(files | {name: b"{}"}, lambda m, n=name: m["files"].update({n: sha("{}")}))
        assert refusal(hidden, tmp_path) == f"the record {name!r} is not among its entries"
    other = {"records/notes.txt": b"{}", "notes/a.json": b"{}"}
    fine = changed(files | other, lambda m: m["files"].update(dict.fromkeys(other, sha("{}"))))
    assert len(unpack(zipped(tmp_path / "fine.zip", list(fine.items())), tmp_path / "fine")) == 2


def test_entries_that_are_not_their_records(archive: Path, tmp_path: Path) -> None:
    files = files_of(archive)
    first, second = json.loads(files[MANIFEST])["entries"]
    name = first["record"]
    wrong = changed(files, lambda m: m["entries"][0].update(checkpoint_sha256="0" * 64))
    assert refusal(wrong, tmp_path) == f"the checkpoint hash of {name} is not the record's"
    recipe = changed(files, lambda m: m["entries"][0].update(recipe=second["recipe"]))
    assert refusal(recipe, tmp_path) == f"{second['recipe']} is not the recipe of {name}"
    other = changed(files, lambda m: m["entries"][0].update(environment=second["recipe"]))
    assert refusal(other, tmp_path) == f"{second['recipe']} is not the environment of {name}"


def test_limits_are_inclusive(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(archive)
    size = sum(map(len, files.values()))
    for name, limit in (("MAX_FILES", len(files)), ("MAX_BYTES", size)):
        monkeypatch.setattr(submit, name, limit)
        assert len(unpack(archive, tmp_path / name)) == 2
        monkeypatch.setattr(submit, name, limit - 1)
        told = f"holds more than {submit.MAX_FILES:,} files or {submit.MAX_BYTES:,} bytes"
        assert refusal(files, tmp_path) == told
        monkeypatch.undo()
    assert (submit.MAX_FILES, submit.MAX_BYTES) == (100_000, 2_147_483_648)


@pytest.mark.parametrize("name", ["..", "a/..", "/a", "a:b", "a\\b", "a/", "a\tb", "é\u200b"])
def test_names_that_are_not_allowed(archive: Path, tmp_path: Path, name: str) -> None:
    assert refusal({name: b""} | files_of(archive), tmp_path) == f"the name {name!r} is not allowed"


def test_a_name_that_is_a_file_and_a_folder_cannot_be_extracted(
    archive: Path, tmp_path: Path
) -> None:
    more = {"x": b"{}", "x/y": b"{}"}
    files = changed(
        files_of(archive) | more, lambda m: m["files"].update(dict.fromkeys(more, sha("{}")))
    )
    assert refusal(files, tmp_path).startswith("cannot be extracted (")


def test_a_header_that_lies_about_the_size_is_caught(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    with zipfile.ZipFile(archive) as opened:
        info = opened.getinfo("records/digits/a.png")
    true, false = (n.to_bytes(4, "little") for n in (info.file_size, info.file_size - 1))
    central = data.rindex(b"PK\x01\x02", 0, data.rindex(b"records/digits/a.png"))
    at = data.index(true, central)
    path = tmp_path / "bad.zip"
    path.write_bytes(data[:at] + false + data[at + 4 :])
    with pytest.raises(UserError, match=r"larger than its header says|is not a readable zip"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_large_archive_is_checked_in_blocks(tmp_path: Path) -> None:
    """A picture of 64 MiB beside a record never lies in memory as a whole."""
    pack([honest(tmp_path / "r")], tmp_path / "a.zip")
    files = files_of(tmp_path / "a.zip")
    large = bytes(64 << 20)
    manifest = json.loads(files[MANIFEST])
    manifest["files"]["records/digits/large.png"] = sha(large)
    files |= {MANIFEST: json.dumps(manifest).encode(), "records/digits/large.png": large}
    path = zipped(tmp_path / "b.zip", list(files.items()))
    del large, files
    tracemalloc.start()
    try:
        unpack(path, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "records" / "digits" / "large.png").stat().st_size == 64 << 20


def test_a_manifest_that_would_fill_the_memory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, b" " * (65 << 20))
    with pytest.raises(UserError, match=r"'manifest.json' takes 68,157,440 bytes"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
