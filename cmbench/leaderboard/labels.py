"""The names of rows in charts, legends, captions and comparisons: one function makes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from cmbench.leaderboard.rows import REFERENCE, REPORTED, Row, conditioning


def row_labels(
    rows: Iterable[Row], *, sampled: bool = True, sampler: bool = True
) -> dict[str, str]:
    """Return a name per row id that tells its configuration apart: ``M, demo +lr=0.01``.

    The method; then what the user changed of the recipe, always; then recipe, sampler,
    conditioning and marks (tuned sigmas) if a method has several. Reference rows always say so.
    Without ``sampled`` only what concerns training: the name of a training curve. Without
    ``sampler`` all but that, for tables in which it has a column.
    """
    rows = list(rows)
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for name, value, _ in _parts(row, sampled, sampler):
            found.setdefault((row.label, name), set()).add(value)

    def label(row: Row) -> str:
        shown = [
            value
            for name, value, always in _parts(row, sampled, sampler)
            if value and (always or len(found[row.label, name]) > 1)
        ]
        return ", ".join([row.label, *shown])

    return {row.id: label(row) for row in rows}


def short_labels(rows: Iterable[Row], *, sampler: bool = True) -> dict[str, str]:
    """Return names as :func:`row_labels` does that tell rows of one NFE and sampler apart.

    What differs between rows of different NFE (a student per number of steps) is left out.
    """
    rows = list(rows)
    full = row_labels(rows, sampler=sampler)
    short = row_labels([replace(row, apart=()) for row in rows], sampler=sampler)
    places = Counter((short[row.id], row.sampler, row.kind, row.nfe) for row in rows)
    crowded = {place[:3] for place, count in places.items() if count > 1}
    return {
        row.id: full[row.id] if (short[row.id], row.sampler, row.kind) in crowded else short[row.id]
        for row in rows
    }


def _parts(row: Row, sampled: bool, sampler: bool) -> Iterator[tuple[str, str, bool]]:
    """Yield what may be part of a row's name, and whether it always is."""
    recipe = row.configuration.replace(row.recipe, row.recipe.rpartition(":")[2], 1)
    yield "recipe", recipe, bool(row.overrides or row.apart)
    if sampled and sampler:
        yield "sampler", row.sampler, row.own_sampler
    if row.conditional is not None:
        yield "labels", conditioning(row.conditional), False
    yield "kind", row.kind, row.kind == REFERENCE
    if sampled and row.kind != REPORTED:
        for mark in row.marks:
            yield f"mark {mark}", mark, True
