"""Images in a folder: class folders, EDM's folder with ``dataset.json``, or a flat folder."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cmbench.data.sources.base import (
    TABLE,
    EncodedSource,
    Fingerprint,
    ImageIndex,
    default_split,
    labels_from_folders,
    labels_from_json,
    why_passed_over,
)
from cmbench.errors import first_names
from cmbench.files import read_json, readable, reading


def walk(
    root: str, below: str = "", above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the name (relative, ``/``) and entry of each file under ``root``, folders in order.

    Links are followed, but not into a folder that they lie in (``above``: device and inode).
    """
    here = os.stat(root)
    above |= {(here.st_dev, here.st_ino)}
    with os.scandir(root) as entries:
        found = sorted(entries, key=lambda e: e.name)
    for entry in found:
        if _is_folder(entry):
            inner = os.stat(entry.path)
            if (inner.st_dev, inner.st_ino) not in above:
                yield from walk(entry.path, f"{below}{entry.name}/", above)
        else:
            yield below + entry.name, entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


class FolderReader:
    """Reads files below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = f"{root}{os.sep}"

    def read(self, locator: tuple[str, int]) -> bytes:
        """Return a file's bytes; ``locator`` is its name and the size it had."""
        name, size = locator
        # Three system calls: Python's files make eight, which costs a tenth of a small JPEG.
        file = os.open(self.root + name, os.O_RDONLY)
        try:
            data = os.read(file, size + 1)
            if len(data) == size:  # one byte more was asked for: this is the end
                return data
            parts = [data]
            while parts[-1]:  # it has grown, or was read in parts
                parts.append(os.read(file, 1 << 20))
            return b"".join(parts)
        finally:
            os.close(file)

    def close(self) -> None:
        """Do nothing: no file is kept open."""


class FolderSource(EncodedSource):
    """A folder of images, recursively.

    A folder with a subfolder ``train`` and no others than splits is entered there (or at the split
    asked for), so that the root of an archive with ``train/<class>/…`` and ``test/<class>/…`` never
    mixes the two.
    """

    kind = "folder"

    def __init__(self, path: Path, split: str = "") -> None:
        super().__init__(path, split)
        self.root = path
        folders = [p.name for p in path.iterdir() if p.is_dir()]
        name = split or default_split(folders)
        if name in folders:
            self.root, self.split = path / name, name
        if split and self.root == path:
            raise self.error(
                f"has no subfolder {split!r}",
                allowed=first_names(sorted(map(readable, folders)), 20),
                remedy="give --split one of them",
            )

    def index(self) -> ImageIndex:
        """Walk the folder."""
        fingerprint, passed_over = Fingerprint(), Counter[str]()
        names, locators = [], []
        for path, entry in walk(str(self.root)):
            if path == TABLE:
                continue
            if why := why_passed_over(path):
                passed_over[why] += 1
                continue
            name = readable(path)
            try:
                state = entry.stat()
            except OSError as error:
                link = " (broken link)" if entry.is_symlink() else ""
                raise self.error(
                    f"image {name!r} cannot be read: {error.strerror}{link}",
                    remedy="remove it or restore its target",
                ) from None
            if not stat.S_ISREG(state.st_mode):
                passed_over["not regular"] += 1
                continue
            names.append(name)
            locators.append((path, state.st_size))
            fingerprint.add(name, state.st_size, state.st_mtime_ns)
        if not names:
            raise self.no_images(passed_over)
        table = self.root / TABLE
        if table.is_file():
            with reading(f"{self.who}, {TABLE}", "restore the file or remove it"):
                labels = labels_from_json(self, read_json(table), names)
            return ImageIndex(names, locators, labels, (), fingerprint.value, passed_over)
        labels, classes, notes = labels_from_folders(names)
        return ImageIndex(names, locators, labels, classes, fingerprint.value, passed_over, notes)

    def reader(self) -> FolderReader:
        """Return a reader of files."""
        return FolderReader(self.root)
