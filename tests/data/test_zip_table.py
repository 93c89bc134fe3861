"""The fast reader of a zip's table agrees with ``zipfile`` on every archive."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmbench.data.sources import zip_table
from cmbench.data.sources.zip_table import Member, read_members

NAMES = st.text(
    st.characters(exclude_characters="\0\\", exclude_categories=["Cs"]), min_size=1, max_size=20
)


def by_zipfile(path: Path) -> list[Member]:
    with zipfile.ZipFile(path) as archive:
        return [
            (
                i.filename,
                i.header_offset,
                i.compress_size,
                i.file_size,
                i.CRC,
                i.compress_type,
                i.flag_bits,
            )
            for i in archive.infolist()
            if not i.is_dir()
        ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.dictionaries(NAMES, st.binary(max_size=50), max_size=8),
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]),
    comment=st.binary(max_size=30),
    before=st.binary(max_size=30),
)
def test_it_agrees_with_zipfile(
    tmp_path: Path, members: dict[str, bytes], method: int, comment: bytes, before: bytes
) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(before)
    with zipfile.ZipFile(path, "a", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.comment = comment
    assert read_members(path) == by_zipfile(path)


def test_members_are_read_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/", "")
        archive.writestr("a/plain.png", b"123")
        archive.writestr("a/übel.png", b"12345", zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zip_table.zipfile, "ZipFile", None)  # asking it would fail
    names = {m[0]: m[3] for m in read_members(path)}
    assert names == {"a/plain.png": 3, "a/übel.png": 5}


def wide_archive(path: Path, *, with_extra: bool = True) -> int:
    """Write a table of one member beyond 4 GiB of a sparse file, in the format's 64-bit fields."""
    offset, size = 5 << 30, 7
    extra = struct.pack("<HHHHQ", 0x7075, 0, 1, 8, offset) if with_extra else b""
    row = (
        struct.pack(
            "<4s6H3L5H2L",
            b"PK\x01\x02",
            45,
            45,
            0,
            0,
            0,
            33,
            1234,
            size,
            size,
            5,
            len(extra),
            0,
            0,
            0,
            0,
            0xFFFFFFFF,
        )
        + b"b.png"
        + extra
    )
    start = offset + 100
    end = start + len(row)
    with open(path, "wb") as file:
        file.seek(start)
        file.write(row)
        file.write(
            struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, len(row), start)
        )
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        file.write(
            struct.pack(
                "<4sHHHHLLH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0
            )
        )
    return offset


def test_archives_beyond_four_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zip"
    offset = wide_archive(path)
    assert by_zipfile(path) == [("b.png", offset, 7, 7, 1234, 0, 0)]
    monkeypatch.setattr(zip_table.zipfile, "ZipFile", None)
    assert read_members(path) == [("b.png", offset, 7, 7, 1234, 0, 0)]


def test_a_missing_64_bit_field_is_what_zipfile_says_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    wide_archive(path, with_extra=False)
    assert read_members(path) == by_zipfile(path)


def test_damage_anywhere_in_the_table_is_judged_by_zipfile(tmp_path: Path) -> None:
    """Whatever a byte of table or end is changed to: the same members, or the same refusal."""
    path, damaged = tmp_path / "a.zip", tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"123")
        archive.writestr("b.png", b"12345", zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    for place in range(whole.find(b"PK\x01\x02"), len(whole)):
        for flip in (1, 0x80, 0xFF):
            changed = bytearray(whole)
            changed[place] ^= flip
            damaged.write_bytes(changed)
            try:
                wanted: object = by_zipfile(damaged)
            except Exception as error:
                wanted = type(error)
            try:
                found: object = read_members(damaged)
            except Exception as error:
                found = type(error)
            assert found == wanted, (place, flip)


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"123")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(zipfile.BadZipFile):
            read_members(path)
