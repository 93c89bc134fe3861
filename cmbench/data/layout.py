"""The layout of a prepared ``images.npy``. Worker processes import it: it needs only numpy."""

from __future__ import annotations

import hashlib
import io
import math
import os
from typing import NamedTuple

import numpy as np

#: numpy's header for our shapes, for every count: it leaves room for the first axis to grow.
HEADER_BYTES = 128
_TARGET_BLOCK_BYTES = 4 << 20
_MAX_BLOCK_IMAGES = 1024


class Layout(NamedTuple):
    """Shape and type of one image, and the sizes and places that follow from them."""

    data_shape: tuple[int, int, int]
    dtype: str = "uint8"

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return math.prod(self.data_shape) * np.dtype(self.dtype).itemsize

    @property
    def block_images(self) -> int:
        """Images per block: about 4 MiB, at most 1,024; fixed by the format."""
        return max(1, min(_MAX_BLOCK_IMAGES, _TARGET_BLOCK_BYTES // self.image_bytes))

    def header(self, count: int) -> bytes:
        """Return the ``.npy`` header for ``count`` images."""
        buffer = io.BytesIO()
        description = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(self.dtype)),
            "fortran_order": False,
            "shape": (count, *self.data_shape),
        }
        np.lib.format.write_array_header_1_0(buffer, description)
        header = buffer.getvalue()
        assert len(header) == HEADER_BYTES, len(header)
        return header

    def blocks(self, count: int) -> int:
        """Return the number of blocks of ``count`` images."""
        return -(-count // self.block_images)

    def block_range(self, block: int, count: int) -> tuple[int, int]:
        """Return the first image of ``block`` and the one after its last."""
        first = block * self.block_images
        return first, min(first + self.block_images, count)

    def offset(self, image: int) -> int:
        """Return where ``image`` begins in ``images.npy``."""
        return HEADER_BYTES + image * self.image_bytes


def hash_block(file: int, layout: Layout, block: int, count: int) -> str:
    """Return the SHA-256 of a block of the images file open as descriptor ``file``."""
    first, stop = layout.block_range(block, count)
    wanted = (stop - first) * layout.image_bytes
    data = os.pread(file, wanted, layout.offset(first))
    return hashlib.sha256(data).hexdigest() if len(data) == wanted else "truncated"
