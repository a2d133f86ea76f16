"""Enrolments and tokens: who may come in."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from cloud.control.api.base import (
    Admin,
    Body,
    Cursor,
    Device,
    Gateway,
    Limit,
    Operator,
    Plane,
    Viewer,
    address_of,
    page,
)
from cloud.control.certificates import Holder
from cloud.control.identity import ENROLMENT_S, Principal, Role
from wire.errors import InvalidInputError, NotAuthenticatedError
from wire.messages import Hardware, Name

router = APIRouter()


class EnrolmentOrder(Body):
    """Which device may enrol, and until when."""

    device_id: Name
    tenant: Name | None = None
    expires_s: Annotated[int, Field(ge=60, le=30 * 24 * 3600)] = ENROLMENT_S


class EnrolRequest(Body):
    """A device's request for its certificate."""

    enrolment_token: Annotated[str, Field(min_length=1, max_length=200)]
    csr_pem: Annotated[str, Field(min_length=1, max_length=16 * 1024)]
    hardware: Hardware | None = None


class RenewalRequest(Body):
    """A device's request for its next certificate."""

    csr_pem: Annotated[str, Field(min_length=1, max_length=16 * 1024)]


class TokenOrder(Body):
    """A new API token."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+$")]
    role: Role
    tenant: Name | None = None


class TokenQuestion(Body):
    """A token to be looked up."""

    token: Annotated[str, Field(max_length=512)]


@router.post("/enrolments", status_code=201)
def create_enrolment(order: EnrolmentOrder, request: Request, plane: Plane, by: Operator) -> dict[str, Any]:
    """Allow one device to enrol once; the token is shown here and never again."""
    row, secret = plane.identity.create_enrolment(
        by, device_id=order.device_id, tenant=order.tenant, expires_s=order.expires_s
    )
    url = plane.device_url or str(request.base_url).rstrip("/")
    return {
        "enrolment_token": secret,
        "device_id": row.device_id,
        "tenant": row.tenant,
        "expires_at": row.expires_at.isoformat(),
        "command": f"foreshore-agent enrol --url {url} --token {secret}",
    }


@router.get("/authority")
def authority(plane: Plane) -> dict[str, str]:
    """The certificate authority that devices trust; an enrolment token carries its fingerprint."""
    return {"ca_pem": plane.authority.ca_pem, "fingerprint": plane.authority.fingerprint}


@router.post("/enrol", status_code=201)
def enrol(order: EnrolRequest, request: Request, plane: Plane) -> dict[str, Any]:
    """Spend an enrolment token: a certificate, a device token, and the root of trust."""
    hardware = order.hardware.model_dump(mode="json", exclude_none=True) if order.hardware else {}
    address = address_of(request)
    plane.guesses.check(address, order.enrolment_token)
    try:
        root = plane.trust.newest_root(plane.identity.tenant_of_enrolment(order.enrolment_token))
        device, issued, token = plane.identity.enrol(order.enrolment_token, order.csr_pem, hardware)
    except NotAuthenticatedError:
        plane.guesses.note_wrong(address, order.enrolment_token)
        raise
    plane.refresh_access()
    return {
        "tenant": device.tenant,
        "device_id": device.device_id,
        "certificate_pem": issued.certificate_pem,
        "ca_pem": plane.authority.ca_pem,
        "control_url": plane.device_url,
        "mqtt": {
            "host": plane.mqtt_host,
            "port": plane.mqtt_port,
            "client_id": plane.client_id(device.tenant, device.device_id),
        },
        "gateway_url": plane.settings.gateway_url,
        "device_token": token,
        "trust": {"root": base64.b64encode(root).decode(), "time": datetime.now(UTC).isoformat(timespec="seconds")},
    }


@router.post("/device/certificate", status_code=201)
def renew_certificate(order: RenewalRequest, plane: Plane, by: Device) -> dict[str, str]:
    """The device's next certificate. The one it shows stays good until it confirms."""
    issued = plane.renew_certificate(_holder(by), order.csr_pem)
    return {"certificate_pem": issued.certificate_pem, "expires_at": issued.expires_at.isoformat()}


@router.post("/device/certificate/confirm", status_code=204)
def confirm_certificate(plane: Plane, by: Device) -> None:
    """The device shows its new certificate: every other of its is revoked."""
    plane.confirm_certificate(_holder(by))


@router.get("/tokens")
def list_tokens(plane: Plane, by: Admin, limit: Limit = 100, cursor: Cursor = 0) -> dict[str, Any]:
    """Tokens that work, without their secrets."""
    rows = plane.identity.list_tokens(by.tenant)[cursor : cursor + limit + 1]
    items = [
        {"token_id": row.token_id, "name": row.name, "role": row.role, "tenant": row.tenant,
         "device_id": row.device_id, "created_at": row.created_at.isoformat()}
        for row in rows
    ]  # fmt: skip
    return page(items, limit, cursor)


@router.post("/tokens", status_code=201)
def create_token(order: TokenOrder, plane: Plane, by: Admin) -> dict[str, Any]:
    """Make a token; the secret is shown here and never again."""
    if order.role is Role.DEVICE:
        raise InvalidInputError("device tokens come from enrolment", remedy="POST /enrolments")
    row, secret = plane.identity.create_token(by, name=order.name, role=order.role, tenant=order.tenant)
    return {"token_id": row.token_id, "name": row.name, "role": row.role, "tenant": row.tenant, "token": secret}


@router.delete("/tokens/{token_id}", status_code=204)
def revoke_token(token_id: str, plane: Plane, by: Admin) -> None:
    """Make a token worthless."""
    plane.identity.revoke_token(by, token_id)


@router.post("/tokens/introspect")
def introspect(question: TokenQuestion, plane: Plane, by: Gateway) -> dict[str, Any]:
    """Whose token this is (RFC 7662 in spirit)."""
    found = plane.identity.find_principal(question.token)
    if found is None:
        return {"active": False, "tenant": None, "subject": None, "role": None}
    return {"active": True, "tenant": found.tenant, "subject": found.subject, "role": found.role.value}


@router.get("/whoami")
def whoami(plane: Plane, by: Viewer) -> dict[str, Any]:
    """The token's own tenant, name and role."""
    return {"tenant": by.tenant, "subject": by.subject, "role": by.role.value}


def _holder(by: Principal) -> Holder:
    return Holder(by.tenant, by.device_id or "", by.token_id.removeprefix("certificate:"))
