"""Randomness as a function of (seed, position, purpose): nothing to save, the same for any world size.

Always holds: the draws of the sample at a global position depend on nothing but the seed, that position and the purpose
they are for; so a resumed run, or one on another number of workers, sees the same noise, timesteps and masks. Called by
recipes (through the loader) and by samplers; the key mixing also serves the sample order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

U64 = np.uint64


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit words in which every input bit changes half of the output (splitmix64's finaliser)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> U64(27))) * U64(0x94D049BB133111EB)
        return values ^ (values >> U64(31))


@lru_cache(maxsize=4096)
def key64(*parts: int | str) -> int:
    """A 64-bit key of the parts, the same on every machine and in every version of Python and numpy."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch. `positions` int64 [b]: global positions of its samples."""

    seed: int
    positions: NDArray[np.int64]

    def _keys(self, purpose: str) -> NDArray[np.uint64]:
        key = U64(key64("draws", self.seed, purpose))
        return mix64(mix64(self.positions.astype(U64) + U64(1)) ^ key)

    def uniform(self, purpose: str) -> NDArray[np.float64]:
        """[b] in [0, 1), with 53 random bits."""
        return (self._keys(purpose) >> U64(11)).astype(np.float64) * 2.0**-53

    def normal(self, purpose: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """[b, *shape] standard normal, float32."""
        out = np.empty((len(self.positions), *shape), np.float32)
        # Philox is counter-based: a key is a whole independent stream, at no cost to set up.
        for row, key in zip(out, self._keys(purpose), strict=True):
            np.random.Generator(np.random.Philox(key=int(key))).standard_normal(out=row, dtype=np.float32)
        return out
