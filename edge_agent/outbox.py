"""Durable telemetry in SQLite: what the control plane has not confirmed yet, within a quota.

Over the quota the oldest event of the lowest priority goes first. Delivery is at least once; `event_id` makes it once
in effect. Events are deleted when the control plane names them as stored.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from wire.messages import MAX_MESSAGE_BYTES, Event

Kind = Literal["decision", "inference", "update", "alarm", "metric"]
PRIORITY_BY_KIND: dict[str, int] = {"alarm": 4, "update": 3, "decision": 2, "inference": 1, "metric": 0}


class Outbox:
    """One database file; may be used from any thread."""

    def __init__(self, path: Path, quota_bytes: int) -> None:
        self._quota_bytes = quota_bytes
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, timeout=10, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, event_id TEXT UNIQUE, priority INTEGER,"
            " size_bytes INTEGER, payload BLOB)"
        )
        self.num_dropped = 0

    def add(self, kind: Kind, body: dict[str, Any]) -> str | None:
        """Keep an event; returns its id, or None when it is too large to be sent at all."""
        event = Event(event_id=uuid.uuid4().hex, kind=kind, at=datetime.now(UTC), body=json.loads(json.dumps(body)))
        payload = event.to_bytes()
        if len(payload) > MAX_MESSAGE_BYTES:
            self.num_dropped += 1
            return None
        with self._lock:
            self._db.execute(
                "INSERT INTO events (event_id, priority, size_bytes, payload) VALUES (?, ?, ?, ?)",
                (event.event_id, PRIORITY_BY_KIND[kind], len(payload), payload),
            )
            self._shrink()
        return event.event_id

    def oldest(self, limit: int = 50) -> list[tuple[str, bytes]]:
        """Ids and payloads, in the order they happened."""
        with self._lock:
            rows = self._db.execute("SELECT event_id, payload FROM events ORDER BY number LIMIT ?", (limit,))
            return [(str(name), bytes(payload)) for name, payload in rows]

    def confirm(self, event_ids: Sequence[str]) -> None:
        """Forget events that are stored elsewhere; unknown ids do no harm."""
        with self._lock:
            self._db.executemany("DELETE FROM events WHERE event_id = ?", [(name,) for name in event_ids])

    @property
    def size_bytes(self) -> int:
        """Bytes of all payloads."""
        with self._lock:
            return int(self._db.execute("SELECT COALESCE(SUM(size_bytes), 0) FROM events").fetchone()[0])

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def _shrink(self) -> None:
        total = int(self._db.execute("SELECT COALESCE(SUM(size_bytes), 0) FROM events").fetchone()[0])
        while total > self._quota_bytes:
            row = self._db.execute("SELECT number, size_bytes FROM events ORDER BY priority, number LIMIT 1").fetchone()
            self._db.execute("DELETE FROM events WHERE number = ?", (row[0],))
            total -= row[1]
            self.num_dropped += 1
