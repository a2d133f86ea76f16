"""Server-sent events, read from bytes as they arrive (WHATWG HTML, section 9.2.6). No network here.

Lines end with LF, CRLF or CR and nothing else: other Unicode line breaks are content. Characters may be torn between
pieces. Comment lines are dropped, events without data too. An event over `MAX_EVENT_BYTES` ends the stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from wire.errors import TooLargeError

MAX_EVENT_BYTES = 4 << 20

_LINE_END = re.compile(rb"\r\n|\n|\r(?!$)")


@dataclass(frozen=True)
class ServerEvent:
    """One event; `event_id` is the last id that the stream gave, also by an earlier event."""

    kind: str
    data: str
    event_id: str | None = None


def read_events(pieces: Iterable[bytes]) -> Iterator[ServerEvent]:
    """Yield each complete event; what follows the last blank line is dropped, as the standard says."""
    kind, data, last_id, size = "", list[str](), None, 0
    for line in _lines(pieces):
        size += len(line)
        if size > MAX_EVENT_BYTES:
            raise TooLargeError(f"an event has over {MAX_EVENT_BYTES} bytes", remedy="the server should send less")
        if not line:
            if data:
                yield ServerEvent(kind or "message", "\n".join(data), last_id)
            kind, data, size = "", [], 0
            continue
        field, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode("utf-8", "replace")
        if field == b"data":
            data.append(text)
        elif field == b"event":
            kind = text
        elif field == b"id" and "\0" not in text:
            last_id = text


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = _LINE_END.split(rest + piece)
        yield from lines
        if len(rest) > MAX_EVENT_BYTES:
            raise TooLargeError(f"a line has over {MAX_EVENT_BYTES} bytes", remedy="the server should send less")
    if rest.endswith(b"\r"):
        yield rest[:-1]
