"""Reference files: safetensors with a hash, cached under a key of everything that decides them.

The file name is a hash of the content of the data, extractor, weights, preprocessing, quantization
and layout version. A damaged file is computed again, and ``notes`` of the reference say so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.files import reading, sealed, unsealed
from cmbench.metrics._files import read_tensors, sha256_tensors, write_tensors
from cmbench.metrics.census import Census, CensusTaker
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.floor import Floors
from cmbench.metrics.inception_score import InceptionScore
from cmbench.metrics.kernel_distance import SelfKernel
from cmbench.metrics.reference import Reference, ReferenceKey
from cmbench.metrics.statistics import Divisor, Moments

KIND = "reference"
CENSUS_KIND = "census"
_REMEDY = "delete the file and run again to compute it again"


def cached_reference(
    images: Callable[[], Iterable[Tensor]],
    extractor: Extractor,
    *,
    source: str,
    source_sha256: str,
    quantization: str,
    folder: Path | None,
) -> Reference:
    """Return the reference of a dataset, read from ``folder`` if possible, else computed and saved.

    A cached reference without spatial features does not serve an extractor that gives them.

    Args:
        images: called only when the reference must be computed; yields uint8 batches
            ``[N, C, H, W]`` (or float in [-1, 1], then quantized).
        extractor: what turns them into features.
        source: name of the dataset and split, for people.
        source_sha256: hash of its content.
        quantization: the rule of the samples.
        folder: folder of reference files; None saves nothing.
    """
    key = ReferenceKey(
        source=source,
        source_sha256=source_sha256,
        extractor=extractor.name,
        extractor_sha256=extractor.weights_sha256,
        preprocessing=extractor.preprocessing,
        quantization=quantization,
    )
    if folder is None:
        return Reference.compute(images(), extractor, key)
    path = folder / key.file_name
    notes: tuple[str, ...] = ()
    if path.exists():
        try:
            found = load_with_floors(path, key)
            # One made without spatial features serves all metrics but theirs.
            if found.spatial is not None or not getattr(extractor, "spatial", False):
                return found
        except UserError as error:
            notes = (f"reference computed again: {error}",)
    reference = replace(Reference.compute(images(), extractor, key), notes=notes)
    save_reference(reference, path)
    return reference


def load_with_floors(path: Path, key: ReferenceKey | None = None) -> Reference:
    """Read a reference; add the floor that files of earlier versions lack, and keep it."""
    found = load_reference(path, key)
    if found.floors is None:
        found = found.with_floors()
        if found.floors is not None:
            save_reference(found, path)
    return found


def cached_census(images: Callable[[], Iterable[Tensor]], path: Path) -> Census:
    """Return the census of images: read from ``path`` if possible, else taken."""
    if path.is_file():
        try:
            tensors, _ = _read(path, CENSUS_KIND)
            if (found := _read_census(tensors)) is not None:
                return found
        except (UserError, KeyError, ValueError):
            pass  # damaged: taken again
    taker = CensusTaker()
    for batch in images():
        taker.update(batch)
    census = taker.result()
    _write(path, _census_tensors(census), {"kind": CENSUS_KIND})
    return census


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors with sealed metadata, which hold the tensors' hash."""
    facts = sealed({**metadata, "sha256": sha256_tensors(tensors)})
    write_tensors(path, tensors, facts)


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of :func:`_write`; raise ``UserError`` if tensors or metadata have changed."""
    tensors, metadata = read_tensors(path, kind)
    if sha256_tensors(tensors) != metadata.get("sha256"):
        raise UserError(str(path), "content does not match its hash", remedy=_REMEDY)
    with reading(str(path), _REMEDY):
        return tensors, unsealed(metadata)


def save_reference(reference: Reference, path: Path) -> None:
    """Write a reference with its hash, atomically."""
    count = -1 if reference.count is None else reference.count
    tensors = {"count": torch.tensor(count), **_moments_tensors("", reference.moments)}
    if reference.features is not None:
        tensors["features"] = reference.features
    if reference.radii is not None:
        tensors["radii"] = reference.radii
    if reference.kernel is not None:
        tensors["kernel_row_means"] = reference.kernel.row_means
        mean_square = torch.tensor(reference.kernel.mean_square, dtype=torch.float64)
        tensors["kernel_mean_square"] = mean_square
    if reference.spatial is not None:
        tensors |= _moments_tensors("spatial_", reference.spatial)
    if reference.census is not None:
        tensors |= _census_tensors(reference.census)
    metadata = {
        "kind": KIND,
        "key": json.dumps(asdict(reference.key), sort_keys=True),
        "divisor": reference.moments.divisor,
        "score": json.dumps(asdict(reference.score)) if reference.score else "",
        "floor": reference.floors.to_json() if reference.floors else "",
    }
    _write(path, tensors, metadata)


def load_reference(path: Path, key: ReferenceKey | None = None) -> Reference:
    """Read a reference; with ``key``, refuse one made for another.

    Raises:
        UserError: the file is missing, damaged, or belongs to another key.
    """
    tensors, metadata = _read(path, KIND)
    try:
        found = ReferenceKey(**json.loads(metadata["key"]))
        reference = _assemble(found, tensors, metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(str(path), f"is missing a part: {error}", remedy=_REMEDY) from error
    if key is not None and found != key:
        raise UserError(str(path), f"was made for {found}", allowed=str(key), remedy=_REMEDY)
    return reference


def _moments_tensors(prefix: str, moments: Moments) -> dict[str, Tensor]:
    return {
        f"{prefix}mean": moments.mean,
        f"{prefix}cov": moments.cov,
        f"{prefix}factor": moments.factor,
    }


#: Numbers of a census in the order of the file; files of earlier versions lack the last two.
_CENSUS_FACTS = ("low", "high", "grey", "flat", "roughness", "blocking")


def _census_tensors(census: Census) -> dict[str, Tensor]:
    tensors = {"census_hashes": census.hashes, "census_shape": torch.tensor(census.shape)}
    if census.mean is not None and census.std is not None:
        facts = [getattr(census, name) for name in _CENSUS_FACTS]
        tensors["census_mean"], tensors["census_std"] = census.mean, census.std
        tensors["census_facts"] = torch.tensor(facts, dtype=torch.float64)
    return tensors


def _read_census(tensors: dict[str, Tensor]) -> Census | None:
    if "census_hashes" not in tensors:
        return None
    shape = tuple(tensors["census_shape"].int().tolist())
    numbers = tensors["census_facts"].tolist() if "census_facts" in tensors else []
    facts: dict[str, Any] = dict(zip(_CENSUS_FACTS, numbers))
    facts |= {name: int(facts[name]) for name in ("low", "high") if name in facts}
    mean, std = tensors.get("census_mean"), tensors.get("census_std")
    return Census(tensors["census_hashes"], mean, std, shape=shape, **facts)


def _assemble(key: ReferenceKey, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Reference:
    divisor, count = metadata["divisor"], int(tensors["count"])
    if divisor not in ("n-1", "unknown"):
        raise ValueError(f"divisor {divisor!r}")

    def moments(prefix: str) -> Moments:
        mean, cov, factor = (tensors[f"{prefix}{name}"] for name in ("mean", "cov", "factor"))
        known = None if count < 0 else count
        return Moments(mean, cov, known, cast(Divisor, divisor), factor)

    kernel = None
    if "kernel_row_means" in tensors:
        kernel = SelfKernel(tensors["kernel_row_means"], float(tensors["kernel_mean_square"]))
    score = metadata["score"]
    return Reference(
        key,
        moments(""),
        features=tensors.get("features"),
        radii=tensors.get("radii"),
        kernel=kernel,
        spatial=moments("spatial_") if "spatial_mean" in tensors else None,
        score=InceptionScore(**json.loads(score)) if score else None,
        census=_read_census(tensors),
        floors=Floors.from_json(metadata["floor"]),
    )
