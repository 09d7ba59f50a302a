"""Untrusted pictures end as upright RGB or as one countable reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_pipeline import images
from data_pipeline.images import ImageError

RAMP = np.add.outer(np.arange(96), np.arange(128)).astype(np.uint8)
PICTURE = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=2)


def saved(image: Image.Image, format_: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format_, **options)
    return sink.getvalue()


def test_every_messy_picture_becomes_rgb_or_one_known_reason(messy: Path) -> None:
    seen = 0
    for folder in ("broken", "lies", "bombs", "colour", "exif", "animated", "avif_heif"):
        for path in sorted((messy / folder).iterdir()):
            seen += 1
            try:
                pixels = images.decode(path.read_bytes(), enough_side=512)
            except ImageError as error:
                assert error.reason in ImageError.REASONS, path
                continue
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, path
            assert pixels.flags.c_contiguous, path
    assert seen > 80


@pytest.mark.parametrize(
    "name",
    [
        "colour/pillow__pil_sample_cmyk.jpg",
        "colour/pillow__12in16bit.tif",
        "colour/pillow__l_trns.png",
        "animated/pillow__iss634.webp",
        "avif_heif/pillow__hopper.avif",
        "exif/pillow__broken_exif_dpi.jpg",
        "broken/pillow__jpeg_ff00_header.jpg",
    ],
)
def test_an_odd_but_whole_picture_is_kept(messy: Path, name: str) -> None:
    images.decode((messy / name).read_bytes())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lies/derived__empty.jpg", "image_empty"),
        ("lies/derived__html_error_page.jpg", "image_unknown_format"),
        ("lies/derived__zeros_tail.jpg", "image_damaged"),
        ("broken/exifsamples__corrupted.jpg", "image_damaged"),
        ("broken/pillow__truncated_jpeg.jpg", "image_damaged"),
        ("bombs/derived__12000x12000_rgb.png", "image_too_many_pixels"),
        ("broken/imagers__Bad_reallybig.bmp", "image_too_many_pixels"),
        ("bombs/pillow__png_decompression_dos.png", "image_damaged"),
    ],
)
def test_a_bad_picture_is_refused_for_its_own_reason(messy: Path, name: str, reason: str) -> None:
    with pytest.raises(ImageError) as refused:
        images.decode((messy / name).read_bytes())
    assert refused.value.reason == reason


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_orientation_is_applied_as_pillow_applies_it(orientation: int, format_: str) -> None:
    image = Image.fromarray(PICTURE)
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = orientation
    data = saved(image, format_, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    difference = np.abs(images.decode(data).astype(int) - expected)
    assert difference.max() <= 4  # Pillow's own libjpeg rounds chroma differently


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (images.decode(saved(image, "PNG")) == 255).all()


def test_sixteen_bits_keep_their_upper_eight() -> None:
    grey = np.full((8, 8), 0xABCD, np.uint16)
    assert (images.decode(saved(Image.fromarray(grey), "PNG")) == 0xAB).all()


@pytest.mark.parametrize("format_", [name for name in images.FORMATS if name != "AVIF"])
def test_every_listed_format_is_read(format_: str) -> None:
    decoded = images.decode(saved(Image.fromarray(PICTURE), format_))
    assert decoded.shape == PICTURE.shape


def test_the_size_is_checked_before_anything_is_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="image_too_many_pixels: 10000x10000"):
        images.decode(bomb)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
def test_damaged_bytes_never_raise_anything_but_an_image_error(format_: str, data: st.DataObject) -> None:
    damaged = bytearray(saved(Image.fromarray(PICTURE), format_))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(0, len(damaged)))
    for candidate in (bytes(damaged), bytes(damaged[:cut])):
        try:
            assert images.decode(candidate).shape[2] == 3
        except ImageError as error:
            assert error.reason in ImageError.REASONS


def test_a_jpeg_cut_anywhere_in_its_pixels_is_refused() -> None:
    data = saved(Image.fromarray(PICTURE), "JPEG")
    start = data.index(b"\xff\xda") + 20
    for cut in range(start, len(data) - 2, 97):
        with pytest.raises(ImageError, match="image_damaged"):
            images.decode(data[:cut])


def test_the_area_filter_gives_the_mean_of_the_covered_area() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    means = picture.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(images.area_resize(picture, 64) - means).max() <= 0.5


def test_the_crop_is_square_and_centred() -> None:
    cropped = images.area_resize(images.centre_crop(PICTURE), 96)
    np.testing.assert_array_equal(cropped, PICTURE[:, 16:112])
    assert images.area_resize(images.centre_crop(PICTURE), 256).shape == (256, 256, 3)


def test_a_stored_picture_comes_back_nearly_equal() -> None:
    stored = images.encode_jpeg(PICTURE)
    assert np.abs(images.decode_stored(memoryview(stored)).astype(int) - PICTURE).max() <= 6


def test_a_reduced_decode_gives_nearly_the_same_stored_picture() -> None:
    grid = np.indices((1200, 1600)).sum(0)
    smooth = np.stack([grid // 12, 255 - grid // 12, (grid // 3) % 256 // 2], axis=2).astype(np.uint8)
    data = saved(Image.fromarray(smooth), "JPEG", quality=95)
    reduced = images.decode(data, enough_side=512)
    assert reduced.shape == (600, 800, 3)
    full = images.area_resize(images.centre_crop(images.decode(data)), 256).astype(int)
    assert np.abs(images.area_resize(images.centre_crop(reduced), 256) - full).mean() < 1
