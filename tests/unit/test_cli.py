"""The command line without an agent: every command explains itself, and what is shown cannot harm a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from agent import __version__, console
from agent.cli import main
from agent.errors import ConfigurationError, DatabaseError

HOSTILE = "evil\x1b]0;owned\x07\nforged\x9b31m \u202eright to left\r"
JOB: dict[str, Any] = {
    "id": "8d1b2a5e-0000-4000-8000-000000000000",
    "activity_id": "a-1",
    "activity_name": HOSTILE,
    "image_name": HOSTILE,
    "run": 1,
    "trigger": "webhook",
    "requested_by": HOSTILE,
    "state": "failed",
    "exit_code": 3,
    "fault": {"class": "user_code", "message": HOSTILE},
    "launch": 1,
    "agent": {"host": "a-machine", "seen_at": "2026-01-02T03:04:05+00:00"},
    "waiting_for": None,
    "live": True,
    "due_at": "2026-01-01T00:00:00+00:00",
    "held_until": None,
    "progress": {"waiting_for": HOSTILE},
    "resources": {"granted": {"cpus": 2, "memory_bytes": 1024}, "notes": [HOSTILE]},
    "created_at": "2026-01-02T03:04:05+00:00",
}
EVENT = {"id": 1, "at": "2026-01-02T03:04:05+00:00", "state": "queued", "attempt": 0, "note": HOSTILE, "done": None}
ACTIVITY = {
    "id": "a-1",
    "judged_at": "2026-01-02T03:04:05+00:00",
    "due_at": "2026-01-02T03:04:05+00:00",
    "reasons": [HOSTILE],
    "deliveries": [{"at": "2026-01-02T03:04:05+00:00", "source": HOSTILE}],
    "jobs": [JOB],
}


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


EVERY = dict(commands(main))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("agent.logs.configure", lambda *_: None)


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_explains_itself(path: tuple[str, ...], option: str) -> None:
    done = CliRunner().invoke(main, [*path, option])
    assert done.exit_code == 0
    command = EVERY[path]
    sentence = " ".join((command.help or "").split())
    assert sentence.endswith(".")
    assert sentence in " ".join(done.output.split())
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help or parameter.show_default, f"{parameter.name} is not explained"
        else:
            assert (parameter.name or "").upper() in sentence.upper(), f"{parameter.name} is not explained"


def test_help_lists_every_command_and_the_exit_codes() -> None:
    done = CliRunner().invoke(main, ["--help"])
    assert done.exit_code == 0
    for path, command in EVERY.items():
        assert (f"\n  {path[0]} " in done.output) != command.hidden
    assert "Exit codes: 0 done; 1 it failed" in " ".join(done.output.split())


def test_the_version_is_told() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"ovation-agent, version {__version__}\n"


@pytest.mark.parametrize("arguments", [["nothing"], ["show"], ["jobs", "--limit", "0"], ["logs", "-x", "1"]])
def test_a_wrong_command_line_is_2(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert "Usage: " in done.stderr


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigurationError("one\ntwo \x1b[2J"), 2), (DatabaseError("gone: Bearer abcdef"), 1)]
)
def test_errors_end_as_lines_with_an_exit_code(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("agent.settings.Settings.load", fail)
    done = CliRunner().invoke(main, ["jobs"])
    assert done.exit_code == code
    assert done.stdout == ""
    expected = ["one", "two \N{REPLACEMENT CHARACTER}[2J"] if code == 2 else ["gone: Bearer [redacted]"]
    assert done.stderr.splitlines() == [f"ovation-agent: {line}" for line in expected]


@pytest.mark.parametrize("name", ["jobs", "doctor"])
def test_ctrl_c_is_130(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("agent.settings.Settings.load", interrupt)
    assert CliRunner().invoke(main, [name]).exit_code == 130


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_shown_cannot_harm_a_terminal(
    is_terminal: bool, as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    monkeypatch.setenv("COLUMNS", "200")
    console.show_jobs([JOB], as_json=as_json)
    console.show_job(JOB, [EVENT], as_json=as_json)
    console.show_activity(ACTIVITY, as_json=as_json)
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # colours are the command's own
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e", "\r"}
    assert not [line for line in text.splitlines() if line.startswith("forged")]
    assert "evil" in text


def test_a_pipe_gets_a_line_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_jobs([JOB, {**JOB, "fault": None, "waiting_for": "Ovation"}], as_json=False)
    first, second = capsys.readouterr().out.splitlines()
    assert first.split("\t")[:2] == [JOB["id"], "failed"]
    assert first.split("\t")[6].startswith("user_code: evil")
    assert second.split("\t")[6] == "Ovation"


@given(st.dictionaries(st.text(), st.text()))
def test_json_is_what_it_was(value: dict[str, str]) -> None:
    printed: list[str] = []
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr("builtins.print", printed.append)
        console.show_jobs([value], as_json=True)
    assert json.loads(printed[0]) == [value]
    assert all(each.isprintable() or each == "\n" for each in printed[0])


async def pieces(*given: bytes) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece


async def test_a_pipe_gets_a_log_as_it_is(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    await console.show_log(pieces(b"a\x1b[31m\xff", "\u00e9".encode()[:1], "\u00e9".encode()[1:], b"\n"))
    assert capfdbinary.readouterr().out == b"a\x1b[31m\xff\xc3\xa9\n"


async def test_a_terminal_gets_no_orders_from_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    await console.show_log(pieces(b"50%\r100%\n\x1b]0;owned\x07", "\u00e9".encode()[:1], "\u00e9".encode()[1:]))
    assert capsys.readouterr().out == "50%\r100%\n\N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER}\u00e9"
