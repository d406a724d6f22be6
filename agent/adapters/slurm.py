"""Containers as batch jobs of a Slurm cluster whose nodes share the data directory's file system.

What counts is on the file system. The intent is durable before a job is submitted; the batch job's runner makes the
claim, and whoever has the claim is the one run that there is: a second job of the same directory finds it and ends.
Where Slurm has a job for dead, this executor takes the claim itself before it says so, so that nothing can start
afterwards; where the node has the claim, Slurm's word and silence are both needed (`alive`, which the runner touches).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from agent.adapters import apptainer, files, runner
from agent.adapters.executor import Ended, Ending, ImageFacts, NotStarted, Running, RunRequest, Status
from agent.adapters.local import NOBODY
from agent.adapters.run_directory import ended, moment, prepare, specification
from agent.adapters.slurm_client import PARTY, Rejected, SlurmClient
from agent.adapters.slurm_records import SUBMITTED, SUBMITTING, Appearing, Records, records, take_claim
from agent.domain import slurm
from agent.domain.container import User
from agent.domain.resources import Resources
from agent.domain.slurm import Meaning, Phase, Row, Sight, Site
from agent.errors import ExecutorUnavailable

_PROGRAM = "runner.py"
_POLL_SECONDS = 0.5
_TAIL_BYTES = 4096
_CANCEL_SECONDS = 30.0  # what the file system and the runner may take beyond the graces


@dataclass(frozen=True, slots=True)
class SlurmSettings:
    """How runs are submitted and judged.

    `silence_seconds` is how long a node that has begun must give no sign, and Slurm say that the job is over, before it
    counts as dead: longer than the file system needs to show a node's writes elsewhere (NFS: a minute).
    """

    site: Site = field(default_factory=Site)
    python: str = "python3"  # on the nodes
    apptainer: str | None = None  # on the nodes; None: where it is on this machine
    container_user: User = NOBODY
    grace_seconds: float = 10.0
    kill_seconds: float = 5.0
    silence_seconds: float = 60.0
    tick_seconds: float = 2.0


@dataclass(slots=True)
class _Seen:
    """What has been seen of a run by this process, in seconds that only go forward."""

    sign: bytes = b""  # the last sign of life
    sign_at: float = field(default_factory=time.monotonic)
    word: str = ""  # Slurm's last word on it
    word_at: float = field(default_factory=time.monotonic)
    submitted_at: float = 0.0
    told_at: float | None = None  # when it was first seen to have been told to end


class SlurmExecutor:
    """Run containers on a Slurm cluster; see `agent.adapters.executor.Executor`."""

    def __init__(
        self,
        settings: SlurmSettings | None = None,
        environment: Mapping[str, str] | None = None,
        *,
        client: SlurmClient | None = None,
    ) -> None:
        self._settings = settings or SlurmSettings()
        self.client = client or SlurmClient(environment, tick_seconds=self._settings.tick_seconds)
        self._seen: dict[str, _Seen] = {}
        self._cancelled_at: dict[str, float] = {}
        self._ends = Appearing(runner.EXIT, _POLL_SECONDS)

    @property
    def user(self) -> User | None:
        """Whom containers run as, `None` for the agent's own user."""
        return self._settings.container_user if os.geteuid() == 0 else None

    async def check(self) -> str:
        """Return Slurm's version and the runtime's, once both have answered here.

        Raises:
            ExecutorUnavailable: one does not; the message says why and what to do.
        """
        scheduler = await self.client.version()
        program = apptainer.find_program()
        return f"{scheduler}, {await apptainer.version(program)}"

    async def inspect(self, image: Path) -> ImageFacts:
        """Read the image's metadata on this machine, without running it.

        Raises:
            ImageError: not an image, truncated, or without a default command.
            ExecutorUnavailable: the runtime itself does not work.
        """
        return await apptainer.inspect(apptainer.find_program(), image, self.user)

    async def cannot_keep(self, resources: Resources) -> list[str]:
        """Say which of these resources a run is not kept to here: Slurm keeps to all that its site has set up."""
        del resources
        return []

    async def start(self, request: RunRequest) -> Running | Ended:
        """Find the run or submit it: calling this again for the same request never starts a second container.

        Raises:
            ExecutorUnavailable: Slurm is away; whether it has taken the job is found out by the next call.
        """
        status = await self.status(request)
        if not isinstance(status, NotStarted):
            return status
        place = str(request.directory)
        if runner.read_json(place, SUBMITTING) is not None and (row := await self._found_by_name(request)):
            return await self._submitted(request, row.job_id)
        try:
            await asyncio.to_thread(self._prepare, request)
        except (OSError, ValueError) as error:
            raise ExecutorUnavailable(f"The run in {request.directory} cannot be prepared: {error}") from error
        arguments = slurm.submission(
            request.name,
            PurePosixPath(request.directory),
            request.time_limit_seconds,
            self._settings.site,
            request.resources,
        )
        script = slurm.script(PurePosixPath(request.directory), self._settings.python, self._settings.site)
        try:
            job_id = await self.client.submit(arguments, script)
        except Rejected as error:
            found = Meaning(Phase.ENDED, Ending.REFUSED, f"Slurm does not take the run: {error}")
            record = await asyncio.to_thread(records, place)
            return await self._end(request, record, found) or Running("", None)
        return await self._submitted(request, job_id)

    async def status(self, request: RunRequest) -> Status:
        """Return what has become of the run; a run of which Slurm says nothing now goes on."""
        record = await asyncio.to_thread(records, str(request.directory))
        told_to_end = record.exit is not None and record.exit["ending"] == Ending.LOST and not record.exit.get("detail")
        if record.exit is not None and not told_to_end:
            return self._over(request, record.exit)
        if record.spec is None:
            return await self._without_records(request)
        if record.job_id is None and record.claim is None:
            return NotStarted()  # whether Slurm has it all the same is looked up before it is submitted again
        return await self._seen_from_outside(request, record, told_to_end=told_to_end)

    async def _seen_from_outside(self, request: RunRequest, record: Records, *, told_to_end: bool) -> Running | Ended:
        going = Running(record.job_id or "", None if record.claim is None else moment(record.claim["at"]))
        seen = self._seen.setdefault(request.name, _Seen())
        if told_to_end and seen.told_at is None:
            seen.told_at = time.monotonic()
        try:  # what Slurm says counts if it has said it since
            row = await self._row(record.job_id, max(seen.submitted_at, seen.told_at or 0.0))
        except ExecutorUnavailable:
            return going
        found = slurm.judge(self._sight(request, record, row, told_to_end=told_to_end), self._settings.silence_seconds)
        if found.phase is Phase.ENDED:
            return await self._end(request, record, found) or going
        return replace(going, waiting_for=found.words or None)

    async def wait(self, request: RunRequest, timeout_seconds: float, told: Running | None = None) -> Status:
        """Return the status as soon as the run ends, or after `timeout_seconds`.

        With `told`, also as soon as the run waits for something else than was told with it.
        """
        deadline = time.monotonic() + timeout_seconds
        status, row = await self.status(request), None
        while isinstance(status, Running) and (left := deadline - time.monotonic()) > 0:
            if told is not None and status.waiting_for != told.waiting_for:
                break
            ended_here = await self._ends.wait(request.directory, min(left, self._settings.tick_seconds))
            before, row = row, await self._row_now(status.native_id)
            if ended_here or row is None or row != before or not _goes_on_as_it_is(row, status):
                status = await self.status(request)
        return status

    async def _row_now(self, job_id: str) -> Row | None:
        """Return what Slurm shows of a job, nothing when it does not answer."""
        try:
            return (await self.client.snapshot()).by_id.get(job_id)
        except ExecutorUnavailable:
            return None

    async def cancel(self, request: RunRequest) -> None:
        """Ask the run to end and return at once; harmless when it has ended or never was."""
        record = await asyncio.to_thread(records, str(request.directory))
        if record.spec is None or record.exit is not None:
            return
        mark = request.directory / runner.CANCEL
        await asyncio.to_thread(mark.touch, mode=0o600)
        if record.claim is None:
            if await self._end(request, record, Meaning(Phase.ENDED, Ending.CANCELLED)):
                return
            record = await asyncio.to_thread(records, str(request.directory))  # it has begun in this moment
        if record.job_id is None:
            return
        asked = self._cancelled_at.setdefault(request.name, time.monotonic())
        own = self._settings.grace_seconds + 2 * self._settings.kill_seconds + _CANCEL_SECONDS
        signal = "TERM" if time.monotonic() - asked < own else None  # the runner does it more gently
        await self.client.cancel(record.job_id, signal=signal)

    async def _found_by_name(self, request: RunRequest) -> Row | None:
        snapshot = await self.client.snapshot(time.monotonic())
        rows = snapshot.by_name.get(request.name, ())
        going = [row for row in rows if slurm.meaning(row.state).phase is not Phase.ENDED]
        return next(iter([*going, *rows]), None)

    async def _submitted(self, request: RunRequest, job_id: str) -> Running | Ended:
        record = {"job_id": job_id, "at": time.time()}
        await asyncio.to_thread(runner.write_json, str(request.directory), SUBMITTED, record)
        self._seen[request.name] = _Seen(submitted_at=time.monotonic())
        return Running(job_id, None, slurm.waiting_for(""))

    async def _row(self, job_id: str | None, newest: float) -> Row | None:
        """Return what Slurm has said of a job since then: the controller, or else the accounting."""
        if job_id is None:
            return None
        snapshot = await self.client.snapshot(max(newest, time.monotonic() - self._settings.tick_seconds))
        if row := snapshot.by_id.get(job_id):
            return row
        accounted = await self.client.accounted([job_id])
        return (accounted or {}).get(job_id)

    async def _without_records(self, request: RunRequest) -> Status:
        """Return the status of a run whose directory is gone: as long as Slurm runs it, it is there."""
        if request.native_id:
            row = (await self.client.snapshot()).by_id.get(request.native_id)
            if row and row.name == request.name and slurm.meaning(row.state).phase is not Phase.ENDED:
                return Running(request.native_id, None)
        return NotStarted()

    def _sight(self, request: RunRequest, record: Records, row: Row | None, *, told_to_end: bool) -> Sight:
        """Note what has changed since the last look, and put together what is seen."""
        seen = self._seen.setdefault(request.name, _Seen())
        now = time.monotonic()
        if record.sign != seen.sign:
            seen.sign, seen.sign_at = record.sign, now
        word = row.state if row else ""
        if word != seen.word:
            seen.word, seen.word_at = word, now
        return Sight(
            begun=record.claim is not None,
            told_to_end=told_to_end,
            cancel_asked=record.cancel_asked,
            row=row,
            silent_seconds=now - seen.sign_at,
            said_for_seconds=now - seen.word_at,
        )

    async def _end(self, request: RunRequest, record: Records, found: Meaning) -> Ended | None:
        """Write that the run is over, so that it stays so; nothing when it has begun, or ended, in this moment."""
        place = str(request.directory)
        if record.claim is None and not await asyncio.to_thread(take_claim, place):
            return None
        if record.job_id:
            await self.client.cancel(record.job_id)
        elif record.submitting:
            await self.client.cancel(name=request.name)
        words = found.words
        if record.claim is None and found.ending is Ending.LOST and (said := self._batch_log(request)):
            words = f"{words} The batch script said last: {said}"
        claimed = record.claim or {}
        known = record.exit or {
            "exit_code": None,
            "started_at": claimed.get("at"),
            "finished_at": time.time(),
        }
        end = known | {"ending": str(found.ending), "detail": words or None}
        if record.exit is not None and found.ending is Ending.LOST and not words:
            end["detail"] = "The run was told to end by its node; Slurm does not say why."
        try:
            await asyncio.to_thread(runner.write_json, place, runner.EXIT, end, exclusive=record.exit is None)
        except FileExistsError:
            return None
        return self._over(request, end)

    def _over(self, request: RunRequest, record: dict[str, Any]) -> Ended:
        self._seen.pop(request.name, None)
        self._cancelled_at.pop(request.name, None)
        return ended(record)

    def _batch_log(self, request: RunRequest) -> str:
        return slurm.complaint(files.tail(request.directory / "slurm.log", _TAIL_BYTES))

    def _prepare(self, request: RunRequest) -> None:
        program = self._settings.apptainer or str(apptainer.find_program())
        grace, kill = self._settings.grace_seconds, self._settings.kill_seconds
        unsquash = os.geteuid() != 0 and not apptainer.fuse_is_usable()
        prepare(request, specification(request, program, self.user, grace, kill, unsquash=unsquash), self.user)
        self._bring_runner(request)

    def _bring_runner(self, request: RunRequest) -> None:
        """Put beside what is to be run the program that does it, and the intent, durable before it is submitted."""
        shutil.copyfile(runner.__file__, request.directory / _PROGRAM)
        runner.write_json(str(request.directory), SUBMITTING, {"at": time.time(), "party": PARTY})


def _goes_on_as_it_is(row: Row, status: Running) -> bool:
    """Say whether a job of which Slurm says the same as before needs no closer look."""
    phase = slurm.meaning(row.state).phase
    return phase is Phase.WAITS or (phase is Phase.RUNS and status.started_at is not None)
