"""File names: whatever Ovation calls a thing, its file stays inside its directory and apart from the others."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.domain.workdir import MANIFEST, NAME_MAX_BYTES, Layout, safe_name, unique_names

anything = st.text(st.characters(), max_size=400)
nasty = st.sampled_from(
    [
        "",
        ".",
        "..",
        "/",
        "../../etc/passwd",
        "/etc/passwd",
        "a/b",
        "-rf",
        ".hidden",
        "a\nb",
        "a\0b",
        "\ud800",
        " ",
        ". ",
    ]
)
names = anything | nasty | st.text("aA.", max_size=6)
uuids = st.uuids().map(str)


@given(names)
def test_a_safe_name_is_one_component_that_stays_inside(name: str) -> None:
    safe = safe_name(name)
    assert safe not in {"", ".", ".."}
    assert "/" not in safe
    assert "\0" not in safe
    assert len(safe.encode()) <= NAME_MAX_BYTES
    assert PurePosixPath("/inputs", safe).parent == PurePosixPath("/inputs")
    assert all(ord(character) >= 32 for character in safe)


@given(names)
def test_a_safe_name_is_stable(name: str) -> None:
    assert safe_name(safe_name(name)) == safe_name(name)


@given(
    st.text(st.characters(categories=("L", "N")), min_size=1, max_size=60), st.sampled_from([".csv", ".fastq.gz", ""])
)
def test_an_ordinary_name_is_kept(stem: str, suffix: str) -> None:
    assert safe_name(stem + suffix) == stem + suffix


@given(st.lists(st.tuples(names, uuids | names), max_size=30))
def test_no_two_files_share_a_name(entries: list[tuple[str, str]]) -> None:
    given_names = unique_names(entries)
    assert len(given_names) == len(entries)
    assert len(set(given_names)) == len(given_names)
    assert MANIFEST not in given_names
    assert all(safe_name(name) == name for name in given_names)


def test_the_second_of_a_name_carries_its_revision() -> None:
    entries = [("reads.fastq.gz", "11111111-aaaa"), ("reads.fastq.gz", "22222222-bbbb"), ("a", "3"), ("A", "4")]
    assert unique_names(entries) == ["reads.fastq.gz", "reads.22222222.fastq.gz", "a", "A"]


def test_a_file_cannot_take_the_manifests_place() -> None:
    assert unique_names([(MANIFEST, "12345678-x")]) == [".manifest.12345678.json"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../../etc/passwd", ".._.._etc_passwd"),
        ("/etc/passwd", "_etc_passwd"),
        ("two\nlines.txt", "two_lines.txt"),
        ("..", "__"),
        ("", "_"),
        ("-rf", "-rf"),
        ("Zellkultur Ä 3.tif", "Zellkultur Ä 3.tif"),
    ],
)
def test_names_that_people_meet(name: str, expected: str) -> None:
    assert safe_name(name) == expected


def test_a_long_name_keeps_its_suffix() -> None:
    safe = safe_name("ä" * 300 + ".fastq.gz")
    assert safe.endswith(".fastq.gz")
    assert 250 <= len(safe.encode()) <= NAME_MAX_BYTES


def test_a_job_has_its_own_directory() -> None:
    layout = Layout(PurePosixPath("/data"), "j1")
    assert str(layout.inputs) == "/data/jobs/j1/inputs"
    assert str(layout.run(2)) == "/data/jobs/j1/run-2"
