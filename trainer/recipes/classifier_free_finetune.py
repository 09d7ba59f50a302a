"""Recipe `classifier_free_finetune`: a base model learns to draw without a caption too (GLIDE, section 4.2).

Training goes on "in exactly the same way as pre-training", with 20% of the captions empty; sampling can then be guided
away from the empty caption. How long, the paper does not say.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.recipes.glide_base import GlideBase, GlideBaseConfig


class ClassifierFreeConfig(GlideBaseConfig):
    """A base model that starts from `parent`."""

    parent: str
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.2


class ClassifierFreeFinetune(GlideBase):
    """See GlideBase: the same in all but the settings."""
