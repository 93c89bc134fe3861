"""Batch files of decoded images: the CIFAR-10 python archive, ImageNet's downsampled batches.

Pickles are read by the restricted unpickler; ``.npz`` are never unpickled.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cmbench.data.npy import npz_rows, read_npz
from cmbench.data.pickles import as_array, load_plain_pickle
from cmbench.data.sources.archives import TRUNCATED, open_packed, truncated
from cmbench.data.sources.base import ArraySource, Chunk, Fingerprint
from cmbench.files import reading, regular

#: MD5 of the batches in the archive that A. Krizhevsky published.
_CIFAR_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


class BatchSource(ArraySource):
    """Rows of ``3 * size * size`` bytes, channels first, with a list of labels."""

    size: ClassVar[int] = 32
    first_label: ClassVar[int] = 0
    classes: ClassVar[int] = 10

    def chunk(self, batch: Any, name: str) -> Chunk:
        """Check one batch file's contents and shape them."""
        if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
            found = ", ".join(sorted(map(str, batch))) if isinstance(batch, dict) else type(batch)
            raise self.error(
                f"{name} holds {found}",
                allowed="data, labels",
                remedy="give --source the published archive",
            )
        with reading(f"{self.who}, {name}", "give --source the published archive"):
            data, labels = as_array(batch["data"], "data"), as_array(batch["labels"], "labels")
        row = 3 * self.size * self.size
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != row:
            raise self.error(
                f"{name} holds {data.dtype} data of shape {data.shape}",
                allowed=f"uint8 [N, {row}]: images of {self.size}x{self.size}",
                remedy="give --source batches of the right resolution",
            )
        if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
            raise self.error(
                f"{name} holds {labels.dtype} labels of shape {labels.shape}",
                allowed=f"{len(data)} class numbers",
                remedy="give --source the published archive",
            )
        first = self.first_label
        outside = np.flatnonzero((labels < first) | (labels >= first + self.classes))
        if len(outside):
            raise self.error(
                f"{name} holds label {labels[outside[0]]} (of its image {outside[0]})",
                allowed=f"{first} … {first + self.classes - 1}",
                remedy="give --source the published archive",
            )
        images = data.reshape(-1, 3, self.size, self.size)
        return Chunk(images, labels.astype(np.int64) - first)


class CifarPythonSource(BatchSource):
    """``cifar-10-python.tar.gz`` or its unpacked folder: five pickled batches, read in order."""

    kind = "cifar-python"
    #: Bytes of a batch: the published ones have 31 million.
    LARGEST_BATCH = 64 << 20

    def __init__(self, path: Path, split: str = "") -> None:
        super().__init__(path, split or "train")
        train = tuple(f"data_batch_{i}" for i in range(1, 6))
        self.batches = ("test_batch",) if self.split == "test" else train

    def chunks(self) -> Iterator[Chunk]:
        """Yield the batches; sets :attr:`remark` where one is not as published."""
        altered = []
        for name, data in self._read():
            if hashlib.md5(data, usedforsecurity=False).hexdigest() != _CIFAR_MD5[name]:
                altered.append(name)
            yield self.chunk(load_plain_pickle(data, f"{self.who}, {name}"), name)
        self.remark = "altered" if altered else ""

    def _read(self) -> Iterator[tuple[str, bytes]]:
        if self.path.is_dir():
            for name in self.batches:
                yield name, self._folder_file(name)
            return
        found: dict[str, bytes] = {}
        try:
            with open_packed(self.path) as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
                for info in tar:
                    name = info.name.rpartition("/")[2]
                    file = tar.extractfile(info) if name in self.batches else None
                    if file is not None:
                        if info.size > self.LARGEST_BATCH:
                            raise self.error(
                                f"{name} takes {info.size:,} bytes",
                                allowed=f"up to {self.LARGEST_BATCH:,}",
                                remedy="download cifar-10-python.tar.gz again",
                            )
                        found[name] = file.read()
        except TRUNCATED as error:
            raise truncated(self, error) from None
        missing = [name for name in self.batches if name not in found]
        if missing:
            raise self.error(
                f"lacks {', '.join(missing)}",
                allowed=", ".join(self.batches),
                remedy="download cifar-10-python.tar.gz from "
                "https://www.cs.toronto.edu/~kriz/cifar.html again",
            )
        for name in self.batches:
            yield name, found.pop(name)

    def _folder_file(self, name: str) -> bytes:
        try:
            return regular(self.path / name).read_bytes()
        except FileNotFoundError:
            raise self.error(
                f"lacks {name}",
                allowed=", ".join(self.batches),
                remedy="unpack cifar-10-python.tar.gz again",
            ) from None

    def fingerprint(self) -> str:
        """Return a hash over names, sizes and times of the files."""
        fingerprint = Fingerprint()
        files = [self.path / n for n in self.batches] if self.path.is_dir() else [self.path]
        for file in files:
            if file.exists():
                fingerprint.add_file(file)
        return fingerprint.value


_IMAGENET_BATCH = re.compile(r"(train_data_batch_(\d+)|val_data)(\.npz)?")


class ImageNetBatchSource(BatchSource):
    """``train_data_batch_1 … 10`` of the official 64x64 downsampled ImageNet, npz or pickle.

    P. Chrabaszcz et al. 2017 (arXiv:1707.08819). Labels there count from 1.
    """

    kind = "imagenet-batches"
    size = 64
    first_label = 1
    classes = 1000
    #: How many batches the training images come in.
    BATCHES = 10

    def __init__(self, path: Path, split: str = "") -> None:
        super().__init__(path, split or "train")
        folder = path if path.is_dir() else path.parent
        matches = [(_IMAGENET_BATCH.fullmatch(f.name), f) for f in sorted(folder.iterdir())]
        wanted = "val_data" if self.split == "val" else "train_data_batch_"
        numbered = sorted(
            (int(m.group(2) or 0), f) for m, f in matches if m and f.name.startswith(wanted)
        )
        self.files = [f for _, f in numbered]
        if self.split == "train":
            there = {number for number, _ in numbered}
            self.missing = [f"{wanted}{i}" for i in range(1, self.BATCHES + 1) if i not in there]
        if not self.files:
            raise self.error(
                "holds no batches",
                allowed="train_data_batch_1 … 10, with or without .npz",
                remedy="give --source the folder that holds them",
            )
        self.total = self._count()

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Return whether ``path`` is a folder of batches, or one of them."""
        if path.is_dir():
            return any(_IMAGENET_BATCH.fullmatch(f.name) for f in path.iterdir())
        return _IMAGENET_BATCH.fullmatch(path.name) is not None

    def _count(self) -> int | None:
        """Return the number of images, None if the headers do not give it."""
        total = 0
        for path in self.files:
            if path.suffix != ".npz":
                return None
            total += npz_rows(path, "labels")
        return total

    def chunks(self) -> Iterator[Chunk]:
        """Yield the batches in the order of their numbers."""
        for path in self.files:
            if path.suffix == ".npz":
                batch: Any = read_npz(path, ("data", "labels"))
            else:
                with regular(path).open("rb") as file:
                    batch = load_plain_pickle(file, f"{self.who}, {path.name}")
            yield self.chunk(batch, path.name)

    def fingerprint(self) -> str:
        """Return a hash over names, sizes and times of the files."""
        fingerprint = Fingerprint()
        for file in self.files:
            fingerprint.add_file(file)
        return fingerprint.value
