"""ReplicatedEngine: plain torch. Every rank holds the whole part; gradients are summed over ranks.

Always holds: masters and Adam moments are one flat fp32 tensor each, of which the module's parameters are views, equal
on all ranks; EMA and the shard view are cut into one contiguous share per rank. The reference in tests, and ZeRO
stage 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trainer.config import Precision, TrainConfig
from trainer.engine.engine import Interval, Kind, autocast
from trainer.engine.group import Group
from trainer.guard import Decision


class ReplicatedEngine:
    """See Engine. `module` must be float32; it is built equal on all ranks (same seed) by the caller."""

    def __init__(self, part: str, module: nn.Module, config: TrainConfig, group: Group) -> None:
        self.module, self.group = module.to(group.device), group
        # fp16 needs a loss scale, which is ZeRO's; a part that is replicated beside it is computed in fp32.
        self.precision: Precision = "fp32" if config.precision == "fp16" else config.precision
        named = list(module.named_parameters())
        self.parameter_sizes = {f"{part}/{name}": parameter.numel() for name, parameter in named}
        size = sum(self.parameter_sizes.values())
        self._master = torch.empty(size, device=group.device)
        self._gradient = torch.zeros_like(self._master)
        offset = 0
        for _, parameter in named:
            end = offset + parameter.numel()
            self._master[offset:end] = parameter.detach().reshape(-1)
            parameter.data = self._master[offset:end].view_as(parameter)
            parameter.grad = self._gradient[offset:end].view_as(parameter)
            offset = end
        self._share = (size * group.rank // group.world_size, size * (group.rank + 1) // group.world_size)
        self._ema = self._master[slice(*self._share)].clone()
        self._moments = {"exp_avg": torch.zeros_like(self._master), "exp_avg_sq": torch.zeros_like(self._master)}
        self._updates = torch.tensor(0.0, device=group.device)  # that were applied
        self._config = config
        self._view = list(self._cut_share())

    def precision_context(self) -> AbstractContextManager[object]:
        return autocast(self.precision, self.group.device)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, lr: float, guard: Callable[[float], Decision]) -> Decision:
        self.group.sum_(self._gradient)
        decision = guard(float(torch.linalg.vector_norm(self._gradient)))
        if decision is Decision.CONTINUE:
            self._step(lr)
        self._gradient.zero_()
        return decision

    @torch.no_grad()
    def _step(self, lr: float) -> None:
        # The function behind torch.optim.AdamW, whose class imports torch._dynamo: two seconds of every start.
        beta1, beta2 = self._config.adam_betas
        adamw(
            [self._master],
            [self._gradient],
            [self._moments["exp_avg"]],
            [self._moments["exp_avg_sq"]],
            [],
            [self._updates],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=self._config.adam_eps,
            weight_decay=self._config.weight_decay,
            amsgrad=False,
            maximize=False,
            fused=True,
        )

    def shard_view(self) -> Iterator[Interval]:
        return iter(self._view)  # cut once: the state stays where it is, and the EMA goes through it at every step

    def _cut_share(self) -> Iterator[Interval]:
        begin, end = self._share
        yield from self._intervals("master", self._master[begin:end], begin)
        yield from self._intervals("exp_avg", self._moments["exp_avg"][begin:end], begin)
        yield from self._intervals("exp_avg_sq", self._moments["exp_avg_sq"][begin:end], begin)
        yield from self._intervals("ema", self._ema, begin)

    def wanted(self) -> Iterable[Interval]:
        yield from self._intervals("master", self._master, 0)
        yield from self._intervals("exp_avg", self._moments["exp_avg"], 0)
        yield from self._intervals("exp_avg_sq", self._moments["exp_avg_sq"], 0)
        yield from self._intervals("ema", self._ema, self._share[0])

    def _intervals(self, kind: Kind, values: Tensor, begin: int) -> Iterator[Interval]:
        """`values` covers [begin, begin + n) of the flat state; one interval per parameter that it touches."""
        end = begin + len(values)
        parameter_begin = 0
        for name, size in self.parameter_sizes.items():
            low, high = max(begin, parameter_begin), min(end, parameter_begin + size)
            if low < high:
                yield Interval(name, kind, low - parameter_begin, values[low - begin : high - begin])
            parameter_begin += size

    def optimizer_steps(self) -> int:
        return int(self._updates)

    def loss_scale(self) -> dict[str, float]:
        return {}

    def loaded(self, optimizer_steps: int, loss_scale: dict[str, float]) -> None:
        self._updates.fill_(float(optimizer_steps))

    @contextmanager
    def weights(self, kind: Literal["master", "ema"]) -> Iterator[nn.Module]:
        training = self.module.training
        self.module.eval()
        masters = self._master.clone() if kind == "ema" else None
        if masters is not None:
            # A sum with zeros is exact, so every rank gets every share to the bit.
            whole = torch.zeros_like(self._master)
            whole[slice(*self._share)] = self._ema
            self._master.copy_(self.group.sum_(whole))
        try:
            yield self.module
        finally:
            if masters is not None:
                self._master.copy_(masters)
            self.module.train(training)
