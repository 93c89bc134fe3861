"""The names of rows in charts, legends, captions and comparisons: one function makes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cmbench.leaderboard.rows import REPORTED, Row, conditioning


def row_labels(rows: Iterable[Row], *, sampled: bool = True) -> dict[str, str]:
    """Return a name per row id that tells its configuration apart: ``M, demo +lr=0.01``.

    The method; then what the user changed of the recipe, always; then recipe, sampler,
    conditioning and marks (tuned sigmas) if a method has several. Without ``sampled`` only what
    concerns training: the name of a training curve.
    """
    rows = list(rows)
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for name, value, _ in _parts(row, sampled):
            found.setdefault((row.label, name), set()).add(value)

    def label(row: Row) -> str:
        shown = [
            value
            for name, value, always in _parts(row, sampled)
            if value and (always or len(found[row.label, name]) > 1)
        ]
        return ", ".join([row.label, *shown])

    return {row.id: label(row) for row in rows}


def _parts(row: Row, sampled: bool) -> Iterator[tuple[str, str, bool]]:
    """Yield what may be part of a row's name, and whether it always is."""
    recipe = row.configuration.replace(row.recipe, row.recipe.rpartition(":")[2], 1)
    yield "recipe", recipe, bool(row.overrides or row.apart)
    if sampled:
        yield "sampler", row.sampler, row.own_sampler
    if row.conditional is not None:
        yield "labels", conditioning(row.conditional), False
    yield "kind", row.kind, False
    if sampled and row.kind != REPORTED:
        for mark in row.marks:
            yield f"mark {mark}", mark, True
