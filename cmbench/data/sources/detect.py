"""Which reader a path needs."""

from __future__ import annotations

import tarfile
from pathlib import Path

from cmbench.data.sources.archives import TAR_SUFFIXES, TarSource, ZipSource
from cmbench.data.sources.base import ImageSource
from cmbench.data.sources.batches import CifarPythonSource, ImageNetBatchSource
from cmbench.data.sources.folder import FolderSource
from cmbench.data.sources.lmdb import LmdbSource
from cmbench.errors import MissingError, UserError
from cmbench.files import regular


def open_source(path: Path, split: str = "", spool: Path | None = None) -> ImageSource:
    """Return the source at ``path``, recognised from its contents where it can be.

    Raises ``MissingError`` if there is nothing, ``UserError`` if no reader fits.
    """
    if not path.exists():
        raise MissingError(
            "--source", f"{path} does not exist", remedy="give the path of what you downloaded"
        )
    if not path.is_dir():
        return _open_file(path, split, spool)
    if (path / "data.mdb").is_file():
        return LmdbSource(path, split)
    inner = path / "cifar-10-batches-py"
    for folder in (inner, path):
        if (folder / "data_batch_1").is_file() or (folder / "batches.meta").is_file():
            return CifarPythonSource(folder, split)
    if ImageNetBatchSource.fits(path):
        return ImageNetBatchSource(path, split)
    return FolderSource(path, split)


def _open_file(path: Path, split: str, spool: Path | None) -> ImageSource:
    name = path.name.lower()
    if regular(path).stat().st_size == 0:
        raise UserError("--source", f"{path} is empty", remedy="download it again")
    if ImageNetBatchSource.fits(path):
        return ImageNetBatchSource(path, split)
    with regular(path).open("rb") as file:
        magic = file.read(4)
    if magic[:2] == b"PK" or name.endswith(".zip"):
        return ZipSource(path, split)
    if name == "data.mdb":
        return LmdbSource(path.parent, split)
    if name.endswith(TAR_SUFFIXES) or tarfile.is_tarfile(path):
        python = name.startswith("cifar-10-python") or _first_member(path).endswith("-batches-py")
        return CifarPythonSource(path, split) if python else TarSource(path, split, spool)
    raise UserError(
        "--source",
        f"{path} has no format that can be read",
        allowed="a folder, .zip, .tar(.gz|.xz|.bz2), an LMDB, CIFAR-10 or ImageNet batches",
        remedy="unpack it and give the folder",
    )


def _first_member(path: Path) -> str:
    """Return the top-level name of an archive's first member, "" if it cannot be read."""
    try:
        with tarfile.open(path) as archive:
            info = archive.next()
    except (tarfile.TarError, EOFError, OSError, ValueError):
        return ""
    return info.name.removeprefix("./").partition("/")[0] if info else ""
