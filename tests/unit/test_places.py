"""Places: who may go on at once, and what is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.domain.job import State
from agent.pipeline.places import LATER, STAGING, Places
from agent.settings import AgentSettings

_STAGED = (State.STAGING, State.STAGING)
_RUNS = (State.RUNNING, State.RUNNING)


@pytest.fixture
def places() -> Places:
    """Two places each, and nobody who is known to wait."""
    places = Places(AgentSettings(data_dir=Path("/nonexistent"), max_staging=2, max_running=2, max_collecting=2))
    places.answered(places.to_ask_for([STAGING, *LATER], []), [])
    return places


def test_at_first_anybody_may_wait() -> None:
    places = Places(AgentSettings(data_dir=Path("/nonexistent")))
    assert not places.goes_on(State.STAGING, State.LAUNCHING, [_STAGED])
    assert set(places.to_ask_for([STAGING, *LATER], [])) == {STAGING, *LATER}


def test_a_job_keeps_its_place_for_the_next_state_of_its_stage(places: Places) -> None:
    places.anybody_may_wait()
    held = [_RUNS, (State.LAUNCHING, State.LAUNCHING)]
    assert places.goes_on(State.LAUNCHING, State.RUNNING, held)
    assert places.goes_on(State.QUEUED, State.STAGING, held)
    assert places.goes_on(State.COLLECTING, State.REPORTING, held)


def test_a_job_goes_on_to_a_place_that_is_free_and_that_nobody_waits_for(places: Places) -> None:
    assert places.goes_on(State.STAGING, State.LAUNCHING, [_STAGED, _RUNS])
    assert not places.goes_on(State.STAGING, State.LAUNCHING, [_STAGED, _RUNS, _RUNS])
    assert not places.goes_on(State.STAGING, State.LAUNCHING, [_STAGED, _RUNS, (State.STAGING, State.LAUNCHING)])
    places.arrives(State.LAUNCHING)
    assert not places.goes_on(State.STAGING, State.LAUNCHING, [_STAGED])
    assert places.goes_on(State.RUNNING, State.COLLECTING, [_RUNS])


def test_a_job_that_has_ended_goes_nowhere(places: Places) -> None:
    assert not places.goes_on(State.REPORTING, State.SUCCEEDED, [])
    places.arrives(State.SUCCEEDED)
    assert places.to_ask_for([STAGING, *LATER], []) == {}


def test_nothing_is_asked_for_where_nobody_waits_or_no_place_is_free(places: Places) -> None:
    assert places.to_ask_for(LATER, []) == {}
    places.arrives(State.LAUNCHING)
    assert places.to_ask_for(LATER, [_RUNS, _RUNS]) == {}
    assert places.to_ask_for(LATER, [_RUNS]) == {"most_running": ((State.LAUNCHING,), 1)}


def test_a_stage_is_waited_for_until_a_claim_leaves_places_free(places: Places) -> None:
    places.arrives(State.LAUNCHING)
    wanted = places.to_ask_for(LATER, [])
    places.answered(wanted, [State.LAUNCHING, State.LAUNCHING])
    assert not places.goes_on(State.STAGING, State.LAUNCHING, [])
    wanted = places.to_ask_for(LATER, [_RUNS])
    places.answered(wanted, [])
    assert places.goes_on(State.STAGING, State.LAUNCHING, [_RUNS])


def test_who_comes_while_a_claim_is_under_way_waits_although_it_took_nobody(places: Places) -> None:
    places.arrives(State.LAUNCHING)
    wanted = places.to_ask_for(LATER, [])
    places.arrives(State.LAUNCHING)
    places.answered(wanted, [])
    assert not places.goes_on(State.STAGING, State.LAUNCHING, [])
    assert places.to_ask_for(LATER, []) == wanted
