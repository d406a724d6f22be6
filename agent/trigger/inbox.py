"""Where webhooks are committed: one writer takes everything that waits, writes it at once, and then answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence

from agent.db.watched import WatchList
from agent.domain.delivery import Delivery, Receipt
from agent.errors import DatabaseError
from agent.logs import logger

# Ovation's senders wait ten seconds for an answer; a clear 503 has them send again.
_ANSWER_SECONDS = 7.0
# Together they stay below the time that the web server gives its handlers when it stops.
_DRAIN_SECONDS = 1.5
_MOST_WAITING = 2000
_MOST_AT_ONCE = 500
_WAKE_SECONDS = 1.0
_SWEEP_SECONDS = 3600.0


class Inbox:
    """Commits deliveries in groups. An idle one has no task of its own, and writes what comes at once."""

    def __init__(
        self, watch_list: WatchList, settle_seconds: float, longest_seconds: float, on_hint: Callable[[], None]
    ) -> None:
        self._watch_list = watch_list
        self._settle_seconds = settle_seconds
        self._longest_seconds = longest_seconds
        self._on_hint = on_hint
        self._waiting: deque[_Sender] = deque()
        self._writing: Sequence[_Sender] = ()
        self._writer: asyncio.Task[None] | None = None
        self._waking: asyncio.TimerHandle | None = None
        self._stopping = False

    async def store(self, delivery: Delivery) -> Receipt:
        """Return once the delivery is committed, or at once when there is no room for it.

        Raises:
            DatabaseError: PostgreSQL is away, or does not answer while the sender still waits.
        """
        if self._stopping:
            return Receipt.STOPPING
        if len(self._waiting) >= _MOST_WAITING:
            return Receipt.FULL
        sender = _Sender(delivery)
        self._waiting.append(sender)
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all(), name="inbox")
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await sender.answer
        except TimeoutError:
            raise DatabaseError("PostgreSQL does not answer in time for the webhook's sender") from None

    async def close(self) -> None:
        """Take nothing more, write what waits, and have the rest sent again."""
        self._stopping = True
        if self._waking is not None:
            self._waking.cancel()
        if self._writer is None:
            return
        await asyncio.wait({self._writer}, timeout=_DRAIN_SECONDS)
        for sender in (*self._writing, *self._waiting):
            sender.tell(Receipt.STOPPING)
        if self._writer is not None:
            self._writer.cancel()

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                taken = [self._waiting.popleft() for _ in range(min(_MOST_AT_ONCE, len(self._waiting)))]
                # Whoever has given up sends again: writing it now would be for nothing.
                self._writing = [sender for sender in taken if not sender.answer.done()]
                if self._writing:
                    await self._write(self._writing)
        finally:
            self._writing = ()
            self._writer = None

    async def _write(self, senders: Sequence[_Sender]) -> None:
        """Commit these deliveries and answer; one that cannot be written is found by halves and fails alone."""
        try:
            receipts = await self._take([sender.delivery for sender in senders])
        except DatabaseError as error:
            for sender in senders:
                sender.fail(DatabaseError(str(error)))
        except Exception as error:  # noqa: BLE001 a bug is its own sender's alone, and loud where that one is answered
            if len(senders) == 1:
                senders[0].fail(error)
                return
            half = len(senders) // 2
            await self._write(senders[:half])
            await self._write(senders[half:])
        else:
            for sender, receipt in zip(senders, receipts, strict=True):
                sender.tell(receipt)
            if Receipt.STORED in receipts:
                self._wake_soon()

    async def _take(self, deliveries: Sequence[Delivery]) -> list[Receipt]:
        """Commit deliveries in one statement.

        Its task is left to end by itself: a database that hangs also hangs whoever waits for the statement's
        cancellation.
        """
        taking = asyncio.create_task(self._watch_list.take(deliveries, self._settle_seconds, self._longest_seconds))
        try:
            await asyncio.wait({taking}, timeout=_ANSWER_SECONDS)
        finally:
            if not taking.done():
                taking.add_done_callback(_end_quietly)
                taking.cancel()
        if not taking.done():
            raise DatabaseError("PostgreSQL does not answer in time for the webhooks' senders")
        return taking.result()

    def _wake_soon(self) -> None:
        """Tell of new hints once a while, not once a group: nothing is due before the quiet time is over."""
        if self._waking is None and not self._stopping:
            seconds = min(self._settle_seconds, self._longest_seconds, _WAKE_SECONDS)
            self._waking = asyncio.get_running_loop().call_later(seconds, self._wake)

    def _wake(self) -> None:
        self._waking = None
        self._on_hint()


async def sweep_deliveries(watch_list: WatchList) -> None:
    """Remove old deliveries, now and every hour, until cancelled."""
    while True:
        with contextlib.suppress(DatabaseError):  # the worker tells of it, once
            await watch_list.sweep()
        await asyncio.sleep(_SWEEP_SECONDS)


class _Sender:
    """A delivery, and the answer that its sender waits for."""

    __slots__ = ("answer", "delivery")

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self.answer: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()

    def tell(self, receipt: Receipt) -> None:
        if not self.answer.done():
            self.answer.set_result(receipt)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


def _end_quietly(taking: asyncio.Task[list[Receipt]]) -> None:
    if not taking.cancelled() and (error := taking.exception()):
        logger().debug("webhook_given_up", error=type(error).__name__)
