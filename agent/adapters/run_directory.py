"""A run's own directory: what is written there before the start, and what its records say afterwards.

The runner (`agent.adapters.runner`) reads and writes the same files, here and on a node of a batch system.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from agent.adapters import runner
from agent.adapters.executor import Ended, Ending, Running, RunRequest, Usage
from agent.domain.container import Container, User, arguments, environment

PRIVATE = "private"  # Apptainer's own home and temporary files
SCRATCH = "scratch"


def specification(
    request: RunRequest,
    program: str,
    user: User | None,
    grace_seconds: float,
    kill_seconds: float,
    *,
    unsquash: bool,
    extra: Sequence[str] = (),
    limits: bool = False,
) -> dict[str, Any]:
    """Return what the runner is to run. `limits`: Apptainer is to keep to the CPUs and the memory that were given.

    Raises:
        ValueError: a path that Apptainer cannot take.
    """
    container = Container(
        image=PurePosixPath(request.image),
        inputs=PurePosixPath(request.inputs),
        related=PurePosixPath(request.related),
        outputs=PurePosixPath(request.outputs),
        scratch=PurePosixPath(request.directory / SCRATCH),
        network=request.network,
        user=user,
        unsquash=unsquash,
        nvidia=bool(request.resources.gpus),
        cpus=request.resources.cpus if limits else None,
        memory_bytes=request.resources.memory_bytes if limits else None,
    )
    *options, image = arguments(container)
    return {
        "name": request.name,
        "argv": [program, *options, *extra, image],
        "environment": environment(PurePosixPath(program), PurePosixPath(request.directory / PRIVATE)),
        "stdout": request.stdout.name,
        "stderr": request.stderr.name,
        "time_limit_seconds": request.time_limit_seconds,
        "max_log_bytes": request.max_log_bytes,
        "grace_seconds": grace_seconds,
        "kill_seconds": kill_seconds,
        "remove": [PRIVATE, SCRATCH],
    }


def prepare(request: RunRequest, spec: dict[str, Any], user: User | None) -> None:
    """Make the directories and write what is to be run: the intent, durable before anything starts."""
    request.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in (PRIVATE, SCRATCH):
        (request.directory / name).mkdir(mode=0o700, exist_ok=True)
    request.outputs.mkdir(mode=0o700, exist_ok=True)
    if user is not None:
        for path in (request.outputs, request.directory / SCRATCH):
            os.chown(path, user.uid, user.gid, follow_symlinks=False)
    for log in (request.stdout, request.stderr):
        log.touch(mode=0o600)
    runner.write_json(str(request.directory), runner.SPEC, spec)


def running(claim: dict[str, Any]) -> Running:
    """Read a claim."""
    return Running(native_id=str(claim["pid"]), started_at=moment(claim["at"]))


def ended(record: dict[str, Any]) -> Ended:
    """Read the record of an end."""
    usage = None
    if "wall_seconds" in record:
        usage = Usage(
            wall_seconds=record["wall_seconds"],
            user_seconds=record["user_seconds"],
            system_seconds=record["system_seconds"],
            peak_memory_bytes=record["peak_memory_bytes"],
        )
    return Ended(
        ending=Ending(record["ending"]),
        exit_code=record["exit_code"],
        started_at=None if record["started_at"] is None else moment(record["started_at"]),
        finished_at=moment(record["finished_at"]),
        usage=usage,
        detail=record.get("detail"),
    )


def moment(seconds: float) -> datetime:
    """Return the time that many seconds after the epoch."""
    return datetime.fromtimestamp(seconds, UTC)
