"""Server-sent events out of bytes that arrive as they like."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_registry.sse import MAX_EVENT_BYTES, ServerEvent, read_events
from wire.errors import TooLargeError

STREAM = (
    ': comment\n\nid: 7\nevent: job\ndata: {"a":1}\n\ndata: Grüße\u2028x\r\ndata:two\r\n\r\nevent: empty\n\ndata\n\n'
).encode()
EVENTS = [
    ServerEvent("job", '{"a":1}', "7"),
    ServerEvent("message", "Grüße\u2028x\ntwo", "7"),
    ServerEvent("message", "", "7"),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_events_are_the_same_however_the_bytes_are_torn(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in itertools.pairwise(places)]
    assert list(read_events(pieces)) == EVENTS


def test_an_unfinished_event_is_dropped() -> None:
    assert list(read_events([b"data: a\n\ndata: b\n"])) == [ServerEvent("message", "a", None)]


def test_carriage_returns_alone_end_lines() -> None:
    assert list(read_events([b"data: a\r\rdata: b\r", b"\r"])) == [
        ServerEvent("message", "a"),
        ServerEvent("message", "b"),
    ]


def test_an_endless_event_is_refused() -> None:
    with pytest.raises(TooLargeError):
        list(read_events([b"data: "] + [bytes(1 << 20)] * 5))
    with pytest.raises(TooLargeError):
        list(read_events([b"data: " + b"x" * 1000 + b"\n"] * (MAX_EVENT_BYTES // 1000 + 1)))
