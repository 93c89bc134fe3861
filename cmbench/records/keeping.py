"""Keeping the record of samples that may have been scored before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmbench.errors import UserError
from cmbench.records.options import value_text
from cmbench.records.record import Record, read_record, write_record

_NOT_STATED = "not stated"


def keep_record(record: Record, folder: Path, who: str) -> Path:
    """Write a record, unless the same samples left it before; return its path.

    Raises:
        UserError: the samples left a record that states other facts about them. It stays as it is.
    """
    path = folder / f"{record.cell}.json"
    if not path.exists():
        return write_record(record, folder)
    before, now = stated_facts(read_record(path)), stated_facts(record)
    changed = [
        f"{name} {value_text(before[name])} there, {value_text(now[name])} now"
        for name in now
        if before[name] != now[name]
    ]
    if changed:
        raise UserError(
            who,
            f"these samples have the record {path} with other facts: {'; '.join(changed)}",
            remedy="records are never changed: delete it and run the command again, or give the"
            " samples another --label",
        )
    return path


def stated_facts(record: Record) -> dict[str, Any]:
    """Return what a record says of its samples that neither their pixels nor the metrics decide."""
    training, sampling = record.training, record.sampling
    return {
        "NFE": sampling.nfe or _NOT_STATED,
        "seed": sampling.seed,
        "parameters": training.parameters or _NOT_STATED,
        "training images": training.images_seen or _NOT_STATED,
        "class labels": sampling.labels or _NOT_STATED,
        "sampler": sampling.sampler,
        "noise levels": sampling.sigmas,
        "dtype": sampling.dtype,
        "protocol's samples": sampling.protocol_samples,
    }
