"""What tests of the sandbox, and against it, share: the released client, a webhook receiver, a sandbox process."""

from __future__ import annotations

import asyncio
import collections
import collections.abc
import importlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import aiohttp
import botocore.session
from aiohttp import web
from botocore.config import Config

from agent.sandbox.server import Sandbox


def released_client() -> Any:
    """Return the modules of `ovation` 1.26.0, which predates Python 3.10."""
    for name in ("Mapping", "Iterable"):
        if not hasattr(collections, name):
            setattr(collections, name, getattr(collections.abc, name))
    names = ("session", "core", "activities", "upload", "download", "contents", "service", "cli")
    return SimpleNamespace(**{name: importlib.import_module(f"ovation.{name}") for name in names})


def quiet(iterable: Any = None, **_: Any) -> Any:
    """Stand in for tqdm in the released client."""
    return SimpleNamespace(update=lambda _: None, close=lambda: None) if iterable is None else iterable


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def s3_client(environment: dict[str, str], **options: Any) -> Any:
    """Return a botocore client with the given keys; no retries, so that a test sees each answer."""
    config = Config(retries={"max_attempts": 1, "mode": "standard"}, s3={"addressing_style": "path"}, **options)
    return botocore.session.Session().create_client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
        region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        aws_session_token=environment["AWS_SESSION_TOKEN"],
        config=config,
    )


@dataclass
class Api:
    """A caller of the sandbox's API with somebody's token."""

    http: aiohttp.ClientSession
    base_url: str
    token: str

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Return the status and the JSON of the answer."""
        sent = {"Authorization": f"Bearer {self.token}", **headers}
        async with self.http.request(method, self.base_url + path, json=body, headers=sent) as response:
            text = await response.text()
            return response.status, json.loads(text) if text else None

    async def get(self, path: str) -> Any:
        """Return the answer's JSON; fail unless it is 200."""
        status, answer = await self.call("GET", path)
        assert status == 200, answer
        return answer


@asynccontextmanager
async def api(sandbox: Sandbox, token: str | None = None) -> AsyncIterator[Api]:
    """Open a caller of the API; the service account's without a token."""
    async with aiohttp.ClientSession() as http:
        yield Api(http, sandbox.api_url, sandbox.service_token if token is None else token)


@dataclass
class Received:
    """One request that a receiver got."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    at: float


@dataclass
class Receiver:
    """An HTTP server that keeps what it gets and answers with the programmed statuses, then 200."""

    statuses: list[int] = field(default_factory=list)
    delay_seconds: float = 0.0
    received: list[Received] = field(default_factory=list)
    url: str = ""
    most_at_once: int = 0
    _open: int = 0
    _runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self._open += 1
        self.most_at_once = max(self.most_at_once, self._open)
        try:
            text = await request.text()
            body = json.loads(text) if text else None
            headers = dict(request.headers)
            self.received.append(Received(request.method, request.path_qs, headers, body, time.monotonic()))
            status = self.statuses.pop(0) if self.statuses else 200
            await asyncio.sleep(self.delay_seconds)
            return web.json_response({}, status=status)
        finally:
            self._open -= 1


@dataclass
class SandboxProcess:
    """A sandbox in a process of its own."""

    process: asyncio.subprocess.Process
    details: dict[str, Any]

    @property
    def api_url(self) -> str:
        """Where its API is."""
        return str(self.details["api_url"])

    async def control(self, method: str, path: str, body: Any = None) -> Any:
        """Call one of the sandbox's own routes."""
        headers = {"Authorization": f"Bearer {self.details['control_token']}"}
        async with (
            aiohttp.ClientSession() as http,
            http.request(method, f"{self.api_url}/_sandbox/{path}", json=body, headers=headers) as response,
        ):
            assert response.status < 300, await response.text()
            return await response.json() if response.content_length else None

    async def admin(self, helper: str, /, **arguments: Any) -> Any:
        """Call one of the admin's helpers."""
        return (await self.control("POST", f"admin/{helper}", arguments))["result"]


@asynccontextmanager
async def sandbox_process(directory: Path, *arguments: str) -> AsyncIterator[SandboxProcess]:
    """Start `python -m agent.sandbox` and stop it with SIGTERM at the end, when it still runs."""
    root = Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent.sandbox", "--directory", str(directory), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 20)
        details = await asyncio.to_thread(Path(json.loads(line)["details"]).read_text)
        yield SandboxProcess(process, json.loads(details))
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), 20)
