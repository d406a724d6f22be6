"""The three programs that the demo needs: the sandbox, the image's builder, and the agent."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agent.sandbox.demo_agent import AgentClient
from agent.sandbox.demo_errors import DemoFailed
from agent.sandbox.demo_home import Home
from agent.sandbox.demo_processes import Child, Children
from agent.sandbox.demo_screen import printable
from agent.sandbox.sample.image import clean

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_OURS = ("OVATION_", "AGENT_", "AWS_", "JWT_")
_POLL_SECONDS = 0.05
_MOMENT_SECONDS = 1.0
_SANDBOX_SECONDS = 30
_IMAGE_SECONDS = 300
_AGENT_SECONDS = 60
_LOG_LINES = 15
_SETTLE_SECONDS = "0.3"
_STOP_SECONDS = 15.0
_SWEEP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class SandboxAddress:
    """What the sandbox says of itself once it is ready."""

    api_url: str
    s3_url: str
    environment: Mapping[str, str] = field(repr=False)  # what an agent needs to know, its token among it
    control_token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class AgentAddress:
    """Where the agent listens, and what it wants to see."""

    url: str
    admin_token: str = field(repr=False)
    webhook_key: str = field(repr=False)


class Services:
    """What the demo starts, and how it is ended."""

    def __init__(self, children: Children, home: Home, cache: Path) -> None:
        self.children = children
        self.home = home.path
        self._temporary = home.temporary
        self.sandbox: SandboxAddress | None = None
        self.agent: AgentAddress | None = None
        self._cache = cache
        self._agent: Child | None = None
        self._sandbox: Child | None = None
        self._building = False

    async def start_sandbox(self) -> SandboxAddress:
        """Start the sandbox and wait until it has said where it is.

        Raises:
            DemoFailed: it ended, or said nothing in time.
        """
        command = _python("-m", "agent.sandbox", "--directory", str(self.home / "sandbox"), "--port", "0")
        child = self._sandbox = self.children.start("sandbox", command, self.home, self._environment())
        deadline = time.monotonic() + _SANDBOX_SECONDS
        while b"\n" not in child.out.read_bytes():
            await _wait(child, deadline, "the sandbox")
        self.sandbox = _sandbox_address(child)
        return self.sandbox

    async def build_image(self, say: Callable[[str], None]) -> tuple[Path, bool]:
        """Return the sample image and whether it had to be built; `say` hears of the steps.

        Raises:
            DemoFailed: it cannot be built.
        """
        command = _python("-m", "agent.sandbox.sample.image", "--cache", str(self._cache))
        self._building = True
        child = self.children.start("image", command, self.home, self._environment())
        deadline = time.monotonic() + _IMAGE_SECONDS
        while (code := child.exit_code) is None:
            if time.monotonic() > deadline:
                raise DemoFailed(f"the sample image was not built within {_IMAGE_SECONDS} s")
            for line in child.tail(1):
                say(printable(line))
            await asyncio.sleep(_POLL_SECONDS)
        if code != 0:
            raise DemoFailed(_with_log(child, "the sample image could not be built"))
        return Path(child.out.read_text(encoding="utf-8").strip()), bool(child.tail(1))

    async def start_agent(self) -> AgentAddress:
        """Start the agent's service beside the sandbox and wait until it answers.

        Raises:
            DemoFailed: it ended, or did not answer in time; the message has the end of its log.
        """
        address = self.agent = _choose_agent_address()
        environment = self._environment(self.agent_settings())
        child = self._agent = self.children.start("agent", _python("-m", "agent", "serve"), self.home, environment)
        deadline = time.monotonic() + _AGENT_SECONDS
        async with AgentClient(address.url, address.admin_token) as client:
            while not await client.is_alive():
                await _wait(child, deadline, "the agent")
        return address

    def require_all(self) -> None:
        """Raise `DemoFailed` with the end of its log when one of the services has ended."""
        for child, what in ((self._sandbox, "the sandbox"), (self._agent, "the agent")):
            if child is not None:
                _require(child, what)

    async def require_all_for_a_moment(self) -> None:
        """The same, of services that may be ending just now: their connections break before they have ended."""
        until = time.monotonic() + _MOMENT_SECONDS
        while time.monotonic() < until:
            self.require_all()
            await asyncio.sleep(_POLL_SECONDS)

    @property
    def agent_is_running(self) -> bool:
        """Whether the agent was started and has not ended."""
        return self._agent is not None and self._agent.exit_code is None

    def agent_settings(self) -> dict[str, str]:
        """Return the environment variables that the agent is configured with; secrets among them."""
        if self.sandbox is None or self.agent is None:
            return {}
        return {
            **self.sandbox.environment,
            "AGENT_PORT": self.agent.url.rpartition(":")[2],
            "AGENT_DATA_DIR": str(self.home / "agent"),
            # A document-change webhook carries one key, as user name and as password.
            "AGENT_WEBHOOK_USERNAME": self.agent.webhook_key,
            "AGENT_WEBHOOK_PASSWORD": self.agent.webhook_key,
            "AGENT_ADMIN_TOKEN": self.agent.admin_token,
            "AGENT_SETTLE_SECONDS": _SETTLE_SECONDS,
        }

    def write_environment(self) -> Path:
        """Write the agent's settings, with its secrets, as a shell would read them; return the file (mode 0600)."""
        path = self.home / "environment"
        path.touch(mode=0o600)
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in self.agent_settings().items()]
        path.write_text("".join(lines), encoding="utf-8")
        return path

    def _environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return this process's environment without any setting of a real Ovation or agent, and with `more`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        # From a checkout the package is found by the working directory, which is another one in the children.
        paths = [str(_PACKAGE_PARENT), kept.get("PYTHONPATH", "")]
        own = {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "TMPDIR": str(self._temporary)}
        return kept | own | dict(more or {})

    async def end(self, hurry: asyncio.Event) -> list[int]:
        """End all that was started, the agent before what it needs, and what those left; return what does not end."""
        for child in (self._agent, self._sandbox):
            if child is not None:
                await self.children.stop(child, _STOP_SECONDS, hurry)
        left = await self.children.sweep(_SWEEP_SECONDS, hurry)
        if self._building:
            clean(self._cache)
        return left


def _sandbox_address(child: Child) -> SandboxAddress:
    """Read where the sandbox is from its one line, and its secrets from the file that the line names."""
    said = json.loads(child.out.read_text(encoding="utf-8").splitlines()[0])
    details = json.loads(Path(said["details"]).read_text(encoding="utf-8"))
    return SandboxAddress(said["api_url"], said["s3_url"], details["environment"], details["control_token"])


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _choose_agent_address() -> AgentAddress:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return AgentAddress(f"http://127.0.0.1:{port}", secrets.token_urlsafe(24), secrets.token_urlsafe(24))


async def _wait(child: Child, deadline: float, what: str) -> None:
    _require(child, what)
    if time.monotonic() > deadline:
        raise DemoFailed(_with_log(child, f"{what} was not ready in time"))
    await asyncio.sleep(_POLL_SECONDS)


def _require(child: Child, what: str) -> None:
    if child.exit_code is not None:
        raise DemoFailed(_with_log(child, f"{what} ended with {child.exit_code}"))


def _with_log(child: Child, message: str) -> str:
    lines = [printable(line) for line in child.tail(_LOG_LINES)]
    return "\n".join([f"{message}; the end of its log:", *lines])
