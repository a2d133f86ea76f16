"""Decision records, kept and shown: from gateways, from devices (as events) and from the control plane itself.

A record is checked by `wire.decision` before it is stored; the same id again replaces it only by the same source, as an
outcome arrives later than the choice.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud.control.database import Database, announce
from cloud.control.tables import DecisionRow
from wire import decision
from wire.errors import ConflictError, InvalidInputError, NotFoundError

MAX_BATCH = 500


class Decisions:
    """The decision log."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def store(self, tenant: str, source: str, records: list[dict[str, Any]]) -> int:
        """Keep records of one source; returns how many. All or none."""
        if len(records) > MAX_BATCH:
            raise InvalidInputError(f"{len(records)} records at once", remedy=f"at most {MAX_BATCH}")
        parsed = [decision.from_dict(record) for record in records]
        with self._database.write() as session:
            for record in parsed:
                add(session, tenant, source, record)
        return len(parsed)

    def newest(
        self, tenant: str, *, kind: str | None = None, subject: str | None = None, limit: int = 100, offset: int = 0
    ) -> list[dict[str, Any]]:
        """Records, newest first."""
        query = select(DecisionRow).where(DecisionRow.tenant == tenant)
        query = query if kind is None else query.where(DecisionRow.kind == kind)
        query = query if subject is None else query.where(DecisionRow.subject == subject)
        query = query.order_by(DecisionRow.stored_at.desc(), DecisionRow.decision_id).limit(limit).offset(offset)
        with self._database.read() as session:
            return [shown(row) for row in session.scalars(query)]

    def get(self, tenant: str, decision_id: str) -> dict[str, Any]:
        """One record; `NotFoundError` otherwise."""
        with self._database.read() as session:
            row = session.get(DecisionRow, decision_id)
            if row is None or row.tenant != tenant:
                raise NotFoundError(f"decision {decision_id!r} is not known", remedy="see: foreshore decisions")
            return shown(row)


def add(session: Session, tenant: str, source: str, record: decision.Decision) -> None:
    """Keep one record within a transaction."""
    if not record.decision_id or len(record.decision_id) > 64:
        raise InvalidInputError(f"decision id {record.decision_id[:80]!r} is not usable", remedy="1 to 64 characters")
    row = session.get(DecisionRow, record.decision_id)
    if row is not None and (row.tenant, row.source) != (tenant, source):
        raise ConflictError(f"decision {record.decision_id!r} belongs to another source", remedy="use a fresh id")
    if row is None:
        row = DecisionRow(decision_id=record.decision_id, tenant=tenant, source=source, stored_at=datetime.now(UTC))
        session.add(row)
    row.kind, row.subject = record.kind, record.subject[:200]
    row.decided_at = _instant(record.decided_at)
    row.record = record.to_dict()
    announce(
        session,
        "decision",
        tenant,
        {
            "decision_id": record.decision_id,
            "kind": record.kind,
            "subject": record.subject,
            "source": source,
            "chosen": record.chosen,
            "reason": record.reason,
            "decided_at": record.decided_at,
        },
    )


def shown(row: DecisionRow) -> dict[str, Any]:
    """A record as the API gives it: the record itself, and who sent it."""
    return {**row.record, "source": row.source, "stored_at": row.stored_at.isoformat()}


def _instant(text: str) -> datetime:
    try:
        instant = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidInputError(f"decided_at {text[:60]!r} is not ISO 8601", remedy="give aware UTC") from error
    if instant.tzinfo is None:
        raise InvalidInputError(f"decided_at {text!r} has no zone", remedy="give aware UTC")
    return instant
