"""Families: the columns of a dataset, grouped by who reads them: those built with it, and those added to it later.

Always holds: all families of a dataset have the same rows in the same order under the same ids; a family's producer
digest changes whenever the same source could give other columns. Called by the corpus builder, enrich, readers and
verify.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from data_pipeline import images
from data_pipeline.captions import CAPTION_VERSION
from data_pipeline.clip_tokenizer import CLIP_CONTEXT_TOKENS
from data_pipeline.manifests import digest_of
from data_pipeline.tokenizer import CONTEXT_TOKENS, TOKENIZER_SHA256

BASE_SIDE, UPSAMPLER_SIDE = 64, 256

# Every version that the bytes of a column depend on; all stand in the dataset's identity.
CODEC_VERSIONS = {
    "decode": images.DECODE_VERSION,
    "area_filter": images.AREA_FILTER_VERSION,
    "jpeg": images.CODEC_VERSION,
    "caption": CAPTION_VERSION,
}

TEXT_COLUMNS = [
    pa.field("tokens", pa.list_(pa.uint16(), CONTEXT_TOKENS), nullable=False),
    pa.field("n_tokens", pa.uint16(), nullable=False),
]


@dataclass(frozen=True)
class Family:
    """One folder of columns. The id comes first in every schema. `made_from`: for an added family, the digests and
    versions of all that its columns depend on besides the rows; a JSON value."""

    name: str
    schema: pa.Schema
    made_from: Any = None

    @property
    def fingerprint(self) -> str:
        """sha256 of the names and types of the columns."""
        return digest_of([[field.name, str(field.type), field.nullable] for field in self.schema])

    @property
    def producer(self) -> str:
        """sha256 of all that made these columns from the source."""
        made_from = [TOKENIZER_SHA256, CODEC_VERSIONS] if self.made_from is None else self.made_from
        return digest_of([self.name, self.fingerprint, made_from])


# Built with the dataset, from the same decoded picture.
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "base",
            pa.schema(
                [
                    pa.field("id", pa.uint64(), nullable=False),
                    pa.field("caption", pa.utf8(), nullable=False),
                    *TEXT_COLUMNS,
                    # RGB uint8 [64, 64, 3], flattened
                    pa.field("image64", pa.list_(pa.uint8(), BASE_SIDE * BASE_SIDE * 3), nullable=False),
                ]
            ),
        ),
        Family(
            "upsampler",
            pa.schema(
                [
                    pa.field("id", pa.uint64(), nullable=False),
                    *TEXT_COLUMNS,
                    # JPEG, quality 95, 4:4:4, of RGB uint8 [256, 256, 3]
                    pa.field("image256", pa.binary(), nullable=False),
                ]
            ),
        ),
    )
}

# Added to a finished dataset by enrich.py, which says what they are made from.
ADDED_FAMILIES = {
    family.name: family
    for family in (
        Family(
            "tokens_clip",
            pa.schema(
                [
                    pa.field("id", pa.uint64(), nullable=False),
                    pa.field("tokens", pa.list_(pa.uint16(), CLIP_CONTEXT_TOKENS), nullable=False),
                    pa.field("n_tokens", pa.uint16(), nullable=False),
                ]
            ),
        ),
        Family(
            "labels",
            pa.schema(
                [
                    pa.field("id", pa.uint64(), nullable=False),
                    pa.field("label", pa.int32(), nullable=False),  # -1: the row has none
                ]
            ),
        ),
    )
}

KNOWN_FAMILIES = FAMILIES | ADDED_FAMILIES
