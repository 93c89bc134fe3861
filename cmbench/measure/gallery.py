"""Images as pictures: sample grids and single files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics.quantize import quantize
from cmbench.records.record import GRID_TILE

_REMEDY = "free space, or leave out --save-samples"
#: Side of a drawn scatter plot, pixels, and the range of data it shows.
PLOT_SIDE, PLOT_RANGE = 256, 1.2


def grid_png(images: Tensor, columns: int = 8) -> bytes:
    """Return a PNG of images ``[N, C, H, W]`` in [-1, 1] in rows; 2-D points as a scatter plot.

    The size of one image is written into the PNG (``GRID_TILE``); a scatter plot has none.
    """
    if tuple(images.shape[1:]) == (2, 1, 1):
        return _png(_scatter(images.flatten(1)))
    if images.shape[1] not in (1, 3):  # latents: show the first three channels
        images = images[:, :3] if images.shape[1] > 3 else images[:, :1]
    pixels = quantize(images.clamp(-1, 1), "round")
    rows = -(-len(pixels) // columns)
    _, c, h, w = pixels.shape
    canvas = torch.zeros(c, rows * h, columns * w, dtype=torch.uint8)
    for index, picture in enumerate(pixels):
        y, x = divmod(index, columns)
        canvas[:, y * h : (y + 1) * h, x * w : (x + 1) * w] = picture
    return _png(_picture(canvas), f"{w}x{h}")


def save_pngs(
    images: Tensor,
    first: int,
    folder: Path,
    remedy: str = "free space, or leave out --save-samples",
) -> None:
    """Write images ``[N, C, H, W]`` in [-1, 1] as ``<index>.png``; ``remedy`` ends an error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for offset, picture in enumerate(quantize(images.cpu().clamp(-1, 1), "round")):
            (folder / f"{first + offset:06d}.png").write_bytes(_png(_picture(picture)))
    except OSError as error:
        raise UserError(
            f"samples folder {folder}", f"cannot be written ({error.strerror})", remedy=remedy
        ) from error


def _picture(pixels: Tensor) -> Image.Image:
    array = pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _png(picture: Image.Image, tile: str = "") -> bytes:
    out = io.BytesIO()
    info = PngInfo()
    if tile:
        info.add_text(GRID_TILE, tile)
    picture.save(out, "PNG", optimize=True, pnginfo=info)
    return out.getvalue()


def _scatter(points: Tensor) -> Image.Image:
    picture = Image.new("RGB", (PLOT_SIDE, PLOT_SIDE), "white")
    pen = ImageDraw.Draw(picture)
    for x, y in (points.float() / PLOT_RANGE * 0.5 + 0.5).clamp(0, 1).tolist():
        px, py = x * (PLOT_SIDE - 1), (1 - y) * (PLOT_SIDE - 1)
        pen.ellipse((px - 2, py - 2, px + 2, py + 2), fill="#2563eb")
    return picture
