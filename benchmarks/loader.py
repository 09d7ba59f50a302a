"""P3 and the data wait of P6: our loader against webdataset, MosaicML streaming, and webdataset with Pillow.

    python -m benchmarks.loader --photographs FOLDER [--repetitions 5] [--scale 1.0]
    python -m benchmarks.loader --run configs/train/demo-base.yaml [key=value ...]

FOLDER holds webdataset tars of captioned photographs. They are built into a dataset once, and its rows written again
and again to as many samples as are asked for: as our shards, as tars and as MDS, in `.glidepath/benchmarks/loader/`.
One process and, but for "2 threads", one thread that reads; samples in shuffled order; one pass, to the last batch.
Every candidate begins anew for each repetition, warm (files in the page cache) and cold (dropped from it). A checksum
of the ids proves that each read every sample once.

- base: 64 px pictures, tokens and their number, in global batches of 2,048. webdataset reads tars of jpg + json (as
  people write them), png + json (the same pixels as ours) and npy + json (no decoding at all), with its own decoder;
  MosaicML reads MDS with raw columns, in its own virtual environment, by StreamingDataset and DataLoader.
- upsampler: 256 px JPEGs decoded, and reduced to 64 by the area filter, in batches of 256; webdataset with Pillow.

Targets: base at least 40 times webdataset (jpg) and 20 times MosaicML streaming; upsampler at least 1.5 times.

`--run` trains in earnest and prints the share of the steps' time in which the loop waited for data (target 0.5%).
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import webdataset
from numpy.typing import NDArray
from PIL import Image

from benchmarks.corpus import deal, photographs_of
from benchmarks.measuring import ratio, write_result
from data_pipeline import manifests
from data_pipeline.build import CorpusConfig, build_corpus
from data_pipeline.config import state_folder
from data_pipeline.draws import Draws
from data_pipeline.executor import one_thread
from data_pipeline.families import FAMILIES
from data_pipeline.images import area_resize, decode_stored
from data_pipeline.loader import Column, Loader, LoaderSettings, Rows, read_rows
from data_pipeline.manifests import Document
from data_pipeline.order import SampleOrder
from data_pipeline.shards import commit_dataset, commit_family, open_dataset, write_shard
from data_pipeline.storage import LocalStore
from data_pipeline.tokenizer import TOKENIZER_SHA256

TARGETS = {"webdataset jpg": 40.0, "MosaicML": 20.0, "webdataset with Pillow": 1.5}
SAMPLES = {"base": 32_768, "upsampler": 4_096}
BATCH = {"base": 2_048, "upsampler": 256}
SHARD_ROWS = 4_096
MOSAICML = ["torch==2.13.0", "mosaicml-streaming==0.13.0"]
COLUMNS = {
    "base": (Column("base", "image64"), Column("base", "tokens"), Column("base", "n_tokens")),
    "upsampler": (Column("upsampler", "image256"), Column("upsampler", "tokens"), Column("upsampler", "n_tokens")),
}

# --- the same samples in each form


def unique_rows(photographs: Path, scratch: Path) -> Rows:
    """Every column of every photograph."""
    pictures = list(photographs_of(photographs))
    tars, output = deal(pictures, scratch / "photographs", len(pictures), 1), tempfile.mkdtemp(dir=scratch)
    values = {"inputs": [{"kind": "webdataset", "uri": str(tars)}], "output": output, "filters": {"preset": "none"}}
    build_corpus(CorpusConfig.model_validate(values))
    dataset = open_dataset(output)
    columns = [Column("base", "caption"), *COLUMNS["base"], Column("upsampler", "image256")]
    shards = np.repeat(np.arange(len(dataset.shard_rows)), dataset.shard_rows)
    return read_rows(dataset, columns, shards, np.concatenate([np.arange(rows) for rows in dataset.shard_rows]))


def record_batch(family: str, rows: Rows, numbers: NDArray[np.int64]) -> pa.RecordBatch:
    schema, chosen = FAMILIES[family].schema, numbers % len(rows["n_tokens"])
    arrays = []
    for field in schema:
        if field.name == "id":
            arrays.append(pa.array(numbers.astype(np.uint64)))
        elif pa.types.is_fixed_size_list(field.type):
            flat = pa.array(rows[field.name][chosen].ravel())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, field.type.list_size).cast(field.type))
        else:
            arrays.append(pa.array([rows[field.name][number] for number in chosen], field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def write_shards(rows: Rows, family: str, samples: int, folder: Path) -> None:
    store, identity = LocalStore(folder), {"tokenizer": TOKENIZER_SHA256, "rows": samples}
    dataset_id, shards = manifests.digest_of(identity), []
    for first in range(0, samples, SHARD_ROWS):
        end = min(first + SHARD_ROWS, samples)
        batches = (
            record_batch(family, rows, np.arange(start, min(start + 256, end))) for start in range(first, end, 256)
        )
        shards.append(write_shard(store, dataset_id, FAMILIES[family], first // SHARD_ROWS, batches))
    commit_dataset(store, identity, [commit_family(store, dataset_id, FAMILIES[family], shards)], {"funnel": {}})


def encoded(pixels: NDArray[np.uint8], kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, pixels)
    else:
        Image.fromarray(pixels).save(file, {"jpg": "JPEG", "png": "PNG"}[kind], quality=95)
    return file.getvalue()


def write_tars(pictures: list[bytes], kind: str, rows: Rows, samples: int, folder: Path) -> None:
    """webdataset's form: picture and json of a sample beside each other, as many samples to a tar as to our shard."""
    folder.mkdir(parents=True)
    for first in range(0, samples, SHARD_ROWS):
        with tarfile.open(folder / f"{first // SHARD_ROWS:05d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD_ROWS, samples)):
                row = number % len(pictures)
                facts = {"id": number, "tokens": rows["tokens"][row].tolist(), "n_tokens": int(rows["n_tokens"][row])}
                for suffix, data in ((kind, pictures[row]), ("json", json.dumps(facts).encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def prepare_forms(photographs: Path, home: Path, samples: Mapping[str, int]) -> dict[str, Path]:
    """Folder of each form; made where it is not there."""
    folders = {
        name: home / f"{name.replace(' ', '-')}-{samples['upsampler' if '256' in name else 'base']}"
        for name in ("shards 64", "shards 256", "tars jpg", "tars png", "tars npy", "tars 256", "MDS")
    }
    ready = home / f"ready-{samples['base']}-{samples['upsampler']}"
    if ready.exists():
        return folders
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    rows = unique_rows(photographs, home)
    np.savez(home / "rows.npz", **{name: rows[name] for name in ("image64", "tokens", "n_tokens")})
    write_shards(rows, "base", samples["base"], folders["shards 64"])
    write_shards(rows, "upsampler", samples["upsampler"], folders["shards 256"])
    for kind in ("jpg", "png", "npy"):
        pictures = [encoded(pixels.reshape(64, 64, 3), kind) for pixels in rows["image64"]]
        write_tars(pictures, kind, rows, samples["base"], folders[f"tars {kind}"])
    write_tars(rows["image256"], "jpg", rows, samples["upsampler"], folders["tars 256"])
    folders["MDS"].mkdir()
    ready.touch()
    os.sync()  # what is not on the disk yet cannot be dropped from the page cache
    return folders


# --- the candidates: each goes through all samples once and returns (samples, sum of ids)


def through_loader(folder: Path, part: str, threads: int = 1) -> tuple[int, int]:
    dataset, batch = open_dataset(str(folder)), BATCH[part]
    order = SampleOrder(dataset.id, dataset.shard_rows, 0, batch)
    prepare = deliver_base if part == "base" else deliver_upsampler
    # Micro batches, so that several threads share a batch: as in training.
    cut = [(0, batch)] if part == "base" else [(begin, begin + 32) for begin in range(0, batch, 32)]
    loader = Loader(dataset, order, COLUMNS[part], prepare, cut, LoaderSettings(threads=threads, ahead=2))
    samples = checksum = 0
    for step in loader.batches(0, order.epoch_images):
        for micro in step:
            samples += len(micro.ids)
            checksum += int(micro.ids.sum())
    return samples, checksum


def deliver_base(rows: Rows, draws: Draws) -> tuple[Any, ...]:
    return rows["image64"].reshape(-1, 64, 64, 3), rows["tokens"], rows["n_tokens"]


def deliver_upsampler(rows: Rows, draws: Draws) -> tuple[Any, ...]:
    decoded = [decode_stored(jpeg) for jpeg in rows["image256"]]
    small = np.stack([area_resize(image, 64) for image in decoded])
    return np.stack(decoded), small, rows["tokens"], rows["n_tokens"]


def through_webdataset(folder: Path, part: str, kind: str) -> tuple[int, int]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    random.seed(0)
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000)
    samples = samples.decode("pil" if part == "upsampler" else "rgb8").to_tuple(kind, "json")
    samples = samples.map(deliver_pillow if part == "upsampler" else deliver_tuple)
    count = checksum = 0
    for *_, ids in samples.batched(BATCH[part]):
        count += len(ids)
        checksum += int(ids.sum())
    return count, checksum


def deliver_tuple(sample: tuple[Any, Any]) -> tuple[Any, ...]:
    picture, facts = sample
    return picture, np.array(facts["tokens"], np.uint16), facts["n_tokens"], facts["id"]


def deliver_pillow(sample: tuple[Any, Any]) -> tuple[Any, ...]:
    picture, facts = sample
    return np.asarray(picture), *deliver_tuple((np.asarray(picture.reduce(4)), facts))


class MosaicML:
    """A process of MosaicML streaming's own virtual environment, made at the first use."""

    def __init__(self, environment: Path, rows: Path, folder: Path, samples: int) -> None:
        python = environment / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
            for requirement in MOSAICML:  # torch first, so that no dependency brings another build of it
                constraints = environment / "constraints.txt"
                constraints.write_text(f"{MOSAICML[0]}\n")
                command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), requirement]
                subprocess.run(command, check=True)
            subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "-y", "torchvision"], check=True)
        self.cpu_s = 0.0  # of all runs
        script = str(Path(__file__).with_name("mosaicml_path.py"))
        self._process = subprocess.Popen(
            [str(python), script, str(rows), str(folder), str(samples), str(BATCH["base"])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if (answer := self._answer()) != "ready":
            raise RuntimeError(f"MosaicML streaming answered {answer!r}, expected 'ready'")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self) -> tuple[int, int]:
        """Also adds to `cpu_s`."""
        assert self._process.stdin is not None
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        samples, checksum, cpu_s = self._answer().split()
        self.cpu_s += float(cpu_s)
        return int(samples), int(checksum)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


# --- measuring


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@dataclass(frozen=True)
class Candidate:
    """What goes through `folder` once and returns (samples, sum of ids)."""

    folder: Path
    run: Callable[[], tuple[int, int]]
    cpu_s: Callable[[], float] = time.process_time  # of CPU, so far


def measured(candidates: Mapping[str, Candidate], expected: tuple[int, int], repetitions: int, cold: bool) -> Document:
    """Seconds of each repetition of each candidate, which take turns; a first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(repetitions + 1):
        for name, candidate in candidates.items():
            gc.collect()  # readers that are gone have no file mapped, so that its pages can be dropped
            if cold:
                drop_from_page_cache(candidate.folder)
            cpu_began, began = candidate.cpu_s(), time.perf_counter()
            found = candidate.run()
            took, cpu_took = time.perf_counter() - began, candidate.cpu_s() - cpu_began
            if found != expected:
                raise RuntimeError(f"{name} delivered {found} (samples, sum of ids), expected {expected}")
            when = f"{'cold' if cold else 'warm'} {repetition or 'first'}"
            print(f"{when:<10} {name:<26} {took:8.3f} s  {cpu_took:8.3f} s of CPU", flush=True)
            if repetition:
                seconds[name].append(took)
                cpu_seconds[name].append(cpu_took)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def ratios_of(part: str, found: Document, samples: int) -> Document:
    """How many times as long as ours each other takes; and microseconds per sample."""
    ours = "ours"
    summary: Document = {}
    for kind in ("seconds", "cpu_seconds"):
        times: dict[str, list[float]] = found[kind]
        summary[f"ratios of {kind}"] = {name: ratio(times, name, ours) for name in times if name != ours}
        micro = {name: statistics.median(values) / samples * 1e6 for name, values in times.items()}
        summary[f"{kind} per million samples"] = micro
        for name, value in summary[f"ratios of {kind}"].items():
            target = TARGETS.get(name, "-")
            print(f"{part}, {kind}: {name} / ours {value:.2f}  (target {target})  {micro[name]:.1f} us per sample")
        print(f"{part}, {kind}: ours {micro[ours]:.1f} us per sample", flush=True)
    return summary


def compare(arguments: argparse.Namespace) -> None:
    home = state_folder() / "benchmarks"
    samples = {part: int(arguments.scale * count) // BATCH[part] * BATCH[part] for part, count in SAMPLES.items()}
    folders = prepare_forms(arguments.photographs, home / "loader", samples)
    document: Document = {"targets": TARGETS, "samples": samples, "batch": BATCH, "mosaicml": MOSAICML}
    base = {"ours": Candidate(folders["shards 64"], partial(through_loader, folders["shards 64"], "base"))}
    base["ours, 2 threads"] = Candidate(folders["shards 64"], partial(through_loader, folders["shards 64"], "base", 2))
    for kind in ("jpg", "png", "npy"):
        tars = folders[f"tars {kind}"]
        base[f"webdataset {kind}"] = Candidate(tars, partial(through_webdataset, tars, "base", kind))
    shards, tars = folders["shards 256"], folders["tars 256"]
    upsampler = {
        "ours": Candidate(shards, partial(through_loader, shards, "upsampler")),
        "webdataset with Pillow": Candidate(tars, partial(through_webdataset, tars, "upsampler", "jpg")),
        "ours, 2 threads": Candidate(shards, partial(through_loader, shards, "upsampler", 2)),
    }
    mosaicml = None
    if not arguments.without_mosaicml:
        mosaicml = MosaicML(home / "mosaicml", home / "loader" / "rows.npz", folders["MDS"], samples["base"])
        base["MosaicML"] = Candidate(folders["MDS"], mosaicml.run, partial(getattr, mosaicml, "cpu_s"))
        os.sync()
    for part, candidates in (("base", base), ("upsampler", upsampler)):
        count = samples[part]
        expected = (count, count * (count - 1) // 2)
        for cold in (False, True):
            found = measured(candidates, expected, arguments.repetitions, cold)
            found |= ratios_of(f"{part}, {'cold' if cold else 'warm'}", found, count)
            document.setdefault(part, {})["cold" if cold else "warm"] = found
    if mosaicml is not None:
        mosaicml.close()
    write_result(arguments.name, document)


# --- wait per step in a real run


def measure_wait(arguments: argparse.Namespace) -> None:
    """Train by the command line and add up what the loop's own timer says of each step."""
    with tempfile.TemporaryDirectory() as store:
        command = [str(Path(sys.executable).with_name("glidepath")), "train", *arguments.run, "run=wait"]
        subprocess.run([*command, f"store={store}/run"], check=True, stdout=subprocess.DEVNULL)
        lines = (Path(store) / "run" / "tracking" / "metrics.jsonl").read_text().splitlines()
    steps = [line["values"] for line in map(json.loads, lines) if "time/step_s" in line.get("values", {})]
    document: Document = {"configuration": arguments.run, "steps": len(steps)}
    # The first step waits for the first batch, which nothing can bring ahead.
    for name, counted in (("all steps", steps), ("but the first", steps[1:])):
        total, waited = (sum(step[f"time/{section}_s"] for step in counted) for section in ("step", "data"))
        document[name] = {"seconds": total, "wait_seconds": waited, "wait_share": waited / total}
        print(
            f"{name}: {len(counted)} steps, {total:.2f} s, waited {waited:.4f} s, {waited / total:.3%}  (target 0.5%)"
        )
    document["largest waits"] = sorted((step["time/data_s"] for step in steps), reverse=True)[:5]
    write_result(f"{arguments.name}_wait", document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--photographs", type=Path)
    kinds.add_argument("--run", nargs="+", metavar="CONFIG", help="what `glidepath train` takes")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of samples, to see that it works")
    parser.add_argument("--without-mosaicml", action="store_true")
    parser.add_argument("--name", default="loader", help="of the json under results/")
    arguments = parser.parse_args()
    if arguments.run:
        measure_wait(arguments)
        return
    one_thread()
    compare(arguments)


if __name__ == "__main__":
    main()
