"""Two ranks that put every ZeRO stage through what it must hold; test_deepspeed.py reads what rank 0 found.

One process group for all cases, because importing DeepSpeed takes longer than most of them. Run as
`zero_ranks.py RANK WORLD_SIZE FOLDER DATASET CONFIG_JSON CASES_JSON`, cases being [stage, precision, offload].
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from data_pipeline.draws import Draws, key64
from data_pipeline.loader import Loader, MicroBatch, micro_batches
from data_pipeline.order import SampleOrder
from data_pipeline.shards import Dataset, open_dataset
from data_pipeline.storage import LocalStore
from trainer.checkpoint.load import restore_newest
from trainer.checkpoint.save import Saver
from trainer.config import TrainConfig
from trainer.engine.engine import Engine
from trainer.engine.group import Group, open_group
from trainer.engine.replicated import ReplicatedEngine
from trainer.guard import GuardHistory
from trainer.recipes import make_recipe, parse_train_config
from trainer.recipes.recipe import Batch, Losses, Phase
from trainer.run import identity_of, make_engine
from trainer.step import Trainee, train_step

sys.path.insert(0, str(Path(__file__).parent))
from two_parts import TwoParts
from zero_layouts import pieces_of

State = dict[tuple[str, str, int], Tensor]


class ScaleGradient(torch.autograd.Function):
    """The value as it is, its gradient times `factor`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class Poked:
    """A recipe whose gradients, not its losses, are multiplied by `factor`."""

    def __init__(self, recipe: Any) -> None:
        self.recipe, self.factor = recipe, 1.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recipe, name)

    def phases(self) -> tuple[Phase, ...]:
        return tuple(dataclasses.replace(phase, loss=self.poked(phase.loss)) for phase in self.recipe.phases())

    def poked(self, loss: Callable[..., Losses]) -> Callable[..., Losses]:
        def poked(parts: Mapping[str, nn.Module], batch: Batch, draws: Draws) -> Losses:
            losses = dict(loss(parts, batch, draws))
            return losses | {"total": ScaleGradient.apply(losses["total"], self.factor)}

        return poked


class Bench:
    """What all cases share."""

    def __init__(self, group: Group, folder: Path, dataset: Dataset, values: dict[str, Any]) -> None:
        self.group, self.folder, self.dataset, self.values = group, folder, dataset, values

    def config(self, **changes: Any) -> TrainConfig:
        return parse_train_config(self.values | changes, "zero ranks")

    def trainee(self, config: TrainConfig, recipe: Any = None) -> Trainee:
        recipe = recipe or make_recipe(config)
        engines: dict[str, Engine] = {}
        for name, part in recipe.parts().items():
            torch.manual_seed(key64("initialise", config.seed, name))
            engines[name] = make_engine(name, part, config, self.group)
        return Trainee(recipe, config, self.group, engines)

    def steps(self, trainee: Trainee, begin: int, end: int) -> Iterator[dict[str, float | str]]:
        """The figures of updates `begin` to `end` on the dataset's batches."""
        config = trainee.config
        order = SampleOrder(self.dataset.id, self.dataset.shard_rows, config.seed, config.batch)
        cut = micro_batches(config.batch, self.group.rank, self.group.world_size, config.micro_batch_size())
        loader = Loader(self.dataset, order, trainee.recipe.columns, trainee.recipe.prepare, cut)
        batches: Iterator[list[MicroBatch]] = loader.batches(begin * config.batch, end * config.batch)
        for update, batch in enumerate(batches, begin):
            yield train_step(trainee, batch, update * config.batch)

    def restored(self, trainee: Trainee, position: int) -> Trainee:
        """A new trainee that starts from a checkpoint of this one, saved and read through the store."""
        store = LocalStore(self.folder / f"store-{key64('store', trainee.config.model_dump_json(), position)}")
        saver = Saver(store, identity_of(trainee, 1))
        order = SampleOrder(self.dataset.id, self.dataset.shard_rows, trainee.config.seed, trainee.config.batch)
        state = {
            "optimizer_steps": {name: engine.optimizer_steps() for name, engine in trainee.engines.items()},
            "loss_scale": {name: engine.loss_scale() for name, engine in trainee.engines.items()},
            "guard": {name: dataclasses.asdict(history) for name, history in trainee.guards.items()},
            "order": dataclasses.asdict(order.state(position)),
        }
        saver.save(position, [i for engine in trainee.engines.values() for i in engine.shard_view()], state)
        saver.wait()
        self.group.all_agree(True)  # rank 0 has committed
        fresh = self.trainee(trainee.config, trainee.recipe)
        wanted = [interval for engine in fresh.engines.values() for interval in engine.wanted()]
        found = restore_newest(store, self.group, wanted, saver.identity.parameters, order.state(0))
        assert found is not None
        for name, engine in fresh.engines.items():
            engine.loaded(found.manifest.optimizer_steps[name], found.manifest.loss_scale[name])
        fresh.guards = dict(trainee.guards)
        return fresh

    @cache  # noqa: B019  (the replicated engine's are wanted by every stage)
    def losses_of(self, stage: int) -> list[float]:
        changes = {"batch": 5, "micro_batch": 2, "dropout": 0.0, "lr": 3e-4}
        # Recomputing blocks in the backward pass must change nothing, where parameters come and go too.
        config = self.config(zero={"stage": stage}, activation_checkpointing=stage > 0, **changes)
        trainee = self.trainee(config)
        return [float(figures["loss/total"]) for figures in self.steps(trainee, 0, 20)]

    def everywhere(self, good: bool) -> bool:
        return self.group.all_agree(good)


def state_of(trainee: Trainee) -> State:
    """Every element of this rank's fp32 state, and the weights that its forward passes use."""
    state = {
        (i.name, i.kind, i.offset): i.values.detach().clone() for e in trainee.engines.values() for i in e.shard_view()
    }
    for part, engine in trainee.engines.items():
        for name, parameter in engine.module.named_parameters():
            held = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3 keeps this rank's share there
            state[f"{part}/{name}", "forward", 0] = held.detach().clone()
    return state


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(values, other[key]) for key, values in one.items())


def check_stage(bench: Bench, stage: int, precision: str, offload: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    guard = {"warmup": 3, "spike_factor": 20.0}
    config = bench.config(zero={"stage": stage, "offload": offload}, precision=precision, guard=guard)
    recipe = Poked(make_recipe(config))
    trainee = bench.trainee(config, recipe)

    (name,) = trainee.engines
    torch.manual_seed(key64("initialise", config.seed, name))
    source = {f"{name}/{key}": p.detach().reshape(-1) for key, p in recipe.parts()[name].build().named_parameters()}
    masters = [i for i in trainee.engines[name].shard_view() if i.kind in ("master", "ema")]
    exact = all(torch.equal(i.values, source[i.name][i.offset : i.offset + len(i.values)]) for i in masters)
    held = [(i.name, i.offset, len(i.values)) for i in masters if i.kind == "master"]
    sizes = trainee.engines[name].parameter_sizes
    as_planned = sorted(held) == sorted(pieces_of(stage, sizes, bench.group.rank, bench.group.world_size))
    found["the layout is what plans are tested with"] = bench.everywhere(as_planned)
    covered = bench.group.sum_(torch.tensor([sum(len(i.values) for i in masters)]))
    found["step-0 masters and ema equal the fp32 source"] = bench.everywhere(exact)
    found["elements covered"] = [int(covered), 2 * sum(values.numel() for values in source.values())]

    figures = list(bench.steps(trainee, 0, 4))
    found["updates"] = [trainee.engines[name].optimizer_steps(), len(figures)]
    for what, factor in (("nan", math.nan if bench.group.rank == 1 else 1.0), ("spike", 50.0)):
        before = state_of(trainee)
        recipe.factor = factor
        (refused,) = bench.steps(trainee, 4, 5)
        recipe.factor = 1.0
        found[f"{what}: refused because"] = str(refused.get("skipped"))
        found[f"{what}: loss"] = refused["loss/total"]
        found[f"{what}: nothing changed"] = bench.everywhere(same(before, state_of(trainee)))
    scales = [1.0] if precision == "fp16" else []
    for scale in [None, *scales]:  # fp16: at the floor of its scale as well
        if scale:
            trainee.engines[name]._set_loss_scale({"cur_scale": scale, "cur_hysteresis": 1})  # type: ignore[attr-defined]
        norm = refused_by_history(bench, trainee)
    (after,) = bench.steps(trainee, 4, 5)
    found["the next update is applied"] = "skipped" not in after and trainee.engines[name].optimizer_steps() == 5
    found["norm when refused and when applied"] = [norm, after["grad_norm"]]
    found["loss scale"] = after.get("loss_scale")

    resumed = bench.restored(trainee, 5 * config.batch)
    found["restored equals saved"] = bench.everywhere(same(state_of(trainee), state_of(resumed)))
    went_on, again = list(bench.steps(trainee, 5, 8)), list(bench.steps(resumed, 5, 8))
    found["resumed goes on as if never stopped"] = (went_on == again) and bench.everywhere(
        same(state_of(trainee), state_of(resumed))
    )
    ema = {(i.name, i.offset): i.values for i in trainee.engines[name].shard_view() if i.kind == "ema"}
    with trainee.engines[name].weights("ema") as module:
        whole = {f"{name}/{key}": parameter.detach().reshape(-1) for key, parameter in module.named_parameters()}
    found["whole ema weights"] = bench.everywhere(
        all(torch.equal(values, whole[key][offset : offset + len(values)]) for (key, offset), values in ema.items())
    )
    return found


def refused_by_history(bench: Bench, trainee: Trainee) -> float:
    """The norm of an ordinary update that the guard refuses, because it remembers smaller ones."""
    guards = dict(trainee.guards)
    trainee.guards = {name: GuardHistory((1e-9,), (1e-9,), accepted=100) for name in guards}
    (refused,) = bench.steps(trainee, 4, 5)
    assert "times its median" in str(refused["skipped"])
    trainee.guards = guards
    return float(refused["grad_norm"])


def check_losses(bench: Bench, stage: int) -> dict[str, Any]:
    """20 updates, each in 2 micro batches and with a last one that is empty on a rank, as the replicated engine's."""
    references = bench.losses_of(0)
    worst = max(abs(mine - its) / its for its, mine in zip(references, bench.losses_of(stage), strict=True))
    return {"largest relative difference of 20 losses": worst, "first and last": [references[0], references[-1]]}


def check_two_parts(bench: Bench, stage: int) -> dict[str, Any]:
    config = bench.config(zero={"stage": stage}, dropout=0.0, guard={"warmup": 1000})
    trainee = bench.trainee(config, TwoParts())
    initial = {part: {n: p.clone() for n, p in whole(trainee, part).items()} for part in trainee.engines}
    frozen = []
    for update in range(6):
        before = state_of(trainee)
        list(bench.steps(trainee, update, update + 1))
        moved = {
            key[0].split("/")[0] for key, values in state_of(trainee).items() if not torch.equal(values, before[key])
        }
        frozen.append(sorted(moved))
    reference = plain_torch(bench, config, initial, updates=6)
    difference = max(
        float((whole(trainee, part)[name] - values).abs().max() / values.abs().max())
        for part, weights in reference.items()
        for name, values in weights.items()
    )
    resumed = bench.restored(trainee, 6 * config.batch)
    went_on, again = list(bench.steps(trainee, 6, 9)), list(bench.steps(resumed, 6, 9))
    return {
        "parts that moved, by update": frozen,
        "engines": [type(engine).__name__ for engine in trainee.engines.values()],
        "largest relative difference to plain torch": difference,
        "resumed goes on as if never stopped": went_on == again
        and bench.everywhere(same(state_of(trainee), state_of(resumed))),
        "figures": sorted(again[0]),
    }


def whole(trainee: Trainee, part: str) -> dict[str, Tensor]:
    with trainee.engines[part].weights("master") as module:
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def plain_torch(
    bench: Bench, config: TrainConfig, initial: dict[str, dict[str, Tensor]], updates: int
) -> dict[str, dict[str, Tensor]]:
    """The same training written down in plain torch, whole batches in one process."""
    recipe = TwoParts()
    modules = {name: part.build() for name, part in recipe.parts().items()}
    for name, module in modules.items():
        module.load_state_dict(initial[name])
    adams = {
        name: torch.optim.AdamW(
            m.parameters(), lr=config.lr, betas=config.adam_betas, eps=config.adam_eps, weight_decay=0
        )
        for name, m in modules.items()
    }
    order = SampleOrder(bench.dataset.id, bench.dataset.shard_rows, config.seed, config.batch)
    loader = Loader(bench.dataset, order, recipe.columns, recipe.prepare, [(0, config.batch)])
    for update, (micro,) in enumerate(loader.batches(0, updates * config.batch)):
        for part, loss in (("critic", recipe.critic_loss), ("generator", recipe.generator_loss)):
            if part == "generator" and update % 2 == 0:
                continue
            adams[part].zero_grad()
            loss(modules, micro.batch, micro.draws)["total"].mean().backward()
            adams[part].step()
    return {name: {n: p.detach() for n, p in m.named_parameters()} for name, m in modules.items()}


def main() -> None:
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    # torch computes fp16 on any CPU; DeepSpeed only admits those that do it fast.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    group = open_group(rank, world_size, f"file://{folder}/rendezvous")
    bench = Bench(group, folder, open_dataset(sys.argv[4]), json.loads(sys.argv[5]))
    results: dict[str, Any] = {}
    for stage, precision, offload in json.loads(sys.argv[6]):
        results[f"stage {stage} {precision} {offload}"] = check_stage(bench, stage, precision, offload)
    for stage in (1, 2, 3):
        results[f"losses {stage}"] = check_losses(bench, stage)
        results[f"two parts {stage}"] = check_two_parts(bench, stage)
    assert isinstance(bench.trainee(bench.config()).engines["base"], ReplicatedEngine)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    group.close()


if __name__ == "__main__":
    main()
