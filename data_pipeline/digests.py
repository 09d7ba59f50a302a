"""Content digests: BLAKE3 of bytes in bulk: input units, pictures, shards; and crc32. Documents and ids keep sha256.

Always holds: equal digests mean equal content, also against someone who tries (256 bits, cryptographic). BLAKE3 and not
SHA-256, because every byte of a corpus is digested several times on its way: 8 against 68 microseconds for a 27 KB
picture on a processor without SHA instructions, where SHA-256 took 16% of a build in a profile. Called by
sources, by the score pass and by arrow_files.py.
"""

from __future__ import annotations

from blake3 import blake3
from isal.isal_zlib import crc32  # zlib's, seven times as fast: every stored byte is checked when written and when read
from typing_extensions import Buffer

__all__ = ["ContentHash", "content_digest", "crc32"]

# Of content that comes in pieces: `.update(data)`, then `.digest()` or `.hexdigest()`.
ContentHash = blake3


def content_digest(data: Buffer) -> bytes:
    """BLAKE3 of `data`, 32 bytes."""
    return blake3(data).digest()
