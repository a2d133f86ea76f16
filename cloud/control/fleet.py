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
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cloud.control import audit
from cloud.control.database import Database, after_commit, announce
from cloud.control.identity import Principal
from cloud.control.tables import Device, Group
from wire import topics
from wire.envelope import sign
from wire.errors import ConflictError, InvalidInputError, NotFoundError
from wire.messages import DESIRED_TYPE, Desired, DesiredModel, Reported, Status

DESIRED_DAYS = 30
RENEW_BEFORE = timedelta(days=15)
ALL = "all"
MAX_FILTER_CHARS = 500

SendDesired = Callable[[str, str, bytes], None]
"""Tenant, device, envelope: puts the retained document on the broker, or leaves it for the next republication."""

_TERM = re.compile(r"\s*(profile|target|architecture|online|device)\s*(=|!=)\s*([A-Za-z0-9*_.-]+)\s*")


class Fleet:
    """The devices and groups of all tenants."""

    def __init__(self, database: Database, key: Ed25519PrivateKey, send: SendDesired) -> None:
        self._database = database
        self._key = key
        self._send = send

    # what devices shall run

    def change_wish(self, session: Session, device: Device, name: str, model: DesiredModel | None) -> int:
        """Set (or take away) one model of the device's wish; returns the new generation. Sent after the commit."""
        others = [one for one in device.desired_models if one["name"] != name]
        wished = [] if model is None else [model.model_dump(mode="json", exclude_none=True)]
        device.desired_models = sorted(others + wished, key=lambda one: str(one["name"]))
        device.generation += 1
        self._seal(session, device)
        return device.generation

    def republish(self) -> int:
        """Send every device's document again (the broker lost it, or may have); renews those that grow old."""
        with self._database.write() as session:
            soon = datetime.now(UTC) + RENEW_BEFORE
            devices = list(session.scalars(select(Device).where(Device.revoked_at.is_(None))))
            for device in devices:
                if device.desired_envelope is None or (device.desired_expires_at or soon) < soon:
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
        device.desired_envelope = sign(DESIRED_TYPE, desired.to_bytes(), self._key).to_bytes()
        self._follow(session, device)

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
            device.reported = reported.model_dump(mode="json", exclude_none=True)
            device.hardware = device.reported["hardware"]
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

    def list_devices(self, tenant: str, *, group: str = ALL, limit: int = 1000, offset: int = 0) -> list[Device]:
        """Enrolled devices by name."""
        with self._database.read() as session:
            return members(session, tenant, group)[offset : offset + limit]

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

    # groups

    def list_groups(self, tenant: str) -> list[Group]:
        """The groups that people made; `all` exists besides."""
        with self._database.read() as session:
            return list(session.scalars(select(Group).where(Group.tenant == tenant).order_by(Group.name)))

    def put_group(
        self, by: Principal, name: str, device_ids: Sequence[str] | None, filter_text: str | None, *, is_new: bool
    ) -> Group:
        """Make or change a group."""
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
            audit.record(session, tenant=by.tenant, actor=by.subject, action="group.put", subject=name)
        return group

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


def members(session: Session, tenant: str, group: str) -> list[Device]:
    """The enrolled devices of a group, by name; `NotFoundError` for an unknown group."""
    query = select(Device).where(Device.tenant == tenant, Device.revoked_at.is_(None)).order_by(Device.device_id)
    devices = list(session.scalars(query))
    if group == ALL:
        return devices
    row = session.get(Group, (tenant, group))
    if row is None:
        raise NotFoundError(f"group {group!r} does not exist", remedy="see: foreshore groups; 'all' always exists")
    if row.device_ids is not None:
        wanted = set(row.device_ids)
        return [device for device in devices if device.device_id in wanted]
    accepts = parse_filter(row.filter or "")
    return [device for device in devices if accepts(device)]


def parse_filter(text: str) -> Callable[[Device], bool]:
    """A filter such as `profile=jetson* and online=true`: terms joined by `and`, with = or != and a trailing *."""
    if not text.strip() or len(text) > MAX_FILTER_CHARS:
        raise InvalidInputError(
            "the filter is empty or too long", remedy="for example: profile=jetson* and online=true"
        )
    terms = []
    for part in re.split(r"\band\b", text):
        match = _TERM.fullmatch(part)
        if match is None:
            raise InvalidInputError(
                f"filter term {part.strip()!r} is not understood",
                remedy="profile, target, architecture, online or device, then = or !=, then a value (may end in *)",
            )
        terms.append((match[1], match[2] == "=", match[3]))
    return lambda device: all(_matches(device, field, value) is wanted for field, wanted, value in terms)


def _matches(device: Device, field: str, value: str) -> bool:
    hardware: Mapping[str, Any] = device.hardware or {}
    found = {
        "profile": [str(hardware.get("profile", ""))],
        "target": [str(one) for one in hardware.get("targets", [])],
        "architecture": [str(hardware.get("architecture", ""))],
        "online": [str(device.online).lower()],
        "device": [device.device_id],
    }[field]
    if value.endswith("*"):
        return any(one.startswith(value[:-1]) for one in found)
    return value in found


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
