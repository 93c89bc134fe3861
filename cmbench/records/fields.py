"""Types of a record's fields, and the base of its parts."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer


def _finite_or_pure_noise(sigma: float) -> float:
    if not sigma <= LARGEST and sigma != math.inf:
        raise ValueError("is not a valid noise level")
    return sigma


#: Names become file names and table cells: a conservative alphabet.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,199}$")]
#: No number is larger in magnitude: squares of sums of such numbers are floats still.
LARGEST = 1e50
#: A noise level; infinite for pure noise, which JSON spells ``"inf"``.
Sigma = Annotated[
    float,
    Field(allow_inf_nan=True, ge=-LARGEST),
    AfterValidator(_finite_or_pure_noise),
    PlainSerializer(lambda sigma: "inf" if math.isinf(sigma) else sigma, when_used="json"),
]
#: Counts up to here are exact as floats, which is what pages and JavaScript make of them.
LARGEST_COUNT = 2**53
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-LARGEST, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
#: Any text in one line.
RowLabel = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
#: What becomes a path: no control characters (a NUL is no path at all).
PathText = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    """Base of every part of a record: frozen, no unknown keys, finite numbers (JSON has no NaN)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
