"""The control plane's application in this process, without broker and clock: for tests that only ask the API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from cloud.control.api.base import DOOR, PEER
from cloud.control.app import create_app, stop_streams
from cloud.control.certificates import PeerCertificate
from cloud.control.identity import SYSTEM, Principal, Role
from cloud.control.plane import ControlPlane
from cloud.control.settings import Settings

OPTIONS: dict[str, Any] = {
    "raise_server_exceptions": False, "follow_redirects": False, "client": ("127.0.0.1", 50000),
}  # fmt: skip
LADDER = ("viewer", "operator", "publisher", "admin")


class ControlApp:
    """One application on a fresh home. Event streams end at once, so that every request does."""

    def __init__(self, home: Path) -> None:
        self.app: FastAPI = create_app(Settings(home=home))
        self.plane: ControlPlane = self.app.state.plane
        stop_streams(self.app)
        self._secrets: dict[tuple[str, str], str] = {}
        self._serials: dict[tuple[str, str], str] = {}

    def token(self, role: str, tenant: str = "default") -> str:
        """An API token with this role."""
        if (role, tenant) not in self._secrets:
            _, secret = self.plane.identity.create_token(
                SYSTEM, name=f"{tenant}-{role}", role=Role(role), tenant=tenant
            )
            self._secrets[role, tenant] = secret
        return self._secrets[role, tenant]

    def enrol(self, device_id: str, tenant: str = "default") -> dict[str, str]:
        """Enrol a device; its token and its certificate's serial number."""
        by = Principal(tenant, "tests", Role.ADMIN, "")
        _, secret = self.plane.identity.create_enrolment(by, device_id=device_id)
        _, issued, token = self.plane.identity.enrol(secret, certificate_request(), {})
        self._serials[device_id, tenant] = issued.serial
        return {"token": token, "serial": issued.serial}

    def client(self, role: str = "none", tenant: str = "default") -> TestClient:
        """A client of the people's door: a role's token, or none."""
        headers = {} if role == "none" else {"authorization": f"Bearer {self.token(role, tenant)}"}
        return TestClient(self.app, headers=headers, **OPTIONS)

    def client_with(self, secret: str) -> TestClient:
        """A client of the people's door with this token."""
        headers = {"authorization": f"Bearer {secret}"}
        return TestClient(self.app, headers=headers, **OPTIONS)

    def device_client(self, serial: str | None) -> TestClient:
        """A client of the devices' door whose TLS handshake showed this certificate, or none."""
        state = {DOOR: "device", PEER: PeerCertificate(serial) if serial else None}

        async def door(scope: Scope, receive: Receive, send: Send) -> None:
            await self.app({**scope, "state": state}, receive, send)

        return TestClient(door, **OPTIONS)

    def operations(self) -> Iterator[tuple[str, str]]:
        """Method and path of everything in the OpenAPI document."""
        for path, methods in self.app.openapi()["paths"].items():
            for method in methods:
                yield method.upper(), path

    def close(self) -> None:
        """Let the database go."""
        self.plane.database.dispose()


@contextmanager
def control_app(home: Path) -> Iterator[ControlApp]:
    """A `ControlApp` that is closed at the end."""
    app = ControlApp(home)
    try:
        yield app
    finally:
        app.close()


def certificate_request() -> str:
    """A certificate request of a new key, PEM."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "whatever")])
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.PEM).decode()


def ask(client: TestClient, method: str, path: str, body: Any = None) -> httpx.Response:
    """One request with a JSON body where the method has one."""
    json = ({} if body is None else body) if method in ("POST", "PUT") else None
    return client.request(method, path, json=json)
