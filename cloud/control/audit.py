"""Who changed what, append-only: every change by a person or a machine leaves one entry in the same transaction.

Each tenant has its own chain (see `audit_chain`): an entry carries the digest of itself and the one before, so that an
edited, dropped or reordered past shows. What it cannot show is a chain that was rewritten to its very end; note the
newest digest elsewhere if that matters, or let a webhook take the entries. The entry is also what webhooks are told, so
it queues itself for them here, in the same transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud.control import webhook_queue
from cloud.control.audit_chain import GENESIS, Verdict, check_entries, export_lines, seal
from cloud.control.tables import AuditEntry


def record(
    session: Session, *, tenant: str, actor: str, action: str, subject: str, details: dict[str, Any] | None = None
) -> AuditEntry:
    """Append one entry to the tenant's chain, and queue it for the webhooks that want it."""
    last = _last(session, tenant)
    entry = AuditEntry(
        sequence=last.sequence + 1 if last else 1,
        at=datetime.now(UTC).isoformat(),
        tenant=tenant,
        actor=actor,
        action=action,
        subject=subject,
        details=details or {},
        previous=last.digest if last else GENESIS,
    )
    entry.digest = seal(to_dict(entry))
    session.add(entry)
    session.flush()
    webhook_queue.add(session, tenant, action, to_dict(entry))
    return entry


def newest(session: Session, tenant: str, *, action: str | None, limit: int, offset: int) -> list[dict[str, Any]]:
    """Entries, newest first; `action` may be the beginning of one."""
    query = select(AuditEntry).where(AuditEntry.tenant == tenant)
    query = query.where(AuditEntry.action.startswith(action, autoescape=True)) if action else query
    query = query.order_by(AuditEntry.sequence.desc()).limit(limit).offset(offset)
    return [to_dict(entry) for entry in session.scalars(query)]


def verify(session: Session, tenant: str) -> Verdict:
    """Check a tenant's chain."""
    return check_entries(_entries(session, tenant, None))


def export(session: Session, tenant: str) -> Iterator[bytes]:
    """A tenant's chain as the lines of a file; entries that come meanwhile are not in it."""
    last = _last(session, tenant)
    number, head = (last.sequence, last.digest) if last else (0, GENESIS)
    yield from export_lines(tenant, number, head, _entries(session, tenant, number))


def to_dict(entry: AuditEntry) -> dict[str, Any]:
    """The entry as it is sealed, shown, exported and sent."""
    return {
        "sequence": entry.sequence,
        "at": entry.at,
        "tenant": entry.tenant,
        "actor": entry.actor,
        "action": entry.action,
        "subject": entry.subject,
        "details": entry.details,
        "previous": entry.previous,
        "digest": entry.digest,
    }


def _last(session: Session, tenant: str) -> AuditEntry | None:
    query = select(AuditEntry).where(AuditEntry.tenant == tenant).order_by(AuditEntry.sequence.desc())
    return session.scalars(query.limit(1)).first()


def _entries(session: Session, tenant: str, until: int | None) -> Iterator[dict[str, Any]]:
    query = select(AuditEntry).where(AuditEntry.tenant == tenant).order_by(AuditEntry.sequence)
    query = query if until is None else query.where(AuditEntry.sequence <= until)
    for entry in session.scalars(query.execution_options(yield_per=500)):
        yield to_dict(entry)
