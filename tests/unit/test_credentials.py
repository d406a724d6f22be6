"""Whose token a person's command carries: which one wins, and a clear word for each way in which there is none."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.client import front_address
from agent.credentials import person_token
from agent.errors import ConfigurationError
from agent.probe import target
from agent.web.hpc_run import Readers

API = "https://api.ovation.io"
HOST = "api.ovation.io"


def written(home: Path, content: object, mode: int = 0o600) -> Path:
    (home / ".ovation").mkdir(exist_ok=True)
    path = home / ".ovation" / "credentials.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(mode)
    return path


def service_token() -> str:
    return jwt.encode({"sub": "abc@clients", "exp": int(time.time()) + 60}, "x" * 32, "HS256")


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    written(tmp_path, {HOST: {"a@example.org": "of-the-file"}})
    found = person_token(API, None, {"OVATION_TOKEN": " of-the-shell\n"}, tmp_path)
    assert (found.token, found.found, found.warning) == ("of-the-shell", "OVATION_TOKEN", None)


def test_who_is_named_wins_over_the_environment(tmp_path: Path) -> None:
    written(tmp_path, {HOST: {"a@example.org": "a", "b@example.org": "b"}})
    found = person_token(API, "b@example.org", {"OVATION_TOKEN": "of-the-shell"}, tmp_path)
    assert found.token == "b"
    assert "b@example.org" in found.found


def test_the_only_user_of_the_host_is_taken(tmp_path: Path) -> None:
    written(tmp_path, {"127.0.0.1:5000": {"a@example.org": "a"}, HOST: {"b@example.org": "b"}})
    assert person_token("http://127.0.0.1:5000/", None, {}, tmp_path).token == "a"
    assert person_token(API, None, {"OVATION_TOKEN": ""}, tmp_path).token == "b"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_told_of(mode: int, tmp_path: Path) -> None:
    path = written(tmp_path, {HOST: {"a@example.org": "a"}}, mode)
    found = person_token(API, None, {}, tmp_path)
    assert found.token == "a"
    assert found.warning == f"{path} is open to others: chmod 600 {path}"


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_of_ones_own_is_not(mode: int, tmp_path: Path) -> None:
    written(tmp_path, {HOST: {"a@example.org": "a"}}, mode)
    assert person_token(API, None, {}, tmp_path).warning is None


SECRET = "do-not-repeat-me"
TWO = {HOST: {"b@example.org": SECRET, "a@example.org": SECRET}}
WRONG: dict[str, tuple[Any, str | None, str]] = {
    "not JSON": (f'{{"{HOST}": {{"a": "{SECRET}"', None, "is not JSON: line 1, column "),
    "not text": (b"\xff\xfe".decode("latin-1"), None, "is not JSON"),
    "a list": ([SECRET], None, "must be {"),
    "a token for a host": ({HOST: SECRET}, None, "must be {"),
    "another host": ({"api-dev.ovation.io": {"a": SECRET}}, None, "the hosts there are: api-dev.ovation.io"),
    "nobody": ({HOST: {}}, None, f"has no token for {HOST}"),
    "several": (TWO, None, "choose one with --user: a@example.org, b@example.org"),
    "another user": (TWO, "c@example.org", "the users there are: a@example.org, b@example.org"),
    "a number": ({HOST: {"a": 5}}, None, "the token of a is not a string"),
    "an empty one": ({HOST: {"a": ""}}, None, "the token of a is not a string"),
    "a line's end": ({HOST: {"a": f"{SECRET}\nX-Evil: 1"}}, None, "the token of a: has spaces, line breaks"),
}


@pytest.mark.parametrize(("content", "user", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_explained(content: Any, user: str | None, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigurationError) as caught:
        person_token(API, user, {}, tmp_path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)
    assert SECRET not in str(caught.value)


def test_no_token_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"neither OVATION_TOKEN nor .*credentials\.json"):
        person_token(API, None, {}, tmp_path)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / ".ovation").mkdir()
    path = tmp_path / ".ovation" / "credentials.json"
    os.mkfifo(path)
    with pytest.raises(ConfigurationError, match="is not a file of credentials"):
        person_token(API, None, {}, tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigurationError, match=r"credentials\.json: "):
        person_token(API, None, {}, tmp_path)


def test_a_service_account_is_no_person(tmp_path: Path) -> None:
    written(tmp_path, {HOST: {"a@example.org": "a"}})
    environment = {"OVATION_TOKEN": service_token()}
    with pytest.raises(ConfigurationError, match=r"a service account's.*--user EMAIL") as caught:
        person_token(API, None, environment, tmp_path)
    assert environment["OVATION_TOKEN"] not in str(caught.value)
    assert person_token(API, "a@example.org", environment, tmp_path).token == "a"


def test_a_token_is_not_in_its_repr(tmp_path: Path) -> None:
    assert SECRET not in repr(person_token(API, None, {"OVATION_TOKEN": SECRET}, tmp_path))


@settings(max_examples=20)
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner))
)
def test_any_file_is_a_token_or_a_clear_error(content: Any) -> None:
    with tempfile.TemporaryDirectory() as home:
        written(Path(home), {HOST: content})
        with contextlib.suppress(ConfigurationError):
            assert person_token(API, None, {}, Path(home)).token in content.values()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://compute.example.org:8080", "http://compute.example.org:8080"),
        ("http://compute.example.org:8080/", "http://compute.example.org:8080"),
        ("http://compute.example.org:8080/hpc_run", "http://compute.example.org:8080"),
        ("https://lab.example.org/agent/hpc_run/", "https://lab.example.org/agent"),
        ("http://[::1]:8080/hpc_run", "http://[::1]:8080"),
    ],
)
def test_the_agents_address(url: str, address: str) -> None:
    assert front_address(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "compute:8080",
        "ftp://x",
        "http://",
        "http://u:p@x",
        "http://x?token=y",
        "http://x#y",
        "http://x:99999",
        "http://[",
    ],
)
def test_what_is_no_address(url: str) -> None:
    for read in (front_address, target):
        with pytest.raises(ConfigurationError):
            read(url)


@pytest.mark.parametrize(
    ("url", "organization", "expected"),
    [
        ("https://agent.example.org", None, "https://agent.example.org/webhooks/ovation"),
        ("https://agent.example.org/", 17, "https://agent.example.org/webhooks/ovation/17"),
        ("https://agent.example.org/webhooks/ovation", 0, "https://agent.example.org/webhooks/ovation/0"),
        ("https://agent.example.org/webhooks/ovation/17", None, "https://agent.example.org/webhooks/ovation/17"),
        ("https://example.org/agent", None, "https://example.org/agent/webhooks/ovation"),
    ],
)
def test_where_webhooks_go(url: str, organization: int | None, expected: str) -> None:
    assert target(url, organization) == expected


def test_an_organization_twice() -> None:
    with pytest.raises(ConfigurationError, match="leave --organization out"):
        target("https://agent.example.org/webhooks/ovation/17", 17)


def test_a_reader_is_remembered_for_a_minute_and_only_for_that_job() -> None:
    now = [0.0]
    readers = Readers(lambda: now[0])
    readers.remember("token", "job")
    assert readers.may_read("token", "job")
    assert not readers.may_read("another", "job")
    assert not readers.may_read("token", "another")
    now[0] = 59
    assert readers.may_read("token", "job")
    now[0] = 60
    assert not readers.may_read("token", "job")


def test_of_a_token_only_a_hash_is_remembered_and_not_too_many() -> None:
    readers = Readers(lambda: 0.0)
    for number in range(1500):
        readers.remember(f"token-{number}", "job")
    assert len(readers._until) == 1024
    assert not readers.may_read("token-0", "job")
    assert readers.may_read("token-1499", "job")
    assert "token-1499" not in repr(vars(readers))
