"""The audit chain: in the database, as a file, and what an edit of either does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from cloud.control import audit
from cloud.control.audit_chain import check_export
from cloud.control.database import Database
from cloud.control.events import EventBus

NUM_ENTRIES = 12


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'c.db'}", EventBus())
    database.upgrade()
    with database.write() as session:
        for number in range(NUM_ENTRIES):
            audit.record(
                session, tenant="home", actor="anna", action="group.put", subject=f"group-{number}",
                details={"filter": f"profile = “jetson”{number}*", "share": 0.5},
            )  # fmt: skip
            audit.record(session, tenant="other", actor="bert", action="token.create", subject="t")
    yield database
    database.dispose()


def exported(database: Database, tenant: str = "home") -> bytes:
    with database.read() as session:
        return b"".join(audit.export(session, tenant))


def lines(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True) if b"\r" not in data and b"\x0b" not in data else data.split(b"\n")


def test_each_tenant_has_a_chain_of_its_own(database: Database) -> None:
    for tenant in ("home", "other", "nobody"):
        with database.read() as session:
            found = audit.verify(session, tenant)
        assert found.fault is None
        assert found.num_entries == (0 if tenant == "nobody" else NUM_ENTRIES)
        assert check_export(iter(lines(exported(database, tenant)))) == found


def test_every_single_byte_edit_of_an_exported_file_is_found(database: Database) -> None:
    data = exported(database)
    rng = random.Random(7)
    for at in range(len(data)):
        other = rng.choice([byte for byte in range(256) if byte != data[at]])
        changed = data[:at] + bytes([other]) + data[at + 1 :]
        assert check_export(lines(changed)).fault, (at, other)
        assert check_export(lines(data[:at] + data[at + 1 :])).fault, f"byte {at} removed"
        assert check_export(lines(data[:at] + b" " + data[at:])).fault, f"byte {at} inserted"


def test_dropped_and_swapped_lines_are_found(database: Database) -> None:
    good = lines(exported(database))
    assert check_export([good[0], *good[2:]]).fault == "entry 1 is missing"
    assert check_export(good[:-1]).fault
    assert check_export([good[0], good[2], good[1], *good[3:]]).fault
    assert check_export([]).fault
    assert check_export(good[1:]).fault


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE audit SET actor = 'eve' WHERE sequence = 5 AND tenant = 'home'",
        "UPDATE audit SET details = '{}' WHERE sequence = 5 AND tenant = 'home'",
        "DELETE FROM audit WHERE sequence = 5 AND tenant = 'home'",
        "UPDATE audit SET tenant = 'home2' WHERE sequence = 5 AND tenant = 'home'",
    ],
)
def test_an_edit_in_the_database_is_found_where_it_is(database: Database, edit: str) -> None:
    with database.write() as session:
        session.execute(text(edit))
    with database.read() as session:
        found = audit.verify(session, "home")
    assert found.num_entries == 4
    assert "entry 5" in str(found.fault)
