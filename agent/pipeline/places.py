"""The places of the stages: how many of each are free, and whether somebody waits for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from agent.domain.job import State
from agent.settings import AgentSettings

STAGING = "max_staging"
LATER = ("most_running", "max_collecting")
_OF = {
    State.QUEUED: STAGING,
    State.STAGING: STAGING,
    State.LAUNCHING: "most_running",
    State.RUNNING: "most_running",
    State.COLLECTING: "max_collecting",
    State.REPORTING: "max_collecting",
}
"""States that share the places of one stage, each by the setting that says how many there are."""
# Whose due jobs take a free place of it. Those that run have one, and those that are queued are let in in an order.
_TAKEN_BY: Mapping[str, Collection[State]] = {
    STAGING: (State.STAGING,),
    "most_running": (State.LAUNCHING,),
    "max_collecting": (State.COLLECTING, State.REPORTING),
}


class Places:
    """Knows which stages due jobs may be waiting for, so that nobody goes past them, and nothing is asked in vain.

    A stage is waited for from the moment at which a job comes to it, or something falls due, until a claim there has
    left places free.
    """

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._waited_for = set(_TAKEN_BY)
        self._arrived: set[str] = set()  # those that a job came to since they were last asked for

    def free(self, stage: str, held: Iterable[tuple[State, State]]) -> int:
        """Return how many places of a stage are free, beside jobs in these states and those that they are moving to."""
        places: int = getattr(self._settings, stage)
        return places - sum(stage in {_OF[state], _OF[to]} for state, to in held)

    def goes_on(self, state: State, to: State, held: Iterable[tuple[State, State]]) -> bool:
        """Say whether a job may go on at once: the place is its own already, or one is free that nobody waits for."""
        stage = _OF.get(to)
        if stage is None:
            return False
        return stage == _OF[state] or (stage not in self._waited_for and self.free(stage, held) > 0)

    def anybody_may_wait(self) -> None:
        """Something fell due, or may have."""
        self._waited_for = set(_TAKEN_BY)

    def arrives(self, state: State) -> None:
        """A job is, or is about to be, in this state, and waits for a place."""
        if stage := _OF.get(state):
            self._waited_for.add(stage)
            self._arrived.add(stage)

    def to_ask_for(
        self, stages: Collection[str], held: Collection[tuple[State, State]]
    ) -> dict[str, tuple[Collection[State], int]]:
        """Return, for each of these stages with free places that may be waited for, whose they are and how many."""
        free = {stage: self.free(stage, held) for stage in stages if stage in self._waited_for}
        wanted = {stage: (_TAKEN_BY[stage], places) for stage, places in free.items() if places > 0}
        self._arrived -= wanted.keys()
        return wanted

    def answered(self, wanted: Mapping[str, tuple[Collection[State], int]], states: Iterable[State]) -> None:
        """Take note of a claim's answer: where places stay free, nobody waits, but for who came meanwhile."""
        taken = Counter(_OF[state] for state in states)
        left = {stage for stage, (_, places) in wanted.items() if taken[stage] < places}
        self._waited_for -= left - self._arrived
