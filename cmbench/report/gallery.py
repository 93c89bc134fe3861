"""What the page shows besides numbers: samples from shared noise, and training curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cmbench.leaderboard.labels import row_labels
from cmbench.leaderboard.rows import Row
from cmbench.records.artifacts import ArtifactError, read_artifact
from cmbench.records.record import Artifact, Record
from cmbench.report.artifacts import (
    STRIP_IMAGES,
    Curve,
    curve_points,
    is_curve,
    is_picture,
    picture,
    png_uri,
)

#: A page stays below 3 MB: what its rows (about 4.5 kB each) leave goes to pictures and curves.
PAGE_BYTES = 2_800_000
ROW_BYTES = 4_600
LEAST_BYTES = 300_000
#: Strips are shown about this wide, in CSS pixels.
STRIP_WIDTH = 60
#: One point of a training curve in the page's JSON.
POINT_BYTES = 8


@dataclass(frozen=True)
class Picture:
    """A sample grid, or a strip of it, as a data URI."""

    row: str
    label: str
    name: str
    uri: str
    #: Width on the page in CSS pixels, for strips: a whole multiple of the image's, so that every
    #: pixel is a square.
    width: int = 0
    #: Whether lines part its images: a full strip of square ones.
    ruled: bool = False


@dataclass
class Panel:
    """Pictures of one NFE and sampling seed: the same noise in every one of them."""

    nfe: str
    seed: int
    strips: list[Picture] = field(default_factory=list)
    grids: list[Picture] = field(default_factory=list)


@dataclass
class Gallery:
    """Pictures and curves of one page, what could not be shown, and what was left out."""

    picture_bytes: int
    curve_bytes: int
    panels: list[Panel] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: int = 0


def build_gallery(rows: Sequence[Row], labels: dict[str, str]) -> Gallery:
    """Embed the pictures of each row's first seed, and the curves of each run once.

    ``labels`` names rows by id. Panels come by ascending NFE, rows in the order given. What does
    not fit the page's budget is left out; its file stays beside the record.
    """
    trained = row_labels(rows, sampled=False)
    budget = max(LEAST_BYTES, PAGE_BYTES - ROW_BYTES * len(rows))
    gallery = Gallery(budget * 2 // 3, budget // 3)
    panels: dict[tuple[int, int], Panel] = {}
    seen: set[str] = set()
    for row in rows:
        for position, (path, record) in enumerate(row.cells):
            for name, artifact in sorted(record.artifacts.items()):
                try:
                    if is_picture(artifact) and position == 0:
                        key = (record.sampling.nfe, record.sampling.seed)
                        panel = panels.setdefault(key, Panel(row.nfe_text, key[1]))
                        _add_picture(gallery, panel, row, labels, name, path, artifact)
                    elif is_curve(artifact) and record.training.run not in seen:
                        seen.add(record.training.run)
                        _add_curve(gallery, row, trained[row.id], path, record, artifact)
                except ArtifactError as error:
                    gallery.problems.append(f"{record.cell}: {error}")
    filled = [key for key, panel in panels.items() if panel.strips or panel.grids]
    gallery.panels = [panels[key] for key in sorted(filled)]
    return gallery


def _add_picture(
    gallery: Gallery,
    panel: Panel,
    row: Row,
    labels: dict[str, str],
    name: str,
    path: Path,
    artifact: Artifact,
) -> None:
    if gallery.picture_bytes > 0:
        data, is_strip = picture(read_artifact(path, artifact), artifact.file)
        uri = png_uri(data)
        gallery.picture_bytes -= len(uri)
        if gallery.picture_bytes > 0:
            shown = _strip_shape(data) if is_strip else (0, False)
            made = Picture(row.id, labels.get(row.id, row.label), name, uri, *shown)
            (panel.strips if is_strip else panel.grids).append(made)
            return
    gallery.left_out += 1


def _strip_shape(png: bytes) -> tuple[int, bool]:
    """Return a strip's width on the page and whether it is a full strip of square images."""
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))  # the header's
    return width * max(1, round(STRIP_WIDTH / width)), height == STRIP_IMAGES * width


def _add_curve(
    gallery: Gallery, row: Row, name: str, path: Path, record: Record, artifact: Artifact
) -> None:
    if gallery.curve_bytes > 0:
        nimg, scalars = curve_points(read_artifact(path, artifact), artifact.file)
        gallery.curve_bytes -= POINT_BYTES * len(nimg) * (1 + len(scalars))
        if gallery.curve_bytes > 0:
            gallery.curves.append(Curve(row.id, record.training.run, name, nimg, scalars))
            return
    gallery.left_out += 1
