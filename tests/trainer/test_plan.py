"""`glidepath plan`: published counts, arithmetic that adds up, and activations against what a real run holds."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cluster.console import show
from data_pipeline.config import PRESETS, find_config, read_values
from data_pipeline.errors import UsageError
from trainer.config import Precision
from trainer.engine.group import Group
from trainer.engine.replicated import ReplicatedEngine
from trainer.models.config import GlideModelConfig
from trainer.models.glide import Glide
from trainer.models.noised_clip import NoisedClip, NoisedClipConfig
from trainer.plan.counting import CountedPart, Counter, parameter_counts
from trainer.plan.hardware import GPUS, Assumed, Cluster, named_cluster
from trainer.plan.memory import (
    FP32_BYTES,
    REDUCE_BUCKET,
    Holding,
    largest_micro_batch,
    state_bytes,
    whole_ema_bytes,
)
from trainer.plan.planning import plan
from trainer.recipes import parse_train_config

sys.path.insert(0, str(Path(__file__).parent))
from contrastive_case import config_of, share_of, trainee_of

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
    snapshot = found["host_bytes_per_gpu"]  # of a save: without offload all that the host holds
    assert snapshot == pytest.approx(found["checkpoint_bytes"] / 8, rel=1e-6)
    assert 2.9 < found["flops_train_per_image"] / found["flops_per_image"] < 3.01
    # Checkpointing computes most of the forward pass once more, never all of it.
    again = found["flops_computed_per_image"] - found["flops_train_per_image"]
    assert 0.7 < again / found["flops_per_image"] < 1
    assert found["checkpoint_bytes"] == 16 * parameters
    memory = dict(found["memory_per_gpu_bytes"])
    assert memory.pop("total") == sum(memory.values())
    assert found["evaluation_peak_bytes"] == 0, "neither held-out rows nor prompts are configured"
    assert found["micro_batch"] * found["accumulation"] * found["cluster"]["workers"] >= 512


def test_the_docs_show_what_the_plan_of_the_base_model_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    shown = re.search(r"glidepath plan glide-base-3.5b --gpu h200 --utilisation 0.5\n(.*?)```", page, re.DOTALL)
    assert shown
    show({name: value for name, value in planned("glide-base-3.5b").items() if name != "choices"}, as_json=False)
    told = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert told > {" ".join(line.split()) for line in shown[1].splitlines()} - {"…"}


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
    assert part.inference(1).flops == pytest.approx(gflops * 1e9, rel=0.01)


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


@pytest.mark.parametrize("micro_batch", [150, 900])
def test_a_contrastive_update_is_planned_with_its_second_pass_and_its_whole_batch(micro_batch: int) -> None:
    config = config_of(batch=900, micro_batch=micro_batch)
    trainee = trainee_of(config, Group())
    engine = trainee.engines["clip"]
    share = share_of(config, trainee.recipe, Group(), 0)
    (phase,) = trainee.recipe.phases()
    assert isinstance(engine, ReplicatedEngine) and phase.accumulate is not None
    given = [tensor for micro in share for tensor in micro.batch.values()]
    with Counter([*engine.module.parameters(), engine._gradient, *given]) as counter:
        phase.accumulate(trainee, phase, share, 0)

    found = plan(config)
    assert found["flops_computed_per_image"] == counter.flops // 900
    beside = found["flops_computed_per_image"] - found["flops_train_per_image"]
    # Six products of all directions with all others, two for the losses and four for the gradients.
    products = 6 * 2 * 900 * config.model.embedding
    assert beside - products == pytest.approx(found["flops_per_image"] * (1 - micro_batch / 900), abs=1)
    # Kernels' own working memory is not in either; the update's float64 values per sample are in the real one only.
    assert found["memory_per_gpu_bytes"]["activations"] == pytest.approx(counter.peak_bytes, rel=0.03)


def test_whole_ema_weights_for_evaluation_are_what_the_engine_really_adds() -> None:
    engine = ReplicatedEngine("clip", (module := NoisedClip(config_of().model)), config_of(), Group())
    parameters = parameter_counts(module)["total"]
    with Counter([*module.parameters()]) as counter, engine.weights("ema"):
        assert counter.live_bytes == whole_ema_bytes(parameters, Holding(0, 1, "fp32")) == 8 * parameters


def test_evaluation_counts_where_it_is_configured_and_must_fit() -> None:
    values = read_values(find_config("train", "demo-base"), ("precision=bf16", "zero.stage=2"))
    config = parse_train_config(values, "demo-base")
    found = plan(config)
    training, evaluation = found["memory_per_gpu_bytes"], found["evaluation_peak_bytes"]
    states = training["total"] - training["activations"]
    # A float32 network beside the state, and what a forward pass of it needs.
    assert 0 < evaluation - states - 4 * found["parameters"]["total"] < 100e6
    assert found["fits"] and training["total"] < evaluation

    between = replace(GPUS["h200"], memory_bytes=(training["total"] + evaluation) // 2)
    tight = plan(config, Cluster(between, Assumed(memory_share=1.0)))
    assert tight["memory_per_gpu_bytes"] == training
    assert not tight["fits"] and tight["largest_micro_batch"] == 0


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
    # Stage 2 gathers low-precision gradients as they are, stage 3 as float32: the part of its buffer that a small model
    # leaves empty is twice as large.
    empty = max(REDUCE_BUCKET - parameters, 0) if precision != "fp32" and stage == 2 else 0
    assert sum(higher[kind] for kind in STATES) <= sum(lower[kind] for kind in STATES) + 2 * empty


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
