"""The one guard of zip archives that are not trusted: ``.npz``, ``.pt`` and submissions.

A directory may claim any size for a member, and deflate packs 1032 to 1. Here a member's claim must
agree with the bytes that it has, and no more than the claim is ever unpacked. Imports no torch.
"""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

from cmbench.files import regular

#: Deflate cannot pack better than 1032 to 1.
_DEFLATE = 1040
#: What reading a zip raises if it is damaged, encrypted, or packed by a method that is not known.
UNREADABLE_ZIP = (
    OSError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    UnicodeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
)


class GuardedZip(zipfile.ZipFile):
    """A zip for reading, whose members never unpack to more than they can hold.

    Raises:
        OSError, ValueError, zipfile.BadZipFile ...: one of :data:`UNREADABLE_ZIP`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(regular(path))
        self.size = path.stat().st_size

    def open_member(self, info: zipfile.ZipInfo, *, stored: bool = False) -> IO[bytes]:
        """Return a stream of at most ``info.file_size`` bytes; ``stored``: of one not packed.

        Raises:
            ValueError: it claims more than it can hold.
        """
        methods = (zipfile.ZIP_STORED, *(() if stored else (zipfile.ZIP_DEFLATED,)))
        if info.compress_type not in methods:
            what = "stored" if stored else "stored or deflated"
            raise ValueError(f"{info.filename[:100]!r} is not {what}")
        times = _DEFLATE if info.compress_type else 1
        if info.file_size > min(info.compress_size, self.size) * times:
            raise ValueError(f"{info.filename[:100]!r} claims {info.file_size:,} bytes")
        return self.open(info)

    def read_member(self, info: zipfile.ZipInfo, most: int) -> bytes:
        """Return a member's bytes.

        Raises:
            ValueError: it has more than ``most``.
        """
        if info.file_size > most:
            raise ValueError(f"{info.filename[:100]!r} takes {info.file_size:,} bytes")
        with self.open_member(info) as file:
            return file.read()
