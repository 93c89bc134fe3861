"""The whole of a preparation: check, decode or copy, verify, put in place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from cmbench.data.layout import Layout
from cmbench.data.locations import DataLocations
from cmbench.data.preparation.arrays import ArrayBlocks
from cmbench.data.preparation.checks import check_count, check_kind, check_labels, check_missing
from cmbench.data.preparation.decode import BlockWork, DecodingJob
from cmbench.data.preparation.partial import WHO, Partial, locked, os_errors
from cmbench.data.preparation.pool import Workers, run_serially
from cmbench.data.rules import Rule
from cmbench.data.sources.base import ArraySource, EncodedSource, ImageIndex, ImageSource
from cmbench.data.sources.detect import open_source
from cmbench.data.store import (
    BLOCKS,
    LABELS,
    MANIFEST,
    DatasetManifest,
    SourceNote,
    StoredLabels,
    content_hash,
    labels_hash,
    read_manifest,
)
from cmbench.data.verify import ProgressCallback, no_progress
from cmbench.errors import UserError
from cmbench.files import readable, write_sealed
from cmbench.plugin.specs import DatasetSpec

#: Below this many images, starting workers costs more than it saves.
_SERIAL_IMAGES = 4096
#: Archives of at least this many bytes, and folders of at least as many files as above, get their
#: workers started while they are indexed.
_LARGE_SOURCE = 8 << 20


@dataclass(frozen=True)
class Request:
    """What the user asks for. Empty strings mean the dataset's own choice."""

    source: Path
    split: str = ""
    transform: str = ""
    subset: bool = False
    workers: int | None = None
    force: bool = False
    restart: bool = False


@dataclass(frozen=True)
class Content:
    """What the blocks hold, once they are all written."""

    count: int
    labels: StoredLabels | None
    class_names: tuple[str, ...]
    fingerprint: str
    remark: str = ""
    passed_over: Mapping[str, int] = field(default_factory=dict)


class AlreadyPrepared(Exception):
    """The dataset is there, from the same source."""

    def __init__(self, manifest: DatasetManifest) -> None:
        super().__init__(manifest.dataset)
        self.manifest = manifest


def prepare(
    spec: DatasetSpec,
    rule: Rule,
    request: Request,
    locations: DataLocations,
    progress: ProgressCallback = no_progress,
) -> tuple[DatasetManifest, bool]:
    """Convert ``request.source`` into ``<data_dir>/<spec.name>``.

    Returns:
        The manifest, and whether anything was done (False: it was prepared already).

    Raises:
        UserError: for every fault of the source, the request or the disk; what was done so far
            is kept, and the same command resumes it.
    """
    target = locations.folder(spec.name)
    with os_errors(locations.data_dir), locked(target) as partial:
        try:
            return Preparation(spec, rule, request, target, partial, progress).run(), True
        except AlreadyPrepared as found:
            return found.manifest, False


def is_large(path: Path) -> bool:
    """Return whether a source is large enough for workers, without reading its files."""
    if path.is_file():
        return path.stat().st_size >= _LARGE_SOURCE
    seen = 0
    for _, _, files in os.walk(path):
        seen += len(files)
        if seen >= _SERIAL_IMAGES:
            return True
    return False


@dataclass
class Preparation:
    """One preparation, under its lock."""

    spec: DatasetSpec
    rule: Rule
    request: Request
    target: Path
    partial: Partial
    progress: ProgressCallback

    def run(self) -> DatasetManifest:
        """Prepare the dataset and return its manifest."""
        self.progress("reading the table of contents", 0, 0)
        source = open_source(self.request.source, self.request.split, self.partial.spool)
        check_kind(source, self.spec, self.rule)
        shape, dtype = self.rule.stored or (self.spec.data_shape, "uint8")
        self.layout = Layout(shape, dtype)
        self.stop_if_prepared(stat=source.stat)
        cut_already = source.kind == "zip" or isinstance(source, ArraySource)
        self.transform = self.request.transform or ("none" if cut_already else self.rule.transform)
        if isinstance(source, ArraySource):
            content = self.copy_arrays(source)
        else:
            content = self.decode_images(cast(EncodedSource, source))
        return self.finish(source, content)

    # ---- encoded images ------------------------------------------------------------------------

    def decode_images(self, source: EncodedSource) -> Content:
        """Read, decode and write every image that the journal lacks."""
        request = self.request
        with Workers(request.workers) as workers:
            if workers.count > 1 and is_large(source.path):
                workers.start()
            index = source.index()
            self.stop_if_prepared(fingerprint=index.fingerprint)
            check_count(source, len(index), self.rule, subset=request.subset)
            for note in index.notes:
                self.progress(f"note: {note}", 0, 0)
            labels = check_labels(source, self.spec, index.labels, index.class_names, index.names)
            count = len(index)
            self.partial.open(
                self.plan(source, index.fingerprint) | {"count": count}, restart=request.restart
            )
            self.partial.allocate(self.layout, count)
            job = DecodingJob(
                source,
                self.layout,
                self.transform,
                count,
                self.partial.images,
                lossless=self.rule.lossless,
                upright=self.rule.upright,
            )
            self.write_blocks(job, index, workers)
        names = tuple(index.class_names) if labels is not None else ()
        return Content(count, labels, names, index.fingerprint, passed_over=index.passed_over)

    def write_blocks(self, job: DecodingJob, index: ImageIndex, workers: Workers) -> None:
        """Write the missing blocks, in workers where that pays."""
        total = job.count
        lengths = {
            b: stop - first
            for b in range(job.layout.blocks(total))
            for first, stop in [job.layout.block_range(b, total)]
        }
        done = sum(lengths[b] for b in self.partial.done)
        self.progress("decoding", done, total)
        run = run_serially if total - done < _SERIAL_IMAGES else workers.run
        for result in run(job, self.missing_blocks(job, index)):
            self.partial.add(result)
            done += lengths[result.block]
            self.progress("decoding", done, total)

    def missing_blocks(self, job: DecodingJob, index: ImageIndex) -> Iterator[BlockWork]:
        """Yield the blocks that are still to be written."""
        for block in range(job.layout.blocks(job.count)):
            if block not in self.partial.done:
                first, stop = job.layout.block_range(block, job.count)
                yield BlockWork(block, index.names[first:stop], index.locators[first:stop])

    # ---- decoded arrays ------------------------------------------------------------------------

    def copy_arrays(self, source: ArraySource) -> Content:
        """Copy decoded images, block by block."""
        fingerprint, request = source.fingerprint(), self.request
        self.stop_if_prepared(fingerprint=fingerprint)
        check_missing(source, self.rule, subset=request.subset)
        if source.total is not None:
            check_count(source, source.total, self.rule, subset=request.subset)
        self.partial.open(self.plan(source, fingerprint), restart=request.restart)
        if not self.partial.images.exists():
            self.partial.images.write_bytes(self.layout.header(0))
        try:
            count, labels = self.copy_chunks(source)
        except UserError:
            # A fault of the source: the copy would only block a corrected source, and copying
            # again takes no longer than reading.
            self.partial.discard()
            raise
        return Content(count, labels, (), fingerprint, source.remark)

    def copy_chunks(self, source: ArraySource) -> tuple[int, StoredLabels | None]:
        """Write the blocks that the journal lacks; return the number of images and the labels."""
        blocks = ArrayBlocks(self.partial.images, self.layout, self.partial.done, self.partial.add)
        total = source.total or self.rule.count or 0
        labels: list[int] = []
        self.progress("copying", 0, total)  # read from the start, even when resuming
        with blocks:
            for chunk in source.chunks():
                if chunk.images.shape[1:] != self.layout.data_shape:
                    raise source.error(
                        f"holds images of shape {chunk.images.shape[1:]}",
                        allowed=str(self.layout.data_shape),
                        remedy=f"give --source {self.rule.hint}",
                    )
                labels.extend([] if chunk.labels is None else chunk.labels.tolist())
                for done in blocks.add(chunk.images):
                    self.progress("copying", done, max(total, done))
        check_count(source, blocks.count, self.rule, subset=self.request.subset)
        return blocks.count, check_labels(source, self.spec, labels or None, (), ())

    # ---- common --------------------------------------------------------------------------------

    def plan(self, source: ImageSource, fingerprint: str) -> dict[str, Any]:
        """Return what decides the result: a resumed preparation must agree in all of it."""
        return {
            "dataset": self.spec.name,
            "source": source.kind,
            "contents": fingerprint,
            "split": source.split,
            "transform": self.transform,
            "shape": list(self.layout.data_shape),
            "dtype": self.layout.dtype,
        }

    def stop_if_prepared(self, *, fingerprint: str = "", stat: str = "") -> None:
        """Raise :class:`AlreadyPrepared`, or ``UserError`` if it came from another source.

        ``stat`` alone settles the first case cheaply, before a large archive is read.
        """
        request = self.request
        if not (self.target / MANIFEST).exists() or request.force:
            return
        manifest = read_manifest(self.target)
        note = manifest.source
        same_shape = tuple(manifest.shape[1:]) == self.layout.data_shape
        same_cut = request.transform in ("", manifest.transform) and same_shape
        if manifest.subset <= request.subset and same_cut:
            same_file = bool(stat) and (note.stat, note.name) == (
                stat,
                readable(request.source.name),
            )
            if note.fingerprint == fingerprint or (same_file and request.split in ("", note.split)):
                raise AlreadyPrepared(manifest)
        if fingerprint:
            raise UserError(
                WHO,
                f"{self.target} was prepared from {note.name}, with other files or settings",
                remedy="add --force to replace it",
            )

    def finish(self, source: ImageSource, content: Content) -> DatasetManifest:
        """Verify, write labels, digests and manifest, and put the folder in its place."""
        folder, done = self.partial.folder, self.partial.done
        blocks = self.partial.verified(self.layout, content.count, self.progress)
        manifest = self.manifest(source, content, blocks)
        converted: dict[str, int] = {}
        for block in done.values():
            for mode, count in block.converted.items():
                converted[mode] = converted.get(mode, 0) + count
        lossy = any(block.lossy for block in done.values())
        manifest = manifest.model_copy(update={"converted": converted, "lossy": lossy})
        if content.labels is not None:
            np.save(folder / LABELS, content.labels.astype("<i4"), allow_pickle=False)
        (folder / BLOCKS).write_text("\n".join(blocks) + "\n", encoding="ascii")
        write_sealed(folder / MANIFEST, manifest.model_dump(mode="json"))
        self.partial.put_in_place(self.target)
        return manifest

    def manifest(self, source: ImageSource, content: Content, blocks: list[str]) -> DatasetManifest:
        """Describe the result."""
        labels, layout = content.labels, self.layout
        classes = self.spec.num_classes
        counts = [] if labels is None else np.bincount(labels, minlength=classes).tolist()
        shape = (content.count, *layout.data_shape)
        return DatasetManifest(
            dataset=self.spec.name,
            revision=self.revision(source, content),
            shape=shape,
            dtype=cast(Literal["uint8", "float32"], layout.dtype),
            num_classes=classes,
            class_names=list(content.class_names),
            class_counts=counts,
            sha256=content_hash(shape, layout.dtype, blocks, labels_hash(labels)),
            labels_sha256=labels_hash(labels),
            block_images=layout.block_images,
            transform=self.transform,
            subset=self.request.subset,
            source=SourceNote(
                kind=source.kind,
                name=readable(self.request.source.name),
                fingerprint=content.fingerprint,
                stat=source.stat,
                split=readable(source.split),
                passed_over=dict(content.passed_over),
            ),
            tools={"numpy": np.__version__, "pillow": version("pillow")},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def revision(self, source: ImageSource, content: Content) -> str:
        """Return the preprocessing, and what distinguishes the content from the published one."""
        parts = ["as-is" if self.transform == "none" else self.transform]
        if source.split not in ("", "train"):
            parts.append(source.split)
        if self.request.subset:
            parts.append(f"subset-{content.count}")
        elif content.remark:
            parts.append(content.remark)
        return "+".join(parts)
