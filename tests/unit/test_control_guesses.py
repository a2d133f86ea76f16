"""Trying tokens: slow for strangers, free for those who are known."""

from __future__ import annotations

import pytest

from cloud.control.guesses import MAX_ADDRESSES, MAX_WRONG, WINDOW_S, Guesses
from wire.errors import OverloadedError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guesses(clock: Clock) -> Guesses:
    return Guesses(clock)


def try_many(guesses: Guesses, address: str, count: int = MAX_WRONG) -> None:
    for number in range(count):
        guesses.check(address, f"wrong-{number}")
        guesses.note_wrong(address, f"wrong-{number}")


def test_after_many_wrong_tokens_an_address_waits_and_is_told_how_long(guesses: Guesses, clock: Clock) -> None:
    try_many(guesses, "192.0.2.1")
    with pytest.raises(OverloadedError) as caught:
        guesses.check("192.0.2.1", "even a right one")
    assert caught.value.details["retry_after_s"] == WINDOW_S
    guesses.check("192.0.2.2", "another address does not wait")
    clock.now += WINDOW_S
    guesses.check("192.0.2.1", "again")


def test_one_wrong_token_over_and_over_is_no_guessing(guesses: Guesses) -> None:
    for _ in range(10 * MAX_WRONG):
        guesses.check("192.0.2.1", "mistyped")
        guesses.note_wrong("192.0.2.1", "mistyped")


def test_who_was_known_before_goes_on_working_behind_an_address_that_waits(guesses: Guesses) -> None:
    guesses.note_right("good")
    try_many(guesses, "192.0.2.1")
    guesses.check("192.0.2.1", "good")


def test_changing_the_address_within_an_ipv6_network_gains_nothing(guesses: Guesses) -> None:
    for number in range(MAX_WRONG):
        guesses.note_wrong(f"2001:db8::{number:x}", f"wrong-{number}")
    with pytest.raises(OverloadedError):
        guesses.check("2001:db8::ffff", "x")
    guesses.check("2001:db8:0:1::1", "x")


def test_memory_is_bounded(guesses: Guesses) -> None:
    for number in range(MAX_ADDRESSES + 500):
        guesses.note_wrong(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", "x")
    assert len(guesses._wrong) == MAX_ADDRESSES
