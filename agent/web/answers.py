"""What the agent answers in JSON. The handlers are checked against these types, and `openapi` describes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic reads typing's own only from Python 3.12 on

from agent.domain.job import FaultClass, State, Verdict

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Trigger = Annotated[str, Field(json_schema_extra={"enum": ["webhook", "reconcile", "hpc_run", "rerun"]})]
JobId = Annotated[str, Field(json_schema_extra={"format": "uuid"})]

_described = with_config(ConfigDict(use_attribute_docstrings=True))


@_described
class ProblemDetail(TypedDict):
    """What is wrong."""

    detail: str
    """A sentence for people: what is wrong and, where that helps, what to do."""


@_described
class Problem(TypedDict):
    """An error, in the shape that Ovation's own API uses."""

    errors: ProblemDetail


@_described
class Alive(TypedDict):
    """The process answers."""

    status: Literal["alive"]


@_described
class Readiness(TypedDict):
    """The agent can work."""

    status: Literal["ready"]


@_described
class Accepted(TypedDict):
    """The delivery is stored."""

    accepted: Annotated[int, Field(ge=0)]
    """How many entities are looked at because of it; 0 when it is irrelevant, or a signed message came again."""


Fault = TypedDict("Fault", {"class": FaultClass, "message": str})  # `class` is no name for an attribute


@_described
class AgentAnswer(TypedDict):
    """The agent that has a run's files."""

    host: str
    seen_at: Time | None
    """When it was last there."""


@_described
class JobAnswer(TypedDict):
    """One run of one Activity's image."""

    id: JobId
    activity_id: str
    activity_name: str
    organization: int
    image_name: str
    image_revision_id: str
    run: Annotated[int, Field(ge=1)]
    """Its number on the Activity."""
    state: State
    """The work that remains."""
    verdict: Verdict | None
    """What became of the container, once it has ended."""
    fault: Fault | None
    """Why it failed, and whose fault that looks like."""
    exit_code: int | None
    trigger: Trigger
    """What started it."""
    requested_by: str | None
    """Who asked for it, if a person did."""
    attempt: Annotated[int, Field(ge=0)]
    """How often the current state's work has failed."""
    launch: Annotated[int, Field(ge=1)]
    """Which start of the container: a run that its machine lost is started again."""
    agent: AgentAnswer | None
    """Where its files are; nothing before it was let in."""
    waiting_for: str | None
    due_at: Time | None
    """When its work is, or was, due to be taken up; nothing once it has ended."""
    held_until: Time | None
    """While an agent works at it: until when it is that agent's if nothing more is heard of it."""
    cancel_requested: bool
    created_at: Time
    started_at: Time | None
    """When the container started."""
    finished_at: Time | None
    progress: dict[str, object]
    """How far the current state's work has come, in files and bytes."""
    resources: dict[str, object]
    """What the run asked for (`asked`), was given (`granted`, with `notes` on what it was not) and used (`used`)."""
    exact_of: JobId | None
    """The job that this one repeats, Revision by Revision (`rerun --exact`)."""
    native_id: str | None
    """The name that the run has where it runs."""
    live: bool
    """It has not ended."""


@_described
class JobList(TypedDict):
    """Jobs, newest first."""

    jobs: list[JobAnswer]


@_described
class EventAnswer(TypedDict):
    """One move of a job."""

    id: int
    at: Time
    state: State
    """Where it went, or stayed."""
    attempt: int
    note: str | None
    done: dict[str, object] | None
    """How far the step that was left had come."""


@_described
class EventList(TypedDict):
    """A job's story, oldest first."""

    events: list[EventAnswer]


@_described
class Delivery(TypedDict):
    """Something that told of an Activity."""

    at: Time
    source: str


@_described
class ActivityAnswer(TypedDict):
    """What led to an Activity's runs, or why there is none."""

    id: str
    organization: int | None
    judged_at: Time | None
    reasons: list[str]
    """Why no run was started at the last look; none if one was."""
    due_at: Time | None
    """When it is looked at again."""
    deliveries: list[Delivery]
    jobs: list[JobAnswer]


@_described
class Admission(TypedDict):
    """Whether this agent lets queued jobs in."""

    admits: bool
    under_way: Annotated[int, Field(ge=0)]
    """Jobs that were let in here and have not ended."""


@_described
class Started(TypedDict):
    """The run that does what was asked for: a new one, or the one that is under way."""

    job_id: JobId
    activity_id: str
    run: Annotated[int, Field(ge=1)]
    state: State


@_described
class Compared(TypedDict):
    """One output of two runs."""

    path: str
    result: Literal["identical", "differs", "missing", "new"]
    """Missing: only the earlier run has it; new: only this one."""


@_described
class Comparison(TypedDict):
    """The outputs of a run beside those of the run that it repeats."""

    job_id: JobId
    exact_of: JobId
    finished: bool
    """Both runs have ended: before, outputs may be missing because they are not there yet."""
    identical: bool
    """Every output has the same bytes in both, and neither has another one."""
    outputs: list[Compared]


@_described
class ChainFile(TypedDict):
    """A Revision in a chain of runs."""

    id: str
    name: str
    sha256: str | None
    made_by: JobId | None
    """The job of this agent's database that has made it."""
    activities: list[str]
    """For what no job of this database has made: the names of the Activities that Ovation knows around it."""


@_described
class ChainRun(TypedDict):
    """A run in a chain: image and inputs, and what came of them."""

    job_id: JobId
    activity_id: str
    activity_name: str
    run: Annotated[int, Field(ge=1)]
    state: State
    trigger: Trigger
    requested_by: str | None
    started_at: Time | None
    finished_at: Time | None
    image: ChainFile
    inputs: list[ChainFile]
    outputs: list[ChainFile]


@_described
class Chain(TypedDict):
    """A run, and those whose outputs it had as inputs, and so on: the one that was asked for comes first."""

    runs: list[ChainRun]
