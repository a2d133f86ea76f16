"""What filters can ask of a device, kept as rows so that a database answers for a hundred thousand devices.

Written in the transaction that stores a report or labels, and only when something changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import delete
from sqlalchemy.orm import Session

from cloud.control.placement import hardware_of
from cloud.control.tables import Device, DeviceFact
from model_registry.compatibility import key_of

LABEL = "label."
NUMBERS = {"memory": "memory_bytes", "budget": "memory_budget_bytes", "context": "max_context_tokens"}
MAX_VALUE_CHARS = 200

Fact = tuple[str, str, float | None]


def facts_of(reported: Mapping[str, Any] | None, hardware: Mapping[str, Any], labels: Mapping[str, Any]) -> set[Fact]:
    """Name, value and, where it can be compared, number of all that is known of a device."""
    return {(name, value[:MAX_VALUE_CHARS], number) for name, value, number in _facts(reported or {}, hardware, labels)}


def _facts(reported: Mapping[str, Any], hardware: Mapping[str, Any], labels: Mapping[str, Any]) -> Iterator[Fact]:
    for name in ("profile", "architecture", "accelerator"):
        if hardware.get(name):
            yield name, str(hardware[name]), None
    hardware_key = key_of(hardware_of(hardware))
    if hardware_key is not None:
        yield "key", str(hardware_key), None
    for target in hardware.get("targets") or ():
        yield "target", str(target), None
    for feature in hardware.get("cpu_features") or ():
        yield "feature", str(feature), None
    for runtime in hardware.get("runtimes") or {}:
        yield "runtime", str(runtime), None
    for name, key in NUMBERS.items():
        if hardware.get(key):
            yield name, str(hardware[key]), float(hardware[key])
    if reported.get("agent_version"):
        yield "agent", str(reported["agent_version"]), version_number(str(reported["agent_version"]))
    for model in reported.get("models") or ():
        if model.get("active_version"):
            yield "runs", f"{model['name']}@{model['active_version']}", None
    for name, value in labels.items():
        yield f"{LABEL}{name}", str(value), _number(str(value))


def store_facts(session: Session, device: Device, before: set[Fact]) -> None:
    """Bring a device's rows from `before` to what it is now."""
    now = facts_of(device.reported, device.hardware or {}, device.labels or {})
    if now == before:
        return
    own = (DeviceFact.tenant == device.tenant) & (DeviceFact.device_id == device.device_id)
    session.execute(delete(DeviceFact).where(own))
    values = {(name, value): number for name, value, number in now}
    session.add_all(
        DeviceFact(tenant=device.tenant, device_id=device.device_id, name=name, value=value, number=number)
        for (name, value), number in values.items()
    )


def version_number(text: str) -> float | None:
    """A version such as 1.12.3 as a number that compares as versions do; None for another text."""
    match = re.match(r"v?(\d{1,5})(?:\.(\d{1,5}))?(?:\.(\d{1,5}))?", text)
    if match is None:
        return None
    major, minor, patch = (int(part or 0) for part in match.groups())
    return float((major * 100_000 + minor) * 100_000 + patch)


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"-?\d{1,15}(\.\d{1,9})?", text) else None
