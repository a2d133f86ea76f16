"""The journal keeps the last whole record through any torn write."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.journal import MAX_RECORDS, Journal


def test_the_last_record_survives_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "m.journal")
    for number in range(5):
        journal.append({"number": number})
    assert Journal(tmp_path / "m.journal").last == {"number": 4}


@pytest.mark.parametrize("kept", range(1, 30))
def test_a_torn_record_leaves_the_one_before(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "m.journal"
    journal = Journal(path)
    journal.append({"number": 1})
    whole = path.stat().st_size
    journal.append({"number": 2, "text": "x" * 40})
    with path.open("r+b") as file:
        file.truncate(whole + kept)
    reopened = Journal(path)
    assert reopened.last == {"number": 1}
    reopened.append({"number": 3})
    assert Journal(path).last == {"number": 3}


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "m.journal"
    journal = Journal(path)
    journal.append({"number": 1})
    journal.append({"number": 2})
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    assert Journal(path).last == {"number": 1}


def test_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "m.journal")
    for number in range(MAX_RECORDS * 2 + 3):
        journal.append({"number": number})
    assert Journal(tmp_path / "m.journal").num_records <= MAX_RECORDS
    assert Journal(tmp_path / "m.journal").last == {"number": MAX_RECORDS * 2 + 2}


def test_zeros_that_a_power_cut_left_are_no_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append({"n": 1})
    with (tmp_path / "j").open("ab") as file:
        file.write(bytes(64))
    again = Journal(tmp_path / "j")
    assert (again.num_records, again.last) == (1, {"n": 1})
    again.append({"n": 2})
    assert Journal(tmp_path / "j").last == {"n": 2}
