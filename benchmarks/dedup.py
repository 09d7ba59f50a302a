"""Dedup measured: planted copies of real photographs; ten million hashes; a corpus of 1e9 rows as its driver sees it.

    python -m benchmarks.dedup photographs --corpus FOLDER [--pictures 2000]
    python -m benchmarks.dedup hashes [--rows 10000000] [--task-rows 1048576]
    python -m benchmarks.dedup scale [--rows 1000000000] [--shards 100000]

`photographs`: recall of each kind of copy at each distance, and how near different photographs come (json and PNG).
`hashes`: the judge pass itself over verdict tables of made-up rows, with planted near pairs; every planted pair within
the distance must be broken up. `scale`: what runs in the driver at the real size, on made-up answers of the tasks.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from benchmarks.measuring import RESULTS, write_result
from data_pipeline import images
from data_pipeline.dedup import choose_bands
from data_pipeline.draws import mix64
from data_pipeline.executor import InlineExecutor
from data_pipeline.judge import judge
from data_pipeline.judge_rows import JudgeSettings
from data_pipeline.perceptual_hash import perceptual_hash
from data_pipeline.score import verdicts_key
from data_pipeline.storage import LocalStore

Hashes = NDArray[np.uint64]
DISTANCES = (0, 2, 4, 6, 8, 10, 12)


# --- photographs ------------------------------------------------------------------------------------------------------


def photographs(corpus: Path, most: int) -> dict[str, Any]:
    """Hash each photograph and its copies; what is found within each distance."""
    hashes: dict[str, list[int]] = {}
    pictures = _photographs_of(corpus)
    chosen = pictures[:: max(1, len(pictures) // most)][:most]
    for data in chosen:
        for kind, copy in _copies(data):
            hashes.setdefault(kind, []).append(_hash_of(copy))
    found = {kind: np.array(values, np.uint64) for kind, values in hashes.items()}
    original = found.pop("original")
    between = np.concatenate([np.bitwise_count(original[i] ^ original[:i]) for i in range(1, len(original))])
    bits = {kind: np.bitwise_count(original ^ copies) for kind, copies in found.items()}
    _plot(bits, between, RESULTS / "dedup_distances.png")
    recall = {kind: {str(d): round(float((b <= d).mean()), 4) for d in DISTANCES} for kind, b in bits.items()}
    for kind, shares in recall.items():
        print(f"{kind:<22}" + "  ".join(f"{d}: {share:.3f}" for d, share in shares.items()), flush=True)
    near = {str(d): int((between <= d).sum()) for d in (*DISTANCES, 14, 16)}
    print("pairs of different photographs:", near)
    return {
        "photographs": len(chosen),
        "without_hash": int((original == 0).sum()),
        "recall_by_distance": recall,
        "pairs_of_different_photographs": {"all": len(between), "within": near},
        "chance_neighbours_of_a_picture": {
            f"{rows:.0e}": {str(d): chance_neighbours(rows, d) for d in DISTANCES} for rows in (1e6, 1e8, 1e9)
        },
    }


def chance_neighbours(rows: float, distance: int) -> float:
    """Others within the distance if all hashes with 32 bits set, one of them that of the mean, were equally likely."""
    from math import comb

    ways = sum(comb(31, half) * comb(32, half) for half in range(distance // 2 + 1))
    return float(f"{rows * ways / comb(63, 31):.2g}")


def _photographs_of(corpus: Path) -> list[bytes]:
    found = []
    for path in sorted(corpus.rglob("*.tar")):
        with tarfile.open(path) as tar:
            files = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")]
            found += [file.read() for file in files if file is not None]
    return found


def _hash_of(data: bytes) -> int:
    square = images.centre_crop(images.decode(data, 512))
    return perceptual_hash(images.area_resize(square, 64))


def _copies(data: bytes) -> Iterator[tuple[str, bytes]]:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = picture.size

    def saved(altered: Image.Image, **options: Any) -> bytes:
        sink = io.BytesIO()
        given: dict[str, Any] = {"format": "JPEG", "quality": 90} | options
        altered.save(sink, **given)
        return sink.getvalue()

    yield "original", data
    for percent in (50, 75, 150, 200):
        size = (width * percent // 100, height * percent // 100)
        yield f"resized {percent}%", saved(picture.resize(size, Image.Resampling.LANCZOS))
    for quality in (30, 50, 70, 90):
        yield f"JPEG quality {quality}", saved(picture, quality=quality)
    yield "PNG", saved(picture, format="PNG")
    yield "WebP quality 75", saved(picture, format="WEBP", quality=75)
    for percent in (2, 5, 10):
        dx, dy = width * percent // 200, height * percent // 200
        yield f"cropped {percent}%", saved(picture.crop((dx, dy, width - dx, height - dy)))
    yield "brightness 110%", saved(ImageEnhance.Brightness(picture).enhance(1.1))
    yield "contrast 90%", saved(ImageEnhance.Contrast(picture).enhance(0.9))
    yield "saturation 70%", saved(ImageEnhance.Color(picture).enhance(0.7))
    yield "grey", saved(picture.convert("L"))
    yield "mirrored (kept)", saved(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def _plot(bits: dict[str, NDArray[Any]], between: NDArray[Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {
        "resized, recompressed, recoloured": [b for kind, b in bits.items() if not kind.startswith(("crop", "mirror"))],
        "cropped 5%": [bits["cropped 5%"]],
        "mirrored": [bits["mirrored (kept)"]],
        "different photographs": [between],
    }
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    edges = np.arange(-0.5, 65.5)
    for name, values in groups.items():
        together = np.concatenate(values)
        axes.hist(together, edges.tolist(), weights=np.full(len(together), 1 / len(together)), alpha=0.55, label=name)
    axes.set(xlabel="bits that differ, of 64 (always an even number)", ylabel="share of pairs (log)")
    axes.set(yscale="log", xlim=(-1, 60))
    axes.set_title("Perceptual hashes of copies and of different photographs")
    axes.legend(loc=(0.2, 0.74), fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


# --- hashes -----------------------------------------------------------------------------------------------------------


def hashes(rows: int, task_rows: int, workers: int, near: int, unit_rows: int = 200_000) -> dict[str, Any]:
    """Judge `rows` made-up rows. Every hundredth is a planted copy, one to eight bits from the row before it."""
    with tempfile.TemporaryDirectory(prefix="dedup-") as folder, InlineExecutor(workers) as executor:
        store = LocalStore(Path(folder))
        starts = range(0, rows, unit_rows)
        with InlineExecutor(workers) as writers:
            written = list(writers.map(partial(_write_unit, store, rows, unit_rows), starts))
        scored = {start: {"out": out, "verdicts": [{"rows": out, "sha256": sha256}]} for start, out, sha256 in written}
        timed = _Timed(executor)
        settings = JudgeSettings(exact="pair", near=near)
        began = time.perf_counter()
        prefixes = [f"{start}/" for start in starts]
        keep = judge(store, prefixes, [scored[start] for start in starts], settings, timed, task_rows=task_rows)
        took = time.perf_counter() - began
        driver_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        kept = np.concatenate([part["id"] for part in keep.slices(2**20)])
        dropped = dict(keep.dropped)
        weighed = _weighed(executor, workers)
    missed, within = _missed(rows, kept, near)
    document = {
        "rows": rows,
        "tasks": -(-rows // task_rows),
        "task_rows": task_rows,
        "workers": workers,
        "distance": near,
        "agreeing_blocks": choose_bands(near, rows).agreeing,
        "planted_within": within,
        "missed": missed,
        "recall": 1 - missed / within,
        "dropped": dropped,
        "dropped_beyond_planted": dropped.get("near_duplicate", 0) - within,
        "expected_by_chance": round(rows**2 / 2 * _ball(near) / 2**64, 1),
        "seconds": round(took, 1),
        "seconds_by_step": {name: round(seconds, 1) for name, seconds in timed.seconds.items()},
        "cpu_seconds": round(sum(cpu_s for _, cpu_s in weighed.values()) - timed.cpu_s, 1),
        "peak_task_rss_mib": max(mib for mib, _ in weighed.values()),
        "worker_rss_before_mib": timed.before_mib,
        "driver_rss_mib": driver_mib,
    }
    print(document)
    return document


class _Timed:
    """An executor that notes how long each function took, and what a worker weighs before the first."""

    def __init__(self, executor: InlineExecutor) -> None:
        self.executor = executor
        self.seconds: dict[str, float] = {}
        weighed = _weighed(executor, executor.workers)
        self.before_mib = max(mib for mib, _ in weighed.values())
        self.cpu_s = sum(cpu_s for _, cpu_s in weighed.values())

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        began = time.perf_counter()
        yield from self.executor.map(function, items)
        name = getattr(function, "func", function).__name__.strip("_")
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def _weighed(executor: InlineExecutor, workers: int) -> dict[int, tuple[int, float]]:
    """Peak memory in MiB and processor seconds so far of each worker, by process id."""
    return dict(executor.map(_weigh, range(8 * workers)))


def _weigh(_: int) -> tuple[int, tuple[int, float]]:
    time.sleep(0.1)  # so that each worker takes some
    used = resource.getrusage(resource.RUSAGE_SELF)
    return os.getpid(), (used.ru_maxrss // 1024, used.ru_utime + used.ru_stime)


def made_up(numbers: NDArray[np.uint64]) -> tuple[Hashes, Hashes]:
    """(id, perceptual hash) of rows by number: a function of the number, so that nothing needs to be kept."""
    hashes_ = mix64(numbers + np.uint64(1))
    copies = numbers % np.uint64(100) == 99
    flips = mix64(numbers[copies] ^ np.uint64(77))
    bits = np.zeros(copies.sum(), np.uint64)
    for place in range(8):
        on = np.uint64(place) < flips % np.uint64(8) + np.uint64(1)
        # Eight places in eight different bytes, so that exactly so many bits differ.
        bits |= on.astype(np.uint64) << (np.uint64(8 * place) + (flips >> np.uint64(8 + 3 * place)) % np.uint64(8))
    hashes_[copies] = mix64(numbers[copies]) ^ bits
    return mix64(numbers ^ np.uint64(2**40)), hashes_


def _write_unit(store: LocalStore, rows: int, unit_rows: int, start: int) -> tuple[int, int, str]:
    numbers = np.arange(start, min(start + unit_rows, rows), dtype=np.uint64)
    ids, hashes_ = made_up(numbers)
    count = len(numbers)
    digests = np.stack([mix64(ids + np.uint64(place)) for place in range(4)], 1)
    content = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), count, [None, pa.py_buffer(digests.tobytes())])
    table = pa.table(
        {
            "id": ids,
            "picture": ids,
            "caption": [f"caption {number}" for number in range(start, start + count)],
            "width": np.full(count, 512),
            "height": 512 + (numbers % np.uint64(100)).astype(np.int64),
            "file_bytes": (ids % np.uint64(100_000)).astype(np.int64),
            "image_digest": content,
            "pixels_digest": content,
            "perceptual_hash": hashes_,
            "row": np.arange(count),
        }
    )
    sink = io.BytesIO()
    pa.parquet.write_table(table, sink, compression="none")
    data = sink.getvalue()
    store.put(verdicts_key(f"{start}/", 0), [data])
    return start, count, hashlib.sha256(data).hexdigest()


def _missed(rows: int, kept: Hashes, near: int) -> tuple[int, int]:
    """Planted pairs within the distance of which both stay, and all of them."""
    copies = np.arange(99, rows, 100, dtype=np.uint64)
    (ids, hashes_), (before, hashes_before) = made_up(copies), made_up(copies - np.uint64(1))
    within = np.bitwise_count(hashes_ ^ hashes_before) <= near
    both = np.isin(ids[within], kept) & np.isin(before[within], kept)
    return int(both.sum()), int(within.sum())


def _ball(near: int) -> int:
    from math import comb

    return sum(comb(64, bits) for bits in range(near + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("photographs")
    part.add_argument("--corpus", type=Path, required=True)
    part.add_argument("--pictures", type=int, default=2200)
    part = parts.add_parser("hashes")
    part.add_argument("--rows", type=int, default=10_000_000)
    part.add_argument("--task-rows", type=int, nargs="+", default=[2**20, 2**21])
    part.add_argument("--workers", type=int, default=2)
    part.add_argument("--near", type=int, default=4)
    part = parts.add_parser("scale")
    part.add_argument("--rows", type=int, default=10**9)
    part.add_argument("--shards", type=int, default=10**5)
    given = parser.parse_args()
    if given.part == "photographs":
        write_result("dedup_photographs", photographs(given.corpus, given.pictures))
    elif given.part == "hashes":
        runs = [hashes(given.rows, task_rows, given.workers, given.near) for task_rows in given.task_rows]
        write_result("dedup_hashes", {"runs": runs})
    else:
        from benchmarks.corpus_scale import scale

        write_result("corpus_scale", scale(given.rows, given.shards))


if __name__ == "__main__":
    main()
