"""Guidance: pulling samples towards a caption or a class, by the network itself or by the gradient of another.

Always holds: sample i's guidance depends on sample i alone; no gradient reaches a parameter. Called by recipes and
sampling: `guided` makes a `Denoise`, the others a `Gradient` for `StepOptions`.

Legend: B batch, C channels, H W image, D features. Sources: Ho & Salimans 2022 (classifier-free guidance), Dhariwal &
Nichol 2021 (classifier guidance), GLIDE = Nichol et al. 2021, sections 2.3 and 2.4 (CLIP guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.diffusion.steps import Denoise, Gradient


def guided(
    model: Callable[..., Tensor],
    guidance_scale: float,
    conditions: Mapping[str, Tensor],
    empty: Mapping[str, Tensor],
) -> Denoise:
    """Classifier-free guidance as a `Denoise`: eps = eps(empty) + scale · (eps(conditions) - eps(empty)).

    `model(x, timesteps, **keywords)` runs once on the doubled batch, conditional half first; `conditions` and `empty`
    hold its keywords: tensors with the batch first, equal keys and shapes (an upsampler's low resolution is in both).
    Guidance acts on the first C output channels, whatever they predict (image and v are linear in eps, so the rule is
    the same); a learned variance is the conditional half's own. At scale 1 the empty half has no weight and is not
    computed. Raises ValueError when the keywords differ.
    """
    if conditions.keys() != empty.keys():
        raise ValueError(f"guidance: expected equal keywords, found {sorted(conditions)} and {sorted(empty)}")
    if guidance_scale == 1:
        return lambda x_BCHW, timesteps_B: model(x_BCHW, timesteps_B, **conditions)
    doubled = {name: torch.cat([conditions[name], empty[name]]) for name in conditions}

    def denoise(x_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        output = model(torch.cat([x_BCHW, x_BCHW]), torch.cat([timesteps_B, timesteps_B]), **doubled)
        conditional, unconditional = output.chunk(2)
        channels = x_BCHW.shape[1]
        eps_BCHW, empty_eps_BCHW = conditional[:, :channels], unconditional[:, :channels]
        guided_eps_BCHW = empty_eps_BCHW + guidance_scale * (eps_BCHW - empty_eps_BCHW)
        return torch.cat([guided_eps_BCHW, conditional[:, channels:]], dim=1)

    return denoise


def classifier_guidance(log_probability: Callable[[Tensor, Tensor], Tensor], scale: float) -> Gradient:
    """scale · gradient of log p(y | x_t) with respect to x_t.

    `log_probability` (x [B, C, H, W], original timesteps [B]) gives [B], sample i's from sample i alone, and must be
    differentiable in x.
    """

    def gradient(x_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        # Samplers run without recording, and a recorded graph must not grow over their steps.
        with torch.enable_grad():
            x_BCHW = x_BCHW.detach().requires_grad_()
            (gradient_BCHW,) = torch.autograd.grad(log_probability(x_BCHW, timesteps_B).sum(), x_BCHW)
        return scale * gradient_BCHW

    return gradient


def clip_guidance(
    image_features: Callable[[Tensor, Tensor], Tensor], text_features_BD: Tensor, logit_scale: float, scale: float
) -> Gradient:
    """scale · gradient of logit_scale · (z_text · z_image), features normalised here (GLIDE section 2.4).

    `image_features` (x [B, C, H, W], original timesteps [B]) gives [B, D]: a CLIP trained on noised images of the same
    process. `logit_scale` is the factor itself, 100 in the release, not its logarithm.
    """
    text_features_BD = normalize(text_features_BD.detach().float(), dim=-1)

    def similarity(x_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        features_BD = normalize(image_features(x_BCHW, timesteps_B).float(), dim=-1)
        return logit_scale * (text_features_BD * features_BD).sum(dim=-1)

    return classifier_guidance(similarity, scale)
