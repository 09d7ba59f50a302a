"""The replicated engine and the training step, in one process: plain torch is the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.draws import Draws
from data_pipeline.errors import UserError
from data_pipeline.loader import MicroBatch, Rows
from trainer.config import TrainConfig
from trainer.ema import update_ema
from trainer.engine.engine import KINDS
from trainer.engine.group import Group, open_group
from trainer.engine.replicated import ReplicatedEngine
from trainer.guard import Decision
from trainer.recipes import parse_train_config
from trainer.recipes.recipe import Batch, Phase, on_device, pinned
from trainer.step import Trainee, only_trained, train_step

Values = Callable[..., dict[str, Any]]


def accept(norm: float) -> Decision:
    return Decision.CONTINUE


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def config_of(train_values: Values, **changes: Any) -> TrainConfig:
    return parse_train_config(train_values(**{"batch": 4, "lr": 1e-2, **changes}), "test")


def test_twenty_updates_equal_those_of_plain_torch(train_values: Values) -> None:
    config = config_of(train_values, weight_decay=0.1)
    engine = ReplicatedEngine("net", small_net(), config, Group())
    reference = small_net()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=config.lr, betas=(0.9, 0.999), weight_decay=0.1)
    for step in range(20):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        for net, backward in ((engine.module, engine.backward), (reference, lambda loss: loss.backward())):
            for half in x.chunk(2):  # two micro batches
                backward(net(half).square().sum() / 4)
        assert engine.update(config.lr, accept) is Decision.CONTINUE
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(engine.module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert engine.optimizer_steps() == 20


def test_the_shares_of_all_ranks_cover_every_element_of_every_kind_once(train_values: Values) -> None:
    config, world = config_of(train_values), 3
    engines = [ReplicatedEngine("net", small_net(), config, Group(rank, world)) for rank in range(world)]
    seen = [
        (interval.name, interval.kind, interval.offset + i)
        for engine in engines
        for interval in engine.shard_view()
        for i in range(len(interval.values))
    ]
    expected = {(n, kind, i) for n, size in engines[0].parameter_sizes.items() for kind in KINDS for i in range(size)}
    assert len(seen) == len(set(seen)) and set(seen) == expected


def test_a_skipped_update_leaves_weights_moments_and_ema_as_they_were(train_values: Values) -> None:
    engine = ReplicatedEngine("net", small_net(), config_of(train_values), Group())

    def state() -> list[Tensor]:
        return [interval.values.clone() for interval in engine.shard_view()]

    engine.backward(engine.module(torch.ones(2, 4)).sum())
    engine.update(1e-2, accept)
    before = state()
    seen: list[float] = []
    for bad in (math.nan, math.inf):
        engine.backward(engine.module(torch.full((2, 4), bad)).sum())
        assert engine.update(1e-2, lambda norm: seen.append(norm) or Decision.SKIP) is Decision.SKIP  # type: ignore[func-returns-value]
    assert not any(math.isfinite(norm) for norm in seen)
    for now, then in zip(state(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    engine.backward(engine.module(torch.ones(2, 4)).sum())
    engine.update(1e-2, lambda norm: seen.append(norm) or Decision.CONTINUE)  # type: ignore[func-returns-value]
    assert math.isfinite(seen[-1]), "nothing of the refused gradient is left"


def test_ema_follows_the_masters_and_is_put_on_only_inside_its_context(train_values: Values) -> None:
    engine = ReplicatedEngine("net", small_net(), config_of(train_values), Group())
    start = [p.detach().clone() for p in engine.module.parameters()]
    engine.backward(engine.module(torch.ones(2, 4)).sum())
    engine.update(1e-1, accept)
    update_ema(engine.shard_view(), 0.75)
    masters = [p.detach().clone() for p in engine.module.parameters()]
    with engine.weights("ema") as module:
        assert not module.training
        for ema, old, new in zip(module.parameters(), start, masters, strict=True):
            torch.testing.assert_close(ema.detach(), 0.75 * old + 0.25 * new)
    assert engine.module.training
    for now, new in zip(engine.module.parameters(), masters, strict=True):
        torch.testing.assert_close(now.detach(), new, rtol=0, atol=0)


class TwoParts:
    """A recipe of two parts whose losses touch both networks."""

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("first", ("total",), self._loss), Phase("second", ("total", "extra"), self._loss))

    def _loss(self, parts: Mapping[str, nn.Module], batch: Batch, draws: Draws) -> dict[str, Tensor]:
        total = (parts["first"](batch["x"]) * parts["second"](batch["x"])).square().sum(dim=1)
        return {"total": total, "extra": total.detach() * 2}


def two_part_trainee(config: TrainConfig) -> Trainee:
    engines = {name: ReplicatedEngine(name, small_net(), config, Group()) for name in ("first", "second")}
    return Trainee(TwoParts(), config, Group(), engines)  # type: ignore[arg-type]


def micro_batch(x: Tensor, begin: int = 0, mine: bool = True) -> MicroBatch:
    """`mine` False: a stand-in for a rank whose share is used up."""
    positions = np.arange(begin, begin + len(x), dtype=np.int64)
    taken = positions if mine else positions[:0]
    return MicroBatch(taken, taken.astype(np.uint64), Draws(0, positions), {"x": x})


def test_each_phase_trains_its_own_part_and_freezes_the_others(train_values: Values) -> None:
    trainee = two_part_trainee(config_of(train_values))
    with only_trained(trainee.engines, "first"):
        assert all(p.requires_grad for p in trainee.engines["first"].module.parameters())
        assert not any(p.requires_grad for p in trainee.engines["second"].module.parameters())
    x = torch.randn(4, 4)
    figures = train_step(trainee, [micro_batch(x[:3]), micro_batch(x[3:], 3)], 0)
    assert {"first/loss/total", "second/loss/extra", "second/grad_norm", "lr"} <= figures.keys()
    assert [engine.optimizer_steps() for engine in trainee.engines.values()] == [1, 1]

    second = small_net()
    first = small_net()
    optimizer = torch.optim.AdamW(first.parameters(), lr=1e-2, weight_decay=0.0)
    ((first(x) * second(x)).square().sum() / 4).backward()
    optimizer.step()
    for mine, theirs in zip(trainee.engines["first"].module.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_micro_batch_that_stands_in_for_an_empty_share_adds_nothing(train_values: Values) -> None:
    x = torch.randn(4, 4)
    trainees = [two_part_trainee(config_of(train_values)) for _ in range(2)]
    train_step(trainees[0], [micro_batch(x)], 0)
    train_step(trainees[1], [micro_batch(x), micro_batch(x + 1, mine=False)], 0)
    for one, other in zip(*(t.engines["first"].module.parameters() for t in trainees), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_step_whose_loss_is_not_a_number_is_refused_and_a_row_of_them_halts(train_values: Values) -> None:
    trainee = two_part_trainee(config_of(train_values, guard={"rollback_after": 2, "halt_after": 0}))
    bad = [micro_batch(torch.full((4, 4), math.nan), begin) for begin in (0, 4)]
    before = [p.detach().clone() for p in trainee.engines["first"].module.parameters()]
    assert "loss is nan" in str(train_step(trainee, bad[:1], 0)["first/skipped"])
    for now, then in zip(trainee.engines["first"].module.parameters(), before, strict=True):
        torch.testing.assert_close(now.detach(), then, rtol=0, atol=0)
    with pytest.raises(UserError, match="2 refused updates in a row, the last because loss is nan"):
        train_step(trainee, bad[1:], 4)


def test_a_phase_is_left_out_while_it_is_not_active(train_values: Values) -> None:
    trainee = two_part_trainee(config_of(train_values))
    first, second = trainee.recipe.phases()
    rare = Phase("second", second.terms, second.loss, active=lambda update: update % 3 == 2, name="penalty")
    trainee.recipe.phases = lambda: (first, rare)  # type: ignore[method-assign]
    batch, x = trainee.config.batch, torch.randn(4, 4)
    seen = [train_step(trainee, [micro_batch(x, update * batch)], update * batch) for update in range(4)]
    assert ["penalty/loss/total" in figures for figures in seen] == [False, False, True, False]
    assert [engine.optimizer_steps() for engine in trainee.engines.values()] == [4, 1]
    assert set(trainee.guards) == {"first", "penalty"}


def test_fp16_is_refused_where_nothing_scales_its_loss(train_values: Values) -> None:
    with pytest.raises(UserError, match=r"zero.stage 1, 2 or 3 with precision fp16, .* found 0"):
        config_of(train_values, precision="fp16")
    config = config_of(train_values, precision="fp16", zero={"stage": 2})
    assert ReplicatedEngine("net", small_net(), config, Group()).precision == "fp32"


def test_a_rank_for_which_torch_sees_no_gpu_is_refused_before_it_meets_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    for seen, local_rank in ((0, 0), (2, 2)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        line = f"launcher.device cuda: expected a GPU number {local_rank} for rank 3, found {seen} that torch sees; set"
        with pytest.raises(UserError, match=line):
            open_group(3, 4, "file:///nowhere/rendezvous", "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_pinned_batches_are_the_same_batches_in_page_locked_memory() -> None:
    def prepare(rows: Rows, draws: Draws) -> Batch:
        return {"x": torch.from_numpy(draws.normal("x", (3, 8, 8)))}

    draws = Draws(0, np.arange(4))
    batch = pinned(prepare, torch.device("cuda"))({}, draws)
    assert batch["x"].is_pinned() and torch.equal(batch["x"], prepare({}, draws)["x"])
    assert torch.equal(on_device(batch, torch.device("cuda"))["x"].cpu(), batch["x"])
