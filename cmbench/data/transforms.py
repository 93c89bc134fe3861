"""How pictures are cropped and shrunk: the recipes of the papers, by name.

Every function maps a PIL image to one of ``size`` x ``size`` pixels. The result depends on Pillow's
resampling, whose version the manifest keeps. All of them leave an image of the right size as it is.
"""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from cmbench.data.pictures import PictureError

Transform = Callable[[Image.Image, int], Image.Image]
_RESAMPLE = Image.Resampling


def _centre(image: Image.Image, size: int) -> Image.Image:
    """Cut the central ``size`` x ``size`` pixels, rounding towards the top left."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """Halve by box filter while the short side is at least twice ``size``; bicubic; centre.

    Dhariwal & Nichol 2021 (arXiv:2105.05233), guided diffusion's loader. EDM2's
    ``center-crop-dhariwal`` computes the same.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), _RESAMPLE.BOX)
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    return _centre(image.resize(shape, _RESAMPLE.BICUBIC), size)


def edm_crop(image: Image.Image, size: int) -> Image.Image:
    """Cut the central square, then shrink it by Lanczos: EDM's ``center-crop``.

    Karras et al. 2022 (arXiv:2206.00364), the ImageNet-64 of the EDM release.
    """
    return _centre(image, min(image.size)).resize((size, size), _RESAMPLE.LANCZOS)


def lsun_crop(image: Image.Image, size: int) -> Image.Image:
    """Shrink the short side to ``size`` by box filter, then centre: LSUN in guided diffusion."""
    scale = size / min(image.size)
    shape = (round(scale * image.width), round(scale * image.height))
    return _centre(image.resize(shape, _RESAMPLE.BOX), size)


def as_is(image: Image.Image, size: int) -> Image.Image:
    """Refuse any other size."""
    if image.size != (size, size):
        raise PictureError(
            f"is {image.width}x{image.height}",
            allowed=f"{size}x{size}",
            remedy="prepare a source of that size; images of your own can be cut by --transform",
        )
    return image


TRANSFORMS: dict[str, Transform] = {
    "none": as_is,
    "adm-crop": adm_crop,
    "dhariwal-crop": adm_crop,
    "edm-crop": edm_crop,
    "lsun-crop": lsun_crop,
}
