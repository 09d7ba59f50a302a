"""Counting what a network costs, by running it without memory: parameters, FLOPs and activation bytes.

Always holds: nothing is guessed from a formula about the architecture. The network that training would build runs
forward and backward on the meta device (shapes and dtypes only), with attention in its fused form, which keeps what the
GPU's keeps. Called by `plan` and `benchmarks/gpu.py`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from trainer.config import Precision
from trainer.models import glide

if TYPE_CHECKING:
    from trainer.recipes.recipe import BatchWide

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Measurable(Protocol):
    """What a network must offer to be planned, beside `nn.Module`."""

    def example_inputs(self, batch: int) -> Mapping[str, Tensor]:
        """Made-up keywords of `forward` for `batch` images, on torch's default device."""


@runtime_checkable
class Counted(Protocol):
    """A network that divides its parameters itself."""

    def parameter_counts(self) -> dict[str, int]:
        """{"total", "text", "visual"}."""


@dataclass(frozen=True)
class Cost:
    """Of one forward and backward pass. FLOPs per image, two per multiply-add; bytes of a whole micro batch.

    `saved_bytes`: alive between forward and backward; `activation_bytes`: most alive at any time, beyond weights and
    accumulated gradients.
    """

    forward_flops: int
    total_flops: int
    saved_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class BatchCost:
    """Of what an update computes once for its whole batch, on one rank: FLOPs; bytes that live on through its backward
    passes, and the most that are alive before them."""

    flops: int
    lasting_bytes: int
    highest_bytes: int


def batch_cost(update: BatchWide, batch: int, share: int) -> BatchCost:
    """Counted on the meta device, for `share` of `batch` samples on this rank."""
    counter = Counter([])
    with torch.device("meta"), counter:
        lasting = update.rehearse(batch, share)
        lasting_bytes = counter.live_bytes
    del lasting
    return BatchCost(counter.flops, lasting_bytes, counter.peak_bytes)


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """{"total", "text", "visual"} of a network, each parameter once; works on fake and meta tensors."""
    if isinstance(module, Counted):
        return module.parameter_counts()
    return glide.parameter_counts(module)


class CountedPart:
    """One network of a recipe on the meta device; costs are counted once each and kept."""

    def __init__(self, build: Callable[[], nn.Module], precision: Precision) -> None:
        self._dtype = DTYPES[precision]
        with torch.device("meta"):
            # Low-precision weights instead of autocast, which the meta device refuses.
            self.module = build().to(self._dtype)
        self._costs: dict[tuple[int, bool], Cost] = {}

    @property
    def can_checkpoint(self) -> bool:
        return hasattr(self.module, "activation_checkpointing")

    def cost(self, micro_batch: int, checkpointing: bool) -> Cost:
        """Of a forward and backward pass."""
        if (micro_batch, checkpointing) not in self._costs:
            if self.can_checkpoint:
                cast(Any, self.module).activation_checkpointing = checkpointing
            with _on_meta():
                self._costs[micro_batch, checkpointing] = run_counted(
                    self.module, self._inputs(micro_batch), micro_batch
                )
        return self._costs[micro_batch, checkpointing]

    def inference(self, batch: int) -> Counter:
        """What a forward pass without a graph needs: FLOPs and most bytes, weights aside, of the whole batch."""
        with _on_meta(), torch.no_grad():
            inputs = self._inputs(batch)
            counter = Counter([*self.module.parameters(), *self.module.buffers(), *inputs.values()])
            with counter:
                self.module(**inputs)
        return counter

    def _inputs(self, batch: int) -> dict[str, Tensor]:
        inputs = cast(Measurable, self.module).example_inputs(batch)
        return {name: self._as_weights(values) for name, values in inputs.items()}

    def _as_weights(self, values: Tensor) -> Tensor:
        return values.to(self._dtype) if values.is_floating_point() else values


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"), patch.object(F, "scaled_dot_product_attention", _fused_attention):
        yield


def run_counted(module: nn.Module, inputs: Mapping[str, Tensor], micro_batch: int) -> Cost:
    """Run forward and backward, counting, on any device; gradients are dropped as they are finished."""
    counter = Counter([*module.parameters(), *module.buffers(), *inputs.values()])
    drops = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in module.parameters()]
    try:
        with counter:
            outputs = module(**inputs)
            forward, saved = counter.flops, counter.live_bytes
            scalar = torch.stack([output.float().sum() for output in tree_leaves(outputs)]).sum()
            del outputs
            scalar.backward()
    finally:
        for drop in drops:
            drop.remove()
    return Cost(forward // micro_batch, counter.flops // micro_batch, saved, counter.peak_bytes)


class Counter(TorchDispatchMode):
    """FLOPs of all operators; bytes of all storages that they made and that are alive, and the highest sum of these."""

    def __init__(self, known: list[Tensor]) -> None:
        """`known`: tensors whose storages do not count."""
        super().__init__()
        self.flops = self.live_bytes = self.peak_bytes = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}
        self._results: dict[Any, Any] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self._run(operator, args, kwargs)
        if formula := _FLOPS.get(operator.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in _tensors(result):
            self._meet(tensor.untyped_storage())
        return result

    def _run(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """The operator's result; on the meta device remembered by the shapes of its arguments, since most blocks of a
        network are alike and torch computes many shapes in Python."""
        if not _makes_new_tensors(operator):
            return operator(*args, **kwargs)
        key = (operator, _looks(args), _looks(tuple(kwargs.items())))
        if key not in self._results:
            result = operator(*args, **kwargs)
            if any(not tensor.is_meta for tensor in _tensors(result)):
                return result
            self._results[key] = _looks(result)
        return _like(self._results[key])

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._alive:
            return
        self._alive.add(storage._cdata)
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._lose, storage._cdata, storage.nbytes())

    def _lose(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.live_bytes -= size


@functools.cache
def _makes_new_tensors(operator: Any) -> bool:
    schema = operator._schema
    aliased = any(value.alias_info is not None for value in (*schema.arguments, *schema.returns))
    return not aliased and all(str(value.type) == "Tensor" for value in schema.returns)


def _looks(value: Any) -> Any:
    """What of a value a shape computation can depend on; hashable."""
    if isinstance(value, Tensor):
        return _Look(value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, (tuple, list)):
        return tuple(_looks(item) for item in value)
    return _Constant(type(value), value)


def _like(look: Any) -> Any:
    if isinstance(look, _Look):
        return torch.empty_strided(look.shape, look.stride, dtype=look.dtype, device="meta")
    return look.value if isinstance(look, _Constant) else tuple(_like(item) for item in look)


def _tensors(result: Any) -> list[Tensor]:
    return [value for value in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(value, Tensor)]


class _Constant(NamedTuple):
    kind: type  # 1, 1.0 and True are equal to a dictionary
    value: Any


class _Look(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _drop_gradient(parameter: Tensor) -> None:
    # Engines add a finished gradient to a store of their own, which the plan counts as `gradients`.
    parameter.grad = None


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """torch's fused attention of the CPU, which has shapes for the meta device; by itself that one falls back to the
    products written out, whose scores would count as activations."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> int:
    # Four products, twice the forward's two. The kernel computes the scores again; model FLOPs leave that out.
    return 2 * sdpa_flop_count(query.shape, key.shape, value.shape)


# torch's formulas, without its FlopCounterMode, which tries to take every operator apart and is five times slower.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
