"""The object store as other programs see it: s5cmd, curl and aiobotocore."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiobotocore.session import get_session

from agent.sandbox.server import Sandbox
from agent.sandbox.settings import BUCKET


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path / "sandbox") as running:
        yield running


async def run(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    """Run a program and return what it said; fail unless it exits with 0."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], **(environment or {})},
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, (output + errors).decode()
    return output.decode()


async def test_s5cmd_copies_lists_reads_and_removes(sandbox: Sandbox, tmp_path: Path) -> None:
    environment = sandbox.admin.store_environment()
    program = Path(sys.executable).with_name("s5cmd")
    endpoint = ("--endpoint-url", environment["AWS_ENDPOINT_URL_S3"])

    async def s5cmd(*arguments: str | Path) -> str:
        return await run(program, *endpoint, *arguments, environment=environment)

    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    large = os.urandom(20_000_000)
    (tree / "large.bin").write_bytes(large)
    for number in range(30):
        (tree / "inner" / f"{number}.txt").write_text(f"small {number}")
    await s5cmd("cp", "--part-size", "6", f"{tree}/", f"s3://{BUCKET}/copy/")
    stored = sandbox.store.stat(BUCKET, "copy/large.bin")
    assert stored is not None
    assert (stored.size, stored.etag.endswith("-4")) == (20_000_000, True)
    listed = await s5cmd("ls", f"s3://{BUCKET}/copy/")
    assert "DIR  inner/" in listed
    assert " 20000000  large.bin" in listed
    assert len((await s5cmd("ls", f"s3://{BUCKET}/copy/inner/*")).splitlines()) == 30
    await s5cmd("cp", "--part-size", "6", "--concurrency", "4", f"s3://{BUCKET}/copy/large.bin", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large
    assert await s5cmd("cat", f"s3://{BUCKET}/copy/inner/7.txt") == "small 7"
    await s5cmd("rm", f"s3://{BUCKET}/copy/inner/*")
    assert [one.key for one in sandbox.store.keys(BUCKET, "", "")] == ["copy/large.bin"]


async def test_curl_follows_a_presigned_url_and_resumes(sandbox: Sandbox, tmp_path: Path) -> None:
    body = os.urandom(3_000_000)
    project = sandbox.admin.create_project("P")["_id"]
    revision = sandbox.admin.create_revision(project, "data set.bin", body)
    headers = {"Authorization": f"Bearer {sandbox.service_token}"}
    async with aiohttp.ClientSession() as http, http.get(revision["attributes"]["url"], headers=headers) as answer:
        url = (await answer.json())["url"]
    target = tmp_path / "got"
    target.write_bytes(body[:1_234_567])
    await run("curl", "--silent", "--fail", "--continue-at", "-", "--output", target, url)
    assert target.read_bytes() == body
    etag = hashlib.md5(body).hexdigest()  # noqa: S324 - that is what an ETag is
    head = await run("curl", "--silent", "--fail", "--dump-header", "-", "--output", "/dev/null", url)
    assert f'ETag: "{etag}"' in head


async def test_curl_signs_an_upload_by_itself(sandbox: Sandbox, tmp_path: Path) -> None:
    environment = sandbox.admin.store_environment()
    source = tmp_path / "source"
    source.write_text("from curl")
    settings = tmp_path / "settings"
    settings.write_text(
        f'user = "{environment["AWS_ACCESS_KEY_ID"]}:{environment["AWS_SECRET_ACCESS_KEY"]}"\n'
        f'header = "x-amz-security-token: {environment["AWS_SESSION_TOKEN"]}"\n'
        'header = "x-amz-content-sha256: UNSIGNED-PAYLOAD"\n'
        'aws-sigv4 = "aws:amz:us-east-1:s3"\n'
    )
    url = f"{sandbox.s3_url}/{BUCKET}/from-curl.txt"
    await run("curl", "--silent", "--fail-with-body", "--config", settings, "--upload-file", source, url)
    assert await run("curl", "--silent", "--fail-with-body", "--config", settings, url) == "from curl"


async def test_aiobotocore_uploads_in_parts_and_reads_back(sandbox: Sandbox) -> None:
    environment = sandbox.admin.store_environment()
    bodies = [os.urandom(5 * 1024 * 1024), b"end"]
    async with get_session().create_client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
        region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        aws_session_token=environment["AWS_SESSION_TOKEN"],
    ) as client:
        where = {"Bucket": BUCKET, "Key": "parts"}
        upload = (await client.create_multipart_upload(**where))["UploadId"]
        answers = await asyncio.gather(
            *(
                client.upload_part(**where, UploadId=upload, PartNumber=number, Body=body)
                for number, body in enumerate(bodies, 1)
            )
        )
        parts = [{"PartNumber": number, "ETag": answer["ETag"]} for number, answer in enumerate(answers, 1)]
        await client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": parts})
        answer = await client.get_object(**where)
        async with answer["Body"] as stream:
            assert await stream.read() == b"".join(bodies)
