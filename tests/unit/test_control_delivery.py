"""One stream of content: union, pacing, repair."""

from __future__ import annotations

from cloud.control.delivery import BATCH, GATHER_S, HEALTHY_S, MAX_AHEAD, REPEAT_S, Stream

ALL = set(range(200))


def drain(stream: Stream, now: float) -> list[tuple[int, str | None]]:
    sent: list[tuple[int, str | None]] = []
    while batch := stream.next_batch(now):
        sent += batch
    return sent


def test_what_two_devices_miss_is_sent_once_to_both() -> None:
    stream = Stream(10, 0.0)
    stream.hear("a", {0, 1}, 0, 0.0)
    stream.hear("b", {0, 1}, 0, 0.1)
    assert stream.next_batch(0.2) == []  # still gathering
    assert drain(stream, GATHER_S) == [(0, None), (1, None)]


def test_a_lone_straggler_is_served_on_its_own_topic() -> None:
    stream = Stream(10, 0.0)
    stream.hear("a", {0}, 0, 0.0)
    stream.hear("b", {0, 7}, 0, 0.0)
    assert drain(stream, 1.0) == [(0, None), (7, "b")]


def test_credit_without_missing_repeats_nothing_and_opens_the_window() -> None:
    stream = Stream(200, 0.0)
    stream.hear("a", set(ALL), 0, 0.0)
    sent = drain(stream, 1.0)
    assert MAX_AHEAD <= len(sent) < MAX_AHEAD + BATCH
    stream.hear("a", set(), 16, 1.5)
    more = drain(stream, 1.5)
    assert len(more) == 16
    assert not {index for index, _ in sent} & {index for index, _ in more}


def test_a_device_that_fell_silent_no_longer_holds_the_others_up() -> None:
    stream = Stream(200, 0.0)
    stream.hear("silent", set(ALL), 0, 0.0)
    stream.hear("a", set(ALL), 0, 0.0)
    drain(stream, 1.0)
    later = 1.0 + HEALTHY_S
    stream.hear("a", set(), 60, later)
    assert drain(stream, later)


def test_what_is_asked_for_again_is_sent_again_but_not_what_is_still_under_way() -> None:
    stream = Stream(10, 0.0)
    stream.hear("a", {0, 1}, 0, 0.0)
    drain(stream, 1.0)
    stream.hear("a", {0, 1}, 0, 1.1)
    assert drain(stream, 1.1) == []
    stream.hear("a", {1}, 1, 1.0 + REPEAT_S)
    assert drain(stream, 1.0 + REPEAT_S) == [(1, None)]
