"""The trigger side on its own: front door, inbox, evaluator and walks are the real ones, runs end as soon as begun."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from agent.adapters.ovation import Ovation
from agent.db.database import Database
from agent.db.jobs import Jobs
from agent.db.log_questions import LogQuestions
from agent.db.outputs import Outputs
from agent.db.reconciliations import Reconciliations
from agent.db.watched import WatchList
from agent.db.work import Work
from agent.domain.decide import Limits, decide
from agent.domain.job import TERMINAL, Done, State, Verdict
from agent.sandbox.server import Sandbox
from agent.settings import Settings
from agent.trigger.evaluate import Evaluator
from agent.trigger.inbox import Inbox
from agent.trigger.reconcile import Reconciler
from agent.web.application import application
from agent.web.state import Services

LIVE = sorted(set(State) - TERMINAL)


@dataclass(slots=True)
class Triggers:
    """What a test of the trigger side works with."""

    url: str
    database: Database
    watch_list: WatchList
    jobs: Jobs
    reconciliations: Reconciliations
    reconciler: Reconciler
    evaluator: Evaluator

    async def settled(self) -> None:
        """Wait until nothing is due, nobody looks at anything and no job is live."""
        while True:
            async with self.database.connection() as connection:
                busy = await connection.fetchval(
                    "SELECT (SELECT count(*) FROM watched WHERE due_at IS NOT NULL OR lease_until IS NOT NULL)"
                    " + (SELECT count(*) FROM jobs WHERE finished_at IS NULL)"
                )
            if busy == 0:
                return
            await asyncio.sleep(0.02)

    async def walk(self) -> None:
        """Walk the organization once, whether that is due or not, and wait for what comes of it."""
        await self.reconciliations.make_due()
        walk = await self.reconciliations.claim(0, 60)
        assert walk is not None
        await self.reconciler._walk(walk)
        await self.settled()

    async def runs(self) -> dict[str, int]:
        """Return how many jobs each Activity has had."""
        async with self.database.connection() as connection:
            rows = await connection.fetch("SELECT activity_id, count(*) AS jobs FROM jobs GROUP BY activity_id")
        return {row["activity_id"]: row["jobs"] for row in rows}


class Door:
    """Lets nobody in or out: no worker is there."""

    admits = True

    def admit(self, *, admits: bool) -> None:
        self.admits = admits


@asynccontextmanager
async def triggers(sandbox: Sandbox, database: Database, directory: Path, **agent: object) -> AsyncIterator[Triggers]:
    """Open the trigger side against a sandbox; its front door takes webhooks from anybody."""
    environment = sandbox.environment()
    settings = Settings.model_validate(
        {
            "ovation": {
                "api_url": environment["OVATION_API_URL"],
                "token": environment["OVATION_TOKEN"],
                "hosts": [environment["OVATION_HOSTS"]],
            },
            "agent": {"webhook_anonymous": True, "settle_seconds": 0.05, "reconcile_looks": 1000, **agent},
        }
    )
    watch_list, jobs = WatchList(database), Jobs(database)
    reconciliations = Reconciliations(database)
    ender = _Ender(jobs)
    async with Ovation.open(settings.ovation) as ovation:
        evaluator = Evaluator(settings, watch_list, ovation, "tests", on_job=ender.wake.set)
        ender.on_end = evaluator.wake
        services = Services(
            settings=settings,
            database=database,
            watch_list=watch_list,
            jobs=jobs,
            outputs=Outputs(database),
            ovation=ovation,
            data_dir=directory,
            admin_token="admin",
            inbox=Inbox(
                watch_list, settings.agent.settle_seconds, settings.agent.settle_max_seconds, on_hint=evaluator.wake
            ),
            on_job=ender.wake.set,
            on_cancel=lambda _: None,
            work=Work(database, "tests"),
            worker=Door(),
            log_questions=LogQuestions(database, "tests"),
        )
        runner = web.AppRunner(application(services), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/webhooks/ovation"
        reconciler = Reconciler(settings, reconciliations, watch_list, ovation, on_due=evaluator.wake)
        tasks = [asyncio.create_task(evaluator.run()), asyncio.create_task(ender.run())]
        try:
            yield Triggers(url, database, watch_list, jobs, reconciliations, reconciler, evaluator)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await services.inbox.close()
            await runner.cleanup()


class _Ender:
    """Moves every job to its end at once, as a worker would whose steps take no time."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self.wake = asyncio.Event()
        self.on_end: Callable[[], None] = self.wake.set

    async def run(self) -> None:
        while True:
            claims = await self._jobs.claim(LIVE, 100, 60, "ender")
            for claim in claims:
                done = Done(verdict=Verdict.SUCCEEDED) if claim.job.state is State.RUNNING else Done()
                await self._jobs.move(claim, decide(claim.job, done, Limits()))
            if claims:
                self.on_end()
                continue
            self.wake.clear()
            try:
                await asyncio.wait_for(self.wake.wait(), 0.1)
            except TimeoutError:
                continue
