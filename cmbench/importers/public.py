"""Checkpoints that others published, by name: ``public_checkpoints.csv``. Imports no torch."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cmbench.errors import MissingError, UserError
from cmbench.files import sha256_file
from cmbench.importers.download import DownloadError, Progress, download, secure

#: Formats that `cmbench import` reads. What is in brackets after a name in the list explains it.
_READ = ("edm pickle", "edm2 pickle", "tcm pickle", "openai .pt", "flax checkpoint")
#: Formats that do not say what their network computes; their methods do.
_SILENT = ("openai .pt", "flax checkpoint")
#: Constants of those: all are of Song et al. 2023 (arXiv:2303.01469, App. C).
_SIGMA_DATA, _SIGMA_MIN = 0.5, 0.002
#: Other names of methods in the list.
_METHODS = {"edm2": "edm"}
#: Servers that answer with pages.
_BY_HAND = ("drive.google.com",)


@dataclass(frozen=True)
class PublicCheckpoint:
    """A row of the list.

    Attributes:
        name: by which `cmbench import` knows it.
        url: of the file.
        format: what kind of file it is; in brackets, what has to be known beside.
        method: how it was trained, in the words of the list.
        dataset: name of the dataset here.
        conditioning: ``conditional`` or ``unconditional``.
        published: metric and value that its authors report.
        note: what the value needs beside.
        read_in: where address and value were read.
        licence: of the weights; empty if not known.
        sha256: of the file; empty if not known.
    """

    name: str
    url: str
    format: str
    method: str
    dataset: str
    conditioning: str
    published: str
    note: str
    read_in: str
    licence: str
    sha256: str

    @property
    def kind(self) -> str:
        """The format without its explanation."""
        return self.format.partition(" (")[0]

    @property
    def is_read(self) -> bool:
        """Whether `cmbench import` reads the format."""
        return self.kind in _READ

    @property
    def by_hand(self) -> bool:
        """Whether the address is a page's, or is not complete: a person has to fetch the file."""
        return urlsplit(self.url).hostname in _BY_HAND or "query string" in self.format

    def path(self, folder: Path) -> Path:
        """Return the place of the file below the folder of downloads, by its address."""
        parts = urlsplit(self.url)
        if parts.hostname in _BY_HAND:  # a page: the address does not end in the file's name
            return folder / f"{self.name}{'.pkl' if 'pickle' in self.kind else '.pt'}"
        return folder.joinpath(parts.hostname or "", *parts.path.strip("/").split("/"))

    @property
    def given(self) -> dict[str, Any]:
        """What has to be said of the file because it does not say it: options of an import."""
        if self.kind not in _SILENT:
            return {}
        if self.method == "edm":
            return {"parameterization": "edm", "sigma_data": _SIGMA_DATA}
        meaning = {"parameterization": "boundary", "sigma_min": _SIGMA_MIN}
        return {**meaning, "sigma_data": _SIGMA_DATA}


@cache
def public_checkpoints() -> tuple[PublicCheckpoint, ...]:
    """Return the list."""
    text = files(__package__).joinpath("public_checkpoints.csv").read_text(encoding="utf-8")
    names = [field.name for field in fields(PublicCheckpoint)]
    rows = csv.DictReader(text.splitlines())
    return tuple(PublicCheckpoint(**{n: (row[n] or "").strip() for n in names}) for row in rows)


def find_public(name: str) -> PublicCheckpoint | None:
    """Return the checkpoint of that name, if it is listed."""
    return next((c for c in public_checkpoints() if c.name == name), None)


def published_teacher(method: str, dataset: str, *, conditional: bool) -> PublicCheckpoint | None:
    """Return a published model of a method on a dataset that can be imported, if one is listed.

    ``conditional``: whether it knows classes.
    """
    conditioning = "conditional" if conditional else "unconditional"
    for one in public_checkpoints():
        same = (_METHODS.get(one.method, one.method), one.dataset, one.conditioning)
        if one.is_read and not one.by_hand and same == (method, dataset, conditioning):
            return one
    return None


def obtain(
    checkpoint: PublicCheckpoint,
    folder: Path,
    progress: Progress = lambda done, total: None,
    allowed: Callable[[str], bool] = secure,
) -> Path:
    """Return the file of a published checkpoint, downloaded to ``folder`` if it is not there.

    Raises:
        MissingError: it cannot be downloaded; the message says which file to put where.
        UserError: this package cannot read it, or the file there is another one.
    """
    who, path = f"checkpoint {checkpoint.name!r}", checkpoint.path(folder)
    if not checkpoint.is_read:
        raise _not_read(checkpoint, who)
    if path.is_file():
        _require_hash(checkpoint, path, who)
        return path
    remedy = (
        f"fetch {checkpoint.url} and put it at {path}, then run "
        f"`cmbench import {checkpoint.name}` again"
    )
    if checkpoint.by_hand:
        raise MissingError(who, "cannot be downloaded directly", remedy=remedy)
    try:
        download(checkpoint.url, path, sha256=checkpoint.sha256, progress=progress, allowed=allowed)
    except DownloadError as error:
        raise MissingError(who, f"cannot be downloaded: {error}", remedy=remedy) from None
    except OSError as error:
        raise UserError(
            who,
            f"cannot be written to {path.parent}: {error.strerror or error}",
            allowed="a writable folder with free space",
            remedy="choose another workspace with --workspace",
        ) from None
    return path


def _not_read(checkpoint: PublicCheckpoint, who: str) -> UserError:
    remedy = "its networks are not here"
    if checkpoint.kind.startswith("reference"):
        remedy = f"fetch {checkpoint.url} and run `cmbench refs import FILE`"
    return UserError(
        who, f"is of the format {checkpoint.kind!r}", allowed=", ".join(_READ), remedy=remedy
    )


def _require_hash(checkpoint: PublicCheckpoint, path: Path, who: str) -> None:
    if checkpoint.sha256 and (found := sha256_file(path)) != checkpoint.sha256:
        raise UserError(
            who,
            f"{path} has sha256 {found}",
            allowed=checkpoint.sha256,
            remedy=f"delete it, and fetch {checkpoint.url} again",
        )
