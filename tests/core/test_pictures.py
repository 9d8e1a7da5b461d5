from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from atoll.core.pictures import (
    MAX_PIXELS,
    UnreadableImage,
    decode,
    is_gray,
    training_pixels,
)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes that say they are a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_each_format_is_read_as_rgb(form: str) -> None:
    image = decode(encoded(Image.new("RGB", (5, 7), (200, 30, 40)), form))
    assert (image.mode, image.size) == ("RGB", (5, 7))
    assert np.abs(np.asarray(image).astype(int)[2, 2] - (200, 30, 40)).max() < 12


def test_transparent_parts_become_white() -> None:
    for mode in ("RGBA", "LA"):
        clear = Image.new(mode, (4, 4), 0)
        assert np.asarray(decode(encoded(clear))).min() == 255
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert np.asarray(decode(encoded(palette, transparency=1))).min() == 255
    assert tuple(np.asarray(decode(encoded(palette)))[0, 0]) == (10, 20, 30)


def test_cmyk_sixteen_bits_and_animations_are_converted() -> None:
    cmyk = decode(encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "JPEG"))
    assert np.asarray(cmyk).min() > 250
    deep = Image.fromarray(np.full((4, 4), 128 * 256, dtype=np.uint16))
    assert set(np.asarray(decode(encoded(deep))).ravel()) == {128}
    frames = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 0, 255))]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(np.asarray(decode(moving))[0, 0]) == (255, 0, 0)


def test_pictures_stand_upright() -> None:
    image = Image.new("RGB", (6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(image, "JPEG", exif=exif)).size == (3, 6)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"not a picture", "not a picture in one of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture in one of"),
        (png_that_claims(30_000, 30_000), f"more than {MAX_PIXELS} pixels"),
        (png_that_claims(10_000, 9_000), f"more than {MAX_PIXELS} pixels"),
        (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900], "truncated"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point samples"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode(data)
    assert "0x" not in str(caught.value), "reasons are written into the run"


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 255))
def test_damaged_bytes_never_raise_anything_else(tail: bytes, place: int, value: int) -> None:
    good = bytearray(encoded(Image.effect_noise((9, 9), 60).convert("P")))
    good[place % len(good)] = value
    for data in (tail, good[:8] + tail, bytes(good), bytes(good[: place % len(good)])):
        with contextlib.suppress(UnreadableImage):
            assert decode(bytes(data)).mode == "RGB"


def test_training_pixels_keep_what_fits_and_crop_what_does_not() -> None:
    values = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    exact = training_pixels(Image.fromarray(values), (4, 4), 3)
    assert torch.equal(exact, torch.from_numpy(values).permute(2, 0, 1))
    wide = Image.new("RGB", (12, 4), (9, 9, 9))
    assert training_pixels(wide, (4, 4), 1).shape == (1, 4, 4)
    assert training_pixels(wide, (4, 4), 1).unique().tolist() == [9]
    gray = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 256, axis=1)
    image = Image.fromarray(gray).convert("RGB")
    assert is_gray(image)
    assert not is_gray(Image.new("RGB", (2, 2), (1, 2, 1)))
    assert torch.equal(training_pixels(image, (256, 256), 1)[0], torch.from_numpy(gray))
