"""Images in zip and tar archives.

A zip is read at random, through a memory map. A tar is read at random too; a compressed one is
unpacked once into a spool file next to the dataset.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import mmap
import os
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from cmbench.data.sources.base import (
    TABLE,
    EncodedSource,
    Fingerprint,
    FolderLabels,
    ImageIndex,
    ImageSource,
    default_split,
    labels_from_folders,
    labels_from_json,
    why_passed_over,
)
from cmbench.errors import UserError, described, first_names
from cmbench.files import parse_json, readable, reading, regular

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
_OPENERS = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open, b"BZ": bz2.open}
TRUNCATED = (EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


#: A member of a zip: name, offset of its local header, packed size, size, CRC, method, flags. A
#: plain tuple: one for each image goes to a worker.
ZipMember = tuple[str, int, int, int, int, int, int]

#: Bytes of an encoded image, at most, and of its row in a table of labels.
LARGEST_IMAGE = 256 << 20
_TABLE_ROW = 1000
_REPACK = "repack the archive with `zip -0`"
#: Bytes that unpacking leaves free on the disk, and how many it writes between two checks.
_SPARE, _STRIDE = 256 << 20, 16 << 20


def truncated(source: ImageSource, error: BaseException, name: str = "") -> UserError:
    """Return the error for an archive (or its file ``name``) that cannot be read to its end."""
    what = f"{name} is a truncated" if name else "truncated"
    return source.error(
        f"{what} or corrupt archive ({described(error, 120)})",
        remedy="download it again and compare its size and hash with the original's",
    )


def enter_split(names: Sequence[str], split: str, source: ImageSource) -> tuple[str, str]:
    """Return the folder (with its ``/``) whose images are taken, and the split that it is.

    A single folder around everything is entered; then the split asked for, or ``train`` if there is
    one and no other folders than splits.
    """
    prefix, chosen = "", ""
    while True:
        inner = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        tops = {name.partition("/")[0] for name in inner}
        wanted = split or default_split(n.partition("/")[0] for n in inner if "/" in n)
        if wanted in tops and not chosen:
            prefix, chosen = f"{prefix}{wanted}/", wanted
        elif len(tops) == 1 and any("/" in name for name in inner):
            prefix = f"{prefix}{min(tops)}/"
        else:
            break
    if split and not chosen:
        raise source.error(
            f"has no folder {split!r}",
            allowed=first_names(sorted(map(readable, tops)), 20),
            remedy="give --split one of them",
        )
    return prefix, chosen


def select_images(
    source: EncodedSource, members: Iterable[str], *, labelled: bool
) -> tuple[list[str], str, Counter[str]]:
    """Return the names of the images to take, the folder they lie in, and what is passed over.

    Raises ``UserError`` if there is no image. A ``labelled`` archive is taken whole; another one is
    entered by :func:`enter_split`, which sets the source's split. Of members of one name the last
    counts, as it does for those who unpack the archive.
    """
    repeats = Counter(members)
    reasons = {name: why_passed_over(name) for name in repeats if name != TABLE}
    names = sorted(name for name, why in reasons.items() if not why)
    prefix = ""
    if names and not labelled:
        prefix, source.split = enter_split(names, source.split, source)
    inside = prefix if source.split else ""  # another split's files are not passed over
    passed_over = Counter(why for name, why in reasons.items() if why and name.startswith(inside))
    passed_over["with the name of a later one"] = sum(
        count - 1 for name, count in repeats.items() if name.startswith(inside)
    )
    passed_over = +passed_over
    if not names:
        raise source.no_images(passed_over)
    return [name for name in names if name.startswith(prefix)], prefix, passed_over


class ZipReader:
    """Reads members through one memory map: about ten times faster than ``ZipFile.read``.

    Checks the local header and the checksum of every member, as ``ZipFile`` does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with regular(path).open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, locator: ZipMember) -> bytes:
        """Return a member's bytes; raise ``UserError`` if they are damaged."""
        name, offset, packed, size, crc, method, _ = locator
        head = self.map[offset : offset + 30]
        start = offset + 30
        if len(head) == 30 and head[:4] == b"PK\x03\x04":
            start += int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            data = self.map[start : start + packed]
            if method == zipfile.ZIP_DEFLATED:
                try:
                    data = zlib.decompressobj(-15).decompress(data, size + 1)
                except zlib.error:
                    data = b""
            if len(data) == size and zlib.crc32(data) == crc:
                return data
        raise UserError(
            f"zip {self.path}",
            f"member {name!r} is damaged",
            allowed="the checksum in the archive",
            remedy="download it again and compare its hash with the original's",
        )

    def close(self) -> None:
        """Unmap the archive."""
        self.map.close()


class ZipSource(EncodedSource):
    """A zip of images: EDM's and EDM2's with ``dataset.json``, or one of class folders."""

    kind = "zip"

    def index(self) -> ImageIndex:
        """Read the central directory."""
        listed = self._members()
        members = {member[0]: member for member in listed}
        labelled = TABLE in members
        names, prefix, passed_over = select_images(self, (m[0] for m in listed), labelled=labelled)
        entries = [members[name] for name in names]
        for member in entries:
            self._check(member, LARGEST_IMAGE)
        fingerprint = Fingerprint()
        fingerprint.add(entries)  # all at once: a line each would take longer than reading them
        if labelled:
            table = self._table(members[TABLE], len(names))
            found = FolderLabels(labels_from_json(self, table, names))
        else:
            names = [name.removeprefix(prefix) for name in names]
            found = labels_from_folders(names)
        labels, classes, notes = found
        return ImageIndex(names, entries, labels, classes, fingerprint.value, passed_over, notes)

    def _members(self) -> list[ZipMember]:
        """Return the files of the archive."""
        try:
            with zipfile.ZipFile(regular(self.path)) as archive:
                return [
                    (
                        info.filename,
                        info.header_offset,
                        info.compress_size,
                        info.file_size,
                        info.CRC,
                        info.compress_type,
                        info.flag_bits,
                    )
                    for info in archive.infolist()
                    if not info.is_dir()
                ]
        except TRUNCATED as error:
            raise truncated(self, error) from None
        except NotImplementedError as error:  # a version of the format that zipfile does not know
            raise self.error(f"cannot be read: {error}", remedy=_REPACK) from None

    def _table(self, member: ZipMember, images: int) -> Any:
        """Read a table of labels, unless it is far larger than its images need."""
        size = member[3]
        if size > (1 << 20) + _TABLE_ROW * images:
            raise self.error(
                f"its dataset.json takes {size:,} bytes for {images:,} images",
                allowed=f"about {_TABLE_ROW} bytes per image",
                remedy="make the archive with EDM's dataset tool",
            )
        self._check(member, size)
        remedy = "make the archive with EDM's dataset tool"
        with closing(self.reader()) as reader, reading(f"{self.who}, dataset.json", remedy):
            return parse_json(reader.read(member))

    def _check(self, member: ZipMember, largest: int) -> None:
        name, _, _, size, _, method, flags = member
        if flags & 1:
            raise self.error(f"member {name!r} is encrypted", remedy="decrypt the archive first")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.error(
                f"member {name!r} is packed by method {method}",
                allowed="stored or deflated members",
                remedy=_REPACK,
            )
        if size > largest:
            raise self.error(
                f"member {name!r} takes {size:,} bytes",
                allowed=f"up to {largest:,} bytes per image",
                remedy="remove it from the archive",
            )

    def reader(self) -> ZipReader:
        """Map the archive."""
        return ZipReader(self.path)


class PlacedReader:
    """Reads parts of a file by their place: members of a tar, values of a database."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDONLY)

    def read(self, locator: tuple[int, int]) -> bytes:
        """Return ``size`` bytes at ``offset``."""
        offset, size = locator
        return os.pread(self.file, size, offset)

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)


class TarSource(EncodedSource):
    """A tar of images in class folders, packed or not.

    ``spool`` says where a packed one is unpacked to; that is kept until the dataset is complete, so
    that a resumed preparation need not unpack again. Its name tells which archive it came from.
    """

    kind = "tar"

    def __init__(self, path: Path, split: str = "", spool: Path | None = None) -> None:
        super().__init__(path, split)
        self.spool = spool
        self.plain = path

    def unpack(self) -> None:
        """Unpack a compressed archive into the spool file, unless it is there already."""
        with regular(self.path).open("rb") as file:
            opener: Any = _OPENERS.get(file.read(2))
        if opener is None:
            return
        assert self.spool is not None
        origin = hashlib.sha256(f"{self.path.resolve()} {self.stat}".encode()).hexdigest()[:16]
        self.plain = self.spool.with_name(f"{self.spool.name}-{origin}")
        for other in self.spool.parent.glob(f"{self.spool.name}-*"):
            if other != self.plain:  # another archive's, or one that a kill cut short
                other.unlink()
        if self.plain.exists():
            return
        part = self.plain.with_name(f"{self.plain.name}.part")
        try:
            with opener(self.path, "rb") as packed, open(part, "wb") as out:
                while data := packed.read(_STRIDE):
                    self._require_room(part.parent, len(data))
                    out.write(data)
        except UserError:
            part.unlink(missing_ok=True)
            raise
        except TRUNCATED as error:
            part.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise truncated(self, error) from None
        part.rename(self.plain)

    def _require_room(self, folder: Path, size: int) -> None:
        if shutil.disk_usage(folder).free < size + _SPARE:
            raise self.error(
                f"unpacks to more than {folder} has room for",
                allowed=f"{_SPARE >> 20} MiB are left free",
                remedy="make room, or unpack it elsewhere and give --source the folder",
            )

    def index(self) -> ImageIndex:
        """Unpack if needed and read the headers."""
        self.unpack()
        listed = self._members()
        members = dict(listed)
        names, prefix, passed_over = select_images(self, (n for n, _ in listed), labelled=False)
        if max(sum(members[name]) for name in names) > self.plain.stat().st_size:
            raise truncated(self, EOFError("the last image is cut off"))
        fingerprint = Fingerprint()
        for name in names:
            fingerprint.add(readable(name), *members[name])
        locators = [members[name] for name in names]
        names = [readable(name.removeprefix(prefix)) for name in names]
        labels, classes, notes = labels_from_folders(names)
        return ImageIndex(names, locators, labels, classes, fingerprint.value, passed_over, notes)

    def _members(self) -> list[tuple[str, tuple[int, int]]]:
        """Return name, and place and size, of the archive's files."""
        try:
            with tarfile.open(self.plain, "r:") as archive:
                members = [
                    (info.name.removeprefix("./"), (info.offset_data, info.size))
                    for info in archive
                    if info.isfile()
                ]
                end_mark = archive.offset
        except TRUNCATED as error:
            raise truncated(self, error) from None
        with open(self.plain, "rb") as file:
            file.seek(end_mark)
            if file.read(512) != b"\0" * 512:  # tarfile itself takes a cut header for the end
                raise truncated(self, EOFError("it lacks the end mark"))
        return members

    def reader(self) -> PlacedReader:
        """Open the plain archive."""
        return PlacedReader(self.plain)


def open_packed(path: Path) -> BinaryIO:
    """Open a file, unpacking it on the fly if it is compressed."""
    with regular(path).open("rb") as file:
        opener: Any = _OPENERS.get(file.read(2))
    return opener(path, "rb") if opener else open(path, "rb")
