"""A database of the first version keeps its audit chain, and both ways end in the tables that the code declares."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import text

from cloud.control import audit
from cloud.control.audit_chain import GENESIS, seal
from cloud.control.database import MIGRATIONS, Database, open_engine, upgrade
from cloud.control.events import EventBus
from cloud.control.tables import Base


def migrate(url: str, revision: str) -> None:
    engine, config = open_engine(url), Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def test_an_audit_chain_of_the_first_version_is_still_whole_and_goes_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'c.db'}"
    migrate(url, "0001")
    entry = {"sequence": 1, "at": "2026-11-01T00:00:00+00:00", "tenant": "home", "actor": "anna",
             "action": "group.put", "subject": "docks", "details": {}, "previous": GENESIS}  # fmt: skip
    database = Database(url, EventBus())
    with database.write() as session:
        names = ", ".join(entry)
        session.execute(
            text(f"INSERT INTO audit ({names}, digest) VALUES ({', '.join(':' + name for name in entry)}, :digest)"),
            {**entry, "details": "{}", "digest": seal(entry)},
        )
    database.upgrade()
    with database.write() as session:
        audit.record(session, tenant="home", actor="bert", action="group.put", subject="tills")
    with database.read() as session:
        assert audit.verify(session, "home").num_entries == 2
        assert audit.verify(session, "home").fault is None
    database.dispose()


def test_the_migrations_end_in_the_tables_that_the_code_declares(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'c.db'}")
    upgrade(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": "control_version"})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()
