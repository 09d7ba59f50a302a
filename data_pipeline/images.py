"""Images: untrusted bytes to RGB arrays, and arrays to the two stored forms.

Always holds: the size is read from the header and checked against PIXEL_LIMIT before anything is decoded; every failure
is an ImageError with a short reason that can be counted; the result is RGB uint8 [H, W, 3], upright, transparency on
white, frame 0 of an animation. Colour profiles are ignored. Called by the score pass; the loader and samplers use
`decode_stored` and `area_resize`.

Plain JPEGs go through simplejpeg; whatever it does not take (CMYK, junk between markers, other formats) through Pillow.
"""

from __future__ import annotations

import io
import warnings
from typing import Literal, cast

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from typing_extensions import Buffer

Pixels = NDArray[np.uint8]

# Where the square that is kept lies in the picture.
Crop = Literal["centre"]

# Versions stand in the dataset's identity: raise one when the same source bytes can give other pixels than before.
DECODE_VERSION = "decode-1"
CODEC_VERSION = "jpeg-q95-444-1"
AREA_FILTER_VERSION = "cv2-area-1"

PIXEL_LIMIT = 64 * 2**20  # 192 MiB as RGB
JPEG_QUALITY = 95
BACKGROUND = (255, 255, 255)

# Formats of photographs and web pictures. Others are refused unread: Pillow's EPS reader, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")

Image.init()  # registers them; a format that Pillow does not know would make every picture look damaged
if missing := set(FORMATS) - set(Image.OPEN):
    raise ImportError(f"this Pillow cannot open {sorted(missing)}; install the wheel from PyPI")

EXIF_ORIENTATION = 0x0112


class ImageError(Exception):
    """An image that cannot be used. `reason` is one of REASONS; `detail` is for people."""

    REASONS = (
        "image_empty",
        "image_unknown_format",
        "image_too_many_pixels",
        "image_damaged",
        "image_unsupported_mode",
    )

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) as the header states them, before orientation. Decodes no pixels. Raises ImageError."""
    if not data:
        raise ImageError("image_empty", "no bytes")
    header = _plain_jpeg_header(data)
    if header is not None:
        width, height = header
    else:
        with _open(data) as image:
            width, height = image.size
    if width * height > PIXEL_LIMIT:
        raise ImageError("image_too_many_pixels", f"{width}x{height}, at most {PIXEL_LIMIT} pixels are decoded")
    return width, height


def decode(data: bytes, enough_side: int | None = None) -> Pixels:
    """RGB uint8 [H, W, 3], upright. Raises ImageError.

    `enough_side`: a JPEG may be decoded at 1/2, 3/8, 1/4 or 1/8 of its size while both sides keep this many pixels;
    decoding a camera's picture for a 256 px crop then costs a small part of the full price.
    """
    size_of(data)
    if _plain_jpeg_header(data) is not None:
        pixels = _decode_plain_jpeg(data, enough_side)
        if pixels is not None:
            return _upright(pixels, _jpeg_orientation(data))
    return _decode_with_pillow(data)


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
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def crop(pixels: Pixels, policy: Crop, picture: int) -> Pixels:
    """The square of [H, W, 3] that is kept, as a view. `picture` is its id, which decides where chance does."""
    assert policy == "centre"
    return centre_crop(pixels)


def area_resize(square: Pixels, side: int) -> Pixels:
    """[S, S, 3] -> [side, side, 3]: each new pixel is the mean of the area it covers; bicubic where it must enlarge.

    The one filter (AREA_FILTER_VERSION) behind the base model's 64 px images and the upsampler's 64 px conditions: the
    upsampler must be conditioned on the kind of image that the base model was trained to produce.
    """
    if square.shape[0] == side:
        return square
    filter_ = cv2.INTER_AREA if square.shape[0] > side else cv2.INTER_CUBIC
    return cast(Pixels, cv2.resize(square, (side, side), interpolation=filter_))


def _plain_jpeg_header(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that simplejpeg decodes rightly; None for everything else."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # TurboJPEG has no conversion from CMYK that honours Adobe's inverted inks; Pillow does.
    return (width, height) if colour_space in ("YCbCr", "RGB", "Gray") else None


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


def _jpeg_orientation(data: bytes) -> int:
    # Opening the picture in Pillow costs a tenth of the whole record; most pictures have no EXIF block to look into.
    if data.find(b"Exif\0\0") < 0:
        return 1
    with _open(data) as image:
        return _orientation(image)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 (upright) where the EXIF block is absent or unreadable, as viewers do."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  (OSError, SyntaxError, struct.error, … on pictures whose pixels load)
        return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """[H, W, 3] turned and mirrored by EXIF orientation (CIPA DC-008, tag 0x0112); unknown values change nothing."""
    turns = {3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}.get(orientation, 0)
    mirrored = pixels[:, ::-1] if orientation in (2, 4) else pixels
    turned = np.rot90(mirrored, turns)
    if orientation in (5, 7):
        turned = turned[:, ::-1]
    return np.ascontiguousarray(turned)


def _open(data: bytes) -> Image.Image:
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


def _decode_with_pillow(data: bytes) -> Pixels:
    with _open(data) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.load()
                pixels = _to_rgb(image)
        except ImageError:
            raise
        except Exception as error:  # noqa: BLE001  (OSError, ValueError, TypeError, … from hostile pixel data)
            raise ImageError("image_damaged", f"{type(error).__name__}: {error}") from None
        return _upright(pixels, _orientation(image))


def _to_rgb(image: Image.Image) -> Pixels:
    """RGB uint8 [H, W, 3] of any loaded mode: 16-bit keeps its upper 8 bits, transparency goes onto BACKGROUND."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ImageError("image_unsupported_mode", "floating-point pixels have no stated range")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))
