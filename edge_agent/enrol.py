"""Enrolment: make a key that never leaves the device, send a certificate request and the one-time token, keep what
comes back (0600).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from edge_agent.agent import hardware
from edge_agent.config import Home, Identity, Profile
from wire.errors import ConflictError, InvalidInputError, NotAuthenticatedError, UnavailableError
from wire.process import replace_durably

TIMEOUT_S = 20.0


def enrol(home: Home, url: str, token: str, profile: Profile) -> Identity:
    """Trade `token` for an identity; everything is on disk when this returns, the identity last."""
    if home.identity_file.exists():
        raise ConflictError(f"{home.path} is enrolled already", remedy="use another folder or delete this one")
    home.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "device")])  # the control plane puts the real name in
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    answer = _post(url, token, request.public_bytes(Encoding.PEM).decode(), profile)
    try:
        identity = Identity(
            tenant=answer["tenant"],
            device_id=answer["device_id"],
            control_url=url.rstrip("/"),
            gateway_url=answer.get("gateway_url"),
            device_token=answer["device_token"],
            mqtt=answer["mqtt"],
            trust=answer["trust"],
        )
        certificate, authority = str(answer["certificate_pem"]), str(answer["ca_pem"])
    except (KeyError, TypeError, ValidationError) as error:
        raise InvalidInputError(f"the control plane's answer is malformed: {error}", remedy="check --url") from error
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    document = yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False)
    files: list[tuple[Path, bytes]] = [
        (home.key_file, secret),
        (home.certificate_file, certificate.encode()),
        (home.ca_file, authority.encode()),
        (home.profile_file, document.encode()),
        (home.identity_file, identity.model_dump_json(indent=1).encode()),
    ]
    for path, data in files:
        replace_durably(path, data, mode=0o600)
    return identity


def _post(url: str, token: str, csr_pem: str, profile: Profile) -> dict[str, Any]:
    told = hardware(profile).model_dump(mode="json", exclude_none=True)
    body = {"enrolment_token": token, "csr_pem": csr_pem, "hardware": told}
    try:
        answer = httpx.post(f"{url.rstrip('/')}/api/v1/enrol", json=body, timeout=TIMEOUT_S)
    except httpx.HTTPError as error:
        raise UnavailableError(f"{url} does not answer: {error}", remedy="check --url") from error
    if answer.status_code in {401, 403, 404}:
        raise NotAuthenticatedError(f"the enrolment token is refused: {answer.text[:300]}", remedy="ask for a new one")
    if answer.status_code >= 400:
        raise InvalidInputError(f"enrolment failed ({answer.status_code}): {answer.text[:300]}", remedy="see above")
    return dict(answer.json())
