"""What a dataset's samples are compared with: its own images, or imported statistics."""

from __future__ import annotations

import torch

from cmbench.data.base import Dataset
from cmbench.errors import MissingError, UserError
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.reference import Reference
from cmbench.metrics.reference_cache import cached_reference
from cmbench.metrics.reference_store import ReferenceStore
from cmbench.records.workspace import Workspace


def store_of(workspace: Workspace) -> ReferenceStore:
    """Return the workspace's references: imported and computed."""
    return ReferenceStore(workspace.root / "references", workspace.cache / "references")


def dataset_reference(
    workspace: Workspace, dataset: Dataset, extractor: Extractor, rule: str, device: torch.device
) -> Reference:
    """Return a dataset's reference on ``device``, from the workspace's cache where it is there.

    Raises:
        MissingError: the data are latents, and the statistics of the original pictures or the
            decoder are not here; the message says how to get them.
    """
    if dataset.spec.latent:
        found = imported_reference(workspace, dataset.name, extractor)
        dataset.require_pixels()
        return found.to(device)
    return cached_reference(
        dataset.reference_images,
        extractor,
        source=dataset.name,
        source_sha256=dataset.sha256,
        quantization=rule,
        folder=workspace.cache / "references",
    ).to(device)


def imported_reference(workspace: Workspace, name: str, extractor: Extractor) -> Reference:
    """Return the imported statistics called ``name`` that were made with this extractor."""
    found: dict[str, Reference] = {}
    for entry in store_of(workspace).entries():
        key = entry.reference.key if entry.reference else None
        if key is not None and (key.source, key.extractor) == (name, extractor.name):
            assert entry.reference is not None
            found[entry.name] = entry.reference
    if len(found) > 1:
        raise UserError(
            f"dataset {name!r}",
            f"has {len(found)} imported references: {', '.join(found)}",
            allowed=f"one of {extractor.name}",
            remedy=f"remove the others from {workspace.root / 'references'}",
        )
    if found:
        return next(iter(found.values()))
    raise MissingError(
        f"dataset {name!r}",
        f"its reference are statistics of the original pictures ({extractor.name}), which are "
        f"not in {workspace.root / 'references'}",
        remedy=f"run `cmbench refs import FILE --name {name}` with EDM2's img512.pkl",
    )
