"""What is on record of a run on a cluster: in its directory, which the agent and the nodes share."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.adapters import runner

SUBMITTING = "submitting.json"  # a job is about to be submitted
SUBMITTED = "submitted.json"  # its id


class Appearing:
    """Looks out for a file that appears in any of many directories: one look for all that wait, every few moments.

    On a file system that several machines share nobody tells of what another one has written.
    """

    def __init__(self, name: str, every_seconds: float) -> None:
        self._name = name
        self._every_seconds = every_seconds
        self._waiting: dict[Path, asyncio.Event] = {}
        self._looking: asyncio.Task[None] | None = None

    async def wait(self, directory: Path, seconds: float) -> bool:
        """Wait until the file is there, so long at most; say whether it is."""
        event = self._waiting.setdefault(directory, asyncio.Event())
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(), name=f"looking for {self._name}")
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        else:
            return True
        finally:
            self._waiting.pop(directory, None)

    async def _look(self) -> None:
        try:
            while self._waiting:
                for directory in await asyncio.to_thread(self._there, list(self._waiting)):
                    if event := self._waiting.get(directory):
                        event.set()
                await asyncio.sleep(self._every_seconds)
        finally:
            self._looking = None

    def _there(self, directories: list[Path]) -> list[Path]:
        return [directory for directory in directories if os.access(f"{directory}/{self._name}", os.F_OK)]


@dataclass(frozen=True, slots=True)
class Records:
    """What is on record of a run."""

    spec: dict[str, Any] | None
    claim: dict[str, Any] | None
    exit: dict[str, Any] | None
    submitted: dict[str, Any] | None
    submitting: bool
    cancel_asked: bool
    sign: bytes

    @property
    def job_id(self) -> str | None:
        """The id of the job that has the claim, or else of the one that was submitted."""
        job_id = (self.claim or {}).get("batch_job") or (self.submitted or {}).get("job_id")
        return None if job_id is None else str(job_id)


def records(place: str) -> Records:
    """Read what there is; the end first, for what is there once is there for good."""
    end = runner.read_json(place, runner.EXIT)
    try:
        sign = Path(place, runner.ALIVE).read_bytes()
    except OSError:
        sign = b""
    return Records(
        spec=runner.read_json(place, runner.SPEC),
        claim=runner.read_json(place, runner.CLAIM),
        exit=end,
        submitted=runner.read_json(place, SUBMITTED),
        submitting=runner.read_json(place, SUBMITTING) is not None,
        cancel_asked=Path(place, runner.CANCEL).exists(),
        sign=sign,
    )


def take_claim(place: str) -> bool:
    """Become the one who has the run, so that no batch job can begin it any more; say whether that came about."""
    try:
        runner.write_json(place, runner.CLAIM, runner.identity(os.getpid()) | {"at": time.time()}, exclusive=True)
    except FileExistsError:
        return False
    return True
