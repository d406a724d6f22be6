"""What a job is and how it may move.

A state names the work that remains; a lease says whether somebody is doing it. There is no "in progress" state, so
there is nothing to rescue: when a worker dies its lease runs out, and the next claim finds the job where it was.

The whole state machine is `TRANSITIONS`. Whatever is not in it cannot happen: `decide` makes moves only from it, and
the database has the same list of states in a CHECK.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType


class State(StrEnum):
    """The work that remains."""

    QUEUED = "queued"  # admitted when there is room; nothing is on disk yet
    STAGING = "staging"  # inputs, related files and image are to be fetched
    LAUNCHING = "launching"  # the container is to be found or started
    RUNNING = "running"  # the container is to be watched until it ends
    COLLECTING = "collecting"  # logs, then outputs, are to be put on the Activity
    REPORTING = "reporting"  # the run is to be closed: record written, work directory removed
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
BEFORE_RUNNING = frozenset({State.QUEUED, State.STAGING, State.LAUNCHING})

TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.QUEUED: frozenset({State.STAGING, State.COLLECTING}),
        State.STAGING: frozenset({State.LAUNCHING, State.COLLECTING}),
        State.LAUNCHING: frozenset({State.RUNNING, State.COLLECTING, State.STAGING}),
        State.RUNNING: frozenset({State.COLLECTING, State.STAGING}),
        State.COLLECTING: frozenset({State.REPORTING}),
        State.REPORTING: frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED}),
        State.SUCCEEDED: frozenset(),
        State.FAILED: frozenset(),
        State.CANCELLED: frozenset(),
    }
)
"""Where a job may go from each state. Staying in a state (not yet, or another attempt) is always allowed."""


class Verdict(StrEnum):
    """What became of the run. It belongs to the container: a delivery that fails never changes it."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class FaultClass(StrEnum):
    """Whose fault a failure looks like."""

    USER_CODE = "user_code"  # the program in the image ended with an error
    IMAGE = "image"  # not an image, truncated, or without a default command
    MEMORY = "memory"
    TIME_LIMIT = "time_limit"
    NODE = "node"  # the machine rebooted or lost the run
    INPUT = "input"  # an input is missing or is not what Ovation says it is
    PLATFORM = "platform"  # Ovation, the object store or the container runtime
    AGENT = "agent"  # a bug in the agent


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a run failed, in words that a scientist understands."""

    cls: FaultClass
    message: str


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One input or related file, pinned: the exact entity, and the file name that it gets in the container."""

    entity_id: str
    type: str  # "Revision" or "Source"
    name: str  # as people see it in Ovation
    file_name: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run works on. Pinned when the job is made, so that later edits of the Activity change nothing in it."""

    inputs: tuple[PlannedFile, ...]
    related: tuple[PlannedFile, ...]
    image: PlannedFile
    wishes: Mapping[str, str] = field(default_factory=dict)  # the Activity's compute.cpus, .memory, .gpus and .time


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one Activity's image."""

    id: str
    organization: int
    activity_id: str
    activity_name: str
    project_id: str
    run: int  # its number on the Activity, from 1
    plan: Plan
    state: State
    attempt: int  # failures of the current state's work
    trigger: str  # webhook, reconcile, hpc_run, rerun
    requested_by: str | None
    created_at: datetime
    verdict: Verdict | None = None
    fault: Fault | None = None
    exit_code: int | None = None
    native_id: str | None = None
    folder_id: str | None = None
    launch: int = 1  # which start of the container: a run that its machine lost is started once more
    place: str | None = None  # the data directory that has the job's files
    host: str | None = None  # the machine with that directory
    host_seen_at: datetime | None = None  # when its agent was last there
    host_is_gone: bool = False  # that was too long ago, or it has stopped
    waiting_for: str | None = None
    waiting_party: str | None = None  # the outside party that is away
    due_at: datetime | None = None  # when its work is due
    held_until: datetime | None = None  # until when somebody's lease on it lasts, if nothing more is heard of them
    waiting_seconds: float = 0.0  # how long it has waited in this state by now
    suspicion: int = 0  # how often the process ended in the middle of the current state's work
    cancel_requested: bool = False
    started_at: datetime | None = None  # the container
    finished_at: datetime | None = None  # the job
    progress: Mapping[str, object] = field(default_factory=dict)
    exact_of: str | None = None  # the job that this one repeats, Revision by Revision
    resources: Mapping[str, object] = field(default_factory=dict)  # asked, granted, notes and used, once they are known


@dataclass(frozen=True, slots=True)
class Done:
    """The step did its work. What it learnt is written with the move."""

    verdict: Verdict | None = None
    fault: Fault | None = None
    exit_code: int | None = None
    native_id: str | None = None
    started_at: datetime | None = None
    note: str | None = None  # for the job's story
    resources: Mapping[str, object] | None = None  # what is to be added to the job's


@dataclass(frozen=True, slots=True)
class NotYet:
    """Nothing is wrong; look again after `seconds`. Uses no attempt. `elsewhere`: another agent may do it as well."""

    seconds: float
    reason: str
    elsewhere: bool = False


@dataclass(frozen=True, slots=True)
class Outage:
    """A party outside is away. It is waited out: no attempt is used, however long it lasts."""

    party: str  # "Ovation", "the object store"
    reason: str
    seconds: float | None = None  # how long it asked to be left alone
    is_told: bool = False  # whoever found out that the party is away has said so


@dataclass(frozen=True, slots=True)
class Failed:
    """The step failed. `final` when doing the same again cannot help."""

    fault: Fault
    final: bool


@dataclass(frozen=True, slots=True)
class Lost:
    """The machine lost the run: it restarted, or somebody stopped what ran there. It may be run again."""

    fault: Fault


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A batch job is to do the rest on a compute node. `place` names the directory that it will have there."""

    place: str
    waiting_for: str
    resources: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class NodeOver:
    """The batch job that worked at a job on a compute node is over, and the job is not. What was there is lost.

    `again`: the node's doing, so that it may be done again elsewhere.
    """

    fault: Fault
    verdict: Verdict
    again: bool


@dataclass(frozen=True, slots=True)
class SetAside:
    """The step keeps ending the agent's process: it is not tried again, so that the other jobs go on."""

    fault: Fault


Outcome = Done | NotYet | Outage | Failed | Lost | HandedOver | NodeOver | SetAside


@dataclass(frozen=True, slots=True)
class Move:
    """One fenced UPDATE: where the job goes, after how long it is due there, and what is written with it.

    `wait_seconds` counts from the database's own clock, so that hosts whose clocks differ agree.
    """

    state: State
    wait_seconds: float
    attempt: int
    launch: int
    verdict: Verdict | None
    fault: Fault | None
    exit_code: int | None
    native_id: str | None
    started_at: datetime | None
    waiting_for: str | None
    waiting_party: str | None = None
    elsewhere: bool = False  # any agent may go on with it
    place: str | None = None  # the directory on a compute node whose worker goes on with it
    resources: Mapping[str, object] | None = None  # what is added to the job's
