"""Checks of a source before it becomes a dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cmbench.data.rules import Rule
from cmbench.data.sources.base import ArraySource, ImageSource
from cmbench.data.store import StoredLabels
from cmbench.errors import first_names
from cmbench.plugin.specs import DatasetSpec


def check_kind(source: ImageSource, spec: DatasetSpec, rule: Rule) -> None:
    """Check that this kind of source can be the dataset."""
    if source.kind not in rule.kinds:
        raise source.error(
            f"cannot be the source of {spec.name!r}",
            allowed=", ".join(rule.kinds),
            remedy=f"give --source {rule.hint}",
        )


def check_missing(source: ArraySource, rule: Rule, *, subset: bool) -> None:
    """Check that all files of a dataset are there, or that a part of it is asked for."""
    if source.missing and rule.count is not None and not subset:
        raise source.error(
            f"lacks {first_names(source.missing, 10)}",
            allowed="all of its batches",
            remedy="download what is missing; or add --subset to prepare a part, which records "
            "then say",
        )


def check_count(source: ImageSource, count: int, rule: Rule, *, subset: bool) -> None:
    """Check that the source has the number of images of the dataset; a subset may have fewer."""
    if rule.count is None or count == rule.count or (subset and count < rule.count):
        return
    remedy = f"give --source {rule.hint}"
    if count < rule.count:
        remedy += "; or add --subset to prepare a part, which records then say"
    raise source.error(f"holds {count:,} images", allowed=f"{rule.count:,}", remedy=remedy)


def check_labels(
    source: ImageSource,
    spec: DatasetSpec,
    labels: Sequence[int] | None,
    class_names: Sequence[str],
    names: Sequence[str],
) -> StoredLabels | None:
    """Return the labels ``[N]``, None without classes; raise if missing or out of range."""
    if not spec.num_classes:
        return None
    if labels is None:
        as_custom = "zip" if source.kind == "zip" else "folder"
        raise source.error(
            f"has no labels, but {spec.name!r} has {spec.num_classes} classes",
            allowed="a dataset.json with labels, or one folder per class",
            remedy="give the folder that holds the class folders, or an archive with labels; or "
            f"prepare it unlabelled as {as_custom}:PATH",
        )
    if class_names and len(class_names) != spec.num_classes:
        raise source.error(
            f"has {len(class_names)} class folders ({', '.join(class_names[:3])}, …)",
            allowed=f"{spec.num_classes}",
            remedy="give the folder that holds the class folders and nothing else",
        )
    array = np.asarray(labels, dtype=np.int64)
    outside = np.flatnonzero((array < 0) | (array >= spec.num_classes))
    if len(outside):
        first = int(outside[0])
        raise source.error(
            f"label {array[first]} of image {names[first] if names else first!r} is out of range",
            allowed=f"0 … {spec.num_classes - 1}",
            remedy="check that the source belongs to this dataset",
        )
    return array.astype(np.int32)
