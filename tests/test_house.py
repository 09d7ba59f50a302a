"""The house rules that a machine can check: floors, rooms of libraries, no pickles."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("data_pipeline", "trainer", "cluster")  # from the ground up
ROOMS = {
    "ray": r"cluster/.*",
    "deepspeed": r"trainer/engine/deepspeed.*\.py",
    "boto3": r"data_pipeline/storage/s3\.py",
    "mlflow": r"trainer/tracking/mlflow\.py",
}
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_floor_imports_only_from_the_floors_below_it(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    above = FLOORS[FLOORS.index(floor) + 1 :]
    assert not [module for module in imported_modules(path) if module.split(".")[0] in above]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_outside_service_has_one_room(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    for module in imported_modules(path):
        room = ROOMS.get(module.split(".")[0])
        assert room is None or re.fullmatch(room, name), f"{name} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    assert "pickle" not in {module.split(".")[0] for module in imported_modules(path)}
    assert not re.search(
        r"torch\.load\((?!.*weights_only=True)|allow_pickle=True|yaml\.(unsafe|full)_load|yaml\.Loader",
        path.read_text(),
    )


def test_the_lower_floors_import_where_no_service_is_installed() -> None:
    names = [path.relative_to(ROOT).as_posix() for path in SOURCES]
    outside = [name for name in names if not any(re.fullmatch(room, name) for room in ROOMS.values())]
    modules = [name.removesuffix(".py").replace("/", ".") for name in outside]
    lower = [module.removesuffix(".__init__") for module in modules if not module.startswith("cluster")]
    blocked = "import sys\nsys.modules.update(dict.fromkeys(['ray', 'mlflow', 'deepspeed', 'boto3']))\n"
    imports = "".join(f"import {module}\n" for module in lower)
    subprocess.run([sys.executable, "-c", blocked + imports], check=True, cwd=ROOT)


def test_the_gpu_benchmark_imports_where_only_torch_numpy_pydantic_and_yaml_are_installed() -> None:
    absent = "pyarrow cv2 PIL tokenizers ftfy simplejpeg isal blake3 ray mlflow boto3 deepspeed"
    code = f"import sys\nsys.modules.update(dict.fromkeys({absent!r}.split()))\nimport benchmarks.gpu"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
