"""The embedded dataset ``digits``: 1,797 real handwritten digits of 8x8 pixels in 10 classes.

Data: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, licensed CC BY 4.0; the copy that scikit-learn
ships (its test part). Changes: the values 0 … 16 are scaled to 0 … 255.
"""

from __future__ import annotations

import hashlib

import numpy as np
from sklearn.datasets import load_digits

from cmbench.data.locations import DataLocations
from cmbench.data.pictures import Pixels
from cmbench.data.stored import ArrayDataset, Labels
from cmbench.errors import MissingError
from cmbench.plugin.specs import DatasetSpec

REVISION = "uci-1998-test-8x8"
#: Of images (uint8 ``[1797, 1, 8, 8]``) and labels (uint8): changed data are noticed.
SHA256 = "a19cb3d96bba7deace8ee5a513a6eb7bad0403d528f00bf4d351b6a7a55baa91"


def read_digits() -> tuple[Pixels, Labels]:
    """Return uint8 images ``[1797, 1, 8, 8]`` as ``round(v * 255 / 16)``, and labels ``[1797]``."""
    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    return np.ascontiguousarray(pixels), data.target.astype(np.int64)


def content_hash(pixels: Pixels, labels: Labels) -> str:
    """Return the SHA-256 of image bytes ``[N, 1, 8, 8]``, then labels ``[N]``, one byte each."""
    return hashlib.sha256(pixels.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()


def build(spec: DatasetSpec, locations: DataLocations) -> ArrayDataset:
    """Return the dataset; it comes with scikit-learn and needs no files of its own."""
    pixels, labels = read_digits()
    sha256 = content_hash(pixels, labels)
    if sha256 != SHA256:
        raise MissingError(
            f"dataset {spec.name!r}",
            f"scikit-learn's digits have changed: SHA-256 {sha256[:16]}…",
            allowed=f"{SHA256[:16]}…",
            remedy="reinstall scikit-learn (pip install --force-reinstall scikit-learn)",
        )
    return ArrayDataset(spec, pixels, labels, sha256=sha256, revision=REVISION)
