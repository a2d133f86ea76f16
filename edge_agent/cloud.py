"""The way to the gateway: forwards OpenAI requests with the device's token, relays streams byte for byte.

Remembers whether the gateway answered last time; after a failure it counts as unreachable for `RETRY_S`, then the
next request may try again.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from wire.errors import UnavailableError

if TYPE_CHECKING:
    import httpx

RETRY_S = 5.0
CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 120.0
MAX_BODY_BYTES = 8 << 20


@dataclass
class Reply:
    """An answer of the gateway: `stream` yields its bytes."""

    status: int
    headers: dict[str, str]
    stream: AsyncIterator[bytes]


class Cloud:
    """The gateway, as one device sees it."""

    def __init__(self, gateway_url: str | None, token: str) -> None:
        self.has_gateway = gateway_url is not None
        self._base_url, self._token = gateway_url or "http://127.0.0.1", token
        self._failed_at = -RETRY_S
        self.seen_at = time.monotonic()
        self.round_trip_s = 0.05

    @cached_property
    def _client(self) -> httpx.AsyncClient:
        """Made with the first request."""
        import httpx

        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        headers = {"authorization": f"Bearer {self._token}"}
        return httpx.AsyncClient(base_url=self._base_url, headers=headers, timeout=timeout)

    @property
    def is_reachable(self) -> bool:
        """Whether it is worth trying."""
        return self.has_gateway and time.monotonic() - self._failed_at >= RETRY_S

    async def send(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        """Forward a request; `UnavailableError` when the gateway does not begin to answer."""
        import httpx

        begun = time.monotonic()
        request = self._client.build_request("POST", path, json=body, headers=headers)
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            self._failed_at = self.seen_at = time.monotonic()
            raise UnavailableError(f"the gateway does not answer: {error}", remedy="try again") from error
        self.seen_at = time.monotonic()
        self.round_trip_s = 0.8 * self.round_trip_s + 0.2 * min(self.seen_at - begun, 1.0)
        kept = {name: value for name, value in answer.headers.items() if name in {"content-type", "retry-after"}}
        return Reply(answer.status_code, kept, self._relay(answer))

    async def _relay(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        import httpx

        try:
            async for part in answer.aiter_bytes():
                yield part
        except httpx.HTTPError as error:
            self._failed_at = time.monotonic()
            raise UnavailableError(f"the gateway broke off: {error}", remedy="send the request again") from error
        finally:
            await answer.aclose()

    async def close(self) -> None:
        """Close the connections."""
        if "_client" in self.__dict__:
            await self._client.aclose()
