"""What of a working tree goes along with a job, on real git checkouts."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from cluster import package
from cluster.package import largest, working_tree, write_zip
from data_pipeline.errors import UserError

SECRET = "wJalrXUtnFEMIK7MDENG"


def write(root: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a changed file, a new one, a deleted one, and all that must stay at home."""
    root = tmp_path / "checkout"
    root.mkdir()
    git(root, "init", "-q")
    write(root, _dot_gitignore="ignored/\n.venv/\n", trainer__loop_dot_py="old", gone_dot_py="1", _dot_ci__run="make")
    git(root, "add", "-A")
    git(root, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first")
    (root / "gone.py").unlink()
    write(root, trainer__loop_dot_py="changed", trainer__new_dot_py="new", ignored__a="1", _dot_venv__b="2")
    write(root, _dot_env=f"AWS_SECRET_ACCESS_KEY={SECRET}", state__datasets__c="3", runs__tiny__part="4")
    (root / "elsewhere").symlink_to("/etc/hostname")
    (root / "trainer" / "new.py").chmod(0o755)
    monkeypatch.setenv("GLIDEPATH_HOME", str(root / "state"))
    return root


def test_a_job_takes_the_changed_tree_along_and_no_data_secret_or_ignored_file(tree: Path, tmp_path: Path) -> None:
    found = working_tree(tree, never=[str(tree / "runs" / "tiny")])
    assert list(found.sizes) == [".ci/run", ".gitignore", "trainer/loop.py", "trainer/new.py"]
    for name in ("a.zip", "b.zip"):
        write_zip(found, tmp_path / name, {"AWS_SECRET_ACCESS_KEY": SECRET})
        (tree / "trainer" / "loop.py").touch()
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes(), "equal trees, equal packages"
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        assert packed.read("trainer/loop.py") == b"changed"
        assert packed.getinfo("trainer/new.py").external_attr >> 16 & 0o777 == 0o755


def test_a_file_with_a_credential_of_this_environment_is_refused_by_name(tree: Path, tmp_path: Path) -> None:
    write(tree, trainer__notes_dot_txt=f"the key is {SECRET}!")
    with pytest.raises(
        UserError, match=r"working tree: trainer/notes.txt: .* found the value of AWS_SECRET"
    ) as refused:
        write_zip(working_tree(tree, []), tmp_path / "a.zip", {"AWS_SECRET_ACCESS_KEY": SECRET})
    assert SECRET not in str(refused.value)
    write_zip(working_tree(tree, []), tmp_path / "b.zip", {"AWS_SECRET_ACCESS_KEY": ""})


def test_a_tree_over_the_limit_is_refused_with_what_is_large_in_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tree, data__shards__one=b"0" * 3_000_000, data__shards__two=b"0" * 3_000_000, big_dot_bin=b"0" * 2_000_000)
    assert largest(working_tree(tree, []).sizes)[:2] == [("data/shards/", 6_000_000), ("big.bin", 2_000_000)]
    monkeypatch.setattr(package, "LIMIT_BYTES", 4_000_000)
    with pytest.raises(UserError) as refused:
        working_tree(tree, [])
    assert "found 8 MiB in 8 files, most of it data/shards/ 6 MiB, big.bin 2 MiB; have git" in str(refused.value)
    assert "\n" not in str(refused.value) and ".gitignore" in str(refused.value)
    assert len(working_tree(tree, [str(tree / "data")]).sizes) == 6


def test_a_tree_that_git_cannot_list_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("gitdir: nowhere")
    with pytest.raises(UserError, match="expected a checkout that git can list, found fatal: "):
        working_tree(tmp_path, [])
