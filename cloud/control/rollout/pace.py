"""How fast a rollout may reach devices: a token bucket whose rate is constant or grows with success.

Credit is counted in devices. It never grows beyond what `BURST_S` seconds earn (at least one device), so neither a
pause nor a control plane that was away lets a crowd through at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BURST_S = 10.0
MAX_PER_MINUTE = 1_000_000.0


@dataclass(frozen=True)
class Pace:
    """At most `per_minute` devices a minute, times `factor` for each `every` successes, up to a ceiling."""

    per_minute: float
    factor: float = 1.0
    every: int = 1
    max_per_minute: float = MAX_PER_MINUTE

    def rate(self, num_succeeded: int) -> float:
        """Devices per minute after that many successes."""
        ceiling = max(self.max_per_minute, self.per_minute)
        steps = num_succeeded // self.every
        if steps == 0 or self.factor == 1.0:
            return self.per_minute
        if steps * math.log(self.factor) >= math.log(ceiling / self.per_minute):
            return ceiling
        return float(self.per_minute * self.factor**steps)

    def burst(self, num_succeeded: int) -> float:
        """The credit that can be saved up."""
        return max(1.0, self.rate(num_succeeded) * BURST_S / 60)

    def earn(self, credit: float, elapsed_s: float, num_succeeded: int) -> float:
        """The credit after `elapsed_s` seconds; a clock that went back earns nothing."""
        earned = self.rate(num_succeeded) * max(elapsed_s, 0.0) / 60
        return min(credit + earned, self.burst(num_succeeded))
