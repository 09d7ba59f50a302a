"""Colour: pictures with an embedded ICC profile to sRGB, which is what a picture without one is taken for.

Always holds: a profile that is broken, too large or of another colour space than its pixels counts as none, as viewers
have it; it never costs the picture. A profile that is sRGB in all but name changes nothing and costs nothing: half of
the web's profiles are such. Called by images.py.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from data_pipeline.digests import content_digest

# How the pixels of a picture are to be read: as the space that its profile must be of. CMYK is that of printing inks.
Space = Literal["RGB", "GRAY", "CMYK"]

PROFILE_LIMIT_BYTES = 4 * 2**20  # the largest printing profiles are about 3 MB
TRANSFORMS = 64  # that are kept; most of a corpus shares a few profiles
SAME_LEVELS = 1  # a profile that moves no colour by more is taken for sRGB; JPEG moves them further

_MODES: dict[Space, str] = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_SRGB = ImageCms.createProfile("sRGB")
_GRID = np.indices((9, 9, 9)).reshape(3, 1, -1).transpose(1, 2, 0).astype(np.uint8) * 31  # [1, 729, 3]
_transforms: dict[tuple[bytes, Space], ImageCms.ImageCmsTransform | None] = {}


def to_srgb(pixels: NDArray[np.uint8], profile: bytes | None, space: Space) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] in sRGB of RGB [H, W, 3] in the profile's colours; grey where `space` is GRAY.

    Perceptual intent, by LittleCMS. The array itself where there is nothing to do.
    """
    transform = _transform_of(profile, space) if profile else None
    if transform is None:
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if space == "GRAY" else pixels))
    return np.asarray(ImageCms.applyTransform(image, transform))


def cmyk_to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB of a CMYK image, by its profile where it has a sound one."""
    transform = _transform_of(profile, "CMYK") if profile else None
    if transform is None:
        return image.convert("RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # None only comes of inPlace
    return converted


def _transform_of(profile: bytes, space: Space) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB; None where the picture is to be left as it is."""
    if len(profile) > PROFILE_LIMIT_BYTES:
        return None
    key = content_digest(profile), space
    if key not in _transforms:
        if len(_transforms) >= TRANSFORMS:
            del _transforms[next(iter(_transforms))]
        _transforms[key] = _built(profile, space)
    return _transforms[key]


def _built(profile: bytes, space: Space) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != space:
            return None
        transform = ImageCms.buildTransform(source, _SRGB, _MODES[space], "RGB")
        if space == "RGB" and _moves_little(transform):
            return None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # all that LittleCMS's binding raises
        return None
    return transform


def _moves_little(transform: ImageCms.ImageCmsTransform) -> bool:
    seen = np.asarray(ImageCms.applyTransform(Image.fromarray(_GRID), transform))
    return bool(np.abs(seen.astype(np.int16) - _GRID).max() <= SAME_LEVELS)
