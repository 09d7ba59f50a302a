"""A build that is killed at every point of its commit protocol: half a dataset is never seen, and nothing is lost."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from data_pipeline.build import CorpusConfig, build_corpus, sweep_build
from data_pipeline.errors import UserError
from data_pipeline.shards import open_dataset, verify_dataset
from data_pipeline.storage import LocalStore
from data_pipeline.storage.crash import Crashed, CrashPointStore

PICTURES, SHARD_ROWS = 3, 2


@pytest.fixture
def config(tmp_path: Path) -> CorpusConfig:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(PICTURES):
            picture = simplejpeg.encode_jpeg(np.full((64, 64, 3), 80 * number, np.uint8))
            for suffix, data in (("jpg", picture), ("txt", f"picture {number}".encode())):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return CorpusConfig(inputs=[{"kind": "webdataset", "uri": str(path)}], shard_rows=SHARD_ROWS)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_build_stopped_at_any_operation_is_invisible_or_whole_and_a_rebuild_gives_the_same_bytes(
    tmp_path: Path, config: CorpusConfig
) -> None:
    whole = CrashPointStore(tmp_path / "whole")
    build_corpus(config, store=whole)
    expected = contents(whole.root)
    assert whole.operations > 50

    for stop_at in range(whole.operations):
        store = CrashPointStore(tmp_path / "stopped", stop_at)
        with pytest.raises(Crashed):
            build_corpus(config, store=store)
        seen = _visible(store.root)
        assert seen in (None, PICTURES), f"stopped at {stop_at}"

        survivor = LocalStore(store.root)
        build_corpus(config, store=survivor)
        sweep_build(survivor)
        assert contents(store.root) == expected, f"stopped at {stop_at}: orphans or other bytes"
        shutil.rmtree(store.root)


def test_a_sweep_after_a_stop_leaves_no_data_without_a_manifest(tmp_path: Path, config: CorpusConfig) -> None:
    whole = CrashPointStore(tmp_path / "whole")
    build_corpus(config, store=whole)
    expected = contents(whole.root)
    for stop_at in range(whole.operations):
        store = CrashPointStore(tmp_path / "stopped", stop_at)
        with pytest.raises(Crashed):
            build_corpus(config, store=store)
        sweep_build(LocalStore(store.root))
        left = contents(store.root)
        assert left.items() <= expected.items(), f"stopped at {stop_at}"
        assert not [key for key in left if key.endswith(".arrow") and not _committed(key, left)], (
            f"stopped at {stop_at}"
        )
        assert sweep_build(LocalStore(store.root)) == 0
        if store.root.exists():
            shutil.rmtree(store.root)


def _committed(key: str, left: dict[str, bytes]) -> bool:
    folder = key.rpartition("/")[0]
    return (f"{folder}/manifest.json" if key.startswith("units/") else key.replace(".arrow", ".json")) in left


def _visible(root: Path) -> int | None:
    """Rows of the dataset that a reader finds after the stop, all verified; None if it finds none."""
    try:
        dataset = open_dataset(str(root))
    except UserError:
        return None
    assert verify_dataset(dataset) == []
    return dataset.rows
