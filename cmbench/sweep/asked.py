"""What may be asked of a sweep: numbers of evaluations, seeds, noise levels. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from cmbench.errors import UserError
from cmbench.seeds import HELD_OUT_FROM

#: More seeds in one sweep are a typing error.
MAX_SEEDS = 1000
#: More network evaluations per image are a typing error, and planning them would never end.
MAX_NFE = 100_000


def as_nfes(given: int | Sequence[int], who: str, shown: str | None = None) -> tuple[int, ...]:
    """Return numbers of network evaluations per image, each once.

    ``who`` and ``shown`` name the option and its value in errors.

    Raises:
        UserError: there is none, or one is not a whole number from 1 to :data:`MAX_NFE`.
    """
    numbers = tuple(dict.fromkeys((given,) if isinstance(given, int) else given))
    if not numbers or not all(_is_whole(n) and 1 <= n <= MAX_NFE for n in numbers):
        allowed = f"whole numbers from 1 to {MAX_NFE:,}, for example 1,2,4"
        raise UserError(who, shown or repr(given), allowed=allowed)
    return numbers


def as_seeds(
    given: int | Sequence[int], who: str, shown: str | None = None, *, held_out: bool = False
) -> tuple[int, ...]:
    """Return training seeds, each once: of a count, those from 0; of a sequence, its members.

    Raises:
        UserError: there are none or too many, one is negative, or one is held out for
            ``cmbench tune-times`` and that was not asked for.
    """
    whole = _is_whole(given) if isinstance(given, int) else all(map(_is_whole, given))
    seeds: tuple[int, ...] = ()
    if whole:
        wanted = range(min(given, MAX_SEEDS + 1)) if isinstance(given, int) else given
        seeds = tuple(dict.fromkeys(wanted))
    if not 0 < len(seeds) <= MAX_SEEDS or min(seeds) < 0:
        raise UserError(
            who,
            shown or repr(given),
            allowed=f"a count (3), a list (0,2) or a range (3-5), of at most {MAX_SEEDS}",
        )
    if max(seeds) >= HELD_OUT_FROM and not held_out:
        raise UserError(
            who,
            f"{max(seeds)} is held out for `cmbench tune-times`",
            allowed=f"below {HELD_OUT_FROM:,}",
            remedy="choose smaller seeds",
        )
    return seeds


def as_sigmas(given: Sequence[float], who: str, shown: str | None = None) -> tuple[float, ...]:
    """Return noise levels; raise ``UserError`` unless they are positive and descending."""
    sigmas = tuple(map(float, given))
    descending = all(a > b for a, b in pairwise(sigmas))
    if not sigmas or not descending or not all(math.isfinite(s) and s > 0 for s in sigmas):
        raise UserError(
            who,
            shown or repr(given),
            allowed="descending positive noise levels, for example 80,0.8; or tuned",
        )
    return sigmas


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)
