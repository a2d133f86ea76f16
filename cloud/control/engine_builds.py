"""Engines: built once per artefact and hardware key, where that hardware is, and shared with every device of the key.

    queued -> building -> awaiting_signature -> proving -> shared           (or failed, after `MAX_ATTEMPTS`)

A build is wanted as soon as a device of a key runs an artefact that an engine can be built from. Whoever has the
hardware leases it: a device of the key, or a builder that names keys. One lease at a time; a lease that ends, an
attempt that takes too long, another key or damaged bytes end the attempt with its reason, and it is queued again. What
was built is offered to the publishers: only an engine that stands in a signed list is handed out, and that one first to
a single device, which proves it by golden inputs before the others get it. This process never opens an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud.control import audit
from cloud.control.database import Database, announce
from cloud.control.engine_views import shown
from cloud.control.identity import Principal, Role, new_id
from cloud.control.placement import hardware_of, read_facts
from cloud.control.tables import Device, DeviceFact, EngineBuildRow
from cloud.control.trust import Trust, listed_in
from model_registry import catalogue
from model_registry.blobs import BlobStore
from model_registry.compatibility import key_of, resolve_build
from model_registry.compatibility.hardware_key import parse_key
from model_registry.engine_faults import ENGINE_FAULTS
from model_registry.manifest import EngineBuild
from model_registry.trust.repository import Repository
from model_registry.trust.roles import release_path
from wire.errors import ConflictError, IntegrityError, NotFoundError
from wire.messages import Phase, Reported

LEASE_S = 30.0
MAX_BUILD_S = 3600.0
MAX_ATTEMPTS = 3
MAX_HISTORY = 20
MAX_KNOWN = 100_000
SYSTEM = "engine-builds"
BUILD_STOPPED = "build_stopped"


class EngineBuilds:
    """The engine builds of all tenants."""

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        trust: Trust,
        *,
        lease_s: float = LEASE_S,
        max_build_s: float = MAX_BUILD_S,
    ) -> None:
        self.lease_s, self.max_build_s = lease_s, max_build_s
        self._database, self._blobs, self._trust = database, blobs, trust
        self._known: set[tuple[str, str, str]] = set()  # tenant, manifest, key that need no further look

    # what devices want

    def hear_report(self, tenant: str, device_id: str, reported: Reported) -> None:
        """Want an engine for each artefact that a device of a key runs and that one can be built from."""
        key = key_of(reported.hardware)
        if key is None:
            return
        for model in reported.models:
            wanted = (tenant, model.active_manifest or "", str(key))
            if model.active_manifest is None or model.phase is not Phase.COMMITTED or wanted in self._known:
                continue
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known.add(wanted)
            try:
                verdict = resolve_build(read_facts(self._blobs, model.active_manifest), reported.hardware)
            except NotFoundError:
                continue
            if verdict.will_run:
                self._want(tenant, model.name, model.active_manifest, str(key), device_id)

    def _want(self, tenant: str, model: str, manifest: str, key: str, device_id: str) -> None:
        now = datetime.now(UTC)
        with self._database.write() as session:
            known = select(EngineBuildRow.build_id).filter_by(tenant=tenant, manifest=manifest, hardware_key=key)
            if session.scalar(known) is not None or catalogue.find_artefact(session, tenant, manifest) is None:
                return
            row = EngineBuildRow(
                build_id=new_id("eng"), tenant=tenant, model=model, manifest=manifest, hardware_key=key,
                state="queued", attempts=0, history=[], created_at=now, updated_at=now,
                reason=f"wanted by {device_id}",
            )  # fmt: skip
            session.add(row)
            _tell(session, row)

    # building

    def lease(self, by: Principal, keys: Sequence[str]) -> dict[str, Any] | None:
        """The oldest build that the caller can do, now its own. A device's key is what it reported, not what it says
        here, and it builds only what it runs itself; a builder names its keys.
        """
        holder, now = _holder(by), datetime.now(UTC)
        with self._database.read() as session:
            queued = session.scalar(select(EngineBuildRow.build_id).where(EngineBuildRow.state == "queued").limit(1))
        if queued is None:
            return None
        with self._database.write() as session:
            query = select(EngineBuildRow).where(EngineBuildRow.state == "queued")
            if by.role is Role.DEVICE:
                device = _device(session, by)
                own = key_of(hardware_of(device.hardware or {}))
                running = [one.get("active_manifest") for one in (device.reported or {}).get("models", [])]
                query = query.where(EngineBuildRow.tenant == by.tenant, EngineBuildRow.hardware_key == str(own))
                query = query.where(EngineBuildRow.manifest.in_([one for one in running if one]))
            else:
                query = query.where(EngineBuildRow.hardware_key.in_([str(one) for one in map(parse_key, keys) if one]))
            rows = session.scalars(query.order_by(EngineBuildRow.created_at, EngineBuildRow.build_id)).all()
            row = next((one for one in rows if not self._should_wait(session, one, holder)), None)
            if row is None:
                return None
            row.state, row.holder, row.lease_id, row.begun_at = "building", holder, new_id("lea"), now
            row.lease_expires_at, row.updated_at = now + timedelta(seconds=self.lease_s), now
            row.attempts += 1
            row.reason = f"{holder} builds it"
            _tell(session, row)
            return {
                "build_id": row.build_id, "lease_id": row.lease_id, "lease_s": self.lease_s, "tenant": row.tenant,
                "limit_s": self.max_build_s, "model": row.model, "manifest": row.manifest,
                "hardware_key": row.hardware_key,
            }  # fmt: skip

    def heartbeat(self, by: Principal, build_id: str, lease_id: str) -> None:
        """Keep the lease; `ConflictError` when it is lost."""
        with self._database.write() as session:
            row = _leased(session, by, build_id, lease_id)
            row.lease_expires_at = datetime.now(UTC) + timedelta(seconds=self.lease_s)

    def check_lease(self, by: Principal, build_id: str, lease_id: str) -> None:
        """Raise `ConflictError` unless the caller has the lease to build."""
        with self._database.read() as session:
            _leased(session, by, build_id, lease_id, state="building")

    def complete(self, by: Principal, build_id: str, lease_id: str, *, hardware_key: str, engine: str) -> None:
        """Take an uploaded engine in, and offer it to the publishers. Another key's ends the attempt."""
        key = parse_key(hardware_key)
        size = self._blobs.find_size(engine)
        with self._database.write() as session:
            row = _leased(session, by, build_id, lease_id, state="building")
            if key is None or hardware_key != row.hardware_key:
                self._end_attempt(session, row, "wrong_key", f"an engine for {hardware_key} was handed in")
            elif not size:
                raise IntegrityError(f"engine {engine[:12]} is not stored", remedy="upload it first")
            else:
                built = EngineBuild(
                    tenant=row.tenant, name=row.model, manifest=row.manifest, hardware_key=row.hardware_key,
                    builder="tensorrt-rtx" if key.builder == "tensorrt-rtx" else "tensorrt",
                    builder_version=key.version, engine=engine, size_bytes=size, built_by=row.holder or "",
                    built_at=datetime.now(UTC).isoformat(timespec="seconds"),
                )  # fmt: skip
                row.state, row.built_by, row.reason = "awaiting_signature", row.holder, "waits for a publisher"
                row.document, row.document_digest = built.to_bytes(), built.digest
                _free(row)
                catalogue.add_references(session, row.tenant, row.build_id, [engine])
                _record(session, row, "engine.built", {"engine": engine, "by": row.built_by})
            refused = row.state != "awaiting_signature"
            _tell(session, row)
        if refused:
            raise IntegrityError(f"the lease was for {row.hardware_key}", remedy="build for the key that was leased")

    def fail(self, by: Principal, build_id: str, lease_id: str, *, code: str, reason: str) -> None:
        """A builder says that it could not; somebody else may try."""
        with self._database.write() as session:
            row = _leased(session, by, build_id, lease_id)
            self._end_attempt(session, row, code, reason)

    # signing

    def sign(self, by: Principal, build_id: str, role: str, metadata: bytes) -> dict[str, Any]:
        """Take in a publisher's list with the engine on it."""
        with self._database.write() as session:
            row = _get(session, by.tenant, build_id)
            if row.state != "awaiting_signature" or row.document is None:
                raise ConflictError(f"the engine build is {row.state}", remedy="sign while it awaits the signature")
            entry = listed_in(role, metadata).targets.get(release_path(row.model, row.document_digest or ""))
            if entry is None or entry.length != len(row.document) or entry.hashes.get("sha256") != row.document_digest:
                raise IntegrityError("another engine was signed", remedy="list the bytes that the build offers")
            self._trust.submit_in(session, by, role, metadata)
            audit.record(
                session, tenant=by.tenant, actor=by.subject, action="engine.sign", subject=row.build_id,
                details={"document": row.document_digest, "role": role},
            )  # fmt: skip
            return shown(row)

    def hear_trust(self, session: Session, tenant: str, repository: Repository) -> None:
        """New metadata is current: engines that it lists may be proven."""
        waiting = select(EngineBuildRow).filter_by(tenant=tenant, state="awaiting_signature")
        for row in session.scalars(waiting):
            if repository.find_release(row.model, row.document_digest or "") is not None:
                row.state, row.reason, row.updated_at = "proving", "the first device tries it", datetime.now(UTC)
                _record(session, row, "engine.listed", {"document": row.document_digest})
                _tell(session, row)

    # sharing

    def offer(self, by: Principal, manifest: str) -> dict[str, Any] | None:
        """The signed engine for the device's key; while it is unproven, for one device, with a lease to prove it."""
        now = datetime.now(UTC)
        with self._database.write() as session:
            own = key_of(hardware_of(_device(session, by).hardware or {}))
            if catalogue.find_artefact(session, by.tenant, manifest) is None:
                raise NotFoundError(f"manifest {manifest[:12]} is of no release", remedy="see: foreshore models")
            query = select(EngineBuildRow).filter_by(tenant=by.tenant, manifest=manifest, hardware_key=str(own))
            row = session.scalar(query)
            if row is None or row.state not in ("proving", "shared") or row.document is None:
                return None
            if row.state == "proving":
                if row.lease_id is not None or self._should_wait(session, row, _holder(by), row.built_by):
                    return None
                row.lease_id, row.holder, row.begun_at = new_id("lea"), _holder(by), now
                row.lease_expires_at = now + timedelta(seconds=self.lease_s)
            return {
                "build_id": row.build_id, "document": row.document, "digest": row.document_digest,
                "lease_id": row.lease_id, "lease_s": self.lease_s,
            }  # fmt: skip

    def prove(self, by: Principal, build_id: str, lease_id: str, *, code: str | None, reason: str) -> None:
        """The first device says how the golden inputs went: shared with every device of the key, or built again."""
        with self._database.write() as session:
            row = _leased(session, by, build_id, lease_id, state="proving")
            if code is not None:
                self._end_attempt(session, row, code, reason)
                return
            row.state, row.reason = "shared", f"proven by {row.holder}"
            _record(session, row, "engine.shared", {"engine_document": row.document_digest, "by": row.holder})
            _free(row)
            _tell(session, row)

    # the clock, and looking

    def tick(self) -> None:
        """End leases that ran out and attempts that take too long."""
        now = datetime.now(UTC)
        leased = select(EngineBuildRow.build_id).where(EngineBuildRow.lease_id.is_not(None))
        with self._database.read() as session:
            build_ids = session.scalars(leased).all()
        for build_id in build_ids:
            with self._database.write() as session:
                row = session.get(EngineBuildRow, build_id)
                if row is None or row.lease_id is None or row.begun_at is None:
                    continue
                if (row.lease_expires_at or now) < now:
                    self._end_attempt(session, row, "builder_lost", f"{row.holder} fell silent")
                elif (now - row.begun_at).total_seconds() > self.max_build_s:
                    self._end_attempt(session, row, "timed_out", f"took more than {self.max_build_s:g} s")

    def newest(self, tenant: str, *, limit: int, offset: int) -> list[dict[str, Any]]:
        """Engine builds, newest first."""
        query = select(EngineBuildRow).filter_by(tenant=tenant).order_by(EngineBuildRow.created_at.desc())
        with self._database.read() as session:
            return [shown(row) for row in session.scalars(query.limit(limit).offset(offset))]

    def get(self, tenant: str, build_id: str) -> dict[str, Any]:
        """One engine build with the bytes to sign."""
        with self._database.read() as session:
            return shown(_get(session, tenant, build_id))

    # inside one transaction

    def _end_attempt(self, session: Session, row: EngineBuildRow, code: str, reason: str) -> None:
        """An attempt came to nothing: the engine it made, if any, is taken back, and it is queued again, or failed."""
        now = datetime.now(UTC)
        is_of_the_device = row.state == "proving" and code not in ENGINE_FAULTS
        ended = {"who": row.holder, "state": row.state, "code": code, "reason": reason[:2000], "at": now.isoformat()}
        row.history = [*row.history, ended][-MAX_HISTORY:]
        row.reason, row.updated_at = f"{code}: {reason}"[:2000], now
        row.attempts -= int(code == BUILD_STOPPED)  # it had better things to do: that says nothing against the build
        _record(session, row, "engine.attempt_failed", {"code": code, "reason": reason[:500], "by": row.holder})
        if not is_of_the_device:
            row.document = row.document_digest = None
            catalogue.remove_references(session, row.tenant, row.build_id)
            row.state = "queued" if row.attempts < MAX_ATTEMPTS else "failed"
        elif len(row.history) >= MAX_HISTORY:  # else another device tries it: nothing was said about the engine
            row.state = "failed"
        _free(row)
        _tell(session, row)

    def _should_wait(self, session: Session, row: EngineBuildRow, holder: str, last: str | None = None) -> bool:
        """Who failed at this (or is `last`, whose work is to be proven) gives way to others of the key."""
        before = {one["who"] for one in row.history} | ({last} if last else set())
        if holder not in before:
            return False
        is_same = (DeviceFact.tenant == Device.tenant) & (DeviceFact.device_id == Device.device_id)
        query = select(Device).join(DeviceFact, is_same)
        query = query.where(DeviceFact.name == "key", DeviceFact.value == row.hardware_key)
        query = query.where(Device.tenant == row.tenant, Device.revoked_at.is_(None), Device.online.is_(True))
        others = (one for one in session.scalars(query) if f"device:{one.device_id}" not in before)
        return any(_runs(one, row.manifest) for one in others)


def _runs(device: Device, manifest: str) -> bool:
    return any(one.get("active_manifest") == manifest for one in (device.reported or {}).get("models", []))


def _holder(by: Principal) -> str:
    return f"device:{by.device_id}" if by.role is Role.DEVICE else f"builder:{by.subject}"


def _device(session: Session, by: Principal) -> Device:
    device = session.get(Device, (by.tenant, by.device_id or ""))
    if device is None or device.revoked_at is not None:
        raise NotFoundError(f"device {by.device_id!r} is not enrolled", remedy="enrol it again")
    return device


def _get(session: Session, tenant: str | None, build_id: str) -> EngineBuildRow:
    row = session.get(EngineBuildRow, build_id)
    if row is None or (tenant is not None and row.tenant != tenant):
        raise NotFoundError(f"engine build {build_id!r} does not exist", remedy="see: foreshore engines")
    return row


def _leased(
    session: Session, by: Principal, build_id: str, lease_id: str, *, state: str | None = None
) -> EngineBuildRow:
    row = _get(session, by.tenant if by.role is Role.DEVICE else None, build_id)
    now = datetime.now(UTC)
    is_held = row.lease_id == lease_id and row.holder == _holder(by) and (row.lease_expires_at or now) >= now
    if not is_held or (state is not None and row.state != state):
        raise ConflictError(f"the lease of engine build {build_id} is lost", remedy="stop working on it")
    return row


def _free(row: EngineBuildRow) -> None:
    row.lease_id = row.lease_expires_at = row.holder = row.begun_at = None
    row.updated_at = datetime.now(UTC)


def _record(session: Session, row: EngineBuildRow, action: str, details: dict[str, Any]) -> None:
    audit.record(
        session, tenant=row.tenant, actor=row.holder or SYSTEM, action=action, subject=row.build_id,
        details={"model": row.model, "hardware_key": row.hardware_key, **details},
    )  # fmt: skip


def _tell(session: Session, row: EngineBuildRow) -> None:
    session.flush()
    announce(session, "engine", row.tenant, shown(row))
