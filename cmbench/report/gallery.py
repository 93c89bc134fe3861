"""What the page shows besides numbers: sample grids and training curves of its rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cmbench.leaderboard.rows import Row
from cmbench.report.artifacts import (
    PAGE_BUDGET_BYTES,
    ArtifactError,
    Curve,
    Picture,
    is_curves,
    is_picture,
    parse_curves,
    png_uri,
    read_artifact,
)


@dataclass
class Gallery:
    """Pictures and curves of one page, and what could not be shown."""

    pictures: list[Picture] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: int = 0


def build_gallery(rows: Iterable[Row], budget: int = PAGE_BUDGET_BYTES) -> Gallery:
    """Embed one picture of each kind per row (its first seed's) and one curve set per run."""
    gallery = Gallery()
    spent = 0
    runs: set[str] = set()
    for row in rows:
        shown: set[str] = set()
        for path, record in row.cells:
            for name, artifact in sorted(record.artifacts.items()):
                try:
                    if is_picture(artifact) and name not in shown:
                        shown.add(name)
                        uri = png_uri(read_artifact(path, artifact), artifact.file)
                        if spent + len(uri) > budget:
                            gallery.left_out += 1
                            continue
                        spent += len(uri)
                        gallery.pictures.append(Picture(row.id, _caption(row), name, uri))
                    elif is_curves(name, artifact) and record.training.run not in runs:
                        runs.add(record.training.run)
                        nimg, scalars = parse_curves(read_artifact(path, artifact), artifact.file)
                        gallery.curves.append(
                            Curve(row.id, row.title, record.training.run, nimg, scalars)
                        )
                except ArtifactError as error:
                    gallery.problems.append(f"{record.cell}: {error}")
    return gallery


def _caption(row: Row) -> str:
    parts = [row.title, f"NFE {row.nfe_text}"]
    return ", ".join([*parts, row.recipe] if row.recipe else parts)
