"""An engine build as the API shows it."""

from __future__ import annotations

import base64
from typing import Any

from cloud.control.tables import EngineBuildRow


def shown(row: EngineBuildRow) -> dict[str, Any]:
    """One build; `document` is base64 of the bytes to sign, while it waits for that."""
    return {
        "build_id": row.build_id,
        "model": row.model,
        "manifest": row.manifest,
        "hardware_key": row.hardware_key,
        "state": row.state,
        "reason": row.reason,
        "holder": row.holder,
        "attempts": row.attempts,
        "built_by": row.built_by,
        "history": row.history,
        "document_digest": row.document_digest,
        "document": base64.b64encode(row.document).decode()
        if row.document and row.state == "awaiting_signature"
        else None,
        "created_at": row.created_at.isoformat(),
        "updated_at": row.updated_at.isoformat(),
    }
