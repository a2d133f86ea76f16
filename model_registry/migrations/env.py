"""Runs the registry's migrations inside the transaction that `catalogue.upgrade` hands in."""

from __future__ import annotations

from alembic import context

from model_registry.catalogue import VERSION_TABLE
from model_registry.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
