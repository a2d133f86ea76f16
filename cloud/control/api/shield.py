"""What every request meets first: which door it came through, how much it may send and how slowly, what answers say.

Rules, in order: through the devices' door only the API is reachable; a body that is over the limit or of no declared
sanity is refused before anything parses it; a body that does not arrive in time is given up; every API answer carries
headers that keep browsers from guessing, framing or storing it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloud.control.api.base import DOOR, PREFIX, problem
from wire.errors import ForeshoreError, InvalidInputError, NotFoundError, RequestTimeoutError, TooLargeError

MAX_BODY_BYTES: Final = 2 << 20
BODY_TIMEOUT_S: Final = 30.0  # for a whole body
PIECE_TIMEOUT_S: Final = 60.0  # for the next piece of a blob, which may be as long as it likes
API_HEADERS: Final[Mapping[str, str]] = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Shield:
    """ASGI middleware around the whole application. Blobs have their own size limit and are streamed."""

    def __init__(self, app: ASGIApp, body_timeout_s: float = BODY_TIMEOUT_S) -> None:
        self._app = app
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        headers = API_HEADERS if path.startswith("/api/") else {}
        send = _with_headers(send, headers, is_secure=scope["scheme"] == "https")
        try:
            self._refuse(scope, path)
        except ForeshoreError as error:
            await problem(error)(scope, receive, send)
            return
        is_blob = path.startswith(f"{PREFIX}/blobs/")
        await self._app(scope, _patient(receive) if is_blob else _limited(receive, self._body_timeout_s), send)

    @staticmethod
    def _refuse(scope: Scope, path: str) -> None:
        if scope.get("state", {}).get(DOOR) == "device" and not path.startswith(f"{PREFIX}/"):
            raise NotFoundError("this is the devices' door", remedy="people use the other address")
        if path.startswith(f"{PREFIX}/blobs/"):
            return
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit():
            raise InvalidInputError("content-length is not a number", remedy="send the size of the body")
        if len(length) > 18 or int(length) > MAX_BODY_BYTES:
            raise TooLargeError("the body is too large", remedy=f"at most {MAX_BODY_BYTES} bytes")


def _limited(receive: Receive, timeout_s: float) -> Receive:
    received, deadline = 0, asyncio.get_running_loop().time() + timeout_s
    is_complete = False

    async def limited() -> Message:
        nonlocal received, is_complete
        if is_complete:  # what comes now is the end of the connection, which may take as long as the answer
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError as error:
            raise RequestTimeoutError("the body did not arrive in time", remedy="send it at once") from error
        received += len(message.get("body", b""))
        is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        if received > MAX_BODY_BYTES:
            raise TooLargeError("the body is too large", remedy=f"at most {MAX_BODY_BYTES} bytes")
        return message

    return limited


def _patient(receive: Receive) -> Receive:
    is_complete = False

    async def patient() -> Message:
        nonlocal is_complete
        if is_complete:
            return await receive()
        try:
            async with asyncio.timeout(PIECE_TIMEOUT_S):
                message = await receive()
        except TimeoutError as error:
            raise RequestTimeoutError("the blob stopped arriving", remedy="send it again") from error
        is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    return patient


def _with_headers(send: Send, headers: Mapping[str, str], *, is_secure: bool) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = MutableHeaders(scope=message)
            for name, value in headers.items():
                given.setdefault(name, value)
            if is_secure:
                given.setdefault("strict-transport-security", "max-age=31536000")
        await send(message)

    return send_with_headers
