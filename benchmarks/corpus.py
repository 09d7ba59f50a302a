"""P1 and P2: the corpus builder against its own kernels, against img2dataset's resize path and against Ray Data.

    python -m benchmarks.corpus --photographs FOLDER [--originals FOLDER] [--large FOLDER] [--repetitions 4]

FOLDER holds webdataset tars of captioned photographs (in subfolders too), those of `--originals` as the web has them,
not reduced before; `--large` is a folder of camera pictures. Under
`.glidepath/benchmarks/` they are dealt to equal tars, and img2dataset gets its virtual environment. Per core:

- kernels: tarfile, simplejpeg, OpenCV's area filter to 256 and 64, JPEG again; nothing is checked, kept or written;
- builder: `build_corpus` from listing to the committed dataset, in this process, and with two worker processes; the
  kernels in two processes show how much of that the machine gives at all;
- img2dataset: its Resizer (centre crop to 256, area filter, JPEG at 95), one picture out where the builder makes two,
  nothing written;
- Ray Data: read_webdataset, map with the same kernels, write_parquet, on one CPU.

Targets: builder / kernels at least 0.85 (P1), at least 3.0 times img2dataset and 1.5 times Ray Data (P2), two workers
at least 1.8 times one. Memory is the peak of a process that builds a corpus of n, 4 n and 16 n records.
"""

from __future__ import annotations

import argparse
import io
import logging
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import simplejpeg

from benchmarks.measuring import interleaved, ratio, write_result
from data_pipeline import images
from data_pipeline.build import CorpusConfig, build_corpus
from data_pipeline.config import state_folder
from data_pipeline.executor import InlineExecutor, one_thread
from data_pipeline.manifests import Document

TARGETS = {"P1": 0.85, "P2 img2dataset": 3.0, "P2 Ray Data": 1.5, "two workers": 1.8}
# Equal ones, so that two workers end together, as they do in a long build.
TARS = {"photographs": 4, "originals": 2, "large": 2}
SHARDS = 2  # for the same reason
# In all; the photographs come again until they are so many.
RECORDS = {"photographs": 4240, "originals": 1200, "large": 400}
IMG2DATASET = "img2dataset==1.47.0"
UPSAMPLER_SIDE, BASE_SIDE = 256, 64


def photographs_of(folder: Path) -> Iterator[tuple[bytes, bytes]]:
    """(JPEG, caption) of every sample of the tars under `folder`, or of every .jpg where there are none."""
    tars = sorted(folder.rglob("*.tar"))
    for path in tars:
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}  # type: ignore[union-attr]
        for name in sorted(files):
            if name.endswith(".jpg"):
                yield files[name], files[name.removesuffix("jpg") + "txt"]
    if not tars:
        for path in sorted(folder.glob("*.jpg")):
            yield path.read_bytes(), b"a photograph of something"


def deal(photographs: list[tuple[bytes, bytes]], folder: Path, records: int, tars: int) -> Path:
    """`records` of the photographs dealt to equal tars; what comes again has another caption, so that it is kept."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dealt = list(enumerate(islice(cycle(photographs), records)))
    for number in range(tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index, (jpeg, caption) in dealt[number::tars]:
                again = b" (%d)" % (index // len(photographs))
                for suffix, data in (("jpg", jpeg), ("txt", caption.strip() + again)):
                    member = tarfile.TarInfo(f"{index:08d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def kernels(jpeg: bytes) -> tuple[bytes, bytes]:
    """(JPEG of 256 px, raw 64 px) with the very calls that the builder makes."""
    side = 2 * UPSAMPLER_SIDE
    pixels = simplejpeg.decode_jpeg(
        jpeg, "RGB", fastdct=False, fastupsample=False, min_height=side, min_width=side, min_factor=2.0
    )
    image256 = images.area_resize(images.centre_crop(pixels), UPSAMPLER_SIDE)
    return images.encode_jpeg(image256), images.area_resize(image256, BASE_SIDE).tobytes()


def run_kernels(folder: Path, executor: InlineExecutor | None = None) -> None:
    for _ in (executor or InlineExecutor()).map(run_kernels_of, sorted(folder.glob("*.tar"))):
        pass


def run_kernels_of(path: Path) -> None:
    with tarfile.open(path) as tar:
        for member in tar:
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".jpg"):
                kernels(data)


def run_builder(folder: Path, scratch: Path, shard_rows: int = 4096, executor: InlineExecutor | None = None) -> int:
    """Build into a fresh folder; rows of the dataset."""
    config = CorpusConfig.model_validate(
        {
            "inputs": [{"kind": "webdataset", "uri": str(folder)}],
            "output": tempfile.mkdtemp(dir=scratch),
            "shard_rows": shard_rows,
        }
    )
    return int(build_corpus(config, executor)["rows"])


class Img2dataset:
    """A process of img2dataset's own virtual environment, made at the first use."""

    def __init__(self, environment: Path) -> None:
        python = environment / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", IMG2DATASET], check=True)
        script = Path(__file__).with_name("img2dataset_path.py")
        self._process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer("ready")

    def _answer(self, expected: str) -> None:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        if answer != expected:
            raise RuntimeError(f"img2dataset answered {answer!r}, expected {expected!r}")

    def run(self, folder: Path, pictures: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        self._answer(str(pictures))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def start_ray() -> None:
    import ray.data

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def run_ray_data(folder: Path, scratch: Path) -> None:
    import ray

    def mapped(row: dict[str, Any]) -> dict[str, Any]:
        image256, image64 = kernels(row["jpg"])
        return {"key": row["__key__"], "caption": row["txt"], "image256": image256, "image64": image64}

    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    ray.data.read_webdataset(paths, decoder=None).map(mapped).write_parquet(tempfile.mkdtemp(dir=scratch))


@dataclass(frozen=True)
class Rivals:
    """What the builder in this process is compared with; None or False: left out."""

    two_workers: InlineExecutor
    img2dataset: Img2dataset | None
    ray_data: bool


def measure_speed(
    builder: Callable[[], Any], folder: Path, repetitions: int, others: dict[str, Callable[[], Any]]
) -> Document:
    """Seconds of each candidate on one folder, of wall clock and, for those in this process, of CPU."""
    cpu: dict[str, list[float]] = {}

    def with_cpu(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> None:
            began = time.process_time()
            run()
            cpu.setdefault(name, []).append(time.process_time() - began)

        return timed

    candidates: dict[str, Callable[[], Any]] = {
        "kernels": with_cpu("kernels", lambda: run_kernels(folder)),
        "builder": with_cpu("builder", builder),
    }
    seconds = interleaved(candidates | others, repetitions)
    cpu = {name: values[1:] for name, values in cpu.items()}  # without the warm-up
    ratios = {"P1": ratio(seconds, "kernels", "builder"), "P1 by CPU time": ratio(cpu, "kernels", "builder")}
    if "img2dataset" in seconds:
        ratios["P2 img2dataset"] = ratio(seconds, "img2dataset", "builder")
    if "Ray Data" in seconds:
        ratios["P2 Ray Data"] = ratio(seconds, "Ray Data", "builder")
    if "builder, 2 workers" in seconds:
        ratios["two workers"] = ratio(seconds, "builder", "builder, 2 workers")
        ratios["two processes of kernels"] = ratio(seconds, "kernels", "kernels, 2 processes")
    for name, found in ratios.items():
        print(f"{folder.name}: {name} {found:.2f}  (target {TARGETS.get(name, '-')})", flush=True)
    return {"seconds": seconds, "cpu_seconds": cpu, "ratios": ratios}


def peak_bytes() -> int:
    """Peak resident bytes of this process. Not `ru_maxrss`, which starts at its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak_memory_of(folder: Path, scratch: Path) -> int:
    """Peak resident bytes of a fresh process that builds the corpus."""
    command = [sys.executable, "-m", "benchmarks.corpus", "--build", str(folder), "--scratch", str(scratch)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(photographs: list[tuple[bytes, bytes]], scratch: Path, records: int) -> dict[str, int]:
    """Peak resident bytes of building n records, 4 n in more units, and 16 n in larger units and in two shards."""
    peaks = {}
    for name, count, tars in (
        ("n", records, 2),
        ("4n, more units", 4 * records, 8),
        ("16n, larger units", 16 * records, 2),
    ):
        peaks[name] = peak_memory_of(deal(photographs, scratch / "memory", count, tars), scratch)
        print(f"memory: {name} = {count} records in {tars} units: {peaks[name] / 2**20:.0f} MiB", flush=True)
    return peaks


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--originals", type=Path)
    parser.add_argument("--large", type=Path)
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of records, to see that it works")
    parser.add_argument("--without", nargs="*", choices=["img2dataset", "ray", "memory"], default=[])
    parser.add_argument("--name", default="corpus", help="of the json under results/")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)  # in a process of its own, to measure its memory
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_corpus(name: str, source: Path, arguments: argparse.Namespace, scratch: Path, rivals: Rivals) -> Document:
    """Speed on one corpus, dealt from `source`."""
    records = round(arguments.scale * RECORDS[name])
    folder = deal(list(photographs_of(source)), scratch / name, records, TARS[name])
    shard_rows = -(-records // SHARDS)
    others: dict[str, Callable[[], Any]] = {}
    if rivals.img2dataset is not None:
        others["img2dataset"] = partial(rivals.img2dataset.run, folder, records)
    if name == "photographs":
        others["builder, 2 workers"] = partial(run_builder, folder, scratch, shard_rows, rivals.two_workers)
        others["kernels, 2 processes"] = partial(run_kernels, folder, rivals.two_workers)
        if rivals.ray_data:
            others["Ray Data"] = partial(run_ray_data, folder, scratch)
    builder = partial(run_builder, folder, scratch, shard_rows)
    measured = measure_speed(builder, folder, arguments.repetitions, others)
    return measured | {
        "records": records,
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "images_per_s": records / statistics.median(measured["seconds"]["builder"]),
    }


def main() -> None:
    arguments = parsed()
    one_thread()
    if arguments.build:
        run_builder(arguments.build, arguments.scratch)
        print(peak_bytes())
        return
    home = state_folder() / "benchmarks"
    home.mkdir(parents=True, exist_ok=True)
    sets = {name: folder for name in TARS if (folder := getattr(arguments, name))}
    document: Document = {"targets": TARGETS, "img2dataset": IMG2DATASET, "tars": TARS}
    with tempfile.TemporaryDirectory(dir=home) as temporary, InlineExecutor(2) as two_workers:
        scratch = Path(temporary)
        img2dataset = None if "img2dataset" in arguments.without else Img2dataset(home / "img2dataset")
        rivals = Rivals(two_workers, img2dataset, "ray" not in arguments.without)
        if rivals.ray_data:
            start_ray()
        document["corpora"] = {name: measure_corpus(name, sets[name], arguments, scratch, rivals) for name in sets}
        if "memory" not in arguments.without:
            photographs = list(photographs_of(arguments.photographs))
            document["peak_bytes"] = measure_memory(photographs, scratch, round(500 * arguments.scale))
        if img2dataset is not None:
            img2dataset.close()
    write_result(arguments.name, document)


if __name__ == "__main__":
    main()
