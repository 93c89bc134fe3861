"""Which rows may be the best: the one procedure behind cards, pivot, bold and terminal.

Per NFE and metric key every row is compared with the row of the best mean, seed by seed on equal
noise. The test is the paired one-sided t test of "worse than the best", of log values where the
metric is a Fréchet distance, with Holm's correction over all of them. Rows that are not rejected
may be best.

Rows that say the same (one method's solvers at NFE 1) count once. Rows without common seeds are
compared by Welch's test and say so; a row with fewer than two seeds gets no verdict. Rows of
different conditioning or precision have groups of their own. Reported rows have no seeds: the best
is the best printed number, among all of a metric and NFE unless every row states its conditioning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmbench.leaderboard.rows import COPIES, REPORTED, MetricSummary, Row
from cmbench.leaderboard.significance import ALPHA, Difference, compare_units, differences, in_logs
from cmbench.leaderboard.statistics import Unit
from cmbench.metrics.values import is_approximate, is_frechet

#: The procedure in three sentences, for pages and terminals.
PROCEDURE = (
    "At each NFE every measured row is compared with the row of the best mean, seed by seed on"
    " equal noise: a paired one-sided t test, of logarithms for Fréchet distances, with Holm's"
    " correction for all of them together.",
    "Rows that it does not reject may be best: they are bold, and the interval of their difference"
    " from the best holds 0.",
    "Solvers that take the same steps count once, rows without common seeds are compared by Welch's"
    " test and marked unpaired, and a row with fewer than two seeds gets no verdict.",
)


@dataclass(frozen=True)
class ComparedRow:
    """A row beside the best one of its group: ``difference`` is this row minus the best."""

    row: Row
    difference: Difference

    @property
    def may_be_best(self) -> bool:
        """Whether the test has not shown that the row is worse than the best mean."""
        return self.difference.p > ALPHA


@dataclass(frozen=True)
class BestGroup:
    """The rows of one metric key, NFE, conditioning and precision, and what is best among them.

    Args:
        metric: name of the metric.
        key: of the metric; empty if there are reported rows only.
        higher_is_better: direction of the metric.
        nfe: network evaluations per image.
        conditional: of all rows; None if they are not split by it.
        dtype: of the passes that sampled.
        best: the measured row with the best mean; None if there are reported rows only.
        compared: the other rows with a verdict, best mean first.
        unjudged: rows with fewer than two seeds, best mean first. If no row has two, ``best`` is
            the best of them and has no verdict either.
        duplicates: by id, rows that were left out because another says the same, with its id.
        reported: the rows with the best printed number at this metric and NFE; several if equal.
    """

    metric: str
    key: str
    higher_is_better: bool
    nfe: int
    conditional: bool | None
    dtype: str
    best: Row | None
    compared: tuple[ComparedRow, ...]
    unjudged: tuple[Row, ...]
    duplicates: Mapping[str, str]
    reported: tuple[Row, ...]

    @property
    def judged(self) -> bool:
        """Whether the best row has the two seeds that a verdict needs."""
        return self.best is not None and _seeds(self.best, self.metric) > 1

    @property
    def measured(self) -> list[Row]:
        """All measured rows that count: the best, the compared and the unjudged."""
        best = [self.best] if self.best is not None else []
        return [*best, *(item.row for item in self.compared), *self.unjudged]

    @property
    def members(self) -> tuple[ComparedRow, ...]:
        """The rows that cannot be told from the best, which is not among them."""
        return tuple(item for item in self.compared if item.may_be_best)

    @property
    def ids(self) -> frozenset[str]:
        """Ids of all measured rows that may be best, with their duplicates; printed in bold."""
        if self.best is None or not self.judged:
            return frozenset()
        found = {self.best.id, *(item.row.id for item in self.members)}
        return frozenset(found | {i for i, other in self.duplicates.items() if other in found})


Member = tuple[Row, MetricSummary]


def best_groups(rows: Iterable[Row], metric: str | None = None) -> list[BestGroup]:
    """Return the groups of rows with what is best in each, by metric, NFE and conditioning.

    Left out: rows whose NFE nobody stated (equal cost cannot be assumed), rows of copied images, of
    fewer samples than the protocol's, and values under an approximate extractor.

    Args:
        rows: measured and reported ones of one dataset.
        metric: only this metric; by default all.
    """
    measured: dict[tuple[Any, ...], list[Member]] = {}
    reported: dict[tuple[str, int], list[Member]] = {}
    for row in rows:
        if row.nfe is None or COPIES in row.findings or not row.full_samples:
            continue
        for name, found in row.measurements.items():
            if metric not in (None, name) or is_approximate(found.key):
                continue
            if row.kind == REPORTED:
                reported.setdefault((name, row.nfe), []).append((row, found))
            else:
                group = (name, row.nfe, row.dtype, found.key)
                measured.setdefault(group, []).append((row, found))
    split = [part for members in measured.values() for part in by_conditioning(members)]
    groups = [_measured_group(members, reported) for members in split]
    beside = {(group.metric, group.nfe, group.conditional) for group in groups}
    groups += [
        _reported_group(part)
        for where, members in reported.items()
        for part in by_conditioning(members)
        if not _stands_beside(part, {c for *other, c in beside if tuple(other) == where})
    ]
    return sorted(groups, key=lambda g: (g.metric, g.nfe, bool(g.conditional), g.dtype, g.key))


def bold_values(groups: Iterable[BestGroup]) -> set[tuple[str, str]]:
    """Return ``(row id, metric)`` of what is printed in bold: members, and best printed numbers."""
    return {
        (identity, group.metric)
        for group in groups
        for identity in group.ids | {row.id for row in group.reported}
    }


def by_conditioning(members: Sequence[Member]) -> list[list[Member]]:
    """Split by conditioning, unless somebody's is not known: then all compare with each other."""
    if any(row.conditional is None for row, _ in members):
        return [list(members)]
    parts = ([m for m in members if m[0].conditional is kind] for kind in (False, True))
    return [part for part in parts if part]


def _measured_group(
    members: Sequence[Member], reported: Mapping[tuple[str, int], Sequence[Member]]
) -> BestGroup:
    (row, found), duplicates = members[0], _duplicates(members)
    sign = -1 if found.higher_is_better else 1
    counted = [m for m in members if m[0].id not in duplicates]
    counted.sort(key=lambda m: (sign * m[1].mean, m[0].id))
    judged = [m for m in counted if m[1].interval.seeds > 1]
    best, *others = judged or counted
    conditional = _conditional(members)
    printed = reported.get((found.name, row.nfe or 0), ())
    parts = by_conditioning(printed) if conditional is not None else [list(printed)]
    suited = [p for p in parts if p and _conditional(p) in (None, conditional)]
    return BestGroup(
        metric=found.name,
        key=found.key,
        higher_is_better=found.higher_is_better,
        nfe=row.nfe or 0,
        conditional=conditional,
        dtype=row.dtype,
        best=best[0],
        compared=_compared(best, others) if judged else (),
        unjudged=tuple(m[0] for m in (counted if judged else others) if m[1].interval.seeds < 2),
        duplicates=duplicates,
        reported=tuple(r for part in suited for r in _best_printed(part)),
    )


def _reported_group(members: Sequence[Member]) -> BestGroup:
    row, found = members[0]
    return BestGroup(
        metric=found.name,
        key="",
        higher_is_better=found.higher_is_better,
        nfe=row.nfe or 0,
        conditional=_conditional(members),
        dtype=row.dtype,
        best=None,
        compared=(),
        unjudged=(),
        duplicates={},
        reported=tuple(_best_printed(members)),
    )


def _stands_beside(reported: Sequence[Member], measured: set[bool | None]) -> bool:
    """Return whether a measured group of these conditionings names the best of reported rows."""
    kind = _conditional(reported)
    return bool(measured) and (kind is None or not measured.isdisjoint({kind, None}))


def _conditional(members: Sequence[Member]) -> bool | None:
    """Return the conditioning that all members have; None if it is not one."""
    kinds = {row.conditional for row, _ in members}
    return kinds.pop() if len(kinds) == 1 else None


def _best_printed(members: Sequence[Member]) -> list[Row]:
    choose = max if members[0][1].higher_is_better else min
    top = choose(found.mean for _, found in members)
    return [row for row, found in members if found.mean == top]


def _duplicates(members: Sequence[Member]) -> dict[str, str]:
    """Return the rows that say the same as an earlier one, by id, with the id of that.

    The same trainings of one method with equal values of every metric at every seed: another
    sampler that takes the same steps.
    """
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for row, _ in members:
        trained = tuple(record.training.checkpoint_sha256 for _, record in row.cells)
        values = frozenset((name, m.key, m.units) for name, m in row.measurements.items())
        other = first.setdefault((row.method, row.recipe, trained, values), row.id)
        if other != row.id:
            found[row.id] = other
    return found


def compared_units(
    groups: Sequence[Sequence[Unit]], key: str
) -> tuple[Sequence[Sequence[Unit]], bool]:
    """Return rows' units as they are compared under a metric key, and whether those are logarithms.

    Logarithms for Fréchet distances, which are positive; others are compared as they are: unbiased
    distances can be negative, scores lie in [0, 1].
    """
    logs = in_logs(groups) if is_frechet(key) else None
    return (groups, False) if logs is None else (logs, True)


def _compared(best: Member, others: Sequence[Member]) -> tuple[ComparedRow, ...]:
    found = best[1]
    units, relative = compared_units([m.units for _, m in (best, *others)], found.key)
    estimates = [e for other in units[1:] if (e := compare_units(other, units[0])) is not None]
    worse = [e.p_less if found.higher_is_better else e.p_greater for e in estimates]
    made = differences([(e, relative) for e in estimates], worse)
    return tuple(ComparedRow(row, d) for (row, _), d in zip(others, made, strict=True))


def _seeds(row: Row, metric: str) -> int:
    return row.measurements[metric].interval.seeds
