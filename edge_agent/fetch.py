"""Fetches one artefact: first from what the device holds, then over MQTT, at last over HTTP.

A chunk counts once it is verified against the signed manifest and durable; only then is its message acknowledged.
No progress for `stall_s`: ask again; three times: HTTP. Interrupted at any point, the next run asks only for what is
missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_agent.config import Identity
from edge_agent.slots import ChunkIndex, Partial, Store
from model_registry.manifest import MAX_MANIFEST_BYTES, Chunk, Manifest, ReleaseArtefact
from wire.errors import (
    ForeshoreError,
    IntegrityError,
    NotAuthenticatedError,
    NotFoundError,
    TooLargeError,
    UnavailableError,
)
from wire.frames import parse_frame
from wire.messages import Need

if TYPE_CHECKING:
    import httpx

MAX_STALLS = 3
CREDIT_CHUNKS = 16
CREDIT_S = 1.0
BATCH_CHUNKS = 4  # made durable together; below the receive maximum, or delivery would stall
REUSE_CHUNKS = 32
HTTP_TIMEOUT_S = 15.0
HTTP_TRIES = 5


@dataclass
class Progress:
    """What reports show of a fetch."""

    bytes_total: int = 0
    bytes_done: int = 0
    wire_bytes: int = 0
    refetched_bytes: int = 0
    encoding: str = "whole"


class HttpSource:
    """The control plane over HTTPS with the device's certificate: content by digest, and the few calls it answers.

    The client is made with the first request: an agent that asks for nothing does without httpx.
    """

    def __init__(self, identity: Identity, tls: ssl.SSLContext) -> None:
        self._url, self._tls = identity.control_url, tls
        self._opened: httpx.AsyncClient | None = None

    @property
    def _client(self) -> httpx.AsyncClient:
        import httpx

        if self._opened is None:
            plain = {"accept-encoding": "identity"}  # a size limit counts what arrives: nothing is unpacked on the way
            self._opened = httpx.AsyncClient(
                base_url=self._url, verify=self._tls, timeout=HTTP_TIMEOUT_S, headers=plain
            )
        return self._opened

    async def release(self, digest: str, size_bytes: int) -> bytes:
        """The bytes of a release."""
        return await self._get(f"/api/v1/releases/{digest}", size_bytes)

    async def manifest(self, digest: str, size_bytes: int) -> bytes:
        """The bytes of a manifest."""
        return await self._get(f"/api/v1/manifests/{digest}", min(size_bytes, MAX_MANIFEST_BYTES))

    async def chunk(self, digest: str, size_bytes: int) -> bytes:
        """The bytes of a chunk, verified."""
        data = await self._get(f"/api/v1/chunks/{digest}", size_bytes)
        if hashlib.sha256(data).hexdigest() != digest:
            raise IntegrityError(f"chunk {digest[:12]} arrived damaged", remedy="it will be fetched again")
        return data

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST below /api/v1; the answer's JSON, empty where there is none."""
        import httpx

        try:
            answer = await self._client.post(f"/api/v1/{path}", json=body)
        except httpx.HTTPError as error:
            raise UnavailableError(f"{path} got no answer: {error}", remedy="it will be tried again") from error
        if answer.status_code in {401, 403}:
            raise NotAuthenticatedError(f"{path} is refused: {answer.text[:200]}", remedy="enrol the device again")
        try:
            document = answer.json() if answer.content else {}
        except ValueError as error:
            raise UnavailableError(f"{path} was not answered in JSON", remedy="it will be tried again") from error
        if not answer.is_success or not isinstance(document, dict):
            raise UnavailableError(f"{path}: {answer.status_code} {answer.text[:200]}", remedy="it will be tried again")
        return document

    async def reconnect(self) -> None:
        """Open connections anew, with the certificate in use now."""
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.aclose()

    async def _get(self, path: str, max_bytes: int) -> bytes:
        import httpx

        error: Exception | None = None
        for attempt in range(HTTP_TRIES):
            try:
                async with self._client.stream("GET", path) as answer:
                    if answer.status_code == 404:
                        raise NotFoundError(f"{path} does not exist", remedy="publish it again")
                    answer.raise_for_status()
                    if answer.headers.get("content-encoding", "identity") != "identity":
                        raise IntegrityError(f"{path} comes encoded", remedy="serve it as it is")
                    if int(answer.headers.get("content-length", "0")) > max_bytes:
                        raise TooLargeError(f"{path} announces more than {max_bytes} bytes", remedy="refused")
                    parts, size = [], 0
                    async for part in answer.aiter_raw():  # no decompressor sees what is not verified
                        size += len(part)
                        if size > max_bytes:
                            raise TooLargeError(f"{path} sends more than {max_bytes} bytes", remedy="refused")
                        parts.append(part)
                    return b"".join(parts)
            except httpx.HTTPError as failure:
                error = failure
                await asyncio.sleep(0.2 * 2**attempt)
        raise UnavailableError(f"{path} cannot be fetched: {error}", remedy="it will be tried again") from error


def choose_encoding(artefact: ReleaseArtefact, held: list[str]) -> tuple[str, str | None]:
    """The cheapest way to get `artefact` with these bases: name of the encoding and its base."""
    usable = [delta for delta in artefact.deltas if delta.base_manifest in held]
    best = min(usable, key=lambda delta: delta.wire_bytes, default=None)
    if best is None or best.wire_bytes >= artefact.size_bytes:
        return "whole", None
    return best.name, best.base_manifest


class Fetch:
    """One artefact on its way in. `receive` is fed with chunk messages while `run` waits."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        http: HttpSource,
        *,
        encoding: str,
        send_need: Callable[[Need], bool],
        progress: Progress,
        stall_s: float,
        find_beside: Callable[[Chunk], bytes | None] = lambda _: None,
    ) -> None:
        self._store, self._manifest, self._http = store, manifest, http
        self._digest = manifest.digest
        self._need, self._progress, self._stall_s = send_need, progress, stall_s
        self._encoding = encoding
        self._find_beside = find_beside  # verified chunks out of a bundle
        self._queue: asyncio.Queue[tuple[bytes, Callable[[], None]]] = asyncio.Queue(maxsize=64)

    def receive(self, payload: bytes, ack: Callable[[], None]) -> None:
        """Take a frame; what does not fit is acknowledged and asked for again."""
        try:
            self._queue.put_nowait((payload, ack))
        except asyncio.QueueFull:
            ack()

    async def run(self) -> None:
        """Return once every chunk is in place."""
        partial = await asyncio.to_thread(self._store.open_partial, self._manifest)
        held = [digest for digest in self._store.held() if self._store.find_manifest(digest)]
        index = await asyncio.to_thread(self._store.find_chunks, held)
        self._progress.bytes_total, self._progress.encoding = self._manifest.size_bytes, self._encoding
        await asyncio.to_thread(_reuse, partial, lambda chunk: index.find(chunk.digest))
        await asyncio.to_thread(_reuse, partial, self._find_beside)
        self._progress.bytes_done = partial.bytes_done
        if partial.missing() and not await self._from_mqtt(partial, index, held):
            await self._from_http(partial)

    async def _from_mqtt(self, partial: Partial, index: ChunkIndex, held: list[str]) -> bool:
        stalls = 0
        clock = asyncio.get_running_loop().time
        if not self._ask(partial, held):
            stalls += 1
        last_credit = last_progress = clock()
        since_credit = 0
        while partial.missing():
            try:
                batch = [await asyncio.wait_for(self._queue.get(), min(0.5, self._stall_s))]
            except TimeoutError:
                if clock() - last_progress > self._stall_s:
                    stalls, last_progress = stalls + 1, clock()
                    if stalls >= MAX_STALLS:
                        return False
                    self._ask(partial, held)
                continue
            while len(batch) < BATCH_CHUNKS and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            num_placed = await asyncio.to_thread(self._place, partial, index, [payload for payload, _ in batch])
            for _, ack in batch:
                ack()
            if not num_placed:
                continue
            stalls, last_progress, since_credit = 0, clock(), since_credit + num_placed
            if since_credit >= CREDIT_CHUNKS or clock() - last_credit > CREDIT_S:
                since_credit, last_credit = 0, clock()
                self._need(Need(manifest=self._digest, encoding=self._encoding, received=len(partial.done)))
        return True

    def _ask(self, partial: Partial, held: list[str]) -> bool:
        return self._need(
            Need(
                manifest=self._digest,
                encoding=self._encoding,
                missing=_ranges(partial.missing()),
                received=len(partial.done),
                held=held[:8],
            )
        )

    def _place(self, partial: Partial, index: ChunkIndex, payloads: list[bytes]) -> int:
        """Verify frames and store the good ones together; what is foreign, repeated or damaged does not count."""
        from model_registry.encodings import decode_frame

        good: dict[int, bytes] = {}
        for payload in payloads:
            try:
                frame = parse_frame(payload)
                if frame.manifest_prefix != bytes.fromhex(self._digest)[:8] or frame.index >= len(partial.places):
                    continue
                self._progress.wire_bytes += len(payload)
                if frame.index in partial.done or frame.index in good:
                    self._progress.refetched_bytes += len(payload)
                    continue
                good[frame.index] = decode_frame(frame, index.find, chunk=partial.places[frame.index].chunk)
            except NotFoundError:  # the base of the delta is damaged: the rest comes whole
                self._encoding = "whole"
            except ForeshoreError:  # damaged on the way; the next need names it again
                continue
        if good:
            partial.put_all(list(good.items()))
            self._progress.bytes_done += sum(map(len, good.values()))
        return len(good)

    def _store_chunk(self, partial: Partial, index: int, data: bytes) -> None:
        partial.put(index, data)
        self._progress.bytes_done += len(data)

    async def _from_http(self, partial: Partial) -> None:
        for index in partial.missing():
            chunk = partial.places[index].chunk
            data = await self._http.chunk(chunk.digest, chunk.size_bytes)
            self._progress.wire_bytes += len(data)
            await asyncio.to_thread(self._store_chunk, partial, index, data)


def _reuse(partial: Partial, find: Callable[[Chunk], bytes | None]) -> None:
    batch: list[tuple[int, bytes]] = []
    for missing in partial.missing():
        data = find(partial.places[missing].chunk)
        if data is not None:
            batch.append((missing, data))
        if len(batch) >= REUSE_CHUNKS:
            partial.put_all(batch)
            batch = []
    if batch:
        partial.put_all(batch)


def _ranges(indexes: list[int]) -> list[tuple[int, int]]:
    """[first, count] runs of sorted indexes, at most 1000 of them."""
    runs: list[tuple[int, int]] = []
    for index in indexes:
        if runs and runs[-1][0] + runs[-1][1] == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs[:1000]
