"""The one format that every prepared dataset has, and how it is written and read.

A folder with

- ``images.npy``: uint8 (or float32 for latents) ``[N, C, H, W]``, an ordinary ``.npy`` file that is
  memory-mapped;
- ``labels.npy``: int32 ``[N]``, absent where there are no classes;
- ``blocks.sha256``: one SHA-256 per block of ``block_images`` images, one per line: a resumed
  preparation knows which blocks are good, and damage is found by block;
- ``manifest.json``: :class:`DatasetManifest`.

It is written next to its final place and renamed when it is complete and has been read back.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from cmbench.data.npy import UNREADABLE, Array
from cmbench.errors import MissingError, UserError, one_line
from cmbench.files import read_sealed, reading, regular

FORMAT: Final = 1
StoredLabels = npt.NDArray[np.int32]
IMAGES, LABELS, BLOCKS, MANIFEST = "images.npy", "labels.npy", "blocks.sha256", "manifest.json"


class SourceNote(BaseModel):
    """Where the images came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = Field(description="reader that was used")
    name: str = Field(description="file or folder name, without its path")
    fingerprint: str = Field(description="SHA-256 over the source's table of contents")
    stat: str = Field("", description="size and modification time of a source that is one file")
    split: str = ""
    passed_over: dict[str, int] = Field(
        default_factory=dict, description="files that were not read, by the reason"
    )


class DatasetManifest(BaseModel):
    """What a prepared dataset is. ``sha256`` identifies images and labels, and nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT
    dataset: str
    revision: str = Field(description="origin and preprocessing, in words that records carry")
    shape: tuple[int, int, int, int]
    dtype: Literal["uint8", "float32"]
    num_classes: int = Field(ge=0)
    class_names: list[str] = Field(default_factory=list)
    class_counts: list[int] = Field(default_factory=list)
    sha256: str
    labels_sha256: str = ""
    block_images: int = Field(gt=0)
    transform: str
    converted: dict[str, int] = Field(
        default_factory=dict,
        description="images that were converted, by what they had and what was done",
    )
    lossy: bool = Field(False, description="some images were JPEG or lossy WebP")
    subset: bool = Field(False, description="fewer images than the dataset has, as asked for")
    source: SourceNote
    tools: dict[str, str] = Field(default_factory=dict, description="versions that decoded")
    created: str

    @property
    def count(self) -> int:
        """Number of images."""
        return self.shape[0]


def content_hash(shape: tuple[int, ...], dtype: str, blocks: list[str], labels: str) -> str:
    """Return the hash of a dataset's content: shape, type, block digests and labels digest."""
    images = hashlib.sha256(b"".join(bytes.fromhex(b) for b in blocks)).hexdigest()
    parts = {"shape": list(shape), "dtype": dtype, "images": images, "labels": labels}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def labels_hash(labels: StoredLabels | None) -> str:
    """Return the SHA-256 of labels ``[N]`` as int32, little-endian; "" without labels."""
    return "" if labels is None else hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest()


# ---- reading -----------------------------------------------------------------------------------


class Store(NamedTuple):
    """An open prepared dataset: images memory-mapped, labels in memory."""

    folder: Path
    manifest: DatasetManifest
    images: Array
    labels: StoredLabels | None


def _damaged(folder: Path, problem: str, allowed: str = "") -> UserError:
    return UserError(
        f"prepared dataset {folder}", problem, allowed=allowed, remedy=_prepare_again(folder)
    )


def _prepare_again(folder: Path) -> str:
    return f"run `cmbench prepare {folder.name} --source … --force` again"


def read_manifest(folder: Path) -> DatasetManifest:
    """Read and validate a manifest; raises ``MissingError`` if it does not exist."""
    path = folder / MANIFEST
    if not path.exists():
        raise MissingError(
            f"prepared dataset {folder}",
            f"has no {MANIFEST}",
            remedy=f"run `cmbench prepare {folder.name}`",
        )
    with reading(f"prepared dataset {folder}, {MANIFEST}", _prepare_again(folder)):
        return DatasetManifest.model_validate(read_sealed(path))


def _load(folder: Path, name: str, shape: tuple[int, ...], dtype: str) -> Array:
    path = folder / name
    try:
        # Copy-on-write: torch can wrap it without a copy, and nothing ever writes to the file.
        array: Array = np.load(regular(path), mmap_mode="c", allow_pickle=False)
    except FileNotFoundError:
        raise _damaged(folder, f"{name} is missing") from None
    except UNREADABLE as error:
        reason = one_line(str(error), 200)
        raise _damaged(folder, f"{name} cannot be read: {reason}") from None
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise _damaged(
            folder, f"{name} holds {array.dtype} {array.shape}", f"{dtype} {shape} by the manifest"
        )
    return array


def open_store(folder: Path) -> Store:
    """Open a prepared dataset and check what can be checked without reading the images."""
    manifest = read_manifest(folder)
    images = _load(folder, IMAGES, manifest.shape, manifest.dtype)
    if not manifest.num_classes:
        return Store(folder, manifest, images, None)
    labels = np.array(_load(folder, LABELS, (manifest.count,), "int32"))
    if labels_hash(labels) != manifest.labels_sha256:
        raise _damaged(folder, f"{LABELS} does not match its hash in the manifest")
    return Store(folder, manifest, images, labels)


def read_blocks(folder: Path) -> list[str]:
    """Return the block digests."""
    try:
        return regular(folder / BLOCKS).read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(folder, f"{BLOCKS} cannot be read: {error}") from None


def check_content_hash(folder: Path, manifest: DatasetManifest, blocks: list[str]) -> None:
    """Check that block digests and labels digest make the manifest's ``sha256``."""
    try:
        found = content_hash(manifest.shape, manifest.dtype, blocks, manifest.labels_sha256)
    except ValueError:
        raise _damaged(folder, f"{BLOCKS} holds a line that is not a SHA-256") from None
    if found != manifest.sha256:
        raise _damaged(folder, f"{BLOCKS} does not match the manifest's sha256")
