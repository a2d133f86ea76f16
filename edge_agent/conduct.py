"""How a loaded model behaves under real requests, and whether a new version behaves as well as the one before it.

Pure: durations come in, a verdict goes out. A wrong request is the caller's fault and is not counted.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

MAX_ERROR_SHARE = 0.1
"""Failed requests of the new version, beyond the share of the old one, that end a soak."""

MIN_TIMED = 8
"""Answers of each version before their speed is compared."""

MAX_TIMED = 256
NOISE_MS = 2.0
"""Slower by less than this is never held against a model."""


@dataclass
class Conduct:
    """Counts of one engine; times are per answer (tensors) or per token (language)."""

    num_requests: int = 0
    num_errors: int = 0
    times_ms: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_TIMED))

    def answered(self, time_ms: float) -> None:
        """One request went well."""
        self.num_requests += 1
        self.times_ms.append(time_ms)

    def failed(self) -> None:
        """One request failed, or its answer was no number."""
        self.num_requests += 1
        self.num_errors += 1

    @property
    def error_share(self) -> float:
        """Failed requests of all."""
        return self.num_errors / self.num_requests if self.num_requests else 0.0


def is_slower(new_ms: float, old_ms: float, max_slowdown: float) -> bool:
    """Whether the new time is beyond the accepted multiple of the old one, noise allowed for."""
    return new_ms > max(old_ms * max_slowdown, old_ms + NOISE_MS)


def complaint(new: Conduct, old: Conduct | None, max_slowdown: float) -> str | None:
    """What a soak has against the new version, or None."""
    allowed = MAX_ERROR_SHARE + (old.error_share if old else 0.0)
    if new.error_share > allowed:
        return f"{new.num_errors} of {new.num_requests} requests failed, at most {allowed:.0%} may"
    if old is None or min(len(new.times_ms), len(old.times_ms)) < MIN_TIMED:
        return None
    new_ms, old_ms = statistics.median(new.times_ms), statistics.median(old.times_ms)
    if is_slower(new_ms, old_ms, max_slowdown):
        return f"answers take {new_ms:.1f} ms, those of the version before {old_ms:.1f} ms"
    return None
