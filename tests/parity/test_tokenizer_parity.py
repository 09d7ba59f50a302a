"""The tokenizer against tokens computed with the public GLIDE code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
PARITY = Path(os.environ.get("GLIDEPATH_PARITY", REPOSITORY.parent / "shared" / "parity"))

pytestmark = pytest.mark.skipif(
    not (PARITY / "tensors.npz").is_file(),
    reason=f"no reference numbers in {PARITY}; set GLIDEPATH_PARITY to their folder",
)


def test_tokens_and_mask_equal_those_of_the_public_code():
    reference = np.load(PARITY / "tensors.npz")
    prompts = json.loads((PARITY / "config.json").read_text())["prompts"]
    expected = reference["tokenizer|bpe|tokens"]

    tokens, n_tokens = tokenizer.encode_batch(prompts, context_tokens=expected.shape[1])

    np.testing.assert_array_equal(tokens, expected)
    mask = tokenizer.mask_of(n_tokens, expected.shape[1])
    np.testing.assert_array_equal(mask, reference["tokenizer|bpe|mask"])
    np.testing.assert_array_equal(reference["tokenizer|bpe|n_vocab"], [tokenizer.VOCABULARY, tokenizer.PADDING_TOKEN])
