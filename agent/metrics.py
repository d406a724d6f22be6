"""The agent's numbers for Prometheus. No label has values from outside: each is one of a list that the code has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from agent import __version__
from agent.domain.delivery import Receipt
from agent.domain.job import TERMINAL, FaultClass, Job, Move, Outage, Outcome, State, Verdict

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PARTIES = ("Ovation", "the object store", "the container runtime", "disk space", "Slurm")
# When a counter was made is no news, and would double the series.
disable_created_metrics()  # type: ignore[no-untyped-call]
_OTHER = "another"
_REFUSED = "refused"
_NOTHING_IN_IT = "irrelevant"
_AWAY = "database_away"
_RESULTS = (*Receipt, _REFUSED, _NOTHING_IN_IT, _AWAY)
_NO_FAULT = "none"
_OUTCOMES = ("done", "notyet", "outage", "failed", "lost", "setaside")
_LIVE = tuple(state for state in State if state not in TERMINAL)
_SECONDS = (0.01, 0.05, 0.25, 1, 5, 30, 120, 600, 3600, 21_600, 86_400)


@dataclass(frozen=True, slots=True)
class Numbers:
    """What the database says of the work, of all agents together but for `unwatched_seconds`. Times in seconds."""

    live: Mapping[str, int]  # jobs that have not ended, by state
    looks_due: int  # Activities and Revisions that are to be looked at now
    oldest_look: float  # since when the first of them is due
    oldest_unjudged: float  # since when the first change is unjudged
    leases: int
    lease_overdue: float  # how long ago the first lease ran out that nobody has freed
    unwatched: float  # since when a run of this agent is to be looked at
    agents: int  # seen within a minute


class _Bytes(Collector):
    """What has passed to and from the object store, which its own part counts."""

    def __init__(self, moved: Callable[[], Mapping[str, int]]) -> None:
        self._moved = moved

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the counts by direction."""
        family = CounterMetricFamily(
            "ovation_agent_transferred_bytes", "Bytes from (down) and to (up) the object store.", labels=["direction"]
        )
        for direction, count in self._moved().items():
            family.add_metric([direction], count)
        yield family


class Metrics:
    """One process's numbers. What other parts know better is asked for when somebody looks."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ovation_agent_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"ovation_agent_{name}", text, labels, registry=registry)

        gauge("info", "The program's version.", "version").labels(__version__).set(1)
        self._deliveries = counter("deliveries", "Webhooks, by what became of them.", "result")
        self._refusals = counter("refusals", "Webhooks that were refused, by HTTP status.", "status")
        self._runs = counter("runs", "Runs that this agent brought to their end.", "verdict", "fault_class")
        self._retries = counter("retries", "Failures of a job's step that it is tried again after.", "state")
        self._outages = counter("outages", "Steps that had to wait for an outside party.", "party")
        self._steps = Histogram(
            "ovation_agent_step_seconds",
            "How long steps took.",
            ("state", "outcome"),
            registry=registry,
            buckets=_SECONDS,
        )
        self._circuits = gauge("party_away", "1 while an outside party is away.", "party")
        self._loops = gauge("loop_age_seconds", "Since when each loop has not come round.", "loop")
        self._held = gauge("held_jobs", "Jobs that this agent works at now.")
        self._disk = gauge("disk_free_bytes", "Free room where jobs' files are.")
        self._database = gauge("database_up", "1 while the database answers; the numbers below come from it.")
        self._jobs = gauge("jobs", "Jobs that have not ended, of all agents.", "state")
        self._outbox = gauge("outbox_jobs", "Jobs whose outputs are not all in Ovation yet, of all agents.")
        self._looks = gauge("looks_due", "Activities and Revisions that are to be looked at now.")
        self._oldest_look = gauge("oldest_look_seconds", "Since when the first of them is due.")
        self._oldest_unjudged = gauge("oldest_unjudged_seconds", "Age of the oldest change that is not judged yet.")
        self._leases = gauge("leases", "Leases that are held, by all agents.")
        self._overdue = gauge("lease_overdue_seconds", "Since when the first lease has run out that nobody freed.")
        self._unwatched = gauge("unwatched_seconds", "Since when a run of this agent waits to be looked at.")
        self._agents = gauge("agents", "Agents on this database that were seen within a minute.")
        self._sources: list[Callable[[], None]] = []
        self._begin()

    def delivery(self, result: Receipt | None) -> None:
        """Count a webhook that was answered; nothing in it was for the agent when there is no receipt."""
        self._deliveries.labels(_NOTHING_IN_IT if result is None else str(result)).inc()

    def delivery_lost(self) -> None:
        """Count a webhook that could not be stored: its sender was told to send it again."""
        self._deliveries.labels(_AWAY).inc()

    def refusal(self, status: int) -> None:
        """Count a webhook that was refused."""
        self._deliveries.labels(_REFUSED).inc()
        self._refusals.labels(str(status)).inc()

    def step(self, job: Job, outcome: Outcome, move: Move, seconds: float) -> None:
        """Count a step that has ended and been written."""
        self._steps.labels(str(job.state), type(outcome).__name__.lower()).observe(seconds)
        if move.attempt > job.attempt:
            self._retries.labels(str(job.state)).inc()
        if isinstance(outcome, Outage):
            self._outages.labels(outcome.party if outcome.party in PARTIES else _OTHER).inc()
        if move.state in TERMINAL and move.verdict is not None:
            self.ended(str(move.verdict), str(move.fault.cls) if move.fault else None)

    def ended(self, verdict: str, fault_class: str | None) -> None:
        """Count a run that has ended."""
        self._runs.labels(verdict, fault_class or _NO_FAULT).inc()

    def watch(
        self,
        *,
        bytes_moved: Callable[[], Mapping[str, int]],
        away: Mapping[str, Callable[[], bool]],
        loop_ages: Callable[[], Mapping[str, float]],
        held: Callable[[], int],
        disk_free: Callable[[], float],
    ) -> None:
        """Take what other parts know, each time somebody looks."""

        def look() -> None:
            for party, is_away in away.items():
                self._circuits.labels(party).set(is_away())
            for loop, age in loop_ages().items():
                self._loops.labels(loop).set(age)
            self._held.set(held())
            self._disk.set(disk_free())

        self._sources.append(look)
        self.registry.register(_Bytes(bytes_moved))

    def database(self, numbers: Numbers | None) -> None:
        """Take what the database says; nothing while it is away, and then the last numbers stay."""
        self._database.set(numbers is not None)
        if numbers is None:
            return
        for state in _LIVE:
            self._jobs.labels(str(state)).set(numbers.live.get(state, 0))
        self._outbox.set(sum(numbers.live.get(state, 0) for state in (State.COLLECTING, State.REPORTING)))
        self._looks.set(numbers.looks_due)
        self._oldest_look.set(numbers.oldest_look)
        self._oldest_unjudged.set(numbers.oldest_unjudged)
        self._leases.set(numbers.leases)
        self._overdue.set(numbers.lease_overdue)
        self._unwatched.set(numbers.unwatched)
        self._agents.set(numbers.agents)

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        for look in self._sources:
            look()
        found: bytes = generate_latest(self.registry)
        return found

    def _begin(self) -> None:
        """Have every series there from the start, at 0: what appears with its first event has no rate then."""
        labels: list[tuple[Any, tuple[str, ...]]] = [
            *((self._deliveries, (str(result),)) for result in _RESULTS),
            *((self._steps, (str(state), outcome)) for state in _LIVE for outcome in _OUTCOMES),
            *((self._retries, (str(state),)) for state in _LIVE),
            *((self._outages, (party,)) for party in (*PARTIES, _OTHER)),
            *((self._runs, (str(verdict), _NO_FAULT)) for verdict in Verdict),
            *((self._runs, (str(Verdict.FAILED), str(each))) for each in FaultClass),
            *((self._jobs, (str(state),)) for state in _LIVE),
        ]
        for metric, values in labels:
            metric.labels(*values)
