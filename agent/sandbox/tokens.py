"""Ovation's bearer tokens: HS256 JWTs for people and for service accounts (ovation-api.md section 3)."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Any

import jwt

from agent.sandbox.records import Records
from agent.sandbox.settings import Clock

AUDIENCE = "https://api.ovation.io/"
SERVICE_SCOPES = "read:global write:global"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. A service account reads and writes everything that its scopes allow."""

    user_id: str
    service: bool
    scopes: frozenset[str] = frozenset()


class Tokens:
    """Makes and checks tokens with a secret that is kept with the data."""

    def __init__(self, records: Records, service_user_id: str, clock: Clock) -> None:
        self.secret = records.remembered("jwt_secret")
        self.client_id = records.remembered("client_id")
        self.client_secret = records.remembered("client_secret")
        self.service_user_id = service_user_id
        self._clock = clock

    def for_user(self, user_id: str, email: str, lifetime_seconds: float) -> str:
        """Return a person's token."""
        return self._encode({"sub": user_id, "email": email}, lifetime_seconds)

    def for_service(self, lifetime_seconds: float, scopes: str = SERVICE_SCOPES) -> str:
        """Return the service account's token."""
        return self._encode({"sub": f"{self.client_id}@clients", "scope": scopes, "aud": AUDIENCE}, lifetime_seconds)

    def is_client(self, client_id: object, client_secret: object) -> bool:
        """Say whether these are the service account's credentials."""
        given = f"{client_id}\n{client_secret}".encode()
        return hmac.compare_digest(given, f"{self.client_id}\n{self.client_secret}".encode())

    def read(self, token: str) -> Principal | None:
        """Return who the token speaks for; None when it is forged, expired or not a token."""
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                self.secret,
                algorithms=["HS256"],
                options={"verify_aud": False, "verify_exp": False, "verify_iat": False, "require": ["sub", "exp"]},
            )
        except jwt.InvalidTokenError:
            return None
        # PyJWT reads the system's clock; the sandbox has its own, so that tests can age tokens
        if float(claims["exp"]) <= self._clock():
            return None
        if str(claims["sub"]).endswith("@clients"):
            scopes = claims.get("scope") or claims.get("https://ovation.io/scope") or ""
            return Principal(self.service_user_id, service=True, scopes=frozenset(str(scopes).split()))
        return Principal(str(claims["sub"]), service=False)

    def _encode(self, claims: dict[str, Any], lifetime_seconds: float) -> str:
        now = self._clock()
        times = {"iat": int(now), "exp": int(now + lifetime_seconds), "iss": "sandbox"}
        return jwt.encode(claims | times, self.secret, algorithm="HS256")
