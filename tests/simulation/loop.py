"""An event loop whose time is virtual: it passes only when nothing else is left to do, and then at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any, TypeVar

from tests.simulation.process import Process, Turn, current, inherit, process_in

_T = TypeVar("_T")
# 2020-01-01: what the simulated clocks on the wall say when the loop's own says 0.
EPOCH = 1_577_836_800.0
_MOST_WITHOUT_TIME = 200_000


class Stalled(Exception):
    """Nothing that is left could ever happen, or what happens never comes to rest."""


class _Selector(selectors.DefaultSelector):
    """Waits for nothing: no file descriptor ever becomes ready, and waiting for a time is passing it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._without_time = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Let the time pass that the loop would wait."""
        if timeout is None:
            raise Stalled("everything waits for something that nothing will bring about")
        if timeout > 0:
            self._without_time = 0
            self.now += timeout
        else:
            self._without_time += 1
            if self._without_time > _MOST_WITHOUT_TIME:
                raise Stalled(f"at {self.now:.6f} something goes on and on without waiting")
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs the callbacks of simulated processes and of the world around them."""

    def __init__(self, thread_seconds: Callable[[], float]) -> None:
        """Make one; `thread_seconds` says how long a call in another thread takes."""
        self._virtual = _Selector()
        self._thread_seconds = thread_seconds
        super().__init__(self._virtual)
        self.set_task_factory(_make_task)  # type: ignore[arg-type]

    def time(self) -> float:
        """Return the monotonic clock, in seconds."""
        return self._virtual.now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Have something called in the process that the context belongs to, unless that is held or dead by then."""
        context = copy_context() if context is None else context
        process = process_in(context)
        if process is None:
            return super().call_soon(callback, *args, context=context)
        turn = Turn(process, callback, args, context)
        turn.handle = super().call_soon(turn, context=context)
        return turn.handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """The same, later."""
        context = copy_context() if context is None else context
        process = process_in(context)
        if process is None:
            return super().call_at(when, callback, *args, context=context)
        turn = Turn(process, callback, args, context)
        handle = super().call_at(when, turn, context=context)
        turn.handle = handle
        return handle

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., _T], *args: Any
    ) -> asyncio.Future[_T]:
        """Do at once what would be done in a thread, and tell of it a little later."""
        del executor
        future: asyncio.Future[_T] = self.create_future()
        try:
            result = func(*args)
        except Exception as error:  # noqa: BLE001 whatever it is, it is the caller's
            self.call_later(self._thread_seconds(), _fail, future, error)
        else:
            self.call_later(self._thread_seconds(), _succeed, future, result)
        return future

    def add_signal_handler(self, sig: int, callback: Callable[..., object], *args: Any) -> None:  # type: ignore[override]
        """Have something called when the process that asks for it gets a signal."""
        current().signals[sig] = (callback, args)


def _succeed(future: asyncio.Future[_T], result: _T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _make_task(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, _T], context: Context | None = None
) -> asyncio.Task[_T]:
    context = copy_context() if context is None else context
    inherit(context)
    task: asyncio.Task[_T] = asyncio.Task(coroutine, loop=loop, context=context)
    process: Process | None = process_in(context)
    if process is not None:
        process.adopt(task)
    return task
