"""What each Python contender does in its process: `python -m tests.bench.transfers.children WHO WHAT`.

The rest comes as JSON. Each prints the seconds and the CPU seconds that the work itself took, without its imports.
"""

from __future__ import annotations

import asyncio
import collections
import collections.abc
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

_BOTO_AT_ONCE = 10


def ours(what: str, given: dict[str, Any]) -> Callable[[], None]:
    """Return the agent's own way, verified and synced."""
    from agent.adapters.ovation import Credentials, Ovation
    from agent.adapters.traffic import Traffic
    from agent.adapters.upload import Uploader, content_type
    from agent.pipeline import delivery, stage
    from agent.pipeline.landing import Landing
    from agent.pipeline.staged import Staged, prepare
    from agent.settings import AgentSettings, AwsSettings, OvationSettings

    settings = AgentSettings()
    traffic = Traffic(settings.max_connections, settings.max_job_connections)

    async def download() -> None:
        from agent.adapters.download import Downloader

        root = Path(given["into"])
        prepare(root)
        landing, gate = Landing(root), asyncio.Semaphore(stage._FETCHED_AT_ONCE)
        async with Downloader(traffic=traffic) as downloader:

            async def one(name: str) -> None:
                async with gate:
                    url, path = f"{given['endpoint']}/bench/{name}", root / "inputs" / name
                    size = given["sizes"][name]
                    fetched = await downloader.fetch(url, path, remote=False, name=name, size=size, job="job")
                    await landing.land(Staged("inputs", name, name, "Revision", name, fetched.size, fetched.sha256))

            await asyncio.gather(*map(one, given["names"]))

    async def upload() -> None:
        aws = AwsSettings(endpoint_url_s3=given["endpoint"])
        gate = asyncio.Semaphore(delivery._AT_ONCE)
        ovation_settings = OvationSettings.model_validate(
            {"api_url": given["ovation"], "token": "token", "hosts": (given["ovation"],)}
        )
        async with Uploader(aws, traffic=traffic) as uploader, Ovation.open(ovation_settings) as ovation:

            async def send(descriptor: int, name: str, credentials: Credentials) -> None:
                size = os.fstat(descriptor).st_size
                await uploader.upload(descriptor, size, credentials, content_type(name), job="job")

            async def one(name: str) -> None:
                async with gate:
                    descriptor = os.open(Path(given["source"]) / name, os.O_RDONLY)
                    try:
                        if what == "upload":
                            await send(descriptor, name, Credentials("a", "b", f"token {name}", "bench", f"up-{name}"))
                            return
                        file = await ovation.create({"links": {"self": "/api/v1/ov/folder/1"}}, "File", name)
                        revision, credentials = await ovation.create_revision(file, name, content_type(name))
                        await send(descriptor, name, credentials)
                        await ovation.upload_complete(revision)
                        links = {"outputs": {"self": "/api/v1/ov/outputs"}}
                        await ovation.add_output({"relationships": links}, str(revision["_id"]))
                    finally:
                        os.close(descriptor)

            await asyncio.gather(*map(one, given["names"]))

    return lambda: asyncio.run(download() if what == "download" else upload())


class _NoDigest:
    """Stands where a digest is computed, and computes none."""

    def update(self, data: object) -> None:
        """Look at nothing."""

    def hexdigest(self) -> str:
        """Return what no digest is."""
        return "0" * 64


def undigested(what: str, given: dict[str, Any]) -> Callable[[], None]:
    """Return the agent's own way without its digests, and so without comparing an MD5."""
    from agent.adapters import multipart, objects, part, stream, upload

    objects.Vouched.compare = lambda *_: None  # type: ignore[method-assign]

    for module in (multipart, part, stream, upload):
        module.hashlib = SimpleNamespace(  # type: ignore[attr-defined]
            sha256=_NoDigest, new=lambda *_, **__: _NoDigest(), md5=hashlib.md5
        )
    return ours(what, given)


def unsynced(what: str, given: dict[str, Any]) -> Callable[[], None]:
    """Return the agent's own way without waiting for the disk."""

    def nothing(descriptor: int) -> None:
        del descriptor

    os.fsync = os.fdatasync = nothing  # type: ignore[assignment]
    return ours(what, given)


def released(what: str, given: dict[str, Any]) -> Callable[[], None]:
    """Return the released client's own way: `download_urls` with its five threads; uploads one after the other."""
    for name in ("Mapping", "Iterable"):
        setattr(collections, name, getattr(collections.abc, name))
    from ovation import core
    from ovation import download as ovation_download
    from ovation import upload as ovation_upload
    from ovation.session import Session

    paths = [str(Path(given["source"]) / name) for name in given["names"]]
    if what == "download":
        urls = [f"{given['endpoint']}/bench/{name}" for name in given["names"]]
        (Path(given["into"])).mkdir(exist_ok=True)

        def quiet(found: Any, **_: Any) -> Any:
            return found

        return lambda: ovation_download.download_urls(urls, output=given["into"], progress=cast("Any", quiet))
    if what == "upload":

        def upload() -> None:
            for name, path in zip(given["names"], paths, strict=True):
                aws = {"access_key_id": "a", "secret_access_key": "b", "session_token": "c", "bucket": "bench"}
                ovation_upload.upload_to_aws({**aws, "key": f"up-{name}"}, "text/csv", path, None)

        return upload

    def all_of_it() -> None:
        session = Session("token", api=given["ovation"])
        for name, path in zip(given["names"], paths, strict=True):
            folder = core.simplify_response({"_id": "1", "type": "Folder", "links": {"self": "/api/v1/ov/folder/1"}})
            file = core.create_file(session, folder, name)
            ovation_upload.upload_revision(session, file, path, progress=None)

    return all_of_it


def boto3(what: str, given: dict[str, Any]) -> Callable[[], None]:
    """Return boto3 with its defaults, ten files at once."""
    import boto3 as boto
    from botocore.config import Config

    config = Config(max_pool_connections=_BOTO_AT_ONCE * _BOTO_AT_ONCE)
    client = boto.client("s3", endpoint_url=given["endpoint"], region_name="us-east-1", config=config)

    def one(name: str) -> None:
        if what == "download":
            client.download_file("bench", name, str(Path(given["into"]) / name))
        else:
            client.upload_file(str(Path(given["source"]) / name), "bench", f"up-{name}")

    def all_of_it() -> None:
        Path(given["into"]).mkdir(exist_ok=True)
        with ThreadPoolExecutor(_BOTO_AT_ONCE) as threads:
            list(threads.map(one, given["names"]))

    return all_of_it


if __name__ == "__main__":
    _ways = {"ours": ours, "undigested": undigested, "unsynced": unsynced, "released": released, "boto3": boto3}
    _work = _ways[sys.argv[1]](sys.argv[2], json.load(sys.stdin))
    _began, _cpu = time.perf_counter(), time.process_time()
    _work()
    sys.stdout.write(json.dumps([time.perf_counter() - _began, time.process_time() - _cpu]) + "\n")
