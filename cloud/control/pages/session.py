"""The browser's session: the API token in a cookie that scripts cannot read, and the defences around it.

Rules: the cookie is HttpOnly and SameSite=Strict; `CookieToBearer` lends it to the API for reading only, so a page of
another site can never change anything with it; every form carries a token derived from the session (`csrf_token`), and
a request whose `Origin` is another host is refused. Nothing is stored on the server: revoking the token ends the
session.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wire.errors import NotAllowedError

COOKIE: Final = "foreshore_session"
CSRF_FIELD: Final = "csrf_token"
MAX_AGE_S: Final = 12 * 3600
MAX_TOKEN_LENGTH: Final = 512
API_PREFIX: Final = "/api/"

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def set_session(response: Response, token: str, *, secure: bool) -> None:
    """Give the browser its session; `secure` where the page came over TLS."""
    response.set_cookie(COOKIE, token, max_age=MAX_AGE_S, httponly=True, samesite="strict", secure=secure, path="/")


def end_session(response: Response) -> None:
    """Have the browser forget its session."""
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")


def csrf_token(session: str) -> str:
    """The token that this session's forms carry; nobody can make it without the session."""
    return hmac.new(session.encode(), b"foreshore form", hashlib.sha256).hexdigest()


def require_same_origin(headers: Mapping[str, str]) -> None:
    """Refuse a form that another site sent (RFC 6454 `Origin`, Fetch Metadata); raises `NotAllowedError`."""
    origin = headers.get("origin")
    foreign = origin is not None and urlsplit(origin).netloc != headers.get("host", "")
    if foreign or headers.get("sec-fetch-site") in {"cross-site", "same-site"}:
        raise NotAllowedError("the form came from another site", remedy="open the page itself and send it from there")


def require_csrf(session: str, given: object) -> None:
    """Check a form's token against its session; raises `NotAllowedError`."""
    if not isinstance(given, str) or not hmac.compare_digest(given.encode(), csrf_token(session).encode()):
        raise NotAllowedError("the form does not belong to this session", remedy="load the page again and resend it")


class CookieToBearer:
    """ASGI middleware: a browser's GET or HEAD below `/api/` is authenticated by its session cookie.

    An `Authorization` header wins, other methods never get one, and a request that another site caused is left alone.
    Page responses get the security headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_api = scope["path"].startswith(API_PREFIX)
        if is_api and scope["method"] in {"GET", "HEAD"}:
            scope = _with_bearer(scope)
        await self._app(scope, receive, send if is_api else _with_page_headers(send))


def _with_bearer(scope: Scope) -> Scope:
    headers = Headers(scope=scope)
    if "authorization" in headers or headers.get("sec-fetch-site", "same-origin") not in {"same-origin", "none"}:
        return scope
    session = _session_of(headers.get("cookie", ""))
    if not session:
        return scope
    return {**scope, "headers": [*scope["headers"], (b"authorization", f"Bearer {session}".encode("latin-1"))]}


def _session_of(cookie_header: str) -> str | None:
    try:
        morsel = SimpleCookie(cookie_header).get(COOKIE)
    except CookieError:
        return None
    return morsel.value if morsel and morsel.value.isascii() and len(morsel.value) <= MAX_TOKEN_LENGTH else None


def _with_page_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in PAGE_HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers
