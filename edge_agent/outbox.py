"""Durable telemetry in SQLite: what the control plane has not confirmed yet, within a quota.

Over the quota the oldest event of the lowest priority goes first. Delivery is at least once; `event_id` makes it once
in effect. Events are deleted when the control plane names them as stored.

Telemetry never stands in the way of serving: one thread of its own owns the database, so that no request waits for a
disk; what the disk does not take is counted as dropped, a file that is damaged is set aside, and without any disk the
events wait in memory. Requests that end after the outbox was closed are counted as dropped too.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from wire.messages import MAX_MESSAGE_BYTES, Event

P = ParamSpec("P")
T = TypeVar("T")
Kind = Literal["decision", "inference", "update", "alarm", "metric"]
PRIORITY_BY_KIND: dict[str, int] = {"alarm": 4, "update": 3, "decision": 2, "inference": 1, "metric": 0}
MAX_UNWRITTEN = 1000  # events on their way to a disk that stalls


class Outbox:
    """One database file; may be used from any thread. Calls take effect in the order they were made."""

    def __init__(self, path: Path, quota_bytes: int) -> None:
        self._quota_bytes = quota_bytes
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._lock = threading.Lock()
        self._num_unwritten = 0
        self._is_closed = False
        self.num_dropped = 0
        self._db = _open(path)
        self._size_bytes = int(self._db.execute("SELECT COALESCE(SUM(size_bytes), 0) FROM events").fetchone()[0])

    def add(self, kind: Kind, body: dict[str, Any]) -> str | None:
        """Keep an event, without waiting for the disk; returns its id, or None when it can't be sent or written."""
        event = Event(event_id=_new_id(), kind=kind, at=datetime.now(UTC), body=json.loads(json.dumps(body)))
        payload = event.to_bytes()
        with self._lock:
            is_too_large = len(payload) > min(MAX_MESSAGE_BYTES, self._quota_bytes)
            if is_too_large or self._is_closed or self._num_unwritten >= MAX_UNWRITTEN:
                self.num_dropped += 1
                return None
            self._num_unwritten += 1
            self._writer.submit(self._write, event.event_id, PRIORITY_BY_KIND[kind], payload)
        return event.event_id

    def oldest(self, limit: int = 50) -> list[tuple[str, bytes]]:
        """Ids and payloads, in the order they happened; waits for what was added before. None once it is closed."""
        reading = self._submit(self._read, limit)
        return reading.result() if reading else []

    def confirm(self, event_ids: Sequence[str]) -> None:
        """Forget events that are stored elsewhere; unknown ids do no harm, what stays is confirmed again later."""
        self._submit(self._forget, list(event_ids))

    @property
    def size_bytes(self) -> int:
        """Bytes of all payloads; waits for what was added before."""
        reading = self._submit(lambda: self._size_bytes)
        return reading.result() if reading else self._size_bytes

    def close(self) -> None:
        """Write what is on its way, then close the database; once is enough."""
        with self._lock:
            self._is_closed = True
        self._writer.shutdown()
        self._db.close()

    def _submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T] | None:
        with self._lock:
            return None if self._is_closed else self._writer.submit(work, *args, **kwargs)

    def _write(self, event_id: str, priority: int, payload: bytes) -> None:
        with self._lock:
            self._num_unwritten -= 1
        try:
            self._make_room(len(payload), priority)
            if self._size_bytes + len(payload) > self._quota_bytes:  # all that waits matters more
                self._drop()
                return
            self._db.execute(
                "INSERT INTO events (event_id, priority, size_bytes, payload) VALUES (?, ?, ?, ?)",
                (event_id, priority, len(payload), payload),
            )
            self._size_bytes += len(payload)
        except sqlite3.Error:
            self._drop()

    def _drop(self) -> None:
        with self._lock:
            self.num_dropped += 1

    def _read(self, limit: int) -> list[tuple[str, bytes]]:
        with contextlib.suppress(sqlite3.Error):  # the next tick reads again
            rows = self._db.execute("SELECT event_id, payload FROM events ORDER BY number LIMIT ?", (limit,))
            return [(str(name), bytes(payload)) for name, payload in rows]
        return []

    def _forget(self, event_ids: list[str]) -> None:
        with contextlib.suppress(sqlite3.Error):
            forgotten = self._db.execute(
                "DELETE FROM events WHERE event_id IN (SELECT value FROM json_each(?)) RETURNING size_bytes",
                (json.dumps(event_ids),),
            ).fetchall()
            self._size_bytes -= sum(row[0] for row in forgotten)

    def _make_room(self, size_bytes: int, priority: int) -> None:
        """Drop the oldest of the lowest priority, at most `priority`, until `size_bytes` fit."""
        while self._size_bytes + size_bytes > self._quota_bytes:
            row = self._db.execute(
                "SELECT number, size_bytes FROM events WHERE priority <= ? ORDER BY priority, number LIMIT 1",
                (priority,),
            ).fetchone()
            if row is None:
                return
            self._db.execute("DELETE FROM events WHERE number = ?", (row[0],))
            self._size_bytes -= row[1]
            self._drop()


def _new_id() -> str:
    """Unique, and later ones sort later: the index grows at its end instead of all over the disk."""
    return f"{time.time_ns():016x}{secrets.token_hex(8)}"


def _open(path: Path) -> sqlite3.Connection:
    """The database; a damaged one is set aside as `.damaged`, and memory is used where the disk takes nothing."""
    try:
        return _connect(str(path))
    except sqlite3.OperationalError:  # full, read-only
        return _connect(":memory:")
    except sqlite3.DatabaseError:
        with contextlib.suppress(OSError):
            for suffix in ("", "-wal", "-shm"):
                part = path.with_name(path.name + suffix)
                if part.exists():
                    part.replace(path.with_name(f"{path.name}.damaged{suffix}"))
            return _connect(str(path))
        return _connect(":memory:")


def _connect(name: str) -> sqlite3.Connection:
    db = sqlite3.connect(name, check_same_thread=False, timeout=10, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute(
            "CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, event_id TEXT UNIQUE, priority INTEGER,"
            " size_bytes INTEGER, payload BLOB)"
        )
        db.execute("CREATE INDEX IF NOT EXISTS events_by_priority ON events (priority, number)")
        db.execute("SELECT COALESCE(SUM(size_bytes), 0) FROM events").fetchone()
    except sqlite3.Error:
        db.close()
        raise
    return db
