"""The agent's program on a compute node: a batch job that stages, runs and delivers one job on the node's own disk.

It works under the same leases and fences as an agent, in a data directory of its own, and keeps nothing. What it needs,
credentials among it, is in a file that it removes as soon as it has read it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
from contextlib import suppress
from pathlib import Path

from agent import logs
from agent.adapters.executor import Running, RunRequest
from agent.adapters.files import remove_tree
from agent.adapters.local import LocalSettings
from agent.adapters.node import NodeExecutor, OrdersGone, take_orders
from agent.db.log_questions import LogQuestions
from agent.db.node_runs import NodeRun, goes_on
from agent.domain.workdir import Layout
from agent.errors import ConfigurationError, DatabaseError
from agent.parties import (
    alone,
    container_user,
    context_of,
    let_containers_read,
    made_data_dir,
    open_parties,
    write_private,
)
from agent.pipeline.context import Context
from agent.pipeline.log_answers import answer_questions
from agent.pipeline.staged import runs
from agent.pipeline.sweep import sweep
from agent.pipeline.worker import Worker
from agent.settings import Settings

DONE, NOTHING_TO_DO, TOLD_TO_END = 0, 5, 128 + signal.SIGTERM
_LOOK_SECONDS = 1.0
_SOON_SECONDS = 0.2
_LOST_SECONDS = 600.0  # the database is away for so long: the run ends here, and may begin anew elsewhere
_CONTAINER_SECONDS = 20.0
_CONNECTIONS = 2  # there may be hundreds of programs like this one on one PostgreSQL
_LOGS = ("stdout.log", "stderr.log")
# What the program on the node has no use for: the front door is elsewhere.
_NOT_NEEDED = frozenset(
    {
        "AGENT_ADMIN_TOKEN",
        "AGENT_WEBHOOK_USERNAME",
        "AGENT_WEBHOOK_PASSWORD",
        "AGENT_WEBHOOK_SECRET",
        "JWT_SECRET",
        "JWT_PUBLIC_KEY",
    }
)


def orders_for(settings: Settings, run: NodeRun) -> dict[str, object]:
    """Return what the program on the node is to do, and what it needs for that: no more of the credentials."""
    return {
        "settings": settings.document(_NOT_NEEDED),
        "place": run.place,
        "job_id": run.job_id,
        "shared": str(Path(settings.agent.data_dir).absolute()),
    }


async def work(directory: Path) -> int:
    """Do what the orders in this directory say; return the code to end with.

    Raises:
        ConfigurationError, DatabaseError, ExecutorUnavailable: it cannot; the message says why.
    """
    let_containers_read()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    try:
        orders = take_orders(directory)
    except OrdersGone:
        return NOTHING_TO_DO
    given = Settings.of(orders["settings"])
    logs.hide(given.secrets())
    logs.configure("json", given.agent.log_level)
    place = orders["place"]
    base = _own_directory(given.agent.node_dir)
    _remove_left(base)
    own = base / place
    settings = given.model_copy(
        update={"agent": given.agent.model_copy(update={"data_dir": own, "cache_dir": base / "cache"})}
    )
    data_dir = made_data_dir(settings)
    write_private(data_dir / "place", f"{place}\n")
    try:
        with alone(data_dir):
            return await _Visit(settings, place, orders["job_id"], Path(orders["shared"]), told).run()
    finally:
        await asyncio.to_thread(remove_tree, own)


class _Visit:
    """The one job that this process has come for."""

    def __init__(self, settings: Settings, place: str, job_id: str, shared: Path, told: asyncio.Event) -> None:
        self._settings = settings
        self._place = place
        self._job_id = job_id
        self._told = told
        self._data_dir = Path(settings.agent.data_dir)
        self._own = Path(Layout(self._data_dir, job_id).root)
        self._shared = Path(Layout(shared, job_id).root)

    async def run(self) -> int:
        executor = NodeExecutor(
            LocalSettings(
                container_user=container_user(self._settings), temporary=self._data_dir / "checks", in_batch=True
            ),
            search_path=_search_path(self._settings.agent.slurm_apptainer),
        )
        await executor.check()  # a node where nothing runs is told of at once, and the run goes to another
        async with open_parties(self._settings, _CONNECTIONS) as parties:
            context = context_of(self._settings, parties, executor, self._data_dir, on_node=True)
            if not await goes_on(parties.database, self._place):
                return NOTHING_TO_DO
            logs.logger().info("node_begins", job_id=self._job_id, host=os.uname().nodename, directory=str(self._own))
            worker = Worker(context, self._place, guest=True)
            loops = [
                asyncio.create_task(worker.run(), name="worker"),
                asyncio.create_task(sweep(context, self._place), name="sweep"),
                asyncio.create_task(self._save_logs(), name="logs"),
                asyncio.create_task(
                    answer_questions(LogQuestions(parties.database, self._place), self._data_dir), name="answers"
                ),
            ]
            leaving = asyncio.create_task(self._told.wait())
            ends = asyncio.create_task(self._ends(context, worker))
            try:
                await asyncio.wait({leaving, ends, *loops}, return_when=asyncio.FIRST_COMPLETED)
                for loop in (*loops, ends):
                    if loop.done():
                        loop.result()
            finally:
                for task in (leaving, ends, *loops):
                    task.cancel()
                await asyncio.gather(leaving, ends, *loops, return_exceptions=True)
                await asyncio.to_thread(self._save, whole=False)  # Slurm may not wait for what comes next
                await self._end_container(context)
                await asyncio.to_thread(self._save, whole=True)
            logs.logger().info("node_ends", job_id=self._job_id, told_to_end=self._told.is_set())
            return TOLD_TO_END if self._told.is_set() else DONE

    async def _ends(self, context: Context, worker: Worker) -> None:
        """Wait until there is nothing more to do here: it is done, or the job is another's."""
        away_since: float | None = None
        clock = asyncio.get_running_loop().time
        seconds = _SOON_SECONDS
        while True:
            await asyncio.sleep(seconds)
            seconds = min(_LOOK_SECONDS, seconds * 1.5)
            if worker.held:
                away_since, seconds = None, _SOON_SECONDS
                continue
            try:
                job = await context.jobs.get(self._job_id)
            except DatabaseError:
                away_since = away_since or clock()
                if clock() - away_since > _LOST_SECONDS:
                    raise
                continue
            away_since = None
            if job is None or job.place != self._place or job.finished_at is not None:
                return

    async def _end_container(self, context: Context) -> None:
        """End what still runs here: it is nobody's any more."""
        for number, directory in await asyncio.to_thread(lambda: list(runs(self._own))):
            request = RunRequest(
                name=f"ovation-{self._job_id}-{number}",
                directory=directory,
                image=self._own,
                inputs=self._own,
                related=self._own,
                time_limit_seconds=_CONTAINER_SECONDS,
            )
            if isinstance(await context.executor.status(request), Running):
                await context.executor.cancel(request)
                await context.executor.wait(request, _CONTAINER_SECONDS)

    async def _save_logs(self) -> None:
        """Bring what the container writes to where the agent has its logs: a node may fail at any moment."""
        while True:
            with suppress(OSError):
                await asyncio.to_thread(self._save, whole=False)
            await asyncio.sleep(_LOOK_SECONDS)

    def _save(self, *, whole: bool) -> None:
        for _, directory in list(runs(self._own)):
            there = self._shared / directory.name
            there.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in _LOGS:
                with suppress(FileNotFoundError):
                    _copy(directory / name, there / name, whole=whole)


def _copy(source: Path, target: Path, *, whole: bool) -> None:
    """Add what is new, or with `whole` put all of it in the place of what is there."""
    with source.open("rb") as reader:
        part = target.with_suffix(".part") if whole else target
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_TRUNC if whole else os.O_APPEND)
        with os.fdopen(os.open(part, flags, 0o600), "ab") as writer:
            reader.seek(0 if whole else writer.tell())
            shutil.copyfileobj(reader, writer)
        if whole:
            part.replace(target)


def _own_directory(node_dir: Path) -> Path:
    """Return this user's directory on the node's disk, made if it was not there.

    Raises:
        ConfigurationError: it cannot be made, or is somebody else's.
    """
    base = node_dir / f"ovation-agent-{os.geteuid()}"
    try:
        base.mkdir(mode=0o700, exist_ok=True)
        found = base.lstat()
    except OSError as error:
        raise ConfigurationError(f"AGENT_NODE_DIR: {node_dir}, on this node: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigurationError(f"AGENT_NODE_DIR: {base}, on this node, is not this user's alone")
    return base


def _remove_left(base: Path) -> None:
    """Remove what a batch job that was killed has left here."""
    for left in base.iterdir():
        if left.name == "cache" or not (left / "lock").is_file():
            continue
        with suppress(ConfigurationError, OSError), alone(left):
            remove_tree(left)


def _search_path(program: str | None) -> str | None:
    """Return where Apptainer is looked for: first where the settings say that it is on the nodes."""
    if program is None or "/" not in program:
        return None
    return os.pathsep.join([str(Path(program).parent), os.environ.get("PATH", "")])
