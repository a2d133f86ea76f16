"""The agent: owns the connections, one `Update` per model name, the outbox and the reports.

It composes nothing itself (see `edge_agent.cli`) and decides nothing that the pure parts decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from edge_agent.config import Home, Identity, Profile
from edge_agent.credentials import Credentials, KeyStore
from edge_agent.engines import Admission, Engines
from edge_agent.fetch import HttpSource
from edge_agent.hardware import find_hardware
from edge_agent.inbox import prove
from edge_agent.link import Connection, Endpoint, Will
from edge_agent.outbox import Outbox
from edge_agent.renewal import Renewal
from edge_agent.slots import Store
from edge_agent.state import Restarted, SlotState, TrustRenewed, Wish, wanted_from
from edge_agent.supply import Supply
from edge_agent.updates import Device, Update
from edge_agent.verify import DeviceTrust, open_desired, recall_desired, signers
from edge_agent.watchdog import Watchdog
from model_registry.trust.bundle import Bundle
from model_registry.trust.errors import MetadataUnavailableError, TrustError
from wire import topics
from wire.errors import ForeshoreError, IntegrityError
from wire.messages import Desired, ModelState, Need, Reported, Status
from wire.process import replace_durably

if TYPE_CHECKING:
    from edge_agent.engine_work import EngineWork
    from model_registry.client import ControlClient

AGENT_VERSION = "0.1.0"
TICK_S = 0.25
REPORT_EVERY_S = 1.0
RESEND_S = 15.0
TRUST_EVERY_S = 600.0
TRUST_RETRY_S = 2.0
WISH_AGAIN_S = 1.0


class Agent:
    """One device at work. Lives in one event loop."""

    def __init__(
        self,
        home: Home,
        profile: Profile,
        identity: Identity,
        credentials: Credentials,
        keys: KeyStore,
        trust: DeviceTrust,
    ) -> None:
        self.home, self.profile, self.identity = home, profile, identity
        self._endpoint = Endpoint(identity.mqtt.host, identity.mqtt.port, credentials.context)
        user = topics.mqtt_user(identity.tenant, identity.device_id)
        self._client_id = identity.mqtt.client_id or user
        self.trust = trust
        self._unproven: bytes | None = None  # a wish that waits for trusted metadata
        self._seen_renewals = 0
        self._trust_is_wanted = asyncio.Event()
        self.engines = Engines(profile.memory_budget_bytes)
        self.admission = Admission(profile.max_streams, profile.max_queue)
        self.store = Store(home.store, profile.disk_budget_bytes)
        self.outbox = Outbox(home.outbox_file, profile.outbox_quota_bytes)
        self.http = HttpSource(identity, credentials.context)
        self._supply = Supply(
            self._endpoint, self._client_id, identity, profile, self.store, trust, self.http,
            send_need=self._send_need, trust_was_asked=self._mend_trust,
        )  # fmt: skip
        self._renewal = Renewal(home, credentials, keys, self.http.post, self._reconnect)
        self.boot_epoch = home.count_boot()
        self.desired: Desired | None = None
        self.updates: dict[str, Update] = {}
        self.local_url: str | None = None
        self.error: str | None = None
        self._generation = 0
        self._troubles: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._dirty = True
        self._urgent = True
        self._sent_at: dict[str, float] = {}
        self._signers: set[str] = set()  # key ids under the wish that is followed
        self._device = Device(
            home=home,
            identity=identity,
            profile=profile,
            trust=trust,
            store=self.store,
            engines=self.engines,
            content=self._supply,
            desired=lambda: self.desired,
            changed=self._changed,
            troubled=self._troubled,
            held=self._held,
        )
        self._engine_work = self._make_engine_work(credentials)
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
        self._spawn(self._watch_trust(), "trust")
        self._spawn(self._send_events(), "events")
        if self._engine_work is not None:
            self._spawn(self._engine_work.run(), "engines")
        watchdog = Watchdog()
        watchdog.say("READY=1")
        while not stopping.is_set():
            watchdog.alive()
            if self._dirty and (self._urgent or time.monotonic() - last_report > REPORT_EVERY_S):
                last_report = time.monotonic()
                self._report()
            self._dirty = self._dirty or any(update.state.is_working for update in self.updates.values())
            if self.trust.num_renewals != self._seen_renewals:
                self._seen_renewals = self.trust.num_renewals
                self._spawn(self._renewed(), "trust-renewed")
            if self._supply.bundle is None and self.home.inbox.exists():
                self._supply.bundle = Bundle.open(self.home.inbox)
                self._spawn(self._take_bundle(self._supply.bundle), "bundle")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), TICK_S)
        watchdog.say("STOPPING=1")
        for task in list(self._tasks):
            task.cancel()
        for update in self.updates.values():
            await update.close()
        self._publish("status", Status(online=False, boot_epoch=self.boot_epoch).to_bytes(), retain=True)
        await asyncio.sleep(0.1)
        await self._supply.close()
        await self.control.close()
        await self.http.close()
        self.outbox.close()

    def report(self) -> Reported:
        """The document for the control plane and for `GET /status`."""
        trust_error = said(self.trust.error) if self.trust.error else None
        return Reported(
            generation=self._followed_generation(),
            agent_version=AGENT_VERSION,
            boot_epoch=self.boot_epoch,
            reported_at=datetime.now(UTC),
            hardware=find_hardware(self.profile, self.home.store),
            models=[self._model_report(update) for _, update in sorted(self.updates.items())][:32],
            local_api=self.local_url,
            error=self.error or next(iter(self._troubles.values()), None) or trust_error,
        )

    def _model_report(self, update: Update) -> ModelState:
        state = update.report()
        return self._engine_work.described(state) if self._engine_work is not None else state

    def _make_engine_work(self, credentials: Credentials) -> EngineWork | None:
        """Only a device with an engine runtime pays for it; its code and httpx come in with the first connection."""
        settings = self.profile.engine
        if settings is None:
            return None
        from edge_agent.engine_work import EngineWork

        def connected() -> ControlClient:
            from model_registry.client import connect

            return connect(self.identity.control_url, tls=credentials.context)

        return EngineWork(
            self._device,
            settings,
            connected,
            updates=lambda: self.updates,
            is_online=lambda: self.is_online,
            alarm=self._engine_alarm,
        )

    def _engine_alarm(self, name: str, note: str) -> None:
        self.outbox.add("alarm", {"model": name, "message": note})

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

    async def _reconnect(self) -> None:
        await self.http.reconnect()
        self.control.reconnect()
        self._supply.reconnect()

    def _renewal_failed(self, error: ForeshoreError) -> None:
        self.outbox.add("alarm", {"code": error.code, "message": f"the certificate is not renewed: {error}"[:2000]})

    async def _resume(self) -> None:
        """Pick up every journal, then the last signed wish."""
        for journal in sorted(self.home.state.glob("*.journal")):
            self.updates[journal.stem] = Update(journal.stem, self._device)
        for update in list(self.updates.values()):  # all are known before the first may collect garbage
            await update.handle(Restarted())
        if self.home.desired_file.exists():
            envelope = self.home.desired_file.read_bytes()
            with contextlib.suppress(ForeshoreError):  # damaged: the broker has it too
                self.desired, self._signers = recall_desired(envelope), signers(envelope)
                await self._wish(envelope)

    async def _wish(self, envelope: bytes) -> None:
        try:
            desired = await self._proven_wish(envelope)
        except ForeshoreError as error:
            self._unproven = envelope if isinstance(error, TrustError | MetadataUnavailableError) else None
            self._mend_trust()
            self._complain(error)
            return
        self.error = self._unproven = None
        if self.desired is None or desired != self.desired:
            try:
                await asyncio.to_thread(replace_durably, self.home.desired_file, envelope, mode=0o600)
            except OSError as error:  # not followed before it is kept: a restart would forget how new it was
                self._troubled("desired", f"disk_failed: the wish cannot be kept: {error}")
                self._spawn(self._wish_again(envelope), "wish-again")
                return
            self._troubled("desired", None)
        is_newer = self.desired is not None and desired.generation > self.desired.generation
        self.desired, self._signers = desired, signers(envelope)
        names = {model.name: model for model in desired.models}
        for name in sorted(set(names) | set(self.updates)):
            update = self.updates.setdefault(name, Update(name, self._device))
            await update.handle(Wish(wanted_from(names[name]) if name in names else None))
            if is_newer:
                await update.handle(TrustRenewed())
        self._soon()

    async def _proven_wish(self, envelope: bytes) -> Desired:
        """The wish, if the director whom targets names now signed it; looks for newer metadata before it says no."""
        try:
            return await asyncio.to_thread(self._open_wish, envelope)
        except (IntegrityError, MetadataUnavailableError) as error:
            try:
                await asyncio.to_thread(self.trust.refresh)
            except MetadataUnavailableError:
                raise error from None
            return await asyncio.to_thread(self._open_wish, envelope)

    def _open_wish(self, envelope: bytes) -> Desired:
        director = self.trust.director()
        is_same_director = bool(self._signers & set(director.keys))
        return open_desired(
            envelope,
            director,
            tenant=self.identity.tenant,
            device_id=self.identity.device_id,
            last_generation=self.desired.generation if self.desired and is_same_director else 0,
        )

    async def _watch_trust(self) -> None:
        """Ask for newer metadata now and then, and whenever the cloud is back."""
        num_failures = 0
        while True:
            wait_s = min(TRUST_RETRY_S * 2.0**num_failures, TRUST_EVERY_S) if self.trust.error else TRUST_EVERY_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._trust_is_wanted.wait(), wait_s)
            self._trust_is_wanted.clear()
            known = self.trust.error.code if self.trust.error else None
            try:
                await asyncio.to_thread(self.trust.refresh)
                num_failures = 0
            except ForeshoreError as error:
                num_failures = min(num_failures + 1, 10)
                if error.code not in {known, MetadataUnavailableError.code}:
                    self.outbox.add("alarm", {"code": error.code, "message": str(error)})
            if known != (self.trust.error.code if self.trust.error else None):
                self._soon()

    def _mend_trust(self) -> None:
        """After a failed refresh: do not wait for the next regular one."""
        if self.trust.error is not None:
            self._trust_is_wanted.set()

    async def _take_bundle(self, bundle: Bundle) -> None:
        """Install what the inbox holds, proven once more; afterwards the inbox is empty, however it ended."""
        last = self.desired.generation if self.desired else 0
        try:
            proven = await asyncio.to_thread(prove, bundle, self.trust, self.identity, last)
            await self._wish(proven.assignment)
            while any(update.state.is_working for update in self.updates.values()):  # noqa: ASYNC110 - they have no event
                await asyncio.sleep(TICK_S)
        except ForeshoreError as error:
            self._complain(error)
        await asyncio.to_thread(shutil.rmtree, self.home.inbox, ignore_errors=True)
        self._supply.bundle = None

    async def _renewed(self) -> None:
        """There is newer trusted metadata: take up what waited for it."""
        if self._unproven is not None:
            await self._wish(self._unproven)
        for update in list(self.updates.values()):
            await update.handle(TrustRenewed())

    def _complain(self, error: ForeshoreError) -> None:
        self.error = said(error)
        self.outbox.add("alarm", {"code": error.code, "message": str(error)})
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

    def _on_connected(self, is_connected: bool) -> None:
        if is_connected:
            self._publish("status", Status(online=True, boot_epoch=self.boot_epoch).to_bytes(), retain=True)
            self._sent_at.clear()
            self._trust_is_wanted.set()
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

    async def _send_events(self) -> None:
        """Send what the outbox holds; a disk that stalls holds up this task alone."""
        while True:
            await asyncio.sleep(TICK_S)
            if not self.is_online:
                continue
            for event_id, payload in await asyncio.to_thread(self.outbox.oldest):
                now = time.monotonic()
                if now - self._sent_at.get(event_id, -RESEND_S) >= RESEND_S and self._publish("event", payload):
                    self._sent_at[event_id] = now

    def _held(self) -> set[str]:
        held = set[str]().union(*(update.state.held() for update in self.updates.values()))
        return held | self._supply.held()

    def _send_need(self, need: Need) -> bool:
        return self._publish("need", need.to_bytes())

    def _publish(self, leaf: str, payload: bytes, *, retain: bool = False) -> bool:
        return self.control.publish(self._topic(leaf), payload, retain=retain)

    def _topic(self, leaf: str) -> str:
        return topics.device(self.identity.tenant, self.identity.device_id, leaf)


def said(error: ForeshoreError) -> str:
    """An error as a report carries it."""
    return f"{error.code}: {error}"[:2000]
