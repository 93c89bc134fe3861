"""Training curves beside the records: CSV files with what training logged."""

from __future__ import annotations

import csv
import io
import math


def parse_curve(data: bytes) -> tuple[list[float], dict[str, list[float | None]]]:
    """Return ``(nimg, scalars)`` of a training curve.

    The file is CSV with a column ``nimg`` (images seen). Every other column that holds a number is
    a scalar; empty cells and values that are not finite become None.

    Raises:
        ValueError: the bytes are not such a file.
    """
    try:
        lines = list(csv.DictReader(io.StringIO(data.decode()), strict=True))
        nimg = [float(line["nimg"]) for line in lines]
        if not all(math.isfinite(x) for x in nimg):
            raise ValueError("nimg is not finite")
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"holds no training curve: {error!r}") from error
    names = [name for name in (lines[0] if lines else {}) if name and name != "nimg"]
    scalars = {name: [_number(line[name]) for line in lines] for name in names}
    return nimg, {name: v for name, v in scalars.items() if any(x is not None for x in v)}


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
