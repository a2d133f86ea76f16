"""A tenant's TUF repository as a value: what is current, what still lacks signatures, and what the online keys add.

Rules:
1. A document enters as the next version of its role, with at least one good signature; more may be added later.
2. Documents become current only together as a whole tree: root by root, targets by root, every publisher by targets.
3. The online part (`sealed`) lists what is current and nothing else; it can make nothing current.
Pure: no clock, no disk; the keys are handed in.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import combinations
from typing import Any
from urllib.parse import unquote

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp

from model_registry.trust import roles
from model_registry.trust.errors import ForgedError, TrustError
from model_registry.trust.trusted import read_metadata, verify
from wire.errors import ConflictError, InvalidInputError, NotFoundError

MAX_PENDING = 6
TIMESTAMP_EVERY = timedelta(days=1)
_VERSIONED = re.compile(r"([1-9][0-9]{0,15})\.(.{1,200})\.json", re.DOTALL)

FindKey = Callable[[str, list[str]], Ed25519PrivateKey]
"""Online role and acceptable TUF key ids -> the private key to sign with."""


@dataclass(frozen=True)
class Pending:
    """A document that waits for signatures or for other documents."""

    role: str
    version: int
    data: bytes
    num_signatures: int
    threshold: int
    key_ids: tuple[str, ...]  # that may sign it


@dataclass(frozen=True)
class Repository:
    """Everything of one tenant."""

    roots: tuple[bytes, ...] = ()  # every version, the first first
    current: Mapping[str, bytes] = field(default_factory=dict)  # targets and publishers
    pending: Mapping[str, bytes] = field(default_factory=dict)
    online: Mapping[str, bytes] = field(default_factory=dict)  # snapshot and timestamp

    @property
    def root(self) -> Root:
        """The newest root."""
        if not self.roots:
            raise NotFoundError("this tenant has no root of trust", remedy="foreshore keys init")
        return read_metadata(Root, self.roots[-1]).signed

    @property
    def targets(self) -> Targets:
        """The current targets."""
        if Targets.type not in self.current:
            raise NotFoundError("this tenant has no targets metadata", remedy="foreshore keys init")
        return read_metadata(Targets, self.current[Targets.type]).signed

    def file(self, name: str) -> bytes | None:
        """A file by the name under which clients ask for it."""
        if name == "timestamp.json":
            return self.online.get(Timestamp.type)
        match = _VERSIONED.fullmatch(name)
        if match is None:
            return None
        version, role = int(match[1]), unquote(match[2])
        if role == Root.type:
            return self.roots[version - 1] if version <= len(self.roots) else None
        data = self.online.get(role) if role == Snapshot.type else self.current.get(role)
        return data if data is not None and Metadata.from_bytes(data).signed.version == version else None

    def find_release(self, model: str, digest: str) -> TargetFile | None:
        """The entry of a release in any publisher's current list that may list it."""
        listed = self._find_list(model, digest)
        return listed[1].signed.targets[roles.release_path(model, digest)] if listed is not None else None

    def find_signers(self, model: str, digest: str) -> tuple[str, tuple[str, ...]] | None:
        """The publisher whose current list holds a release, and the ids of the keys that really signed that list."""
        listed = self._find_list(model, digest)
        if listed is None:
            return None
        role, metadata = listed
        result = self.targets.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
        return role, tuple(sorted(result.signed))

    def _find_list(self, model: str, digest: str) -> tuple[str, Metadata[Targets]] | None:
        """The first publisher's current list that may list a release and does."""
        path = roles.release_path(model, digest)
        delegations = self.targets.delegations if Targets.type in self.current else None
        for role, _ in delegations.get_roles_for_target(path) if delegations else ():
            metadata = read_metadata(Targets, self.current[role])
            entry = metadata.signed.targets.get(path)
            if entry is not None and entry.hashes.get("sha256") == digest:
                return role, metadata
        return None

    def submit(self, role: str, data: bytes, now: datetime) -> Repository:
        """Take a document in; what it completes becomes current. Raises a `TrustError` or `ConflictError`."""
        metadata = self._merged(role, read_metadata(_kind(role), data))
        self._check_due(role, metadata.signed.version)
        if metadata.signed.expires <= now:
            raise ConflictError(f"{role} version {metadata.signed.version} has expired", remedy="sign a new one")
        if not self._count(role, metadata)[0]:
            raise ForgedError(f"no key that may sign {role} signed this", remedy="see: foreshore keys list")
        if role not in self.pending and len(self.pending) >= MAX_PENDING:
            raise ConflictError(f"{MAX_PENDING} documents wait for signatures", remedy="foreshore keys sign")
        return replace(self, pending={**self.pending, role: roles.signed(metadata)})._settled()

    def waiting(self) -> list[Pending]:
        """What is pending, with how far it is."""
        found = []
        for role, data in self.pending.items():
            metadata = read_metadata(_kind(role), data)
            count, threshold = self._count(role, metadata)
            found.append(Pending(role, metadata.signed.version, data, count, threshold, self._signers(role, metadata)))
        return found

    def sealed(self, find_key: FindKey, now: datetime) -> Repository:
        """The repository with a snapshot and a timestamp that are right and not old. Itself when nothing is due."""
        if Targets.type not in self.current:
            return self
        root = self.root
        snapshot = self._snapshot(root, find_key, now)
        timestamp = self._timestamp(root, snapshot, find_key, now)
        online = {Snapshot.type: snapshot, Timestamp.type: timestamp}
        return self if online == dict(self.online) else replace(self, online=online)

    def _merged(self, role: str, metadata: Metadata[Any]) -> Metadata[Any]:
        held = self.pending.get(role)
        if held is not None:
            known = read_metadata(_kind(role), held)
            if known.signed_bytes == metadata.signed_bytes:
                known.signatures.update(metadata.signatures)
                return known
        return metadata

    def _check_due(self, role: str, version: int) -> None:
        due = len(self.roots) + 1
        if role != Root.type:
            held = self.current.get(role)
            due = read_metadata(Targets, held).signed.version + 1 if held is not None else 1
        if version != due:
            raise ConflictError(f"{role} version {version} was sent, {due} is due", remedy="refresh and sign again")

    def _count(self, role: str, metadata: Metadata[Any]) -> tuple[int, int]:
        """Good signatures under the delegation most likely to come true, and how many are needed."""
        best = (0, 1)
        for above in self._delegators(role, metadata):
            try:
                result = above.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
            except ValueError:
                continue
            best = max(best, (len(result.signed), result.threshold))
        return best

    def _signers(self, role: str, metadata: Metadata[Any]) -> tuple[str, ...]:
        found = set[str]()
        for above in self._delegators(role, metadata):
            with contextlib.suppress(ValueError):
                found |= set(above.get_delegated_role(role).keyids)
        return tuple(sorted(found))

    def _delegators(self, role: str, metadata: Metadata[Any]) -> list[Root | Targets]:
        kind: type[Any] = Root if role in roles.TOP_ROLES else Targets
        known = list(self.roots[-1:]) if kind is Root else [self.current.get(Targets.type)]
        documents = [data for data in (*known, self.pending.get(kind.type)) if data is not None]
        found: list[Any] = [read_metadata(kind, data).signed for data in documents]
        return [*found, metadata.signed] if role == Root.type else found

    def _settled(self) -> Repository:
        """Move as many pending documents as form a whole with the current ones."""
        names = sorted(self.pending)
        for size in range(len(names), 0, -1):
            for chosen in combinations(names, size):
                moved = self._with(chosen)
                if moved._is_whole():
                    return moved
        return self

    def _with(self, chosen: tuple[str, ...]) -> Repository:
        rest = {role: data for role, data in self.pending.items() if role not in chosen}
        roots = (*self.roots, self.pending[Root.type]) if Root.type in chosen else self.roots
        below = {role: self.pending[role] for role in chosen if role != Root.type}
        return replace(self, roots=roots, current={**self.current, **below}, pending=rest)

    def _is_whole(self) -> bool:
        if not self.roots:
            return False
        try:
            newest = read_metadata(Root, self.roots[-1])
            verify(newest, read_metadata(Root, self.roots[max(len(self.roots) - 2, 0)]).signed, Root.type)
            verify(newest, newest.signed, Root.type)
            if Targets.type not in self.current:
                return not self.current
            targets = read_metadata(Targets, self.current[Targets.type])
            verify(targets, newest.signed, Targets.type)
            for role in roles.publishers(targets.signed):
                if role not in self.current:
                    return False
                verify(read_metadata(Targets, self.current[role]), targets.signed, role)
        except TrustError:
            return False
        return True

    def _snapshot(self, root: Root, find_key: FindKey, now: datetime) -> bytes:
        listed = [(role, read_metadata(Targets, data).signed.version, data) for role, data in self.current.items()]
        held = self._held(Snapshot, root)
        version = held.signed.version + 1 if held else self._next_version(Snapshot)
        made = roles.make_snapshot(version, listed, now)
        if held and held.signed.meta == made.signed.meta and held.signed.expires - now > roles.SNAPSHOT_LIFE / 2:
            return self.online[Snapshot.type]
        return roles.signed(made, find_key(Snapshot.type, root.roles[Snapshot.type].keyids))

    def _timestamp(self, root: Root, snapshot: bytes, find_key: FindKey, now: datetime) -> bytes:
        held = self._held(Timestamp, root)
        version = held.signed.version + 1 if held else self._next_version(Timestamp)
        made = roles.make_timestamp(version, snapshot, read_metadata(Snapshot, snapshot).signed.version, now)
        is_young = held is not None and made.signed.expires - held.signed.expires < TIMESTAMP_EVERY
        if held and is_young and held.signed.snapshot_meta == made.signed.snapshot_meta:
            return self.online[Timestamp.type]
        return roles.signed(made, find_key(Timestamp.type, root.roles[Timestamp.type].keyids))

    def _held(self, kind: type[Any], root: Root) -> Metadata[Any] | None:
        """The online document, if the present root still vouches for it."""
        if kind.type not in self.online:
            return None
        metadata = read_metadata(kind, self.online[kind.type])
        try:
            verify(metadata, root, kind.type)
        except ForgedError:
            return None
        return metadata

    def _next_version(self, kind: type[Any]) -> int:
        return read_metadata(kind, self.online[kind.type]).signed.version + 1 if kind.type in self.online else 1


def _kind(role: str) -> type[Any]:
    if role in (Snapshot.type, Timestamp.type, roles.DIRECTOR):
        raise InvalidInputError(f"{role} is made by the control plane", remedy="submit root, targets or a publisher")
    return Root if role == Root.type else Targets
