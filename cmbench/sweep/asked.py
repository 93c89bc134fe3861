"""What may be asked of a sweep: numbers of evaluations, seeds, noise levels. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeGuard

from cmbench.errors import UserError
from cmbench.seeds import HELD_OUT_FROM
from cmbench.sweep.recipes import nested

#: More seeds in one sweep are a typing error.
MAX_SEEDS = 1000
#: More network evaluations per image are a typing error, and planning them would never end.
MAX_NFE = 100_000

#: More CPU threads are a typing error; the system runs out of memory long before it has them.
MAX_THREADS = 1024


def as_count(given: object, who: str, least: int = 1, most: int | None = None) -> int:
    """Return a whole number from ``least`` to ``most``; raise ``UserError`` for anything else."""
    if _is_whole(given) and least <= given <= (most or given):
        return given
    allowed = f"whole numbers from {least:,}" + (f" to {most:,}" if most else "")
    raise UserError(who, repr(given), allowed=allowed)


def as_nfes(given: int | Sequence[int], who: str, shown: str | None = None) -> tuple[int, ...]:
    """Return numbers of network evaluations per image, each once.

    ``who`` and ``shown`` name the option and its value in errors.

    Raises:
        UserError: there is none, or one is not a whole number from 1 to :data:`MAX_NFE`.
    """
    numbers = (given,) if isinstance(given, int) else _members(given)
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
    if isinstance(given, int):
        seeds = tuple(range(min(given, MAX_SEEDS + 1))) if _is_whole(given) else ()
    else:
        seeds = _members(given)
        seeds = seeds if all(map(_is_whole, seeds)) else ()
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
    try:
        sigmas = tuple(map(float, given))
    except (TypeError, ValueError):
        sigmas = ()
    descending = all(a > b for a, b in pairwise(sigmas))
    if not sigmas or not descending or not all(math.isfinite(s) and s > 0 for s in sigmas):
        raise UserError(
            who,
            shown or repr(given),
            allowed="descending positive noise levels, for example 80,0.8; or tuned",
        )
    return sigmas


def as_options(given: object) -> dict[str, Any]:
    """Return ``{"optimizer.lr": 1e-4}`` as tables within tables; None is none."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise UserError("options", repr(given), allowed='a mapping, {"optimizer.lr": 1e-4}')
    return nested(given)


def as_names(given: object, who: str) -> tuple[str, ...]:
    """Return a name, or several, each once; raise ``UserError`` for anything else."""
    names = (given,) if isinstance(given, str) else _members(given)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(who, repr(given), allowed="a name, or a list of names")
    return names


def _members(given: object) -> tuple[Any, ...]:
    """Return the members of a sequence, each once; none of anything else."""
    return tuple(dict.fromkeys(given)) if isinstance(given, Sequence) else ()


def _is_whole(number: object) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool)
