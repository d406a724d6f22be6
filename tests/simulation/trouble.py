"""Everything that goes wrong, and everything that people do meanwhile, as a seed draws it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from tests.simulation.agents import Agent
from tests.simulation.chance import Chance
from tests.simulation.people import People, Post
from tests.simulation.process import Process
from tests.simulation.store import Store
from tests.simulation.world import Fate, Party, World

_LOST = (Fate.CUT_BEFORE, Fate.CUT_AFTER, Fate.SILENT_BEFORE, Fate.SILENT_AFTER, Fate.BUSY, Fate.REFUSED)
_UNCOUNTED = ("claim_", "count_", "next_", "lapse_", "agent_seen", "renew_", "set_progress", "SELECT")
# Where deaths hurt most. The empty one is every request.
_MOMENTS = ("", "", "POST", "PUT", "relationships", "upload", "save_output", "commit", "start", "GET", "judge_watched")
_OUTAGES = (Fate.REFUSED, Fate.BUSY, Fate.CUT_BEFORE, Fate.SILENT_BEFORE, Fate.REFUSED)

_KINDS = {
    "deaths": 0.3,
    "deaths at a request": 0.5,
    "freezes": 0.3,
    "freezes at a request": 0.2,
    "stops": 0.3,
    "reboots": 0.2,
    "lost containers": 0.2,
    "database outage": 0.3,
    "lost statements": 0.3,
    "Ovation outage": 0.3,
    "flaky Ovation": 0.4,
    "store outage": 0.3,
    "flaky store": 0.3,
    "spoilt downloads": 0.3,
    "runtime away": 0.2,
    "flaky runtime": 0.2,
    "slow parties": 0.3,
    "webhooks": 0.4,
    "changes": 0.5,
    "changes during looks": 0.3,
    "cancellations": 0.3,
    "requests": 0.3,
    "a long outage": 0.01,
}
"""What may go wrong or be done, and how probable it is that a schedule has some of it."""


def kinds(chance: Chance) -> list[str]:
    """Draw what kinds of things happen in a schedule."""
    return [kind for kind, probability in _KINDS.items() if chance.happens(probability, kind)]


class Trouble:
    """What a schedule has in store, until all is calm."""

    def __init__(self, world: World, agents: Sequence[Agent], people: People, store: Store, post: Post) -> None:
        self._world = world
        self._chance = world.chance
        self._agents = agents
        self._people = people
        self._store = store
        self._post = post
        self.kinds: list[str] = []
        self.until = self._chance.between(30, 150, "until")
        self._sources: dict[str, Callable[[], None]] = {
            "deaths": self._deaths,
            "deaths at a request": self._deaths_at_a_request,
            "freezes": self._freezes,
            "freezes at a request": self._freezes_at_a_request,
            "stops": self._stops,
            "reboots": self._reboots,
            "lost containers": self._lost_containers,
            "database outage": lambda: self._outage(Party.DATABASE, 40),
            "lost statements": lambda: self._flaky(Party.DATABASE, 0.02, _LOST),
            "Ovation outage": lambda: self._outage(Party.OVATION, 90),
            "flaky Ovation": lambda: self._flaky(Party.OVATION, 0.3, _LOST),
            "store outage": lambda: self._outage(Party.STORE, 90),
            "flaky store": lambda: self._flaky(Party.STORE, 0.3, _LOST),
            "spoilt downloads": self._spoilt,
            "runtime away": lambda: self._outage(Party.RUNTIME, 40),
            "flaky runtime": lambda: self._flaky(Party.RUNTIME, 0.3, (Fate.REFUSED, Fate.SILENT_AFTER)),
            "slow parties": self._slow,
            "webhooks": self._webhooks,
            "changes": self._changes,
            "changes during looks": self._changes_during_looks,
            "cancellations": self._cancellations,
            "requests": self._requests,
            "a long outage": self._long_outage,
        }

    def plan(self) -> None:
        """Draw what happens and when."""
        self.kinds = kinds(self._chance)
        for kind in self.kinds:
            self._sources[kind]()
        self._world.note("world", f"{len(self._agents)} agents; {', '.join(self.kinds) or 'no trouble'}")

    def end(self) -> None:
        """Let all be calm, and whoever is away be back."""
        self._world.is_calm = True
        for agent in self._agents:
            agent.on_start = lambda _: None
            if agent.process is not None:
                agent.process.on_arrival = lambda _: None
            agent.resume()
            if agent.process is None:
                agent.start()

    def _times(self, kind: str, least: int, most: int) -> list[float]:
        return [self._chance.between(0.2, self.until, kind) for _ in range(self._chance.count(least, most, kind))]

    def _some_agent(self, kind: str) -> Agent:
        return self._chance.one_of(self._agents, kind)

    # Agents.

    def _away_seconds(self, kind: str) -> float:
        """Return for how long an agent stays away: mostly shorter than a lease, sometimes longer than a minute."""
        longest = self._chance.one_of((3.0, 10.0, 30.0, 90.0), kind)
        return self._chance.between(0.3, longest, kind)

    def _deaths(self) -> None:
        for at in self._times("deaths", 1, 4):
            agent = self._some_agent("deaths")
            self._world.later(at, agent.kill, self._away_seconds("deaths"))

    def _freezes(self) -> None:
        for at in self._times("freezes", 1, 3):
            agent = self._some_agent("freezes")
            self._world.later(at, agent.hold, self._away_seconds("freezes"))

    def _stops(self) -> None:
        for at in self._times("stops", 1, 3):
            agent = self._some_agent("stops")
            self._world.later(at, agent.terminate)
            if self._chance.happens(0.3, "stops"):
                self._world.later(at + self._chance.between(0.1, 8, "stops"), agent.terminate)

    def _reboots(self) -> None:
        for at in self._times("reboots", 1, 2):
            machine = self._some_agent("reboots").machine
            seconds = self._chance.between(2, 40, "reboots")

            def reboot(machine: object = machine, seconds: float = seconds) -> None:
                for agent in self._agents:
                    if agent.machine is machine:
                        agent.kill(seconds)
                        agent.machine.reboot()

            self._world.later(at, reboot)

    def _lost_containers(self) -> None:
        for at in self._times("lost containers", 1, 3):
            agent = self._some_agent("lost containers")

            def lose(agent: Agent = agent) -> None:
                if running := agent.machine.running():
                    agent.machine.lose(self._chance.one_of(running, "lost containers"))

            self._world.later(at, lose)

    def _deaths_at_a_request(self) -> None:
        self._at_a_request("deaths at a request", lambda agent, seconds: agent.kill(seconds))

    def _freezes_at_a_request(self) -> None:
        self._at_a_request("freezes at a request", lambda agent, seconds: agent.hold(seconds))

    def _at_a_request(self, kind: str, strike: Callable[[Agent, float], None]) -> None:
        """Strike just before or just after something is done, which moments drawn from a clock seldom are."""
        left = [self._chance.count(1, 4, kind)]
        sought = self._chance.one_of(_MOMENTS, kind)

        def watch(agent: Agent, process: Process) -> Callable[[str], None]:
            longest = self._chance.one_of((4, 10, 40) if sought else (8, 40, 150), kind)
            count = [self._chance.count(1, longest, kind)]

            def arrived(what: str) -> None:
                if process.is_dead or sought not in what or any(f"database {name}" in what for name in _UNCOUNTED):
                    return
                count[0] -= 1
                if count[0] == 0 and left[0] > 0 and not self._world.is_calm:
                    left[0] -= 1
                    self._world.note("world", f"{kind}: {what}")
                    strike(agent, self._away_seconds(kind))
                    count[0] = self._chance.count(1, longest, kind)

            return arrived

        self._watch_requests(watch)

    def _watch_requests(self, watch: Callable[[Agent, Process], Callable[[str], None]]) -> None:
        """Have what `watch` returns called with each request of a process, as it arrives and once it was served."""

        def listen(agent: Agent, before: Callable[[Process], None], process: Process) -> None:
            before(process)
            seen, also = process.on_arrival, watch(agent, process)

            def arrived(what: str) -> None:
                seen(what)
                also(what)

            process.on_arrival = arrived

        for agent in self._agents:
            agent.on_start = functools.partial(listen, agent, agent.on_start)

    # Parties.

    def _outage(self, party: Party, longest: float) -> None:
        for at in self._times(f"{party} outage", 1, 2):
            seconds = self._chance.between(1, longest, f"{party} outage")
            fate = self._chance.one_of(_OUTAGES, f"{party} outage")
            self._world.weather[party].outages.append((at, at + seconds, fate))
            self._world.note("world", f"{party} is away from {at:.1f} to {at + seconds:.1f}: {fate}")

    def _long_outage(self) -> None:
        party = self._chance.one_of((Party.OVATION, Party.STORE), "a long outage")
        at = self._chance.between(1, self.until, "a long outage")
        self.until = at + 3600
        self._world.weather[party].outages.append((at, self.until, self._chance.one_of(_OUTAGES, "a long outage")))

    def _flaky(self, party: Party, most: float, fates: Sequence[Fate]) -> None:
        for fate in fates:
            if self._chance.happens(0.6, f"flaky {party}"):
                share = self._chance.between(0, most / 3, f"flaky {party}")
                silent = fate in {Fate.SILENT_BEFORE, Fate.SILENT_AFTER}
                self._world.weather[party].fates[fate] = share / 4 if silent else share

    def _spoilt(self) -> None:
        self._store.spoilt = self._chance.between(0.1, 0.6, "spoilt")

    def _slow(self) -> None:
        for party in Party:
            self._world.weather[party].slow = self._chance.between(0, 0.05 if party is Party.DATABASE else 0.2, "slow")

    # People and their webhooks.

    def _webhooks(self) -> None:
        self._post.dropped = self._chance.between(0, 0.5, "webhooks")
        self._post.doubled = self._chance.between(0, 0.5, "webhooks")
        self._post.late = self._chance.between(0, 0.5, "webhooks")

    def _changes(self) -> None:
        for at in self._times("changes", 1, 4):
            add = self._chance.happens(0.7, "changes")
            uploading = self._chance.happens(0.2, "changes")

            def change(add: bool = add, uploading: bool = uploading) -> None:
                if not self._people.activities:
                    return
                activity = self._chance.one_of(self._people.activities, "changes")
                if add:
                    self._people.add_input(activity, uploading=uploading)
                else:
                    self._people.remove_input(activity)

            self._world.later(at, change)

    def _changes_during_looks(self) -> None:
        left = [self._chance.count(1, 4, "changes during looks")]
        begin = self._chance.one_of((0.0, 0.4, 0.6), "changes during looks") * self.until  # later looks find less

        def watch(agent: Agent, process: Process) -> Callable[[str], None]:
            del agent, process

            def arrived(what: str) -> None:
                if left[0] == 0 or self._world.now < begin or "after" not in what or "/links/inputs" not in what:
                    return
                for activity in self._people.activities:
                    if f"/{activity.id}/" in what and self._chance.happens(0.25, "changes during looks"):
                        left[0] -= 1
                        self._people.add_input(activity)

            return arrived

        self._watch_requests(watch)

    def _cancellations(self) -> None:
        self._to_some_activity("cancellations", self._people.cancel)

    def _requests(self) -> None:
        self._to_some_activity("requests", self._people.ask_for_a_run)

    def _to_some_activity(self, kind: str, function: Callable[..., None]) -> None:
        for at in self._times(kind, 1, 3):

            def act() -> None:
                if self._people.activities:
                    function(self._chance.one_of(self._people.activities, kind))

            self._world.later(at, act)
