"""Perceptual hash: 64 bits that stay nearly the same when a picture is resized, recompressed or a little recoloured.

Always holds: a function of the stored 64 px picture alone; equal pictures have equal hashes. Called by the score pass;
dedup.py compares hashes by how many bits differ.
"""

from __future__ import annotations

import cv2
import numpy as np

from data_pipeline.images import Pixels

HASH_VERSION = "dct-1"  # raise it when the same picture can give another hash than before


def perceptual_hash(image64: Pixels) -> int:
    """pHash (Zauner 2010) of uint8 [64, 64, 3]: which of the 64 lowest cosine frequencies are above their median."""
    grey = cv2.resize(cv2.cvtColor(image64, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    low = cv2.dct(grey.astype(np.float32))[:8, :8].ravel()
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")
