"""Who changed what, append-only: every change by a person or a machine leaves one entry in the same transaction.

Each entry carries the digest of itself and the one before, so that an edited, dropped or reordered past shows:
`verify` finds the first entry that does not fit. What it cannot show is a chain that was rewritten to its very end;
note the newest digest elsewhere if that matters.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud.control.tables import AuditEntry
from model_registry.manifest import canonical_bytes, sha256

GENESIS = "0" * 64


def record(
    session: Session, *, tenant: str, actor: str, action: str, subject: str, details: dict[str, Any] | None = None
) -> AuditEntry:
    """Append one entry to the chain."""
    last = session.scalars(select(AuditEntry).order_by(AuditEntry.sequence.desc()).limit(1)).first()
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
    entry.digest = seal(entry)
    session.add(entry)
    session.flush()
    return entry


def seal(entry: AuditEntry) -> str:
    """The digest that the entry should carry."""
    return sha256(
        canonical_bytes(
            {
                "sequence": entry.sequence,
                "at": entry.at,
                "tenant": entry.tenant,
                "actor": entry.actor,
                "action": entry.action,
                "subject": entry.subject,
                "details": entry.details,
                "previous": entry.previous,
            }
        )
    )


def verify(session: Session) -> tuple[int, str | None]:
    """How many entries fit, and what is wrong with the first that does not (None: the chain is whole)."""
    previous, count = GENESIS, 0
    for entry in session.scalars(select(AuditEntry).order_by(AuditEntry.sequence).execution_options(yield_per=500)):
        if entry.sequence != count + 1:
            return count, f"entry {count + 1} is missing"
        if entry.previous != previous:
            return count, f"entry {entry.sequence} does not follow the one before it"
        if entry.digest != seal(entry):
            return count, f"entry {entry.sequence} was changed"
        previous, count = entry.digest, count + 1
    return count, None


def to_dict(entry: AuditEntry) -> dict[str, Any]:
    """The entry as the API shows it."""
    return {
        "sequence": entry.sequence,
        "at": entry.at,
        "actor": entry.actor,
        "action": entry.action,
        "subject": entry.subject,
        "details": entry.details,
        "digest": entry.digest,
    }
