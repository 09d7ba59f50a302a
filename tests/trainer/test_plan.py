"""`glidepath plan`: published counts, arithmetic that adds up, and activations against what a real run holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from data_pipeline.config import PRESETS, find_config, read_values
from data_pipeline.errors import UsageError
from trainer.config import Precision
from trainer.models.config import GlideModelConfig
from trainer.models.glide import Glide
from trainer.models.noised_clip import NoisedClip, NoisedClipConfig
from trainer.plan.counting import CountedPart, parameter_counts
from trainer.plan.hardware import GPUS, Cluster, named_cluster
from trainer.plan.memory import FP32_BYTES, Holding, largest_micro_batch, state_bytes
from trainer.plan.planning import plan
from trainer.recipes import parse_train_config

SMALL: dict[str, Any] = {
    "image_size": 32,
    "channels": 32,
    "res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (16,),
    "head_channels": 16,
    "text_context": 16,
    "text_width": 32,
    "text_layers": 2,
    "text_heads": 2,
}


def planned(preset: str, *overrides: str, gpu: str = "h200") -> dict[str, Any]:
    values = read_values(find_config("train", preset), overrides)
    return plan(parse_train_config(values, preset), Cluster(GPUS[gpu]))


@pytest.mark.parametrize(
    ("preset", "parameters", "gflops"),
    [("glide-base-3.5b", 3_554_414_086, 1858), ("glide-upsampler-1.5b", 1_540_932_998, 5096)],
)
def test_the_paper_s_models_are_planned_with_their_published_size(preset: str, parameters: int, gflops: int) -> None:
    found = planned(preset)
    assert found["parameters"]["total"] == parameters == sum(found["parameters"][kind] for kind in ("text", "visual"))
    assert found["flops_per_image"] == pytest.approx(gflops * 1e9, rel=0.01)
    assert 2.9 < found["flops_train_per_image"] / found["flops_per_image"] < 3.01
    # Checkpointing computes most of the forward pass once more, never all of it.
    again = found["flops_computed_per_image"] - found["flops_train_per_image"]
    assert 0.7 < again / found["flops_per_image"] < 1
    assert found["checkpoint_bytes"] == 16 * parameters
    memory = dict(found["memory_per_gpu_bytes"])
    assert memory.pop("total") == sum(memory.values())
    assert found["micro_batch"] * found["accumulation"] * found["cluster"]["workers"] >= 512


@pytest.mark.parametrize(
    ("size", "changes", "parameters", "gflops"),
    [
        ("glide-upsampler-1.5b", {"text_layers": 24}, 1_641_702_790, 5123),
        ("glide-base-released", {}, 385_030_726, 238),
        ("glide-upsampler-released", {}, 398_361_286, 1281),
        ("glide-base-released", {"inpaint": True}, 385_037_638, 238),
    ],
)
def test_forward_flops_are_those_of_the_public_code(
    size: str, changes: dict[str, Any], parameters: int, gflops: int
) -> None:
    config = GlideModelConfig(**{**read_values(PRESETS / "model" / f"{size}.yaml")["model"], **changes})
    part = CountedPart(lambda: Glide(config), "bf16")
    assert parameter_counts(part.module)["total"] == parameters
    assert part.cost(1, checkpointing=False).forward_flops == pytest.approx(gflops * 1e9, rel=0.01)


def test_a_size_in_no_table_is_counted_as_the_published_ones_predict() -> None:
    # Without the caption's projections the U-Net has a·c² + b·c + 6 parameters; the published 192 and 512 give a and b.
    unet = 7999 * 320**2 + 1361 * 320 + 6
    caption_projections = 140_577_792 * 320 // 512
    text = 1_316_249_600 - (2048 + 1) * 4 * (512 - 320)
    values = read_values(find_config("train", "glide-base-3.5b"), ("model.channels=320",))
    part = CountedPart(lambda: Glide(GlideModelConfig(**values["model"])), "bf16")
    assert parameter_counts(part.module)["total"] == unet + caption_projections + text == 2_222_070_214


def test_the_clip_of_the_release_is_counted_by_its_own_division() -> None:
    with torch.device("meta"):
        model = NoisedClip(NoisedClipConfig())
    assert parameter_counts(model) == {"total": 158_123_264, "text": 71_679_488, "visual": 86_443_776}
    cost = CountedPart(lambda: NoisedClip(NoisedClipConfig()), "bf16").cost(2, checkpointing=False)
    # Two per weight and position, of the projections alone: 257 patches and 77 tokens.
    assert cost.forward_flops > 2 * 85e6 * 257


@pytest.mark.parametrize("changes", [{}, {"low_resolution": 16}, {"inpaint": True}], ids=str)
def test_counted_activations_are_those_of_a_real_run(changes: dict[str, Any]) -> None:
    def build() -> nn.Module:
        return Glide(GlideModelConfig(**SMALL, **changes), dropout=0.1)

    estimate = CountedPart(build, "fp32").cost(4, checkpointing=False)
    model = build()
    inputs = model.example_inputs(4)  # type: ignore[operator]
    assert estimate.saved_bytes == pytest.approx(really_saved(model, inputs), rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_highest_sum_of_living_tensors_is_close_to_the_allocator_s(checkpointing: bool, one_thread: None) -> None:
    def build() -> nn.Module:
        return Glide(GlideModelConfig(**SMALL))

    estimate = CountedPart(build, "fp32").cost(8, checkpointing)
    model = build()
    model.activation_checkpointing = checkpointing  # type: ignore[assignment]
    # Kernels need working memory beside the tensors, here an eighth at the most.
    assert 0.97 < highest_allocation(model, 8) / estimate.activation_bytes < 1.2


def really_saved(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, weights and inputs aside."""
    kept: dict[int, Tensor] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *inputs.values())}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**inputs)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in known)


def highest_allocation(model: nn.Module, batch: int) -> int:
    """The allocator's highest sum over a forward and backward pass, by torch's profiler."""

    def step() -> None:
        inputs = model.example_inputs(batch)  # type: ignore[operator]
        model(**inputs).sum().backward()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    now = highest = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


precisions: st.SearchStrategy[Precision] = st.sampled_from(("fp32", "bf16", "fp16"))
sizes = st.integers(1, 10**10)
STATES = ("optimizer", "ema", "gradients")


@given(
    parameters=sizes, workers=st.integers(1, 512), stage=st.integers(0, 3), precision=precisions, offload=st.booleans()
)
def test_more_workers_never_need_more_memory_each(
    parameters: int, workers: int, stage: int, precision: Precision, offload: bool
) -> None:
    fewer = state_bytes(parameters, Holding(stage, workers, precision, offload))
    more = state_bytes(parameters, Holding(stage, workers + 1, precision, offload))
    assert all(more.gpu[kind] <= fewer.gpu[kind] and more.host[kind] <= fewer.host[kind] for kind in fewer.gpu)


@given(
    parameters=sizes, workers=st.integers(1, 512), stage=st.integers(1, 2), precision=precisions, offload=st.booleans()
)
def test_a_higher_stage_never_holds_more_state(
    parameters: int, workers: int, stage: int, precision: Precision, offload: bool
) -> None:
    lower = state_bytes(parameters, Holding(stage, workers, precision, offload)).gpu
    higher = state_bytes(parameters, Holding(stage + 1, workers, precision, offload)).gpu
    # Low-precision gradients are cast for the sum over ranks from stage 2 on; that buffer does not grow with the model.
    cast = 2 * 500_000_000 if precision == "fp16" and stage == 1 else 0
    assert sum(higher[kind] for kind in STATES) <= sum(lower[kind] for kind in STATES) + cast


@given(parameters=sizes, workers=st.integers(1, 512), stage=st.integers(1, 3), precision=precisions)
def test_offload_moves_state_to_the_host_and_loses_none(
    parameters: int, workers: int, stage: int, precision: Precision
) -> None:
    kept = state_bytes(parameters, Holding(stage, workers, precision))
    moved = state_bytes(parameters, Holding(stage, workers, precision, offload=True))
    assert sum(moved.gpu.values()) + sum(moved.host.values()) == sum(kept.gpu.values())
    assert moved.gpu["optimizer"] == moved.gpu["ema"] == 0


@given(parameters=sizes, workers=st.integers(1, 512))
def test_all_ranks_together_hold_masters_moments_and_ema_once(parameters: int, workers: int) -> None:
    held = state_bytes(parameters, Holding(2, workers, "bf16")).gpu
    whole = 4 * FP32_BYTES * parameters
    assert whole <= workers * (held["optimizer"] + held["ema"]) < whole + 4 * FP32_BYTES * workers


@given(per_image=st.integers(1, 10**9), state=st.integers(0, 10**11), memory=st.integers(0, 10**11))
def test_the_largest_micro_batch_fits_and_the_next_does_not(per_image: int, state: int, memory: int) -> None:
    found = largest_micro_batch(lambda images: state + per_image * images, memory, 64)
    assert found == 0 or state + per_image * found <= memory
    assert found == 64 or state + per_image * (found + 1) > memory


def test_a_smaller_gpu_holds_less_and_is_slower() -> None:
    settings = ("precision=bf16", "zero.stage=2", "batch=10000000", "images=10000000", "launcher.workers=8")
    large, small = (planned("demo-upsampler", *settings, gpu=gpu) for gpu in ("h200", "a100-40"))
    assert 0 < small["largest_micro_batch"] < large["largest_micro_batch"]
    assert small["gpu_days"] == pytest.approx(large["gpu_days"] * 989 / 312)
    assert small["memory_per_gpu_bytes"] == large["memory_per_gpu_bytes"]
    rows = {(row["workers"], row["zero_stage"], row["checkpointing"]): row for row in large["choices"]}
    assert rows[8, 2, False]["largest_micro_batch"] == large["largest_micro_batch"]
    assert rows[8, 2, True]["activations_gib"] <= rows[8, 2, False]["activations_gib"]
    assert {stage for _, stage, _ in rows} == {0, 2, 3}  # bf16's stage 1 runs as stage 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("v100", 0.5, 1.0), "--gpu: expected one of .*h200.*, found 'v100'"),
        (("h200", 1.5, 1.0), "--utilisation: expected a share above 0, at most 1, found 1.5"),
        (("h200", 0.5, 0.0), "--upload: expected GB/s above 0"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(arguments: tuple[str, float, float], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        named_cluster(*arguments)
