"""Slurm's command line: jobs are submitted, listed, asked about and cancelled. What its words mean: `domain.slurm`."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from agent.domain import slurm
from agent.domain.slurm import Row
from agent.errors import ExecutorUnavailable
from agent.logs import logger

PARTY = "Slurm"
_AT_ONCE = 4  # submissions; more gain nothing
_SUBMIT_SECONDS = 60.0
_ASK_SECONDS = 30.0
_KILL_SECONDS = 5.0


class Rejected(Exception):
    """Slurm does not take this job, now or later; the message is its own."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of the agent's jobs as Slurm showed them at one moment (seconds that only go forward)."""

    at: float
    by_id: Mapping[str, Row]
    by_name: Mapping[str, Sequence[Row]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Answer:
    code: int
    output: str
    complaint: str


class SlurmClient:
    """Asks Slurm, once for all that want to know at the same time."""

    def __init__(self, environment: Mapping[str, str] | None = None, *, tick_seconds: float = 2.0) -> None:
        self._environment = slurm.environment(os.environ if environment is None else environment)
        self._tick_seconds = tick_seconds
        self._submitting = asyncio.Semaphore(_AT_ONCE)
        self._snapshot: Snapshot | None = None
        self._looking: asyncio.Task[Snapshot] | None = None
        self._away_since: float | None = None
        self._accounting = True
        self.calls = 0

    def missing(self) -> list[str]:
        """Return which of Slurm's programs are not to be found."""
        path = self._environment.get("PATH")
        return [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name, path=path) is None]

    async def version(self) -> str:
        """Return Slurm's name and version, once its controller has answered.

        Raises:
            ExecutorUnavailable: a program is missing, or the controller does not answer.
        """
        if missing := self.missing():
            raise ExecutorUnavailable(
                f"{', '.join(missing)}: not found. Install Slurm's client programs on this machine and put them on"
                " the agent's PATH, or set AGENT_EXECUTOR=local."
            )
        answer = await self._ask(["sbatch", "--version"], _ASK_SECONDS)
        await self.snapshot(0.0)
        return answer.output.strip() or "slurm"

    async def submit(self, arguments: Sequence[str], script: str) -> str:
        """Submit a job and return its id.

        Raises:
            Rejected: Slurm will never take it.
            ExecutorUnavailable: it may have been taken all the same: look before it is submitted again.
        """
        async with self._submitting:
            answer = await self._ask(["sbatch", *arguments], _SUBMIT_SECONDS, script.encode())
        if answer.code == 0 and (job_id := slurm.submitted_id(answer.output)):
            self._tell(None)
            return job_id
        said = slurm.complaint(answer.complaint) or f"sbatch ended with {answer.code}"
        if answer.code > 0 and not slurm.is_ambiguous(answer.complaint):
            raise Rejected(said)
        self._tell(said)
        raise ExecutorUnavailable(f"Slurm does not take jobs now: {said}", party=PARTY, away=True)

    async def snapshot(self, newest: float | None = None) -> Snapshot:
        """Return what Slurm shows: at most a tick old, or not older than `newest` (seconds that only go forward).

        Raises:
            ExecutorUnavailable: Slurm does not answer.
        """
        oldest = time.monotonic() - self._tick_seconds if newest is None else newest
        while self._snapshot is None or self._snapshot.at < oldest:
            if self._looking is None:
                self._looking = asyncio.create_task(self._look(), name="squeue")
                self._looking.add_done_callback(self._looked)
            snapshot = await asyncio.shield(self._looking)
            if newest == 0.0:
                return snapshot
        return self._snapshot

    def _looked(self, task: asyncio.Task[Snapshot]) -> None:
        self._looking = None
        if not task.cancelled():
            task.exception()  # those that wait have it

    async def _look(self) -> Snapshot:
        at = time.monotonic()
        answer = await self._ask(["squeue", *slurm.squeue_arguments(str(os.geteuid()))], _ASK_SECONDS)
        if answer.code != 0:
            said = slurm.complaint(answer.complaint) or f"squeue ended with {answer.code}"
            self._tell(said)
            raise ExecutorUnavailable(f"Slurm does not answer: {said}", party=PARTY, away=True)
        self._tell(None)
        found = slurm.rows(answer.output)
        by_name: dict[str, list[Row]] = {}
        for row in found:
            by_name.setdefault(row.name, []).append(row)
        self._snapshot = Snapshot(at, {row.job_id: row for row in found}, by_name)
        return self._snapshot

    def _tell(self, away: str | None) -> None:
        """Say once that Slurm is away, and why, and once that it is back."""
        now = time.monotonic()
        if away is not None and self._away_since is None:
            self._away_since = now
            logger().warning("party_away", party=PARTY, reason=away)
        elif away is None and self._away_since is not None:
            logger().info("party_back", party=PARTY, seconds=round(now - self._away_since, 1))
            self._away_since = None

    async def accounted(self, job_ids: Collection[str]) -> dict[str, Row] | None:
        """Return what the accounting has of these jobs; nothing at all where there is none, or it does not answer."""
        if not self._accounting or not job_ids:
            return None
        answer = await self._ask(["sacct", *slurm.sacct_arguments(job_ids)], _ASK_SECONDS)
        if answer.code != 0:
            self._accounting = "disabled" not in answer.complaint.lower()
            return None
        return {row.job_id: row for row in slurm.rows(answer.output)}

    async def accounting(self) -> str:
        """Say in words whether there is accounting.

        Raises:
            ExecutorUnavailable: there is, and it does not answer.
        """
        answer = await self._ask(["sacct", *slurm.sacct_arguments(["1"])], _ASK_SECONDS)
        if answer.code == 0:
            return "answers: it is asked what became of a run that the controller has forgotten"
        said = slurm.complaint(answer.complaint) or f"sacct ended with {answer.code}"
        if "disabled" in answer.complaint.lower() or (answer.code == -1 and "timed out" not in answer.complaint):
            return "there is none: a run that the controller has forgotten is judged by its own record"
        raise ExecutorUnavailable(f"sacct: {said}")

    async def cancel(self, job_id: str | None = None, *, name: str | None = None, signal: str | None = None) -> None:
        """Cancel a job, by its id or its name, or send a signal to its batch script alone.

        That Slurm is away is no error: it is asked again.
        """
        options = [] if signal is None else ["--batch", f"--signal={signal}"]
        which = [job_id] if job_id else [f"--name={name}", f"--user={os.geteuid()}"]
        await self._ask(["scancel", "--quiet", *options, *which], _ASK_SECONDS)

    async def _ask(self, command: Sequence[str], seconds: float, given: bytes | None = None) -> _Answer:
        self.calls += 1
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=self._environment,
                cwd="/",
                stdin=asyncio.subprocess.DEVNULL if given is None else asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            return _Answer(-1, "", f"{command[0]}: {error.strerror}")
        talking = asyncio.create_task(process.communicate(given))
        try:
            async with asyncio.timeout(seconds):
                output, complaint = await asyncio.shield(talking)
        except TimeoutError:
            return _Answer(-1, "", f"{command[0]} did not answer within {seconds:g} s (timed out)")
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
            await asyncio.gather(talking, return_exceptions=True)
        return _Answer(process.returncode or 0, output.decode(errors="replace"), complaint.decode(errors="replace"))
