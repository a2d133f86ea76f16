"""The time that expiry is judged by: the machine's clock, never earlier than what is already proven.

Floors: this build, the enrolment, the newest accepted timestamp metadata (its signed `signed_at`). A clock that starts
in 1970 therefore cannot revive expired metadata. The clock itself never raises a floor: one that was wrong by ten years
blocks installs while it is wrong and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

BUILT_AT = datetime(2026, 11, 1, tzinfo=UTC)
"""No correct clock shows less; raised with every release of this software."""


def machine_time() -> datetime:
    """What the machine believes."""
    return datetime.now(UTC)


class TrustedClock:
    """Machine time with a floor. `read` comes in so that tests can be anywhere in time."""

    def __init__(self, read: Callable[[], datetime] = machine_time, *, not_before: datetime = BUILT_AT) -> None:
        self._read = read
        self._not_before = not_before

    def now(self, proven: datetime | None = None) -> datetime:
        """The time to judge expiry by, given the newest proven instant."""
        floor = self._not_before if proven is None else max(self._not_before, proven)
        return max(self._read(), floor)
