"""The TUF client's workflow as a pure object: bytes go in, what is trusted comes out, in the specification's order.

https://theupdateframework.github.io/specification/latest/ section 5, with one error type per reason. Rules:
1. Root first, one version at a time; each is signed by its predecessor and by itself.
2. Nothing below a role is accepted while that role is expired; versions never fall, entries never vanish.
3. A delegated role is verified against the role that delegates to it now, each time, however it was obtained.
4. The newest accepted timestamp's `signed_at` is proven time (see `clock`).
No clock but the one handed in, no disk, no network.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, TypeVar

from tuf.api.exceptions import LengthOrHashMismatchError, UnsignedMetadataError
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from model_registry.trust.clock import TrustedClock
from model_registry.trust.errors import (
    ExpiredError,
    ForgedError,
    FrozenError,
    MalformedError,
    MixedError,
    RolledBackError,
)

SIGNED_AT = "x-foreshore-signed-at"
"""Field of timestamp metadata: when the online key signed it, ISO 8601. A key of our own, ignored by other clients."""

S = TypeVar("S", Root, Timestamp, Snapshot, Targets)


class TrustedSet:
    """What is trusted at one moment. Starts from a root that somebody trustworthy handed over."""

    def __init__(self, root: bytes, clock: TrustedClock) -> None:
        self._clock = clock
        metadata = read_metadata(Root, root)
        verify(metadata, metadata.signed, Root.type)
        self.root = metadata.signed
        self.timestamp: Timestamp | None = None
        self.snapshot: Snapshot | None = None
        self._targets: dict[tuple[str, str], Targets] = {}  # by role and delegator

    @property
    def now(self) -> datetime:
        """The time that expiry is judged by."""
        return self._clock.now(signed_at(self.timestamp) if self.timestamp else None)

    @property
    def targets(self) -> Targets:
        """The top-level targets; only after `update_targets`."""
        return self._targets[(Targets.type, Root.type)]

    def find(self, role: str, delegator: str) -> Targets | None:
        """A targets role as `delegator` vouches for it."""
        return self._targets.get((role, delegator))

    def update_root(self, data: bytes) -> None:
        """The next root, signed by the present one and by itself."""
        new = read_metadata(Root, data)
        verify(new, self.root, Root.type)
        if new.signed.version != self.root.version + 1:
            raise RolledBackError(
                f"root has version {new.signed.version}, {self.root.version + 1} is due",
                remedy="serve each version of root under its own number",
            )
        verify(new, new.signed, Root.type)
        self.root = new.signed

    def update_timestamp(self, data: bytes) -> bool:
        """Accept a timestamp; False when it is the one that is trusted already."""
        self._require_fresh_root()
        new = self._read(Timestamp, data).signed
        if self.timestamp is not None:
            if new.version == self.timestamp.version:
                return False
            _require_not_older("timestamp", new.version, self.timestamp.version)
            _require_not_older("snapshot", new.snapshot_meta.version, self.timestamp.snapshot_meta.version)
        self.timestamp = new
        return True

    def update_snapshot(self, data: bytes, *, is_local: bool = False) -> None:
        """Accept a snapshot. A local one was verified before: it serves against roll-back even if it is outdated."""
        timestamp = self.require_timestamp()
        if not is_local:
            self._require_listed(Snapshot, data, timestamp.snapshot_meta, self.root, Snapshot.type)
        new = self._read(Snapshot, data).signed
        if self.snapshot is not None:
            _require_nothing_lost(self.snapshot, new)
        self.snapshot = new
        self._require_final_snapshot()

    def update_targets(self, data: bytes, role: str = Targets.type, delegator: str = Root.type) -> Targets:
        """Accept a targets role, as `delegator` (already trusted) vouches for it."""
        new = self.verified_targets(data, role, delegator).signed
        _require_unexpired(new, role, self.now, ExpiredError)
        self._targets[(role, delegator)] = new
        return new

    def verified_targets(self, data: bytes, role: str, delegator: str) -> Metadata[Targets]:
        """A targets role that is genuine and current, expired or not; not accepted by this."""
        meta = self.listed(role)
        above: Root | Targets = self.root if delegator == Root.type else self._by_name(delegator)
        self._require_listed(Targets, data, meta, above, role)
        metadata = read_metadata(Targets, data)
        verify(metadata, above, role)
        version = metadata.signed.version
        if version != meta.version:
            raise MixedError(f"{role} has version {version}, snapshot lists {meta.version}", remedy="serve both")
        return metadata

    def listed(self, role: str) -> MetaFile:
        """What the current snapshot says about a targets role."""
        snapshot = self._require_final_snapshot()
        try:
            return snapshot.meta[f"{role}.json"]
        except KeyError:
            raise MixedError(f"snapshot does not list {role}", remedy="publish that role's metadata") from None

    def require_fresh(self, *roles: tuple[str, str]) -> None:
        """Raise `ExpiredError` unless everything up to these targets roles is valid now."""
        now = self.now
        parts: list[tuple[str, Signed | None]] = [
            ("root", self.root), ("timestamp", self.timestamp), ("snapshot", self.snapshot),
            *((role, self._targets.get((role, above))) for role, above in roles),
        ]  # fmt: skip
        for name, part in parts:
            if part is None:
                raise ExpiredError(f"{name} was never accepted", remedy="reach the control plane or give a bundle")
            _require_unexpired(part, name, now, ExpiredError)

    def _by_name(self, role: str) -> Targets:
        found = next((targets for (name, _), targets in self._targets.items() if name == role), None)
        if found is None:
            raise ForgedError(f"{role} is not trusted and cannot delegate", remedy="load it first")
        return found

    def _read(self, kind: type[S], data: bytes) -> Metadata[S]:
        metadata = read_metadata(kind, data)
        verify(metadata, self.root, kind.type)
        return metadata

    def _require_fresh_root(self) -> None:
        _require_unexpired(self.root, "root", self.now, ExpiredError)

    def require_timestamp(self) -> Timestamp:
        """The timestamp, which must not have expired."""
        if self.timestamp is None:
            raise ExpiredError("timestamp was never accepted", remedy="reach the control plane or give a bundle")
        _require_unexpired(self.timestamp, "timestamp", self.now, FrozenError)
        return self.timestamp

    def _require_final_snapshot(self) -> Snapshot:
        timestamp = self.require_timestamp()
        if self.snapshot is None:
            raise ExpiredError("snapshot was never accepted", remedy="reach the control plane or give a bundle")
        _require_unexpired(self.snapshot, "snapshot", self.now, FrozenError)
        if self.snapshot.version != timestamp.snapshot_meta.version:
            raise MixedError(
                f"snapshot has version {self.snapshot.version}, timestamp lists {timestamp.snapshot_meta.version}",
                remedy="serve the snapshot that the timestamp lists",
            )
        return self.snapshot

    @staticmethod
    def _require_listed(kind: type[S], data: bytes, meta: MetaFile, above: Root | Targets, role: str) -> None:
        try:
            meta.verify_length_and_hashes(data)
        except LengthOrHashMismatchError as error:
            verify(read_metadata(kind, data), above, role)  # genuine at least? else the reason is forgery
            raise MixedError(f"{role} is not the file that is listed: {error}", remedy="serve both together") from error


def read_metadata(kind: type[S], data: bytes) -> Metadata[S]:
    """Metadata of this type, unverified."""
    try:
        metadata = Metadata[S].from_bytes(data)
    except (DeserializationError, RecursionError) as error:
        raise MalformedError(f"{kind.type} is not TUF metadata: {error}"[:300], remedy="fetch it again") from error
    if not isinstance(metadata.signed, kind):
        raise MalformedError(f"a {metadata.signed.type} came in the place of a {kind.type}", remedy="fetch it again")
    return metadata


def verify(metadata: Metadata[Any], above: Root | Targets, role: str) -> None:
    """Raise `ForgedError` unless enough keys that `above` names for `role` signed."""
    try:
        above.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (UnsignedMetadataError, ValueError) as error:
        raise ForgedError(f"{role}: {error}", remedy="do not trust whoever served this") from error


def signed_at(timestamp: Timestamp) -> datetime | None:
    """When the online key says it signed; never later than the expiry."""
    text = timestamp.unrecognized_fields.get(SIGNED_AT)
    if not isinstance(text, str):
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return min(at, timestamp.expires)


def _require_not_older(name: str, found: int, known: int) -> None:
    if found < known:
        raise RolledBackError(f"{name} has version {found}, {known} was seen", remedy="serve the newest")


def _require_nothing_lost(old: Snapshot, new: Snapshot) -> None:
    for name, meta in old.meta.items():
        if name not in new.meta:
            raise RolledBackError(f"snapshot no longer lists {name}", remedy="serve the newest")
        _require_not_older(name, new.meta[name].version, meta.version)


def _require_unexpired(part: Signed, name: str, now: datetime, kind: type[ExpiredError] | type[FrozenError]) -> None:
    if part.is_expired(now):
        raise kind(
            f"{name} expired at {part.expires:%Y-%m-%d %H:%M} UTC, it is {now:%Y-%m-%d %H:%M}",
            remedy="check the clock, then renew the metadata: foreshore keys sign",
        )
