"""`hpc_run`: a person asks a running agent for a run, with their own token, and follows it to its end."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from agent import console
from agent.client import AgentRefused, Client
from agent.errors import AgentError
from agent.logs import printable

_LOOK_SECONDS = 0.5
_LOOK_MOST_SECONDS = 5.0
_LOOK_GROWTH = 1.05
_PATIENCE_SECONDS = 300.0
_SUCCEEDED = "succeeded"


@dataclass(frozen=True, slots=True)
class Wish:
    """What to run: a related file of an Activity."""

    activity_id: str
    image_name: str
    organization: int


class JobFailed(AgentError):
    """The job that was followed did not succeed; the message says why."""


async def ask(client: Client, wish: Wish) -> dict[str, Any]:
    """Ask for a run and return the answer: the new job's id, or that of the live job that does the same.

    Raises:
        AgentRefused: the agent will not, or is away; the message says why.
    """
    body = {"activity_id": wish.activity_id, "image_name": wish.image_name, "organization": wish.organization}
    answer = await client.post("hpc_run", body=body)
    if not isinstance(answer, dict) or not isinstance(answer.get("job_id"), str):
        raise AgentRefused("the answer names no job: is it an agent of this version?")
    return answer


async def follow(
    client: Client,
    job_id: str,
    on_away: Callable[[str], None] = lambda _: None,
    *,
    look_seconds: float = _LOOK_SECONDS,
    patience_seconds: float = _PATIENCE_SECONDS,
) -> AsyncIterator[dict[str, Any]]:
    """Yield the job again and again, the last time when it has ended.

    Args:
        client: with the person's token.
        job_id: the job.
        on_away: is called once with the reason when the agent does not answer; it is waited for.
        look_seconds: between the first looks; then slowly more.
        patience_seconds: how long an agent that does not answer is waited for.

    Raises:
        AgentRefused: the person may not see the job (any more), or the agent stays away.
    """
    away_since: float | None = None
    while True:
        try:
            job = _job(await client.get("hpc_run", job_id))
        except AgentRefused as error:
            if not error.transient:
                raise
            now = time.monotonic()
            if away_since is None:
                away_since = now
                on_away(str(error))
            elif now - away_since > patience_seconds:
                raise
        else:
            away_since = None
            yield job
            if not job["live"]:
                return
        await asyncio.sleep(look_seconds)
        look_seconds = min(look_seconds * _LOOK_GROWTH, _LOOK_MOST_SECONDS)


def _job(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict) or not {"state", "live", "progress", "waiting_for", "fault"} <= set(answer):
        raise AgentRefused("the answer is no job: is it an agent of this version?", status=200)
    return answer


async def run(client: Client, wanted: Wish | str, *, wait: bool, as_json: bool) -> None:
    """Ask for a job, or take the one of that id, and show it to its end; what goes on is said when it is interrupted.

    Raises:
        AgentRefused: see `ask` and `follow`.
        JobFailed: it failed or was cancelled.
    """
    job_id = wanted if isinstance(wanted, str) else None
    try:
        if isinstance(wanted, Wish):
            answer = await ask(client, wanted)
            job_id = str(answer["job_id"])
            if not wait:
                console.show_json(answer) if as_json else print(printable(job_id))  # noqa: T201
                return
        assert job_id is not None  # noqa: S101 for mypy: it is one or the other
        job = await _shown(client, job_id, as_json=as_json)
    except asyncio.CancelledError:
        _say(
            f"interrupted: the job goes on; {_again(job_id)}"
            if job_id
            else "interrupted: it is not known whether the agent has made a job; asking again while it is live makes"
            " no second one"
        )
        raise
    except AgentRefused as error:
        if job_id is not None and not isinstance(wanted, str):
            raise AgentRefused(f"{error}; the job goes on: {_again(job_id)}", status=error.status) from None
        raise
    if as_json:
        console.show_json(job)
    if job["state"] != _SUCCEEDED:
        cause = console.cause(job)
        raise JobFailed(f"job {job_id} {job['state']}{f': {cause}' if cause else ''}")


async def _shown(client: Client, job_id: str, *, as_json: bool) -> dict[str, Any]:
    def on_away(reason: str) -> None:
        _say(f"{reason} Waiting for it; the job goes on.")

    job: dict[str, Any] = {}
    if as_json:
        async for job in follow(client, job_id, on_away):  # noqa: B007 the last one counts
            pass
        return job
    with console.job_progress(job_id) as show:
        async for job in follow(client, job_id, on_away):
            show(job)
    return job


def _again(job_id: str) -> str:
    return f"follow it with `ovation-agent hpc_run --job {job_id}`"


def _say(text: str) -> None:
    print(f"ovation-agent: {printable(text)}", file=sys.stderr, flush=True)  # noqa: T201 this is for who waits
