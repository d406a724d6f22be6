"""Agents in the simulation: each the real `serve`, in a simulated process, with its own data directory."""

from __future__ import annotations

import asyncio
import signal
import traceback
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from agent import app
from agent.db.database import Database
from agent.errors import AgentError
from agent.settings import AgentSettings, OvationSettings, Settings
from agent.web.state import Services
from tests.simulation.database import Pool, Server
from tests.simulation.machine import Machine, SimulatedExecutor
from tests.simulation.ovation import API, SimulatedOvation
from tests.simulation.process import Process, current
from tests.simulation.session import SILENCE_SECONDS, Reply, Request, Session
from tests.simulation.store import Clients, Store
from tests.simulation.wire import Wire
from tests.simulation.world import Party, World

_AGENTS: weakref.WeakKeyDictionary[Process, Agent] = weakref.WeakKeyDictionary()
_RESTART_SECONDS = 3.0  # what a service manager waits before it starts again what has failed


class Agent:
    """One data directory on one machine, and the process that serves it, if one does."""

    def __init__(
        self,
        world: World,
        name: str,
        machine: Machine,
        server: Server,
        ovation: SimulatedOvation,
        store: Store,
        settings: Mapping[str, Any],
    ) -> None:
        self.name = name
        self.machine = machine
        self.data_dir = world.root / name
        self.services: Services | None = None
        self.lines: list[tuple[float, str, str, dict[str, Any]]] = []  # (when, process, event, values)
        self.holds = 0
        self.processes: list[Process] = []
        self.on_start: Callable[[Process], None] = lambda _: None
        self._world = world
        self._server = server
        self._ovation = ovation
        self._store = store
        self._settings = Settings(
            ovation=OvationSettings(api_url=API, token="the-token"),
            agent=AgentSettings(data_dir=self.data_dir, webhook_anonymous=True, **settings),
        )
        self._stays_down = False
        self._restart: asyncio.TimerHandle | None = None

    @property
    def process(self) -> Process | None:
        """The process that serves now, held or not."""
        last = self.processes[-1] if self.processes else None
        return None if last is None or last.is_dead else last

    @property
    def answers(self) -> bool:
        """Whether HTTP requests are answered."""
        return self.services is not None and self.process is not None and not self.process.is_held

    def start(self) -> None:
        """Start a process, unless there is one."""
        if self._restart is not None:
            self._restart.cancel()
        if self.process is not None or self._stays_down:
            return
        process = Process(f"{self.name}.{len(self.processes) + 1}")
        self.processes.append(process)
        _AGENTS[process] = self
        self._world.note(process.name, "starts")
        self.on_start(process)
        task = process.spawn(app.serve(self._settings), "serve")
        task.add_done_callback(lambda done: self._ended(process, done), context=self._world.context)

    def start_later(self, seconds: float) -> None:
        """Start a process in so many seconds."""
        if self._restart is not None:
            self._restart.cancel()
        self._restart = self._world.later(seconds, self.start)

    def kill(self, seconds: float) -> None:
        """End the process where it is, and start another after so many seconds."""
        if self.process is None:
            return
        self._world.note(self.process.name, f"is killed, for {seconds:.1f} s")
        self.process.kill()
        self.services = None
        self.start_later(seconds)

    def hold(self, seconds: float) -> None:
        """Stop the process where it is, for so many seconds."""
        process = self.process
        if process is None or process.is_held:
            return
        self._world.note(process.name, f"is held, for {seconds:.1f} s")
        process.hold()
        self.holds += 1
        self._world.later(seconds, self._resume, process)

    def resume(self) -> None:
        """Let a held process go on."""
        if self.process is not None:
            self._resume(self.process)

    def stay_down(self) -> None:
        """Start no process again."""
        if self._restart is not None:
            self._restart.cancel()
        self._stays_down = True

    def place(self) -> str:
        """Return what names the data directory in the database."""
        file = self.data_dir / "place"
        return file.read_text().strip() if file.exists() else ""

    def terminate(self) -> None:
        """Send SIGTERM."""
        if self.process is not None and not self.process.is_held:
            self._world.note(self.process.name, "gets SIGTERM")
            self.process.signal(signal.SIGTERM)

    def exit(self, code: int) -> None:
        """End at once, by its own will."""
        assert self.process is not None
        self._world.note(self.process.name, f"exits with {code}")
        self.process.kill()
        self.services = None
        self.start_later(_RESTART_SECONDS)

    def database(self) -> Database:
        """Return the database as this agent reaches it."""
        pool: Any = Pool(self._world, self._server, current())
        return Database(pool, "the simulated database", 10)

    def executor(self) -> SimulatedExecutor:
        """Return the machine as this agent reaches it."""
        return SimulatedExecutor(self._world, self.machine, current())

    def clients(self) -> Clients:
        """Return the object store as this agent uploads to it."""
        return Clients(self._store, self._wire(Party.STORE))

    def session(self) -> Session:
        """Return HTTP as this agent speaks it."""
        to_ovation, to_store = self._wire(Party.OVATION), self._wire(Party.STORE)

        def route(request: Request) -> tuple[Wire, Callable[[Request], Reply]]:
            if f"{request.url.origin()}" == API:
                return to_ovation, self._ovation.serve
            return to_store, self._store.serve

        return Session(route)

    def _wire(self, party: Party) -> Wire:
        return Wire(self._world, current(), party, SILENCE_SECONDS)

    def _resume(self, process: Process) -> None:
        if process.is_held and not process.is_dead:
            self._world.note(process.name, "goes on")
            process.resume()

    def _ended(self, process: Process, task: asyncio.Task[None]) -> None:
        if process.is_dead:
            return
        error = None if task.cancelled() else task.exception()
        process.kill()
        self.services = None
        self._world.note(process.name, f"has ended{f': {error!r}' if error else ''}")
        if error is not None and not isinstance(error, AgentError):
            trace = "".join(traceback.format_exception(error))
            self._world.problem(f"{process.name} ended with a bug\n{trace}")
        self.start_later(_RESTART_SECONDS)


def agent_of(process: Process | None = None) -> Agent:
    """Return the agent whose process this is, by default the one whose code this is."""
    return _AGENTS[process or current()]
