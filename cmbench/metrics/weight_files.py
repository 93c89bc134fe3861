"""Weights of published extractors: where they are, how to get them, and their hashes.

Nothing is ever fetched during an evaluation. ``cmbench prepare inception`` downloads from the
address that the library itself uses and verifies the hash; ``--from FILE`` takes a file that
was copied from elsewhere. A file whose hash is not the published one can still be used by its path,
but then the numbers are not called FID.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from cmbench.data.locations import DataLocations, default_data_dir, user_data_dir
from cmbench.downloads import DownloadError, download
from cmbench.errors import MissingError, UserError, unknown_name
from cmbench.files import expanded, sha256_file

WEIGHTS_VARIABLE = "CMBENCH_WEIGHTS"


@dataclass(frozen=True)
class WeightsFile:
    """A published file.

    ``sha256`` is the published hash, or the published first digits of it, or empty where the
    publisher names none. ``also`` are other names of the same file, in the libraries' caches.
    """

    name: str
    file_name: str
    url: str
    sha256: str
    also: tuple[str, ...] = ()

    def verifies(self, sha256: str) -> bool:
        """Whether a file with this hash is the published one."""
        return bool(self.sha256) and sha256.startswith(self.sha256)

    def problem(self, path: Path) -> UserError | None:
        """Return the error for a file with another hash than the published one."""
        found = sha256_file(path)
        if not self.sha256 or self.verifies(found):
            return None
        return UserError(
            f"weights {self.name!r}",
            f"{path.name} has sha256 {found}",
            allowed=f"{self.sha256}…" if len(self.sha256) < 64 else self.sha256,
            remedy=f"fetch {self.url} again; nothing was installed",
        )


WEIGHTS: dict[str, WeightsFile] = {
    file.name: file
    for file in (
        WeightsFile(
            "inception",
            "weights-inception-2015-12-05-6726825d.pth",
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
            # torch.hub's convention: the suffix is the beginning of the SHA-256.
            "6726825d",
            also=("pt_inception-2015-12-05-6726825d.pth",),
        ),
        WeightsFile(
            "clean-fid",
            "inception-2015-12-05.pt",
            "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
            "inception-2015-12-05.pt",
            # NVIDIA publishes no hash; k-diffusion's evaluation.py pins this one.
            "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        ),
        WeightsFile(
            "dinov2",
            "dinov2_vitl14_pretrain.pth",
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
            "",
        ),
    )
}


def weights_folder() -> Path:
    """Return ``$CMBENCH_WEIGHTS``, or the folder ``weights`` beside the prepared datasets."""
    given = os.environ.get(WEIGHTS_VARIABLE)
    return expanded(given) if given else default_data_dir() / "weights"


def find_weights(name: str, location: Path | str | None = None) -> Path:
    """Return the path of a weights file: the one given, ours, or the library's own cache.

    Raises:
        MissingError: it does not exist; the message says how to get it.
    """
    file = weights_file(name)
    if location is not None:
        path = Path(location)
        if not path.is_file():
            raise MissingError(f"weights {name!r}", f"no file {path}", remedy=_remedy(name))
        return path
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    # those that were prepared before CMBENCH_DATA was set
    before = [] if WEIGHTS_VARIABLE in os.environ else [user_data_dir() / "weights"]
    folders: list[Path] = [weights_folder(), *before, hub]
    for folder in folders:
        for candidate in (file.file_name, *file.also):
            if (folder / candidate).is_file():
                return folder / candidate
    raise MissingError(
        f"weights {name!r}",
        f"no file {file.file_name} in {weights_folder()} or {hub}",
        remedy=_remedy(name),
    )


def weights_file(name: str) -> WeightsFile:
    """Return what is known of a published file."""
    if name not in WEIGHTS:
        raise unknown_name("cmbench prepare", "weight", name, WEIGHTS)
    return WEIGHTS[name]


def _remedy(name: str) -> str:
    return (
        f"run `cmbench prepare {name}`, or fetch {WEIGHTS[name].url} elsewhere and run"
        f" `cmbench prepare {name} --from FILE`"
    )


def prepare_weights(name: str, source: Path | None = None, folder: Path | None = None) -> Path:
    """Install a weights file, verified, and return its path.

    Args:
        name: "inception", "clean-fid" or "dinov2".
        source: a local copy; None downloads from the library's address.
        folder: where to put it; :func:`weights_folder` by default.

    Raises:
        MissingError: the download fails or the local copy does not exist.
        UserError: the hash is not the published one; nothing is installed then.
    """
    file = weights_file(name)
    target = (folder or weights_folder()) / file.file_name
    if source is None and target.is_file() and file.problem(target) is None:
        return target  # a damaged one is fetched again
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".prepare-") as temporary:
            fetched = Path(temporary) / file.file_name
            if source is None:
                _fetch(file, fetched)
            elif source.is_file():
                shutil.copyfile(source, fetched)
            else:
                raise MissingError(f"weights {name!r}", f"no file {source}", remedy="check --from")
            if problem := file.problem(fetched):
                raise problem
            fetched.replace(target)
    except OSError as error:
        raise UserError(
            f"weights {name!r}",
            f"cannot be written to {target.parent}: {error.strerror or error}",
            remedy=f"set {WEIGHTS_VARIABLE} to a writable folder with free space",
        ) from error
    return target


def _fetch(file: WeightsFile, target: Path) -> None:
    try:
        download(file.url, target)
    except DownloadError as error:
        raise MissingError(
            f"weights {file.name!r}",
            f"cannot download {file.url}: {error}",
            remedy=f"fetch it elsewhere and run `cmbench prepare {file.name} --from FILE`",
        ) from error


def prepare_target(name: str, source: Path | None, locations: DataLocations) -> str:
    """Install a weights file and return the line that ``cmbench prepare`` prints.

    Without ``$CMBENCH_WEIGHTS`` it goes to the folder ``weights`` of ``--data-dir``.
    """
    named = os.environ.get(WEIGHTS_VARIABLE)
    path = prepare_weights(name, source, None if named else locations.data_dir / "weights")
    found = sha256_file(path)
    state = "verified" if weights_file(name).verifies(found) else "no published hash to verify"
    return f"{name}: {path} (sha256 {found}, {state})"
