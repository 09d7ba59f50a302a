"""CLIP's tokenizer: captions to the tokens of the noised CLIP. GLIDE's own networks read another one (tokenizer.py).

Always holds: the BPE file is CLIP's own (its digest is checked before use), and equal captions give equal tokens on
every machine. A caption is repaired (ftfy), its HTML entities resolved, its white space single, its letters lower; then
[start] tokens [end], cut so that the end stays, padded with 0. Called by the recipe `noised_clip` and by CLIP guidance.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import ftfy
import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as InTurn

from data_pipeline.errors import UserError

CLIP_CONTEXT_TOKENS = 77
MERGES = 49152 - 256 - 2  # of the 262,144 in the file, as in CLIP
CLIP_VOCABULARY = 256 + 256 + MERGES + 2  # bytes, bytes that end a word, merges, start and end
START_TOKEN, END_TOKEN, PADDING_TOKEN = CLIP_VOCABULARY - 2, CLIP_VOCABULARY - 1, 0
WORD_END = "</w>"

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
PACKAGE = "open_clip_torch==3.3.0"  # of it only the file is used; its own dependencies are not needed

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def clip_tokens(
    captions: Sequence[str], context_tokens: int = CLIP_CONTEXT_TOKENS
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """(tokens uint16 [n, context_tokens], lengths int64 [n] with start and end) of n captions.

    The image of a caption is read at `lengths - 1`, its end token. Raises UserError as `load_clip_bpe` does.
    """
    tokens = np.full((len(captions), context_tokens), PADDING_TOKEN, np.uint16)
    lengths = np.zeros(len(captions), np.int64)
    cleaned = [clean(caption) for caption in captions]
    for row, encoding in enumerate(load_clip_bpe().encode_batch(cleaned, add_special_tokens=False)):
        ids = [START_TOKEN, *encoding.ids[: context_tokens - 2], END_TOKEN]
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return tokens, lengths


def clean(caption: str) -> str:
    """What CLIP does before its BPE. Entities are resolved twice: scraped captions were often escaped twice."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split()).lower()


@lru_cache(maxsize=1)
def load_clip_bpe() -> Tokenizer:
    """The checked BPE. Raises UserError when the file is absent or is not CLIP's."""
    lines = gzip.decompress(_read_checked()).decode().split("\n")
    merges = [(pair[0], pair[1]) for line in lines[1 : MERGES + 1] if (pair := line.split())]
    letters = _byte_letters()
    words = [*letters, *(letter + WORD_END for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=WORD_END))
    # No added tokens: the text "<|endoftext|>" in a caption must stay text, never become the end token.
    split = Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = InTurn([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def _byte_letters() -> list[str]:
    """The letters that stand for the 256 bytes, in CLIP's order: printable bytes first, the others moved past 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(256 - len(printable))]


def _read_checked() -> bytes:
    # Found, not imported: the package itself would want torchvision.
    package = importlib.util.find_spec("open_clip")
    advice = f"pip install --no-deps {PACKAGE}"
    if package is None or package.origin is None:
        raise UserError(f"CLIP tokenizer file {BPE_FILE}", "package open_clip_torch", "not installed", advice)
    path = Path(package.origin).parent / BPE_FILE
    data = path.read_bytes() if path.is_file() else b""
    found = hashlib.sha256(data).hexdigest()
    if found != BPE_SHA256:
        raise UserError(f"CLIP tokenizer file {path}", f"sha256 {BPE_SHA256[:12]}", found[:12], advice)
    return data
