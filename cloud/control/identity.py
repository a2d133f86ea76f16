"""Who may do what: API tokens with roles, one-time enrolment of devices, the keys that stand behind signatures.

A token is 32 random bytes; only its SHA-256 is kept. Roles are a ladder (viewer, operator, publisher, admin), besides
three that are no rung of it: worker, gateway, device. A principal acts inside one tenant; the worker and the gateway
serve all, so only an administrator of the platform (an admin of the default tenant) makes their tokens. A device is
known to this API by its certificate; its token is good for the gateway only. Every change is in the audit chain.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud.control import audit
from cloud.control.authority import Authority, Issued, check_user
from cloud.control.certificates import Certificates, PeerCertificate, revoke_all
from cloud.control.database import Database, announce
from cloud.control.device_facts import store_facts
from cloud.control.tables import Device, Enrolment, Token
from wire import topics
from wire.errors import ConflictError, InvalidInputError, NotAllowedError, NotAuthenticatedError, NotFoundError

DEFAULT_TENANT = "default"
ENROLMENT_S = 24 * 3600
MAX_ENROLMENT_S = 30 * 24 * 3600
MAX_TOKEN_CHARS = 200


class Role(StrEnum):
    """What a token is good for."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    PUBLISHER = "publisher"
    ADMIN = "admin"
    WORKER = "worker"
    GATEWAY = "gateway"
    DEVICE = "device"


PLATFORM_ROLES = frozenset({Role.WORKER, Role.GATEWAY})  # they serve every tenant
LADDER = (Role.VIEWER, Role.OPERATOR, Role.PUBLISHER, Role.ADMIN)


@dataclass(frozen=True)
class Principal:
    """Whoever sent a request."""

    tenant: str
    subject: str
    role: Role
    token_id: str
    device_id: str | None = None

    def has(self, *roles: Role) -> bool:
        """Whether one of `roles` is held: itself, or by standing higher on the ladder."""
        for role in roles:
            if self.role is role:
                return True
            if role in LADDER and self.role in LADDER and LADDER.index(self.role) >= LADDER.index(role):
                return True
        return False

    def require(self, *roles: Role) -> None:
        """Raise `NotAllowedError` unless one of `roles` is held."""
        if not self.has(*roles):
            raise NotAllowedError(
                f"a {self.role} token may not do this", remedy=f"use a token with role {' or '.join(roles)}"
            )


SYSTEM = Principal(DEFAULT_TENANT, "control-plane", Role.ADMIN, "")


class Identity:
    """Tokens, enrolments and publisher keys, in the database."""

    def __init__(self, database: Database, authority: Authority) -> None:
        self.certificates = Certificates(database, authority)
        self._database = database
        self._authority = authority

    # tokens

    def create_token(
        self, by: Principal, *, name: str, role: Role, tenant: str | None = None, device_id: str | None = None
    ) -> tuple[Token, str]:
        """Make a token; the secret is returned here and never again."""
        if role in PLATFORM_ROLES and by.tenant != DEFAULT_TENANT:
            raise NotAllowedError(
                f"a {role} token serves every tenant", remedy="an administrator of the platform may make one"
            )
        with self._database.write() as session:
            return self._add_token(session, by, name=name, role=role, tenant=tenant, device_id=device_id)

    def list_tokens(self, tenant: str) -> list[Token]:
        """All tokens that still work, devices' included."""
        with self._database.read() as session:
            query = select(Token).where(Token.tenant == tenant, Token.revoked_at.is_(None))
            return list(session.scalars(query.order_by(Token.created_at)))

    def revoke_token(self, by: Principal, token_id: str) -> None:
        """Make a token worthless."""
        with self._database.write() as session:
            token = session.get(Token, token_id)
            if token is None or token.tenant != by.tenant or token.revoked_at is not None:
                raise NotFoundError(f"token {token_id!r} does not exist", remedy="see: foreshore tokens")
            token.revoked_at = datetime.now(UTC)
            audit.record(session, tenant=by.tenant, actor=by.subject, action="token.revoke", subject=token_id)

    def find_principal(self, secret: str) -> Principal | None:
        """Whose token this is, or None when nobody's (or no longer)."""
        if not secret or len(secret) > MAX_TOKEN_CHARS:
            return None
        with self._database.read() as session:
            token = session.scalar(select(Token).where(Token.secret_digest == _digest(secret)))
            if token is None or token.revoked_at is not None:
                return None
            if token.expires_at is not None and token.expires_at < datetime.now(UTC):
                return None
            return Principal(token.tenant, token.name, Role(token.role), token.token_id, token.device_id)

    def get_principal(self, secret: str) -> Principal:
        """Whose token this is; `NotAuthenticatedError` otherwise."""
        principal = self.find_principal(secret)
        if principal is None:
            raise NotAuthenticatedError("this token is unknown, revoked or expired", remedy="log in: foreshore login")
        return principal

    def get_device(self, peer: PeerCertificate) -> Principal:
        """The device that showed this certificate; `NotAuthenticatedError` otherwise."""
        holder = self.certificates.get_holder(peer)
        name = f"device:{holder.device_id}"
        return Principal(holder.tenant, name, Role.DEVICE, f"certificate:{holder.serial}", holder.device_id)

    # enrolment

    def create_enrolment(
        self, by: Principal, *, device_id: str, tenant: str | None = None, expires_s: int = ENROLMENT_S
    ) -> tuple[Enrolment, str]:
        """Allow one device to enrol once; the secret is returned here and never again.

        Behind the dot it carries the authority's fingerprint, so that the device knows whom it talks to from the start.
        """
        tenant = _own_tenant(by, tenant)
        check_user(topics.mqtt_user(tenant, device_id))
        if not 60 <= expires_s <= MAX_ENROLMENT_S:
            raise InvalidInputError(f"expires_s is {expires_s}", remedy=f"60 to {MAX_ENROLMENT_S} seconds")
        secret, now = f"fe_{secrets.token_urlsafe(32)}.{self._authority.fingerprint}", datetime.now(UTC)
        with self._database.write() as session:
            known = session.get(Device, (tenant, device_id))
            if known is not None and known.revoked_at is None:
                raise ConflictError(
                    f"device {device_id!r} is enrolled already", remedy="revoke it first, or choose another name"
                )
            row = Enrolment(
                enrolment_id=new_id("enr"),
                tenant=tenant,
                device_id=device_id,
                secret_digest=_digest(secret),
                created_at=now,
                expires_at=now + timedelta(seconds=expires_s),
            )
            session.add(row)
            audit.record(session, tenant=tenant, actor=by.subject, action="enrolment.create", subject=device_id)
        return row, secret

    def tenant_of_enrolment(self, secret: str) -> str:
        """Where this enrolment leads, without spending it; raises as `enrol` does."""
        with self._database.read() as session:
            return _usable(session, secret, datetime.now(UTC)).tenant

    def enrol(self, secret: str, csr_pem: str, hardware: dict[str, Any]) -> tuple[Device, Issued, str]:
        """Spend an enrolment: the device's row, its certificate and its API token. All or nothing."""
        with self._database.write() as session:
            now = datetime.now(UTC)
            row = _usable(session, secret, now)
            issued = self.certificates.issue(session, row.tenant, row.device_id, csr_pem)
            row.used_at = now
            device = self._put_device(session, row, issued, hardware, now)
            by = Principal(row.tenant, f"enrolment:{row.enrolment_id}", Role.ADMIN, "")
            name = f"device:{row.device_id}"
            _, token = self._add_token(session, by, name=name, role=Role.DEVICE, device_id=row.device_id)
            audit.record(
                session,
                tenant=row.tenant,
                actor=by.subject,
                action="device.enrol",
                subject=row.device_id,
                details={"certificate_serial": issued.serial},
            )
            announce(session, "device", row.tenant, {"device_id": row.device_id, "enrolled": True})
        return device, issued, token

    def revoke_device(self, by: Principal, device_id: str) -> None:
        """Take a device out: its token and certificates die here, its place at the broker by the caller."""
        with self._database.write() as session:
            device = session.get(Device, (by.tenant, device_id))
            if device is None or device.revoked_at is not None:
                raise NotFoundError(f"device {device_id!r} does not exist", remedy="see: foreshore devices")
            now = datetime.now(UTC)
            device.revoked_at, device.online = now, False
            query = select(Token).where(Token.tenant == by.tenant, Token.device_id == device_id)
            for token in session.scalars(query.where(Token.revoked_at.is_(None))):
                token.revoked_at = now
            revoke_all(session, by.tenant, device_id, now)
            audit.record(session, tenant=by.tenant, actor=by.subject, action="device.revoke", subject=device_id)
            announce(session, "device", by.tenant, {"device_id": device_id, "revoked": True})

    def _add_token(
        self,
        session: Session,
        by: Principal,
        *,
        name: str,
        role: Role,
        tenant: str | None = None,
        device_id: str | None = None,
    ) -> tuple[Token, str]:
        tenant = _own_tenant(by, tenant)
        secret = "fs_" + secrets.token_urlsafe(32)
        token = Token(
            token_id=new_id("tok"),
            tenant=topics.check_name("tenant", tenant),
            name=name,
            role=role.value,
            secret_digest=_digest(secret),
            device_id=device_id,
            created_at=datetime.now(UTC),
        )
        session.add(token)
        audit.record(
            session,
            tenant=tenant,
            actor=by.subject,
            action="token.create",
            subject=token.token_id,
            details={"name": name, "role": role.value},
        )
        return token, secret

    @staticmethod
    def _put_device(
        session: Session, row: Enrolment, issued: Issued, hardware: dict[str, Any], now: datetime
    ) -> Device:
        device = session.get(Device, (row.tenant, row.device_id))
        if device is None:
            device = Device(tenant=row.tenant, device_id=row.device_id, generation=0, online=False, boot_epoch=0)
            session.add(device)
        elif device.revoked_at is None:
            raise ConflictError(f"device {row.device_id!r} is enrolled already", remedy="revoke it first")
        device.enrolled_at, device.revoked_at = now, None
        device.certificate_serial = issued.serial
        device.hardware = hardware
        device.desired_models, device.desired_envelope, device.attempts, device.reported = [], None, {}, None
        device.boot_epoch = 0
        store_facts(session, device, set())
        return device


def _usable(session: Session, secret: str, now: datetime) -> Enrolment:
    row = session.scalar(select(Enrolment).where(Enrolment.secret_digest == _digest(secret[:MAX_TOKEN_CHARS])))
    if row is None or row.used_at is not None or row.expires_at < now:
        raise NotAuthenticatedError(
            "this enrolment token is unknown, used or expired", remedy="make a new one: foreshore enrolments"
        )
    return row


def new_id(kind: str) -> str:
    """A new identifier that sorts by nothing and collides never."""
    return f"{kind}-{uuid.uuid4().hex[:20]}"


def _own_tenant(by: Principal, tenant: str | None) -> str:
    if tenant is None or tenant == by.tenant:
        return by.tenant
    if not (by.has(Role.ADMIN) and by.tenant == DEFAULT_TENANT):
        raise NotAllowedError(f"tenant {tenant!r} is not yours", remedy="an administrator of the platform may do this")
    return topics.check_name("tenant", tenant)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
