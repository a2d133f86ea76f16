"""Alembic's environment for the control plane's tables; the version lives in `control_version`."""

from __future__ import annotations

from alembic import context

from cloud.control.tables import Base


def run() -> None:
    """Migrate over the connection that `database.upgrade` hands in."""
    connection = context.config.attributes["connection"]
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        version_table="control_version",
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


run()
