"""What is said of a run on its Activity."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from agent.domain.annotations import Told, event, mark, note, properties
from agent.domain.job import Fault, FaultClass, Verdict

TOLD = Told(
    job_id="job-1",
    number=3,
    image_name="count.sif",
    image_sha256="a" * 64,
    verdict=Verdict.SUCCEEDED,
    fault=None,
    exit_code=0,
    started_at=datetime(2026, 11, 25, 12, 0, tzinfo=UTC),
    finished_at=datetime(2026, 11, 25, 12, 1, tzinfo=UTC),
)


def failed(cls: FaultClass, tail: str = "") -> Told:
    return replace(TOLD, verdict=Verdict.FAILED, fault=Fault(cls, "It broke."), exit_code=3, stderr_tail=tail)


def test_an_event_has_start_end_and_verdict() -> None:
    assert event(TOLD) == {
        "name": "Run 3 of count.sif succeeded",
        "notes": "Succeeded (job job-1)",
        "start": "2026-11-25T12:00:00+00:00",
        "end": "2026-11-25T12:01:00+00:00",
    }
    assert event(failed(FaultClass.MEMORY))["notes"] == "Failed: It broke. (job job-1)"


def test_properties_are_what_people_filter_on() -> None:
    assert properties(TOLD) == {
        "compute.run": "3",
        "compute.status": "succeeded",
        "compute.image.sha256": "a" * 64,
        "compute.exit_code": "0",
    }
    assert properties(replace(TOLD, image_sha256=None, exit_code=None)).keys() == {"compute.run", "compute.status"}


def test_only_a_failure_has_a_note() -> None:
    assert note(TOLD) is None
    assert note(replace(TOLD, verdict=Verdict.CANCELLED)) is None


@pytest.mark.parametrize("cls", list(FaultClass))
def test_a_note_says_what_whose_fault_and_what_to_try(cls: FaultClass) -> None:
    said = note(failed(cls))
    assert said is not None
    assert "It broke." in said["text"]
    assert "It looks like the fault of" in said["text"]
    assert "What to try: " in said["text"]
    assert said["text"].endswith(mark("job-1"))


def test_the_last_lines_of_standard_error_are_quoted_without_control_characters() -> None:
    said = note(failed(FaultClass.USER_CODE, "\n".join(["first", *map(str, range(9)), "\x1b[31mred" + "x" * 500, ""])))
    assert said is not None
    lines = [line for line in said["text"].splitlines() if line.startswith("    ")]
    assert len(lines) == 10
    assert "first" not in said["text"]
    assert lines[-1].startswith("     [31mred")
    assert len(lines[-1]) == 204
