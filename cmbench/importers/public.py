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

from cmbench.downloads import DownloadError, Progress, download, secure
from cmbench.errors import MissingError, UserError
from cmbench.files import UNREADABLE, read_sealed, sha256_file, write_sealed

#: Formats that `cmbench import` reads. What is in brackets after a name in the list explains it.
_READ = ("edm pickle", "edm2 pickle", "tcm pickle", "openai .pt", "flax checkpoint")
#: The format of samples that their authors published.
ARCHIVE = "sample archive"
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
        metrics: the published values' metrics here, in the order of ``published``.
        nfe: network evaluations per image behind the value; empty for an archive of samples.
        sampler: the solver; empty where the method has only one.
        sigmas: noise levels, if the solver's own grid is not meant.
        samples: images that were scored.
        quantize: rule that made bytes of the images.
        reference: row of the statistics that they were compared with.
        settings_in: where metrics to reference were read. UNVERIFIED marks what was not.
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
    metrics: str
    nfe: str
    sampler: str
    sigmas: str
    samples: str
    quantize: str
    reference: str
    settings_in: str
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
    def is_archive(self) -> bool:
        """Whether the file holds samples: nothing has to be sampled."""
        return self.kind == ARCHIVE

    @property
    def values(self) -> dict[str, tuple[float, float]]:
        """By metric, the published value and half a unit of its last digit."""
        texts = [part.split()[-1] for part in self.published.split(", ")]
        names = self.metrics.split()
        return {
            name: (float(text), 0.5 * 10.0 ** -len(text.partition(".")[2]))
            for name, text in zip(names, texts, strict=True)
        }

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
    if not checkpoint.is_read:
        raise _not_read(checkpoint)
    again = f"cmbench import {checkpoint.name}"
    return fetch_listed(checkpoint, folder, again, progress, allowed)


def fetch_listed(
    listed: PublicCheckpoint,
    folder: Path,
    again: str,
    progress: Progress = lambda done, total: None,
    allowed: Callable[[str], bool] = secure,
) -> Path:
    """Return the file of any row of the list, downloaded to ``folder`` if it is not there.

    Beside a downloaded file stands ``<file>.origin.json`` with its address and SHA-256.
    ``again`` is the command to repeat after the file was put there by hand.

    Raises:
        MissingError: it cannot be downloaded; the message says which file to put where.
        UserError: the file there is another one, or cannot be written.
    """
    who, path = f"{_what(listed)} {listed.name!r}", listed.path(folder)
    if path.is_file():
        _require_hash(listed, path, who)
        return path
    remedy = f"fetch {listed.url} and put it at {path}, then run `{again}` again"
    if listed.by_hand:
        raise MissingError(who, "cannot be downloaded directly", remedy=remedy)
    try:
        download(listed.url, path, sha256=listed.sha256, progress=progress, allowed=allowed)
        write_sealed(_origin(path), {"url": listed.url, "sha256": sha256_file(path)})
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


def unproven(listed: PublicCheckpoint, path: Path) -> str:
    """Return why a file is not known to be the published one; empty if it is.

    It is known by the hash in the list, or because it was downloaded from the address in the list.
    """
    found = sha256_file(path)
    if listed.sha256:
        return "" if found == listed.sha256 else f"has sha256 {found}, not {listed.sha256}"
    try:
        origin = read_sealed(_origin(path))
        if (origin["url"], origin["sha256"]) == (listed.url, found):
            return ""
    except UNREADABLE:
        pass
    return "was given by hand, and no hash of the published file is listed"


def _origin(path: Path) -> Path:
    return path.with_name(f"{path.name}.origin.json")


def _what(listed: PublicCheckpoint) -> str:
    if listed.kind.startswith("reference"):
        return "reference"
    return "samples" if listed.is_archive else "checkpoint"


def _not_read(checkpoint: PublicCheckpoint) -> UserError:
    remedy = "its networks are not here"
    if checkpoint.kind.startswith("reference"):
        remedy = f"fetch {checkpoint.url} and run `cmbench refs import FILE`"
    elif checkpoint.is_archive:
        remedy = f"run `cmbench reproduce {checkpoint.name}`"
    return UserError(
        f"{_what(checkpoint)} {checkpoint.name!r}",
        f"is of the format {checkpoint.kind!r}",
        allowed=", ".join(_READ),
        remedy=remedy,
    )


def _require_hash(checkpoint: PublicCheckpoint, path: Path, who: str) -> None:
    if checkpoint.sha256 and (found := sha256_file(path)) != checkpoint.sha256:
        raise UserError(
            who,
            f"{path} has sha256 {found}",
            allowed=checkpoint.sha256,
            remedy=f"delete it, and fetch {checkpoint.url} again",
        )
