"""A contrastive run on synthetic pairs, and the same in plain torch; shared by test_contrastive.py and its ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.draws import Draws, key64
from data_pipeline.loader import MicroBatch
from data_pipeline.order import micro_batches
from trainer.config import TrainConfig
from trainer.engine.engine import Engine
from trainer.engine.group import Group
from trainer.models.noised_clip import NoisedClip
from trainer.recipes import make_recipe, parse_train_config
from trainer.recipes.noised_clip import NoisedClipRecipe
from trainer.run import make_engine
from trainer.step import Trainee

BATCH = 5  # uneven over two ranks
MODEL = {
    "image_size": 8,
    "embedding": 12,
    "image_layers": 1,
    "image_heads": 1,
    "text_layers": 1,
    "text_heads": 1,
    "image_head_channels": 16,
    "text_head_channels": 16,
    "text_context": 8,
    "vocabulary": 49408,
    "timesteps": 20,
}
VALUES: dict[str, Any] = {
    "run": "pairs",
    "recipe": "noised_clip",
    "dataset": "none",
    "images": 64,
    "batch": BATCH,
    "micro_batch": 2,
    "lr": 1e-2,
    "adam_eps": 1e-2,  # so that an update is a smooth function of the gradient
    "logit_scale": 10.0,
    "guard": {"warmup": 1000},
    "model": MODEL,
    "diffusion": {"schedule": "cosine", "steps": 20},
}
WORDS = ["red", "green", "blue", "small", "large", "cat", "dog", "bird", "car", "tree"]


def config_of(**changes: Any) -> TrainConfig:
    return parse_train_config(VALUES | changes, "pairs")


def rows_at(positions: np.ndarray) -> dict[str, Any]:
    """A picture and a caption for each position, stored as the dataset's columns."""
    draws = Draws(7, positions)
    words = (draws.uniform("word") * len(WORDS)).astype(int)
    images = (draws.normal("picture", (8, 8, 3)) * 50 + 128).clip(0, 255).astype(np.uint8)
    stored = images.repeat(8, axis=1).repeat(8, axis=2).reshape(len(positions), -1)
    captions = [f"{WORDS[word]} {WORDS[position % 10]}" for word, position in zip(words, positions, strict=True)]
    return {"image64": stored, "caption": captions}


def micro_batch(recipe: Any, config: TrainConfig, begin: int, end: int) -> MicroBatch:
    """As the loader makes it: an empty one carries the first row of its batch."""
    positions = np.arange(begin, end, dtype=np.int64)
    read = positions if begin < end else np.array([begin - begin % config.batch])
    draws = Draws(config.seed, read)
    return MicroBatch(positions, positions.astype(np.uint64), draws, recipe.prepare(rows_at(read), draws))


def share_of(config: TrainConfig, recipe: Any, group: Group, position: int) -> list[MicroBatch]:
    cut = micro_batches(config.batch, group.rank, group.world_size, config.micro_batch_size())
    return [micro_batch(recipe, config, position + begin, position + end) for begin, end in cut]


def trainee_of(config: TrainConfig, group: Group) -> Trainee:
    recipe = make_recipe(config)
    engines: dict[str, Engine] = {}
    for name, part in recipe.parts().items():
        torch.manual_seed(key64("initialise", config.seed, name))
        engines[name] = make_engine(name, part, config, group)
    return Trainee(recipe, config, group, engines)


def plain_losses(recipe: NoisedClipRecipe, clip: NoisedClip, batch: dict[str, Tensor], scale: float) -> Tensor:
    """Symmetric cross-entropy of the whole batch (CLIP, figure 3)."""
    noised = recipe.process.q_sample(batch["images"], batch["timesteps"], batch["noise"])
    image, text = clip(noised, batch["timesteps"], tokens=batch["tokens"], lengths=batch["lengths"])
    image, text = (f / f.norm(dim=1, keepdim=True) for f in (image, text))
    scores, right = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(scores, right, reduction="none") + F.cross_entropy(scores.T, right, reduction="none")) / 2


def plain_torch(config: Any, updates: int) -> tuple[NoisedClip, list[float], list[float]]:
    """The same training on whole batches in one process: the module, its losses and gradient norms."""
    recipe = make_recipe(config)
    assert isinstance(recipe, NoisedClipRecipe)
    torch.manual_seed(key64("initialise", config.seed, "clip"))
    (part,) = recipe.parts().values()
    clip = part.build()
    assert isinstance(clip, NoisedClip)
    adam = torch.optim.AdamW(clip.parameters(), lr=config.lr, eps=config.adam_eps, weight_decay=config.weight_decay)
    losses, norms = [], []
    for update in range(updates):
        micro = micro_batch(recipe, config, update * config.batch, (update + 1) * config.batch)
        loss = plain_losses(recipe, clip, micro.batch, config.logit_scale).mean()
        adam.zero_grad()
        loss.backward()
        losses.append(float(loss))
        gradients = [p.grad for p in clip.parameters() if p.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))))
        adam.step()
    return clip, losses, norms
