"""What a compute node takes part with when a batch job does the rest of a run there.

`NodePrograms` is the agent's side: our own program as a batch job, submitted once, found again and judged as a
container would be. `NodeExecutor` is the node's: containers in the batch job that this process is part of.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent.adapters import runner
from agent.adapters.executor import Ended, Ending, Running, RunRequest, Status
from agent.adapters.local import LocalExecutor
from agent.adapters.slurm import SlurmExecutor
from agent.domain.resources import Resources

ORDERS = "orders.json"
"""What the program on the node is to do, credentials among it: mode 0600, and removed as soon as it is read."""

_GRACE_SECONDS = 25.0  # for the container's own end, and the last of its logs
_KILL_SECONDS = 5.0
_HEARS_SECONDS = 5.0


class OrdersGone(Exception):
    """Somebody has taken them before: a batch job that its system starts a second time has nothing to do."""


@dataclass(frozen=True, slots=True)
class NodeRequest(RunRequest):
    """A batch job that does the rest of a run. Of a `RunRequest` only what concerns the batch job means anything."""

    orders: Mapping[str, object] = field(default_factory=dict, repr=False)


class NodePrograms(SlurmExecutor):
    """Runs `agent node DIRECTORY` as a batch job."""

    def _prepare(self, request: RunRequest) -> None:
        if not isinstance(request, NodeRequest):
            raise TypeError("a batch job that does the rest of a run needs orders")
        request.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for log in (request.stdout, request.stderr):
            log.touch(mode=0o600)
        place = str(request.directory)
        runner.write_json(place, ORDERS, dict(request.orders))
        spec = {
            "name": request.name,
            "argv": [self._settings.python, "-I", "-m", "agent", "node", place],
            "environment": None,
            "stdout": request.stdout.name,
            "stderr": request.stderr.name,
            "time_limit_seconds": request.time_limit_seconds,
            "max_log_bytes": request.max_log_bytes,
            "grace_seconds": _GRACE_SECONDS,
            "kill_seconds": _KILL_SECONDS,
            "remove": [],
        }
        runner.write_json(place, runner.SPEC, spec)
        self._bring_runner(request)


def take_orders(directory: Path) -> dict[str, Any]:
    """Read what is to be done and remove it: from now on the credentials are nowhere but in this process.

    Raises:
        OrdersGone: they were taken before.
    """
    path = directory / ORDERS
    mine = path.with_suffix(f".{os.getpid()}")
    try:
        path.rename(mine)  # so that only one takes them
        content = mine.read_bytes()
    except FileNotFoundError:
        raise OrdersGone from None
    finally:
        mine.unlink(missing_ok=True)
    orders: dict[str, Any] = json.loads(content)
    return orders


class NodeExecutor(LocalExecutor):
    """Containers in this batch job, which is what keeps them to their resources."""

    async def cannot_keep(self, resources: Resources) -> list[str]:
        """Say which of these resources a run is not kept to here: Slurm keeps to all that its site has set up."""
        del resources
        return []

    async def start(self, request: RunRequest) -> Running | Ended:
        """Find the run or start it; its id is the batch job's."""
        status = await super().start(request)
        return replace(status, native_id=_job_id() or status.native_id) if isinstance(status, Running) else status

    async def wait(self, request: RunRequest, timeout_seconds: float, told: Running | None = None) -> Status:
        """Return the status as soon as the run ends, or after `timeout_seconds`.

        A run that was told to end, and not by this process, is told of later: the batch system is about to end this
        process too, and knows better why.
        """
        status = await super().wait(request, timeout_seconds, told)
        if isinstance(status, Ended) and status.ending is Ending.LOST:
            await asyncio.sleep(_HEARS_SECONDS)
        return status


def _job_id() -> str | None:
    return os.environ.get("SLURM_JOB_ID")
