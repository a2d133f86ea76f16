"""A maintenance window: when a device may switch to a model that it has already downloaded.

A window opens at a time of day in UTC, on all days or some, and stays open for a while; it may reach past midnight. It
recurs, so that a device that slept through one night takes the next without asking anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

DAY_S = 86_400
EPOCH_WEEKDAY = 3  # 1970-01-01 was a Thursday; Monday is 0
MIN_S = 60


@dataclass(frozen=True)
class Window:
    """Opens `opens_s` seconds after midnight UTC for `lasts_s` seconds, on `weekdays` (0: Monday; empty: every day)."""

    opens_s: int
    lasts_s: int
    weekdays: tuple[int, ...] = ()

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Raise `ValueError` for what is no window."""
        if not 0 <= self.opens_s < DAY_S:
            raise ValueError(f"opens_s is {self.opens_s}; it counts seconds after midnight, 0 to {DAY_S - 1}")
        if not MIN_S <= self.lasts_s <= DAY_S:
            raise ValueError(f"lasts_s is {self.lasts_s}; a window lasts {MIN_S} to {DAY_S} seconds")
        if any(not 0 <= day <= 6 for day in self.weekdays) or len(set(self.weekdays)) != len(self.weekdays):
            raise ValueError(f"weekdays are {self.weekdays}; each is 0 (Monday) to 6 (Sunday), once")

    def next_open_s(self, now_s: float) -> float:
        """`now_s` (seconds since the epoch) itself while the window is open, else when it opens next."""
        today = int(now_s // DAY_S)
        for day in range(today - 1, today + 8):
            opens_s = day * DAY_S + self.opens_s
            if self._has(day) and now_s < opens_s + self.lasts_s:
                return max(now_s, float(opens_s))
        raise AssertionError("a window recurs within a week")

    def wait_s(self, now_s: float) -> float:
        """Seconds until it is open; 0 while it is."""
        return self.next_open_s(now_s) - now_s

    def _has(self, day: int) -> bool:
        return not self.weekdays or (day + EPOCH_WEEKDAY) % 7 in self.weekdays
