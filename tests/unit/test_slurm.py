"""Slurm in text: answers as its versions give them, what its words mean, and what is judged from what is seen."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.domain import slurm
from agent.domain.container import Ending, judge
from agent.domain.job import FaultClass
from agent.domain.resources import NOTHING_SAID, Resources
from agent.domain.slurm import Meaning, Phase, Row, Sight, Site

NAME = "ovation-6d2f6c1e-1111-2222-3333-444455556666-1"

# Every state that slurm/slurm.h has had from 20.11 to 25.11, as `squeue -t all` and `sacct` print it.
STATES = (
    *("PENDING", "RUNNING", "SUSPENDED", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"),
    *("BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "LAUNCH_FAILED", "RECONFIG_FAIL", "CONFIGURING", "COMPLETING"),
    *("RESIZING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SIGNALING", "SPECIAL_EXIT"),
    *("STAGE_OUT", "STOPPED", "REVOKED", "POWER_UP_NODE", "UPDATE_DB", "EXPEDITING"),
)


@pytest.mark.parametrize("state", STATES)
def test_every_state_has_a_meaning(state: str) -> None:
    assert slurm.is_known(state)
    found = slurm.meaning(state)
    assert found.phase is not Phase.ENDED or found.words.endswith(".")


@pytest.mark.parametrize(
    ("state", "cls"),
    [
        ("TIMEOUT", FaultClass.TIME_LIMIT),
        ("DEADLINE", FaultClass.TIME_LIMIT),
        ("OUT_OF_MEMORY", FaultClass.MEMORY),
        ("NODE_FAIL", FaultClass.NODE),
        ("BOOT_FAIL", FaultClass.NODE),
        ("PREEMPTED", FaultClass.NODE),
        ("FAILED", FaultClass.NODE),
        ("COMPLETED", FaultClass.NODE),  # without a record of its own it is no success
        ("CANCELLED", FaultClass.PLATFORM),
        ("REVOKED", FaultClass.PLATFORM),
    ],
)
def test_each_end_has_a_fault_and_words(state: str, cls: FaultClass) -> None:
    found = slurm.meaning(state)
    judgement = judge(found.ending, None, "", detail=found.words)
    assert judgement.fault is not None
    assert (judgement.fault.cls, judgement.fault.message) == (cls, found.words)


def test_a_state_that_nobody_has_heard_of_goes_on() -> None:
    assert not slurm.is_known("HIBERNATING")
    assert slurm.meaning("HIBERNATING").phase is Phase.RUNS


# `squeue --noheader --all --states=all -O "JobID:|,Name:|,State:|,Reason:|"`, as 22.05.8 and 25.11.7 print it.
SQUEUE = f"""\
41|{NAME}|RUNNING|None|
42|ovation-x-1|PENDING|Resources|
43|ovation-y-1|FAILED|NonZeroExitCode|
44|ovation-z-1|PENDING|launch failed requeued held|
slurm_load_jobs error: something that is no job
45|a name|with a bar|PENDING|
"""
# `sacct --noheader --parsable2 --allocations --duplicates --format=JobIDRaw,JobName,State`
SACCT = """\
41|ovation-a-1|COMPLETED
42|ovation-b-1|CANCELLED by 1000
43|ovation-c-1|OUT_OF_MEMORY
44|ovation-d-1|NODE_FAIL
"""


def test_reading_squeue() -> None:
    found = slurm.rows(SQUEUE)
    assert found[0] == Row("41", NAME, "RUNNING", "None")
    assert found[1] == Row("42", "ovation-x-1", "PENDING", "Resources")
    assert found[3].reason == "launch failed requeued held"
    assert [row.job_id for row in found] == ["41", "42", "43", "44", "45"]


def test_reading_sacct() -> None:
    assert [row.state for row in slurm.rows(SACCT)] == ["COMPLETED", "CANCELLED", "OUT_OF_MEMORY", "NODE_FAIL"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("41\n", "41"), ("41;tests\n", "41"), ("sbatch: a word of the site's\n41\n", "41"), ("", None), ("x41", None)],
)
def test_the_id_that_sbatch_prints(answer: str, expected: str | None) -> None:
    assert slurm.submitted_id(answer) == expected


@pytest.mark.parametrize(
    "complaint",
    [
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying",
        "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
        "sbatch: fatal: Could not establish a configuration source",
        "",
    ],
)
def test_what_may_have_happened_all_the_same(complaint: str) -> None:
    assert slurm.is_ambiguous(complaint)


@pytest.mark.parametrize(
    "complaint",
    [
        "sbatch: error: invalid partition specified: nowhere\nsbatch: error: Invalid partition name specified",
        "sbatch: error: Batch job submission failed: Requested node configuration is not available",
        "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
        "sbatch: error: Invalid generic resource (gres) specification",
    ],
)
def test_what_is_rejected_for_good(complaint: str) -> None:
    assert not slurm.is_ambiguous(complaint)
    assert not slurm.complaint(complaint).startswith("sbatch")


def test_the_arguments_of_a_submission() -> None:
    site = Site("long", "lab", "high", ("--constraint=avx2",))
    wanted = Resources(cpus=4, memory_bytes=(1 << 30) + 1, gpus=2)
    found = slurm.submission(NAME, PurePosixPath("/data/run-1"), 61, site, wanted)
    assert found == [
        "--parsable",
        f"--job-name={NAME}",
        f"--comment={NAME}",
        "--no-requeue",
        "--export=ALL",
        "--nodes=1",
        "--ntasks=1",
        "--open-mode=append",
        "--chdir=/data/run-1",
        "--output=/data/run-1/slurm.log",
        "--time=2",
        "--partition=long",
        "--account=lab",
        "--qos=high",
        "--cpus-per-task=4",
        "--mem=1025M",
        "--gres=gpu:2",
        "--constraint=avx2",
    ]
    bare = slurm.submission(NAME, PurePosixPath("/data/run-1"), 1, Site(), NOTHING_SAID)
    assert not [each for each in bare if each.startswith(("--partition", "--mem", "--gres", "--cpus"))]


@pytest.mark.parametrize("place", ["/data/run-1", "/data/a b/$(touch x)/run-1", "/data/'\"/run-1"])
def test_the_script_is_one_that_bash_can_read(place: str) -> None:
    found = slurm.script(PurePosixPath(place), "/opt/python 3/bin/python", Site(preamble="module load apptainer\n"))
    assert found.startswith("#!/bin/bash -l\n")
    assert "\nunset SLURM_JWT\nmodule load apptainer\n" in found
    assert slurm.script(PurePosixPath(place), "python3", Site()).startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n"], input=found, text=True, check=True)


def test_the_environment_has_nothing_that_changes_what_commands_do() -> None:
    given_ = {"SLURM_CONF": "/x", "SLURM_JWT": "y", "SBATCH_PARTITION": "z", "SQUEUE_FORMAT": "%i", "PATH": "/bin"}
    given_ |= {"OVATION_TOKEN": "secret", "SLURM_JOB_ID": "1", "SLURM_CLUSTERS": "other"}
    assert slurm.environment(given_) == {"SLURM_CONF": "/x", "SLURM_JWT": "y", "PATH": "/bin", "LC_ALL": "C"}


BEGUN = Sight(True, False, False, Row("1", NAME, "RUNNING"), 0, 0)
SILENCE = 60.0


def said(state: str | None, sight: Sight = BEGUN, reason: str = "", **changes: float) -> Meaning:
    row = None if state is None else Row("1", NAME, state, reason)
    return slurm.judge(replace(sight, row=row, **changes), SILENCE)  # type: ignore[arg-type]


@pytest.mark.parametrize("state", ["NODE_FAIL", "COMPLETED", "PENDING", "CANCELLED", None])
def test_one_sign_alone_is_never_enough(state: str | None) -> None:
    assert said(state, silent_seconds=1, said_for_seconds=1000).phase is Phase.RUNS
    assert said(state, silent_seconds=1000, said_for_seconds=1).phase is Phase.RUNS
    assert said(state, silent_seconds=1000, said_for_seconds=1000).phase is Phase.ENDED
    assert said("RUNNING", silent_seconds=10**6, said_for_seconds=10**6).phase is Phase.RUNS


def test_put_back_into_the_queue_it_is_lost() -> None:
    found = said("PENDING", silent_seconds=61, said_for_seconds=61)
    assert (found.ending, "back into the queue" in found.words) == (Ending.LOST, True)


def test_told_to_end_it_is_what_slurm_says() -> None:
    told = replace(BEGUN, told_to_end=True)
    assert said("RUNNING", told).phase is Phase.RUNS  # it ends in this moment
    assert said("RUNNING", told, said_for_seconds=61).ending is Ending.LOST
    assert said("TIMEOUT", told).ending is Ending.TIME_LIMIT
    assert said("OUT_OF_MEMORY", told).ending is Ending.MEMORY
    assert said("CANCELLED", told).ending is Ending.OUTSIDE
    assert said("FAILED", told) == Meaning(Phase.ENDED)
    assert said(None, told) == Meaning(Phase.ENDED)
    assert said("CANCELLED", replace(told, cancel_asked=True)).ending is Ending.CANCELLED


WAITING = replace(BEGUN, begun=False)


@pytest.mark.parametrize("reason", ["Priority", "Resources", "None", "", "BeginTime", "QOSMaxJobsPerUserLimit"])
def test_what_may_pass_is_waited_for(reason: str) -> None:
    found = said("PENDING", WAITING, reason)
    assert found.phase is Phase.WAITS
    assert found.words.startswith("Slurm: ")


@pytest.mark.parametrize(
    "reason", ["PartitionTimeLimit", "BadConstraints", "DependencyNeverSatisfied", "launch failed requeued held"]
)
def test_what_never_passes_is_an_end(reason: str) -> None:
    found = said("PENDING", WAITING, reason)
    assert (found.phase, found.ending) == (Phase.ENDED, Ending.REFUSED)
    assert reason in found.words


def test_held_it_waits_and_says_how_it_is_released() -> None:
    assert "scontrol release" in said("PENDING", WAITING, "JobHeldAdmin").words


STATE = st.sampled_from([*STATES, "HIBERNATING"]) | st.text(max_size=12)
SIGHTS = st.builds(
    Sight,
    begun=st.booleans(),
    told_to_end=st.booleans(),
    cancel_asked=st.booleans(),
    row=st.none() | st.builds(Row, st.just("1"), st.just(NAME), STATE, st.text(max_size=20)),
    silent_seconds=st.floats(0, 1000),
    said_for_seconds=st.floats(0, 1000),
)


@given(SIGHTS)
def test_whatever_is_seen_no_run_that_gives_signs_is_called_over(sight: Sight) -> None:
    found = slurm.judge(sight, SILENCE)
    if sight.begun and not sight.told_to_end and sight.silent_seconds < SILENCE:
        assert found.phase is not Phase.ENDED
    if found.phase is Phase.ENDED:
        assert found.ending is not Ending.EXITED  # only the run's own record says that
    if found.phase is Phase.WAITS:
        assert not sight.begun
        assert found.words
    if sight.cancel_asked and found.phase is Phase.ENDED:
        assert found.ending not in {Ending.LOST, Ending.OUTSIDE}
