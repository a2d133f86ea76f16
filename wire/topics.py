"""Every MQTT topic Foreshore uses: builders, and one parser for what the control plane receives.

Shape: `fs/1/{tenant}/d/{device}/{leaf}` for one device, `fs/1/{tenant}/a/{digest}/...` for content that all devices of
a tenant share, `fs/1/epoch` for the control plane's own sign of life. The broker's user name of a device is
`{tenant}.{device}`, the common name of its certificate; names therefore hold neither dots, slashes nor wildcards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from wire.errors import InvalidInputError

ROOT = "fs/1"
EPOCH = f"{ROOT}/epoch"

DEVICE_READS = ("desired", "chunk", "cmd/+")
"""Leaves below `d/{device}/` that a device may subscribe to."""

DEVICE_WRITES = ("reported", "status", "need", "event", "rsp/+")
"""Leaves below `d/{device}/` that a device may publish."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class DeviceTopic:
    """A topic of one device, parsed."""

    tenant: str
    device_id: str
    leaf: str


def check_name(kind: str, value: str) -> str:
    """Return `value` if it may stand in a topic and a certificate name: lower-case letters, digits and hyphens."""
    if not _NAME.fullmatch(value):
        raise InvalidInputError(
            f"{kind} {value!r} is not a valid name",
            remedy="use 1 to 64 lower-case letters, digits and inner hyphens",
        )
    return value


def mqtt_user(tenant: str, device_id: str) -> str:
    """The broker user name (certificate common name) of a device."""
    return f"{check_name('tenant', tenant)}.{check_name('device', device_id)}"


def device(tenant: str, device_id: str, leaf: str) -> str:
    """The topic `leaf` of one device."""
    return f"{ROOT}/{check_name('tenant', tenant)}/d/{check_name('device', device_id)}/{leaf}"


def all_devices(leaf: str) -> str:
    """The filter by which the control plane hears `leaf` from every device of every tenant."""
    return f"{ROOT}/+/d/+/{leaf}"


def manifest_page(tenant: str, digest: str) -> str:
    """The topic on which the pages of a manifest are sent."""
    return f"{ROOT}/{check_name('tenant', tenant)}/a/{_check_digest(digest)}/manifest"


def chunks(tenant: str, digest: str, encoding: str) -> str:
    """The shared topic of one encoding of the artefact whose manifest has `digest`."""
    return f"{ROOT}/{check_name('tenant', tenant)}/a/{_check_digest(digest)}/c/{check_name('encoding', encoding)}"


def shared(tenant: str) -> str:
    """The filter for all shared content of a tenant (for access lists)."""
    return f"{ROOT}/{check_name('tenant', tenant)}/a/#"


def parse_device(topic: str) -> DeviceTopic:
    """Take a device's topic apart; anything else raises `InvalidInputError`."""
    parts = topic.split("/", 5)
    if len(parts) != 6 or "/".join(parts[:2]) != ROOT or parts[3] != "d":
        raise InvalidInputError(f"topic {topic!r} is not a device topic", remedy="expected fs/1/TENANT/d/DEVICE/LEAF")
    return DeviceTopic(check_name("tenant", parts[2]), check_name("device", parts[4]), parts[5])


def _check_digest(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise InvalidInputError(f"digest {digest!r} is not a SHA-256 in lower-case hex", remedy="64 hex characters")
    return digest
