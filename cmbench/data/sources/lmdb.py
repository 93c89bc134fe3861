"""Images in an LMDB, as LSUN is published. Needs the optional package ``lmdb``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmbench.data.sources.base import EncodedSource, Fingerprint, ImageIndex
from cmbench.errors import MissingError

#: Pages that may be missing at the end of an intact database: its last change freed them.
_LOOSE_PAGES = 16


def _lmdb(who: str) -> Any:
    try:
        import lmdb
    except ImportError:
        raise MissingError(
            who, "reading it needs the package lmdb", remedy="pip install 'cmbench[lsun]'"
        ) from None
    return lmdb


class LmdbReader:
    """One read transaction for as long as the worker lives."""

    def __init__(self, path: Path) -> None:
        lmdb = _lmdb(f"lmdb {path}")
        self.errors = lmdb.Error
        self.environment = lmdb.open(
            str(path), readonly=True, lock=False, readahead=False, subdir=path.is_dir()
        )
        self.transaction = self.environment.begin(write=False)

    def read(self, locator: bytes) -> bytes:
        """Return the value of a key; raise ``OSError`` if the database is damaged there."""
        try:
            return bytes(self.transaction.get(locator) or b"")
        except self.errors as error:
            raise OSError(str(error)) from None

    def close(self) -> None:
        """End the transaction."""
        self.transaction.abort()
        self.environment.close()


class LmdbSource(EncodedSource):
    """Encoded images by key, in the database's own order, without labels."""

    kind = "lmdb"

    def index(self) -> ImageIndex:
        """Read all keys."""
        lmdb = _lmdb(self.who)
        fingerprint = Fingerprint()
        try:
            with (
                lmdb.open(
                    str(self.path), readonly=True, lock=False, subdir=self.path.is_dir()
                ) as environment,
                environment.begin(write=False) as transaction,
            ):
                self._require_whole(environment)
                keys = [bytes(k) for k in transaction.cursor().iternext(keys=True, values=False)]
                fingerprint.add(sorted(transaction.stat().items()))
        except lmdb.Error as error:
            raise self.error(
                f"truncated or corrupt database ({error})",
                remedy="download it again and compare its size with the original's",
            ) from None
        if not keys:
            raise self.error("is empty", remedy="give --source the folder that holds data.mdb")
        fingerprint.add(len(keys), keys[0], keys[-1])
        names = [key.decode("utf-8", "backslashreplace") for key in keys]
        return ImageIndex(names, keys, None, fingerprint=fingerprint.value)

    def _require_whole(self, environment: Any) -> None:
        """Raise if the file is shorter than its pages: reading those would end the process."""
        file = self.path / "data.mdb" if self.path.is_dir() else self.path
        wanted = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        found = file.stat().st_size
        if found < wanted - _LOOSE_PAGES * environment.stat()["psize"]:
            raise self.error(
                f"truncated database: data.mdb takes {found:,} bytes",
                allowed=f"{wanted:,} by its own table",
                remedy="download it again and compare its size with the original's",
            )

    def reader(self) -> LmdbReader:
        """Open the database."""
        return LmdbReader(self.path)
