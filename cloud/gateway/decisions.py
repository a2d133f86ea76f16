"""Decision records of this gateway: the newest in a bounded ring, all of them sent to the control plane in batches.

A batch that cannot be sent is kept and tried again with growing pauses; when too many wait, the oldest are dropped and
counted. Records of one tenant are never shown to another.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict, deque
from typing import Any

import httpx

from wire.decision import Decision
from wire.errors import NotFoundError

RING_SIZE = 2000
MAX_UNSENT = 5000
BATCH_SIZE = 100
_INTERVAL_S = 1.0
_MAX_PAUSE_S = 30.0


class DecisionLog:
    """Keeps and forwards decisions."""

    def __init__(self, client: httpx.AsyncClient | None = None) -> None:
        self._client = client
        self._ring: OrderedDict[str, tuple[str, Decision]] = OrderedDict()
        self._unsent: deque[tuple[str, Decision]] = deque(maxlen=MAX_UNSENT)
        self.num_dropped = 0

    def put(self, tenant: str, decision: Decision) -> None:
        """Store or replace a decision that is still in the making."""
        self._ring[decision.decision_id] = (tenant, decision)
        while len(self._ring) > RING_SIZE:
            self._ring.popitem(last=False)

    def finish(self, tenant: str, decision: Decision) -> None:
        """Store a decision whose outcome is known, and send it."""
        self.put(tenant, decision)
        if self._client is not None:
            self.num_dropped += len(self._unsent) == MAX_UNSENT
            self._unsent.append((tenant, decision))

    def get(self, tenant: str, decision_id: str) -> dict[str, Any]:
        """The record as plain data; raises `NotFoundError`, also for another tenant's."""
        found = self._ring.get(decision_id)
        if found is None or found[0] != tenant:
            raise NotFoundError(f"decision {decision_id!r} is not here", remedy="ask the control plane for older ones")
        return found[1].to_dict()

    async def forward(self) -> None:
        """Send batches until cancelled."""
        pause = _INTERVAL_S
        while True:
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = _INTERVAL_S if await self.send_batch() else min(_MAX_PAUSE_S, pause * 2)

    async def send_batch(self) -> bool:
        """Send the oldest unsent records of one tenant; False when the control plane did not take them."""
        if self._client is None or not self._unsent:
            return True
        tenant = self._unsent[0][0]
        batch = [item for item in list(self._unsent)[:BATCH_SIZE] if item[0] == tenant]
        body = {"tenant": tenant, "records": [decision.to_dict() for _, decision in batch]}
        try:
            response = await self._client.post("/api/v1/decisions", json=body)
        except httpx.HTTPError:
            return False
        if response.status_code >= 500 or response.status_code in (401, 403, 408, 429):
            return False
        if response.is_error:  # refused for good: sending it again would block the rest
            self.num_dropped += len(batch)
        for item in batch:
            if item in self._unsent:
                self._unsent.remove(item)
        return True
