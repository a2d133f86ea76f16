"""The database: connections, transactions and migrations, on SQLite (WAL) or PostgreSQL.

`write()` is the only way to change something: one writer at a time in this process, and on SQLite `BEGIN IMMEDIATE`, so
that nobody reads, thinks and then finds the file locked. What a transaction wants to tell (`announce`) or do
(`after_commit`) happens after its commit, or not at all. A row changed by others meanwhile is a `ConflictError`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import IntegrityError as SqlIntegrityError
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.orm.exc import StaleDataError

from cloud.control.events import EventBus, Happening
from wire.errors import ConflictError, UnavailableError

BUSY_TIMEOUT_S = 10
MIGRATIONS = Path(__file__).with_name("migrations")


class Database:
    """The tables, behind short transactions."""

    def __init__(self, url: str, bus: EventBus) -> None:
        self.engine = open_engine(url)
        self.bus = bus
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        self._writer = threading.RLock()

    def upgrade(self) -> None:
        """Bring the tables to this build's version."""
        upgrade(self.engine)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session to look with; whatever it changes is thrown away."""
        with self._sessions() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction: committed at the end, rolled back by an exception, announced after its commit."""
        with self._writer:
            with self._sessions() as session:
                if self.engine.dialect.name == "sqlite":
                    session.connection().exec_driver_sql("BEGIN IMMEDIATE")
                try:
                    yield session
                    session.commit()
                except StaleDataError as error:
                    raise ConflictError(
                        "somebody else changed this meanwhile", remedy="look again, then retry"
                    ) from error
                except SqlIntegrityError as error:
                    raise ConflictError("this exists already", remedy="choose another name") from error
                except OperationalError as error:
                    raise UnavailableError("the database is busy or away", remedy="try again") from error
            followers = session.info.get("after_commit", [])
            for happening in session.info.get("announced", []):
                self.bus.publish(happening)
        for follow in followers:
            follow()

    def dispose(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def announce(session: Session, kind: str, tenant: str, data: dict[str, Any]) -> None:
    """Tell the event streams, once this transaction is committed."""
    session.info.setdefault("announced", []).append(Happening(kind, tenant, data))


def after_commit(session: Session, follow: Callable[[], object]) -> None:
    """Call `follow` once this transaction is committed and the writer's lock is free."""
    session.info.setdefault("after_commit", []).append(follow)


def open_engine(url: str) -> Engine:
    """An engine for `url`, with the settings that SQLite needs for one writer and many readers."""
    engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA case_sensitive_like=ON")  # as PostgreSQL does
    cursor.close()


def upgrade(engine: Engine) -> None:
    """Run the migrations that this database has not seen."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
