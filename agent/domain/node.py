"""A batch job that worked at a run on a compute node has ended → what that means for the run."""

from __future__ import annotations

from agent.domain.container import Ending, judge
from agent.domain.job import Fault, FaultClass, NodeOver, Verdict
from agent.domain.resources import Resources

OWN_MEMORY_BYTES = 512 << 20
"""What the program on the node takes beside the container: it fetches and delivers there."""


def asked_for(granted: Resources, most_seconds: float, margin_seconds: float) -> tuple[Resources, float]:
    """Return what a batch job is to be given, and for how long (seconds), that runs a container with these resources.

    Args:
        granted: what the container gets.
        most_seconds: how long a container may run that nobody has set a time for.
        margin_seconds: what staging and delivery may take beside it.
    """
    memory = None if granted.memory_bytes is None else granted.memory_bytes + OWN_MEMORY_BYTES
    seconds = (granted.time_seconds or most_seconds) + margin_seconds
    return Resources(granted.cpus, memory, granted.gpus, granted.time_seconds), seconds


def node_over(
    ending: Ending | None, exit_code: int | None, detail: str | None, said: str, time_limit_seconds: float
) -> NodeOver:
    """Return the outcome for a job whose batch job is over while the job is not.

    Args:
        ending: how the batch job ended, None for one that never was submitted.
        exit_code: what its program returned.
        detail: what Slurm says of it, in words.
        said: the last line that the program wrote to its log.
        time_limit_seconds: what the batch job was given.
    """
    if ending is None or ending is Ending.CANCELLED:
        return NodeOver(Fault(FaultClass.PLATFORM, "The run was cancelled."), Verdict.CANCELLED, again=False)
    if ending is Ending.TIME_LIMIT:
        words = (
            f"Staging, the run and the delivery of its outputs took longer than their batch job's"
            f" {time_limit_seconds / 60:.0f} minutes. AGENT_NODE_MARGIN_SECONDS is what it is given beside the run."
        )
        return NodeOver(Fault(FaultClass.TIME_LIMIT, words), Verdict.FAILED, again=False)
    if ending is Ending.EXITED:
        last = f" It said last: {said}" if said else ""
        words = f"The agent's program on the compute node ended ({exit_code}) before the run did.{last}"
        return NodeOver(Fault(FaultClass.NODE, words), Verdict.FAILED, again=True)
    judgement = judge(ending, exit_code, "", detail=detail)
    fault = judgement.fault or Fault(FaultClass.PLATFORM, "The batch system ended the run.")
    return NodeOver(fault, Verdict.FAILED, again=ending is Ending.LOST)
