"""The tenants' TUF repositories: documents in the database, online keys in files, one lock per change.

The rules are `model_registry.trust.repository`'s. What is accepted here was signed elsewhere by people; this process
holds only the keys of snapshot, timestamp and director, which can list nothing. Renewal is the clock's turn (`tick`).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import delete, select
from sqlalchemy.orm import Session
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from cloud.control import audit
from cloud.control.database import Database, after_commit, announce
from cloud.control.identity import Principal, Role
from cloud.control.tables import TrustRow
from model_registry.trust import roles
from model_registry.trust.keys import create_key, encode_public_key, load_key, tuf_key
from model_registry.trust.repository import Pending, Repository
from model_registry.trust.trusted import read_metadata
from wire.errors import ConflictError, InvalidInputError, NotFoundError

MAX_METADATA_BYTES = 5 << 20
ONLINE = (Snapshot.type, Timestamp.type)

OnAccepted = Callable[[Session, str, Repository], None]
"""Session, tenant, repository: hears in the same transaction that new documents became current."""


class OnlineKeys:
    """The private keys of the online roles: `snapshot.pem`, later `snapshot-2.pem`, ..., the last is the newest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for role in roles.ONLINE_ROLES:
            if not self._files(role):
                create_key(folder / f"{role}.pem")

    def newest(self, role: str) -> Ed25519PrivateKey:
        """The key that should be named from now on."""
        return load_key(self._files(role)[-1])

    def find(self, role: str, key_ids: list[str]) -> Ed25519PrivateKey:
        """A key that metadata names; `ConflictError` when none of them is here."""
        for path in reversed(self._files(role)):
            key = load_key(path)
            if tuf_key(key.public_key()).keyid in key_ids:
                return key
        raise ConflictError(
            f"this control plane holds no key that may sign {role}", remedy=f"foreshore keys rotate {role}"
        )

    def add(self, role: str) -> Ed25519PrivateKey:
        """Make the next key; it signs once root or targets name it."""
        if role not in roles.ONLINE_ROLES:
            raise InvalidInputError(f"{role!r} is no online role", remedy=f"one of {', '.join(roles.ONLINE_ROLES)}")
        return create_key(self._folder / f"{role}-{len(self._files(role)) + 1}.pem")

    def public(self) -> dict[str, str]:
        """The newest public keys by role, in base64."""
        return {role: encode_public_key(self.newest(role).public_key()) for role in roles.ONLINE_ROLES}

    def _files(self, role: str) -> list[Path]:
        found = {
            int(match[1] or 1): path
            for path in self._folder.glob(f"{role}*.pem")
            if (match := re.fullmatch(rf"{role}(?:-([0-9]+))?\.pem", path.name))
        }
        return [found[number] for number in sorted(found)]


class Trust:
    """The repositories of all tenants."""

    def __init__(self, database: Database, keys: OnlineKeys) -> None:
        self._database = database
        self.keys = keys
        self._listeners: list[OnAccepted] = []
        self._directors: dict[str, Ed25519PrivateKey] = {}

    def on_accepted(self, listener: OnAccepted) -> None:
        """Have `listener` called whenever documents become current."""
        self._listeners.append(listener)

    def repository(self, tenant: str) -> Repository:
        """The tenant's repository now."""
        with self._database.read() as session:
            return load(session, tenant)

    def file(self, tenant: str, name: str) -> bytes:
        """A file as TUF clients ask for it; `NotFoundError` otherwise."""
        data = self.repository(tenant).file(name)
        if data is None:
            raise NotFoundError(f"{name[:100]!r} is not in the trust repository", remedy="see: foreshore keys list")
        return data

    def newest_root(self, tenant: str) -> bytes:
        """The root that a new device is given; `ConflictError` before there is one."""
        repository = self.repository(tenant)
        if Targets.type not in repository.current:
            raise ConflictError(
                f"tenant {tenant!r} has no root of trust: nothing could ever be installed",
                remedy="foreshore keys init",
            )
        return repository.roots[-1]

    def submit(self, by: Principal, role: str, data: bytes) -> Repository:
        """Take a signed document in."""
        with self._database.write() as session:
            return self.submit_in(session, by, role, data)

    def submit_in(self, session: Session, by: Principal, role: str, data: bytes) -> Repository:
        """As `submit`, inside the caller's transaction."""
        before = load(session, by.tenant)
        if not before.roots:
            by.require(Role.ADMIN)
        now = datetime.now(UTC)
        after = before.submit(role, data, now)
        if len(after.roots) > len(before.roots):
            self._require_ours(after.root)
        after = after.sealed(self.keys.find, now)
        _store(session, by.tenant, before, after)
        version = Metadata.from_bytes(data).signed.version
        is_current = after.pending.get(role) is None
        audit.record(
            session, tenant=by.tenant, actor=by.subject, action="trust.submit", subject=role,
            details={"version": version, "is_current": is_current},
        )  # fmt: skip
        announce(session, "trust", by.tenant, {"role": role, "version": version, "is_current": is_current})
        if (after.roots, after.current) != (before.roots, before.current):
            after_commit(session, lambda: self._directors.pop(by.tenant, None))
            for listener in self._listeners:
                listener(session, by.tenant, after)
        return after

    def add_online_key(self, by: Principal, role: str) -> None:
        """Make the next key of an online role."""
        with self._database.write() as session:
            self.keys.add(role)
            audit.record(session, tenant=by.tenant, actor=by.subject, action="trust.online_key", subject=role)

    def director(self, tenant: str) -> Ed25519PrivateKey:
        """The key that signs the assignments of the tenant's devices."""
        if tenant not in self._directors:
            repository = self.repository(tenant)
            if Targets.type not in repository.current:
                return self.keys.newest(roles.DIRECTOR)
            keys, _ = roles.delegated_keys(repository.targets, roles.DIRECTOR)
            self._directors[tenant] = self.keys.find(roles.DIRECTOR, [key.keyid for key in keys])
        return self._directors[tenant]

    def tick(self) -> None:
        """Renew what the online keys sign before it grows old."""
        with self._database.read() as session:
            tenants = session.scalars(select(TrustRow.tenant).distinct()).all()
        for tenant in tenants:
            before = self.repository(tenant)
            if before.sealed(self.keys.find, datetime.now(UTC)) is before:
                continue
            with self._database.write() as session:
                before = load(session, tenant)
                _store(session, tenant, before, before.sealed(self.keys.find, datetime.now(UTC)))

    def _require_ours(self, root: Root) -> None:
        for role in ONLINE:
            self.keys.find(role, root.roles[role].keyids)


def summary(repository: Repository) -> dict[str, Any]:
    """A repository as people see it."""
    documents = {Root.type: repository.roots[-1]} if repository.roots else {}
    documents |= {**repository.current, **repository.online}
    return {
        "roles": [_role_document(role, data) for role, data in documents.items()],
        "pending": [_pending_document(one) for one in repository.waiting()],
    }


def load(session: Session, tenant: str) -> Repository:
    """The tenant's repository as the session sees it."""
    rows = session.scalars(select(TrustRow).where(TrustRow.tenant == tenant).order_by(TrustRow.version)).all()
    current = {row.role: row.data for row in rows if not row.is_pending}
    return Repository(
        roots=tuple(row.data for row in rows if row.role == Root.type and not row.is_pending),
        current={role: data for role, data in current.items() if role not in (Root.type, *ONLINE)},
        pending={row.role: row.data for row in rows if row.is_pending},
        online={role: current[role] for role in ONLINE if role in current},
    )


def _store(session: Session, tenant: str, before: Repository, after: Repository) -> None:
    """Write what differs; of all roles but root only the newest version is kept."""
    for number, data in enumerate(after.roots[len(before.roots) :], start=len(before.roots) + 1):
        session.add(TrustRow(tenant=tenant, role=Root.type, version=number, is_pending=False, data=data))
    old, new = {**before.current, **before.online}, {**after.current, **after.online}
    for is_pending, was, now in ((False, old, new), (True, before.pending, after.pending)):
        for role in [role for role in {*was, *now} if was.get(role) != now.get(role)]:
            gone = delete(TrustRow).where(
                TrustRow.tenant == tenant, TrustRow.role == role, TrustRow.is_pending.is_(is_pending)
            )
            session.execute(gone)
            if role in now:
                version = Metadata.from_bytes(now[role]).signed.version
                session.add(TrustRow(tenant=tenant, role=role, version=version, is_pending=is_pending, data=now[role]))
    session.flush()


def _role_document(role: str, data: bytes) -> dict[str, Any]:
    signed = Metadata.from_bytes(data).signed
    document = {"role": role, "version": signed.version, "expires_at": signed.expires.isoformat()}
    if isinstance(signed, Root):
        document["keys"] = {
            name: {"key_ids": one.keyids, "threshold": one.threshold} for name, one in signed.roles.items()
        }
    if isinstance(signed, Targets):
        document["num_releases"] = len(signed.targets)
        delegations = signed.delegations.roles if signed.delegations else None
        document["delegations"] = {
            name: {"key_ids": one.keyids, "threshold": one.threshold, "paths": one.paths}
            for name, one in (delegations or {}).items()
        }
    return document


def _pending_document(pending: Pending) -> dict[str, Any]:
    return {
        "role": pending.role,
        "version": pending.version,
        "num_signatures": pending.num_signatures,
        "threshold": pending.threshold,
        "key_ids": list(pending.key_ids),
        "metadata": base64.b64encode(pending.data).decode(),
    }


def listed_in(role: str, data: bytes) -> Targets:
    """The targets role inside `data`, unverified."""
    if role in (Root.type, *ONLINE):
        raise InvalidInputError(f"{role} lists no releases", remedy="send the publisher's role")
    return read_metadata(Targets, data).signed
