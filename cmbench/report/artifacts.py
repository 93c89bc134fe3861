"""Pictures and training curves beside the records, made ready to be embedded in a page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from cmbench.records.artifacts import ArtifactError, parse_curve
from cmbench.records.record import GRID_TILE, Artifact

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
#: Points of one embedded curve; longer ones are thinned evenly.
CURVE_POINTS = 200
#: Images of a grid that are shown side by side with other methods'.
STRIP_IMAGES = 8
#: Images of a strip are at most this wide or high, in pixels; larger ones are scaled down.
STRIP_SIDE = 128
MAX_PIXELS = 16_000_000


@dataclass(frozen=True)
class Curve:
    """Training curves of one run: images seen and one list per scalar."""

    row: str
    run: str
    #: Of its legend: method and recipe, as far as they tell curves apart.
    name: str
    nimg: Sequence[float]
    scalars: Mapping[str, Sequence[float | None]]


def png_uri(data: bytes) -> str:
    """Return PNG bytes as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def picture(data: bytes, file: str) -> tuple[bytes, bool]:
    """Return the PNG to show and whether it is a strip.

    A grid that names the size of its images (text chunk ``tile``) becomes a strip of its first
    :data:`STRIP_IMAGES` images, one below the other, so that strips of several methods show one
    seed in one row. Other pictures are shown whole. Raises ``ArtifactError`` for anything that is
    not a valid PNG, whatever its name.
    """
    if not data.startswith(PNG_MAGIC):
        raise ArtifactError(f"{file} is not a PNG")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ArtifactError(f"{file} has more than {MAX_PIXELS:,} pixels")
            tile = _tile(opened)
            if tile is None:
                opened.verify()
                return data, False
            return _strip(opened, *tile), True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ArtifactError(f"{file} is not a valid PNG: {error}") from error


def _tile(opened: Image.Image) -> tuple[int, int] | None:
    width, _, height = str(opened.info.get(GRID_TILE, "")).partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        return None
    w, h = int(width), int(height)
    fits = 0 < w <= opened.width and 0 < h <= opened.height
    return (w, h) if fits and opened.width % w == 0 and opened.height % h == 0 else None


def _strip(grid: Image.Image, w: int, h: int) -> bytes:
    columns = grid.width // w
    count = min(STRIP_IMAGES, columns * (grid.height // h))
    mode = grid.mode if grid.mode in ("L", "RGB") else "RGB"
    shrink = min(1.0, STRIP_SIDE / max(w, h))
    width, height = max(1, round(w * shrink)), max(1, round(h * shrink))
    strip = Image.new(mode, (width, count * height))
    source = grid.convert(mode)
    for index in range(count):
        x, y = index % columns * w, index // columns * h
        tile = source.crop((x, y, x + w, y + h))
        if shrink < 1:
            tile = tile.resize((width, height), Image.Resampling.LANCZOS)
        strip.paste(tile, (0, index * height))
    out = io.BytesIO()
    strip.save(out, "PNG", optimize=True)
    return out.getvalue()


def curve_points(
    data: bytes, file: str
) -> tuple[Sequence[float], Mapping[str, Sequence[float | None]]]:
    """Return ``(nimg, scalars)`` of a training curve, thinned to :data:`CURVE_POINTS`.

    Scalars have the five digits that a chart needs.
    """
    try:
        nimg, scalars = parse_curve(data)
    except ValueError as error:
        raise ArtifactError(f"{file} {error}") from error
    stride = max(1, math.ceil(len(nimg) / CURVE_POINTS))
    return nimg[::stride], {
        name: [None if y is None else float(f"{y:.5g}") for y in values[::stride]]
        for name, values in scalars.items()
    }


def is_picture(artifact: Artifact) -> bool:
    """Whether an artifact is meant to be looked at."""
    return artifact.file.lower().endswith(".png")


def is_curve(artifact: Artifact) -> bool:
    """Whether an artifact may hold a training curve."""
    return artifact.file.lower().endswith(".csv")
