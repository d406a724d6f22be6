"""What tests of real containers share: run a script in one, and see that nothing of it is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent.adapters import runner
from agent.adapters.executor import Ended, RunRequest
from agent.adapters.local import LocalExecutor, LocalSettings
from tests.images import images, write_script

QUICK = LocalSettings(grace_seconds=0.5, kill_seconds=0.5)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a script in a container came to."""

    ended: Ended
    stdout: str
    stderr: str


def make_request(
    place: Path,
    script: str,
    *,
    image: Path | None = None,
    time_limit_seconds: float = 60,
    max_log_bytes: int | None = None,
    network: Literal["none", "host"] = "none",
) -> RunRequest:
    """Make the directories of a job that runs `script`."""
    place.mkdir(parents=True, exist_ok=True)
    write_script(place / "inputs", script)
    (place / "related").mkdir(exist_ok=True)
    (place / "related").chmod(0o755)
    return RunRequest(
        name="job-1",
        directory=place / "run-1",
        image=image or images().scripted,
        inputs=place / "inputs",
        related=place / "related",
        time_limit_seconds=time_limit_seconds,
        max_log_bytes=max_log_bytes,
        network=network,
    )


async def finish(request: RunRequest, executor: LocalExecutor | None = None) -> Outcome:
    """Start the run, wait for its end, and return what it came to."""
    executor = executor or LocalExecutor(QUICK)
    await executor.start(request)
    ended = await executor.wait(request, 60)
    assert isinstance(ended, Ended), ended
    return Outcome(ended, request.stdout.read_text(errors="replace"), request.stderr.read_text(errors="replace"))


async def run_script(place: Path, script: str, *, network: Literal["none", "host"] = "none") -> Outcome:
    """Run `script` in a container."""
    return await finish(make_request(place, script, network=network))


async def until(condition: Callable[[], bool], timeout_seconds: float = 20) -> None:
    """Wait until the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def container_pid(request: RunRequest) -> int:
    """Return the pid of Apptainer's starter, which leads the run's session."""
    started = runner.read_json(str(request.directory), runner.STARTED)
    assert started is not None
    return int(started["pid"])


def runner_pid(request: RunRequest) -> int:
    """Return the pid of the run's runner."""
    claim = runner.read_json(str(request.directory), runner.CLAIM)
    assert claim is not None
    return int(claim["pid"])


def processes_with(mark: str) -> list[int]:
    """Return the processes, in any namespace, that have `mark` as a word of their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark.encode() in words:
                found.append(int(entry.name))
    return found
