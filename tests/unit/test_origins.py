"""To whom Ovation's token may go."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from agent.adapters.origins import Origins
from agent.errors import ConfigurationError

API = "https://api.ovation.io"
OURS = Origins(API, ("*.ovation.io", "files.example.org", "http://127.0.0.1:9000", "https://store.example.org:8443"))


@pytest.mark.parametrize(
    "url",
    [
        "https://api.ovation.io",
        "https://api.ovation.io/",
        "https://api.ovation.io:443/x?y#z",
        "HTTPS://API.Ovation.IO/x",
        "https://a.b.c.ovation.io/",
        "https://files.example.org/x",
        "http://127.0.0.1:9000/x",
        "https://store.example.org:8443/x",
        "https://ａｐｉ.ovation.io/",  # noqa: RUF001 wide letters are sent as plain ones
    ],
)
def test_its_own_origins_see_the_token(url: str) -> None:
    assert url in OURS


@pytest.mark.parametrize(
    "url",
    [
        "https://api.ovation.io.evil.com/",
        "https://evilovation.io/",
        "https://ovation.io/",  # the wildcard stands for one or more labels
        "https://.ovation.io/",
        "https://a..ovation.io/",
        "https://api.ovation.io./",
        "https://api.ovation.io@evil.com/",
        "https://user:word@api.ovation.io/",
        "https://@evil.com/",
        "https://api.ovation.io:444/",
        "https://api.ovation.io:80/",
        "http://api.ovation.io/",
        "http://api.ovation.io:443/",
        "ftp://api.ovation.io/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "https://api.ovation.io\\@evil.com/",
        "https://evil.com\\.ovation.io/",
        "https://evil.com/.ovation.io",
        "https://evil.com?.ovation.io",
        "https://evil.com#.ovation.io",
        "https://evil.com%2f.ovation.io/",
        "https://evil.com%00.ovation.io/",
        "https://api.ovation.io\n.evil.com/",
        "https://api.ovation.io\t.evil.com/",
        "https://api.ovatiοn.io/",  # noqa: RUF001 a Greek omicron
        "https://api.ovatıon.io/",  # noqa: RUF001 a dotless i
        "https://xn--ovation-.io",
        "https://api.ovation.io:99999/",
        "https://api.ovation.io:port/",
        "https://[::1",
        "https:///api.ovation.io",
        "https:api.ovation.io",
        "//api.ovation.io/",
        "/api/v1/",
        "",
        "https://sub.files.example.org/",
        "https://127.0.0.1:9000/",
        "http://127.0.0.1:9001/",
        "http://127.0.0.1/",
        "http://store.example.org:8443/",
        "https://store.example.org/",
        "https://[]@",
        "https://[api.ovation.io]@",
    ],
)
def test_everybody_else_does_not(url: str) -> None:
    assert url not in OURS


HOSTS = st.text(string.ascii_lowercase + string.digits + ".-@:/\\#?%[]_*~。ıＡ", max_size=20)  # noqa: RUF001 odd on purpose


@given(before=HOSTS, after=HOSTS)
def test_whatever_stands_around_the_name_the_host_that_is_connected_to_decides(before: str, after: str) -> None:
    for url in (f"https://{before}api.ovation.io{after}", f"https://{before}.ovation.io{after}/x"):
        if url in OURS:
            address = URL(url)
            host = address.raw_host or ""
            assert address.scheme == "https"
            assert (address.port, host == "files.example.org" or host.endswith(".ovation.io")) == (443, True)
            assert address.raw_user is None


@given(st.text(max_size=40))
def test_any_text_gets_an_answer(url: str) -> None:
    assert (url in OURS) in {True, False}
    assert f"https://evil.example/{url}" not in OURS


@pytest.mark.parametrize(
    "host",
    [
        "*",
        "*.",
        "",
        "a.*.ovation.io",
        "https://*.ovation.io",
        "*.https://ovation.io",
        "files.ovation.io:8443",
        "files.ovation.io/path",
        "https://files.ovation.io/path",
        "user@files.ovation.io",
        "ftp://files.ovation.io",
        "[::1",
        "https://files.ovation.io:99999",
    ],
)
def test_a_host_that_cannot_be_read_is_told_and_not_left_out(host: str) -> None:
    with pytest.raises(ConfigurationError, match="OVATION_HOSTS"):
        Origins(API, (host,))


def test_the_api_is_its_own_origin_whatever_the_hosts_say() -> None:
    plain = Origins("http://127.0.0.1:8000", ())
    assert "http://127.0.0.1:8000/api" in plain
    assert "http://127.0.0.1:8001/api" not in plain
    assert "https://api.ovation.io/" not in plain


def test_names_in_the_settings_may_be_written_as_people_write_them() -> None:
    assert "https://files.ovation.io/" in Origins(API, ("Files.Ovation.IO", "*.BÜCHER.example"))
    assert "https://a.xn--bcher-kva.example/" in Origins(API, ("*.bücher.example",))
