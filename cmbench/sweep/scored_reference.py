"""What samples from elsewhere are compared with: images, statistics, or a dataset's reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from cmbench.data.base import Dataset
from cmbench.errors import UserError
from cmbench.files import sha256_file
from cmbench.measure.observers import PixelDigest
from cmbench.measure.references import dataset_reference, store_of
from cmbench.metrics.census import Census
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.metric import Metric
from cmbench.metrics.reference import Reference
from cmbench.metrics.reference_cache import (
    cached_census,
    cached_reference,
    load_with_floors,
    save_reference,
)
from cmbench.metrics.reference_import import holds_images, import_reference, with_reference_images
from cmbench.plugin.specs import DatasetSpec
from cmbench.samples.opening import open_samples
from cmbench.samples.source import ReadOptions, SampleSource
from cmbench.sweep.cells import CellSamples
from cmbench.sweep.context import Context
from cmbench.sweep.imported import is_import
from cmbench.sweep.opened_runs import find_run, open_imported_samples, open_run
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.scored_record import OpenSamples, ScoreRequest

_STATISTICS = {".safetensors", ".pt", ".pkl"}


@dataclass(frozen=True)
class RealImages:
    """Opens what one evaluation compares with.

    ``rule`` quantizes the samples, images must have ``channels``; ``notes`` say what was odd about
    images that were read.
    """

    context: Context
    request: ScoreRequest
    spec: DatasetSpec | None
    rule: str
    channels: int
    notes: list[str] = field(default_factory=list)

    def reference(self, extractor: Extractor, metrics: Sequence[Metric]) -> Reference:
        """Return the reference for ``metrics``, from the cache where it is there."""
        context, given = self.context, self.request.reference
        if given is None:
            assert self.spec is not None
            dataset = context.dataset(self.spec.name)
            return dataset_reference(
                context.workspace, dataset, extractor, self.rule, context.device
            )
        if find_run(context, given) is None:
            saved = self._saved(given, extractor)
            if saved is not None:
                return self._with_own_images(saved, extractor, metrics).to(context.device)
        return self.of_images(given, extractor)

    def of_images(self, given: str, extractor: Extractor) -> Reference:
        """Return the reference of the images that ``given`` means."""
        read = self.request.read
        options = ReadOptions(
            channels=self.channels, value_range=read.value_range, run_pipeline=read.run_pipeline
        )
        images, _ = open_source(self.context, given, options)
        reference = cached_reference(
            lambda: self._batches(images),
            extractor,
            source=Path(given).stem,
            quantization=self.rule,
            folder=self.context.workspace.cache / "references",
            source_sha256=content_hash(images, self.request.batch_size),
        )
        self.notes.extend(images.notes)
        return reference.to(self.context.device)

    def census(self, dataset: Dataset | None) -> Census | None:
        """Return what the pixels of real images say, for a reference that is statistics alone.

        Of the images that the file of statistics itself holds (OpenAI's), else of the dataset's;
        taken once and cached. None if neither has images.
        """
        path, folder = Path(self.request.reference or ""), self.context.workspace.cache / "census"
        if path.is_file() and holds_images(path):
            source = open_samples(str(path), ReadOptions())
            file = folder / f"{sha256_file(path)}.safetensors"
            return cached_census(lambda: self._batches(source), file)
        if dataset is None or dataset.spec.latent:
            return None
        return cached_census(dataset.reference_images, folder / f"{dataset.sha256}.safetensors")

    def _batches(self, source: SampleSource) -> Iterator[Tensor]:
        return (batch.images for batch in source.batches(self.request.batch_size))

    def _with_own_images(
        self, saved: Reference, extractor: Extractor, metrics: Sequence[Metric]
    ) -> Reference:
        """Add the features of the images that a file of statistics holds, if a metric needs them.

        OpenAI's files have 10,000 images, with which precision, recall and kernel distances
        compare. They are extracted once and kept in the cache.
        """
        path = Path(self.request.reference or "")
        wanted = any("real features" in metric.needs for metric in metrics)
        if not wanted or saved.features is not None or not holds_images(path):
            return saved
        key = replace(saved.key, source=f"{saved.key.source}-with-images")
        kept = self.context.workspace.cache / "references" / key.file_name
        if kept.is_file():
            return load_with_floors(kept)
        images = open_samples(str(path), ReadOptions())
        found = with_reference_images(saved, self._batches(images), extractor)
        save_reference(found, kept)
        return found

    def _saved(self, given: str, extractor: Extractor) -> Reference | None:
        """Return reference statistics that ``given`` means, or None if it means images."""
        path = Path(given)
        if path.suffix in _STATISTICS and path.is_file():
            entry = "fd_dinov2" if extractor.name == "dinov2" else "fid"
            return import_reference(path, entry=entry)
        if path.suffix == ".npz" and path.is_file():
            try:
                return import_reference(path)
            except UserError as error:
                if "holds" not in error.problem:
                    raise
                return None
        if path.exists() or ":" in given:
            return None
        return store_of(self.context.workspace).get(given)


def open_source(
    context: Context,
    given: str | OpenSamples,
    options: ReadOptions,
    nfe: int = 0,
    dataset: str | None = None,
    settings: SampleSettings | None = None,
) -> tuple[SampleSource, CellSamples | None]:
    """Return the samples that ``given`` means, and the run that makes them, if one does.

    A run of this harness, an imported checkpoint (sampled as ``dataset`` and ``settings`` ask), or
    what others made.
    """
    if not isinstance(given, str):
        return given(options), None
    if is_import(given):
        opened = open_imported_samples(
            context, given, dataset, nfe or None, options, settings or SampleSettings()
        )
        return opened.source, opened
    trained = find_run(context, given)
    if trained is None:
        return open_samples(given, options), None
    opened = open_run(context, trained, nfe or None, options)
    return opened.source, opened


def content_hash(source: SampleSource, batch_size: int) -> str:
    """Return a hash of a source's shape, type and pixels in order."""
    digest = PixelDigest(typed=True)
    for batch in source.batches(batch_size):
        digest(batch)
    return digest.sha256
