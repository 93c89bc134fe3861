"""What sets the configuration of one record apart, in words: the same on pages and terminals."""

from __future__ import annotations

from cmbench.records.options import pair_text, value_text
from cmbench.records.record import Record


def overrides_text(record: Record) -> tuple[str, ...]:
    """Return what differs from the recipe: ``("optimizer.lr=0.01",)``."""
    return pair_text(sorted((record.training.overrides or {}).items()))


def sampling_marks(record: Record) -> tuple[str, ...]:
    """Return how the samples were made otherwise than usual: ``("sigmas 80,0.8", "bfloat16")``.

    A sampler that the user chose is not among them: tables have a column for it.
    """
    sampling = record.sampling
    given = {k: v for k, v in sorted((sampling.overrides or {}).items()) if k != "sampler"}
    marks = [f"{key} {value_text(value)}" for key, value in given.items()]
    if sampling.tuned is not None:
        marks.append("tuned sigmas")
    if sampling.dtype != "float32":
        marks.append(sampling.dtype)
    return tuple(marks)


def configured_method(record: Record) -> str:
    """Return the method with what differs from its recipe: ``M +lr=0.01, sigmas 80,0.8``."""
    method = " ".join(
        [record.label or record.method, *(f"+{text}" for text in overrides_text(record))]
    )
    sampler = (record.sampling.overrides or {}).get("sampler")
    return ", ".join([method, *([str(sampler)] if sampler else []), *sampling_marks(record)])
