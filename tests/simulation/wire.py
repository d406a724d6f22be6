"""Requests on their way from a process to a party and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from tests.simulation.process import Process
from tests.simulation.world import Fate, Party, World

_T = TypeVar("_T")


class Broken(Exception):
    """A request that was not answered; `fate` says why."""

    def __init__(self, fate: Fate) -> None:
        super().__init__(str(fate))
        self.fate = fate


class Wire:
    """From one process to one party."""

    def __init__(self, world: World, process: Process, party: Party, silence_seconds: float) -> None:
        """Lay it; after `silence_seconds` without an answer a request counts as lost."""
        self.world = world
        self.process = process
        self.party = party
        self.silence_seconds = silence_seconds

    async def ask(self, what: str, serve: Callable[[], _T]) -> _T:
        """Have something done at the party, and return what it answers.

        Once sent, a request arrives or not, whatever becomes of whoever waits for the answer.

        Raises:
            Broken: there is no answer.
        """
        if self.process.is_buried:
            raise Broken(Fate.REFUSED)
        flight = _Flight(self, what, serve)
        self.process.flights[flight] = None
        try:
            return await flight.answer
        except asyncio.CancelledError:
            flight.let_go()
            raise
        finally:
            self.process.flights.pop(flight, None)


class _Flight(Generic[_T]):
    def __init__(self, wire: Wire, what: str, serve: Callable[[], _T]) -> None:
        self._wire = wire
        self._world = wire.world
        self._what = f"{wire.process.name} {wire.party} {what}"
        self._serve = serve
        self._is_over = False
        self.answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._world.later(self._world.latency(wire.party, self._what), self._arrive)

    def let_go(self) -> None:
        """Nobody waits any more: what was sent arrives now or never."""
        if not self._is_over and self._world.chance.happens(0.5, f"let go {self._what}"):
            self._arrive()
        self._is_over = True

    def _arrive(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        world, wire = self._world, self._wire
        was_alive = not wire.process.is_dead
        wire.process.on_arrival(self._what)
        if was_alive and wire.process.is_dead:
            return  # it died of what it was about to do
        fate = world.fate(wire.party, self._what)
        back = world.latency(wire.party, self._what)
        if fate is not Fate.SERVED:
            world.note(wire.process.name, f"{wire.party} {fate}: {self._what.partition(' ')[2].partition(' ')[2]}")
        result: Any = None
        error: Exception | None = None
        if fate.is_done:
            try:
                result = self._serve()
            except Exception as raised:  # noqa: BLE001 it is the answer
                error = raised
        wire.process.on_arrival(f"after {self._what}")
        if fate is Fate.SERVED:
            world.later(back, self._deliver, result, error)
        else:
            silent = fate in {Fate.SILENT_BEFORE, Fate.SILENT_AFTER}
            world.later(wire.silence_seconds if silent else back, self._deliver, None, Broken(fate))

    def _deliver(self, result: Any, error: Exception | None) -> None:
        if self.answer.done():
            return
        if error is None:
            self.answer.set_result(result)
        else:
            self.answer.set_exception(error)


__all__ = ["Broken", "Process", "Wire"]
