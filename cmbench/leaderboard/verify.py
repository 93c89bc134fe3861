"""Verify records: recompute hashes, sample again, and say what was not checked.

Everything that needs a network comes in as a callable, so this module imports no torch:
``reproduce`` makes the first images of a record, or all of them, again.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from cmbench.errors import UserError
from cmbench.files import sha256_file
from cmbench.records.record import (
    DTYPES,
    GRID_TILE,
    Artifact,
    FirstSamples,
    MetricRecord,
    Record,
    SamplingRecord,
    read_record,
)
from cmbench.records.reproduction import TOLERANCES, CannotReproduceError, Reproduce, Reproduction

#: "reproduced": not bit for bit, but within the tolerance that the record states.
State = Literal["ok", "reproduced", "failed", "not checked"]

#: Relative difference of a metric measured again on all images: covers other hardware's rounding.
DEFAULT_TOLERANCE = 0.01
#: Where a metric is near 0 a share of it says nothing: this share of its standard error is allowed
#: too, or, for a metric without one, one image of those measured.
ROUNDING_ERRORS = 0.1


@dataclass(frozen=True)
class Check:
    """One thing that was (not) checked, and what came out."""

    name: str
    state: State
    detail: str


def verify_record(
    path: Path,
    *,
    runs: Path | None = None,
    reproduce: Reproduce | None = None,
    full: bool = False,
    tolerance: float = DEFAULT_TOLERANCE,
) -> list[Check]:
    """Check one record file; the first failure does not stop the others.

    Args:
        path: the record.
        runs: folder of runs, to find the checkpoint whose hash the record holds.
        reproduce: makes images again; None skips that part and says so.
        full: make all images and compare every metric, instead of the first images only.
        tolerance: relative difference allowed for metrics of all images.
    """
    try:
        record = read_record(path)
    except UserError as error:
        return [Check("record", "failed", str(error))]
    return [
        Check("record", "ok", f"valid, schema version {record.schema_version}"),
        _check_bytes(path, record),
        _check_config(record),
        *_check_artifacts(path, record),
        _check_checkpoint(record, runs),
        *_check_snapshots(record, runs),
        _check_nfe(record),
        *_check_again(path, record, reproduce, full, tolerance),
    ]


def _check_bytes(path: Path, record: Record) -> Check:
    stored = hashlib.sha256(path.read_bytes()).hexdigest()
    if stored == record.sha256:
        return Check("bytes", "ok", f"sha256 {stored}")
    return Check("bytes", "failed", f"not the canonical form: {stored}, expected {record.sha256}")


def _check_config(record: Record) -> Check:
    """The hash covers the resolved recipe and the teacher's run id, if the teacher is a run."""
    training = record.training
    for teacher in {training.teacher, None}:
        text = json.dumps([training.config, teacher], sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest() == training.config_sha256:
            return Check("recipe hash", "ok", training.config_sha256)
    if record.status != "finished" and training.teacher is None and training.config.get("teacher"):
        return Check("recipe hash", "not checked", "it covers a teacher that the record omits")
    return Check("recipe hash", "failed", f"the recipe does not give {training.config_sha256}")


def _check_artifacts(path: Path, record: Record) -> list[Check]:
    return [
        _check_artifact(f"artifact {name}", path, artifact)
        for name, artifact in sorted(record.artifacts.items())
    ]


def _check_artifact(label: str, path: Path, artifact: Artifact) -> Check:
    try:
        folder = path.parent.resolve()
        file = (folder / artifact.file).resolve()
        if not file.is_relative_to(folder):
            return Check(label, "failed", f"{artifact.file} leaves the record's folder")
        if not file.is_file():
            return Check(label, "not checked", f"{artifact.file} is not here")
        if sha256_file(file) != artifact.sha256:
            return Check(label, "failed", f"{artifact.file} has another hash")
    except (OSError, ValueError, RuntimeError) as error:  # no path at all, loops of links
        return Check(label, "failed", f"{artifact.file!r} cannot be read ({error})")
    return Check(label, "ok", artifact.sha256)


def _check_checkpoint(record: Record, runs: Path | None) -> Check:
    expected = record.training.checkpoint_sha256
    if not expected:
        return Check("checkpoint", "not checked", "the record holds no checkpoint hash")
    try:
        folder = None if runs is None else (runs / record.training.run).resolve()
        if folder is None or not folder.is_relative_to(runs.resolve() if runs else folder):
            return Check("checkpoint", "not checked", "no folder of runs")
        files = sorted(folder.glob("weights-*.safetensors"))
        if not files:
            return Check("checkpoint", "not checked", f"no weights of {record.training.run} here")
        hashes = {file.name: sha256_file(file) for file in files}
    except (OSError, ValueError, RuntimeError) as error:  # no path at all, loops of links
        return Check("checkpoint", "not checked", f"the run cannot be read: {error}")
    if expected in hashes.values():
        return Check("checkpoint", "ok", expected)
    return Check("checkpoint", "failed", f"none of {', '.join(hashes)} has the hash {expected}")


def _check_snapshots(record: Record, runs: Path | None) -> list[Check]:
    """Check what a reconstructed average was made from; nothing for averages that were kept."""
    expected, label = record.training.snapshots, "snapshots"
    if not expected:
        return []
    try:
        folder = None if runs is None else (runs / record.training.run / "snapshots").resolve()
        if folder is None or runs is None or not folder.is_relative_to(runs.resolve()):
            return [Check(label, "not checked", "no folder of runs")]
        here = {n: sha256_file(folder / n) for n in expected if (folder / n).is_file()}
    except (OSError, ValueError, RuntimeError) as error:  # no path at all, loops of links
        return [Check(label, "not checked", f"the run cannot be read: {error}")]
    changed = sorted(name for name, found in here.items() if found != expected[name])
    if changed:
        return [Check(label, "failed", f"of another hash: {', '.join(changed)}")]
    if len(here) < len(expected):
        missing = f"{len(expected) - len(here)} of {len(expected)} are not here"
        return [Check(label, "not checked", missing)]
    return [Check(label, "ok", f"{len(here)} of the hashes that the record holds")]


def _check_nfe(record: Record) -> Check:
    sampling = record.sampling
    if sampling.nfe_measured is None:
        return Check("NFE", "not checked", "the record holds no counted NFE")
    if math.isclose(sampling.nfe_measured, sampling.nfe, rel_tol=1e-9):
        return Check("NFE", "ok", f"{sampling.nfe} declared and counted")
    return Check("NFE", "failed", f"{sampling.nfe} declared, {sampling.nfe_measured} counted")


# ---- sampling again -----------------------------------------------------------------------------


def _check_again(
    path: Path, record: Record, reproduce: Reproduce | None, full: bool, tolerance: float
) -> list[Check]:
    if record.status != "finished":
        return [Check("samples", "not checked", f"the cell is {record.status}")]
    if reproduce is None:
        return [Check("samples", "not checked", "sampling again was not asked for")]
    if record.first_samples is None and not full:
        remedy = "verify it with --full"
        return [Check("samples", "not checked", f"the record holds no checksums; {remedy}")]
    try:
        again = reproduce(record, full)
    except CannotReproduceError as error:
        return [Check("samples", "not checked", str(error))]
    except UserError as error:
        return [Check("samples", "not checked", f"cannot be sampled again: {error}")]
    except Exception as error:  # a method's fault must not end the verification of the others
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Check("samples", "failed", f"sampling again failed: {told}")]
    checks = _check_first(path, record, again)
    if not full:
        return [*checks, Check("metrics", "not checked", "compared with --full only")]
    for name, stored in record.metrics.items():
        checks.append(
            _check_metric(name, stored, again.metrics.get(name), tolerance, record.sampling)
        )
    return checks


def _check_first(path: Path, record: Record, again: Reproduction) -> list[Check]:
    """Compare the first images: by their checksum, else by pixels and features within tolerance."""
    stored, made, label = record.first_samples, again.first_samples, "samples"
    if stored is None:
        return [Check(label, "not checked", "the record holds no checksums")]
    if made.count != stored.count:
        problem = f"{made.count} images were made, the record has checksums of {stored.count}"
        return [Check(label, "failed", problem)]
    if made.pixels_sha256 == stored.pixels_sha256:
        told = f"the first {stored.count} images are the same: sha256 {stored.pixels_sha256}"
        return [Check(label, "ok", told), _check_grid(path, record, 0.0, again.grid_png)]
    pixels, features = _tolerances(record.sampling, stored)
    return [
        _check_features(stored, made, features),
        _check_grid(path, record, pixels, again.grid_png),
    ]


def _tolerances(sampling: SamplingRecord, stored: FirstSamples) -> tuple[float, float]:
    """Return what pixels and features may differ by: what the record states, within our limits."""
    precision = {dtype: name for name, dtype in DTYPES.items()}.get(sampling.dtype, "fp32")
    pixels, features = TOLERANCES[precision]
    return min(stored.pixel_tolerance, pixels), min(stored.feature_tolerance, features)


def _within(label: str, difference: float, allowed: float, unit: str) -> Check:
    """Return what a difference from the stored samples means."""
    if difference == 0:
        return Check(label, "ok", "the same")
    if difference <= allowed:
        return Check(label, "reproduced", f"within {difference:.3g} {unit} of {allowed:g} allowed")
    return Check(label, "failed", f"differs by {difference:.3g} {unit}, allowed {allowed:g}")


def _check_features(stored: FirstSamples, made: FirstSamples, tolerance: float) -> Check:
    label = f"mean feature of {stored.count} samples"
    ours, theirs = np.asarray(made.mean_feature), np.asarray(stored.mean_feature)
    if ours.shape != theirs.shape:
        return Check(label, "failed", f"{ours.size} features instead of {theirs.size}")
    norm = max(float(np.linalg.norm(theirs)), 1e-30)
    difference = float(np.linalg.norm(ours - theirs)) / norm
    return _within(label, difference, tolerance, "relative")


def _check_grid(path: Path, record: Record, tolerance: float, grid_png: bytes | None) -> Check:
    """Compare the sample grid, the only pixels that a record keeps."""
    artifact, label = record.artifacts.get("grid"), "pixels of the sample grid"
    if artifact is None or grid_png is None:
        return Check(label, "not checked", "no sample grid to compare with")
    try:
        file = (path.parent / artifact.file).resolve()
        if not (file.is_relative_to(path.parent.resolve()) and file.is_file()):
            return Check(label, "not checked", f"{artifact.file} is not here")
        (before, tile), (after, _) = _picture(file.read_bytes()), _picture(grid_png)
    except (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
        return Check(label, "failed", f"{artifact.file} is no picture: {error}")
    if before.shape != after.shape:
        return Check(label, "failed", f"{after.shape} instead of {before.shape} pixels")
    if not tile:
        return Check(label, "not checked", "it is a plot, not the images themselves")
    difference = float(np.abs(before - after).max(initial=0.0))
    return _within(label, difference, tolerance, "levels")


def _picture(data: bytes) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float64]], bool]:
    """Return a PNG's pixels, and whether they are those of images side by side."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        return np.asarray(picture.convert("RGB"), float), GRID_TILE in picture.info


def _check_metric(
    name: str,
    stored: MetricRecord,
    again: MetricRecord | None,
    tolerance: float,
    sampling: SamplingRecord,
) -> Check:
    label = f"metric {name}"
    if again is None:
        return Check(label, "not checked", "it was not measured again")
    if again.value is None or stored.value is None:
        same: State = "ok" if again.value == stored.value else "failed"
        return Check(label, same, f"{again.value} again, {stored.value} stored")
    if again.key != stored.key:
        return Check(label, "failed", f"measured under {again.key} instead of {stored.key}")
    if again.value == stored.value:
        return Check(label, "ok", f"{again.value:.6g}, the same")
    allowed = tolerance * abs(stored.value)
    if again.standard_error:
        allowed = max(allowed, ROUNDING_ERRORS * again.standard_error)
    elif not stored.value:
        allowed = 1 / max(sampling.num_samples, 1)
    state: State = "reproduced" if abs(again.value - stored.value) <= allowed else "failed"
    told = f"{again.value:.6g} again, {stored.value:.6g} stored, allowed ±{allowed:.3g}"
    return Check(label, state, told)
