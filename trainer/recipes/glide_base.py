"""Recipe `glide_base`: the text-conditional base model (GLIDE, section 4.1), 64 x 64 at the paper's size."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from data_pipeline.draws import Draws
from data_pipeline.images import area_resize
from data_pipeline.loader import Column, Rows
from trainer.recipes.glide import STORED_SIDE, GlideConfig, GlideRecipe, to_model_range


class GlideBaseConfig(GlideConfig):
    """A base model."""

    part = "base"


class GlideBase(GlideRecipe):
    """See Recipe. Trains at 64 px, or below it on the same column reduced by the same area filter."""

    columns = (Column("base", "image64"), Column("base", "tokens"), Column("base", "n_tokens"))

    def pictures(self, rows: Rows, draws: Draws) -> dict[str, Tensor]:
        side, stored = self.config.model.image_size, STORED_SIDE["base"]
        images = np.stack([area_resize(image, side) for image in rows["image64"].reshape(-1, stored, stored, 3)])
        return {"images": to_model_range(images)}
