"""Configuration: files that extend files, overrides, and refusals that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.config import PRESETS, Settings, find_config, parse, read_values
from data_pipeline.corpus import CorpusConfig
from data_pipeline.errors import UsageError


class Inner(Settings):
    workers: int = 1


class Outer(Settings):
    lr: float
    launcher: Inner = Inner()
    inputs: tuple[Inner, ...] = ()


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_file_wins_over_what_it_extends_and_an_override_wins_over_the_file(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "lr: 1\nlauncher: {workers: 3}\n")
    path = write(tmp_path, "top.yaml", "extends: base.yaml\nlr: 2\n")
    config = parse(Outer, read_values(path, ["lr=1e-4"]), "top")
    assert (config.lr, config.launcher.workers) == (1e-4, 3)
    assert parse(Outer, read_values(path), "top").lr == 2
    assert parse(Outer, read_values(path, ["launcher.workers=8"]), "top").launcher.workers == 8


@pytest.mark.parametrize(
    ("override", "near"),
    [("lrr=1", "lr"), ("launcher.worker=2", "workers"), ("inputs=[{wrkers: 1}]", "workers")],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(tmp_path: Path, override: str, near: str) -> None:
    path = write(tmp_path, "top.yaml", "lr: 2\n")
    with pytest.raises(UsageError, match=rf"top: key .*an unknown key; did you mean {near}\?"):
        parse(Outer, read_values(path, [override]), "top")


def test_a_quoted_number_stays_text_and_a_bare_exponent_is_a_number(tmp_path: Path) -> None:
    values = read_values(write(tmp_path, "top.yaml", "run: '1e3'\nlr: 1e-4\nbig: 2E+5\nname: 1e-4x\n"))
    assert values == {"run": "1e3", "lr": 1e-4, "big": 2e5, "name": "1e-4x"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("lr: [1", "expected YAML"),
        ("- 1", "expected a mapping of keys to values, found list"),
        ("extends: top.yaml", "extends: without a circle"),
        ("extends: none.yaml", "expected a readable file"),
        ("launcher: {workers: 1}", "key lr: expected a value, found none"),
        ("lr: fast", "key lr: expected a valid number"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    path = write(tmp_path, "top.yaml", text)
    with pytest.raises(UsageError) as refusal:
        parse(Outer, read_values(path), "top")
    assert line in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ("{kind: nope, uri: x}", "key decontaminate.sets.0.kind: expected 'webdataset', "),
        ("{kind: folder}", "add decontaminate.sets.0.uri: … or decontaminate.sets.0.uri=…"),
        ("{kind: folder, uri: x, urii: y}", "key decontaminate.sets.0.urii: .*did you mean uri"),
    ],
)
def test_a_key_inside_a_choice_of_kinds_is_told_by_its_path_alone(tmp_path: Path, entry: str, line: str) -> None:
    path = write(tmp_path, "top.yaml", "inputs: [{kind: folder, uri: x}]\n")
    with pytest.raises(UsageError, match=line):
        parse(CorpusConfig, read_values(path, [f"decontaminate.sets=[{entry}]"]), "top")


def test_an_override_without_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"key\.sub=value"):
        read_values(write(tmp_path, "top.yaml", "lr: 2\n"), ["lr"])


def test_a_missing_preset_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"presets are: .*glide-base-3\.5b"):
        find_config("train", "glide-bse")


def test_the_promised_presets_exist() -> None:
    train = {"tiny", "demo-base", "demo-upsampler", "glide-base-3.5b", "glide-upsampler-1.5b"}
    train |= {"glide-base-released", "glide-upsampler-released"}
    assert train <= {path.stem for path in (PRESETS / "train").glob("*.yaml")}
    assert {"demo", "photos"} <= {path.stem for path in (PRESETS / "corpus").glob("*.yaml")}


@pytest.mark.parametrize("given", ["{kind: webdataset, uri: 'U'}", "['U']", "'U'", "[{kind: no, uri: 'U'}]", "'U"])
def test_a_refused_value_is_shown_without_the_signature_or_user_of_an_address(given: str, tmp_path: Path) -> None:
    file = tmp_path / "corpus.yaml"
    file.write_text("output: x")
    for address in ("https://host/a.tar?Signature=SECRET&x=1", "s3://KEY:SECRET@bucket/a.tar"):
        with pytest.raises(UsageError) as refused:
            parse(CorpusConfig, read_values(file, [f"inputs={given.replace('U', address)}"]), "corpus")
        assert "SECRET" not in str(refused.value)
