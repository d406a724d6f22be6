"""What the commands share: how they end, their settings, their event loop."""

from __future__ import annotations

import io
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from agent.client import Client
    from agent.settings import Settings

_INTERRUPTED = 130
_ALIASES = {"hpc-run": "hpc_run"}  # how the released client of Ovation spells it


class Commands(click.Group):
    """A group whose commands end with one line on standard error where others print a traceback."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of that name, or of its other spelling."""
        return super().get_command(ctx, _ALIASES.get(cmd_name, cmd_name))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and end with its exit code and reason."""
        from agent.errors import AgentError, ConfigurationError

        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks is no reason to end
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            self._end(error, 2)
        except AgentError as error:
            self._end(error, 1)
        except KeyboardInterrupt:
            sys.exit(_INTERRUPTED)

    def _end(self, error: Exception, code: int) -> None:
        from agent.logs import printable, redact

        for line in str(error).splitlines():
            click.echo(f"ovation-agent: {printable(redact(line))}", err=True)
        sys.exit(code)


def load_settings(config: Path | None, *, log: bool = False) -> Settings:
    """Return the settings, with the log set up and their secrets kept out of it."""
    from agent import logs
    from agent.settings import Settings

    settings = Settings.load(config)
    logs.hide(settings.secrets())
    logs.configure(settings.agent.log_format, settings.agent.log_level if log else "warning")
    return settings


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a command's work; Ctrl-C ends it with 130."""
    import asyncio

    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def ask(config: Path | None, question: Callable[[Client], Awaitable[Any]]) -> Any:
    """Ask the agent that runs with these settings, and end the command with a message when it refuses."""
    from agent.client import Client

    async def work() -> Any:
        async with Client.find(load_settings(config)) as client:
            return await question(client)

    return run(work())
