"""Telemetry stays within its quota, loses the least important first and never stands in the way."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from edge_agent.outbox import MAX_UNWRITTEN, Outbox

QUOTA_BYTES = 64 * 1024


def _kinds(outbox: Outbox) -> list[str]:
    return [json.loads(payload)["kind"] for _, payload in outbox.oldest(10_000)]


def test_over_the_quota_the_oldest_of_the_lowest_priority_goes_first(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", QUOTA_BYTES)
    outbox.add("alarm", {"number": -1})
    for number in range(400):
        outbox.add("metric", {"number": number, "text": "x" * 200})
        assert outbox.size_bytes <= QUOTA_BYTES
    numbers = [json.loads(payload)["body"]["number"] for _, payload in outbox.oldest(10_000)]
    assert numbers[0] == -1
    assert numbers[1:] == list(range(numbers[1], 400))
    assert numbers[1] > 0
    assert outbox.num_dropped == numbers[1]


def test_what_matters_less_than_all_that_waits_is_dropped_itself(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", QUOTA_BYTES)
    for _ in range(100):
        outbox.add("alarm", {"text": "x" * 2000})
    waiting, dropped = len(_kinds(outbox)), outbox.num_dropped
    assert dropped == 100 - waiting > 0
    outbox.add("metric", {"text": "x" * 2000})
    assert _kinds(outbox) == ["alarm"] * waiting
    assert outbox.num_dropped == dropped + 1


def test_a_disk_that_stalls_holds_no_caller_up_and_the_backlog_has_a_bound(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", 64 * QUOTA_BYTES)
    stalled = sqlite3.connect(tmp_path / "outbox.db", isolation_level=None)
    stalled.execute("BEGIN IMMEDIATE")  # the writer can't go on until this ends
    added = [outbox.add("decision", {"number": number}) for number in range(MAX_UNWRITTEN + 50)]
    assert [event is None for event in added[-40:]] == [True] * 40
    stalled.execute("ROLLBACK")
    kept = [name for name, _ in outbox.oldest(MAX_UNWRITTEN + 50)]
    assert kept == [event for event in added if event is not None]
    assert outbox.num_dropped == len(added) - len(kept)


def test_events_survive_a_restart_and_go_when_confirmed(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", QUOTA_BYTES)
    first, second = outbox.add("update", {"a": 1}), outbox.add("decision", {"b": 2})
    outbox.close()
    outbox = Outbox(tmp_path / "outbox.db", QUOTA_BYTES)
    assert [name for name, _ in outbox.oldest()] == [first, second]
    outbox.confirm([str(first), "unknown"])
    assert [name for name, _ in outbox.oldest()] == [second]
    outbox.confirm([str(second)])
    assert outbox.size_bytes == 0


def test_requests_that_end_after_it_was_closed_are_counted_and_do_no_harm(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", QUOTA_BYTES)
    kept = outbox.add("decision", {"number": 1})
    outbox.close()
    assert outbox.add("decision", {"number": 2}) is None
    assert outbox.num_dropped == 1
    assert outbox.oldest() == []
    outbox.confirm([str(kept)])
    outbox.close()
    assert [name for name, _ in Outbox(tmp_path / "outbox.db", QUOTA_BYTES).oldest()] == [kept]


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    path.write_bytes(b"no database at all" * 1000)
    outbox = Outbox(path, QUOTA_BYTES)
    assert outbox.add("alarm", {}) is not None
    assert (tmp_path / "outbox.db.damaged").exists()


def test_without_a_disk_events_wait_in_memory(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "missing" / "outbox.db", QUOTA_BYTES)
    assert outbox.add("alarm", {}) is not None
    assert _kinds(outbox) == ["alarm"]
