"""Quick imports: without Python's collector, which would go through all that they make again and again.

Importing torch, Ray and our own floors takes 3.8 s of a processor with it and 3.4 s without; a start has three such
processes. Called where commands, jobs and workers import what is heavy.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """No collection inside; all that there is afterwards, even what nobody needs, is left out of later ones: for where
    a process begins."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
