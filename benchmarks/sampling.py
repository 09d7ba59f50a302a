"""P9: sampling with classifier-free guidance by Glidepath against a plain sampler, same steps, same images.

    python -m benchmarks.sampling [--repetitions 5] [--size small|tiny] [--steps 10]

The plain network computes as the public code does (see `plain_glide`), and so encodes both captions again at every
step; ours encodes them once. The reverse steps are the same code. Target: at least 1.5.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measuring import TINY, filled_glide, interleaved, ratio, write_result
from benchmarks.plain_glide import plain
from trainer.diffusion.gaussian import Diffusion
from trainer.diffusion.guidance import guided
from trainer.diffusion.samplers import sample
from trainer.models.config import GlideModelConfig
from trainer.models.glide import Glide

TARGET = 1.5
GUIDANCE = 3.0
IMAGES = 2
LEVEL = 2 / 255  # of 8 bits on [-1, 1]
SIZES = {
    # The released base model at a third of its width, its caption encoder in proportion.
    "small": GlideModelConfig(
        image_size=64,
        channels=64,
        res_blocks=2,
        channel_mult=(1, 2, 3, 4),
        attention_resolutions=(32, 16, 8),
        text_context=128,
        text_width=192,
        text_layers=16,
        text_heads=3,
    ),
    "tiny": TINY,
}


def captions(config: GlideModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(50257, (IMAGES, config.text_context), generator=generator)
    return {"tokens": tokens, "mask": torch.arange(config.text_context).expand(IMAGES, -1) < 12}


def our_sampler(model: Glide, process: Diffusion, start: Tensor) -> Callable[[], Tensor]:
    given = captions(model.config)

    @torch.no_grad()
    def draw() -> Tensor:
        captioned = model.encode_text(**given)._asdict()
        empty = model.encode_text(given["tokens"], torch.zeros_like(given["mask"]))._asdict()
        return sample("ddim", guided(model.denoise, GUIDANCE, captioned, empty), process, start)

    return draw


def plain_sampler(
    model: nn.Module, process: Diffusion, start: Tensor, given: dict[str, Tensor]
) -> Callable[[], Tensor]:
    empty = {**given, "mask": torch.zeros_like(given["mask"])}

    @torch.no_grad()
    def draw() -> Tensor:
        return sample("ddim", guided(model, GUIDANCE, given, empty), process, start)

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    config = SIZES[arguments.size]
    # Not cosine: its first step divides by the signal left at t = 999 and so multiplies rounding errors by 20,000.
    process = Diffusion.from_schedule("linear").respaced(str(arguments.steps))
    side = config.image_size
    start = torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(2))
    model = filled_glide(config).eval()
    draws = {
        "plain": plain_sampler(plain(model).eval(), process, start, captions(config)),
        "glidepath": our_sampler(model, process, start),
    }
    images: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[], None]:
        return lambda: images.update({name: draws[name]()})

    seconds = interleaved({name: keep(name) for name in draws}, arguments.repetitions)
    difference = (images["plain"] - images["glidepath"]).abs().max().item()
    assert difference < LEVEL, f"the images differ by up to {difference:.1e} on [-1, 1]"
    found = ratio(seconds, "plain", "glidepath")
    print(f"images differ by at most {difference:.1e} on [-1, 1]; {found:.2f}x  (target {TARGET})")
    write_result(
        f"sampling{'' if arguments.size == 'small' else f'_{arguments.size}'}",
        {
            "model": config.model_dump(mode="json"),
            "images": IMAGES,
            "steps": arguments.steps,
            "guidance_scale": GUIDANCE,
            "seconds": seconds,
            "largest_difference": difference,
            "speed_against_plain": found,
            "target": TARGET,
        },
    )


if __name__ == "__main__":
    main()
