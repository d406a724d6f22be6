"""A run's crate: what is in it, for every verdict; and how two runs are compared."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.domain.job import Fault, FaultClass, Verdict
from agent.domain.provenance import Image, Person, Result, Run, Source, compare, crate, is_parameters
from tests.crates import issues, read_back

IMAGE = Source("image-1", "Revision", "count.sif", 4096, "a" * 64)
FILES = {"stdout.log": b"hello\n", "stderr.log": b"", "tables/by day/50%.csv": b"1,2\n"}
RUN = Run(
    api_url="https://api.ovation.io",
    organization=7,
    activity_id="activity-1",
    activity_name="Counting",
    number=2,
    job_id="6d2f6c1e-1111-2222-3333-444455556666",
    launch=1,
    trigger="webhook",
    verdict=Verdict.SUCCEEDED,
    fault=None,
    exit_code=0,
    created_at=datetime(2026, 11, 25, 12, 0, tzinfo=UTC),
    started_at=datetime(2026, 11, 25, 12, 1, tzinfo=UTC),
    finished_at=datetime(2026, 11, 25, 12, 2, tzinfo=UTC),
    inputs=[
        Source("revision-1", "Revision", "reads.csv", 4, "b" * 64),
        Source("source-1", "Source", "mouse", 120, "c" * 64),
        Source("revision-2", "Revision", "run-parameters.json", 9, "d" * 64),
    ],
    related=[IMAGE, Source("revision-3", "Revision", "protocol.pdf", 9, "e" * 64)],
    image=IMAGE,
    image_facts=Image(
        {"Version": "1.0", "b": "2"}, "#!/bin/sh\nexec count", "Bootstrap: localimage", "apptainer version 1.4.5"
    ),
    results=[
        Result(path, f"result-{number}", len(content), "f" * 64, "text/csv", is_log=path.endswith(".log"))
        for number, (path, content) in enumerate(FILES.items())
    ],
    agent_version="0.1.0",
    executor="slurm",
    native_id="41",
    requested_by=Person("user-1", "Ada"),
    operators=[Person("user-2", "Grace"), Person("user-1", "Ada")],
    command=["apptainer", "run", "--mount", 'type=bind,"source=inputs",destination=/inputs,ro', "related/count.sif"],
    amounts=[("CPUs granted", 4, "CPU"), ("wall time", 59.25, "second")],
    notes=["compute.cpus: 64 CPUs were asked for, 4 CPUs are allowed here"],
)
FAILED = replace(
    RUN, verdict=Verdict.FAILED, fault=Fault(FaultClass.USER_CODE, "The program ended with exit code 3."), exit_code=3
)
NEVER_RAN = replace(
    FAILED,
    fault=Fault(FaultClass.INPUT, "reads.csv cannot be fetched."),
    exit_code=None,
    started_at=None,
    finished_at=None,
    inputs=[Source("revision-1", "Revision", "reads.csv")],
    image_facts=Image({}),
    results=[RUN.results[1]],
    requested_by=None,
    operators=(),
    command=(),
    amounts=(),
    notes=(),
    native_id=None,
    executor="local",
)


def graph(run: Run) -> dict[str, Any]:
    return {entity["@id"]: entity for entity in crate(run)["@graph"]}


@pytest.mark.parametrize("run", [RUN, FAILED, replace(RUN, verdict=Verdict.CANCELLED), NEVER_RAN])
def test_every_required_check_of_the_profile_passes(run: Run) -> None:
    files = {result.path: FILES[result.path] for result in run.results}
    assert issues(crate(run), files) == []


def test_the_validator_can_say_no() -> None:
    document = crate(RUN)
    [action] = [entity for entity in document["@graph"] if entity["@type"] == "CreateAction"]
    del action["instrument"]
    assert issues(document, FILES)


def test_what_a_reader_finds() -> None:
    found = read_back(crate(RUN), FILES)
    [action] = [each for each in found.contextual_entities if each.type == "CreateAction"]
    assert action["instrument"].id.endswith("/entities/image-1")
    assert {each.id for each in action["result"]} == {"stdout.log", "stderr.log", "tables/by%20day/50%25.csv"}
    assert action["agent"][0]["name"] == "Ada"
    assert action["startTime"] == "2026-11-25T12:01:00+00:00"
    assert found.root_dataset["conformsTo"].id == "https://w3id.org/ro/wfrun/process/0.5"


def test_inputs_have_their_revision_address_size_and_digest() -> None:
    entity = graph(RUN)["https://api.ovation.io/api/v1/o/7/entities/revision-1"]
    assert (entity["identifier"], entity["contentSize"], entity["sha256"]) == ("revision-1", "4", "b" * 64)
    parameters = graph(RUN)["https://api.ovation.io/api/v1/o/7/entities/revision-2"]
    assert parameters["additionalType"] == "parameters"


def test_a_failure_says_why() -> None:
    action = graph(FAILED)[f"#run-{RUN.job_id}"]
    assert action["actionStatus"] == {"@id": "http://schema.org/FailedActionStatus"}
    assert action["error"] == "user_code: The program ended with exit code 3."
    assert "error" not in graph(RUN)[f"#run-{RUN.job_id}"]


def test_who_is_named_once_and_without_anybody_the_agent_is() -> None:
    assert [each["@id"] for each in graph(RUN)[f"#run-{RUN.job_id}"]["agent"]] == ["#person-user-1", "#person-user-2"]
    assert graph(NEVER_RAN)[f"#run-{RUN.job_id}"]["agent"] == {"@id": "#agent"}


@pytest.mark.parametrize("run", [RUN, FAILED, NEVER_RAN])
def test_every_reference_leads_somewhere_and_no_id_is_there_twice(run: Run) -> None:
    entities = crate(run)["@graph"]
    ids = [entity["@id"] for entity in entities]
    assert len(ids) == len(set(ids))
    outside = ("http://schema.org/", "https://w3id.org/ro/")

    def references(value: Any) -> list[str]:
        if isinstance(value, dict) and value.keys() == {"@id"}:
            return [value["@id"]]
        if isinstance(value, list):
            return [found for each in value for found in references(each)]
        return []

    named = {found for entity in entities for value in entity.values() for found in references(value)}
    assert {each for each in named if not each.startswith(outside)} <= set(ids)


def test_the_same_run_makes_the_same_crate() -> None:
    assert json.dumps(crate(RUN)) == json.dumps(crate(replace(RUN)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("parameters.json", True),
        ("run-params.yaml", True),
        ("Config.TOML", True),
        ("my_settings.ini", True),
        ("params.csv", False),
        ("reads.json", False),
        ("reparameterised.txt", False),
    ],
)
def test_files_of_parameters_are_recognised(name: str, expected: bool) -> None:
    assert is_parameters(name) is expected


DIGESTS = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["1", "2"]))


@given(DIGESTS, DIGESTS)
def test_comparing(earlier: dict[str, str], later: dict[str, str]) -> None:
    found = compare(earlier, later)
    assert found.keys() == earlier.keys() | later.keys()
    assert all(result == "identical" for result in found.values()) == (earlier == later)
    swapped = {"missing": "new", "new": "missing"}
    assert compare(later, earlier) == {path: swapped.get(result, result) for path, result in found.items()}
