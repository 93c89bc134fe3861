"""Small files in every format that ``cmbench prepare`` reads."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def pictures(count: int, size: int = 8, seed: int = 0, channels: int = 3) -> np.ndarray:
    """uint8 ``[N, H, W, C]``, all different."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def encode(array: np.ndarray, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    squeezed = array[..., 0] if array.shape[-1] == 1 else array
    Image.fromarray(squeezed).save(buffer, kind, **options)
    return buffer.getvalue()


def class_folder(root: Path, images: np.ndarray, classes: tuple[str, ...] = CLASSES) -> list[int]:
    """``root/<class>/<n>.png`` in turn; return the labels in the order of the sorted paths."""
    for i, image in enumerate(images):
        folder = root / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:05d}.png").write_bytes(encode(image))
    return sorted(i % len(classes) for i in range(len(images)))


def edm_zip(
    path: Path,
    images: np.ndarray,
    labels: list[int] | None,
    *,
    table: object = "made from labels",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """An archive as EDM's dataset tool makes it; ``table`` replaces ``dataset.json``."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(name, encode(image, compress_level=0))
        if table == "made from labels":
            rows = None if labels is None else [[n, y] for n, y in zip(names, labels, strict=True)]
            table = {"labels": rows}
        if table is not None:
            archive.writestr("dataset.json", json.dumps(table))
    return path


def add_bytes(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def cifar_archive(path: Path, images: np.ndarray, labels: list[int], protocol: int = 2) -> Path:
    """``cifar-10-python.tar.gz`` with the images spread over five batches."""
    parts = np.array_split(np.arange(len(images)), 5)
    with tarfile.open(path, "w:gz") as archive:
        for i, part in enumerate(parts, 1):
            rows = images[part].transpose(0, 3, 1, 2).reshape(len(part), -1)
            batch = {b"data": rows, b"labels": [labels[k] for k in part], b"batch_label": b"x"}
            name = f"cifar-10-batches-py/data_batch_{i}"
            add_bytes(archive, name, pickle.dumps(batch, protocol=protocol))
    return path


def image_tar(path: Path, images: np.ndarray, prefix: str = "train", mode: str = "w:xz") -> Path:
    """Class folders in a tar."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for i, image in enumerate(images):
            name = f"{prefix}/{CLASSES[i % len(CLASSES)]}/{i:05d}.png"
            add_bytes(archive, name, encode(image))
    return path
