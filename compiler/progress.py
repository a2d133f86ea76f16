"""How far a job is and how long it still takes, learned from what its stages took before.

`StageTimes` remembers seconds per stage and size beside the cache; a stage never seen takes a first guess. `Progress`
turns a plan of stages into (stage, share of the whole, message) with the time left, and repeats it while a stage runs.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from wire.process import replace_durably

Report = Callable[[str, float, str], None]

TICK_S = 1.0
_LEARNING = 0.5  # weight of the newest time
_GROWTH = 0.8  # time grows a little slower than size
_FIRST_GUESS_S: Mapping[str, float] = {
    "import": 10.0, "fingerprint": 1.0, "clean": 2.0, "inputs": 2.0, "answers": 4.0, "calibrate": 8.0, "quantise": 2.0,
    "cast": 2.0, "measure": 4.0, "golden": 3.0, "engine": 3.0, "genai": 40.0, "source-logits": 15.0, "package": 1.0,
}  # fmt: skip


class StageTimes:
    """Seconds by stage, kept in one small file; a lost update costs nothing but a guess."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._seen: dict[str, dict[str, float]] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            self._seen = {}

    def expected_s(self, stage: str, size_bytes: int) -> float:
        """What `stage` is expected to take for a model of `size_bytes`."""
        seen = self._seen.get(stage)
        if seen is None:
            return _FIRST_GUESS_S.get(stage, 2.0)
        return seen["seconds"] * (max(1, size_bytes) / max(1.0, seen["size_bytes"])) ** _GROWTH

    def learn(self, stage: str, size_bytes: int, seconds: float) -> None:
        """Remember that `stage` took `seconds`."""
        if stage in self._seen:
            seconds = _LEARNING * seconds + (1 - _LEARNING) * self.expected_s(stage, size_bytes)
        self._seen[stage] = {"seconds": round(seconds, 3), "size_bytes": size_bytes}
        replace_durably(self._path, json.dumps(self._seen, sort_keys=True).encode())


class Progress:
    """Progress of one job through `plan`, a list of stage names in order."""

    def __init__(
        self,
        plan: Sequence[str],
        times: StageTimes,
        size_bytes: int,
        report: Report,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open = list(plan)
        self._times, self._size_bytes, self._report, self._clock = times, size_bytes, report, clock
        self._spent_s = 0.0
        self._share = 0.0

    def remaining_s(self, running: str | None = None, for_s: float = 0.0) -> float:
        """Expected seconds to the end of the job, while `running` has run `for_s`."""
        left = sum(self._times.expected_s(stage, self._size_bytes) for stage in self._open)
        if running is not None:
            left += max(0.0, self._times.expected_s(running, self._size_bytes) - for_s)
        return left

    def say(self, stage: str, message: str, for_s: float = 0.0) -> None:
        """Report where the job is; the share never falls."""
        left = self.remaining_s(stage if for_s else None, for_s)
        spent = self._spent_s + for_s
        self._share = max(self._share, min(0.99, spent / max(1e-9, spent + left)))
        tail = f" (about {left:.0f} s left)" if left >= 1 else ""
        self._report(stage, self._share, message + tail)

    @contextmanager
    def running(self, stage: str, message: str) -> Iterator[None]:
        """While `stage` runs: say so at once and every second; learn what it took when it ends well."""
        self._take(stage)
        started = self._clock()
        done = threading.Event()

        def tick() -> None:
            while not done.wait(TICK_S):
                self.say(stage, message, self._clock() - started)

        self.say(stage, message, 1e-6)
        ticker = threading.Thread(target=tick, name=f"progress-{stage}", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            done.set()
            ticker.join()
        took_s = self._clock() - started
        self._spent_s += took_s
        self._times.learn(stage, self._size_bytes, took_s)

    def skip(self, stage: str) -> None:
        """`stage` was built before, or is not needed."""
        self._take(stage)

    def finish(self, message: str) -> None:
        """The whole is done."""
        self._open = []
        self._report("package", 1.0, message)

    def _take(self, stage: str) -> None:
        if stage in self._open:
            self._open.remove(stage)
