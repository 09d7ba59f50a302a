"""The model registry: names and aliases for checkpoints on a tracking server, by the URIs under which they are stored.

Always holds: a version stands for one committed checkpoint, told by URI and sha256 of its manifest; the same checkpoint
again is the same version; no byte of it passes through the server. A name is `models:/NAME@ALIAS` or
`models:/NAME/VERSION`, as MLflow writes it. Called by the models commands, and by whatever takes a checkpoint's URI.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import UsageError, UserError
from trainer.tracking.mlflow import IDENTITY, mlflow_client, refusing, training_run
from trainer.tracking.server import ENVIRONMENT, is_server

SCHEME = "models:/"
CHECKPOINT, MANIFEST = "glidepath.checkpoint", "glidepath.manifest_sha256"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ALIAS = re.compile(r"(?!latest$|v\d+$)[A-Za-z][A-Za-z0-9_-]*", re.IGNORECASE)  # those two are MLflow's own
# A server takes no path of its own machine as a source, lest it be asked to read it; this one it cannot read.
FOLDER = "glidepath-folder://store"
PER_PAGE = 200


@dataclass(frozen=True)
class Version:
    """A checkpoint under a name. `checkpoint`: its URI; `mlflow_run_id`: of the run that trained it, None where the
    server does not know it."""

    name: str
    version: int
    aliases: tuple[str, ...]
    checkpoint: str
    manifest_sha256: str
    mlflow_run_id: str | None
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"{SCHEME}{self.name}@{self.aliases[0]}" if self.aliases else f"{SCHEME}{self.name}/{self.version}"


def is_model_uri(uri: str) -> bool:
    """Whether it names a registered model."""
    return uri.startswith(SCHEME)


def refuse_bad_names(name: str, alias: str | None) -> None:
    """Raises UsageError for a name or an alias that a registry does not take."""
    if not NAME.fullmatch(name):
        raise UsageError(f"model name {name!r}", "letters, digits, . _ and -", "another", "correct it")
    if alias is not None and not ALIAS.fullmatch(alias):
        expected = "letters, digits, _ and -, neither latest nor v1, v2 …, which MLflow keeps"
        raise UsageError(f"alias {alias!r}", expected, "another", "correct it")


def register(
    server: str,
    name: str,
    checkpoint: str,
    manifest_sha256: str,
    alias: str | None,
    run_identity: str | None,
    tags: Mapping[str, str],
) -> Version:
    """The version of this name that stands for a checkpoint, made where there is none. `alias` is then that version's,
    and no other's. `run_identity`: of the run that trained it; `tags`: what else is to be read there. Raises UserError,
    UsageError as `refuse_bad_names`."""
    refuse_bad_names(name, alias)
    with refusing(server):
        client = mlflow_client(server)
        if not _models(client, name):
            client.create_registered_model(name)
        same = (checkpoint, manifest_sha256)
        mine = [found for found in _versions(client, name) if (found.checkpoint, found.manifest_sha256) == same]
        if mine:
            version = mine[0].version
        else:
            run_id = training_run(client, run_identity) if run_identity else None
            about = {**tags, CHECKPOINT: checkpoint, MANIFEST: manifest_sha256}
            if run_identity:
                about[IDENTITY] = run_identity
            source = checkpoint if "://" in checkpoint else f"{FOLDER}{checkpoint}"
            made = client.create_model_version(name, source, run_id, about, await_creation_for=None)
            version = int(made.version)
        if alias is not None:
            client.set_registered_model_alias(name, alias, str(version))
        return next(found for found in _versions(client, name) if found.version == version)


def registered(server: str, name: str | None = None) -> list[Version]:
    """Every version of a name, or of all, newest first of each. Raises UserError."""
    with refusing(server):
        return _versions(mlflow_client(server), name)


def find_version(uri: str, server: str | None) -> Version:
    """What `models:/NAME@ALIAS` or `models:/NAME/VERSION` stands for.

    Raises UsageError for another form and without a server, UserError naming what there is for an unknown name, alias
    or version.
    """
    match = re.fullmatch(rf"{SCHEME}({NAME.pattern})(?:@({ALIAS.pattern})|/(\d+))", uri, re.IGNORECASE)
    if match is None:
        raise UsageError(uri, f"{SCHEME}NAME@ALIAS or {SCHEME}NAME/VERSION", "another form", "correct it")
    if server is None or not is_server(server):
        step = f"set {ENVIRONMENT}, or give the checkpoint's own URI"
        raise UsageError(uri, "a tracking server to look it up on", server or "none", step)
    name, alias, version = match.groups()
    versions = registered(server, name)
    for found in versions:
        if alias in found.aliases or (version and found.version == int(version)):
            return found
    if not versions:
        there = ", ".join(sorted({found.name for found in registered(server)})) or "none"
        raise UserError(f"model {name}", f"one of those on {server}", f"there are: {there}", "glidepath models list")
    if alias:
        wanted, there_are = f"the alias {alias}", sorted(alias for found in versions for alias in found.aliases)
    else:
        wanted, there_are = f"the version {version}", [str(found.version) for found in reversed(versions)]
    found_text = f"{', '.join(there_are) or 'none'} there"
    raise UserError(f"model {name}", wanted, found_text, "glidepath models list shows all")


def _models(client: Any, name: str | None) -> list[Any]:
    """The registered models of this name, or all."""
    models, token = [], None
    while True:
        page = client.search_registered_models(f"name = '{name}'" if name else None, PER_PAGE, None, token)
        models += page
        token = page.token
        if not token:
            return models


def _versions(client: Any, name: str | None) -> list[Version]:
    """Those that stand for checkpoints; users may register other models."""
    found: list[Version] = []
    for model in _models(client, name):
        aliases: dict[int, list[str]] = {}
        for alias, version in model.aliases.items():
            aliases.setdefault(int(version), []).append(alias)
        token = None
        while True:
            page = client.search_model_versions(f"name = '{model.name}'", PER_PAGE, ["version_number DESC"], token)
            found += [
                _version(entry, aliases.get(int(entry.version), [])) for entry in page if CHECKPOINT in entry.tags
            ]
            token = page.token
            if not token:
                break
    return found


def _version(entry: Any, aliases: list[str]) -> Version:
    tags = entry.tags
    return Version(
        name=entry.name,
        version=int(entry.version),
        aliases=tuple(sorted(aliases)),
        checkpoint=tags[CHECKPOINT],
        manifest_sha256=tags.get(MANIFEST, ""),
        mlflow_run_id=entry.run_id or None,
        tags=tags,
    )
