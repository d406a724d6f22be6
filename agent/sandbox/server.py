"""The sandbox: API, file addresses and object store on three ports, and the webhook sender behind them."""

from __future__ import annotations

import fcntl
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from agent.sandbox import api, s3
from agent.sandbox.admin import Admin
from agent.sandbox.api_annotations import AnnotationRoutes
from agent.sandbox.api_entities import EntityRoutes
from agent.sandbox.api_files import FileRoutes
from agent.sandbox.api_links import LinkRoutes
from agent.sandbox.control import ControlRoutes
from agent.sandbox.faults import FaultBook
from agent.sandbox.lab import LabRoutes
from agent.sandbox.model import Model
from agent.sandbox.objects import ObjectStore
from agent.sandbox.outbox import WebhookOutbox
from agent.sandbox.records import Entity, Records
from agent.sandbox.settings import MEBIBYTE, REGION, SandboxSettings
from agent.sandbox.tokens import Tokens
from agent.sandbox.uploads import Uploads
from agent.sandbox.webhooks import WebhookSender


class Sandbox:
    """A stand-in for Ovation. Use it as an async context manager; what it holds is kept in `directory`.

    `port` is the API's; the object store and the files' addresses take the two after it, or any free ones when 0.
    """

    def __init__(
        self,
        directory: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        settings: SandboxSettings | None = None,
    ) -> None:
        self.directory = directory
        self.host = host
        self.port = port
        self.settings = settings or SandboxSettings()
        self.faults = FaultBook()
        self.api_url = self.s3_url = self.services_url = ""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._open(stack)
            await self._serve(stack)
            await self.webhooks.start()
            stack.push_async_callback(self.webhooks.stop)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def auth_url(self) -> str:
        """Where service tokens are fetched: `{auth_url}oauth/token`."""
        return f"{self.api_url}/"

    @property
    def service_token(self) -> str:
        """A token of the service account, which reads and writes everything."""
        return self.tokens.for_service(self.settings.token_seconds)

    @property
    def jwt_secret(self) -> str:
        """What people's tokens are signed with (HS256)."""
        return self.tokens.secret

    def user_token(self, email: str) -> str:
        """Return a token of the person with that address, who is made if need be."""
        return str(self.admin.create_user(email)["token"])

    def environment(self) -> dict[str, str]:
        """Return the environment variables that an agent needs to work against this sandbox."""
        return {
            "OVATION_API_URL": self.api_url,
            "OVATION_TOKEN": self.service_token,
            "OVATION_HOSTS": self.services_url,
            "AWS_ENDPOINT_URL_S3": self.s3_url,
            "AWS_DEFAULT_REGION": REGION,
        }

    def details(self) -> dict[str, object]:
        """Return everything that another process needs to use and to steer the sandbox; secrets among it."""
        return {
            **self.urls(),
            "environment": self.environment(),
            "store_environment": self.admin.store_environment(),
            "client_id": self.tokens.client_id,
            "client_secret": self.tokens.client_secret,
            "jwt_secret": self.jwt_secret,
            "control_token": self.control_token,
        }

    def urls(self) -> dict[str, str]:
        """Return the addresses."""
        return {
            "api_url": self.api_url,
            "auth_url": self.auth_url,
            "services_url": self.services_url,
            "s3_url": self.s3_url,
        }

    def _open(self, stack: AsyncExitStack) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = stack.enter_context((self.directory / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another sandbox runs in {self.directory}") from error
        clock = self.settings.clock
        self.records = Records(self.directory / "ovation.sqlite")
        stack.callback(self.records.close)
        self.store = ObjectStore(self.directory)
        stack.callback(self.store.close)
        self.outbox = WebhookOutbox(self.records, self.faults, clock)
        self.model = Model(self.records, self.outbox, clock)
        self.uploads = Uploads(self.model, self.store, self.settings)
        self.tokens = Tokens(self.records, self._service_user(), clock)
        self.webhooks = WebhookSender(self.records, self.settings.webhooks, clock)
        self.admin = Admin(self.model, self.uploads, self.store, self.tokens, self.outbox, self.webhooks, self.settings)
        self.control_token = self.records.remembered("control_token")

    def _service_user(self) -> str:
        user_id = self.records.remembered("service_user_id")
        if self.records.entity(user_id) is None:
            self.records.save(Entity(user_id, 0, "User", user_id, {"name": "Service account"}))
        return user_id

    async def _serve(self, stack: AsyncExitStack) -> None:
        application = api.make_application(
            self.tokens,
            self.settings.token_seconds,
            self.faults,
            FileRoutes(self.model, self.uploads),
            EntityRoutes(self.model, self.uploads),
            LinkRoutes(self.model),
            AnnotationRoutes(self.model),
            LabRoutes(self.model),
        )
        ControlRoutes(self.faults, self.admin, self.control_token).add_to(application)
        store = s3.make_application(self.store, self.uploads.credential, self.settings, self.faults)
        ports = [self.port + offset if self.port else 0 for offset in range(3)]
        api_runner = await self._runner(stack, application)
        self.api_url = await self._listen(api_runner, ports[0])
        self.services_url = self.api_url
        if self.settings.separate_services:
            self.services_url = await self._listen(api_runner, ports[2])
        self.s3_url = await self._listen(await self._runner(stack, store), ports[1])
        self.model.services_url = self.services_url
        self.uploads.s3_url = self.s3_url

    async def _runner(self, stack: AsyncExitStack, application: web.Application) -> web.AppRunner:
        runner = web.AppRunner(
            application,
            access_log=None,
            shutdown_timeout=1.0,
            read_bufsize=MEBIBYTE,
            # an upload whose object is compressed is stored as it came
            auto_decompress=False,
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        return runner

    async def _listen(self, runner: web.AppRunner, port: int) -> str:
        await web.TCPSite(runner, self.host, port, backlog=1024).start()
        bound = runner.addresses[-1][1]
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{bound}"
