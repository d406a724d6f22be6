"""Checks of the machine and the settings, each with its remedy."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from agent.adapters.executor import Executor
from agent.adapters.ovation import Ovation
from agent.db.connect import connect
from agent.errors import AgentError
from agent.settings import Settings

_LITTLE_SPACE_BYTES = 10 << 30


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
        ("Ovation", lambda: _ovation(settings), "check OVATION_API_URL and OVATION_TOKEN (or OVATION_CLIENT_ID)"),
        ("object store", lambda: _store(settings), "check AWS_ENDPOINT_URL_S3, AWS_DEFAULT_REGION and the network"),
    ]
    for name, check, remedy in checks:
        try:
            yield Finding(name, good=True, found=await check())
        except AgentError as error:
            yield Finding(name, good=False, found=str(error), remedy=remedy)
        except OSError as error:
            yield Finding(name, good=False, found=f"{error.strerror}: {error.filename}", remedy=remedy)


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


async def _store(settings: Settings) -> str:
    region = settings.aws.default_region
    url = settings.aws.endpoint_url_s3 or f"https://s3.{region}.amazonaws.com"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as http,
            http.head(url, allow_redirects=False) as response,
        ):
            return f"{url} answers ({response.status} without credentials)"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise _Trouble(f"{url} cannot be reached: {type(error).__name__}") from None
