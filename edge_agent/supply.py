"""Where the bytes of an update come from: a bundle on a stick, MQTT pages and chunks, and HTTP for what does not come.

The bulk connection exists only while something is fetched. Nothing here is believed: digests are checked by whoever
asked.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from tuf.api.metadata import TargetFile

from edge_agent.config import Identity, Profile
from edge_agent.fetch import Fetch, HttpSource, Progress, choose_encoding
from edge_agent.inbox import find_chunk
from edge_agent.link import Connection, Endpoint
from edge_agent.slots import Store
from edge_agent.verify import DeviceTrust
from model_registry.manifest import Manifest, ReleaseArtefact, sha256
from model_registry.trust.bundle import Bundle
from wire import topics
from wire.errors import ForeshoreError
from wire.frames import parse_frame
from wire.messages import Need

MANIFEST_TRIES = 3


class Supply:
    """All sources of one device; `bundle` is the one in the inbox, if there is one."""

    def __init__(
        self,
        endpoint: Endpoint,
        client_id: str,
        identity: Identity,
        profile: Profile,
        store: Store,
        trust: DeviceTrust,
        http: HttpSource,
        *,
        send_need: Callable[[Need], bool],
        trust_was_asked: Callable[[], None],
    ) -> None:
        self.bundle: Bundle | None = None
        self._endpoint, self._client_id = endpoint, client_id
        self._identity, self._profile = identity, profile
        self._store, self._trust, self._http = store, trust, http
        self._send_need, self._trust_was_asked = send_need, trust_was_asked
        self._fetches: dict[str, Fetch] = {}
        self._pages: dict[str, asyncio.Queue[bytes]] = {}
        self._bulk: Connection | None = None

    def held(self) -> set[str]:
        """Digests of the manifests that are being fetched."""
        return set(self._fetches) | set(self._pages)

    def reconnect(self) -> None:
        """Leave and come back with the certificate in use now."""
        if self._bulk is not None:
            self._bulk.reconnect()

    async def close(self) -> None:
        """Leave the broker."""
        await self._close_bulk()

    async def listed(self, model: str, release: str) -> TargetFile:
        """What a publisher's fresh metadata says about a release."""
        try:
            return await asyncio.to_thread(self._trust.find_release, model, release, self.bundle)
        finally:
            self._trust_was_asked()

    async def release(self, digest: str, size_bytes: int) -> bytes:
        """A release, out of a bundle or over HTTP."""
        return await self._from_bundle("releases", digest, size_bytes) or await self._http.release(digest, size_bytes)

    async def manifest(self, digest: str, size_bytes: int) -> bytes:
        """Out of a bundle, else pages over MQTT; over HTTP when they do not come."""
        held = await self._from_bundle("manifests", digest, size_bytes)
        if held is not None:
            return held
        queue = self._pages.setdefault(digest, asyncio.Queue(maxsize=512))
        await self._open_bulk(topics.manifest_page(self._identity.tenant, digest))
        try:
            for _ in range(MANIFEST_TRIES):
                self._send_need(Need(manifest=digest, manifest_wanted=True))
                data = await self._collect_pages(queue, size_bytes)
                if data is not None and sha256(data) == digest:
                    return data
        finally:
            self._pages.pop(digest, None)
        return await self._http.manifest(digest, size_bytes)

    async def fetch(self, manifest: Manifest, artefact: ReleaseArtefact, progress: Progress) -> None:
        """Bring every chunk into the store."""
        encoding, _ = choose_encoding(artefact, self._store.held())
        fetch = Fetch(
            self._store,
            manifest,
            self._http,
            encoding=encoding,
            send_need=self._send_need,
            progress=progress,
            stall_s=self._profile.fetch_stall_s,
            find_beside=lambda chunk: find_chunk(self.bundle, chunk) if self.bundle else None,
        )
        self._fetches[manifest.digest] = fetch
        tenant = self._identity.tenant
        wanted = {topics.chunks(tenant, manifest.digest, name) for name in (encoding, "whole")}
        try:
            await self._open_bulk(*wanted, topics.device(tenant, self._identity.device_id, "chunk"))
            await fetch.run()
        finally:
            self._fetches.pop(manifest.digest, None)
            if not self._fetches and not self._pages:
                await self._close_bulk()

    async def _open_bulk(self, *wanted: str) -> None:
        if self._bulk is None:
            self._bulk = Connection(
                self._endpoint,
                f"{self._client_id}.bulk",
                receive=self._receive_bulk,
                connected=lambda _: None,
                persistent=False,
                receive_maximum=8,
                reconnect_max_s=self._profile.reconnect_max_s,
            )
            self._bulk.subscribe(*wanted)
            self._bulk.start()
        else:
            self._bulk.subscribe(*wanted)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._profile.fetch_stall_s):
                await self._bulk.ready.wait()
                await asyncio.sleep(0.1)  # lets the broker take the subscription before the request is out

    async def _close_bulk(self) -> None:
        bulk, self._bulk = self._bulk, None
        if bulk is not None:
            await bulk.close()

    async def _from_bundle(self, kind: str, digest: str, size_bytes: int) -> bytes | None:
        if self.bundle is None:
            return None
        try:
            return await asyncio.to_thread(self.bundle.find, kind, digest, size_bytes)
        except ForeshoreError:
            return None

    def _receive_bulk(self, topic: str, payload: bytes, ack: Callable[[], None]) -> None:
        if topic.endswith("/manifest"):
            queue = self._pages.get(topic.split("/")[-2])
            if queue is not None and not queue.full():
                queue.put_nowait(payload)
            ack()
            return
        prefix = payload[4:12]
        for digest, fetch in self._fetches.items():
            if bytes.fromhex(digest)[:8] == prefix:
                fetch.receive(payload, ack)
                return
        ack()

    async def _collect_pages(self, queue: asyncio.Queue[bytes], size_bytes: int) -> bytes | None:
        pages: dict[int, bytes] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._profile.fetch_stall_s):
                while sum(map(len, pages.values())) < size_bytes:
                    try:
                        frame = parse_frame(await queue.get())
                    except ForeshoreError:
                        continue
                    if bytes.fromhex(sha256(frame.body))[:16] == frame.digest_prefix:
                        pages[frame.index] = frame.body
        if sorted(pages) != list(range(len(pages))):
            return None
        return b"".join(pages[index] for index in sorted(pages))
