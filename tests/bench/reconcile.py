"""What walks cost when nothing changed: calls to Ovation and seconds for 10,000 Activities.

python -m tests.bench.reconcile
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import structlog

from agent.adapters import ovation_http
from agent.db.database import Database
from agent.sandbox.server import Sandbox
from tests.postgres import debian_server
from tests.triggers import triggers

WALKS = 4
LOOKS = 100


async def bench(activities: int) -> None:
    """Walk, and count each call that the agent makes."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))
    calls: list[str] = []
    real_call = ovation_http.Connection.call

    async def counted(self: ovation_http.Connection, method: str, path: str, **request: Any) -> dict[str, Any]:
        calls.append(path)
        return await real_call(self, method, path, **request)

    ovation_http.Connection.call = counted  # type: ignore[method-assign]  # counts, and does the same
    with debian_server() as url, tempfile.TemporaryDirectory() as directory:
        async with Sandbox(Path(directory) / "sandbox") as sandbox:
            project_id = sandbox.admin.create_project("Bench")["_id"]
            data, image = (sandbox.admin.create_revision(project_id, name, "x")["_id"] for name in ("a.csv", "i.sif"))
            for number in range(activities):
                sandbox.admin.create_activity(project_id, f"Activity {number}", [data], [image])
            database = await Database.open(url, "the bench database")
            await database.migrate()
            async with triggers(sandbox, database, Path(directory), reconcile_looks=LOOKS) as front:
                for walk in range(1, WALKS + 1):
                    calls.clear()
                    began = time.monotonic()
                    await front.walk()
                    seconds = time.monotonic() - began
                    runs = sum((await front.runs()).values())
                    print(  # noqa: T201 a bench prints
                        f"walk {walk}: {activities} Activities, {len(calls)} calls, {seconds:.2f} s, {runs} runs"
                    )
            await database.close()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activities", type=int, default=10_000)
    asyncio.run(bench(parser.parse_args().activities))


if __name__ == "__main__":
    main()
