"""Standard Webhooks: what vouches for a body, and what does not."""

from __future__ import annotations

import base64
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.settings.types import webhook_key
from agent.web import signatures

# The published example of Svix, where the rules come from.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NOW = 1614265330
BODY = b'{"test": 2432232314}'
EXAMPLE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"


def key_of(secret: str) -> bytes:
    key = webhook_key(secret)
    assert key is not None
    return key


KEY = key_of(SECRET)
OTHER = b"another key of sixteen and more bytes"


def sign(key: bytes, message_id: str = ID, timestamp: str = str(NOW), body: bytes = BODY) -> str:
    digest = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, "sha256")
    return f"v1,{base64.b64encode(digest).decode()}"


def headers(**changes: str | None) -> dict[str, str]:
    made = {"id": ID, "timestamp": str(NOW), "signature": EXAMPLE} | changes
    return {f"webhook-{name}": value for name, value in made.items() if value is not None}


def vouched(given: dict[str, str], *keys: bytes, body: bytes = BODY, now: float = NOW) -> bool:
    return signatures.read(given, now).vouched(body, keys or (KEY,))


def test_the_example_of_the_rules() -> None:
    assert sign(KEY) == EXAMPLE
    assert vouched(headers())
    assert signatures.read(headers(), NOW).message_id == ID


def test_the_prefix_and_the_padding_of_a_secret_may_be_missing() -> None:
    assert key_of(SECRET[6:]) == KEY
    assert {key_of(f"whsec_{'QUFB' * 6}QQ{padding}") for padding in ("", "=", "==")} == {b"A" * 19}


@pytest.mark.parametrize(
    "changed",
    [
        {"id": f"{ID}x"},
        {"timestamp": str(NOW + 1)},
        {"timestamp": f"0{NOW}"},
        {"signature": sign(OTHER)},
        {"signature": sign(KEY, body=b"")},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_nothing_may_be_changed(changed: dict[str, str]) -> None:
    assert not vouched(headers(**changed))


def test_the_body_may_not_be_changed() -> None:
    assert not vouched(headers(), body=BODY + b" ")


@pytest.mark.parametrize(("old", "expected"), [(-300, True), (300, True), (-301, False), (301, False)])
def test_five_minutes_either_way(old: int, expected: bool) -> None:
    if expected:
        assert vouched(headers(), now=NOW + old)
        return
    with pytest.raises(signatures.Unsigned, match="five minutes"):
        signatures.read(headers(), NOW + old)


NEIGHBOURS = ["v1,", "v1", "", "v1,???", "v1,AAAA", "v2,AAAA", "v1a,AAAA", "v1,a,b", ",", "v1,\udcff", sign(OTHER)]


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("first", [True, False])
def test_one_good_signature_among_others_suffices(neighbour: str, first: bool) -> None:
    both = [EXAMPLE, neighbour] if first else [neighbour, EXAMPLE]
    assert vouched(headers(signature=" ".join(both)))


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_no_good_signature(neighbour: str) -> None:
    try:
        assert not vouched(headers(signature=f"{neighbour} {neighbour}"))
    except signatures.Unsigned as error:
        assert "no signature of version v1" in str(error)  # noqa: PT017 either way it is refused


def test_one_of_several_secrets_suffices() -> None:
    assert vouched(headers(), OTHER, KEY)
    assert vouched(headers(), KEY, OTHER)
    assert not vouched(headers(), OTHER)
    assert not signatures.read(headers(), NOW).vouched(BODY, ())


@pytest.mark.parametrize("name", ["id", "timestamp", "signature"])
def test_the_three_headers_belong_together(name: str) -> None:
    with pytest.raises(signatures.Unsigned, match="needed together"):
        signatures.read(headers(**{name: None}), NOW)


@pytest.mark.parametrize("timestamp", ["", " ", "now", "1.5", "1e9", "-1", "+1", "nan", "1_0", "\u0661", "9" * 13])
def test_times_that_are_none(timestamp: str) -> None:
    with pytest.raises(signatures.Unsigned, match="not a number of seconds"):
        signatures.read(headers(timestamp=timestamp), NOW)


@pytest.mark.parametrize("message_id", ["", "a b", "a\n", "\u00e9", "\udcff", "x" * 257])
def test_ids_that_are_none(message_id: str) -> None:
    with pytest.raises(signatures.Unsigned, match="webhook-id"):
        signatures.read(headers(id=message_id), NOW)


words = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)


@given(
    key=st.binary(min_size=16, max_size=64), message_id=words, body=st.binary(max_size=200), now=st.integers(0, 10**11)
)
def test_what_is_signed_is_vouched_for(key: bytes, message_id: str, body: bytes, now: int) -> None:
    signed = headers(id=message_id, timestamp=str(now), signature=sign(key, message_id, str(now), body))
    assert vouched(signed, key, body=body, now=now)
    assert not vouched(signed, key + b"x", body=body, now=now)
    assert not vouched(signed, key, body=body + b"x", now=now)


@given(st.text(max_size=60), st.text(max_size=20), st.text(max_size=120))
def test_whatever_stands_in_the_headers_it_is_refused(message_id: str, timestamp: str, signature: str) -> None:
    try:
        assert not vouched(headers(id=message_id, timestamp=timestamp, signature=signature))
    except signatures.Unsigned as error:
        assert error.args  # noqa: PT017 either way it is refused


@given(st.text(max_size=80))
def test_a_secret_is_a_key_or_is_refused(secret: str) -> None:
    key = webhook_key(secret)
    assert key is None or len(key) >= 16
