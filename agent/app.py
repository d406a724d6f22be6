"""The composition root: open everything, run, drain. The only place that wires."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from agent import __version__, logs
from agent.adapters.disk import remove_unfinished
from agent.adapters.node import NodePrograms
from agent.adapters.service_manager import notify, watchdog_seconds
from agent.adapters.slurm import SlurmExecutor
from agent.beats import Beats
from agent.db.log_questions import LogQuestions
from agent.db.node_runs import NodeRuns
from agent.db.reconciliations import Reconciliations
from agent.db.watched import WatchList
from agent.db.work import Work
from agent.errors import ConfigurationError, OvationRefused, OvationUnavailable
from agent.node import orders_for
from agent.parties import (
    alone,
    context_of,
    executor_for,
    let_containers_read,
    made_data_dir,
    open_parties,
    place_of,
    slurm_settings,
    write_private,
)
from agent.pipeline.context import Context
from agent.pipeline.log_answers import answer_questions
from agent.pipeline.node_keeper import NodeKeeper
from agent.pipeline.perform import OBJECT_STORE, OVATION
from agent.pipeline.sweep import sweep
from agent.pipeline.worker import Worker
from agent.settings import Settings
from agent.trigger.evaluate import Evaluator
from agent.trigger.inbox import Inbox, sweep_deliveries
from agent.trigger.reconcile import Reconciler
from agent.web.application import runner as runner_of
from agent.web.state import Services

_LIFE_SECONDS = 10.0
_WALK_SECONDS = 900.0  # an organization's Activities may be very many


@dataclass(frozen=True, slots=True)
class _Agent:
    services: Services
    worker: Worker
    evaluator: Evaluator
    reconciler: Reconciler
    context: Context
    place: str
    nodes: NodeKeeper | None  # sees to what compute nodes do


async def serve(settings: Settings) -> None:
    """Run the service until SIGTERM or SIGINT; containers that run go on and are found again.

    Raises:
        ConfigurationError, DatabaseError, OvationRefused, ExecutorUnavailable: it cannot start; the message says why.
    """
    if not settings.agent.webhooks_are_guarded:
        raise ConfigurationError(
            "webhooks would be taken from anybody: set AGENT_WEBHOOK_USERNAME and AGENT_WEBHOOK_PASSWORD,"
            " or AGENT_WEBHOOK_SECRET, or AGENT_WEBHOOK_ANONYMOUS=true for a trial on one machine"
        )
    if settings.ovation.token is None and settings.ovation.client_id is None:
        raise ConfigurationError(
            "the agent has no account in Ovation: set OVATION_TOKEN, or OVATION_CLIENT_ID and OVATION_CLIENT_SECRET"
        )
    let_containers_read()
    stop = _stop_on_signals()
    async with _open(settings) as agent:
        if await _done_before(stop.asked, _check(agent, settings)):
            async with _listen(agent.services, settings) as address:
                logs.logger().info(
                    "agent_started",
                    address=address,
                    pid=os.getpid(),
                    version=__version__,
                    data_dir=str(settings.agent.data_dir),
                )
                notify("READY=1", f"STATUS=Listening at {address}")
                await _run(agent, settings, stop)
    logs.logger().info("agent_stopped")


@asynccontextmanager
async def _open(settings: Settings) -> AsyncIterator[_Agent]:
    data_dir = made_data_dir(settings)
    admin_token = _admin_token(settings)
    async with AsyncExitStack() as stack:
        stack.enter_context(alone(data_dir))
        remove_unfinished(data_dir)
        parties = await stack.enter_async_context(open_parties(settings))
        database, ovation = parties.database, parties.ovation
        context = context_of(settings, parties, executor_for(settings, data_dir), data_dir)
        place = place_of(data_dir)  # nobody else's: the data directory is locked
        await context.jobs.expire_leases(place)
        beats = Beats()
        worker = Worker(context, place, beat=beats.of("worker"))
        context.metrics.watch(
            bytes_moved=lambda: parties.traffic.moved,
            away={OVATION: lambda: ovation.away, OBJECT_STORE: lambda: parties.store.away},
            loop_ages=beats.ages,
            held=lambda: worker.held,
            disk_free=lambda: shutil.disk_usage(data_dir).free,
        )
        ovation.on_back(partial(worker.party_back, OVATION))
        parties.store.on_back(partial(worker.party_back, OBJECT_STORE))
        watch_list = WatchList(database)
        evaluator = Evaluator(settings, watch_list, ovation, place, on_job=worker.wake, beat=beats.of("evaluator"))
        walks = Reconciliations(database)
        reconciler = Reconciler(
            settings,
            walks,
            watch_list,
            ovation,
            on_due=evaluator.wake,
            holder=place,
            beat=beats.of("reconciler", _WALK_SECONDS),
        )
        services = Services(
            settings=settings,
            database=database,
            watch_list=watch_list,
            jobs=context.jobs,
            outputs=context.outputs,
            ovation=ovation,
            data_dir=data_dir,
            admin_token=admin_token,
            inbox=Inbox(
                watch_list, settings.agent.settle_seconds, settings.agent.settle_max_seconds, on_hint=evaluator.wake
            ),
            on_job=worker.wake,
            on_cancel=worker.cancel,
            work=Work(database, place),
            worker=worker,
            log_questions=LogQuestions(database, place),
            metrics=context.metrics,
            beats=beats,
        )
        nodes = None
        if isinstance(context.executor, SlurmExecutor):
            nodes = NodeKeeper(
                context,
                NodeRuns(database, place),
                NodePrograms(slurm_settings(settings), client=context.executor.client),
                partial(orders_for, settings),
                on_job=worker.wake,
                beat=beats.of("nodes"),
            )
        yield _Agent(services, worker, evaluator, reconciler, context, place, nodes)


async def _check(agent: _Agent, settings: Settings) -> None:
    """Refuse to start with what no waiting can cure; an outage is waited out."""
    runtime = await agent.context.executor.check()
    try:
        account = await agent.services.ovation.check()
    except OvationRefused as error:
        raise OvationRefused(f"{settings.ovation.api_url} does not accept the agent's token: {error}") from None
    except OvationUnavailable:
        return  # the circuit tells of it
    logs.logger().info("ready", runtime=runtime, ovation=account)


async def _done_before(stop: asyncio.Event, work: Coroutine[None, None, None]) -> bool:
    """Do this; give it up and return False when the agent is to stop first."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        working.result()
        return True
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


@asynccontextmanager
async def _listen(services: Services, settings: Settings) -> AsyncIterator[str]:
    host, port = settings.agent.host, settings.agent.port
    runner = runner_of(services)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}; choose another AGENT_PORT"
            ) from None
        port = runner.addresses[0][1]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        write_private(settings.agent.address_file, json.dumps({"address": address, "pid": os.getpid()}))
        yield address
    finally:
        settings.agent.address_file.unlink(missing_ok=True)
        await services.inbox.close()  # while those who wait for it can still be answered
        services.refusals.close()
        await runner.cleanup()


async def _run(agent: _Agent, settings: Settings, stop: _Stop) -> None:
    """Run the loops until one fails or the agent is to stop; then let steps that are under way come to an end."""
    worker = asyncio.create_task(agent.worker.run(), name="worker")
    others = [
        asyncio.create_task(agent.evaluator.run(), name="evaluator"),
        asyncio.create_task(agent.reconciler.run(), name="reconciler"),
        asyncio.create_task(sweep(agent.context, agent.place), name="sweep"),
        asyncio.create_task(sweep_deliveries(agent.services.watch_list), name="sweep of deliveries"),
        asyncio.create_task(_show_life(agent.services.beats), name="sign of life"),
        asyncio.create_task(
            answer_questions(
                agent.services.log_questions, agent.services.data_dir, beat=agent.services.beats.of("log answers")
            ),
            name="answers about logs",
        ),
    ]
    if agent.nodes is not None:
        others.append(asyncio.create_task(agent.nodes.run(), name="nodes"))
    stopping = asyncio.create_task(stop.asked.wait(), name="stop")
    try:
        await asyncio.wait({worker, *others, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for loop in (worker, *others):
            if loop.done():
                loop.result()  # a loop never ends by itself: let its error end the agent, loudly
        for loop in others:
            loop.cancel()
        notify("STOPPING=1", "STATUS=Letting steps come to their end; containers go on")
        await agent.worker.drain(settings.agent.drain_seconds, stop.at_once)
    finally:
        for task in (worker, *others, stopping):
            task.cancel()
        await asyncio.gather(worker, *others, stopping, return_exceptions=True)


async def _show_life(beats: Beats) -> None:
    """Tell systemd's watchdog that every loop comes round, until one does not: then it starts the agent anew."""
    every = watchdog_seconds()
    told = False
    while True:
        stuck = beats.stuck()
        if stuck and not told:
            logs.logger().error("loop_stuck", loops={loop: round(age) for loop, age in stuck.items()})
        told = bool(stuck)
        if not stuck and every is not None:
            notify("WATCHDOG=1")
        await asyncio.sleep(min(every or _LIFE_SECONDS, _LIFE_SECONDS))


@dataclass(frozen=True, slots=True)
class _Stop:
    """What SIGTERM and SIGINT have asked for: to stop; asked twice, at once."""

    asked: asyncio.Event
    at_once: asyncio.Event


def _stop_on_signals() -> _Stop:
    stop = _Stop(asyncio.Event(), asyncio.Event())
    loop = asyncio.get_running_loop()

    def asked(number: int) -> None:
        if stop.at_once.is_set():
            os._exit(128 + number)  # asked three times: leases run out by themselves
        if stop.asked.is_set():
            stop.at_once.set()
        stop.asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked, number)
    return stop


def _admin_token(settings: Settings) -> str:
    if settings.agent.admin_token is not None:
        return settings.agent.admin_token.get_secret_value()
    path = settings.agent.admin_token_file
    try:
        token = path.read_text().strip()
    except FileNotFoundError:
        token = secrets.token_urlsafe(32)
        write_private(path, token)
    logs.hide([token])
    return token
