"""Verify records: recompute hashes, sample again, and say what was not checked. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

from cmbench.errors import UserError
from cmbench.files import UNREADABLE, read_sealed, sha256_file
from cmbench.leaderboard.details import contradiction_of
from cmbench.leaderboard.sampled_again import DEFAULT_TOLERANCE, Check, check_again
from cmbench.records.record import Artifact, Record, read_record
from cmbench.records.reproduction import Reproduce


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
    folder = _run_folder(record, runs)
    return [
        Check("record", "ok", f"valid, schema version {record.schema_version}"),
        _check_bytes(path, record),
        *_check_name(path, record),
        _check_config(record),
        *_check_artifacts(path, record),
        _check_checkpoint(record, folder),
        *_check_training(record, folder),
        *_check_snapshots(record, folder),
        _check_nfe(record),
        *_check_values(record),
        *check_again(path, record, reproduce, full, tolerance),
    ]


def _check_bytes(path: Path, record: Record) -> Check:
    stored = hashlib.sha256(path.read_bytes()).hexdigest()
    if stored == record.sha256:
        return Check("bytes", "ok", f"sha256 {stored}")
    return Check("bytes", "failed", f"not the canonical form: {stored}, expected {record.sha256}")


def _check_name(path: Path, record: Record) -> list[Check]:
    """Compare the file's name and folder, and the keys of the metrics, with the record."""
    found = []
    if path.stem != record.cell:
        found.append(Check("name", "failed", f"the file is {path.name}, the cell {record.cell}"))
    folder = path.resolve().parent
    if folder.parent.name == "records" and folder.name != record.dataset.name:
        told = f"the record belongs to {record.dataset.name}, but is stored under {folder.name}"
        found.append(Check("folder", "failed", told))
    counts = {
        int(fact[2:])
        for metric in record.metrics.values()
        for fact in metric.key.split(":")
        if re.fullmatch(r"n=\d{1,15}", fact)
    }
    if counts - {record.sampling.num_samples}:
        told = f"{record.sampling.num_samples} samples, but the keys of its metrics say {counts}"
        found.append(Check("number of samples", "failed", told))
    return found


def _check_config(record: Record) -> Check:
    """The hash covers the resolved recipe and the teacher's run id, if the teacher is a run."""
    training = record.training
    if record.kind == "scored samples" and not training.config:
        return Check("recipe hash", "not checked", "the samples come without a recipe")
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


def _run_folder(record: Record, runs: Path | None) -> Path | str:
    """Return the folder of the record's run below ``runs``, or why there is none to look into."""
    try:
        folder = None if runs is None else (runs / record.training.run).resolve()
        if runs is None or folder is None or not folder.is_relative_to(runs.resolve()):
            return "no folder of runs"
    except (OSError, ValueError, RuntimeError) as error:  # no path at all, loops of links
        return f"the run cannot be read: {error}"
    return folder


def _check_checkpoint(record: Record, folder: Path | str) -> Check:
    expected, label = record.training.checkpoint_sha256, "checkpoint"
    if not expected:
        return Check(label, "not checked", "the record holds no checkpoint hash")
    if isinstance(folder, str):
        return Check(label, "not checked", folder)
    try:
        files = sorted(folder.glob("weights-*.safetensors"))
        if not files:
            return Check(label, "not checked", f"no weights of {record.training.run} here")
        hashes = {file.name: sha256_file(file) for file in files}
    except OSError as error:
        return Check(label, "not checked", f"the run cannot be read: {error}")
    if expected in hashes.values():
        return Check(label, "ok", expected)
    return Check(label, "failed", f"none of {', '.join(hashes)} has the hash {expected}")


def _check_training(record: Record, folder: Path | str) -> list[Check]:
    """Compare the record's run, parameters and images with the run's files, which are sealed."""
    training, label = record.training, "training"
    if isinstance(folder, str) or not (folder / "result.json").is_file():
        return []
    try:
        result, others = read_sealed(folder / "result.json"), _runs_of(folder) - {training.run}
        weights = training.checkpoint_sha256
        exports = [e for e in result["exports"].values() if e["sha256"] == weights]
        pairs = {"parameters": (training.parameters, {result["parameters"]})}
        if exports:
            pairs["images"] = (training.images_seen, {e["images_seen"] for e in exports})
    except UNREADABLE as error:
        return [Check(label, "failed", f"the run's result {error}")]
    for other in sorted(others):
        return [Check(label, "failed", f"a record of {training.run}, but files there of {other}")]
    for what, (told, known) in pairs.items():
        if told not in known:
            words = " or ".join(f"{n:,}" for n in sorted(known))
            return [Check(label, "failed", f"{told:,} {what}, but the run's result says {words}")]
    return [Check(label, "ok", f"{training.parameters:,} parameters, as the run's result")]


def _runs_of(folder: Path) -> set[str]:
    """Return the ids that description, result and weights in a run's folder hold."""
    files = [folder / "run.json", folder / "result.json"]
    manifests = [read_sealed(path)["meta"] for path in folder.glob("weights-*.json")]
    return {str(facts["run"]) for facts in (*map(read_sealed, files), *manifests)}


def _check_snapshots(record: Record, folder: Path | str) -> list[Check]:
    """Check what a reconstructed average was made from; nothing for averages that were kept."""
    expected, label = record.training.snapshots, "snapshots"
    if not expected:
        return []
    if isinstance(folder, str):
        return [Check(label, "not checked", folder)]
    try:
        kept = folder / "snapshots"
        here = {n: sha256_file(kept / n) for n in expected if (kept / n).is_file()}
    except OSError as error:
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
    most = "at most " if sampling.adaptive else ""
    told = f"{most}{sampling.nfe} declared, {sampling.nfe_measured} counted"
    fewer = sampling.adaptive and sampling.nfe_measured < sampling.nfe
    return Check("NFE", "ok" if fewer else "failed", told)


def _check_values(record: Record) -> list[Check]:
    """Compare each value with what was stored beside it; nothing where they agree."""
    told = {name: contradiction_of(metric) for name, metric in sorted(record.metrics.items())}
    return [Check(f"metric {name}", "failed", why) for name, why in told.items() if why]
