"""Search for the noise levels of multistep sampling: golden sections over ln sigma."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Levels = tuple[float, ...]
#: What a golden section leaves of the bracket.
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class FoundLevels:
    """The best noise levels, their value, and how many schedules were evaluated."""

    levels: Levels
    value: float
    evaluations: int


def golden_section(
    objective: Callable[[float], float], low: float, high: float, evaluations: int
) -> tuple[float, float]:
    """Return the best point found in the open interval ``(low, high)`` and its value.

    Finds the minimum of a unimodal function to ``0.618^(evaluations - 1) (high - low)``; of another
    function, a local one (Kiefer 1953).

    Raises:
        ValueError: an empty interval, or fewer than two evaluations.
    """
    if not low < high or evaluations < 2:
        raise ValueError(f"golden section in ({low}, {high}) with {evaluations} evaluations")
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = objective(left), objective(right)
    best = min((at_left, left), (at_right, right))
    for _ in range(evaluations - 2):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = objective(left)
            best = min(best, (at_left, left))
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = objective(right)
            best = min(best, (at_right, right))
    return best[1], best[0]


def search_levels(
    objective: Callable[[Levels], float],
    start: Sequence[float],
    sigma_min: float,
    *,
    evaluations: int = 10,
    rounds: int = 2,
) -> FoundLevels:
    """Minimise ``objective`` over all noise levels but the first, one at a time.

    Each level is searched in ln sigma between its neighbours, the last one down to ``sigma_min``
    (or to itself, if it lies lower). With one level to choose, one round; otherwise until
    ``rounds`` are over or one brought nothing. The result is never worse than ``start``.

    Args:
        objective: of descending noise levels; smaller is better. NaN counts as infinite.
        start: the levels to begin with, descending, at least two.
        sigma_min: the smallest noise level to consider.
        evaluations: of the objective, per level and round.
        rounds: through all levels.

    Raises:
        ValueError: nothing to search, or levels that do not descend.
    """
    levels = tuple(float(level) for level in start)
    if len(levels) < 2 or any(a <= b for a, b in pairwise(levels)):
        raise ValueError(f"noise levels {levels}: at least two, descending")
    seen: dict[Levels, float] = {}

    def value_of(candidate: Levels) -> float:
        if candidate not in seen:
            value = objective(candidate)
            seen[candidate] = math.inf if math.isnan(value) else value
        return seen[candidate]

    best = value_of(levels)
    for _ in range(rounds if len(levels) > 2 else 1):
        before = best
        for i in range(1, len(levels)):
            below = levels[i + 1] if i + 1 < len(levels) else min(sigma_min, levels[i])
            above, under = levels[:i], levels[i + 1 :]
            point, value = golden_section(
                lambda x, a=above, b=under: value_of((*a, math.exp(x), *b)),  # type: ignore[misc]
                math.log(below),
                math.log(levels[i - 1]),
                evaluations,
            )
            if value < best:
                levels, best = (*above, math.exp(point), *under), value
        if best >= before:
            break
    return FoundLevels(levels, best, len(seen))
