"""Reference statistics that others published, read safely and kept under their own key.

========================== ================================================== ==================
file                       holds                                              extractor
========================== ================================================== ==================
EDM, pytorch-fid ``.npz``  mu, sigma                                          legacy-tensorflow
clean-fid ``.npz``         mu, sigma; or feats (its KID file)                 mode in its own name
OpenAI ``VIRTUAL_*.npz``   mu, sigma, mu_s, sigma_s, arr_0 (10,000 images)    inception
torch-fidelity ``.pt``     mu, sigma; or a matrix of features                 inception
EDM2 ``.pkl``              {fid: {mu, sigma}, fd_dinov2: {mu, sigma}}         by its entry
cmbench ``.safetensors``   a whole reference                                  in its key
========================== ================================================== ==================

No file names the weights that made it, so an imported reference counts as made with the published
ones. It names its source (``origin``) and never shares a metric key with a reference computed here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmbench.data.npy import npz_names, read_npz
from cmbench.data.pickles import load_plain_pickle
from cmbench.errors import MissingError, UserError, first_names, unknown_name
from cmbench.files import regular, sha256_file, write_atomically
from cmbench.importers.tensors import read_torch
from cmbench.metrics.catalog import EXTRACTORS
from cmbench.metrics.census import CensusTaker
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.reference import ANY, Reference, ReferenceKey
from cmbench.metrics.reference_cache import load_reference
from cmbench.metrics.statistics import Moments
from cmbench.metrics.weight_files import WEIGHTS

Array = npt.NDArray[Any]

#: Extractor name -> (published weights, preprocessing), as in the key of computed references.
PUBLISHED = {
    "inception": (WEIGHTS["inception"].sha256, "tf1-bilinear"),
    "inception-clean": (WEIGHTS["clean-fid"].sha256, "clean"),
    "inception-legacy-tensorflow": (WEIGHTS["clean-fid"].sha256, "legacy-tensorflow"),
    "inception-legacy-pytorch": (WEIGHTS["inception"].sha256, "legacy-pytorch"),
    # EDM2 resizes otherwise than dgm-eval: its statistics fit the extractor "dinov2-edm2" alone.
    "dinov2": (ANY, "edm2"),
}
#: Width of each one's features, and of the spatial ones of OpenAI's files (7 maps of 17 x 17).
WIDTHS = {name: 1024 if name == "dinov2" else 2048 for name in PUBLISHED}
SPATIAL_WIDTH = 2023
#: Largest negative eigenvalue of a covariance in float32, relative to the largest one.
_ROUNDING = 1e-4
#: Features of images are of order 1 in every published extractor: what is this large, or varies
#: this little in all features together, is damaged. Products of such numbers are finite floats.
_LARGEST_FEATURE, _SMALLEST_TRACE = 1e6, 1e-12
_ALLOWED = "an EDM, clean-fid, OpenAI, torch-fidelity, EDM2 or cmbench reference file"
#: clean-fid's own names: {data}_{mode}_{split}_{resolution}.npz, and _kid.npz. A mode's name
#: anywhere else says nothing: such files are taken for EDM's unless ``extractor`` says otherwise.
_CLEAN_FID = re.compile(
    r".+_(clean|legacy_pytorch|legacy_tensorflow)_[a-z0-9]+_(?:\d+|na)(?:_kid)?\.npz"
)


@dataclass(frozen=True)
class FileArrays:
    """What a file holds: arrays, and the extractor that its format implies."""

    origin: str
    extractor: str
    arrays: Mapping[str, Array]


def import_reference(
    path: Path,
    *,
    name: str | None = None,
    extractor: str | None = None,
    count: int | None = None,
    entry: str = "fid",
) -> Reference:
    """Read a reference file of another program.

    Args:
        path: the file, see the table above.
        name: what to call it; its file name by default.
        extractor: which extractor made it; guessed from the format by default.
        count: number of images behind it, if you know: the file does not say. It decides the rank
            of the covariance.
        entry: which entry of an EDM2 file: "fid" or "fd_dinov2".

    Raises:
        MissingError: the file does not exist.
        UserError: it is damaged, or of another kind; nothing in it is executed.
    """
    if not path.is_file():
        raise MissingError(str(path), "does not exist", allowed=_ALLOWED)
    if path.suffix == ".safetensors":
        return load_reference(path)
    found = _read(path, entry)
    chosen = extractor or found.extractor
    _require_published(path, chosen)
    weights, preprocessing = PUBLISHED[chosen]
    key = ReferenceKey(
        source=name or path.stem,
        source_sha256=sha256_file(path),
        extractor=chosen,
        extractor_sha256=weights,
        preprocessing=preprocessing,
        quantization=ANY,
        origin=found.origin,
    )
    return _build(path, key, found.arrays, count)


def _require_published(path: Path, extractor: str) -> None:
    """Raise ``UserError`` unless statistics of an extractor can be imported."""
    if extractor in {spec.name for spec in EXTRACTORS} - PUBLISHED.keys():
        raise UserError(
            str(path),
            f"statistics of {extractor!r} cannot be imported: no file names its weights",
            allowed=", ".join(PUBLISHED),
            remedy="give the images themselves as --reference",
        )
    if extractor not in PUBLISHED:
        raise unknown_name(str(path), "extractor", extractor, PUBLISHED)


def _require_width(path: Path, what: str, width: int, expected: int, extractor: str) -> None:
    if width != expected:
        raise UserError(
            str(path),
            f"{what} of {width} features",
            allowed=f"{expected}, the width of {extractor!r}",
            remedy="name the extractor that made them with --extractor, or download the file again",
        )


def _build(
    path: Path, key: ReferenceKey, arrays: Mapping[str, Array], count: int | None
) -> Reference:
    if "features" in arrays:
        rows = arrays["features"]
        if rows.ndim != 2 or rows.dtype.kind != "f" or len(rows) < 2:
            problem = f"features of shape {rows.shape} and {rows.dtype}"
            raise UserError(str(path), problem, allowed="floats [N, D]")
        _require_width(path, "rows", rows.shape[1], WIDTHS[key.extractor], key.extractor)
        with np.errstate(over="ignore"):
            _check_range(path, "features", rows, rows.var(axis=0, dtype="f8"))
        return Reference.of_features(key, torch.from_numpy(rows.astype(np.float32)).clone())
    moments = _moments(path, arrays["mu"], arrays["sigma"], count)
    _require_width(path, "statistics", moments.dim, WIDTHS[key.extractor], key.extractor)
    spatial = None
    if "mu_s" in arrays:
        spatial = _moments(path, arrays["mu_s"], arrays["sigma_s"], count)
        _require_width(path, "spatial statistics", spatial.dim, SPATIAL_WIDTH, key.extractor)
    return Reference(key, moments, spatial=spatial)


def _moments(path: Path, mean: Array, cov: Array, count: int | None) -> Moments:
    if mean.dtype.kind != "f" or cov.dtype.kind != "f":
        raise UserError(
            str(path), f"mu of {mean.dtype} and sigma of {cov.dtype}", allowed="floating point"
        )
    try:
        # Copies in memory of torch's own alignment, as of tensors that are read or computed.
        mu, sigma = (torch.from_numpy(array.astype("f8")).clone() for array in (mean, cov))
        moments = Moments(mu, sigma, count)
    except UserError as error:
        remedy = error.remedy or "fetch the file again, or give the images themselves"
        raise UserError(str(path), error.problem, allowed=error.allowed, remedy=remedy) from error
    asymmetry = float((moments.cov - moments.cov.T).abs().max())
    if asymmetry > 1e-6 * float(moments.cov.abs().max()):
        raise UserError(str(path), "sigma is not symmetric", allowed="a covariance matrix")
    if count is not None and count < 2:
        raise UserError(str(path), f"count {count}", allowed="at least 2")
    found = replace(moments, cov=(moments.cov + moments.cov.T) / 2)
    _check_range(path, "mu", mean, np.diagonal(cov).astype("f8"))
    _check_values(path, found, np.finfo(cov.dtype).eps)
    return found


def _check_range(path: Path, what: str, values: Array, variances: Array) -> None:
    """Refuse features or means, and variances in float64, that no images have."""
    for told, number, least, most in (
        (f"{what} up to", np.abs(values).max(), 0, _LARGEST_FEATURE),
        ("the variances sum to", variances.sum(), _SMALLEST_TRACE, _LARGEST_FEATURE**2),
    ):
        if not least <= number <= most:
            problem, allowed = f"{told} {number:.3g}", f"{least:g} to {most:g}"
            raise UserError(str(path), problem, allowed=allowed, remedy="fetch the file again")


def _check_values(path: Path, moments: Moments, eps: float) -> None:
    """Refuse negative variances, and a count that the covariance contradicts.

    The rank is at most count - 1.
    """
    variances = moments.cov.diagonal()
    if bool((variances < 0).any()):
        index = int(variances.argmin())
        problem = f"the variance of feature {index} is {float(variances[index]):.3g}"
        raise UserError(str(path), problem, allowed="a covariance matrix, variances from 0")
    values = torch.linalg.eigvalsh(moments.cov)
    if float(values[0]) < -_ROUNDING * float(values[-1]):
        problem = f"sigma has the eigenvalue {float(values[0]):.3g}, a negative variance"
        raise UserError(str(path), problem, allowed="a covariance matrix, eigenvalues from 0")
    if moments.rank_bound == moments.dim:
        return
    rank = int((values > 10 * float(values[-1]) * moments.dim * eps).sum())
    if rank > moments.rank_bound:
        raise UserError(
            str(path),
            f"count {moments.count}, but sigma has rank {rank}",
            allowed=f"a count above {rank}",
            remedy="give the number of images behind the file, or leave the count out",
        )


# ---- readers ------------------------------------------------------------------------------------


def _read(path: Path, entry: str) -> FileArrays:
    readers: dict[str, Callable[[Path, str], FileArrays]] = {
        ".npz": _read_npz,
        ".pt": _read_torch,
        ".pth": _read_torch,
        ".pkl": _read_pickle,
    }
    if path.suffix not in readers:
        raise UserError(str(path), f"a {path.suffix or 'nameless'} file", allowed=_ALLOWED)
    return readers[path.suffix](path, entry)


def _read_npz(path: Path, entry: str) -> FileArrays:
    names = npz_names(path)
    arrays = read_npz(path, ("mu", "sigma", "mu_s", "sigma_s", "feats"))
    mode = _CLEAN_FID.fullmatch(path.name.lower())
    clean = f"inception-{mode.group(1).replace('_', '-')}" if mode else ""
    if {"mu_s", "sigma_s", "mu", "sigma"} <= arrays.keys():
        four = ("mu", "sigma", "mu_s", "sigma_s")
        return FileArrays("openai", "inception", {name: arrays[name] for name in four})
    if {"mu", "sigma"} <= arrays.keys():
        values = {name: arrays[name] for name in ("mu", "sigma")}
        if clean:
            return FileArrays("clean-fid", clean, values)
        return FileArrays("edm", "inception-legacy-tensorflow", values)
    if "feats" in arrays:
        return FileArrays("clean-fid", clean or "inception-clean", {"features": arrays["feats"]})
    raise _other(path, dict.fromkeys(names))


def _read_torch(path: Path, entry: str) -> FileArrays:
    content = read_torch(path, str(path))
    if isinstance(content, Tensor):
        return FileArrays("torch-fidelity", "inception", {"features": content.numpy()})
    if isinstance(content, dict) and {"mu", "sigma"} <= content.keys():
        return FileArrays("torch-fidelity", "inception", _statistics(path, content))
    raise _other(path, content)


def _statistics(path: Path, content: Mapping[str, Any]) -> dict[str, Array]:
    """Return ``mu`` and ``sigma`` as arrays."""
    found = {}
    for name in ("mu", "sigma"):
        value = content[name].numpy() if isinstance(content[name], Tensor) else content[name]
        if not isinstance(value, np.ndarray):
            problem = f"{name} is a {type(value).__name__}"
            raise UserError(
                str(path), problem, allowed="an array", remedy="download the file again"
            )
        found[name] = value
    return found


def _read_pickle(path: Path, entry: str) -> FileArrays:
    with regular(path).open("rb") as file:
        content = load_plain_pickle(file, str(path))
    if not isinstance(content, dict):
        raise _other(path, content)
    extractor = {"fid": "inception-legacy-tensorflow", "fd_dinov2": "dinov2"}.get(entry, "")
    values = content.get(entry)
    if not extractor or not isinstance(values, dict) or not {"mu", "sigma"} <= values.keys():
        raise UserError(
            str(path),
            f"no entry {entry!r} with mu and sigma",
            allowed="fid, fd_dinov2",
            remedy=f"the file has: {', '.join(sorted(map(str, content)))}",
        )
    return FileArrays("edm2", extractor, _statistics(path, values))


def _other(path: Path, content: object) -> UserError:
    if isinstance(content, dict):
        held = first_names(sorted(map(str, content)), 8) or "nothing"
    else:
        held = type(content).__name__
    return UserError(str(path), f"holds {held}", allowed=_ALLOWED)


def holds_images(path: Path) -> bool:
    """Say whether a file of statistics also holds images (OpenAI's do, in ``arr_0``)."""
    return path.suffix == ".npz" and "arr_0" in npz_names(path)


# ---- adding images ------------------------------------------------------------------------------


def with_reference_images(
    reference: Reference, images: Iterable[Tensor], extractor: Extractor
) -> Reference:
    """Return an imported reference with features of its own images (OpenAI's ``arr_0``).

    The moments stay those of the file (the whole training set); precision, recall and KID compare
    with these images. ``images`` are uint8 batches ``[N, 3, H, W]``.
    """
    key = reference.key
    if key.extractor != extractor.name or not extractor.weights_sha256.startswith(
        key.extractor_sha256
    ):
        raise UserError(
            f"reference {key.source!r}",
            f"the extractor is {extractor.name!r} with weights {extractor.weights_sha256[:8]}",
            allowed=f"{key.extractor!r} with weights {key.extractor_sha256[:8]}",
            remedy="import it without its images",
        )
    census, pool = CensusTaker(), []
    for batch in images:
        census.update(batch)
        pool.append(extractor(batch).pool)
    whole = replace(reference.with_features(torch.cat(pool)), census=census.result())
    return whole.with_floors()


def export_reference(reference: Reference, path: Path) -> None:
    """Write mean and covariance as an ``.npz`` with ``mu`` and ``sigma``, as EDM's files are."""
    buffer = io.BytesIO()
    moments = reference.moments
    np.savez(buffer, mu=moments.mean.cpu().numpy(), sigma=moments.cov.cpu().numpy())
    write_atomically(path, buffer.getvalue())
