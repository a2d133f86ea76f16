"""Who is calling: bearer tokens, checked by the control plane or against a file. Never open by default.

Rules: a token's answer is remembered for at most 30 s and by its hash only; roles that may infer are listed here; when
the control plane cannot be asked, nobody new gets in. The tenant's KV salt is derived here from the authenticated
tenant, never taken from a request.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from wire.errors import InvalidInputError, NotAllowedError, NotAuthenticatedError, UnavailableError

INFERENCE_ROLES = frozenset({"device", "operator", "publisher", "admin"})
MAX_TOKEN_CHARS = 4096
_CACHE_S = 30.0
_CACHE_SIZE = 4096


@dataclass(frozen=True)
class Caller:
    """An authenticated caller."""

    tenant: str
    subject: str
    role: str

    @property
    def salt(self) -> bytes:
        """What separates this tenant's cached prefixes from all others'."""
        fields = (b"foreshore.tenant.salt.1", self.tenant.encode())
        return hashlib.sha256(b"".join(struct.pack("<Q", len(f)) + f for f in fields)).digest()


class Authenticator(Protocol):
    """Turns a bearer token into a caller, or raises `NotAuthenticatedError`, `NotAllowedError`, `UnavailableError`."""

    async def authenticate(self, token: str) -> Caller: ...


class FileTokens:
    """Stand-alone use: one token per line of a file, all of one tenant."""

    def __init__(self, path: Path, tenant: str = "default") -> None:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        self._digests = [_digest(line) for line in lines if line and not line.startswith("#")]
        if not self._digests:
            raise InvalidInputError(f"{path} holds no token", remedy="write one token per line")
        self._tenant = tenant

    async def authenticate(self, token: str) -> Caller:
        """See `Authenticator`."""
        given = _digest(token)
        if not any(hmac.compare_digest(given, digest) for digest in self._digests):
            raise NotAuthenticatedError("the token is unknown", remedy="use a token of the gateway's token file")
        return Caller(self._tenant, "token-file", "operator")


class ControlPlaneTokens:
    """Asks the control plane and remembers its answer for a short while."""

    def __init__(self, client: httpx.AsyncClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._answers: OrderedDict[bytes, tuple[float, Caller | None]] = OrderedDict()

    async def authenticate(self, token: str) -> Caller:
        """See `Authenticator`."""
        key = _digest(token)
        known = self._answers.get(key)
        if known is None or known[0] < self._clock():
            caller = await self._introspect(token)
            self._answers[key] = (self._clock() + _CACHE_S, caller)
            self._answers.move_to_end(key)
            while len(self._answers) > _CACHE_SIZE:
                self._answers.popitem(last=False)
        else:
            caller = known[1]
        if caller is None:
            raise NotAuthenticatedError("the token is unknown or revoked", remedy="ask an admin for a new one")
        if caller.role not in INFERENCE_ROLES:
            raise NotAllowedError(
                f"role {caller.role!r} may not use models", remedy=f"one of {', '.join(sorted(INFERENCE_ROLES))} may"
            )
        return caller

    async def _introspect(self, token: str) -> Caller | None:
        try:
            response = await self._client.post("/api/v1/tokens/introspect", json={"token": token})
            response.raise_for_status()
            answer = response.json()
            if not answer["active"]:
                return None
            return Caller(str(answer["tenant"]), str(answer["subject"]), str(answer["role"]))
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UnavailableError(
                f"the control plane could not check the token: {error!r}", remedy="try again soon"
            ) from error


def read_bearer(header: str | None) -> str:
    """The token of an Authorization header; raises `NotAuthenticatedError`."""
    scheme, _, token = (header or "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > MAX_TOKEN_CHARS:
        raise NotAuthenticatedError("no bearer token", remedy="send 'Authorization: Bearer TOKEN'")
    return token


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
