"""Uploads to the sandbox's store over real HTTP: every byte verified, nothing left behind."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.adapters import upload
from agent.adapters.ovation import Credentials, Ovation
from agent.adapters.upload import Uploader, content_type, part_bytes
from agent.errors import StorageError, StorageMismatch, StorageRefused, StorageUnavailable
from agent.sandbox.server import Sandbox
from agent.sandbox.settings import REGION, SandboxSettings
from agent.settings import AwsSettings, OvationSettings
from tests.integration.raw_server import RawServer, answer
from tests.integration.sandbox_fixtures import s3_client, sandbox_process

MEBIBYTE = 1 << 20
BORDER = 16 * MEBIBYTE


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path / "sandbox") as opened:
        yield opened


class Output:
    """One file on its way: the Revision made for it, and what the store has of it."""

    def __init__(self, sandbox: Sandbox, path: Path, credentials: Credentials, revision: dict[str, Any]) -> None:
        self.sandbox = sandbox
        self.path = path
        self.credentials = credentials
        self.revision = revision
        self.progress: list[int] = []

    @classmethod
    async def begin(cls, sandbox: Sandbox, path: Path, content: bytes) -> Output:
        path.write_bytes(content)
        project = sandbox.admin.create_project("Project")
        async with Ovation.open(ovation_settings(sandbox)) as ovation:
            file = await ovation.create(project, "File", path.name)
            revision, credentials = await ovation.create_revision(file, path.name, content_type(path.name))
        return cls(sandbox, path, credentials, revision)

    async def upload(
        self,
        *,
        endpoint: str | None = None,
        credentials: Credentials | None = None,
        size: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> str:
        settings = AwsSettings(endpoint_url_s3=endpoint or self.sandbox.s3_url, default_region=REGION)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return await Uploader(settings).upload(
                descriptor,
                os.fstat(descriptor).st_size if size is None else size,
                credentials or self.credentials,
                content_type(self.path.name),
                progress or self.progress.append,
            )
        finally:
            os.close(descriptor)

    async def refused(self, error: type[StorageError], words: str, **options: Any) -> None:
        """Upload, and expect this error; it tells no secret, and nothing is left in the store."""
        with pytest.raises(error, match=words) as caught:
            await self.upload(**options)
        assert type(caught.value) is error
        used = options.get("credentials") or self.credentials
        for secret in (used.access_key_id, used.secret_access_key, used.session_token):
            assert secret not in f"{caught.value}{caught.value!r}{caught.value.__cause__}"
        assert await self.stored() is None
        assert await self.unfinished() == []

    async def complete(self) -> dict[str, Any]:
        async with Ovation.open(ovation_settings(self.sandbox)) as ovation:
            return await ovation.upload_complete(self.revision)

    async def stored(self) -> Any:
        """Return the store's answer with all bytes under `Content`, or None."""
        client = self._client()

        def read() -> Any:
            try:
                found = client.get_object(Bucket=self.credentials.bucket, Key=self.credentials.key)
            except client.exceptions.NoSuchKey:
                return None
            return {**found, "Content": found["Body"].read()}

        return await asyncio.to_thread(read)

    async def unfinished(self) -> list[Any]:
        listed = await asyncio.to_thread(self._client().list_multipart_uploads, Bucket=self.credentials.bucket)
        found: list[Any] = listed.get("Uploads", [])
        return found

    def _client(self) -> Any:
        return s3_client(self.sandbox.admin.store_environment())


def ovation_settings(sandbox: Sandbox) -> OvationSettings:
    given = {"api_url": sandbox.api_url, "token": sandbox.service_token, "hosts": (sandbox.services_url,)}
    return OvationSettings.model_validate(given)


def content_of(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


@pytest.mark.parametrize("size", [0, 1, BORDER - 1, BORDER, BORDER + 1, 3 * BORDER - 1])
async def test_the_bytes_arrive_verified_in_one_piece_or_in_parts(sandbox: Sandbox, tmp_path: Path, size: int) -> None:
    content = content_of(size)
    output = await Output.begin(sandbox, tmp_path / "table.csv", content)
    assert await output.upload() == hashlib.sha256(content).hexdigest()
    stored = await output.stored()
    assert stored["Content"] == content
    assert stored["ContentType"] == "text/csv"
    assert stored["ServerSideEncryption"] == "AES256"
    assert stored["ETag"].endswith('-2"') is (BORDER < size <= 2 * BORDER)
    assert sum(output.progress) == size
    assert await output.unfinished() == []
    assert (await output.complete())["attributes"]["content_length"] == size


@pytest.mark.parametrize("size", [5, BORDER + 1])
async def test_type_and_encryption_are_asked_for(sandbox: Sandbox, tmp_path: Path, size: int) -> None:
    """The sandbox's store encrypts whatever one asks for, so look at what is sent."""
    output = await Output.begin(sandbox, tmp_path / "x.csv", content_of(size))
    async with RawServer(answer(b"<Error><Code>AccessDenied</Code></Error>", 403)) as server:
        await output.refused(StorageRefused, "AccessDenied", endpoint=server.url)
    assert len(server.heard) == 1
    assert "x-amz-server-side-encryption: AES256\r\n" in server.heard[0]
    assert "content-type: text/csv\r\n" in server.heard[0].lower()
    assert f"x-amz-security-token: {output.credentials.session_token}\r\n".lower() in server.heard[0].lower()
    assert output.credentials.secret_access_key not in server.heard[0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.csv", "text/csv"),
        ("a.png", "image/png"),
        ("a.json", "application/json"),
        ("a", "application/octet-stream"),
        ("a.unheard-of", "application/octet-stream"),
        (".csv", "application/octet-stream"),
        ("", "application/octet-stream"),
        ("x" * 255, "application/octet-stream"),
        ("new\nline.txt", "text/plain"),
    ],
)
def test_content_types(name: str, kind: str) -> None:
    assert content_type(name) == kind


@given(st.integers(1, 5 << 40))
def test_parts_are_neither_too_small_nor_too_many_nor_too_large(size: int) -> None:
    step = part_bytes(size)
    assert 5 * MEBIBYTE <= step <= 5 << 30
    assert len(range(0, size, step)) <= 10_000


def test_parts_grow_just_where_they_must() -> None:
    most = BORDER * 10_000
    assert part_bytes(most) == BORDER
    assert part_bytes(most + 1) == BORDER + 1
    assert len(range(0, most, part_bytes(most))) == 10_000


class Tampering:
    """A proxy before the store that changes one byte of each request's body."""

    def __init__(self, store_url: str) -> None:
        self._port = int(store_url.rpartition(":")[2])
        self.url = ""
        self.changed = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        store_reader, store_writer = await asyncio.open_connection("127.0.0.1", self._port)

        async def forth() -> None:
            while data := await reader.read(1 << 20):
                position = data.find(b"precious")
                if position >= 0:
                    self.changed += 1
                    data = data[:position] + b"P" + data[position + 1 :]
                store_writer.write(data)
                await store_writer.drain()
            store_writer.close()

        async def back() -> None:
            while data := await store_reader.read(65_536):
                writer.write(data)
                await writer.drain()
            writer.close()

        self._tasks |= {asyncio.create_task(forth()), asyncio.create_task(back())}


@pytest.mark.parametrize("size", [100, BORDER + 100])
async def test_bytes_that_change_on_the_way_are_not_taken(sandbox: Sandbox, tmp_path: Path, size: int) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", b"precious".ljust(size, b"."))
    async with Tampering(sandbox.s3_url) as proxy:
        await output.refused(StorageMismatch, "SHA256Mismatch|BadDigest", endpoint=proxy.url)
        assert proxy.changed >= 1


@pytest.mark.parametrize("size", [100, BORDER + 100])
async def test_the_store_compares_the_checksum_itself(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", content_of(size))
    monkeypatch.setattr(upload, "_crc32", lambda _: "AAAAAA==")
    await output.refused(StorageMismatch, "BadDigest")


async def test_expired_credentials_are_asked_for_anew(tmp_path: Path) -> None:
    settings = SandboxSettings(upload_credentials_seconds=0)
    async with Sandbox(tmp_path / "sandbox", settings=settings) as sandbox:
        output = await Output.begin(sandbox, tmp_path / "x", b"content")
        await output.refused(StorageUnavailable, "ExpiredToken")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"access_key_id": "AKIAIOSFODNN7EXAMPLE"}, "InvalidAccessKeyId; is AWS_ENDPOINT_URL_S3"),
        ({"secret_access_key": "another-secret-of-some-length"}, "SignatureDoesNotMatch"),
        ({"session_token": "another-token"}, "InvalidToken"),
        ({"bucket": "no-such-bucket"}, "NoSuchBucket|AccessDenied"),
        ({"bucket": "Not A Bucket"}, "no request can be made"),
        ({"bucket": ""}, "no request can be made"),
        ({"key": "another/key"}, "AccessDenied"),
    ],
)
async def test_what_the_store_refuses_for_good(
    sandbox: Sandbox, tmp_path: Path, wrong: dict[str, str], words: str
) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", b"content")
    given = {name: getattr(output.credentials, name) for name in Credentials.__dataclass_fields__}
    await output.refused(StorageRefused, words, credentials=Credentials(**{**given, **wrong}))


async def test_nobody_listens(sandbox: Sandbox, tmp_path: Path) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", b"content")
    await output.refused(StorageUnavailable, "cannot be reached", endpoint="http://127.0.0.1:1")


@pytest.mark.parametrize("size", [5, BORDER + 1])
async def test_a_store_that_says_nothing_is_not_waited_for_for_ever(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(upload, "_STALL_SECONDS", 0.3)
    output = await Output.begin(sandbox, tmp_path / "x", content_of(size))
    fault = sandbox.faults.add("black_hole", target="store", path="PUT |POST ")
    await asyncio.wait_for(output.refused(StorageUnavailable, "cannot be reached"), 60)
    assert fault.hits == 4


@pytest.mark.parametrize("fault", [{"kind": "reset_request", "after_bytes": 100_000}, {"kind": "lost_answer"}])
@pytest.mark.parametrize("size", [MEBIBYTE, 2 * BORDER + 5])
async def test_a_line_that_breaks_is_tried_again(
    sandbox: Sandbox, tmp_path: Path, fault: dict[str, Any], size: int
) -> None:
    content = content_of(size)
    output = await Output.begin(sandbox, tmp_path / "x", content)
    programmed = sandbox.faults.add(target="store", path="PUT ", times=2, **fault)
    await output.upload()
    assert programmed.hits == 2
    assert (await output.stored())["Content"] == content
    assert sum(output.progress) == size
    assert await output.unfinished() == []


async def test_a_store_that_is_overloaded_is_tried_again_and_then_told(sandbox: Sandbox, tmp_path: Path) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", content_of(BORDER + 1))
    body = "<Error><Code>SlowDown</Code></Error>"
    fault = sandbox.faults.add("status", target="store", path="partNumber=2", status=503, body=body, times=4)
    await output.refused(StorageUnavailable, "SlowDown|503")
    assert fault.hits == 4
    await output.upload()
    assert (await output.stored())["Content"] == output.path.read_bytes()


async def test_the_last_call_may_lose_its_answer(sandbox: Sandbox, tmp_path: Path) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", content_of(BORDER + 1))
    fault = sandbox.faults.add("lost_answer", target="store", path="POST .*uploadId=", times=1)
    await output.upload()
    assert fault.hits == 1
    assert (await output.stored())["Content"] == output.path.read_bytes()


async def test_cancelled_in_the_middle_it_leaves_no_parts(sandbox: Sandbox, tmp_path: Path) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", content_of(3 * BORDER))
    first = asyncio.Event()
    sandbox.faults.add("black_hole", target="store", path="partNumber=2")
    task = asyncio.create_task(output.upload(progress=lambda _: first.set()))
    await asyncio.wait_for(first.wait(), 20)
    assert len(await output.unfinished()) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await output.unfinished() == []
    assert await output.stored() is None


async def test_cancelled_while_the_store_is_away_it_ends_all_the_same(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_ABORT_SECONDS", 0.2)
    output = await Output.begin(sandbox, tmp_path / "x", content_of(2 * BORDER))
    first = asyncio.Event()
    sandbox.faults.add("black_hole", target="store", path="partNumber=2|DELETE")
    task = asyncio.create_task(output.upload(progress=lambda _: first.set()))
    await asyncio.wait_for(first.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)


async def test_a_file_that_shrinks_is_told(sandbox: Sandbox, tmp_path: Path) -> None:
    output = await Output.begin(sandbox, tmp_path / "x.csv", content_of(3 * BORDER))

    def shrink(_: int) -> None:
        os.truncate(output.path, BORDER + 5)

    await output.refused(StorageMismatch, r"x\.csv: it became shorter", progress=shrink)
    await output.refused(StorageMismatch, r"x\.csv: it became shorter", size=BORDER + 6)
    os.truncate(output.path, 5)
    await output.refused(StorageMismatch, r"x\.csv: it became shorter", size=6)


async def test_of_a_file_that_grows_the_announced_bytes_are_sent(sandbox: Sandbox, tmp_path: Path) -> None:
    content = content_of(2 * BORDER)
    output = await Output.begin(sandbox, tmp_path / "x", content)

    def grow(_: int) -> None:
        with output.path.open("ab") as file:
            file.write(b"more")

    assert await output.upload(progress=grow) == hashlib.sha256(content).hexdigest()
    assert (await output.stored())["Content"] == content


async def test_many_at_once_with_one_uploader(sandbox: Sandbox, tmp_path: Path) -> None:
    uploader = Uploader(AwsSettings(endpoint_url_s3=sandbox.s3_url, default_region=REGION))
    outputs = [await Output.begin(sandbox, tmp_path / f"{number}", content_of(number)) for number in range(8)]

    async def one(output: Output) -> None:
        descriptor = os.open(output.path, os.O_RDONLY)
        try:
            await uploader.upload(descriptor, output.path.stat().st_size, output.credentials, "text/plain")
        finally:
            os.close(descriptor)

    await asyncio.gather(*map(one, outputs))
    for output in outputs:
        assert (await output.stored())["Content"] == output.path.read_bytes()


_LARGE = """
import asyncio, json, os, resource, sys
from agent.adapters.ovation import Credentials
from agent.adapters.upload import Uploader
from agent.settings import AwsSettings
async def main():
    given = json.loads(sys.stdin.read())
    uploader = Uploader(AwsSettings(endpoint_url_s3=given["endpoint"], default_region="us-east-1"))
    credentials = Credentials(**given["credentials"])
    descriptor = os.open(given["path"], os.O_RDONLY)
    await uploader.upload(descriptor, 40 << 20, credentials, "text/plain")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sha256 = await uploader.upload(descriptor, 300 << 20, credentials, "text/plain")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([sha256, after - before]))
asyncio.run(main())
"""


async def test_300_mb_take_no_more_memory_than_a_few_parts(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(300 * MEBIBYTE)
    async with sandbox_process(tmp_path / "sandbox") as sandbox:
        environment = sandbox.details["store_environment"]
        credentials = {
            "access_key_id": environment["AWS_ACCESS_KEY_ID"],
            "secret_access_key": environment["AWS_SECRET_ACCESS_KEY"],
            "session_token": environment["AWS_SESSION_TOKEN"],
            "bucket": "ovation-sandbox",
            "key": "large",
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _LARGE),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        given = {"endpoint": environment["AWS_ENDPOINT_URL_S3"], "credentials": credentials, "path": str(path)}
        out, _ = await asyncio.wait_for(process.communicate(json.dumps(given).encode()), 90)
    sha256, grown_kib = json.loads(out)
    digest = hashlib.sha256()
    for _ in range(300):
        digest.update(bytes(MEBIBYTE))
    assert sha256 == digest.hexdigest()
    assert grown_kib < 40 * 1024
