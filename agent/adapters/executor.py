"""What the pipeline asks of whatever runs containers, here or on a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from agent.domain.container import Ending, Network
from agent.domain.resources import NOTHING_SAID, Resources

__all__ = [
    "Ended",
    "Ending",
    "Executor",
    "ImageFacts",
    "NotStarted",
    "RunRequest",
    "Running",
    "Status",
    "Usage",
]


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One start of one container.

    `name` follows from the job and the attempt and nothing else, so that the run is found again by whoever looks.
    `directory` belongs to this attempt alone; the executor makes `outputs/` (what the container sees as `/outputs`),
    `scratch/` (its `/tmp`), `stdout.log`, `stderr.log` and its own records below it. `image`, `inputs` and
    `related` exist already. All paths are absolute. With `outputs_directory` the outputs are there instead. A run whose
    stdout or stderr grows past `max_log_bytes` is ended. `resources` is what it is to be given; its time is in
    `time_limit_seconds`.
    """

    name: str
    directory: Path
    image: Path
    inputs: Path
    related: Path
    time_limit_seconds: float
    network: Network = "none"
    outputs_directory: Path | None = None
    native_id: str | None = None
    max_log_bytes: int | None = None
    resources: Resources = NOTHING_SAID

    @property
    def outputs(self) -> Path:
        """What the container sees as `/outputs`."""
        return self.outputs_directory or self.directory / "outputs"

    @property
    def stdout(self) -> Path:
        """What the container wrote to its standard output, growing while it runs."""
        return self.directory / "stdout.log"

    @property
    def stderr(self) -> Path:
        """What the container wrote to its standard error, growing while it runs."""
        return self.directory / "stderr.log"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run used: seconds of wall clock and of processor, and the peak of its resident memory in bytes."""

    wall_seconds: float
    user_seconds: float
    system_seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True)
class NotStarted:
    """No trace of the run: it may be started."""


@dataclass(frozen=True, slots=True)
class Running:
    """The run was started and has not ended. `waiting_for`: what a batch system keeps it waiting for, in words."""

    native_id: str
    started_at: datetime | None
    waiting_for: str | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The run is over. `exit_code` is what Apptainer returned (128 + n for signal n), `None` when nobody saw it.

    `detail` is what a batch system says of its end, in words.
    """

    ending: Ending
    exit_code: int | None
    started_at: datetime | None
    finished_at: datetime | None
    usage: Usage | None
    detail: str | None = None


Status = NotStarted | Running | Ended


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image says of itself: its labels, its default command, and the runtime that read it."""

    labels: dict[str, str]
    runscript: str
    runtime: str  # for instance "apptainer version 1.4.5"
    definition: str = ""  # the definition file that it was built from, where it has that


class Executor(Protocol):
    """Starts containers that outlive the agent, and finds them again."""

    async def check(self) -> str:
        """Return the runtime's name and version once it has run something as the configured user.

        Raises:
            ExecutorUnavailable: it cannot; the message says why and what to do.
        """
        ...

    async def inspect(self, image: Path) -> ImageFacts:
        """Read the image's metadata without running it.

        Raises:
            ImageError: not an image, truncated, or without a default command.
            ExecutorUnavailable: the runtime itself does not work.
        """
        ...

    async def cannot_keep(self, resources: Resources) -> list[str]:
        """Say which of these resources a run is not kept to here, and why, each in a sentence."""
        ...

    async def start(self, request: RunRequest) -> Running | Ended:
        """Find the run or start it: calling this again for the same request never starts a second container.

        Raises:
            ExecutorUnavailable: nothing was started.
        """
        ...

    async def status(self, request: RunRequest) -> Status:
        """Return what has become of the run; never guesses: `LOST` needs two independent signs."""
        ...

    async def wait(self, request: RunRequest, timeout_seconds: float, told: Running | None = None) -> Status:
        """Return the status as soon as the run ends, or after `timeout_seconds`.

        With `told`, also as soon as the run waits for something else than was told with it.
        """
        ...

    async def cancel(self, request: RunRequest) -> None:
        """Ask the run to end and return at once; harmless when it has ended or never was."""
        ...
