"""What a run may use: wishes, labels, limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.domain.resources import CPUS, GPUS, MEMORY, NAMES, NOTHING_SAID, TIME, Resources, grant, wishes

GIB = 1 << 30


def granted(label: str, text: str) -> Resources:
    return grant({label: text}, {}, NOTHING_SAID, NOTHING_SAID).given


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1073741824", GIB),
        ("1G", GIB),
        ("1.5G", 3 * GIB // 2),
        ("2 GiB", 2 * GIB),
        ("512m", GIB // 2),
        ("4GB", 4 * GIB),
        ("0", None),
        ("-1G", None),
        ("1E9", None),
        ("much", None),
        ("9" * 40, None),
        ("١G", None),  # noqa: RUF001 a digit, but not ours
    ],
)
def test_memory(text: str, expected: int | None) -> None:
    assert granted(MEMORY, text).memory_bytes == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400),
        ("90s", 90),
        ("2h", 7200),
        ("1.5h", 5400),
        ("1d", 86_400),
        ("1:30", 5400),
        ("0:01:30", 90),
        ("2-12:00:00", 216_000),
        ("0", None),
        ("soon", None),
        ("1:99:99:99", None),
    ],
)
def test_time(text: str, expected: int | None) -> None:
    assert granted(TIME, text).time_seconds == expected


@pytest.mark.parametrize(("text", "expected"), [("4", 4), ("0", None), ("-2", None), ("2.5", None), ("999999", None)])
def test_cpus(text: str, expected: int | None) -> None:
    assert granted(CPUS, text).cpus == expected


def test_no_gpu_can_be_asked_for_where_one_is_the_default() -> None:
    assert grant({}, {GPUS: "0"}, Resources(gpus=1), NOTHING_SAID).given.gpus == 0


def test_the_activity_goes_before_the_image_and_the_image_before_the_default() -> None:
    default = Resources(cpus=1, memory_bytes=GIB, time_seconds=60)
    found = grant({CPUS: "2", MEMORY: "2G"}, {CPUS: "3"}, default, NOTHING_SAID)
    assert found.given == Resources(cpus=3, memory_bytes=2 * GIB, time_seconds=60)
    assert found.asked == Resources(cpus=3, memory_bytes=2 * GIB)
    assert found.notes == ()


def test_what_is_beyond_the_limit_is_cut_and_said() -> None:
    found = grant({CPUS: "64"}, {TIME: "10d"}, NOTHING_SAID, Resources(cpus=8, time_seconds=86_400))
    assert found.given == Resources(cpus=8, time_seconds=86_400)
    assert found.notes == (
        "compute.cpus: 64 CPUs were asked for, 8 CPUs are allowed here",
        "compute.time: 864000 s were asked for, 86400 s are allowed here",
    )


def test_a_default_beyond_the_limit_is_cut_in_silence() -> None:
    found = grant({}, {}, Resources(cpus=4), Resources(cpus=2))
    assert (found.given.cpus, found.notes) == (2, ())


def test_what_cannot_be_read_is_said_and_the_label_holds() -> None:
    found = grant({CPUS: "2"}, {CPUS: "lots"}, NOTHING_SAID, NOTHING_SAID)
    assert found.given.cpus == 2
    assert "the property compute.cpus is 'lots', which cannot be read" in found.notes[0]


def test_people_who_disagree_are_told() -> None:
    asked = wishes({CPUS: ("4", "2"), MEMORY: (" 1G ", ""), "other": ("x",)})
    assert asked == {CPUS: "2 or 4", MEMORY: "1G"}
    found = grant({}, asked, NOTHING_SAID, NOTHING_SAID)
    assert found.given == Resources(memory_bytes=GIB)
    assert "'2 or 4', which cannot be read" in found.notes[0]


TEXTS = st.dictionaries(
    st.sampled_from(NAMES), st.text(max_size=80) | st.from_regex(r"[0-9]{1,6}[KMGTsmhd]?", fullmatch=True)
)
LIMITS = st.builds(
    Resources,
    cpus=st.none() | st.integers(1, 100),
    memory_bytes=st.none() | st.integers(1, 1 << 40),
    gpus=st.none() | st.integers(1, 8),
    time_seconds=st.none() | st.integers(1, 10**6),
)


@given(labels=TEXTS, asked=TEXTS, default=LIMITS, most=LIMITS)
def test_whatever_is_wished_for_nothing_is_beyond_the_limit(
    labels: dict[str, str], asked: dict[str, str], default: Resources, most: Resources
) -> None:
    found = grant(labels, asked, default, most)
    for name, limit in most.document().items():
        value = getattr(found.given, name)
        assert value is None or value <= limit
    for name in default.document():
        assert getattr(found.given, name) is not None
