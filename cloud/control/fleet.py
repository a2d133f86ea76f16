"""Devices and groups: what each device shall run (signed, with a rising generation) and what it says it runs.

The signed desired document is made in the transaction that changes the wish, so what is stored is what is sent, however
often. Reports are believed because the broker's access list lets only that device write them; an older boot epoch or a
report of a revoked device changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from cloud.control import audit
from cloud.control.database import Database, after_commit, announce
from cloud.control.device_facts import facts_of, store_facts
from cloud.control.device_filter import condition, parse_filter
from cloud.control.identity import Principal
from cloud.control.tables import Device, Group
from wire import topics
from wire.envelope import key_id, parse_envelope, sign
from wire.errors import ConflictError, InvalidInputError, NotFoundError
from wire.messages import DESIRED_TYPE, Desired, DesiredModel, Reported, Status

DESIRED_DAYS = 30
RENEW_BEFORE = timedelta(days=15)
ALL = "all"
MAX_LABELS = 32

SendDesired = Callable[[str, str, bytes], None]
"""Tenant, device, envelope: puts the retained document on the broker, or leaves it for the next republication."""

FindDirector = Callable[[str], Ed25519PrivateKey]
"""Tenant -> the key that its root of trust lets sign assignments."""

_LABEL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,63}")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9_.:@/+-]{1,100}")


class Fleet:
    """The devices and groups of all tenants."""

    def __init__(self, database: Database, director: FindDirector, send: SendDesired) -> None:
        self._database = database
        self._director = director
        self._send = send

    # what devices shall run

    def change_wish(
        self, session: Session, device: Device, name: str, model: DesiredModel | None, *, actor: str
    ) -> int:
        """Set (or take away) one model of the device's wish; returns the new generation. Sent after the commit.

        The other models of the wish stay as they are.
        """
        others = [one for one in device.desired_models if one["name"] != name]
        wished = [] if model is None else [model.model_dump(mode="json", exclude_none=True)]
        device.desired_models = sorted(others + wished, key=lambda one: str(one["name"]))
        device.generation += 1
        self._seal(session, device)
        audit.record(
            session, tenant=device.tenant, actor=actor, action="device.wish", subject=device.device_id,
            details={
                "model": name, "version": model.version if model else None,
                "rollout": model.rollout_id if model else None, "generation": device.generation,
            },
        )  # fmt: skip
        return device.generation

    def republish(self) -> int:
        """Send every device's document again (the broker lost it, or may have); renews those that grow old."""
        with self._database.write() as session:
            soon = datetime.now(UTC) + RENEW_BEFORE
            devices = list(session.scalars(select(Device).where(Device.revoked_at.is_(None))))
            for device in devices:
                is_old = (device.desired_expires_at or soon) < soon
                if device.desired_envelope is None or is_old or not self._is_by_director(device):
                    device.generation += 1
                    self._seal(session, device)
                else:
                    self._follow(session, device)
        return len(devices)

    def desired_envelope(self, tenant: str, device_id: str) -> bytes:
        """The signed document as the device gets it."""
        with self._database.read() as session:
            device = get_device(session, tenant, device_id)
            if device.desired_envelope is None:
                raise NotFoundError(f"nothing is desired of {device_id!r} yet", remedy="start a rollout")
            return device.desired_envelope

    def _seal(self, session: Session, device: Device) -> None:
        now = datetime.now(UTC)
        device.desired_expires_at = now + timedelta(days=DESIRED_DAYS)
        desired = Desired(
            tenant=device.tenant,
            device_id=device.device_id,
            generation=device.generation,
            issued_at=now,
            expires_at=device.desired_expires_at,
            models=[DesiredModel.model_validate(one) for one in device.desired_models],
        )
        device.desired_envelope = sign(DESIRED_TYPE, desired.to_bytes(), self._director(device.tenant)).to_bytes()
        self._follow(session, device)

    def _is_by_director(self, device: Device) -> bool:
        director = key_id(self._director(device.tenant).public_key())
        return any(one.key_id == director for one in parse_envelope(device.desired_envelope or b"").signatures)

    def _follow(self, session: Session, device: Device) -> None:
        tenant, device_id, envelope = device.tenant, device.device_id, device.desired_envelope or b""
        after_commit(session, lambda: self._send(tenant, device_id, envelope))

    # what devices say

    def store_report(self, tenant: str, device_id: str, reported: Reported) -> bool:
        """Keep a device's report; False when it is stale or the device is unknown."""
        with self._database.write() as session:
            device = session.get(Device, (tenant, device_id))
            if device is None or device.revoked_at is not None or reported.boot_epoch < device.boot_epoch:
                return False
            known = facts_of(device.reported, device.hardware or {}, device.labels or {})
            device.reported = reported.model_dump(mode="json", exclude_none=True)
            device.hardware = device.reported["hardware"]
            store_facts(session, device, known)
            device.boot_epoch = reported.boot_epoch
            device.last_seen_at = datetime.now(UTC)
            device.online = True
            announce(session, "device", tenant, summary(device))
        return True

    def store_status(self, tenant: str, device_id: str, status: Status) -> bool:
        """Keep a birth or a last will; an older boot epoch than the last seen is ignored."""
        with self._database.write() as session:
            device = session.get(Device, (tenant, device_id))
            if device is None or device.revoked_at is not None or status.boot_epoch < device.boot_epoch:
                return False
            device.boot_epoch = status.boot_epoch
            device.online = status.online
            if status.online:
                device.last_seen_at = datetime.now(UTC)
            announce(session, "device", tenant, summary(device))
        return True

    # looking

    def list_devices(
        self, tenant: str, *, group: str = ALL, filter_text: str | None = None, limit: int = 1000, offset: int = 0
    ) -> list[Device]:
        """Enrolled devices by name, of a group or as a filter says."""
        with self._database.read() as session:
            query = select_group(session, tenant, group)
            if filter_text:
                query = query.where(condition(parse_filter(filter_text)))
            return list(session.scalars(query.limit(limit).offset(offset)))

    def get_device(self, tenant: str, device_id: str) -> Device:
        """One device; `NotFoundError` otherwise."""
        with self._database.read() as session:
            return get_device(session, tenant, device_id)

    def all_access(self) -> list[tuple[str, str]]:
        """Tenant and name of every device that may use the broker."""
        with self._database.read() as session:
            query = select(Device.tenant, Device.device_id).where(Device.revoked_at.is_(None))
            return [(tenant, device_id) for tenant, device_id in session.execute(query)]

    def count_online(self) -> tuple[int, int]:
        """How many devices are enrolled, and how many of them are online."""
        with self._database.read() as session:
            query = select(func.count()).select_from(Device).where(Device.revoked_at.is_(None))
            return session.scalar(query) or 0, session.scalar(query.where(Device.online)) or 0

    def label(self, by: Principal, device_id: str, labels: Mapping[str, str]) -> Device:
        """Replace a device's labels."""
        if len(labels) > MAX_LABELS:
            raise InvalidInputError(f"{len(labels)} labels are too many", remedy=f"at most {MAX_LABELS}")
        for name, value in labels.items():
            if not _LABEL_NAME.fullmatch(name) or not _LABEL_VALUE.fullmatch(value):
                raise InvalidInputError(
                    f"label {name[:70]!r} = {value[:110]!r} is not usable",
                    remedy="letters, digits, . _ - in the name, also : @ / + in the value",
                )
        with self._database.write() as session:
            device = get_device(session, by.tenant, device_id)
            known = facts_of(device.reported, device.hardware or {}, device.labels or {})
            device.labels = dict(sorted(labels.items()))
            store_facts(session, device, known)
            audit.record(
                session, tenant=by.tenant, actor=by.subject, action="device.label", subject=device_id,
                details={"labels": device.labels},
            )  # fmt: skip
            announce(session, "device", by.tenant, summary(device))
            return device

    # groups

    def count(self, tenant: str, group: str = ALL) -> int:
        """How many devices are in a group."""
        with self._database.read() as session:
            return count_group(session, tenant, group)

    def list_groups(self, tenant: str) -> list[tuple[Group, int]]:
        """The groups that people made, each with the number of its devices now; `all` exists besides."""
        with self._database.read() as session:
            groups = list(session.scalars(select(Group).where(Group.tenant == tenant).order_by(Group.name)))
            return [(group, count_group(session, tenant, group.name)) for group in groups]

    def put_group(
        self, by: Principal, name: str, device_ids: Sequence[str] | None, filter_text: str | None, *, is_new: bool
    ) -> tuple[Group, int]:
        """Make or change a group; returns it with the number of its devices now."""
        if topics.check_name("group", name) == ALL:
            raise ConflictError("the group 'all' holds every device", remedy="choose another name")
        if (device_ids is None) == (filter_text is None):
            raise InvalidInputError("a group has either device_ids or a filter", remedy="give exactly one of them")
        if filter_text is not None:
            parse_filter(filter_text)
        with self._database.write() as session:
            group = session.get(Group, (by.tenant, name))
            if is_new and group is not None:
                raise ConflictError(f"group {name!r} exists", remedy="change it with PUT, or choose another name")
            if not is_new and group is None:
                raise NotFoundError(f"group {name!r} does not exist", remedy="make it with POST /groups")
            for device_id in device_ids or ():
                get_device(session, by.tenant, device_id)
            if group is None:
                group = Group(tenant=by.tenant, name=name, created_at=datetime.now(UTC))
                session.add(group)
            group.device_ids = sorted(set(device_ids)) if device_ids is not None else None
            group.filter = filter_text
            audit.record(
                session, tenant=by.tenant, actor=by.subject, action="group.put", subject=name,
                details={"devices": len(group.device_ids)} if group.device_ids is not None else {"filter": filter_text},
            )  # fmt: skip
            session.flush()
            return group, count_group(session, by.tenant, name)

    def delete_group(self, by: Principal, name: str) -> None:
        """Forget a group; its devices stay."""
        with self._database.write() as session:
            group = session.get(Group, (by.tenant, name))
            if group is None:
                raise NotFoundError(f"group {name!r} does not exist", remedy="see: foreshore groups")
            session.delete(group)
            audit.record(session, tenant=by.tenant, actor=by.subject, action="group.delete", subject=name)


def get_device(session: Session, tenant: str, device_id: str) -> Device:
    """One enrolled device of the tenant; `NotFoundError` otherwise."""
    device = session.get(Device, (tenant, device_id))
    if device is None or device.revoked_at is not None:
        raise NotFoundError(f"device {device_id!r} does not exist", remedy="see: foreshore devices")
    return device


def select_group(session: Session, tenant: str, group: str) -> Select[Device]:
    """The query for a group's enrolled devices, by name; `NotFoundError` for an unknown group."""
    query = select(Device).where(Device.tenant == tenant, Device.revoked_at.is_(None)).order_by(Device.device_id)
    if group == ALL:
        return query
    row = session.get(Group, (tenant, group))
    if row is None:
        raise NotFoundError(f"group {group!r} does not exist", remedy="see: foreshore groups; 'all' always exists")
    if row.device_ids is not None:
        return query.where(Device.device_id.in_(row.device_ids))
    return query.where(condition(parse_filter(row.filter or "")))


def members(session: Session, tenant: str, group: str) -> list[Device]:
    """The enrolled devices of a group, by name."""
    return list(session.scalars(select_group(session, tenant, group)))


def count_group(session: Session, tenant: str, group: str) -> int:
    """How many devices are in a group."""
    query = select_group(session, tenant, group).order_by(None)
    return session.scalar(select(func.count()).select_from(query.subquery())) or 0


def is_member(session: Session, device: Device, group: str) -> bool:
    """Whether a device is in a group now; no device is in a group that is gone."""
    if group != ALL and session.get(Group, (device.tenant, group)) is None:
        return False
    query = select_group(session, device.tenant, group).where(Device.device_id == device.device_id)
    return session.scalar(query) is not None


def summary(device: Device) -> dict[str, Any]:
    """A device as lists and events show it."""
    reported = device.reported or {}
    return {
        "device_id": device.device_id,
        "tenant": device.tenant,
        "online": device.online,
        "last_seen_at": device.last_seen_at.isoformat() if device.last_seen_at else None,
        "enrolled_at": device.enrolled_at.isoformat(),
        "generation": device.generation,
        "reported_generation": reported.get("generation"),
        "is_in_sync": reported.get("generation") == device.generation if device.generation else True,
        "boot_epoch": device.boot_epoch,
        "agent_version": reported.get("agent_version"),
        "profile": (device.hardware or {}).get("profile"),
        "hardware": device.hardware,
        "labels": device.labels or {},
        "models": reported.get("models", []),
        "local_api": reported.get("local_api"),
        "error": reported.get("error"),
    }


def details(device: Device) -> dict[str, Any]:
    """A device with its wish and its whole report."""
    return {
        **summary(device),
        "desired": {
            "generation": device.generation,
            "expires_at": device.desired_expires_at.isoformat() if device.desired_expires_at else None,
            "models": device.desired_models,
        },
        "reported": device.reported,
        "certificate_serial": device.certificate_serial,
    }
