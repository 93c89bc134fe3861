"""Sections: which rows are ranked together, and why the others are not.

Two rows are ranked together only if the key of their rank metric is equal and both have the
samples that the protocol asks for. All other rows are shown in separate sections with the reason,
never merged silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cmbench.leaderboard.rows import COPIES, REFERENCE, REPORTED, Row
from cmbench.metrics.values import is_approximate

#: Ids of ranked sections; the first is the one that the others are told from.
_RANKED = "ranked-"
_FIRST = f"{_RANKED}0"


@dataclass(frozen=True)
class Section:
    """Rows that are comparable with each other."""

    id: str
    title: str
    #: Why these rows stand apart; empty for the first ranked section.
    reason: str
    ranked: bool
    rows: tuple[Row, ...]
    metric: str = ""
    key: str = ""


def rank_key(row: Row) -> str:
    """Return the metric key that ``row`` is ranked by; empty if it has no rank value."""
    found = row.rank_measurement
    return found.key if found is not None else ""


def sections(rows: Iterable[Row]) -> list[Section]:
    """Split ``rows`` into sections: ranked ones by size, then those that cannot be ranked.

    Ranked sections of nothing but reference rows come after those of the user's own rows.
    """
    full: dict[str, list[Row]] = {}
    short: dict[str, list[Row]] = {}
    unranked: list[Row] = []
    approximate: list[Row] = []
    copied: list[Row] = []
    reported: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        key = rank_key(row)
        if row.kind == REPORTED and not key:
            reported.setdefault(row.protocol, []).append(row)
        elif not key:
            unranked.append(row)
        elif COPIES in row.findings:
            copied.append(row)
        elif is_approximate(key):
            approximate.append(row)
        else:
            (full if row.full_samples else short).setdefault(key, []).append(row)
    result = _told_apart(_ranked(full) + _short(short))
    result += _copied(copied) + _approximate(approximate)
    return result + _unranked(unranked) + _reported(reported)


def _copied(rows: list[Row]) -> list[Section]:
    section = Section(
        "copies",
        "Copies of real images",
        "Significantly more of these samples are copies of real images, pixel by pixel or as near "
        "neighbours, than of held-out real images; never ranked.",
        False,
        tuple(rows),
        rows[0].rank_metric if rows else "",
    )
    return [section] if rows else []


def _approximate(rows: list[Row]) -> list[Section]:
    section = Section(
        "approximate",
        "Under an approximate extractor",
        "The extractor ran in bfloat16, in another memory layout or compiled, so its features are "
        "not quite the protocol's; never ranked.",
        False,
        tuple(rows),
        rows[0].rank_metric if rows else "",
    )
    return [section] if rows else []


def _unranked(rows: list[Row]) -> list[Section]:
    section = Section(
        "no-rank-metric",
        "Without a value of the rank metric",
        "The rank metric could not be computed for these cells, so they have no rank.",
        False,
        tuple(rows),
    )
    return [section] if rows else []


def _reported(groups: dict[tuple[str, str], list[Row]]) -> list[Section]:
    return [
        Section(
            f"reported-{index}",
            f"Reported by their authors{f': {title}' if title else ''}",
            "Shown as printed, never ranked with measured rows"
            + (f": {reason}." if reason else ": their metric keys are not known."),
            False,
            tuple(rows),
            rows[0].rank_metric,
        )
        for index, ((title, reason), rows) in enumerate(groups.items())
    ]


def _ranked(groups: dict[str, list[Row]]) -> list[Section]:
    result = []
    order = sorted(groups.items(), key=lambda g: (not holds_own(g[1]), -len(g[1])))
    for index, (key, rows) in enumerate(order):
        reason = (
            ""
            if index == 0
            else (
                "Another metric key than the first section: another reference, sample count, "
                "extractor or implementation, so the numbers do not compare with it."
            )
        )
        kind = _kind({row.kind == REPORTED for row in rows})
        result.append(
            Section(
                f"{_RANKED}{index}",
                kind if index == 0 else f"{kind} under another protocol",
                reason,
                True,
                tuple(sorted(rows, key=_best_first)),
                rows[0].rank_metric,
                key,
            )
        )
    return result


def holds_own(rows: Iterable[Row]) -> bool:
    """Return whether not all rows are reference ones."""
    return any(row.kind != REFERENCE for row in rows)


def _kind(reported: set[bool]) -> str:
    if len(reported) > 1:
        return "Measured and reported, equal metric keys"
    return "Reported" if True in reported else "Measured"


def _best_first(row: Row) -> tuple[Any, ...]:
    """Order inside a ranked section: by NFE, conditioning and the rank metric's mean."""
    found = row.rank_measurement
    mean = 0.0 if found is None else found.mean * (-1 if found.higher_is_better else 1)
    return (row.nfe or 0, row.conditional is True, mean, row.method, row.id)


def _short(groups: dict[str, list[Row]]) -> list[Section]:
    return [
        Section(
            f"short-{index}",
            "Fewer samples than the protocol",
            "Distances are biased upwards when fewer samples are drawn, so these rows are never "
            "ranked with full ones.",
            False,
            tuple(rows),
            rows[0].rank_metric,
            key,
        )
        for index, (key, rows) in enumerate(groups.items())
    ]


def _told_apart(found: list[Section]) -> list[Section]:
    """Add to titles what differs between metric keys.

    From the first section's, where a section stands apart because of its key; from each other's,
    where titles occur more than once.
    """
    first = found[0].key if found and found[0].id == _FIRST else ""
    result = []
    for section in found:
        same = [other.key for other in found if other.title == section.title]
        if first and section.ranked and section.id != _FIRST:
            same.append(first)
        if len(same) > 1:
            own = key_difference(section.key, same)
            section = replace(section, title=f"{section.title} ({own})")
        result.append(section)
    return result


def key_difference(key: str, keys: Sequence[str]) -> str:
    """Return the parts of ``key`` that not all ``keys`` have; metric keys are joined by colons."""
    others = [set(other.split(":")) for other in keys]
    own = [part for part in key.split(":") if not all(part in other for other in others)]
    return ", ".join(own) or key
