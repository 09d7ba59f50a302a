"""Presets: the filters of published datasets by name, in their published numbers.

| preset         | shorter side | longer / shorter | file, bytes | caption, characters | words    | languages | more   |
|----------------|--------------|------------------|-------------|---------------------|----------|-----------|--------|
| none           | any          | any              | any         | any                 | any      | any       |        |
| basic          | 64           | 2                | any         | 3 to 1000           | any      | any       |        |
| dalle          | any          | 2                | any         | 5 or more (ours)    | any      | English   | (1)    |
| laion400m      | any          | any              | 5000        | 5 or more           | any      | any       |        |
| coyo           | 200          | 3                | 5000        | 6 to 1000           | 3 to 256 | English   | (2)    |
| datacomp_basic | 200          | 3                | any         | 6 or more           | 3 or more | English  |        |

(1) boilerplate is dropped; (2) captions of more than 10 pictures are dropped.

What stands in a source and cannot be had without its models is a threshold on a column (`filters.columns`, or
`filters.scores` for a scorer), or is left out:

- dalle: Ramesh et al. 2021, appendix C. How short "too short" is, is not published; 5 is LAION's. Its English is
  cld3's.
- laion400m: Schuhmann et al. 2021. CLIP ViT-B/32 cosine of at least 0.3: `columns: {similarity: {min: 0.3}}`. Illegal
  content was removed with CLIP embeddings: left out. Repeats of url and caption: the judge pass removes equal pairs.
- coyo: kakaobrain/coyo-dataset, README. NSFW scores of at most 0.5: `columns: {nsfw_score_opennsfw2: {max: 0.5},
  nsfw_score_gantman: {max: 0.5}}`. "Over 1000 words" is read as characters: the longest caption of the published set
  has 1000. Captions without a noun and lists of forbidden words: left out. Its English is cld3's.
- datacomp_basic: Gadre et al. 2023, "basic filtering", in the numbers of baselines/apply_filter.py. Its English is
  fastText's.

English is py3langid's here, and what is in doubt is kept, where the sources drop it (language.py).
"""

from __future__ import annotations

from typing import Any

# By preset, the settings that differ from "no limit".
PRESETS: dict[str, dict[str, Any]] = {
    "none": {"min_side": 1},
    "basic": {"min_side": 64, "max_aspect": 2.0, "min_caption": 3, "max_caption": 1000},
    "dalle": {"min_side": 1, "max_aspect": 2.0, "min_caption": 5, "languages": ("en",), "drop_boilerplate": True},
    "laion400m": {"min_side": 1, "min_file_bytes": 5000, "min_caption": 5},
    "coyo": {
        "min_side": 200,
        "max_aspect": 3.0,
        "min_file_bytes": 5000,
        "min_caption": 6,
        "max_caption": 1000,
        "min_words": 3,
        "max_words": 256,
        "languages": ("en",),
        "max_caption_repeats": 10,
    },
    "datacomp_basic": {"min_side": 200, "max_aspect": 3.0, "min_caption": 6, "min_words": 3, "languages": ("en",)},
}
