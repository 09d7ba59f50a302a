"""Editing a given image: keeping known pixels, and starting the process from the image instead of noise.

Always holds: images are float32 in [-1, 1], masks 1 where the image is known. Called by recipes and sampling.

Legend: B batch, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trainer.diffusion.gaussian import Diffusion
from trainer.diffusion.steps import timesteps


def pinned(known_BCHW: Tensor, mask_B1HW: Tensor) -> Callable[[Tensor], Tensor]:
    """A `process_x_start` for inpainting that puts the known pixels into every predicted image.

    The last step returns the predicted image, so known pixels come out exactly equal. A gradient moves it once more;
    apply the returned function to the result then. Raises ValueError when the sizes differ.
    """
    if mask_B1HW.shape != (len(known_BCHW), 1, *known_BCHW.shape[2:]):
        raise ValueError(
            f"mask: expected the image's {tuple(known_BCHW.shape)} with one channel, found {tuple(mask_B1HW.shape)}"
        )
    return lambda x_start_BCHW: x_start_BCHW * (1 - mask_B1HW) + known_BCHW * mask_B1HW


def sdedit_start(diffusion: Diffusion, image_BCHW: Tensor, strength: float, noise_BCHW: Tensor) -> tuple[Tensor, int]:
    """Where an edit of `image_BCHW` starts: the sample, and the `start_index` that samplers take (Meng et al. 2021).

    `strength` is the part of the process's time, not of its steps, so it means the same for every respacing: the steps
    below strength · (last timestep + 1) are run on the image noised to the highest of them. 0 runs none and gives the
    image back (index -1); 1 starts from the noise alone, exactly as without an image. Raises ValueError outside 0..1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: expected 0 (the image itself) to 1 (noise alone), found {strength}")
    if strength == 1:
        return noise_BCHW, diffusion.steps - 1
    end = strength * (diffusion.timestep_map[-1] + 1)
    index = int((diffusion.timestep_map < end).sum()) - 1
    if index < 0:
        return image_BCHW, -1
    return diffusion.q_sample(image_BCHW, timesteps(image_BCHW, index), noise_BCHW), index
