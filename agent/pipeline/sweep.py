"""The sweep: what no job owns any more leaves the disk, and so does what is kept for a while, when its time is over."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from typing import NoReturn

from agent.adapters.executor import Running, RunRequest
from agent.adapters.files import remove_tree
from agent.db.jobs import OnDisk
from agent.domain.job import State
from agent.domain.workdir import Layout
from agent.errors import AgentError, DatabaseError
from agent.logs import logger
from agent.pipeline.context import Context
from agent.pipeline.staged import remove_work, runs

_SWEEP_SECONDS = 3600.0
_AGAIN_SECONDS = 60.0  # when PostgreSQL is away
_UNOWNED = "unowned"


class Fate(Enum):
    """What is to become of a directory."""

    STAYS = auto()
    LOSES_WORK = auto()  # its logs and the runners' records stay
    GOES = auto()
    UNOWNED = auto()  # goes when nobody has touched it for a while


def fate(job: OnDisk | None, place: str, keep_seconds: float, keep_failed_seconds: float) -> Fate:
    """Return what is to become of a job's directory at `place`; `None` is a job that this database does not have."""
    if job is None or job.place not in {None, place}:
        return Fate.UNOWNED
    if job.ended_seconds is None:
        return Fate.STAYS
    work_stays = keep_failed_seconds if job.state is State.FAILED else 0.0
    if job.ended_seconds < work_stays:
        return Fate.STAYS
    return Fate.LOSES_WORK if job.ended_seconds < keep_seconds else Fate.GOES


async def sweep(context: Context, place: str) -> NoReturn:
    """Sweep at the start and then again and again until cancelled; make room in between when staging lacks it.

    Args:
        context: whose data directory is swept.
        place: what names that data directory in the database.
    """
    sweeper = Sweeper(context, place)
    context.room.clear = sweeper.make_room
    while True:
        try:
            await sweeper.sweep()
            await sweeper.sweep_cache()
            seconds = sweeper.period_seconds
        except DatabaseError:  # whoever cannot work without it says so
            seconds = min(sweeper.period_seconds, _AGAIN_SECONDS)
        await asyncio.sleep(seconds)


class Sweeper:
    """Removes directories of jobs; whatever fails on one of them is told once and keeps none of the others."""

    def __init__(self, context: Context, place: str) -> None:
        self._context = context
        self._place = place
        self._keep = float(context.settings.keep_seconds)
        self._keep_failed = float(context.settings.keep_failed_seconds)
        self._folder = Path(context.settings.data_dir).absolute() / "jobs"
        self._told: set[str] = set()
        self._lock = asyncio.Lock()

    @property
    def period_seconds(self) -> float:
        """How often it is worth to look: nothing stays for much longer than twice its time."""
        times = [seconds for seconds in (self._keep, self._keep_failed) if seconds > 0]
        return max(1.0, min([_SWEEP_SECONDS, *times]))

    async def sweep(self) -> None:
        """Look at every directory once.

        Raises:
            DatabaseError: nobody can say what is owned; nothing more was removed.
        """
        async with self._lock:
            counts: Counter[str] = Counter()
            try:
                names = await self._names()
                jobs = await self._context.jobs.on_disk(names)  # after the names: a job is there before its directory
                for name in names:
                    if what := await self._guarded(name, jobs.get(name)):
                        counts[what] += 1
            finally:
                _tell(counts)

    async def make_room(self, enough: Callable[[], bool]) -> None:
        """Remove what is kept for nobody's work until it is enough.

        What is only kept to be quick goes before the files of failed runs, at which somebody may want to look; of both,
        the oldest first.
        """
        with self._complaining("cache"):
            if freed := await self._context.cache.make_room(lambda _: enough()):
                logger().info("cache_evicted", bytes=freed)
        async with self._lock:
            counts: Counter[str] = Counter()
            with suppress(DatabaseError):
                jobs = await self._context.jobs.on_disk(await self._names())
                kept = [
                    (job.ended_seconds or 0.0, name)
                    for name, job in jobs.items()
                    if job.state is State.FAILED and job.place in {None, self._place}
                ]
                for _, name in sorted(kept, reverse=True):
                    if enough():
                        break
                    if await self._remove_work(name):
                        counts["files of failed runs, for room"] += 1
            _tell(counts)

    async def sweep_cache(self) -> None:
        """Remove what was begun for the cache and never came to an end."""
        with self._complaining("cache"):
            await self._context.cache.sweep()

    @contextmanager
    def _complaining(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._complain(name, error)

    async def _guarded(self, name: str, job: OnDisk | None) -> str | None:
        """Do what is to be done with one directory, and say what was."""
        try:
            return await self._treat(name, job)
        except DatabaseError:
            raise
        except (AgentError, OSError, ValueError, KeyError) as error:
            self._complain(name, error)
            return None

    async def _treat(self, name: str, job: OnDisk | None) -> str | None:
        root = self._folder / name
        match fate(job, self._place, self._keep, self._keep_failed):
            case Fate.STAYS:
                await asyncio.to_thread((root / _UNOWNED).unlink, missing_ok=True)
            case Fate.LOSES_WORK:
                return "files of ended runs" if await self._remove_work(name) else None
            case Fate.GOES:
                await asyncio.to_thread(remove_tree, root)
                return "ended runs"
            case Fate.UNOWNED if await self._is_abandoned(name, job):
                await asyncio.to_thread(remove_tree, root)
                return "directories that no job owns"
        return None

    async def _remove_work(self, name: str) -> bool:
        try:
            return await asyncio.to_thread(remove_work, self._folder / name)
        except OSError as error:
            self._complain(name, error)
            return False

    async def _is_abandoned(self, name: str, job: OnDisk | None) -> bool:
        """Return whether nobody has touched a directory for long enough, nothing runs there, and no job has it now.

        What runs there for a job that went on elsewhere runs for nobody, and is ended.
        """
        if await asyncio.to_thread(_idle_seconds, self._folder / name) < self._keep_failed:
            return False
        layout = Layout(self._folder.parent, name)
        for number, directory in await asyncio.to_thread(lambda: list(runs(self._folder / name))):
            request = RunRequest(
                name=f"ovation-{name}-{number}",
                directory=directory,
                image=Path(layout.related),
                inputs=Path(layout.inputs),
                related=Path(layout.related),
                time_limit_seconds=self._context.settings.time_limit_seconds,
            )
            if isinstance(await self._context.executor.status(request), Running):
                if job is not None:
                    await self._context.executor.cancel(request)
                return False
        now = (await self._context.jobs.on_disk([name])).get(name)  # a job may have come here in the meantime
        return fate(now, self._place, self._keep, self._keep_failed) is Fate.UNOWNED

    async def _names(self) -> list[str]:
        try:
            return await asyncio.to_thread(_list, self._folder)
        except OSError as error:
            self._complain(self._folder.name, error)
            return []

    def _complain(self, name: str, error: Exception) -> None:
        if isinstance(error, FileNotFoundError) or name in self._told:
            return  # a job that ends removes its files itself
        self._told.add(name)
        logger().warning("sweep_failed", directory=name, error=str(error))


def _tell(counts: Counter[str]) -> None:
    for what, count in counts.items():
        logger().info("swept", what=what, count=count)


def _list(folder: Path) -> list[str]:
    """Return what is called like a job; whatever else lies there is none of the agent's business."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_id(entry.name) and entry.is_dir(follow_symlinks=False))


def _is_id(name: str) -> bool:
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False


def _idle_seconds(root: Path) -> float:
    """Return for how long nobody has touched a directory.

    To find it without an owner for the first time is to touch it, by a mark: so that an agent that was started with
    another database, be it for a minute, removes nothing that is waiting to be delivered.
    """
    with suppress(FileExistsError):
        os.close(os.open(root / _UNOWNED, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    latest = root.lstat().st_mtime
    for directory in (root, *(directory for _, directory in runs(root))):
        with suppress(FileNotFoundError), os.scandir(directory) as entries:
            latest = max([latest, *(entry.stat(follow_symlinks=False).st_mtime for entry in entries)])
    return time.time() - latest
