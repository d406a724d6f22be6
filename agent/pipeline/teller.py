"""What the worker's log says: one line a step, and an outage once when it begins and once when it ends."""

from __future__ import annotations

import time

from agent.db.jobs import Claim
from agent.domain.job import Failed, Move, NotYet, Outage, Outcome, SetAside
from agent.errors import DatabaseError
from agent.logs import logger
from agent.pipeline.perform import HAVE_CIRCUITS


class Teller:
    """Tells of steps, and knows who is away."""

    def __init__(self) -> None:
        self._away: dict[str, float] = {}
        self._database_away_since: float | None = None

    def step(self, claim: Claim, outcome: Outcome, move: Move, seconds: float) -> None:
        """Tell how a step ended, unless the log has had it."""
        self._parties(claim, outcome)
        if isinstance(outcome, NotYet):
            return
        line: dict[str, object] = {
            "outcome": type(outcome).__name__.lower(),
            "next": str(move.state),
            "seconds": round(seconds, 3),
            **({"verdict": str(move.verdict)} if move.verdict else {}),
            **({"waiting_for": move.waiting_for} if move.waiting_for else {}),
            **({"fault": str(move.fault.cls), "message": move.fault.message} if move.fault else {}),
        }
        if isinstance(outcome, SetAside):
            logger().error("step", **line)
        elif _is_told(claim, outcome, move) or (isinstance(outcome, Outage) and outcome.party in self._away):
            logger().debug("step", **line)
        else:
            logger().info("step", **line)

    def database(self, away: DatabaseError | None) -> None:
        """Say once that PostgreSQL is away, and once that it is back."""
        if away is not None and self._database_away_since is None:
            logger().warning("database_away", error=str(away))
            self._database_away_since = time.monotonic()
        elif away is None and self._database_away_since is not None:
            logger().info("database_back", seconds=round(time.monotonic() - self._database_away_since, 1))
            self._database_away_since = None

    def _parties(self, claim: Claim, outcome: Outcome) -> None:
        if isinstance(outcome, Outage):
            if not outcome.is_told and outcome.party not in HAVE_CIRCUITS and outcome.party not in self._away:
                self._away[outcome.party] = time.monotonic()
                logger().warning("party_away", party=outcome.party, reason=outcome.reason)
            return
        since = self._away.pop(claim.job.waiting_party or "", None)
        if since is not None:
            logger().info("party_back", party=claim.job.waiting_party, seconds=round(time.monotonic() - since, 1))


def _is_told(claim: Claim, outcome: Outcome, move: Move) -> bool:
    """Say whether the log has had this: an outage that was told, or the same trouble of the same job as before."""
    if isinstance(outcome, Outage):
        return outcome.is_told or claim.job.waiting_party == outcome.party
    return isinstance(outcome, Failed) and outcome.final and claim.job.waiting_for == move.waiting_for
