"""Checks of the machine and the settings, each with its remedy."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import aiohttp

from agent.adapters import apptainer
from agent.adapters.executor import Executor
from agent.adapters.ovation import Ovation
from agent.adapters.slurm import SlurmExecutor
from agent.db.connect import connect
from agent.db.watched import WatchList
from agent.domain import token
from agent.domain.resources import Resources
from agent.errors import AgentError, DatabaseError
from agent.settings import Settings

_LITTLE_SPACE_BYTES = 10 << 30
_SILENT_SECONDS = 86_400.0
_SKEW_SECONDS = 60.0  # S3 refuses from a quarter of an hour on; tokens are less patient


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found; `remedy` is what to do when `good` is false."""

    check: str
    good: bool
    found: str
    remedy: str = ""


class _Trouble(AgentError):
    """A check failed in a way that no other error describes."""


async def examine(settings: Settings, executor: Executor) -> AsyncIterator[Finding]:
    """Run every check in turn; none changes anything but what `serve` would make anyway."""
    checks: list[tuple[str, Callable[[], Awaitable[str]], str]] = [
        (
            "webhooks",
            lambda: _webhooks(settings),
            "set AGENT_WEBHOOK_USERNAME and AGENT_WEBHOOK_PASSWORD, or AGENT_WEBHOOK_SECRET",
        ),
        (
            "data directory",
            lambda: asyncio.to_thread(_data_dir, settings),
            "set AGENT_DATA_DIR to a local disk that this user may write",
        ),
        ("database", lambda: _database(settings), "see AGENT_DATABASE_URL; `ovation-agent migrate` updates the schema"),
        ("containers", executor.check, "`make setup` installs Apptainer; docs/operations.md has more"),
        ("images", lambda: asyncio.to_thread(_fuse), "chmod 0666 /dev/fuse, as udev does; docs/operations.md has more"),
        ("limits", lambda: _limits(executor), "see `containers`"),
        ("Ovation", lambda: _ovation(settings), "check OVATION_API_URL and OVATION_TOKEN (or OVATION_CLIENT_ID)"),
        (
            "token",
            lambda: _token(settings),
            "ask whoever runs Ovation for a new one, or for a service account with read:global and write:global",
        ),
        ("object store", lambda: _store(settings), "check AWS_ENDPOINT_URL_S3, AWS_DEFAULT_REGION and the network"),
        (
            "clock",
            lambda: _clock(settings),
            "have the machine's clock set by NTP: requests to S3 are signed with the time",
        ),
        (
            "deliveries",
            lambda: _deliveries(settings),
            "`ovation-agent webhooks list` says what Ovation is told to send where, `webhooks test` sends one through",
        ),
        *_of_a_cluster(executor),
        ("agent", lambda: _agent(settings), "`journalctl -u ovation-agent`, or what else starts it, says why"),
    ]
    for name, check, remedy in checks:
        try:
            yield Finding(name, good=True, found=await check())
        except AgentError as error:
            yield Finding(name, good=False, found=str(error), remedy=remedy)
        except OSError as error:
            yield Finding(name, good=False, found=f"{error.strerror}: {error.filename}", remedy=remedy)


def _of_a_cluster(executor: Executor) -> list[tuple[str, Callable[[], Awaitable[str]], str]]:
    if not isinstance(executor, SlurmExecutor):
        return []
    return [
        (
            "accounting",
            executor.client.accounting,
            "have slurmdbd looked at: without it, what Slurm's controller has forgotten is known by a run's own record",
        )
    ]


async def _webhooks(settings: Settings) -> str:
    if not settings.agent.webhooks_are_guarded:
        raise _Trouble("no credentials are set: `serve` will not start")
    if settings.agent.webhook_anonymous:
        return "taken from anybody, as AGENT_WEBHOOK_ANONYMOUS says"
    accepted = ["basic auth"] if settings.agent.webhook_username is not None else []
    accepted += ["a signature"] if settings.agent.webhook_secret else []
    return f"must carry {' or '.join(accepted)}"


def _data_dir(settings: Settings) -> str:
    path = Path(settings.agent.data_dir).absolute()
    nearest = next(each for each in (path, *path.parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise _Trouble(f"{path} cannot be written")
    free = shutil.disk_usage(nearest).free
    if free < _LITTLE_SPACE_BYTES:
        raise _Trouble(f"{path}: {free / (1 << 30):.1f} GiB free, which is little for images and their inputs")
    return f"{path}, {free / (1 << 30):.0f} GiB free"


async def _database(settings: Settings) -> str:
    async with connect(settings.agent) as database:
        await database.check()
        async with database.connection() as connection:
            version = await connection.fetchval("SHOW server_version")
    kind = "embedded" if settings.agent.database_url is None else "given"
    return f"PostgreSQL {version} ({kind}), schema up to date"


async def _ovation(settings: Settings) -> str:
    async with Ovation.open(settings.ovation) as ovation:
        return f"{settings.ovation.api_url}: {await ovation.check()}"


async def _token(settings: Settings) -> str:
    """Say what the agent's token says of itself: that Ovation takes it is another check's."""
    async with Ovation.open(settings.ovation) as ovation:
        claims, is_renewed = await ovation.claims(), ovation.renews_its_token
    if claims is None:
        return "does not say what it may do, nor until when"
    if trouble := token.trouble_with(claims, datetime.now(UTC), is_renewed=is_renewed):
        raise _Trouble(trouble)
    return token.words(claims, is_renewed=is_renewed)


async def _deliveries(settings: Settings) -> str:
    """Say when a webhook came last; that none comes is only known by what had to be found without one."""
    try:
        async with connect(settings.agent) as database:
            await database.check()
            last, found = await WatchList(database).heard()
    except DatabaseError:
        return "not known: see `database`"
    if last is None and not found:
        return "none has come yet"
    ago = "none has come yet" if last is None else f"the last one came {_ago(last)} ago"
    if found and (last is None or last > _SILENT_SECONDS):
        raise _Trouble(f"{ago}, and {found} runs of the last day were found only by walks: Ovation does not reach it")
    return ago


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _fuse() -> str:
    if os.geteuid() != 0 and not apptainer.fuse_is_usable():
        raise _Trouble(
            "/dev/fuse cannot be used by this user: each run unpacks its image, which takes seconds and room"
        )
    return "mounted as they are"


async def _limits(executor: Executor) -> str:
    cannot = await executor.cannot_keep(Resources(cpus=1, memory_bytes=1 << 30))
    return "; ".join(cannot) or "runs are kept to the CPUs and the memory that they are given"


async def _clock(settings: Settings) -> str:
    """Compare the machine's clock with the object store's, as far as an answer's Date tells: to the second."""
    url = _store_address(settings)
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as http,
            http.head(url, allow_redirects=False) as response,
        ):
            date = response.headers.get("Date", "")
    except (aiohttp.ClientError, OSError, TimeoutError):
        return "the object store, whose clock counts, does not answer"
    try:
        seconds = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
    except (ValueError, TypeError):
        return "the object store does not tell its time"
    if abs(seconds) > _SKEW_SECONDS:
        raise _Trouble(f"it is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the object store's")
    return "agrees with the object store's"


async def _agent(settings: Settings) -> str:
    """Ask the agent that runs with these settings, if one does, how it is."""
    try:
        address = str(json.loads(settings.agent.address_file.read_text())["address"])
    except (OSError, ValueError, KeyError, TypeError):
        return "none runs on this data directory"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as http,
            http.get(f"{address}/readyz", allow_redirects=False) as response,
        ):
            body = await response.json()
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise _Trouble(f"it does not answer at {address}: {type(error).__name__}") from None
    if response.status != 200:  # noqa: PLR2004 HTTP's own number
        raise _Trouble(f"it listens at {address} and is not ready: {body.get('errors', {}).get('detail', '')}")
    return f"listens at {address} and is ready"


def _store_address(settings: Settings) -> str:
    return settings.aws.endpoint_url_s3 or f"https://s3.{settings.aws.default_region}.amazonaws.com"


async def _store(settings: Settings) -> str:
    url = _store_address(settings)
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as http,
            http.head(url, allow_redirects=False) as response,
        ):
            return f"{url} answers ({response.status} without credentials)"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise _Trouble(f"{url} cannot be reached: {type(error).__name__}") from None
