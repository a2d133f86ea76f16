"""The agent: owns the connections, one `Update` per model name, the outbox and the reports.

It composes nothing itself (see `edge_agent.cli`) and decides nothing that the pure parts decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from edge_agent.config import Home, Identity, Profile
from edge_agent.credentials import Credentials, KeyStore
from edge_agent.engines import Admission, Engines
from edge_agent.fetch import Fetch, HttpSource, Progress, choose_encoding
from edge_agent.hardware import find_hardware
from edge_agent.link import Connection, Endpoint, Will
from edge_agent.outbox import Outbox
from edge_agent.renewal import Renewal
from edge_agent.slots import Store
from edge_agent.state import Restarted, SlotState, Wish, wanted_from
from edge_agent.updates import Device, Update
from edge_agent.verify import open_desired
from edge_agent.watchdog import Watchdog
from model_registry.manifest import Manifest, ReleaseArtefact, sha256
from model_registry.trust import key_ring
from wire import topics
from wire.errors import ForeshoreError
from wire.frames import parse_frame
from wire.messages import Desired, Need, Reported, Status
from wire.process import replace_durably

AGENT_VERSION = "0.1.0"
TICK_S = 0.25
REPORT_EVERY_S = 1.0
RESEND_S = 15.0
MANIFEST_TRIES = 3
WISH_AGAIN_S = 1.0


class Agent:
    """One device at work. Lives in one event loop."""

    def __init__(
        self, home: Home, profile: Profile, identity: Identity, credentials: Credentials, keys: KeyStore
    ) -> None:
        self.home, self.profile, self.identity = home, profile, identity
        self._endpoint = Endpoint(identity.mqtt.host, identity.mqtt.port, credentials.context)
        user = topics.mqtt_user(identity.tenant, identity.device_id)
        self._client_id = identity.mqtt.client_id or user
        self._control_keys = key_ring(identity.trust.control)
        self.engines = Engines(profile.memory_budget_bytes)
        self.admission = Admission(profile.max_streams, profile.max_queue)
        self.store = Store(home.store, profile.disk_budget_bytes)
        self.outbox = Outbox(home.outbox_file, profile.outbox_quota_bytes)
        self.http = HttpSource(identity, credentials.context)
        self._renewal = Renewal(home, credentials, keys, self.http.post, self._reconnect)
        self.boot_epoch = home.count_boot()
        self.desired: Desired | None = None
        self.updates: dict[str, Update] = {}
        self.local_url: str | None = None
        self.error: str | None = None
        self._generation = 0
        self._troubles: dict[str, str] = {}
        self._fetches: dict[str, Fetch] = {}
        self._pages: dict[str, asyncio.Queue[bytes]] = {}
        self._bulk: Connection | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._dirty = True
        self._urgent = True
        self._sent_at: dict[str, float] = {}
        self._device = Device(
            home=home,
            identity=identity,
            profile=profile,
            publishers=key_ring(identity.trust.publishers),
            store=self.store,
            engines=self.engines,
            content=self,
            desired=lambda: self.desired,
            changed=self._changed,
            troubled=self._troubled,
            held=self._held,
        )
        self.control: Connection

    @property
    def is_online(self) -> bool:
        """Whether the broker is reachable now."""
        return self.control.is_connected

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set, then leave cleanly."""
        self._connect()
        await self._resume()
        self.control.start()
        if self.identity.control_url.startswith("https://"):
            self._spawn(self._renewal.run(self._renewal_failed), "renewal")
        last_report = 0.0
        watchdog = Watchdog()
        watchdog.say("READY=1")
        while not stopping.is_set():
            watchdog.alive()
            if self._dirty and (self._urgent or time.monotonic() - last_report > REPORT_EVERY_S):
                last_report = time.monotonic()
                self._report()
            self._dirty = self._dirty or any(update.state.is_working for update in self.updates.values())
            self._flush_outbox()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), TICK_S)
        watchdog.say("STOPPING=1")
        for task in list(self._tasks):
            if task.get_name() == "renewal":
                task.cancel()
        for update in self.updates.values():
            await update.close()
        self._publish("status", Status(online=False, boot_epoch=self.boot_epoch).to_bytes(), retain=True)
        await asyncio.sleep(0.1)
        await self._close_bulk()
        await self.control.close()
        await self.http.close()
        self.outbox.close()

    def report(self) -> Reported:
        """The document for the control plane and for `GET /status`."""
        return Reported(
            generation=self._followed_generation(),
            agent_version=AGENT_VERSION,
            boot_epoch=self.boot_epoch,
            reported_at=datetime.now(UTC),
            hardware=find_hardware(self.profile, self.home.store),
            models=[update.report() for _, update in sorted(self.updates.items())][:32],
            local_api=self.local_url,
            error=self.error or next(iter(self._troubles.values()), None),
        )

    async def release(self, digest: str) -> bytes:
        """A signed release, over HTTP."""
        return await self.http.release(digest)

    async def manifest(self, digest: str, size_bytes: int) -> bytes:
        """Pages over MQTT; over HTTP when they do not come."""
        queue = self._pages.setdefault(digest, asyncio.Queue(maxsize=512))
        await self._open_bulk(topics.manifest_page(self.identity.tenant, digest))
        try:
            for _ in range(MANIFEST_TRIES):
                self._send_need(Need(manifest=digest, manifest_wanted=True))
                data = await self._collect_pages(queue, size_bytes)
                if data is not None and sha256(data) == digest:
                    return data
        finally:
            self._pages.pop(digest, None)
        return await self.http.manifest(digest)

    async def fetch(self, manifest: Manifest, artefact: ReleaseArtefact, progress: Progress) -> None:
        """Bring every chunk into the store."""
        encoding, _ = choose_encoding(artefact, self.store.held())
        fetch = Fetch(
            self.store,
            manifest,
            self.http,
            encoding=encoding,
            send_need=self._send_need,
            progress=progress,
            stall_s=self.profile.fetch_stall_s,
        )
        self._fetches[manifest.digest] = fetch
        tenant = self.identity.tenant
        wanted = {topics.chunks(tenant, manifest.digest, name) for name in (encoding, "whole")}
        try:
            await self._open_bulk(*wanted, self._topic("chunk"))
            await fetch.run()
        finally:
            self._fetches.pop(manifest.digest, None)
            if not self._fetches and not self._pages:
                await self._close_bulk()

    def _connect(self) -> None:
        will = Will(self._topic("status"), Status(online=False, boot_epoch=self.boot_epoch).to_bytes())
        self.control = Connection(
            self._endpoint,
            self._client_id,
            receive=self._receive,
            connected=self._on_connected,
            persistent=True,
            receive_maximum=20,
            reconnect_max_s=self.profile.reconnect_max_s,
            will=will,
        )
        self.control.subscribe(self._topic("desired"), self._topic("cmd/+"), topics.EPOCH)

    async def _open_bulk(self, *wanted: str) -> None:
        if self._bulk is None:
            self._bulk = Connection(
                self._endpoint,
                f"{self._client_id}.bulk",
                receive=self._receive_bulk,
                connected=lambda _: None,
                persistent=False,
                receive_maximum=8,
                reconnect_max_s=self.profile.reconnect_max_s,
            )
            self._bulk.subscribe(*wanted)
            self._bulk.start()
        else:
            self._bulk.subscribe(*wanted)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.profile.fetch_stall_s):
                await self._bulk.ready.wait()
                await asyncio.sleep(0.1)  # lets the broker take the subscription before the request is out

    async def _close_bulk(self) -> None:
        bulk, self._bulk = self._bulk, None
        if bulk is not None:
            await bulk.close()

    async def _reconnect(self) -> None:
        await self.http.reconnect()
        for connection in (self.control, self._bulk):
            if connection is not None:
                connection.reconnect()

    def _renewal_failed(self, error: ForeshoreError) -> None:
        self.outbox.add("alarm", {"code": error.code, "message": f"the certificate is not renewed: {error}"[:2000]})

    async def _resume(self) -> None:
        """Pick up every journal, then the last signed wish."""
        for journal in sorted(self.home.state.glob("*.journal")):
            self.updates[journal.stem] = Update(journal.stem, self._device)
        for update in list(self.updates.values()):  # all are known before the first may collect garbage
            await update.handle(Restarted())
        if self.home.desired_file.exists():
            await self._wish(self.home.desired_file.read_bytes())

    async def _wish(self, envelope: bytes) -> None:
        last = self.desired.generation if self.desired else 0
        try:
            desired = open_desired(
                envelope,
                self._control_keys,
                tenant=self.identity.tenant,
                device_id=self.identity.device_id,
                last_generation=last,
            )
        except ForeshoreError as error:
            self.error = f"{error.code}: {error}"[:2000]
            self.outbox.add("alarm", {"code": error.code, "message": str(error)})
            self._soon()
            return
        self.error = None
        if self.desired is None or desired.generation > last:
            try:
                await asyncio.to_thread(replace_durably, self.home.desired_file, envelope, mode=0o600)
            except OSError as error:  # not followed before it is kept: a restart would forget how new it was
                self._troubled("desired", f"disk_failed: the wish cannot be kept: {error}")
                self._spawn(self._wish_again(envelope), "wish-again")
                return
            self._troubled("desired", None)
        self.desired = desired
        names = {model.name: model for model in desired.models}
        for name in sorted(set(names) | set(self.updates)):
            update = self.updates.setdefault(name, Update(name, self._device))
            await update.handle(Wish(wanted_from(names[name]) if name in names else None))
        self._soon()

    async def _wish_again(self, envelope: bytes) -> None:
        await asyncio.sleep(WISH_AGAIN_S)
        await self._wish(envelope)

    def _receive(self, topic: str, payload: bytes, ack: Callable[[], None]) -> None:
        leaf = topic.rsplit("/", 1)[-1]
        if leaf == "desired":
            self._spawn(self._wish_then_ack(payload, ack), "desired")
            return
        if topic.endswith("cmd/ack"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                names = [str(name) for name in json.loads(payload)["event_ids"]][:1000]
                self.outbox.confirm(names)
                for name in names:
                    self._sent_at.pop(name, None)
        else:
            self._soon()
        ack()

    async def _wish_then_ack(self, payload: bytes, ack: Callable[[], None]) -> None:
        await self._wish(payload)
        ack()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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
            async with asyncio.timeout(self.profile.fetch_stall_s):
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

    def _on_connected(self, is_connected: bool) -> None:
        if is_connected:
            self._publish("status", Status(online=True, boot_epoch=self.boot_epoch).to_bytes(), retain=True)
            self._sent_at.clear()
            self._soon()

    def _changed(self, name: str, state: SlotState) -> None:
        self._dirty = True
        if not state.is_working:
            self._urgent = True
            self.outbox.add(
                "update", {"model": name, "phase": state.phase, "result": state.result, "reason": state.reason}
            )

    def _followed_generation(self) -> int:
        """The last generation that every update has taken up: a report never pairs a new wish with an old result."""
        if self.desired is not None:
            wanted = {model.name: wanted_from(model).identity for model in self.desired.models}
            taken = {n: u.state.wanted.identity for n, u in self.updates.items() if u.state.wanted is not None}
            if wanted == taken:
                self._generation = self.desired.generation
        return self._generation

    def _troubled(self, name: str, trouble: str | None) -> None:
        if trouble is None:
            self._troubles.pop(name, None)
        elif self._troubles.get(name) != trouble[:2000]:
            self._troubles[name] = trouble[:2000]
            self.outbox.add("alarm", {"model": name, "message": trouble})
        self._dirty = True

    def _soon(self) -> None:
        self._dirty = self._urgent = True

    def _report(self) -> None:
        if self._publish("reported", self.report().to_bytes(), retain=True):
            self._dirty = self._urgent = False

    def _flush_outbox(self) -> None:
        if not self.is_online:
            return
        now = time.monotonic()
        for event_id, payload in self.outbox.oldest():
            if now - self._sent_at.get(event_id, -RESEND_S) >= RESEND_S and self._publish("event", payload):
                self._sent_at[event_id] = now

    def _held(self) -> set[str]:
        held = set[str]().union(*(update.state.held() for update in self.updates.values()))
        return held | set(self._fetches) | set(self._pages)

    def _send_need(self, need: Need) -> bool:
        return self._publish("need", need.to_bytes())

    def _publish(self, leaf: str, payload: bytes, *, retain: bool = False) -> bool:
        return self.control.publish(self._topic(leaf), payload, retain=retain)

    def _topic(self, leaf: str) -> str:
        return topics.device(self.identity.tenant, self.identity.device_id, leaf)
