"""The catalogue's tables: models and releases of tenants, artefacts, deltas, sources, and which blobs they need.

One schema for SQLite and PostgreSQL; `migrations/` changes it, a test keeps both equal. The queries are in `catalogue`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    LargeBinary,
    MetaData,
    String,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

NAMING = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python on every database; a naive time is a mistake and is refused."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To the database."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """From the database; SQLite forgets the zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """The registry's own metadata; other packages have theirs."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {datetime: UtcDateTime, int: BigInteger, dict[str, Any]: JSON, list[Any]: JSON}


class ModelRow(Base):
    """One name of a tenant; its releases share it."""

    __tablename__ = "registry_model"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime]


class ReleaseRow(Base):
    """One release that a publisher lists; its canonical bytes are kept, the columns are copies for queries."""

    __tablename__ = "registry_release"
    __table_args__ = (
        ForeignKeyConstraint(["tenant", "name"], ["registry_model.tenant", "registry_model.name"]),
        UniqueConstraint("tenant", "name", "version", name="uq_registry_release_version"),
        UniqueConstraint("tenant", "name", "sequence", name="uq_registry_release_sequence"),
    )

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(64))
    version: Mapped[str] = mapped_column(String(64))
    sequence: Mapped[int]
    kind: Mapped[str] = mapped_column(String(16))
    licence: Mapped[str] = mapped_column(String(200))
    source_format: Mapped[str] = mapped_column(String(32))
    source_digest: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    document: Mapped[bytes] = mapped_column(LargeBinary)
    artefacts: Mapped[list[ArtefactRow]] = relationship(
        back_populates="release", order_by="ArtefactRow.place", cascade="all, delete-orphan", lazy="selectin"
    )


class ArtefactRow(Base):
    """One target of a release."""

    __tablename__ = "registry_artefact"

    release_digest: Mapped[str] = mapped_column(
        String(64), ForeignKey("registry_release.digest", ondelete="CASCADE"), primary_key=True
    )
    target: Mapped[str] = mapped_column(String(64), primary_key=True)
    place: Mapped[int]
    manifest: Mapped[str] = mapped_column(String(64), index=True)
    manifest_bytes: Mapped[int]
    size_bytes: Mapped[int]
    runtime: Mapped[str] = mapped_column(String(32))
    precision: Mapped[str] = mapped_column(String(64))
    deltas: Mapped[list[Any]]  # DeltaEncoding documents
    release: Mapped[ReleaseRow] = relationship(back_populates="artefacts")


class SourceRow(Base):
    """What a tenant uploaded to be compiled: the files of one source model."""

    __tablename__ = "registry_source"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    format: Mapped[str] = mapped_column(String(32))
    files: Mapped[list[Any]]  # {path, digest, size_bytes}
    created_at: Mapped[datetime]


class BlobReferenceRow(Base):
    """`owner` (a manifest, a source, an index of delta frames) needs `blob`; a blob without an owner may go."""

    __tablename__ = "registry_blob_reference"

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    blob: Mapped[str] = mapped_column(String(64), primary_key=True, index=True)
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
