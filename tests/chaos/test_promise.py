"""The check of the promise can fail: each violation, planted where all was well, is found and named."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from agent.sandbox.objects import Part
from agent.sandbox.settings import BUCKET
from tests.chaos import harness
from tests.chaos.harness import Chaos
from tests.chaos.promise import check_promise, violations
from tests.chaos.zygote import Zygote

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chaos(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote, embedded_url: str) -> AsyncIterator[Chaos]:
    """A run that went well, and an agent that has stopped."""
    async with harness.chaos(tmp_path_factory.mktemp("promise"), zygote, embedded_url) as opened:
        await opened.start()
        opened.activity()
        await opened.recovered("a run without faults")
        await opened.check()
        await opened.stop()
        yield opened


async def found(chaos: Chaos, words: str, files: dict[str, bytes] | None = None) -> None:
    """Look for violations, and fail unless one has these words; `files` are expected besides what is expected."""
    expected = {key: replace(each, files={**each.files, **(files or {})}) for key, each in chaos.expected.items()}
    named = await violations(chaos.scene(), expected)
    assert [each for each in named if words in each], f"not among {named}"


async def test_all_is_well(chaos: Chaos) -> None:
    assert await violations(chaos.scene(), chaos.expected) == []


async def test_all_are_told_at_once(chaos: Chaos) -> None:
    expected = {key: replace(value, runs=2, state="failed") for key, value in chaos.expected.items()}
    with pytest.raises(AssertionError, match=r"(?s)broken, 2 times:.*1 runs, 2 expected.*succeeded, failed expected"):
        await check_promise(chaos.scene(), expected, quiet_seconds=0)


async def test_a_run_of_an_activity_of_nobodys(chaos: Chaos) -> None:
    assert "nobody asked for its runs" in (await violations(chaos.scene(), {}))[0]


ROWS = [
    ("UPDATE jobs SET lease_until = now() + interval '1 minute'", "jobs: a lease is held on"),
    ("UPDATE watched SET lease_until = now() + interval '1 minute'", "watched: a lease is held on"),
    ("UPDATE reconciliations SET lease_until = now() + interval '1 minute'", "reconciliations: a lease is held on"),
    ("UPDATE watched SET due_at = now()", "to be looked at, and nobody does"),
    ("UPDATE jobs SET state = 'staging', finished_at = NULL, verdict = NULL", "due in staging, and nobody does it"),
    ("UPDATE jobs SET state = 'failed'", "failed, succeeded expected"),
    ("INSERT INTO job_events (job_id, state, attempt) SELECT id, state, 0 FROM jobs", "ended 2 times"),
    ("DELETE FROM job_events WHERE state = 'launching'", "went from staging to running"),
]


@asynccontextmanager
async def changed(chaos: Chaos, statement: str) -> AsyncIterator[None]:
    """Change the database for a moment."""
    async with chaos.database() as connection:
        tables = ("jobs", "watched", "reconciliations", "job_events")
        for table in tables:
            await connection.execute(f"CREATE TEMPORARY TABLE kept_{table} AS TABLE {table}")
        await connection.execute(statement)
        try:
            yield
        finally:
            for table in reversed(tables):
                await connection.execute(f"DELETE FROM {table}")  # noqa: S608 a table of ours
            for table in tables:
                await connection.execute(
                    f"INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT * FROM kept_{table}"  # noqa: S608 the same
                )


@pytest.mark.parametrize(("statement", "words"), ROWS)
async def test_what_is_wrong_in_the_database(chaos: Chaos, statement: str, words: str) -> None:
    async with changed(chaos, statement):
        await found(chaos, words)


def run_folder(chaos: Chaos) -> str:
    """Return the id of the run's Folder."""
    project = chaos.lab.sandbox.admin.entity(chaos.lab.project_id)
    [folder] = chaos.lab.sandbox.model.records.related(project["_id"], "folders")
    return folder.id


def a_file_twice(chaos: Chaos) -> None:
    chaos.lab.sandbox.admin.create_revision(run_folder(chaos), "empty")


def a_file_too_many(chaos: Chaos) -> None:
    chaos.lab.sandbox.admin.create_revision(run_folder(chaos), "surprise")


def a_folder_twice(chaos: Chaos) -> None:
    model, admin = chaos.lab.sandbox.model, chaos.lab.sandbox.admin
    project = model.records.entity(chaos.lab.project_id)
    assert project is not None
    model.add_child(admin.service, project, {"type": "Folder", "attributes": {"name": "Activity 1 run 1"}})


def a_log_that_is_gone(chaos: Chaos) -> None:
    records = chaos.lab.sandbox.model.records
    [log] = [each for each in records.related(run_folder(chaos), "files") if each.attributes["name"] == "stdout.log"]
    chaos.lab.sandbox.admin.purge(log.id)


def a_second_revision(chaos: Chaos) -> None:
    records = chaos.lab.sandbox.model.records
    file = records.related(run_folder(chaos), "files")[0]
    chaos.lab.sandbox.admin.create_revision(file.id, "again", "the same")


def a_link_twice(chaos: Chaos) -> None:
    records = chaos.lab.sandbox.model.records
    query = (
        "INSERT INTO relations (id, organization, source_id, rel, target_id, inverse_rel, user_id)"
        " SELECT 'twice', organization, source_id, rel, target_id, inverse_rel, user_id FROM relations"
        " WHERE rel = 'outputs' LIMIT 1"
    )
    assert records.write(query) == 1


def no_link(chaos: Chaos) -> None:
    assert chaos.lab.sandbox.model.records.write("DELETE FROM relations WHERE rel = 'outputs'") > 0


def a_link_to_somewhere_else(chaos: Chaos) -> None:
    [activity_id] = chaos.expected
    stranger = chaos.lab.revision("stranger.txt")
    chaos.lab.sandbox.admin.link(activity_id, "outputs", stranger, "origins")


def an_upload_that_never_ended(chaos: Chaos) -> None:
    chaos.lab.sandbox.admin.in_progress_revision(run_folder(chaos), "half.txt")


DELIVERED: list[tuple[Callable[[Chaos], None], str]] = [
    (a_file_twice, "empty is there twice"),
    (a_file_too_many, "surprise was not expected"),
    (a_folder_twice, "there 2 times, 1 expected"),
    (a_log_that_is_gone, "stdout.log is missing"),
    (a_second_revision, "has 2 complete Revisions"),
    (a_link_twice, "is linked 2 times"),
    (no_link, "is not linked"),
    (a_link_to_somewhere_else, "not in the Folder of a run"),
    (an_upload_that_never_ended, "left in-progress"),
]


@pytest.mark.parametrize(("plant", "words"), DELIVERED)
async def test_what_is_wrong_in_ovation(chaos: Chaos, plant: Callable[[Chaos], None], words: str) -> None:
    connection = chaos.lab.sandbox.model.records.connection
    connection.execute("BEGIN")
    try:
        plant(chaos)
        await found(chaos, words)
    finally:
        connection.execute("ROLLBACK")


async def test_other_bytes(chaos: Chaos) -> None:
    await found(chaos, "empty is b'', b'full' expected", {"empty": b"full"})


async def test_a_directory_that_is_not_there(chaos: Chaos) -> None:
    await found(chaos, "the Folder deep/er is missing", {"deep/er/file": b""})


async def test_a_multipart_upload(chaos: Chaos) -> None:
    store = chaos.lab.sandbox.store
    upload = store.begin_upload(BUCKET, "0/half", {}, 0)
    with store.writer() as writer:
        writer.write(b"half")
        store.add_part(upload.id, Part(1, writer.finish(), 0))
    await found(chaos, "a multipart upload is left, with 1 parts: 0/half")
    store.abort_upload(upload)


@contextmanager
def left(path: Path) -> Iterator[None]:
    """Leave a file somewhere for a moment."""
    made = [each for each in path.parents if not each.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("left")
    yield
    path.unlink()
    for each in made:
        each.rmdir()


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("data/jobs/some-job/run-1/stdout.log", "some-job is left behind, with run-1, run-1/stdout.log"),
        ("data/.agent.json.part", ".agent.json.part is left behind"),
        ("tmp/anything/inside", "tmp/anything is left behind"),
    ],
)
async def test_files_that_are_left(chaos: Chaos, where: str, words: str) -> None:
    with left(chaos.directory / "a" / where):
        await found(chaos, words)


@pytest.mark.parametrize("works_there", [True, False])
async def test_a_process_that_is_left(chaos: Chaos, *, works_there: bool) -> None:
    """It is known by where it works, or by what it was started with."""
    place, mark = (chaos.directory, "anything") if works_there else (Path("/"), f"{chaos.directory}/a")
    with subprocess.Popen(["sh", "-c", "read -r end", mark], cwd=place, stdin=subprocess.PIPE) as process:  # noqa: ASYNC220
        await found(chaos, f"process {process.pid} is left behind: sh -c read -r end {mark}")
        process.kill()


async def test_a_process_that_sees_a_part_mounted(chaos: Chaos, tmp_path: Path) -> None:
    """So it is with what runs in a container: neither its command nor where it works names the directory."""
    script = f"mount --bind {chaos.directory}/a {tmp_path} && echo mounted && exec sh -c 'read -r end'"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: ASYNC220
        assert process.stdout is not None
        assert process.stdout.readline() == b"mounted\n"
        await found(chaos, f"process {process.pid} is left behind: sh -c read -r end")
        process.kill()


async def test_a_container_that_was_started_twice(chaos: Chaos) -> None:
    record = chaos.scene().starts
    lines = record.read_text()
    record.write_text(lines + lines.splitlines()[-1] + "\n")
    await found(chaos, "the container of run-1 was started 2 times")
    record.write_text("")
    await found(chaos, "the container of run-1 was never started")
    record.write_text(lines)


async def test_a_bug_that_the_agent_told_of(chaos: Chaos, tmp_path: Path) -> None:
    log = tmp_path / "agent.log"
    log.write_text('{"event": "step_failed"}\n')
    named = await violations(replace(chaos.scene(), logs=[log]), chaos.expected)
    assert named == ['agent.log: {"event": "step_failed"}']
