"""The table of contents of a zip, five times faster than ``zipfile`` reads it.

An archive of 60,000 pictures of 32x32 pixels costs a tenth of their decoding to list with
``zipfile``. Here the ordinary case is read directly; whatever is out of the ordinary (a comment,
something before the archive, a damaged table) goes to ``zipfile``, which judges and explains it.
"""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

#: A member: name, offset of its local header, packed size, size, CRC, method, flags. A plain tuple:
#: one for each image goes to a worker.
Member = tuple[str, int, int, int, int, int, int]

#: A row of the table without what is not used: magic, version needed, flags, method, CRC, packed
#: size, size, lengths of name, extra field and comment, offset of the local header.
_ROW = struct.Struct("<4s2xHHH4xLLLHHH8xL")
_MAGIC = b"PK\x01\x02"
#: End of the table: magic, disks, rows here and in all, bytes and offset of the table, comment.
_END = struct.Struct("<4sHHHHLLH")
_END64 = struct.Struct("<4sQHHLLQQQQ")
_LOCATOR64 = struct.Struct("<4sLQL")
_UTF8 = 0x800
#: The version of the format that ``zipfile`` knows.
_VERSION = 63
#: What stands in a field whose value is in the extra field of 64-bit numbers, and that field's id.
_IN_EXTRA, _EXTRA64 = 0xFFFFFFFF, 1


class _Unusual(Exception):
    """The archive is not the ordinary case."""


def read_members(path: Path) -> list[Member]:
    """Return the members of a zip in the order of its table, folders left out.

    Raises what ``zipfile.ZipFile`` raises.
    """
    with open(path, "rb") as file:
        try:
            return _rows(*_table(file))
        except (_Unusual, struct.error, UnicodeDecodeError):
            with zipfile.ZipFile(file) as archive:
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


def _table(file: BinaryIO) -> tuple[bytes, int]:
    """Return the bytes of the table and the number of its rows."""
    end = file.seek(0, os.SEEK_END) - _END.size
    if end < 0:
        raise _Unusual
    magic, disk, first_disk, here, count, size, offset, comment = _at(file, end, _END)
    if magic != b"PK\x05\x06" or disk or first_disk or here != count or comment:
        raise _Unusual
    locator = end - _LOCATOR64.size
    if locator >= _END64.size:
        magic, disk, place, disks = _at(file, locator, _LOCATOR64)
        if magic == b"PK\x06\x07":
            end = locator - _END64.size
            if place != end or disk or disks > 1:
                raise _Unusual
            magic, rest, _, _, _, _, _, count, size, offset = _at(file, end, _END64)
            if magic != b"PK\x06\x06" or rest != _END64.size - 12:
                raise _Unusual
    if offset + size != end:
        raise _Unusual
    file.seek(offset)
    return file.read(size), count


def _at(file: BinaryIO, offset: int, form: struct.Struct) -> tuple[Any, ...]:
    file.seek(offset)
    return form.unpack(file.read(form.size))


def _rows(table: bytes, count: int) -> list[Member]:
    """Return the members that a table lists."""
    found: list[Member] = []
    unpack, head, position, end = _ROW.unpack_from, _ROW.size, 0, len(table)
    for _ in range(count):
        magic, version, flags, method, crc, packed, size, n, extra, comment, offset = unpack(
            table, position
        )
        stop = position + head + n
        raw = table[position + head : stop]
        position = stop + extra + comment
        if magic != _MAGIC or version > _VERSION or position > end or b"\0" in raw:
            raise _Unusual
        # ASCII is the same in both encodings, and cp437 takes long to decode.
        name = raw.decode("ascii" if raw.isascii() else "utf-8" if flags & _UTF8 else "cp437")
        if extra and _IN_EXTRA in (size, packed, offset):
            size, packed, offset = _wide(table[stop : stop + extra], size, packed, offset)
        if not name.endswith("/"):
            found.append((name, offset, packed, size, crc, method, flags))
    if position != end:
        raise _Unusual
    return found


def _wide(extra: bytes, *values: int) -> list[int]:
    """Return ``values`` with those that did not fit in 32 bits taken from the extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        position += 4
        if kind == _EXTRA64:
            left = iter(struct.unpack_from(f"<{length // 8}Q", extra, position))
            try:
                return [next(left) if value == _IN_EXTRA else value for value in values]
            except StopIteration:
                break
        position += length
    raise _Unusual
