"""JPEG markers: what is told of a JPEG by its segments alone, without decoding a pixel.

Always holds: bytes within a segment, such as an embedded thumbnail, are never taken for segments. Called by images.py.
"""

from __future__ import annotations

import re

JPEG_START = b"\xff\xd8\xff"

# Markers by ITU-T T.81, table B.1.
EOI, SOS = 0xD9, 0xDA
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15 but for DHT, JPG and DAC
WITH_LENGTH = range(0xC0, 0xFF)

# The next marker as libjpeg finds it, among coded pixels or junk: neither a stuffed zero, a fill byte nor a restart.
MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])", re.DOTALL)


def count_scans(data: bytes, most: int) -> int:
    """How often a JPEG goes over its pixels, counted no further than to `most` + 1."""
    scans, position = 0, len(JPEG_START) - 1
    progressive, components = True, 0
    while scans <= most and (found := MARKER.search(data, position)) is not None:
        marker, position = found[1][0], found.end()
        if marker == EOI:
            break
        if marker in FRAMES:
            progressive, components = marker & 3 == 2, int.from_bytes(data[position + 7 : position + 8])
        elif marker == SOS:
            scans += 1
            if not progressive and int.from_bytes(data[position + 2 : position + 3]) == components:
                break  # all there is: the coded pixels, nearly the whole file, need no search
        if marker in WITH_LENGTH:
            position += max(2, int.from_bytes(data[position : position + 2]))
    return scans


def has_metadata(data: bytes) -> bool:
    """Whether a JPEG has EXIF, an XMP orientation or an ICC profile before its pixels, or junk that may hide them."""
    position = 2
    while data[position : position + 1] == b"\xff":
        marker, start = data[position + 1 : position + 2], position + 4
        if marker == b"\xda":
            return False
        end = position + 2 + int.from_bytes(data[start - 2 : start], "big")
        if marker == b"\xe2" and data.startswith(b"ICC_PROFILE\0", start):
            return True
        if marker == b"\xe1" and (
            data.startswith(b"Exif\0\0", start) or data.find(b"tiff:Orientation", start, end) >= 0
        ):
            return True
        position = end
    return True
