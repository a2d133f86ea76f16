"""The control plane as one object: every part made once, wired, started and stopped in order. No HTTP here."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from cloud.control import audit
from cloud.control.audit_chain import Verdict
from cloud.control.authority import CONTROL_USER, Authority, Issued
from cloud.control.broker import Broker, DeviceAccess, client_context
from cloud.control.certificates import Holder
from cloud.control.database import Database, after_commit, announce
from cloud.control.decisions import Decisions
from cloud.control.decisions import add as add_decision
from cloud.control.delivery import Delivery
from cloud.control.engine_builds import EngineBuilds
from cloud.control.events import EventBus
from cloud.control.fleet import Fleet
from cloud.control.guesses import Guesses
from cloud.control.identity import SYSTEM, Identity, Principal, Role
from cloud.control.jobs import Jobs
from cloud.control.link import Link
from cloud.control.publications import Publications
from cloud.control.rollouts import Rollouts
from cloud.control.settings import Settings
from cloud.control.tables import DeviceEvent, Setting
from cloud.control.trust import OnlineKeys, Trust
from cloud.control.webhooks import Webhooks
from model_registry import catalogue
from model_registry.blobs import open_blob_store
from model_registry.trust.keys import create_key, load_key
from wire import decision
from wire.errors import ForeshoreError, InvalidInputError
from wire.messages import Event, Need, Reported, Status, parse
from wire.process import free_port, replace_durably
from wire.topics import check_name, mqtt_user

SERVICE_TOKENS = {"admin": Role.ADMIN, "worker": Role.WORKER, "gateway": Role.GATEWAY}

log = logging.getLogger(__name__)


class ControlPlane:
    """Owns the parts; `start` brings them up, `stop` takes them down."""

    def __init__(self, settings: Settings) -> None:
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.settings = settings
        self.bus = EventBus()
        self.database = Database(settings.database, self.bus)
        self.database.upgrade()
        catalogue.upgrade(self.database.engine)
        self.blobs = open_blob_store(settings.blobs)
        self.trust = Trust(self.database, OnlineKeys(settings.home / "keys"))
        secret_file = settings.home / "keys" / "client-ids.pem"
        self._client_secret = load_key(secret_file) if secret_file.exists() else create_key(secret_file)
        self.authority = Authority(settings.home / "pki", settings.device_lifetime)
        self.identity = Identity(self.database, self.authority)
        self.guesses = Guesses(time.monotonic)
        self.fleet = Fleet(self.database, self.trust.director, self._send_desired)
        self.decisions = Decisions(self.database)
        self.rollouts = Rollouts(self.database, self.fleet, self.blobs)
        self.webhooks = Webhooks(self.database)
        self.jobs = Jobs(self.database, self.blobs, lease_s=settings.lease_s)
        self.publications = Publications(
            self.database, self.blobs, self.jobs, self.trust, lambda name: find_target(settings, name)
        )
        self.engine_builds = EngineBuilds(
            self.database, self.blobs, self.trust,
            lease_s=settings.engine_lease_s, max_build_s=settings.engine_limit_s,
        )  # fmt: skip
        self.trust.on_accepted(self.publications.hear_trust)
        self.trust.on_accepted(self.engine_builds.hear_trust)
        self.trust.on_accepted(lambda session, *_: after_commit(session, self.fleet.republish))
        self.mqtt_host = settings.broker_host or settings.advertise_host
        self.mqtt_port = settings.broker_port if settings.broker_host else (settings.mqtt_port or free_port())
        self.broker = None if settings.broker_host else self._make_broker()
        self.link = self._make_link()
        self.delivery = Delivery(self.database, self.blobs, self.link.send_bulk)
        self._is_stopping = threading.Event()
        self._clock = threading.Thread(target=self._tick, name="control-clock", daemon=True)

    def start(self) -> None:
        """Bring everything up; returns when the broker listens."""
        self._write_service_tokens()
        self.authority.revoke(self.identity.certificates.revoked())
        if self.broker is not None:
            self.broker.start(self._access())
        self.link.start()
        self.delivery.start()
        self.rollouts.catch_up()
        self.webhooks.start()
        self._clock.start()

    def stop(self) -> None:
        """Take everything down, in the other order."""
        self._is_stopping.set()
        if self._clock.is_alive():
            self._clock.join(10.0)
        self.webhooks.stop()
        self.delivery.stop()
        self.link.stop()
        if self.broker is not None:
            self.broker.stop()
        self.database.dispose()

    def server_certificate(self) -> tuple[Path, Path]:
        """Certificate and key files for what devices talk to: the broker and their HTTPS port."""
        settings = self.settings
        return self.authority.ensure_server([settings.device_host, "localhost", settings.advertise_host])

    @property
    def device_url(self) -> str | None:
        """Where devices reach this API with their certificates; None when there is no such port."""
        settings = self.settings
        return f"https://{settings.advertise_host}:{settings.device_port}" if settings.device_port else None

    def client_id(self, tenant: str, device_id: str) -> str:
        """The MQTT client id of a device. Nobody else can know it: whoever connects with it takes the session over."""
        user = mqtt_user(tenant, device_id)
        secret = hashlib.sha256(self._client_secret.private_bytes_raw() + b"foreshore mqtt client id").digest()
        return f"{user}-{hmac.new(secret, user.encode(), hashlib.sha256).hexdigest()[:32]}"

    def renew_certificate(self, holder: Holder, csr_pem: str) -> Issued:
        """A second certificate for a device; the broker learns which ones have died."""
        issued = self.identity.certificates.renew(holder, csr_pem)
        self.refresh_access()
        return issued

    def confirm_certificate(self, holder: Holder) -> None:
        """A device shows its new certificate: the old one dies, at the broker too."""
        if self.identity.certificates.confirm(holder):
            self.refresh_access()

    def refresh_access(self) -> None:
        """Have the broker know who may use it now, and whose certificates it must refuse."""
        self.authority.revoke(self.identity.certificates.revoked())
        if self.broker is not None:
            self.broker.allow(self._access())

    def revoke(self, by: Principal, device_id: str) -> None:
        """Take a device out of the fleet: token, certificates, access, connections, documents, running rollouts."""
        self.identity.revoke_device(by, device_id)
        self.refresh_access()
        client_id = self.client_id(by.tenant, device_id)
        self.link.cut_off([client_id, f"{client_id}.bulk"])
        self.link.clear_retained(by.tenant, device_id)
        self.rollouts.remove_device(by.tenant, device_id)

    def hear(self, tenant: str, device_id: str, leaf: str, payload: bytes) -> None:
        """A message of a device."""
        if leaf == "reported":
            reported = parse(Reported, payload)
            if self.fleet.store_report(tenant, device_id, reported):
                self.rollouts.hear_report(tenant, device_id, reported)
            self.engine_builds.hear_report(tenant, device_id, reported)
        elif leaf == "status":
            self.fleet.store_status(tenant, device_id, parse(Status, payload))
        elif leaf == "need":
            self.delivery.hear_need(tenant, device_id, parse(Need, payload))
        elif leaf == "event":
            event = parse(Event, payload)
            self.store_event(tenant, device_id, event)
            ack = json.dumps({"event_ids": [event.event_id]}).encode()
            self.link.send_command(tenant, device_id, "ack", ack)

    def store_event(self, tenant: str, device_id: str, event: Event) -> None:
        """Keep a piece of telemetry once, however often it is delivered."""
        with self.database.write() as session:
            if session.get(DeviceEvent, (tenant, device_id, event.event_id)) is not None:
                return
            session.add(
                DeviceEvent(
                    tenant=tenant, device_id=device_id, event_id=event.event_id, kind=event.kind,
                    at=event.at if event.at.tzinfo else event.at.replace(tzinfo=UTC),
                    stored_at=datetime.now(UTC), body=event.body,
                )
            )  # fmt: skip
            if event.kind == "decision":
                try:
                    add_decision(session, tenant, f"device:{device_id}", decision.from_dict(event.body))
                except InvalidInputError as error:
                    log.warning("decision of %s was refused: %s", device_id, error)
            announce(session, "telemetry", tenant, {"device_id": device_id, "kind": event.kind})

    def _send_desired(self, tenant: str, device_id: str, envelope: bytes) -> None:
        self.link.send_desired(tenant, device_id, envelope)

    def _access(self) -> list[DeviceAccess]:
        return [DeviceAccess(tenant, device_id) for tenant, device_id in self.fleet.all_access()]

    def _make_broker(self) -> Broker:
        return Broker(
            self.settings.home / "mosquitto",
            self.authority,
            host=self.settings.device_host,
            port=self.mqtt_port,
            advertised=[self.settings.advertise_host],
        )

    def _make_link(self) -> Link:
        certificate, key = self.authority.ensure_client(CONTROL_USER)
        context = client_context(self.authority.ca_file, certificate, key)
        host = self.settings.broker_host or self.settings.device_host
        return Link(
            host, self.mqtt_port, context, epoch=self._next_epoch(), hear=self.hear, republish=self.fleet.republish
        )

    def _next_epoch(self) -> int:
        with self.database.write() as session:
            row = session.get(Setting, "epoch") or Setting(key="epoch", value="0")
            row.value = str(int(row.value) + 1)
            session.add(row)
            return int(row.value)

    def _write_service_tokens(self) -> None:
        folder = self.settings.home / "tokens"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        for name, role in SERVICE_TOKENS.items():
            path = folder / name
            if path.exists() and self.identity.find_principal(path.read_text().strip()) is not None:
                continue
            _, secret = self.identity.create_token(SYSTEM, name=name, role=role)
            replace_durably(path, secret.encode(), mode=0o600)

    def _tick(self) -> None:
        parts: Mapping[str, Callable[[], None]] = {
            "jobs": self.jobs.tick, "rollouts": self.rollouts.tick, "publications": self.publications.tick,
            "trust": self.trust.tick, "engines": self.engine_builds.tick,
        }  # fmt: skip
        while not self._is_stopping.wait(self.settings.tick_s):
            for name, tick in parts.items():
                try:
                    tick()
                except ForeshoreError as error:
                    log.warning("%s: %s", name, error)
                except Exception:
                    log.exception("%s: the clock's turn failed", name)

    def verify_audit(self, tenant: str) -> Verdict:
        """Check a tenant's audit chain."""
        with self.database.read() as session:
            return audit.verify(session, tenant)


def find_target(settings: Settings, name: str) -> Mapping[str, Any]:
    """The content of a target's file. Raises `InvalidInputError` with the names that exist."""
    folder = settings.config_folder / "targets"
    path = folder / f"{check_name('target', name)}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in folder.glob("*.yaml"))) or "none"
        raise InvalidInputError(f"target {name!r} is unknown", remedy=f"known targets: {known}")
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise InvalidInputError(f"target file {path.name} is not a mapping", remedy="mend the file")
    return {"name": name, **content}
