"""Verify records: recompute hashes, sample again, measure again, and say what was not checked.

Everything that needs a network comes in as a callable, so this module imports no torch:
``resample`` makes the first images of a record's sampling seed again and measures them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from cmbench.errors import UserError
from cmbench.records.record import Artifact, MetricRecord, Record, read_record

State = Literal["ok", "failed", "not checked"]

#: Relative difference of a metric measured again on all images: covers other hardware's rounding.
DEFAULT_TOLERANCE = 0.01
#: Where a metric is near 0 a share of it says nothing: this share of its standard error is allowed
#: too, or, for a metric without one, one image of those measured.
ROUNDING_ERRORS = 0.1
#: Mean absolute difference of the sample grid, in levels of 255.
GRID_LEVELS = 1.0
#: Half-width, in combined standard errors, for numbers measured again on a subset.
SUBSET_ERRORS = 4.0


@dataclass(frozen=True)
class Check:
    """One thing that was (not) checked, and what came out."""

    name: str
    state: State
    detail: str


@dataclass(frozen=True)
class Resampled:
    """Images of a record made again: how many, their metrics, and the sample grid."""

    count: int
    metrics: Mapping[str, MetricRecord]
    grid_png: bytes | None = None


class CannotResampleError(Exception):
    """Why a record cannot be sampled again here."""


#: Called with the record and the number of images wanted (its first ones).
Resample = Callable[[Record, int], Resampled]


def verify_record(
    path: Path,
    *,
    runs: Path | None = None,
    resample: Resample | None = None,
    samples: int = 0,
    tolerance: float = DEFAULT_TOLERANCE,
) -> list[Check]:
    """Check one record file; the first failure does not stop the others.

    Args:
        path: the record.
        runs: folder of runs, to find the checkpoint whose hash the record holds.
        resample: makes images again; None skips that part with the reason.
        samples: images to make again; 0 means all of them.
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
        *_check_again(path, record, resample, samples, tolerance),
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
        if _file_sha256(file) != artifact.sha256:
            return Check(label, "failed", f"{artifact.file} has another hash")
    except (OSError, ValueError, RuntimeError) as error:  # no path at all, loops of links
        return Check(label, "failed", f"{artifact.file!r} cannot be read ({error})")
    return Check(label, "ok", artifact.sha256)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        hashes = {file.name: _file_sha256(file) for file in files}
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
        here = {n: _file_sha256(folder / n) for n in expected if (folder / n).is_file()}
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
    path: Path, record: Record, resample: Resample | None, samples: int, tolerance: float
) -> list[Check]:
    if record.status != "finished":
        return [Check("samples", "not checked", f"the cell is {record.status}")]
    if resample is None:
        return [Check("samples", "not checked", "sampling again was not asked for")]
    count = min(samples or record.sampling.num_samples, record.sampling.num_samples)
    try:
        again = resample(record, count)
    except CannotResampleError as error:
        return [Check("samples", "not checked", str(error))]
    except UserError as error:
        return [Check("samples", "not checked", f"cannot be sampled again: {error}")]
    except Exception as error:  # a method's fault must not end the verification of the others
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Check("samples", "failed", f"sampling again failed: {told}")]
    full = again.count == record.sampling.num_samples
    checks = [_check_grid(path, record, again.grid_png)]
    for name, stored in record.metrics.items():
        try:
            made = again.metrics.get(name)
            checks.append(_check_metric(name, stored, made, tolerance, count, full))
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            told = f"cannot be compared: {type(error).__name__}: {error}"
            checks.append(Check(f"metric {name}", "failed", told))
    return checks


def _check_grid(path: Path, record: Record, grid_png: bytes | None) -> Check:
    artifact = record.artifacts.get("grid")
    if artifact is None or grid_png is None:
        return Check("grid", "not checked", "no sample grid to compare with")
    try:
        file = (path.parent / artifact.file).resolve()
        if not (file.is_relative_to(path.parent.resolve()) and file.is_file()):
            return Check("grid", "not checked", f"{artifact.file} is not here")
        stored, made = _pixels(file.read_bytes()), _pixels(grid_png)
    except (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
        return Check("grid", "failed", f"{artifact.file} is no picture: {error}")
    if stored.shape != made.shape:
        return Check("grid", "failed", f"{made.shape} instead of {stored.shape} pixels")
    difference = float(np.abs(stored - made).mean())
    state: State = "ok" if difference <= GRID_LEVELS else "failed"
    return Check("grid", state, f"mean difference {difference:.3g} levels, allowed {GRID_LEVELS:g}")


def _pixels(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        return np.asarray(picture.convert("RGB"), float)


def _check_metric(
    name: str,
    stored: MetricRecord,
    again: MetricRecord | None,
    tolerance: float,
    count: int,
    full: bool,
) -> Check:
    label = f"metric {name}"
    if again is None or again.value is None or stored.value is None:
        return Check(label, "not checked", "no value to compare")
    if not full:
        return _check_subset(label, stored, again)
    if again.key != stored.key:
        return Check(label, "failed", f"measured under {again.key} instead of {stored.key}")
    difference = abs(again.value - stored.value)
    allowed = tolerance * abs(stored.value)
    if stored.standard_error:
        allowed = max(allowed, ROUNDING_ERRORS * stored.standard_error)
    elif not stored.value:
        allowed = 1 / max(count, 1)
    state: State = "ok" if difference <= allowed else "failed"
    return Check(
        label, state, f"{again.value:.6g} again, {stored.value:.6g} stored, allowed ±{allowed:.3g}"
    )


def _check_subset(label: str, stored: MetricRecord, again: MetricRecord) -> Check:
    """Compare estimates whose expectation does not depend on the number of samples.

    A Fréchet distance falls with the number of samples, so its extrapolation to infinitely many
    is compared; other metrics need a standard error on both sides.
    """
    first, second = _unbiased(stored), _unbiased(again)
    if first is None or second is None:
        return Check(label, "not checked", "depends on the number of samples: verify all of them")
    allowed = SUBSET_ERRORS * math.hypot(first[1], second[1])
    difference = abs(first[0] - second[0])
    state: State = "ok" if difference <= allowed else "failed"
    return Check(
        label,
        state,
        f"{second[0]:.6g} on the subset, {first[0]:.6g} stored, allowed ±{allowed:.3g}",
    )


def _unbiased(metric: MetricRecord) -> tuple[float, float] | None:
    """Return an estimate without the sample count's bias, and its standard error, if known."""
    infinity = metric.detail.get("infinity")
    if isinstance(infinity, Mapping):
        interval = infinity.get("interval")
        if not infinity.get("reliable", True) or not interval or infinity.get("value") is None:
            return None
        return float(infinity["value"]), (float(interval[1]) - float(interval[0])) / (2 * 1.96)
    if metric.value is None or not metric.standard_error:
        return None
    return metric.value, metric.standard_error
