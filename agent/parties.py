"""What a process that works at jobs opens: the database, Ovation, the object store, a data directory of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.adapters.cache import Cache
from agent.adapters.circuit import Circuit
from agent.adapters.disk import Room, write_whole
from agent.adapters.download import Downloader
from agent.adapters.executor import Executor
from agent.adapters.lanes import Lanes
from agent.adapters.local import LocalExecutor, LocalSettings
from agent.adapters.ovation import Ovation
from agent.adapters.slurm import SlurmExecutor, SlurmSettings
from agent.adapters.traffic import Traffic
from agent.adapters.upload import Uploader
from agent.db.connect import connect
from agent.db.database import CONNECTIONS, Database
from agent.db.jobs import Jobs
from agent.db.outputs import Outputs
from agent.domain.container import User
from agent.domain.slurm import Site
from agent.errors import ConfigurationError, OvationUnavailable, StorageUnavailable
from agent.pipeline.context import Context
from agent.pipeline.perform import OBJECT_STORE, OVATION
from agent.settings import Settings


@dataclass(frozen=True, slots=True)
class Parties:
    """What is outside of this process. `store` tells whether the object store is there."""

    database: Database
    ovation: Ovation
    downloader: Downloader
    uploader: Uploader
    store: Circuit
    traffic: Traffic


@asynccontextmanager
async def open_parties(settings: Settings, connections: int = CONNECTIONS) -> AsyncIterator[Parties]:
    """Open what is outside, with so many connections to the database at most, and close it in turn.

    Raises:
        ConfigurationError, DatabaseError: it cannot be opened; the message says why.
    """
    async with AsyncExitStack() as stack:
        database: Database = await stack.enter_async_context(connect(settings.agent, connections))
        await database.check()
        store = Circuit(OBJECT_STORE, StorageUnavailable)
        ovation = await stack.enter_async_context(
            Ovation.open(settings.ovation, circuit=Circuit(OVATION, OvationUnavailable))
        )
        given = settings.agent
        traffic = Traffic(given.max_connections, given.max_job_connections, given.max_bytes_per_second)
        lanes = Lanes(given.max_connections)
        stack.callback(lanes.close)
        downloader = await stack.enter_async_context(
            Downloader(
                given.remote_hosts,
                remote_max_bytes=given.remote_max_bytes,
                circuit=store,
                traffic=traffic,
                lanes=lanes,
            )
        )
        uploader = await stack.enter_async_context(Uploader(settings.aws, circuit=store, traffic=traffic, lanes=lanes))
        yield Parties(database, ovation, downloader, uploader, store, traffic)


def context_of(
    settings: Settings, parties: Parties, executor: Executor, data_dir: Path, *, on_node: bool = False
) -> Context:
    """Return what steps work with. `on_node`: in a batch job that has come for one job."""
    given = settings.agent
    return Context(
        settings=given,
        jobs=Jobs(parties.database, bound=on_node),
        outputs=Outputs(parties.database),
        ovation=parties.ovation,
        downloader=parties.downloader,
        uploader=parties.uploader,
        executor=executor,
        room=Room(data_dir / "jobs", given.min_free_bytes),
        cache=Cache(given.cache_directory, given.cache_max_bytes),
        hands_over=given.executor == "slurm" and given.staging == "node" and not on_node,
    )


def executor_for(settings: Settings, data_dir: Path | None = None) -> Executor:
    """Return the executor that the settings name; with a data directory, for the agent that holds it."""
    if settings.agent.executor == "slurm":
        return SlurmExecutor(slurm_settings(settings))
    temporary = None if data_dir is None else data_dir / "checks"
    return LocalExecutor(LocalSettings(container_user=container_user(settings), temporary=temporary))


def container_user(settings: Settings) -> User:
    """Return whom containers run as."""
    uid, _, gid = settings.agent.container_user.partition(":")
    return User(int(uid), int(gid))


def slurm_settings(settings: Settings) -> SlurmSettings:
    """Return how runs are submitted.

    Raises:
        ConfigurationError: the preamble cannot be read.
    """
    given, preamble = settings.agent, ""
    if given.slurm_preamble is not None:
        try:
            preamble = given.slurm_preamble.read_text()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise ConfigurationError(f"AGENT_SLURM_PREAMBLE: {given.slurm_preamble}: {why}") from None
    site = Site(given.slurm_partition, given.slurm_account, given.slurm_qos, given.slurm_arguments, preamble)
    return SlurmSettings(
        site=site,
        python=given.slurm_python or sys.executable,
        apptainer=given.slurm_apptainer,
        container_user=container_user(settings),
        silence_seconds=given.slurm_silence_seconds,
    )


def let_containers_read() -> None:
    """Have what is staged readable for the user that containers run as, whoever started this process with which umask.

    The directories above are closed to everybody else, and so is each file that is for this user alone.
    """
    os.umask(0o022)


def place_of(data_dir: Path) -> str:
    """Return what names this data directory, wherever it is mounted; made once."""
    file = data_dir / "place"
    try:
        return str(uuid.UUID(file.read_text().strip()))
    except FileNotFoundError:
        place = str(uuid.uuid4())
        write_private(file, f"{place}\n")
        return place
    except ValueError:
        raise ConfigurationError(
            f"{file} does not name this data directory: if no run is under way there, remove it"
        ) from None


def made_data_dir(settings: Settings) -> Path:
    """Return the data directory, made if it was not there.

    Raises:
        ConfigurationError: it cannot be.
    """
    data_dir = Path(settings.agent.data_dir).absolute()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        (data_dir / "jobs").mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigurationError(f"AGENT_DATA_DIR: {data_dir} cannot be used: {error.strerror}") from None
    return data_dir


@contextlib.contextmanager
def alone(data_dir: Path) -> Iterator[None]:
    """Hold the data directory: two agents on one would take each other's work for their own."""
    with (data_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another agent runs on {data_dir}: stop it, or give this one an AGENT_DATA_DIR of its own"
            ) from None
        yield


def write_private(path: Path, content: str) -> None:
    """Write a file for this user alone."""
    write_whole(path, content.encode(), 0o600)
