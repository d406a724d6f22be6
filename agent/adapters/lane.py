"""One blocking connection, which carries large bodies.

asyncio moves a body through the interpreter in small pieces, all on one core. A thread with a blocking socket moves a
megabyte at a time, lets go of the interpreter meanwhile, and has TLS done beside the others. So asyncio decides what is
sent and fetched and when, and a lane does it: one request, from its first byte to its last.
"""

from __future__ import annotations

import http.client
import os
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from yarl import URL

PIECE_BYTES = 1 << 20
CONNECT_SECONDS = 20.0
# No byte for so long: cut; a slow link is not a stall. Half a minute, so that what hung in a store is fetched again
# within a minute of its coming back to life.
STALL_SECONDS = 30.0
KEPT_SECONDS = 15.0
"""How long an idle connection is kept: S3 closes it after some 20 s, and it is less than STALL_SECONDS, so that after
one call that met a dead connection the next ones do not meet the other dead ones."""
_PAUSE_SECONDS = 0.25  # a pause is made of these, so that it can be cut
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Broken(Exception):
    """The connection could not be made, broke off, or hung; the message says which."""


class Cut(Exception):
    """Nobody waits any more for what a lane does."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of an open file, in bytes."""

    descriptor: int
    offset: int
    length: int


class Lane:
    """One connection to an origin. Its methods are called by one thread at a time; `cut` by any."""

    def __init__(
        self, origin: URL, context: ssl.SSLContext | None, connect_seconds: float, stall_seconds: float
    ) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self.buffer = memoryview(bytearray(PIECE_BYTES))
        self._context = context
        self._connect_seconds = connect_seconds
        self._stall_seconds = stall_seconds
        self._is_cut = False
        self._socket: socket.socket | None = None
        self._connection: http.client.HTTPConnection | None = None
        self._response: http.client.HTTPResponse | None = None

    def cut(self) -> None:
        """End what is under way: the thread that is at it is told at once."""
        self._is_cut = True
        connected = self._socket
        if connected is not None:
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give up the connection."""
        if self._response is not None:
            self._response.close()
        if self._connection is not None:
            self._connection.close()
        if self._socket is not None:
            self._socket.close()
        self._response = self._connection = self._socket = None

    @property
    def is_free(self) -> bool:
        """Whether another request may be sent: the last answer was read to its end, and the server keeps the line."""
        if self._is_cut or self._connection is None or self._connection.sock is None:
            return False
        return self._response is None or self._response.isclosed()

    def check(self) -> None:
        """Go on only while somebody waits for it.

        Raises:
            Cut: nobody does.
        """
        if self._is_cut:
            raise Cut

    def pause(self, seconds: float) -> None:
        """Do nothing for a while.

        Raises:
            Cut: nobody waits any more.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, _PAUSE_SECONDS))
        self.check()

    def get(self, target: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """Send a GET, and return the answer; its body is read with `read`.

        Raises:
            Broken, Cut: there is none.
        """
        return self._answer("GET", target, headers, None, lambda _: None)

    def put(
        self, target: str, headers: Mapping[str, str], body: Span, sent: Callable[[int], None]
    ) -> http.client.HTTPResponse:
        """Send a PUT, and return the answer.

        Args:
            target: path and query.
            headers: all but the body's length.
            body: what is sent.
            sent: told of bytes as they go, and with a negative count that they go again.

        Raises:
            Broken, Cut: there is none.
            EOFError: the file became shorter while it was sent.
        """
        return self._answer("PUT", target, {**headers, "Content-Length": str(body.length)}, body, sent)

    def read(self, response: http.client.HTTPResponse, most: int, buffer: memoryview | None = None) -> memoryview:
        """Return the next bytes of an answer, in a buffer or good until the next call; nothing at its end.

        Raises:
            Broken, Cut: it broke off.
        """
        with self._network():
            into = self.buffer if buffer is None else buffer
            return into[: response.readinto(into[:most])]

    def read_all(self, response: http.client.HTTPResponse, most: int) -> bytes:
        """Return the rest of a short answer, but not more than `most` bytes.

        Raises:
            Broken, Cut: it broke off.
        """
        with self._network():
            return response.read(most)

    @contextmanager
    def _network(self) -> Iterator[None]:
        """Turn what the network raises into our own errors, here and nowhere else."""
        self.check()
        try:
            yield
        except TimeoutError:
            self.check()
            raise Broken(f"no byte passed for {self._stall_seconds:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.check()
            raise Broken(f"the transfer broke off ({type(error).__name__})") from None

    def _answer(
        self, method: str, target: str, headers: Mapping[str, str], body: Span | None, sent: Callable[[int], None]
    ) -> http.client.HTTPResponse:
        if self.is_free and self._connection is not None:
            passed = 0

            def passing(count: int) -> None:
                nonlocal passed
                passed += count
                sent(count)

            # What was idle may have been closed by the server meanwhile, which says nothing of the server.
            try:
                return self._ask(self._connection, method, target, headers, body, passing)
            except Broken:
                sent(-passed)
        self.close()
        return self._ask(self._connect(), method, target, headers, body, sent)

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: Span | None,
        sent: Callable[[int], None],
    ) -> http.client.HTTPResponse:
        with self._network():
            connection.putrequest(method, target, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
        if body is not None:
            self._send(body, sent)
        with self._network():
            self._response = connection.getresponse()
        return self._response

    def _connect(self) -> http.client.HTTPConnection:
        host = self.origin.host or ""
        port = self.origin.port or _DEFAULT_PORTS[self.origin.scheme]
        reason = "its name is unknown"
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise Broken(f"its server cannot be reached ({error.strerror})") from None
        for family, kind, protocol, _, address in found:
            self.check()
            self._socket = socket.socket(family, kind, protocol)
            try:
                self._socket.settimeout(self._connect_seconds)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socket.connect(address)
                if self._context is not None:
                    self._socket = self._context.wrap_socket(self._socket, server_hostname=host)
            except TimeoutError:
                reason = f"no connection within {self._connect_seconds:g} s"
            except OSError as error:
                reason = error.strerror or type(error).__name__
            else:
                self._socket.settimeout(self._stall_seconds)
                self._connection = http.client.HTTPConnection(host, port)
                self._connection.default_port = _DEFAULT_PORTS[self.origin.scheme]  # what Host need not name
                self._connection.sock = self._socket
                self.check()
                return self._connection
            self._socket.close()
        self.check()
        raise Broken(f"its server cannot be reached ({reason})")

    def _send(self, body: Span, sent: Callable[[int], None]) -> None:
        offset, end = body.offset, body.offset + body.length
        while offset < end:
            count = self._send_some(body, offset, min(end - offset, PIECE_BYTES))
            if not count:
                raise EOFError
            offset += count
            sent(count)

    def _send_some(self, body: Span, offset: int, most: int) -> int:
        connected = self._socket
        if connected is None:
            raise Broken("the transfer broke off")
        if self._context is None:
            with self._network():
                return _sendfile(connected, body.descriptor, offset, most)
        count = os.preadv(body.descriptor, [self.buffer[:most]], offset)
        with self._network():
            connected.sendall(self.buffer[:count])
        return count


def _sendfile(connected: socket.socket, descriptor: int, offset: int, most: int) -> int:
    """Have the kernel send some of a file; return how much. `socket.sendfile` would go on in another way on errors.

    Raises:
        TimeoutError: nothing could be sent for as long as the socket waits.
    """
    seconds = connected.gettimeout()
    while True:
        with suppress(BlockingIOError):
            return os.sendfile(connected.fileno(), descriptor, offset, most)
        writable = select.poll()
        writable.register(connected, select.POLLOUT)
        if not writable.poll(None if seconds is None else seconds * 1000):
            raise TimeoutError
