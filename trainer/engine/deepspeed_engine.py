"""DeepSpeedEngine: a part whose state is spread over ranks by DeepSpeed's ZeRO, stage 1, 2 or 3.

Always holds: the fp32 masters start as the fp32 weights that the part was built with, not as their rounded copy; the
guard is asked inside the update, with the norm of this update's gradients; checkpoints and EMA see only flat intervals
of this rank's fp32 partitions, so every stage and world size reads what any other wrote. DeepSpeed's own checkpoints
(pickles) are not used. Called by `trainer.run.make_trainee`; imported only where a run asks for it.

What is borrowed from DeepSpeed's inside, because it has no public call for it, stands in `_Partitions` and in
`_ask_guard_inside`; it was written against 0.19.8.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import deepspeed
import torch
from deepspeed.runtime.utils import is_invalid_grad_norm
from torch import Tensor, nn

from data_pipeline.errors import UserError
from trainer.config import TrainConfig
from trainer.engine.engine import Interval, Kind, autocast
from trainer.engine.group import Group
from trainer.guard import Decision

log = logging.getLogger(__name__)

FP16_SCALE = {"initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1.0}


class DeepSpeedEngine:
    """See Engine. `module` is float32 and equal on all ranks; `build` makes another one like it, of any weights, when
    whole weights are asked for."""

    def __init__(
        self, part: str, module: nn.Module, build: Callable[[], nn.Module], config: TrainConfig, group: Group
    ) -> None:
        _prepare_deepspeed(config, group)
        self._part, self._build, self._group = part, build, group
        self.precision = config.precision
        # DeepSpeed gives the parameters other memory and leaves this one as it is.
        source = {name: parameter.detach() for name, parameter in module.named_parameters()}
        self.parameter_sizes = {f"{part}/{name}": values.numel() for name, values in source.items()}
        adam = torch.optim.AdamW(
            module.parameters(),
            lr=config.lr,
            betas=config.adam_betas,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=adam, config=deepspeed_config(config), dist_init_required=False
        )
        self.module: nn.Module = self._engine.module
        self._zero = self._engine.optimizer
        if config.precision == "fp16":
            self._zero.loss_scaler.raise_error_at_min_scale = False  # at the floor the guard decides
        self._partitions = _Partitions(self._zero, dict(module.named_parameters()), group)
        self._guard: Callable[[float], Decision] | None = None
        self._decision: Decision | None = None
        self._overflow = False
        _ask_guard_inside(self._zero, self._decide)
        for interval in self._intervals("master"):
            whole = source[interval.name.removeprefix(f"{part}/")].reshape(-1)
            interval.values.copy_(whole[interval.offset : interval.offset + len(interval.values)])
        for flat, ema in zip(self._partitions.flats, self._partitions.state["ema"], strict=True):
            ema.copy_(flat)
        self._partitions.publish()

    def precision_context(self) -> AbstractContextManager[object]:
        return autocast(self.precision, self._group.device)

    def backward(self, loss: Tensor) -> None:
        # What DeepSpeedEngine.forward would have done: without the first, ZeRO-3 keeps the last micro batch's gradients
        # and forgets the ones before. Losses call the bare module, since while a part is frozen nothing may be hooked.
        self._zero.clear_backward_seen_flag()
        self._engine._backward_prologue()
        # DeepSpeed divides by the number of ranks what the others add up.
        self._engine.backward(loss * self._group.world_size, scale_wrt_gas=False)

    def update(self, lr: float, guard: Callable[[float], Decision]) -> Decision:
        for settings in self._zero.optimizer.param_groups:
            settings["lr"] = lr
        scale = self.loss_scale()
        self._guard, self._decision, self._overflow = guard, None, False
        self._engine.step()
        self._guard = None
        assert self._decision is not None, "DeepSpeed's update did not ask for the gradient norm"
        if self._decision is not Decision.CONTINUE:
            self._forget_gradients()
            if not self._overflow:
                self._set_loss_scale(scale)  # the scale answers to overflows, not to what the guard refused
        return self._decision

    def _forget_gradients(self) -> None:
        """What DeepSpeed's way past an overflow leaves under offload in stages 1 and 2: the fp32 sums of the refused
        update, which would count in the next one."""
        if getattr(self._zero, "cpu_offload", False):
            for number in self._zero.averaged_gradients:
                self._zero.averaged_gradients[number] = None

    def _decide(self, scaled_norm: Any) -> bool:
        """Whether the update with this global norm (times the loss scale) may happen."""
        assert self._guard is not None
        invalid = bool(is_invalid_grad_norm(scaled_norm))
        norm = float("inf") if invalid else float(scaled_norm) / float(self._zero.loss_scale)
        if invalid and self.precision == "fp16" and self._zero.loss_scale > FP16_SCALE["min_loss_scale"]:
            # Too large a loss scale, not a bad gradient; it is halved. At its floor the guard is asked.
            self._decision, self._overflow = Decision.SKIP, True
        else:
            self._decision = self._guard(norm)
        return self._decision is Decision.CONTINUE

    def loss_scale(self) -> dict[str, float]:
        if self.precision != "fp16":
            return {}
        scaler = self._zero.loss_scaler
        return {name: float(getattr(scaler, name)) for name in _SCALER_STATE}

    def _set_loss_scale(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            kind = type(getattr(self._zero.loss_scaler, name))
            setattr(self._zero.loss_scaler, name, kind(value))

    def shard_view(self) -> Iterator[Interval]:
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
            yield from self._intervals(cast(Kind, kind))

    def wanted(self) -> Iterable[Interval]:
        return self.shard_view()

    def _intervals(self, kind: Kind) -> Iterator[Interval]:
        flats = self._partitions.flats if kind == "master" else self._partitions.state[kind]
        for place in self._partitions.places:
            values = flats[place.flat].detach()[place.at : place.at + place.length]
            yield Interval(f"{self._part}/{place.parameter}", kind, place.offset, values)

    def optimizer_steps(self) -> int:
        return int(self._partitions.steps[0])

    def loaded(self, optimizer_steps: int, loss_scale: dict[str, float]) -> None:
        for step in self._partitions.steps:
            step.fill_(float(optimizer_steps))
        self._set_loss_scale(loss_scale)
        self._partitions.publish()

    @contextmanager
    def weights(self, kind: Literal["master", "ema"]) -> Iterator[nn.Module]:
        # A plain module of its own: rank 0 may then draw alone, where ZeRO-3's would wait for the other ranks.
        with torch.device("meta"):
            module = self._build()
        module = module.to_empty(device=self._group.device).eval()
        for name, buffer in module.named_buffers():
            buffer.copy_(self.module.get_buffer(name))
        mine: dict[str, list[Interval]] = {}
        for interval in self._intervals(kind):
            mine.setdefault(interval.name.removeprefix(f"{self._part}/"), []).append(interval)
        for name, parameter in module.named_parameters():
            whole = torch.zeros_like(parameter).reshape(-1)
            for interval in mine.get(name, ()):
                whole[interval.offset : interval.offset + len(interval.values)] = interval.values
            # A sum with zeros is exact, so every rank gets every share to the bit.
            parameter.data = self._group.sum_(whole).view_as(parameter)
        yield module


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's settings for a run's: the loop owns accumulation, schedule, guard and logging."""
    zero: dict[str, Any] = {"stage": _stage(config)}
    if config.zero.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # required; the loader decides
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # `update` is the boundary, however many backward passes came before
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW under offload as well: nothing to compile
        "zero_allow_untested_optimizer": True,
        # bf16 accumulation: gradient error 6.3e-3 against 1.75e-3 at 32 micro batches.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": 0.0,  # the default is 1; the guard refuses, nothing here clips
        "steps_per_print": None,
    }
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}  # else an infinite norm is not a skip
    if config.precision == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 0, **FP16_SCALE}
    return settings


def _stage(config: TrainConfig) -> int:
    if config.precision == "bf16" and config.zero.stage == 1:
        # With fp32 accumulation DeepSpeed runs bf16 stage 1 in another class, without what is used here.
        log.info("bf16 with ZeRO stage 1 runs as stage 2: gradients are spread over ranks as well")
        return 2
    return config.zero.stage


def _prepare_deepspeed(config: TrainConfig, group: Group) -> None:
    if config.precision == "fp16" and not deepspeed.get_accelerator().is_fp16_supported():
        raise UserError("precision", "fp32 or bf16 on this device", "fp16", "choose one of them")
    # Else the first start on a CPU compiles an extension, and a kill meanwhile leaves a lock that hangs the next.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ERROR: it calls a refusal by the guard an overflow. The loop says what was skipped, and why.
    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    # DeepSpeed calls torch by older names; nobody who trains can mend that.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    os.environ.setdefault("LOCAL_RANK", "0")
    group.ensure_process_group()


_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class _Place:
    """Elements [offset, offset + length) of a parameter lie at [at, at + length) of this rank's flat number `flat`."""

    parameter: str
    offset: int
    length: int
    flat: int
    at: int


class _Partitions:
    """This rank's fp32 partitions in DeepSpeed's optimizer, and what lies where in them."""

    def __init__(self, zero: Any, parameters: dict[str, nn.Parameter], group: Group) -> None:
        self._zero = zero
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._is_stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
        self.flats: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self._is_stage_3 else zero.single_partition_of_fp32_groups
        )
        self.places = tuple(self._of_stage_3(group.rank) if self._is_stage_3 else self._of_stages_1_and_2(parameters))
        # Moments come into being at the first step; they are made here as zeros, so that a checkpoint of step 0 has the
        # same parts as any other and can be loaded into.
        kinds = ("exp_avg", "exp_avg_sq", "ema")
        self.state = {kind: [torch.zeros_like(flat.detach()) for flat in self.flats] for kind in kinds}
        self.steps = [torch.tensor(0.0, device=flat.device) for flat in self.flats]
        for number, flat in enumerate(self.flats):
            moments = {kind: self.state[kind][number] for kind in ("exp_avg", "exp_avg_sq")}
            zero.optimizer.state[flat] = {"step": self.steps[number], **moments}

    def _of_stages_1_and_2(self, parameters: dict[str, nn.Parameter]) -> Iterator[_Place]:
        for name, parameter in parameters.items():
            mapping = cast(Any, parameter)._hp_mapping
            if mapping is not None:  # None: no part of it is on this rank
                held, place = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield _Place(name, place.start, held.numel, mapping.param_group_index, held.start)

    def _of_stage_3(self, rank: int) -> Iterator[_Place]:
        for number, sub_group in enumerate(self._zero.fp16_groups):
            at = 0
            for parameter in sub_group:
                share = parameter.partition_numel()  # the last one is padded
                offset = rank * share
                length = min(share, parameter.ds_numel - offset)
                if length > 0:
                    yield _Place(self._names[id(parameter)], offset, length, number, at)
                at += share

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the masters into the weights that forward passes use. A collective call."""
        if not self._is_stage_3:
            self._zero.update_lp_params()
            return
        # Setting the local fp32 values alone leaves the forward pass as it was.
        self._zero._partition_all_parameters()
        for number in range(len(self.flats)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        if persistent := self._zero.persistent_parameters:
            persistent[0].all_gather(persistent)


def _ask_guard_inside(zero: Any, decide: Callable[[Any], bool]) -> None:
    """Have DeepSpeed's update ask `decide` with its global gradient norm; a refusal takes its path for overflows.

    The norm can be had before the update only of the update before. Its own overflow check is switched off: it would
    skip before anybody was asked.
    """
    zero.check_overflow = lambda *_, **__: None
    if hasattr(zero, "_get_norm_groups"):
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norm_groups = zero._get_norm_groups

        def ask_in_stage_3() -> list[Tensor]:
            norms = norm_groups()
            return norms if decide(combine_grad_norm_groups(norms)) else [torch.tensor(float("inf"))]

        zero._get_norm_groups = ask_in_stage_3
    else:
        global_norm = zero.scaled_global_norm

        def ask(*arguments: Any, **named: Any) -> Tensor:
            norm = global_norm(*arguments, **named)
            return norm if decide(norm) else torch.tensor(float("inf"))

        zero.scaled_global_norm = ask
