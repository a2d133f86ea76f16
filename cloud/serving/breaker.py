"""A circuit breaker per worker: after failures it stays closed to traffic for a while, then lets one request try.

Pure: time comes in as a number of seconds from any steady clock.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_OPEN_S = 10.0


@dataclass
class Breaker:
    """Counts failures in a row. Each opening lasts twice as long as the one before, up to 10 s."""

    first_open_s: float = 0.5
    failures_to_open: int = 1
    num_failures: int = 0
    open_until_s: float = 0.0

    def is_open(self, now_s: float) -> bool:
        """True while the worker should get nothing."""
        return now_s < self.open_until_s

    def record_success(self) -> None:
        """The worker answered: forget its failures."""
        self.num_failures = 0
        self.open_until_s = 0.0

    def record_failure(self, now_s: float) -> None:
        """The worker failed: open when that happened often enough."""
        self.num_failures += 1
        excess = self.num_failures - self.failures_to_open
        if excess >= 0:
            self.open_until_s = now_s + min(MAX_OPEN_S, self.first_open_s * 2.0 ** min(excess, 10))
