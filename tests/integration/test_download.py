"""Downloads over real HTTP: whole and verified, or not at all."""

from __future__ import annotations

import asyncio
import errno
import gzip
import hashlib
import json
import os
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.abc import ResolveResult
from aiohttp.resolver import DefaultResolver
from yarl import URL

from agent.adapters.download import Downloader
from agent.adapters.ovation import Ovation
from agent.adapters.remote import RemoteGuard
from agent.errors import StorageError, StorageMismatch, StorageRefused, StorageUnavailable
from agent.sandbox.server import Sandbox
from agent.settings import OvationSettings
from tests.integration.raw_server import Answer, RawServer, answer
from tests.integration.sandbox_fixtures import s3_client, sandbox_process

MEBIBYTE = 1 << 20
LOCAL = ("127.0.0.1",)


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path / "sandbox") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "inputs"
    path.mkdir()
    return path


def settings(sandbox: Sandbox) -> OvationSettings:
    return OvationSettings.model_validate(
        {"api_url": sandbox.api_url, "token": sandbox.service_token, "hosts": (sandbox.services_url,)}
    )


async def presigned(sandbox: Sandbox, revision: dict[str, Any]) -> str:
    async with Ovation.open(settings(sandbox)) as ovation:
        found = await ovation.download(revision)
    assert not found.remote
    return found.url


def content_of(size: int) -> bytes:
    return bytes(range(251)) * (size // 251) + bytes(size % 251)


def revision_of(sandbox: Sandbox, content: bytes) -> dict[str, Any]:
    project = sandbox.admin.create_project("Project")
    return sandbox.admin.create_revision(project["_id"], "data.bin", content)


async def refused(folder: Path, given: Answer, *, remote: bool = False, stall_seconds: float = 20) -> StorageError:
    """Fetch from a server that answers so, and return the error; nothing may be left."""
    async with RawServer(given) as server, Downloader(LOCAL, stall_seconds) as downloader:
        with pytest.raises(StorageError) as caught:
            await downloader.fetch(f"{server.url}/x?secret", folder / "file", remote=remote, name="data.csv")
    assert list(folder.iterdir()) == []
    assert str(caught.value).startswith("data.csv: ")
    assert "secret" not in str(caught.value)
    assert server.url not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("size", [0, 1, 5 * MEBIBYTE + 3])
async def test_the_bytes_arrive_and_are_counted_and_hashed(sandbox: Sandbox, folder: Path, size: int) -> None:
    content = content_of(size)
    seen: list[int] = []
    async with Downloader() as downloader:
        url = await presigned(sandbox, revision_of(sandbox, content))
        fetched = await downloader.fetch(url, folder / "file", remote=False, name="x", progress=seen.append)
    assert (fetched.size, fetched.sha256) == (size, hashlib.sha256(content).hexdigest())
    assert (folder / "file").read_bytes() == content
    assert sum(seen) == size
    assert [path.name for path in folder.iterdir()] == ["file"]


async def test_a_name_of_255_bytes(sandbox: Sandbox, folder: Path) -> None:
    async with Downloader() as downloader:
        url = await presigned(sandbox, revision_of(sandbox, b"content"))
        await downloader.fetch(url, folder / ("ü" * 127 + "x"), remote=False, name="x")
    assert (folder / ("ü" * 127 + "x")).read_bytes() == b"content"


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ({"kind": "close", "after_bytes": 1000}, StorageUnavailable, "broke off"),
        ({"kind": "reset", "after_bytes": 1000}, StorageUnavailable, "broke off"),
        ({"kind": "expired_url"}, StorageUnavailable, "address had expired"),
        ({"kind": "status", "status": 404}, StorageRefused, "not there"),
        ({"kind": "status", "status": 416}, StorageRefused, "answers 416"),
        ({"kind": "status", "status": 301}, StorageRefused, "answers 301"),
        ({"kind": "status", "status": 206}, StorageRefused, "answers 206"),
        ({"kind": "status", "status": 500}, StorageUnavailable, "answers 500"),
        ({"kind": "status", "status": 503}, StorageUnavailable, "answers 503"),
        ({"kind": "status", "status": 429}, StorageUnavailable, "answers 429"),
        ({"kind": "black_hole"}, StorageUnavailable, "no byte arrived for 0.3 s"),
    ],
    ids=lambda value: f"{value['kind']}-{value.get('status', '')}" if isinstance(value, dict) else "",
)
async def test_what_goes_wrong_is_told_and_the_next_try_works(
    sandbox: Sandbox, folder: Path, fault: dict[str, Any], error: type[StorageError], words: str
) -> None:
    content = content_of(3 * MEBIBYTE)
    url = await presigned(sandbox, revision_of(sandbox, content))
    sandbox.faults.add(**{"target": "store", "times": 1, **fault})
    async with Downloader(stall_seconds=0.3) as downloader:
        with pytest.raises(error, match=words):
            await downloader.fetch(url, folder / "file", remote=False, name="data.csv")
        assert list(folder.iterdir()) == []
        await downloader.fetch(url, folder / "file", remote=False, name="data.csv")
    assert (folder / "file").read_bytes() == content


async def test_a_slow_drip_is_not_a_stall(sandbox: Sandbox, folder: Path) -> None:
    content = content_of(3000)
    url = await presigned(sandbox, revision_of(sandbox, content))
    sandbox.faults.add("drip", target="store", bytes_per_second=2000)
    began = time.monotonic()
    async with Downloader(stall_seconds=0.5) as downloader:
        await downloader.fetch(url, folder / "file", remote=False, name="x")
    assert time.monotonic() - began > 1
    assert (folder / "file").read_bytes() == content


async def test_a_stall_in_the_middle_is_cut(folder: Path) -> None:
    async def stall(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"x" * 100, content_length="200"))
        await asyncio.sleep(30)

    error = await refused(folder, stall, stall_seconds=0.3)
    assert isinstance(error, StorageUnavailable)
    assert "no byte arrived for 0.3 s" in str(error)


async def test_the_etag_of_parts_is_not_taken_for_an_md5(sandbox: Sandbox, folder: Path) -> None:
    revision = revision_of(sandbox, b"old")
    url = await presigned(sandbox, revision)
    bucket, _, key = URL(url).path.lstrip("/").partition("/")
    client = s3_client(sandbox.admin.store_environment())
    target = {"Bucket": bucket, "Key": key}
    content = content_of(6 * MEBIBYTE)

    def upload() -> str:
        upload_id = client.create_multipart_upload(**target)["UploadId"]
        pieces = [content[: 5 * MEBIBYTE], content[5 * MEBIBYTE :]]
        parts = [
            {
                "PartNumber": number,
                "ETag": client.upload_part(**target, UploadId=upload_id, PartNumber=number, Body=piece)["ETag"],
            }
            for number, piece in enumerate(pieces, 1)
        ]
        done = client.complete_multipart_upload(**target, UploadId=upload_id, MultipartUpload={"Parts": parts})
        return str(done["ETag"])

    assert (await asyncio.to_thread(upload)).endswith('-2"')
    async with Downloader() as downloader:
        await downloader.fetch(url, folder / "file", remote=False, name="x")
    assert (folder / "file").read_bytes() == content


WRONG = f'"{"0" * 32}"'


@pytest.mark.parametrize(
    ("given", "remote", "is_kept"),
    [
        (answer(b"content", ETag=WRONG), False, False),
        (answer(b"content", ETag=f'"{hashlib.md5(b"content", usedforsecurity=False).hexdigest()}"'), False, True),
        (answer(b"content", ETag=WRONG, x_amz_server_side_encryption="AES256"), False, False),
        (answer(b"content", ETag=WRONG, x_amz_server_side_encryption="aws:kms"), False, True),
        (answer(b"content", ETag=f"W/{WRONG}"), False, True),
        (answer(b"content", ETag=WRONG), True, True),  # a stranger's ETag may be anything
    ],
)
async def test_whose_etag_is_an_md5(folder: Path, given: bytes, remote: bool, is_kept: bool) -> None:
    if not is_kept:
        assert isinstance(await refused(folder, given, remote=remote), StorageMismatch)
        return
    async with RawServer(given) as server, Downloader(LOCAL) as downloader:
        await downloader.fetch(server.url, folder / "file", remote=remote, name="x")
    assert (folder / "file").read_bytes() == b"content"


async def test_without_a_length_the_end_of_the_chunks_decides(folder: Path) -> None:
    chunks = b"4\r\nfour\r\n3\r\nsix\r\n0\r\n\r\n"
    given = answer(chunks, content_length="", transfer_encoding="chunked")
    async with RawServer(given) as server, Downloader(LOCAL) as downloader:
        fetched = await downloader.fetch(server.url, folder / "file", remote=False, name="x")
    assert fetched.size == 7
    assert (folder / "file").read_bytes() == b"foursix"
    (folder / "file").unlink()
    error = await refused(folder, answer(chunks[:-5], content_length="", transfer_encoding="chunked"))
    assert isinstance(error, StorageUnavailable)


async def test_compressed_by_a_stranger_the_bytes_are_kept_as_sent(folder: Path) -> None:
    body = gzip.compress(b"content")
    async with RawServer(answer(body, content_encoding="gzip")) as server, Downloader(LOCAL) as downloader:
        await downloader.fetch(server.url, folder / "file", remote=True, name="x")
    assert (folder / "file").read_bytes() == body
    assert "accept-encoding: identity" in server.heard[0].lower()


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (answer(status=401), StorageRefused),
        (answer(status=403), StorageRefused),
        (answer(status=404), StorageRefused),
        (answer(status=503), StorageMismatch),
        (answer(b"half", content_length="8"), StorageMismatch),
        (b"nonsense\r\n\r\n", StorageMismatch),
        (b"", StorageMismatch),
        (answer(status=302), StorageRefused),
        (answer(status=302, location="file:///etc/passwd"), StorageRefused),
        (answer(status=302, location="ftp://example.org/x"), StorageRefused),
        (answer(status=302, location="http://[::1"), StorageRefused),
        (answer(status=302, location="http://169.254.169.254/latest/meta-data/"), StorageRefused),
        (answer(status=302, location="http://localhost/"), StorageRefused),
        (answer(status=302, location="//[::ffff:10.0.0.1]/"), StorageRefused),
    ],
)
async def test_a_stranger_that_is_away_is_tried_again_a_few_times_and_one_that_refuses_is_not(
    folder: Path, given: bytes, error: type[StorageError]
) -> None:
    found = await refused(folder, given, remote=True)
    assert type(found) is error
    assert "object store" not in str(found)


async def test_redirects_of_a_stranger_are_followed_so_far(folder: Path) -> None:
    def hop(number: int) -> bytes:
        return answer(status=302, location=f"/hop {number}?ä=%20")

    async with RawServer(*map(hop, range(5)), answer(b"content")) as server, Downloader(LOCAL) as downloader:
        await downloader.fetch(f"{server.url}/first", folder / "file", remote=True, name="x")
        assert [line.split()[1] for line in server.heard][:2] == ["/first", "/hop%200?%C3%A4=%20"]
    (folder / "file").unlink()
    error = await refused(folder, hop(0), remote=True)
    assert "more than 5 redirects" in str(error)


async def test_a_stranger_gets_neither_token_nor_cookie(sandbox: Sandbox, folder: Path) -> None:
    cookies = answer(status=302, location="/next", set_cookie="a=b; Path=/")
    async with RawServer(cookies, answer(b"1"), answer(b"2")) as server, Downloader(LOCAL) as downloader:
        project = sandbox.admin.create_project("Project")
        made = sandbox.admin.remote_revision(project["_id"], "remote", f"{server.url}/data")
        async with Ovation.open(settings(sandbox)) as ovation:
            found = await ovation.download(made)
        assert found.remote
        for name in ("one", "two"):
            await downloader.fetch(found.url, folder / name, remote=True, name=name)
    assert len(server.heard) == 3
    for heard in server.heard:
        assert "authorization" not in heard.lower()
        assert "cookie" not in heard.lower()
        assert sandbox.service_token not in heard


INSIDE = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0177.0.0.1",
    "0x7f000001",
    "0x7f.1",
    "１２７.0.0.1",  # noqa: RUF001 wide digits are sent as plain ones
    "0.0.0.0",  # noqa: S104 one more spelling of this machine
    "0",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "169.254.169.254",
    "224.0.0.1",
    "255.255.255.255",
    "240.0.0.1",
    "localhost",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:a00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::10.0.0.1]",
    "[64:ff9b:1::1]",
    "[2002:7f00:1::]",
    "[2002:808:808::]",
    "[fe80::1]",
    "[fe80::1%25lo]",
    "[fc00::1]",
    "[fd12:3456::1]",
    "[fec0::1]",
    "[ff02::1]",
]


@pytest.mark.parametrize("host", INSIDE)
async def test_no_spelling_of_an_address_inside_is_read(folder: Path, host: str) -> None:
    async with RawServer(answer(b"inside")) as server, Downloader() as downloader:
        with pytest.raises(StorageRefused, match=r"AGENT_REMOTE_HOSTS|cannot be read"):
            await downloader.fetch(f"http://{host}:{server.port}/", folder / "file", remote=True, name="x")
    assert server.heard == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["", "/etc/passwd", "file:///etc/passwd", "ftp://example.org/", "http://", "http://[", "x"]
)
async def test_what_is_no_address_on_the_web_is_refused(folder: Path, url: str) -> None:
    async with Downloader(LOCAL) as downloader:
        for remote in (True, False):
            with pytest.raises(StorageRefused):
                await downloader.fetch(url, folder / "file", remote=remote, name="x")


@pytest.mark.parametrize("host", ["8.8.8.8", "[2606:4700::1111]", "[64:ff9b::8.8.8.8]", "example.org"])
async def test_what_is_out_on_the_internet_may_be_read(host: str) -> None:
    RemoteGuard().check(URL(f"http://{host}/"))


def answer_dns(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Have names resolve to these, one answer after the other; return what was asked."""
    asked: list[str] = []
    left = list(answers)

    async def resolve(_: object, host: str, port: int = 0, family: int = socket.AF_INET) -> list[ResolveResult]:
        asked.append(host)
        given = left.pop(0) if len(left) > 1 else left[0]
        if not given:
            raise OSError(None, "Name or service not known")
        return [
            ResolveResult(hostname=host, host=each, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST)
            for each in given
        ]

    monkeypatch.setattr(DefaultResolver, "resolve", resolve)
    return asked


@pytest.mark.parametrize("found", [["10.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["fe80::1%eth0"], ["::ffff:192.168.0.1"]])
async def test_a_name_that_stands_for_an_address_inside_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, found: list[str]
) -> None:
    answer_dns(monkeypatch, found)
    async with Downloader() as downloader:
        with pytest.raises(StorageRefused, match=r"evil\.example is inside this network"):
            await downloader.fetch("http://evil.example/", folder / "file", remote=True, name="x")
        results = await asyncio.gather(
            *(downloader.fetch("http://evil.example/", folder / name, remote=True, name="x") for name in "abc"),
            return_exceptions=True,
        )
        assert [type(each) for each in results] == [StorageRefused] * 3


async def test_the_address_that_was_judged_is_the_one_that_is_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS that says something harmless first, and an address inside whenever it is asked again."""
    monkeypatch.setattr("agent.adapters.remote._is_on_the_internet", lambda address: address != "127.0.0.2")
    async with RawServer(answer(b"outside")) as server, Downloader() as downloader:
        inside = await asyncio.start_server(lambda *_: pytest.fail("was connected to"), "127.0.0.2", server.port)
        asked = answer_dns(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
        async with inside:
            url = f"http://rebinding.example:{server.port}/"
            await downloader.fetch(url, folder / "file", remote=True, name="x")
            assert asked == ["rebinding.example"]
        assert len(server.heard) == 1
    async with Downloader() as downloader:
        with pytest.raises(StorageRefused):
            await downloader.fetch(url, folder / "file", remote=True, name="x")


async def test_a_stranger_whose_name_is_unknown_is_not_waited_out_for_ever(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_dns(monkeypatch, [])
    async with Downloader() as downloader:
        with pytest.raises(StorageMismatch, match="cannot be reached"):
            await downloader.fetch("http://gone.example/", folder / "file", remote=True, name="x")
        with pytest.raises(StorageUnavailable):
            await downloader.fetch("http://127.0.0.1:1/", folder / "file", remote=False, name="x")


async def test_the_operator_may_allow_a_host_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_dns(monkeypatch, ["127.0.0.1"])
    async with (
        RawServer(answer(b"content")) as server,
        Downloader(("Data.Example", "[::1]", "127.0.0.1")) as downloader,
    ):
        for host in ("data.example", "DATA.example.", "127.0.0.1"):
            await downloader.fetch(f"http://{host}:{server.port}/", folder / "file", remote=True, name="x")
        with pytest.raises(StorageRefused):
            await downloader.fetch(f"http://other.example:{server.port}/", folder / "file", remote=True, name="x")
        with pytest.raises(StorageRefused):
            await downloader.fetch(f"http://127.0.0.2:{server.port}/", folder / "file", remote=True, name="x")


async def test_leftovers_and_planted_links_are_replaced_and_never_written_through(folder: Path, tmp_path: Path) -> None:
    part = folder / f".{hashlib.sha256(b'file').hexdigest()[:32]}.part"
    (tmp_path / "victim").write_text("precious")
    async with RawServer(answer(b"content")) as server, Downloader(LOCAL) as downloader:
        part.symlink_to(tmp_path / "victim")
        (folder / "file").symlink_to(tmp_path / "victim")
        await downloader.fetch(server.url, folder / "file", remote=False, name="x")
        assert not (folder / "file").is_symlink()
        part.hardlink_to(tmp_path / "victim")
        await downloader.fetch(server.url, folder / "file", remote=False, name="x")
        part.write_bytes(b"longer than what comes now")
        await downloader.fetch(server.url, folder / "file", remote=False, name="x")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (folder / "file").read_bytes() == b"content"
    assert [path.name for path in folder.iterdir()] == ["file"]


async def test_a_failure_leaves_what_stood_there_before(folder: Path) -> None:
    (folder / "file").write_text("before")
    async with RawServer(answer(b"half", content_length="8")) as server, Downloader(LOCAL) as downloader:
        with pytest.raises(StorageUnavailable):
            await downloader.fetch(server.url, folder / "file", remote=False, name="x")
    assert (folder / "file").read_text() == "before"
    assert [path.name for path in folder.iterdir()] == ["file"]


async def test_cancelled_in_the_middle_it_leaves_nothing(folder: Path) -> None:
    began = asyncio.Event()

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"x" * 100, content_length="200"))
        await asyncio.sleep(30)

    async with RawServer(drip) as server, Downloader(LOCAL) as downloader:
        task = asyncio.create_task(
            downloader.fetch(server.url, folder / "file", remote=False, name="x", progress=lambda _: began.set())
        )
        await asyncio.wait_for(began.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert list(folder.iterdir()) == []


async def test_a_full_disk_is_an_error_of_this_machine(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with RawServer(answer(bytes(3 * MEBIBYTE))) as server, Downloader(LOCAL) as downloader:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MEBIBYTE, hard))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                await downloader.fetch(server.url, folder / "file", remote=False, name="x")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not isinstance(caught.value, StorageError)
    assert caught.value.errno == errno.EFBIG
    assert list(folder.iterdir()) == []


_LARGE = """
import asyncio, hashlib, json, resource, sys
from pathlib import Path
from agent.adapters.download import Downloader
async def main():
    async with Downloader() as downloader:
        await downloader.fetch(sys.argv[1], Path(sys.argv[3]), remote=False, name="small")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fetched = await downloader.fetch(sys.argv[2], Path(sys.argv[3]), remote=False, name="large")
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([fetched.size, fetched.sha256, after - before]))
asyncio.run(main())
"""


async def test_300_mb_take_no_memory(tmp_path: Path) -> None:
    size = 300 * MEBIBYTE
    async with sandbox_process(tmp_path / "sandbox") as sandbox:
        environment = sandbox.details["store_environment"]
        client = await asyncio.to_thread(lambda: s3_client(environment, signature_version="s3v4"))
        large = tmp_path / "large"
        with large.open("wb") as file:
            file.truncate(size)
        with large.open("rb") as file:
            await asyncio.to_thread(client.put_object, Bucket="ovation-sandbox", Key="large", Body=file)
        await asyncio.to_thread(client.put_object, Bucket="ovation-sandbox", Key="small", Body=bytes(3 * MEBIBYTE))
        urls = [
            client.generate_presigned_url("get_object", {"Bucket": "ovation-sandbox", "Key": key})
            for key in ("small", "large")
        ]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _LARGE, *urls, str(tmp_path / "file")),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        out, _ = await asyncio.wait_for(process.communicate(), 60)
    found_size, sha256, grown_kib = json.loads(out)
    digest = hashlib.sha256()
    for _ in range(300):
        digest.update(bytes(MEBIBYTE))
    assert (found_size, sha256) == (size, digest.hexdigest())
    assert grown_kib < 20 * 1024


@pytest.mark.parametrize(("most_bytes", "is_kept"), [(6, False), (7, True)])
async def test_a_stranger_that_never_stops_sending_is_cut(folder: Path, most_bytes: int, is_kept: bool) -> None:
    async with RawServer(answer(b"content")) as server, Downloader(LOCAL, remote_max_bytes=most_bytes) as downloader:
        if is_kept:
            fetched = await downloader.fetch(server.url, folder / "file", remote=True, name="x")
            assert fetched.size == most_bytes
            return
        with pytest.raises(StorageRefused, match="x: it is larger than 6 bytes"):
            await downloader.fetch(server.url, folder / "file", remote=True, name="x")
    assert list(folder.iterdir()) == []
