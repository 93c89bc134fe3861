"""Images in an LMDB, as LSUN is published.

The file is read here and not by LMDB's library, which follows whatever page numbers and offsets a
file has and ends the process where they lead out of it. Layout: ``mdb.c`` of LMDB 0.9, 64 bits,
little-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cmbench.data.sources.archives import LARGEST_IMAGE, PlacedReader
from cmbench.data.sources.base import EncodedSource, Fingerprint, ImageIndex
from cmbench.files import regular

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEADER = 16
#: Flags of pages and of nodes.
_BRANCH, _LEAF, _BIG, _SUB_DATABASE = 0x01, 0x02, 0x01, 0x02
_NO_PAGE = 2**64 - 1
#: A tree of more levels has more keys than a file can hold.
_DEEPEST = 32
#: Pages that may be missing at the end of an intact database: its last change freed them.
_LOOSE_PAGES = 16
#: Bytes of a page: powers of two in this range.
_PAGES = (256, 65536)


class Tree(NamedTuple):
    """What a database says of itself: bytes of a page, its pages, entries and root page."""

    page: int
    pages: int
    entries: int
    root: int


class BrokenTree(ValueError):
    """The pages make no tree; the text says where."""


class Pages:
    """The pages of a database file. Whatever they say, nothing beyond the file is read."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(regular(path), os.O_RDONLY)
        self.size = os.fstat(self.file).st_size
        self.tree = self._newest()

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)

    def _newest(self) -> Tree:
        """Return what the newer of the two first pages says."""
        first = self._meta(0)
        second = self._meta(first[1].page) if first else None
        found = [meta for meta in (first, second) if meta]
        if not found:
            raise BrokenTree("its first page is none of an LMDB")
        return max(found, key=lambda meta: meta[0])[1]

    def _meta(self, offset: int) -> tuple[int, Tree] | None:
        data = os.pread(self.file, 136, _HEADER + offset)
        if len(data) < 136:
            return None
        magic, version, _, _, page = struct.unpack_from("<IIQQI", data)
        if (magic, version) != (_MAGIC, _VERSION):
            return None
        entries, root = struct.unpack_from("<QQ", data, 24 + 48 + 32)
        last, transaction = struct.unpack_from("<QQ", data, 24 + 96)
        if not _PAGES[0] <= page <= _PAGES[1] or page & (page - 1):
            raise BrokenTree(f"pages of {page} bytes")
        return transaction, Tree(page, last + 1, entries, root)

    def read(self, number: int) -> bytes:
        """Return a whole page."""
        data = os.pread(self.file, self.tree.page, self._place(number, self.tree.page))
        if len(data) < self.tree.page:
            raise BrokenTree(f"page {number} is cut off")
        return data

    def _place(self, number: int, size: int) -> int:
        if number >= self.tree.pages or number * self.tree.page + size > self.size:
            raise BrokenTree(f"page {number} lies outside the file")
        return number * self.tree.page

    def values(self) -> Iterator[tuple[bytes, int, int]]:
        """Yield key, place and size of each value, in the order of the keys."""
        if self.tree.root == _NO_PAGE:
            return
        seen = 0
        waiting = [(self.tree.root, 0)]
        while waiting:
            number, depth = waiting.pop()
            seen += 1
            if depth > _DEEPEST or seen * self.tree.page > self.size:
                raise BrokenTree("its pages lead back to one another")
            page = self.read(number)
            (flags, lower) = struct.unpack_from("<HH", page, 10)
            nodes = [self._node(page, at) for at in _pointers(page, lower)]
            if flags & _BRANCH:
                below = [low | high << 16 | kind << 32 for low, high, kind, *_ in nodes]
                waiting += [(child, depth + 1) for child in reversed(below)]
            elif flags & _LEAF:
                yield from (self._value(page, number, *node) for node in nodes)
            else:
                raise BrokenTree(f"page {number} is of an unknown kind")

    @staticmethod
    def _node(page: bytes, at: int) -> tuple[int, int, int, bytes, int]:
        """Return the three numbers of a node, its key, and where its data begin."""
        if at < _HEADER or at + 8 > len(page):
            raise BrokenTree("an entry lies outside its page")
        low, high, kind, length = struct.unpack_from("<HHHH", page, at)
        if at + 8 + length > len(page):
            raise BrokenTree("a key leaves its page")
        return low, high, kind, page[at + 8 : at + 8 + length], at + 8 + length

    def _value(
        self, page: bytes, number: int, low: int, high: int, kind: int, key: bytes, start: int
    ) -> tuple[bytes, int, int]:
        size = low | high << 16
        if kind & _SUB_DATABASE or size > LARGEST_IMAGE:
            raise BrokenTree(f"entry {key[:40]!r} is not an image")
        if not kind & _BIG:
            if start + size > len(page):
                raise BrokenTree("a value leaves its page")
            return key, number * self.tree.page + start, size
        if start + 8 > len(page):
            raise BrokenTree("an entry leaves its page")
        (first,) = struct.unpack_from("<Q", page, start)
        return key, self._place(first, _HEADER + size) + _HEADER, size


def _pointers(page: bytes, lower: int) -> tuple[int, ...]:
    """Return where the entries of a page begin."""
    if not _HEADER <= lower <= len(page):
        raise BrokenTree("a page has more entries than room")
    return struct.unpack_from(f"<{(lower - _HEADER) // 2}H", page, _HEADER)


class LmdbSource(EncodedSource):
    """Encoded images by key, in the database's own order, without labels."""

    kind = "lmdb"

    @property
    def file(self) -> Path:
        """The file of the database."""
        return self.path / "data.mdb" if self.path.is_dir() else self.path

    def index(self) -> ImageIndex:
        """Read all keys."""
        try:
            pages = Pages(self.file)
            try:
                self._require_whole(pages)
                found = list(pages.values())
                if len(found) != pages.tree.entries:
                    raise BrokenTree(f"{len(found):,} entries of {pages.tree.entries:,}")
            finally:
                pages.close()
        except BrokenTree as error:
            raise self.error(
                f"truncated or corrupt database ({error})",
                remedy="download it again and compare its size with the original's",
            ) from None
        if not found:
            raise self.error("is empty", remedy="give --source the folder that holds data.mdb")
        fingerprint = Fingerprint()
        fingerprint.add(*pages.tree, len(found), *found[0], *found[-1])
        names = [key.decode("utf-8", "backslashreplace") for key, _, _ in found]
        places = [(place, size) for _, place, size in found]
        return ImageIndex(names, places, None, fingerprint=fingerprint.value)

    def _require_whole(self, pages: Pages) -> None:
        """Raise if the file is shorter than its pages."""
        wanted, spare = pages.tree.pages * pages.tree.page, _LOOSE_PAGES * pages.tree.page
        if pages.size < wanted - spare:
            raise self.error(
                f"truncated database: data.mdb takes {pages.size:,} bytes",
                allowed=f"{wanted:,} by its own table",
                remedy="download it again and compare its size with the original's",
            )

    def reader(self) -> PlacedReader:
        """Open the database."""
        return PlacedReader(self.file)
