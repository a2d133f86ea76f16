"""Devices' certificates: issued, renewed, confirmed, revoked, and asked about on every request.

A device may hold two for a while: the one it has and the one it just asked for. The old one dies when the device shows
the new one (`confirm`), so that a device that is killed anywhere in between always holds one that works. A certificate
that is not in this table is nobody's, whoever signed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from cloud.control import audit
from cloud.control.authority import Authority, Issued
from cloud.control.database import Database
from cloud.control.tables import Device, DeviceCertificate
from wire import topics
from wire.errors import NotAuthenticatedError, NotFoundError

MAX_UNCONFIRMED = 8  # a device that asks again and again without showing what it got loses the oldest


@dataclass(frozen=True)
class PeerCertificate:
    """What TLS says about the other side: the serial number of a certificate of ours, in lower-case hex."""

    serial: str


@dataclass(frozen=True)
class Holder:
    """The device that a certificate belongs to."""

    tenant: str
    device_id: str
    serial: str


class Certificates:
    """The certificates of all devices."""

    def __init__(self, database: Database, authority: Authority) -> None:
        self._database = database
        self._authority = authority

    def issue(self, session: Session, tenant: str, device_id: str, csr_pem: str) -> Issued:
        """A certificate for the key behind `csr_pem`, within the caller's transaction."""
        issued = self._authority.issue_device(topics.mqtt_user(tenant, device_id), csr_pem)
        session.add(
            DeviceCertificate(
                serial=issued.serial,
                tenant=tenant,
                device_id=device_id,
                issued_at=issued.issued_at,
                expires_at=issued.expires_at,
            )
        )
        return issued

    def renew(self, holder: Holder, csr_pem: str) -> Issued:
        """A second certificate for a device that shows one it has; the first lives on until `confirm`."""
        with self._database.write() as session:
            _get_device(session, holder)
            issued = self.issue(session, holder.tenant, holder.device_id, csr_pem)
            session.flush()
            waiting = [one for one in _living(session, holder) if one.serial not in (holder.serial, issued.serial)]
            for one in waiting[:-MAX_UNCONFIRMED]:
                one.revoked_at = datetime.now(UTC)
            audit.record(
                session, tenant=holder.tenant, actor=f"device:{holder.device_id}", action="certificate.renew",
                subject=holder.device_id, details={"certificate_serial": issued.serial},
            )  # fmt: skip
        return issued

    def confirm(self, holder: Holder) -> bool:
        """The device shows its new certificate: all others of its die. Whether any did."""
        with self._database.write() as session:
            device = _get_device(session, holder)
            others = [one for one in _living(session, holder) if one.serial != holder.serial]
            if not others:
                return False
            for one in others:
                one.revoked_at = datetime.now(UTC)
            device.certificate_serial = holder.serial
            audit.record(
                session, tenant=holder.tenant, actor=f"device:{holder.device_id}", action="certificate.confirm",
                subject=holder.device_id, details={"certificate_serial": holder.serial},
            )  # fmt: skip
        return True

    def get_holder(self, peer: PeerCertificate) -> Holder:
        """Whose certificate this is; `NotAuthenticatedError` when it is unknown, revoked or past its time."""
        with self._database.read() as session:
            row = session.get(DeviceCertificate, peer.serial)
            if row is None or row.revoked_at is not None or row.expires_at < datetime.now(UTC):
                raise NotAuthenticatedError(
                    "this certificate is unknown, revoked or expired", remedy="enrol the device again"
                )
            return Holder(row.tenant, row.device_id, row.serial)

    def revoked(self) -> list[str]:
        """Serial numbers for the revocation list: revoked before their time, and not past it yet."""
        query = select(DeviceCertificate.serial).where(
            DeviceCertificate.revoked_at.is_not(None), DeviceCertificate.expires_at > datetime.now(UTC)
        )
        with self._database.read() as session:
            return list(session.scalars(query))


def revoke_all(session: Session, tenant: str, device_id: str, at: datetime) -> None:
    """Take every certificate of a device back, within the caller's transaction."""
    mine = (DeviceCertificate.tenant == tenant, DeviceCertificate.device_id == device_id)
    session.execute(
        update(DeviceCertificate).where(*mine, DeviceCertificate.revoked_at.is_(None)).values(revoked_at=at)
    )


def _living(session: Session, holder: Holder) -> list[DeviceCertificate]:
    query = select(DeviceCertificate).where(
        DeviceCertificate.tenant == holder.tenant,
        DeviceCertificate.device_id == holder.device_id,
        DeviceCertificate.revoked_at.is_(None),
    )
    return list(session.scalars(query.order_by(DeviceCertificate.issued_at)))


def _get_device(session: Session, holder: Holder) -> Device:
    device = session.get(Device, (holder.tenant, holder.device_id))
    if device is None or device.revoked_at is not None:
        raise NotFoundError(f"device {holder.device_id!r} does not exist", remedy="enrol it again")
    return device
