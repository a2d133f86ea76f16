"""What webhooks still have to be told: rows written in the transaction of the change itself, so that none is lost."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud.control.tables import Webhook, WebhookDelivery


def add(session: Session, tenant: str, action: str, entry: dict[str, Any]) -> None:
    """Queue an audit entry for each webhook of the tenant that wants its action."""
    for hook in session.scalars(select(Webhook).where(Webhook.tenant == tenant)):
        if wants(hook.actions, action):
            session.add(new_delivery(hook, action, {"type": action, "entry": entry}))


def wants(patterns: Sequence[str], action: str) -> bool:
    """Whether one of the patterns (`rollout.*`) fits the action."""
    return any(fnmatchcase(action, pattern) for pattern in patterns)


def new_delivery(hook: Webhook, action: str, body: dict[str, Any]) -> WebhookDelivery:
    """A delivery that is due at once."""
    now = datetime.now(UTC)
    return WebhookDelivery(
        delivery_id=f"msg-{uuid.uuid4().hex}", webhook_id=hook.webhook_id, tenant=hook.tenant, action=action,
        body=json.dumps(body, separators=(",", ":"), sort_keys=True), due_at=now, created_at=now,
    )  # fmt: skip
