"""Captions are one normalised line; every dropped record has a reason."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline import captions
from data_pipeline.captions import CaptionError, normalise
from data_pipeline.filters import FILTERS, Facts, FilterSettings, reason_to_drop

facts = st.builds(Facts, st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 10**7), st.text(max_size=1200))
settings_ = st.builds(
    FilterSettings,
    preset=st.sampled_from(["none", "basic"]),
    min_side=st.none() | st.integers(1, 300),
    max_aspect=st.none() | st.floats(1, 10),
    min_caption=st.none() | st.integers(0, 20),
    max_caption=st.none() | st.integers(0, 2000),
)


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text.encode("utf-8", "replace"))
    assert normalise(once.encode()) == once


@given(st.text(alphabet="&amp;#3x<br/>i ", max_size=200))
def test_normalising_twice_changes_nothing_under_any_escaping(text: str) -> None:
    once = normalise(text.encode())
    assert normalise(once.encode()) == once


def test_a_caption_that_is_escaped_over_and_over_is_refused_at_once() -> None:
    assert normalise(b"&" + b"amp;" * 5 + b"lt;b&" + b"amp;" * 5 + b"gt;bold") == "bold"
    with pytest.raises(CaptionError, match="escaped more than 8 times"):
        normalise(b"&" + b"amp;" * 25_000)
    assert normalise(b"&amp;" * 20_000) == "&" * 20_000
    assert len(normalise(b"<a " * 33_000)) == 98_999


@given(st.text(alphabet="a \u0301\u0316\u0345\u0f73\u0f71\u0344\u1e9b\u0323\u00e9\ufdfa\uac01\u11a8", max_size=60))
def test_a_long_caption_is_normalised_as_a_short_one_is(text: str) -> None:
    assert unicodedata.normalize("NFKC", captions._decomposed(text)) == unicodedata.normalize("NFKC", text)


def test_a_row_of_combining_marks_takes_no_minutes() -> None:
    # CPython sorts a row of marks in time that grows with its square: some 5 minutes for these.
    marks = 240_000
    assert normalise(("a" + "\u0301\u0316" * marks).encode()) == "\u00e1" + "\u0316" * marks + "\u0301" * (marks - 1)


@given(st.text())
def test_a_caption_is_one_line_without_control_characters(text: str) -> None:
    caption = normalise(text.encode("utf-8", "replace"))
    assert caption == " ".join(caption.split())
    assert not any(unicodedata.category(character) == "Cc" for character in caption)


@given(st.binary())
def test_bytes_are_normalised_or_refused_and_nothing_else(raw: bytes) -> None:
    try:
        normalise(raw).encode()
    except CaptionError as error:
        assert error.reason == "caption_encoding"


@pytest.mark.parametrize(
    ("raw", "caption"),
    [
        (b"\xef\xbb\xbfa  dog\r\n", "a dog"),
        ("été".encode("utf-16"), "été"),
        ("ｆｕｌｌ　width".encode(), "full width"),
        (b"a\x00b\x1b[31mred", "a b [31mred"),
        ("zero\u200bwidth \u202eoverride".encode(), "zerowidth override"),
        ("family 👨\u200d👩\u200d👧".encode(), "family 👨\u200d👩\u200d👧"),
        (b"", ""),
        (b"valentine&amp;amp;#39;s&nbsp;day", "valentine's day"),
        (b"Orchid<br>Jungle <a href='http://x.org/y'>in <B>Yale</B></a> H<sub>2</sub>O", "Orchid Jungle in Yale H2O"),
        (b"(&lt;i&gt;Truong Son&lt;/i&gt; / &copy;: WWF)", "(Truong Son / \u00a9: WWF)"),
        ("full-width \uff06amp; &#8203;sign".encode(), "full-width & sign"),
        (
            b"R&region, I <3 you, a < b > c, AT&T; x, <|endoftext|>",
            "R&region, I <3 you, a < b > c, AT&T; x, <|endoftext|>",
        ),
        (b"&#0;&#xD800;&#x110000;", "\ufffd\ufffd\ufffd"),
    ],
)
def test_known_captions(raw: bytes, caption: str) -> None:
    assert normalise(raw) == caption


@pytest.mark.parametrize("raw", [b"caf\xe9", b"\xc0\xaf", b"\xed\xa0\x80", b"cut \xe2\x82", b"\xff\xfea"])
def test_bytes_in_no_certain_encoding_are_refused(raw: bytes) -> None:
    with pytest.raises(CaptionError):
        normalise(raw)


def test_every_messy_caption_is_normalised_or_refused(messy: Path) -> None:
    outcomes = {}
    for path in sorted((messy / "captions").glob("*.txt")):
        try:
            outcomes[path.name] = normalise(path.read_bytes())
        except CaptionError:
            outcomes[path.name] = None
    legacy = {name for name in outcomes if name.split("_")[0] in ("cp1251", "eucjp", "koi8r", "shiftjis")}
    assert legacy and all(outcomes[name] is None for name in legacy)
    assert all(outcomes[name] for name in outcomes if name.startswith("utf8_"))


@given(facts, settings_)
def test_a_record_is_kept_exactly_when_every_filter_keeps_it(record: Facts, chosen: FilterSettings) -> None:
    limits = chosen.resolved()
    reasons = [filter_(record, limits) for filter_ in FILTERS]
    assert (reason_to_drop(record, limits) is None) == (not any(reasons))


@given(facts)
def test_the_preset_none_keeps_every_picture_that_has_a_size(record: Facts) -> None:
    assert (reason_to_drop(record, FilterSettings(preset="none").resolved()) is None) == (
        min(record.width, record.height) >= 1
    )


@given(facts, settings_)
def test_turning_a_picture_on_its_side_changes_no_verdict(record: Facts, chosen: FilterSettings) -> None:
    turned = Facts(record.height, record.width, record.file_bytes, record.caption)
    assert reason_to_drop(record, chosen.resolved()) == reason_to_drop(turned, chosen.resolved())


def test_a_threshold_replaces_that_of_the_preset_and_null_removes_it() -> None:
    limits = FilterSettings(preset="basic", min_side=128, max_aspect=None).resolved()
    assert (limits.min_side, limits.max_aspect, limits.max_caption) == (128, None, 1000)
    assert FilterSettings().resolved() == FilterSettings(preset="basic").resolved()


def test_an_impossible_threshold_is_refused() -> None:
    with pytest.raises(ValidationError):
        FilterSettings(max_aspect=0.5)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Facts(63, 200, 1000, "a dog"), "image_too_small"),
        (Facts(64, 129, 1000, "a dog"), "image_aspect"),
        (Facts(64, 128, 1000, "ad"), "caption_too_short"),
        (Facts(64, 128, 1000, "a" * 1001), "caption_too_long"),
        (Facts(64, 128, 1000, "a dog"), None),
    ],
)
def test_the_basic_preset_drops_for_the_reason_in_its_table(record: Facts, reason: str | None) -> None:
    assert reason_to_drop(record, FilterSettings(preset="basic").resolved()) == reason
