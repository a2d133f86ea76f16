"""The shell around the rollout engine: one transaction per event, with the version it read, so that nothing is lost.

The engine's state and the wishes it causes are committed together; what is sent afterwards is sent again after a
restart, so a kill at any point leaves a rollout that goes on. Which artefact a device gets is decided once, when the
device comes into the rollout; devices that cannot run the release are skipped with the reason. A rollout touches only
its own model of a device's wish, and only while no later rollout has a wish of its own there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud.control import audit, decisions, rollout, trust
from cloud.control.database import Database, announce
from cloud.control.fleet import Fleet, is_member, members
from cloud.control.identity import Principal, Role, new_id
from cloud.control.placement import place
from cloud.control.rollout import Explain, Offer, State, Status, Withdraw
from cloud.control.rollout_order import Order
from cloud.control.rollout_views import details, summary
from cloud.control.tables import Device, RolloutRow
from model_registry import catalogue
from model_registry.blobs import BlobStore
from model_registry.compatibility import Choice
from model_registry.tables import ArtefactRow, ReleaseRow
from wire.decision import Candidate, Input, decide
from wire.errors import ConflictError, InvalidInputError, NotAllowedError, NotFoundError
from wire.messages import DesiredModel, ModelState, Phase, Reported, Result
from wire.window import Window

UNDER_WAY = tuple(status.value for status in rollout.UNDER_WAY)
TAKES_JOINERS = (Status.RUNNING.value, Status.PAUSED.value, Status.SUCCEEDED.value)
ORDERS = ("approve", "start", "pause", "resume", "halt", "retry", "rollback")
MAX_CHAIN = 100
ENGINE = "rollout-engine"


class Rollouts:
    """The rollouts of all tenants."""

    def __init__(self, database: Database, fleet: Fleet, blobs: BlobStore) -> None:
        self._database = database
        self._fleet = fleet
        self._blobs = blobs

    # what people ask

    def create(self, by: Principal, order: Order, *, start: bool) -> dict[str, Any]:
        """Plan a rollout and, if wanted, start it (once it is approved, where it needs that)."""
        with self._database.write() as session:
            release = catalogue.get_release(session, order.release)
            if release.tenant != by.tenant:
                raise NotFoundError(f"release {order.release[:12]} is not in the catalogue", remedy="foreshore models")
            _refuse_withdrawn(session, release)
            devices = sorted(members(session, by.tenant, order.group), key=lambda d: (not d.online, d.device_id))
            placed = place(self._blobs, release, devices)
            if start and order.approval is None:
                _refuse_overlap(session, by.tenant, release.name, set(placed.chosen))
            waves = rollout.plan_waves(list(placed.chosen), order.waves)
            state = rollout.new(waves, order.terms(start=start), placed.skipped)
            now = datetime.now(UTC)
            row = RolloutRow(
                rollout_id=new_id("rol"), tenant=by.tenant, model=release.name, model_version=release.version,
                release=release.digest, group=order.group, status=state.status.value, order=order.to_dict(),
                state=state.to_dict(), joins=order.joins, reason="", created_by=by.subject,
                created_with=by.token_id, created_at=now, updated_at=now,
                offers={
                    name: _unoffered(release, artefact, placed.choices[name], soak_s=order.soak_s, window=order.window)
                    for name, artefact in placed.chosen.items()
                },
            )  # fmt: skip
            session.add(row)
            audit.record(
                session, tenant=by.tenant, actor=by.subject, action="rollout.create", subject=row.rollout_id,
                details={"release": release.digest, "group": order.group, "devices": len(placed.chosen)},
            )  # fmt: skip
            if start and state.status is Status.DRAFT:
                self._apply(session, row, rollout.Started(time.time()))
            announce(session, "rollout", row.tenant, summary(row))
            return details(row)

    def steer(self, by: Principal, rollout_id: str, order: str, reason: str = "") -> dict[str, Any]:
        """A person's order, one of `ORDERS`. Whoever made the rollout cannot approve it."""
        now = time.time()
        events: dict[str, rollout.Event] = {
            "approve": rollout.Approved(by.subject, now),
            "start": rollout.Started(now),
            "resume": rollout.Started(now),
            "pause": rollout.Paused(),
            "halt": rollout.Halted(reason or f"halted by {by.subject}"),
            "retry": rollout.RetriedFailed(now),
            "rollback": rollout.RollBack(now, reason or f"rolled back by {by.subject}"),
        }
        if order not in events:
            raise NotFoundError(f"a rollout cannot {order!r}", remedy=f"one of {', '.join(ORDERS)}")
        with self._database.write() as session:
            row = _get(session, by.tenant, rollout_id)
            if order == "approve":
                _require_another(by, row)
            if (order, row.status) in {("start", Status.PAUSED.value), ("resume", Status.DRAFT.value)}:
                raise ConflictError(f"cannot {order} a rollout that is {row.status}", remedy="resume what is paused")
            if order in ("approve", "start", "retry"):
                _refuse_withdrawn(session, catalogue.get_release(session, row.release))
                _refuse_overlap(session, row.tenant, row.model, set(row.offers), besides=rollout_id)
            audit.record(
                session, tenant=by.tenant, actor=by.subject, action=f"rollout.{order}", subject=rollout_id,
                details={"reason": reason} if reason else {},
            )  # fmt: skip
            self._apply(session, row, events[order])
            return details(row)

    # what devices and time say

    def hear_report(self, tenant: str, device_id: str, reported: Reported) -> None:
        """Let every rollout of this device know what it reports, and let it join those that wait for it."""
        for rollout_id in self._with_status(tenant, UNDER_WAY):
            with self._database.write() as session:
                row = session.get(RolloutRow, rollout_id)
                if row is not None and device_id in row.offers:
                    self._hear(session, row, device_id, reported)
        self._join(tenant, device_id)

    def consider(self, tenant: str, group: str | None = None, device_id: str | None = None) -> None:
        """A group or a device's labels changed: let devices join that belong to a group now."""
        if device_id is not None:
            self._join(tenant, device_id)
            return
        query = select(RolloutRow).where(
            RolloutRow.tenant == tenant, RolloutRow.status.in_(TAKES_JOINERS), RolloutRow.joins,
            RolloutRow.group == group,
        )  # fmt: skip
        with self._database.read() as session:
            known = [set(row.state["devices"]) for row in session.scalars(query)]
            newcomers = [
                device.device_id
                for device in (members(session, tenant, group) if known and group is not None else [])
                if any(device.device_id not in one for one in known)
            ]
        for newcomer in newcomers:
            self._join(tenant, newcomer)

    def remove_device(self, tenant: str, device_id: str) -> None:
        """A device left the fleet."""
        for rollout_id in self._with_status(tenant, UNDER_WAY):
            with self._database.write() as session:
                row = session.get(RolloutRow, rollout_id)
                if row is not None and device_id in row.offers:
                    self._apply(session, row, rollout.Removed(device_id, time.time()))

    def tick(self) -> None:
        """Time passed: let deadlines and the pace count."""
        now = time.time()
        for rollout_id in self._with_status(None, UNDER_WAY):
            with self._database.write() as session:
                row = session.get(RolloutRow, rollout_id)
                if row is not None and row.status in UNDER_WAY:
                    self._apply(session, row, rollout.Ticked(now))

    def catch_up(self) -> None:
        """After a start: judge every stored report again, as the last ones may have been stored but not heard."""
        for rollout_id in self._with_status(None, UNDER_WAY):
            with self._database.write() as session:
                row = session.get(RolloutRow, rollout_id)
                if row is not None:
                    self._hear_stored(session, row, list(row.offers))

    # looking

    def newest(self, tenant: str, *, limit: int = 100, offset: int = 0) -> list[dict[str, Any]]:
        """Rollouts, newest first."""
        query = select(RolloutRow).where(RolloutRow.tenant == tenant).order_by(RolloutRow.created_at.desc())
        with self._database.read() as session:
            return [summary(row) for row in session.scalars(query.limit(limit).offset(offset))]

    def get(self, tenant: str, rollout_id: str) -> dict[str, Any]:
        """One rollout with its waves and devices."""
        with self._database.read() as session:
            return details(_get(session, tenant, rollout_id))

    def _with_status(self, tenant: str | None, statuses: Sequence[str]) -> Sequence[str]:
        query = select(RolloutRow.rollout_id).where(RolloutRow.status.in_(statuses)).order_by(RolloutRow.created_at)
        query = query if tenant is None else query.where(RolloutRow.tenant == tenant)
        with self._database.read() as session:
            return session.scalars(query).all()

    # inside one transaction

    def _apply(self, session: Session, row: RolloutRow, event: rollout.Event) -> None:
        before = rollout.from_dict(row.state)
        after, actions = rollout.step(before, event)
        if after == before and not actions:
            return
        row.state, row.status, row.reason = after.to_dict(), after.status.value, after.reason
        row.updated_at = datetime.now(UTC)
        if after.status is not before.status:
            audit.record(
                session, tenant=row.tenant, actor=ENGINE, action=f"rollout.{after.status}",
                subject=row.rollout_id, details={"reason": after.reason} if after.reason else {},
            )  # fmt: skip
        for action in actions:
            match action:
                case Offer(device_ids):
                    self._offer(session, row, device_ids)
                case Withdraw(device_ids):
                    self._withdraw(session, row, device_ids)
                    self._hear_stored(session, row, device_ids)  # those that are back already say nothing new
                case Explain():
                    self._explain(session, row, after, action)
        announce(session, "rollout", row.tenant, summary(row))

    def _offer(self, session: Session, row: RolloutRow, device_ids: Sequence[str]) -> None:
        offers = dict(row.offers)
        for device_id in device_ids:
            device = session.get(Device, (row.tenant, device_id))
            if device is None or device.revoked_at is not None:
                continue
            now = _wish_of(device, row.model)
            is_ours = now is not None and now.get("rollout_id") == row.rollout_id
            before = offers[device_id].get("before") if is_ours else now
            tries = device.attempts.get(row.release, 0) + 1
            device.attempts = {**device.attempts, row.release: tries}
            document = {**offers[device_id]["model"], "rollout_id": row.rollout_id, "attempt": tries - 1}
            generation = self._fleet.change_wish(
                session, device, row.model, DesiredModel.model_validate(document), actor=ENGINE
            )
            choice = offers[device_id].get("choice")
            offers[device_id] = {"model": document, "before": before, "generation": generation, "choice": choice}
        row.offers = offers

    def _withdraw(self, session: Session, row: RolloutRow, device_ids: Sequence[str]) -> None:
        offers, others = dict(row.offers), list[str]()
        for device_id in device_ids:
            device, offer = session.get(Device, (row.tenant, device_id)), offers[device_id]
            if device is None or device.revoked_at is not None or "generation" not in offer:
                continue
            now = _wish_of(device, row.model)
            if "withdrawn_generation" in offer:
                continue
            if now is None or now.get("rollout_id") != row.rollout_id:
                others.append(device_id)
                continue
            before = _standing(session, offer["before"], device_id)
            model = (
                DesiredModel.model_validate({**before, "window": None}) if before else None
            )  # going back cannot wait
            generation = self._fleet.change_wish(session, device, row.model, model, actor=ENGINE)
            offers[device_id] = {**offer, "before": before, "withdrawn_generation": generation}
        row.offers = offers
        for device_id in others:
            event = rollout.Removed(device_id, time.time(), "a later rollout decides about this model here")
            self._apply(session, row, event)

    def _hear(self, session: Session, row: RolloutRow, device_id: str, reported: Reported) -> None:
        model = next((one for one in reported.models if one.name == row.model), None)
        event = _heard(row, device_id, model, reported)
        if event is not None and row.status in UNDER_WAY:
            self._apply(session, row, event)

    def _hear_stored(self, session: Session, row: RolloutRow, device_ids: Sequence[str]) -> None:
        for device_id in device_ids:
            device = session.get(Device, (row.tenant, device_id))
            if device is not None and device.revoked_at is None and device.reported:
                self._hear(session, row, device_id, Reported.model_validate(device.reported))

    def _join(self, tenant: str, device_id: str) -> None:
        """Bring a device into the newest rollout of each model that takes joiners and whose group holds it."""
        query = select(RolloutRow).where(RolloutRow.tenant == tenant, RolloutRow.status.in_(TAKES_JOINERS))
        with self._database.read() as session:
            if session.scalar(query.where(RolloutRow.joins).limit(1)) is None:
                return
        with self._database.write() as session:
            device = session.get(Device, (tenant, device_id))
            if device is None or device.revoked_at is not None:
                return
            rows = list(session.scalars(query.order_by(RolloutRow.created_at.desc())))
            settled = {row.model for row in rows if row.status in UNDER_WAY and device_id in row.offers}
            for row in rows:
                if row.model in settled:
                    continue
                if device_id in row.state["devices"]:
                    settled.add(row.model)
                elif row.joins and is_member(session, device, row.group):
                    settled.add(row.model)
                    self._join_one(session, row, device)

    def _join_one(self, session: Session, row: RolloutRow, device: Device) -> None:
        release = catalogue.get_release(session, row.release)
        placed = place(self._blobs, release, [device])
        artefact = placed.chosen.get(device.device_id)
        if artefact is None:
            return
        window = rollout.from_dict(row.state).terms.window
        choice = placed.choices[device.device_id]
        offer = _unoffered(release, artefact, choice, soak_s=float(row.order["soak_s"]), window=window)
        row.offers = {**row.offers, device.device_id: offer}
        audit.record(
            session, tenant=row.tenant, actor=ENGINE, action="rollout.join", subject=row.rollout_id,
            details={"device": device.device_id},
        )  # fmt: skip
        self._apply(session, row, rollout.Joined((device.device_id,), time.time()))

    def _explain(self, session: Session, row: RolloutRow, state: State, action: Explain) -> None:
        counted, gate = rollout.counts(state.devices.values()), state.terms.gate
        record = decide(
            decision_id=new_id("dec"),
            kind="rollout",
            policy="rollout-gate/1",
            config=row.order,
            decided_at=datetime.now(UTC).isoformat(),
            inputs={
                **{f"num_{name}": Input(count) for name, count in sorted(counted.items())},
                "wave": Input(state.wave + 1),
                "max_failures": Input(gate.max_failures),
                "min_success_ratio": Input(gate.min_success_ratio),
            },
            candidates=[Candidate("go on", excluded=(action.reason,)), Candidate("halt", terms={"risk": 0.0})],
            weights={"risk": 1.0},
            reason=f"Halted in wave {state.wave + 1} of {state.num_waves}: {action.reason}.",
            subject=row.rollout_id,
        )
        decisions.add(session, row.tenant, "control-plane", record)
        row.decision_id = record.decision_id


def _heard(row: RolloutRow, device_id: str, model: ModelState | None, reported: Reported) -> rollout.Event | None:
    """What a report means for this rollout, or None while it means nothing."""
    offer = row.offers[device_id]
    withdrawn = offer.get("withdrawn_generation")
    if withdrawn is not None:
        wanted = offer["before"]["manifest"] if offer["before"] else None
        active = model.active_manifest if model is not None else None
        is_back = reported.generation >= withdrawn and active == wanted
        return rollout.Returned(device_id) if is_back and row.status == Status.ROLLING_BACK else None
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


def _unoffered(
    release: ReleaseRow, artefact: ArtefactRow, choice: Choice, *, soak_s: float, window: Window | None
) -> dict[str, Any]:
    model = DesiredModel(
        name=release.name,
        version=release.version,
        release=release.digest,
        manifest=artefact.manifest,
        manifest_bytes=artefact.manifest_bytes,
        target=artefact.target,
        soak_s=soak_s,
        window=window,
    )
    return {"model": model.model_dump(mode="json", exclude_none=True), "before": None, "choice": choice.reason}


def _wish_of(device: Device, model: str) -> dict[str, Any] | None:
    return next((one for one in device.desired_models if one["name"] == model), None)


def _standing(session: Session, before: dict[str, Any] | None, device_id: str) -> dict[str, Any] | None:
    """The newest earlier wish whose own rollout still stands: what was rolled back since is not brought back."""
    for _ in range(MAX_CHAIN):
        if before is None or before.get("rollout_id") is None:
            return before
        earlier = session.get(RolloutRow, before["rollout_id"])
        if earlier is None or earlier.status not in (Status.ROLLED_BACK, Status.ROLLING_BACK):
            return before
        before = earlier.offers.get(device_id, {}).get("before")
    return None


def _refuse_withdrawn(session: Session, release: ReleaseRow) -> None:
    """No device installs what no publisher lists."""
    if trust.load(session, release.tenant).find_release(release.name, release.digest) is None:
        raise ConflictError(
            f"no publisher lists {release.name} {release.version} any longer: no device would install it",
            remedy="roll out another release, or publish this one again",
        )


def _refuse_overlap(
    session: Session, tenant: str, model: str, device_ids: set[str], *, besides: str | None = None
) -> None:
    """Two rollouts of one model must not steer one device at the same time."""
    query = select(RolloutRow).where(
        RolloutRow.tenant == tenant, RolloutRow.model == model, RolloutRow.status.in_(UNDER_WAY)
    )
    for other in session.scalars(query):
        shared = sorted(device_ids & set(other.offers))
        if shared and other.rollout_id != besides:
            raise ConflictError(
                f"rollout {other.rollout_id} of {model!r} is still under way on {shared[0]}"
                + (f" and {len(shared) - 1} more" if len(shared) > 1 else ""),
                remedy="wait, halt it or roll it back",
            )


def _require_another(by: Principal, row: RolloutRow) -> None:
    role = row.order.get("approval")
    if role is None:
        raise InvalidInputError("this rollout needs no approval", remedy="start it")
    by.require(Role(role))
    if by.token_id == row.created_with or by.subject == row.created_by:
        raise NotAllowedError("whoever made a rollout cannot approve it", remedy=f"ask another person ({role})")


def _get(session: Session, tenant: str, rollout_id: str) -> RolloutRow:
    row = session.get(RolloutRow, rollout_id)
    if row is None or row.tenant != tenant:
        raise NotFoundError(f"rollout {rollout_id!r} does not exist", remedy="see: foreshore rollouts")
    return row
