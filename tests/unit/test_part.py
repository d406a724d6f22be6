"""A file that is fetched in ranges: what is to come, what is there, what the journal tells of it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.adapters.part import Part, bytes_on_disk, journal_of, ranges_of

ETAG = '"tag"'
CONTENT = bytes(range(256)) * 8


@st.composite
def _there(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int]:
    edges = sorted(draw(st.sets(st.integers(0, 200), max_size=20)))
    done = [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=False)]
    return done, draw(st.integers(max([1, *edges]), 260))


@given(_there(), st.integers(1, 50))
def test_ranges_cover_the_whole_once_and_ask_for_what_is_lacking(
    there: tuple[list[tuple[int, int]], int], length: int
) -> None:
    done, size = there
    ranges = ranges_of(done, size, length)
    assert [each.start for each in ranges] == [0, *(each.end for each in ranges[:-1])][: len(ranges)]
    assert ranges[-1].end == size
    assert [(each.start, each.end) for each in ranges if each.at == each.end] == done
    assert all(each.at == each.start and each.end - each.start <= length for each in ranges if each.at < each.end)


@given(st.integers(1, 1 << 31), st.integers(4 << 20, 32 << 20), st.integers(1, 16))
def test_the_last_ranges_are_short_where_many_come_at_once(size: int, length: int, at_once: int) -> None:
    ranges = ranges_of([], size, length, at_once)
    assert [each.start for each in ranges] == [0, *(each.end for each in ranges[:-1])]
    assert ranges[-1].end == size
    lengths = [each.end - each.start for each in ranges]
    assert max(lengths) <= length
    assert lengths == sorted(lengths, reverse=True)
    if at_once > 1:
        assert lengths[-1] <= 8 << 20
    assert len(ranges) <= 2 + size // min(length, 8 << 20)


def opened(path: Path, size: int = len(CONTENT), etag: str = ETAG, length: int = 500) -> Part:
    return Part(path, size, etag, length)


def test_what_was_noted_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "part"
    part = opened(path)
    assert (part.found, part.lacking) == (0, len(CONTENT))
    second = part.ranges[1]
    part.write(second, memoryview(CONTENT)[500:700])
    part.checkpoint()
    part.write(second, memoryview(CONTENT)[700:800])  # not noted
    part.close()
    assert bytes_on_disk(path) == 200
    again = opened(path, length=1000)
    assert (again.found, again.lacking) == (200, len(CONTENT) - 200)
    assert [(each.start, each.at, each.end) for each in again.ranges[:3]] == [
        (0, 0, 500),
        (500, 700, 700),
        (700, 700, 1700),
    ]
    again.close()


@pytest.mark.parametrize(("size", "etag"), [(len(CONTENT) + 1, ETAG), (len(CONTENT), '"other"')])
def test_what_is_there_of_another_object_goes(tmp_path: Path, size: int, etag: str) -> None:
    path = tmp_path / "part"
    part = opened(path)
    part.write(part.ranges[0], memoryview(CONTENT)[:500])
    part.checkpoint()
    part.close()
    other = opened(path, size, etag)
    assert (other.found, path.stat().st_size) == (0, 0)
    other.close()


@given(
    st.one_of(
        st.binary(max_size=50),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        ).map(lambda done: json.dumps({"size": len(CONTENT), "etag": ETAG, "done": done}).encode()),
    )
)
def test_no_journal_makes_more_of_it_than_there_is(tmp_path_factory: pytest.TempPathFactory, journal: bytes) -> None:
    path = tmp_path_factory.mktemp("part") / "part"
    path.write_bytes(CONTENT[:1000])
    journal_of(path).write_bytes(journal)
    assert bytes_on_disk(path) <= 1000
    part = opened(path)
    assert part.found <= 1000
    assert part.found + part.lacking == len(CONTENT)
    assert part.ranges[-1].end == len(CONTENT)
    part.close()


def test_digests_follow_ranges_that_come_in_any_order(tmp_path: Path) -> None:
    part = opened(tmp_path / "part")
    found: dict[str, str] = {}
    readers = [
        threading.Thread(target=lambda name=name: found.update({name: part.digest(name)})) for name in ("sha256", "md5")
    ]
    for reader in readers:
        reader.start()
    for each in reversed(part.ranges):
        middle = (each.start + each.end) // 2
        part.write(each, memoryview(CONTENT)[each.start : middle])
        part.write(each, memoryview(CONTENT)[middle : each.end])
    for reader in readers:
        reader.join(10)
    assert found == {
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "md5": hashlib.md5(CONTENT, usedforsecurity=False).hexdigest(),
    }
    part.close()


def test_a_digest_ends_when_nothing_more_comes(tmp_path: Path) -> None:
    part = opened(tmp_path / "part")
    caught: list[Any] = []

    def read() -> None:
        try:
            part.digest("sha256")
        except EOFError as error:
            caught.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    part.write(part.ranges[0], memoryview(CONTENT)[:10])
    part.end()
    reader.join(10)
    assert len(caught) == 1
    part.close()


def test_a_link_in_its_place_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "part").symlink_to(tmp_path / "victim")
    part = opened(tmp_path / "part")
    part.write(part.ranges[0], memoryview(CONTENT)[:10])
    part.close()
    assert (tmp_path / "victim").read_text() == "precious"


def test_discarded_nothing_is_left(tmp_path: Path) -> None:
    part = opened(tmp_path / "part")
    part.checkpoint()
    part.discard()
    part.close()
    assert os.listdir(tmp_path) == []  # noqa: PTH208 names
