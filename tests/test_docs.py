"""The docs are held against the project: links, commands, settings, code, pictures.

Always holds: nothing that a page shows is run here; commands are parsed by the real command line and their settings by
the real models. `make docs` builds the site.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from cluster.cli import app, load_train_config
from cluster.corpus_commands import load_corpus_config
from cluster.evaluation_config import EvaluateConfig
from cluster.manifests.description import ClusterDescription
from data_pipeline.config import find_config, parse, read_values
from data_pipeline.corpus import CorpusConfig
from data_pipeline.corpus_plan import is_corpus
from data_pipeline.errors import UsageError
from trainer.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"])
FOLDERS = ("data_pipeline", "trainer", "cluster", "configs", "tests", "benchmarks", "docs")
A_FILE = re.compile(rf"({'|'.join(FOLDERS)})/[\w./-]+\.(py|md|ya?ml|json|png|txt)")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Command(NamedTuple):
    """A command line of a page. `refusal`: the page's next line, where that is an error."""

    arguments: list[str]
    refusal: str | None


@cache
def tokens_of(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def inline_of(page: Path, kind: str) -> list[Token]:
    return [token for block in tokens_of(page) for token in block.children or () if token.type == kind]


def blocks_of(page: Path, *languages: str) -> list[str]:
    """Code blocks; indented ones have the language ""."""
    kinds = ("fence", "code_block")
    return [token.content for token in tokens_of(page) if token.type in kinds and token.info.strip() in languages]


@cache
def anchors_of(page: Path) -> set[str]:
    """What can be linked to in a page: its headings, as GitHub and MyST write them."""
    found: dict[str, int] = {}
    headings = zip(tokens_of(page), tokens_of(page)[1:], strict=False)
    for text in [following.children or () for token, following in headings if token.type == "heading_open"]:
        words = "".join(part.content for part in text).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


@by_page
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    links = [str(token.attrs["href"]) for token in inline_of(page, "link_open")]
    links += [str(token.attrs["src"]) for token in inline_of(page, "image")]
    for link in links:
        if re.match(r"(https?|mailto):", link):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists() and ROOT in target.parents, f"{link} leads to nothing"
        assert not anchor or anchor in anchors_of(target), f"{link}: no such heading"
    for code in inline_of(page, "code_inline"):
        if A_FILE.fullmatch(code.content):
            assert (ROOT / code.content).exists(), f"{code.content} is gone"


def commands_of(page: Path) -> Iterator[Command]:
    """`glidepath …` in code blocks, up to a pipe or a redirection; continued lines are one."""
    for block in blocks_of(page, "", "sh", "bash", "console"):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if re.match(r"\s*glidepath\s", line):
                words = shlex.split(line, comments=True)[1:]
                end = next((index for index, word in enumerate(words) if word in ("|", ">", "&&", ";", "&")), None)
                yield Command(words[:end], following if following.startswith("error: ") else None)


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """(name, parameters) of a command line as the real one reads it, without doing it."""
    command = command_line()
    name: list[str] = []
    rest, context = arguments, None
    while True:
        context = command.make_context(command.name, list(rest), parent=context)
        if not hasattr(command, "resolve_command"):
            return " ".join(name), context.params
        rest = [*context._protected_args, *context.args]
        called, command, rest = command.resolve_command(context, rest)
        name.append(called)


@cache
def settings_page() -> Any:
    """docs/settings_page.py as a module."""
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs" / "settings_page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def known_keys(model: Any, prefix: str = "") -> set[str]:
    """Dotted keys of a settings model; whatever is below a list or a mapping counts as its key."""
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        keys.add(f"{prefix}{name}")
        for inner in settings_page().models_in(field.annotation):
            keys |= known_keys(inner, f"{prefix}{name}.")
    return keys


@cache
def keys_of(kind: str) -> set[str]:
    trained = [known_keys(config) for config, _ in RECIPES.values()]
    models = {"corpus": CorpusConfig, "evaluate": EvaluateConfig, "cluster": ClusterDescription}
    return set().union(*trained) if kind == "train" else known_keys(models[kind])


LOAD = {
    "train": load_train_config,
    "corpus": load_corpus_config,
    "evaluate": lambda name, given: parse(EvaluateConfig, read_values(find_config("evaluate", name), given), name),
    "cluster": lambda name, given: parse(ClusterDescription, read_values(find_config("cluster", name), given), name),
}
KIND = {"train": "train", "submit train": "train", "corpus build": "corpus", "submit corpus build": "corpus"}
KIND |= {"evaluate": "evaluate", "submit evaluate": "evaluate"}


def settings_of(name: str, found: dict[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """(kind, configuration, overrides) of a parsed command."""
    config, given = found.get("config"), list(found.get("overrides") or ())
    if name == "manifests":
        yield "cluster", found["cluster"], list(found["settings"] or ())
    if config is None:
        return
    kind = ("corpus" if is_corpus(config) else "train") if name == "plan" else KIND.get(name, "train")
    yield kind, config, given


def is_preset(kind: str, name: str) -> bool:
    try:
        find_config(kind, name)
    except UsageError:
        return False
    return True


@by_page
def test_commands_are_ones_that_the_command_line_and_its_settings_take(page: Path) -> None:
    for command in commands_of(page):
        shown = f"glidepath {shlex.join(command.arguments)}"
        try:
            name, found = parsed(command.arguments)
        except typer.TyperException as error:
            pytest.fail(f"{shown}: {error}")
        for kind, config, given in settings_of(name, found):
            if command.refusal is None:
                unknown = {text.partition("=")[0] for text in given} - keys_of(kind)
                assert all("=" in text for text in given) and not unknown, f"{shown}: no such setting {unknown}"
            if not is_preset(kind, config) or any("…" in text for text in given):
                continue  # a file of the reader's, or a value that is left to them
            try:
                LOAD[kind](config, given)
            except UsageError as error:
                expected = "|".join(re.escape(command.refusal or "none").split("…"))
                assert re.fullmatch(expected.replace("|", ".*"), f"error: {error}"), f"{shown}: {error}"


@by_page
def test_code_blocks_are_python_and_yaml_that_can_be_read(page: Path) -> None:
    for block in blocks_of(page, "python"):
        # Lines of a table stand alone on a page.
        ast.parse(f"{{{block}}}" if block.startswith('    "') else block)
    for block in blocks_of(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


@by_page
def test_settings_named_in_the_text_exist(page: Path) -> None:
    known = keys_of("train") | keys_of("corpus") | keys_of("evaluate") | keys_of("cluster")
    groups = {key.partition(".")[0] for key in known if "." in key}
    for token in inline_of(page, "code_inline"):
        key = re.fullmatch(r"([a-z]\w*(?:\.[a-z]\w*)+)(=.*)?", token.content, re.DOTALL)
        if key and key[1].partition(".")[0] in groups and not re.search(r"\.(py|json|safetensors|md|yaml)$", key[1]):
            assert key[1] in known, f"no such setting: {key[1]}"


def test_the_page_of_settings_is_the_one_that_the_models_make() -> None:
    stale = "docs/settings.md is not what the settings are now: run .venv/bin/python docs/settings_page.py"
    assert settings_page().text() == (ROOT / "docs" / "settings.md").read_text(), stale


def test_each_picture_names_the_script_that_makes_it() -> None:
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \|", (ROOT / "docs/pictures/README.md").read_text(), re.MULTILINE)
    shown = {(page.parent / str(token.attrs["src"])).resolve() for page in PAGES for token in inline_of(page, "image")}
    assert {ROOT / picture for picture, _ in rows} == shown | {
        path for path in (ROOT / "docs" / "pictures").iterdir() if path.suffix != ".md"
    }
    assert all((ROOT / script).is_file() for _, script in rows)


def test_every_page_stands_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    listed = re.findall(r"^[a-z-]+$", "\n".join(re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL)), re.MULTILINE)
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert len(listed) == len(set(listed)) and set(listed) == pages
