"""What systemd is told."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from agent.adapters.service_manager import notify, watchdog_seconds
from agent.sandbox.server import Sandbox
from tests.agents import running_agent, until


def test_it_is_told_through_its_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        assert notify("READY=1", "STATUS=up", environment={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert manager.recv(100) == b"READY=1\nSTATUS=up"


def test_an_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0ovation-agent-{os.getpid()}")
        assert notify("WATCHDOG=1", environment={"NOTIFY_SOCKET": f"@ovation-agent-{os.getpid()}"})
        assert manager.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/to/be/found"])
def test_without_one_nothing_happens(address: str) -> None:
    assert not notify("READY=1", environment={"NOTIFY_SOCKET": address})
    assert not notify("READY=1", environment={})


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 30),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 30),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
    ],
)
def test_how_often_it_wants_a_sign_of_life(environment: dict[str, str], seconds: float | None) -> None:
    assert watchdog_seconds(environment) == seconds


async def test_a_real_agent_tells_that_it_listens_lives_and_stops(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
        manager.bind(str(tmp_path / "notify"))
        said: list[str] = []

        async def told(words: str, log: Path) -> None:
            async def look() -> bool | None:
                with suppress(BlockingIOError):
                    while True:
                        said.append(manager.recv(1000).decode())
                return True if any(words in each for each in said) else None

            await until(look, words, log)

        async with Sandbox(tmp_path / "sandbox") as sandbox:
            settings = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
            async with running_agent(sandbox.environment(), tmp_path / "agent", **settings) as agent:
                await told("READY=1", agent.log)
                await told("WATCHDOG=1", agent.log)
                said.clear()
                await told("WATCHDOG=1", agent.log)  # again and again
                await agent.stop()
                await told("STOPPING=1", agent.log)
