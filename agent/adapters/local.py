"""Containers on this machine, each under a runner of its own that outlives the agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.adapters import apptainer, files, host_image, runner
from agent.adapters.executor import Ended, Ending, ImageFacts, NotStarted, Running, RunRequest, Status
from agent.adapters.run_directory import PRIVATE, SCRATCH, ended, prepare, running, specification
from agent.domain.container import User
from agent.domain.resources import Resources
from agent.errors import ExecutorUnavailable

NOBODY = User(65534, 65534)

_AGAIN_SECONDS = 0.05
_TAIL_BYTES = 8192
_HANDSHAKE_SECONDS = 30.0
_GPUS = Path("/dev/nvidiactl")
_LIMITS = ("--cpus", "1", "--memory", "256M")


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """How containers are started here.

    `container_user` is whom they run as when the agent is root; otherwise they run as the agent's own user.
    `grace_seconds` is what a container gets between SIGTERM and SIGKILL, `kill_seconds` what its end may then take.
    `temporary` is a directory of this process's alone for what is thrown away at once: `check` empties it, for a
    process that was killed leaves things there. `in_batch`: this is a batch job, whose system tells every one of its
    processes to end, the container before whoever watches over it.
    """

    container_user: User = NOBODY
    grace_seconds: float = 10.0
    kill_seconds: float = 5.0
    temporary: Path | None = None
    in_batch: bool = False


class LocalExecutor:
    """Run containers on this machine; see `agent.adapters.executor.Executor`."""

    def __init__(self, settings: LocalSettings | None = None, *, search_path: str | None = None) -> None:
        self._settings = settings or LocalSettings()
        self._search_path = search_path
        self._cannot: str | None = None  # why limits cannot be kept here; "": they can

    @property
    def user(self) -> User | None:
        """Whom containers run as, `None` for the agent's own user."""
        return self._settings.container_user if os.geteuid() == 0 else None

    async def check(self) -> str:
        """Return the runtime's name and version once it has run something as the configured user.

        Raises:
            ExecutorUnavailable: it cannot; the message says why and what to do.
        """
        program = apptainer.find_program(self._search_path)
        apptainer.check_user()
        temporary = self._settings.temporary
        if temporary is not None:
            await asyncio.to_thread(temporary.mkdir, mode=0o700, exist_ok=True)
            for left in await asyncio.to_thread(lambda: list(temporary.iterdir())):
                await self._throw_away(left)
        runtime = await apptainer.version(program, temporary)
        complaint = await self._try(program)
        if complaint is not None:
            raise ExecutorUnavailable(host_image.complaint(program, complaint))
        return runtime

    async def _try(self, program: Path, *options: str) -> str | None:
        """Run a container of this machine's own programs; return what it complained about when it fails."""
        with tempfile.TemporaryDirectory(
            prefix="ovation-agent-check-", dir=self._settings.temporary, ignore_cleanup_errors=True
        ) as place:
            request = await asyncio.to_thread(host_image.request, Path(place))
            await self._launch(request, program, extra=[*host_image.mounts(), *options])
            status = await self.wait(request, host_image.TIME_LIMIT_SECONDS * 2)
            if isinstance(status, Ended) and status.exit_code == 0:
                return None
            return files.tail(request.stderr, _TAIL_BYTES)

    async def cannot_keep(self, resources: Resources) -> list[str]:
        """Say which of these resources a run is not kept to here, and why, each in a sentence."""
        found = []
        if resources.gpus and not _has_gpus():
            found.append("There is no NVIDIA GPU on this machine.")
        if resources.cpus or resources.memory_bytes:
            if self._cannot is None:
                complaint = await self._try(apptainer.find_program(self._search_path), *_LIMITS)
                self._cannot = "" if complaint is None else complaint.strip().rpartition("\n")[2] or "it failed"
            if self._cannot:
                found.append(f"This machine does not keep runs to their CPUs and memory: {self._cannot[:300]}")
        return found

    async def _throw_away(self, left: Path) -> None:
        """Remove what a killed process left of a check, whose container may still be running."""
        run = RunRequest(left.name, left / host_image.RUN, left, left, left, host_image.TIME_LIMIT_SECONDS)
        await self.cancel(run)
        await self.wait(run, host_image.TIME_LIMIT_SECONDS)
        with contextlib.suppress(OSError):  # the next one tries again
            await asyncio.to_thread(files.remove_tree, left)

    async def inspect(self, image: Path) -> ImageFacts:
        """Read the image's metadata without running it.

        Raises:
            ImageError: not an image, truncated, or without a default command.
            ExecutorUnavailable: the runtime itself does not work.
        """
        program = apptainer.find_program(self._search_path)
        return await apptainer.inspect(program, image, self.user, self._settings.temporary)

    async def start(self, request: RunRequest) -> Running | Ended:
        """Find the run or start it: calling this again for the same request never starts a second container.

        Raises:
            ExecutorUnavailable: nothing was started.
        """
        status = await self.status(request)
        if not isinstance(status, NotStarted):
            return status
        program = apptainer.find_program(self._search_path)
        apptainer.check_user()
        code = await self._launch(request, program)
        status = await self.status(request)
        if not isinstance(status, NotStarted):
            return status
        detail = files.tail(request.directory / runner.LOG, _TAIL_BYTES).strip().rpartition("\n")[2]
        raise ExecutorUnavailable(f"The container's runner did not start (exit code {code}). {detail}".strip())

    async def status(self, request: RunRequest) -> Status:
        """Return what has become of the run.

        `LOST` needs two signs, the runner's lock free and its process gone, and no exit record after both. A run whose
        records are gone is `NotStarted` only once its process is gone too.
        """
        status = await asyncio.to_thread(self._status, request.directory)
        if isinstance(status, NotStarted) and request.native_id and _runs_in(request.native_id, request.directory):
            return Running(native_id=request.native_id, started_at=datetime.now(UTC))
        return status

    async def wait(self, request: RunRequest, timeout_seconds: float, told: Running | None = None) -> Status:
        """Return the status as soon as the run ends, or after `timeout_seconds`; a run here waits for nothing."""
        del told
        deadline = time.monotonic() + timeout_seconds
        while True:
            status = await self.status(request)
            left = deadline - time.monotonic()
            if not isinstance(status, Running) or left <= 0:
                return status
            if await _runner_is_gone(request.directory, left):
                # Its end and what it wrote are seen in this order; only a doubtful end is looked at twice.
                status = await self.status(request)
                if not isinstance(status, Running):
                    return status
                await asyncio.sleep(min(_AGAIN_SECONDS, left))

    async def cancel(self, request: RunRequest) -> None:
        """Ask the run to end and return at once; harmless when it has ended or never was."""
        await asyncio.to_thread(_cancel, request.directory)

    def _status(self, directory: Path) -> Status:
        place = str(directory)
        claim = runner.read_json(place, runner.CLAIM)
        if claim is None:
            return NotStarted()
        if runner.alive(claim):
            return running(claim)
        with _locked(place) as is_free:
            if not is_free:
                return running(claim)
            record = runner.read_json(place, runner.EXIT)
            if record is None:
                record = self._give_up(place, claim)
        return ended(record)

    def _give_up(self, place: str, claim: dict[str, Any]) -> dict[str, Any]:
        """Record that the run is lost, once nothing of it runs any more."""
        started = runner.read_json(place, runner.STARTED)
        if started and started["boot"] == runner.boot_id():
            with contextlib.suppress(PermissionError):
                runner.sweep(started, self._settings.grace_seconds, self._settings.kill_seconds)
        record = {
            "ending": str(Ending.LOST),
            "exit_code": None,
            "started_at": claim["at"],
            "finished_at": time.time(),
        }
        runner.write_json(place, runner.EXIT, record)
        for name in (PRIVATE, SCRATCH):
            runner.remove_tree(str(Path(place) / name))
        return record

    def _spec(self, request: RunRequest, program: Path, extra: Sequence[str]) -> dict[str, Any]:
        unsquash = os.geteuid() != 0 and not apptainer.fuse_is_usable()
        grace, kill = self._settings.grace_seconds, self._settings.kill_seconds
        limits = self._cannot == ""
        spec = specification(
            request, str(program), self.user, grace, kill, unsquash=unsquash, extra=extra, limits=limits
        )
        return spec | {"in_batch": self._settings.in_batch}

    async def _launch(self, request: RunRequest, program: Path, extra: Sequence[str] = ()) -> int:
        try:
            await asyncio.to_thread(prepare, request, self._spec(request, program, extra), self.user)
        except (OSError, ValueError) as error:
            raise ExecutorUnavailable(f"The run in {request.directory} cannot be prepared: {error}") from error
        return await _start_runner(request.directory)


def _has_gpus() -> bool:
    return _GPUS.exists()


async def _start_runner(directory: Path) -> int:
    """Start the runner and return the code with which its first process says how that went."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        _program(),
        str(directory),
        env={},
        cwd="/",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C at a terminal is the agent's, not its runners'
    )
    try:
        async with asyncio.timeout(_HANDSHAKE_SECONDS):
            return await process.wait()
    except TimeoutError:
        return runner.FAILED_CODE  # it may still start; whoever asks for its status sees


def _program() -> str:
    """Return the runner compiled, as this process has loaded it, where that is kept: it spares a fifth of its start."""
    kept = runner.__spec__.cached if runner.__spec__ else None
    return kept if kept and Path(kept).exists() else str(runner.__file__)


async def _runner_is_gone(directory: Path, timeout_seconds: float) -> bool:
    """Wait for the runner's process to end; return whether it has."""
    claim = runner.read_json(str(directory), runner.CLAIM)
    if claim is None:
        return True
    try:
        handle = os.pidfd_open(claim["pid"])
    except ProcessLookupError:
        return True
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    try:
        if not runner.alive(claim):  # asked after the handle was opened: the pid may be another's by now
            return True
        loop.add_reader(handle, gone.set)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await gone.wait()
        return gone.is_set()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


def _runs_in(native_id: str, directory: Path) -> bool:
    """Say whether that process is the runner of this directory, which may not be there any more."""
    try:
        arguments = Path(f"/proc/{int(native_id)}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return False
    return os.fsencode(directory) in arguments


def _cancel(directory: Path) -> None:
    if not (directory / runner.SPEC).exists() or (directory / runner.EXIT).exists():
        return
    (directory / runner.CANCEL).touch(mode=0o600)
    # The runner looks for that file after its claim, so that one of the two sees the other.
    claim = runner.read_json(str(directory), runner.CLAIM)
    if claim is None:
        return
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(claim["pid"])
        try:
            if runner.alive(claim):
                signal.pidfd_send_signal(handle, signal.SIGTERM)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _locked(place: str) -> Iterator[bool]:
    """Hold the runner's lock, and say whether it was free."""
    handle = runner.lock(place)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)
