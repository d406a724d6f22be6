"""Slurm in text: the batch script, the arguments of its commands, its answers, and what its words mean.

Measured with Slurm 22.05 and 25.11. What is said here of states and exit codes holds for both.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath

from agent.domain.container import Ending
from agent.domain.resources import Resources

SEPARATOR = "|"
_FIELDS = ("JobID", "Name", "State", "Reason")
_ACCOUNT_FIELDS = ("JobIDRaw", "JobName", "State")
# Variables named SLURM_*, SBATCH_*, SQUEUE_*, SACCT_* and SCANCEL_* would change what commands do, but these two.
_KEPT = frozenset({"SLURM_CONF", "SLURM_JWT", "PATH", "HOME", "USER", "LOGNAME", "LD_LIBRARY_PATH"})


@dataclass(frozen=True, slots=True)
class Site:
    """How jobs are submitted here: `None` leaves it to Slurm. `arguments` are further ones of `sbatch`."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    arguments: tuple[str, ...] = ()
    preamble: str = ""  # lines of the batch script before the run: `module load apptainer`


@dataclass(frozen=True, slots=True)
class Row:
    """A job as `squeue` or `sacct` shows it. `state` is one word; `reason` says why it waits."""

    job_id: str
    name: str
    state: str
    reason: str = ""


class Phase(StrEnum):
    """What a state of Slurm's means for a run."""

    WAITS = "waits"
    RUNS = "runs"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a state means for a run.

    `words` say what it waits for, or how it ended; `ending` is for one that has ended without a record of its own.
    """

    phase: Phase
    ending: Ending = Ending.LOST
    words: str = ""


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of a run whose end is not on record, or only as "it was told to end" (`told_to_end`).

    `begun`: its runner has the claim. `row` is what Slurm says, nothing when it does not know the job. The two times
    are how long the node has given no new sign, and for how long Slurm has said the same.
    """

    begun: bool
    told_to_end: bool
    cancel_asked: bool
    row: Row | None
    silent_seconds: float
    said_for_seconds: float


_WAITS = Meaning(Phase.WAITS)
_RUNS = Meaning(Phase.RUNS)
_STATES: Mapping[str, Meaning] = {
    "PENDING": _WAITS,
    "CONFIGURING": _WAITS,
    "REQUEUED": _WAITS,
    "REQUEUE_FED": _WAITS,
    "REQUEUE_HOLD": _WAITS,
    "RESV_DEL_HOLD": _WAITS,
    "SPECIAL_EXIT": _WAITS,
    "RUNNING": _RUNS,
    "COMPLETING": _RUNS,
    "SUSPENDED": _RUNS,
    "STOPPED": _RUNS,
    "SIGNALING": _RUNS,
    "STAGE_OUT": _RUNS,
    "RESIZING": _RUNS,
    "UPDATE_DB": _RUNS,
    "EXPEDITING": _WAITS,
    "POWER_UP_NODE": _WAITS,
    "COMPLETED": Meaning(
        Phase.ENDED, Ending.LOST, "Slurm says that the run completed, but it left no record of how it ended."
    ),
    "FAILED": Meaning(Phase.ENDED, Ending.LOST, "The batch job failed before it could record how the run ended."),
    "TIMEOUT": Meaning(Phase.ENDED, Ending.TIME_LIMIT, "Slurm ended the run at the time limit of its job."),
    "DEADLINE": Meaning(Phase.ENDED, Ending.TIME_LIMIT, "Slurm ended the run at its deadline."),
    "OUT_OF_MEMORY": Meaning(Phase.ENDED, Ending.MEMORY, "The run needed more memory than its Slurm job was given."),
    "CANCELLED": Meaning(
        Phase.ENDED, Ending.OUTSIDE, "Somebody cancelled the run in Slurm (scancel), and not through Ovation's agent."
    ),
    "REVOKED": Meaning(Phase.ENDED, Ending.OUTSIDE, "Slurm revoked the job."),
    "NODE_FAIL": Meaning(Phase.ENDED, Ending.LOST, "The node on which the run was failed."),
    "BOOT_FAIL": Meaning(Phase.ENDED, Ending.LOST, "The node on which the run was to be did not start."),
    "LAUNCH_FAILED": Meaning(Phase.ENDED, Ending.LOST, "The node could not start the job."),
    "RECONFIG_FAIL": Meaning(Phase.ENDED, Ending.LOST, "The node could not be set up for the job."),
    "PREEMPTED": Meaning(Phase.ENDED, Ending.LOST, "The run had to make way for a job of a higher priority."),
}
_GONE = Meaning(Phase.ENDED, Ending.LOST, "Slurm does not know the job any more, and it left no record of its end.")
_PUT_BACK = Meaning(Phase.ENDED, Ending.LOST, "Slurm took the run off its node and put it back into the queue.")

# Reasons for which a job waits that no waiting ends, as the scheduler's source names them.
_NEVER: Mapping[str, str] = {
    "PartitionNodeLimit": "it asks for more nodes than its partition allows",
    "PartitionTimeLimit": "its time limit is longer than its partition allows",
    "BadConstraints": "no node has what it asks for",
    "PartitionConfig": "its partition does not allow the time, or has no node with what it asks for",
    "AccountNotAllowed": "its account may not use the partition",
    "QOSNotAllowed": "its QOS may not be used here",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its QOS is not valid",
    "QOSMaxCpuPerJobLimit": "it asks for more CPUs than its QOS allows",
    "QOSMaxMemoryPerJob": "it asks for more memory than its QOS allows",
    "QOSMaxWallDurationPerJobLimit": "its time limit is longer than its QOS allows",
    "AssocMaxWallDurationPerJobLimit": "its time limit is longer than its account allows",
    "AssocMaxCpuPerJobLimit": "it asks for more CPUs than its account allows",
    "AssocMaxMemPerJob": "it asks for more memory than its account allows",
    "DependencyNeverSatisfied": "a job on which it depends has failed",
    "JobHoldMaxRequeue": "Slurm has started it too often in vain",
    "JobLaunchFailure": "Slurm could not start it",
}
_HELD = {
    "JobHeldAdmin": "an administrator holds it: `scontrol release` lets it go on",
    "JobHeldUser": "somebody holds it: `scontrol release` lets it go on",
}


def meaning(state: str) -> Meaning:
    """Return what a state means; a word that nobody has heard of is taken for a job that goes on."""
    return _STATES.get(state.upper(), _RUNS)


def is_known(state: str) -> bool:
    """Say whether this is a state that this program has a meaning for."""
    return state.upper() in _STATES


def never(reason: str) -> str | None:
    """Return why a job that waits for this reason will never run, `None` when it may."""
    if reason.startswith("launch failed requeued held"):
        return "Slurm could not start it and holds it"
    return _NEVER.get(reason)


def waiting_for(reason: str) -> str:
    """Return what a job waits for, in words."""
    if held := _HELD.get(reason):
        return f"Slurm: {held}"
    if reason in {"", "None", "Priority", "Resources"}:
        return "Slurm: waiting for a free node"
    return f"Slurm: {' '.join(reason.split())[:200]}"


def judge(sight: Sight, silence_seconds: float) -> Meaning:
    """Say what has become of a run. It is over only by its own record, or by two signs: Slurm's word, and silence.

    Args:
        sight: what is seen.
        silence_seconds: how long both signs must have lasted. What one machine writes is seen late on another.
    """
    said = meaning(sight.row.state) if sight.row else _GONE
    if sight.told_to_end:
        found = _told_to_end(sight, said, silence_seconds)
    elif not sight.begun:
        found = _not_begun(sight, said, silence_seconds)
    elif said.phase is Phase.RUNS or min(sight.silent_seconds, sight.said_for_seconds) < silence_seconds:
        found = _RUNS  # Slurm gives up what goes on, when a node was silent or the controller has forgotten
    else:
        found = _PUT_BACK if said.phase is Phase.WAITS else said
    if sight.cancel_asked and found.phase is Phase.ENDED and found.ending in {Ending.LOST, Ending.OUTSIDE}:
        return Meaning(Phase.ENDED, Ending.CANCELLED)
    return found


def _told_to_end(sight: Sight, said: Meaning, silence_seconds: float) -> Meaning:
    """Why a run was told to end is what Slurm says of its job, once it has said it."""
    if sight.cancel_asked:
        return Meaning(Phase.ENDED, Ending.CANCELLED)
    if said.phase is Phase.WAITS:
        return _PUT_BACK
    if said.phase is Phase.RUNS:
        ends_now = sight.said_for_seconds < silence_seconds and sight.silent_seconds < silence_seconds
        return _RUNS if ends_now else Meaning(Phase.ENDED)
    state = sight.row.state.upper() if sight.row else ""
    return Meaning(Phase.ENDED) if state in {"", "COMPLETED", "FAILED"} else said


def _not_begun(sight: Sight, said: Meaning, silence_seconds: float) -> Meaning:
    if sight.row is not None and said.phase is Phase.WAITS:
        if why := never(sight.row.reason):
            words = f"Slurm would never run it: {why} ({sight.row.reason})."
            return Meaning(Phase.ENDED, Ending.REFUSED, words)
        return Meaning(Phase.WAITS, words=waiting_for(sight.row.reason))
    if said.phase is Phase.RUNS:
        return Meaning(Phase.WAITS, words="Slurm: its node is getting ready")
    if sight.said_for_seconds < silence_seconds:
        return _RUNS  # that it has begun may not be seen here yet
    return said


def script(directory: PurePosixPath, python: str, site: Site) -> str:
    """Return the batch script: the site's own lines, then the runner; what it leaves when it is killed is ended.

    The site's lines are read by a login shell: what `module` needs is in the profile. What signs in to Slurm
    is not for what runs here.
    """
    command = shlex.join([python, "-I", "-S", f"{directory}/runner.py"])
    place = shlex.quote(str(directory))
    lines = [
        "#!/bin/bash -l" if site.preamble.strip() else "#!/bin/bash",
        "umask 077",
        "unset SLURM_JWT",
        *site.preamble.strip().splitlines(),
        f"{command} --in-place {place} &",
        "runner=$!",
        "trap 'kill -TERM \"$runner\" 2>/dev/null' TERM INT",
        "while :; do",
        '    wait "$runner"; code=$?',
        '    kill -0 "$runner" 2>/dev/null || break  # else it was the trap that ended the wait',
        "done",
        f"{command} --sweep {place}",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def submission(name: str, directory: PurePosixPath, limit_seconds: float, site: Site, wanted: Resources) -> list[str]:
    """Return the arguments of `sbatch`; the script comes on its standard input.

    The job gets the environment of `sbatch`, which is `environment`. With anything less than all of it, Slurm makes the
    job's by a login of the user on the node: seconds for each job, which is put on hold where the login fails.
    """
    return [
        "--parsable",
        f"--job-name={name}",
        f"--comment={name}",
        "--no-requeue",
        "--export=ALL",
        "--nodes=1",
        "--ntasks=1",
        "--open-mode=append",
        f"--chdir={directory}",
        f"--output={directory}/slurm.log",
        f"--time={_minutes(limit_seconds)}",
        *([f"--partition={site.partition}"] if site.partition else []),
        *([f"--account={site.account}"] if site.account else []),
        *([f"--qos={site.qos}"] if site.qos else []),
        *([f"--cpus-per-task={wanted.cpus}"] if wanted.cpus else []),
        *([f"--mem={-(-wanted.memory_bytes // (1 << 20))}M"] if wanted.memory_bytes else []),
        *([f"--gres=gpu:{wanted.gpus}"] if wanted.gpus else []),
        *site.arguments,
    ]


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of Slurm's commands and of jobs: nothing that would change what they answer or submit."""
    return {name: value for name, value in given.items() if name in _KEPT} | {"LC_ALL": "C"}


def squeue_arguments(user: str) -> list[str]:
    """Return the arguments that list all jobs of a user, those that ended a while ago among them."""
    fields = ",".join(f"{name}:{SEPARATOR}" for name in _FIELDS)
    return ["--noheader", "--all", "--states=all", f"--user={user}", "-O", fields]


def sacct_arguments(job_ids: Iterable[str]) -> list[str]:
    """Return the arguments that ask the accounting about jobs."""
    jobs, fields = ",".join(sorted(job_ids)), ",".join(_ACCOUNT_FIELDS)
    return ["--noheader", "--parsable2", "--allocations", "--duplicates", f"--jobs={jobs}", f"--format={fields}"]


def rows(answer: str) -> list[Row]:
    """Read what `squeue` or `sacct` answers; a line that is none of its own is left out."""
    found = []
    for line in answer.splitlines():
        fields = [field.strip() for field in line.split(SEPARATOR)]
        if len(fields) >= 3 and re.fullmatch(r"\d+(_\d+)?", fields[0]):  # noqa: PLR2004 the id, the name, the state
            state = fields[2].split()[0] if fields[2] else ""  # "CANCELLED by 1000"
            found.append(Row(fields[0], fields[1], state.rstrip("+"), fields[3] if len(fields) > 3 else ""))  # noqa: PLR2004
    return found


def submitted_id(answer: str) -> str | None:
    """Return the job's id out of `sbatch --parsable`'s answer (`ID` or `ID;CLUSTER`)."""
    for line in answer.splitlines():
        if match := re.fullmatch(r"(\d+)(;[\w.-]+)?", line.strip()):
            return match[1]
    return None


# What sbatch says when the controller may have taken the job all the same, or may take it later.
_AMBIGUOUS = (
    "socket timed out",
    "unable to contact",
    "connection",
    "communication",
    "transport",
    "zero bytes",
    "timed out",
    "temporarily",
    "too many",
    "try again",
    "slurm backup controller",
    "munge",
    "maxjobcount",
    "maximum job count",
    "job violates accounting/qos policy (job submit limit",
    "configuration source",
)


def is_ambiguous(complaint: str) -> bool:
    """Say whether a submission that failed so may have happened, or may succeed later."""
    said = complaint.lower()
    return any(sign in said for sign in _AMBIGUOUS) or not said.strip()


def complaint(answer: str) -> str:
    """Return the last thing that a command complained about, without its prefix."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    said = [re.sub(r"^\w+: (error|fatal): ", "", line) for line in lines]
    return (said or [""])[-1][:300]


def _minutes(limit_seconds: float) -> int:
    return max(1, math.ceil(limit_seconds / 60))  # the runner's own limit is to the second
