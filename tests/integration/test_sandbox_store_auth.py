"""Who may do what in the object store: signatures, temporary credentials, presigned URLs, signed chunks."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

from agent.sandbox.server import Sandbox
from agent.sandbox.settings import BUCKET, SandboxSettings
from tests.integration.sandbox_fixtures import s3_client


@dataclass
class Clock:
    """A clock that a test moves on."""

    ahead_seconds: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def sandbox(tmp_path: Path, clock: Clock) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path / "sandbox", settings=SandboxSettings(clock=clock)) as running:
        yield running


@pytest.fixture
def root(sandbox: Sandbox) -> dict[str, str]:
    environment = sandbox.admin.store_environment()
    s3_client(environment).put_object  # noqa: B018 - the service model is loaded here, not within a test's time
    return environment


async def refused(client: Any, operation: str, **parameters: Any) -> tuple[int, str]:
    def call() -> None:
        getattr(client, operation)(Bucket=BUCKET, **parameters)

    with pytest.raises(ClientError) as caught:
        await asyncio.to_thread(call)
    answer = caught.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


def upload_keys(sandbox: Sandbox, name: str = "a.txt") -> tuple[dict[str, str], str]:
    """Return the environment of an upload's own credentials, and the object's key."""
    project = sandbox.model.records.entity(sandbox.admin.create_project("P")["_id"])
    assert project is not None
    file, _ = sandbox.model.add_child(sandbox.admin.service, project, {"type": "File", "attributes": {"name": name}})
    new = {"type": "Revision", "attributes": {"name": name, "content_type": "text/plain"}}
    _, _, aws = sandbox.uploads.create(sandbox.admin.service, file, new)
    environment = {
        "AWS_ACCESS_KEY_ID": aws["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": aws["secret_access_key"],
        "AWS_SESSION_TOKEN": aws["session_token"],
        "AWS_ENDPOINT_URL_S3": sandbox.s3_url,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return environment, str(aws["key"])


async def test_upload_credentials_are_good_for_their_object_only(sandbox: Sandbox) -> None:
    environment, key = upload_keys(sandbox)
    client = s3_client(environment)
    await asyncio.to_thread(client.put_object, Bucket=BUCKET, Key=key, Body=b"mine")
    await asyncio.to_thread(client.head_object, Bucket=BUCKET, Key=key)
    assert await refused(client, "put_object", Key=key + "x", Body=b"") == (403, "AccessDenied")
    assert await refused(client, "get_object", Key="other") == (403, "AccessDenied")
    assert await refused(client, "list_objects_v2") == (403, "AccessDenied")
    assert await refused(client, "create_multipart_upload", Key="other") == (403, "AccessDenied")


async def test_upload_credentials_expire(sandbox: Sandbox, clock: Clock) -> None:
    environment, key = upload_keys(sandbox)
    clock.ahead_seconds = 800
    client = s3_client(environment)
    await asyncio.to_thread(client.put_object, Bucket=BUCKET, Key=key, Body=b"in time")
    records = sandbox.model.records
    records.write("UPDATE credentials SET expires_at = ? WHERE key = ?", clock(), key)
    assert await refused(client, "put_object", Key=key, Body=b"late") == (400, "ExpiredToken")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"AWS_ACCESS_KEY_ID": "ASIANOBODY"}, (403, "InvalidAccessKeyId")),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, (403, "SignatureDoesNotMatch")),
        ({"AWS_SESSION_TOKEN": "wrong"}, (400, "InvalidToken")),
    ],
)
async def test_wrong_credentials_are_refused(
    root: dict[str, str], change: dict[str, str], expected: tuple[int, str]
) -> None:
    assert await refused(s3_client({**root, **change}), "put_object", Key="k", Body=b"x") == expected


async def test_another_region_and_the_old_signature_are_refused(sandbox: Sandbox, root: dict[str, str]) -> None:
    request, signer, _ = signed_put(sandbox, root, "k", "UNSIGNED-PAYLOAD", {})
    signer._region_name = "eu-west-1"
    signer.add_auth(request)
    assert await put(request, b"x") == (400, "AuthorizationHeaderMalformed")
    old = s3_client(root, signature_version="s3").generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": "k"})
    async with aiohttp.ClientSession() as http, http.get(old) as answer:
        assert (answer.status, "Please use AWS4-HMAC-SHA256" in await answer.text()) == (400, True)


async def test_a_session_token_is_needed(sandbox: Sandbox, root: dict[str, str]) -> None:
    status, code = await send(sandbox, {**root, "AWS_SESSION_TOKEN": ""}, "k", b"x")
    assert (status, code) == (400, "InvalidToken")


async def test_a_clock_that_is_wrong_is_refused(root: dict[str, str], clock: Clock) -> None:
    clock.ahead_seconds = 1000
    assert await refused(s3_client(root), "put_object", Key="k", Body=b"x") == (403, "RequestTimeTooSkewed")


async def test_without_a_signature_nothing_is_given(sandbox: Sandbox) -> None:
    async with aiohttp.ClientSession() as http:
        headers = {"Authorization": f"Bearer {sandbox.service_token}"}
        for given in ({}, headers):
            async with http.get(f"{sandbox.s3_url}/{BUCKET}/k", headers=given) as answer:
                assert answer.status == 403
                assert "<Code>AccessDenied</Code>" in await answer.text()


async def test_a_presigned_url_reads_one_object_until_it_expires(sandbox: Sandbox, clock: Clock) -> None:
    project = sandbox.admin.create_project("P")["_id"]
    revision = sandbox.admin.create_revision(project, "täble 1.csv", "a,b\n")
    url = await presigned(sandbox, revision)
    async with aiohttp.ClientSession() as http:
        async with http.get(url, headers={"Range": "bytes=2-"}) as answer:
            assert (answer.status, await answer.text()) == (206, "b\n")
        async with http.put(url, data=b"x") as answer:
            assert (answer.status, "SignatureDoesNotMatch" in await answer.text()) == (403, True)
        for tampered in (url.replace(revision["_id"], "0" * 36), url.replace("Expires=3600", "Expires=9999")):
            async with http.get(tampered) as answer:
                assert (answer.status, "SignatureDoesNotMatch" in await answer.text()) == (403, True)
        clock.ahead_seconds = 3601
        async with http.get(url) as answer:
            text = await answer.text()
    assert answer.status == 403
    assert "<Code>AccessDenied</Code><Message>Request has expired</Message>" in text


async def presigned(sandbox: Sandbox, revision: dict[str, Any]) -> str:
    headers = {"Authorization": f"Bearer {sandbox.service_token}"}
    async with aiohttp.ClientSession() as http, http.get(revision["attributes"]["url"], headers=headers) as answer:
        return str((await answer.json())["url"])


async def test_a_presigned_put_of_a_part_works(sandbox: Sandbox) -> None:
    environment, key = upload_keys(sandbox, "large.bin")
    client = s3_client(environment, signature_version="s3v4")

    def begin() -> tuple[str, str]:
        upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
        parameters = {"Bucket": BUCKET, "Key": key, "UploadId": upload, "PartNumber": 1}
        return upload, client.generate_presigned_url("upload_part", Params=parameters)

    upload, url = await asyncio.to_thread(begin)
    async with aiohttp.ClientSession() as http, http.put(url, data=b"part") as answer:
        assert answer.status == 200
        etag = answer.headers["ETag"]
    parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
    await asyncio.to_thread(
        client.complete_multipart_upload, Bucket=BUCKET, Key=key, UploadId=upload, MultipartUpload=parts
    )
    stored = sandbox.store.stat(BUCKET, key)
    assert stored is not None
    assert stored.size == 4


class _Signer(S3SigV4Auth):  # type: ignore[misc]  # botocore publishes no types
    """Signs with a payload kind of the test's choice."""

    kind = "UNSIGNED-PAYLOAD"

    def payload(self, request: Any) -> str:
        del request
        return self.kind


def signed_put(
    sandbox: Sandbox, root: dict[str, str], key: str, kind: str, headers: dict[str, str]
) -> tuple[Any, Any, str]:
    """Return a signed PUT: the request, its signer, its signature."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    signer = _Signer(Credentials(*(root[name] for name in names)), "s3", "us-east-1")
    signer.kind = kind
    request = AWSRequest("PUT", f"{sandbox.s3_url}/{BUCKET}/{key}", headers=headers)
    signer.add_auth(request)
    return request, signer, request.headers["Authorization"].rpartition("Signature=")[2]


async def send(
    sandbox: Sandbox, root: dict[str, str], key: str, body: bytes, kind: str = "UNSIGNED-PAYLOAD"
) -> tuple[int, str]:
    """Send one PUT and return its status and S3's code."""
    request, _, _ = signed_put(sandbox, root, key, kind, {})
    return await put(request, body)


async def put(request: Any, body: bytes) -> tuple[int, str]:
    headers = dict(request.headers.items())
    async with aiohttp.ClientSession() as http, http.put(request.url, data=body, headers=headers) as answer:
        text = await answer.text()
        return answer.status, text.partition("<Code>")[2].partition("</Code>")[0]


async def test_the_payload_hash_is_checked(sandbox: Sandbox, root: dict[str, str]) -> None:
    wrong = hashlib.sha256(b"other").hexdigest()
    assert await send(sandbox, root, "k", b"x", wrong) == (400, "XAmzContentSHA256Mismatch")
    assert await send(sandbox, root, "k", b"x", hashlib.sha256(b"x").hexdigest()) == (200, "")
    assert await send(sandbox, root, "k", b"x", "STREAMING-SOMETHING") == (501, "NotImplemented")


async def test_an_amazon_header_that_is_not_signed_is_refused(sandbox: Sandbox, root: dict[str, str]) -> None:
    request, _, _ = signed_put(sandbox, root, "k", "UNSIGNED-PAYLOAD", {})
    request.headers["x-amz-meta-owner"] = "somebody"
    assert await put(request, b"x") == (403, "AccessDenied")


def signed_chunks(signer: Any, request: Any, signature: str, chunks: list[bytes], trailer: bytes = b"") -> bytes:
    """Return a body of signed chunks, as Amazon's documentation of SigV4 streaming describes it."""
    scope = signer.credential_scope(request)
    empty = hashlib.sha256(b"").hexdigest()
    body = b""

    def sign(kind: str, *digests: str) -> str:
        lines = [f"AWS4-HMAC-SHA256-{kind}", request.context["timestamp"], scope, signature, *digests]
        return str(signer.signature("\n".join(lines), request))

    for chunk in [*chunks, b""]:
        signature = sign("PAYLOAD", empty, hashlib.sha256(chunk).hexdigest())
        body += f"{len(chunk):x};chunk-signature={signature}\r\n".encode() + chunk + (b"\r\n" if chunk else b"")
    if trailer:
        signature = sign("TRAILER", hashlib.sha256(trailer + b"\n").hexdigest())
        body += trailer + b"\r\nx-amz-trailer-signature:" + signature.encode() + b"\r\n"
    return body + b"\r\n"


@pytest.mark.parametrize("with_trailer", [False, True])
async def test_signed_chunks_are_put_together_and_checked(
    sandbox: Sandbox, root: dict[str, str], with_trailer: bool
) -> None:
    kind = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD" + ("-TRAILER" if with_trailer else "")
    chunks = [os.urandom(70_000), b"123456789"]
    crc = base64.b64encode(zlib.crc32(b"".join(chunks)).to_bytes(4, "big"))
    trailer = b"x-amz-checksum-crc32:" + crc if with_trailer else b""
    length = sum(len(chunk) for chunk in chunks)
    headers = {"Content-Encoding": "aws-chunked,gzip", "x-amz-decoded-content-length": str(length)}
    if trailer:
        headers["x-amz-trailer"] = "x-amz-checksum-crc32"
    request, signer, signature = signed_put(sandbox, root, "k", kind, headers)
    body = signed_chunks(signer, request, signature, chunks, trailer)
    assert await put(request, body) == (200, "")
    stored = sandbox.store.stat(BUCKET, "k")
    assert stored is not None
    assert sandbox.store.path(stored.blobs[0]).read_bytes() == b"".join(chunks)
    assert stored.headers["content-encoding"] == "gzip"
    tampered = body.replace(b"123456789", b"987654321")
    assert await put(request, tampered) == (403, "SignatureDoesNotMatch")
    if trailer:
        wrong = body.replace(trailer, b"x-amz-checksum-crc32:AAAAAA==")
        assert await put(request, wrong) == (403, "SignatureDoesNotMatch")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:NhCmhg==\r\n\r\n", (200, "")),
        (b"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n", (400, "BadDigest")),
        (b"5\r\nhello\r\n0\r\n\r\n", (400, "MalformedTrailerError")),
        (b"4\r\nhell\r\n0\r\nx-amz-checksum-crc32:NhCmhg==\r\n\r\n", (400, "IncompleteBody")),
        (b"5\r\nhel", (400, "IncompleteBody")),
        (b"4\r\nhello\r\n0\r\n\r\n", (400, "InvalidRequest")),
        (b"-1\r\nhello\r\n0\r\n\r\n", (400, "InvalidRequest")),
        (b"nonsense", (400, "InvalidRequest")),
        (b"5" * 10_000 + b"\r\nhello", (400, "InvalidRequest")),
    ],
)
async def test_unsigned_chunks_with_a_trailer_are_checked(
    sandbox: Sandbox, root: dict[str, str], body: bytes, expected: tuple[int, str]
) -> None:
    headers = {"x-amz-decoded-content-length": "5", "x-amz-trailer": "x-amz-checksum-crc32"}
    request, _, _ = signed_put(sandbox, root, "k", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", headers)
    assert await put(request, body) == expected
    assert (sandbox.store.stat(BUCKET, "k") is not None) == (expected == (200, ""))
