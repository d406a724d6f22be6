"""What is put in the agent's way to the outside while a simulation runs: clocks, chance, HTTP, PostgreSQL, containers.

Everything else of the agent is itself, `agent.app.serve` and its wiring included.
"""

from __future__ import annotations

import datetime as dt
import inspect
import os
import random
import sys
import time as real_time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from unittest import mock

import aiohttp
import structlog
from aiobotocore.session import get_session

from agent import app, parties
from agent.adapters.executor import Executor
from agent.db.database import Database
from agent.settings import AgentSettings, Settings
from agent.web.state import Services
from tests.simulation.agents import Agent, agent_of
from tests.simulation.process import Exited, of_task
from tests.simulation.world import World

_NOT_SHOWN = frozenset({"exc_info", "pid"})


@contextmanager
def installed(world: World) -> Iterator[None]:
    """Let the agent's code see the simulated world, and nothing else."""
    with (
        mock.patch.multiple(app, executor_for=_executor_for, _listen=_listen, alone=_alone),
        mock.patch.multiple(parties, connect=_connect),
        mock.patch.multiple(aiohttp, ClientSession=_session, TCPConnector=_nothing),
        mock.patch.object(os, "_exit", _exit),
        _clocks(world),
        _chance(world.seed),
        _log(world),
    ):
        yield


@asynccontextmanager
async def _connect(settings: AgentSettings, size: int) -> AsyncIterator[Database]:
    del settings, size
    yield agent_of().database()


def _executor_for(settings: Settings, data_dir: Path) -> Executor:
    del settings, data_dir
    return agent_of().executor()


@asynccontextmanager
async def _listen(services: Services, settings: Settings) -> AsyncIterator[str]:
    del settings
    agent = agent_of()
    agent.services = services
    try:
        yield "http://simulated"
    finally:
        agent.services = None
        await services.inbox.close()


@contextmanager
def _alone(data_dir: Path) -> Iterator[None]:
    assert agent_of().data_dir == data_dir
    yield


def _session(**_: Any) -> Any:
    return agent_of().session()


def _exit(code: int) -> NoReturn:
    agent_of().exit(code)
    raise Exited


def _nothing(**_: Any) -> None:
    return None


@contextmanager
def _chance(seed: int) -> Iterator[None]:
    """Let what the agent draws follow from the seed."""
    state = random.getstate()
    ids = random.Random(seed)  # noqa: S311 no secret
    random.seed(seed)

    def next_id() -> uuid.UUID:
        return uuid.UUID(int=ids.getrandbits(128), version=4)

    try:
        with mock.patch.object(uuid, "uuid4", next_id):
            yield
    finally:
        random.setstate(state)


class _Time:
    """The module `time`, with other clocks."""

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        return self._world.now

    def monotonic_ns(self) -> int:
        return int(self._world.now * 1e9)

    def time(self) -> float:
        return self._world.wall

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the simulation has no time.{name}")


def _datetime_of(world: World) -> type[dt.datetime]:
    class _Datetime(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return dt.datetime.fromtimestamp(world.wall, tz)

    return _Datetime


@contextmanager
def _clocks(world: World) -> Iterator[None]:
    """Let every module of the agent read the simulated clocks."""
    time = _Time(world)
    datetime = _datetime_of(world)
    instead: dict[Any, Any] = {real_time.monotonic: time.monotonic, real_time.time: time.time}
    named: list[tuple[object, object]] = [
        (real_time, time),
        (dt.datetime, datetime),
        (get_session, lambda: agent_of().clients()),
    ]
    undo: list[Callable[[], None]] = []
    for module in _modules():
        for name, value in list(vars(module).items()):
            for original, replacement in named:
                if value is original:
                    undo.append(_set(module, name, replacement))
            if inspect.isfunction(value):
                undo += _set_defaults(value, instead)
            elif inspect.isclass(value) and value.__module__ == module.__name__:
                for function in vars(value).values():
                    undo += _set_defaults(function, instead)
    try:
        yield
    finally:
        for each in reversed(undo):
            each()


def _modules() -> list[ModuleType]:
    names = (name for name in sys.modules if name.startswith("agent.") and not name.startswith("agent.sandbox"))
    return [sys.modules[name] for name in sorted(names)]


def _set(owner: Any, name: str, value: object) -> Callable[[], None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def _set_defaults(function: Any, instead: dict[Any, Any]) -> list[Callable[[], None]]:
    """Replace the real clocks where they are a parameter's default."""
    found = getattr(function, "__kwdefaults__", None)
    if not inspect.isfunction(function) or not found:
        return []
    replaced = {name: instead.get(value, value) if callable(value) else value for name, value in found.items()}
    return [_set(function, "__kwdefaults__", replaced)] if replaced != found else []


@contextmanager
def _log(world: World) -> Iterator[None]:
    """Write down what agents log."""

    def take(_: object, level: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        process = of_task()
        name = event.pop("event")
        shown = " ".join(f"{key}={value}" for key, value in sorted(event.items()) if key not in _NOT_SHOWN)
        if event.get("exc_info"):
            shown += f"\n{traceback.format_exc()}"
            world.problem(f"{name}: {shown}")
        if process is not None:
            agent_of(process).lines.append((world.now, process.name, name, dict(event)))
        world.note("?" if process is None else process.name, f"[{level}] {name} {shown}")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, take],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.configure(**before)


__all__ = ["Agent", "installed"]
