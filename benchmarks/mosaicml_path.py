"""MosaicML streaming's own dataset and loader, in its own virtual environment: for benchmarks/loader.py.

    python mosaicml_path.py ROWS.npz FOLDER COUNT BATCH

Writes COUNT samples as MDS into FOLDER where there are none, the rows of ROWS.npz again and again. At each line of its
input it goes through one epoch, shuffled, in this process, and answers with the number of samples, the sum of their
ids and the seconds of CPU. Only the standard library, numpy, torch and streaming are imported.
"""

import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np


def stand_in_for_torchvision() -> None:
    """streaming imports torchvision for datasets that are not used here; its wheel on PyPI is for CUDA builds of torch,
    and does not load beside another."""
    names = {
        "torchvision": (),
        "torchvision.datasets": ("VisionDataset",),
        "torchvision.transforms": (),
        "torchvision.transforms.functional": ("to_tensor",),
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        for attribute in attributes:
            setattr(module, attribute, type(attribute, (), {}))
        sys.modules[name] = module


stand_in_for_torchvision()

from streaming import MDSWriter, StreamingDataset  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

COLUMNS = {"id": "int", "image64": "ndarray:uint8:64,64,3", "tokens": "ndarray:uint16:128", "n_tokens": "int"}


def write(rows: str, folder: Path, count: int) -> None:
    with np.load(rows) as archive:
        images, tokens, n_tokens = (archive[name] for name in ("image64", "tokens", "n_tokens"))
    with MDSWriter(out=str(folder), columns=COLUMNS, exist_ok=True) as writer:
        for number in range(count):
            row = number % len(images)
            sample = {"id": number, "image64": images[row].reshape(64, 64, 3)}
            writer.write({**sample, "tokens": tokens[row], "n_tokens": int(n_tokens[row])})


def main() -> None:
    rows, folder, count, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if not (folder / "index.json").exists():
        write(rows, folder, count)
    dataset = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=0, batch_size=batch)
    loader = DataLoader(dataset, batch_size=batch, num_workers=0)
    print("ready", flush=True)
    for _ in sys.stdin:
        samples, checksum = 0, 0
        began = time.process_time()
        for columns in loader:
            assert columns["image64"].shape[1:] == (64, 64, 3) and columns["tokens"].shape[1:] == (128,)
            samples += len(columns["id"])
            checksum += int(columns["id"].numpy().sum())
        print(samples, checksum, time.process_time() - began, flush=True)


if __name__ == "__main__":
    main()
