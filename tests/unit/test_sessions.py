"""Who may see the page."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.web.sessions import SESSION_SECONDS, form_token, is_form_token, is_good, issue

TOKEN = "the-admin-token"


def test_a_session_lasts_as_long_as_it_says() -> None:
    cookie = issue(TOKEN, now=1000)
    assert is_good(TOKEN, cookie, now=1000 + SESSION_SECONDS - 1)
    assert not is_good(TOKEN, cookie, now=1000 + SESSION_SECONDS)


def test_a_new_admin_token_ends_it() -> None:
    assert not is_good("another", issue(TOKEN))


def test_two_sessions_differ_and_so_do_their_forms() -> None:
    one, other = issue(TOKEN), issue(TOKEN)
    assert one != other
    assert is_form_token(TOKEN, one, form_token(TOKEN, one))
    assert not is_form_token(TOKEN, other, form_token(TOKEN, one))
    assert not is_good(TOKEN, form_token(TOKEN, one))


@given(st.text(), st.integers(0, 200))
def test_what_was_changed_is_not_good(piece: str, at: int) -> None:
    cookie = issue(TOKEN)
    changed = cookie[:at] + piece + cookie[at + 1 :]
    assert changed == cookie or not is_good(TOKEN, changed)


@given(st.one_of(st.none(), st.text()))
def test_nothing_from_outside_is_good(cookie: str | None) -> None:
    assert not is_good(TOKEN, cookie)


def test_a_later_end_cannot_be_written_in() -> None:
    until, _, rest = issue(TOKEN, now=0).partition(".")
    assert not is_good(TOKEN, f"{int(until) + 10**9}.{rest}", now=10**6)
