"""The next certificate, in time: asked for at two thirds of the life of the one in use, with the one in use.

Steps, each durable before the next: the new key (`next.key`), its certificate together with it in `device.pem`, the
control plane's word that the old one is dead, and `next.key` gone. Killed anywhere, the device has a working identity
and the next start goes on from what the files say: a `next.key` whose certificate is in use only wants confirming, any
other is asked for again. An answer that got lost costs a certificate that nobody ever uses.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from edge_agent.config import Home
from edge_agent.credentials import Credentials, KeyStore
from wire.errors import ForeshoreError, InvalidInputError
from wire.process import replace_durably

LOOK_S = 60.0  # the clock may be set meanwhile
MAX_PAUSE_S = 600.0

Post = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""POST below /api/v1 with the device's certificate; the answer's JSON. Raises `ForeshoreError`."""


class Renewal:
    """Keeps one device's certificate young. `switched` is awaited after each change, to open connections anew."""

    def __init__(
        self, home: Home, credentials: Credentials, keys: KeyStore, post: Post, switched: Callable[[], Awaitable[None]]
    ) -> None:
        self._next_key = home.next_key_file
        self._credentials, self._keys = credentials, keys
        self._post, self._switched = post, switched

    async def run(self, trouble: Callable[[ForeshoreError], None]) -> None:
        """Renew for ever; what goes wrong is told to `trouble` and tried again after a growing, jittered pause."""
        num_failures = 0
        while True:
            try:
                if self._next_key.exists() or self._credentials.is_due():
                    await self.renew()
                num_failures = 0
                left_s = (self._credentials.renew_at - datetime.now(UTC)).total_seconds()
                await asyncio.sleep(min(LOOK_S, max(0.05, left_s)))
            except (ForeshoreError, OSError) as error:
                known = error if isinstance(error, ForeshoreError) else InvalidInputError(f"renewal: {error}")
                trouble(known)
                await asyncio.sleep(random.uniform(0.5, 1.0) * min(MAX_PAUSE_S, 2.0**num_failures))
                num_failures = min(num_failures + 1, 12)

    async def renew(self) -> None:
        """Go from wherever the files say we are to a confirmed certificate of a new key."""
        key_text = await asyncio.to_thread(self._begin)
        if not self._credentials.is_for(key_text):
            request = await asyncio.to_thread(self._keys.request, key_text)
            answer = await self._post("device/certificate", {"csr_pem": request})
            await asyncio.to_thread(self._credentials.replace, key_text, str(answer.get("certificate_pem")))
        await self._switched()
        await self._post("device/certificate/confirm", {})
        await asyncio.to_thread(self._next_key.unlink, missing_ok=True)

    def _begin(self) -> str:
        if self._next_key.exists():
            return self._next_key.read_text()
        key_text = self._keys.create()
        replace_durably(self._next_key, key_text.encode(), mode=0o600)
        return key_text
