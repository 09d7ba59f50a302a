"""Contrastive updates against the plain loss of the whole batch: in one process, and on two real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.draws import Draws
from data_pipeline.errors import UsageError, UserError
from data_pipeline.shards import open_dataset
from trainer.engine.group import Group
from trainer.engine.replicated import ReplicatedEngine
from trainer.evaluation.retrieval import _by_picture, heldout_retrieval, retrieval_accuracy
from trainer.models.noised_clip import NoisedClip
from trainer.recipes.contrastive import contrast, pair_losses, unit
from trainer.recipes.noised_clip import NoisedClipRecipe
from trainer.recipes.recipe import seed_dropout
from trainer.step import train_step

sys.path.insert(0, str(Path(__file__).parent))
from contrastive_case import MODEL, config_of, rows_at, share_of, trainee_of

WORLD_SIZE = 2


def directions(count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, width, generator=generator)
    return unit(images), unit(images + torch.randn(count, width, generator=generator))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("chunk_rows", [1, 7, 64])
@pytest.mark.parametrize("logit_scale", [5.0, 100.0])
def test_closed_form_gradients_of_all_ranks_together_are_those_of_autograd(chunk_rows: int, logit_scale: float) -> None:
    images, captions = (side.double().requires_grad_() for side in directions(48, 16))
    expected = pair_losses(images, captions, logit_scale)
    expected["total"].mean().backward()
    # Three ranks in turn, of which one has no pair; every rank needs the others' normalisers, so those are known.
    scores = logit_scale * images.detach() @ captions.detach().T
    known = torch.stack([scores.logsumexp(dim=1), scores.logsumexp(dim=0)])
    for places in (torch.arange(20), torch.arange(20, 48), torch.arange(0)):

        def summed(mine: Tensor, places: Tensor = places) -> Tensor:
            torch.testing.assert_close(mine[:, places], known[:, places])
            return known

        found = contrast(images.detach(), captions.detach(), places, logit_scale, summed, chunk_rows)
        assert images.grad is not None and captions.grad is not None
        torch.testing.assert_close(found.image_gradients_bE, images.grad[places], atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(found.caption_gradients_bE, captions.grad[places], atol=1e-12, rtol=1e-9)
        for name, values in expected.items():
            torch.testing.assert_close(found.losses[name], values[places].detach(), atol=1e-12, rtol=1e-9)


def test_no_temporary_is_larger_than_a_chunk_of_rows_by_the_batch() -> None:
    images, captions = directions(96, 4)
    with Largest() as largest:
        contrast(images, captions, torch.arange(96), 20.0, lambda values: values, chunk_rows=8)
    assert largest.elements == 8 * 96
    with Largest() as largest:
        pair_losses(images, captions, 20.0)
    assert largest.elements == 96 * 96, "what is avoided"


def test_a_constant_feature_is_wrong_everywhere_and_its_loss_is_that_of_chance() -> None:
    same = unit(torch.ones(10, 3))
    losses = pair_losses(same, same, 100.0)
    torch.testing.assert_close(losses["total"], torch.full((10,), 10.0).log())
    assert losses["image_to_text_error"].tolist() == losses["text_to_image_error"].tolist() == [1.0] * 10
    right = pair_losses(*directions(10, 64)[:1] * 2, 100.0)
    assert right["image_to_text_error"].sum() == 0


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_two_passes_give_the_gradient_of_the_whole_batch_with_dropout_and_noise(
    micro_batch: int, one_thread: None
) -> None:
    config = config_of(dropout=0.2, micro_batch=micro_batch)
    trainee = trainee_of(config, Group())
    engine, recipe = trainee.engines["clip"], trainee.recipe
    assert isinstance(engine, ReplicatedEngine) and isinstance(recipe, NoisedClipRecipe)
    share = share_of(config, recipe, Group(), 0)

    kept = []  # one graph over all micro batches, each with its own dropout
    for micro in share:
        seed_dropout(micro, trainee.group.rank)
        kept.append(recipe.directions(trainee.modules, micro.batch))
    images, captions = (torch.cat(side) for side in zip(*kept, strict=True))
    right = torch.arange(5)
    scores = 10.0 * images @ captions.T
    loss = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
    expected = torch.autograd.grad(loss, list(engine.module.parameters()))

    (phase,) = recipe.phases()
    assert phase.accumulate is not None
    values = phase.accumulate(trainee, phase, share, 0)
    assert values.shape == (4, 5) and values.dtype == torch.float64
    assert float(values[0].mean()) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert values[3].tolist() == torch.cat([micro.batch["timesteps"] for micro in share]).tolist()
    whole = torch.cat([gradient.flatten() for gradient in expected])
    found = torch.cat(
        [parameter.grad.flatten() for parameter in engine.module.parameters() if parameter.grad is not None]
    )
    assert float((found - whole).norm() / whole.norm()) < 1e-5


def test_training_falls_below_chance_and_retrieves_what_it_was_shown(one_thread: None) -> None:
    config = config_of(batch=20, micro_batch=10, lr=3e-3, adam_eps=1e-8, images=20)
    trainee = trainee_of(config, Group())
    share = share_of(config, trainee.recipe, Group(), 0)
    figures = [train_step(trainee, share, 0) for _ in range(40)]
    assert float(figures[-1]["loss/total"]) < 0.5 * float(figures[0]["loss/total"])
    assert {"loss/q0", "loss/q1", "loss/q2", "loss/q3", "loss/image_to_text_error"} <= set(figures[0])
    with torch.no_grad():
        found = [trainee.recipe.directions(trainee.modules, micro.batch) for micro in share]  # type: ignore[attr-defined]
    accuracy = retrieval_accuracy(*(torch.cat(side) for side in zip(*found, strict=True)), ways=10)
    assert accuracy["image_to_text"] > 0.7 and accuracy["text_to_image"] > 0.7
    shuffled = retrieval_accuracy(torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]).roll(1, 0), 10)
    assert shuffled["image_to_text"] < 0.3


def test_a_locked_image_tower_keeps_all_but_its_projection_and_the_captions_tower_learns(one_thread: None) -> None:
    model = MODEL | {"image_init": "colour", "text_layers": 0}
    config = config_of(lock_image=True, weight_decay=0.0, dropout=0.5, lr=3e-3, adam_eps=1e-8, model=model)
    trainee = trainee_of(config, Group())
    module = trainee.engines["clip"].module
    before = {name: values.clone() for name, values in module.state_dict().items()}
    figures = [train_step(trainee, share_of(config, trainee.recipe, Group(), 0), 0) for _ in range(20)]
    changed = {name for name, values in module.state_dict().items() if not torch.equal(values, before[name])}
    projection = {f"image_encoder.blocks.output.{name}" for name in ("ln.g", "ln.b", "f.w")}
    assert changed == projection | {name for name in before if name.startswith("text_encoder.")}
    assert float(figures[-1]["loss/total"]) < 0.5 * float(figures[0]["loss/total"])
    picture = torch.zeros(1, 3, 8, 8, requires_grad=True)  # guidance still has its gradient
    clip = cast(NoisedClip, module).eval()
    clip.encode_image(picture, torch.zeros(1, dtype=torch.int64)).sum().backward()
    assert picture.grad is not None and float(picture.grad.abs().sum()) > 0
    with pytest.raises(UsageError, match="weight_decay 0 with lock_image"):
        config_of(lock_image=True, weight_decay=0.1)


def test_logit_normal_timesteps_have_its_quantiles_and_are_for_training_only() -> None:
    config = config_of(logit_normal=[-2.5, 1.0], model=MODEL | {"timesteps": 1000}, diffusion={"steps": 1000})
    draws, rows = Draws(0, np.arange(2000)), rows_at(np.arange(2000))
    found = NoisedClipRecipe(config).prepare(rows, draws)["timesteps"].double()  # type: ignore[arg-type]
    quantiles = torch.quantile(found, torch.tensor([0.16, 0.5, 0.84], dtype=torch.float64))
    expected = 1000 * torch.sigmoid(torch.tensor([-3.5, -2.5, -1.5], dtype=torch.float64))
    torch.testing.assert_close(quantiles, expected, rtol=0.1, atol=1.0)
    extreme = config_of(logit_normal=[50.0, 1.0])
    assert NoisedClipRecipe(extreme).prepare(rows, draws)["timesteps"].unique().tolist() == [19]  # type: ignore[arg-type]
    even = NoisedClipRecipe(config.for_evaluation()).prepare(rows, draws)["timesteps"].double()  # type: ignore[arg-type]
    assert float(even.mean()) == pytest.approx(500, abs=25)


def test_heldout_retrieval_counts_a_picture_once_and_can_take_the_mean_of_its_captions(
    dataset_uri: str, one_thread: None
) -> None:
    config = config_of(batch=8, model=MODEL | {"image_size": 16, "text_context": 16})
    recipe = NoisedClipRecipe(config)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = recipe.parts()["clip"].build().eval()
    assert isinstance(model, NoisedClip)
    dataset = open_dataset(dataset_uri)
    found = heldout_retrieval(recipe, model, dataset, timestep=0, ways=20)
    assert found == heldout_retrieval(recipe, model, dataset, timestep=0, ways=20)
    assert 0 <= found["image_to_text"] < 0.5
    with pytest.raises(UserError, match="at least 200 held-out pictures"):
        heldout_retrieval(recipe, model, dataset, timestep=0, ways=200)

    images, captions = directions(6, 8)
    pictures = [b"a", b"b", b"a", b"c", b"b", b"a"]
    once = _by_picture(pictures, images, captions, "one")
    assert torch.equal(once[0], images[[0, 1, 3]]) and torch.equal(once[1], captions[[0, 1, 3]])
    mean = _by_picture(pictures, images, captions, "mean")[1]
    torch.testing.assert_close(mean[0], unit(captions[[0, 2, 5]].mean(dim=0)))
    torch.testing.assert_close(mean[2], captions[3])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the two ranks found."""
    folder = tmp_path_factory.mktemp("contrastive")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    script = Path(__file__).with_name("contrastive_ranks.py")
    processes = []
    for rank in range(WORLD_SIZE):
        log = (folder / f"rank-{rank}.log").open("wb")
        command = [sys.executable, str(script), str(rank), str(WORLD_SIZE), str(folder)]
        processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    codes = [process.wait(300) for process in processes]
    logs = "\n".join((folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(WORLD_SIZE))
    assert codes == [0] * WORLD_SIZE, logs
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.mark.parametrize("case", ["0", "1", "2", "3", "3 with checkpointing", "0 locked", "2 locked", "3 locked"])
def test_two_ranks_with_uneven_shares_train_as_plain_torch_does_at_every_zero_stage(
    ranks: dict[str, Any], case: str
) -> None:
    found = ranks[case]
    assert found["engine"] == ("ReplicatedEngine" if case.startswith("0") else "DeepSpeedEngine")
    assert found["loss"] == pytest.approx(found["plain loss"], rel=1e-5)
    assert found["norm"] == pytest.approx(found["plain norm"], rel=1e-4)
    assert found["largest difference of a weight"] < 1e-5
    assert found["loss"][-1] != pytest.approx(found["loss"][0], rel=1e-3), "it moves"
    assert {"loss/total", "loss/image_to_text_error", "loss/text_to_image_error"} <= set(found["figures"])


def test_in_bf16_loss_and_gradient_are_those_of_float32_to_its_precision(ranks: dict[str, Any]) -> None:
    found = ranks["2 in bf16"]
    assert found["loss"][0] == pytest.approx(found["plain loss"][0], rel=0.01)
    assert found["norm"][0] == pytest.approx(found["plain norm"][0], rel=0.05)
    assert found["loss"][0] != found["plain loss"][0]
