"""The working tree as a job takes it along: which files, how large they are, and the zip that the cluster unpacks.

Always holds: what is packaged is what git keeps or would keep - never the state folder, the data of the job itself,
hidden files that git does not track, or a file that holds a credential of this environment, since everybody with the
dashboard can download the package; equal trees give equal bytes, which Ray then stores once. Called by `submit`.
"""

from __future__ import annotations

import os
import stat
import subprocess
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import state_folder
from data_pipeline.errors import UserError

# Ray's dashboard refuses a request body above 100 MiB (DASHBOARD_CLIENT_MAX_SIZE, no setting); its store, above 512.
# The difference is room for the zip's own entries.
LIMIT_BYTES = 96 * 2**20
ENTRY_BYTES = 256  # of a zip, for each file beside its content
LARGEST_SHOWN = 3
MOST = 0.8  # of a folder in one of its entries: then that entry is what is large
CREDENTIALS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "HF_TOKEN",
    "RAY_AUTH_TOKEN",
)
SHORTEST_CREDENTIAL = 8  # characters: a shorter value stands in many files by chance
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can say


@dataclass(frozen=True)
class Tree:
    """Files of a working tree by their path in it, sorted, with their sizes in bytes."""

    root: Path
    sizes: Mapping[str, int]


def checkout() -> Path | None:
    """The checkout that this program runs from; None for an installed copy, which the cluster must have as well."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / ".git").exists() else None


def working_tree(root: Path, never: Sequence[str]) -> Tree:
    """The files of the checkout `root` to take along. `never`: folders that stay here, such as a run's store.

    Raises UserError if git does not answer, or if they are too large together; nothing is read for that.
    """
    kept = [*(Path(folder).absolute() for folder in never), state_folder()]
    sizes = {}
    hidden = {name for name in _listed(root, "--others") if any(part.startswith(".") for part in name.split("/"))}
    for name in sorted({*_listed(root, "--cached"), *_listed(root, "--others")} - hidden):
        path = root / name
        inside = path.resolve().is_relative_to(root.resolve())  # a link may lead anywhere
        if inside and path.is_file() and not any(path.is_relative_to(folder) for folder in kept if folder != root):
            sizes[name] = path.stat().st_size
    tree = Tree(root, sizes)
    _refuse_too_large(tree)
    return tree


def write_zip(tree: Tree, path: Path, environment: Mapping[str, str]) -> None:
    """The tree as a zip. Raises UserError for a file in which a credential of the environment stands."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name in tree.sizes:
            content = (tree.root / name).read_bytes()
            refuse_credentials(f"working tree: {name}", content, environment)
            entry = zipfile.ZipInfo(name, EPOCH)
            runs = os.access(tree.root / name, os.X_OK)
            entry.external_attr = (stat.S_IFREG | (0o755 if runs else 0o644)) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, content)


def refuse_credentials(name: str, content: bytes, environment: Mapping[str, str]) -> None:
    """Raise UserError if a credential of `environment` stands in what everybody with the dashboard will see."""
    for variable in CREDENTIALS:
        value = environment.get(variable, "")
        if len(value) >= SHORTEST_CREDENTIAL and value.encode() in content:
            raise UserError(
                name,
                "no credential in what a job takes along",
                f"the value of {variable}",
                "take it out, or have git ignore the file",
            )


def largest(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """(file or folder/, bytes) of what is largest in a tree: not a folder whose bytes are nearly all one entry's."""
    found = []
    for name, size in _children(sizes, "").most_common(LARGEST_SHOWN):
        while name.endswith("/"):
            [(inner, inner_size)] = _children(sizes, name).most_common(1)
            if inner_size < MOST * size:
                break
            name, size = inner, inner_size
        found.append((name, size))
    return found


def _children(sizes: Mapping[str, int], folder: str) -> Counter[str]:
    """Bytes by entry directly in `folder` ("" or a path that ends with /); folders end with /."""
    found: Counter[str] = Counter()
    for name, size in sizes.items():
        if name.startswith(folder):
            first, slash, _ = name.removeprefix(folder).partition("/")
            found[f"{folder}{first}{slash}"] += size
    return found


def _refuse_too_large(tree: Tree) -> None:
    total = sum(tree.sizes.values()) + ENTRY_BYTES * len(tree.sizes)
    if total > LIMIT_BYTES:
        shown = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in largest(tree.sizes) if size >= 2**20)
        raise UserError(
            f"working tree {tree.root}",
            f"at most {LIMIT_BYTES / 2**20:.0f} MiB to send with a job, as Ray's dashboard takes no more",
            f"{total / 2**20:,.0f} MiB in {len(tree.sizes):,} files, most of it {shown}",
            "have git ignore what the job does not need (.gitignore, or .git/info/exclude)",
        )


def _listed(root: Path, which: str) -> list[str]:
    command = ["git", "-C", str(root), "ls-files", "-z", which, "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        raise UserError("git", "the program, which knows what belongs to the tree", "none", "install git") from None
    if done.returncode:
        said = os.fsdecode(done.stderr).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UserError(f"working tree {root}", "a checkout that git can list", said[0], "correct it")
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
