"""A server that answers with the very bytes that a test gives it, however wrong they are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Self

Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes = b"", status: int = 200, **headers: str) -> bytes:
    """Return an answer on the wire; `content_length=""` leaves the length out, so that the end of line says it."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    given.setdefault("content-length", str(len(body)))
    lines = [f"{name}: {value}" for name, value in given.items() if value]
    return "\r\n".join([f"HTTP/1.1 {status} As Asked", *lines, "connection: close", "", ""]).encode() + body


def json_answer(value: Any, status: int = 200, **headers: str) -> bytes:
    """Return a JSON answer on the wire."""
    return answer(json.dumps(value).encode(), status, content_type="application/json", **headers)


class RawServer:
    """Gives one answer to each request, the last one again and again, and keeps what it heard."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.heard: list[str] = []
        self.url = ""
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = next((line[15:] for line in head.lower().split("\r\n") if line.startswith("content-length:")), "0")
            if "expect: 100-continue" in head.lower():
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.readexactly(int(length))
            self.heard.append(head + body.decode("latin-1"))
            given = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if isinstance(given, bytes):
                writer.write(given)
                await writer.drain()
            else:
                await given(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the other side had enough
        finally:
            self._tasks.discard(task)
            writer.close()
