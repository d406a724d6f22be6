"""The main job on real parts: webhook, PostgreSQL, staging over HTTP, Apptainer, S3 upload, outputs on the Activity."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.images import SCRIPT, images
from tests.lab import Lab, laboratory

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    before = os.umask(0o077)  # of whoever starts the agent: its containers read what is staged all the same
    try:
        async with laboratory(tmp_path_factory.mktemp("lab"), AGENT_MAX_RUNNING="4") as opened:
            os.umask(before)
            yield opened
    finally:
        os.umask(before)


async def test_results_come_back(lab: Lab) -> None:
    script = """
        echo "counting"; echo "a warning" >&2
        mkdir -p /outputs/tables/by-day
        wc -c < /inputs/reads.csv > /outputs/tables/by-day/count.txt
        cat /related/protocol.txt > /outputs/protocol.txt
        printf '' > /outputs/empty
    """
    job, outputs = await lab.run(
        script,
        inputs=[lab.revision("reads.csv", "1,2,3\n"), lab.revision("nothing.csv", "")],
        related=[lab.image(), lab.revision("protocol.txt", "step 1")],
    )
    assert (job["state"], job["verdict"], job["exit_code"], job["fault"]) == ("succeeded", "succeeded", 0, None)
    assert job["trigger"] == "webhook"
    assert outputs == {
        "stdout.log": b"counting\n",
        "stderr.log": b"a warning\n",
        "tables/by-day/count.txt": b"6\n",
        "protocol.txt": b"step 1",
        "empty": b"",
    }


async def test_outputs_are_in_a_folder_of_the_run(lab: Lab) -> None:
    activity_id = lab.activity("echo 1 > /outputs/one", name="Align reads / day 1")
    await lab.agent.job(activity_id)
    project = (await lab.get(f"/api/v1/o/0/projects/{lab.project_id}"))["project"]
    folders = (await lab.get(project["relationships"]["folders"]["related"]))["folders"]
    assert [each["attributes"]["name"] for each in folders].count("Align reads / day 1 run 1") == 1


async def test_a_failing_command_still_delivers(lab: Lab) -> None:
    job, outputs = await lab.run("echo part > /outputs/part.txt; echo 'no such gene: BRCA9' >&2; exit 7")
    assert (job["state"], job["exit_code"]) == ("failed", 7)
    assert job["fault"]["class"] == "user_code"
    assert "no such gene: BRCA9" in job["fault"]["message"]
    assert outputs["part.txt"] == b"part\n"
    assert outputs["stderr.log"] == b"no such gene: BRCA9\n"


async def test_a_legacy_image_runs(lab: Lab) -> None:
    job, outputs = await lab.run("echo old > /outputs/o", related=[lab.image(images().scripted_simg)])
    assert job["state"] == "succeeded"
    assert outputs["o"] == b"old\n"


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("without_command", "default command"),
        ("truncated", "not"),
    ],
)
async def test_an_image_at_fault_is_told(lab: Lab, image: str, words: str) -> None:
    job, outputs = await lab.run("true", related=[lab.image(getattr(images(), image))])
    assert (job["state"], job["fault"]["class"]) == ("failed", "image")
    assert words in job["fault"]["message"]
    assert job["fault"]["message"].encode() in outputs["stderr.log"]


@pytest.mark.parametrize("content", [b"", b"this is not an image", b"\0" * 4096])
async def test_something_that_is_not_an_image_is_told(lab: Lab, content: bytes) -> None:
    job, outputs = await lab.run("true", related=[lab.revision("image.sif", content)])
    assert (job["state"], job["fault"]["class"]) == ("failed", "image")
    assert "image.sif" in job["fault"]["message"]
    assert b"ovation-agent: the image was not run" in outputs["stderr.log"]


NAMES = [
    "with space.csv",
    "Zellkultur Ä µ 漢字 🧬.csv",
    "two\nlines.csv",
    ".hidden",
    "-rf",
    "-",
    "x" * 251 + ".csv",
    "ä" * 200 + ".fastq.gz",
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "same.csv",
    "Same.csv",
    "same.csv",
    ".manifest.json",
    "comma,colon:quote\"'$(touch oops)`.csv",
]


async def test_names_from_outside_stay_inside(lab: Lab) -> None:
    revisions = [lab.revision(name, f"content {number}") for number, name in enumerate(NAMES)]
    script = """
        cp /inputs/.manifest.json /outputs/manifest.json
        mkdir /outputs/copies
        cd /inputs && for file in * .[!.]* ..?*; do [ -e "$file" ] && cp -- "$file" /outputs/copies/; done; true
    """
    job, outputs = await lab.run(script, inputs=revisions)
    assert job["state"] == "succeeded", job["fault"]
    files = {each["id"]: each for each in json.loads(outputs["manifest.json"])["files"]}
    for number, (name, revision_id) in enumerate(zip(NAMES, revisions, strict=True)):
        entry = files[revision_id]
        assert entry["name"] == name
        assert "/" not in entry["file_name"]
        assert outputs[f"copies/{entry['file_name']}"] == f"content {number}".encode()
    assert len({entry["file_name"] for entry in files.values()}) == len(files) == len(NAMES) + 1
    assert {entry["file_name"] for entry in files.values()} >= {"with space.csv", "same.csv", "Same.csv", ".hidden"}


async def test_nothing_is_written_outside_the_jobs_directory(lab: Lab) -> None:
    before = set(lab.data_dir.iterdir())
    job, _ = await lab.run("true", inputs=[lab.revision("../../../escaped", "x"), lab.revision("../escaped", "x")])
    assert job["state"] == "succeeded"
    assert set(lab.data_dir.iterdir()) == before
    found = [path for path in lab.directory.rglob("*escaped*") if "sandbox" not in path.parts]
    assert found == []


async def test_hostile_output_names_and_kinds(lab: Lab) -> None:
    script = r"""
        cd /outputs
        echo a > 'two
lines'
        echo b > ' leading space'; echo c > '-rf'; echo d > .hidden; echo e > 'ünïcode 漢字'
        echo f > "$(printf 'not-utf8-\377')"
        ln -s /etc/passwd passwd; ln -s /inputs inputs-link; ln -s . loop; mkfifo pipe
        mkdir -p deep/er/still; echo g > deep/er/still/file; mkdir nothing-inside
        mkdir closed; echo h > closed/inside; chmod 000 closed; echo i > secret; chmod 000 secret
    """
    job, outputs = await lab.run(script)
    assert job["state"] == "succeeded", job["fault"]
    assert outputs == {
        "stdout.log": b"",
        "stderr.log": b"",
        "two\nlines": b"a\n",
        " leading space": b"b\n",
        "-rf": b"c\n",
        ".hidden": b"d\n",
        "ünïcode 漢字": b"e\n",
        "not-utf8-\N{REPLACEMENT CHARACTER}": b"f\n",
        "deep/er/still/file": b"g\n",
        "closed/inside": b"h\n",
        "secret": b"i\n",
    }
    _, story = await lab.agent.call("GET", f"/api/jobs/{job['id']}/events")
    [note] = [each["note"] for each in story["events"] if each["note"]]
    for skipped in ("passwd (a symbolic link)", "loop (a symbolic link)", "pipe (a named pipe)"):
        assert skipped in note


async def test_an_empty_outputs_directory_is_told(lab: Lab) -> None:
    job, outputs = await lab.run("true")
    assert job["state"] == "succeeded"
    assert set(outputs) == {"stdout.log", "stderr.log"}
    _, story = await lab.agent.call("GET", f"/api/jobs/{job['id']}/events")
    assert "the container left nothing in /outputs" in [each["note"] for each in story["events"]]


async def test_a_source_is_given_as_its_document(lab: Lab) -> None:
    source = lab.sandbox.admin.create_source("mouse 7", {"strain": "C57BL/6"}, lab.project_id)
    job, outputs = await lab.run("cp '/inputs/mouse 7.source.json' /outputs/", inputs=[source["_id"]])
    assert job["state"] == "succeeded", job["fault"]
    assert json.loads(outputs["mouse 7.source.json"])["attributes"]["strain"] == "C57BL/6"


async def test_an_old_revision_without_a_status_is_complete(lab: Lab) -> None:
    old = lab.sandbox.admin.old_revision(lab.project_id, "old.txt", "from 2016")
    job, outputs = await lab.run("cp /inputs/old.txt /outputs/", inputs=[old["_id"]])
    assert job["state"] == "succeeded", job["fault"]
    assert outputs["old.txt"] == b"from 2016"


async def test_an_input_that_is_not_there_is_told(lab: Lab) -> None:
    missing = lab.sandbox.admin.missing_revision(lab.project_id, "gone.csv")
    job, outputs = await lab.run("true", inputs=[missing["_id"]])
    assert (job["state"], job["fault"]["class"]) == ("failed", "input")
    assert "gone.csv" in job["fault"]["message"]
    assert b"gone.csv" in outputs["stderr.log"]
    assert job["started_at"] is None


async def test_an_input_that_is_still_uploading_is_waited_for(lab: Lab) -> None:
    revision = lab.sandbox.admin.in_progress_revision(lab.project_id, "reads_2.fastq.gz")
    activity_id = lab.activity("true", inputs=[revision["_id"]])
    assert await lab.agent.why(activity_id, "waiting for") == ["waiting for reads_2.fastq.gz to finish uploading"]
    _, activity = await lab.agent.call("GET", f"/api/activities/{activity_id}")
    assert activity["due_at"] is not None  # it is looked at again without another webhook
    assert activity["jobs"] == []


async def test_an_input_whose_upload_failed_is_told(lab: Lab) -> None:
    revision = lab.sandbox.admin.failed_revision(lab.project_id, "broken.csv")
    activity_id = lab.activity("true", inputs=[revision["_id"]])
    assert await lab.agent.why(activity_id, "broken.csv") == [
        "the upload of broken.csv failed: upload it again or remove it"
    ]


async def test_an_activity_without_an_image_is_not_run(lab: Lab) -> None:
    activity_id = lab.activity("true", related=[lab.revision("notes.txt")])
    [reason] = await lab.agent.why(activity_id, "compute image")
    assert reason.startswith("no related file is a compute image")
    assert await lab.agent.jobs(activity_id) == []


async def test_what_the_agent_uploads_starts_nothing(lab: Lab) -> None:
    activity_id = lab.activity("echo 1 > /outputs/x.sif")
    await lab.agent.job(activity_id)
    await lab.agent.why(activity_id, "nothing new since the last run")
    assert len(await lab.agent.jobs(activity_id)) == 1


async def test_a_new_input_starts_another_run(lab: Lab) -> None:
    activity_id = lab.activity("ls /inputs")
    await lab.agent.job(activity_id)
    lab.sandbox.admin.link(activity_id, "inputs", lab.revision("more.csv"), "activities")
    job = await lab.agent.job(activity_id, run=2)
    assert job["state"] == "succeeded"
    stdout = [
        body for path, body in (await _outputs_of_all_runs(lab, activity_id)).items() if path.endswith("stdout.log")
    ]
    assert sorted(stdout) == [f"more.csv\n{SCRIPT}\n".encode(), f"{SCRIPT}\n".encode()]


async def test_a_change_during_a_run_is_judged_after_it(lab: Lab) -> None:
    activity_id = lab.activity("while [ ! -e /inputs/go ]; do sleep 0.1; [ $((i=i+1)) -gt 30 ] && break; done; true")
    await lab.agent.job(activity_id, states={"running"})
    lab.sandbox.admin.link(activity_id, "inputs", lab.revision("go"), "activities")
    await lab.agent.why(activity_id, "run 1 is under way")
    assert (await lab.agent.job(activity_id, run=1))["state"] == "succeeded"
    assert (await lab.agent.job(activity_id, run=2))["state"] == "succeeded"


async def test_a_file_link_made_from_the_other_end_counts(lab: Lab) -> None:
    revision = lab.revision("reads.csv")
    activity_id = lab.activity("cp /inputs/reads.csv /outputs/", inputs=[])
    lab.sandbox.admin.link(revision, "activities", activity_id, "inputs")
    await lab.agent.job(activity_id, states={"succeeded"})
    jobs = await lab.agent.jobs(activity_id)
    last = await lab.agent.job(activity_id, run=max(job["run"] for job in jobs))
    assert last["state"] == "succeeded"


async def test_a_cancelled_run_delivers_what_there_is(lab: Lab) -> None:
    activity_id = lab.activity("echo begun; echo part > /outputs/part; sleep 600")
    job = await lab.agent.job(activity_id, states={"running"})
    assert await _log_has(lab, job["id"], "begun")
    status, answer = await lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel")
    assert (status, answer["cancel_requested"]) == (202, True)
    job = await lab.agent.job(activity_id)
    assert (job["state"], job["verdict"]) == ("cancelled", "cancelled")
    outputs = await lab.outputs(activity_id)
    assert (outputs["part"], outputs["stdout.log"]) == (b"part\n", b"begun\n")
    status, answer = await lab.agent.call("POST", f"/api/jobs/{job['id']}/cancel")
    assert status == 409


async def test_finished_jobs_leave_only_their_logs(lab: Lab) -> None:
    job, _ = await lab.run("echo hello; echo 1 > /outputs/one")
    directory = lab.data_dir / "jobs" / job["id"]
    for gone in ("inputs", "related", "run-1/outputs", "run-1/scratch"):
        assert not (directory / gone).exists()
    assert await lab.agent.call("GET", f"/api/jobs/{job['id']}/logs/stdout") == (200, "hello\n")


async def _log_has(lab: Lab, job_id: str, words: str) -> bool:
    while True:
        status, text = await lab.agent.call("GET", f"/api/jobs/{job_id}/logs/stdout")
        if status == 200 and words in text:
            return True


async def _outputs_of_all_runs(lab: Lab, activity_id: str) -> dict[str, Any]:
    found = {}
    for document in await lab.output_documents(activity_id):
        found[f"{document['_id']}/{document['attributes']['name']}"] = await lab._bytes(document)
    return found


@pytest.mark.parametrize(
    ("kind", "where", "options"),
    [
        ("corrupt", "store", {"after_bytes": 3}),
        ("truncate", "store", {"after_bytes": 3}),
        ("close", "store", {"after_bytes": 3}),
        ("reset", "store", {"after_bytes": 3}),
        ("status", "store", {"status": 503}),
        ("expired_url", "api", {}),
    ],
)
async def test_bytes_that_arrive_wrong_are_fetched_again(
    lab: Lab, kind: str, where: str, options: dict[str, Any]
) -> None:
    reads = lab.revision("reads.bin", b"the very bytes")
    path = r"GET .*reads\.bin" if where == "store" else f"GET .*{reads}"
    fault = lab.sandbox.faults.add(kind, path, target=where, times=1, **options)
    try:
        job, outputs = await lab.run("cp /inputs/reads.bin /outputs/", inputs=[reads])
    finally:
        lab.sandbox.faults.remove(fault.id)
    assert fault.hits == 1
    assert (job["state"], job["attempt"]) == ("succeeded", 0)
    assert outputs["reads.bin"] == b"the very bytes"


async def test_an_upload_whose_answer_is_lost_is_there_once(lab: Lab) -> None:
    fault = lab.sandbox.faults.add("lost_answer", "POST .*/(files|folders|projects)/", target="api", times=3)
    try:
        job, outputs = await lab.run("echo 1 > /outputs/one; mkdir /outputs/d; echo 2 > /outputs/d/two")
    finally:
        lab.sandbox.faults.remove(fault.id)
    assert fault.hits == 3
    assert (job["state"], job["attempt"]) == ("succeeded", 0)
    assert (outputs["one"], outputs["d/two"]) == (b"1\n", b"2\n")
    folders = await _folders_of(lab, f"{job['activity_name']} run 1")
    assert len(folders) == 1
    files = (await lab.get(folders[0]["relationships"]["files"]["related"]))["files"]
    assert sorted(each["attributes"]["name"] for each in files) == [
        "one",
        "ro-crate-metadata.json",
        "stderr.log",
        "stdout.log",
    ]


async def _folders_of(lab: Lab, name: str) -> list[dict[str, Any]]:
    project = (await lab.get(f"/api/v1/o/0/projects/{lab.project_id}"))["project"]
    folders: list[dict[str, Any]] = (await lab.get(project["relationships"]["folders"]["related"]))["folders"]
    return [each for each in folders if each["attributes"]["name"] == name]
