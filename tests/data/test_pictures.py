"""The one decoder of pictures: its rule, and that ``prepare`` and ``eval`` both follow it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_builders import class_folder, encode, pictures
from PIL import Image, ImageOps

from cmbench.data.locations import DataLocations
from cmbench.data.pictures import (
    UNREADABLE,
    PictureError,
    decode_picture,
    open_picture,
    picture_shape,
)
from cmbench.data.preparation.run import Request, prepare
from cmbench.data.rules import RULES, Rule
from cmbench.data.store import open_store
from cmbench.errors import UserError
from cmbench.plugin.specs import DatasetSpec
from cmbench.samples.opening import open_samples

RGB = pictures(1)[0]
GREY = pictures(1, channels=1)[0]
ORIENTATION = 0x112


def saved(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(color_type: int, depth: int, raw: bytes, *extra: bytes) -> bytes:
    """An 8x8 PNG of those samples, which Pillow cannot write in every depth."""
    row = len(raw) // 8
    rows = b"".join(b"\0" + raw[i * row : (i + 1) * row] for i in range(8))
    head = struct.pack(">IIBBBBB", 8, 8, depth, color_type, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def wide(channels: int) -> bytes:
    values = np.arange(64 * channels, dtype=np.uint32) * 257 % 65536
    return bytes(values.astype(">u2").tobytes())


def wide_tiff() -> bytes:
    """An 8x8 TIFF of 16-bit RGB."""
    tags = [
        (256, 3, 1, 8),
        (257, 3, 1, 8),
        (258, 3, 3, 200),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 300),
        (277, 3, 1, 3),
        (278, 3, 1, 8),
        (279, 4, 1, 384),
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    head += b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return head.ljust(200, b"\0") + struct.pack("<3H", 16, 16, 16).ljust(100, b"\0") + wide(3)


def frames(kind: str) -> bytes:
    first, *rest = (Image.fromarray(p) for p in pictures(3))
    return saved(first, kind, save_all=True, append_images=rest)


def with_alpha(alpha: int) -> Image.Image:
    image = Image.fromarray(RGB)
    image.putalpha(Image.fromarray(np.full((8, 8), alpha, np.uint8)))
    return image


def palette() -> Image.Image:
    return Image.fromarray(RGB).quantize(16)


def oriented(kind: str, turn: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    return saved(Image.fromarray(pictures(1)[0, :6]), kind, exif=exif, **options)


REFUSED: dict[str, tuple[bytes, str]] = {
    "16-bit RGB PNG": (png(2, 16, wide(3)), r"more than 8 bits \(mode RGB, 16 bits per channel"),
    "16-bit RGBA PNG": (png(6, 16, wide(4)), r"more than 8 bits"),
    "16-bit grey PNG": (png(0, 16, wide(1)), r"more than 8 bits"),
    "16-bit grey and alpha PNG": (png(4, 16, wide(2)), r"more than 8 bits"),
    "16-bit RGB TIFF": (wide_tiff(), r"more than 8 bits \(mode RGB, 16 bits per channel"),
    "32-bit TIFF": (saved(Image.new("I", (8, 8)), "tiff"), r"more than 8 bits"),
    "float TIFF": (saved(Image.new("F", (8, 8)), "tiff"), r"more than 8 bits"),
    "transparent PNG": (saved(with_alpha(254)), r"is transparent in places"),
    "transparent colour in an RGB PNG": (
        saved(Image.fromarray(RGB), transparency=tuple(RGB[3, 3].tolist())),
        r"is transparent in places",
    ),
    "transparent grey value": (
        saved(Image.fromarray(GREY[..., 0]), transparency=int(GREY[0, 0, 0])),
        r"is transparent in places",
    ),
    "transparent palette": (saved(palette(), transparency=bytes([0])), r"is transparent in places"),
    "transparent WebP": (saved(with_alpha(7), "webp", lossless=True), r"is transparent in places"),
    "TIFF of several pages": (frames("tiff"), r"holds 3 frames; allowed: one picture per file"),
    "animated GIF": (frames("gif"), r"holds 3 frames"),
    "APNG": (frames("png"), r"holds 3 frames"),
    "animated WebP": (frames("webp"), r"holds 3 frames"),
    "JPEG 2000": (saved(Image.fromarray(RGB), "jpeg2000"), r"no image of a format that is read"),
    "PostScript": (saved(Image.fromarray(RGB), "eps"), r"no image of a format that is read"),
    "cut": (encode(RGB)[:80], r"cannot be decoded \(\w+: .*replace the file"),
    "text": (b"no picture", r"no image of a format that is read"),
    "PNG whose header comes late": (
        encode(RGB)[:8] + chunk(b"CgBI", b"") + encode(RGB)[8:],
        r"a PNG must begin with its header",
    ),
}

grey_as_rgb = np.repeat(GREY, 3, axis=2)
quantized = np.asarray(palette().convert("RGB"))
cmyk = Image.fromarray(RGB).convert("CMYK")
#: Bytes, the pixels that they mean, and what is noted.
TAKEN: dict[str, tuple[bytes, np.ndarray[Any, Any], tuple[str, ...]]] = {
    "RGB PNG": (encode(RGB), RGB, ()),
    "WebP": (saved(Image.fromarray(RGB), "webp", lossless=True), RGB, ()),
    "BMP": (encode(RGB, "bmp"), RGB, ()),
    "TIFF": (encode(RGB, "tiff"), RGB, ()),
    "grey": (encode(GREY), grey_as_rgb, ("are grey (made RGB",)),
    "grey GIF": (encode(GREY, "gif"), grey_as_rgb, ("have a palette",)),
    "one bit": (saved(Image.new("1", (8, 8), 1)), np.full_like(RGB, 255), ("are grey",)),
    "palette": (saved(palette()), quantized, ("have a palette (converted to RGB)",)),
    "opaque palette": (
        saved(palette(), transparency=bytes([255] * 16)),
        quantized,
        ("have a palette", "have an opaque alpha channel (dropped)"),
    ),
    "opaque alpha": (saved(with_alpha(255)), RGB, ("have an opaque alpha channel (dropped)",)),
    "opaque grey and alpha": (
        saved(Image.merge("LA", [Image.fromarray(GREY[..., 0]), Image.new("L", (8, 8), 255)])),
        grey_as_rgb,
        ("have an opaque alpha", "are grey"),
    ),
    "unused transparent colour": (
        saved(Image.fromarray(RGB), transparency=(1, 2, 3)),
        RGB,
        ("have an opaque alpha",),
    ),
    "CMYK": (
        saved(cmyk, "tiff"),
        np.asarray(cmyk.convert("RGB")),
        ("have pixel mode CMYK (converted to RGB)",),
    ),
}


# ---- the rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken(name: str) -> None:
    data, wanted, notes = TAKEN[name]
    pixels, found = decode_picture(data, 3)
    assert np.array_equal(pixels, wanted)
    assert len(found) == len(notes)
    assert all(a.startswith(b) for a, b in zip(found, notes, strict=True))


def test_grey_data_take_grey_pictures_only() -> None:
    pixels, notes = decode_picture(encode(GREY), 1)
    assert np.array_equal(pixels, GREY)
    assert notes == ()
    for data in (encode(grey_as_rgb), saved(Image.fromarray(grey_as_rgb).quantize(256))):
        pixels, notes = decode_picture(data, 1)
        assert np.array_equal(pixels, GREY)
        assert notes == ("are grey stored in colour (one channel is read)",)
    with pytest.raises(PictureError, match=r"has colours \(mode RGB\)"):
        decode_picture(encode(RGB), 1)


@pytest.mark.parametrize(
    ("kind", "options", "lossy"),
    [
        ("jpeg", {}, "JPEG"),
        ("webp", {"lossless": False}, "WEBP"),
        ("webp", {"lossless": True}, ""),
        ("webp", {"lossless": True, "icc_profile": bytes(999)}, ""),
        ("webp", {"lossless": False, "icc_profile": bytes(999)}, "WEBP"),
        ("tiff", {"compression": "jpeg"}, "TIFF"),
        ("tiff", {"compression": "tiff_lzw"}, ""),
        ("png", {}, ""),
    ],
)
def test_lossy_formats(kind: str, options: dict[str, Any], lossy: str) -> None:
    data = saved(Image.fromarray(RGB), kind, **options)
    assert open_picture(data, 3).lossy == lossy
    assert ("lossy" in "".join(decode_picture(data, 3)[1])) == bool(lossy)


def test_further_pictures_of_a_jpeg_are_said() -> None:
    first, second = (Image.fromarray(p) for p in pictures(2))
    data = saved(first, "mpo", save_all=True, append_images=[second])
    pixels, notes = decode_picture(data, 3)
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(saved(first, "jpeg")))))
    assert any(note.startswith("hold further pictures (MPO") for note in notes)


# ---- orientation -------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_an_orientation_is_applied(kind: str, turn: int) -> None:
    data = oriented(kind, turn, **({"lossless": True} if kind == "webp" else {}))
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    pixels, notes = decode_picture(data, 3)
    assert np.array_equal(pixels, wanted)
    assert ("have an EXIF orientation (turned upright)" in notes) == (turn != 1)
    assert picture_shape(data) == (3, *wanted.shape[:2])


def test_an_orientation_behind_the_pixels_of_a_png() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encode(RGB)
    late = data[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]
    pixels, notes = decode_picture(late, 3)
    assert np.array_equal(pixels, np.rot90(RGB, -1))
    assert notes == ("have an EXIF orientation (turned upright)",)
    assert picture_shape(late) == (3, 8, 8)


def test_an_orientation_as_stored() -> None:
    data = oriented("jpeg", 6)
    image, _, notes = open_picture(data, 3, upright=False)
    assert image.size == (8, 6)
    (note,) = notes
    assert note.startswith("have an EXIF orientation (left as stored")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_an_orientation_that_makes_no_sense_is_none(exif: bytes) -> None:
    data = saved(Image.fromarray(RGB), "jpeg", exif=exif)
    assert open_picture(data, 3).notes == ()
    assert oriented("jpeg", 9) != data
    assert open_picture(oriented("jpeg", 9), 3).notes == ()


# ---- both callers ------------------------------------------------------------------------------


def prepared(folder: Path, data: Path, spec: DatasetSpec, rule: Rule) -> tuple[Any, Any]:
    manifest, _ = prepare(spec, rule, Request(folder), DataLocations(data))
    return open_store(data / spec.name).images, manifest


def sampled(folder: Path) -> tuple[Any, list[str]]:
    source = open_samples(str(folder))
    images = [batch.images.numpy() for batch in source.batches(4)]
    return np.concatenate(images), source.notes


@pytest.mark.parametrize("name", REFUSED)
def test_prepare_and_eval_refuse_the_same(
    tmp_path: Path, spec: DatasetSpec, rule: Rule, name: str
) -> None:
    data, message = REFUSED[name]
    class_folder(tmp_path / "s", pictures(3))
    (tmp_path / "s/bee/odd.png").write_bytes(data)
    callers: list[Callable[[], Any]] = [
        lambda: prepared(tmp_path / "s", tmp_path / "data", spec, rule),
        lambda: sampled(tmp_path / "s"),
    ]
    said = []
    for call in callers:
        with pytest.raises(UserError, match=rf"image 'bee/odd.png' .*{message}") as caught:
            call()
        assert "\n" not in str(caught.value)
        assert "BytesIO" not in str(caught.value)
        said.append(str(caught.value).partition("image ")[2])
    assert said[0] == said[1]


def test_prepare_and_eval_read_the_same(tmp_path: Path, spec: DatasetSpec, rule: Rule) -> None:
    for i, (data, _, _) in enumerate(TAKEN.values()):
        folder = tmp_path / "s" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03}.png").write_bytes(data)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = saved(Image.fromarray(RGB), "jpeg", exif=exif)
    (tmp_path / "s/a/turned.jpg").write_bytes(turned)
    images, manifest = prepared(tmp_path / "s", tmp_path / "data", spec, rule)
    samples, notes = sampled(tmp_path / "s")
    assert np.array_equal(images, samples)
    count = len(samples)
    said = {f"{n} of {count} samples {what}" for what, n in manifest.converted.items()}
    lossy = "1 of 14 samples are JPEG or another lossy format, which changes every distance:"
    assert said == {note for note in notes if not note.startswith(lossy)}
    assert manifest.lossy


def test_published_datasets_keep_the_orientation_that_their_makers_ignored(
    tmp_path: Path, spec: DatasetSpec, rule: Rule
) -> None:
    class_folder(tmp_path / "s", pictures(3))
    (tmp_path / "s/bee/odd.jpg").write_bytes(oriented("jpeg", 6))
    published = replace(rule, transform="adm-crop", upright=RULES["imagenet64-adm"].upright)
    images, manifest = prepared(tmp_path / "s", tmp_path / "a", spec, published)
    upright, other = prepared(
        tmp_path / "s", tmp_path / "b", spec, replace(rule, transform="adm-crop")
    )
    assert not np.array_equal(images, upright)
    assert list(manifest.converted) == [
        "have an EXIF orientation (left as stored, as the dataset's makers did)"
    ]
    assert list(other.converted) == ["have an EXIF orientation (turned upright)"]
    assert not any(RULES[n].upright for n in RULES if n.startswith("lsun") or n == "imagenet64")


def test_lossless_webp_counts_as_lossless(tmp_path: Path, spec: DatasetSpec, rule: Rule) -> None:
    class_folder(tmp_path / "s", pictures(3))
    exact = replace(rule, lossless=True)
    (tmp_path / "s/bee/x.webp").write_bytes(saved(Image.fromarray(RGB), "webp", lossless=True))
    assert not prepared(tmp_path / "s", tmp_path / "a", spec, exact)[1].lossy
    (tmp_path / "s/bee/y.webp").write_bytes(saved(Image.fromarray(RGB), "webp", lossless=False))
    with pytest.raises(UserError, match=r"image 'bee/y.webp' is WEBP, which is lossy"):
        prepared(tmp_path / "s", tmp_path / "b", spec, exact)


def test_a_damaged_colour_profile_is_one_clear_line() -> None:
    """Pillow raises IndexError for a profile without a method of compression."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "png")
    data = buffer.getvalue()
    end = data.rindex(b"IEND") - 4
    body = b"iCCP" + b"name\0"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    with pytest.raises(UNREADABLE):
        decode_picture(data[:end] + chunk + data[end:], 3)
