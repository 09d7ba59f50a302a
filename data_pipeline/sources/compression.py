"""Compression: gzip, bzip2, xz and zstandard data unpacked without trusting it.

Always holds: the format is told by the first bytes, never by a name; no more is unpacked than a stated limit, and no
decoder gets more memory than DECODER_LIMIT_BYTES; what was unpacked of a file lies in a nameless temporary file, which
is gone when it is closed, however the process ends. Called by the readers of tars.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO

import pyarrow as pa

from data_pipeline.config import state_folder
from data_pipeline.errors import UserError

PIECE_BYTES = 2**20
DECODER_LIMIT_BYTES = 128 * 2**20  # an xz header of a few bytes can ask for 4 GiB

# A tar of pictures hardly shrinks, one of captions perhaps to a tenth: what is far from that was made to fill a disk.
LIKELY_BYTES, LIKELY_RATIO = 64 * 2**20, 200
UNPACKED_LIMIT_BYTES = 64 * 2**30

# The longest of them, and enough of bzip2's that no file name at the start of a plain tar is taken for it.
FORMATS = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", re.DOTALL),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstandard": re.compile(rb"\x28\xb5\x2f\xfd"),
}
LONGEST_MARK_BYTES = 10

# What the decoders raise on damaged data. pyarrow's own errors are OSError and ValueError.
DAMAGE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


class TooLarge(ValueError):
    """More comes out than the limit allows."""


def format_of(start: bytes) -> str | None:
    """The name of the format that data beginning with `start` is packed in; None if it is none of FORMATS."""
    return next((name for name, mark in FORMATS.items() if mark.match(start)), None)


def unpack(data: bytes, limit_bytes: int) -> bytes:
    """The content of a packed file; other data as it is. Raises TooLarge, and DAMAGE for damaged data."""
    name = format_of(data[:LONGEST_MARK_BYTES])
    if name is None:
        return data
    unpacked = bytearray()
    for piece in _pieces(io.BytesIO(data), name):
        unpacked += piece
        if len(unpacked) > limit_bytes:
            raise TooLarge(f"more than {limit_bytes} bytes when unpacked")
    return bytes(unpacked)


def opened(file: IO[bytes]) -> IO[bytes] | Unpacked:
    """The file itself, or what is packed in it as a file to seek in. Raises UserError for a format not built in."""
    name = format_of(file.read(LONGEST_MARK_BYTES))
    size_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    if name is None:
        return file
    if name == "zstandard" and not pa.Codec.is_available("zstd"):
        raise UserError(f"{file.name}", "gzip, bzip2 or xz", "zstandard, which this pyarrow lacks", "pack it otherwise")
    return Unpacked(_pieces(file, name), min(UNPACKED_LIMIT_BYTES, LIKELY_BYTES + LIKELY_RATIO * size_bytes))


class Unpacked:
    """A packed file's content, unpacked once and only as far as it is asked for.

    The formats cannot be sought in: going back would unpack everything again, and the files of a sample lie anywhere.
    """

    def __init__(self, pieces: Iterator[bytes], limit_bytes: int) -> None:
        self._pieces, self._limit_bytes = pieces, limit_bytes
        self._size = self._position = 0
        # Not the system's temporary folder, which may be memory.
        state_folder().mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=state_folder())  # noqa: SIM115  (closed by `close`)

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end. Raises DAMAGE."""
        self._unpack_until(self._position + size)
        self._file.seek(self._position)
        data = self._file.read(size)
        self._position += len(data)
        return data

    def seek(self, position: int, whence: int = 0) -> int:
        assert whence == 0
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._file.close()

    def _unpack_until(self, end: int) -> None:
        self._file.seek(self._size)
        while self._size < end:
            if self._size > self._limit_bytes:
                raise TooLarge(f"more than {self._limit_bytes} bytes when unpacked")
            piece = next(self._pieces, b"")
            if not piece:
                return
            try:
                self._file.write(piece)
            except OSError as error:  # of this disk, not of the data
                found, next_step = error.strerror or str(error), "make room, or move GLIDEPATH_HOME"
                raise UserError(f"{state_folder()}", "room to unpack a file", found, next_step) from None
            self._size += len(piece)


def _pieces(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The unpacked content in pieces of at most PIECE_BYTES. Raises DAMAGE."""
    if name == "xz":
        yield from _xz_pieces(file)
        return
    if name == "zstandard":
        with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd") as stream:
            while piece := stream.read(PIECE_BYTES):
                yield piece
        return
    decoder = gzip.GzipFile(fileobj=file) if name == "gzip" else bz2.BZ2File(file)
    while piece := decoder.read(PIECE_BYTES):
        yield piece


def _xz_pieces(file: IO[bytes]) -> Iterator[bytes]:
    """One stream or several; LZMAFile would leave the memory to the data."""
    waiting = b""
    while True:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=DECODER_LIMIT_BYTES)
        while not decoder.eof:
            if decoder.needs_input and not waiting:
                waiting = file.read(PIECE_BYTES)
                if not waiting:
                    raise EOFError("the xz data ends before its end mark")
            if piece := decoder.decompress(waiting, PIECE_BYTES):
                yield piece
            waiting = b""
        waiting = (decoder.unused_data or file.read(PIECE_BYTES)).lstrip(b"\0")  # streams may be padded
        if not waiting:
            return
