"""Images in zip and tar archives.

A zip is read at random, through a memory map. A tar is read at random too; a compressed one is
unpacked once into a spool file beside the dataset that is being made.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import mmap
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cmbench.data.sources.base import (
    EncodedSource,
    Fingerprint,
    ImageIndex,
    ImageSource,
    default_split,
    is_image,
    labels_from_folders,
    labels_from_json,
)
from cmbench.data.sources.zip_table import Member, read_members
from cmbench.errors import UserError, first_names

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
_OPENERS = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open, b"BZ": bz2.open}
TRUNCATED = (EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


#: Bytes of an encoded image, at most, and of its row in a table of labels.
LARGEST_IMAGE = 256 << 20
_TABLE_ROW = 1000
_REPACK = "repack the archive with `zip -0`"
#: Bytes that unpacking leaves free on the disk, and how many it writes between two looks at it.
_SPARE, _STRIDE = 256 << 20, 16 << 20


def truncated(source: ImageSource, error: BaseException, name: str = "") -> UserError:
    """Return the error for an archive (or its file ``name``) that ends early or is none."""
    detail = " ".join(str(error).split())[:120]
    what = f"{name} is a truncated" if name else "truncated"
    return source.error(
        f"{what} or corrupt archive ({type(error).__name__}: {detail})",
        remedy="download it again and compare its size and hash with the original's",
    )


def enter_split(
    names: Sequence[str], split: str, source: ImageSource
) -> tuple[list[int], list[str], str]:
    """Return positions and names of the images of one split, names relative to it.

    A single folder around everything is entered; then the split asked for, or ``train`` if there is
    one and no other folders than splits.
    """
    prefix, chosen = "", ""
    while True:
        tops = {name[len(prefix) :].partition("/")[0] for name in names if name.startswith(prefix)}
        folders = {
            name[len(prefix) :].partition("/")[0]
            for name in names
            if name.startswith(prefix) and "/" in name[len(prefix) :]
        }
        wanted = split or default_split(folders)
        if wanted in tops and not chosen:
            prefix, chosen = f"{prefix}{wanted}/", wanted
        elif len(tops) == 1 and any(n.startswith(f"{prefix}{min(tops)}/") for n in names):
            prefix = f"{prefix}{min(tops)}/"
        else:
            break
    if split and not chosen:
        raise source.error(
            f"has no folder {split!r}",
            allowed=first_names(sorted(tops), 20),
            remedy="give --split one of them",
        )
    kept = [i for i, name in enumerate(names) if name.startswith(prefix)]
    return kept, [names[i][len(prefix) :] for i in kept], chosen


class ZipReader:
    """Reads members through one memory map: about ten times faster than ``ZipFile.read``.

    Checks the local header and the checksum of every member, as ``ZipFile`` does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, locator: Member) -> bytes:
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
        try:
            members = {member[0]: member for member in read_members(self.path)}
        except TRUNCATED as error:
            raise truncated(self, error) from None
        except NotImplementedError as error:  # a version of the format that zipfile does not know
            raise self.error(f"cannot be read: {error}", remedy=_REPACK) from None
        names = sorted(filter(is_image, members))
        if not names:
            raise self.error(
                "holds no images",
                allowed=".png, .jpg, .webp, … or .npy for latents",
                remedy="give --source an archive of images",
            )
        labels: list[int] | None
        classes: list[str] = []
        if "dataset.json" in members:
            kept = names
            labels = labels_from_json(self, self._table(members["dataset.json"], len(names)), names)
        else:
            places, kept, self.split = enter_split(names, self.split, self)
            names = [names[i] for i in places]
            found = labels_from_folders(kept)
            labels, classes = found if found else (None, [])
        entries = [members[name] for name in names]
        for member in entries:
            self._check(member, LARGEST_IMAGE)
        fingerprint = Fingerprint()
        fingerprint.add(entries)  # all at once: a line each would take longer than reading them
        return ImageIndex(kept, entries, labels, classes, fingerprint.value)

    def _table(self, member: Member, images: int) -> Any:
        """Read a table of labels, unless it is far larger than its images need."""
        size = member[3]
        if size > (1 << 20) + _TABLE_ROW * images:
            raise self.error(
                f"its dataset.json takes {size:,} bytes for {images:,} images",
                allowed=f"about {_TABLE_ROW} bytes an image",
                remedy="make the archive with EDM's dataset tool",
            )
        self._check(member, size)
        reader = self.reader()
        try:
            return json.loads(reader.read(member))
        except (ValueError, RecursionError) as error:
            raise self.error(
                f"its dataset.json cannot be read: {error}",
                remedy="make the archive with EDM's dataset tool",
            ) from None
        finally:
            reader.close()

    def _check(self, member: Member, largest: int) -> None:
        name, _, _, size, _, method, flags = member
        if flags & 1 or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.error(
                f"member {name!r} is encrypted or packed by method {method}",
                allowed="stored or deflated members",
                remedy=_REPACK,
            )
        if size > largest:
            raise self.error(
                f"member {name!r} takes {size:,} bytes",
                allowed=f"up to {largest:,} bytes an image",
                remedy="remove it from the archive",
            )

    def reader(self) -> ZipReader:
        """Map the archive."""
        return ZipReader(self.path)


class TarReader:
    """Reads members of an uncompressed tar by their place."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDONLY)

    def read(self, locator: tuple[int, int]) -> bytes:
        """Return ``size`` bytes at ``offset``."""
        offset, size = locator
        return os.pread(self.file, size, offset)

    def close(self) -> None:
        """Close the archive."""
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
        with open(self.path, "rb") as file:
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
        members: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(self.plain, "r:") as archive:
                for info in archive:
                    name = info.name.removeprefix("./")
                    if info.isfile() and is_image(name):
                        members[name] = (info.offset_data, info.size)
                end_mark = archive.offset
        except TRUNCATED as error:
            raise truncated(self, error) from None
        with open(self.plain, "rb") as file:
            file.seek(end_mark)
            if file.read(512) != b"\0" * 512:  # tarfile itself takes a cut header for the end
                raise truncated(self, EOFError("it lacks the end mark"))
        if not members:
            raise self.error(
                "holds no images",
                allowed=".png, .jpg, .webp, …",
                remedy="give --source an archive of images",
            )
        ordered = sorted(members)
        end = max(offset + size for offset, size in members.values())
        if end > self.plain.stat().st_size:
            raise truncated(self, EOFError("the last image is cut off"))
        kept, names, self.split = enter_split(ordered, self.split, self)
        found = labels_from_folders(names)
        labels, classes = found if found else (None, [])
        fingerprint = Fingerprint()
        for i in kept:
            fingerprint.add(ordered[i], *members[ordered[i]])
        locators = [members[ordered[i]] for i in kept]
        return ImageIndex(names, locators, labels, classes, fingerprint.value)

    def reader(self) -> TarReader:
        """Open the plain archive."""
        return TarReader(self.plain)


def open_packed(path: Path) -> BinaryIO:
    """Open a file, unpacking it on the fly if it is compressed."""
    with open(path, "rb") as file:
        opener: Any = _OPENERS.get(file.read(2))
    return opener(path, "rb") if opener else open(path, "rb")
