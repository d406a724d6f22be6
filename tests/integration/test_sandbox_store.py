"""The object store does what S3 does, as botocore sees it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from agent.sandbox.server import Sandbox
from agent.sandbox.settings import BUCKET
from tests.integration.sandbox_fixtures import s3_client

PART = 5 * 1024 * 1024


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path / "sandbox") as running:
        yield running


class Caller:
    """Calls botocore in a thread, always on the one bucket."""

    def __init__(self, client: Any) -> None:
        self.client = client

    async def __call__(self, operation: str, **parameters: Any) -> dict[str, Any]:
        def call() -> dict[str, Any]:
            answer: dict[str, Any] = getattr(self.client, operation)(Bucket=BUCKET, **parameters)
            if "Body" in answer and not isinstance(answer["Body"], bytes):
                with answer["Body"] as body:
                    answer["Body"] = body.read()
            return answer

        return await asyncio.to_thread(call)

    async def refused(self, operation: str, **parameters: Any) -> tuple[int, str]:
        """Return the status and S3's code of the refusal."""
        with pytest.raises(ClientError) as caught:
            await self(operation, **parameters)
        answer = caught.value.response
        return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


@pytest.fixture
def s3(sandbox: Sandbox) -> Caller:
    return Caller(s3_client(sandbox.admin.store_environment()))


async def test_an_object_comes_back_with_everything_that_was_said_of_it(s3: Caller) -> None:
    body = os.urandom(200_000)
    put = await s3(
        "put_object",
        Key="a b/é+%.bin",
        Body=body,
        ContentType="text/plain",
        ServerSideEncryption="AES256",
        Metadata={"owner": "me"},
        ContentDisposition="attachment",
    )
    assert put["ETag"] == f'"{hashlib.md5(body).hexdigest()}"'  # noqa: S324 - that is what an ETag is
    assert put["ServerSideEncryption"] == "AES256"
    assert base64.b64decode(put["ChecksumCRC32"]) == zlib.crc32(body).to_bytes(4, "big")
    for operation in ("get_object", "head_object"):
        got = await s3(operation, Key="a b/é+%.bin")
        assert got["ETag"] == put["ETag"]
        assert (got["ContentType"], got["ContentLength"]) == ("text/plain", 200_000)
        assert (got["Metadata"], got["ContentDisposition"]) == ({"owner": "me"}, "attachment")
        assert got["VersionId"] == put["VersionId"]
        assert got["LastModified"] is not None
    assert (await s3("get_object", Key="a b/é+%.bin"))["Body"] == body
    assert (await s3("get_object", Key="a b/é+%.bin", ChecksumMode="ENABLED"))["ChecksumCRC32"] == put["ChecksumCRC32"]
    await s3("delete_object", Key="a b/é+%.bin")
    assert await s3.refused("get_object", Key="a b/é+%.bin") == (404, "NoSuchKey")
    await s3("delete_object", Key="a b/é+%.bin")


@pytest.mark.parametrize("key", ["..", "../x", "a/../b", "./a", "a//b", "/a", "a\nb", "a?b#c", "%2F", "~", "é" * 100])
async def test_any_key_is_a_key_and_never_a_path(s3: Caller, sandbox: Sandbox, tmp_path: Path, key: str) -> None:
    await s3("put_object", Key=key, Body=b"content")
    assert (await s3("get_object", Key=key))["Body"] == b"content"
    assert [one["Key"] for one in (await s3("list_objects_v2"))["Contents"]] == [key]
    assert os.listdir(tmp_path) == ["sandbox"]  # noqa: PTH208 - a short look, and nothing else runs
    assert sandbox.store.stat(BUCKET, key) is not None


async def test_an_empty_object_is_an_object(s3: Caller) -> None:
    put = await s3("put_object", Key="empty", Body=b"")
    got = await s3("get_object", Key="empty")
    assert (got["ContentLength"], got["Body"], got["ETag"]) == (0, b"", put["ETag"])
    assert await s3.refused("get_object", Key="empty", Range="bytes=0-0") == (416, "InvalidRange")


@pytest.mark.parametrize(
    ("wanted", "found", "content_range"),
    [
        ("bytes=0-0", slice(0, 1), "bytes 0-0/300000"),
        ("bytes=299999-", slice(299_999, None), "bytes 299999-299999/300000"),
        ("bytes=-5", slice(-5, None), "bytes 299995-299999/300000"),
        ("bytes=100000-250000", slice(100_000, 250_001), "bytes 100000-250000/300000"),
        ("bytes=100-999999999", slice(100, None), "bytes 100-299999/300000"),
        ("bytes=-999999999", slice(0, None), "bytes 0-299999/300000"),
    ],
)
async def test_a_range_is_answered_with_that_range(s3: Caller, wanted: str, found: slice, content_range: str) -> None:
    body = os.urandom(300_000)
    await s3("put_object", Key="k", Body=body)
    got = await s3("get_object", Key="k", Range=wanted)
    assert got["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert (got["Body"], got["ContentRange"]) == (body[found], content_range)
    head = await s3("head_object", Key="k", Range=wanted)
    assert head["ContentLength"] == len(body[found])


@pytest.mark.parametrize("wanted", ["bytes=5-2", "bytes=0-1,3-4", "lines=0-1", "bytes=-"])
async def test_a_range_that_s3_does_not_understand_is_ignored(s3: Caller, wanted: str) -> None:
    await s3("put_object", Key="k", Body=b"0123456789")
    got = await s3("get_object", Key="k", Range=wanted)
    assert (got["ResponseMetadata"]["HTTPStatusCode"], got["Body"]) == (200, b"0123456789")


@pytest.mark.parametrize("wanted", ["bytes=10-", "bytes=10-20", "bytes=-0"])
async def test_a_range_behind_the_end_is_416(s3: Caller, wanted: str) -> None:
    await s3("put_object", Key="k", Body=b"0123456789")
    with pytest.raises(ClientError) as caught:
        await s3("get_object", Key="k", Range=wanted)
    metadata = caught.value.response["ResponseMetadata"]
    assert (metadata["HTTPStatusCode"], metadata["HTTPHeaders"]["content-range"]) == (416, "bytes */10")


async def test_conditions_hold_or_are_refused(s3: Caller) -> None:
    etag = (await s3("put_object", Key="k", Body=b"one"))["ETag"]
    assert (await s3("get_object", Key="k", IfMatch=etag, Range="bytes=1-"))["Body"] == b"ne"
    assert await s3.refused("get_object", Key="k", IfMatch='"other"') == (412, "PreconditionFailed")
    assert (await s3.refused("get_object", Key="k", IfNoneMatch=etag))[0] == 304
    assert (await s3("get_object", Key="k", IfNoneMatch='"other"'))["Body"] == b"one"
    assert await s3.refused("put_object", Key="k", Body=b"two", IfNoneMatch="*") == (412, "PreconditionFailed")
    assert await s3.refused("put_object", Key="k", Body=b"two", IfMatch='"other"') == (412, "PreconditionFailed")
    await s3("put_object", Key="k", Body=b"two", IfMatch=etag)
    assert await s3.refused("get_object", Key="k", IfMatch=etag) == (412, "PreconditionFailed")


async def test_a_multipart_upload_becomes_one_object(s3: Caller) -> None:
    bodies = [os.urandom(PART), os.urandom(PART + 7), b"end"]
    upload = (await s3("create_multipart_upload", Key="m", ContentType="text/csv", Metadata={"a": "b"}))["UploadId"]
    parts = []
    for number, body in enumerate(bodies, 1):
        done = await s3("upload_part", Key="m", UploadId=upload, PartNumber=number, Body=body)
        parts.append({"PartNumber": number, "ETag": done["ETag"], "ChecksumCRC32": done["ChecksumCRC32"]})
    assert await s3.refused("get_object", Key="m") == (404, "NoSuchKey")
    assert [one["UploadId"] for one in (await s3("list_multipart_uploads"))["Uploads"]] == [upload]
    listed = await s3("list_parts", Key="m", UploadId=upload, MaxParts=2)
    assert [one["Size"] for one in listed["Parts"]] == [PART, PART + 7]
    assert listed["NextPartNumberMarker"] == 2
    wanted = {"Key": "m", "UploadId": upload, "MultipartUpload": {"Parts": parts}}
    first = await s3("complete_multipart_upload", **wanted)
    again = await s3("complete_multipart_upload", **wanted)
    digests = b"".join(hashlib.md5(body).digest() for body in bodies)  # noqa: S324 - that is what an ETag is
    assert first["ETag"] == again["ETag"] == f'"{hashlib.md5(digests).hexdigest()}-3"'  # noqa: S324 - as above
    whole = b"".join(bodies)
    got = await s3("get_object", Key="m")
    assert (got["Body"], got["ContentType"], got["Metadata"]) == (whole, "text/csv", {"a": "b"})
    across = await s3("get_object", Key="m", Range=f"bytes={PART - 3}-{2 * PART + 8}")
    assert across["Body"] == whole[PART - 3 : 2 * PART + 9]
    assert "Uploads" not in await s3("list_multipart_uploads")


async def test_a_part_sent_again_replaces_the_first(s3: Caller, sandbox: Sandbox) -> None:
    upload = (await s3("create_multipart_upload", Key="m"))["UploadId"]
    old = await s3("upload_part", Key="m", UploadId=upload, PartNumber=1, Body=b"old")
    new = await s3("upload_part", Key="m", UploadId=upload, PartNumber=1, Body=b"new")

    def wanted(part: dict[str, Any]) -> dict[str, Any]:
        return {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}

    refused = await s3.refused("complete_multipart_upload", Key="m", UploadId=upload, MultipartUpload=wanted(old))
    assert refused == (400, "InvalidPart")
    await s3("complete_multipart_upload", Key="m", UploadId=upload, MultipartUpload=wanted(new))
    assert (await s3("get_object", Key="m"))["Body"] == b"new"
    assert len(list(sandbox.directory.glob("blobs/*/*"))) == 1


async def test_uploads_that_s3_refuses_are_refused(s3: Caller, sandbox: Sandbox) -> None:
    upload = (await s3("create_multipart_upload", Key="m"))["UploadId"]
    etags = [
        (await s3("upload_part", Key="m", UploadId=upload, PartNumber=number, Body=b"small"))["ETag"]
        for number in (1, 2)
    ]

    async def complete(*numbers: int, key: str = "m", etag: str = etags[0]) -> tuple[int, str]:
        parts = [{"PartNumber": number, "ETag": etag} for number in numbers]
        given = {"Key": key, "UploadId": upload, "MultipartUpload": {"Parts": parts}}
        return await s3.refused("complete_multipart_upload", **given)

    assert await complete(1, 2) == (400, "EntityTooSmall")
    assert await complete(2, 1) == (400, "InvalidPartOrder")
    assert await complete(1, 3) == (400, "InvalidPart")
    assert await complete(1, etag='"0"') == (400, "InvalidPart")
    assert await complete() == (400, "MalformedXML")
    assert await complete(1, key="other") == (404, "NoSuchUpload")
    part = {"Key": "m", "UploadId": upload, "Body": b""}
    assert await s3.refused("upload_part", PartNumber=10_001, **part) == (400, "InvalidArgument")
    await s3("abort_multipart_upload", Key="m", UploadId=upload)
    assert await s3.refused("upload_part", PartNumber=1, **part) == (404, "NoSuchUpload")
    assert await s3.refused("list_parts", Key="m", UploadId=upload) == (404, "NoSuchUpload")
    assert list(sandbox.directory.glob("blobs/*/*")) == []


async def test_bodies_that_are_not_what_they_promise_leave_nothing(s3: Caller, sandbox: Sandbox) -> None:
    wrong = base64.b64encode(b"\0" * 16).decode()
    put = {"Key": "k", "Body": b"content"}
    assert await s3.refused("put_object", ContentMD5=wrong, **put) == (400, "BadDigest")
    assert await s3.refused("put_object", ContentMD5="nonsense", **put) == (400, "InvalidDigest")
    assert await s3.refused("put_object", ChecksumCRC32="AAAAAA==", **put) == (400, "BadDigest")
    sha256 = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
    assert await s3.refused("put_object", ChecksumSHA256=sha256, **put) == (400, "BadDigest")
    assert list(sandbox.directory.glob("blobs/*/*")) == []
    good = base64.b64encode(hashlib.sha256(b"content").digest()).decode()
    assert (await s3("put_object", ChecksumSHA256=good, **put))["ChecksumSHA256"] == good


async def test_lists_are_paged_and_folded_like_those_of_s3(s3: Caller) -> None:
    keys = sorted(["a", "b/1", "b/2", "b/c/1", "b-", "c/1", "d e", "é"])
    for key in keys:
        await s3("put_object", Key=key, Body=b"x")

    async def listed(**options: Any) -> list[tuple[list[str], list[str]]]:
        pages: list[tuple[list[str], list[str]]] = []
        more: dict[str, str] = {}
        while True:
            page = await s3("list_objects_v2", **options, **more)
            contents = [one["Key"] for one in page.get("Contents", [])]
            pages.append((contents, [one["Prefix"] for one in page.get("CommonPrefixes", [])]))
            if not page["IsTruncated"]:
                return pages
            more = {"ContinuationToken": page["NextContinuationToken"]}

    assert await listed() == [(keys, [])]
    assert await listed(MaxKeys=3) == [(keys[:3], []), (keys[3:6], []), (keys[6:], [])]
    assert await listed(Delimiter="/") == [(["a", "b-", "d e", "é"], ["b/", "c/"])]
    assert await listed(Delimiter="/", MaxKeys=2) == [(["a", "b-"], []), ([], ["b/", "c/"]), (["d e", "é"], [])]
    assert await listed(Delimiter="/", Prefix="b/") == [(["b/1", "b/2"], ["b/c/"])]
    assert await listed(StartAfter="c/1") == [(["d e", "é"], [])]
    first = await s3("list_objects", Delimiter="/", MaxKeys=3)
    rest = await s3("list_objects", Delimiter="/", Marker=first["NextMarker"])
    assert [one["Prefix"] for one in (*first["CommonPrefixes"], *rest["CommonPrefixes"])] == ["b/", "c/"]
    await s3("delete_objects", Delete={"Objects": [{"Key": key} for key in keys]})
    assert await listed() == [([], [])]


async def test_what_is_not_implemented_says_so(s3: Caller) -> None:
    await s3("put_object", Key="k", Body=b"x")
    assert await s3.refused("get_object_acl", Key="k") == (501, "NotImplemented")
    assert await s3.refused("copy_object", Key="j", CopySource=f"{BUCKET}/k") == (501, "NotImplemented")
    assert await s3.refused("put_object", Key="k", Body=b"", ServerSideEncryption="aws:kms") == (501, "NotImplemented")


async def test_writers_at_the_same_time_each_write_whole_objects(s3: Caller) -> None:
    bodies = [bytes([number]) * 400_000 for number in range(8)]
    await asyncio.gather(*(s3("put_object", Key="k", Body=body) for body in bodies))
    reads = await asyncio.gather(*(s3("get_object", Key="k") for _ in range(4)))
    assert {one["Body"] for one in reads} <= set(bodies)
    assert len({one["ETag"] for one in reads}) == 1


async def test_a_reader_keeps_the_object_that_it_began_with(s3: Caller, sandbox: Sandbox) -> None:
    body = os.urandom(30_000_000)
    await s3("put_object", Key="k", Body=body)

    def read(replace: Callable[[], None]) -> bytes:
        stream = s3.client.get_object(Bucket=BUCKET, Key="k")["Body"]
        with stream:
            begin: bytes = stream.read(1000)
            replace()
            rest: bytes = stream.read()
        return begin + rest

    def replace() -> None:
        s3.client.put_object(Bucket=BUCKET, Key="k", Body=b"new")

    assert await asyncio.to_thread(read, replace) == body
    assert len(list((sandbox.directory / "blobs").glob("*/*"))) == 1
