"""Writes settings.md: every key of every configuration, out of the models that define it.

Always holds: each key has a meaning, beside its definition (a comment, or the text below it) or in meanings.yaml, never
in both. Run by hand after a change of a setting, `python docs/settings_page.py`; a test compares.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cluster.evaluation_config import EvaluateConfig
from cluster.manifests.description import ClusterDescription
from data_pipeline.config import Settings
from data_pipeline.corpus import CorpusConfig
from trainer.config import TrainConfig
from trainer.recipes import RECIPES
from trainer.recipes.glide import GlideConfig

PAGE = Path(__file__).with_name("settings.md")
HEAD = """\
# Every setting

<!-- Written by docs/settings_page.py from the models that define the settings; change those, then run it. -->

A setting is a key of a YAML file, or `key.sub=value` on the command line, which wins. `[]` stands for each entry of a
list, `<name>` for a name of your own. A default of — means that the key has to be given, by the file, by what it
`extends`, or on the command line. What presets choose: `configs/`. How files and the command line are read:
[Training](training.md#configuration-files).
"""

MEANINGS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("meanings.yaml").read_text())

NUMBER = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
BOUNDS = {"minimum": "≥ ", "exclusiveMinimum": "> ", "maximum": "≤ ", "exclusiveMaximum": "< "}


def text() -> str:
    """The page."""
    pages = [HEAD, section("Training", "Every training run", TrainConfig, "`configs/train/*.yaml`")]
    pages.append(section("GLIDE", "The GLIDE recipes", GlideConfig, "", TrainConfig))
    shown: list[tuple[type[Settings], str]] = [(TrainConfig, "every run"), (GlideConfig, "the GLIDE recipes")]
    for name, (config, _) in RECIPES.items():
        base, of = next((base, of) for base, of in reversed(shown) if issubclass(config, base))
        pages.append(section(f"`{name}`", f"Recipe `{name}`", config, f"The keys of {of}, and:", base))
        shown.append((config, f"`{name}`"))
    pages.append(section("Corpus", "A corpus", CorpusConfig, "`configs/corpus/*.yaml`"))
    pages.append(section("Evaluation", "An evaluation", EvaluateConfig, "`configs/evaluate/*.yaml`"))
    pages.append(section("Cluster", "A cluster", ClusterDescription, "`configs/cluster/*.yaml`"))
    unused = MEANINGS.keys() - used_meanings
    assert not unused, f"docs/meanings.yaml: no such keys, or they have a meaning beside them: {sorted(unused)}"
    return "\n".join(pages)


def section(short: str, title: str, model: type[Settings], about: str, base: type[Settings] | None = None) -> str:
    """All keys of a model, or those that it adds to a base or gives another meaning; a heading for each group."""
    names = [name for name in model.model_fields if base is None or differs(model, base, name)]
    lines = [f"## {title}", "", *([about, ""] if about else [])]
    if not names:
        return f"## {title}\n\n{about.removesuffix(', and:')}.\n"
    groups: list[tuple[str, type[Settings], Any]] = []
    for heading, rows in tables(model, names, groups):
        lines += [f"### {short}: `{heading}`", ""] if heading else []
        lines += rows
    return "\n".join(lines)


def tables(
    model: type[Settings], names: list[str], groups: list[tuple[str, type[Settings], Any]]
) -> Iterator[tuple[str, list[str]]]:
    """(prefix of the keys, lines) of the model's own keys, then of every group below it, in order of appearance."""
    if rows := own_rows("", model, names, None, groups):
        yield "", table(rows)
    while groups:
        prefix, inner, default = groups.pop(0)
        below: list[tuple[str, type[Settings], Any]] = []
        rows = own_rows(prefix, inner, list(inner.model_fields), default, below)
        groups[:0] = below
        yield prefix.removesuffix("."), [*about_class(inner), *table(rows)] if rows else about_class(inner)


def own_rows(
    prefix: str, model: type[Settings], names: list[str], default: Any, groups: list[tuple[str, type[Settings], Any]]
) -> list[str]:
    """A row for each key that holds a value; keys that hold further keys are added to `groups`."""
    schema, rows = model.model_json_schema(), []
    for name in names:
        field = model.model_fields[name]
        value = getattr(default, name) if default is not None else default_of(field)
        inner = models_in(field.annotation)
        shape = brackets(field.annotation)
        groups += [(f"{prefix}{name}{shape}.", nested, None if shape else value) for nested in inner]
        if inner and isinstance(value, Settings):
            continue  # its heading says it
        kind = type_text(schema["properties"][name], schema.get("$defs", {}))
        rows.append(f"| `{prefix}{name}` | {kind} | {default_text(field, value)} | {meaning(model, name)} |")
    return rows


def table(rows: list[str]) -> list[str]:
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]


def about_class(model: type[Settings]) -> list[str]:
    return [escaped(" ".join((inspect.getdoc(model) or "").split())), ""]


def differs(model: type[Settings], base: type[Settings], name: str) -> bool:
    theirs, ours = base.model_fields.get(name), model.model_fields[name]
    return theirs is None or (theirs.annotation, theirs.default) != (ours.annotation, ours.default)


def models_in(annotation: Any) -> list[type[Settings]]:
    """The settings classes that a key's value may be, or hold."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, Settings) else []
    return [model for argument in typing.get_args(annotation) for model in models_in(argument)]


def brackets(annotation: Any) -> str:
    """How a key of an entry is written: [] below a list, .<name> below a mapping."""
    origin = typing.get_origin(annotation)
    if origin is tuple:
        return "[]"
    if origin is dict:
        return ".<name>"
    return next((found for part in typing.get_args(annotation) if models_in(part) and (found := brackets(part))), "")


def type_text(schema: dict[str, Any], known: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        named = known[schema["$ref"].rsplit("/", 1)[-1]]
        return "keys below" if named.get("type") == "object" else type_text(named, known)
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{value}`" for value in values)
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(type_text(choice, known) for choice in choices))
    kind = schema.get("type")
    if kind == "null":
        return "null"
    if kind == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(type_text(item, known) for item in schema['prefixItems'])}]"
        return f"list of {type_text(schema['items'], known)}"
    if kind == "object":
        entries = schema.get("additionalProperties")
        return f"name: {type_text(entries, known)}" if entries else "keys below"
    if kind is None:
        return "by recipe"
    if {"minimum", "maximum"} <= schema.keys():
        return f"{NUMBER[kind]}, {schema['minimum']:g} to {schema['maximum']:g}"
    bounds = " and ".join(f"{sign}{schema[bound]:g}" for bound, sign in BOUNDS.items() if bound in schema)
    return f"{NUMBER[kind]} {bounds}".rstrip()


def default_of(field: FieldInfo) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True)


def default_text(field: FieldInfo, value: Any) -> str:
    if field.is_required():
        return "—"
    plain = to_jsonable_python(value)
    if plain in ([], {}):
        return "none"
    if isinstance(plain, float):
        return f"{plain:g}"
    return escaped(plain if isinstance(plain, str) else json.dumps(plain))


used_meanings: set[str] = set()


def meaning(model: type[Settings], name: str) -> str:
    """What stands beside the key's definition, or in MEANINGS."""
    owner = next(base for base in model.__mro__ if name in inspect.get_annotations(base))
    beside, key = notes(owner).get(name, ""), f"{owner.__name__}.{name}"
    if not beside:
        assert key in MEANINGS, f"{key} has no meaning: write a comment beside it, or a line into docs/meanings.yaml"
        used_meanings.add(key)
    return escaped(beside or MEANINGS[key])


@cache
def notes(model: type[Settings]) -> dict[str, str]:
    """{field: the comment lines above it, comments beside it and the text below it} of a class's source."""
    lines = textwrap.dedent(inspect.getsource(model)).splitlines()
    (definition,) = ast.parse("\n".join(lines)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        above = first
        while lines[above - 1].lstrip().startswith("#"):
            above -= 1
        comments = [match[1] for line in lines[above:last] if (match := re.search(r"(?:^\s*|\s\s)# (.*)$", line))]
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            comments.append(" ".join(str(following.value.value).split()))
        found[node.target.id] = " ".join(comments)
    return found


def escaped(words: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table; `code` stays code."""
    parts = re.split(r"(`[^`]*`)", words)
    plain = [part if part.startswith("`") else re.sub(r"([*<>\[\]])", r"\\\1", part) for part in parts]
    return "".join(plain).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(text())
