"""Positions in a group, and probabilities of being best, from five shared seeds on.

With n seeds that all rows share, what is known of the rows' means is a multivariate t distribution
with n - 1 degrees of freedom around the observed means, its scale the covariance of the seeds over
n; each difference of two rows then has the distribution of their paired t test. A row's probability
of being best is the share of draws in which it is; its position is given as the 95 % interval of
its places in the draws. Fewer than five seeds say too little to show either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmbench.leaderboard.best_groups import BestGroup, compared_units
from cmbench.leaderboard.statistics import CONFIDENCE, Unit, cluster_means

#: Seeds that all rows share before positions are shown.
FEWEST_SEEDS = 5
#: Draws of the means; a probability has an error of at most 0.8 percentage points.
DRAWS = 4000


@dataclass(frozen=True)
class Position:
    """Where a row stands in its group: from ``low`` (first is 1) to ``high``, 95 % interval."""

    low: int
    high: int
    #: Probability that the row is the best of its group.
    p_best: float

    @property
    def text(self) -> str:
        """``1`` or ``2–4``."""
        return str(self.low) if self.low == self.high else f"{self.low}–{self.high}"


def positions(groups: Iterable[BestGroup]) -> dict[str, Position]:
    """Return the positions by row id, by the metric that each row is ranked by.

    Left out: rows that lack a seed of their group's best row, groups of which that has fewer than
    five, and rows that are alone in their group.
    """
    found: dict[str, Position] = {}
    for group in groups:
        if group.best is not None and group.metric == group.best.rank_metric:
            found |= _positions(group)
    return found


def _positions(group: BestGroup) -> dict[str, Position]:
    rows = [row for row in (group.best, *(c.row for c in group.compared)) if row is not None]
    units = [row.measurements[group.metric].units for row in rows]
    aligned = _aligned(compared_units(units, group.key)[0])
    kept = [(row, values) for row, values in zip(rows, aligned) if values is not None]
    if len(kept) < 2 or len(kept[0][1]) < FEWEST_SEEDS:
        return {}
    values = np.array([values for _, values in kept])
    placed = place(-values if group.higher_is_better else values)
    found = {row.id: position for (row, _), position in zip(kept, placed)}
    return found | {i: found[other] for i, other in group.duplicates.items() if other in found}


def _aligned(groups: Sequence[Sequence[Unit]]) -> list[list[float] | None]:
    """Return the independent values of each row at the seeds of the first; None if one is missing.

    They are in one order, seed by seed.
    """
    wanted = [(unit.training_seed, unit.sampling_seed) for unit in groups[0]]
    result: list[list[float] | None] = []
    for units in groups:
        known = {(unit.training_seed, unit.sampling_seed): unit for unit in units}
        whole = all(seeds in known for seeds in wanted)
        result.append(cluster_means([known[seeds] for seeds in wanted]) if whole else None)
    return result


def place(values: NDArray[np.float64]) -> list[Position]:
    """Return the positions of rows whose lowest mean is the best.

    Args:
        values: [rows, seeds], at least two of each; one column per seed that all rows share.
    """
    rows, n = values.shape
    means = values.mean(axis=1)
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((DRAWS, n)) @ (values - means[:, None]).T
    scale = np.sqrt((n - 1) / generator.chisquare(n - 1, DRAWS) / n / (n - 1))
    drawn = means + noise * scale[:, None]
    places = 1 + drawn.argsort(axis=1).argsort(axis=1)
    tail = math.floor((1 - CONFIDENCE) / 2 * DRAWS)
    ordered = np.sort(places, axis=0)
    low, high = ordered[tail], ordered[-1 - tail]
    best = (places == 1).mean(axis=0)
    return [Position(int(low[i]), int(high[i]), float(best[i])) for i in range(rows)]
