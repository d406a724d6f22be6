"""One schedule: what happens in a simulation, drawn from its seed, and its course from the first start to the check.

Each seed switches only some kinds of trouble on, so that each kind also meets a world that is otherwise sound.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from agent.adapters import upload
from tests.simulation import check
from tests.simulation.agents import Agent
from tests.simulation.chance import Chance
from tests.simulation.check import Scene
from tests.simulation.database import Server
from tests.simulation.loop import Stalled, VirtualLoop
from tests.simulation.machine import Machine
from tests.simulation.ovation import SimulatedOvation
from tests.simulation.patches import installed
from tests.simulation.people import People, Post
from tests.simulation.process import Process
from tests.simulation.store import Store
from tests.simulation.trouble import Trouble
from tests.simulation.world import World

PROMISED_SECONDS = 60.0
_CHECK_SECONDS = 1.0
_WALK_SECONDS = 120.0  # for so long nobody walks where an agent died on its way
_SLICE_SECONDS = 5
_MOST_PROBLEMS = 5  # what is as broken as that need not go on
_GIVE_UP_SECONDS = 3600.0


@dataclass(slots=True)
class Result:
    """What became of a schedule."""

    seed: int
    broken: list[str]
    log: list[str]
    digest: str
    seconds: float  # simulated
    recovery_seconds: float  # of them, after all was calm and while no container ran
    statements: int
    jobs: int
    troubles: list[str] = field(default_factory=list)

    def report(self, most_lines: int = 150) -> str:
        """Return what a person needs to know of a broken schedule."""
        broken = "\n  ".join(self.broken)
        log = "\n".join(self.log[-most_lines:])
        return (
            f"{log}\n\nseed {self.seed} breaks the promise ({', '.join(self.troubles)}):\n  {broken}\n"
            f"Replay it with: SIM_SEED={self.seed} pytest tests/simulation"
        )


def simulate(seed: int, server: Server, directory: Path) -> Result:
    """Run the schedule of a seed and check the promise at its end."""
    chance = Chance(seed)
    loop = VirtualLoop(lambda: chance.between(0.0001, 0.002, "thread"))
    before = server.statements
    try:
        with tempfile.TemporaryDirectory(prefix=f"{seed}-", dir=directory) as root:
            world = World(seed, chance, loop, Path(root))
            server.clear(world.wall)
            schedule = Schedule(world, server)
            with installed(world), _small_parts():
                try:
                    loop.run_until_complete(schedule.run())
                except Stalled as stalled:
                    world.problem(str(stalled))
                    schedule.broken.append(str(stalled))
                loop.run_until_complete(schedule.clear_away())
            return Result(
                seed=seed,
                broken=schedule.broken,
                log=world.log,
                digest=world.digest(),
                seconds=schedule.ended_at,
                recovery_seconds=schedule.recovery_seconds,
                statements=server.statements - before,
                jobs=len(schedule.scene.jobs()),
                troubles=schedule.trouble.kinds,
            )
    finally:
        loop.close()


@contextmanager
def _small_parts() -> Iterator[None]:
    """Let small files be sent in parts, as large ones are."""
    with mock.patch.multiple(upload, _SINGLE_MAX_BYTES=200, _PART_MIN_BYTES=100):
        yield


class Schedule:
    """A world with agents, people and trouble."""

    def __init__(self, world: World, server: Server) -> None:
        self.world = world
        self.broken: list[str] = []
        self.recovery_seconds = 0.0
        self.ended_at = 0.0
        chance = world.chance
        self._store = Store(world)
        self._ovation = SimulatedOvation(world, self._store)
        self._ovation.links_change_time = chance.happens(0.5, "links change times")
        self._settings = _settings(chance)
        agents = self._agents(server)
        post = Post()
        self.people = People(world, self._ovation, agents, post)
        self.trouble = Trouble(world, agents, self.people, self._store, post)
        self.scene = Scene(world, server, self._ovation, self._store, agents, self.people)

    def _agents(self, server: Server) -> list[Agent]:
        chance = self.world.chance
        count = chance.one_of((1, 1, 1, 2, 2, 3), "agents")
        together = chance.happens(0.3, "agents on one machine")
        machines = [Machine(self.world, f"m{number + 1}") for number in range(1 if together else count)]
        return [
            Agent(
                self.world,
                f"agent{number + 1}",
                machines[number % len(machines)],
                server,
                self._ovation,
                self._store,
                self._settings,
            )
            for number in range(count)
        ]

    async def run(self) -> None:
        """Let it all happen, then be calm, and check."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._complain)
        world = self.world
        for number, agent in enumerate(self.scene.agents):
            agent.start_later(world.chance.between(0, 2, f"start {number}"))
        self._plan_people()
        self.trouble.plan()
        for second in range(0, int(self.trouble.until), _SLICE_SECONDS):
            if len(world.problems) >= _MOST_PROBLEMS:
                break
            await asyncio.sleep(min(_SLICE_SECONDS, self.trouble.until - second))
        self.trouble.end()
        world.note("world", "all is calm")
        allowed = PROMISED_SECONDS
        if self.people.lost_webhooks:
            allowed += 2 * self._settings["reconcile_seconds"] + self._settings["settle_seconds"] + _WALK_SECONDS
        left = await self._come_to_rest(allowed)
        self.ended_at = world.now
        if left:
            late = "; ".join(left)
            self.broken.append(f"{self.recovery_seconds:.0f} s after all was calm there is still to do: {late}")
        self.broken += check.violations(self.scene)
        for line in check.story(self.scene):
            world.note("job", line)

    def _plan_people(self) -> None:
        world, chance, people = self.world, self.world.chance, self.people
        for number in range(chance.count(1, 3, "activities")):
            what = f"activity {number + 1}"
            at = chance.between(0.5, self.trouble.until / 2, what)
            inputs = chance.count(1, 3, what)
            uploading = chance.happens(0.2, what)
            world.later(
                at, lambda inputs=inputs, uploading=uploading: people.make_activity(inputs, uploading=uploading)
            )

    async def _come_to_rest(self, allowed: float) -> list[str]:
        """Wait until nothing is to be done; return what still is when it took too long."""
        world = self.world
        give_up = world.now + _GIVE_UP_SECONDS
        while (left := check.unfinished(self.scene)) or check.walks(self.scene) or self.people.uploads:
            if self.recovery_seconds > allowed or world.now > give_up or len(world.problems) >= _MOST_PROBLEMS:
                return left
            running = any(agent.machine.running() for agent in self.scene.agents)
            await asyncio.sleep(_CHECK_SECONDS)
            if left and not running:
                self.recovery_seconds += _CHECK_SECONDS
        return []

    async def clear_away(self) -> None:
        """Unwind every process that there was."""
        processes: list[Process] = [process for agent in self.scene.agents for process in agent.processes]
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        for agent in self.scene.agents:
            agent.stay_down()
        for process in processes:
            await process.bury()
        gc.collect(0)

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        del loop
        error = context.get("exception")
        self.world.problem(f"{context['message']}: {error!r}")


def _settings(chance: Chance) -> dict[str, Any]:
    """Return how the agents are set up."""
    return {
        "settle_seconds": round(chance.between(0.5, 10, "settle"), 1),
        "settle_max_seconds": 30,
        "reconcile_seconds": round(chance.between(20, 60, "reconcile"), 1) if chance.happens(0.5, "walks") else 300.0,
        "max_staging": chance.count(1, 4, "max_staging"),
        "max_running": chance.count(1, 3, "max_running"),
        "max_collecting": chance.count(1, 4, "max_collecting"),
        "time_limit_seconds": 60,
        "drain_seconds": round(chance.between(0, 30, "drain")),
        "keep_seconds": 0,
        "keep_failed_seconds": 0,
    }
