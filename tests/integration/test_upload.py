"""Uploads to the sandbox's store over real HTTP: every byte verified, nothing left behind."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.adapters import multipart, sending, store, sums
from agent.adapters.multipart import Parts
from agent.adapters.ovation import Credentials, Ovation
from agent.adapters.upload import Uploader, content_type, part_bytes
from agent.errors import StorageError, StorageExpired, StorageMismatch, StorageRefused, StorageUnavailable
from agent.sandbox.server import Sandbox
from agent.sandbox.settings import REGION, SandboxSettings
from agent.settings import AwsSettings, OvationSettings
from tests.integration.raw_server import RawServer, answer
from tests.integration.sandbox_fixtures import s3_client, sandbox_process, until

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
        parts: Parts | None = None,
    ) -> str:
        settings = AwsSettings(endpoint_url_s3=endpoint or self.sandbox.s3_url, default_region=REGION)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            async with Uploader(settings) as uploader:
                return await uploader.upload(
                    descriptor,
                    os.fstat(descriptor).st_size if size is None else size,
                    credentials or self.credentials,
                    content_type(self.path.name),
                    progress or self.progress.append,
                    parts=parts,
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

    async def abort(self, upload_id: str | None, credentials: Credentials | None = None) -> None:
        settings = AwsSettings(endpoint_url_s3=self.sandbox.s3_url, default_region=REGION)
        async with Uploader(settings) as uploader:
            await uploader.abort(credentials or self.credentials, upload_id)

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
    monkeypatch.setattr(sums, "_base64", lambda _: "AAAAAA==")
    await output.refused(StorageMismatch, "BadDigest")


async def test_expired_credentials_are_asked_for_anew(tmp_path: Path) -> None:
    settings = SandboxSettings(upload_credentials_seconds=0)
    async with Sandbox(tmp_path / "sandbox", settings=settings) as sandbox:
        output = await Output.begin(sandbox, tmp_path / "x", b"content")
        await output.refused(StorageExpired, "ExpiredToken")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"secret_access_key": "another-secret-of-some-length"}, "SignatureDoesNotMatch"),
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


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"access_key_id": "AKIAIOSFODNN7EXAMPLE"}, "InvalidAccessKeyId; is AWS_ENDPOINT_URL_S3"),
        ({"session_token": "another-token"}, "InvalidToken; is AWS_ENDPOINT_URL_S3"),
    ],
)
async def test_credentials_that_the_store_does_not_know(
    sandbox: Sandbox, tmp_path: Path, wrong: dict[str, str], words: str
) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", b"content")
    await output.refused(StorageExpired, words, credentials=replace(output.credentials, **wrong))


async def test_nobody_listens(sandbox: Sandbox, tmp_path: Path) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", b"content")
    await output.refused(StorageUnavailable, "cannot be reached", endpoint="http://127.0.0.1:1")


@pytest.mark.parametrize("size", [5, BORDER + 1])
async def test_a_store_that_says_nothing_is_not_waited_for_for_ever(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(store, "_STALL_SECONDS", 0.3)
    monkeypatch.setattr(sending, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(sending, "CONNECT_SECONDS", 0.3)
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
    monkeypatch.setattr(multipart, "_ABORT_SECONDS", 0.2)
    output = await Output.begin(sandbox, tmp_path / "x", content_of(2 * BORDER))
    first = asyncio.Event()
    sandbox.faults.add("black_hole", target="store", path="partNumber=2|DELETE")
    task = asyncio.create_task(output.upload(progress=lambda _: first.set()))
    await asyncio.wait_for(first.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)


async def interrupted(output: Output, part: int, kept: list[str]) -> Parts:
    """Upload up to a part, break off, and return how to go on."""
    fault = output.sandbox.faults.add("black_hole", f"partNumber={part}", target="store")

    async def keep(upload_id: str) -> None:
        kept.append(upload_id)

    task = asyncio.create_task(output.upload(parts=Parts(BORDER, keep=keep)))
    others = [each for each in range(1, -(-output.path.stat().st_size // BORDER) + 1) if each != part]
    await until(lambda: fault.hits and len(output.progress) == len(others), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    output.sandbox.faults.remove()
    output.progress.clear()
    return Parts(BORDER, kept[-1], keep, is_new=False)


async def test_what_was_sent_is_not_sent_again(sandbox: Sandbox, tmp_path: Path) -> None:
    content = content_of(2 * BORDER + 100)
    output = await Output.begin(sandbox, tmp_path / "x", content)
    kept: list[str] = []
    parts = await interrupted(output, 3, kept)
    assert [each["UploadId"] for each in await output.unfinished()] == kept
    sent = sandbox.faults.add("latency", "PUT ", target="store", seconds=0)
    assert await output.upload(parts=parts) == hashlib.sha256(content).hexdigest()
    assert sent.hits == 1
    assert sum(output.progress) == len(content)
    assert (await output.stored())["Content"] == content
    assert await output.unfinished() == []
    assert len(kept) == 1


@pytest.mark.parametrize("there", [b"other bytes".ljust(BORDER, b"."), content_of(BORDER)[:-1], b""])
async def test_a_part_that_is_not_the_files_is_sent_again(sandbox: Sandbox, tmp_path: Path, there: bytes) -> None:
    content = content_of(BORDER + 100)
    output = await Output.begin(sandbox, tmp_path / "x", content)
    parts = await interrupted(output, 2, [])
    part = {"Bucket": output.credentials.bucket, "Key": output.credentials.key, "UploadId": parts.upload_id}
    await asyncio.to_thread(output._client().upload_part, **part, PartNumber=1, Body=there)
    assert await output.upload(parts=parts) == hashlib.sha256(content).hexdigest()
    assert (await output.stored())["Content"] == content


async def test_the_id_is_kept_before_the_first_part_is_sent(sandbox: Sandbox, tmp_path: Path) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", content_of(BORDER + 1))
    sent = sandbox.faults.add("latency", "PUT .*partNumber", target="store", seconds=0)

    async def keep(upload_id: str) -> None:
        assert [each["UploadId"] for each in await output.unfinished()] == [upload_id]
        assert sent.hits == 0
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await output.upload(parts=Parts(BORDER, keep=keep))
    assert sent.hits == 0
    assert await output.unfinished() == []


async def test_an_upload_that_was_completed_unnoticed_is_found(sandbox: Sandbox, tmp_path: Path) -> None:
    content = content_of(BORDER + 1)
    output = await Output.begin(sandbox, tmp_path / "x", content)
    fault = sandbox.faults.add("lost_answer", "POST .*uploadId=", target="store")
    kept: list[str] = []

    async def keep(upload_id: str) -> None:
        kept.append(upload_id)

    with pytest.raises(StorageUnavailable):
        await output.upload(parts=Parts(BORDER, keep=keep))
    sandbox.faults.remove()
    sent = sandbox.faults.add("latency", "PUT |POST ", target="store", seconds=0)
    output.progress.clear()
    assert await output.upload(parts=Parts(BORDER, kept[0], keep, is_new=False)) == hashlib.sha256(content).hexdigest()
    assert (fault.hits, sent.hits, len(kept)) == (4, 0, 1)
    assert sum(output.progress) == len(content)
    # The same id with another file: what is there is not that, so it is sent.
    other = content_of(BORDER + 2)[1:]
    output.path.write_bytes(other)
    with pytest.raises(StorageMismatch, match="the object store has bytes with"):
        await output.upload(parts=Parts(BORDER, kept[0], keep, is_new=False))


async def test_an_upload_that_is_gone_is_begun_anew(sandbox: Sandbox, tmp_path: Path) -> None:
    content = content_of(BORDER + 1)
    output = await Output.begin(sandbox, tmp_path / "x", content)
    kept: list[str] = []
    parts = await interrupted(output, 2, kept)
    await output.abort(kept[0])
    assert await output.unfinished() == []
    assert await output.upload(parts=parts) == hashlib.sha256(content).hexdigest()
    assert len(kept) == 2
    assert (await output.stored())["Content"] == content
    assert await output.unfinished() == []


async def test_what_says_that_it_is_gone_at_the_end_may_be_there(sandbox: Sandbox, tmp_path: Path) -> None:
    """The first answer to the last call is lost, and to the second the store says what Amazon's may say."""
    output = await Output.begin(sandbox, tmp_path / "x", content_of(BORDER + 1))
    sandbox.faults.add("lost_answer", "POST .*uploadId=", target="store", times=1)
    body = "<Error><Code>NoSuchUpload</Code></Error>"
    again = sandbox.faults.add("status", "POST .*uploadId=", target="store", status=404, body=body)
    await output.upload()
    assert again.hits == 1
    assert (await output.stored())["Content"] == output.path.read_bytes()
    sandbox.faults.remove()
    empty = await Output.begin(sandbox, tmp_path / "y", content_of(BORDER + 1))
    sandbox.faults.add("status", "POST .*uploadId=", target="store", status=404, body=body)
    await empty.refused(StorageMismatch, "NoSuchUpload")


def whole_store(sandbox: Sandbox, key: str) -> Credentials:
    """Return credentials that may list what is under way in the bucket."""
    given = sandbox.admin.store_environment()
    return Credentials(
        access_key_id=given["AWS_ACCESS_KEY_ID"],
        secret_access_key=given["AWS_SECRET_ACCESS_KEY"],
        session_token=given["AWS_SESSION_TOKEN"],
        bucket="ovation-sandbox",
        key=key,
    )


async def test_an_upload_whose_id_was_lost_is_found_and_thrown_away(sandbox: Sandbox, tmp_path: Path) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", content_of(BORDER + 1))
    neighbour = f"{output.credentials.key}.more"
    client = output._client()
    await asyncio.to_thread(client.create_multipart_upload, Bucket=output.credentials.bucket, Key=neighbour)
    fault = sandbox.faults.add("lost_answer", r"POST .*\?uploads", target="store", times=2)
    credentials = whole_store(sandbox, output.credentials.key)
    await output.upload(credentials=credentials)
    assert fault.hits == 2
    assert [each["Key"] for each in await output.unfinished()] == [neighbour]
    # So are those that an earlier process has left.
    for _ in range(2):
        await asyncio.to_thread(
            client.create_multipart_upload, Bucket=output.credentials.bucket, Key=output.credentials.key
        )

    async def keep(_: str) -> None:
        assert len(await output.unfinished()) == 2

    await output.upload(credentials=credentials, parts=Parts(BORDER, keep=keep, is_new=False))
    assert [each["Key"] for each in await output.unfinished()] == [neighbour]
    await output.abort(None, credentials)
    assert [each["Key"] for each in await output.unfinished()] == [neighbour]


async def test_with_credentials_for_one_object_a_lost_id_leaves_no_parts(sandbox: Sandbox, tmp_path: Path) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", content_of(BORDER + 1))
    sandbox.faults.add("lost_answer", r"POST .*\?uploads", target="store", times=2)
    await output.upload()
    left = await output.unfinished()
    assert len(left) == 2
    assert [sandbox.store.parts(each["UploadId"]) for each in left] == [[], []]


async def test_to_abort_is_to_try(sandbox: Sandbox, tmp_path: Path) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", content_of(BORDER + 1))
    kept: list[str] = []
    await interrupted(output, 2, kept)
    await output.abort("never-was")
    await output.abort(kept[0], replace(output.credentials, session_token="another"))
    assert len(await output.unfinished()) == 1
    sandbox.faults.add("status", "DELETE ", target="store", status=503, times=4)
    with pytest.raises(StorageUnavailable):
        await output.abort(kept[0])
    await output.abort(kept[0])
    assert await output.unfinished() == []


MD5_OF_CONTENT = hashlib.md5(b"content").hexdigest()  # noqa: S324 what S3 answers


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"ETag": f'"{MD5_OF_CONTENT}"', "x-amz-checksum-crc32": "AAAAAA=="}, "CRC32 AAAAAA=="),
        ({"ETag": f'"{"0" * 32}"'}, f"MD5 {'0' * 32}"),
        ({"ETag": f'"{"0" * 32}"', "x-amz-server-side-encryption": "AES256"}, "MD5"),
        ({"ETag": f'"{"0" * 32}"', "x-amz-server-side-encryption": "aws:kms"}, None),
        ({"ETag": f'"{MD5_OF_CONTENT}"'}, None),
        ({"ETag": '"anything"'}, None),
        ({"ETag": f'"{"0" * 32}-2"'}, None),
    ],
)
async def test_what_the_store_says_it_has_is_compared(
    sandbox: Sandbox, tmp_path: Path, headers: dict[str, str], words: str | None
) -> None:
    output = await Output.begin(sandbox, tmp_path / "x", b"content")
    async with RawServer(answer(b"", 200, **headers)) as server:
        if words is None:
            await output.upload(endpoint=server.url)
        else:
            await output.refused(StorageMismatch, words, endpoint=server.url)


@given(st.binary(max_size=100), st.integers(1, 40))
def test_the_sums_of_parts_are_those_of_s3(content: bytes, length: int) -> None:
    pieces = [content[at : at + length] for at in range(0, len(content), length)] or [b""]
    whole = sums.composite([sums.sums(piece) for piece in pieces])
    expected = hashlib.md5(b"".join(hashlib.md5(piece).digest() for piece in pieces)).hexdigest()  # noqa: S324
    assert whole.etag == f"{expected}-{len(pieces)}"
    said = {"ETag": f'"{whole.etag}"', "ChecksumCRC32": whole.crc32}
    assert sums.confirm(said, whole)
    assert sums.confirm({"ChecksumCRC32": whole.crc32.partition("-")[0]}, whole)
    assert not sums.confirm({"ChecksumCRC32": "other", "ChecksumType": "FULL_OBJECT"}, whole)
    for wrong in ({"ETag": f'"{"f" * 32}-{len(pieces)}"'}, {"ChecksumCRC32": f"////-{len(pieces)}"}):
        with pytest.raises(StorageMismatch):
            sums.confirm(said | wrong, whole)


async def test_a_file_that_shrinks_is_told(sandbox: Sandbox, tmp_path: Path) -> None:
    output = await Output.begin(sandbox, tmp_path / "x.csv", content_of(3 * BORDER))

    def shrink(_: int) -> None:
        os.truncate(output.path, BORDER + 5)

    await output.refused(StorageMismatch, r"x\.csv: it (became shorter|has 16777221 bytes now)", progress=shrink)
    await output.refused(StorageMismatch, r"x\.csv: it became shorter", size=BORDER + 6)
    os.truncate(output.path, 5)
    await output.refused(StorageMismatch, r"x\.csv: it became shorter", size=6)


@pytest.mark.parametrize("size", [5, BORDER + 1])
async def test_a_file_that_grows_is_told(sandbox: Sandbox, tmp_path: Path, size: int) -> None:
    output = await Output.begin(sandbox, tmp_path / "x.csv", content_of(size))
    with output.path.open("ab") as file:
        file.write(b"more")
    await output.refused(StorageMismatch, rf"x\.csv: it has {size + 4} bytes now, {size} when", size=size)


async def test_many_at_once_with_one_uploader(sandbox: Sandbox, tmp_path: Path) -> None:
    outputs = [await Output.begin(sandbox, tmp_path / f"{number}", content_of(number)) for number in range(8)]

    async def one(output: Output) -> None:
        descriptor = os.open(output.path, os.O_RDONLY)
        try:
            await uploader.upload(descriptor, output.path.stat().st_size, output.credentials, "text/plain")
        finally:
            os.close(descriptor)

    async with Uploader(AwsSettings(endpoint_url_s3=sandbox.s3_url, default_region=REGION)) as uploader:
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
    credentials = Credentials(**given["credentials"])
    async def upload(path):
        descriptor = os.open(path, os.O_RDONLY)
        return await uploader.upload(descriptor, os.fstat(descriptor).st_size, credentials, "text/plain")
    async with Uploader(AwsSettings(endpoint_url_s3=given["endpoint"], default_region="us-east-1")) as uploader:
        await upload(given["small"])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sha256 = await upload(given["large"])
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([sha256, after - before]))
asyncio.run(main())
"""


async def test_300_mb_take_no_more_memory_than_a_few_parts(tmp_path: Path) -> None:
    paths = {"small": tmp_path / "small", "large": tmp_path / "large"}
    for name, mebibytes in (("small", 40), ("large", 300)):
        with paths[name].open("wb") as file:
            file.truncate(mebibytes * MEBIBYTE)
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
        given = {"endpoint": environment["AWS_ENDPOINT_URL_S3"], "credentials": credentials}
        given |= {name: str(path) for name, path in paths.items()}
        out, _ = await asyncio.wait_for(process.communicate(json.dumps(given).encode()), 90)
    sha256, grown_kib = json.loads(out)
    digest = hashlib.sha256()
    for _ in range(300):
        digest.update(bytes(MEBIBYTE))
    assert sha256 == digest.hexdigest()
    assert grown_kib < 40 * 1024
