"""The one decoder of pictures: what is read as it is, what is converted, what is refused.

``prepare`` and ``eval`` both read pictures here, so that a picture has the same pixels in both.

=================================================  ===============================================
in the file                                        what happens
=================================================  ===============================================
8-bit grey or RGB, as the data are                 read as it is
palette, CMYK and other colour spaces, bilevel     converted to RGB, noted
opaque alpha channel, transparent colour unused    dropped, noted
grey where the data are RGB                        the channel is repeated, noted
RGB of three equal channels where data are grey    one channel is read, noted
EXIF orientation                                   turned upright, noted; left as stored, noted,
                                                   for published datasets, whose makers ignored it
further pictures of a JPEG (MPO: previews, depth)  only the first is read, noted
JPEG and other lossy formats                       read, noted
more than 8 bits per channel, float pixels         refused
a pixel that is transparent                        refused
several frames (TIFF, GIF, APNG, WebP)             refused
colours where the data are grey                    refused
other formats than PNG JPEG WebP BMP TIFF GIF      refused
=================================================  ===============================================

Colour profiles and gamma are ignored. Imports no torch.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError

from cmbench.errors import UserError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
LOSSY = "are JPEG or another lossy format, which changes every distance: save them as PNG"
_PALETTE = "have a palette (converted to RGB)"
_OPAQUE = "have an opaque alpha channel (dropped)"
_REPEATED = "are grey (made RGB by repeating the channel)"
_EQUAL = "are grey stored in colour (one channel is read)"
_UPRIGHT = "have an EXIF orientation (turned upright)"
_AS_STORED = "have an EXIF orientation (left as stored, as the dataset's makers did)"
_FIRST = "hold further pictures (MPO; only the first is read)"

MODES = {1: "L", 3: "RGB"}
_GREY = frozenset({"1", "L", "LA", "La", "I", "F"})
#: As Pillow refuses by default.
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 27)
_PNG = b"\x89PNG\r\n\x1a\n"
#: The two formats that large datasets come in, by their first bytes. Opening them directly saves
#: the search through all of Pillow's formats: a fifth of the time of a 32x32 image.
_COMMON: tuple[tuple[bytes, Callable[[BinaryIO], Image.Image]], ...] = (
    (_PNG, PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
)
#: Entries of Pillow's ``info`` that need a second look; most pictures have none of them.
_EXIF = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})
_ODD = _EXIF | {"transparency", "mp"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE = 258
#: Where a PNG's header, its first chunk by the standard, has the bit depth.
_DEPTH = 24


def mode_of(channels: int) -> str:
    """Return the mode of pictures with so many channels; raise ``PictureError`` without one."""
    if channels not in MODES:
        raise PictureError(
            f"cannot have {channels} channels",
            allowed="1 or 3; .npy arrays may have others",
            remedy="give the right source",
        )
    return MODES[channels]


class PictureError(Exception):
    """A picture that is refused: why, what is allowed and what to do."""

    def __init__(self, problem: str, *, allowed: str = "", remedy: str = "") -> None:
        super().__init__(problem)
        self.problem, self.allowed, self.remedy = problem, allowed, remedy


#: What opening and decoding a picture may raise: Pillow lets whatever a damaged file breaks pass.
UNREADABLE = (
    PictureError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)


def unreadable(who: str, name: str, error: Exception) -> UserError:
    """Return the error for the picture ``name`` of ``who``, without Pillow's internals."""
    if isinstance(error, PictureError):
        problem, allowed, remedy = error.problem, error.allowed, error.remedy
    else:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if isinstance(error, UnidentifiedImageError):  # its text names our buffer
            reason = "no image of a format that is read"
        problem, allowed = f"cannot be decoded ({reason})", f"whole files: {', '.join(FORMATS)}"
        remedy = "replace the file: leaving it out would change the data set"
    return UserError(who, f"image {name!r} {problem}", allowed=allowed, remedy=remedy)


class OpenedPicture(NamedTuple):
    """A picture of mode ``L`` or ``RGB``, and what is unusual about its file.

    ``lossy`` names the lossy format of the file, "" if it is lossless. Pillow may decode the
    picture only when its pixels are asked for, and raise :data:`UNREADABLE` then.
    """

    image: Image.Image
    lossy: str
    notes: tuple[str, ...] = ()


def open_picture(data: bytes, channels: int, *, upright: bool = True) -> OpenedPicture:
    """Open an encoded picture by the rule above.

    Args:
        data: the whole file.
        channels: 1 for grey data, 3 for RGB.
        upright: apply an EXIF orientation.

    Raises:
        PictureError: it is refused.
        Exception: any other of :data:`UNREADABLE`, if it cannot be decoded.

    """
    image, mode = _open(data), mode_of(channels)
    if image.mode == mode and _ODD.isdisjoint(image.info):  # nearly all pictures end here
        if image.format == "JPEG":
            return OpenedPicture(image, "JPEG")
        if image.format == "PNG" and _is_plain_png(image, data):
            return OpenedPicture(image, "")
    _check_frames_and_depth(image, data)
    lossy, turn = _lossy_format(image, data), _orientation(image, data)
    notes = [_FIRST] if "mp" in image.info else []
    turned_by_pillow = image.format == "TIFF"
    if image.has_transparency_data:
        image = _without_alpha(image, notes)
    if turn != 1:
        notes.append(_UPRIGHT if upright or turned_by_pillow else _AS_STORED)
        if upright and not turned_by_pillow:
            image = image.transpose(_TURNS[turn])
    if image.mode != mode:
        image = _to_rgb(image, notes) if mode == "RGB" else _to_grey(image, notes)
    return OpenedPicture(image, lossy, tuple(notes))


def decode_picture(
    data: bytes, channels: int, most_pixels: int = _MAX_PIXELS
) -> tuple[Pixels, tuple[str, ...]]:
    """Return the pixels uint8 ``[H, W, C]`` of a picture and its notes, upright.

    Raises as :func:`open_picture` does, and for a picture of more than ``most_pixels``, whose
    pixels are not decoded.
    """
    width, height = _open(data).size
    if width * height > most_pixels:
        raise PictureError(
            f"has {width:,} x {height:,} pixels",
            allowed=f"up to {most_pixels:,} pixels",
            remedy="score samples of the size that they were generated in",
        )
    image, lossy, notes = open_picture(data, channels)
    pixels = np.array(image, dtype=np.uint8)
    pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
    return pixels, ((LOSSY, *notes) if lossy else notes)


def picture_shape(data: bytes) -> tuple[int, int, int]:
    """Return channels, height and width of an encoded picture, upright.

    Raises as :func:`open_picture` does.
    """
    image = _open(data)
    turn = _orientation(image, data)
    image.load()  # which turns a TIFF
    swapped = turn > 4 and image.format != "TIFF"
    width, height = image.size[::-1] if swapped else image.size
    return (1 if image.mode.partition(";")[0] in _GREY else 3, height, width)


def _open(data: bytes) -> Image.Image:
    for magic, opener in _COMMON:
        if data.startswith(magic):
            image = opener(io.BytesIO(data))
            if magic == _PNG and data[12:16] != b"IHDR":
                raise SyntaxError("a PNG must begin with its header")
            if image.width * image.height > _MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            return image
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _is_plain_png(image: Any, data: bytes) -> bool:
    """Return whether a PNG has one frame, 8 bits per channel and no orientation in a chunk."""
    return data[_DEPTH] == 8 and not image.is_animated and not _has_exif_chunk(data)


def _check_frames_and_depth(image: Image.Image, data: bytes) -> None:
    if getattr(image, "is_animated", False):
        raise PictureError(
            f"holds {getattr(image, 'n_frames', 'several')} frames",
            allowed="one picture per file",
            remedy="save every frame as a file of its own",
        )
    depth = 8
    if image.format == "PNG":
        depth = data[_DEPTH]  # Pillow reads 16-bit colours as 8-bit without a warning
    elif image.format == "TIFF":
        depth = max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,)))
    if depth > 8 or image.mode.startswith(("I", "F")):
        raise PictureError(
            f"has pixels of more than 8 bits (mode {image.mode}, {depth} bits per channel)",
            allowed="8 bits per channel",
            remedy="round it to 8 bits as its generator does",
        )


def _lossy_format(image: Image.Image, data: bytes) -> str:
    kind = image.format or ""
    if kind == "WEBP":
        return "" if _is_lossless_webp(data) else kind
    if kind == "TIFF":
        return kind if "jpeg" in str(image.info.get("compression")) else ""
    return kind if kind == "JPEG" else ""


def _is_lossless_webp(data: bytes) -> bool:
    """Return whether the pixels, in the first chunk of that kind, are coded without loss."""
    place = 12
    while (kind := data[place : place + 4]) not in (b"VP8 ", b"VP8L", b""):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
    return kind == b"VP8L"


def _orientation(image: Image.Image, data: bytes) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it is missing or invalid."""
    if image.format == "PNG" and _has_exif_chunk(data):
        image.load()  # the chunk may follow the pixels
    if image.format != "TIFF" and _EXIF.isdisjoint(image.info):
        return 1
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, KeyError, IndexError, TypeError, OSError, struct.error):
        return 1
    return turn if turn in _TURNS else 1


def _has_exif_chunk(data: bytes) -> bool:
    place = 33  # behind the header
    while kind := data[place + 4 : place + 8]:
        if kind == b"eXIf":
            return True
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return False


def _without_alpha(image: Image.Image, notes: list[str]) -> Image.Image:
    whole = image.convert("RGBA")
    lowest = whole.getchannel("A").getextrema()[0]
    if isinstance(lowest, (int, float)) and lowest < 255:
        raise PictureError(
            "is transparent in places",
            allowed="opaque pictures",
            remedy="composite it on the background that the data have",
        )
    if image.mode in ("P", "PA"):
        notes.append(_PALETTE)
    notes.append(_OPAQUE)
    return whole.getchannel("R") if image.mode in _GREY else whole.convert("RGB")


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    other = f"have pixel mode {image.mode} (converted to RGB)"
    notes.append(_REPEATED if image.mode in _GREY else {"P": _PALETTE}.get(image.mode, other))
    return image.convert("RGB")


def _to_grey(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode == "1":
        notes.append("have pixel mode 1 (converted to grey)")
        return image.convert("L")
    bands = image.convert("RGB").split()
    if len({band.tobytes() for band in bands}) > 1:
        raise PictureError(
            f"has colours (mode {image.mode})",
            allowed="grey, as the data are",
            remedy="convert it to grey first",
        )
    notes.append(_EQUAL)
    return bands[0]
