"""A simulated operating system process: a set of tasks of one event loop that can be held or ended as one.

Whatever a process does, it does in a callback of the loop, and the loop asks the process first. One that was killed
runs no further line of code, not even a `finally`. One that is stopped (SIGSTOP) goes on where it was once it is
continued, with its timers overdue.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, Protocol

_OF: ContextVar[Process | None] = ContextVar("process", default=None)
_OWNERS: weakref.WeakKeyDictionary[asyncio.Task[Any], Process] = weakref.WeakKeyDictionary()
_MOST_BURIALS = 50


def process_in(context: Context) -> Process | None:
    """Return whose code runs in a context; None for the world's."""
    return context.get(_OF)


def inherit(context: Context) -> None:
    """Let what runs in a fresh context be the code of the process that made it."""
    process = _OF.get()
    if process is not None and context.get(_OF) is None:
        context.run(_OF.set, process)


def of_task() -> Process | None:
    """Return whose task runs now, whatever context it runs a function in."""
    task = asyncio.current_task()
    return None if task is None else _OWNERS.get(task)


def current() -> Process:
    """Return the process whose code this is."""
    process = _OF.get()
    if process is None:
        raise RuntimeError("only a simulated process does this")
    return process


class Exited(BaseException):
    """What ends a callback of a process that has just ended itself."""


class Flight(Protocol):
    """A request that is on its way to a party."""

    def let_go(self) -> None:
        """Nobody waits for the answer any more; the request itself may still arrive."""


class Process:
    """One start of one agent."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.flights: dict[Flight, None] = {}  # a set that keeps its order
        self._tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self._graveyard: list[asyncio.Task[Any]] = []
        self._held: list[Turn] = []
        self.is_held = False
        self.is_dead = False
        self.is_buried = False
        self.signals: dict[int, tuple[Callable[..., object], tuple[object, ...]]] = {}
        self.on_arrival: Callable[[str], None] = lambda _: None

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run a coroutine as this process's code."""
        context = copy_context()
        context.run(_OF.set, self)
        return asyncio.get_running_loop().create_task(coroutine, name=name, context=context)

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Count a task as this process's."""
        self._tasks.add(task)
        _OWNERS[task] = self

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Have a function called as this process's code."""
        context = copy_context()
        context.run(_OF.set, self)
        asyncio.get_running_loop().call_soon(function, *arguments, context=context)

    def signal(self, number: int) -> None:
        """Send it a signal; one that it does not handle ends it."""
        if number in self.signals:
            handler, arguments = self.signals[number]
            self.call(handler, *arguments)
        else:
            self.kill()

    def hold(self) -> None:
        """Stop it where it is: SIGSTOP."""
        self.is_held = True

    def resume(self) -> None:
        """Let it go on: SIGCONT."""
        self.is_held = False
        held, self._held = self._held, []
        for turn in held:
            turn.again()

    def kill(self) -> None:
        """End it at once: SIGKILL. What it has sent may arrive or not."""
        self.is_dead = True
        self._graveyard = list(self._tasks)  # unwound by the garbage collector they would still close and remove things
        for flight in list(self.flights):
            flight.let_go()

    async def bury(self) -> None:
        """Unwind what is left of it, once that can do no harm: its parties answer nothing any more."""
        self.is_dead = self.is_held = False
        self.is_buried = True
        self.resume()
        for _ in range(_MOST_BURIALS):
            left = [task for task in {*self._tasks, *self._graveyard} if not task.done()]
            if not left:
                break
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=1.0)
        self._graveyard = []

    def takes(self, turn: Turn) -> bool:
        """Say whether a callback may run now; one that may not is kept, for later or for the burial."""
        if self.is_dead or self.is_held:
            self._held.append(turn)
            return False
        return True


class Turn:
    """One callback of a process's code."""

    __slots__ = ("arguments", "callback", "context", "handle", "process")

    def __init__(
        self, process: Process, callback: Callable[..., object], arguments: tuple[Any, ...], context: Context
    ) -> None:
        self.process = process
        self.callback = callback
        self.arguments = arguments
        self.context = context
        self.handle: asyncio.Handle | None = None

    def __call__(self) -> None:
        if self.handle is not None and self.handle.cancelled():
            return  # it was held, and what came before it has cancelled it since
        if self.process.takes(self):
            with contextlib.suppress(Exited):
                self.callback(*self.arguments)

    def again(self) -> None:
        """Have it called now."""
        asyncio.get_running_loop().call_soon(_Repeated(self), context=self.context)


class _Repeated:
    """Calls a held turn, without another gate around it; whoever knows its handle can still cancel it."""

    __slots__ = ("turn",)

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def __call__(self) -> None:
        self.turn()
