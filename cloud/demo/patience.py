"""Waiting for a platform whose processes may be killed and restarted at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from wire.errors import NotFoundError, UnavailableError

PATIENCE_S = 90.0
PAUSE_S = 1.0
T = TypeVar("T")


class WrongPlaceError(UnavailableError):
    """A request was answered elsewhere than the story expects; a restarting process explains it, a bug does not."""

    code = "wrong_place"


def patiently(call: Callable[[], T], *, timeout_s: float = PATIENCE_S, before_retry: Callable[[], None]) -> T:
    """Repeat `call` while the platform is unavailable, or does not yet hold what it will; the last error is raised.

    `before_retry` runs before each new try, for example to start again what has died.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return call()
        except (UnavailableError, NotFoundError):
            if time.monotonic() > deadline:
                raise
        time.sleep(PAUSE_S)
        before_retry()
