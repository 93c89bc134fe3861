"""What a source of images is.

Two kinds: an :class:`EncodedSource` is a table of encoded images that worker processes read and
decode in any order; an :class:`ArraySource` yields decoded arrays in order, as fast as they copy.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cmbench.data.pictures import Pixels
from cmbench.errors import UserError, first_names
from cmbench.files import readable

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
ARRAY_SUFFIX = ".npy"
_READ = IMAGE_SUFFIXES | {ARRAY_SUFFIX}
#: EDM's table of labels, at the root of a folder or an archive.
TABLE = "dataset.json"


class Reader(Protocol):
    """Gives the bytes of one image; each worker has its own."""

    def read(self, locator: Any) -> bytes:
        """Return the encoded image at ``locator``."""

    def close(self) -> None:
        """Release the file."""


@dataclass(frozen=True)
class ImageIndex:
    """The table of contents of an encoded source, in the order the dataset will have.

    ``labels`` are class numbers, or None; ``class_names`` are known where folders give classes.
    ``passed_over`` counts the files that are not read, by :func:`why_passed_over`. ``notes`` say
    what is remarkable about the labels.
    """

    names: Sequence[str]
    locators: Sequence[Any]
    labels: Sequence[int] | None
    class_names: Sequence[str] = ()
    fingerprint: str = ""
    passed_over: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.names)


class ImageSource(ABC):
    """A path and the reader that fits it."""

    kind: ClassVar[str]

    def __init__(self, path: Path, split: str = "") -> None:
        self.path, self.split = path, split

    @property
    def who(self) -> str:
        """How messages name this source."""
        return f"{self.kind} {readable(str(self.path))}"

    @property
    def stat(self) -> str:
        """Size and modification time of a source that is one file, "" for a folder."""
        if self.path.is_dir():
            return ""
        stat = self.path.stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"

    def error(self, problem: str, *, allowed: str = "", remedy: str = "") -> UserError:
        """Return a ``UserError`` that names this source."""
        return UserError(self.who, problem, allowed=allowed, remedy=remedy)


class EncodedSource(ImageSource):
    """A table of encoded images."""

    @abstractmethod
    def index(self) -> ImageIndex:
        """Read the table of contents."""

    @abstractmethod
    def reader(self) -> Reader:
        """Open the source for reading, in whichever process this is called."""

    def no_images(self, passed_over: Mapping[str, int]) -> UserError:
        """Return the error for a source without a single image."""
        found = f" ({describe_passed_over(passed_over)})" if passed_over else ""
        return self.error(
            f"holds no images{found}",
            allowed=f"{', '.join(sorted(IMAGE_SUFFIXES))}, or {ARRAY_SUFFIX} for latents",
            remedy="give the folder that holds the images, or their archive",
        )


@dataclass(frozen=True)
class Chunk:
    """Decoded images uint8 ``[n, C, H, W]`` with their labels."""

    images: Pixels
    labels: npt.NDArray[np.int64] | None


class ArraySource(ImageSource):
    """Decoded images in files of arrays."""

    #: Number of images if it is known without reading them.
    total: int | None = None
    #: Files of the whole dataset that are not here; a part of it can do without them.
    missing: Sequence[str] = ()
    #: What is remarkable about the files (for the dataset's revision).
    remark: str = ""

    @abstractmethod
    def chunks(self) -> Iterator[Chunk]:
        """Yield all images in order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that tells whether the files have changed."""


@dataclass
class Fingerprint:
    """A hash over a table of contents."""

    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, *parts: object) -> None:
        """Add an entry."""
        self.digest.update("\0".join(map(str, parts)).encode() + b"\n")

    def add_file(self, path: Path) -> None:
        """Add a file's name, size and modification time."""
        stat = path.stat()
        self.add(path.name, stat.st_size, stat.st_mtime_ns)

    @property
    def value(self) -> str:
        """The hash so far."""
        return str(self.digest.hexdigest())


#: Names of folders that are parts of a dataset. Next to any other folder, `train` is a class.
_SPLITS = frozenset({"train", "test", "val", "valid", "validation", "dev"})


def default_split(folders: Iterable[str]) -> str:
    """Return ``train`` if folders of these names are splits and that is one of them, else ''."""
    names = {name for name in folders if not name.startswith((".", "_"))}
    return "train" if "train" in names and names <= _SPLITS else ""


def why_passed_over(name: str) -> str:
    """Return why a file is not read as an image or an array of one; "" if it is read.

    ``name`` is relative to the source, with ``/``. Hidden folders and ``__MACOSX`` hold copies that
    file managers and notebooks make: their files are not read, and they are not classes.
    """
    suffix = name[max(name.rfind("."), 0) :].lower()
    if suffix in _READ and not name.startswith(".") and "/." not in name and "__" not in name:
        return ""  # nearly all files
    folders, _, base = name.rpartition("/")
    if any(folder.startswith(".") or folder == "__MACOSX" for folder in folders.split("/")):
        return "in hidden folders"
    if base.startswith("."):
        return "hidden"
    if suffix in _READ:
        return ""
    return readable(suffix) if "." in base else "without a suffix"


def describe_passed_over(counts: Mapping[str, int]) -> str:
    """Return how many files were passed over and why, the largest share first."""
    reasons = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    files = sum(counts.values())
    return f"{files:,} file{'s' * (files != 1)} passed over: " + ", ".join(
        f"{count:,} {reason}" for reason, count in reasons
    )


class FolderLabels(NamedTuple):
    """Labels by folder, or None; the names of the classes; why folders are no classes."""

    labels: list[int] | None = None
    classes: Sequence[str] = ()
    notes: Sequence[str] = ()


def labels_from_folders(names: Sequence[str]) -> FolderLabels:
    """Return labels and class names if every image lies in one of several top-level folders.

    Classes are numbered in the sorted order of their folders, as ImageNet's are. Folders that only
    split many files (EDM's ``00000/img00000000.png``) are not classes.
    """
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    classes = sorted(set(tops))
    if len(classes) < 2 or _is_sharding(names):
        return FolderLabels()
    if "" in classes:
        loose, folders = tops.count(""), first_names(classes[1:], 5)
        lie = f"{loose:,} of {len(names):,} images lie outside the folders {folders}"
        return FolderLabels(
            notes=(f"{lie}: labels are not read from folders",) * (classes[2:] != [])
        )
    number = {name: i for i, name in enumerate(classes)}
    return FolderLabels([number[top] for top in tops], classes)


def _is_sharding(names: Iterable[str]) -> bool:
    for name in names:
        folder, _, base = name.rpartition("/")
        digits = base[3:11]
        if not (
            base.startswith("img")
            and digits.isdigit()
            and len(digits) == 8
            and folder == digits[:5]
        ):
            return False
    return True


def labels_from_json(source: ImageSource, data: Any, names: Sequence[str]) -> list[int] | None:
    """Return labels from the contents of an EDM ``dataset.json``; None where they are null."""
    table = data.get("labels") if isinstance(data, dict) else None
    if not isinstance(data, dict) or "labels" not in data:
        raise source.error(
            "its dataset.json has no 'labels'",
            allowed='{"labels": [["00000/img00000000.png", 6], …]} or {"labels": null}',
            remedy="make it with EDM's dataset tool, or remove the file to label by folders",
        )
    if table is None:
        return None
    try:
        label_of = {str(name): label for name, label in table}
    except (TypeError, ValueError):
        raise source.error(
            "its dataset.json has labels that are not pairs of name and class",
            allowed='["00000/img00000000.png", 6]',
            remedy="make it with EDM's dataset tool",
        ) from None
    missing = [name for name in names if name not in label_of]
    if missing:
        raise source.error(
            f"its dataset.json has no label for {len(missing)} of {len(names)} images, "
            f"the first being {missing[0]!r}",
            remedy="make the archive and its labels again, together",
        )
    labels = [label_of[name] for name in names]
    for name, label in zip(names, labels):
        if type(label) is not int:
            raise source.error(
                f"label {label!r} of {name!r} in its dataset.json is not a class number",
                allowed="integers from 0",
                remedy="one-hot or continuous labels are not supported",
            )
    return labels
