"""A lean object store for the bench: the same for everybody, and as little in the way as can be.

`python -m tests.bench.transfers.server DIRECTORY CERTIFICATE KEY` serves the files of a directory as objects of the
bucket `bench` over HTTP, over HTTPS, and over HTTP with 50 MB/s a connection and 20 ms before each answer. What is
uploaded is counted, its CRC32 computed, and thrown away. It asks nobody for a signature. Below `/api/v1/ov` is what an
upload needs of Ovation, 20 ms a call.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import itertools
import json
import os
import re
import socket
import socketserver
import ssl
import sys
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PACE = 50_000_000
DELAY = 0.02
_SO_MAX_PACING_RATE = 47
_PIECE = 1 << 20
_MULTIPART_FROM = 16 << 20
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Objects:
    """What there is, and what was uploaded: sizes only."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.etags: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()

    def etag(self, name: str) -> str:
        """Return the MD5 of a small object, or of one whose name asks for it; else something as of many parts."""
        if name not in self.etags:
            path = self.directory / name
            large = path.stat().st_size >= _MULTIPART_FROM and not name.startswith("whole")
            digest = hashlib.md5(b"x" if large else path.read_bytes(), usedforsecurity=False).hexdigest()
            self.etags[name] = f'"{digest}-8"' if large else f'"{digest}"'
        return self.etags[name]


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    objects: Objects
    delay = 0.0

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer with an object's headers."""
        self._get(send=False)

    def do_GET(self) -> None:
        """Answer with an object, or a range of it."""
        self._get(send=True)

    def _get(self, *, send: bool) -> None:
        time.sleep(self.delay)
        address = urlsplit(self.path)
        name = unquote(address.path).removeprefix("/bench/").strip("/")
        path = self.objects.directory / name
        if not path.is_file():
            self._listing(parse_qs(address.query).get("prefix", [""])[0])
            return
        size = path.stat().st_size
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        end = min(int(found[2]) + 1, size) if found and found[2] else size
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", self.objects.etag(name))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", "Wed, 25 Nov 2026 00:00:00 GMT")
        if found:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        self.wfile.flush()
        if send:
            with path.open("rb") as file:
                self._send_file(file, start, end)

    def _send_file(self, file: Any, start: int, end: int) -> None:
        if isinstance(self.connection, ssl.SSLSocket):
            while start < end:
                piece = os.pread(file.fileno(), min(_PIECE, end - start), start)
                self.connection.sendall(piece)
                start += len(piece)
        while start < end:
            start += os.sendfile(self.connection.fileno(), file.fileno(), start, min(end - start, 1 << 24))

    def _listing(self, prefix: str) -> None:
        names = sorted(path.name for path in self.objects.directory.iterdir() if path.name.startswith(prefix))
        contents = "".join(
            f"<Contents><Key>{name}</Key><LastModified>2026-11-25T00:00:00.000Z</LastModified>"
            f"<ETag>{self.objects.etag(name)}</ETag><Size>{(self.objects.directory / name).stat().st_size}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for name in names
        )
        self._answer(
            f"<ListBucketResult><Name>bench</Name><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        )

    def do_PUT(self) -> None:
        """Take an object, or a part of one."""
        time.sleep(self.delay)
        if self.path.startswith("/api/v1/ov/"):
            self._ovation()
            return
        size, crc32 = self._body()
        checksum = base64.b64encode(crc32.to_bytes(4, "big")).decode()
        promised = self.headers.get("x-amz-checksum-crc32")
        if promised is not None and promised != checksum:
            self._answer("<Error><Code>BadDigest</Code></Error>", 400)
            return
        self.objects.sizes[urlsplit(self.path).path] = size
        headers = {"ETag": f'"{os.urandom(16).hex()}-0"'}
        if promised is not None:
            headers["x-amz-checksum-crc32"] = checksum
        self._answer("", 200, headers)

    def _body(self) -> tuple[int, int]:
        """Read a body, and return its size and its CRC32; of one in chunks, the CRC32 of whatever it is framed in."""
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self._read(int(self.headers.get("Content-Length", "0")))
        total = crc32 = 0
        while count := int(self.rfile.readline().partition(b";")[0], 16):
            total, crc32 = total + count, self._read(count, crc32)[1]
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return total, crc32

    def _read(self, size: int, crc32: int = 0) -> tuple[int, int]:
        left = size
        buffer = memoryview(bytearray(min(_PIECE, max(1, left))))
        while left:
            count = self.rfile.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise ConnectionError
            crc32 = zlib.crc32(buffer[:count], crc32)
            left -= count
        return size, crc32

    def do_POST(self) -> None:
        """Begin or complete an upload in parts; or be Ovation."""
        time.sleep(self.delay)
        if self.path.startswith("/api/v1/ov/"):
            self._ovation()
            return
        self._body()
        if "uploads" in self.path:
            self._answer(
                "<InitiateMultipartUploadResult><Bucket>bench</Bucket><Key>x</Key><UploadId>upload</UploadId>"
                "</InitiateMultipartUploadResult>"
            )
        else:
            self._answer(
                "<CompleteMultipartUploadResult><Bucket>bench</Bucket><Key>x</Key><ETag>&quot;x-8&quot;</ETag>"
                "</CompleteMultipartUploadResult>"
            )

    def do_DELETE(self) -> None:
        """Throw away what is thrown away already."""
        self._answer("", 204)

    def _ovation(self) -> None:
        self._body()
        time.sleep(DELAY)
        with self.objects.lock:
            number = next(self.objects.numbers)
        if self.path.startswith("/api/v1/ov/folder"):
            answer: Any = {
                "entities": [{"_id": f"f{number}", "type": "File", "links": {"self": f"/api/v1/ov/file/{number}"}}]
            }
        elif self.path.startswith("/api/v1/ov/file"):
            key = f"up-{number}"
            aws = {"access_key_id": "a", "secret_access_key": "b", "session_token": "c", "bucket": "bench", "key": key}
            links = {
                "self": f"/api/v1/ov/revision/{key}",
                "upload-complete": f"/api/v1/ov/done/{key}",
                "upload-failed": "/api/v1/ov/bad",
            }
            answer = {"entities": [{"_id": key, "type": "Revision", "attributes": {}, "links": links}]}
            answer["aws"] = [{"id": key, "aws": aws}]
        elif self.path.startswith("/api/v1/ov/done"):
            key = self.path.rpartition("/")[2]
            length = self.objects.sizes.get(f"/bench/{key}")
            attributes = {"upload-status": "complete", "content_length": length}
            answer = {"revision": {"_id": key, "type": "Revision", "attributes": attributes, "links": {}}}
        else:
            answer = {"links": [], "updates": []}
        if "entities" in answer:
            answer |= {"links": [], "updates": []}
        self._answer(json.dumps(answer), 201, {"Content-Type": "application/json"})

    def _answer(self, body: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())


class Server(socketserver.ThreadingTCPServer):
    """A thread a connection."""

    request_queue_size = 256
    daemon_threads = True
    allow_reuse_address = True
    context: ssl.SSLContext | None = None
    pace = 0

    def get_request(self) -> tuple[socket.socket, Any]:
        """Take a connection, as fast as this server's may be."""
        connection, address = super().get_request()
        if self.pace:
            connection.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, self.pace)
        return connection, address

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection; a handshake is the business of its own thread."""
        with suppress(ConnectionError, BrokenPipeError, ssl.SSLError, TimeoutError):
            if self.context is not None:
                request = self.context.wrap_socket(request, server_side=True)
            super().finish_request(request, client_address)


def main(directory: str, certificate: str, key: str) -> None:
    """Serve until the standard input ends; print the addresses first."""
    objects = Objects(Path(directory))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    addresses = {}
    for name, tls, pace, delay in (("http", None, 0, 0.0), ("https", context, 0, 0.0), ("limited", None, PACE, DELAY)):
        handler = type("Serving", (Handler,), {"objects": objects, "delay": delay})
        server = Server(("127.0.0.1", 0), handler)
        server.context, server.pace = tls, pace
        threading.Thread(target=server.serve_forever, daemon=True).start()
        scheme = "https" if tls else "http"
        host = "localhost" if tls else "127.0.0.1"
        addresses[name] = f"{scheme}://{host}:{server.server_address[1]}"
    sys.stdout.write(json.dumps(addresses) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
