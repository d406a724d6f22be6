"""The log: one line an event, the same form for libraries, and no secret in any part of it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from agent import logs

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJlLW9mLWl0"
PRESIGNED = (
    "https://bucket.s3.amazonaws.com/key?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAEXAMPLE%2Fus"
    "&X-Amz-Signature=deadbeefcafe&X-Amz-Security-Token=FwoGZXIvYXdzEXAMPLE&versionId=3"
)
SECRETS = {
    "bearer": ("Authorization: Bearer opaque-token-123", "opaque-token-123"),
    "basic": ("{'Authorization': 'Basic dXNlcjpodW50ZXIy'}", "dXNlcjpodW50ZXIy"),
    "jwt": (f"refused: {JWT}", JWT),
    "query": ("GET /files/1?token=opaque-token-123&x=1", "opaque-token-123"),
    "presigned": (PRESIGNED, "deadbeefcafe"),
    "session": (PRESIGNED, "FwoGZXIvYXdzEXAMPLE"),
    "database": ("postgresql://agent:hunter2@db.example.org/agent", "hunter2"),
    "database, at sign": ("postgresql://agent:hunt@er2@db.example.org/agent", "er2@"),
    "database, query": ("postgresql:///agent?host=/run&password=hunter2", "hunter2"),
    "json": ('{"client_secret": "hunter2-secret"}', "hunter2-secret"),
    "assignment": ("OVATION_CLIENT_SECRET=hunter2-secret", "hunter2-secret"),
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def _restored() -> Iterator[None]:
    """Give structlog, logging and warnings back as they were."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()
    logs._hidden.clear()


@pytest.fixture
def log(_restored: None, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure("json")
    return stream


@pytest.fixture
def terminal(_restored: None, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure("auto")
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(("text", "secret"), SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize(
    "shape",
    [
        lambda text: text,
        lambda text: [text],
        lambda text: {"inner": [{"deep": text}]},
        lambda text: (1, {text: "a key"}),
        lambda text: {text},
        ValueError,
        str.encode,
    ],
    ids=["text", "list", "nested", "key", "set", "exception", "bytes"],
)
def test_secrets_are_redacted_wherever_they_stand(text: str, secret: str, shape: Any, log: io.StringIO) -> None:
    logs.logger().info("something", value=shape(text), other=5)
    assert secret not in log.getvalue()
    assert logs.REDACTED in log.getvalue()
    assert lines(log)[0]["other"] == 5


@pytest.mark.parametrize("key", ["token", "password", "client_secret", "Authorization", "session_token", "credentials"])
@pytest.mark.parametrize("value", ["plain", ["plain"], {"a": "plain"}, b"plain"], ids=["text", "list", "dict", "bytes"])
def test_what_stands_under_a_secret_key_is_redacted(key: str, value: object, log: io.StringIO) -> None:
    logs.logger().info("something", **{key: value}, nested={key: value}, listed=[{key: value}])
    assert "plain" not in log.getvalue()
    logs.logger().info("something", **{key: None})
    assert lines(log)[-1][key] is None


@pytest.mark.parametrize(
    "text",
    [
        "no token: set OVATION_TOKEN, or OVATION_CLIENT_ID and OVATION_CLIENT_SECRET",
        "webhooks must carry basic authentication",
        "http://127.0.0.1:8080/webhooks/ovation",
        "postgresql://agent@db.example.org:5432/agent",
        "The program ended with exit code 3. It said last: the bearer of news",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert logs.redact(text).replace("bearer [redacted]", "bearer of") == text


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6, max_size=40), st.text(), st.text())
def test_known_secrets_are_hidden_by_value(secret: str, before: str, after: str) -> None:
    logs._hidden.clear()
    logs.hide([secret, "ab", ""])
    try:
        shown = logs.redact(f"{before}|{secret}|{after}")
        assert secret not in shown.replace(logs.REDACTED, "")
        assert logs.redact("ab and nothing else") == "ab and nothing else"
    finally:
        logs._hidden.clear()


def fail(local: str) -> None:
    raise KeyError(f"postgresql://agent:hunter2@db/agent?token={local}")


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_no_secret(log_format: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure(log_format)
    local = "a-local-variable-" + "s3cret"
    try:
        try:
            fail(local)
        except KeyError as error:
            raise RuntimeError(f"Bearer {local}") from error
    except RuntimeError:
        logs.logger().exception("failed")
        logging.getLogger("aiohttp.server").exception("Error handling request")
    text = stream.getvalue()
    assert "RuntimeError" in text
    assert "KeyError" in text
    assert "hunter2" not in text
    assert local not in text


def test_libraries_and_warnings_take_the_same_form(log: io.StringIO) -> None:
    logging.getLogger("asyncio").error("Task exception was never retrieved: %s", f"Bearer {JWT}")
    logging.getLogger("aiohttp.server").info("not worth a line")
    logging.getLogger("asyncpg.pool").warning("the worker tells of outages")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("something is old", UserWarning, stacklevel=1)
        logging.captureWarnings(capture=False)
    first, second = lines(log)
    assert first["logger"] == "asyncio"
    assert first["level"] == "error"
    assert first["event"] == "Task exception was never retrieved: Bearer [redacted]"
    assert "something is old" in second["event"]
    assert second["level"] == "warning"


def test_asyncio_reports_a_lost_error_as_json(log: io.StringIO) -> None:
    async def fail() -> None:
        raise ValueError("lost: Bearer opaque-token-123")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        task = loop.create_task(fail())
        await asyncio.wait({task})
        loop.call_exception_handler({"message": "never retrieved", "exception": task.exception(), "task": task})

    asyncio.run(main())
    (line,) = lines(log)
    assert line["event"].startswith("never retrieved")
    assert "opaque-token-123" not in log.getvalue()
    assert line["exception"][0]["exc_type"] == "ValueError"


def test_bound_values_and_levels(log: io.StringIO) -> None:
    with structlog.contextvars.bound_contextvars(job_id="j", admin_token="plain"):
        logs.logger().debug("unseen")
        logs.logger().warning("seen", seconds=0.5)
    (line,) = lines(log)
    assert (line["event"], line["level"], line["job_id"], line["seconds"]) == ("seen", "warning", "j", 0.5)
    assert line["admin_token"] == logs.REDACTED
    assert line["timestamp"].endswith("Z")


def test_a_terminal_gets_text_and_no_foreign_control_characters(terminal: Terminal) -> None:
    logs.logger().warning("named", name="evil\x1b]0;owned\x07\nforged line\u202e", listed=["\x9b31m"])
    text = terminal.getvalue()
    assert not text.startswith("{")
    assert text.count("\n") == 1
    assert not {"\x07", "\u202e", "\x9b"} & set(text)
    assert "\x1b]" not in text
    assert "owned" in text


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(
    ("log_format", "is_terminal", "is_json"),
    [("auto", True, False), ("auto", False, True), ("json", True, True), ("console", False, False)],
)
def test_the_form_follows_the_setting_and_the_terminal(
    log_format: Any, is_terminal: bool, is_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure(log_format)
    logs.logger().info("hello", n=1)
    assert stream.getvalue().startswith("{") == is_json
    assert ("\x1b[" in stream.getvalue()) == (is_terminal and not is_json)


@given(st.text())
def test_printable_leaves_nothing_a_terminal_obeys(text: str) -> None:
    shown = logs.printable(text)
    assert shown.isprintable()
    assert len(shown) == len(text)
    assert logs.printable(shown) == shown
