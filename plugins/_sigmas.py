"""Which noise levels a consistency model is evaluated at, for any NFE.

Papers publish the time of the second step only (found by a search on the FID of the dataset). The
rule for more steps, stated here once for all methods: the published levels come first; further
steps fill the largest gap in ln sigma between ``sigma_max`` and a smallest level, each at the gap's
middle. ``--sigmas`` overrides it and ``cmbench tune-times`` searches on held-out seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heapify, heappush, heapreplace
from itertools import pairwise

from cmbench.errors import Declined
from cmbench.plugin.method import SamplingPlan

SMALLEST_SIGMA = 0.05


def consistency_sigmas(
    nfe: int, sigma_max: float, published: tuple[float, ...], sigma_min: float = SMALLEST_SIGMA
) -> tuple[float, ...]:
    """Return ``nfe`` descending noise levels from ``sigma_max``.

    Args:
        nfe: network evaluations, at least 1.
        sigma_max: noise level of the first step.
        published: the paper's levels for later steps, in order of importance.
        sigma_min: lower end of the last gap.
    """
    levels = [sigma_max, *published[: max(nfe - 1, 0)]]
    ordered = sorted({*levels, sigma_min}, reverse=True)
    gaps = [(-math.log(a / b), -a, b) for a, b in pairwise(ordered)]  # the widest, highest first
    heapify(gaps)
    while len(levels) < nfe:
        _, negative, below = gaps[0]
        above = -negative
        middle = math.sqrt(above * below)
        heapreplace(gaps, (-math.log(above / middle), -above, middle))
        heappush(gaps, (-math.log(middle / below), -middle, below))
        levels.append(middle)
    return tuple(sorted(levels, reverse=True))


def multistep_plan(
    nfe: int,
    sigmas: Sequence[float] | None,
    sampler: str | None,
    *,
    sigma_max: float,
    published: tuple[float, ...],
) -> SamplingPlan:
    """Return the plan of a consistency model: one evaluation at each of ``nfe`` noise levels.

    ``sigmas`` override the rule of :func:`consistency_sigmas`; another ``sampler`` than
    ``multistep`` and a wrong number of levels are declined.
    """
    if sampler not in (None, "multistep"):
        raise Declined(f"sampler {sampler!r}: consistency models have multistep only")
    if sigmas is None:
        sigmas = consistency_sigmas(nfe, sigma_max, published)
    if len(sigmas) != nfe:
        raise Declined(f"NFE {nfe} takes {nfe} noise levels, got {len(sigmas)}")
    return SamplingPlan(nfe, "multistep", tuple(sigmas))
