"""What the page shows besides numbers: samples from shared noise, and training curves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cmbench.bench.record import Artifact, Record
from cmbench.leaderboard.rows import Row
from cmbench.report.artifacts import (
    ArtifactError,
    Curve,
    is_curve,
    is_picture,
    parse_curve,
    picture,
    png_uri,
    read_artifact,
)

#: Pictures of one page together; beyond it the page names the files instead of showing them.
PAGE_BUDGET_BYTES = 1_200_000
#: Points of all training curves of one page together.
CURVE_BUDGET_POINTS = 60_000


@dataclass(frozen=True)
class Picture:
    """A sample grid, or a strip of it, as a data URI."""

    row: str
    label: str
    name: str
    uri: str


@dataclass
class Panel:
    """Pictures of one NFE and sampling seed: the same noise in every one of them."""

    nfe: str
    seed: int
    strips: list[Picture] = field(default_factory=list)
    grids: list[Picture] = field(default_factory=list)


@dataclass
class Gallery:
    """Pictures and curves of one page, and what could not be shown."""

    panels: list[Panel] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: int = 0
    bytes_spent: int = 0
    points_spent: int = 0


def build_gallery(
    rows: Iterable[Row], labels: dict[str, str], budget: int = PAGE_BUDGET_BYTES
) -> Gallery:
    """Embed the pictures of each row's first seed, and the curves of each run once.

    ``labels`` names rows by id. Panels come by ascending NFE, rows in the order given.
    """
    gallery = Gallery()
    panels: dict[tuple[int, int], Panel] = {}
    seen: set[str] = set()
    for row in rows:
        for position, (path, record) in enumerate(row.cells):
            for name, artifact in sorted(record.artifacts.items()):
                try:
                    if is_picture(artifact) and position == 0:
                        key = (record.sampling.nfe, record.sampling.seed)
                        panel = panels.setdefault(key, Panel(row.nfe_text, key[1]))
                        _add_picture(gallery, panel, row, labels, name, path, artifact, budget)
                    elif is_curve(artifact) and record.training.run not in seen:
                        seen.add(record.training.run)
                        _add_curve(gallery, row, path, record, artifact)
                except ArtifactError as error:
                    gallery.problems.append(f"{record.cell}: {error}")
    gallery.panels = [panels[key] for key in sorted(panels) if _filled(panels[key])]
    return gallery


def _filled(panel: Panel) -> bool:
    return bool(panel.strips or panel.grids)


def _add_picture(
    gallery: Gallery, panel: Panel, row: Row, labels: dict[str, str], name: str, path: Path,
    artifact: Artifact, budget: int,
) -> None:  # fmt: skip
    if gallery.bytes_spent >= budget:
        gallery.left_out += 1
        return
    data, is_strip = picture(read_artifact(path, artifact), artifact.file)
    uri = png_uri(data)
    if gallery.bytes_spent + len(uri) > budget:
        gallery.left_out += 1
        return
    gallery.bytes_spent += len(uri)
    made = Picture(row.id, labels.get(row.id, row.label), name, uri)
    (panel.strips if is_strip else panel.grids).append(made)


def _add_curve(
    gallery: Gallery, row: Row, path: Path, record: Record, artifact: Artifact
) -> None:  # fmt: skip
    nimg, scalars = parse_curve(read_artifact(path, artifact), artifact.file)
    points = len(nimg) * len(scalars)
    if gallery.points_spent + points > CURVE_BUDGET_POINTS:
        gallery.left_out += 1
        return
    gallery.points_spent += points
    gallery.curves.append(Curve(row.id, record.training.run, nimg, scalars))


def series_labels(rows: Iterable[Row]) -> dict[str, str]:
    """Return a name per row id that tells its series apart, without what all series share.

    The method, then recipe, sampler and conditioning where a method comes with several.
    """
    rows = list(rows)

    def parts(row: Row) -> Iterator[tuple[str, str]]:
        yield "recipe", row.recipe.rpartition(":")[2]
        yield "sampler", row.sampler
        if row.conditional is not None:
            yield "labels", "conditional" if row.conditional else "unconditional"
        yield "kind", row.kind

    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for name, value in parts(row):
            found.setdefault((row.label, name), set()).add(value)
    return {
        row.id: ", ".join(
            [row.label, *(v for n, v in parts(row) if v and len(found[row.label, n]) > 1)]
        )
        for row in rows
    }
