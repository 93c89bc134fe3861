"""The tail of a binomial distribution. Importing ``scipy.stats`` takes longer than all else."""

from __future__ import annotations

import math


def binomial_tail(least: int, trials: int, p: float) -> float:
    """Return the chance of at least ``least`` successes in ``trials``, each with chance ``p``.

    ``0 < p < 1``; above 10,000 trials by the normal approximation.
    """
    if least <= 0:
        return 1.0
    if trials > 10_000:
        spread = math.sqrt(2 * trials * p * (1 - p))
        return math.erfc((least - 0.5 - trials * p) / spread) / 2
    log_p, log_q, log_all = math.log(p), math.log1p(-p), math.lgamma(trials + 1)
    total = 0.0
    for k in range(least, trials + 1):
        log_ways = log_all - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        term = math.exp(log_ways + k * log_p + (trials - k) * log_q)
        total += term
        if k > trials * p and term < 1e-17 * total:  # the rest falls faster than geometrically
            break
    return min(total, 1.0)
