"""Lanes over real sockets: kept and used again, cut, and with TLS from end to end."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import json
import os
import ssl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from yarl import URL

from agent.adapters.lane import Broken, Lane
from agent.adapters.lanes import Lanes
from agent.sandbox.server import Sandbox
from agent.sandbox.settings import BUCKET, REGION
from tests.integration.sandbox_fixtures import s3_client

MEBIBYTE = 1 << 20
SIZE = 34 * MEBIBYTE + 5


class Idle:
    """A server that answers each request, and closes the connection `after` seconds without one."""

    def __init__(self, after: float) -> None:
        self.after = after
        self.connections = 0
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                async with asyncio.timeout(self.after):
                    await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass


@asynccontextmanager
async def serving(serve: Any, **options: Any) -> AsyncIterator[URL]:
    """Serve connections; at the end nobody does any more."""
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        finally:
            tasks.discard(task)
            writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0, **options) as listening:
        yield URL(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def get(lane: Lane) -> bytes:
    return lane.read_all(lane.get("/", {}), 100)


async def test_a_connection_is_used_again_and_one_that_the_server_closed_is_replaced() -> None:
    server = Idle(after=0.2)
    lanes = Lanes(2)
    async with serving(server.serve) as origin:
        assert await lanes.use(origin, get) == b"ok"
        assert await lanes.use(origin, get) == b"ok"
        assert server.connections == 1
        await asyncio.sleep(0.5)  # longer than the server keeps it
        assert await lanes.use(origin, get) == b"ok"
        assert (server.connections, server.requests) == (2, 3)
        lanes.close()


async def test_an_answer_that_was_not_read_to_its_end_costs_the_connection() -> None:
    server = Idle(after=20)
    lanes = Lanes(2)
    async with serving(server.serve) as origin:
        await lanes.use(origin, lambda lane: lane.get("/", {}).status)
        assert await lanes.use(origin, get) == b"ok"
        assert server.connections == 2
        lanes.close()


async def test_cancelled_it_is_cut_at_once() -> None:
    began = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        began.set()
        await reader.read()

    lanes = Lanes(1)
    async with serving(silent) as origin:
        task = asyncio.create_task(lanes.use(origin, get))
        await asyncio.wait_for(began.wait(), 10)
        cancelled_at = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - cancelled_at < 5, "a lane waits for half a minute"
    lanes.close()


async def test_a_silent_server_and_none_at_all() -> None:
    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    lanes = Lanes(1, stall_seconds=0.2)
    async with serving(silent) as origin:
        with pytest.raises(Broken, match=r"no byte passed for 0\.2 s"):
            await lanes.use(origin, get)
    with pytest.raises(Broken, match="its server cannot be reached"):
        await lanes.use(URL("http://127.0.0.1:1"), get)
    with pytest.raises(Broken, match="its server cannot be reached"):
        await lanes.use(URL("http://no-such-host.invalid"), get)
    lanes.close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for localhost, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + dt.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path / "certificate.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path


@asynccontextmanager
async def tls_in_front_of(url: str, certificate: Path) -> AsyncIterator[str]:
    """Take TLS off connections, and pass them on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    target = URL(url)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while some := await reader.read(1 << 16):
                writer.write(some)
                await writer.drain()
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(target.host, target.port)
        await asyncio.gather(pump(reader, back), pump(there, writer))

    async with serving(pass_on, ssl=context) as origin:
        yield f"https://localhost:{origin.port}"


_THERE_AND_BACK = """
import asyncio, json, os, sys
from pathlib import Path
from agent.adapters.download import Downloader
from agent.adapters.ovation import Credentials
from agent.adapters.upload import Uploader
from agent.settings import AwsSettings
async def main(endpoint, region, credentials, source, size, url, target):
    descriptor = os.open(source, os.O_RDONLY)
    async with Uploader(AwsSettings(endpoint_url_s3=endpoint, default_region=region)) as uploader:
        sent = await uploader.upload(descriptor, size, Credentials(**credentials), "text/plain")
    async with Downloader() as downloader:
        fetched = await downloader.fetch(url, Path(target), remote=False, name="large", size=size)
    print(json.dumps([sent, fetched.sha256]))
asyncio.run(main(**json.load(sys.stdin)))
"""


async def test_large_objects_go_and_come_over_tls(tmp_path: Path, certificate: Path) -> None:
    content = os.urandom(SIZE)
    (tmp_path / "large").write_bytes(content)
    async with (
        Sandbox(tmp_path / "sandbox") as sandbox,
        tls_in_front_of(sandbox.s3_url, certificate) as endpoint,
    ):
        environment = {**sandbox.admin.store_environment(), "AWS_ENDPOINT_URL_S3": endpoint}
        client = s3_client(environment, signature_version="s3v4")
        names = ("access_key_id", "secret_access_key", "session_token")
        given = {
            "endpoint": endpoint,
            "region": REGION,
            "credentials": {
                **{name: environment[f"AWS_{name.upper()}"] for name in names},
                "bucket": BUCKET,
                "key": "x",
            },
            "source": str(tmp_path / "large"),
            "size": SIZE,
            "url": client.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": "x"}),
            "target": str(tmp_path / "copy"),
        }
        trusted = {"SSL_CERT_FILE": str(certificate), "AWS_CA_BUNDLE": str(certificate)}
        ended = [await there_and_back(given, variables) for variables in ({}, trusted)]
    assert ended[0][0] == 1, "nobody vouches for that certificate"
    assert "StorageUnavailable" in ended[0][2]
    assert ended[1][0] == 0, ended[1][2]
    assert json.loads(ended[1][1]) == [hashlib.sha256(content).hexdigest()] * 2
    assert (tmp_path / "copy").read_bytes() == content


async def there_and_back(given: dict[str, Any], variables: dict[str, str]) -> tuple[int | None, str, str]:
    """Upload and download in a process with these variables; return how it ended and what it said."""
    pipe = asyncio.subprocess.PIPE
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _THERE_AND_BACK), stdin=pipe, stdout=pipe, stderr=pipe, env=environment
    )
    out, error = await process.communicate(json.dumps(given).encode())
    return process.returncode, out.decode(), error.decode()
