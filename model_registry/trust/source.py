"""Where metadata comes from: HTTP or a folder, both under a size limit that is kept before anything is parsed.

What arrives is raw: a content encoding is refused, so no decompressor runs. A peer must begin to answer within
`grace_s` and then keep up `MIN_BYTES_PER_S` on average; the whole wait is bounded whatever it does.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urljoin

import httpx

from model_registry.trust.errors import (
    EndlessError,
    MalformedError,
    MetadataUnavailableError,
    OversizedError,
    SlowError,
)

MIN_BYTES_PER_S = 1000


class MetadataSource(Protocol):
    """Gives files by the names of a TUF repository."""

    def fetch(self, name: str, max_bytes: int) -> bytes | None:
        """The file, or None when there is none of this name; raises a `TrustError` or `MetadataUnavailableError`."""


@dataclass(frozen=True)
class HttpSource:
    """Files below a URL (names are relative references). Each fetch has connections and a loop of its own."""

    base_url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    verify: ssl.SSLContext | bool = True
    grace_s: float = 15.0
    transport: Callable[[], httpx.AsyncBaseTransport] | None = None  # tests put a hostile server here

    def fetch(self, name: str, max_bytes: int) -> bytes | None:
        """GET, in the calling thread."""
        try:
            return asyncio.run(self._fetch(urljoin(self.base_url.rstrip("/") + "/", name), max_bytes))
        except httpx.HTTPError as error:
            raise MetadataUnavailableError(f"{name} cannot be fetched: {error!r}"[:300], remedy="try again") from error

    async def _fetch(self, url: str, max_bytes: int) -> bytes | None:
        headers = {**self.headers, "accept-encoding": "identity"}
        transport = self.transport() if self.transport else None
        limits = httpx.Timeout(self.grace_s)
        async with httpx.AsyncClient(
            headers=headers, timeout=limits, verify=self.verify, transport=transport, trust_env=False
        ) as client:
            try:
                async with asyncio.timeout(self.grace_s + max_bytes / MIN_BYTES_PER_S):
                    return await self._receive(client, client.build_request("GET", url), max_bytes)
            except (TimeoutError, httpx.ReadTimeout) as error:
                raise SlowError(f"{url} did not arrive in time", remedy="refused; try another network") from error

    async def _receive(self, client: httpx.AsyncClient, request: httpx.Request, max_bytes: int) -> bytes | None:
        begun = time.monotonic()
        async with asyncio.timeout(self.grace_s):
            answer = await client.send(request, stream=True)
        try:
            if answer.status_code in {403, 404}:
                return None
            if answer.status_code != 200:
                raise MetadataUnavailableError(f"{request.url}: status {answer.status_code}", remedy="try again")
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise MalformedError(f"{request.url} comes encoded", remedy="serve it as it is")
            announced = answer.headers.get("content-length", "")
            if announced.isdigit() and int(announced) > max_bytes:
                raise OversizedError(f"{request.url} announces {announced} bytes", remedy=f"at most {max_bytes}")
            return await self._read(answer, max_bytes, begun)
        finally:
            await answer.aclose()

    async def _read(self, answer: httpx.Response, max_bytes: int, begun: float) -> bytes:
        data = bytearray()
        async for piece in answer.aiter_raw():
            data += piece
            waited_s = time.monotonic() - begun
            if len(data) > max_bytes:
                raise EndlessError(f"{answer.url} sends more than {max_bytes} bytes", remedy="refused")
            if waited_s > self.grace_s and len(data) < (waited_s - self.grace_s) * MIN_BYTES_PER_S:
                raise SlowError(f"{answer.url} sent {len(data)} bytes in {waited_s:.0f} s", remedy="refused")
        return bytes(data)


@dataclass(frozen=True)
class FolderSource:
    """Files in one folder, for example on a stick. Links and anything that is no plain file count as absent."""

    folder: Path

    def fetch(self, name: str, max_bytes: int) -> bytes | None:
        """Read the file."""
        path = self.folder / name
        if path.parent != self.folder or path.is_symlink() or not path.is_file():
            return None
        return read_limited(path, max_bytes)


class NoSource:
    """Nothing can be reached; what is on disk has to do."""

    def fetch(self, name: str, max_bytes: int) -> bytes | None:
        """Raise."""
        raise MetadataUnavailableError(f"{name} is not on this device", remedy="reach the control plane")


def read_limited(path: Path, max_bytes: int) -> bytes:
    """A file of at most `max_bytes`; a larger one is not read."""
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OversizedError(f"{path.name} has more than {max_bytes} bytes", remedy="refused")
    return data
