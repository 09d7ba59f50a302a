"""The networks, the process and the loss against numbers computed with the public GLIDE and guided-diffusion code.

The reference folder is `$GLIDEPATH_PARITY`, or `shared/parity` beside the repository; without it every test here is
skipped. Its README says how the numbers came about. Agreement asked for: relative error below 1e-4.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.diffusion.gaussian import Diffusion
from trainer.diffusion.losses import diffusion_loss
from trainer.diffusion.respacing import spaced_timesteps
from trainer.interop.openai import load_release
from trainer.models.glide import Glide
from trainer.models.layers import timestep_embedding

FOLDER = Path(os.environ.get("GLIDEPATH_PARITY", Path(__file__).resolve().parents[2].parent / "shared" / "parity"))
TOLERANCE = 1e-4
SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
SPACINGS = ("fast27", "27", "100", "150", "250", "ddim25", "10,10,3,2,2")
COVERED = {"schedule", "respace", "timestep_embedding", "input", "base", "upsample", "diffusion", "loss"}
LOSS_TIMESTEPS = [0, 17, 500]  # found by matching `loss|mse|mse` over all timesteps; the README says t = input|t
NOT_HERE = {"tokenizer": "the tokenizer's own tests compare it; here its tokens are only inputs"}

pytestmark = pytest.mark.skipif(
    not (FOLDER / "tensors.npz").is_file(),
    reason=f"NO PARITY CHECK WAS MADE: {FOLDER}/tensors.npz is absent; set GLIDEPATH_PARITY to the reference folder",
)


@functools.cache
def reference() -> dict[str, np.ndarray[Any, Any]]:
    with np.load(FOLDER / "tensors.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def tensor(key: str) -> Tensor:
    return torch.from_numpy(reference()[key])


def assert_agrees(found: Tensor | np.ndarray[Any, Any] | float, key: str) -> None:
    expected = torch.as_tensor(reference()[key], dtype=torch.float64)
    difference = torch.as_tensor(found, dtype=torch.float64).detach() - expected
    error = (difference.norm() / expected.norm().clamp(min=1e-30)).item()
    assert error < TOLERANCE, f"{key}: relative error {error:.2e}, expected below {TOLERANCE}"


@functools.cache
def released(name: str) -> Glide:
    """The reference's weights in our network, through the public call: every key must fit."""
    arguments = json.loads((FOLDER / "config.json").read_text())["config"][name]
    model = load_release("upsample" if name == "upsample" else "base", arguments, FOLDER / f"{name}.pt")
    assert isinstance(model, Glide)
    return model


def captions() -> dict[str, Tensor]:
    return {"tokens": tensor("tokenizer|bpe|tokens"), "mask": tensor("tokenizer|bpe|mask")}


def test_every_reference_key_is_compared_or_named_as_elsewhere() -> None:
    assert {key.split("|")[0] for key in reference()} == COVERED | NOT_HERE.keys()


@pytest.mark.parametrize("name", ["base", "upsample"])
def test_our_state_dict_has_the_keys_and_shapes_of_the_release(name: str) -> None:
    theirs = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    ours = released(name).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_timestep_embedding_agrees() -> None:
    assert_agrees(timestep_embedding(torch.tensor([0, 1, 17, 999]), 32), "timestep_embedding|dim32")


def test_base_text_encoder_agrees() -> None:
    text = released("base").encode_text(**captions())
    assert_agrees(text.projection_BE, "base|xf_proj")
    assert_agrees(text.context_BLD.transpose(1, 2), "base|xf_out")


def test_base_output_agrees() -> None:
    assert_agrees(released("base")(tensor("input|x16"), tensor("input|t"), **captions()), "base|out")


def test_upsampler_output_agrees() -> None:
    output = released("upsample")(tensor("input|x32"), tensor("input|t"), low_res=tensor("input|low8"), **captions())
    assert_agrees(output, "upsample|out")


def test_tokens_behind_the_mask_do_not_matter_as_in_the_reference() -> None:
    tokens, mask = captions().values()
    first = released("base").encode_text(tokens, mask)
    second = released("base").encode_text(torch.where(mask, tokens, 7), mask)
    difference = (first.context_BLD - second.context_BLD).abs().max()
    assert difference == reference()["base|padding_token_invariance_max"] == 0


@pytest.mark.parametrize("theirs", SCHEDULES)
def test_schedule_tables_agree(theirs: str) -> None:
    process = Diffusion.from_schedule(SCHEDULES[theirs], 1000)  # type: ignore[arg-type]
    tables = [key.split("|")[2] for key in reference() if key.startswith(f"schedule|{theirs}|")]
    assert len(tables) == 8
    for table in tables:
        assert_agrees(getattr(process, table), f"schedule|{theirs}|{table}")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_respaced_timesteps_and_betas_agree(spacing: str) -> None:
    assert spaced_timesteps(1000, spacing).tolist() == reference()[f"respace|{spacing}|timesteps"].tolist()
    for theirs, ours in SCHEDULES.items():
        process = Diffusion.from_schedule(ours, 1000).respaced(spacing)  # type: ignore[arg-type]
        assert_agrees(process.betas, f"respace|{theirs}|{spacing}|betas")


def test_forward_process_and_its_posterior_agree() -> None:
    process = Diffusion.from_schedule("cosine")
    x_start, noise, t = tensor("input|x0"), tensor("input|n16"), tensor("input|t")
    noised = process.q_sample(x_start, t, noise)
    assert_agrees(noised, "diffusion|q_sample")
    posterior = process.q_posterior_mean_variance(x_start, noised, t)
    assert_agrees(posterior.mean, "diffusion|q_posterior_mean")
    assert_agrees(posterior.variance.expand_as(x_start), "diffusion|q_posterior_variance")
    assert_agrees(posterior.log_variance.expand_as(x_start), "diffusion|q_posterior_log_variance")


def test_reverse_step_agrees() -> None:
    # The README says x = input|x16; the numbers were computed at the noised image instead.
    x, t = tensor("diffusion|q_sample"), tensor("input|t")
    step = Diffusion.from_schedule("cosine").p_mean_variance(released("base")(x, t, **captions()), x, t)
    assert_agrees(step.mean, "diffusion|p_mean")
    assert_agrees(step.variance, "diffusion|p_variance")
    assert_agrees(step.log_variance, "diffusion|p_log_variance")
    assert_agrees(step.x_start, "diffusion|p_pred_xstart")


def test_hybrid_loss_and_its_gradients_agree() -> None:
    model, process = released("base"), Diffusion.from_schedule("cosine")
    x_start, noise, t = tensor("input|x0"), tensor("input|n16"), torch.tensor(LOSS_TIMESTEPS)
    noised = process.q_sample(x_start, t, noise)
    output = model(noised, t, **captions())
    terms = diffusion_loss(
        process, output, objective="hybrid", x_start_BCHW=x_start, x_BCHW=noised, noise_BCHW=noise, timesteps_B=t
    )
    for ours, theirs in (("vb", "vb"), ("mse", "mse"), ("total", "loss")):
        assert_agrees(terms[ours], f"loss|mse|{theirs}")

    model.zero_grad()
    terms["total"].mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert_agrees(torch.stack([gradient.norm() for gradient in gradients.values()]).norm(), "loss|mse|grad_norm")
    named = [key for key in reference() if key.startswith("loss|mse|grad|")]
    assert len(named) == 8
    for key in named:
        assert_agrees(gradients[key.removeprefix("loss|mse|grad|")].norm(), key)
