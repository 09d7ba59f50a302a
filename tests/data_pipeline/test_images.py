"""Untrusted pictures end as upright RGB or as one countable reason."""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from data_pipeline import colour, images
from data_pipeline.images import ImageError

RAMP = np.add.outer(np.arange(96), np.arange(128)).astype(np.uint8)
PICTURE = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=2)


def saved(image: Image.Image, format_: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format_, **options)
    return sink.getvalue()


def swapping_profile() -> bytes:
    """An ICC profile of RGB colours whose red primary is sRGB's blue and whose blue is its red."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    red, green, blue = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    gamma = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(2.2 * 256))
    tags = {
        b"rXYZ": xyz(*blue),
        b"gXYZ": xyz(*green),
        b"bXYZ": xyz(*red),
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma),
    }
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    whole = struct.pack(">I", len(tags)) + table + body
    header = struct.pack(">I4xI", 128 + len(whole), 0x02400000) + b"mntrRGB XYZ " + bytes(12) + b"acsp"
    return header.ljust(128, b"\0") + whole


def psnr(a: images.Pixels, b: images.Pixels) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


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


@pytest.mark.parametrize("orientation", range(10))
def test_the_square_of_a_turned_picture_is_cut_from_the_upright_one_to_the_pixel(orientation: int) -> None:
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = orientation
    pixels = np.random.default_rng(orientation).integers(0, 256, (97, 152, 3), dtype=np.uint8)  # odd slack
    for size in ((152, 97), (97, 152)):
        data = saved(Image.fromarray(pixels).resize(size), "JPEG", exif=exif)
        for policy, picture in itertools.product(("centre", "near_centre"), (1, 2**63 + 5)):
            upright = images.decode(data, enough_side=80)
            expected = images.area_resize(images.crop(upright, policy, picture, 40), 40)
            assert np.array_equal(images.decode_square(data, 40, policy, picture), expected), (size, policy)


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (images.decode(saved(image, "PNG")) == 255).all()


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_embedded_profile_says_what_the_colours_are(format_: str) -> None:
    red = Image.new("RGB", (64, 48), (255, 0, 0))
    options = {"lossless": True} if format_ == "WEBP" else {}
    data = saved(red, format_, icc_profile=swapping_profile(), **options)
    assert np.abs(images.decode(data).astype(int) - (0, 0, 255)).max() <= 4
    assert np.abs(images.decode_square(data, 16, "centre", 1).astype(int) - (0, 0, 255)).max() <= 4


@pytest.mark.parametrize(
    "profile",
    [
        b"not a profile",
        swapping_profile()[:200],
        swapping_profile().replace(b"mntrRGB ", b"mntrCMYK"),
        swapping_profile().replace(b"curv", b"\xff\xff\xff\xff"),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        bytes(colour.PROFILE_LIMIT_BYTES + 1),
    ],
)
def test_a_broken_foreign_or_srgb_profile_counts_as_none(profile: bytes) -> None:
    picture = Image.fromarray(PICTURE)
    for format_ in (
        ("JPEG", "PNG") if len(profile) < 2**20 else ("JPEG",)
    ):  # Pillow takes a larger one in PNG for a bomb
        without = images.decode(saved(picture, format_))
        np.testing.assert_array_equal(images.decode(saved(picture, format_, icc_profile=profile)), without)


def test_a_grey_picture_with_a_profile_of_colours_stays_grey() -> None:
    data = saved(Image.fromarray(RAMP), "JPEG", icc_profile=swapping_profile())
    pixels = images.decode(data)
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all() and np.abs(pixels[:, :, 0].astype(int) - RAMP).max() <= 8


def test_sixteen_bits_keep_their_upper_eight() -> None:
    grey = np.full((8, 8), 0xABCD, np.uint16)
    assert (images.decode(saved(Image.fromarray(grey), "PNG")) == 0xAB).all()


def test_the_transparent_value_of_sixteen_bits_lies_on_white_and_no_other_with_the_same_upper_eight() -> None:
    grey = np.full((8, 8), 300, np.uint16)
    grey[4:] = 301
    pixels = images.decode(saved(Image.fromarray(grey), "PNG", transparency=300))
    assert (pixels[:4] == 255).all() and (pixels[4:] == 300 >> 8).all()


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


def with_more_scans(jpeg: bytes, count: int) -> bytes:
    """A JPEG with its last scan `count` times again."""
    start = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[start:-2] * count + jpeg[-2:]


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_that_goes_over_its_pixels_too_often_is_refused_before_it_is_decoded(mode: str) -> None:
    jpeg = saved(Image.new(mode, (2048, 1024)), "JPEG", progressive=True)
    most = images.SCANNED_PIXEL_LIMIT // (2048 * 1024)
    assert images.read_header(with_more_scans(jpeg, most - jpeg.count(b"\xff\xda"))).width == 2048
    too_many = with_more_scans(jpeg, most + 1 - jpeg.count(b"\xff\xda"))
    restarts = too_many.replace(b"\xff\xda", b"\xff\xd0\xff\xff\xda")
    for bomb in (too_many, restarts, too_many.replace(b"\xff\xda", b"junk\xff\x00\xff\xda")):
        with pytest.raises(ImageError, match=f"image_too_many_scans: 2048x1024, at most {most} scans"):
            images.read_header(bomb)


def test_scans_of_a_small_jpeg_are_bounded_too() -> None:
    jpeg = saved(Image.new("L", (8, 8)), "JPEG", progressive=True)
    images.decode(with_more_scans(jpeg, 500))
    with pytest.raises(ImageError, match="image_too_many_scans"):
        images.decode(with_more_scans(jpeg, 2**12))


def test_scans_of_one_colour_each_are_counted_without_progression() -> None:
    jpeg = saved(Image.new("RGB", (8, 8)), "JPEG")
    start = jpeg.index(b"\xff\xda")
    scan = b"\xff\xda\0\x08\1\1\0\0\x3f\0" + bytes(8)
    with pytest.raises(ImageError, match="image_too_many_scans"):
        images.decode(jpeg[:start] + scan * 2**12 + jpeg[-2:])


@pytest.mark.parametrize("progressive", [False, True])
def test_what_looks_like_a_scan_within_a_segment_or_after_the_end_is_none(progressive: bool) -> None:
    jpeg = saved(Image.fromarray(PICTURE), "JPEG", progressive=progressive)
    scans = b"\xff\xda\0\2" * 2**13
    segment = b"\xff\xe5" + struct.pack(">H", len(scans) + 2) + scans
    np.testing.assert_array_equal(images.decode(jpeg[:2] + segment + jpeg[2:] + scans), images.decode(jpeg))


def run_length_bmp(side: int) -> bytes:
    """One end-of-line code for a picture of side x side."""
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 1084, 0, 0, 1078, 40, side, side, 1, 8, 1, 2, 0, 0, 256, 0)
    return header + bytes(1024) + b"\0\0\0\1"


@pytest.mark.parametrize(
    ("bomb", "line"),
    [
        (b"P2 8 8 255\n" + b"#\n" * 2**20, "image_unknown_format: a PNM of written numbers"),
        (run_length_bmp(8191), "image_unknown_format: a run-length coded BMP"),
        (
            saved(Image.fromarray(PICTURE), "PNG")[:33]
            + (struct.pack(">I4s", 6, b"iCCP") + b"a\0\0xyz" + bytes(4)) * 2000
            + saved(Image.fromarray(PICTURE), "PNG")[33:],
            "image_damaged: 2000 iCCP chunks",
        ),
    ],
    ids=["plain-pnm", "run-length-bmp", "png-profiles"],
)
def test_what_takes_minutes_to_decode_is_refused_unread(bomb: bytes, line: str) -> None:
    for read in (images.read_header, images.decode):
        with pytest.raises(ImageError, match=line):
            read(bomb)


def test_a_palette_of_an_os2_bmp_is_not_taken_for_run_length_coding() -> None:
    palette = bytearray(768)
    palette[4] = 1  # the byte at which a longer header tells of compression
    header = struct.pack("<2sIHHIIHHHH", b"BM", 0, 0, 0, 26 + 768, 12, 4, 2, 1, 8)
    data = header + bytes(palette) + bytes([1] * 8)
    assert data[30:34] == b"\1\0\0\0"
    assert images.decode(data).tolist() == [[[0, 1, 0]] * 4] * 2


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


@pytest.mark.parametrize("shape", [(480, 640), (300, 300), (256, 900), (100, 70)])
def test_the_near_central_crop_is_decided_by_the_id_and_stays_near_the_centre(shape: tuple[int, int]) -> None:
    down, right = np.indices(shape)
    places = np.stack([down, right], axis=2)
    boxes = []
    for picture in range(300):
        cropped = images.crop(places, "near_centre", picture, 256)  # type: ignore[arg-type]
        np.testing.assert_array_equal(cropped, images.crop(places, "near_centre", picture, 256))  # type: ignore[arg-type]
        side, largest = len(cropped), min(shape)
        assert cropped.shape == (side, side, 2) and min(largest, 256) <= side <= largest
        assert side >= largest * 8 / 9 - 1
        for axis in (0, 1):
            slack, start = shape[axis] - largest, int(cropped[0, 0, axis])
            assert 3 / 8 * slack - 1 <= start <= 5 / 8 * slack + largest - side + 1
        boxes.append((side, *cropped[0, 0]))
    sides, tops, lefts = (np.array(column) for column in zip(*boxes, strict=True))
    if shape[0] != shape[1]:
        assert len(set(tops if shape[0] > shape[1] else lefts)) > 5
    assert (sides == min(shape)).all() == (min(shape) <= 256)


def test_of_a_picture_at_the_limit_no_process_needs_a_gibibyte_and_a_half(messy: Path, tmp_path: Path) -> None:
    for name, mode in (("alpha.tif", "RGBA"), ("deep.tif", "I;16"), ("turned.jpg", "RGB")):
        exif = Image.Exif()
        exif[images.EXIF_ORIENTATION] = 6
        Image.new(mode, (8192, 8192)).save(tmp_path / name, exif=exif)
    # A process of its own, for the peak of a process never goes down.
    script = """if True:
        import sys
        from pathlib import Path
        from data_pipeline import colour, images
        for path in map(Path, sys.argv[1:]):
            try:
                images.decode_square(path.read_bytes(), 256, "centre", 1)
            except images.ImageError as error:
                assert path.name not in {"alpha.tif", "deep.tif", "turned.jpg"}, error
        print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """
    folders = ("broken", "lies", "bombs", "colour", "exif", "animated", "avif_heif")
    files = [*tmp_path.iterdir(), *(path for folder in folders for path in sorted((messy / folder).iterdir()))]
    command = [sys.executable, "-c", script, *map(str, files)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(printed.split()[1]) < 1.5 * 2**20  # KiB


def test_a_stored_picture_comes_back_nearly_equal() -> None:
    stored = images.encode_jpeg(PICTURE)
    assert np.abs(images.decode_stored(memoryview(stored)).astype(int) - PICTURE).max() <= 6


def test_a_reduced_decode_gives_nearly_the_same_stored_picture(messy: Path, photographs: Path) -> None:
    with tarfile.open(photographs / "coco_original" / "00000.tar") as tar:
        small = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")][:40]  # type: ignore[union-attr]
    camera = [path.read_bytes() for path in sorted((messy / "exif").glob("recurser__*.jpg"))]
    # Least and median of the square, least and median of a quarter of it, in dB: see decode_square.
    for pictures, side, bounds in ((camera, 256, (44, 44, 54, 54)), (small, 96, (29, 36, 37, 45))):
        squares, quarters = [], []
        for data in pictures:
            full, reduced = images.decode(data), images.decode(data, enough_side=2 * side)
            if reduced.shape == full.shape:
                continue
            a, b = (images.area_resize(images.centre_crop(pixels), side) for pixels in (full, reduced))
            squares.append(psnr(a, b))
            quarters.append(psnr(images.area_resize(a, side // 4), images.area_resize(b, side // 4)))
        found = (min(squares), np.median(squares), min(quarters), np.median(quarters))
        assert len(squares) >= 5 and all(np.array(found) > bounds), found
