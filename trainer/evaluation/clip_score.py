"""CLIP score: how well a caption fits its picture, by a trained noised CLIP without noise; a corpus scorer.

Always holds: a pair's score depends on the checkpoint, the picture and the caption alone, up to the rounding of batched
arithmetic; the model is told the first timestep, which is what it saw nearly noiseless pictures with. Called by the
corpus builder's scorer pool (see data_pipeline/scorers.py).

Source: Hessel et al. 2021 (CLIPScore), equation 1 without its factor and its floor; Schuhmann et al. 2021 (LAION-400M)
filter by the same cosine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.images import Pixels
from data_pipeline.manifests import digest_of
from trainer.clip_guide import similarities
from trainer.models.noised_clip import NoisedClip
from trainer.recipes.noised_clip import PART, NoisedClipRecipe
from trainer.weights import Checkpoint, WeightsKind, load_trained, open_checkpoint

SCORE_VERSION = "clip-score-1"
WEIGHTS: WeightsKind = "ema"


def open_clip_checkpoint(uri: str) -> Checkpoint:
    """The checkpoint of a noised CLIP, its manifest read. Raises UserError if there is none, or of another recipe."""
    checkpoint = open_checkpoint(uri)
    if checkpoint.config.recipe != "noised_clip":
        name, found = f"scorer checkpoint {checkpoint.uri}", checkpoint.config.recipe
        raise UserError(name, "the recipe noised_clip", found, "name a checkpoint of a noised CLIP")
    return checkpoint


def score_digest(checkpoint: Checkpoint) -> str:
    """sha256 of what the scores depend on besides the pairs; known before the weights are loaded."""
    return digest_of([SCORE_VERSION, WEIGHTS, checkpoint.manifest_sha256])


class NoisedClipScorer:
    """See data_pipeline.scorers.Scorer. The weights are loaded once, onto `device` ("cpu", "cuda").

    Raises UserError as `open_clip_checkpoint` and `load_trained` do, and where there is no such device.
    """

    columns = ("clip_similarity",)

    def __init__(self, uri: str, device: str = "cpu") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("scorer device cuda", "a GPU that torch sees", "none", "set scorers.0.device to cpu")
        checkpoint = open_clip_checkpoint(uri)
        self.digest = score_digest(checkpoint)
        trained = load_trained(checkpoint.uri, WEIGHTS)
        model = trained.modules[PART]
        assert isinstance(trained.recipe, NoisedClipRecipe) and isinstance(model, NoisedClip)
        self._recipe, self._model = trained.recipe, model.requires_grad_(False).to(device)

    def __call__(self, captions: Sequence[str], images64: Pixels) -> dict[str, NDArray[np.float32]]:
        """{"clip_similarity": cosine float32 [b] in [-1, 1]} of captions [b] and pictures uint8 [b, 64, 64, 3]."""
        cosines = similarities(self._recipe, self._model, images64, captions)
        return {"clip_similarity": cosines.astype(np.float32)}
