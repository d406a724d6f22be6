"""Who may see the page: whoever has shown the admin token in this browser, for twelve hours.

Nothing is kept here: the cookie says until when it is good, and is signed with a key that follows from the admin token.
A new admin token ends every session.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

COOKIE = "ovation-agent-session"
SESSION_SECONDS = 12 * 3600


def issue(admin_token: str, now: float | None = None) -> str:
    """Return a cookie's value that is good from now on (`now` in seconds since 1970)."""
    until = int((time.time() if now is None else now) + SESSION_SECONDS)
    body = f"{until}.{secrets.token_urlsafe(16)}"
    return f"{body}.{_sign(admin_token, 'session', body)}"


def is_good(admin_token: str, cookie: str | None, now: float | None = None) -> bool:
    """Say whether a cookie's value was issued for this admin token, and is still good."""
    body, _, signature = (cookie or "").rpartition(".")
    if not _same(signature, _sign(admin_token, "session", body)):
        return False
    return int(body.partition(".")[0]) > (time.time() if now is None else now)


def form_token(admin_token: str, cookie: str) -> str:
    """Return what a form of this session carries, so that no other site can send it."""
    return _sign(admin_token, "form", cookie)


def is_form_token(admin_token: str, cookie: str, token: str) -> bool:
    """Say whether a form is one of this session's."""
    return _same(token, form_token(admin_token, cookie))


def _sign(admin_token: str, purpose: str, text: str) -> str:
    key = hashlib.sha256(f"ovation-agent page {purpose}\0{admin_token}".encode(errors="surrogatepass")).digest()
    return hmac.new(key, text.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()


def _same(left: str, right: str) -> bool:
    return hmac.compare_digest(left.encode(errors="surrogatepass"), right.encode(errors="surrogatepass"))
