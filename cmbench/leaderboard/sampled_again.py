"""Sample the images of a record again and compare them. Imports no torch.

Everything that needs a network comes in as a callable: ``reproduce`` makes the first images of a
record, or all of them, again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from cmbench.errors import UserError
from cmbench.records.record import (
    DTYPES,
    GRID_TILE,
    FirstSamples,
    MetricRecord,
    Record,
    SamplingRecord,
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


def check_again(
    path: Path, record: Record, reproduce: Reproduce | None, full: bool, tolerance: float
) -> list[Check]:
    """Make a record's images again and compare them; see :func:`verify.verify_record`."""
    if record.status != "finished":
        return [Check("samples", "not checked", f"the cell is {record.status}")]
    if record.kind != "measured":
        return [Check("samples", "not checked", f"{record.kind}: they are not sampled again")]
    if reproduce is None:
        return [Check("samples", "not checked", "skipped (--no-resample)")]
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
    for name in sorted(record.metrics.keys() | again.metrics.keys()):
        stored, made = record.metrics.get(name), again.metrics.get(name)
        if stored is None:
            checks.append(Check(f"metric {name}", "failed", "measured, but not in the record"))
            continue
        checks.append(check_metric(name, stored, made, tolerance, record.sampling))
        if made is not None and record.schema_version > 1:
            checks += _check_detail(name, stored, made)
    return checks


def _check_detail(name: str, stored: MetricRecord, made: MetricRecord) -> list[Check]:
    """Compare what stands beside a value, if the value itself is the same to the last bit."""
    if stored.value != made.value:
        return []
    pairs = {
        "standard error": (stored.standard_error, made.standard_error),
        "interval": (stored.interval, made.interval),
        **{
            part: (stored.detail.get(part), made.detail.get(part)) for part in ("floor", "infinity")
        },
    }
    changed = [part for part, (before, after) in pairs.items() if not _same(before, after)]
    if not changed:
        return []
    return [Check(f"metric {name}", "failed", f"other {', '.join(changed)} than measured again")]


def _same(first: object, second: object) -> bool:
    """Whether two parts of a record agree, numbers to the rounding of another machine."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-12)
    return first == second


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
    pixels, features = tolerances(record.sampling, stored)
    return [
        check_features(stored, made, features),
        _check_grid(path, record, pixels, again.grid_png),
    ]


def tolerances(sampling: SamplingRecord, stored: FirstSamples) -> tuple[float, float]:
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


def check_features(stored: FirstSamples, made: FirstSamples, tolerance: float) -> Check:
    """Compare the mean feature of the first samples, relative to its norm."""
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
        return Check(label, "failed", f"{artifact.file} cannot be decoded as an image: {error}")
    if before.shape != after.shape:
        return Check(label, "failed", f"{after.shape} instead of {before.shape} pixels")
    if not tile:
        return Check(label, "not checked", "it is a plot, not the images themselves")
    difference = float(np.abs(before - after).max())
    return _within(label, difference, tolerance, "levels")


def _picture(data: bytes) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float64]], bool]:
    """Return a PNG's pixels, and whether they are those of images side by side."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        return np.asarray(picture.convert("RGB"), float), GRID_TILE in picture.info


def check_metric(
    name: str,
    stored: MetricRecord,
    again: MetricRecord | None,
    tolerance: float,
    sampling: SamplingRecord,
) -> Check:
    """Compare a metric's value with the stored one, within a share of it or of its error."""
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
    allowed, share = tolerance * abs(stored.value), f"{100 * tolerance:g} %"
    if again.standard_error and ROUNDING_ERRORS * again.standard_error > allowed:
        allowed = ROUNDING_ERRORS * again.standard_error
        share = f"{ROUNDING_ERRORS:g} standard errors"
    elif not (again.standard_error or stored.value):
        allowed, share = 1 / max(sampling.num_samples, 1), "of one sample"
    state: State = "reproduced" if abs(again.value - stored.value) <= allowed else "failed"
    values = _told_apart(again.value, stored.value)
    told = "{} again, {} stored".format(*values)
    return Check(label, state, f"{told}, allowed ±{allowed:.3g} ({share})")


def _told_apart(a: float, b: float) -> tuple[str, str]:
    """Return two numbers that differ with the digits, at least six, that show it."""
    texts = ((f"{a:.{digits}g}", f"{b:.{digits}g}") for digits in range(6, 18))
    return next((x, y) for x, y in texts if x != y)
