"""The delivery of outputs, whatever fails in between: each once, verified, and nothing left of an upload."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent.adapters import disk, upload
from agent.db.jobs import LeaseLost
from agent.db.outputs import Kind
from agent.domain.job import Done, Failed, FaultClass, Outage
from agent.pipeline import delivery, transfer, under_way
from agent.pipeline.context import Control
from agent.pipeline.perform import DISK, OBJECT_STORE, OVATION, perform
from agent.sandbox.server import Sandbox
from agent.sandbox.settings import BUCKET, SandboxSettings
from tests.agents import AgentProcess, agent_environment, until
from tests.integration.collecting import (
    LOGS,
    PART_BYTES,
    Collecting,
    claimed,
    content_of,
    opened,
    parts_left,
    where_of,
)
from tests.lab import Lab, laboratory

SMALL = {"one": b"1\n", "d/two": b"2\n", "empty/": b""}
LARGE = {"large.bin": content_of(3 * PART_BYTES - 7)}
BOTH = {**SMALL, **LARGE}


class Clock:
    """The sandbox's time, which a test can move on."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def credentials_seconds() -> float:
    return 600.0


@pytest.fixture
async def sandbox(tmp_path: Path, clock: Clock, credentials_seconds: float) -> AsyncIterator[Sandbox]:
    settings = SandboxSettings(
        clock=clock, minimum_part_bytes=PART_BYTES, upload_credentials_seconds=credentials_seconds, token_seconds=1e6
    )
    async with Sandbox(tmp_path / "sandbox", settings=settings) as opened_sandbox:
        yield opened_sandbox


@pytest.fixture
async def collecting(sandbox: Sandbox, tmp_path: Path, database_url: str) -> AsyncIterator[Collecting]:
    (tmp_path / "data" / "jobs").mkdir(parents=True)
    where = where_of(sandbox, database_url, tmp_path / "data")
    async with opened(where) as (database, context):
        await database.migrate()
        yield Collecting(sandbox, database, context, where)


def statuses(sandbox: Sandbox) -> list[str]:
    """Return the upload-status of every Revision."""
    found = sandbox.model.records.entities_of_type(0, "Revision")
    return sorted(str(each.attributes["upload-status"]) for each in found)


async def test_everything_is_there_once(collecting: Collecting) -> None:
    run = await collecting.job(BOTH)
    outcome, job = await run.one_try()
    assert outcome == Done(note=None)
    assert job.attempt == 0
    await run.is_exact(BOTH)
    assert set(statuses(collecting.sandbox)) == {"complete"}


async def test_what_an_upload_needs_is_on_the_disk_while_it_lasts(collecting: Collecting) -> None:
    run = await collecting.job(LARGE)
    collecting.sandbox.faults.add("black_hole", "partNumber=2", target="store")
    claim = await claimed(collecting.database, collecting.context, run.job_id)
    step = asyncio.create_task(perform(collecting.context, claim, Control(), _raise))
    await _until(lambda: parts_left(collecting.sandbox))
    [file] = run.uploads.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(run.uploads.stat().st_mode) == 0o700
    found = json.loads(file.read_bytes())
    [upload] = collecting.sandbox.store.uploads(BUCKET, "")
    assert (found["upload_id"], found["size"], found["part_bytes"]) == (upload.id, len(LARGE["large.bin"]), PART_BYTES)
    assert found["credentials"]["key"] == upload.key
    assert found["revision_id"] in upload.key
    step.cancel()
    await asyncio.gather(step, return_exceptions=True)


KILLED = {"one": b"1\n", "large.bin": content_of(2 * PART_BYTES + 1)}


@pytest.mark.timeout(240)
async def test_killed_at_any_request_it_is_delivered_once(collecting: Collecting) -> None:
    """Each request in turn is the last that the agent makes: its answer is lost, and what should follow undone."""
    request = 0
    while True:
        request += 1
        for folder in collecting.lab.sandbox.model.records.related(collecting.lab.project_id, "folders"):
            collecting.sandbox.admin.trash(folder.id)
        run = await collecting.job(KILLED, name=f"Activity {request}")
        if await run.die_at(request) < request:
            break
        outcomes, job = await run.tries(1)
        assert (job.attempt, len(outcomes)) == (0, 1)
        await run.is_exact(KILLED)
    assert request > 25


@pytest.mark.parametrize("times", [1, 5])
@pytest.mark.parametrize(
    ("target", "path", "most"),
    [
        ("api", "POST .*/projects/", 1),  # it is found before it is made again
        ("api", "POST .*/folders/", 5),
        ("api", "POST .*/files/", 5),
        ("api", "PUT .*/upload-complete", 5),
        ("api", "POST .*/links/outputs/relationships", 5),
        ("api", "GET ", 5),
        ("store", "PUT .*/one", 5),
        ("store", "POST .*uploads", 5),
        ("store", "PUT .*partNumber=2", 5),
        ("store", "POST .*uploadId=", 4),  # one try's; the next finds the object there
    ],
)
async def test_answers_that_are_lost_double_nothing(
    collecting: Collecting, target: str, path: str, most: int, times: int
) -> None:
    run = await collecting.job(BOTH)
    fault = collecting.sandbox.faults.add("lost_answer", path, target=target, times=times)
    _, job = await run.tries(12)
    assert fault.hits == min(most, times)
    assert job.attempt == 0
    await run.is_exact(BOTH)


@pytest.mark.parametrize(
    ("target", "path", "kind", "options"),
    [
        ("api", ".*", "status", {"status": 503, "times": 9}),
        ("api", "POST .*/files/", "truncate", {"after_bytes": 20, "times": 2}),
        ("api", "POST .*/folders/", "close", {"after_bytes": 20, "times": 2}),
        ("store", ".*", "status", {"status": 503, "times": 9}),
        ("store", "PUT .*partNumber=1", "reset_request", {"after_bytes": 30_000, "times": 5}),
        ("store", "PUT .*/one", "reset_request", {"after_bytes": 0, "times": 5}),
        ("store", "POST .*uploads", "status", {"status": 500, "times": 5}),
    ],
)
async def test_bursts_of_faults_cost_only_time(
    collecting: Collecting, target: str, path: str, kind: str, options: dict[str, Any]
) -> None:
    run = await collecting.job(BOTH)
    fault = collecting.sandbox.faults.add(kind, path, target=target, **options)
    _, job = await run.tries(12)
    assert fault.hits == options["times"]
    assert job.attempt == 0
    await run.is_exact(BOTH)


async def test_an_upload_in_parts_is_gone_on_with(collecting: Collecting) -> None:
    run = await collecting.job(LARGE)
    first = collecting.sandbox.faults.add("latency", "PUT .*partNumber=1", target="store", seconds=0)
    fault = collecting.sandbox.faults.add("status", "PUT .*partNumber=3", target="store", status=503, times=4)
    outcome, _ = await run.one_try()
    assert isinstance(outcome, Outage)
    assert outcome.party == OBJECT_STORE
    [begun] = collecting.sandbox.store.uploads(BUCKET, "")
    await run.tries(1)
    assert (first.hits, fault.hits) == (1, 4)
    after = collecting.sandbox.store.upload(begun.id)
    assert after is not None
    assert after.completed is not None  # the very upload that was begun
    await run.is_exact(LARGE)
    assert run.revisions("large.bin") == ["complete"]


async def test_a_file_that_changed_its_size_meanwhile_gets_another_revision(collecting: Collecting) -> None:
    run = await collecting.job(LARGE)
    fault = collecting.sandbox.faults.add("status", "PUT .*partNumber=3", target="store", status=503, times=4)
    await run.one_try()
    assert fault.hits == 4
    changed = {"large.bin": content_of(2 * PART_BYTES + 5, first=9)}
    (run.directory / "outputs" / "large.bin").write_bytes(changed["large.bin"])
    _, job = await run.tries(1)
    assert job.attempt == 0
    await run.is_exact(changed)
    assert run.revisions("large.bin") == ["error", "complete"]
    assert collecting.sandbox.store.uploads(BUCKET, "") == []


async def test_a_file_that_changed_within_its_size_is_sent_as_it_is(collecting: Collecting) -> None:
    run = await collecting.job(LARGE)
    collecting.sandbox.faults.add("status", "PUT .*partNumber=3", target="store", status=503, times=4)
    await run.one_try()
    changed = {"large.bin": b"X" + LARGE["large.bin"][1:]}
    (run.directory / "outputs" / "large.bin").write_bytes(changed["large.bin"])
    await run.tries(1)
    await run.is_exact(changed)
    assert run.revisions("large.bin") == ["complete"]


async def test_credentials_that_expired_between_two_tries(collecting: Collecting, clock: Clock) -> None:
    run = await collecting.job(BOTH)
    collecting.sandbox.faults.add("status", "PUT .*(/one|partNumber=3)", target="store", status=503, times=8)
    outcome, _ = await run.one_try()
    assert isinstance(outcome, Outage)
    clock.ahead += 700
    outcomes, job = await run.tries(1)
    assert isinstance(outcomes[0], Done)
    assert job.attempt == 0
    assert run.revisions("large.bin") == run.revisions("one") == ["error", "complete"]
    # Parts that nobody may throw away any more are left to the bucket's own rule.
    assert len(parts_left(collecting.sandbox)) == 1
    assert await collecting.lab.outputs(run.activity_id) == {
        **LOGS,
        **{path: content for path, content in BOTH.items() if not path.endswith("/")},
    }
    assert not run.uploads.exists()


@pytest.mark.parametrize("credentials_seconds", [60.0])
async def test_credentials_that_expire_in_the_middle(collecting: Collecting, clock: Clock) -> None:
    run = await collecting.job(LARGE)
    match = collecting.sandbox.faults.match

    def late(target: str, method: str, where: str) -> Any:
        if method == "PUT" and "partNumber=2" in where and clock.ahead == 0:
            clock.ahead += 61
        return match(target, method, where)

    collecting.sandbox.faults.match = late  # type: ignore[method-assign]
    outcomes, job = await run.tries(1)
    assert isinstance(outcomes[0], Done)
    assert job.attempt == 0
    assert run.revisions("large.bin") == ["error", "complete"]
    assert (await collecting.lab.outputs(run.activity_id))["large.bin"] == LARGE["large.bin"]
    assert not run.uploads.exists()


@pytest.mark.parametrize("credentials_seconds", [0.0])
async def test_credentials_that_are_never_good_are_told_and_make_no_heap_of_revisions(
    collecting: Collecting,
) -> None:
    run = await collecting.job({}, logs={"stdout.log": b"x"})
    outcome, job = await run.one_try()
    assert isinstance(outcome, Failed)
    assert outcome.final
    assert outcome.fault.cls is FaultClass.PLATFORM
    assert "ExpiredToken" in outcome.fault.message
    assert job.waiting_for == outcome.fault.message
    assert run.revisions("stdout.log") == ["in-progress"]
    await run.one_try()
    assert run.revisions("stdout.log") == ["error", "in-progress"]


@pytest.mark.parametrize(("code", "is_lost"), [("InvalidAccessKeyId", True), ("RequestTimeTooSkewed", False)])
async def test_an_upload_is_given_up_when_its_credentials_are_refused_and_only_then(
    collecting: Collecting, code: str, is_lost: bool
) -> None:
    run = await collecting.job(LARGE)
    collecting.sandbox.faults.add("status", "PUT .*partNumber=3", target="store", status=503, times=4)
    await run.one_try()
    body = f"<Error><Code>{code}</Code></Error>"
    [begun] = collecting.sandbox.store.uploads(BUCKET, "")
    collecting.sandbox.faults.add("status", f"GET .*{begun.key}", target="store", status=403, body=body, times=1)
    outcome, _ = await run.one_try()
    assert isinstance(outcome, Done if is_lost else Failed)
    if not is_lost:
        await run.tries(1)
    assert run.revisions("large.bin") == (["error", "complete"] if is_lost else ["complete"])
    await run.is_exact(LARGE)


async def test_a_revision_that_is_complete_already_is_taken(collecting: Collecting) -> None:
    """The answers of upload-complete are lost, of the logs in the first try and of the outputs in the second."""
    run = await collecting.job(BOTH)
    fault = collecting.sandbox.faults.add("lost_answer", "PUT .*/upload-complete", target="api")
    for _ in range(2):
        outcome, _ = await run.one_try()
        assert isinstance(outcome, Outage)
        assert "upload-complete" in outcome.reason
    collecting.sandbox.faults.remove(fault.id)
    _, job = await run.tries(1)
    assert job.attempt == 0
    assert statuses(collecting.sandbox) == ["complete"] * (len(LOGS) + 3)
    await run.is_exact(BOTH)


async def test_no_revision_stays_in_progress_for_ever(collecting: Collecting) -> None:
    run = await collecting.job({"one": b"1\n"})
    fault = collecting.sandbox.faults.add("lost_answer", "POST .*/files/", target="api", times=3)
    await run.tries()
    assert fault.hits == 3
    assert statuses(collecting.sandbox).count("error") == 3
    await run.is_exact({"one": b"1\n"})


@pytest.mark.parametrize("said", [None, 1, "many"])
async def test_what_ovation_found_in_the_store_must_be_what_was_sent(
    collecting: Collecting, monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    run = await collecting.job({"one": b"one\n"})
    uploads = collecting.sandbox.uploads
    complete = uploads.complete

    def wrong(*what: Any) -> Any:
        revision = complete(*what)
        if revision.attributes["name"] == "one":
            revision.attributes["content_length"] = said
            monkeypatch.setattr(uploads, "complete", complete)
        return revision

    monkeypatch.setattr(uploads, "complete", wrong)
    outcome, job = await run.one_try()
    assert isinstance(outcome, Failed)
    assert not outcome.final
    assert "one: Ovation" in outcome.fault.message
    assert "of 4 bytes arrived" in outcome.fault.message
    assert job.attempt == 1
    assert run.revisions("one") == ["error"]
    await run.tries(1)
    assert run.revisions("one") == ["error", "complete"]
    await run.is_exact({"one": b"one\n"})


async def test_one_output_that_fails_does_not_hold_up_the_others(collecting: Collecting) -> None:
    files = {f"{number:02}": b"x" for number in range(30)}
    run = await collecting.job(files)
    body = "<Error><Code>AccessDenied</Code></Error>"
    refused = collecting.sandbox.faults.add("status", "PUT .*/0[05]$", target="store", status=403, body=body)
    outcome, _ = await run.one_try()
    assert isinstance(outcome, Failed)
    assert outcome.final
    assert "AccessDenied" in outcome.fault.message
    records = await run.records()
    assert {path for path, output in records.items() if not output.linked} == {"output/00", "output/05"}
    collecting.sandbox.faults.remove(refused.id)
    await run.tries(1)
    await run.is_exact(files)
    assert run.revisions("00") == ["complete"]


async def test_a_folder_that_fails_does_not_hold_up_the_others(collecting: Collecting) -> None:
    files = {"a/1": b"1", "b/c/2": b"2", "3": b"3"}
    run = await collecting.job(files)
    refused = collecting.sandbox.faults.add("status", "POST .*/folders/", target="api", status=400, skip=3, times=1)
    outcome, _ = await run.one_try()
    assert refused.hits == 1
    assert isinstance(outcome, Failed)
    linked = {path for path, output in (await run.records()).items() if output.linked}
    assert "output/3" in linked
    assert len(linked) == len(LOGS) + 2
    await run.tries(1)
    await run.is_exact(files)


async def test_an_outage_is_told_before_a_refusal_and_a_bug_before_both(
    collecting: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = dict.fromkeys(("bug", "away", "refused", "well"), b"x")
    run = await collecting.job(files)
    body = "<Error><Code>AccessDenied</Code></Error>"
    collecting.sandbox.faults.add("status", "PUT .*/refused", target="store", status=403, body=body)
    collecting.sandbox.faults.add("status", "PUT .*/away", target="store", status=503)
    content_type = upload.content_type

    def buggy(name: str) -> str:
        if name == "bug":
            raise KeyError(name)
        return content_type(name)

    with monkeypatch.context() as patched:
        patched.setattr(transfer, "content_type", buggy)
        outcome, _ = await run.one_try()
        assert isinstance(outcome, Failed)
        assert outcome.fault.cls is FaultClass.AGENT
    outcome, _ = await run.one_try()
    assert isinstance(outcome, Outage)
    assert outcome.party == OBJECT_STORE
    assert (await run.records())["output/well"].linked
    assert (await run.records())["output/bug"].linked
    collecting.sandbox.faults.remove()
    await run.tries(1)
    await run.is_exact(files)


async def test_nothing_more_is_begun_while_the_store_is_away(collecting: Collecting) -> None:
    files = {f"{number:03}": b"x" for number in range(100)}
    run = await collecting.job(files)
    collecting.sandbox.faults.add("status", "PUT .*/[0-9]{3}$", target="store", status=503)
    outcome, job = await run.one_try()
    assert isinstance(outcome, Outage)
    assert job.attempt == 0
    most = delivery._AT_ONCE + delivery._IN_A_ROW - 1  # until three made it sure, others took their places
    assert len(statuses(collecting.sandbox)) <= len(LOGS) + most
    collecting.sandbox.faults.remove()
    await run.tries(1)
    await run.is_exact(files)


async def test_logs_come_before_everything_else(collecting: Collecting) -> None:
    run = await collecting.job(BOTH)
    fault = collecting.sandbox.faults.add("status", "PUT .*/stderr.log", target="store", status=503)
    outcome, _ = await run.one_try()
    assert isinstance(outcome, Outage)
    assert fault.hits == 4
    assert sorted(run.paths(run.folder().id, "")) == ["stderr.log", "stdout.log"]
    assert {output.kind for output in (await run.records()).values()} == {Kind.LOG}
    collecting.sandbox.faults.remove()
    await run.tries(1)
    await run.is_exact(BOTH)


async def test_no_output_keeps_the_logs_back(collecting: Collecting) -> None:
    run = await collecting.job({})
    outputs = run.directory / "outputs"
    outputs.rmdir()
    outputs.symlink_to("/etc")
    outcome, _ = await run.one_try()
    assert isinstance(outcome, Failed)
    assert outcome.fault.cls is FaultClass.NODE
    assert await collecting.lab.outputs(run.activity_id) == LOGS


async def test_a_full_disk_keeps_nothing_back(collecting: Collecting, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = await collecting.job(BOTH)
    monkeypatch.setattr(under_way, "write_whole", full)
    await run.tries(1)
    await run.is_exact(BOTH)


async def test_a_full_disk_leaves_no_parts_when_the_store_goes_too(
    collecting: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = await collecting.job(LARGE)
    collecting.sandbox.faults.add("status", "PUT .*partNumber=3", target="store", status=503, times=4)
    with monkeypatch.context() as patched:
        patched.setattr(under_way, "write_whole", full)
        outcome, _ = await run.one_try()
    assert isinstance(outcome, Outage)
    assert collecting.sandbox.store.uploads(BUCKET, "") == []
    await run.tries(1)
    await run.is_exact(LARGE)
    assert run.revisions("large.bin") == ["error", "complete"]


async def test_an_upload_whose_id_cannot_be_kept_is_thrown_away(
    collecting: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole = disk.write_whole

    def full_later(path: Path, content: bytes, mode: int, *, durable: bool) -> None:
        if json.loads(content)["upload_id"] is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_whole(path, content, mode, durable=durable)

    run = await collecting.job(LARGE)
    with monkeypatch.context() as patched:
        patched.setattr(under_way, "write_whole", full_later)
        outcome, _ = await run.one_try()
    assert isinstance(outcome, Outage)
    assert outcome.party == DISK
    assert collecting.sandbox.store.uploads(BUCKET, "") == []
    await run.tries(1)
    await run.is_exact(LARGE)


@pytest.mark.parametrize("how", ["trash", "purge"])
async def test_a_runs_folder_that_somebody_took_away_is_made_anew(collecting: Collecting, how: str) -> None:
    files = {"a/one": b"1", "a/two": b"2", "large.bin": LARGE["large.bin"]}
    run = await collecting.job(files)
    faults = collecting.sandbox.faults
    faults.add("status", "PUT .*(/two|partNumber=3)", target="store", status=503)
    outcome, _ = await run.one_try()
    assert isinstance(outcome, Outage)
    getattr(collecting.sandbox.admin, how)(run.folder().id)
    # The step is broken off again, after it has made another Folder.
    faults.add("status", "PUT .*upload-failed", target="api", status=503, times=4)
    outcome, _ = await run.one_try()
    faults.remove()
    outcomes, _ = await run.tries(2)
    assert isinstance(outcomes[-1], Done)
    linked = {path: output for path, output in (await run.records()).items() if output.linked}
    assert linked.keys() == {"log/stdout.log", "log/stderr.log", *(f"output/{path}" for path in files)}
    assert sorted(run.paths(run.folder().id, "")) == ["a/", "a/two", "large.bin"]  # the rest was there
    documents = await collecting.lab.output_documents(run.activity_id)
    assert len(documents) == len(linked)
    assert parts_left(collecting.sandbox) == []
    assert not run.uploads.exists()


async def test_a_folder_taken_away_in_the_middle_is_told_in_the_story(collecting: Collecting) -> None:
    run = await collecting.job({"one": b"1"})
    match = collecting.sandbox.faults.match

    def take_away(target: str, method: str, where: str) -> Any:
        if target == "store" and "stderr.log" in where:
            collecting.sandbox.faults.match = match  # type: ignore[method-assign]
            collecting.sandbox.admin.trash(run.folder().id)
        return match(target, method, where)

    collecting.sandbox.faults.match = take_away  # type: ignore[method-assign]
    outcome, job = await run.one_try()
    assert isinstance(outcome, Failed)
    assert not outcome.final  # tried again in seconds
    outcomes, _ = await run.tries(1)
    assert outcomes == [
        Done(note="the run's Folder was gone from Ovation: what was not delivered by then is in another of that name")
    ]
    events = await collecting.context.jobs.events(job.id)
    assert "the run's Folder was gone" in str(events[-1].note)
    assert run.paths(run.folder().id, "") == ["one"]
    assert len(await collecting.lab.output_documents(run.activity_id)) == len(LOGS) + 1
    run.nothing_is_left()


@pytest.mark.parametrize("what", ["folder", "file", "revision"])
async def test_what_somebody_took_away_below_it_is_made_anew(collecting: Collecting, what: str) -> None:
    files = {"a/b/one": b"1", "a/two": b"2"}
    run = await collecting.job(files)
    collecting.sandbox.faults.add("status", "POST .*/outputs/relationships", target="api", status=400, skip=2, times=2)
    outcome, _ = await run.one_try()
    assert isinstance(outcome, Failed)
    records = await run.records()
    gone = {
        "folder": records["folder/a"].entity_id,
        "file": records["output/a/two"].entity_id,
        "revision": records["output/a/two"].revision_id,
    }[what]
    collecting.sandbox.admin.trash(str(gone))
    if what == "file":
        collecting.sandbox.admin.trash(str(records["output/a/two"].revision_id))
    await run.tries(1)
    if what == "revision":  # another Revision of that File
        assert (await collecting.lab.outputs(run.activity_id)).keys() == {*LOGS, *files}
    else:
        await run.is_exact(files)


async def test_another_activity_of_that_name_keeps_its_folder(collecting: Collecting) -> None:
    first = await collecting.job({"one": b"first"}, name="Same name")
    await first.tries(1)
    second = await collecting.job({"one": b"second"}, name="Same name")
    fault = collecting.sandbox.faults.add("status", "POST .*/projects/", target="api", status=503, times=1)
    outcomes, _ = await second.tries(2)
    assert (fault.hits, len(outcomes)) == (1, 2)
    assert (await collecting.lab.outputs(first.activity_id))["one"] == b"first"
    assert (await collecting.lab.outputs(second.activity_id))["one"] == b"second"
    folders = second.folders()
    assert [sorted(second.paths(each.id, "")) for each in folders] == [["one", "stderr.log", "stdout.log"]] * 2


@pytest.mark.parametrize("lost", [False, True])
async def test_an_output_may_be_called_as_a_log_is(collecting: Collecting, lost: bool) -> None:
    run = await collecting.job({"stdout.log": b"the program's own"})
    if lost:
        collecting.sandbox.faults.add("lost_answer", "POST .*/folders/", target="api", skip=2, times=1)
    await run.tries(2)
    documents = await collecting.lab.output_documents(run.activity_id)
    found = [(each["attributes"]["name"], await collecting.lab._bytes(each)) for each in documents]
    assert sorted(found) == [
        ("stderr.log", LOGS["stderr.log"]),
        ("stdout.log", LOGS["stdout.log"]),
        ("stdout.log", b"the program's own"),
    ]
    assert len({each["attributes"]["file_id"] for each in documents}) == 3


async def test_names_that_are_no_text_stay_apart(collecting: Collecting) -> None:
    run = await collecting.job({})
    outputs = os.fsencode(run.directory / "outputs")
    for name, content in ((b"a\xff.csv", b"1"), (b"a\xfe.csv", b"2"), ("a\ufffd.csv".encode(), b"3"), (b"b\xff", b"4")):
        Path(os.fsdecode(outputs + b"/" + name)).write_bytes(content)
    for name in (b"d\xff", b"d\xfe"):
        Path(os.fsdecode(outputs + b"/" + name)).mkdir()
        Path(os.fsdecode(outputs + b"/" + name + b"/same")).write_bytes(name)
    await run.tries(1)
    found = await collecting.lab.outputs(run.activity_id)
    assert found.pop("a\ufffd.csv") == b"3"
    assert found.pop("b\ufffd") == b"4"
    assert sorted(found.values()) == sorted([*LOGS.values(), b"1", b"2", b"d\xff", b"d\xfe"])
    run.nothing_is_left()


async def test_a_lost_lease_ends_everything(collecting: Collecting) -> None:
    files = {f"{number:02}": b"x" for number in range(80)}
    run = await collecting.job(files)
    before = asyncio.all_tasks()
    claim = await claimed(collecting.database, collecting.context, run.job_id)
    match = collecting.sandbox.faults.match
    seen = 0

    def count(target: str, method: str, where: str) -> Any:
        nonlocal seen
        seen += target == "store"
        return match(target, method, where)

    collecting.sandbox.faults.match = count  # type: ignore[method-assign]
    collecting.sandbox.faults.add("latency", "PUT .*/00", target="store", seconds=0.2)
    step = asyncio.create_task(perform(collecting.context, claim, Control(), _raise))
    await _until(lambda: seen > len(LOGS))
    async with collecting.database.connection() as connection:
        await connection.execute("UPDATE jobs SET lease_token = lease_token + 1")
    with pytest.raises(LeaseLost):
        await step
    stopped_at = seen
    assert stopped_at <= len(LOGS) + 40  # some half of them
    assert {task for task in asyncio.all_tasks() - before if not _is_the_servers(task)} == set()
    collecting.sandbox.faults.match = match  # type: ignore[method-assign]
    await run.tries(1)
    await run.is_exact(files)


async def test_cancelled_it_leaves_no_task_and_is_gone_on_with(collecting: Collecting) -> None:
    run = await collecting.job(LARGE)
    before = asyncio.all_tasks()
    hole = collecting.sandbox.faults.add("black_hole", "partNumber=2", target="store")
    first = collecting.sandbox.faults.add("latency", "PUT .*partNumber=1", target="store", seconds=0)
    claim = await claimed(collecting.database, collecting.context, run.job_id)
    step = asyncio.create_task(perform(collecting.context, claim, Control(), _raise))
    await _until(lambda: hole.hits)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert {task for task in asyncio.all_tasks() - before if not _is_the_servers(task)} == set()
    [begun] = collecting.sandbox.store.uploads(BUCKET, "")
    collecting.sandbox.faults.remove(hole.id)
    await run.tries(1)
    after = collecting.sandbox.store.upload(begun.id)
    assert after is not None
    assert after.completed is not None
    assert first.hits == 1
    await run.is_exact(LARGE)


async def test_what_is_under_way_to_a_file_that_is_gone_is_given_up(collecting: Collecting) -> None:
    run = await collecting.job(BOTH)
    collecting.sandbox.faults.add("status", "PUT .*(/one|partNumber=3)", target="store", status=503, times=8)
    await run.one_try()
    for path in ("one", "large.bin"):
        (run.directory / "outputs" / path).unlink()
    outcomes, _ = await run.tries(1)
    note = str(getattr(outcomes[0], "note", ""))
    assert "large.bin (is not there any more)" in note
    assert "one (is not there any more)" in note
    assert set(await collecting.lab.outputs(run.activity_id)) == {*LOGS, "d/two"}
    run.nothing_is_left()


async def test_a_damaged_record_of_an_upload_costs_a_revision_and_no_more(collecting: Collecting) -> None:
    run = await collecting.job({"one": b"1"})
    collecting.sandbox.faults.add("status", "PUT .*/one", target="store", status=503, times=4)
    await run.one_try()
    [file] = run.uploads.iterdir()
    file.write_bytes(b'{"half')
    await run.tries(1)
    assert run.revisions("one") == ["error", "complete"]
    await run.is_exact({"one": b"1"})


async def test_nothing_at_all_touches_nothing(collecting: Collecting) -> None:
    run = await collecting.job({}, logs={})
    shutil.rmtree(run.directory)
    calls = collecting.sandbox.faults.add("latency", target="any", seconds=0)
    outcome, _ = await run.one_try()
    assert outcome == Done()
    assert calls.hits == 0


async def test_ovation_that_is_away_uses_no_attempt(collecting: Collecting) -> None:
    run = await collecting.job(SMALL)
    collecting.sandbox.faults.add("status", target="api", status=503)
    outcome, job = await run.one_try()
    assert isinstance(outcome, Outage)
    assert outcome.party == OVATION
    assert job.attempt == 0
    collecting.sandbox.faults.remove()
    await run.tries(1)
    await run.is_exact(SMALL)


BORDER = 16 << 20


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    """A laboratory of the test's own, since it kills the agent."""
    async with laboratory(tmp_path) as opened_lab:
        yield opened_lab


async def test_an_agent_killed_in_the_middle_of_a_large_upload(lab: Lab) -> None:
    """With the agent's own sizes, as a process of its own, from the webhook to the outputs."""
    faults = lab.sandbox.faults
    hole = faults.add("black_hole", "PUT .*partNumber=2", target="store")
    first = faults.add("latency", "PUT .*partNumber=1", target="store", seconds=0)
    size = 2 * BORDER + 12_345
    activity_id = lab.activity(f"yes 'some line of text' | head -c {size} > /outputs/large; echo 1 > /outputs/one")

    async def in_the_middle() -> bool | None:
        begun = lab.sandbox.store.uploads(BUCKET, "")
        there = [part.number for each in begun for part in lab.sandbox.store.parts(each.id)]
        return (hole.hits > 0 and sorted(there) == [1, 3]) or None

    await until(in_the_middle, "only the second part on its way", lab.agent.log)
    [begun] = lab.sandbox.store.uploads(BUCKET, "")
    await lab.agent.kill()
    faults.remove(hole.id)
    environment = agent_environment(lab.sandbox.environment(), lab.directory / "agent")
    agent = await AgentProcess.start(environment, lab.directory / "agent" / "agent.log")
    lab.watch(agent)
    try:
        job = await agent.job(activity_id)
        assert (job["state"], job["exit_code"]) == ("succeeded", 0)
        text = b"some line of text\n"
        found = await lab.outputs(activity_id)
        assert found.keys() == {"stdout.log", "stderr.log", "large", "one"}
        assert found["one"] == b"1\n"
        assert found["large"] == (text * (size // len(text) + 1))[:size]
        assert first.hits == 1
        after = lab.sandbox.store.upload(begun.id)
        assert after is not None
        assert after.completed is not None
        assert lab.sandbox.store.uploads(BUCKET, "") == []
        revisions = lab.sandbox.model.records.entities_of_type(0, "Revision")
        assert {each.attributes["upload-status"] for each in revisions} == {"complete"}
        assert not list(lab.data_dir.glob("jobs/*/uploads"))
    finally:
        await agent.stop()


def _raise(error: Exception) -> None:
    raise error


async def _until(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def _is_the_servers(task: asyncio.Task[Any]) -> bool:
    """Say whether a task is the sandbox's, for a connection or a request."""
    return "aiohttp/web" in str(task.get_coro()) or "RequestHandler" in repr(task)
