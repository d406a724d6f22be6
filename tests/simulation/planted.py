"""Bugs that are planted in the agent, to see that the simulation finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any
from unittest import mock

import aiosql

from agent.adapters import stream
from agent.adapters.objects import Vouched
from agent.db import database
from agent.db.jobs import Claim, Jobs
from agent.domain import decide
from agent.domain.job import Done, Failed, Fault, FaultClass, Job, Move, Outage, Outcome, State
from agent.pipeline import perform, worker
from agent.pipeline.context import Context
from agent.pipeline.folders import Folders
from agent.pipeline.transfer import Transfers


@dataclass(frozen=True, slots=True)
class Plant:
    """A bug; `sign` is in what the check says when it meets it."""

    name: str
    sign: str
    needs: frozenset[str]  # kinds of trouble without which nothing shows it
    planted: Callable[[], AbstractContextManager[Any]]


def _delivers_without_looking() -> AbstractContextManager[Any]:
    begin = Folders.__init__

    def blind(self: Folders, *what: Any, is_repeated: bool) -> None:
        del is_repeated
        begin(self, *what, is_repeated=False)

    return mock.patch.object(Folders, "__init__", blind)


@contextmanager
def _believes_downloads() -> Iterator[None]:
    with mock.patch.object(Vouched, "compare"), mock.patch.object(stream, "_check_length"):
        yield


def _counts_outages() -> AbstractContextManager[Any]:
    def counting(job: Job, outcome: Outcome, *limits: Any, **more: Any) -> Move:
        if isinstance(outcome, Outage):
            outcome = Failed(Fault(FaultClass.PLATFORM, outcome.reason), final=False)
        return decide.decide(job, outcome, *limits, **more)

    return mock.patch.object(worker, "decide", counting)


def _starts_again_after_a_failure() -> AbstractContextManager[Any]:
    request = Context.run_request

    def another(self: Context, job: Job) -> Any:
        found = request(self, job)
        return replace(
            found,
            directory=found.directory.with_name(f"{found.directory.name}-{job.suspicion + int(job.waiting_seconds)}"),
        )

    return mock.patch.object(Context, "run_request", another)


def _lets_a_former_step_go_on() -> AbstractContextManager[Any]:
    claim = Jobs.claim

    async def hasty(self: Jobs, states: Any, most: int, lease_seconds: float, place: str, **more: Any) -> list[Claim]:
        del lease_seconds
        return await claim(self, states, most, 1.0, place, **more)

    async def goes_on(_earlier: Any) -> None:
        return None

    plant = ExitStack()  # alone, the first would do no harm: a job's former step is over before it is begun again
    plant.enter_context(mock.patch.object(Jobs, "claim", hasty))
    plant.enter_context(mock.patch.object(worker, "_ended", goes_on))
    return plant


def _leaves_revisions_waiting() -> AbstractContextManager[Any]:
    async def idle(*_: Any) -> None:
        return None

    return mock.patch.object(Transfers, "_fail_strays", idle)


def _leaves_files_behind() -> AbstractContextManager[Any]:
    async def lazy(*_: Any) -> Outcome:
        return Done()

    return mock.patch.dict(perform.STEPS, {State.REPORTING: lazy})


def _forgets_what_changed_during_a_run() -> AbstractContextManager[Any]:
    text = resources.files("agent.db").joinpath("queries.sql").read_text()
    looks = "SELECT ended_for FROM moved WHERE ended_for IS NOT NULL"
    assert looks in text
    forgetful = aiosql.from_str(text.replace(looks, f"{looks} AND false"), "asyncpg", mandatory_parameters=False)
    return mock.patch.object(database._QUERIES, "move_jobs", forgetful.move_jobs)


PLANTS = (
    Plant(
        "a delivery that does not look",
        " times",
        frozenset({"deaths at a request", "flaky Ovation"}),
        _delivers_without_looking,
    ),
    Plant(
        "Revisions that wait for ever",
        "its upload is still going on",
        frozenset({"deaths at a request"}),
        _leaves_revisions_waiting,
    ),
    Plant("downloads that are believed", ", expected b", frozenset({"spoilt downloads"}), _believes_downloads),
    Plant("outages that are counted", "'platform'", frozenset({"store outage"}), _counts_outages),
    Plant(
        "a container that is started again",
        "started 2 times",
        frozenset({"deaths at a request"}),
        _starts_again_after_a_failure,
    ),
    Plant("a former step that goes on", "", frozenset(), _lets_a_former_step_go_on),
    Plant("files that stay", "left on agent", frozenset(), _leaves_files_behind),
    Plant("changes that are forgotten", "ready for a run", frozenset({"changes"}), _forgets_what_changed_during_a_run),
)
