"""The roles of a tenant and how each next version of their metadata is made. Pure: documents in, documents out.

    root       offline   names the keys of root, targets, snapshot and timestamp
    targets    offline   delegates: one role per publisher (`releases/MODEL/DIGEST`), and `director` (`assignments/...`)
    PUBLISHER  offline   lists releases by digest; a release lists its manifests, a manifest its chunks
    director   online    signs each device's assignment (`wire.messages.Desired`); can list nothing
    snapshot, timestamp  online   say which versions belong together, and that they are the newest

Making a version never signs it: `signed` does, with whatever keys are at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from datetime import datetime, timedelta
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.signer import Key
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from model_registry.manifest import EngineBuild, Release
from model_registry.trust.keys import tuf_key, tuf_signer
from model_registry.trust.trusted import SIGNED_AT
from wire.errors import ConflictError, InvalidInputError, NotFoundError
from wire.topics import check_name

DIRECTOR = "director"
ASSIGNMENTS = "assignments/*"
OFFLINE_LIFE = timedelta(days=365)
SNAPSHOT_LIFE = timedelta(days=30)
TIMESTAMP_LIFE = timedelta(days=7)
ONLINE_ROLES = (Snapshot.type, Timestamp.type, DIRECTOR)
TOP_ROLES = (Root.type, Targets.type, Snapshot.type, Timestamp.type)

Listed = Release | EngineBuild
"""What a publisher's list may hold."""

S = TypeVar("S", Root, Snapshot, Targets, Timestamp)


def release_path(model: str, digest: str) -> str:
    """The target path of a release."""
    return f"releases/{check_name('model', model)}/{digest}"


def first_root(
    *,
    root: Sequence[Ed25519PublicKey],
    targets: Sequence[Ed25519PublicKey],
    snapshot: Ed25519PublicKey,
    timestamp: Ed25519PublicKey,
    now: datetime,
    root_threshold: int = 1,
    targets_threshold: int = 1,
) -> Metadata[Root]:
    """Version 1 of root."""
    made = Root(version=1, expires=_expiry(now, OFFLINE_LIFE), consistent_snapshot=True)
    wanted = {
        Root.type: (root, root_threshold), Targets.type: (targets, targets_threshold),
        Snapshot.type: ([snapshot], 1), Timestamp.type: ([timestamp], 1),
    }  # fmt: skip
    for role, (keys, threshold) in wanted.items():
        _set_top_keys(made, role, keys, threshold)
    return Metadata(made)


def first_targets(director: Ed25519PublicKey, now: datetime) -> Metadata[Targets]:
    """Version 1 of targets: nobody but the director, who can list nothing."""
    key = tuf_key(director)
    role = DelegatedRole(DIRECTOR, [key.keyid], 1, True, paths=[ASSIGNMENTS])
    delegations = Delegations({key.keyid: key}, {DIRECTOR: role})
    return Metadata(Targets(version=1, expires=_expiry(now, OFFLINE_LIFE), delegations=delegations))


def first_publisher(now: datetime) -> Metadata[Targets]:
    """Version 1 of a publisher's role: an empty list."""
    return Metadata(Targets(version=1, expires=_expiry(now, OFFLINE_LIFE)))


def renewed(metadata: Metadata[S], now: datetime, life: timedelta = OFFLINE_LIFE) -> Metadata[S]:
    """The next version with the same content, unsigned."""
    signed = deepcopy(metadata.signed)
    signed.version += 1
    signed.expires = _expiry(now, life)
    return Metadata(signed)


def with_release(metadata: Metadata[Targets], release: Listed, now: datetime) -> Metadata[Targets]:
    """The next version of a publisher's role, listing one document more."""
    made = renewed(metadata, now)
    data = release.to_bytes()
    path = release_path(release.name, release.digest)
    listed = TargetFile(len(data), {"sha256": release.digest}, path, {"custom": dict(release.listing)})
    made.signed.targets[path] = listed
    return made


def without_release(metadata: Metadata[Targets], path: str, now: datetime) -> Metadata[Targets]:
    """The next version of a publisher's role, listing this document no longer."""
    made = renewed(metadata, now)
    if made.signed.targets.pop(path, None) is None:
        raise NotFoundError(f"{path} is not listed", remedy="foreshore models show NAME tells the releases and signers")
    return made


def with_delegation(
    metadata: Metadata[Targets],
    role: str,
    keys: Sequence[Ed25519PublicKey],
    now: datetime,
    *,
    threshold: int = 1,
    models: Sequence[str] = ("*",),
) -> Metadata[Targets]:
    """The next version of targets in which `role` (a publisher, or the director) has exactly these keys."""
    if role in TOP_ROLES:
        raise InvalidInputError(f"{role!r} is no name for a publisher", remedy="choose another")
    check_name("publisher", role)
    _check_threshold(role, keys, threshold)
    made = renewed(metadata, now)
    delegations = made.signed.delegations
    assert delegations is not None
    assert delegations.roles is not None
    paths = [ASSIGNMENTS] if role == DIRECTOR else [f"releases/{one}/*" for one in models]
    found = [tuf_key(key) for key in keys]
    delegations.roles[role] = DelegatedRole(
        role, [key.keyid for key in found], threshold, role == DIRECTOR, paths=paths
    )
    delegations.keys.update({key.keyid: key for key in found})
    used = {name for one in delegations.roles.values() for name in one.keyids}
    delegations.keys = {name: key for name, key in delegations.keys.items() if name in used}
    return made


def with_top_keys(
    metadata: Metadata[Root], role: str, keys: Sequence[Ed25519PublicKey], now: datetime, *, threshold: int = 1
) -> Metadata[Root]:
    """The next version of root in which a top-level role has exactly these keys."""
    made = renewed(metadata, now)
    _set_top_keys(made.signed, role, keys, threshold)
    return made


def make_snapshot(version: int, listed: Iterable[tuple[str, int, bytes]], now: datetime) -> Metadata[Snapshot]:
    """A snapshot of (role, version, bytes)."""
    meta = {f"{role}.json": MetaFile.from_data(number, data, ["sha256"]) for role, number, data in listed}
    return Metadata(Snapshot(version=version, expires=_expiry(now, SNAPSHOT_LIFE), meta=meta))


def make_timestamp(version: int, snapshot: bytes, snapshot_version: int, now: datetime) -> Metadata[Timestamp]:
    """A timestamp of a snapshot, signed now."""
    meta = MetaFile.from_data(snapshot_version, snapshot, ["sha256"])
    at = {SIGNED_AT: now.isoformat(timespec="seconds")}
    expires = _expiry(now, TIMESTAMP_LIFE)
    return Metadata(Timestamp(version=version, expires=expires, snapshot_meta=meta, unrecognized_fields=at))


def signed(metadata: Metadata[Any], *keys: Ed25519PrivateKey) -> bytes:
    """The metadata with these signatures besides those it carries."""
    for key in keys:
        metadata.sign(tuf_signer(key), append=True)
    return metadata.to_bytes(JSONSerializer(compact=True))


def delegated_keys(targets: Targets, role: str) -> tuple[list[Key], int]:
    """The keys that may sign for a delegated role, and how many must."""
    delegations = targets.delegations
    if delegations is None or not delegations.roles or role not in delegations.roles:
        raise ConflictError(f"targets delegates to no {role!r}", remedy=f"foreshore keys add-publisher {role}")
    found: Role = delegations.roles[role]
    return [delegations.keys[name] for name in found.keyids if name in delegations.keys], found.threshold


def publishers(targets: Targets) -> list[str]:
    """The names of the publishers' roles, most trusted first."""
    roles = targets.delegations.roles if targets.delegations else None
    return [name for name in roles or {} if name != DIRECTOR]


def _set_top_keys(root: Root, role: str, keys: Sequence[Ed25519PublicKey], threshold: int) -> None:
    _check_threshold(role, keys, threshold)
    for name in list(root.roles[role].keyids):
        root.revoke_key(name, role)
    for key in keys:
        root.add_key(tuf_key(key), role)
    root.roles[role].threshold = threshold


def _check_threshold(role: str, keys: Sequence[Ed25519PublicKey], threshold: int) -> None:
    if not 1 <= threshold <= len(keys):
        raise InvalidInputError(
            f"{role} has {len(keys)} keys and wants {threshold} signatures", remedy="a threshold of 1 to all of them"
        )


def _expiry(now: datetime, life: timedelta) -> datetime:
    return (now + life).replace(microsecond=0)
