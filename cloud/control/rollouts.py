"""The shell around the rollout engine: one transaction per event, with the version it read, so that nothing is lost.

The engine's state and the wishes it causes are committed together; what is sent afterwards is sent again after a
restart, so a kill at any point leaves a rollout that goes on. Which artefact a device gets is decided once, when the
rollout is made; devices that cannot run the release are skipped with the reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud.control import audit, decisions, rollout
from cloud.control.database import Database, announce
from cloud.control.fleet import Fleet, members
from cloud.control.identity import Principal, new_id
from cloud.control.rollout import Explain, Gate, Offer, State, Status, Withdraw
from cloud.control.tables import Device, RolloutRow
from model_registry import catalogue
from model_registry.blobs import BlobStore
from model_registry.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from model_registry.tables import ArtefactRow, ReleaseRow
from wire.decision import Candidate, Input, decide
from wire.errors import ConflictError, InvalidInputError, NotFoundError
from wire.messages import DesiredModel, ModelState, Phase, Reported, Result

RUNNING = (Status.RUNNING.value, Status.PAUSED.value, Status.ROLLING_BACK.value)
MAX_TIMEOUT_S = 30 * 24 * 3600


@dataclass(frozen=True)
class Order:
    """What a person asked for."""

    release: str
    group: str = "all"
    waves: Sequence[Mapping[str, float]] = ()
    gate: Gate = field(default_factory=Gate)
    soak_s: float = 0.0
    device_timeout_s: float = 600.0


class Rollouts:
    """The rollouts of all tenants."""

    def __init__(self, database: Database, fleet: Fleet, blobs: BlobStore) -> None:
        self._database = database
        self._fleet = fleet
        self._blobs = blobs

    def create(self, by: Principal, order: Order, *, start: bool) -> dict[str, Any]:
        """Plan a rollout and, if wanted, start it."""
        _check(order)
        with self._database.write() as session:
            release = catalogue.get_release(session, order.release)
            if release.tenant != by.tenant:
                raise NotFoundError(f"release {order.release[:12]} is not in the catalogue", remedy="foreshore models")
            self._refuse_second(session, release)
            devices = sorted(members(session, by.tenant, order.group), key=lambda d: (not d.online, d.device_id))
            chosen, skipped = self._place(release, devices)
            state = rollout.new(
                rollout.plan_waves(list(chosen), order.waves), order.gate, order.device_timeout_s, skipped
            )
            now = datetime.now(UTC)
            row = RolloutRow(
                rollout_id=new_id("rol"),
                tenant=by.tenant,
                model=release.name,
                model_version=release.version,
                release=release.digest,
                group=order.group,
                status=state.status.value,
                order=_order_document(order),
                state=state.to_dict(),
                offers={name: {"model": self._model(release, a, order), "before": None} for name, a in chosen.items()},
                reason="",
                created_by=by.subject,
                created_at=now,
                updated_at=now,
            )
            session.add(row)
            audit.record(
                session, tenant=by.tenant, actor=by.subject, action="rollout.create", subject=row.rollout_id,
                details={"release": release.digest, "group": order.group, "devices": len(chosen)},
            )  # fmt: skip
            if start:
                self._apply(session, row, rollout.Started(time.time()))
            announce(session, "rollout", row.tenant, summary(row))
            return details(row)

    def steer(self, by: Principal, rollout_id: str, order: str, reason: str = "") -> dict[str, Any]:
        """A person's order: start, pause, resume, halt or rollback."""
        now = time.time()
        events: dict[str, rollout.Event] = {
            "start": rollout.Started(now),
            "resume": rollout.Started(now),
            "pause": rollout.Paused(),
            "halt": rollout.Halted(reason or f"halted by {by.subject}"),
            "rollback": rollout.RollBack(now, reason or f"rolled back by {by.subject}"),
        }
        if order not in events:
            raise NotFoundError(f"a rollout cannot {order!r}", remedy=f"one of {', '.join(events)}")
        with self._database.write() as session:
            row = _get(session, by.tenant, rollout_id)
            if order in ("start", "resume") and row.status != ("draft" if order == "start" else "paused"):
                wanted = "a draft" if order == "start" else "paused"
                raise ConflictError(f"the rollout is {row.status}", remedy=f"{order} works while it is {wanted}")
            self._apply(session, row, events[order])
            audit.record(
                session, tenant=by.tenant, actor=by.subject, action=f"rollout.{order}", subject=rollout_id,
                details={"reason": reason} if reason else {},
            )  # fmt: skip
            return details(row)

    def hear_report(self, tenant: str, device_id: str, reported: Reported) -> None:
        """Let every running rollout of this device know what the device reports."""
        by_name = {model.name: model for model in reported.models}
        for rollout_id in self._running(tenant):
            with self._database.write() as session:
                row = session.get(RolloutRow, rollout_id)
                if row is None or row.status not in RUNNING or device_id not in row.offers:
                    continue
                event = _heard(row, device_id, by_name.get(row.model), reported)
                if event is not None:
                    self._apply(session, row, event)

    def remove_device(self, tenant: str, device_id: str) -> None:
        """A device left the fleet."""
        for rollout_id in self._running(tenant):
            with self._database.write() as session:
                row = session.get(RolloutRow, rollout_id)
                if row is not None and device_id in row.offers:
                    self._apply(session, row, rollout.Removed(device_id, time.time()))

    def tick(self) -> None:
        """Time passed: let deadlines count."""
        now = time.time()
        for rollout_id in self._running(None):
            with self._database.write() as session:
                row = session.get(RolloutRow, rollout_id)
                if row is not None and row.status in RUNNING:
                    self._apply(session, row, rollout.Ticked(now))

    def newest(self, tenant: str, *, limit: int = 100, offset: int = 0) -> list[dict[str, Any]]:
        """Rollouts, newest first."""
        query = select(RolloutRow).where(RolloutRow.tenant == tenant).order_by(RolloutRow.created_at.desc())
        with self._database.read() as session:
            return [summary(row) for row in session.scalars(query.limit(limit).offset(offset))]

    def get(self, tenant: str, rollout_id: str) -> dict[str, Any]:
        """One rollout with its waves and devices."""
        with self._database.read() as session:
            return details(_get(session, tenant, rollout_id))

    # inside one transaction

    def _apply(self, session: Session, row: RolloutRow, event: rollout.Event) -> None:
        before = rollout.from_dict(row.state)
        after, actions = rollout.step(before, event)
        if after == before and not actions:
            return
        row.state, row.status, row.reason = after.to_dict(), after.status.value, after.reason
        row.updated_at = datetime.now(UTC)
        for action in actions:
            if isinstance(action, Offer):
                self._offer(session, row, action.device_ids)
            elif isinstance(action, Withdraw):
                self._withdraw(session, row, action.device_ids)
            else:
                self._explain(session, row, after, action)
        if after.status is not before.status:
            audit.record(
                session, tenant=row.tenant, actor="rollout-engine", action=f"rollout.{after.status}",
                subject=row.rollout_id, details={"reason": after.reason} if after.reason else {},
            )  # fmt: skip
        announce(session, "rollout", row.tenant, summary(row))

    def _offer(self, session: Session, row: RolloutRow, device_ids: Sequence[str]) -> None:
        offers = dict(row.offers)
        for device_id in device_ids:
            device = session.get(Device, (row.tenant, device_id))
            if device is None or device.revoked_at is not None:
                continue
            before = next((one for one in device.desired_models if one["name"] == row.model), None)
            attempts = dict(device.attempts)
            attempts[row.release] = attempts.get(row.release, 0) + 1
            device.attempts = attempts
            document = {
                **offers[device_id]["model"],
                "rollout_id": row.rollout_id,
                "attempt": attempts[row.release] - 1,
            }
            generation = self._fleet.change_wish(session, device, row.model, DesiredModel.model_validate(document))
            offers[device_id] = {"model": document, "before": before, "generation": generation}
        row.offers = offers

    def _withdraw(self, session: Session, row: RolloutRow, device_ids: Sequence[str]) -> None:
        offers = dict(row.offers)
        for device_id in device_ids:
            device, offer = session.get(Device, (row.tenant, device_id)), offers[device_id]
            if device is None or device.revoked_at is not None or "generation" not in offer:
                continue
            now = next((one for one in device.desired_models if one["name"] == row.model), None)
            if now is None or now.get("rollout_id") != row.rollout_id:
                continue  # a later rollout has its own wish here
            model = DesiredModel.model_validate(offer["before"]) if offer["before"] else None
            generation = self._fleet.change_wish(session, device, row.model, model)
            offers[device_id] = {**offer, "withdrawn_generation": generation}
        row.offers = offers

    def _explain(self, session: Session, row: RolloutRow, state: State, action: Explain) -> None:
        counted = rollout.counts(state.devices.values())
        record = decide(
            decision_id=new_id("dec"),
            kind="rollout",
            policy="rollout-gate/1",
            config=row.order,
            decided_at=datetime.now(UTC).isoformat(),
            inputs={
                **{f"num_{name}": Input(count) for name, count in sorted(counted.items())},
                "wave": Input(state.wave + 1),
                "max_failures": Input(state.gate.max_failures),
                "min_success_ratio": Input(state.gate.min_success_ratio),
            },
            candidates=[Candidate("go on", excluded=(action.reason,)), Candidate("halt", terms={"risk": 0.0})],
            weights={"risk": 1.0},
            reason=f"Halted in wave {state.wave + 1} of {state.num_waves}: {action.reason}.",
            subject=row.rollout_id,
        )
        decisions.add(session, row.tenant, "control-plane", record)
        row.decision_id = record.decision_id

    def _place(self, release: ReleaseRow, devices: Sequence[Device]) -> tuple[dict[str, ArtefactRow], dict[str, str]]:
        """The artefact for each device that can run the release, and why the others cannot."""
        chosen: dict[str, ArtefactRow] = {}
        skipped: dict[str, str] = {}
        manifests: dict[str, Manifest] = {}
        for device in devices:
            targets = [str(one) for one in (device.hardware or {}).get("targets", [])]
            reasons = [] if targets else ["it has not said which targets it runs"]
            for artefact in catalogue.artefacts_for(release, targets):
                if artefact.manifest not in manifests:
                    data = self._blobs.get(artefact.manifest, max_bytes=MAX_MANIFEST_BYTES)
                    manifests[artefact.manifest] = parse_manifest(data, expected_digest=artefact.manifest)
                problem = find_obstacle(manifests[artefact.manifest], device.hardware or {})
                if problem is None:
                    chosen[device.device_id] = artefact
                    break
                reasons.append(f"{artefact.target}: {problem}")
            else:
                known = ", ".join(artefact.target for artefact in release.artefacts)
                skipped[device.device_id] = "; ".join(reasons) or f"no artefact for it; the release has {known}"
        return chosen, skipped

    @staticmethod
    def _model(release: ReleaseRow, artefact: ArtefactRow, order: Order) -> dict[str, Any]:
        model = DesiredModel(
            name=release.name,
            version=release.version,
            release=release.digest,
            manifest=artefact.manifest,
            manifest_bytes=artefact.manifest_bytes,
            target=artefact.target,
            soak_s=order.soak_s,
        )
        return model.model_dump(mode="json", exclude_none=True)

    @staticmethod
    def _refuse_second(session: Session, release: ReleaseRow) -> None:
        query = select(RolloutRow.rollout_id).where(
            RolloutRow.tenant == release.tenant, RolloutRow.model == release.name, RolloutRow.status.in_(RUNNING)
        )
        running = session.scalar(query.limit(1))
        if running is not None:
            raise ConflictError(
                f"rollout {running} of {release.name!r} is still under way", remedy="wait, halt it or roll it back"
            )

    def _running(self, tenant: str | None) -> Sequence[str]:
        query = select(RolloutRow.rollout_id).where(RolloutRow.status.in_(RUNNING)).order_by(RolloutRow.created_at)
        query = query if tenant is None else query.where(RolloutRow.tenant == tenant)
        with self._database.read() as session:
            return session.scalars(query).all()


def find_obstacle(manifest: Manifest, hardware: Mapping[str, Any]) -> str | None:
    """Why a device cannot run an artefact, by what it reports of itself; None when nothing speaks against it."""
    needs, budget = manifest.requires, int(hardware.get("memory_budget_bytes") or 0)
    if budget and needs.memory_bytes > budget:
        return f"needs {needs.memory_bytes >> 20} MiB of memory, the budget is {budget >> 20} MiB"
    disk = int(hardware.get("disk_free_bytes") or 0)
    if disk and needs.disk_bytes > disk:
        return f"needs {needs.disk_bytes >> 20} MiB of disk, {disk >> 20} MiB are free"
    architecture = str(hardware.get("architecture") or "")
    if architecture and needs.architectures and architecture not in needs.architectures:
        return f"is for {', '.join(needs.architectures)}, the device is {architecture}"
    missing = sorted(set(needs.cpu_features) - set(hardware.get("cpu_features") or ()))
    if missing and hardware.get("cpu_features"):
        return f"the processor lacks {', '.join(missing)}"
    if needs.hardware_key and needs.hardware_key != hardware.get("hardware_key"):
        return f"was built for {needs.hardware_key}, the device is {hardware.get('hardware_key') or 'another'}"
    return None


def _heard(row: RolloutRow, device_id: str, model: ModelState | None, reported: Reported) -> rollout.Event | None:
    """What a report means for this rollout, or None while it means nothing."""
    offer = row.offers[device_id]
    withdrawn = offer.get("withdrawn_generation")
    if withdrawn is not None and row.status == Status.ROLLING_BACK:
        wanted = offer["before"]["manifest"] if offer["before"] else None
        active = model.active_manifest if model is not None else None
        is_back = reported.generation >= withdrawn and active == wanted
        return rollout.Returned(device_id) if is_back else None
    if model is None or "generation" not in offer or reported.generation < offer["generation"]:
        return None
    wish = offer["model"]
    if model.active_manifest == wish["manifest"] and model.phase is Phase.COMMITTED:
        return rollout.Succeeded(device_id, time.time())
    is_ours = model.rollout_id == row.rollout_id if model.rollout_id else model.wanted_manifest == wish["manifest"]
    if not is_ours or (model.wanted_manifest == wish["manifest"] and model.attempt < wish.get("attempt", 0)):
        return None
    if model.result is not None and model.result is not Result.SUCCEEDED:
        return rollout.Failed(device_id, time.time(), model.reason or model.result.value)
    return rollout.Progressed(device_id, model.phase.value)


def _check(order: Order) -> None:
    if not 1 <= order.device_timeout_s <= MAX_TIMEOUT_S or not math.isfinite(order.device_timeout_s):
        raise InvalidInputError(f"device_timeout_s is {order.device_timeout_s}", remedy=f"1 to {MAX_TIMEOUT_S}")
    if not 0 <= order.soak_s <= 86400:
        raise InvalidInputError(f"soak_s is {order.soak_s}", remedy="0 to 86400 seconds")
    if not 0 <= order.gate.min_success_ratio <= 1 or order.gate.max_failures < 0:
        raise InvalidInputError(f"the gate {order.gate} is out of range", remedy="a ratio of 0 to 1, failures from 0")


def _order_document(order: Order) -> dict[str, Any]:
    return {
        "waves": [dict(wave) for wave in order.waves],
        "gate": {"max_failures": order.gate.max_failures, "min_success_ratio": order.gate.min_success_ratio},
        "soak_s": order.soak_s,
        "device_timeout_s": order.device_timeout_s,
    }


def _get(session: Session, tenant: str, rollout_id: str) -> RolloutRow:
    row = session.get(RolloutRow, rollout_id)
    if row is None or row.tenant != tenant:
        raise NotFoundError(f"rollout {rollout_id!r} does not exist", remedy="see: foreshore rollouts")
    return row


def summary(row: RolloutRow) -> dict[str, Any]:
    """A rollout as lists and events show it."""
    state = rollout.from_dict(row.state)
    return {
        "rollout_id": row.rollout_id,
        "status": row.status,
        "model": row.model,
        "version": row.model_version,
        "release": row.release,
        "group": row.group,
        "wave": state.wave + 1,
        "num_waves": state.num_waves,
        "counts": rollout.counts(state.devices.values()),
        "num_devices": len(state.devices),
        "reason": row.reason,
        "decision_id": row.decision_id,
        "created_by": row.created_by,
        "created_at": row.created_at.isoformat(),
        "updated_at": row.updated_at.isoformat(),
    }


def details(row: RolloutRow) -> dict[str, Any]:
    """A rollout with its order, waves and devices."""
    state = rollout.from_dict(row.state)
    waves = []
    for number in range(state.num_waves):
        inside = state.of_wave(number)
        waves.append(
            {
                "wave": number + 1,
                "is_canary": number == 0,
                "is_current": number == state.wave,
                "counts": rollout.counts(inside.values()),
                "device_ids": sorted(inside),
            }
        )
    devices = [
        {
            "device_id": name,
            "wave": slot.wave + 1 if slot.wave >= 0 else None,
            "state": slot.slot.value,
            "phase": slot.phase,
            "reason": slot.reason,
            "deadline": datetime.fromtimestamp(slot.deadline, UTC).isoformat() if slot.deadline else None,
            "target": row.offers.get(name, {}).get("model", {}).get("target"),
        }
        for name, slot in sorted(state.devices.items())
    ]
    return {**summary(row), **row.order, "waves_planned": row.order["waves"], "waves": waves, "devices": devices}
