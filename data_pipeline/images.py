"""Images: untrusted bytes to RGB arrays, and arrays to the two stored forms.

Always holds: the size, and how often a JPEG goes over its pixels, are checked against the limits before anything is
decoded; every failure is an ImageError with a short reason that can be counted; the result is RGB uint8 [H, W, 3] in
sRGB, upright, transparency on white, frame 0 of an animation; of a picture at the limit no process needs 1.5 GiB.
Called by the score pass; the loader and samplers use `decode_stored` and `area_resize`.

Plain JPEGs go through simplejpeg; whatever it does not take (CMYK, junk between markers, other formats) through Pillow.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal, cast

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from typing_extensions import Buffer

from data_pipeline.colour import Space, cmyk_to_rgb, to_srgb
from data_pipeline.draws import key64, mix64
from data_pipeline.jpeg_markers import JPEG_START, count_scans, has_metadata

Pixels = NDArray[np.uint8]

# Where the square that is kept lies in the picture: see `crop`.
Crop = Literal["centre", "near_centre"]

# Versions stand in the dataset's identity: raise one when the same source bytes can give other pixels than before.
DECODE_VERSION = "decode-4"
CODEC_VERSION = "jpeg-q95-444-1"
AREA_FILTER_VERSION = "cv2-area-2"

PIXEL_LIMIT = 64 * 2**20  # 192 MiB as RGB
# OpenJPEG holds every channel of every pixel as 32 bits, twice.
PIXEL_LIMITS = {"JPEG2000": 16 * 2**20}
# Of a JPEG, pixels times scans: a scan of a hundred bytes goes over all pixels, and a file can have a million of these.
# libjpeg writes 1, 6, 10 or, in CMYK, 18. A scan has a price of its own, so that pictures smaller than SMALL_PIXELS
# count as that.
SCANNED_PIXEL_LIMIT = 32 * PIXEL_LIMIT
SMALL_PIXELS = 2**20
JPEG_QUALITY = 95
BACKGROUND = 255  # white
STRIP_PIXELS = 2**20  # that are brought to RGB at once

PLAIN_PNM = (b"P1", b"P2", b"P3")
RUN_LENGTH_BMP = (b"\1\0\0\0", b"\2\0\0\0")  # biCompression: BI_RLE8, BI_RLE4
OS2_HEADER = b"\x0c\0\0\0"  # its size in bytes
PNG_START = b"\x89PNG\r\n\x1a\n"
MOST_PROFILES = 8

# Formats of photographs and web pictures. Others are refused unread: Pillow's EPS reader, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")

Image.init()  # registers them; a format that Pillow does not know would make every picture look damaged
if missing := set(FORMATS) - set(Image.OPEN):
    raise ImportError(f"this Pillow cannot open {sorted(missing)}; install the wheel from PyPI")

# By EXIF orientation (CIPA DC-008, tag 0x0112): the upright picture is the stored one flipped top to bottom, left to
# right, then transposed.
EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}
_QUARTER_TURNS = {6: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}

# DALL-E's near-central crop (Ramesh et al. 2021, appendix A, listing 2): the square lies between 3/8 and 5/8 of the
# slack; of the square, enlarged to at most 9/8 of the side that is stored, a random window of that side is kept.
NEAR_CENTRE = (3 / 8, 5 / 8)
LARGEST_ENLARGEMENT = 9 / 8


class ImageError(Exception):
    """An image that cannot be used. `reason` is one of REASONS; `detail` is for people."""

    REASONS = (
        "image_empty",
        "image_unknown_format",
        "image_too_many_pixels",
        "image_too_many_scans",
        "image_damaged",
        "image_unsupported_mode",
    )

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True)
class Header:
    """What is known of a picture before it is decoded: `width` and `height` in pixels, before orientation."""

    width: int
    height: int
    plain: Literal["YCbCr", "RGB", "Gray"] | None  # the colours of a JPEG that simplejpeg decodes rightly


@dataclass(frozen=True)
class _Decoded:
    """RGB in the picture's own colours and as it lies in the file: how it is to be turned, and the profile that says
    what its colours are."""

    pixels: Pixels
    orientation: int
    profile: bytes | None
    space: Space


def read_header(data: bytes) -> Header:
    """Decodes no pixels. Raises ImageError, also for a picture that would take too much to be decoded."""
    if not data:
        raise ImageError("image_empty", "no bytes")
    header = _plain_jpeg_header(data)
    limit = PIXEL_LIMIT
    if header is None:
        with _open(data) as image:
            header = Header(*image.size, plain=None)
            limit = PIXEL_LIMITS.get(image.format or "", PIXEL_LIMIT)
    if header.width * header.height > limit:
        raise ImageError("image_too_many_pixels", f"{header.width}x{header.height}, at most {limit} pixels are decoded")
    most = SCANNED_PIXEL_LIMIT // max(header.width * header.height, SMALL_PIXELS)
    if data.startswith(JPEG_START) and count_scans(data, most) > most:
        raise ImageError("image_too_many_scans", f"{header.width}x{header.height}, at most {most} scans are decoded")
    return header


def decode(data: bytes, enough_side: int | None = None, header: Header | None = None) -> Pixels:
    """RGB uint8 [H, W, 3], upright, in sRGB. Raises ImageError. `header`: where it was read already.

    `enough_side`: a JPEG may be decoded at 1/2, 3/8, 1/4 or 1/8 of its size while both sides keep this many pixels;
    decoding a camera's picture for a 256 px crop then costs a small part of the full price.
    """
    decoded = _decode(data, enough_side, header)
    return to_srgb(_upright(decoded.pixels, decoded.orientation), decoded.profile, decoded.space)


def decode_square(data: bytes, side: int, policy: Crop, picture: int, header: Header | None = None) -> Pixels:
    """The square that is stored, RGB uint8 [side, side, 3] in sRGB: decode, crop, `area_resize`. Raises ImageError.

    A JPEG is decoded at no less than twice `side`, so that the area filter still has pixels to average. Stored pictures
    made so against those of a full decode:

    | pictures, decoded at 1/2                    | that square: least, median | a quarter of it: least, median |
    |---------------------------------------------|----------------------------|--------------------------------|
    | 5 of a camera, 1800x1200, to 256 px          | 45.8 dB, 46.0 dB           | 55.9 dB, 56.2 dB               |
    | 95 photographs of COCO, 640x480, to 96 px    | 30.1 dB, 37.6 dB           | 38.7 dB, 46.8 dB               |

    Storing the square as JPEG at quality 95 leaves 41.0 dB and 38.9 dB (medians). COCO's are the hard case: reduced
    before, they have detail in every pixel, which libjpeg's reduction keeps sharper than an area filter does.

    What is stored is turned upright and converted, not what was decoded, which has many times its pixels. The filters
    treat all sides alike, but for rounding.
    """
    decoded = _decode(data, 2 * side, header)
    square = area_resize(_cropped(decoded, policy, picture, side), side)
    return to_srgb(_upright(square, decoded.orientation), decoded.profile, decoded.space)


def decode_stored(jpeg: Buffer) -> Pixels:
    """RGB uint8 [H, W, 3] of a picture that `encode_jpeg` wrote: the fast path, for data whose crc was checked.

    Takes an Arrow value without a copy: `decode_stored(batch["image256"][row].as_buffer())`.
    """
    return simplejpeg.decode_jpeg(memoryview(jpeg).cast("B"), "RGB", fastdct=False, fastupsample=False)


def encode_jpeg(pixels: Pixels) -> bytes:
    """JPEG, quality 95, no chroma subsampling, of RGB uint8 [H, W, 3]."""
    contiguous = np.ascontiguousarray(pixels)
    return bytes(simplejpeg.encode_jpeg(contiguous, JPEG_QUALITY, "RGB", colorsubsampling="444", fastdct=False))


def centre_crop(pixels: Pixels) -> Pixels:
    """The largest centred square of [H, W, 3], as a view."""
    return crop(pixels, "centre", picture=0, side=0)


def crop(pixels: Pixels, policy: Crop, picture: int, side: int) -> Pixels:
    """The square of upright [H, W, 3] that is kept to become [side, side, 3], as a view.

    `centre`: the largest centred one. `near_centre`: DALL-E's, decided by `picture`, its id; never smaller than
    8/9 of the largest square, nor than `side` pixels.
    """
    height, width = pixels.shape[:2]
    top, left, kept = _place(height, width, policy, picture, side)
    return pixels[top : top + kept, left : left + kept]


def _cropped(decoded: _Decoded, policy: Crop, picture: int, side: int) -> Pixels:
    """`crop` of the upright picture, as a view of it as it lies in the file."""
    flipped_down, flipped_right, transposed = _TURNS.get(decoded.orientation, (False, False, False))
    height, width = decoded.pixels.shape[:2]
    if transposed:
        left, top, kept = _place(width, height, policy, picture, side)
    else:
        top, left, kept = _place(height, width, policy, picture, side)
    top = height - top - kept if flipped_down else top
    left = width - left - kept if flipped_right else left
    return decoded.pixels[top : top + kept, left : left + kept]


def _place(height: int, width: int, policy: Crop, picture: int, side: int) -> tuple[int, int, int]:
    """(top, left, kept side) of the square that `crop` keeps."""
    largest = min(height, width)
    if policy == "centre":
        return (height - largest) // 2, (width - largest) // 2, largest
    down, right, enlarged, inner_down, inner_right = _uniforms(picture, 5)
    enlargement = 1 + enlarged * max(min(LARGEST_ENLARGEMENT, largest / side) - 1, 0)
    kept = round(largest / enlargement)
    low, high = NEAR_CENTRE
    top = (height - largest) * (low + (high - low) * down) + (largest - kept) * inner_down
    left = (width - largest) * (low + (high - low) * right) + (largest - kept) * inner_right
    return round(top), round(left), kept


def _uniforms(picture: int, count: int) -> list[float]:
    """`count` draws in [0, 1) that depend on the picture's id alone."""
    keys = np.array([picture ^ key64("crop", number) for number in range(count)], np.uint64)
    return [float(draw) for draw in (mix64(keys) >> np.uint64(11)) * 2.0**-53]


def area_resize(square: Pixels, side: int) -> Pixels:
    """[S, S, 3] -> [side, side, 3]: each new pixel is the mean of the area it covers; bicubic where it must enlarge.

    The one filter (AREA_FILTER_VERSION) behind the base model's 64 px images and the upsampler's 64 px conditions: the
    upsampler must be conditioned on the kind of image that the base model was trained to produce.
    """
    if square.shape[0] == side:
        return square
    filter_ = cv2.INTER_AREA if square.shape[0] > side else cv2.INTER_CUBIC
    return cast(Pixels, cv2.resize(square, (side, side), interpolation=filter_))


def _plain_jpeg_header(data: bytes) -> Header | None:
    if not data.startswith(JPEG_START):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # TurboJPEG has no conversion from CMYK that honours Adobe's inverted inks; Pillow does.
    return Header(width, height, colours) if colours in ("YCbCr", "RGB", "Gray") else None


def _decode(data: bytes, enough_side: int | None, header: Header | None) -> _Decoded:
    header = header or read_header(data)
    if header.plain is not None:
        pixels = _decode_plain_jpeg(data, enough_side)
        if pixels is not None:
            orientation, profile = _read_markers(data)
            return _Decoded(pixels, orientation, profile, "GRAY" if header.plain == "Gray" else "RGB")
    return _decode_with_pillow(data)


def _decode_plain_jpeg(data: bytes, enough_side: int | None) -> Pixels | None:
    """RGB pixels, or None where Pillow is to judge. Raises ImageError for a damaged picture."""
    side = enough_side or 0  # 0: no reduction asked for
    factor = 2.0 if enough_side else 1.0  # libjpeg's factors below 2 are slower than no reduction
    try:
        return simplejpeg.decode_jpeg(
            data, "RGB", fastdct=False, fastupsample=False, min_height=side, min_width=side, min_factor=factor
        )
    except ValueError as error:
        if str(error).startswith(("Corrupt JPEG data", "Premature end")):
            # Pillow accepts some of these with a grey or smeared lower part, and the model would learn to draw it.
            raise ImageError("image_damaged", str(error)) from None
        return None


def _read_markers(data: bytes) -> tuple[int, bytes | None]:
    """(orientation, ICC profile) of a JPEG."""
    # Opening a picture in Pillow costs as much as a tenth of the whole record; most have nothing there to look for.
    if not has_metadata(data):
        return 1, None
    with _open(data) as image:
        return _orientation(image), _profile(image)


def _profile(image: Image.Image) -> bytes | None:
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) else None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 (upright) where the EXIF block is absent or unreadable, as viewers do."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  (OSError, SyntaxError, struct.error, … on pictures whose pixels load)
        return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """[H, W, 3] turned and mirrored by EXIF orientation; unknown values change nothing."""
    # By OpenCV: numpy copies turned pixels one by one, which took a third of the time of a camera's picture. A quarter
    # turn at once takes half of what a flip and a transposition do.
    if orientation in _QUARTER_TURNS:
        return cast(Pixels, cv2.rotate(pixels, _QUARTER_TURNS[orientation]))
    flipped_down, flipped_right, transposed = _TURNS.get(orientation, (False, False, False))
    if flipped_down or flipped_right:
        pixels = cast(Pixels, cv2.flip(pixels, -1 if flipped_down and flipped_right else int(flipped_right)))
    return cast(Pixels, cv2.transpose(pixels)) if transposed else pixels


def _refuse_bombs(data: bytes) -> None:
    """Raise ImageError for what Pillow decodes in Python, or again and again, so that a small file takes minutes."""
    if data.startswith(PLAIN_PNM):
        raise ImageError("image_unknown_format", "a PNM of written numbers, in which no photograph is stored")
    # OS/2's short header has its palette where others tell of compression.
    if data.startswith(b"BM") and data[14:18] != OS2_HEADER and data[30:34] in RUN_LENGTH_BMP:
        raise ImageError("image_unknown_format", "a run-length coded BMP, in which no photograph is stored")
    # A PNG has one at most; as many as this do not come together by chance in its packed pixels.
    if data.startswith(PNG_START) and (profiles := data.count(b"iCCP")) > MOST_PROFILES:
        raise ImageError("image_damaged", f"{profiles} iCCP chunks in one PNG")


def _open(data: bytes) -> Image.Image:
    _refuse_bombs(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bomb and EXIF warnings: PIXEL_LIMIT decides, not Pillow's own limit
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError("image_unknown_format", f"{len(data)} bytes starting {data[:8]!r}") from None
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_many_pixels", str(error)) from None
    except Exception as error:  # noqa: BLE001  (Pillow raises anything on hostile headers; only Pillow runs in here)
        raise ImageError("image_damaged", f"{type(error).__name__}: {error}") from None


def _decode_with_pillow(data: bytes) -> _Decoded:
    with _open(data) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.load()
                profile = _profile(image)
                space: Space = "GRAY" if image.mode in ("1", "L", "LA", "La") else "RGB"
                if image.mode == "CMYK":
                    pixels, profile = _to_rgb(image, profile), None
                else:
                    pixels = _to_rgb(image)
        except ImageError:
            raise
        except Exception as error:  # noqa: BLE001  (OSError, ValueError, TypeError, … from hostile pixel data)
            raise ImageError("image_damaged", f"{type(error).__name__}: {error}") from None
        return _Decoded(pixels, _orientation(image), profile, space)


def _to_rgb(image: Image.Image, cmyk_profile: bytes | None = None) -> Pixels:
    """RGB uint8 [H, W, 3] of any loaded mode: 16-bit keeps its upper 8 bits, transparency goes onto BACKGROUND."""
    if image.mode == "F":
        raise ImageError("image_unsupported_mode", "floating-point pixels have no stated range")
    if (image.width * image.height) <= STRIP_PIXELS:
        return _strip_to_rgb(image, cmyk_profile)
    # In strips: the intermediate forms of a whole picture at the limit would take gigabytes.
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = _strip_to_rgb(strip, cmyk_profile)
    return pixels


def _strip_to_rgb(image: Image.Image, cmyk_profile: bytes | None) -> Pixels:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        grey = (values.clip(0, 65535) >> 8).astype(np.uint8)
        if image.has_transparency_data:  # of a PNG: the one value that is transparent, in all its bits
            grey[values == image.info["transparency"]] = BACKGROUND
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "CMYK":
        return np.asarray(cmyk_to_rgb(image, cmyk_profile))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (BACKGROUND,) * 4)
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))
