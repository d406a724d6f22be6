"""A sender of webhooks that costs little itself: requests made beforehand, answers read no further than needed."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from tests.agents import WEBHOOK_KEY

ACTIVITIES = 1000
_BODY_BYTES = 1024
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


@dataclass(slots=True)
class Load:
    """What came of it. Latencies in seconds, from the moment at which a request was to be sent."""

    answers: int
    refused: int
    seconds: float
    median: float
    p99: float
    longest: float
    lag: float = 0.0  # p99 of how late the sender itself woke up: what the machine adds


class _Connection(asyncio.Protocol):
    """One connection with at most one request under way."""

    def __init__(self, on_answer: Callable[[_Connection, bool], None]) -> None:
        self._on_answer = on_answer
        self._received = b""
        self.transport: asyncio.Transport | None = None
        self.intended = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def send(self, request: bytes, intended: float) -> None:
        assert self.transport is not None
        self.intended = intended
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(self._received, 0, end)
        assert length is not None, self._received
        if len(self._received) < end + 4 + int(length[1]):
            return
        accepted = self._received.startswith(b"HTTP/1.1 202 ")
        self._received = b""
        self._on_answer(self, accepted)

    def connection_lost(self, _: Exception | None) -> None:
        self.transport = None


class _Sender:
    """Counts answers, and sends the next request on each connection as soon as there is one to send."""

    def __init__(self, next_intended: Callable[[], float | None]) -> None:
        self._next_intended = next_intended
        self._requests = requests()
        self._sent = 0
        self.idle: deque[_Connection] = deque()
        self.latencies: list[float] = []
        self.refused = 0

    def answered(self, connection: _Connection, accepted: bool) -> None:
        self.latencies.append(time.perf_counter() - connection.intended)
        self.refused += not accepted
        self.idle.append(connection)
        self.send()

    def send(self) -> None:
        while self.idle and (intended := self._next_intended()) is not None:
            self.idle.popleft().send(self._requests[self._sent % ACTIVITIES], intended)
            self._sent += 1

    async def connect(self, address: str, connections: int) -> None:
        url = urlsplit(address)
        assert url.hostname is not None
        assert url.port is not None
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            _, connection = await loop.create_connection(lambda: _Connection(self.answered), url.hostname, url.port)
            self.idle.append(connection)

    def result(self, seconds: float) -> Load:
        ordered = sorted(self.latencies)
        median, p99 = (ordered[int(len(ordered) * share)] for share in (0.5, 0.99))
        return Load(len(ordered), self.refused, seconds, median, p99, ordered[-1])


def requests() -> list[bytes]:
    """Return a webhook of 1 KiB for each of 1,000 Activities, as the research service sends it."""
    key = base64.b64encode(f"{WEBHOOK_KEY}:{WEBHOOK_KEY}".encode()).decode()
    made = []
    for number in range(ACTIVITIES):
        document = {
            "rel": "inputs",
            "inverse_rel": "activities",
            "owner_id": "person",
            "entity_id": f"{number:08}-502b-40ed-95eb-4e4f3fc0ab40",
            "target_id": f"{number:08}-502b-40ed-95eb-4e4f3fc0ab41",
            "attributes": {"note": ""},
        }
        document["attributes"] = {"note": "x" * (_BODY_BYTES - len(json.dumps(document)))}
        body = json.dumps(document)
        head = (
            "POST /webhooks/ovation/0 HTTP/1.1\r\nHost: agent\r\nContent-Type: application/json\r\n"
            f"Authorization: Basic {key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        made.append((head + body).encode())
    return made


async def saturate(address: str, seconds: float, connections: int) -> Load:
    """Send as fast as answers come, on this many connections."""
    end = time.perf_counter() + seconds

    def now() -> float | None:
        at = time.perf_counter()
        return at if at < end else None

    sender = _Sender(now)
    await sender.connect(address, connections)
    began = time.perf_counter()
    sender.send()
    await _drained(sender, connections, end)
    return sender.result(time.perf_counter() - began)


async def steady(address: str, seconds: float, rate: float, connections: int) -> Load:
    """Send this many a second, whether answers come or not: a late answer delays nobody's clock."""
    began = time.perf_counter() + 0.1
    number = 0

    def due() -> float | None:
        nonlocal number
        intended = began + number / rate
        if number >= seconds * rate or intended > time.perf_counter():
            return None
        number += 1
        return intended

    sender = _Sender(due)
    await sender.connect(address, connections)
    lags = []
    while number < seconds * rate:
        sender.send()
        wake = max(began + number / rate, time.perf_counter())
        await asyncio.sleep(wake - time.perf_counter())
        lags.append(time.perf_counter() - wake)
    await _drained(sender, connections, began + seconds)
    found = sender.result(time.perf_counter() - began)
    found.lag = sorted(lags)[int(len(lags) * 0.99)]
    return found


async def _drained(sender: _Sender, connections: int, end: float) -> None:
    while time.perf_counter() < end or len(sender.idle) < connections:
        assert time.perf_counter() < end + 30, "answers are missing"
        await asyncio.sleep(0.01)


def main() -> None:
    """Run one load as `tests.bench.ingress` asks for it, and print what came of it as JSON."""
    kind, address, seconds, rate, connections = sys.argv[1:]
    if kind == "saturate":
        load = saturate(address, float(seconds), int(connections))
    else:
        load = steady(address, float(seconds), float(rate), int(connections))
    sys.stdout.write(json.dumps(asdict(asyncio.run(load))))


if __name__ == "__main__":
    main()
