"""img2dataset's own resize path, in an interpreter of its own virtual environment: for benchmarks/corpus.py.

    python img2dataset_path.py

Reads the name of a folder of tars from each line of its input, takes every picture through img2dataset's Resizer and
answers with the number of pictures. Only the standard library and img2dataset are imported.
"""

import io
import sys
import tarfile
from pathlib import Path

from img2dataset.resizer import Resizer

# img2dataset's defaults but for the mode: a square of 256 px, as the builder keeps.
resizer = Resizer(image_size=256, resize_mode="center_crop", resize_only_if_bigger=False, encode_quality=95)


def resized(folder: str) -> int:
    pictures = 0
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".jpg"):
                    _, width, height, _, _, error = resizer(io.BytesIO(data))
                    assert (width, height, error) == (256, 256, None), (member.name, error)
                    pictures += 1
    return pictures


print("ready", flush=True)
for line in sys.stdin:
    print(resized(line.strip()), flush=True)
