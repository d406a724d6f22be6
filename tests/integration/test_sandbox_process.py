"""The sandbox as a process of its own: it starts, keeps its data, needs little memory, and stops."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agent.sandbox.server import Sandbox
from agent.sandbox.settings import BUCKET
from tests.integration.sandbox_fixtures import Receiver, SandboxProcess, s3_client, sandbox_process, until

MEBIBYTE = 1024 * 1024
SIZE = 300 * MEBIBYTE
BLOCK = bytes(range(256)) * 4096


async def blocks() -> AsyncIterator[bytes]:
    for _ in range(SIZE // len(BLOCK)):
        yield BLOCK


def memory(running: SandboxProcess, field: str) -> int:
    """Return a figure of the process's memory in bytes (proc_pid_status(5))."""
    lines = Path(f"/proc/{running.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def presigned(running: SandboxProcess, method: str) -> str:
    client = s3_client(running.details["store_environment"], signature_version="s3v4")
    return str(client.generate_presigned_url(method, {"Bucket": BUCKET, "Key": "large"}))


async def test_large_objects_take_little_memory(tmp_path: Path) -> None:
    async with sandbox_process(tmp_path / "sandbox") as running, aiohttp.ClientSession() as http:
        before = await asyncio.to_thread(memory, running, "VmRSS")
        headers = {"Content-Length": str(SIZE)}
        async with http.put(presigned(running, "put_object"), data=blocks(), headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            etag = answer.headers["ETag"]
        digest = hashlib.md5(usedforsecurity=False)
        async with http.get(presigned(running, "get_object")) as answer:
            async for chunk in answer.content.iter_chunked(MEBIBYTE):
                digest.update(chunk)
        assert etag == f'"{digest.hexdigest()}"'
        peak = await asyncio.to_thread(memory, running, "VmHWM")
        assert peak - before < 32 * MEBIBYTE
        assert peak < 192 * MEBIBYTE


async def test_what_it_holds_survives_a_kill(tmp_path: Path) -> None:
    directory = tmp_path / "sandbox"
    async with sandbox_process(directory) as running:
        project = await running.admin("create_project", name="P", owner="a@example.org")
        revision = await running.admin("create_revision", parent_id=project["_id"], name="a.txt", content="kept")
        activity = await running.admin("create_activity", project_id=project["_id"], name="A", inputs=[revision["_id"]])
        token = (await running.admin("create_user", email="a@example.org"))["token"]
        client = s3_client(running.details["store_environment"])
        await asyncio.to_thread(client.create_multipart_upload, Bucket=BUCKET, Key="unfinished")
        keys = running.details["store_environment"]
        (directory / "blobs" / "00").mkdir(exist_ok=True)
        (directory / "blobs" / "00" / "half.part").write_text("half written")
        running.process.kill()
        await running.process.wait()
    async with sandbox_process(directory) as again, aiohttp.ClientSession() as http:
        headers = {"Authorization": f"Bearer {token}"}
        async with http.get(again.api_url + activity["relationships"]["inputs"]["related"], headers=headers) as answer:
            (found,) = (await answer.json())["inputs"]
        assert (found["_id"], found["attributes"]["content_length"]) == (revision["_id"], 4)
        async with http.get(found["attributes"]["url"], headers=headers) as answer:
            url = (await answer.json())["url"]
        async with http.get(url) as answer:
            assert await answer.text() == "kept"
        client = s3_client({**keys, "AWS_ENDPOINT_URL_S3": again.details["s3_url"]})
        uploads = await asyncio.to_thread(client.list_multipart_uploads, Bucket=BUCKET)
        assert [one["Key"] for one in uploads["Uploads"]] == ["unfinished"]
        assert not (directory / "blobs" / "00" / "half.part").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_it_stops_in_order_when_it_is_told_to(tmp_path: Path, number: signal.Signals) -> None:
    async with sandbox_process(tmp_path / "sandbox") as running:
        running.process.send_signal(number)
        assert await asyncio.wait_for(running.process.wait(), 10) == 0
        assert running.process.stdout is not None
        assert await running.process.stdout.read() == b""


async def test_its_one_line_has_no_secrets_and_its_file_is_private(tmp_path: Path) -> None:
    directory = tmp_path / "sandbox"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent.sandbox", "--directory", str(directory)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    line: dict[str, Any] = json.loads(await process.stdout.readline())
    process.terminate()
    await process.wait()
    assert set(line) == {"api_url", "auth_url", "services_url", "s3_url", "details"}
    details = Path(line["details"])
    assert stat.S_IMODE(details.stat().st_mode) == 0o600
    assert {"environment", "control_token", "store_environment"} <= json.loads(details.read_text()).keys()


async def test_two_sandboxes_do_not_share_a_directory(tmp_path: Path) -> None:
    async with Sandbox(tmp_path / "sandbox"):
        with pytest.raises(RuntimeError, match="another sandbox runs in"):
            async with Sandbox(tmp_path / "sandbox"):
                pass


async def test_it_is_steered_from_another_process(tmp_path: Path) -> None:
    async with Receiver(statuses=[503]) as receiver:
        arguments = ("--research-backoff-seconds", "0.05")
        async with sandbox_process(tmp_path / "sandbox", *arguments) as running:
            await running.admin("create_webhook", url=receiver.url, trigger_type="Project", api_key="k")
            await running.control("POST", "faults", {"kind": "duplicate", "target": "webhooks", "times": 1})
            await running.admin("create_project", name="P")
            await until(lambda: len(receiver.received) == 3)
            log = await running.admin("deliveries")
            assert sorted(one["status"] for one in log[:3]) == [200, 200, 503]
