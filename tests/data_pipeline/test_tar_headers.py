"""The short way through a tar's headers finds what tarfile finds, in sound tars and in damaged ones."""

from __future__ import annotations

import io
import re
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.sources import webdataset

NAMES = ("d/0000.jpg", "d/0000.txt", "d/é.jpg", f"{'x' * 90}/1.jpg", f"{'y' * 60}/{'x' * 90}.txt")


def tar_of(format_: int) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format_) as tar:
        for number, name in enumerate(NAMES):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 10 + number, 1.5 * number
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return sink.getvalue()


def index_of(data: bytes) -> tuple[str, str]:
    found, damage = webdataset._index(io.BytesIO(data), len(data))
    return repr(found), re.sub(r"at byte \d+", "", damage)


def both_ways_find_the_same(data: bytes) -> bool:
    short = index_of(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webdataset, "_plain_member", lambda headers, tar: None)
        return index_of(data) == short


def test_all_but_the_first_of_plain_headers_go_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    short, found = webdataset._plain_member, []
    monkeypatch.setattr(webdataset, "_plain_member", lambda *given: found.append(short(*given)) or found[-1])
    index_of(tar_of(tarfile.USTAR_FORMAT))
    # tarfile reads the first itself when it opens; the last name is in two pieces; then comes the end.
    assert [member and member.name for member in found] == [None, *NAMES[1:4], None, None]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]), st.data())
def test_both_ways_find_the_same_in_whole_and_damaged_tars(format_: int, data: st.DataObject) -> None:
    damaged = bytearray(tar_of(format_))
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, 7000)) % len(damaged)] = data.draw(
            st.sampled_from([0, 32, 48, 49, 55, 56, 255])
        )
    cut = data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))
    assert both_ways_find_the_same(bytes(damaged[:cut]))


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_both_ways_find_the_same_in_a_tar_that_is_cut_next_to_a_header(format_: int) -> None:
    whole = tar_of(format_)
    for end in range(0, len(whole), tarfile.BLOCKSIZE):
        for cut in range(max(end - 2, 0), end + 3):
            assert both_ways_find_the_same(whole[:cut]), cut
