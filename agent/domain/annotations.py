"""What a run says on its Activity: a timeline event, properties to filter on and, when it failed, a note."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from agent.domain.job import Fault, FaultClass, Verdict

RUN = "compute.run"
STATUS = "compute.status"
IMAGE_SHA256 = "compute.image.sha256"
EXIT_CODE = "compute.exit_code"
_MOST_LINES = 10
_MOST_CHARACTERS = 200

_ADVICE: Mapping[FaultClass, tuple[str, str]] = {
    FaultClass.USER_CODE: (
        "the code in the image",
        "Read the log's last lines below, and try the image on the same inputs with `ovation-agent try`.",
    ),
    FaultClass.IMAGE: (
        "the image",
        "Build the image again, try it with `ovation-agent try`, and upload it as a new Revision.",
    ),
    FaultClass.MEMORY: (
        "memory",
        "Ask for more with the property `compute.memory` on this Activity (for instance 32G), or give it less to do.",
    ),
    FaultClass.TIME_LIMIT: (
        "the time limit",
        "Ask for more with the property `compute.time` on this Activity (for instance 24h), or give it less to do.",
    ),
    FaultClass.NODE: (
        "the machine that ran it",
        "Ask for another run. If it happens again, tell whoever operates the compute agent.",
    ),
    FaultClass.INPUT: (
        "an input",
        "Download that input in Ovation. If that does not work either, upload it again.",
    ),
    FaultClass.PLATFORM: (
        "Ovation or the machines around it",
        "Ask for another run later. If it happens again, tell whoever operates the compute agent.",
    ),
    FaultClass.AGENT: (
        "the compute agent",
        "Tell whoever operates the compute agent; its log has more.",
    ),
}
_VERDICTS = {Verdict.SUCCEEDED: "succeeded", Verdict.FAILED: "failed", Verdict.CANCELLED: "was cancelled"}


@dataclass(frozen=True, slots=True)
class Told:
    """What is told of a run."""

    job_id: str
    number: int
    image_name: str
    image_sha256: str | None
    verdict: Verdict
    fault: Fault | None
    exit_code: int | None
    started_at: datetime
    finished_at: datetime
    stderr_tail: str = ""


def event(told: Told) -> dict[str, str]:
    """Return the timeline event of a run."""
    cause = f": {told.fault.message}" if told.fault else ""
    return {
        "name": f"Run {told.number} of {told.image_name} {_VERDICTS[told.verdict]}",
        "notes": f"{_VERDICTS[told.verdict].capitalize()}{cause} {mark(told.job_id)}",
        "start": told.started_at.isoformat(),
        "end": told.finished_at.isoformat(),
    }


def properties(told: Told) -> dict[str, str]:
    """Return what people filter on, by key."""
    found = {RUN: str(told.number), STATUS: str(told.verdict)}
    if told.image_sha256:
        found[IMAGE_SHA256] = told.image_sha256
    if told.exit_code is not None:
        found[EXIT_CODE] = str(told.exit_code)
    return found


def note(told: Told) -> dict[str, str] | None:
    """Return the note on a failed run, nothing for others: what failed, whose fault it looks like, what to try."""
    if told.fault is None or told.verdict is not Verdict.FAILED:
        return None
    whose, advice = _ADVICE[told.fault.cls]
    parts = [
        f"Run {told.number} of {told.image_name} failed.",
        told.fault.message,
        f"It looks like the fault of {whose}.",
    ]
    if lines := _last_lines(told.stderr_tail):
        parts.append("Its last lines on standard error:\n" + "\n".join(f"    {line}" for line in lines))
    parts += [f"What to try: {advice}", mark(told.job_id)]
    return {"text": "\n\n".join(parts), "timestamp": told.finished_at.isoformat()}


def mark(job_id: str) -> str:
    """Return by what an annotation of a run is known again."""
    return f"(job {job_id})"


def _last_lines(text: str) -> list[str]:
    lines = ["".join(c if c.isprintable() else " " for c in line).rstrip() for line in text.splitlines()]
    return [line[:_MOST_CHARACTERS] for line in lines if line.strip()][-_MOST_LINES:]
