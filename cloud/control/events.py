"""What happened just now, for whoever is looking: a bounded ring in memory, read by server-sent-event streams.

An event is announced only after the transaction that caused it is committed (see `database`). The ring forgets; the
database does not: a reader whose last event is gone, or from before a restart, gets `reset` and reads the page anew.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

RING_SIZE = 2000


@dataclass(frozen=True)
class Happening:
    """One event. `tenant` says who may see it; `data` is plain JSON data."""

    kind: str
    tenant: str
    data: dict[str, Any] = field(default_factory=dict)
    event_id: int = 0

    def to_json(self) -> str:
        """The data as one line."""
        return json.dumps(self.data, separators=(",", ":"), default=str)


class EventBus:
    """Keeps the last events and wakes those who wait. Safe for threads."""

    def __init__(self, ring_size: int = RING_SIZE) -> None:
        self._ring: deque[Happening] = deque(maxlen=ring_size)
        self._lock = threading.Lock()
        self._listeners: set[Callable[[], None]] = set()
        self._first_id = time.time_ns() // 1000  # ids of one run never meet those of another
        self._last_id = self._first_id

    def publish(self, happening: Happening) -> None:
        """Number the event, keep it, wake the listeners."""
        with self._lock:
            self._last_id += 1
            self._ring.append(Happening(happening.kind, happening.tenant, happening.data, self._last_id))
            listeners = list(self._listeners)
        for wake in listeners:
            wake()

    def since(self, event_id: int | None) -> tuple[list[Happening], int, bool]:
        """Events after `event_id` (None: only those to come), the newest id, and whether some are lost for ever."""
        with self._lock:
            if event_id is None:
                return [], self._last_id, False
            oldest = self._ring[0].event_id if self._ring else self._last_id + 1
            is_lost = event_id < oldest - 1 or event_id > self._last_id
            return [one for one in self._ring if one.event_id > event_id], self._last_id, is_lost

    def listen(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Call `wake` (quick, from any thread) at each event, until the returned function is called."""
        with self._lock:
            self._listeners.add(wake)

        def stop() -> None:
            with self._lock:
                self._listeners.discard(wake)

        return stop
