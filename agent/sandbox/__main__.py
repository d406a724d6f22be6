"""`python -m agent.sandbox --directory DIR --port N`: run until SIGINT or SIGTERM.

One line of JSON with the addresses goes to standard output when it is ready; what is secret is in DIR/sandbox.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import structlog

from agent.sandbox.server import Sandbox
from agent.sandbox.settings import SandboxSettings, WebhookSettings


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m agent.sandbox", description="A stand-in for Ovation.")
    parser.add_argument("--directory", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="of the API; the two after it are taken as well")
    parser.add_argument("--token-seconds", type=float, default=86_400.0)
    parser.add_argument("--presigned-seconds", type=int, default=3_600)
    parser.add_argument("--upload-credentials-seconds", type=float, default=3_600.0)
    parser.add_argument("--lab-retry-seconds", default="64,729", help="waits between attempts, comma-separated")
    parser.add_argument("--research-backoff-seconds", type=float, help="a fixed wait instead of 1, 2, 4 … 60")
    arguments = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(run(Sandbox(arguments.directory, arguments.host, arguments.port, settings=_settings(arguments))))


async def run(sandbox: Sandbox) -> None:
    """Serve until a signal comes."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for one in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(one, stop.set)
    async with sandbox:
        path = sandbox.directory / "sandbox.json"
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(sandbox.details(), file, indent=2)
        sys.stdout.write(json.dumps({**sandbox.urls(), "details": str(path)}) + "\n")
        sys.stdout.flush()
        await stop.wait()


def _settings(arguments: argparse.Namespace) -> SandboxSettings:
    waits = tuple(float(one) for one in arguments.lab_retry_seconds.split(",") if one)
    webhooks = WebhookSettings(lab_retry_seconds=waits)
    if arguments.research_backoff_seconds is not None:
        fixed: float = arguments.research_backoff_seconds
        webhooks = WebhookSettings(lab_retry_seconds=waits, research_backoff_seconds=lambda _attempt: fixed)
    return SandboxSettings(
        token_seconds=arguments.token_seconds,
        presigned_seconds=arguments.presigned_seconds,
        upload_credentials_seconds=arguments.upload_credentials_seconds,
        webhooks=webhooks,
    )


if __name__ == "__main__":
    main()
