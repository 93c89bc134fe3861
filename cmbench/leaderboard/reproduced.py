"""Whether two records of one cell agree: measured twice, on other hardware or another torch."""

from __future__ import annotations

from typing import Any

from cmbench.leaderboard.sampled_again import (
    DEFAULT_TOLERANCE,
    Check,
    check_features,
    check_metric,
    tolerances,
)
from cmbench.records.options import dotted
from cmbench.records.record import Record

#: What may differ between two honest measurements: the machine, the time, what rounding changes,
#: and what is compared within a tolerance.
_MAY_DIFFER = (
    *("schema_version", "created", "command", "environment", "warnings", "artifacts", "metrics"),
    *("first_samples", "copies", "plugin.version", "dataset.reference_sha256"),
    *("training.checkpoint_sha256", "training.snapshots", "training.seconds_by_phase"),
    *("training.overrides", "sampling.overrides", "sampling.seconds", "sampling.images_per_s"),
    *("sampling.batch_size", "cost", "training.teacher_cost"),
)


def agreement(stored: Record, again: Record) -> list[Check]:
    """Compare what decides the numbers for equality, and the numbers within their tolerance.

    That of a metric is the one of ``cmbench verify --full``: a share of the value, or of its
    standard error; that of the first samples' mean feature is stated by the record.
    """
    before, after = _decides(stored), _decides(again)
    changed = sorted(
        key for key in before.keys() | after.keys() if before.get(key) != after.get(key)
    )
    if changed:
        return [Check("configuration", "failed", f"other {', '.join(changed[:5])}")]
    checks = []
    first, second = stored.first_samples, again.first_samples
    if first is not None and second is not None and first.pixels_sha256 != second.pixels_sha256:
        checks.append(check_features(first, second, tolerances(stored.sampling, first)[1]))
    for name in sorted(stored.metrics.keys() | again.metrics.keys()):
        metric = stored.metrics.get(name)
        if metric is None or name not in again.metrics:
            checks.append(Check(f"metric {name}", "failed", "in one of the records only"))
            continue
        made = again.metrics[name]
        checks.append(check_metric(name, metric, made, DEFAULT_TOLERANCE, stored.sampling))
    return checks


def _decides(record: Record) -> dict[str, Any]:
    flat = dict(dotted(record.model_dump(mode="json")))
    return {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(f"{name}.") for name in _MAY_DIFFER)
    }
