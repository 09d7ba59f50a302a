"""Which timesteps of the training process a shorter sampler visits.

Always holds: the timesteps are distinct, ascending and inside the process. Called by `gaussian.Diffusion.respaced`.
"""

from __future__ import annotations

from itertools import accumulate, chain, repeat

import numpy as np
import numpy.typing as npt

FAST27_SECTIONS = "10,10,3,2,2"


def spaced_timesteps(steps: int, spacing: str) -> npt.NDArray[np.int64]:
    """Timesteps kept of 0..steps-1, ascending: [n] int64.

    `spacing` is one of
    `"100"`: that many, evenly, both ends included (Nichol & Dhariwal 2021, section 4);
    `"10,10,3,2,2"`: the process in equal sections from the image side, that many evenly in each;
    `"ddim50"`: that many at an integer stride from 0 (Song et al. 2021, appendix D.3);
    `"fast27"`: the sections 10,10,3,2,2 of GLIDE's upsampler, with the very last timestep taken two earlier, which
    spares DDIM the artefacts of the noisiest one.

    Raises ValueError when the text is none of these or asks for more timesteps than there are.
    """
    if spacing == "fast27":
        kept = spaced_timesteps(steps, FAST27_SECTIONS)
        return np.append(kept[:-1], steps - 3)
    stride = spacing.startswith("ddim")
    try:
        counts = [int(text) for text in spacing.removeprefix("ddim").split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or (stride and len(counts) > 1):
        raise ValueError(f"respacing: expected 'N', 'N,N,…', 'ddimN' or 'fast27' with N above 0, found {spacing!r}")
    return _strided(steps, counts[0]) if stride else _sections(steps, counts)


def _strided(steps: int, count: int) -> npt.NDArray[np.int64]:
    for stride in range(1, steps + 1):
        kept = np.arange(0, steps, stride)
        if len(kept) == count:
            return kept
    raise ValueError(f"respacing ddim{count}: no integer stride takes exactly {count} of {steps} timesteps")


def _sections(steps: int, counts: list[int]) -> npt.NDArray[np.int64]:
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if count > size:
            raise ValueError(
                f"respacing: section {section} has {size} of the {steps} timesteps, found {count} asked of it"
            )
        stride = (size - 1) / max(count - 1, 1)
        # Summed and rounded half to even, as the release does: a product can round to the neighbouring timestep.
        offsets = accumulate(chain([0.0], repeat(stride, count - 1)))
        kept += [start + round(offset) for offset in offsets]
        start += size
    return np.array(kept, dtype=np.int64)
