from __future__ import annotations

import csv
import struct
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.domain.container import (
    Container,
    Ending,
    Network,
    User,
    arguments,
    environment,
    inspection_environment,
    judge,
    mount,
)
from agent.domain.image import complaint
from agent.domain.job import FaultClass, Verdict

PROGRAM = PurePosixPath("/opt/apptainer/bin/apptainer")
JOB = PurePosixPath("/data/jobs/1")
components = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0\r"), min_size=1, max_size=40
).filter(lambda name: name not in {".", ".."})
paths = st.lists(components, min_size=1, max_size=4).map(lambda parts: PurePosixPath("/", *parts))


def container(*, network: Network = "none", user: User | None = None, unsquash: bool = False) -> Container:
    return Container(
        image=JOB / "related/tool.sif",
        inputs=JOB / "inputs",
        related=JOB / "related",
        outputs=JOB / "run-1/outputs",
        scratch=JOB / "run-1/scratch",
        network=network,
        user=user,
        unsquash=unsquash,
    )


def values_of(words: list[str], option: str) -> list[str]:
    return [words[place + 1] for place, word in enumerate(words) if word == option]


@given(paths, st.booleans())
def test_any_path_survives_the_quoting_of_a_mount(path: PurePosixPath, writable: bool) -> None:
    [fields] = csv.reader([mount(path, "/inputs", writable=writable)], strict=True)
    expected = ["type=bind", f"source={path}", "destination=/inputs"]
    assert fields == (expected if writable else [*expected, "ro"])


@given(paths)
def test_the_image_is_the_last_word_and_cannot_be_an_option(path: PurePosixPath) -> None:
    whole = container()
    words = arguments(Container(path, whole.inputs, whole.related, whole.outputs, whole.scratch))
    assert words[-1] == str(path)
    assert words[-1].startswith("/")


@pytest.mark.parametrize("path", ["relative/image.sif", "-x", "/with\rreturn", "/with\0nul"])
def test_a_path_that_cannot_be_passed_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        mount(PurePosixPath(path), "/inputs", writable=False)


def test_only_the_outputs_are_writable() -> None:
    mounts = values_of(arguments(container()), "--mount")
    assert {value.split("destination=")[1] for value in mounts if not value.endswith(",ro")} == {
        "/outputs",
        "/data/outputs",
    }
    assert {value.split("destination=")[1] for value in mounts if value.endswith(",ro")} == {
        "/inputs,ro",
        "/data/inputs,ro",
        "/related,ro",
        "/data/related,ro",
    }


def test_no_mount_is_inside_another() -> None:
    places = [
        PurePosixPath(value.split("destination=")[1].removesuffix(",ro"))
        for value in values_of(arguments(container()), "--mount")
    ]
    assert not [(one, other) for one in places for other in places if one in other.parents]


def test_what_isolates_is_always_there() -> None:
    words = arguments(container())
    assert {"run", "--containall", "--no-home", "--cleanenv", "--no-eval", "--no-privs"} <= set(words)
    assert values_of(words, "--pwd") == ["/outputs"]
    assert values_of(words, "--workdir") == [str(JOB / "run-1/scratch")]


def test_the_network_is_off_unless_asked_for() -> None:
    assert values_of(arguments(container()), "--network") == ["none"]
    assert "--net" in arguments(container())
    assert not {"--net", "--network"} & set(arguments(container(network="host")))


def test_root_becomes_another_user() -> None:
    assert values_of(arguments(container(user=User(65534, 65533))), "--security") == ["uid:65534,gid:65533"]
    assert "--security" not in arguments(container())


@pytest.mark.parametrize(("uid", "gid"), [(0, 65534), (65534, 0), (-1, 1)])
def test_a_container_never_runs_as_root(uid: int, gid: int) -> None:
    with pytest.raises(ValueError, match="root"):
        User(uid, gid)


def test_an_image_is_unpacked_only_when_asked_for() -> None:
    assert "--unsquash" in arguments(container(unsquash=True))
    assert "--unsquash" not in arguments(container())


def test_the_environment_has_nothing_of_the_agents() -> None:
    variables = environment(PROGRAM, JOB / "run-1/private")
    assert variables["PATH"].startswith("/opt/apptainer/bin:")
    assert variables["APPTAINER_TMPDIR"] == variables["HOME"] == str(JOB / "run-1/private")
    assert not [name for name in variables if name.startswith(("APPTAINERENV_", "SINGULARITYENV_"))]


def test_inspecting_an_image_is_contained_as_well() -> None:
    variables = inspection_environment(PROGRAM, JOB, User(65534, 65534))
    assert variables["APPTAINER_SECURITY"] == "uid:65534,gid:65534"
    assert variables["APPTAINER_CONTAINALL"] == variables["APPTAINER_NO_PRIVS"] == "1"
    assert variables["APPTAINER_NETWORK"] == "none"
    assert "APPTAINER_SECURITY" not in inspection_environment(PROGRAM, JOB, None)


FATAL_FORMAT = "FATAL:   While checking container encryption: could not open image /x: image format not recognized\n"


@pytest.mark.parametrize(
    ("exit_code", "stderr", "cls", "words"),
    [
        (1, "one\nValueError: no column 'mass'\n\n", FaultClass.USER_CODE, "ValueError: no column 'mass'"),
        (3, "", FaultClass.USER_CODE, "exit code 3"),
        (126, "sh: x: Permission denied", FaultClass.USER_CODE, "not executable"),
        (127, "sh: x: not found", FaultClass.USER_CODE, "not found"),
        (255, "the tool says no", FaultClass.USER_CODE, "the tool says no"),
        (255, FATAL_FORMAT, FaultClass.IMAGE, "not an image"),
        (255, "FATAL:   container creation failed: kernel reported a bad superblock", FaultClass.IMAGE, "damaged"),
        (255, "FATAL:   exec /bin/sh failed: fork/exec /bin/sh: exec format error", FaultClass.IMAGE, "processor"),
        (255, "FATAL:   exec /x failed: fork/exec /x: no such file", FaultClass.IMAGE, "not in the image"),
        (255, "FATAL:   container creation failed: no space", FaultClass.PLATFORM, "could not start"),
        (1, 'Error for command "run": unknown flag: --x\n', FaultClass.PLATFORM, "unknown flag"),
        (1, "FATAL:   says the tool", FaultClass.USER_CODE, "exit code 1"),
        (135, "", FaultClass.IMAGE, "damaged"),
        (137, "", FaultClass.MEMORY, "probably"),
        (139, "", FaultClass.USER_CODE, "SIGSEGV"),
        (143, "", FaultClass.USER_CODE, "SIGTERM"),
        (159, "", FaultClass.USER_CODE, "signal 31"),
    ],
)
def test_why_a_run_failed(exit_code: int, stderr: str, cls: FaultClass, words: str) -> None:
    judgement = judge(Ending.EXITED, exit_code, stderr)
    assert judgement.verdict is Verdict.FAILED
    assert judgement.fault is not None
    assert judgement.fault.cls is cls
    assert words in judgement.fault.message


def test_exit_code_0_is_success_whatever_was_said() -> None:
    assert judge(Ending.EXITED, 0, FATAL_FORMAT).verdict is Verdict.SUCCEEDED


@given(st.integers(0, 255) | st.none(), st.text(max_size=200))
def test_the_ending_outweighs_the_exit_code(exit_code: int | None, stderr: str) -> None:
    limited = judge(Ending.TIME_LIMIT, exit_code, stderr, time_limit_seconds=5400)
    assert limited.fault is not None
    assert limited.fault.cls is FaultClass.TIME_LIMIT
    assert "1 h 30 min" in limited.fault.message
    endless = judge(Ending.LOG_LIMIT, exit_code, stderr, max_log_bytes=7)
    assert endless.fault is not None
    assert endless.fault.cls is FaultClass.USER_CODE
    assert judge(Ending.CANCELLED, exit_code, stderr).verdict is Verdict.CANCELLED
    lost = judge(Ending.LOST, exit_code, stderr)
    assert lost.fault is not None
    assert lost.fault.cls is FaultClass.NODE


@given(st.sampled_from(Ending), st.integers(0, 255) | st.none(), st.text(max_size=2000))
def test_a_fault_is_one_short_printable_line(ending: Ending, exit_code: int | None, stderr: str) -> None:
    judgement = judge(ending, exit_code, stderr)
    assert (judgement.fault is not None) == (judgement.verdict is Verdict.FAILED)
    if judgement.fault is not None:
        assert judgement.fault.message.isprintable()
        assert len(judgement.fault.message) < 500


def sif(machine: bytes = b"02", data_bytes: int = 1000) -> bytes:
    launch = b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0")
    numbers = struct.pack("<8q", 0, 0, 45, 48, 4096, 28080, 32176, data_bytes)
    return launch + b"SIF_MAGIC\0" + b"01\0" + machine + b"\0" + bytes(16) + numbers


def squashfs(whole_bytes: int) -> bytes:
    return b"hsqs" + bytes(36) + struct.pack("<Q", whole_bytes) + bytes(80)


@pytest.mark.parametrize(
    ("header", "size_bytes", "words"),
    [
        (b"", 0, "empty"),
        (sif(), 33175, "33,175 of 33,176"),
        (sif()[:60], 60, "not complete"),
        (sif(machine=b"04"), 40000, "aarch64"),
        (squashfs(5000), 4999, "4,999 of 5,000"),
        (squashfs(5000)[:50], 50, "not complete"),
    ],
)
def test_a_damaged_image_file_is_told_from_its_header(header: bytes, size_bytes: int, words: str) -> None:
    assert words in (complaint(header, size_bytes, "x86_64") or "")


@pytest.mark.parametrize(
    ("header", "size_bytes"), [(sif(), 33176), (sif(machine=b"00"), 99999), (squashfs(5000), 8192), (b"text", 4)]
)
def test_a_whole_image_file_is_left_to_apptainer(header: bytes, size_bytes: int) -> None:
    assert complaint(header, size_bytes, "x86_64") is None


@given(st.binary(max_size=128), st.integers(0, 2**40))
def test_no_header_is_too_strange(header: bytes, size_bytes: int) -> None:
    answer = complaint(header, size_bytes, "x86_64")
    assert answer is None or answer.isprintable()
