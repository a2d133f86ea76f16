"""The control plane's tables: everything it must know after a power cut. Releases live in `model_registry.catalogue`.

Times are aware UTC. A row that several threads change carries `version`; whoever changes it states the one it read.
Secrets are stored as SHA-256 only. Nothing here talks to a database; that is `database`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Float, Index, Integer, LargeBinary, MetaData, String, Text
from sqlalchemy import types as sql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(sql.TypeDecorator[datetime]):
    """An aware UTC time, also on SQLite, which knows no zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive times; store UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone is ambiguous")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give UTC back."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Base of the control plane's tables."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {
        datetime: UtcDateTime(),
        dict[str, Any]: JSON(),
        list[Any]: JSON(),
        bytes: LargeBinary(),
    }


class Setting(Base):
    """Small durable facts of the control plane itself, such as its epoch."""

    __tablename__ = "settings"
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class Token(Base):
    """An API token: who it speaks for, and the digest of its secret."""

    __tablename__ = "tokens"
    token_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(200))
    role: Mapped[str] = mapped_column(String(16))
    secret_digest: Mapped[str] = mapped_column(String(64), unique=True)
    device_id: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Enrolment(Base):
    """A one-time permission for one device to get its certificate."""

    __tablename__ = "enrolments"
    enrolment_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    device_id: Mapped[str] = mapped_column(String(64))
    secret_digest: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]


class TrustRow(Base):
    """One document of a tenant's TUF repository, as it was signed. Every version of root, else the current one."""

    __tablename__ = "trust_metadata"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    role: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    is_pending: Mapped[bool] = mapped_column(primary_key=True)
    data: Mapped[bytes]


class Device(Base):
    """One device: what it is, what it shall run, what it says it runs."""

    __tablename__ = "devices"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    device_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    enrolled_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    certificate_serial: Mapped[str] = mapped_column(String(64))
    hardware: Mapped[dict[str, Any]]
    online: Mapped[bool] = mapped_column(default=False)
    boot_epoch: Mapped[int] = mapped_column(BigInteger, default=0)
    last_seen_at: Mapped[datetime | None]
    generation: Mapped[int] = mapped_column(BigInteger, default=0)
    desired_models: Mapped[list[Any]]  # of wire.messages.DesiredModel
    desired_envelope: Mapped[bytes | None]
    desired_expires_at: Mapped[datetime | None]
    attempts: Mapped[dict[str, Any]]  # release digest -> how often it was offered to this device
    labels: Mapped[dict[str, Any]] = mapped_column(default=dict)  # what people call it, for groups
    reported: Mapped[dict[str, Any] | None]  # of wire.messages.Reported
    version: Mapped[int] = mapped_column(Integer, default=0)
    __mapper_args__ = {"version_id_col": version}


class DeviceFact(Base):
    """One thing that filters can ask of a device: what it reported, or a label. `number` where it can be compared."""

    __tablename__ = "device_facts"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    device_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(80), primary_key=True)
    value: Mapped[str] = mapped_column(String(200), primary_key=True)
    number: Mapped[float | None] = mapped_column(Float)
    __table_args__ = (Index("ix_device_facts_value", "tenant", "name", "value"),)


class DeviceCertificate(Base):
    """A certificate that was issued to a device."""

    __tablename__ = "device_certificates"
    serial: Mapped[str] = mapped_column(String(64), primary_key=True)  # lower-case hex
    tenant: Mapped[str] = mapped_column(String(64))
    device_id: Mapped[str] = mapped_column(String(64))
    issued_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    __table_args__ = (Index("ix_device_certificates_device", "tenant", "device_id"),)


class Group(Base):
    """A named set of devices: a list, or a filter over what devices report."""

    __tablename__ = "groups"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    device_ids: Mapped[list[Any] | None]
    filter: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime]


class RolloutRow(Base):
    """A rollout: its order, and the engine's state as data."""

    __tablename__ = "rollouts"
    rollout_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(64))
    model_version: Mapped[str] = mapped_column(String(64))
    release: Mapped[str] = mapped_column(String(64))
    group: Mapped[str] = mapped_column("group_name", String(64))
    status: Mapped[str] = mapped_column(String(20), index=True)
    order: Mapped[dict[str, Any]] = mapped_column("order_document")
    state: Mapped[dict[str, Any]]
    offers: Mapped[dict[str, Any]]  # device -> the DesiredModel offered, and the one before it
    joins: Mapped[bool] = mapped_column(default=False)
    reason: Mapped[str] = mapped_column(Text, default="")
    decision_id: Mapped[str | None] = mapped_column(String(64))
    created_by: Mapped[str] = mapped_column(String(200))
    created_with: Mapped[str] = mapped_column(String(40), default="")  # the id of the token
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    version: Mapped[int] = mapped_column(Integer, default=0)
    __mapper_args__ = {"version_id_col": version}


class Publication(Base):
    """A model on its way to a signed release."""

    __tablename__ = "publications"
    publication_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(64))
    model_version: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(20), index=True)
    order: Mapped[dict[str, Any]] = mapped_column("order_document")
    release: Mapped[bytes | None]  # canonical bytes to sign
    release_digest: Mapped[str | None] = mapped_column(String(64))
    reason: Mapped[str] = mapped_column(Text, default="")
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    version: Mapped[int] = mapped_column(Integer, default=0)
    __mapper_args__ = {"version_id_col": version}


class Job(Base):
    """One compile job and its lease."""

    __tablename__ = "jobs"
    job_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    publication_id: Mapped[str] = mapped_column(String(40), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    target: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16), index=True)
    spec: Mapped[dict[str, Any]]
    cache_key: Mapped[str] = mapped_column(String(64))
    stage: Mapped[str] = mapped_column(String(64), default="")
    progress: Mapped[float] = mapped_column(Float, default=0.0)
    message: Mapped[str] = mapped_column(Text, default="")
    log: Mapped[str] = mapped_column(Text, default="")
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    lease_id: Mapped[str | None] = mapped_column(String(40))
    worker_id: Mapped[str | None] = mapped_column(String(200))
    lease_expires_at: Mapped[datetime | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    cached: Mapped[bool] = mapped_column(default=False)
    manifest: Mapped[str | None] = mapped_column(String(64))
    stages: Mapped[list[Any] | None]
    gates: Mapped[list[Any] | None]
    code: Mapped[str | None] = mapped_column(String(64))
    reason: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    version: Mapped[int] = mapped_column(Integer, default=0)
    __mapper_args__ = {"version_id_col": version}


class Build(Base):
    """The build cache: what was decided about a build -> the manifest it gave."""

    __tablename__ = "builds"
    cache_key: Mapped[str] = mapped_column(String(64), primary_key=True)
    manifest: Mapped[str] = mapped_column(String(64))
    built_at: Mapped[datetime]


class EngineBuildRow(Base):
    """The engine of one artefact for one hardware key, from being wanted to being shared; there is one row for each."""

    __tablename__ = "engine_builds"
    build_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(64))
    manifest: Mapped[str] = mapped_column(String(64))
    hardware_key: Mapped[str] = mapped_column(String(120))
    state: Mapped[str] = mapped_column(String(20), index=True)
    lease_id: Mapped[str | None] = mapped_column(String(40))
    holder: Mapped[str | None] = mapped_column(String(200))  # who has the lease, to build or to prove
    lease_expires_at: Mapped[datetime | None]
    begun_at: Mapped[datetime | None]  # of the attempt under way
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    built_by: Mapped[str | None] = mapped_column(String(200))
    document: Mapped[bytes | None]  # canonical bytes of `manifest.EngineBuild`, to sign
    document_digest: Mapped[str | None] = mapped_column(String(64))
    reason: Mapped[str] = mapped_column(Text, default="")
    history: Mapped[list[Any]]  # of attempts that came to nothing: who, code, reason, at
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    version: Mapped[int] = mapped_column(Integer, default=0)
    __mapper_args__ = {"version_id_col": version}
    __table_args__ = (Index("uq_engine_builds_key", "tenant", "manifest", "hardware_key", unique=True),)


class DecisionRow(Base):
    """One explained choice, from a gateway, a device or the control plane itself."""

    __tablename__ = "decisions"
    decision_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))
    subject: Mapped[str] = mapped_column(String(200), default="")
    source: Mapped[str] = mapped_column(String(200))
    decided_at: Mapped[datetime]
    stored_at: Mapped[datetime]
    record: Mapped[dict[str, Any]]
    __table_args__ = (
        Index("ix_decisions_newest", "tenant", "stored_at"),
        Index("ix_decisions_subject", "tenant", "subject"),
    )


class DeviceEvent(Base):
    """A piece of a device's telemetry; its id makes a repeated delivery harmless."""

    __tablename__ = "device_events"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    device_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    event_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    at: Mapped[datetime]
    stored_at: Mapped[datetime] = mapped_column(index=True)
    body: Mapped[dict[str, Any]]


class AuditEntry(Base):
    """Who changed what in a tenant: append-only, each entry sealed by the digest of itself and the one before."""

    __tablename__ = "audit"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    at: Mapped[str] = mapped_column(String(40))  # ISO 8601, as sealed
    actor: Mapped[str] = mapped_column(String(200))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(200))
    details: Mapped[dict[str, Any]]
    previous: Mapped[str] = mapped_column(String(64))
    digest: Mapped[str] = mapped_column(String(64))


class Webhook(Base):
    """An address that is told of changes. The secret signs what it is sent, so it is kept as it is."""

    __tablename__ = "webhooks"
    webhook_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), index=True)
    url: Mapped[str] = mapped_column(String(2000))
    actions: Mapped[list[Any]]  # patterns over audit actions
    secret: Mapped[str] = mapped_column(String(100))
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime]


class WebhookDelivery(Base):
    """One change on its way to one address, until it is taken or given up."""

    __tablename__ = "webhook_deliveries"
    delivery_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    webhook_id: Mapped[str] = mapped_column(String(40))
    tenant: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    body: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16), default="pending")  # pending, delivered, given_up
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    due_at: Mapped[datetime]
    answer: Mapped[str] = mapped_column(String(300), default="")
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    __table_args__ = (
        Index("ix_webhook_deliveries_due", "webhook_id", "state", "created_at"),
        Index("ix_webhook_deliveries_newest", "webhook_id", "created_at"),
    )
