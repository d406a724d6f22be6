"""The released client, ovation 1.26.0, is the judge of the sandbox: what people run against Ovation works here."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.sandbox.server import Sandbox
from tests.integration.sandbox_fixtures import Receiver, quiet, released_client

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with Sandbox(tmp_path / "sandbox") as running:
        yield running


@pytest.fixture
def client(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", sandbox.s3_url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("HOME", str(tmp_path))
    modules = released_client()
    # the functions that pass no progress of their own reach for tqdm
    monkeypatch.setattr(modules.upload, "tqdm", quiet)
    for function in (modules.upload.upload_file, modules.upload.upload_revision):
        monkeypatch.setattr(
            function,
            "__defaults__",
            tuple(quiet if getattr(one, "__name__", "") == "tqdm" else one for one in function.__defaults__),
        )
    return modules


@pytest.fixture
def session(sandbox: Sandbox, client: Any) -> Any:
    return client.session.connect("a@example.org", token=sandbox.user_token("a@example.org"), api=sandbox.api_url)


@pytest.fixture
def project(sandbox: Sandbox) -> str:
    return str(sandbox.admin.create_project("Retina", owner="a@example.org")["_id"])


async def test_an_activity_with_local_files_is_created_changed_and_downloaded(
    client: Any, session: Any, project: str, tmp_path: Path
) -> None:
    first, second, image = (tmp_path / name for name in ("first.csv", "second.csv", "image.sif"))
    first.write_text("1,2\n")
    second.write_text("")
    image.write_bytes(os.urandom(9_000_000))

    def work() -> None:
        acts = client.activities
        activity = acts.create_activity(session, project, "Run", inputs=[str(first)], progress=quiet)
        assert activity.links._collaboration_roots == [project]
        acts.add_inputs(session, activity, [str(second)], progress=quiet)
        acts.add_related(session, activity, [str(image)], progress=quiet)
        inputs = session.get(activity.relationships.inputs.related)
        assert [one.attributes.name for one in inputs] == ["first.csv", "second.csv"]
        assert [one.attributes["content_length"] for one in inputs] == [4, 0]
        assert {one.attributes["upload-status"] for one in inputs} == {"complete"}
        target = tmp_path / "down"
        target.mkdir()
        client.download.download_activity(session, activity, output=str(target), progress=quiet)
        assert (target / "inputs" / "first.csv").read_text() == "1,2\n"
        assert (target / "inputs" / "second.csv").read_bytes() == b""
        assert (target / "related" / "image.sif").read_bytes() == image.read_bytes()
        assert list((target / "outputs").iterdir()) == []
        acts.remove_inputs(session, activity, [inputs[0]._id], progress=quiet)
        left = session.get(activity.relationships.inputs.related)
        assert [one.attributes.name for one in left] == ["second.csv"]
        acts.add_outputs(session, activity, [inputs[0]._id], progress=quiet)
        assert [one._id for one in session.get(activity.relationships.outputs.related)] == [inputs[0]._id]
        origins = session.get(inputs[0].relationships.origins.related)
        assert [one._id for one in origins] == [activity._id]

    await asyncio.to_thread(work)


async def test_a_folder_is_uploaded_walked_and_downloaded(
    client: Any, session: Any, project: str, tmp_path: Path
) -> None:
    tree = tmp_path / "data"
    (tree / "inner").mkdir(parents=True)
    (tree / "large.bin").write_bytes(os.urandom(20_000_000))
    (tree / "inner" / "small file é.txt").write_text("small")

    def work() -> None:
        client.upload.upload_folder(session, project, str(tree), progress=quiet)
        walked = list(client.contents.walk(session, project, recurse=True))
        names = [(parent.attributes.name, [file.attributes.name for file in files]) for parent, _, files in walked]
        assert names == [("Retina", []), ("data", ["large.bin"]), ("inner", ["small file é.txt"])]
        large, small = walked[1][2][0], walked[2][2][0]
        head = client.contents.get_head_revision(session, large)
        assert head.attributes.content_length == 20_000_000
        assert large.revisions[head._id].status == "complete"
        assert client.contents.get_breadcrumbs(session, small) == "Retina/data/inner/small file é.txt"
        # three parts of at most 8 MiB each
        assert client.download.revision_download_info(session, head)["etag"].endswith("-3")
        target = tmp_path / "down"
        target.mkdir()
        client.download.download_folder(session, walked[1][0]._id, output=str(target), progress=quiet)
        assert (target / "data" / "large.bin").read_bytes() == (tree / "large.bin").read_bytes()

    await asyncio.to_thread(work)


async def test_a_second_revision_becomes_the_head(client: Any, session: Any, project: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"

    def work() -> None:
        path.write_text("one")
        first = client.upload.upload_file(session, project, str(path), progress=quiet)
        path.write_text("second")
        file = client.core.get_entity(session, first.attributes.file_id)
        second = client.upload.upload_revision(session, file, str(path), progress=quiet)
        assert second.attributes.previous == [first._id]
        assert client.contents.get_head_revision(session, file)._id == second._id
        assert client.core.get_entity(session, file._id).revisions[second._id].status == "complete"

    await asyncio.to_thread(work)


async def test_an_upload_that_fails_is_registered_as_failed(
    sandbox: Sandbox, client: Any, session: Any, project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    sandbox.faults.add("status", r"^PUT ", target="store", status=500)

    def work() -> None:
        answer = client.upload.upload_file(session, project, str(tmp_path / "a.txt"), progress=quiet)
        assert answer.revision.attributes["upload-status"] == "error"
        assert answer.file.revisions[answer.revision._id].status == "error"

    await asyncio.to_thread(work)


async def test_a_trashed_entity_is_gone_until_it_is_restored(client: Any, session: Any, project: str) -> None:
    def work() -> None:
        activity = client.activities.create_activity(session, project, "Run", progress=quiet)
        client.core.delete_entity(session, activity)
        assert session.get(session.path("activities")) == []
        assert client.core.get_entity(session, activity._id, include_trash=True).trash_info.trash_root == activity._id
        client.core.undelete_entity(session, activity._id)
        assert [one._id for one in session.get(session.path("activities"))] == [activity._id]

    await asyncio.to_thread(work)


async def test_projects_are_created_listed_and_updated(client: Any, session: Any) -> None:
    def work() -> None:
        new = {"projects": [{"type": "Project", "attributes": {"name": "New"}}]}
        (made,) = session.post(session.path("project"), data=new)
        assert [one._id for one in client.core.get_projects(session)] == [made._id]
        made.attributes["name"] = "Renamed"
        assert session.put(made.links.self, made).attributes.name == "Renamed"
        assert client.core.get_entity(session, made._id).attributes.name == "Renamed"

    await asyncio.to_thread(work)


async def test_a_service_account_gets_a_token_and_uses_it(sandbox: Sandbox, client: Any, project: str) -> None:
    def work() -> None:
        service, audience = client.service, "https://api.ovation.io/"
        ids = {"client_id": sandbox.tokens.client_id, "client_secret": sandbox.tokens.client_secret}
        token = service.get_service_token(**ids, audience=audience, auth=sandbox.auth_url)
        assert token["expires_in"] > 0
        _, session = service.make_session(token, api=sandbox.api_url)
        assert [one._id for one in client.core.get_projects(session)] == [project]

    await asyncio.to_thread(work)


async def test_start_compute_sends_what_the_endpoint_documents(
    sandbox: Sandbox, client: Any, session: Any, project: str
) -> None:
    activity_id = sandbox.admin.create_activity(project, "Run")["_id"]
    async with Receiver(statuses=[201]) as endpoint:
        arguments = SimpleNamespace(
            session=session, activity=activity_id, image="image.sif", url=f"{endpoint.url}/hpc_run"
        )
        await asyncio.to_thread(client.activities.start_compute_main, arguments)
        (got,) = endpoint.received
    assert (got.method, got.path) == ("POST", "/hpc_run")
    assert got.body == {"activity_id": activity_id, "image_name": "image.sif", "organization": 0}
    assert got.headers["Authorization"] == f"Bearer {session.token}"
    assert got.headers["Content-Type"] == "application/json"


async def test_the_released_command_line_only_prints_help() -> None:
    """Why `hpc-run` is driven through `start_compute_main` above: `main` of ovation 1.26.0 never gets any further."""
    script = (
        "import collections, collections.abc, sys\n"
        "collections.Mapping, collections.Iterable = collections.abc.Mapping, collections.abc.Iterable\n"
        "import ovation.cli\n"
        "sys.exit(ovation.cli.main())\n"
    )
    command = ("hpc-run", "--activity", "an-id", "--image", "image.sif", "--url", "http://127.0.0.1:9/hpc_run")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-c", script, "-t", "a-token", *command), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 1
    assert output.startswith(b"usage: python -m ovation.cli")
