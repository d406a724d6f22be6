"""What a token says of itself, and whether the agent can do its work with it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.domain.token import expiry, trouble_with, words

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
SERVICE = {"sub": "abc@clients", "scope": "read:global write:global"}


def in_days(days: float) -> float:
    return (NOW + timedelta(days=days)).timestamp()


@pytest.mark.parametrize(
    "claims",
    [
        SERVICE,
        {**SERVICE, "exp": in_days(8)},
        {"sub": "abc@clients", "https://ovation.io/scope": ["write:global", "read:global"]},
        {"sub": "a-person"},
        {"sub": "a-person", "exp": in_days(30)},
        {},
    ],
)
def test_what_will_do(claims: dict[str, Any]) -> None:
    assert trouble_with(claims, NOW, is_renewed=False) is None


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ({"sub": "abc@clients"}, "without read:global and write:global"),
        ({"sub": "abc@clients", "scope": "read:global"}, "without write:global"),
        ({"sub": "a-person", "exp": in_days(6)}, "it expires on 2026-12-01 12:00 UTC"),
        ({**SERVICE, "exp": in_days(-1)}, "it has expired on 2026-11-24 12:00 UTC"),
    ],
)
def test_what_will_not(claims: dict[str, Any], said: str) -> None:
    assert said in (trouble_with(claims, NOW, is_renewed=False) or "")


def test_one_that_is_renewed_may_be_short() -> None:
    assert trouble_with({**SERVICE, "exp": in_days(0.1)}, NOW, is_renewed=True) is None
    assert words(SERVICE, is_renewed=True) == "of a service account with read:global, write:global, renewed by itself"


_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)


@given(st.dictionaries(st.sampled_from(["sub", "exp", "scope", "https://ovation.io/scope"]), _JSON), st.booleans())
def test_whatever_it_says_there_is_an_answer(claims: dict[str, Any], is_renewed: bool) -> None:
    trouble_with(claims, NOW, is_renewed=is_renewed)
    assert words(claims, is_renewed=is_renewed).startswith("of a ")
    expires = expiry(claims)
    assert expires is None or expires.tzinfo is UTC
