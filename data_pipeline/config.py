"""Settings: pydantic models define them, YAML files choose values, `key.sub=value` overrides win.

Always holds: an unknown key is refused with the nearest valid one, never ignored; a loaded configuration is frozen.
Called by the command line; the models themselves live beside what they configure.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import UsageError

PRESETS = Path(__file__).resolve().parent.parent / "configs"


class Settings(BaseModel):
    """Base of every settings model: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as text; a number is what everybody means by it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)

S = TypeVar("S", bound=Settings)


def state_folder() -> Path:
    """Where runs, datasets and logs go by default: `$GLIDEPATH_HOME`, else `./.glidepath`."""
    return Path(os.environ.get("GLIDEPATH_HOME", ".glidepath")).absolute()


def find_config(kind: str, name: str) -> Path:
    """The YAML file that `name` means: a path, or the name of a preset in `configs/<kind>/`.

    Raises UsageError naming the presets of that kind when neither exists.
    """
    for candidate in (Path(name), PRESETS / kind / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    presets = ", ".join(sorted(path.stem for path in (PRESETS / kind).glob("*.yaml")))
    raise UsageError(f"configuration {name}", "a YAML file or a preset", "neither", f"{kind} presets are: {presets}")


def read_values(path: Path, overrides: typing.Sequence[str] = ()) -> dict[str, Any]:
    """The plain nested dictionary of a YAML file: `extends:` files underneath, `key.sub=value` overrides on top.

    `extends` is one path or a list, relative to the file; later ones win, the file itself wins over all of them.
    Override values parse as YAML. Raises UsageError for unreadable YAML, a missing or circular `extends`, an override
    without `=`.
    """
    values = _read_extended(path, ())
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UsageError(f"override {override!r}", "key.sub=value", "no '='", "write for example lr=1e-4")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise UsageError(f"override {key}", "a YAML value", _shown(text), "quote the value") from None
        _set_key(values, key, value)
    return values


def parse(model: type[S], values: dict[str, Any], source: str) -> S:
    """`values` as a frozen `model`. Raises UsageError naming the key, what it expects and the nearest valid key."""
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        raise _usage_error(model, invalid, source) from None


def _read_extended(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in chain:
        raise UsageError(f"{path}", "extends: without a circle", f"it extends itself through {chain[-1]}", "remove one")
    try:
        values = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        by = f"; extended by {chain[-1]}" if chain else ""
        raise UsageError(f"{path}", "a readable file", error.strerror or str(error), f"check the path{by}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}", "YAML", " ".join(str(error).split()), "correct the file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}", "UTF-8", error.reason, "save the file as UTF-8") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}", "a mapping of keys to values", type(values).__name__, "correct the file")
    parents = values.pop("extends", [])
    parents = parents if isinstance(parents, list) else [parents]
    merged: dict[str, Any] = {}
    for parent in parents:
        if not isinstance(parent, str):
            raise UsageError(f"{path}: key extends", "a path or a list of paths", repr(parent), "correct the value")
        merged = _merge(merged, _read_extended(path.parent / parent, (*chain, path)))
    return _merge(merged, values)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _set_key(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = values.get(parent)
        if not isinstance(child, dict):
            child = values[parent] = {}
        values = child
    values[last] = value


def _usage_error(model: type[Settings], invalid: ValidationError, source: str) -> UsageError:
    error = invalid.errors()[0]
    # A union names the member that it tried, such as `function-after[check(), Input]`, which is no key.
    location = [str(part) for part in error["loc"] if "[" not in str(part)]
    name = f"{source}: key {'.'.join(location) or '(top)'}"
    if error["type"] == "extra_forbidden":
        keys = sorted(_fields_at(model, error["loc"][:-1]))
        near = difflib.get_close_matches(location[-1], keys, n=1, cutoff=0.0)
        return UsageError(
            name, f"one of {', '.join(keys)}", "an unknown key", f"did you mean {near[0] if near else '-'}?"
        )
    if error["type"] == "missing":
        return UsageError(name, "a value", "none", f"add {'.'.join(location)}: … or {'.'.join(location)}=…")
    # Validators of our own say what they expected and found themselves.
    message, _, found = error["msg"].removeprefix("Value error, ").partition(", found ")
    message = message.removeprefix("Input should be ")
    if not location:
        name = source
    return UsageError(name, message, found or _shown(error["input"]), "correct the value")


def _shown(value: Any) -> str:
    """What was given, without user and query of addresses: they may be secret."""
    without_user = re.sub(r"//[^/@\s'\"]*@", "//…@", repr(value))
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\",}\]]*", r"\1?…", without_user)


def _fields_at(model: Any, location: typing.Sequence[int | str]) -> set[str]:
    """Valid keys at a location: through nested models, optional and list fields."""
    fields = dict(model.model_fields)
    for part in location:
        if isinstance(part, int) or part not in fields:  # list index, or the tag of a union
            continue
        fields = {
            name: field for inner in _models_in(fields[part].annotation) for name, field in inner.model_fields.items()
        }
    return set(fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
