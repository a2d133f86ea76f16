"""HTTP to the control plane: one place for credentials, retries, limits and the way errors come back as our types.

Requests that may be repeated safely are, at most `MAX_TRIES` times with growing, jittered pauses; others only when no
connection came about. An answer over the limit is cut off. A problem document (RFC 9457) becomes the error class of
its `code`. Safe to use from several threads.
"""

from __future__ import annotations

import json
import random
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import httpx

from model_registry.sse import ServerEvent, read_events
from wire import errors
from wire.errors import ForeshoreError, InvalidInputError, TooLargeError, UnavailableError

MAX_TRIES = 5
MAX_PAUSE_S = 8.0
MAX_ANSWER_BYTES = 64 << 20
TIMEOUT_S = 30.0
EVENT_TIMEOUT_S = 60.0  # servers send a comment every 15 s

Json = dict[str, Any]
Content = bytes | Callable[[], Iterable[bytes]]
"""A body, or a function that gives a fresh iterator of its pieces for every try."""

OPENED = ServerEvent("open", "")

_REPEATABLE = frozenset({"GET", "HEAD", "PUT", "DELETE"})


class Transport:
    """Requests below `{url}/api/v1`."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        ca_file: str | None = None,
        tls: ssl.SSLContext | None = None,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidInputError(f"address {url!r} is not HTTP", remedy="for example https://fleet.example.org")
        self.url = url.rstrip("/")
        self._sleep = sleep
        self._jitter = jitter
        self._client = httpx.Client(
            base_url=f"{self.url}/api/v1/",
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=timeout_s,
            verify=tls or _tls(ca_file),
            transport=transport,
            follow_redirects=False,
        )

    def close(self) -> None:
        """Let the connections go."""
        self._client.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        is_repeatable: bool = False,
    ) -> Any:
        """Send JSON, return the answer's JSON (None for an empty answer).

        `is_repeatable` says that the server takes this very request twice without harm, whatever its method.
        """
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        answer = self.fetch(
            method,
            path,
            content=content,
            params=params,
            timeout_s=timeout_s,
            headers={} if content is None else {"content-type": "application/json"},
            is_repeatable=is_repeatable,
        )
        if not answer:
            return None
        try:
            return json.loads(answer)
        except ValueError as error:
            raise UnavailableError(f"{self.url} did not answer in JSON", remedy="check the address") from error

    def fetch(
        self,
        method: str,
        path: str,
        *,
        content: Content | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
        is_repeatable: bool = False,
    ) -> bytes:
        """Return the answer's bytes, or raise the error it describes."""
        return self._repeat(
            is_repeatable or method in _REPEATABLE,
            lambda: self._once(method, path, content, params, headers, timeout_s, max_bytes),
        )

    def stream(self, path: str, *, headers: Mapping[str, str] | None = None) -> Iterator[bytes]:
        """The body of a GET in pieces, without retries."""
        try:
            with self._client.stream("GET", path.lstrip("/"), headers=headers) as response:
                self._raise_for(response)
                yield from response.iter_bytes()
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def events(self, path: str, *, last_event_id: str | None = None) -> Iterator[ServerEvent]:
        """The events of one connection; ends when the server ends it, raises `UnavailableError` when it breaks.

        The first is `OPENED`: what the caller reads from now on is no older than the events that follow.
        """
        headers = {"accept": "text/event-stream"} | ({"last-event-id": last_event_id} if last_event_id else {})
        timeout = httpx.Timeout(TIMEOUT_S, read=EVENT_TIMEOUT_S)
        try:
            with self._client.stream("GET", path.lstrip("/"), headers=headers, timeout=timeout) as response:
                self._raise_for(response)
                yield OPENED
                yield from read_events(response.iter_bytes())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def pause(self, attempt: int, *, at_least_s: float = 0.0) -> None:
        """Wait before try number `attempt` + 1: doubling from half a second, at most `MAX_PAUSE_S`, jittered."""
        self._sleep(max(at_least_s, min(MAX_PAUSE_S, 0.5 * 2.0**attempt) * (0.1 + 0.9 * self._jitter())))

    def _repeat(self, is_repeatable: bool, send: Callable[[], bytes]) -> bytes:
        for attempt in range(MAX_TRIES):
            try:
                return send()
            except UnavailableError as error:
                is_unsent = isinstance(error.__cause__, httpx.ConnectError)
                if attempt == MAX_TRIES - 1 or not (is_repeatable or is_unsent):
                    raise
                self.pause(attempt, at_least_s=_asked_pause(error))
        raise AssertionError("unreachable")

    def _once(
        self,
        method: str,
        path: str,
        content: Content | None,
        params: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None,
        timeout_s: float | None,
        max_bytes: int,
    ) -> bytes:
        body = content() if callable(content) else content
        options: Json = {} if timeout_s is None else {"timeout": timeout_s}
        try:
            with self._client.stream(
                method, path.lstrip("/"), content=body, params=params, headers=headers, **options
            ) as response:
                self._raise_for(response)
                return _read_bounded(response, max_bytes)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _raise_for(self, response: httpx.Response) -> None:
        if response.status_code >= 300:
            raise error_of(response.status_code, _read_bounded(response, 1 << 20), self.url)

    def _unreachable(self, error: httpx.HTTPError) -> UnavailableError:
        kind = errors.TimedOutError if isinstance(error, httpx.TimeoutException) else UnavailableError
        return kind(f"{self.url} cannot be reached: {error or type(error).__name__}", remedy="is the server running?")


def error_of(status: int, body: bytes, where: str) -> ForeshoreError:
    """The error that an answer describes: by the code in its problem document, else by its status."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = {}
    document = document if isinstance(document, dict) else {}
    message = str(document.get("message") or document.get("detail") or document.get("title") or f"status {status}")
    kind = _error_class(str(document.get("code", "")), status)
    details = document.get("details")
    error = kind(message[:2000], remedy=str(document.get("remedy") or "")[:2000])
    error.details = {"status": status, "server": where, **(details if isinstance(details, dict) else {})}
    return error


def _asked_pause(error: UnavailableError) -> float:
    """The pause that an overloaded server asked for, in seconds, as far as we go along with it."""
    asked = error.details.get("retry_after_s")
    return min(MAX_PAUSE_S, float(asked)) if isinstance(asked, int | float) else 0.0


def _error_class(code: str, status: int) -> type[ForeshoreError]:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ForeshoreError)]
    plain = [kind for kind in classes if kind is not errors.MissingExtraError]  # has a constructor of its own
    by_code = {kind.code: kind for kind in plain}
    by_status = {
        400: InvalidInputError, 401: errors.NotAuthenticatedError, 403: errors.NotAllowedError,
        404: errors.NotFoundError, 409: errors.ConflictError, 413: TooLargeError, 422: InvalidInputError,
        429: errors.OverloadedError, 502: UnavailableError, 503: UnavailableError, 504: errors.TimedOutError,
        507: errors.InsufficientSpaceError,
    }  # fmt: skip
    return by_code.get(code) or by_status.get(status, ForeshoreError)


def _read_bounded(response: httpx.Response, max_bytes: int) -> bytes:
    data = bytearray()
    for piece in response.iter_bytes():
        data += piece
        if len(data) > max_bytes:
            raise TooLargeError(f"an answer has over {max_bytes} bytes", remedy="ask for less at once")
    return bytes(data)


def _tls(ca_file: str | None) -> Any:
    import ssl

    try:
        return ssl.create_default_context(cafile=ca_file) if ca_file else True
    except (OSError, ssl.SSLError) as error:
        raise InvalidInputError(f"CA file {ca_file!r} cannot be read: {error}", remedy="give a PEM file") from error
